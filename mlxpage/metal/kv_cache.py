"""The K/V cache as arrays: a pool of blocks per layer, seen by mlx-lm as one cache per layer."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from types import ModuleType
from typing import Self

import numpy as np

from mlxpage.errors import UnsupportedModel
from mlxpage.metal import reference, states
from mlxpage.metal.backend import mx
from mlxpage.metal.layout import Attention, LayerSpec, Rows, Spec, StateSpec, Step, group_kinds


@dataclass(frozen=True, slots=True)
class MaskTag:
    step: Step
    window: int | None


class Tagged(mx.array):
    """A lazy array that remembers where it comes from.

    `tag` is the LayerCache behind a K or V, or the MaskTag of a mask. Handed on untouched it
    reaches the attention hook, which reads the pool instead and never evaluates the array. Any
    operation on it gives a plain array with the right values; those that would change it in place
    do so too, or take the tag off.
    """

    tag: object = None

    @classmethod
    def of(cls, array: mx.array, tag: object) -> Self:
        tagged = cls(array)
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


class TaggedV(Tagged):
    """The V of a layer. If the model has it turned, `swapaxes(-1, -2)`, and multiplies queries by
    that, the products are `Scores`: so latent attention begins."""

    def swapaxes(self, *axes: int):
        turned = super().swapaxes(*axes)
        is_turned = sorted(axis % self.ndim for axis in axes) == [self.ndim - 2, self.ndim - 1]
        return _TurnedV.of(turned, self.tag) if is_turned else turned


class _TurnedV(Tagged):
    def __rmatmul__(self, q: mx.array) -> mx.array:
        scores = Scores.of(mx.matmul(q, self), self.tag)
        scores.q = q
        return scores


class Scores(Tagged):
    """Queries `q` times a layer's V."""

    q: mx.array


# Elements of a forward's result that stand for it; hidden states have as many at least.
_AFTER = 32

# Where steps are dispatched ahead, a forward of many rows is so in stretches: layers whose
# attention gave so many bytes in all. Smaller ones aren't worth it; and all that stretches make
# exists at once, so there are few ahead of the one that is computed (docs/log.md).
_STRETCH = 2**24
_LEAST_OF_A_LAYER = _STRETCH // 2
_STRETCHES_AHEAD = 2


@dataclass(slots=True)
class Forward:
    """The forward under way. Apart from the KVCache, because its layers see it too: if they led
    back to the KVCache, a dropped pool would stay until Python's collector ran."""

    given: mx.array | None = None
    """What stands for `positions` in a compiled forward."""
    start: int | None = None
    """The first position of a run: rows of one sequence, along the model's length axis."""
    steps: list[Step] = field(default_factory=list)  # one per cache group
    fetches: bool = True
    """Whether a layer gives its K and V, or only something that stands for them."""
    looks_ahead: bool = False
    """Whether forwards are dispatched before the results of those before are read."""
    after: mx.array | None = None
    """What comes after every read of the forward before: no write may overtake it."""
    before_waiting: Callable[[], None] | None = None
    """Called while the forward is built, before it waits for a stretch, of it or of one before."""
    unsent_nbytes: int = 0
    """Of attention, since the last stretch of it."""
    ahead: deque[mx.array] = field(default_factory=deque)
    """What comes after each of the last stretches, of this forward or of one before."""

    @property
    def positions(self) -> mx.array:
        """(T,) of the rows. Asked for late, they may have come with other metadata."""
        return self.steps[0].positions if self.given is None else self.given

    def go_on(self, attended: mx.array) -> None:
        """Dispatches the forward as far as what a layer has `attended`, if that's enough for a
        stretch: the GPU is at work while Python builds the rest. Waits if they get too far
        ahead."""
        if not self.looks_ahead or attended.nbytes < _LEAST_OF_A_LAYER or self.given is not None:
            return
        self.unsent_nbytes += attended.nbytes
        if self.unsent_nbytes < _STRETCH:
            return
        self.unsent_nbytes = 0
        mark = attended[:1, :1, :1] + 0  # with memory of its own
        mx.async_eval(mark)
        self.ahead.append(mark)
        if len(self.ahead) > _STRETCHES_AHEAD:
            if self.before_waiting:
                self.before_waiting()
            mx.eval(self.ahead.popleft())


