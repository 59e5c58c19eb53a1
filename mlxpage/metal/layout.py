"""The shape of a pool, and of one forward over it: what every backend is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from math import prod
from typing import NamedTuple

import numpy as np

from mlxpage.errors import UnsupportedModel
from mlxpage.metal.backend import mx
from mlxpage.metal.plan import GroupKind


class Format(NamedTuple):
    """How a pool keeps the K, or the V, of one head: as it is, or quantised.

    Quantised, a group of elements along the head is `code * scale + bias`, as in MLX's affine
    format. A block of a head is its positions' codes in uint32 words, the first one in the lowest
    bits, then their scales and biases: a word for each group, the scale in its lower half.
    """

    head_dim: int
    dtype: mx.Dtype
    bits: int | None = None
    """Of a code, 8 or 4; None: not quantised."""

    @property
    def group_size(self) -> int:
        return 64 if self.head_dim % 64 == 0 else 32

    @property
    def side_dtype(self) -> mx.Dtype:
        """Of scales and biases."""
        return mx.float16 if self.dtype == mx.float32 else self.dtype

    @property
    def element_bits(self) -> int:
        return self.bits or 8 * self.dtype.size

    @property
    def row_words(self) -> int:
        """Words of the codes, or of the elements themselves, of one position."""
        return self.head_dim * self.element_bits // 32

    @property
    def side_words(self) -> int:
        return self.head_dim // self.group_size if self.bits else 0

    @property
    def nbytes(self) -> int:
        """Bytes of one position."""
        return self.head_dim * self.element_bits // 8 + 4 * self.side_words

    def block(self, block_size: int) -> tuple[tuple[int, ...], mx.Dtype]:
        """Shape and dtype of a block of one head."""
        if self.bits is None:
            return (block_size, self.head_dim), self.dtype
        return (block_size * (self.row_words + self.side_words),), mx.uint32


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What one layer keeps for each position."""

    window: int | None
    kv_heads: int
    k_head_dim: int
    v_head_dim: int
    dtype: mx.Dtype
    k_bits: int | None = None
    v_bits: int | None = None

    @property
    def group(self) -> GroupKind:
        return GroupKind(self.window)

    @property
    def k(self) -> Format:
        return Format(self.k_head_dim, self.dtype, self.k_bits)

    @property
    def v(self) -> Format:
        return Format(self.v_head_dim, self.dtype, self.v_bits)

    @property
    def bytes_per_token(self) -> int:
        return self.kv_heads * (self.k.nbytes + self.v.nbytes)

    @property
    def may_be_latent(self) -> bool:
        """Whether K and V may be the two parts of a latent that all heads share."""
        return self.window is None and self.kv_heads == 1 and self.k_head_dim != self.v_head_dim

    def block_nbytes(self, block_size: int) -> list[int]:
        """Bytes of a block in each of the layer's arrays."""
        return [block_size * self.kv_heads * part.nbytes for part in (self.k, self.v)]

    def quantised(self, k_bits: int | None, v_bits: int | None) -> LayerSpec:
        """The same with K and V kept in so many bits. Raises UnsupportedModel for a head size that
        can't be cut into groups."""
        for name, size, bits in (("K", self.k_head_dim, k_bits), ("V", self.v_head_dim, v_bits)):
            if bits and size % 32:
                raise UnsupportedModel(
                    f"{name} has heads of {size} elements, which is no multiple of 32: they can't "
                    "be quantised in groups of 64 or 32. Leave kv_bits out, or give it for the "
                    "other one alone."
                )
        return replace(self, k_bits=k_bits, v_bits=v_bits if self.v_head_dim else None)


class StateArray(NamedTuple):
    """One array of a layer's state, of one sequence."""

    shape: tuple[int, ...]
    dtype: mx.Dtype
    growing: int | None = None
    """The axis that is as long as the sequence until it has its full length."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.size


@dataclass(frozen=True, slots=True)
class StateSpec:
    """What one layer keeps of all positions together: the arrays of an mlx-lm `ArraysCache`, None
    for those that it never sets."""

    arrays: tuple[StateArray | None, ...]

    @property
    def group(self) -> GroupKind:
        return GroupKind(has_states=True)

    @property
    def kept(self) -> list[StateArray]:
        return [array for array in self.arrays if array is not None]

    @property
    def full_after(self) -> int:
        """Tokens after which its arrays have their full shapes: a state of nothing is None."""
        return max(1 if a.growing is None else a.shape[a.growing] for a in self.kept)

    @property
    def dtype(self) -> mx.Dtype:
        """The least precise of its arrays."""
        return min((array.dtype for array in self.kept), key=lambda dtype: dtype.size)

    def block_nbytes(self, block_size: int) -> list[int]:
        """Bytes of a state in each of the layer's arrays."""
        return [array.nbytes for array in self.kept]

    def quantised(self, k_bits: int | None, v_bits: int | None) -> StateSpec:
        """A state stays as it is."""
        return self


