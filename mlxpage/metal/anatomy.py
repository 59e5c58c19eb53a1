"""What one of mlx-lm's models looks like, from its caches and forwards that nobody evaluates."""

from __future__ import annotations

from typing import Any

from mlxpage.errors import UnsupportedModel
from mlxpage.metal.backend import mx
from mlxpage.metal.layout import LayerSpec

# What the families call the longest sequence they were trained for.
CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "n_ctx",
)


def refuse_dynamic_rope(module, family: str) -> None:
    if any(type(part).__name__ == "DynamicNTKScalingRoPE" for _, part in module.named_modules()):
        raise UnsupportedModel(
            f"{family} has dynamic NTK RoPE, which depends on the length of a forward; "
            "here a forward has rows of several sequences"
        )


def layer_specs(module, family: str) -> tuple[list[LayerSpec], list[int | None]]:
    """Window, heads and dtype of every layer's cache, from a forward that is never evaluated. And
    how many of them each layer has in a list, None if it has one and no list."""
    from mlx_lm.models.cache import CacheList, ChunkedKVCache, RotatingKVCache, make_prompt_cache
    from mlx_lm.models.cache import KVCache as DenseCache

    of_layers = make_prompt_cache(module)
    nesting = [len(c.caches) if isinstance(c, CacheList) else None for c in of_layers]
    caches = [
        cache
        for of_layer in of_layers
        for cache in (of_layer.caches if isinstance(of_layer, CacheList) else [of_layer])
    ]
    for cache in caches:
        if type(cache) not in (DenseCache, RotatingKVCache, ChunkedKVCache):
            raise UnsupportedModel(
                f"{family} keeps its state in {type(cache).__name__}, "
                "which can't be paged yet; only attention layers with K and V can"
            )
        if getattr(cache, "keep", 0):
            raise UnsupportedModel(
                f"{family} keeps its first {cache.keep} positions beside a window, "
                "which can't be paged yet"
            )
    module(mx.zeros((1, 1), mx.int32), cache=of_layers)
    if any(cache.keys is None for cache in caches):
        raise UnsupportedModel(
            f"{family} has layers that never fill their cache, which can't be paged yet"
        )
    if any(cache.values.shape[3] == 0 for cache in caches):
        raise UnsupportedModel(
            f"{family} has layers that keep K without V, which can't be paged yet"
        )
    return [
        LayerSpec(
            window=getattr(cache, "max_size", None),
            kv_heads=cache.keys.shape[1],
            k_head_dim=cache.keys.shape[3],
            v_head_dim=cache.values.shape[3],
            dtype=cache.keys.dtype,
        )
        for cache in caches
    ], nesting


def nested(caches: list, nesting: list[int | None]) -> list:
    """One cache, or a list of them, for each layer."""
    rest = iter(caches)
    return [next(rest) if n is None else [next(rest) for _ in range(n)] for n in nesting]


def logits_of(module) -> tuple[int, mx.Dtype]:
    logits = module(mx.zeros((1, 1), mx.int32))
    return logits.shape[-1], logits.dtype


def context_length(config: dict[str, Any]) -> int | None:
    for section in (config, config.get("text_config") or {}):
        for key in CONTEXT_KEYS:
            if isinstance(length := section.get(key), int) and length > 0:
                return length
    return None
