"""Random cases for the kernels, what is exact for them, and the kernels run on them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from unittest.mock import patch

import metal_sim
import numpy as np
from metal.test_reference import Case, make

from mlxpage.metal import kernels
from mlxpage.metal.backend import mx
from mlxpage.metal.kernels import attention, latent, launch, moving, work
from mlxpage.metal.layout import Blocks, Format, PoolKind
from mlxpage.metal.quantised import dequantised, quantise, quantised_blocks

# Of the norm, over inputs that are rounded to the type first.
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1e-2}
ONE_RUN = 2**30
FENCE = mx.zeros(8, mx.int32)


@contextmanager
def fresh_kernels() -> Iterator[None]:
    """Kernels are made anew, of whatever `mx.fast.metal_kernel` and the texts are now, and may
    write to their pools."""
    forget()
    try:
        with metal_sim.options(writable=("k_pool", "v_pool")):
            yield
    finally:
        forget()


def forget(but: tuple = ()) -> None:
    for module in (attention, latent, launch, moving, work):
        for name, function in vars(module).items():
            if hasattr(function, "cache_clear") and name not in but:
                function.cache_clear()


@contextmanager
def cut(run_length: int = ONE_RUN, cuda: bool = False) -> Iterator[None]:
    """How keys are cut into runs, and which GPU's tiling is taken."""

    def tiling(*arguments):
        return kernels.tiling(*arguments[:-1], cuda)

    def latent_tiling(*arguments):
        return kernels.latent_tiling(*arguments[:-1], cuda)

    with ExitStack() as stack:
        stack.callback(forget, but=("_kernel",))
        stack.enter_context(patch.object(work, "_run_length", lambda *_: run_length))
        for module in (work, attention):
            stack.enter_context(patch.object(module, "tiling", tiling))
        for module in (work, latent):
            stack.enter_context(patch.object(module, "latent_tiling", latent_tiling))
        forget(but=("_kernel",))
        yield


@contextmanager
def text_changed(file: str, old: str, new: str) -> Iterator[None]:
    """Kernels are made of another text."""
    text = launch._text

    def changed(name: str) -> str:
        return text(name).replace(old, new) if name == file else text(name)

    with patch.object(launch, "_text", changed):
        launch._kernel.cache_clear()
        try:
            yield
        finally:
            launch._kernel.cache_clear()


# -- cases --


def cover(
    values: dict[str, list], strength: int, allowed: Callable[[dict], bool]
) -> list[dict[str, object]]:
    """Settings in which every `strength` values of different names come together, if allowed."""
    missing = {
        chosen: None
        for names in itertools.combinations(values, strength)
        for chosen in itertools.product(*([(name, v) for v in values[name]] for name in names))
        if allowed(dict(chosen))
    }
    order, rng = list(values), random.Random(0)
    settings = []
    while missing:
        setting = dict(next(iter(missing)))
        for name in sorted(set(values) - set(setting), key=lambda n: (-len(values[n]), n)):
            choices = [value for value in values[name] if allowed({**setting, name: value})]
            rng.shuffle(choices)
            met = [
                sum(1 for _ in _met(setting, name, v, strength, order, missing)) for v in choices
            ]
            setting[name] = choices[int(np.argmax(met))]
        for chosen in itertools.combinations([(n, setting[n]) for n in order], strength):
            missing.pop(chosen, None)
        settings.append({name: setting[name] for name in order})
    return settings


def _met(setting: dict, name: str, value, strength: int, order: list[str], missing) -> Iterator:
    """What is still missing of the combinations that a value completes."""
    for others in itertools.combinations(setting, strength - 1):
        names = sorted([*others, name], key=order.index)
        chosen = tuple((n, value if n == name else setting[n]) for n in names)
        if chosen in missing:
            yield chosen


