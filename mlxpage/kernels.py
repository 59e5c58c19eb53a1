"""Paged attention on a GPU: the texts in metal/, compiled for Metal or CUDA, a function for each.

`reference` has the same functions in plain MLX, and says what they compute. Here the pools are
written in place, behind MLX's back, so the order is carried by fences: small arrays that MLX does
see. A layer's write gives one, and whatever reads that layer's pool takes it in; a write takes what
comes after every read of the step before. On a GPU nothing but these kernels touches a pool.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlxpage import layout, reference
from mlxpage.backend import mx
from mlxpage.errors import UnsupportedModel
from mlxpage.layout import LayerSpec, first_readable

_dense_attention = reference.dense_attention

# MLX passes arrays of fewer elements in another address space, and would compile again for it.
_LEAST = 8
_THREADS = 256
_NO_WINDOW = 2**30
_MAX_THREADGROUP_BYTES = 24 * 1024


# -- texts --


def _text(name: str) -> str:
    """A file of metal/: in the package when it is installed, else beside it.

    Without comments: MLX hashes the text at every call, and takes names in it for attributes.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "metal", here.parent / "metal"):
        if (folder / name).is_file():
            lines = (folder / name).read_text(encoding="ascii").splitlines()
            return "\n".join(line.partition("//")[0].strip() for line in lines) + "\n"
    raise FileNotFoundError(f"{name} is neither in {here / 'metal'} nor in {here.parent / 'metal'}")


def to_cuda(text: str) -> str:
    """Metal text as CUDA: pointers have no address spaces, threadgroup variables are shared."""
    text = re.sub(r"\b(device|constant|thread)\b ?", "", text)
    return re.sub(r"\bthreadgroup\b", "__shared__", text)


# Inputs and outputs, in the order of the texts.
_SIGNATURES = {
    "write_kv": ("k, v, k_pool, v_pool, slots, ints, after", "fence"),
    "gather_blocks": ("k_pool, v_pool, block_tables, lengths, ints, fence", "k, v"),
    "copy_blocks": ("k_pool, v_pool, pairs, ints, after", "fence"),
    "paged_attention": (
        "q, k_pool, v_pool, block_tables, work, ints, floats, sinks, fence",
        "out, stats",
    ),
    "merge_partials": (
        "partials, stats, owners, row_starts, partial_starts, sinks, ints",
        "out",
    ),
}


@cache
def _kernel(name: str):
    inputs, outputs = (names.split(", ") for names in _SIGNATURES[name])
    source, header = _text(f"{name}.metal"), _text("common.h")
    make = mx.fast.metal_kernel
    if on_cuda():
        source, header = to_cuda(source), _text("cuda.h") + to_cuda(header)
        make = mx.fast.cuda_kernel
    return make(
        name=f"mlxpage_{name}",
        input_names=inputs,
        output_names=outputs,
        source=source,
        header=header,
    )


def on_cuda() -> bool:
    return mx.cuda.is_available()


class _Launch(NamedTuple):
    """All of a call but its inputs, which is made once for every shape: a step has hundreds."""

    name: str
    template: list
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: list
    output_dtypes: list

    def __call__(self, *inputs: mx.array) -> list[mx.array]:
        return _kernel(self.name)(
            inputs=inputs,
            template=self.template,
            grid=self.grid,
            threadgroup=self.threadgroup,
            output_shapes=self.output_shapes,
            output_dtypes=self.output_dtypes,
        )


