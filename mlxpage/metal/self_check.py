"""Before a model serves: does it compute over the pool what mlx-lm computes without one?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import NamedTuple

import numpy as np

from mlxpage.errors import InvalidModel, MlxpageError, OutOfMemory, UnsupportedModel
from mlxpage.metal import kernels, reference, seam
from mlxpage.metal.backend import mx
from mlxpage.metal.kv_cache import KVCache
from mlxpage.metal.layout import (
    Attention,
    LayerSpec,
    PoolKind,
    Rows,
    Shape,
    Spec,
    StateSpec,
    group_kinds,
)
from mlxpage.metal.model import Model
from mlxpage.metal.quantised import dequantised, quantised_blocks

# Rounding that the dtype makes by itself, relative to the largest logit.
_FLOOR = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 4e-2}
# How much more than mlx-lm's own noise is still noise.
_SLACK = 8
# Of the largest logit. Logits that differ more depend on how a prompt is cut into forwards.
_MOST_NOISE = 0.05
_CHEAP_WINDOW = 64
# How a step may be given to a model, the quickest way first; and whether it reads the K and V
# that most only hand on.
WAYS = [
    (Shape.ROWS, False),
    (Shape.ROWS, True),
    (Shape.CHUNKS, False),
    (Shape.CHUNKS, True),
    (Shape.SEQUENCES, True),
]


def check(
    model: Model,
    block_size: int,
    seed: int = 0,
    *,
    backend: ModuleType = reference,
    ways: list[tuple[Shape, bool]] = WAYS,
) -> None:
    """Runs short random prompts through the pool and through mlx-lm's own caches, and finds in
    which of the `ways` the model takes them: its `shape` and `fetches` from now on.

    The pool is a small one of its own, its blocks in random order and full of other values. The
    prompts come in chunks of several sequences, then as single rows. The logits have to agree
    within the noise that mlx-lm shows itself when it takes the same prompt in one or in two
    forwards; if each token is a row of its own, every layer has to reach the attention hook.
    Windows of up to 64 positions are passed.

    All that is in a pool that isn't quantised. If the model's are, kernels have to come as near to
    what the reference makes of such a pool as that is to the logits without quantising, and leave
    the same codes in it, or those beside them.

    Raises:
        UnsupportedModel: the model can't be run over a pool.
        InvalidModel: its logits are not finite.
        OutOfMemory: there is no memory to run it.
    """
    if not seam.is_installed():
        raise UnsupportedModel(
            "something in this process has replaced mx.fast.scaled_dot_product_attention since "
            "the model was loaded: load it after that, or don't use both in one process"
        )
    rng = np.random.default_rng(seed)
    lengths = [8, block_size + 1, 2 * block_size + 3]
    windows = {spec.window for spec in model.kv_specs} - {None}
    cheap = [window for window in windows if window <= _CHEAP_WINDOW]
    if cheap:
        lengths.append(max(cheap) + block_size)
    prompts = [rng.integers(0, model.vocab_size, n).astype(np.int32) for n in sorted(lengths)]

    with _refusing(f"mlx-lm can't run {model.family} on this device"):
        dense = [_dense(model, prompt) for prompt in prompts]
        again = _dense(model, prompts[-1][:-1], prompts[-1][-1:])
    if not all(np.isfinite(logits).all() for logits in (*dense, again)):
        raise InvalidModel(f"{model.family}: the logits are not finite; the weights are damaged")
    noise = np.abs(dense[-1] - again).max()
    scale = max(np.abs(logits).max() for logits in dense)
    if noise > _MOST_NOISE * scale:
        raise UnsupportedModel(
            f"{model.family} gives other logits when a prompt is computed in two forwards: they "
            f"differ by {noise:.2g}, and the largest is {scale:.2g}"
        )
    allowed = _SLACK * noise + _FLOOR[_working_dtype(model)] * scale
    plain = [spec.quantised(None, None) for spec in model.specs]
    refusals: list[str] = []  # not the errors, which hold the pools that they were raised over
    model.why_not_rows = None
    if model.state_specs:
        model.why_not_rows = _why_states_need_chunks(model)
        ways = [way for way in ways if way[0] is not Shape.ROWS]
    for way in ways:
        model.take_steps(*way)
        try:
            with _refusing(f"{model.family} can't compute over a block pool"):
                paged = _paged(model, plain, prompts, block_size, backend, rng).logits
            what = f"{model.family} computes something else over a block pool"
            _compare(what, paged, dense, allowed)
            break
        except UnsupportedModel as error:
            refusals.append(str(error))
    else:
        raise UnsupportedModel(refusals[0])
    if model.shape is not Shape.ROWS:
        model.why_not_rows = model.why_not_rows or refusals[0]
    if model.specs != plain and backend is not reference:
        ours, theirs = (
            _paged(model, model.specs, prompts, block_size, each, rng)
            for each in (backend, reference)
        )
        pairs = zip(theirs.logits, paged, strict=True)
        allowed += max(np.abs(a - b).max() for a, b in pairs)
        what = f"{model.family} computes otherwise over quantised blocks"
        _compare(what, ours.logits, theirs.logits, allowed)
        _compare_held(model.specs, ours.held(prompts), theirs.held(prompts))


def why_not_rows(model: Model, block_size: int) -> str | None:
    """Why `check` won't find that the model takes each token as a row of its own, as far as a
    forward shows that nobody evaluates: it needs no weights. None: it may find that."""
    if model.state_specs:
        return _why_states_need_chunks(model)
    try:
        with _refusing(f"{model.family} can't take tokens as rows"):
            _check_every_layer_attends(model, _after_a_lazy_forward(model, block_size))
    except UnsupportedModel as error:
        return str(error)
    return None


def _why_states_need_chunks(model: Model) -> str:
    # Rows of a sequence in one batch would each go on from the state before all of them.
    return f"{model.family} keeps states, which need whole chunks"


def _after_a_lazy_forward(model: Model, block_size: int) -> KVCache:
    """A cache in which the model has had rows of two sequences. Nothing is evaluated."""
    num_groups = len(group_kinds(model.specs))
    cache = KVCache(model.specs, [2] * num_groups, block_size, fetches=model.fetches)
    # Seven rows: with as many as there are heads, what doesn't fit could pass by chance.
    prompts = [np.zeros(count, np.int32) for count in (1, 6)]
    previous = model.cache
    model.bind(cache)
    try:
        model(_rows(prompts, [[1], [2]], [(0, 1), (0, 6)], num_groups))
    finally:
        model.bind(previous)
    return cache


def _compare(what: str, ours: list[np.ndarray], theirs: list[np.ndarray], allowed: float) -> None:
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        difference = np.abs(a - b).max()
        if not difference <= allowed:
            raise UnsupportedModel(
                f"{what}: logits of prompt {number} differ by {difference:.2g}, where "
                f"{allowed:.2g} is rounding"
            )


# Codes that two ways to compute the same may differ by, after some layers.
_MOST_CODES = 3


def _compare_held(specs: list[Spec], ours: list[np.ndarray], theirs: list[np.ndarray]) -> None:
    """K and V of all layers, as the pools hold them."""
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        spec = specs[number // 2]
        coarsest = min(bits for bits in (spec.k_bits, spec.v_bits) if bits)
        error = _MOST_CODES / (2**coarsest - 1) + _FLOOR[spec.dtype]
        allowed = error * np.abs(b).max()
        difference = np.abs(a - b).max()
        if not difference <= allowed:
            raise UnsupportedModel(
                f"{'KV'[number % 2]} of layer {number // 2} is written otherwise than the "
                f"reference does: it differs by {difference:.2g}, where {allowed:.2g} is rounding"
            )


@contextmanager
def _refusing(message: str) -> Iterator[None]:
    """Makes UnsupportedModel of whatever the model's own code raises."""
    try:
        yield
    except (MlxpageError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if "malloc" in reason:
            raise OutOfMemory(f"there is no memory to check the model with: {reason}") from error
        raise UnsupportedModel(f"{message}: {reason}") from error


def _working_dtype(model: Model) -> mx.Dtype:
    return min((spec.dtype for spec in model.specs), key=lambda dtype: dtype.size)


def _dense(model: Model, *chunks: np.ndarray) -> np.ndarray:
    """mlx-lm's logits (vocab,) after the last of the chunks of a prompt."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model.module)
    for chunk in chunks:
        logits = model.module(mx.array(chunk)[None], cache=cache)
    return np.array(logits[0, -1].astype(mx.float32))


class _Paged(NamedTuple):
    """What a model has computed over a pool: logits (vocab,) after each prompt."""

    logits: list[np.ndarray]
    cache: KVCache
    tables: list[list[int]]

    def held(self, prompts: list[np.ndarray]) -> list[np.ndarray]:
        """K and V of each layer, of all positions: (positions, kv_heads, head_dim) each."""
        size = self.cache.block_size
        places = [
            (n, t)
            for prompt, t in zip(prompts, self.tables, strict=True)
            for n in range(len(prompt))
        ]
        blocks = np.array([table[n // size] for n, table in places])
        offsets = np.array([n % size for n, _ in places])
        return [
            np.array(rows.astype(mx.float32))
            for layer in self.cache.layers
            for rows in _written(layer.pool, blocks, offsets)
        ]


def _paged(
    model: Model,
    specs: list[Spec],
    prompts: list[np.ndarray],
    block_size: int,
    backend: ModuleType,
    rng,
) -> _Paged:
    num_blocks = sum(-(-len(prompt) // block_size) for prompt in prompts)
    groups = group_kinds(specs)
    sizes = [num_blocks] * len(groups), block_size
    cache = KVCache(specs, *sizes, backend, fetches=model.fetches)
    for layer in cache.layers:  # what a freed block holds: somebody else's K and V
        layer.pool.fill(*_random(layer, num_blocks, rng))
    mx.eval(cache.arrays())
    order = iter(rng.permutation(num_blocks) + 1)
    tables = [[next(order) for _ in range(-(-len(p) // block_size))] for p in prompts]

    previous = model.cache
    model.bind(cache)
    try:
        # The first half of all prompts in one forward, then the rest but three tokens, then one
        # each: on a GPU, the last of these are compiled.
        cuts = [[0, len(p) // 2, *range(len(p) - 3, len(p) + 1)] for p in prompts]
        for step in range(5):
            spans = [(cut[step], cut[step + 1]) for cut in cuts]
            logits = model(_rows(prompts, tables, spans, len(groups)))
            mx.eval(logits, cache.written())
            if step == 0 and model.shape is Shape.ROWS:
                _check_every_layer_attends(model, cache)
        return _Paged(list(np.array(logits.astype(mx.float32))), cache, tables)
    finally:
        model.bind(previous)


def _random(layer, num_blocks: int, rng) -> Iterator[mx.array]:
    """What may be in the arrays of a layer's pool."""
    if isinstance(layer.spec, StateSpec):
        for array in layer.pool.held():
            yield mx.array(rng.standard_normal(array.shape, np.float32)).astype(array.dtype)
    else:
        yield from _random_blocks(layer.pool.kind, num_blocks, rng)


def _random_blocks(kind: PoolKind, num_blocks: int, rng) -> Iterator[mx.array]:
    """The K and the V array of a pool."""
    for part in (kind.k, kind.v):
        shape = num_blocks + 1, kind.kv_heads, kind.block_size, part.head_dim
        rows = mx.array(rng.standard_normal(shape, np.float32)).astype(part.dtype)
        yield quantised_blocks(rows, part) if part.bits else rows


def _rows(prompts, tables, spans, num_groups: int) -> Rows:
    """The shortest prompt has the single rows, so the order is the one that `Rows` asks for."""
    longest = max(map(len, tables))
    padded = np.array([t + [0] * (longest - len(t)) for t in tables], np.int32)
    ends = np.cumsum([end - start for start, end in spans])
    return Rows(
        tokens=np.concatenate([p[a:b] for p, (a, b) in zip(prompts, spans, strict=True)]),
        positions=np.concatenate([np.arange(a, b) for a, b in spans]).astype(np.int32),
        starts=np.concatenate([[0], ends]).astype(np.int32),
        contexts=np.array([end for _, end in spans], np.int32),
        block_tables=[padded] * num_groups,
        sample_rows=(ends - 1).astype(np.int32),
    )


def _check_every_layer_attends(model: Model, cache: KVCache) -> None:
    aside = [i for i, layer in enumerate(cache.layers) if layer.num_attended == 0]
    if aside:
        raise UnsupportedModel(
            f"{model.family} changes K and V after its cache (layers {aside[:8]}), "
            "so its attention can't read the block pool yet"
        )


# -- the kernels, one by one --

_CHECKED_WINDOW = 256
# A shape that many models have.
COMMON = LayerSpec(None, 8, 128, 128, mx.float16), Attention(32, mx.float16, None, 0.0884, False)

# Of the largest result: what rounding in this type makes of sums in another order.
_KERNEL_ERROR = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}


