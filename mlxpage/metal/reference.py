"""Paged attention in plain MLX: the CPU's backend, every test's oracle, the kernels' specification.

A pool is `(num_blocks + 1, kv_heads, block_size, head_dim)`, one array for K and one for V of each
layer. A block's positions of one head stand together, so that one head of one block is a single
run of memory, for the products here as for a threadgroup that serves one head. A quantised pool
keeps words there (see `layout.Format`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mlxpage.metal import layout
from mlxpage.metal.backend import mx
from mlxpage.metal.layout import Blocks, Format, first_readable
from mlxpage.metal.quantised import columns, dequantised, quantise

# MLX's own, taken before the seam puts its hook in this place.
dense_attention = mx.fast.scaled_dot_product_attention

# A call of its own costs a handful of operations per layer, about as much as reading this many
# blocks: sequences are padded to their bucket's longest rather than split over more buckets.
_BUCKET_BLOCKS = 64
# Scores (rows x keys x heads) of one call: on a CPU, which has no fused attention, they exist at
# once, and MLX runs some twenty calls ahead of the one that is computed.
MAX_SCORES = 2**22
_MAX_STREAMS = 4


@dataclass(slots=True)
class Span:
    """Rows that are attended in one call: a row each of several sequences, or a run of one's."""

    rows: slice
    tables: (
        mx.array
    )  # (S, M) int32 block ids, padded with NULL_BLOCK; one for all pieces of a chunk
    keys: slice  # of the M * block_size positions
    mask: mx.array | str | None  # (S, 1, C, keys) bool, or "causal"
    is_chunk: bool = False  # consecutive rows of one sequence, maybe only one of them
    stream: int = 0
    _indices: dict[int, mx.array] = field(default_factory=dict)

    def head_indices(self, kv_heads: int) -> mx.array:
        """(S, kv_heads, M): where each head of each block lies in a pool seen as
        (blocks * kv_heads, block_size, head_dim). The same for all layers, so made once."""
        if kv_heads not in self._indices:
            heads = mx.arange(kv_heads, dtype=mx.int32)
            self._indices[kv_heads] = self.tables[:, None, :] * kv_heads + heads[None, :, None]
        return self._indices[kv_heads]

    @property
    def cost(self) -> int:
        return (self.rows.stop - self.rows.start) * (self.keys.stop - self.keys.start)


def plan(
    starts: np.ndarray,
    contexts: np.ndarray,
    tables: np.ndarray,
    block_size: int,
    window: int | None,
    heads: int,
) -> list[Span]:
    """How the rows of a forward are attended, for the layers of one cache group.

    Args:
        starts: (S + 1,) row at which each sequence's rows start; sequences with a single row come
            first.
        contexts: (S,) positions that exist once this forward has written its rows.
        tables: (S, M) block ids, padded with NULL_BLOCK.
        block_size: positions in a block.
        window: a row at position p reads the positions k with p - window < k <= p.
        heads: of the queries.

    Returns:
        Spans in the order of the rows, spread over the CPU's streams.
    """
    streams = len(_streams())
    num_decoding = int(np.searchsorted(np.diff(starts) > 1, True))
    spans = [
        *_decoding(starts, contexts, tables, block_size, window, num_decoding, streams),
        *(
            span
            for i in range(num_decoding, len(contexts))
            for span in _chunk(
                range(int(starts[i]), int(starts[i + 1])),
                int(contexts[i]),
                tables[i : i + 1],
                block_size,
                window,
                heads,
                streams,
            )
        ),
    ]
    _spread(spans, streams)
    return spans


