"""Where mlx-lm's models meet the pool: one function of MLX, looked up by mlx-lm at call time.

The models call `mx.fast.scaled_dot_product_attention(q, k, v, ...)`. With the hook in its place,
calls whose K, V and mask come tagged from the same LayerCache read the pool; every other call in
the process goes to MLX's own function untouched.
"""

from __future__ import annotations

from mlxpage.metal.backend import mx
from mlxpage.metal.layer_cache import LayerCache
from mlxpage.metal.tagged import MaskTag, Scores, Tagged, TaggedV

_dense_attention = mx.fast.scaled_dot_product_attention


def install() -> None:
    """Puts the hook in place; again does nothing."""
    if mx.fast.scaled_dot_product_attention is not _attention:
        mx.fast.scaled_dot_product_attention = _attention


def is_installed() -> bool:
    return mx.fast.scaled_dot_product_attention is _attention


def _attention(q, k, v, *args, scale=None, mask=None, sinks=None, **options):
    layer = k.tag if type(k) is Tagged else None
    if isinstance(layer, LayerCache) and not args and not options:
        if type(v) is TaggedV and v.tag is layer:
            # No mask for a single row and "causal" are what the rows' own positions say anyway.
            own = isinstance(mask, str) or (mask is None and q.shape[2] == 1)
            tag = MaskTag(layer.step, layer.step.window) if own else getattr(mask, "tag", None)
            if isinstance(tag, MaskTag) and tag.step is layer.step:
                return layer.attend(q, tag.window, scale, sinks)
        elif v is k and sinks is None and _is_latent(q, mask, layer):
            return layer.attend_latent(q, mask.q, scale)
    return _dense_attention(q, k, v, *args, scale=scale, mask=mask, sinks=sinks, **options)


def _is_latent(q: mx.array, mask, layer: LayerCache) -> bool:
    """Whether the mask is nothing but scores of single rows that the layer's V takes part in."""
    if type(mask) is not Scores or mask.tag is not layer or layer.step.window is not None:
        return False
    return q.shape[2] == 1 and mask.q.shape[:3] == q.shape[:3]
