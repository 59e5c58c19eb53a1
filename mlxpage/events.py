"""What a request that was submitted to an `AsyncEngine` tells while it is served.

for event in engine.submit("Once upon a time"):
    match event:
        case Prefill(num_computed_tokens=done, num_prompt_tokens=all):
            bar.set(done / all)
        case Tokens(text=text):
            print(text, end="")
"""

from __future__ import annotations

from dataclasses import dataclass

from mlxpage.errors import MlxpageError
from mlxpage.outputs import FinishReason, RequestOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Queued:
    """The request was accepted, and waits for its turn."""

    num_ahead: int
    """Requests of all priorities that waited when it came."""


@dataclass(frozen=True, slots=True)
class Prefill:
    """So much of the prompt is computed. After a preemption it begins again."""

    num_computed_tokens: int
    num_prompt_tokens: int
    num_cached_tokens: int
    """Of the computed ones, those that were found instead."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What is new in a generation since its last event; the texts of all make the whole text."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None = None
    """One entry per token id, if asked for."""
    finish_reason: FinishReason | None = None
    choice: int = 0
    """Which of the generations this is part of, if `n` asked for more than one."""


@dataclass(frozen=True, slots=True)
class Preempted:
    """The pool was full: the generation waits, and what it had is computed again. No token is lost
    or comes twice."""

    num_preemptions: int
    """So far, this one included."""
    choice: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """The request has ended, or was cancelled: then the `finish_reason` is "abort"."""

    output: RequestOutput


@dataclass(frozen=True, slots=True)
class Error:
    """The request has failed."""

    error: MlxpageError
    output: RequestOutput | None = None
    """What it had until then, if it had begun."""


Event = Queued | Prefill | Tokens | Preempted | Done | Error