def check_kernels(model: Model, block_size: int, *, is_read: bool = False) -> None:
    """`check_attention` in the shapes of the model's layers, each once."""
    for spec, attention in dict.fromkeys(_attentions(model, block_size)):
        check_attention(spec, attention, block_size, is_read=is_read)


def check_attention(
    spec: LayerSpec = COMMON[0],
    attention: Attention = COMMON[1],
    block_size: int = 16,
    seed: int = 0,
    *,
    is_read: bool = False,
) -> None:
    """Compares the kernels with the reference on random rows of one layer; by default, of a common
    shape.

    That compiles them too, so the first request doesn't wait for it. `is_read` is for models that
    read K and V as arrays: other kernels serve them.

    Raises UnsupportedModel: they give something else.
    """
    rng = np.random.default_rng(seed)
    spec, attention = _narrowed(spec, attention)
    # Runs of keys that are merged, and a sequence's keys in one run; chunks, alone and padded.
    for sequences, run_length in (
        ([(5, 1), (300, 1), (700, 1), (40, 20)], 128),
        ([(1, 1), (17, 1), (9, 9), (33, 8)], 1024),
    ):
        window = spec.window or 0
        cases = [(context + window, rows) for context, rows in sequences]
        both = _both(spec, attention, cases, block_size, run_length, is_read, rng)
        for what, bits, ours, theirs in both:
            error = _KERNEL_ERROR[spec.dtype] + (2 / (2**bits - 1) if bits else 0)
            limit = error * np.abs(theirs).max()
            difference = np.abs(ours - theirs).max()
            if not difference <= limit:
                raise UnsupportedModel(
                    f"{what} of {spec} differs from the reference by {difference:.2g}, where "
                    f"{limit:.2g} is rounding"
                )


