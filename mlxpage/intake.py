"""What callers ask for, checked and made requests with sequences of their own."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mlxpage.errors import InvalidRequest
from mlxpage.outputs import StreamEvent, Timings
from mlxpage.request import Choice, Request
from mlxpage.sampling_params import SamplingParams
from mlxpage.scheduler import Scheduler
from mlxpage.sequence import Sequence
from mlxpage.text import Tokenizer


class Intake:
    """Makes requests for a model of `vocab_size` and `context_length`, and for the pool of a
    scheduler. `request` may be called from any thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        *,
        vocab_size: int,
        context_length: int | None,
        defaults: dict[str, Any] | None,
    ):
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._vocab_size = vocab_size
        self._context_length = context_length or 2**31
        self.defaults = dict(defaults or {})
        if "top_k" in self.defaults:  # some models' files ask for more than they have
            self.defaults["top_k"] = min(self.defaults["top_k"], vocab_size)
        # A tokenizer may end texts by a token that its model doesn't have.
        self.eos_token_ids = frozenset(i for i in tokenizer.eos_token_ids if self._is_token(i))
        self._ids = itertools.count()

    def request(
        self,
        prompt: list[int],
        params: SamplingParams,
        on_event: Callable[[StreamEvent], None],
        priority: int,
    ) -> Request:
        """Raises InvalidRequest if it can never be served."""
        params = params.with_defaults(self.defaults)
        self._check_tokens(prompt, params)
        choices = []
        for index, of_choice in enumerate(_params_of_choices(params)):
            options = self._options(len(prompt), of_choice, priority)
            seq = Sequence(next(self._ids), prompt, of_choice, **options)
            choices.append(self._choice(index, seq))
        first, *others = (choice.seq for choice in choices)
        first.forks = others
        self._scheduler.limit_length(first)
        return Request(params, choices, on_event)

    def fork(
        self,
        parent: Request,
        params: SamplingParams | None,
        on_event: Callable[[StreamEvent], None],
    ) -> Request:
        """A request that has what `parent` has so far. Raises InvalidRequest if that is no token
        yet or several choices, or if it can't go on by these params."""
        if parent.choices[0].seq.num_output_tokens == 0:
            raise InvalidRequest(
                f"the prompt of request {parent.id} is still being computed; fork it after its "
                "first token, or ask for n generations"
            )
        params = self._params_of_fork(parent, params)
        (choice,) = parent.choices
        tokens = choice.seq.token_ids
        self._check_tokens(tokens, params)
        options = self._options(choice.seq.num_prompt_tokens, params, choice.seq.priority)
        if len(tokens) >= options["max_length"]:
            raise InvalidRequest(
                f"max_tokens is {params.max_tokens} and the request has "
                f"{choice.seq.num_output_tokens} tokens already: nothing is left to generate"
            )
        seq = choice.seq.fork(next(self._ids), params, **options)
        fork = Request(params, [self._choice(0, seq)], on_event)
        fork.choices[0].take_over(choice)
        return fork

    def _params_of_fork(self, parent: Request, params: SamplingParams | None) -> SamplingParams:
        if params is None:
            params = replace(parent.params, seed=None)
        params = params.with_defaults(self.defaults)
        if len(parent.choices) > 1 or max(params.n, params.best_of or 1) > 1:
            raise InvalidRequest("only a request with n=1 can be forked, into one with n=1")
        if params.logprobs is not None and parent.params.logprobs is None:
            raise InvalidRequest("a fork has logprobs only if the request has them from the start")
        # The blocks are the same, and so are the log-probabilities of the prompt.
        return replace(params, cache_salt=parent.params.cache_salt, prompt_logprobs=None)

    def _options(self, prompt: int, params: SamplingParams, priority: int) -> dict[str, Any]:
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        return {
            "max_length": self._max_length(prompt, params.max_tokens),
            "stop_token_ids": eos | frozenset(params.stop_token_ids),
            "priority": priority,
        }

    def _max_length(self, prompt: int, max_tokens: int | None) -> int:
        """Prompt and output together: as asked, but no longer than the model's context. The
        scheduler lets what nobody has limited end where the pool does."""
        context = self._context_length
        if prompt >= context:
            raise InvalidRequest(
                f"the prompt has {prompt:,} tokens; the model's context of {context:,} must hold "
                f"it and at least one more. Shorten the prompt."
            )
        return context if max_tokens is None else min(prompt + max_tokens, context)

    def _choice(self, index: int, seq: Sequence) -> Choice:
        params = seq.params
        text_stream = self._tokenizer.stream(params.stop, params.skip_special_tokens)
        return Choice(index, seq, text_stream, Timings(arrived=time.perf_counter()))

    def _check_tokens(self, prompt: list[int], params: SamplingParams) -> None:
        if not prompt:
            raise InvalidRequest("the prompt is empty; give it at least one token")
        vocab = self._vocab_size
        for name, ids in (
            ("the prompt", prompt),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias or ()),
        ):
            for token in ids:
                if not self._is_token(token):
                    raise InvalidRequest(
                        f"{name} holds {token!r}; token ids of this model go from 0 to {vocab - 1}"
                    )
        if params.top_k and params.top_k > vocab:
            raise InvalidRequest(f"top_k is {params.top_k}; the vocabulary has {vocab} tokens")

    def _is_token(self, token: Any) -> bool:
        return isinstance(token, int) and 0 <= token < self._vocab_size


def _params_of_choices(params: SamplingParams) -> list[SamplingParams]:
    """The first one computes the prompt, so its log-probabilities are with it. To choose the best
    takes those of all tokens."""
    first = params
    count = params.best_of or params.n
    if count > params.n and params.logprobs is None:
        first = replace(params, logprobs=0)
    return [first, *[replace(first, prompt_logprobs=None)] * (count - 1)]
