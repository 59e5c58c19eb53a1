"""The shape of a pool, and of one forward over it: what every backend is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mlxpage.metal.backend import mx


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer keeps for each position."""

    window: int | None
    kv_heads: int
    k_head_dim: int
    v_head_dim: int
    dtype: mx.Dtype

    @property
    def bytes_per_token(self) -> int:
        return self.kv_heads * (self.k_head_dim + self.v_head_dim) * self.dtype.size


class Attention(NamedTuple):
    """How one layer attends."""

    heads: int
    dtype: mx.Dtype  # of the queries
    window: int | None
    scale: float
    has_sinks: bool


@dataclass(slots=True)
class Rows:
    """The tokens of one forward, of any number of sequences, as rows of length 1.

    A sequence's rows stand side by side. Those of one row come first, shortest context first.
    All arrays are NumPy int32, `tokens` may be MLX's.
    """

    tokens: np.ndarray | mx.array  # (T,)
    positions: np.ndarray  # (T,)
    starts: np.ndarray  # (S + 1,) where each sequence's rows start
    contexts: np.ndarray  # (S,) positions that exist after this forward
    block_tables: list[np.ndarray]  # per cache group (S, M), padded with NULL_BLOCK
    sample_rows: np.ndarray  # (R,) rows whose logits are wanted
    copies: list[np.ndarray] = field(default_factory=list)
    """Per cache group (C, 2): blocks that are copied, in order, before a row is written."""

    @property
    def num_decoding(self) -> int:
        """Sequences with a single row."""
        return int(np.searchsorted(np.diff(self.starts) > 1, True))


class Step:
    """What all layers of one cache group share in one forward. Backends add their own to it."""

    def __init__(self, rows: Rows, tables: np.ndarray, block_size: int, window: int | None):
        self.rows = rows
        self.tables = tables
        self.block_size = block_size
        self.window = window
        owners = np.repeat(np.arange(len(rows.contexts)), np.diff(rows.starts))
        self.write_blocks = tables[owners, rows.positions // block_size]  # (T,)
        assert self.write_blocks.all(), "a row has no block to be written to"
        self._owners = owners
        self._row_tables: mx.array | None = None
        self._unread: dict[LayerSpec, tuple[mx.array, mx.array]] = {}

    @property
    def row_tables(self) -> mx.array:
        """(T, M) the block table of each row, for a model that wants K and V as plain arrays."""
        if self._row_tables is None:
            self._row_tables = mx.take(mx.array(self.tables), mx.array(self._owners), axis=0)
        return self._row_tables

    def unread(self, spec: LayerSpec) -> tuple[mx.array, mx.array]:
        """Stands for K and V (T, kv_heads, M * block_size, head_dim) that are only handed on: they
        are NaN, so a model that does anything else with them gives no numbers at all."""
        if spec not in self._unread:
            shape = len(self.rows.positions), spec.kv_heads, self.tables.shape[1] * self.block_size
            nan = mx.array(float("nan"), spec.dtype)
            self._unread[spec] = (
                mx.broadcast_to(nan, (*shape, spec.k_head_dim)),
                mx.broadcast_to(nan, (*shape, spec.v_head_dim)),
            )
        return self._unread[spec]

    def row_mask(self, window: int | None, positions: mx.array) -> mx.array:
        """(T, 1, 1, M * block_size) bool, lazy: what each row, at `positions` (T,), may read of
        its own table."""
        keys = mx.arange(self.tables.shape[1] * self.block_size)
        queries = positions[:, None, None, None]
        mask = keys <= queries
        return mask if window is None else mask & (keys > queries - window)


class Pool:
    """The blocks of one layer, full of zeros at first. Backends write and read them."""

    def __init__(self, spec: LayerSpec, num_blocks: int, block_size: int):
        shape = (num_blocks + 1, spec.kv_heads, block_size)
        self.fill(
            mx.zeros((*shape, spec.k_head_dim), spec.dtype),
            mx.zeros((*shape, spec.v_head_dim), spec.dtype),
        )

    def fill(self, k: mx.array, v: mx.array) -> None:
        """Makes these the pools: (num_blocks + 1, kv_heads, block_size, head_dim) each."""
        self.k, self.v = k, v


def first_readable(positions, block_size: int, window: int | None):
    """The first position of the block where the window of each position begins."""
    if window is None:
        return np.zeros_like(positions)
    return np.maximum(0, positions - window + 1) // block_size * block_size