def rounded(array: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """In float64, as near as `dtype` comes."""
    return np.array(mx.array(array.astype(np.float32)).astype(dtype).astype(mx.float32), np.float64)


def rounded_case(case: Case, dtype: mx.Dtype, kv_dtype: mx.Dtype) -> Case:
    """A case whose numbers these types hold."""
    return replace(
        case,
        q=rounded(case.q, dtype),
        keys=[rounded(keys, kv_dtype) for keys in case.keys],
        values=[rounded(values, kv_dtype) for values in case.values],
        sinks=None if case.sinks is None else rounded(case.sinks, dtype),
    )


def case(rng, sequences, dtype=mx.float32, kv_dtype=None, **options) -> Case:
    """`make` with rounded numbers, and with NaN wherever nothing may be read."""
    made = make(rng, sequences, garbage=np.nan, **options)
    return rounded_case(made, dtype, kv_dtype or dtype)


def coded_case(case: Case, kv_dtype: mx.Dtype, bits: tuple[int | None, int | None]) -> Case:
    """A case whose K and V are what a pool with codes of so many bits makes of them."""

    def coded(rows: np.ndarray, bits: int | None) -> np.ndarray:
        if not bits:
            return rows
        part = Format(rows.shape[-1], kv_dtype, bits)
        words = quantise(array(rows, kv_dtype), part)
        # Of a block with one position, in float32: attention doesn't round what it reads.
        return floats(dequantised(words, part, 1, mx.float32)[..., 0, :])

    return replace(
        case,
        keys=[coded(keys, bits[0]) for keys in case.keys],
        values=[coded(values, bits[1]) for values in case.values],
    )


def exact(case: Case, softcap: float = 0.0) -> np.ndarray:
    """The definition in float64, a row of all heads at a time: (T, heads, v_dim)."""
    heads, kv_heads = case.q.shape[1], case.keys[0].shape[1]
    out = []
    for (context, rows), keys, values in zip(case.sequences, case.keys, case.values, strict=True):
        for position in range(context - rows, context):
            first = 0 if case.window is None else max(0, position - case.window + 1)
            q = case.q[len(out)].reshape(kv_heads, heads // kv_heads, -1)
            scores = case.scale * q @ keys[first : position + 1].transpose(1, 2, 0)
            if softcap:
                scores = softcap * np.tanh(scores / softcap)
            sinks = np.full(heads, -np.inf) if case.sinks is None else case.sinks
            sinks = sinks.reshape(kv_heads, -1, 1)
            largest = np.maximum(scores.max(axis=-1, keepdims=True), sinks)
            weights = np.exp(scores - largest)
            total = weights.sum(axis=-1, keepdims=True) + np.exp(sinks - largest)
            attended = weights @ values[first : position + 1].swapaxes(0, 1) / total
            out.append(attended.reshape(heads, -1))
    return np.array(out)


# -- the kernels --


def array(values: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(values.astype(np.float32)).astype(dtype)


def floats(result: mx.array) -> np.ndarray:
    return np.array(result.astype(mx.float32), np.float64)


def attended(
    case: Case,
    dtype: mx.Dtype,
    kv_dtype: mx.Dtype,
    *,
    softcap: float = 0.0,
    split: bool = False,
    bits: tuple[int | None, int | None] = (None, None),
    append: bool = False,
) -> np.ndarray:
    """What `kernels.paged_attention` makes of a case, its K and V in codes of so many bits. With
    `append`, the rows' own K and V aren't in the pools before, but are after it."""
    planned = kernels.plan_work(
        case.starts, case.contexts, case.tables, case.block_size, case.window, work.RunCost(1, 1, 1)
    )
    assert (planned.partial_rows > 0) == split, "the case has as many runs as it is meant to have"
    pools, new = [case.k_pool, case.v_pool], None
    if append:
        at = slots(case)
        new = tuple(array(pool[at], kv_dtype)[:, :, None] for pool in pools)
        pools = [without(pool, at) for pool in pools]
    blocks = blocks_of(*pools, kv_dtype, bits)
    expected = blocks_of(case.k_pool, case.v_pool, kv_dtype, bits)
    out, fence = kernels.paged_attention(
        array(case.q, dtype)[:, :, None],
        blocks,
        planned,
        FENCE,
        scale=case.scale,
        sinks=None if case.sinks is None else array(case.sinks, dtype),
        softcap=softcap,
        new=new,
    )
    assert out.dtype == dtype
    mx.eval(out, fence)
    assert fence.dtype == mx.int32 and fence.size >= 8
    for pool, then in zip(blocks[:2], expected[:2], strict=True):
        assert np.array_equal(contents(pool), contents(then)), "the pools are as they should be"
    return floats(out[:, :, 0])


def blocks_of(k_pool: np.ndarray, v_pool: np.ndarray, dtype: mx.Dtype, bits) -> Blocks:
    """Evaluated, of pools (num_blocks + 1, kv_heads, block_size, head_dim)."""
    formats = [
        Format(pool.shape[-1], dtype, each)
        for pool, each in zip((k_pool, v_pool), bits, strict=True)
    ]
    arrays = [
        quantised_blocks(array(pool, dtype), part) if part.bits else array(pool, dtype)
        for pool, part in zip((k_pool, v_pool), formats, strict=True)
    ]
    mx.eval(arrays)
    return Blocks(*arrays, PoolKind(*k_pool.shape[1:3], *formats))


def contents(pool: mx.array) -> np.ndarray:
    return np.array(pool.view(mx.uint8))


def slots(case: Case) -> tuple:
    """Where the last positions of a case's sequences lie in the pools."""
    last = case.contexts - 1
    blocks = case.tables[np.arange(len(last)), last // case.block_size]
    return blocks, slice(None), last % case.block_size


def without(pool: np.ndarray, at: tuple) -> np.ndarray:
    pool = pool.copy()
    pool[at] = np.nan
    return pool


def error(out: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(out - expected) / np.linalg.norm(expected))