def _decoding(
    starts, contexts, tables, block_size: int, window: int | None, num_decoding: int, streams: int
) -> Iterator[Span]:
    """Spans of the sequences with a single row."""
    first = first_readable(contexts[:num_decoding] - 1, block_size, window)
    blocks = -(-(contexts[:num_decoding] - first) // block_size)
    for begin, end, width in buckets(blocks, streams):
        # A sequence with fewer blocks than its bucket reads on past its own: masked.
        columns = first[begin:end, None] // block_size + np.arange(width)
        columns = np.minimum(columns, tables.shape[1] - 1)
        taken = np.take_along_axis(tables[begin:end], columns, axis=1)
        keys = first[begin:end, None] + np.arange(width * block_size)
        ends = contexts[begin:end, None]
        readable = (keys < ends) if window is None else (keys < ends) & (keys >= ends - window)
        mask = None if readable.all() else mx.array(readable[:, None, None, :])
        rows = slice(int(starts[begin]), int(starts[end]))
        yield Span(rows, mx.array(taken), slice(0, readable.shape[1]), mask)


def _chunk(
    rows: range,
    context: int,
    table: np.ndarray,
    block_size: int,
    window: int | None,
    heads: int,
    streams: int,
) -> Iterator[Span]:
    """Spans of one sequence's rows, its last ones. They read parts of the same blocks, which are
    gathered once."""
    scores = len(rows) * context * heads
    count = -(-scores // MAX_SCORES)
    if streams > 1 and scores > MAX_SCORES // 8:
        # Later rows have more keys: two pieces each, the first with the last, even it out.
        count = max(count, 2 * streams)
    base = int(first_readable(context - len(rows), block_size, window))
    blocks = mx.array(table[:, base // block_size : -(-context // block_size)])
    for piece in pieces(len(rows), context, block_size, window, count):
        own = slice(rows[0] + piece.rows.start, rows[0] + piece.rows.stop)
        yield Span(own, blocks, piece.keys, piece.mask, is_chunk=True)


class Piece(NamedTuple):
    """Some rows of a chunk, and the positions they read."""

    rows: slice  # of the chunk
    keys: slice  # of the positions from the first block on that the chunk reads
    mask: mx.array | str  # (1, 1, rows, keys) bool, or "causal"


def pieces(rows: int, context: int, block_size: int, window: int | None, count: int) -> list[Piece]:
    """Cuts a chunk, the last `rows` positions of `context`, into `count` pieces, so that not all
    of its scores exist at once."""
    before = context - rows
    base = int(first_readable(before, block_size, window))
    cuts = np.linspace(0, rows, min(count, rows) + 1).astype(int).tolist()
    return [_piece(begin, end, before, base, block_size, window) for begin, end in pairwise(cuts)]


def _piece(begin, end, before, base, block_size, window) -> Piece:
    q = np.arange(before + begin, before + end)
    first = int(first_readable(q[0], block_size, window))
    mask: mx.array | str = "causal"
    if window is not None and before + end > window:
        k = np.arange(first, before + end)
        mask = mx.array((k <= q[:, None]) & (k > q[:, None] - window))[None, None]
    return Piece(slice(begin, end), slice(first - base, before + end - base), mask)


def buckets(blocks: np.ndarray, streams: int) -> list[tuple[int, int, int]]:
    """Cuts block counts into runs (begin, end, largest count) that don't pad too much, and give
    every stream its share."""
    share = max(_BUCKET_BLOCKS, blocks.sum() / streams)
    buckets, begin, total, width = [], 0, 0, 0
    for i, count in enumerate(blocks.tolist()):
        padding = max(width, count) * (i - begin + 1) - (total + count)
        if i > begin and (padding > _BUCKET_BLOCKS or total + count / 2 > share):
            buckets.append((begin, i, width))
            begin, total, width = i, 0, 0
        total, width = total + count, max(width, count)
    return [*buckets, (begin, len(blocks), width)] if len(blocks) else []


def _spread(spans: list[Span], streams: int) -> None:
    """Gives each span, the most costly first, to the stream that has the least to do."""
    load = [0] * streams
    for span in sorted(spans, key=lambda span: span.cost, reverse=True):
        span.stream = load.index(min(load))
        load[span.stream] += span.cost


@cache
def _streams() -> list:
    """One for each of the CPU's cores: MLX runs the operations of a stream one after the other,
    each on a single core. None is the default stream; on a GPU it's the only one."""
    if mx.default_device() != mx.cpu:
        return [None]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    others = [mx.new_thread_local_stream(mx.cpu) for _ in range(min(cores or 1, _MAX_STREAMS) - 1)]
    return [None, *others]


def write(
    pool: mx.array,
    rows: mx.array,
    part: Format,
    blocks: mx.array,
    offsets: mx.array,
    begun: mx.array | None,
) -> mx.array:
    """The pool with `rows` (T, kv_heads, head_dim) at `offsets` (T,) of `blocks` (T,).

    `begun` (B,) are the blocks that get their first row but not all of them. The rest of them is
    zeroed: what the last owner left there is masked, but a weight of zero doesn't hide a NaN.

    In place if nobody else holds `pool`: MLX then gives its memory to the result.
    """
    if not rows.size:  # of a layer without V: MLX ends the process when it scatters nothing
        return pool
    if begun is not None:
        pool[begun] = 0
    if part.bits is None:
        pool[blocks, :, offsets] = rows
    else:
        words = quantise(rows, part)
        block_size = pool.shape[2] // (part.row_words + part.side_words)
        where = columns(part, offsets, block_size)[:, None]
        pool[blocks[:, None, None], mx.arange(pool.shape[1])[:, None], where] = words
    return pool


def copy_blocks(pool: mx.array, pairs: np.ndarray) -> mx.array:
    """The pool after its blocks were copied, `pairs` (C, 2) of source and target in order; in
    place as in `write`."""
    if not pool.size:
        return pool
    sources, targets = mx.array(pairs[:, 0]), mx.array(pairs[:, 1])
    # All are read before one is written: a block may be a target after it was a source. And they
    # have been read, or what is still to be read would hold the pool.
    taken = pool[sources]
    mx.eval(taken)
    pool[targets] = taken
    return pool


def gather(blocks: Blocks, indices: mx.array) -> tuple[mx.array, mx.array]:
    """K and V (S, kv_heads, M * block_size, head_dim): the blocks at `Span.head_indices` in
    order."""
    k = _gathered(blocks.k, blocks.kind.k, blocks.kind.block_size, indices)
    return k, _gathered(blocks.v, blocks.kind.v, blocks.kind.block_size, indices)


def _gathered(pool: mx.array, part: Format, block_size: int, indices: mx.array) -> mx.array:
    taken = mx.take(pool.flatten(0, 1), indices, axis=0)
    if part.bits is not None:
        taken = dequantised(taken, part, block_size)
    return taken.reshape(*indices.shape[:2], indices.shape[2] * block_size, part.head_dim)


def paged_attention(
    q: mx.array,
    blocks: Blocks,
    spans: list[Span],
    *,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention of every row to the positions of its own sequence.

    Args:
        q: (T, heads, head_dim), the rows in the order of the plan.
        blocks: with the rows of this forward.
        spans: from `plan`.
        scale: factor of the scores.
        sinks: (heads,) a logit that takes part in each head's softmax without a value.

    Returns:
        (T, heads, value head_dim)
    """
    outputs = []
    chunk, k, v = None, None, None  # the chunk whose K and V were gathered last
    for span in spans:
        rows = q[span.rows] if len(spans) > 1 else q
        stream = _streams()[span.stream]
        with mx.stream(stream) if stream else nullcontext():
            if not span.is_chunk:
                outputs.append(_decode(rows, blocks, span, scale, sinks))
                continue
            if span.tables is not chunk:
                indices = span.head_indices(blocks.kind.kv_heads)
                chunk, k, v = span.tables, *_gather_to_read(blocks, indices)
            outputs.append(_attend_piece(rows, k, v, span, scale, sinks))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


def _gather_to_read(blocks, indices):
    k, v = gather(blocks, indices)
    if blocks.kind.is_quantised:
        # Unpacking takes several times the memory of its result: not for K, V and other layers at
        # once.
        for array in (k, v):
            mx.eval(array)
    return k, v


def _attend_piece(q, k, v, span, scale, sinks):
    """q: (C, heads, head_dim), the last C of `span.keys`, which k and v hold among others"""
    k, v = k[:, :, span.keys], v[:, :, span.keys]
    q = q.swapaxes(0, 1)[None]
    out = dense_attention(q, k, v, scale=scale, mask=span.mask, sinks=sinks)
    return out[0].swapaxes(0, 1)


def _decode(q, blocks, span, scale, sinks):
    """q: (S, heads, head_dim), the last position of each of S sequences"""
    all_float32 = q.dtype == blocks.k.dtype == blocks.v.dtype == mx.float32
    if all_float32 and mx.default_device() == mx.cpu:
        return _decode_where_blocks_lie(q, blocks.k, blocks.v, span, scale, sinks)
    rows, heads, _ = q.shape
    k, v = _gather_to_read(blocks, span.head_indices(blocks.kind.kv_heads))
    out = dense_attention(q[:, :, None], k, v, scale=scale, mask=span.mask, sinks=sinks)
    return out.reshape(rows, heads, -1)


def _decode_where_blocks_lie(q, k_pool, v_pool, span, scale, sinks):
    """As `_decode`, without copying K and V: a small product for each block, half the time on a
    CPU. In float32 only, for the scores pass through the products' dtype."""
    _, kv_heads, block_size, k_dim = k_pool.shape
    v_dim = v_pool.shape[3]
    blocks = span.head_indices(kv_heads)  # (S, kv_heads, M)
    sequences, _, width = blocks.shape
    queries = mx.arange(sequences * kv_heads, dtype=mx.int32).reshape(sequences, kv_heads, 1)
    scores = mx.gather_mm(
        (q * scale).reshape(sequences * kv_heads, -1, k_dim),
        k_pool.reshape(-1, block_size, k_dim).swapaxes(1, 2),
        mx.broadcast_to(queries, blocks.shape),
        blocks,
    )  # (S, kv_heads, M, group, block_size)
    scores = scores.swapaxes(2, 3).reshape(sequences, kv_heads, -1, width * block_size)
    if span.mask is not None:
        scores = mx.where(span.mask, scores, -mx.inf)
    weights = _softmax(scores, sinks).reshape(sequences, kv_heads, -1, width, block_size)
    parts = mx.gather_mm(
        weights.swapaxes(2, 3), v_pool.reshape(-1, block_size, v_dim), rhs_indices=blocks
    )  # (S, kv_heads, M, group, v_dim)
    return parts.sum(axis=2).reshape(sequences, -1, v_dim)


def _softmax(scores: mx.array, sinks: mx.array | None) -> mx.array:
    """scores: (S, kv_heads, group, keys); a head's sink takes a share and gives no value."""
    if sinks is None:
        return mx.softmax(scores, axis=-1)
    sequences, kv_heads, group, _ = scores.shape
    sinks = sinks.astype(scores.dtype).reshape(1, kv_heads, group, 1)
    sinks = mx.broadcast_to(sinks, (sequences, kv_heads, group, 1))
    return mx.softmax(mx.concatenate([scores, sinks], axis=-1), axis=-1)[..., :-1]


# -- as a backend --

# A step that is dispatched while the last one holds the pool would copy the pool.
LOOK_AHEAD = 0
# On a CPU, building a graph is little beside computing it, and compiling takes a compiler.
COMPILES = False


class Step(layout.Step):
    """Where the rows go, and how they are attended, made once for all layers of a cache group."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        offsets = self.rows.positions % self.block_size
        begun = self.write_blocks[offsets == 0]
        begun = np.setdiff1d(begun, self.write_blocks[offsets == self.block_size - 1])
        self.slots = (
            mx.array(self.write_blocks),
            mx.array(offsets),
            mx.array(begun) if len(begun) else None,
        )
        self._spans: dict[tuple, list[Span]] = {}

    def spans(self, window: int | None, heads: int) -> list[Span]:
        if (window, heads) not in self._spans:
            rows = self.rows
            self._spans[window, heads] = plan(
                rows.starts, rows.contexts, self.tables, self.block_size, window, heads
            )
        return self._spans[window, heads]


class Pool(layout.Pool):
    """The blocks of one layer, as MLX arrays that each write replaces by its result."""

    def arrays(self) -> list[mx.array]:
        return self.held()

    def written(self) -> list[mx.array]:
        """What has to be evaluated in every step, so that its writes take place."""
        return self.held()

    def write(
        self, step: Step, k: mx.array, v: mx.array, after: mx.array | None, *, is_read: bool
    ) -> None:
        """k and v: (T, kv_heads, 1, head_dim). MLX itself knows what comes `after` what, and who
        reads."""
        self.k = write(self.k, k.squeeze(2), self.kind.k, *step.slots)
        self.v = write(self.v, v.squeeze(2), self.kind.v, *step.slots)

    def copy(self, pairs: np.ndarray, after: mx.array | None) -> mx.array | None:
        """Copies blocks (C, 2), of which none is a target before it is a source."""
        self.k, self.v = copy_blocks(self.k, pairs), copy_blocks(self.v, pairs)
        return after

    def load(
        self, blocks: np.ndarray, contents: list[mx.array], after: mx.array | None
    ) -> mx.array | None:
        """Makes K and V `contents` what `blocks` (B,) hold."""
        where = mx.array(blocks)
        for pool, content in zip(self.held(), contents, strict=True):
            if content.size:
                pool[where] = content
        return after

    def fetch(self, step: Step) -> tuple[mx.array, mx.array]:
        """K and V as each row, or all of a run, may read them: (T or 1, kv_heads, positions,
        head_dim)."""
        kv_heads = self.kind.kv_heads
        heads = mx.arange(kv_heads, dtype=mx.int32)[None, :, None]
        indices = step.fetched_tables[:, None, :] * kv_heads + heads
        k, v = gather(Blocks(self.k, self.v, self.kind), indices)
        return k[:, :, : step.num_fetched], v[:, :, : step.num_fetched]

    def attend(self, step: Step, q: mx.array, window: int | None, scale: float, sinks) -> mx.array:
        """q (T, heads, 1, k_dim) -> (T, heads, 1, v_dim)"""
        spans = step.spans(window, q.shape[1])
        blocks = Blocks(self.k, self.v, self.kind)
        out = paged_attention(q.squeeze(2), blocks, spans, scale=scale, sinks=sinks)
        return out[:, :, None]
