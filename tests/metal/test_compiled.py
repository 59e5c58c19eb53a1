"""A compiled forward gives what the forward gives, from its inputs alone, or isn't compiled."""

import pytest

from mlxpage.metal import compiled
from mlxpage.metal.backend import mx
from mlxpage.metal.compiled import Compiled


class Cache:
    """What `Compiled` asks of a KVCache: here, one array that each forward adds its tokens to."""

    def __init__(self, kind: str = "decode"):
        self.kind = kind
        self.sum = mx.zeros(4)

    def signature(self):
        return self.kind

    @property
    def after(self):
        return self.sum

    def inputs(self):
        return [self.sum]

    def put(self, arrays, *, tracing=False):
        (self.sum,) = arrays

    def take(self, after):
        self.sum = after


class Forward:
    def __init__(self, cache: Cache):
        self.cache = cache
        self.built = 0

    def __call__(self, tokens: mx.array) -> mx.array:
        self.built += 1
        self.cache.sum = self.cache.sum + tokens
        return self.cache.sum * 2


def run(steps, cache, forward, kinds=("decode",)) -> list:
    function = Compiled()
    results = []
    for step in range(steps):
        cache.kind = kinds[step % len(kinds)]
        logits = function(forward, cache, mx.full((4,), step))
        mx.eval(logits, cache.sum)
        results.append((logits.tolist(), cache.sum.tolist()))
    return results


def expected(steps) -> list:
    sums = [sum(range(step + 1)) for step in range(steps)]
    return [([2.0 * s] * 4, [float(s)] * 4) for s in sums]


def test_a_shape_that_is_seen_again_is_built_once_more_and_then_replayed():
    cache = Cache()
    forward = Forward(cache)
    assert run(10, cache, forward) == expected(10)
    assert forward.built == 2


def test_what_is_fixed_in_a_function_makes_another_one():
    cache = Cache()
    forward = Forward(cache)
    assert run(12, cache, forward, kinds=("a", "b", "c")) == expected(12)
    assert forward.built == 6


def test_other_shapes_make_another_one():
    cache = Cache()
    forward = Forward(cache)
    function = Compiled()
    for size in (4, 4, 4, 1, 1, 1):
        mx.eval(function(forward, cache, mx.ones(size)), cache.sum)
    assert forward.built == 4
    assert cache.sum.tolist() == [6] * 4


def test_functions_that_were_not_used_for_long_are_forgotten(monkeypatch):
    monkeypatch.setattr(compiled, "_MOST_FUNCTIONS", 2)
    cache = Cache()
    forward = Forward(cache)
    assert run(9, cache, forward, kinds=("a", "b", "c")) == expected(9)
    assert forward.built == 9, "three take turns, two are kept"


def test_what_was_used_last_is_kept(monkeypatch):
    monkeypatch.setattr(compiled, "_MOST_FUNCTIONS", 2)
    cache = Cache()
    forward = Forward(cache)
    # The third is compiled when the first has just been used, so the second is forgotten.
    assert run(8, cache, forward, kinds=("a", "a", "b", "b", "a", "c", "c", "a")) == expected(8)
    assert forward.built == 6, "seen and built, each of the three"


@pytest.mark.parametrize("steps", [1, 5])
def test_a_forward_that_looks_at_its_numbers_runs_as_it_is(steps):
    cache = Cache()

    def forward(tokens):
        cache.sum = cache.sum + tokens
        return cache.sum * (2 if tokens[0].item() >= 0 else 3)

    assert run(steps, cache, forward) == expected(steps)
