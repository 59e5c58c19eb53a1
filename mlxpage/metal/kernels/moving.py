"""Rows and blocks, moved: into their slots, out of their blocks, from block to block."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from mlxpage.metal.backend import mx
from mlxpage.metal.kernels.launch import LEAST, Launch, ints, one_thread_a_piece, padded

PoolKind = tuple[tuple[int, int, int], mx.Dtype]  # a pool's shape but its blocks, and its dtype


def _pool_template(k_pool: PoolKind, v_dim: int) -> dict:
    (kv_heads, block_size, k_dim), dtype = k_pool
    return {
        "KV": dtype,
        "K_DIM": k_dim,
        "V_DIM": v_dim,
        "KV_HEADS": kv_heads,
        "BLOCK_SIZE": block_size,
        "WIDTH": load_width(k_dim, v_dim, itemsize=dtype.size),
    }


def pool_kind(pool: mx.array) -> PoolKind:
    return pool.shape[1:], pool.dtype


def _head_pieces(template: dict) -> int:
    """Pieces of one head's K and V at one position."""
    return (template["K_DIM"] + template["V_DIM"]) // template["WIDTH"]


def load_width(*sizes: int, itemsize: int) -> int:
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
        k_pool: (num_blocks + 1, kv_heads, block_size, k_dim), or its first block.
        v_pool: (num_blocks + 1, kv_heads, block_size, v_dim), likewise.
        slots: (T or more,) int32, block * block_size + offset.
        after: of 8 elements or more; the write takes place once it's computed.

    Returns:
        A fence: what reads the rows has to take it in.
    """
    rows = k.shape[0]
    launch = _write_launch(rows, pool_kind(k_pool), v_pool.shape[3])
    return launch(k, v, k_pool, v_pool, slots, ints(rows), after)[0]


@lru_cache(1024)
def _write_launch(rows: int, k_pool: PoolKind, v_dim: int) -> Launch:
    template = _pool_template(k_pool, v_dim)
    pieces = rows * template["KV_HEADS"] * _head_pieces(template)
    return one_thread_a_piece("write_kv", template, pieces, ((LEAST,), mx.int32))


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
    k, v = launch(k_pool, v_pool, tables, lengths, ints(width, positions, sequences), fence)
    return k, v


@lru_cache(1024)
def _gather_launch(sequences: int, positions: int, k_pool: PoolKind, v_dim: int) -> Launch:
    template = _pool_template(k_pool, v_dim)
    shape = sequences, template["KV_HEADS"], positions
    return one_thread_a_piece(
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
    launch = one_thread_a_piece("copy_blocks", template, pieces, ((LEAST,), mx.int32))
    return launch(k_pool, v_pool, padded(pairs), ints(len(pairs)), after)[0]
