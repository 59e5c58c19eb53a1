"""The requests that are being served: what has come of them, and what their callers hear."""

from __future__ import annotations

import random
import time
from dataclasses import replace

from mlxpage.errors import MlxpageError
from mlxpage.events import Preempted, Prefill
from mlxpage.outputs import FinishReason, StreamEvent, TokenLogprobs
from mlxpage.request import Choice, Request
from mlxpage.scheduler import Schedule, Scheduler
from mlxpage.sequence import Sequence


class Served:
    """Keeps requests from the moment that a scheduler has their sequences until they end."""

    def __init__(self, scheduler: Scheduler, seed: int | None):
        self._scheduler = scheduler
        self._seeds = random.Random(seed)
        self._requests: dict[int, Request] = {}
        self._choices: dict[int, tuple[Request, Choice]] = {}
        """By the ids of their sequences, until they end."""
        self.num_prompt_tokens = self.num_output_tokens = 0
        """Of generations that came to their end; those that were aborted don't count."""
        self._num_preemptions_told = 0

    def choices(self) -> list[Choice]:
        """The generations that haven't ended."""
        return [choice for _, choice in self._choices.values()]

    def find(self, request_id: int) -> Request | None:
        return self._requests.get(request_id)

    def request_of(self, seq: Sequence) -> Request | None:
        request, _ = self._find_choice(seq)
        return request

    def _find_choice(self, seq: Sequence) -> tuple[Request, Choice] | tuple[None, None]:
        return self._choices.get(seq.id, (None, None))

    def begin(self, request: Request) -> None:
        seed = request.params.seed
        seed = self._seeds.getrandbits(64) if seed is None else seed
        self._requests[request.id] = request
        for choice in request.choices:
            # A choice is what its seed gives alone.
            of_choice = (seed + choice.index) % 2**64
            choice.seq.params = replace(choice.seq.params, seed=of_choice)
            self._choices[choice.seq.id] = request, choice

    def note_start(self, schedule: Schedule) -> None:
        now = time.perf_counter()
        for part in schedule.scheduled:
            _, choice = self._choices[part.seq.id]
            timings = choice.timings
            timings.scheduled = timings.scheduled or now

    def tell_progress(self, schedule: Schedule) -> None:
        """Hands out how far the prompts of a step that was computed are."""
        for part in schedule.scheduled:
            seq = part.seq
            request = self.request_of(seq) if part.start < seq.num_prompt_tokens else None
            if request and request.on_progress:
                computed = min(part.start + part.num_tokens, seq.num_prompt_tokens)
                cached = seq.num_cached_tokens
                request.on_progress(Prefill(computed, seq.num_prompt_tokens, cached))

    def tell_preemptions(self) -> None:
        """Hands out which generations had to give their blocks up, for whatever reason."""
        if self._num_preemptions_told == self._scheduler.num_preemptions:
            return
        self._num_preemptions_told = self._scheduler.num_preemptions
        for request, choice in list(self._choices.values()):
            count = choice.seq.num_preemptions
            if count > choice.num_preemptions_told:
                choice.num_preemptions_told = count
                if request.on_progress:
                    request.on_progress(Preempted(count, choice.index))

    def take_prompt_logprobs(
        self, scoring: list[tuple[Sequence, int]], entries: list[TokenLogprobs]
    ) -> None:
        """Those of one token of a prompt each: its sequence and position."""
        for (seq, position), entry in zip(scoring, entries, strict=True):
            request = self.request_of(seq)
            # A preempted prompt is computed again.
            if request and position == len(request.prompt_logprobs):
                request.prompt_logprobs.append(_first(entry, seq.params.prompt_logprobs))

    def take_logprobs(self, sampling: list[Sequence], entries: list[TokenLogprobs]) -> None:
        """Those of the tokens that `take_token` gets next."""
        for seq, entry in zip(sampling, entries, strict=True):
            _, choice = self._find_choice(seq)
            if choice and seq.params.logprobs is not None:
                choice.logprobs.append(_first(entry, seq.params.logprobs))

    def take_token(self, seq: Sequence, token: int, now: float) -> None:
        """Hands out a token that `seq` has got; does nothing if it was aborted before that."""
        request, choice = self._find_choice(seq)
        if choice is None:
            return
        choice.timings.first_token = choice.timings.first_token or now
        ended_by_token = seq.finish_reason == "stop"
        text = "" if ended_by_token else choice.text_stream.add(token)
        new = choice.logprobs[-1:] if seq.params.logprobs is not None else None
        if seq.finish_reason or choice.text_stream.stopped:
            self._finish(request, choice, seq.finish_reason or "stop", text, [token], new)
        else:
            choice.text += text
            request.on_event(StreamEvent(text, [token], choice=choice.index, logprobs=new))

    def take_end(self, seq: Sequence) -> None:
        """Hands out that `seq` has ended without another token."""
        request, choice = self._find_choice(seq)
        if choice is not None:
            self._finish(request, choice, seq.finish_reason)

    def end(self, request: Request, error: MlxpageError | None = None) -> None:
        """Ends a request before its time, with what it has so far."""
        for choice in request.choices:
            if choice.seq.id in self._choices:
                self._finish(request, choice, "abort", error=error)

    def end_all(self, error: MlxpageError | None = None) -> None:
        for request in list(self._requests.values()):
            self.end(request, error)

    def _finish(
        self,
        request: Request,
        choice: Choice,
        reason: FinishReason,
        text: str = "",
        token_ids: list[int] | None = None,
        logprobs: list[TokenLogprobs] | None = None,
        error: MlxpageError | None = None,
    ) -> None:
        seq = choice.seq
        if error is None:
            text += choice.text_stream.finish()
        self._scheduler.finish(seq, reason)
        del self._choices[seq.id]
        if choice.text_stream.stopped:
            seq.finish_reason = "stop"
        choice.text += text
        choice.timings.finished = time.perf_counter()
        self._count(choice)
        request.num_unfinished -= 1
        output = None
        if request.num_unfinished == 0:
            del self._requests[request.id]
            output = request.output()
        ids, reason = token_ids or [], seq.finish_reason
        request.on_event(StreamEvent(text, ids, reason, output, error, choice.index, logprobs))

    def _count(self, choice: Choice) -> None:
        seq = choice.seq
        if seq.finish_reason != "abort":
            if choice.index == 0 and not choice.num_taken_over:
                self.num_prompt_tokens += seq.num_prompt_tokens
            self.num_output_tokens += seq.num_output_tokens - choice.num_taken_over


def _first(entry: TokenLogprobs, count: int) -> TokenLogprobs:
    """The batch computed as many as its most curious request wants."""
    return replace(entry, top=entry.top[:count])
