"""Arrays that remember where they come from: so the attention hook knows what models hand it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Self

from mlxpage.metal.backend import mx
from mlxpage.metal.layout import Step


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