def check_copies(spec: LayerSpec = COMMON[0], block_size: int = 16, seed: int = 0) -> None:
    """Compares copies of blocks, of which some are targets after they were sources, with those of
    the reference: they may not differ at all. Raises UnsupportedModel."""
    num_blocks = 8
    pairs = np.array([[1, 5], [2, 6], [3, 1], [4, 3]], np.int32)
    pools = [backend.Pool(spec, num_blocks, block_size) for backend in (kernels, reference)]
    before = list(_random_blocks(pools[0].kind, num_blocks, np.random.default_rng(seed)))
    for pool in pools:
        pool.fill(*(array + 0 for array in before))
        mx.eval(pool.arrays())
        pool.copy(pairs, None)
        mx.eval(pool.arrays(), pool.written())
    for name, ours, theirs in zip("KV", *(pool.held() for pool in pools), strict=True):
        if not mx.array_equal(ours, theirs).item():
            raise UnsupportedModel(f"copied blocks of {name} of {spec} are not what they were")


def _case(spec: LayerSpec, attention: Attention = COMMON[1], **options) -> Callable[[], None]:
    return partial(check_attention, spec, attention, **options)


# Every kernel, in shapes that many models have between them; each case raises UnsupportedModel.
CASES: dict[str, Callable[[], None]] = {
    "8 x 128, float16": check_attention,
    "3 x 64, bfloat16": _case(
        LayerSpec(None, 3, 64, 64, mx.bfloat16), Attention(9, mx.bfloat16, None, 0.125, False)
    ),
    "2 x 80, float32, blocks of 32": _case(
        LayerSpec(None, 2, 80, 80, mx.float32),
        Attention(2, mx.float32, None, 0.1118, False),
        block_size=32,
    ),
    "1 x 256, a window": _case(
        LayerSpec(512, 1, 256, 256, mx.bfloat16), Attention(4, mx.bfloat16, 512, 0.0625, False)
    ),
    "8 x 64, a window and sinks": _case(
        LayerSpec(128, 8, 64, 64, mx.bfloat16), Attention(64, mx.bfloat16, 128, 0.125, True)
    ),
    "K in 8 bits": _case(replace(COMMON[0], k_bits=8)),
    "K in 8 bits, V in 4": _case(replace(COMMON[0], k_bits=8, v_bits=4)),
    "latent, 512 and 64": _case(
        LayerSpec(None, 1, 512, 64, mx.bfloat16),
        Attention(16, mx.bfloat16, None, 0.0722, False, is_latent=True),
    ),
    "K and V read as arrays": _case(COMMON[0], is_read=True),
    "copies of blocks": check_copies,
}


