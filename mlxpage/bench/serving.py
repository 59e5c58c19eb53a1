"""Requests that come when they come, as to a server, but in this process."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext

import numpy as np

from mlxpage.async_engine import AsyncEngine
from mlxpage.bench.driver import forget
from mlxpage.bench.runs import Arm
from mlxpage.bench.timeline import Timeline, serving_metrics
from mlxpage.bench.workloads import Item, greedy
from mlxpage.errors import EngineError, InvalidRequest, MlxpageError
from mlxpage.events import Tokens


def arrivals(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds at which so many requests come, at `rate` a second.

    The gaps are gamma distributed: `burstiness` 1 is a Poisson process, less comes in bursts, more
    more evenly. They are scaled so that the last one comes at count / rate, whatever was drawn. An
    infinite rate: all at once.
    """
    if not rate > 0:
        raise InvalidRequest(f"--request-rate is {rate}; it must be above 0, or inf")
    if not 0 < burstiness < math.inf:
        raise InvalidRequest(f"--burstiness is {burstiness}; it must be above 0")
    if rate == math.inf:
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), count)
    times = np.cumsum(gaps)
    return (times * (count / rate / times[-1])).tolist()


async def simulate(
    engine: AsyncEngine,
    items: list[Item],
    times: list[float],
    max_concurrency: int | None,
    on_end: Callable[[], None] = lambda: None,
) -> tuple[list[Timeline], float]:
    """Sends each item at its time, and hears it in this event loop, as an app would. Returns what
    came of them, and the seconds from the beginning to the last end.

    Beyond `max_concurrency`, a request is kept back until another has ended, and only then counts
    as sent. An item that follows another one is kept back until that has ended, too.
    """
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
    ended = [asyncio.Event() for _ in items]
    began = time.perf_counter()

    async def one(index: int) -> Timeline:
        item = items[index]
        await asyncio.sleep(max(0.0, began + times[index] - time.perf_counter()))
        if item.after is not None:
            await ended[item.after].wait()
        async with gate:
            line = await _listen(engine, item)
        ended[index].set()
        on_end()
        return line

    lines = await asyncio.gather(*map(one, range(len(items))))
    return lines, time.perf_counter() - began


async def _listen(engine: AsyncEngine, item: Item) -> Timeline:
    line = Timeline(time.perf_counter(), len(item.prompt))
    try:
        async for event in engine.submit(item.prompt, greedy(item)):
            if isinstance(event, Tokens):
                line.hear(time.perf_counter(), len(event.token_ids))
    except MlxpageError as error:
        line.error = f"{type(error).__name__}: {error}"
    return line


def arm(
    engine: AsyncEngine,
    items: list[Item],
    *,
    rate: float,
    burstiness: float,
    max_concurrency: int | None,
    goals: Mapping[str, float],
    seed: int,
    on_end: Callable[[], None] = lambda: None,
) -> Arm:
    times = arrivals(len(items), rate, burstiness, seed)

    def run() -> dict[str, float]:
        engine._call(forget)
        lines, duration = asyncio.run(simulate(engine, items, times, max_concurrency, on_end))
        errors = sorted({line.error for line in lines if line.error})
        if errors:
            made.facts["errors"] = errors
        if not any(line.has_completed for line in lines):
            raise EngineError(f"no request has completed: {', '.join(errors) or 'no token came'}")
        return serving_metrics(lines, duration, goals)

    def warm_up() -> None:
        short = [Item(item.prompt, min(4, item.output_len)) for item in items[:2]]
        asyncio.run(simulate(engine, short, [0.0] * len(short), None))

    made = Arm({"request_rate": "inf" if rate == math.inf else rate}, run, warm_up)
    return made
