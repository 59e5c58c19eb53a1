"""Paged attention in plain MLX: the CPU's backend, every test's oracle, the kernels' specification.

A pool is `(num_blocks + 1, kv_heads, block_size, head_dim)`, one array for K and one for V of each
layer. A block's positions of one head stand together, so that one head of one block is a single
run of memory, for the products here as for a threadgroup that serves one head. A quantised pool
keeps words there (see `layout.Format`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mlxpage.metal import layout
from mlxpage.metal.backend import mx
from mlxpage.metal.cascade import Run, common_runs, without
from mlxpage.metal.layout import Blocks, Format, first_readable
from mlxpage.metal.quantised import columns, dequantised, quantise
from mlxpage.metal.streams import cpu_streams

# MLX's own, taken before the seam puts its hook in this place.
dense_attention = mx.fast.scaled_dot_product_attention

# A call of its own costs a handful of operations per layer, about as much as reading this many
# blocks: sequences are padded to their bucket's longest rather than split over more buckets.
_BUCKET_BLOCKS = 64
# Scores (rows x keys x heads) that exist at once in one call on a CPU, which has no fused
# attention: twice, as they are and as exponentials. MLX runs some twenty calls ahead of the one
# that is computed.
MAX_SCORES = 2**22
_COPIES = 2
# So many are worth a second core.
_SCORES_TO_SPREAD = 2**15
# Of a head of K and V. With many, a product of their own is a small part of reading the blocks, and
# BLAS would divide it among its threads.
_FEW_QUERIES = 128


@dataclass(slots=True)
class Span:
    """Rows that are attended in one call: a row each of several sequences, or some that read the
    same keys."""

    rows: slice  # of its level's
    tables: (
        mx.array
    )  # (S, M) int32 block ids, padded with NULL_BLOCK; one for all pieces of a chunk
    keys: slice  # of the M * block_size positions
    mask: mx.array | str | None  # (S, 1, C, keys) bool, or "causal"
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


@dataclass(slots=True)
class Level:
    """Spans that read some of their rows' keys. What came of the level before is one more key."""

    spans: list[Span]
    rows: mx.array | None = None  # (R,) of the forward, in the order of the spans; None: all
    before: mx.array | None = None  # (R,) places in the level before; past its end: in none


@dataclass(slots=True)
class Plan:
    """How the rows of a forward are attended: the keys that several sequences share, if any do,
    then what else each row reads."""

    levels: list[Level]
    places: mx.array | None = None  # (T,) of each row in the last level; None: in order

    @property
    def spans(self) -> list[Span]:
        """All rows with what they read alone."""
        return self.levels[-1].spans


