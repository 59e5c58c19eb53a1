"""Batches of prompts of one length: how long they take, and how long the tokens after them.

Prompts and tokens are measured apart. First each prompt is asked for one token, which computes it
and keeps its blocks; then all are asked again, which finds them, so that each step from the first
token on computes one row of every sequence. The clock of generation begins when all have their
first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from mlxpage import LLM
from mlxpage.bench.bandwidth import step_bytes
from mlxpage.bench.driver import Heard, forget, serve
from mlxpage.bench.runs import Arm
from mlxpage.bench.workloads import Item, draw
from mlxpage.engine import Engine
from mlxpage.metal.backend import mx
from mlxpage.metal.model import Model


@dataclass(frozen=True, slots=True)
class Batch:
    """So many prompts of `pp` random tokens each, and `tg` tokens after each."""

    pp: int
    tg: int
    sequences: int
    is_shared: bool = False
    """Whether they are the same prompt, which is computed once."""

    @property
    def num_prompts(self) -> int:
        return 1 if self.is_shared else self.sequences

    @property
    def num_tokens(self) -> int:
        """That K and V are computed of."""
        return self.num_prompts * self.pp + self.sequences * self.tg


@dataclass(slots=True)
class Timing:
    """Seconds."""

    prompt: float
    generation: float
    first_tokens: list[float]
    """Of each prompt."""
    num_generated: int
    peak_memory: int

    @property
    def generation_tps(self) -> float:
        return self.num_generated / self.generation

    @property
    def total(self) -> float:
        return self.prompt + self.generation


Figures = Callable[[Batch, Timing], dict[str, float]]


def time_batch(engine: Engine, batch: Batch, prompts: list[list[int]]) -> Timing:
    forget(engine)
    mx.reset_peak_memory()
    began = time.perf_counter()
    first = serve(engine, [Item(p, 1) for p in prompts[: batch.num_prompts]])
    waits = [heard.times[0] - began for heard in first]
    again = serve(engine, [Item(prompt, batch.tg + 1) for prompt in prompts])
    seconds, generated = generation_time(again)
    return Timing(max(waits), seconds, waits, generated, mx.get_peak_memory())


def generation_time(heard: list[Heard]) -> tuple[float, int]:
    """From when all have their first token to the end, and the tokens that came then."""
    begin = max(each.times[0] for each in heard)
    end = max(each.times[-1] for each in heard)
    return end - begin, sum(now > begin for each in heard for now in each.times)


def arm(
    llm: LLM,
    batch: Batch,
    case: dict[str, Any],
    figures: Figures,
    ids: np.ndarray,
    *,
    bytes_per_s: float,
    seed: int,
) -> Arm:
    """Prompts are of `ids`. `bytes_per_s` is what the machine copies, for the roofline."""
    rng = np.random.default_rng(seed)
    prompts = [draw(rng, ids, batch.pp) for _ in range(batch.num_prompts)]
    if batch.is_shared:
        prompts *= batch.sequences
    most = llm._call(lambda engine: roofline(engine.model, batch, bytes_per_s))

    def run(batch: Batch) -> dict[str, float]:
        timing = llm._call(lambda engine: time_batch(engine, batch, prompts))
        of_most = {"roofline_percent": 100 * timing.generation_tps / most} if most else {}
        return figures(batch, timing) | of_most

    short = replace(batch, tg=min(4, batch.tg))
    return Arm(case, partial(run, batch), partial(run, short))


def latency_figures(batch: Batch, timing: Timing) -> dict[str, float]:
    """By mlx_lm.benchmark's names."""
    return {
        "prompt_tps": batch.num_prompts * batch.pp / timing.prompt,
        "generation_tps": timing.generation_tps,
        "peak_memory": timing.peak_memory / 1e9,
        "total_time": timing.total,
        "ttft_ms": 1e3 * statistics.median(timing.first_tokens),
    }


def batched_figures(batch: Batch, timing: Timing) -> dict[str, float]:
    """By llama-batched-bench's names."""
    return {
        "t_pp": timing.prompt,
        "speed_pp": batch.num_prompts * batch.pp / timing.prompt,
        "t_tg": timing.generation,
        "speed_tg": timing.generation_tps,
        "t": timing.total,
        "speed": batch.num_tokens / timing.total,
        "peak_memory": timing.peak_memory / 1e9,
    }


def roofline(model: Model, batch: Batch, bytes_per_s: float) -> float | None:
    """Tokens a second, if a step took as long as to copy what it reads; None where that isn't known
    (`bandwidth.weight_bytes`)."""
    half = batch.tg / 2
    shared, own = (batch.pp, half) if batch.is_shared else (0, batch.pp + half)
    nbytes = step_bytes(model, batch.sequences, own, shared)
    return None if nbytes is None else batch.sequences * bytes_per_s / nbytes
