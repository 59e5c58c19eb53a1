"""What a client sees of requests, and the figures that are made of it, by vLLM's definitions."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mlxpage.bench.spread import percentile

PERCENTILES = (90, 99)
GOALS = ("ttft", "tpot", "e2el")
"""What goodput may ask for, in milliseconds."""


@dataclass(slots=True)
class Timeline:
    """One request: seconds on one clock, from when it was sent."""

    started: float
    num_prompt_tokens: int
    chunks: list[tuple[float, int]] = field(default_factory=list)
    """When something came, and how many tokens that was."""
    error: str | None = None

    def hear(self, now: float, num_tokens: int) -> None:
        if num_tokens:
            self.chunks.append((now, num_tokens))

    @property
    def has_completed(self) -> bool:
        return self.error is None and bool(self.chunks)

    @property
    def num_output_tokens(self) -> int:
        return sum(count for _, count in self.chunks)

    @property
    def ended(self) -> float:
        return self.chunks[-1][0]

    @property
    def ttft(self) -> float:
        """Time to first token."""
        return self.chunks[0][0] - self.started

    @property
    def e2el(self) -> float:
        """End-to-end latency: up to the last token."""
        return self.ended - self.started

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None if there is no other."""
        others = self.num_output_tokens - 1
        return (self.e2el - self.ttft) / others if others > 0 else None

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the gaps between what came."""
        return [late - early for (early, _), (late, _) in itertools.pairwise(self.chunks)]


def serving_metrics(
    timelines: Iterable[Timeline], duration: float, goals: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Figures of all requests under vLLM's names; times in ms, rates by the second of `duration`.

    `goals` are milliseconds for some of GOALS: a request that meets all of them is good. One with a
    single token has no time per token, and meets any goal for that.
    """
    lines = list(timelines)
    done = [line for line in lines if line.has_completed]
    prompt = sum(line.num_prompt_tokens for line in done)
    output = sum(line.num_output_tokens for line in done)
    metrics = {
        "duration": duration,
        "completed": len(done),
        "failed": len(lines) - len(done),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(done) / duration,
        "output_throughput": output / duration,
        "total_token_throughput": (prompt + output) / duration,
        "max_output_tokens_per_s": max_output_tokens_per_s(done),
        "max_concurrent_requests": max_concurrent_requests(done),
    }
    if goals:
        good = sum(_meets(line, goals) for line in done)
        metrics |= {"request_goodput": good / duration, "good": good}
    if done:
        each = {
            "ttft": [line.ttft for line in done],
            "tpot": [line.tpot for line in done if line.tpot is not None],
            "itl": [gap for line in done for gap in line.itl],
            "e2el": [line.e2el for line in done],
        }
        for name, seconds in each.items():
            metrics |= _distribution(name, seconds)
        each_token = [line.e2el / line.num_output_tokens for line in done]
        metrics["normalized_latency_ms"] = 1e3 * statistics.fmean(each_token)
    return metrics


def _distribution(name: str, seconds: list[float]) -> dict[str, float]:
    values = [1e3 * value for value in seconds] or [0.0]
    return {
        f"mean_{name}_ms": statistics.fmean(values),
        f"median_{name}_ms": statistics.median(values),
        f"std_{name}_ms": statistics.pstdev(values),
        **{f"p{p}_{name}_ms": percentile(values, p) for p in PERCENTILES},
    }


def _meets(line: Timeline, goals: Mapping[str, float]) -> bool:
    return all(1e3 * (getattr(line, name) or 0.0) <= limit for name, limit in goals.items())


def max_output_tokens_per_s(lines: Iterable[Timeline]) -> int:
    """Of seconds counted from when the first request was sent, the tokens of the fullest."""
    lines = list(lines)
    first = min((line.started for line in lines), default=0.0)
    counts: Counter[int] = Counter()
    for line in lines:
        for now, tokens in line.chunks:
            counts[int(now - first)] += tokens
    return max(counts.values(), default=0)


def max_concurrent_requests(lines: Iterable[Timeline]) -> int:
    """The most that were under way at once. One that ends makes room for one that begins then."""
    changes = []
    for line in lines:
        changes += [(line.started, 1), (line.ended, -1)]
    under_way = itertools.accumulate(change for _, change in sorted(changes))
    return max(under_way, default=0)
