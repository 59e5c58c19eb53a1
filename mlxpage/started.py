"""A step of the engine from the moment it is dispatched until its results are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mlxpage.batch import Batch
from mlxpage.metal.backend import mx
from mlxpage.metal.model import Model
from mlxpage.metal.sampler import logprobs, sample
from mlxpage.outputs import TokenLogprobs
from mlxpage.scheduler import Schedule


@dataclass(slots=True)
class Started:
    """A step that is being computed: its plan, and its results as arrays."""

    schedule: Schedule
    batch: Batch
    began: float
    """`time.perf_counter`, before anything of it was computed."""
    tokens: mx.array | None = None
    """(S,) int32, one for each of `Batch.sampling`."""
    logprobs: tuple[mx.array, ...] = ()
    """Of those tokens, as `sampler.logprobs` gives them, if anyone asked."""
    prompt_logprobs: tuple[mx.array, ...] = ()
    """Likewise, of `Batch.scoring`."""

    def dispatch(self, model: Model, *, ahead: bool, before_waiting: Callable[[], None]) -> None:
        """Runs the model over the batch and chooses tokens: `ahead` of anybody who reads them, or
        evaluates them here. `before_waiting` as in `Model`."""
        batch = self.batch
        logits = model(batch.rows, before_waiting)
        num_sampled = len(batch.sampling)
        if num_sampled:
            self.tokens = sample(logits[:num_sampled], batch.choices)
            if (top := _most_logprobs(seq.params.logprobs for seq in batch.sampling)) is not None:
                self.logprobs = logprobs(logits[:num_sampled], self.tokens, top)
        if batch.scoring:
            targets = mx.array(batch.scored_tokens)
            top = _most_logprobs(seq.params.prompt_logprobs for seq, _ in batch.scoring)
            self.prompt_logprobs = logprobs(logits[num_sampled:], targets, top)
        results = [self.tokens] if num_sampled else []
        # The pools too: a write that nobody reads must happen all the same.
        results += [*self.logprobs, *self.prompt_logprobs, *model.cache.written()]
        (mx.async_eval if ahead else mx.eval)(*results)

    def read_tokens(self) -> list[int]:
        """Waits for them; -1 where the logits weren't finite."""
        return [] if self.tokens is None else self.tokens.tolist()

    def read_logprobs(self, tokens: list[int]) -> list[TokenLogprobs]:
        """Of `tokens`, as read; none if nobody asked."""
        return _as_logprobs(tokens, self.logprobs)

    def read_prompt_logprobs(self) -> list[TokenLogprobs]:
        return _as_logprobs(self.batch.scored_tokens, self.prompt_logprobs)


def _most_logprobs(wanted: Iterable[int | None]) -> int | None:
    return max((count for count in wanted if count is not None), default=None)


def _as_logprobs(tokens: list[int], arrays: tuple[mx.array, ...]) -> list[TokenLogprobs]:
    if not arrays:
        return []
    chosen, ids, values = (array.tolist() for array in arrays)
    return [
        TokenLogprobs(token, logprob, tuple(zip(top, of_top, strict=True)))
        for token, logprob, top, of_top in zip(tokens, chosen, ids, values, strict=True)
    ]
