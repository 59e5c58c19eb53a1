"""What one of mlx-lm's models looks like, from its caches and forwards that nobody evaluates."""

from __future__ import annotations

from typing import Any

from mlxpage.errors import UnsupportedModel
from mlxpage.metal.backend import mx
from mlxpage.metal.layout import LayerSpec, Spec, StateArray, StateSpec

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


Nesting = list[int | list[int | None] | None]
"""For each layer the number of its cache's spec, or those of several; None: it never fills it."""


def layer_specs(module, family: str) -> tuple[list[Spec], Nesting]:
    """What the layers' caches keep, from forwards that are never evaluated, and whose they are."""
    from mlx_lm.models.cache import CacheList, make_prompt_cache

    of_layers = make_prompt_cache(module)
    for cache in _flat(of_layers):
        _refuse_unknown(cache, family)
    module(mx.zeros((1, 1), mx.int32), cache=of_layers)
    filled = [cache for cache in _flat(of_layers) if not cache.empty()]
    states = [cache for cache in filled if _has_states(cache)]
    state_arrays = iter(_state_arrays(module, of_layers, states, family) if states else ())
    specs = [
        StateSpec(next(state_arrays))
        if _has_states(cache)
        else LayerSpec(
            window=getattr(cache, "max_size", None),
            kv_heads=cache.keys.shape[1],
            k_head_dim=cache.keys.shape[3],
            v_head_dim=cache.values.shape[3],
            dtype=cache.keys.dtype,
        )
        for cache in filled
    ]
    if not specs:
        raise UnsupportedModel(f"{family} has no layer that keeps what it has read")
    numbers = {id(cache): number for number, cache in enumerate(filled)}
    return specs, [
        [numbers.get(id(each)) for each in cache.caches]
        if isinstance(cache, CacheList)
        else numbers.get(id(cache))
        for cache in of_layers
    ]


def _flat(of_layers: list) -> list:
    from mlx_lm.models.cache import CacheList

    return [
        cache
        for of_layer in of_layers
        for cache in (of_layer.caches if isinstance(of_layer, CacheList) else [of_layer])
    ]


def _has_states(cache) -> bool:
    from mlx_lm.models.cache import ArraysCache

    return isinstance(cache, ArraysCache)


def _refuse_unknown(cache, family: str) -> None:
    from mlx_lm.models.cache import ArraysCache, ChunkedKVCache, KVCache, RotatingKVCache

    if type(cache) not in (KVCache, RotatingKVCache, ChunkedKVCache, ArraysCache):
        raise UnsupportedModel(
            f"{family} keeps what it has read in {type(cache).__name__}, which can't be paged "
            "yet; only K and V and states in mlx-lm's own caches can"
        )
    if getattr(cache, "keep", 0):
        raise UnsupportedModel(
            f"{family} keeps its first {cache.keep} positions beside a window, "
            "which can't be paged yet"
        )


_LONGEST_START = 64
"""Tokens after which a state has to have its full shape."""


def _state_arrays(
    module, caches: list, states: list, family: str
) -> list[tuple[StateArray | None, ...]]:
    """The arrays of each state, in caches that have had a forward of one token: more follow, until
    no shape changes."""
    shapes = [_shapes(states)]
    while len(shapes) < 2 or shapes[-1] != shapes[-2]:
        if len(shapes) == _LONGEST_START:
            raise UnsupportedModel(
                f"{family} keeps a state whose shape still changes after {_LONGEST_START} tokens, "
                "which can't be paged"
            )
        module(mx.zeros((1, 1), mx.int32), cache=caches)
        shapes.append(_shapes(states))
    return [
        tuple(
            None if array is None else StateArray(array, held.dtype, _growing(first, array))
            for first, array, held in zip(*before, state.cache, strict=True)
        )
        for *before, state in zip(shapes[0], shapes[-1], states, strict=True)
    ]


def _shapes(states: list) -> list[list[tuple[int, ...] | None]]:
    """Without the axis of the batch."""
    return [[array if array is None else array.shape[1:] for array in s.cache] for s in states]


def _growing(first: tuple[int, ...], last: tuple[int, ...]) -> int | None:
    """The axis along which a state grows."""
    return next(
        (i for i, pair in enumerate(zip(first, last, strict=True)) if len({*pair}) > 1), None
    )


def nested(caches: list, nesting: Nesting) -> list:
    """What each layer gets of `caches`, of which there is one for each spec."""

    def of(number: int | None):
        return None if number is None else caches[number]

    return [
        [of(n) for n in of_layer] if isinstance(of_layer, list) else of(of_layer)
        for of_layer in nesting
    ]


def attention_kinds(specs: list[Spec], config: dict[str, Any]) -> str:
    """What there is among a model's layers, such as "full, window and states" or "latent"."""
    rank = (config | (config.get("text_config") or {})).get("kv_lora_rank")

    def kind(spec: Spec) -> str:
        if isinstance(spec, StateSpec):
            return "states"
        # Families that make heads of the latent before their cache keep several.
        if spec.kv_heads == 1 and rank in (spec.k_head_dim, spec.v_head_dim):
            return "latent"
        return "full" if spec.window is None else "window"

    found = {kind(spec) for spec in specs}
    if "latent" in found:
        found.discard("full")  # keys that choose the positions which latents are read of
    *others, last = (name for name in ("latent", "full", "window", "states") if name in found)
    return f"{', '.join(others)} and {last}" if others else last


def logits_of(module) -> tuple[int, mx.Dtype]:
    logits = module(mx.zeros((1, 1), mx.int32))
    return logits.shape[-1], logits.dtype


def context_length(config: dict[str, Any]) -> int | None:
    for section in (config, config.get("text_config") or {}):
        for key in CONTEXT_KEYS:
            if isinstance(length := section.get(key), int) and length > 0:
                return length
    return None
