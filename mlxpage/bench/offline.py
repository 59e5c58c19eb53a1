"""All requests at once, as fast as it goes: this engine, and its rivals."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mlxpage import LLM
from mlxpage.bench.driver import forget, serve
from mlxpage.bench.runs import Arm
from mlxpage.bench.workloads import Item, longest
from mlxpage.engine import Engine
from mlxpage.metal.backend import mx
from mlxpage.metal.model import Model

# What mlx-lm's caches grow by, in tokens.
CACHE_STEP = 256
PROMPTS_AT_ONCE = 8
"""That its `BatchGenerator` computes, by its own default."""


@dataclass(slots=True)
class Ran:
    """What an arm did with a workload."""

    seconds: float
    tokens: list[list[int]]
    """Of each request."""
    peak_kv: int
    peak_memory: int | None
    """The most bytes that MLX had, with the pool counted as far as blocks of it were in use; None:
    it wasn't MLX."""

    def figures(self, items: list[Item]) -> dict[str, float]:
        """By vLLM's names."""
        output = sum(map(len, self.tokens))
        total = output + sum(len(item.prompt) for item in items)
        memory = {} if self.peak_memory is None else {"peak_memory": self.peak_memory / 1e9}
        return {
            "elapsed_time": self.seconds,
            "num_requests": len(items),
            "total_num_tokens": total,
            "requests_per_second": len(items) / self.seconds,
            "tokens_per_second": total / self.seconds,
            "output_tokens_per_second": output / self.seconds,
            "peak_kv_bytes": self.peak_kv,
            **memory,
        }


@dataclass(slots=True)
class Comparison:
    """The arms on one workload, and what they said."""

    llm: LLM
    items: list[Item]
    chunk: int
    """Tokens of prompts in a step."""
    said: dict[str, list[list[int]]] = field(default_factory=dict)
    """The tokens of each arm's last run."""

    def arm(self, name: str, serve_all: Callable[[Engine, list[Item]], Ran]) -> Arm:
        short = [Item(item.prompt[:32], min(8, item.output_len)) for item in self.items[:4]]

        def run() -> dict[str, float]:
            ran = self.llm._call(lambda engine: serve_all(engine, self.items))
            self.said[name] = ran.tokens
            return ran.figures(self.items)

        def warm_up() -> None:
            self.llm._call(lambda engine: serve_all(engine, short))

        return Arm({"arm": name}, run, warm_up)

    def ours(self) -> Arm:
        return self.arm("mlxpage", run_ours)

    def batch_generator(self, at_once: int) -> Arm:
        """mlx-lm's, with up to so many sequences in a batch."""

        def batched(engine: Engine, items: list[Item]) -> Ran:
            return run_batch_generator(engine, items, at_once, self.chunk)

        arm = self.arm("mlx-lm BatchGenerator", batched)
        arm.facts["at_once"] = at_once
        return arm

    def one_at_a_time(self) -> Arm:
        """mlx-lm's generation."""

        def alone(engine: Engine, items: list[Item]) -> Ran:
            return run_one_at_a_time(engine, items, self.chunk)

        return self.arm("mlx-lm one at a time", alone)

    def same_tokens(self, name: str) -> dict[str, Any]:
        """How many requests got the tokens that mlxpage gave them, and where the others part."""
        pairs = zip(self.said["mlxpage"], self.said[name], strict=True)
        parted = [_first_difference(*pair) for pair in pairs]
        places = [place for place in parted if place is not None]
        return {
            "same_tokens": len(parted) - len(places),
            "first_difference": min(places, default=None),
        }


def _first_difference(ours: list[int], theirs: list[int]) -> int | None:
    if ours == theirs:
        return None
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def run_ours(engine: Engine, items: list[Item]) -> Ran:
    forget(engine)
    held = 0

    def look() -> None:
        nonlocal held
        held = max(held, engine.pool.used_nbytes)

    mx.reset_peak_memory()
    began = time.perf_counter()
    heard = serve(engine, items, after_step=look)
    seconds = time.perf_counter() - began
    peak = mx.get_peak_memory() - engine.pool.nbytes + held
    return Ran(seconds, [each.tokens for each in heard], held, peak)


def run_batch_generator(engine: Engine, items: list[Item], at_once: int, chunk: int) -> Ran:
    """mlx-lm's continuous batching: contiguous caches, padded to the longest sequence."""
    from mlx_lm.generate import BatchGenerator

    def generate() -> Iterator[tuple[int, int, int]]:
        generator = BatchGenerator(
            engine.model.module,
            completion_batch_size=at_once,
            prefill_batch_size=min(PROMPTS_AT_ONCE, at_once),
            prefill_step_size=chunk,
        )
        uids = generator.insert([i.prompt for i in items], [i.output_len for i in items])
        places = {uid: place for place, uid in enumerate(uids)}
        while responses := generator.next_generated():
            held = generator.prompt_cache_nbytes
            for response in responses:
                yield places[response.uid], response.token, held
        generator.close()

    return _run_rival(engine, items, generate())


def run_one_at_a_time(engine: Engine, items: list[Item], chunk: int) -> Ran:
    from mlx_lm.generate import generate_step
    from mlx_lm.models.cache import make_prompt_cache

    def generate() -> Iterator[tuple[int, int, int]]:
        for place, item in enumerate(items):
            cache = make_prompt_cache(engine.model.module)
            steps = generate_step(
                mx.array(item.prompt),
                engine.model.module,
                max_tokens=item.output_len,
                prompt_cache=cache,
                prefill_step_size=chunk,
            )
            for token, _ in steps:
                yield place, int(token), 0
            yield place, -1, sum(layer.nbytes for layer in cache)

    return _run_rival(engine, items, generate())


def _run_rival(engine: Engine, items, generated: Iterator[tuple[int, int, int]]) -> Ran:
    """`generated`: (place of the request, token or -1, bytes of K and V then)."""
    tokens: list[list[int]] = [[] for _ in items]
    held = 0
    mx.reset_peak_memory()
    began = time.perf_counter()
    for place, token, nbytes in generated:
        held = max(held, nbytes)
        if token >= 0:
            tokens[place].append(token)
    seconds = time.perf_counter() - began
    peak = mx.get_peak_memory() - engine.pool.nbytes
    mx.clear_cache()
    return Ran(seconds, tokens, held, peak)


def at_once_within(model: Model, items: list[Item], kv_bytes: int, most: int) -> int:
    """Sequences that mlx-lm may batch, up to `most`, for caches of the longest one each to stay
    within `kv_bytes`: at least 1. A cache is rounded up to steps, and one that grows takes a step
    more: its new part is rounded up by itself."""
    plain = sum(spec.quantised(None, None).bytes_per_token for spec in model.kv_specs)
    length = (-(-longest(items) // CACHE_STEP) + 1) * CACHE_STEP
    return max(1, min(most, kv_bytes // (plain * length) if plain else most))
