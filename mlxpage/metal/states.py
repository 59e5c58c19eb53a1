"""What layers keep of all tokens together: states of recurrences and convolutions, and the like.

A block holds the state after its last token, or after the last one that is computed of it. Models
get mlx-lm's own `ArraysCache`, filled with the states of the sequences that a forward goes on with.
"""

from __future__ import annotations

import numpy as np

from mlxpage.errors import UnsupportedModel
from mlxpage.metal.backend import mx
from mlxpage.metal.layout import BlockArrays, Rows, StateArray, StateSpec
from mlxpage.metal.reference import copy_blocks


class Step:
    """Where the states of a forward's sequences are, before it and after it."""

    def __init__(self, rows: Rows, tables: np.ndarray, block_size: int):
        counts = np.diff(rows.starts)
        starts, sequences = rows.contexts - counts, np.arange(len(counts))
        self.num_tokens = starts
        """(S,) that each state comes after."""
        self.positions = mx.array(rows.positions)
        """(T,) of the rows."""
        self.write_blocks = mx.array(_of(tables, sequences, (rows.contexts - 1) // block_size))
        self.read_blocks: mx.array | None = None
        """(S,), None if the sequence, which is alone then, begins here."""
        assert len(starts) == 1 or starts.all(), "a state of nothing beside others"
        if starts.all():
            self.read_blocks = mx.array(_of(tables, sequences, (starts - 1) // block_size))


def _of(tables: np.ndarray, sequences: np.ndarray, columns: np.ndarray) -> np.ndarray:
    blocks = tables[sequences, columns]
    if not blocks.all():
        raise IndexError("a sequence has no block for its state")
    return blocks


class Pool(BlockArrays):
    """The states of one layer, an array (num_blocks + 1, ...) for each of its arrays."""

    def __init__(self, spec: StateSpec, num_blocks: int):
        self._spec = spec
        self.fill(*(mx.zeros((num_blocks + 1, *kept.shape), kept.dtype) for kept in spec.kept))

    def held(self) -> list[mx.array]:
        return list(self._arrays)

    arrays = written = held

    def fill(self, *arrays: mx.array) -> None:
        self._arrays = list(arrays)

    def states(self, step: Step) -> list[mx.array | None]:
        """What the forward goes on with: (S, ...) each, None for what isn't there."""
        if step.read_blocks is None:
            return [None] * len(self._spec.arrays)
        held = iter(self._arrays)
        return [kept and self._taken(next(held), kept, step) for kept in self._spec.arrays]

    def _taken(self, array: mx.array, kept: StateArray, step: Step) -> mx.array:
        taken = mx.take(array, step.read_blocks, axis=0)
        if kept.growing is None:
            return taken
        # Who is shorter than that is alone.
        length = min(int(step.num_tokens.min()), kept.shape[kept.growing])
        return mx.split(taken, [length], axis=1 + kept.growing)[0]

    def write(self, step: Step, states: list[mx.array | None]) -> None:
        """Takes what the forward has come to, (S, ...) each; in place, if nobody else holds the
        arrays."""
        there = [state for state, kept in zip(states, self._spec.arrays, strict=True) if kept]
        for array, kept, state in zip(self._arrays, self._spec.kept, there, strict=True):
            if state is None:
                raise UnsupportedModel("a layer leaves its state empty after a forward")
            array[step.write_blocks] = _padded(state, kept)

    def copy(self, pairs: np.ndarray, after: mx.array | None) -> mx.array | None:
        """Copies blocks (C, 2), of which none is a target before it is a source."""
        self.fill(*(copy_blocks(array, pairs) for array in self._arrays))
        return after

    def load(
        self, blocks: np.ndarray, contents: list[mx.array], after: mx.array | None
    ) -> mx.array | None:
        """Makes `contents` what `blocks` (B,) hold."""
        where = mx.array(blocks)
        for array, content in zip(self._arrays, contents, strict=True):
            array[where] = content
        return after


def _padded(state: mx.array, kept: StateArray) -> mx.array:
    if kept.growing is None:
        return state
    axis = 1 + kept.growing
    missing = kept.shape[kept.growing] - state.shape[axis]
    return mx.pad(state, [(0, missing if i == axis else 0) for i in range(state.ndim)])


class StateLayer:
    """One layer's states, for the forward under way in an mlx-lm `ArraysCache`."""

    num_attended = 0
    attention = None

    def __init__(self, spec: StateSpec, group: int, num_blocks: int):
        from mlx_lm.models.cache import ArraysCache

        self.spec = spec
        self.group = group
        self.pool = Pool(spec, num_blocks)
        self.seen = ArraysCache(len(spec.arrays))
        """What the model gets."""

    def begin(self, step: Step) -> None:
        self.seen.cache = self.pool.states(step)

    def end(self, step: Step) -> None:
        self.pool.write(step, self.seen.cache)
        self.seen.cache = [None] * len(self.spec.arrays)
