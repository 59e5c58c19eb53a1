"""Chunks of prompts: their K and V are gathered, then MLX's own attention computes them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mlxpage.metal import reference
from mlxpage.metal.backend import mx
from mlxpage.metal.kernels.launch import padded
from mlxpage.metal.kernels.moving import gather
from mlxpage.metal.layout import Blocks, first_readable

_dense_attention = reference.dense_attention

# A launch for each sequence, or one for several, padded: so many more scores (rows times keys)
# under a mask take the time of the launches that one sequence less needs (docs/log.md).
_SCORES_OF_A_LAUNCH = 2**15
# That exist at once.
_MOST_PADDED_SCORES = 2**22


class Chunk(NamedTuple):
    """Consecutive rows of one sequence, or of several that are padded to the same shape."""

    rows: slice  # of the forward
    tables: mx.array
    lengths: mx.array  # positions that each sequence has in its tables
    shape: tuple[int, int, int]  # sequences, width of the tables, positions
    pieces: list[reference.Piece] | None  # of a single sequence
    # Of several, where not all are as long: (sequences * C,) the row at each place, or any, and
    # (rows,) where each row is then.
    spread: mx.array | None = None
    places: mx.array | None = None
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
    bundles, begin, most_rows, most_keys, scores = [], 0, 0, 0, 0
    for i, (r, k) in enumerate(zip(rows, keys, strict=True)):
        wider, longer = max(most_rows, r), max(most_keys, k)
        padded = (i - begin + 1) * wider * longer
        more = padded - scores
        if i > begin and (more > _SCORES_OF_A_LAUNCH or padded > _MOST_PADDED_SCORES):
            bundles.append((begin, i))
            begin, wider, longer, padded = i, r, k, r * k
        most_rows, most_keys, scores = wider, longer, padded
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
        tables=padded(taken),
        lengths=padded(lengths.astype(np.int32)),
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
    if rows.min() < most:
        spread = np.minimum(row, rows[:, None] - 1) + (starts[:-1] - starts[0])[:, None]
        places = np.flatnonzero(row < rows[:, None])
        chunk = chunk._replace(spread=_as_int32(spread.reshape(-1)), places=_as_int32(places))
    queries = ((contexts - rows)[:, None] + row)[:, None, :, None]
    keys = (first[:, None] + np.arange(chunk.shape[2]))[:, None, None, :]
    mask = keys <= queries
    if window is not None:
        mask &= keys > queries - window
    return chunk._replace(mask=mx.array(mask))


def _as_int32(rows: np.ndarray) -> mx.array:
    return mx.array(rows.astype(np.int32))


def attend_chunk(
    q: mx.array,
    blocks: Blocks,
    chunk: Chunk,
    fence: mx.array,
    *,
    scale: float,
    sinks: mx.array | None = None,
    q_v: mx.array | None = None,
) -> mx.array:
    """Attention of a chunk's rows `q` (rows, heads, 1, k_dim): (rows, heads, 1, v_dim). With `q_v`
    (rows, heads, 1, v_dim) it's latent attention, of k_dim."""
    k, v = gather(blocks, chunk.tables, chunk.lengths, chunk.shape, fence)
    if q_v is not None:
        q, scale = mx.concatenate([q * scale, q_v], axis=-1), 1.0
        k, v = mx.concatenate([k, v], axis=-1), k
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
    if chunk.spread is not None:
        q = _taken(q, chunk.spread)
    q = q.reshape(sequences, -1, heads, q.shape[3]).swapaxes(1, 2)
    out = _dense_attention(q, k, v, scale=scale, mask=chunk.mask, sinks=sinks)
    out = out.swapaxes(1, 2).reshape(-1, heads, 1, v.shape[3])
    return out if chunk.places is None else _taken(out, chunk.places)


def _taken(array: mx.array, places: mx.array) -> mx.array:
    """`array[places]`. On CUDA MLX's gather has a thread for each element, however small, which
    finds its place axis by axis; so it gets few axes of large ones. Rows of any head that the
    kernels serve have 16 bytes or a multiple."""
    words = array.reshape(len(array), -1).view(mx.uint64)
    return words[places].view(array.dtype).reshape(-1, *array.shape[1:])
