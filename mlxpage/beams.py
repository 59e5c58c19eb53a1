"""Beam searches served by an engine: from prompts to outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from mlxpage.beam_search import Beam, BeamSearch, Likeliest, carry_out
from mlxpage.errors import InvalidRequest
from mlxpage.outputs import RequestOutput
from mlxpage.sampling_params import MAX_LOGPROBS, BeamSearchParams, SamplingParams

if TYPE_CHECKING:  # loads MLX
    from mlxpage.engine import Engine
    from mlxpage.text import Tokenizer

Run = Callable[[list[list[int]], SamplingParams], list[RequestOutput]]
"""Generates after many sequences of token ids."""


def search(
    engine: Engine, prompts: Iterable[list[int]], params: BeamSearchParams, run: Run
) -> list[RequestOutput]:
    """The likeliest continuations of each prompt: the best one, with the others as its choices."""
    ends = set() if params.ignore_eos else set(engine.eos_token_ids)
    ends.update(params.stop_token_ids)
    num_likeliest = params.beam_width + len(ends)
    if num_likeliest > MAX_LOGPROBS:
        raise InvalidRequest(
            f"beam_width is {params.beam_width} and there are {len(ends)} end and stop tokens; "
            f"together they may be {MAX_LOGPROBS}"
        )
    searches = [_begin(engine, prompt, params, ends) for prompt in prompts]
    step = SamplingParams(
        temperature=0,
        max_tokens=1,
        logprobs=num_likeliest,
        ignore_eos=True,
        cache_salt=params.cache_salt,
    )
    firsts: list[RequestOutput] = []

    def after(sequences: list[list[int]]) -> list[Likeliest]:
        outputs = run(sequences, step)
        firsts.extend(() if firsts else outputs)
        return [output.logprobs[0].top for output in outputs]

    carry_out(searches, after)
    return [
        _output(engine.tokenizer, search, first, params.skip_special_tokens)
        for search, first in zip(searches, firsts, strict=True)
    ]


def _begin(
    engine: Engine, prompt: list[int], params: BeamSearchParams, ends: set[int]
) -> BeamSearch:
    whole = SamplingParams(max_tokens=params.max_tokens, stop_token_ids=params.stop_token_ids)
    # Refuses what can't be served before the first step.
    request = engine.request(prompt, whole, lambda event: None)
    max_tokens = request.choices[0].seq.max_length - len(prompt)
    return BeamSearch(prompt, params, ends, max_tokens)


def _output(
    tokenizer: Tokenizer, search: BeamSearch, first: RequestOutput, skip_special_tokens: bool
) -> RequestOutput:
    """`first` is what the first step gave."""
    timings = replace(first.timings, finished=time.perf_counter())
    best, *others = (
        replace(
            first,
            text=_text(tokenizer, beam, skip_special_tokens),
            token_ids=beam.token_ids,
            finish_reason=beam.finish_reason,
            timings=timings,
            logprobs=beam.logprobs,
        )
        for beam in search.finished
    )
    best.choices = others
    return best


def _text(tokenizer: Tokenizer, beam: Beam, skip_special_tokens: bool) -> str:
    stream = tokenizer.stream((), skip_special_tokens)
    shown = beam.token_ids[:-1] if beam.finish_reason == "stop" else beam.token_ids
    return "".join(map(stream.add, shown)) + stream.finish()
