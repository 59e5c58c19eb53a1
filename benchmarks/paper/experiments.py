"""What is measured, as functions that return plain numbers and share nothing: they may run side by
side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, count
from multiprocessing import get_context

from benchmarks.paper.lengths import Lengths, Pair, lognormal
from benchmarks.paper.orca import RESERVES, Orca
from benchmarks.paper.paged import NoRoomKept, Paged
from benchmarks.paper.serving import SLOTS, Held, Request, System, draw, fill, serve

LIMIT = 0.15
"""Seconds of normalised latency, up to which a system is said to bear a rate."""
ORACLE, OURS, NO_ROOM = "Orca Oracle", "mlxpage", "mlxpage, no room kept"
SYSTEMS: dict[str, Callable[[], System]] = {
    **{name: partial(Orca, SLOTS, reserve) for name, reserve in RESERVES.items()},
    OURS: partial(Paged, SLOTS),
}
BLOCK_SIZES = (1, 8, 16, 32, 64, 128, 256)
SAMPLES = (2, 4, 6)

# Of a prompt that translates: the paper's have 80 tokens with one example and 341 with five, so an
# example has 65, a sentence and its translation. It doesn't say how long the sentences are that are
# asked for: half of that each, then.
SHOTS = {"1 example": 80, "5 examples": 341}
SENTENCE = (341 - 80) / 4 / 2
SENTENCE_SPREAD = 0.6

PAPERS_RATE = {"ShareGPT": 2, "ShareGPT, stretched": 2, "Alpaca": 30}
"""Requests in a second where the paper counted batches."""


@dataclass(frozen=True)
class Scale:
    """How much is run of a workload."""

    steps: int
    """Of a full queue, after a quarter as many to warm up."""
    duration: float
    """Seconds of a trace."""
    rates: tuple[float, ...]
    """Whose latency is told, as far as a system bears them."""
    precision: float = 0.02
    """Of the highest rate that it bears."""


_SHAREGPT = Scale(12_000, 600, (0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4))
FULL = {
    "ShareGPT": _SHAREGPT,
    "ShareGPT, stretched": _SHAREGPT,
    "Alpaca": Scale(4000, 180, (2, 4, 8, 16, 24, 30, 36, 42, 48, 54, 60)),
    "translation": Scale(0, 60, (8, 16, 24, 32, 40, 48, 56, 64, 72, 80)),
}
_QUICK_SHAREGPT = Scale(200, 10, (0.5, 4), precision=0.4)
QUICK = {
    "ShareGPT": _QUICK_SHAREGPT,
    "ShareGPT, stretched": _QUICK_SHAREGPT,
    "Alpaca": Scale(200, 2, (4, 240), precision=0.4),
    "translation": Scale(0, 2, (16, 160), precision=0.4),
}

Job = Callable[[], dict]


def jobs(lengths: dict[str, Lengths], scales: dict[str, Scale]) -> dict[tuple[str, str], Job]:
    """What has to be run, by experiment and workload."""
    found: dict[tuple[str, str], Job] = {}
    for experiment in (rates, memory, sampling):
        for workload, each in lengths.items():
            found[experiment.__name__, workload] = partial(experiment, each.pairs, scales[workload])
    for workload in ("ShareGPT", "Alpaca"):
        pairs, scale = lengths[workload].pairs, scales[workload]
        found["block sizes", workload] = partial(block_sizes, pairs, scale)
    for workload, rate in PAPERS_RATE.items():
        pairs, scale = lengths[workload].pairs, scales[workload]
        found["batches", workload] = partial(batches, pairs, scale, rate)
    for shot, common in SHOTS.items():
        found["prefix", shot] = partial(prefix, common, scales["translation"])
    return found


def measure(
    jobs: dict[tuple[str, str], Job], processes: int, on_status: Callable[[str], None]
) -> dict[str, dict[str, dict]]:
    """Experiment -> workload -> what it found."""
    results: dict[str, dict[str, dict]] = {}
    with ProcessPoolExecutor(processes, get_context("spawn")) as executor:
        futures = {key: executor.submit(job) for key, job in jobs.items()}
        for (experiment, workload), future in futures.items():
            results.setdefault(experiment, {})[workload] = future.result()
            on_status(f"{experiment}, {workload}: done")
    return results


def memory(pairs: list[Pair], scale: Scale) -> dict[str, dict]:
    """What each system holds while its queue never empties."""
    systems = {**SYSTEMS, NO_ROOM: partial(Paged, SLOTS, scheduler=NoRoomKept)}
    found = {}
    for name, make in systems.items():
        # Few requests at once take long to show what the mean is, but hardly any time to run.
        steps = scale.steps * (10 if name in RESERVES else 1)
        found[name] = asdict(Held.of(fill(make(), draw(pairs), steps)))
    return found


def block_sizes(pairs: list[Pair], scale: Scale) -> dict[str, dict]:
    """The same of pools with blocks of another size."""
    return {
        str(size): asdict(Held.of(fill(Paged(SLOTS, size), draw(pairs), scale.steps)))
        for size in BLOCK_SIZES
    }


def batches(pairs: list[Pair], scale: Scale, rate: float) -> dict[str, float]:
    """The mean batch of each system at one rate."""
    return {
        name: serve(make(), draw(pairs), rate, scale.duration).batch
        for name, make in SYSTEMS.items()
    }


def sampling(pairs: list[Pair], scale: Scale) -> dict[str, float]:
    """What samples of one prompt save: % of the blocks that they would take without sharing."""
    savings = {}
    for samples in SAMPLES:
        system = Paged(SLOTS, samples=samples)
        entries = blocks = 0
        for _ in fill(system, draw(pairs), scale.steps):
            entries += system.entries
            blocks += system.blocks
        savings[str(samples)] = 100 * (1 - blocks / entries)
    return savings


def rates(pairs: list[Pair], scale: Scale) -> dict[str, dict]:
    """What each system bears."""
    return {name: bear(make, partial(draw, pairs), scale) for name, make in SYSTEMS.items()}


def prefix(common: int, scale: Scale) -> dict[str, dict]:
    """The same where all prompts begin with so many tokens."""
    sentences = lognormal((SENTENCE, SENTENCE), (SENTENCE_SPREAD, SENTENCE_SPREAD)).pairs
    requests = partial(draw, sentences, common)
    return {name: bear(SYSTEMS[name], requests, scale) for name in (ORACLE, OURS)}


def bear(
    make: Callable[[], System], requests: Callable[[], Iterator[Request]], scale: Scale
) -> dict:
    """Normalised latencies at the rates of the scale, up to the first that is above `LIMIT`, and
    the highest rate that isn't."""

    def latency(rate: float) -> float:
        return serve(make(), requests(), rate, scale.duration).latency

    low, high, curve = 0.0, math.inf, {}
    for rate in chain(scale.rates, (scale.rates[-1] * 2**n for n in count(1))):
        curve[str(rate)] = latency(rate)
        if curve[str(rate)] > LIMIT:
            high = rate
            break
        low = rate
    while high - low > scale.precision * high:
        middle = (low + high) / 2
        low, high = (middle, high) if latency(middle) <= LIMIT else (low, middle)
    return {"highest": low, "latency": curve}
