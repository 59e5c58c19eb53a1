"""Beam search: which beginnings are carried on, and when there is nothing better to be found."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from mlxpage.outputs import FinishReason, TokenLogprobs
from mlxpage.sampling_params import BeamSearchParams


@dataclass(slots=True)
class Beam:
    """Tokens after the prompt, and what the model thinks of them."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None

    def then(self, token: int, logprob: float) -> Beam:
        return Beam(
            [*self.token_ids, token],
            [*self.logprobs, TokenLogprobs(token, logprob)],
            self.cumulative_logprob + logprob,
        )


Likeliest = tuple[tuple[int, float], ...]
"""(token, log-probability), likeliest first."""


def carry_out(
    searches: list[BeamSearch], after: Callable[[list[list[int]]], list[Likeliest]]
) -> None:
    """All searches side by side to their ends; `after` says for many sequences what comes next."""
    while running := [search for search in searches if search.beams]:
        sequences = [
            [*search.prompt, *beam.token_ids] for search in running for beam in search.beams
        ]
        results = iter(after(sequences))
        for search in running:
            search.advance([next(results) for _ in search.beams])


class BeamSearch:
    """The search after one prompt, as Hugging Face's generation has it.

    A step extends every beam by every token, and carries on the `beam_width` likeliest results.
    One that ends with an end token is finished if it's among the likeliest `beam_width` of all. In
    the end those are ranked by cumulative log-probability over length ** length_penalty.
    """

    def __init__(
        self,
        prompt: list[int],
        params: BeamSearchParams,
        end_tokens: Collection[int],
        max_tokens: int,
    ):
        """`max_tokens` is what the context leaves of those in `params`."""
        self.prompt = prompt
        self._params = params
        self._end_tokens = end_tokens
        self._max_tokens = max_tokens
        self.beams = [Beam()]
        """To be carried on; none when the search is over."""
        self.finished: list[Beam] = []
        """The best so far, best first."""

    def advance(self, likeliest: list[Likeliest]) -> None:
        """Takes the likeliest tokens after each of `beams`, `beam_width` of them and as many more
        as there are end tokens, and makes the next beams."""
        width = self._params.beam_width
        steps = [
            beam.then(token, logprob)
            for beam, tokens in zip(self.beams, likeliest, strict=True)
            for token, logprob in tokens
        ]
        steps.sort(key=lambda beam: -beam.cumulative_logprob)
        self.beams = []
        for rank, beam in enumerate(steps):
            if beam.token_ids[-1] in self._end_tokens:
                if rank < width:
                    self._finish(beam, "stop")
            elif len(self.beams) < width:
                self.beams.append(beam)
        if self.beams and len(self.beams[0].token_ids) >= self._max_tokens:
            for beam in self.beams:
                self._finish(beam, "length")
            self.beams = []
        elif self._is_over():
            self.beams = []

    def _finish(self, beam: Beam, reason: FinishReason) -> None:
        beam.finish_reason = reason
        self.finished.append(beam)
        self.finished.sort(key=lambda beam: -self.score(beam))
        del self.finished[self._params.beam_width :]

    def score(self, beam: Beam) -> float:
        return beam.cumulative_logprob / len(beam.token_ids) ** self._params.length_penalty

    def _is_over(self) -> bool:
        if len(self.finished) < self._params.beam_width:
            return False
        if self._params.early_stopping or not self.beams:
            return True
        # Sums only go down, and what they are divided by is largest at one of the ends.
        best, penalty = self.beams[0], self._params.length_penalty
        lengths = len(best.token_ids) + 1, self._max_tokens
        attainable = best.cumulative_logprob / max(length**penalty for length in lengths)
        return attainable <= self.score(self.finished[-1])