def _one_thread_a_piece(name: str, template: dict, pieces: int, *outputs) -> _Launch:
    threads = -(-pieces // _THREADS) * _THREADS
    return _launch(name, template, (threads, 1, 1), _THREADS, *outputs)


def _launch(name: str, template: dict, grid, threads: int, *outputs) -> _Launch:
    """`grid` is in threads, `threads` are a threadgroup's, `outputs` (shape, dtype) pairs."""
    shapes, dtypes = zip(*outputs, strict=True)
    return _Launch(name, list(template.items()), grid, (threads, 1, 1), shapes, dtypes)


@lru_cache(4096)
def _ints(*values: int) -> mx.array:
    return _padded(np.array(values, np.int32))


def _padded(array: np.ndarray) -> mx.array:
    """As an MLX array of at least 8 elements."""
    flat = array.reshape(-1)
    if flat.size < _LEAST:
        flat = np.concatenate([flat, np.zeros(_LEAST - flat.size, flat.dtype)])
    return mx.array(flat)


@lru_cache(256)
def _floats(scale: float, softcap: float) -> mx.array:
    return mx.array([scale, softcap] + [0.0] * (_LEAST - 2), mx.float32)


# -- moving rows and blocks --


PoolKind = tuple[tuple[int, int, int], mx.Dtype]  # a pool's shape but its blocks, and its dtype


def _pool_template(k_pool: PoolKind, v_dim: int) -> dict:
    (kv_heads, block_size, k_dim), dtype = k_pool
    return {
        "KV": dtype,
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        "KV_HEADS": kv_heads,
        "BLOCK_SIZE": block_size,
        "WIDTH": _width(k_dim, v_dim, itemsize=dtype.size),
    }


def pool_kind(pool: mx.array) -> PoolKind:
    return pool.shape[1:], pool.dtype


def _head_pieces(template: dict) -> int:
    """Pieces of one head's K and V at one position."""
    return (template["K_DIM"] + template["V_DIM"]) // template["WIDTH"]


def _width(*sizes: int, itemsize: int) -> int:
    """Elements in the widest load, of 16 bytes at most, that divides all sizes."""
    width = 16 // itemsize
    while any(size % width for size in sizes):
        width //= 2
    return width


def write(
    k: mx.array, v: mx.array, k_pool: mx.array, v_pool: mx.array, slots: mx.array, after: mx.array
) -> mx.array:
    """Writes rows into their slots of the pools, in place.

    Args:
        k: (T, kv_heads, 1, k_dim), in the pool's dtype.
        v: (T, kv_heads, 1, v_dim).
        k_pool: (num_blocks + 1, kv_heads, block_size, k_dim).
        v_pool: (num_blocks + 1, kv_heads, block_size, v_dim).
        slots: (T or more,) int32, block * block_size + offset.
        after: of 8 elements or more; the write takes place once it's computed.

    Returns:
        A fence: what reads the rows has to take it in.
    """
    rows = k.shape[0]
    launch = _write_launch(rows, pool_kind(k_pool), v_pool.shape[3])
    return launch(k, v, k_pool, v_pool, slots, _ints(rows), after)[0]


@lru_cache(1024)
def _write_launch(rows: int, k_pool: PoolKind, v_dim: int) -> _Launch:
    template = _pool_template(k_pool, v_dim)
    pieces = rows * template["KV_HEADS"] * _head_pieces(template)
    return _one_thread_a_piece("write_kv", template, pieces, ((_LEAST,), mx.int32))


def gather(
    k_pool: mx.array,
    v_pool: mx.array,
    tables: mx.array,
    lengths: mx.array,
    shape: tuple[int, int, int],
    fence: mx.array,
) -> tuple[mx.array, mx.array]:
    """The K and V of sequences, in order; zeros from a sequence's length on.

    Args:
        tables: int32, (sequences, width) in `shape`, or that many elements and more.
        lengths: (sequences or more,) int32, positions of each.
        shape: sequences, width of the tables, positions that each gets.

    Returns:
        (sequences, kv_heads, positions, k_dim) and the same of V.
    """
    sequences, width, positions = shape
    launch = _gather_launch(sequences, positions, pool_kind(k_pool), v_pool.shape[3])
    ints = _ints(width, positions, sequences)
    k, v = launch(k_pool, v_pool, tables, lengths, ints, fence)
    return k, v


@lru_cache(1024)
def _gather_launch(sequences: int, positions: int, k_pool: PoolKind, v_dim: int) -> _Launch:
    template = _pool_template(k_pool, v_dim)
    shape = sequences, template["KV_HEADS"], positions
    return _one_thread_a_piece(
        "gather_blocks",
        template,
        math.prod(shape) * _head_pieces(template),
        ((*shape, template["K_DIM"]), template["KV"]),
        ((*shape, v_dim), template["KV"]),
    )


def copy_blocks(k_pool: mx.array, v_pool: mx.array, pairs: np.ndarray, after: mx.array) -> mx.array:
    """Copies blocks within the pools, in place; returns a fence, as `write` does.

    `pairs` (copies, 2) int32 are sources and targets. No block may be a source and a target, or
    a target twice.
    """
    template = _pool_template(pool_kind(k_pool), v_pool.shape[3])
    positions = len(pairs) * template["KV_HEADS"] * template["BLOCK_SIZE"]
    pieces = positions * _head_pieces(template)
    launch = _one_thread_a_piece("copy_blocks", template, pieces, ((_LEAST,), mx.int32))
    return launch(k_pool, v_pool, _padded(pairs), _ints(len(pairs)), after)[0]


# -- attention --


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
def tiling(k_dim: int, v_dim: int, queries: int, itemsize: int, block_size: int, cuda: bool):
    """A `Tiling` for heads of these sizes and so many queries that share a K and V.

    Raises UnsupportedModel for a head size that no choice of lanes divides.
    """
    registers = 32 if cuda else 16  # floats of the queries, and as many of the sums, in a lane
    loads = 64 if cuda else 16  # words of K and V that are on their way
    widest = max(k_dim, v_dim)
    elements = 4 // min(itemsize, 4)  # in a word
    possible = [
        lanes
        for lanes in (4, 8, 16, 32)
        if k_dim % (lanes * elements) == 0 and v_dim % (lanes * elements) == 0
    ]
    if not possible:
        raise UnsupportedModel(
            f"heads of {k_dim} and {v_dim} elements are not a multiple of {4 * elements}, which "
            "the attention kernel needs"
        )
    at_once = min(queries, 8, possible[-1])
    while at_once > 1 and at_once * widest // possible[-1] > registers:
        at_once -= 1
    # The same number in each pass.
    at_once = -(-queries // -(-queries // at_once))
    padded = 1 << (at_once - 1).bit_length()
    enough = [n for n in possible if n >= padded and at_once * widest // n <= registers]
    lanes = min(enough, default=possible[-1])
    share = (k_dim + v_dim) // lanes * itemsize // 4  # words that a lane holds of a K and a V
    keys = 1
    while keys < min(8, block_size) and 2 * keys * share <= loads and 2 * keys * padded <= 32:
        keys *= 2
    simd_groups = 4
    while simd_groups > 1 and simd_groups * at_once * v_dim * 4 > _MAX_THREADGROUP_BYTES:
        simd_groups //= 2
    return Tiling(
        at_once,
        padded,
        lanes,
        keys,
        _width(k_dim // lanes, itemsize=itemsize),
        _width(v_dim // lanes, itemsize=itemsize),
        simd_groups,
    )


def run_cost(k_pool: PoolKind, v_dim: int, heads: int) -> tuple[int, int]:
    """Threadgroups that one run of keys occupies, and bytes that one of them reads of a K and V,
    when each sequence has a single row."""
    (kv_heads, block_size, k_dim), dtype = k_pool
    group = heads // kv_heads
    shape = tiling(k_dim, v_dim, group, dtype.size, block_size, on_cuda())
    return kv_heads * -(-group // shape.queries), (k_dim + v_dim) * dtype.size


class Work(NamedTuple):
    """What paged_attention's threadgroups compute, for a number of sequences."""

    rows: int
    max_rows: int  # of a sequence
    items: int
    partial_rows: int  # 0: each sequence's keys are one run, there is nothing to merge
    inputs: list[mx.array]  # block_tables, work, ints
    merge_inputs: list[mx.array]  # owners, row_starts, partial_starts


def plan_work(
    starts: np.ndarray,
    contexts: np.ndarray,
    tables: np.ndarray,
    block_size: int,
    window: int | None,
    threadgroups: int,
    key_bytes: int,
) -> Work:
    """Cuts the keys of sequences into runs, few but enough to fill the GPU.

    Args:
        starts: (S + 1,) int32, row at which each sequence's rows start, from 0 on.
        contexts: (S,) int32, positions of each sequence, its rows being the last ones.
        tables: (S, M) int32 block ids.
        window: as in `reference.plan`.
        threadgroups: that each run occupies.
        key_bytes: that one of them reads of a K and its V.
    """
    rows = np.diff(starts)
    first = first_readable(contexts - rows, block_size, window)
    lengths = contexts - first
    # As many runs as that makes, but of equal lengths.
    size = lengths / -(-lengths // _run_length(lengths, threadgroups, key_bytes))
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
    return Work(
        rows=int(starts[-1]),
        max_rows=int(rows.max()),
        items=len(runs),
        partial_rows=int(partial_starts[-1]) if len(runs) > len(contexts) else 0,
        inputs=[
            _padded(tables),
            _padded(runs),
            _ints(tables.shape[1], window or _NO_WINDOW),
        ],
        merge_inputs=[
            _padded(np.repeat(np.arange(len(contexts), dtype=np.int32), rows)),
            _padded(starts),
            _padded(partial_starts.astype(np.int32)),
        ],
    )


class _Gpu(NamedTuple):
    """What the cutting of keys into runs rests on. Times are in bytes of K and V that the GPU
    would read in them."""

    at_once: int  # threadgroups
    enough: int  # threadgroups that read as fast as the GPU can
    start: int  # time in which a threadgroup begins and ends
    merge: int  # time of merging, with its launch


# Fitted to an H100; for Apple's GPUs a guess.
_GPUS = {True: _Gpu(264, 220, 50_000, 26_000_000), False: _Gpu(128, 64, 16_000, 3_000_000)}
_RUN_LENGTHS = np.array(
    [64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 2**30]
)


def _run_length(lengths: np.ndarray, threadgroups: int, key_bytes: int) -> int:
    """How many keys a run has, so that the sequences take the least time."""
    gpu = _GPUS[on_cuda()]
    runs = -(-lengths[:, None] // _RUN_LENGTHS)
    count = runs.sum(axis=0) * threadgroups
    waves, rest = -(-count // gpu.at_once), count % gpu.at_once
    # The last threadgroups are too few to read as fast as the GPU can.
    longest = np.minimum(_RUN_LENGTHS, lengths.max()) * key_bytes
    waste = np.maximum(0, gpu.enough - rest) * longest * (rest > 0)
    is_split = (runs > 1).any(axis=0)
    times = waste + waves * gpu.at_once * gpu.start + is_split * gpu.merge
    return int(_RUN_LENGTHS[np.argmin(times)])


def paged_attention(
    q: mx.array,
    k_pool: mx.array,
    v_pool: mx.array,
    work: Work,
    fence: mx.array,
    *,
    scale: float,
    sinks: mx.array | None = None,
    softcap: float = 0.0,
) -> mx.array:
    """Attention of the rows of `work` to their own sequences: (rows, heads, 1, v_dim).

    Args:
        q: (rows, heads, 1, k_dim), float32, float16 or bfloat16.
        k_pool: (num_blocks + 1, kv_heads, block_size, k_dim), likewise.
        v_pool: (num_blocks + 1, kv_heads, block_size, v_dim).
        fence: of the write that the rows' own K and V came by.
        scale: factor of the scores.
        sinks: (heads,) a logit in each head's softmax that has no value.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
    """
    heads = q.shape[1]
    attend, merge = _attention_launches(
        (q.dtype, heads, sinks is not None, softcap > 0),
        (pool_kind(k_pool), v_pool.shape[3]),
        (work.rows, work.max_rows, work.items, work.partial_rows),
    )
    floats = _floats(scale, softcap)
    sinks = floats if sinks is None else _at_least_8(sinks)
    out, stats = attend(q, k_pool, v_pool, *work.inputs, floats, sinks, fence)
    if merge is None:
        return out
    return merge(out, stats, *work.merge_inputs, sinks, _ints(work.rows))[0]


@lru_cache(1024)
def _attention_launches(queries, pools, work) -> tuple[_Launch, _Launch | None]:
    """The launch of paged_attention, and that of merge_partials if there is something to merge."""
    dtype, heads, has_sinks, has_softcap = queries
    ((kv_heads, block_size, k_dim), kv_dtype), v_dim = pools
    rows, max_rows, items, partial_rows = work
    group = heads // kv_heads
    shape = tiling(k_dim, v_dim, group * max_rows, kv_dtype.size, block_size, on_cuda())
    out_dtype = mx.float32 if partial_rows else dtype
    template = {
        "T": dtype,
        "KV": kv_dtype,
        "Out": out_dtype,
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        **{name.upper(): value for name, value in shape._asdict().items()},
        "SINKS": has_sinks,
        "SOFTCAP": has_softcap,
        "SPLIT": partial_rows > 0,
    }
    threads = shape.simd_groups * 32
    passes = -(-group * max_rows // shape.queries)
    results = partial_rows or rows, heads
    attend = _launch(
        "paged_attention",
        template,
        (items * threads, kv_heads * passes, 1),
        threads,
        ((*results, 1, v_dim), out_dtype),
        ((*results, 2), mx.float32),
    )
    if not partial_rows:
        return attend, None
    template = {"T": dtype, "HEADS": heads, "V_DIM": v_dim, "SINKS": has_sinks, "SIMD_GROUPS": 4}
    threadgroups = -(-rows * heads // 4)
    out = (rows, heads, 1, v_dim), dtype
    return attend, _launch("merge_partials", template, (threadgroups * 128, 1, 1), 128, out)


def _at_least_8(array: mx.array) -> mx.array:
    return array if array.size >= _LEAST else mx.pad(array, [(0, _LEAST - array.size)])


# -- chunks of prompts: gathered, then MLX's own attention --

# A launch for each sequence, or one for several, padded: so many scores (rows times keys) take the
# time of the launches that are saved.
_SCORES_OF_A_LAUNCH = 2**16
_MOST_PADDED_SCORES = 2**22


class Chunk(NamedTuple):
    """Consecutive rows of one sequence, or of several that are padded to the same shape."""

    rows: slice  # of the forward
    tables: mx.array
    lengths: mx.array  # positions that each sequence has in its tables
    shape: tuple[int, int, int]  # sequences, width of the tables, positions
    pieces: list[reference.Piece] | None  # of a single sequence
    spread: mx.array | None = None  # of several: (sequences * C,) the row at each place, or any
    places: mx.array | None = None  # (rows,) where each row is then
    mask: mx.array | None = None  # (sequences, 1, C, positions)


def plan_chunks(
    starts: np.ndarray,
    contexts: np.ndarray,
    tables: np.ndarray,
    block_size: int,
    window: int | None,
    most_scores: int,
) -> list[Chunk]:
    """How sequences with several rows each are attended. Arguments as in `reference.plan`;
    `most_scores` (rows times keys) may exist at once."""
    rows = np.diff(starts)
    first = first_readable(contexts - rows, block_size, window)
    keys = contexts - first
    return [
        _chunk(starts, contexts, tables, first, slice(begin, end), block_size, window, most_scores)
        for begin, end in _bundles(rows.tolist(), keys.tolist())
    ]


def _bundles(rows: list[int], keys: list[int]) -> list[tuple[int, int]]:
    """Cuts sequences into runs that are padded and computed together where that costs less."""
    bundles, begin, own, most_rows, most_keys = [], 0, 0, 0, 0
    for i, (r, k) in enumerate(zip(rows, keys, strict=True)):
        wider, longer = max(most_rows, r), max(most_keys, k)
        padded = (i - begin + 1) * wider * longer
        saved = (i - begin) * _SCORES_OF_A_LAUNCH
        if i > begin and padded > min(own + r * k + saved, _MOST_PADDED_SCORES):
            bundles.append((begin, i))
            begin, own, wider, longer = i, 0, r, k
        own, most_rows, most_keys = own + r * k, wider, longer
    return [*bundles, (begin, len(rows))] if rows else []


def _chunk(starts, contexts, tables, first, which, block_size, window, most_scores) -> Chunk:
    starts = starts[which.start : which.stop + 1]
    rows, contexts, first = np.diff(starts), contexts[which], first[which]
    lengths = contexts - first
    width = -(-int(lengths.max()) // block_size)
    columns = first[:, None] // block_size + np.arange(width)
    taken = np.take_along_axis(tables[which], np.minimum(columns, tables.shape[1] - 1), axis=1)
    chunk = Chunk(
        rows=slice(int(starts[0]), int(starts[-1])),
        tables=_padded(taken),
        lengths=_padded(lengths.astype(np.int32)),
        shape=(len(rows), width, int(lengths.max())),
        pieces=None,
    )
    if len(rows) == 1:
        count = -(-int(rows[0]) * int(contexts[0]) // most_scores)
        return chunk._replace(
            pieces=reference.pieces(int(rows[0]), int(contexts[0]), block_size, window, count)
        )
    most = int(rows.max())
    row = np.arange(most)
    spread = np.minimum(row, rows[:, None] - 1) + (starts[:-1] - starts[0])[:, None]
    places = np.concatenate([i * most + np.arange(n) for i, n in enumerate(rows)])
    queries = ((contexts - rows)[:, None] + row)[:, None, :, None]
    keys = (first[:, None] + np.arange(chunk.shape[2]))[:, None, None, :]
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    return chunk._replace(
        spread=mx.array(spread.reshape(-1)), places=mx.array(places), mask=mx.array(mask)
    )


def attend_chunk(
    q: mx.array,
    k_pool: mx.array,
    v_pool: mx.array,
    chunk: Chunk,
    fence: mx.array,
    *,
    scale: float,
    sinks: mx.array | None,
) -> mx.array:
    """Attention of a chunk's rows `q` (rows, heads, 1, k_dim): (rows, heads, 1, v_dim)."""
    k, v = gather(k_pool, v_pool, chunk.tables, chunk.lengths, chunk.shape, fence)
    if chunk.pieces is not None:
        q = q.transpose(2, 1, 0, 3)
        outs = [
            _dense_attention(
                q[:, :, piece.rows],
                k[:, :, piece.keys],
                v[:, :, piece.keys],
                scale=scale,
                mask=piece.mask,
                sinks=sinks,
            )
            for piece in chunk.pieces
        ]
        out = outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=2)
        return out.transpose(2, 1, 0, 3)
    sequences, heads = chunk.shape[0], q.shape[1]
    q = q[chunk.spread].reshape(sequences, -1, heads, q.shape[3]).swapaxes(1, 2)
    out = _dense_attention(q, k, v, scale=scale, mask=chunk.mask, sinks=sinks)
    out = out.swapaxes(1, 2).reshape(-1, heads, 1, v.shape[3])
    return out[chunk.places]


# -- as a backend --

LOOK_AHEAD = 1
COMPILES = True
_TABLE_WIDTH = 32


class Step(layout.Step):
    """The metadata that the kernels take, made once for all layers of a cache group."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        # A compiled function is good for one width.
        more = -self.tables.shape[1] % _TABLE_WIDTH
        self.tables = np.pad(self.tables, [(0, 0), (0, more)])
        slots = self.write_blocks * self.block_size + self.rows.positions % self.block_size
        self.slots = _padded(slots.astype(np.int32))
        self._work: dict[tuple, Work] = {}
        self._chunks: dict[tuple, list[Chunk]] = {}
        self._row_lengths: mx.array | None = None
        self.is_traced = False
        """While a function is compiled: metadata made now would stay what it is."""

    @property
    def row_lengths(self) -> mx.array:
        """(T or more,) positions that each row may read, without a window."""
        if self._row_lengths is None:
            self._row_lengths = _padded(self.rows.positions + 1)
        return self._row_lengths

    def prepare(self, kind: tuple, attention: tuple) -> None:
        """Makes the metadata that layers will take which attend so: see `LayerCache.attention`."""
        heads, _, window, _, _ = attention
        self.work(window, *run_cost(*kind, heads))

    def signature(self) -> tuple:
        """What launches depend on, beside the shapes of `arrays`."""
        return tuple((key, work[:4]) for key, work in self._work.items())

    def arrays(self) -> list[mx.array]:
        arrays = [self.slots]
        for work in self._work.values():
            arrays += [*work.inputs, *work.merge_inputs]
        return arrays

    def put(self, arrays: Iterator[mx.array]) -> None:
        """Puts others in the place of `arrays`."""
        self.slots = next(arrays)
        for key, work in self._work.items():
            inputs = [next(arrays) for _ in work.inputs]
            merge_inputs = [next(arrays) for _ in work.merge_inputs]
            self._work[key] = work._replace(inputs=inputs, merge_inputs=merge_inputs)

    def work(self, window: int | None, threadgroups: int, key_bytes: int) -> Work:
        """Of the sequences with a single row."""
        key = window, threadgroups, key_bytes
        if key not in self._work:
            if self.is_traced:
                raise RuntimeError("a layer attends otherwise than it did before")
            count, rows = self.rows.num_decoding, self.rows
            self._work[key] = plan_work(
                rows.starts[: count + 1],
                rows.contexts[:count],
                self.tables[:count],
                self.block_size,
                *key,
            )
        return self._work[key]

    def chunks(self, window: int | None, most_scores: int) -> list[Chunk]:
        """Of the others."""
        key = window, most_scores
        if key not in self._chunks:
            count, rows = self.rows.num_decoding, self.rows
            self._chunks[key] = plan_chunks(
                rows.starts[count:],
                rows.contexts[count:],
                self.tables[count:],
                self.block_size,
                window,
                most_scores,
            )
        return self._chunks[key]


class Pool:
    """The blocks of one layer, which only the kernels write and read."""

    def __init__(self, spec: LayerSpec, num_blocks: int, block_size: int):
        shape = (num_blocks + 1, spec.kv_heads, block_size)
        self.k = mx.zeros((*shape, spec.k_head_dim), spec.dtype)
        self.v = mx.zeros((*shape, spec.v_head_dim), spec.dtype)
        self.fence = mx.zeros(_LEAST, mx.int32)

    @property
    def kind(self) -> tuple[PoolKind, int]:
        """Shape and dtype of the K pool but for its blocks, and the head size of V."""
        return pool_kind(self.k), self.v.shape[3]

    def arrays(self) -> list[mx.array]:
        return [self.k, self.v, self.fence]

    def put(self, arrays: Iterator[mx.array]) -> None:
        """Puts others in the place of `arrays`."""
        self.k, self.v, self.fence = (next(arrays) for _ in range(3))

    def written(self) -> list[mx.array]:
        """What has to be evaluated in every step, so that its writes take place."""
        return [self.fence]

    def write(self, step: Step, k: mx.array, v: mx.array, after: mx.array | None) -> None:
        """k and v: (T, kv_heads, 1, head_dim)"""
        # Norms in float32 make such K of models whose V has 16 bits.
        k, v = k.astype(self.k.dtype), v.astype(self.v.dtype)
        after = self.fence if after is None else after
        self.fence = write(k, v, self.k, self.v, step.slots, after)

    def fetch(self, step: Step) -> tuple[mx.array, mx.array]:
        """K and V as each row may read them: (T, kv_heads, M * block_size, head_dim)."""
        rows, width = step.row_tables.shape
        shape = (rows, width, width * step.block_size)
        return gather(self.k, self.v, step.row_tables, step.row_lengths, shape, self.fence)

    def attend(self, step: Step, q: mx.array, window: int | None, scale: float, sinks) -> mx.array:
        """q (T, heads, 1, k_dim) -> (T, heads, 1, v_dim)"""
        pools = self.k, self.v
        q = q.astype(mx.result_type(q, self.k))  # the type of the results too, as MLX has it
        rows, heads = q.shape[:2]
        decoding = step.rows.num_decoding
        outs = []
        if decoding:
            work = step.work(window, *run_cost(*self.kind, heads))
            part = q if decoding == rows else q[:decoding]
            outs.append(paged_attention(part, *pools, work, self.fence, scale=scale, sinks=sinks))
        if decoding < rows:
            for chunk in step.chunks(window, self._most_scores(heads)):
                part = q[chunk.rows]
                outs.append(attend_chunk(part, *pools, chunk, self.fence, scale=scale, sinks=sinks))
        return outs[0] if len(outs) == 1 else mx.concatenate(outs)

    def _most_scores(self, heads: int) -> int:
        is_fused = self.k.dtype.size == 2 and self.k.shape[3] == self.v.shape[3] in (64, 80, 128)
        return 2**40 if is_fused else max(1, reference.MAX_SCORES // heads)
