"""What a caller asked for, and what has come of it so far."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from mlxpage.errors import InvalidRequest
from mlxpage.events import Preempted, Prefill
from mlxpage.outputs import RequestOutput, StreamEvent, Timings, TokenLogprobs
from mlxpage.sampling_params import SamplingParams
from mlxpage.sequence import Sequence
from mlxpage.text import TextStream


@dataclass(slots=True, eq=False)
class Choice:
    """One of a request's generations."""

    index: int
    seq: Sequence
    text_stream: TextStream
    timings: Timings
    text: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    num_taken_over: int = 0
    """Tokens that a fork began with."""
    num_preemptions_told: int = 0

    def take_over(self, other: Choice) -> None:
        """What has come of another one, whose tokens this one has too."""
        for token in self.seq.output_token_ids:
            self.text += self.text_stream.add(token)
        if self.text_stream.stopped:
            raise InvalidRequest(f"the text so far holds a stop string already: {self.text!r:.80}")
        self.logprobs = list(other.logprobs)
        self.num_taken_over = len(self.seq.output_token_ids)

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, so that length doesn't count."""
        return statistics.fmean(entry.logprob for entry in self.logprobs or [_NEVER])


_NEVER = TokenLogprobs(-1, float("-inf"))


@dataclass(slots=True, eq=False)
class Request:
    """A prompt, its generations, and what the caller wants to hear of them."""

    params: SamplingParams
    choices: list[Choice]
    on_event: Callable[[StreamEvent], None]
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=lambda: [None])
    on_progress: Callable[[Prefill | Preempted], None] | None = None
    num_unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_unfinished = len(self.choices)

    @property
    def id(self) -> int:
        return self.choices[0].seq.id

    @property
    def prompt_token_ids(self) -> list[int]:
        seq = self.choices[0].seq
        return seq.token_ids[: seq.num_prompt_tokens]

    def output(self) -> RequestOutput:
        """The first of the choices, with the others that were asked for in it; the likeliest come
        first if there are more of them."""
        choices = self.choices
        if len(choices) > self.params.n:
            choices = sorted(choices, key=lambda choice: -choice.mean_logprob)[: self.params.n]
        first, *others = (self._output(choice) for choice in choices)
        first.choices = others
        return first

    def _output(self, choice: Choice) -> RequestOutput:
        seq, params = choice.seq, self.params
        return RequestOutput(
            prompt_token_ids=seq.token_ids[: seq.num_prompt_tokens],
            text=choice.text,
            token_ids=seq.output_token_ids,
            finish_reason=seq.finish_reason,
            num_cached_tokens=seq.num_cached_tokens,
            num_preemptions=seq.num_preemptions,
            timings=choice.timings,
            logprobs=choice.logprobs if params.logprobs is not None else None,
            prompt_logprobs=self.prompt_logprobs if params.prompt_logprobs is not None else None,
        )