def run_cases() -> dict[str, str | None]:
    """What is wrong in each of `CASES`; None if nothing is."""
    results: dict[str, str | None] = {}
    for name, check in CASES.items():
        try:
            check()
            results[name] = None
        except Exception as error:  # whatever a compiler or a GPU has to say
            results[name] = " ".join(str(error).split())[:300] or type(error).__name__
    return results


def _narrowed(spec: LayerSpec, attention: Attention) -> tuple[LayerSpec, Attention]:
    """With a window that a short sequence passes: kernels take it as a number like others."""

    def narrow(window: int | None) -> int | None:
        return window and min(window, _CHECKED_WINDOW)

    window = narrow(attention.window)
    return replace(spec, window=narrow(spec.window)), attention._replace(window=window)


def _attentions(model: Model, block_size: int) -> list[tuple[LayerSpec, Attention]]:
    """(spec, how the model attends) of each layer."""
    cache = _after_a_lazy_forward(model, block_size)
    if any(layer.attention is None for layer in cache.layers):
        raise UnsupportedModel(f"{model.family} attends by itself: it reads K and V as arrays")
    return [(layer.spec, layer.attention) for layer in cache.layers]


def _both(
    spec, attention, sequences, block_size: int, run_length: int, is_read: bool, rng
) -> list[tuple[str, int | None, np.ndarray, np.ndarray]]:
    """What kernels and reference give for random rows: its name, the bits that it is rounded to,
    and both."""
    heads, dtype, window, scale, has_sinks, is_latent = attention
    needed = [-(-context // block_size) for context, _ in sequences]
    order = iter((rng.permutation(sum(needed)) + 1).tolist())
    tables = [[next(order) for _ in range(count)] for count in needed]
    tokens = [np.zeros(context, np.int32) for context, _ in sequences]
    spans = [(context - rows, context) for context, rows in sequences]
    rows = _rows(tokens, tables, spans, 1)

    def random(*shape, dtype=spec.dtype):
        return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)

    count = len(rows.positions)
    k = random(count, spec.kv_heads, 1, spec.k_head_dim)
    v = random(count, spec.kv_heads, 1, spec.v_head_dim)
    q = random(count, heads, 1, spec.k_head_dim, dtype=dtype)
    q_v = random(count, heads, 1, spec.v_head_dim, dtype=dtype)
    sinks = random(heads, dtype=dtype) if has_sinks else None

    def attend(pool, step) -> mx.array:
        if is_latent:
            return pool.attend_latent(step, q, q_v * scale, scale)
        return pool.attend(step, q, window, scale, sinks)

    pools = [backend.Pool(spec, sum(needed), block_size) for backend in (kernels, reference)]
    before = list(_random_blocks(pools[0].kind, sum(needed), rng))
    ours, theirs = [], []
    for pool, backend, found in zip(pools, (kernels, reference), (ours, theirs), strict=True):
        pool.fill(*(array + 0 for array in before))
        mx.eval(pool.arrays())
        step = backend.Step(rows, rows.block_tables[0], block_size, spec.window)
        if isinstance(step, kernels.Step):
            step.run_length = run_length
        pool.write(step, k, v, None, is_read=is_read)
        out = attend(pool, step)
        mx.eval(out, pool.written())
        # A row of each sequence's last block: what no row wrote may differ.
        written = _written(pool, step.write_blocks, rows.positions % block_size)
        found += [np.array(array.astype(mx.float32)) for array in (out, *written)]
    if spec.k_bits or spec.v_bits:
        # What lies between two codes may become either: attention is compared over the same ones.
        pool.fill(pools[0].k, pools[0].v)
        out = attend(pool, step)
        theirs[0] = np.array(out.astype(mx.float32))
    names = "attention", "a written K", "a written V"
    return list(zip(names, (None, spec.k_bits, spec.v_bits), ours, theirs, strict=True))


def _written(pool, blocks: np.ndarray, offsets: np.ndarray) -> Iterator[mx.array]:
    """K and V (T, kv_heads, head_dim) at `offsets` of `blocks`."""
    blocks, offsets = mx.array(blocks), mx.array(offsets)
    for array, part in ((pool.k, pool.kind.k), (pool.v, pool.kind.v)):
        held = array[blocks]
        if part.bits:
            held = dequantised(held, part, pool.kind.block_size)
        yield held[mx.arange(len(blocks)), :, offsets]
