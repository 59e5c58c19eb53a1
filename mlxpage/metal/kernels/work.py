"""How the attention kernel's work is divided: among lanes, and among threadgroups."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np

from mlxpage.errors import UnsupportedModel
from mlxpage.metal.backend import mx
from mlxpage.metal.kernels.launch import on_cuda
from mlxpage.metal.kernels.upload import ints, upload
from mlxpage.metal.layout import Format, PoolKind, first_readable

_NO_WINDOW = 2**30
_MAX_THREADGROUP_BYTES = 24 * 1024


class Tiling(NamedTuple):
    """How paged_attention divides its work; the names are those of its text."""

    queries: int
    padded_queries: int
    lanes: int
    keys: int
    k_width: int
    v_width: int
    simd_groups: int


@cache
def tiling(k: Format, v: Format, queries: int, block_size: int, cuda: bool) -> Tiling:
    """For heads of these formats and so many queries that share a K and V.

    Raises UnsupportedModel for a head size that no choice of lanes divides.
    """
    # Codes take instructions to unpack, so a lane holds more of a row, for fewer queries at once:
    # what it does for a row besides is shared by more elements then.
    has_codes = bool(k.bits or v.bits)
    registers = 16  # floats of the queries, and as many of the sums, in a lane
    loads = 16  # words of K and V that are on their way
    if cuda:
        registers, loads = 64 if has_codes else 32, 64
    most, scores = (4, 16) if has_codes else (8, 32)  # of queries; of them with the keys of a step
    widest = max(k.head_dim, v.head_dim)
    row_bits = [part.head_dim * part.element_bits for part in (k, v)]
    possible = [n for n in (4, 8, 16, 32) if not any(bits % (32 * n) for bits in row_bits)]
    if not possible:
        raise UnsupportedModel(
            f"heads of {k.head_dim} and {v.head_dim} elements take {row_bits[0]} and {row_bits[1]} "
            "bits, which are not multiples of 128, as the attention kernel needs"
        )
    at_once = min(queries, most, possible[-1])
    while at_once > 1 and at_once * widest // possible[-1] > registers:
        at_once -= 1
    # The same number in each pass.
    at_once = -(-queries // -(-queries // at_once))
    padded = 1 << (at_once - 1).bit_length()
    enough = [n for n in possible if n >= padded and at_once * widest // n <= registers]
    lanes = min(enough, default=possible[-1])
    share = (k.row_words + v.row_words) // lanes  # words that a lane holds of a K and a V
    keys = 1
    while keys < min(8, block_size) and 2 * keys * share <= loads and 2 * keys * padded <= scores:
        keys *= 2
    simd_groups = 4
    while simd_groups > 1 and simd_groups * at_once * v.head_dim * 4 > _MAX_THREADGROUP_BYTES:
        simd_groups //= 2
    return Tiling(
        at_once,
        padded,
        lanes,
        keys,
        _load_width(k, lanes),
        _load_width(v, lanes),
        simd_groups,
    )


def _load_width(part: Format, lanes: int) -> int:
    """Elements in the widest load, of 16 bytes at most, that divides a lane's share."""
    words = part.row_words // lanes
    return math.gcd(words, 4) * 32 // part.element_bits


