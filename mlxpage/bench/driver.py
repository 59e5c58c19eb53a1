"""Serves a workload on an engine's own thread, with nothing between its steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from mlxpage.bench.workloads import Item, greedy
from mlxpage.engine import Engine
from mlxpage.outputs import RequestOutput, StreamEvent


@dataclass(slots=True)
class Heard:
    """What came of a request."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    """`time.perf_counter` of each token."""
    output: RequestOutput | None = None


def forget(engine: Engine) -> None:
    """What is cached, so that a run finds nothing of the one before."""
    if engine.scheduler.prefix_cache is not None:
        engine.scheduler.prefix_cache.clear()


def serve(
    engine: Engine,
    items: list[Item],
    *,
    after_step: Callable[[], None] = lambda: None,
    **params,
) -> list[Heard]:
    """All of them at once, in their order, greedily unless `params` say otherwise. Of several
    choices the first is heard."""
    heard = [Heard() for _ in items]
    errors: list[Exception] = []

    def on_event(index: int, event: StreamEvent) -> None:
        if event.error is not None:
            errors.append(event.error)
        if event.choice == 0:
            heard[index].tokens += event.token_ids
            heard[index].times += [time.perf_counter()] * len(event.token_ids)
        heard[index].output = event.output or heard[index].output

    try:
        for index, item in enumerate(items):
            given = greedy(item, **params)
            engine.add(engine.request(item.prompt, given, partial(on_event, index)))
        while engine.has_work:
            engine.step()
            after_step()
            if errors:
                raise errors[0]
    except BaseException:
        engine.abort_all()
        raise
    return heard
