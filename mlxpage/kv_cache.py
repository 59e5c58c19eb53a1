"""The K/V cache as arrays: a pool of blocks per layer, seen by mlx-lm as one cache per layer."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import numpy as np

from mlxpage import reference
from mlxpage.backend import mx
from mlxpage.errors import UnsupportedModel


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


@dataclass(slots=True)
class Rows:
    """The tokens of one forward, of any number of sequences, as rows of length 1.

    A sequence's rows stand side by side. Those of one row come first, shortest context first.
    All arrays are NumPy int32.
    """

    tokens: np.ndarray  # (T,)
    positions: np.ndarray  # (T,)
    starts: np.ndarray  # (S + 1,) where each sequence's rows start
    contexts: np.ndarray  # (S,) positions that exist after this forward
    block_tables: list[np.ndarray]  # per cache group (S, M), padded with NULL_BLOCK
    sample_rows: np.ndarray  # (R,) rows whose logits are wanted


class GroupStep:
    """What all layers of one cache group share in one forward."""

    def __init__(self, rows: Rows, tables: np.ndarray, block_size: int, window: int | None):
        self.window = window
        self._rows = rows
        self._tables = tables
        self._block_size = block_size
        self._spans: dict[tuple, list[reference.Span]] = {}
        owners = np.repeat(np.arange(len(rows.contexts)), np.diff(rows.starts))
        blocks = tables[owners, rows.positions // block_size]
        assert blocks.all(), "a row has no block to be written to"
        self.write_blocks = mx.array(blocks)  # (T,)
        offsets = rows.positions % block_size
        self.write_offsets = mx.array(offsets)  # (T,)
        begun = np.setdiff1d(blocks[offsets == 0], blocks[offsets == block_size - 1])
        self.begun_blocks = mx.array(begun) if len(begun) else None
        # Lazy: evaluated only for a model that wants K, V or the mask as plain arrays.
        self.row_tables = mx.take(mx.array(tables), mx.array(owners), axis=0)  # (T, M)

    def spans(self, window: int | None, heads: int) -> list[reference.Span]:
        """How the rows are attended by a layer that reads `window` positions."""
        if (window, heads) not in self._spans:
            rows = self._rows
            self._spans[window, heads] = reference.plan(
                rows.starts, rows.contexts, self._tables, self._block_size, window, heads
            )
        return self._spans[window, heads]

    def row_mask(self, window: int | None) -> mx.array:
        """(T, 1, 1, M * block_size) bool, lazy: what each row may read of its own table."""
        keys = mx.arange(self._tables.shape[1] * self._block_size)
        queries = mx.array(self._rows.positions)[:, None, None, None]
        mask = keys <= queries
        return mask if window is None else mask & (keys > queries - window)


@dataclass(frozen=True, slots=True)
class MaskTag:
    step: GroupStep
    window: int | None


class Tagged(mx.array):
    """A lazy array that remembers where it comes from.

    `tag` is the LayerCache behind a K or V, or the MaskTag of a mask. Handed on untouched it
    reaches the attention hook, which reads the pool instead and never evaluates the array. Any
    operation on it gives a plain array with the right values; those that would change it in place
    do so too, or take the tag off.
    """

    tag: object = None

    @staticmethod
    def of(array: mx.array, tag: object) -> Tagged:
        tagged = Tagged(array)
        tagged.tag = tag
        return tagged

    def __setitem__(self, index, value):
        self.tag = None
        super().__setitem__(index, value)


def _in_place_gives_a_plain_array(name: str) -> None:
    apply = getattr(operator, name)
    setattr(Tagged, f"__i{name.strip('_')}__", lambda self, other: apply(self, other))


for _name in ("add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow"):
    _in_place_gives_a_plain_array(_name)
for _name in ("and_", "or_", "xor", "lshift", "rshift"):
    _in_place_gives_a_plain_array(_name)


@dataclass(slots=True)
class Forward:
    """The forward under way. Apart from the KVCache, because its layers see it too: if they led
    back to the KVCache, a dropped pool would stay until Python's collector ran."""

    positions: mx.array | None = None  # (T,)
    steps: list[GroupStep] = field(default_factory=list)  # one per cache group


