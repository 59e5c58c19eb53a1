"""What a generation gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mlxpage.errors import MlxpageError

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model's own distribution (natural logarithm,
    before temperature and penalties)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens as (token id, log-probability), likeliest first."""


@dataclass(slots=True)
class Timings:
    """Seconds from `time.perf_counter`, on the engine's thread."""

    arrived: float
    scheduled: float | None = None
    first_token: float | None = None
    finished: float | None = None

    @property
    def queue_s(self) -> float:
        return (self.scheduled or self.arrived) - self.arrived

    @property
    def ttft_s(self) -> float:
        return (self.first_token or self.arrived) - self.arrived

    @property
    def total_s(self) -> float:
        return (self.finished or self.arrived) - self.arrived


@dataclass(slots=True)
class RequestOutput:
    """A finished generation."""

    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    num_cached_tokens: int
    """Prompt tokens whose K and V were found in the pool instead of computed."""
    num_preemptions: int
    timings: Timings
    logprobs: list[TokenLogprobs] | None = None
    """One entry per output token, if asked for."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One entry per prompt token, if asked for; the first has no predecessor and is None."""
    choices: list[RequestOutput] = field(default_factory=list)
    """The further generations of the same prompt, if `n` asked for more than one."""


@dataclass(slots=True)
class StreamEvent:
    """What one step added to a generation; the texts of all events make the whole text."""

    text: str
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    output: RequestOutput | None = None
    """Everything the request gave, with its last event."""
    error: MlxpageError | None = None
    """Why the generation ended, when the engine failed."""
    choice: int = 0
    """Which of the generations this is part of, if `n` asked for more than one."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry per token id, if asked for."""