class LayerCache:
    """One layer's pool, in the shape of mlx-lm's cache protocol (`mlx_lm/models/cache.py`)."""

    def __init__(self, forward: Forward, spec: LayerSpec, group: int, pool):
        self._forward = forward
        self.group = group
        self.spec = spec
        self.pool = pool
        self.num_attended = 0
        """Calls of the attention hook: every layer must go through it in every forward."""
        self.attention: Attention | None = None
        """How the model attends, as seen last."""

    @property
    def step(self) -> Step:
        return self._forward.steps[self.group]

    @property
    def seen(self) -> LayerCache:
        """What the model gets."""
        return self

    # -- what mlx-lm's models call --

    start_position = 0
    """The first one whose K and V are there."""

    @property
    def offset(self) -> mx.array | int:
        """(T,) each row's position, or the first one of a run."""
        start = self._forward.start
        return self._forward.positions if start is None else start

    def maybe_trim_front(self) -> None:
        """What a model no longer reads is masked."""

    @property
    def keys(self) -> mx.array:
        """Stands for what mlx-lm's caches hold: models assign something that depends on it, so
        that it is evaluated. Pools are in every step."""
        return mx.zeros(1)

    @keys.setter
    def keys(self, _: mx.array) -> None: ...

    values = keys

    def make_mask(self, N: int, window_size: int | None = None, return_array: bool = False):  # noqa: N803
        kept = self.step.window
        window = window_size or kept
        if kept is not None and window > kept:
            raise UnsupportedModel(
                f"the model reads {window} positions in a layer whose cache keeps {kept}"
            )
        if N == 1 and window is None and self.spec.may_be_latent and not self._forward.fetches:
            return None  # as mlx-lm's caches do: what masks scores itself would make them unknown
        mask = self.step.mask(window, self._forward.positions)
        return Tagged.of(mask, MaskTag(self.step, window))

    def update_and_fetch(self, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """Writes the rows (T, kv_heads, 1, head_dim), or (1, kv_heads, T, head_dim) of a run, and
        returns what they may read, tagged: (T or 1, kv_heads, positions, head_dim)."""
        forward = self._forward
        if self.step.is_run:
            k, v = k.swapaxes(0, 2), v.swapaxes(0, 2)
        self.pool.write(self.step, k, v, forward.after, is_read=forward.fetches)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        fetches = self._forward.fetches
        k, v = self.pool.fetch(self.step) if fetches else self.step.unread(self.spec)
        return Tagged.of(k, self), TaggedV.of(v, self)

    def is_trimmable(self) -> bool:
        return False

    # -- what the hook calls --

    def attend(
        self, q: mx.array, window: int | None, scale: float, sinks: mx.array | None
    ) -> mx.array:
        """q (T, heads, 1, head_dim) -> (T, heads, 1, value head_dim), or as (1, heads, T, ...)"""
        self.num_attended += 1
        self.attention = Attention(q.shape[1], q.dtype, window, scale, sinks is not None)
        if not self.step.is_run:
            out = self.pool.attend(self.step, q, window, scale, sinks)
        else:
            q = q.swapaxes(0, 2)
            out = self.pool.attend(self.step, q, window, scale, sinks).swapaxes(0, 2)
        self._forward.go_on(out)
        return out

    def attend_latent(self, q: mx.array, q_v: mx.array, scale: float) -> mx.array:
        """Where K are the values too, and V only more of what scores are made of, `scale * q @ K +
        q_v @ V`: q (T, heads, 1, head_dim), q_v (T, heads, 1, value head_dim) -> as q. Or as
        (1, heads, T, ...)"""
        self.num_attended += 1
        self.attention = Attention(q.shape[1], q.dtype, None, scale, False, is_latent=True)
        if not self.step.is_run:
            out = self.pool.attend_latent(self.step, q, q_v, scale)
        else:
            q, q_v = q.swapaxes(0, 2), q_v.swapaxes(0, 2)
            out = self.pool.attend_latent(self.step, q, q_v, scale).swapaxes(0, 2)
        self._forward.go_on(out)
        return out


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
