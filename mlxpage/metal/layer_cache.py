"""One layer's K and V as mlx-lm sees them, and the forward that writes and reads them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from mlxpage.errors import UnsupportedModel
from mlxpage.metal.backend import mx
from mlxpage.metal.layout import Attention, LayerSpec, Step
from mlxpage.metal.tagged import MaskTag, Tagged, TaggedV

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
