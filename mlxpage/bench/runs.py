"""Arms are measured in turns, so that what the machine does meanwhile happens to all of them."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mlxpage.bench.spread import interval

WARM_UP_SECONDS = 1.0
"""At least: fewer leave a GPU's clock where it was."""


@dataclass(slots=True)
class Arm:
    """One of the things that are compared, and what its runs came to."""

    case: dict[str, Any]
    """What distinguishes it from the others: settings."""
    run: Callable[[], dict[str, float]]
    """Does it once, and returns metrics."""
    warm_up: Callable[[], Any] = lambda: None
    """The same, maybe shorter."""
    runs: list[dict[str, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """What is told of it beside figures."""

    def row(self) -> dict[str, Any]:
        """What a record has of it: the medians, 95 % intervals of the means, and all runs."""
        values = {
            name: [run[name] for run in self.runs]
            for name, value in self.runs[0].items()
            if isinstance(value, (int, float)) and all(name in run for run in self.runs)
        }
        return {
            "case": self.case,
            "metrics": {name: statistics.median(each) for name, each in values.items()},
            "interval": {name: interval(each) for name, each in values.items()},
            "runs": self.runs,
            **({"facts": self.facts} if self.facts else {}),
        }


def in_turns(
    arms: list[Arm],
    repeats: int,
    *,
    warm_up: bool = True,
    delay: float = 0.0,
    on_run: Callable[[], None] = lambda: None,
) -> None:
    """Runs each arm `repeats` times, in turns, each after `delay` seconds.
    Warming up takes all of them once, and a second at least."""
    if warm_up:
        began = time.monotonic()
        for count, arm in enumerate(itertools.cycle(arms)):
            if count >= len(arms) and time.monotonic() - began >= WARM_UP_SECONDS:
                break
            arm.warm_up()
    for _ in range(repeats):
        for arm in arms:
            time.sleep(delay)
            gc.collect()
            arm.runs.append(arm.run())
            on_run()


def drift(arms: list[Arm], metric: str) -> float | None:
    """The last repetition's `metric` by the first one's, the median of all arms: far from 1, the
    machine got hot, or was busy with something else."""
    pairs = [(arm.runs[0].get(metric), arm.runs[-1].get(metric)) for arm in arms]
    ratios = [last / first for first, last in pairs if first and last is not None]
    if not ratios or len(arms[0].runs) < 2:
        return None
    return statistics.median(ratios)