class LayerCache:
    """One layer's pool, in the shape of mlx-lm's cache protocol (`mlx_lm/models/cache.py`)."""

    def __init__(
        self, forward: Forward, spec: LayerSpec, group: int, num_blocks: int, block_size: int
    ):
        self._forward = forward
        self._group = group
        self.spec = spec
        shape = (num_blocks + 1, spec.kv_heads, block_size)
        self.k = mx.zeros((*shape, spec.k_head_dim), spec.dtype)
        self.v = mx.zeros((*shape, spec.v_head_dim), spec.dtype)
        self.num_attended = 0
        """Calls of the attention hook: every layer must go through it in every forward."""

    @property
    def step(self) -> GroupStep:
        return self._forward.steps[self._group]

    # -- what mlx-lm's models call --

    @property
    def offset(self) -> mx.array:
        """(T,) each row's position."""
        return self._forward.positions

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False):  # noqa: N803
        kept = self.step.window
        window = window_size or kept
        if kept is not None and window > kept:
            raise UnsupportedModel(
                f"the model reads {window} positions in a layer whose cache keeps {kept}"
            )
        return Tagged.of(self.step.row_mask(window), MaskTag(self.step, window))

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Writes the rows (T, kv_heads, 1, head_dim) and returns what they may read, tagged:
        (T, kv_heads, M * block_size, head_dim)."""
        step = self.step
        where = step.write_blocks, step.write_offsets, step.begun_blocks
        self.k = reference.write(self.k, k.squeeze(2), *where)
        self.v = reference.write(self.v, v.squeeze(2), *where)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        heads = mx.arange(self.spec.kv_heads, dtype=mx.int32)[None, :, None]
        indices = self.step.row_tables[:, None, :] * self.spec.kv_heads + heads
        return (
            Tagged.of(reference.gather(self.k, indices), self),
            Tagged.of(reference.gather(self.v, indices), self),
        )

    def is_trimmable(self) -> bool:
        return False

    # -- what the hook calls --

    def attend(
        self, q: mx.array, window: int | None, scale: float, sinks: mx.array | None
    ) -> mx.array:
        """q (T, heads, 1, head_dim) -> (T, heads, 1, value head_dim)"""
        self.num_attended += 1
        spans = self.step.spans(window, q.shape[1])
        out = reference.paged_attention(
            q.squeeze(2), self.k, self.v, spans, scale=scale, sinks=sinks
        )
        return out[:, :, None]


class KVCache:
    """All layers' pools. Layers of the same window share block tables: they form a cache group."""

    def __init__(self, specs: list[LayerSpec], num_blocks: list[int], block_size: int):
        """`num_blocks` has one entry per cache group, in the order of `windows(specs)`."""
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.windows = windows(specs)
        self._forward = Forward()
        groups = [self.windows.index(spec.window) for spec in specs]
        self.layers = [
            LayerCache(self._forward, spec, group, num_blocks[group], block_size)
            for spec, group in zip(specs, groups, strict=True)
        ]
        mx.eval(self.arrays())

    def begin(self, rows: Rows) -> None:
        """Makes `rows` the ones that the next forward writes and reads."""
        for tables, num_blocks in zip(rows.block_tables, self.num_blocks, strict=True):
            # MLX doesn't check: on a GPU this would be somebody else's memory.
            known = tables.min() >= 0 and tables.max() <= num_blocks
            assert known, "a table holds a block that the pool doesn't have"
        self._forward.positions = mx.array(rows.positions)
        self._forward.steps = [
            GroupStep(rows, tables, self.block_size, window)
            for tables, window in zip(rows.block_tables, self.windows, strict=True)
        ]

    def arrays(self) -> list[mx.array]:
        return [array for layer in self.layers for array in (layer.k, layer.v)]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())


def windows(specs: list[LayerSpec]) -> list[int | None]:
    """The window of each cache group, in the order of the layers."""
    return list(dict.fromkeys(spec.window for spec in specs))
