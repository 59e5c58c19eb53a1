"""The K/V cache as arrays: a pool of blocks per layer, seen by mlx-lm as one cache per layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from types import ModuleType

import numpy as np

from mlxpage.metal import reference, states
from mlxpage.metal.backend import mx
from mlxpage.metal.layer_cache import Forward, LayerCache
from mlxpage.metal.layout import Rows, Spec, StateSpec, group_kinds

# Elements of a forward's result that stand for it; hidden states have as many at least.
_AFTER = 32


class KVCache:
    """All layers' pools. Layers of the same window share block tables, and so do those with states:
    they form a cache group."""

    def __init__(
        self,
        specs: list[Spec],
        num_blocks: list[int],
        block_size: int,
        backend: ModuleType = reference,
        *,
        fetches: bool = True,
    ):
        """`num_blocks` has one entry per cache group, as in `group_kinds(specs)`. `backend`
        is `reference` or `kernels`: its `Pool` holds a layer, its `Step` the metadata, and
        `LOOK_AHEAD` says how many steps may be dispatched before the results of one are read.
        Without `fetches`, a model has to hand on the K and V that it gets, unread."""
        self.block_size = block_size
        self.num_blocks = list(num_blocks)
        self.kinds = kinds = group_kinds(specs)
        self._backend = backend
        self._forward = Forward(fetches=fetches, looks_ahead=bool(backend.LOOK_AHEAD))
        self._attentions: list[tuple] | None = None
        """(group, kind of pool, attention) of the layers, each once."""
        self.layers = [self._layer(spec, kinds.index(spec.group)) for spec in specs]
        self._state_layers = [layer for layer in self.layers if kinds[layer.group].has_states]
        mx.eval(self.arrays())

    def _layer(self, spec: Spec, group: int) -> LayerCache | states.StateLayer:
        num_blocks = self.num_blocks[group]
        if isinstance(spec, StateSpec):
            return states.StateLayer(spec, group, num_blocks)
        pool = self._backend.Pool(spec, num_blocks, self.block_size)
        return LayerCache(self._forward, spec, group, pool)

    def resize(
        self, num_blocks: list[int], moves: list[list[tuple[int, int]]] | None = None
    ) -> None:
        """Makes the pools so large, per cache group, one array of one layer after the other.

        New blocks are zeros. Of a pool that shrinks, `moves` says what is brought from where to
        where, (source, target) each, before the blocks above are dropped. Nothing may be computed
        meanwhile. If a pool can't grow, MLX's error is raised and all hold what they held; if one
        can't shrink, what they hold is lost.
        """
        mx.clear_cache()  # what MLX keeps for another use would be there beside the first array
        before, self.num_blocks = self.num_blocks, list(num_blocks)
        try:
            self._resize(moves or [[]] * len(num_blocks))
        except Exception:
            self.num_blocks = before
            if not moves:
                with suppress(Exception):  # a layer that stays larger does no harm
                    self._resize([[]] * len(before))
            raise

    def _resize(self, moves: list[list[tuple[int, int]]]) -> None:
        for layer in self.layers:
            layer.pool.resize(self.num_blocks[layer.group], moves[layer.group])

    def begin(
        self,
        rows: Rows,
        *,
        is_run: bool = False,
        before_waiting: Callable[[], None] | None = None,
    ) -> None:
        """Makes `rows` the ones that the next forward writes and reads; `is_run`: along its length
        axis. While it is built, `before_waiting` is called before it waits for what is computed."""
        for group, tables in enumerate(rows.block_tables):
            self._check_blocks(group, tables, least=0)  # 0 pads a table
        if len(rows.sample_rows) and rows.sample_rows.max() >= len(rows.positions):
            raise IndexError(f"row {rows.sample_rows.max()} of {len(rows.positions)} is sampled")
        self._forward.given = None
        self._forward.before_waiting, self._forward.unsent_nbytes = before_waiting, 0
        self._forward.start = int(rows.positions[0]) if is_run else None
        self._forward.steps = [
            states.Step(rows, tables, self.block_size)
            if kind.has_states
            else self._backend.Step(rows, tables, self.block_size, kind.window, is_run)
            for tables, kind in zip(rows.block_tables, self.kinds, strict=True)
        ]
        self.copy(rows.copies)
        for layer in self._state_layers:
            layer.begin(self._forward.steps[layer.group])
        # While MLX still has to read a pool, it would write into a copy.
        mx.eval([layer.seen.cache for layer in self._state_layers])

    def _check_blocks(self, group: int, blocks: np.ndarray, least: int) -> None:
        """Raises IndexError. MLX doesn't look: on a GPU it would be somebody else's memory."""
        most = self.num_blocks[group]
        if blocks.size and not least <= blocks.min() <= blocks.max() <= most:
            raise IndexError(
                f"blocks {blocks.min()} to {blocks.max()} of a pool of those from {least} to {most}"
            )

    def copy(self, copies: list[np.ndarray]) -> None:
        """Copies blocks, as in `Rows`."""
        for group, pairs in enumerate(copies):
            self._check_blocks(group, pairs, least=1)
        # One layer after the other, so that what comes after the last comes after all.
        after = self._forward.after
        for layer in self.layers:
            if copies and len(pairs := copies[layer.group]):
                after = layer.pool.copy(pairs, after)
        self._go_on_after(after)

    def load(self, group: int, blocks: list[int], contents: list[memoryview]) -> None:
        """Makes blocks of a cache group hold `contents`, one each, as `read` gave them. Evaluates
        it, a layer at a time."""
        rows = np.stack([np.frombuffer(content, np.uint8) for content in contents])
        after, start = self._forward.after, 0
        for pool in self._pools(group):
            ends = start + np.cumsum(pool.block_nbytes())
            parts = np.split(rows[:, start : ends[-1]], ends[:-1] - start, axis=1)
            after = pool.load(np.array(blocks), pool.as_arrays(parts), after)
            mx.eval(pool.written())
            start = ends[-1]
        self._go_on_after(after)

    def _go_on_after(self, after: mx.array | None) -> None:
        if after is not None and after is not self._forward.after:
            self._forward.after = mx.concatenate([after[:8]] * (_AFTER // 8))

    def read(self, group: int, blocks: list[int]) -> list[memoryview]:
        """What `blocks` hold of all layers of a cache group: the arrays of a layer after the other,
        as they lie in the pools. Waits for what is being computed."""
        mx.synchronize()
        which = mx.array(blocks, mx.int32)
        parts = [part for pool in self._pools(group) for part in pool.read(which)]
        return [memoryview(content) for content in np.concatenate(parts, axis=1)]

    def block_nbytes(self, group: int) -> int:
        """Bytes of a block of all layers of a cache group: of what `read` gives for it."""
        return sum(sum(pool.block_nbytes()) for pool in self._pools(group))

    def _pools(self, group: int) -> list:
        return [layer.pool for layer in self.layers if layer.group == group]

    @property
    def is_run(self) -> bool:
        return self._forward.start is not None

    def note_built(self) -> None:
        """Tells that the forward is built, or that it can't be."""
        self._forward.before_waiting = None  # it may lead back to this cache

    def end(self, after: mx.array) -> None:
        """Tells what the forward comes to: an array that depends on all of its reads."""
        self._attentions = None
        for layer in self._state_layers:
            layer.end(self._forward.steps[layer.group])
        if self._forward.looks_ahead:
            # Of the same shape and type, however many rows of whatever.
            self._forward.after = after.reshape(-1)[:_AFTER].view(mx.int32)

    @property
    def after(self) -> mx.array | None:
        return self._forward.after

    # -- for a compiled forward, whose inputs and outputs must be named --

    @property
    def may_compile(self) -> bool:
        """Whether this forward could be one of a compiled function: on a GPU, in a decode."""
        forward = self._forward
        # What a layer fetches is found by metadata that isn't among the inputs.
        if not self._backend.COMPILES or forward.after is None or forward.fetches or self.is_run:
            return False
        is_decode = all(step.rows.num_decoding == len(step.rows.contexts) for step in forward.steps)
        attentions = all(layer.attention is not None for layer in self.layers)
        return is_decode and attentions

    def signature(self) -> tuple:
        """What is fixed in a compiled forward, apart from its tokens and this cache itself."""
        if self._attentions is None:
            every = [(layer.group, layer.pool.kind, layer.attention) for layer in self.layers]
            self._attentions = list(dict.fromkeys(every))
        for group, kind, attention in self._attentions:
            self._forward.steps[group].prepare(kind, attention)
        return tuple(step.signature() for step in self._forward.steps)

    def inputs(self) -> list[mx.array]:
        """All that a forward takes beside its tokens and the weights."""
        arrays = [self._forward.positions, self._forward.after]
        for part in self._parts():
            arrays += part.inputs()
        return arrays

    def put(self, arrays: list[mx.array], *, tracing: bool = False) -> None:
        """Puts others in the place of `inputs`: those of a trace, or the real ones again."""
        self._forward.given, self._forward.after, *arrays = arrays
        for step in self._forward.steps:
            step.is_traced = tracing
        rest = iter(arrays)
        for part in self._parts():
            part.put(rest)

    def _parts(self) -> list:
        return [*self._forward.steps, *(layer.pool for layer in self.layers)]

    def take(self, after: mx.array) -> None:
        """Takes what a compiled forward has come to: it comes after all writes as well, for each
        of its rows is written by the attention that reads it, or before that."""
        self._forward.after = after
        for layer in self.layers:
            layer.pool.fence = after

    def written(self) -> list[mx.array]:
        """What has to be evaluated in every step: a write that nobody asks for never runs."""
        written = [array for layer in self.layers for array in layer.pool.written()]
        return written if self._forward.after is None else [*written, self._forward.after]

    def arrays(self) -> list[mx.array]:
        return [array for layer in self.layers for array in layer.pool.arrays()]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())
