"""Requests come to a system, the system takes steps, and what it holds and does is watched."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from statistics import fmean
from typing import Protocol

from benchmarks.paper.cost import seconds
from benchmarks.paper.lengths import Pair

# OPT-13B on an A100 of 40 GB: 12 GiB for K and V, 800 KiB a token (table 1 of the paper).
SLOTS = 15_728
CONTEXT = 2048


@dataclass(slots=True, eq=False)
class Request:
    """Lengths in tokens; `arrived` in seconds."""

    id: int
    prompt: int
    output: int
    common: int = 0
    """Tokens of the prompt that all begin with."""
    arrived: float = 0.0


@dataclass(slots=True)
class Memory:
    """What the slots of K and V are used for at one moment, in slots, as figure 2 has it."""

    used: float = 0
    """Each holds a token."""
    reserved: float = 0
    """Taken for tokens that will come."""
    internal: float = 0
    """Taken for tokens that will never come."""
    external: float = 0
    """Lost between what was taken, or free."""


@dataclass(slots=True)
class Step:
    """What one step computes."""

    rows: int
    """Tokens."""
    context: int
    """Tokens of K and V that their attention reads."""
    batch: int
    """Sequences that run."""
    memory: Memory
    """While it runs."""
    preempted: int = 0
    finished: list[Request] = field(default_factory=list)


class System(Protocol):
    """A pool of K and V, and who is served from it in which order."""

    num_waiting: int

    def add(self, request: Request) -> None: ...

    def step(self) -> Step: ...


def draw(pairs: list[Pair], common: int = 0) -> Iterator[Request]:
    """Requests without end, their lengths drawn from `pairs`, after so many tokens in common."""
    rng = random.Random(1)
    for id in count():
        prompt, output = rng.choice(pairs)
        yield Request(id, common + prompt, output, common)


def fill(system: System, requests: Iterator[Request], steps: int) -> Iterator[Step]:
    """So many steps with a queue that never empties, so that as many are served at once as there is
    memory for; after a quarter as many to warm up."""
    for number in range(-(steps // 4), steps):
        while system.num_waiting < 8:
            system.add(next(requests))
        step = system.step()
        if number >= 0:
            yield step


@dataclass
class Held:
    """What steps held and did."""

    shares: dict[str, float]
    """Means of the slots, in %, by the names of `Memory`."""
    batch: float
    """Mean."""
    throughput: float
    """Requests that ended in a second."""
    preemptions: float
    """For each request that ended."""

    @classmethod
    def of(cls, steps: Iterable[Step]) -> Held:
        steps = list(steps)
        finished = sum(len(step.finished) for step in steps)
        clock = sum(seconds(step.rows, step.context) for step in steps)
        shares = {
            name: 100 * fmean(getattr(step.memory, name) for step in steps) / SLOTS
            for name in Memory.__slots__
        }
        preempted = sum(step.preempted for step in steps)
        batch = fmean(step.batch for step in steps)
        return cls(shares, batch, finished / clock, preempted / finished)


@dataclass
class Served:
    """What became of a trace of requests."""

    latency: float
    """Normalised: the mean over requests of seconds from arrival to end / tokens of output."""
    batch: float
    """Mean over the steps that began while requests could arrive."""


def serve(system: System, requests: Iterator[Request], rate: float, duration: float) -> Served:
    """Serves what arrives in so many seconds, Poisson at `rate` a second, to the end. A trace at
    another rate is the same one faster or slower."""
    arriving = _arrivals(requests, rate, duration)
    coming, clock, unfinished = next(arriving, None), 0.0, 0
    latencies, batches = [], []
    while unfinished or coming:
        if not unfinished:
            clock = coming.arrived
        while coming and coming.arrived <= clock:
            system.add(coming)
            unfinished += 1
            coming = next(arriving, None)
        step = system.step()
        if clock < duration:
            batches.append(step.batch)
        clock += seconds(step.rows, step.context)
        unfinished -= len(step.finished)
        latencies += [(clock - each.arrived) / each.output for each in step.finished]
    return Served(fmean(latencies), fmean(batches))


def _arrivals(requests: Iterator[Request], rate: float, duration: float) -> Iterator[Request]:
    rng = random.Random(2)
    clock = rng.expovariate(1) / rate
    while clock < duration:
        request = next(requests)
        request.arrived = clock
        yield request
        clock += rng.expovariate(1) / rate