def plan(
    starts: np.ndarray,
    contexts: np.ndarray,
    tables: np.ndarray,
    block_size: int,
    window: int | None,
    heads: int,
) -> Plan:
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
        Spans spread over the CPU's streams.
    """
    windows = None if window is None else np.full_like(contexts, window)
    runs = _common_runs(starts, contexts, tables, block_size, windows)
    if not runs:
        return Plan([Level(_own(starts, contexts, tables, block_size, windows, heads))])
    return _cascade(runs, starts, contexts, tables, block_size, windows, heads)


def _cascade(
    runs: list[Run], starts, contexts, tables, block_size: int, windows, heads: int
) -> Plan:
    """Attends what is shared, and then the rest: as it would be if the runs weren't there, for all
    keys in them are read. Contexts are shorter by them, and windows too."""
    shared, shared_rows = _shared(runs, starts, tables, block_size, heads)
    cut = np.zeros_like(contexts)
    for run in runs:
        cut[run.sequences] = run.length * block_size
    contexts, tables = contexts - cut, without(tables, runs)
    # Again the shortest first.
    count = _num_decoding(starts)
    order = np.arange(len(contexts))
    order[:count] = np.argsort(contexts[:count], kind="stable")
    windows = None if windows is None else (windows - cut)[order]
    own = _own(starts, contexts[order], tables[order], block_size, windows, heads)
    rows = np.concatenate([order[:count], np.arange(count, starts[-1])])
    before = np.full(starts[-1], len(shared_rows))
    before[shared_rows] = np.arange(len(shared_rows))
    levels = [
        Level(shared, mx.array(shared_rows)),
        Level(own, mx.array(rows), mx.array(before[rows])),
    ]
    return Plan(levels, mx.array(np.argsort(rows)))


def _num_decoding(starts) -> int:
    """Sequences with a single row."""
    return int(np.searchsorted(np.diff(starts) > 1, True))


def _common_runs(starts, contexts, tables, block_size: int, windows) -> list[Run]:
    """Of blocks that all rows of some sequences read entirely."""
    if mx.default_device() != mx.cpu:
        return []  # fused attention doesn't give the sums that it takes to go on
    first = np.zeros_like(contexts)
    if windows is not None:
        first = -(-np.maximum(contexts - windows, 0) // block_size)
    return common_runs(tables, first, (contexts - np.diff(starts)) // block_size)


def _shared(
    runs: list[Run], starts, tables, block_size: int, heads: int
) -> tuple[list[Span], np.ndarray]:
    """Spans of what sequences share, and their rows. They read the same blocks, which are gathered
    once."""
    spans, rows, streams = [], [], len(cpu_streams())
    for run in runs:
        begin = len(rows)
        for i in run.sequences:
            rows += range(starts[i], starts[i + 1])
        keys = run.length * block_size
        scores = (len(rows) - begin) * keys * heads
        count = -(-scores * _COPIES // MAX_SCORES)
        if scores > _SCORES_TO_SPREAD:
            count = -(-count // streams) * streams
        blocks = mx.array(tables[run.sequences[:1], run.begin : run.end])
        spans += [
            Span(slice(*cut), blocks, slice(0, keys), None)
            for cut in _cuts(begin, len(rows), count)
        ]
    _spread(spans, streams)
    return spans, np.array(rows)


def _own(starts, contexts, tables, block_size: int, windows, heads: int) -> list[Span]:
    """Spans of all rows in order, as if no sequence had anything in common with another.

    Arguments as in `plan`, but for `windows`, (S,) one of each sequence.
    """
    streams = len(cpu_streams())
    num_decoding = _num_decoding(starts)
    spans = [
        *_decoding(starts, contexts, tables, block_size, windows, num_decoding, streams),
        *(
            span
            for i in range(num_decoding, len(contexts))
            for span in _chunk(
                range(int(starts[i]), int(starts[i + 1])),
                int(contexts[i]),
                tables[i : i + 1],
                block_size,
                None if windows is None else int(windows[i]),
                heads,
                streams,
            )
        ),
    ]
    _spread(spans, streams)
    return spans


def _decoding(
    starts, contexts, tables, block_size: int, windows, num_decoding: int, streams: int
) -> Iterator[Span]:
    """Spans of the sequences with a single row."""
    contexts = contexts[:num_decoding]
    windows = None if windows is None else windows[:num_decoding]
    first = first_readable(contexts - 1, block_size, windows)
    blocks = -(-(contexts - first) // block_size)
    for begin, end, width in buckets(blocks, streams):
        # A sequence with fewer blocks than its bucket reads on past its own: masked.
        columns = first[begin:end, None] // block_size + np.arange(width)
        columns = np.minimum(columns, tables.shape[1] - 1)
        taken = np.take_along_axis(tables[begin:end], columns, axis=1)
        keys = first[begin:end, None] + np.arange(width * block_size)
        ends = contexts[begin:end, None]
        readable = keys < ends
        if windows is not None:
            readable &= keys >= ends - windows[begin:end, None]
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
    count = -(-scores * _COPIES // MAX_SCORES)
    if streams > 1 and scores > MAX_SCORES // 8:
        # Later rows have more keys: two pieces each, the first with the last, even it out.
        count = max(count, 2 * streams)
    base = int(first_readable(context - len(rows), block_size, window))
    blocks = mx.array(table[:, base // block_size : -(-context // block_size)])
    for piece in pieces(len(rows), context, block_size, window, count):
        own = slice(rows[0] + piece.rows.start, rows[0] + piece.rows.stop)
        yield Span(own, blocks, piece.keys, piece.mask)


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
    return [_piece(*cut, before, base, block_size, window) for cut in _cuts(0, rows, count)]


def _cuts(begin: int, end: int, count: int) -> Iterator[tuple[int, int]]:
    """About equal parts of some rows."""
    return pairwise(np.linspace(begin, end, min(count, end - begin) + 1).astype(int).tolist())


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


class Attended(NamedTuple):
    """What came of attending rows to some of their keys. To a softmax that has further keys it is
    one key: with the sum of their exponentials, and what they gave together."""

    values: mx.array | None  # (R, heads, v_dim); None: nothing
    logits: mx.array  # (R, heads, 1) log of the sum; (1, heads, 1) if alike for all rows

    def of(self, rows: slice, sequences: int) -> Attended:
        """Of some rows, as `_turned`."""
        if self.values is None:
            return Attended(None, self.logits[..., None])
        return Attended(*(_turned(each[rows], sequences) for each in self))


def paged_attention(
    q: mx.array,
    blocks: Blocks,
    plan: Plan,
    *,
    scale: float,
    sinks: mx.array | None = None,
    q_v: mx.array | None = None,
) -> mx.array:
    """Attention of every row to the positions of its own sequence.

    Latent attention, with `q_v`, has one head of K and V. Its values are K, and its scores are
    `scale * q @ K + q_v @ V`.

    Args:
        q: (T, heads, head_dim), the rows in the order of the plan's arguments.
        blocks: with the rows of this forward.
        plan: from `plan`.
        scale: factor of the scores.
        sinks: (heads,) a logit that takes part in each head's softmax without a value.
        q_v: (T, heads, value head_dim), scaled already.

    Returns:
        (T, heads, value head_dim), of latent attention (T, heads, head_dim).
    """
    dtype = mx.result_type(q.dtype, blocks.kind.k.dtype)  # as MLX has it
    is_latent = q_v is not None
    if is_latent:
        wide = mx.float32 if mx.default_device() == mx.cpu else dtype
        q, scale = mx.concatenate([q.astype(wide) * scale, q_v.astype(wide)], axis=-1), 1.0
    before = start = None if sinks is None else Attended(None, sinks[None, :, None])
    parts: list[Attended] = []
    for level in plan.levels:
        rows = q if level.rows is None else q[level.rows]
        if level.before is not None:
            before = _joined(parts, start, level.before)
        parts = _attend_spans(rows, blocks, level.spans, before, scale, is_latent)
    out = parts[0].values if len(parts) == 1 else mx.concatenate([part.values for part in parts])
    out = out.astype(dtype)
    return out if plan.places is None else out[plan.places]


def _joined(parts: list[Attended], start: Attended | None, places: mx.array) -> Attended:
    """Of the rows of a level, at their places among the parts of the level before."""
    values = [part.values for part in parts]
    logits = [part.logits for part in parts]
    values.append(mx.zeros((1, *values[0].shape[1:]), values[0].dtype))
    logits.append(start.logits if start else mx.full((1, *logits[0].shape[1:]), -mx.inf))
    return Attended(mx.concatenate(values)[places], mx.concatenate(logits)[places])


def _attend_spans(q, blocks, spans, before, scale, is_latent) -> list[Attended]:
    parts = []
    tables, k, v = None, None, None  # whose K and V were gathered last
    for span in spans:
        count = span.tables.shape[0]
        rows = _turned(q[span.rows] if len(spans) > 1 else q, count)
        rest = span.mask, before and before.of(span.rows, count), scale
        stream = cpu_streams()[span.stream]
        with mx.stream(stream) if stream else nullcontext():
            indices = span.head_indices(blocks.kind.kv_heads)
            if _is_read_in_place(rows, blocks, span):
                part = _attend_in_place(rows, blocks, indices, *rest)
            else:
                if span.tables is not tables:
                    tables, k, v = span.tables, *_gather_to_read(blocks, indices, is_latent)
                part = _attend(rows, k[:, :, span.keys], v[:, :, span.keys], *rest)
            parts.append(Attended(*(_rows(each) for each in part)))
    return parts


def _turned(rows: mx.array, sequences: int) -> mx.array:
    """Rows (R, heads, head_dim) as (sequences, heads, rows of each, head_dim)."""
    return rows.reshape(sequences, -1, *rows.shape[1:]).swapaxes(1, 2)


def _rows(turned: mx.array) -> mx.array:
    """The rows (R, heads, head_dim) again."""
    return turned.swapaxes(1, 2).flatten(0, 1)


def _gather_to_read(blocks, indices, is_latent):
    k, v = gather(blocks, indices)
    if is_latent:
        k, v = mx.concatenate([k, v], axis=-1), k
    if mx.default_device() == mx.cpu:
        # In 16 bits products are slow there, and scores would be rounded.
        k, v = k.astype(mx.float32), v.astype(mx.float32)
    if blocks.kind.is_quantised:
        # Unpacking takes several times the memory of its result: not for K, V and other layers at
        # once.
        for array in (k, v):
            mx.eval(array)
    return k, v


def _is_read_in_place(q, blocks, span) -> bool:
    """In float32 only, which all products are in."""
    if mx.default_device() != mx.cpu:
        return False
    all_float32 = q.dtype == blocks.k.dtype == blocks.v.dtype == mx.float32
    all_keys = span.keys == slice(0, span.tables.shape[1] * blocks.kind.block_size)
    few = q.shape[1] * q.shape[2] <= _FEW_QUERIES * blocks.kind.kv_heads
    return all_float32 and all_keys and few


def _attend(q, k, v, mask, before, scale) -> Attended:
    """q: (S, heads, C, k_dim); k, v: (S, kv_heads, keys, head_dim), on a CPU in float32; mask: as
    in `Span`"""
    if mx.default_device() != mx.cpu:
        sinks = before and before.logits.flatten()
        out = dense_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
        return Attended(out, out[..., :1])  # without sums: here nothing is shared
    sequences, heads, rows, k_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    q = q.astype(mx.float32) * scale
    scores = q.reshape(sequences, kv_heads, -1, k_dim) @ k.swapaxes(2, 3)
    scores = scores.reshape(sequences, heads, rows, keys)

    def values(weights):
        weights = weights.reshape(sequences, kv_heads, -1, keys)
        return (weights @ v).reshape(sequences, heads, rows, -1)

    return _weighed(scores, mask, before, values)


def _attend_in_place(q, blocks, indices, mask, before, scale) -> Attended:
    """As `_attend`, of the blocks at `indices` (S, kv_heads, M) where they lie: a small product for
    each, half the time on a CPU for few queries."""
    sequences, heads, rows, k_dim = q.shape
    _, kv_heads, block_size, size = blocks.k.shape
    queries = mx.arange(sequences * kv_heads, dtype=mx.int32).reshape(sequences, kv_heads, 1)
    q = (q * scale).reshape(sequences * kv_heads, -1, k_dim)

    def products(q, pool):  # (S, kv_heads, M, group * C, block_size)
        pool, which = pool.flatten(0, 1), mx.broadcast_to(queries, indices.shape)
        return mx.gather_mm(q, pool.swapaxes(1, 2), which, indices)

    scores, held = products(q[..., :size], blocks.k), blocks.v
    if k_dim > size:  # of latent attention
        scores, held = scores + products(q[..., size:], blocks.v), blocks.k
    scores = scores.swapaxes(2, 3).reshape(sequences, heads, rows, -1)

    def values(weights):
        weights = weights.reshape(sequences, kv_heads, -1, indices.shape[2], block_size)
        parts = mx.gather_mm(weights.swapaxes(2, 3), held.flatten(0, 1), rhs_indices=indices)
        return parts.sum(axis=2).reshape(sequences, heads, rows, -1)

    return _weighed(scores, mask, before, values)


def _weighed(
    scores: mx.array,
    mask: mx.array | str | None,
    before: Attended | None,
    values: Callable[[mx.array], mx.array],
) -> Attended:
    """A softmax of scores (S, heads, C, keys), and what `values` makes of weights.

    `before` is (S, heads, C, head_dim) of what the rows were attended to already.
    """
    if isinstance(mask, str):  # causal
        rows, keys = scores.shape[2:]
        mask = mx.arange(keys) <= mx.arange(keys - rows, keys)[:, None]
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    largest = scores.max(axis=-1, keepdims=True)
    if before is not None:
        largest = mx.maximum(largest, before.logits)
    weights = _exp(scores - largest)
    total = weights.sum(axis=-1, keepdims=True)
    out = values(weights)
    if before is not None:
        share = _exp(before.logits - largest)
        total = total + share
        if before.values is not None:
            out = out + share * before.values
    return Attended(out / total, largest + mx.log(total))


def _exp(x: mx.array) -> mx.array:
    """A power of e: on a CPU `mx.exp` takes 12 ns, which is most of attention, and this 4.5."""
    return mx.power(math.e, x)


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
        self._plans: dict[tuple, Plan] = {}

    def plan(self, window: int | None, heads: int) -> Plan:
        if (window, heads) not in self._plans:
            rows = self.rows
            self._plans[window, heads] = plan(
                rows.starts, rows.contexts, self.tables, self.block_size, window, heads
            )
        return self._plans[window, heads]


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
        plan = step.plan(window, q.shape[1])
        blocks = Blocks(self.k, self.v, self.kind)
        out = paged_attention(q.squeeze(2), blocks, plan, scale=scale, sinks=sinks)
        return out[:, :, None]

    def attend_latent(self, step: Step, q: mx.array, q_v: mx.array, scale: float) -> mx.array:
        """q (T, heads, 1, k_dim) and q_v (T, heads, 1, v_dim) -> (T, heads, 1, k_dim)"""
        plan = step.plan(None, q.shape[1])
        blocks = Blocks(self.k, self.v, self.kind)
        q, q_v = q.squeeze(2), q_v.squeeze(2)
        return paged_attention(q, blocks, plan, scale=scale, q_v=q_v)[:, :, None]
