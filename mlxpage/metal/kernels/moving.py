"""Rows and blocks, moved: into their slots, out of their blocks, from block to block."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from mlxpage.metal.backend import mx
from mlxpage.metal.kernels.launch import LEAST, Launch, one_thread_a_piece, padded
from mlxpage.metal.kernels.upload import ints
from mlxpage.metal.layout import Blocks, Format, PoolKind


@lru_cache(256)
def pool_template(kind: PoolKind) -> dict:
    """What the texts are told about a pool."""
    template = {"KV": kind.k.dtype, "KV_HEADS": kind.kv_heads, "BLOCK_SIZE": kind.block_size}
    for name, part in (("K", kind.k), ("V", kind.v)):
        template |= {
            f"{name}_DIM": part.head_dim,
            f"{name}_BITS": part.element_bits,
            f"{name}_GROUP": part.group_size,
            f"{name}_HEAD": kind.block_size * (part.row_words + part.side_words),
        }
    return template


def _piece_width(part: Format) -> int:
    """Elements that a thread moves: 16 bytes of them at most, or those in a word of codes."""
    width = math.gcd(part.head_dim, 16 // part.dtype.size)
    return max(width, 32 // part.bits) if part.bits else width


def _template(kind: PoolKind) -> dict:
    widths = {"K_WIDTH": _piece_width(kind.k), "V_WIDTH": _piece_width(kind.v)}
    return pool_template(kind) | widths


def write(k: mx.array, v: mx.array, blocks: Blocks, slots: mx.array, after: mx.array) -> mx.array:
    """Writes rows into their slots of a pool, in place, quantised if the pool is.

    Args:
        k: (T, kv_heads, 1, k_dim), in the pool's dtype.
        v: (T, kv_heads, 1, v_dim).
        slots: (T or more,) int32, block * block_size + offset.
        after: of 8 elements or more; the write takes place once it's computed.

    Returns:
        A fence: what reads the rows has to take it in.
    """
    rows = k.shape[0]
    launch = _write_launch(rows, blocks.kind)
    return launch(k, v, blocks.k, blocks.v, slots, ints(rows), after)[0]


@lru_cache(1024)
def _write_launch(rows: int, kind: PoolKind) -> Launch:
    template = _template(kind)
    pieces = (
        rows
        * kind.kv_heads
        * sum(
            part.head_dim // (part.group_size if part.bits else _piece_width(part))
            for part in (kind.k, kind.v)
        )
    )
    return one_thread_a_piece("write_kv", template, pieces, ((LEAST,), mx.int32))


def gather(
    blocks: Blocks,
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
    launch = _gather_launch(sequences, positions, blocks.kind)
    k, v = launch(blocks.k, blocks.v, tables, lengths, ints(width, positions, sequences), fence)
    return k, v


@lru_cache(1024)
def _gather_launch(sequences: int, positions: int, kind: PoolKind) -> Launch:
    parts = kind.k, kind.v
    shape = sequences, kind.kv_heads, positions
    return one_thread_a_piece(
        "gather_blocks",
        _template(kind),
        math.prod(shape) * sum(part.head_dim // _piece_width(part) for part in parts),
        *(((*shape, part.head_dim), part.dtype) for part in parts),
    )


_COPIED_WORDS = 4  # of a thread


def copy_blocks(
    blocks: Blocks, pairs: np.ndarray, after: mx.array, source: Blocks | None = None
) -> mx.array:
    """Copies blocks within a pool, or into it from the arrays of `source`, in place; returns a
    fence, as `write` does.

    `pairs` (copies, 2) int32 are sources and targets. No block may be a source and a target of the
    same pool, or a target twice.
    """
    source = source or blocks
    template = pool_template(blocks.kind)
    words = template["KV_HEADS"] * (template["K_HEAD"] + template["V_HEAD"])
    pieces = len(pairs) * words // _COPIED_WORDS
    launch = one_thread_a_piece("copy_blocks", template, pieces, ((LEAST,), mx.int32))
    return launch(
        *(source.k, source.v, blocks.k, blocks.v),
        *(padded(pairs), ints(len(pairs)), after),
    )[0]
