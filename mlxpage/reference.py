"""Paged attention in plain MLX: the CPU's backend, every test's oracle, the kernels' specification.

A pool is `(num_blocks + 1, kv_heads, block_size, head_dim)`, one array for K and one for V of each
layer. A block's positions of one head stand together, so that one head of one block is a single
run of memory, for the gathers here as for a threadgroup that serves one head.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mlxpage.backend import mx

# MLX's own, taken before the seam puts its hook in this place.
_dense_attention = mx.fast.scaled_dot_product_attention

# Scores of a chunk's rows that exist at once where MLX has no fused attention, as on a CPU.
SCORES_BYTES = 128 * 2**20

# Sequences of a decode bucket are padded to its longest. A bucket of its own costs a handful of
# operations per layer, about what this many blocks per head cost to read.
_BUCKET_BLOCKS = 64


@dataclass(slots=True)
class Span:
    """Rows that are attended in one call: one row each of several sequences, or a chunk of one.

    `first` is the position where the tables start; sequences in a windowed group start late.
    """

    rows: slice
    tables: mx.array  # (S, M) int32 block ids, padded with NULL_BLOCK
    mask: mx.array | str | None  # (S, 1, C, M * block_size) bool, or "causal"
    num_keys: int  # of M * block_size, for a chunk: it needs no mask where it's cut to length
    _indices: dict[int, mx.array] = field(default_factory=dict)

    def head_indices(self, kv_heads: int) -> mx.array:
        """(S, kv_heads, M): where each head of each block lies in a pool seen as
        (blocks * kv_heads, block_size, head_dim). The same for all layers, so made once."""
        if kv_heads not in self._indices:
            heads = mx.arange(kv_heads, dtype=mx.int32)
            self._indices[kv_heads] = self.tables[:, None, :] * kv_heads + heads[None, :, None]
        return self._indices[kv_heads]


def plan(
    starts: np.ndarray,
    contexts: np.ndarray,
    tables: np.ndarray,
    block_size: int,
    window: int | None,
) -> list[Span]:
    """How the rows of a forward are attended, for the layers of one cache group.

    Args:
        starts: (S + 1,) row at which each sequence's rows start; sequences with a single row come
            first, shortest context first.
        contexts: (S,) positions that exist once this forward has written its rows.
        tables: (S, M) block ids, padded with NULL_BLOCK.
        block_size: positions in a block.
        window: a row at position p reads the positions k with p - window < k <= p.
    """
    lengths = np.diff(starts)
    # The first position that any row of the sequence reads, at the start of its block.
    first = np.zeros_like(contexts)
    if window is not None:
        first = np.maximum(0, contexts - lengths - window + 1) // block_size * block_size
    blocks = -(-(contexts - first) // block_size)

    spans = []
    num_decoding = int(np.searchsorted(lengths > 1, True))
    for begin, end, width in _buckets(blocks[:num_decoding]):
        # A sequence with fewer blocks than the bucket reads on past its own: masked.
        columns = first[begin:end, None] // block_size + np.arange(width)
        columns = np.minimum(columns, tables.shape[1] - 1)
        taken = np.take_along_axis(tables[begin:end], columns, axis=1)
        positions = first[begin:end, None] + np.arange(width * block_size)
        readable = positions < contexts[begin:end, None]
        if window is not None:
            readable &= positions >= contexts[begin:end, None] - window
        mask = None if readable.all() else mx.array(readable[:, None, None, :])
        rows = slice(int(starts[begin]), int(starts[end]))
        spans.append(Span(rows, mx.array(taken.astype(np.int32)), mask, readable.shape[1]))

    for i in range(num_decoding, len(lengths)):
        begin = first[i] // block_size
        taken = tables[i : i + 1, begin : begin + blocks[i]]
        keys = int(contexts[i] - first[i])
        mask: mx.array | str = "causal"
        if window is not None and contexts[i] > window:
            k = np.arange(first[i], contexts[i])[None, :]
            q = np.arange(contexts[i] - lengths[i], contexts[i])[:, None]
            mask = mx.array(((k <= q) & (k > q - window))[None, None])
        rows = slice(int(starts[i]), int(starts[i + 1]))
        spans.append(Span(rows, mx.array(taken.astype(np.int32)), mask, keys))
    return spans


def _buckets(blocks: np.ndarray) -> list[tuple[int, int, int]]:
    """Cuts block counts into runs (begin, end, largest count) that don't pad too much."""
    buckets, begin, total, width = [], 0, 0, 0
    for i, count in enumerate(blocks.tolist()):
        widened = max(width, count)
        if widened * (i - begin + 1) - (total + count) > _BUCKET_BLOCKS:
            buckets.append((begin, i, width))
            begin, total, widened = i, 0, count
        total, width = total + count, widened
    return [*buckets, (begin, len(blocks), width)] if len(blocks) else []