class LatentTiling(NamedTuple):
    """How latent_attention divides its work; the names are those of its text."""

    queries: int
    lanes: int
    keys: int
    k_width: int
    v_width: int
    simd_groups: int

    def passes(self, heads: int) -> int:
        """Threadgroups of a run of keys."""
        return -(-heads // (self.queries * self.simd_groups))


@cache
def latent_tiling(kind: PoolKind, heads: int, cuda: bool) -> LatentTiling:
    """Raises UnsupportedModel for a pool that the kernel can't read."""
    k, v = kind.k, kind.v
    if kind.is_quantised:
        raise UnsupportedModel("no kernel reads quantised blocks of latent attention")
    if kind.kv_heads != 1:
        raise UnsupportedModel(f"latent attention has {kind.kv_heads} heads of K and V")
    lanes = next((n for n in (32, 16, 8, 4) if not (k.row_words % n or v.row_words % n)), None)
    if lanes is None:
        raise UnsupportedModel(
            f"a latent of {k.head_dim} and {v.head_dim} elements takes {k.row_words} and "
            f"{v.row_words} words, which are not multiples of 4, as its kernel needs"
        )
    # Floats of queries and sums; words on their way. For Apple's GPUs a guess.
    floats, loads, most_groups = (144, 40, 1) if cuda else (72, 18, 4)
    queries = 1
    each = (2 * k.head_dim + v.head_dim) // lanes
    while queries < min(4, lanes) and heads % (2 * queries) == 0 and 2 * queries * each <= floats:
        queries *= 2
    keys, share = 1, (k.row_words + v.row_words) // lanes
    while keys < min(8, kind.block_size) and 2 * keys * share <= loads and keys * queries <= 16:
        keys *= 2
    simd_groups = min(most_groups, heads // queries)
    return LatentTiling(
        queries, lanes, keys, _load_width(k, lanes), _load_width(v, lanes), simd_groups
    )


class RunCost(NamedTuple):
    """What a run of keys costs, when each sequence has a single row."""

    threadgroups: int
    key_bytes: int  # that a threadgroup reads of a K and its V
    queries: int  # that a threadgroup computes with them


def run_cost(kind: PoolKind, heads: int) -> RunCost:
    group = heads // kind.kv_heads
    shape = tiling(kind.k, kind.v, group, kind.block_size, on_cuda())
    passes = -(-group // shape.queries)
    return RunCost(kind.kv_heads * passes, kind.k.nbytes + kind.v.nbytes, shape.queries)


def latent_cost(kind: PoolKind, heads: int) -> RunCost:
    shape = latent_tiling(kind, heads, on_cuda())
    # Of each element of K there is a product for the scores and one for the values.
    queries = shape.queries * shape.simd_groups * 3 // 2
    return RunCost(shape.passes(heads), kind.k.nbytes + kind.v.nbytes, queries)


class Work(NamedTuple):
    """What paged_attention's threadgroups compute, for a number of sequences."""

    rows: int
    max_rows: int  # of a sequence
    items: int
    partial_rows: int  # 0: each sequence's keys are one run, there is nothing to merge
    inputs: list[mx.array]  # block_tables, work, ints
    merge_inputs: list[mx.array]  # owners, row_starts, partial_starts; none with nothing to merge
    beside: list[mx.array]  # what was brought along


def plan_work(
    starts: np.ndarray,
    contexts: np.ndarray,
    tables: np.ndarray,
    block_size: int,
    window: int | None,
    cost: RunCost,
    run_length: int | None = None,
    beside: tuple[np.ndarray, ...] = (),
) -> Work:
    """Cuts the keys of sequences into runs, few but enough to fill the GPU.

    Args:
        starts: (S + 1,) int32, row at which each sequence's rows start, from 0 on.
        contexts: (S,) int32, positions of each sequence, its rows being the last ones.
        tables: (S, M) int32 block ids.
        window: as in `reference.plan`.
        cost: of a run.
        run_length: keys that a run has at most, but for the rest of a block; None is as many as
            take the least time.
        beside: int32, flat, brought to the GPU along with the plan: once costs less than twice.
    """
    rows = np.diff(starts)
    first = first_readable(contexts - rows, block_size, window)
    lengths = contexts - first
    # As many runs as that makes, but of equal lengths.
    size = lengths / -(-lengths // (run_length or _run_length(lengths, cost)))
    size = (-(-size // block_size) * block_size).astype(np.int64)
    counts = -(-lengths // size)
    sequences = np.repeat(np.arange(len(contexts)), counts)
    nth = np.arange(len(sequences)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = first[sequences] + nth * size[sequences]
    ends = np.minimum(begins + size[sequences], contexts[sequences])
    partial_starts = np.concatenate([[0], np.cumsum(counts * rows)])
    partials = partial_starts[sequences] + nth * rows[sequences]
    # The longest sequences come last, and their runs first: none begins when the rest is over.
    of_sequence = np.stack([starts[:-1], rows, contexts, np.zeros_like(rows)], axis=1)
    runs = np.stack([sequences, begins, ends, partials], axis=1)
    runs = np.concatenate([runs, of_sequence[sequences]], axis=1).astype(np.int32)[::-1]
    is_split = len(runs) > len(contexts)
    merged = [np.repeat(np.arange(len(contexts), dtype=np.int32), rows), starts, partial_starts]
    arrays = upload(tables, runs, *(part.astype(np.int32) for part in merged if is_split), *beside)
    last = len(arrays) - len(beside)
    return Work(
        rows=int(starts[-1]),
        max_rows=int(rows.max()),
        items=len(runs),
        partial_rows=int(partial_starts[-1]) if is_split else 0,
        inputs=[*arrays[:2], ints(tables.shape[1], window or _NO_WINDOW)],
        merge_inputs=arrays[2:last],
        beside=arrays[last:],
    )


class _Gpu(NamedTuple):
    """What the cutting of keys into runs rests on. Times are in bytes of K and V that the GPU
    could read in them."""

    at_once: int  # threadgroups that fit
    some: int  # threadgroups that read 76 % of what the GPU can: n of them tanh(n / some)
    start: int  # time in which the threadgroups that fit begin and end
    merge: int  # time of merging, with a launch that the host has to make too


# Fitted to an H100 (`benchmarks/attention.py`); for Apple's GPUs a guess.
_GPUS = {True: _Gpu(264, 115, 4_100_000, 36_000_000), False: _Gpu(128, 40, 2_000_000, 3_000_000)}
# Lengths count in steps of so many keys: the choice is as good, and most steps find it made.
_COARSE = 64
_RUN_LENGTHS = np.array([64, 128, 256, 512, 1024, 2048, 4096, 8192, 2**30])
# More queries than this take longer than reading what they are multiplied by.
_LIGHT = 4


def _run_length(lengths: np.ndarray, cost: RunCost) -> int:
    """How many keys a run has, so that the sequences take the least time."""
    return _best_run_length(tuple((-(-lengths // _COARSE)).tolist()), cost)


@lru_cache(256)
def _best_run_length(coarse: tuple[int, ...], cost: RunCost) -> int:
    lengths = np.array(coarse) * _COARSE
    gpu = _GPUS[on_cuda()]
    heavy = max(1.0, cost.queries / _LIGHT)
    some = gpu.some * heavy
    counts = -(-lengths // _RUN_LENGTHS[:, None])
    sizes = lengths / counts * (cost.key_bytes * heavy)  # (lengths of runs, sequences)
    order = np.argsort(sizes, axis=1)
    sizes = np.take_along_axis(sizes, order, axis=1)
    groups = np.take_along_axis(counts, order, axis=1) * cost.threadgroups
    total = groups.sum(axis=1)
    # If all begin together: the fewer are left, the less of the GPU they use.
    left = total[:, None] - np.cumsum(groups, axis=1) + groups
    together = (np.diff(sizes, axis=1, prepend=0) * _slowed(left, some)).sum(axis=1)
    # In turns, those of one length stay side by side, and the last ones are what is left over;
    # others are anywhere when nothing is left to begin.
    alike = sizes[:, -1] <= 1.2 * sizes[:, 0]
    last = (total - 1) % gpu.at_once + 1
    spread = np.linspace(1, gpu.at_once, 32)
    tail = np.where(alike, _slowed(last, some) - last, (_slowed(spread, some) - spread).mean())
    in_turns = (sizes * groups).sum(axis=1) + sizes.mean(axis=1) * tail
    times = np.where(total <= gpu.at_once, together, in_turns)
    times += np.maximum(1, total / gpu.at_once) * gpu.start + (counts > 1).any(axis=1) * gpu.merge
    return int(_RUN_LENGTHS[np.argmin(times)])


def _slowed(threadgroups, some: float):
    """As many threadgroups as would read alone, at full speed, what these read in the same time."""
    return threadgroups / np.tanh(threadgroups / some)