Spec = LayerSpec | StateSpec


def group_kinds(specs: list[Spec]) -> list[GroupKind]:
    """The cache groups, in the order of the layers."""
    return list(dict.fromkeys(spec.group for spec in specs))


def group_nbytes(specs: list[Spec], block_size: int) -> list[int]:
    """Bytes of a block of all layers of each cache group."""
    return [
        sum(sum(spec.block_nbytes(block_size)) for spec in specs if spec.group == kind)
        for kind in group_kinds(specs)
    ]


class Attention(NamedTuple):
    """How one layer attends."""

    heads: int
    dtype: mx.Dtype  # of the queries
    window: int | None
    scale: float
    has_sinks: bool
    is_latent: bool = False
    """Whether it does as `LayerCache.attend_latent` says."""


class Shape(Enum):
    """How a model takes the tokens of a step."""

    ROWS = "in one forward, each token a row of its own"
    CHUNKS = "the chunk of a prompt in a forward of its own, single tokens of sequences together"
    SEQUENCES = "each sequence in a forward of its own"


@dataclass(slots=True)
class Rows:
    """The tokens of one step, of any number of sequences, as rows of length 1.

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

    def part(self, first: int, last: int) -> Rows:
        """Of the sequences from `first` to `last`, whose rows are sampled in their own order."""
        begin, end = int(self.starts[first]), int(self.starts[last])
        sampled = self.sample_rows[self.sampled_of(first, last)] - begin
        return Rows(
            tokens=self.tokens[begin:end],
            positions=self.positions[begin:end],
            starts=self.starts[first : last + 1] - begin,
            contexts=self.contexts[first:last],
            block_tables=[tables[first:last] for tables in self.block_tables],
            sample_rows=sampled.astype(np.int32),
        )

    def sampled_of(self, first: int, last: int) -> np.ndarray:
        """Where in `sample_rows` those of some sequences stand."""
        begin, end = self.starts[first], self.starts[last]
        return np.flatnonzero((self.sample_rows >= begin) & (self.sample_rows < end))


class Step:
    """What all layers of one cache group share in one forward. Backends add their own to it."""

    def __init__(
        self,
        rows: Rows,
        tables: np.ndarray,
        block_size: int,
        window: int | None,
        is_run: bool = False,
    ):
        """`is_run`: the model gets the rows, which are one sequence's, along its length axis."""
        self.rows = rows
        self.is_run = is_run
        self.tables = tables = tables[:, : -(-int(rows.contexts.max()) // block_size)]
        self.block_size = block_size
        self.window = window
        owners = np.repeat(np.arange(len(rows.contexts)), np.diff(rows.starts))
        self.write_blocks = tables[owners, rows.positions // block_size]  # (T,)
        if not self.write_blocks.all():
            raise IndexError("a row has no block to be written to")
        self._owners = owners
        self._fetched_tables: mx.array | None = None
        self._unread: dict[LayerSpec, tuple[mx.array, mx.array]] = {}
        self._positions: mx.array | None = None

    @property
    def positions(self) -> mx.array:
        """(T,) of the rows."""
        if self._positions is None:
            self._positions = mx.array(self.rows.positions)
        return self._positions

    @property
    def fetched_tables(self) -> mx.array:
        """The block tables behind K and V that a model wants as plain arrays: (T, M) one of each
        row, or (1, M) of a run."""
        if self._fetched_tables is None:
            tables = mx.array(self.tables)
            own = tables if self.is_run else mx.take(tables, mx.array(self._owners), axis=0)
            self._fetched_tables = own
        return self._fetched_tables

    @property
    def num_fetched(self) -> int:
        """Positions of such K and V; of a run just those that there are."""
        if self.is_run:
            return int(self.rows.contexts[0])
        return self.tables.shape[1] * self.block_size

    def unread(self, spec: LayerSpec) -> tuple[mx.array, mx.array]:
        """Stands for K and V (T or 1, kv_heads, positions, head_dim) that are only handed on: they
        are NaN, so a model that does anything else with them gives no numbers at all."""
        if spec not in self._unread:
            shape = self.fetched_tables.shape[0], spec.kv_heads, self.num_fetched
            nan = mx.array(float("nan"), spec.dtype)
            self._unread[spec] = (
                mx.broadcast_to(nan, (*shape, spec.k_head_dim)),
                mx.broadcast_to(nan, (*shape, spec.v_head_dim)),
            )
        return self._unread[spec]

    def mask(self, window: int | None, positions: mx.array) -> mx.array:
        """Bool, lazy: what each row, at `positions` (T,), may read of what is fetched for it.
        (T, 1, 1, positions), of a run (T, positions)."""
        keys = mx.arange(self.num_fetched)
        queries = positions[:, None] if self.is_run else positions[:, None, None, None]
        mask = keys <= queries
        return mask if window is None else mask & (keys > queries - window)


class PoolKind(NamedTuple):
    """All of a pool but its blocks."""

    kv_heads: int
    block_size: int
    k: Format
    v: Format

    @property
    def is_quantised(self) -> bool:
        return bool(self.k.bits or self.v.bits)

    @property
    def may_be_latent(self) -> bool:
        """As in `LayerSpec`."""
        return self.kv_heads == 1 and self.k.head_dim != self.v.head_dim

    def shape(self, part: Format, num_blocks: int) -> tuple[tuple[int, ...], mx.Dtype]:
        """Shape and dtype of the K or V array of a pool."""
        of_head, dtype = part.block(self.block_size)
        return (num_blocks + 1, self.kv_heads, *of_head), dtype


class Blocks(NamedTuple):
    """The K and V arrays of a pool, and how to read them. For kernels, the first block of each
    will do."""

    k: mx.array
    v: mx.array
    kind: PoolKind

    @staticmethod
    def plain(k: mx.array, v: mx.array) -> Blocks:
        """Of arrays (num_blocks + 1, kv_heads, block_size, head_dim), not quantised."""
        formats = Format(k.shape[3], k.dtype), Format(v.shape[3], v.dtype)
        return Blocks(k, v, PoolKind(*k.shape[1:3], *formats))


class BlockArrays(ABC):
    """The blocks of one layer, in arrays (num_blocks + 1, ...)."""

    @abstractmethod
    def held(self) -> list[mx.array]:
        """The arrays."""

    @abstractmethod
    def fill(self, *arrays: mx.array) -> None:
        """Makes these the ones that are `held`."""

    def resize(self, num_blocks: int, moves: list[tuple[int, int]]) -> None:
        """Keeps the blocks up to `num_blocks`, after moving (source, target) each; new ones are
        zeros. Nothing may be computed with the arrays meanwhile.

        At most one array exists twice at any time, and none is changed: if it raises, each holds
        all that it held, and is of the one or the other size.
        """
        arrays = self.held()
        for place in range(len(arrays)):
            arrays[place] = _resized(arrays[place], num_blocks + 1, moves)
            self.fill(*arrays)
            mx.clear_cache()  # or MLX would keep the old array for another use

    def block_nbytes(self) -> list[int]:
        """Of a block in each array."""
        return [array.nbytes // len(array) for array in self.held()]

    def read(self, blocks: mx.array) -> Iterator[np.ndarray]:
        """`blocks` (B,) of each array as they are, (B, bytes of a block) uint8. Nothing may be
        computed with the arrays meanwhile."""
        for array in self.held():
            taken = mx.take(array, blocks, axis=0).reshape(len(blocks), -1)
            yield np.array(taken.view(mx.uint8))

    def as_arrays(self, contents: list[np.ndarray]) -> list[mx.array]:
        """What `read` gave, as arrays again."""
        return [
            mx.array(data).view(array.dtype).reshape(len(data), *array.shape[1:])
            for data, array in zip(contents, self.held(), strict=True)
        ]


class Pool(BlockArrays):
    """K and V of one layer, full of zeros at first. Backends write and read them."""

    def __init__(self, spec: LayerSpec, num_blocks: int, block_size: int):
        self.kind = kind = PoolKind(spec.kv_heads, block_size, spec.k, spec.v)
        self.fill(*(mx.zeros(*kind.shape(part, num_blocks)) for part in (kind.k, kind.v)))

    def held(self) -> list[mx.array]:
        return [self.k, self.v]

    def fill(self, k: mx.array, v: mx.array) -> None:
        """Makes these the pools: of `PoolKind.shape` each."""
        self.k, self.v = k, v


def _resized(array: mx.array, length: int, moves: list[tuple[int, int]]) -> mx.array:
    """The array with another `length` of its first axis."""
    if length > len(array):
        array = mx.pad(array, [(0, length - len(array)), *[(0, 0)] * (array.ndim - 1)])
    elif length < len(array):
        order = np.arange(length, dtype=np.int32)
        for source, target in moves:
            order[target] = source
        array = mx.take(array, mx.array(order), axis=0)
    mx.eval(array)
    return array


def first_readable(positions, block_size: int, window: int | None):
    """The first position of the block where the window of each position begins."""
    if window is None:
        return np.zeros_like(positions)
    return np.maximum(0, positions - window + 1) // block_size * block_size