def write(pool: mx.array, rows: mx.array, blocks: mx.array, offsets: mx.array) -> mx.array:
    """The pool with `rows` (T, kv_heads, head_dim) at `offsets` (T,) of `blocks` (T,).

    In place if nobody else holds `pool`: MLX then gives its memory to the result.
    """
    pool[blocks, :, offsets] = rows
    return pool


def gather(pool: mx.array, indices: mx.array) -> mx.array:
    """(S, kv_heads, M * block_size, head_dim): the blocks at `Span.head_indices` in order."""
    _, _, block_size, head_dim = pool.shape
    taken = mx.take(pool.reshape(-1, block_size, head_dim), indices, axis=0)
    return taken.reshape(*indices.shape[:2], -1, head_dim)


def paged_attention(
    q: mx.array,
    k_pool: mx.array,
    v_pool: mx.array,
    spans: list[Span],
    *,
    scale: float,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention of every row to the positions of its own sequence.

    Args:
        q: (T, heads, head_dim), the rows in the order of the plan.
        k_pool: (num_blocks + 1, kv_heads, block_size, head_dim), the rows of this forward included.
        v_pool: likewise; its head_dim may differ.
        spans: from `plan`.
        scale: factor of the scores.
        sinks: (heads,) a logit that takes part in each head's softmax without a value.

    Returns:
        (T, heads, value head_dim)
    """
    kv_heads = k_pool.shape[1]
    outputs = []
    for span in spans:
        rows = q[span.rows] if len(spans) > 1 else q
        indices = span.head_indices(kv_heads)
        k, v = gather(k_pool, indices), gather(v_pool, indices)
        attend = _chunk if rows.shape[0] > span.tables.shape[0] else _decode
        outputs.append(attend(rows, k, v, span, scale, sinks))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


def _decode(q, k, v, span, scale, sinks):
    rows, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    # The heads of a group stand in as rows of one head: K and V are read once for all of them.
    # A sink belongs to a head, so there they stay apart.
    shape = (rows, kv_heads, -1, head_dim) if sinks is None else (rows, heads, 1, head_dim)
    out = _dense_attention(q.reshape(shape), k, v, scale=scale, mask=span.mask, sinks=sinks)
    return out.reshape(rows, heads, -1)


def _chunk(q, k, v, span, scale, sinks):
    rows, heads, _ = q.shape
    k, v = k[:, :, : span.num_keys], v[:, :, : span.num_keys]
    at_once = max(1, SCORES_BYTES // (4 * heads * span.num_keys))
    outputs = []
    for start in range(0, rows, at_once):
        end = min(start + at_once, rows)
        keys = span.num_keys - (rows - end) if span.mask == "causal" else span.num_keys
        out = _dense_attention(
            q[start:end].swapaxes(0, 1)[None],
            k[:, :, :keys],
            v[:, :, :keys],
            scale=scale,
            mask=span.mask if span.mask == "causal" else span.mask[:, :, start:end],
            sinks=sinks,
        )
        outputs.append(out[0].swapaxes(0, 1))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)
