"""A model's decode step as a compiled function.

Python builds the graph of a large model's step in milliseconds, and a GPU may be done with the step
before by then. A compiled function is built once for its shapes: `mx.compile` keeps the graph, and
takes what changes from step to step as inputs. Pools are among them: what it captures, it keeps.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from mlxpage.metal.backend import mx
from mlxpage.metal.kv_cache import KVCache

_MOST_FUNCTIONS = 32
_MOST_KEYS = 256


class Compiled:
    """Runs forwards of shapes that it has seen before by compiled functions.

    A shape that comes for the first time runs as it is: to compile costs as much as some steps.
    """

    def __init__(self):
        self._functions: OrderedDict[tuple, Callable] = OrderedDict()
        self._seen: OrderedDict[tuple, None] = OrderedDict()
        self.error: str | None = None
        """Why nothing is compiled, if the model can't be."""

    def __call__(
        self, forward: Callable[[mx.array], mx.array], cache: KVCache, tokens: mx.array
    ) -> mx.array:
        """`forward(tokens)`, whatever of `cache` it reads and writes included."""
        if self.error is not None:
            return forward(tokens)
        key = (tokens.shape, tokens.dtype, cache.signature())
        inputs = [tokens, *cache.inputs()]
        function = self._function(key, forward, cache)
        if function is None:
            return forward(tokens)
        try:
            logits, after = function(inputs)
        except Exception as error:  # a model that looks at its numbers, say
            # Not the error itself: its frames hold the pools.
            self.error = f"{type(error).__name__}: {error}"
            return forward(tokens)
        cache.take(after)
        return logits

    def _function(self, key: tuple, forward, cache: KVCache) -> Callable | None:
        if key in self._functions:
            self._functions.move_to_end(key)
            return self._functions[key]
        if key not in self._seen:
            _remember(self._seen, key, None, _MOST_KEYS)
            return None
        _remember(self._functions, key, _compile(forward, cache), _MOST_FUNCTIONS)
        return self._functions[key]


def _remember(known: OrderedDict, key: tuple, value, most: int) -> None:
    known[key] = value
    if len(known) > most:
        known.popitem(last=False)


def _compile(forward, cache: KVCache) -> Callable:
    def traced(inputs):
        tokens, *arrays = inputs
        real = cache.inputs()
        try:
            cache.put(arrays, tracing=True)
            return forward(tokens), cache.after
        finally:
            cache.put(real)

    return mx.compile(traced)
