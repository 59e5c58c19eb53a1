"""The batching loop: plan a step, compute it, hand out the tokens."""

from __future__ import annotations

import itertools
import random
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mlxpage.batch import Batch
from mlxpage.block_pool import BlockPool
from mlxpage.cache_group import CacheGroup
from mlxpage.errors import EngineError, InvalidRequest, MlxpageError
from mlxpage.metal.backend import mx
from mlxpage.metal.choice import REFERENCE, Backend
from mlxpage.metal.kv_cache import KVCache
from mlxpage.metal.memory import Plan
from mlxpage.metal.model import Model
from mlxpage.metal.sampler import logprobs, sample
from mlxpage.outputs import FinishReason, StreamEvent, Timings, TokenLogprobs
from mlxpage.prefix_cache import PrefixCache
from mlxpage.request import Choice, Request
from mlxpage.sampling_params import SamplingParams
from mlxpage.scheduler import Schedule, Scheduler
from mlxpage.sequence import Sequence
from mlxpage.text import Tokenizer


@dataclass(slots=True)
class Started:
    """A step that is being computed: its plan, and its results as arrays."""

    schedule: Schedule
    batch: Batch
    tokens: mx.array | None  # (S,) one for each of `Batch.sampling`
    logprobs: tuple  # of those tokens, as `sampler.logprobs` gives them, if anyone asked
    prompt_logprobs: tuple  # likewise, of `Batch.scoring`


class Engine:
    """Serves generations over a block pool. It belongs to the thread that made it: MLX's streams
    do. `request` alone may be called from any thread."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        plan: Plan,
        *,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        defaults: dict[str, Any] | None = None,
        seed: int | None = None,
        backend: Backend = REFERENCE,
        prefix_cache: bool = True,
    ):
        self.model = model
        self.backend = backend
        self.tokenizer = tokenizer
        self.plan = plan
        self._vocab_size = model.vocab_size
        self.defaults = dict(defaults or {})
        if "top_k" in self.defaults:  # some models' files ask for more than they have
            self.defaults["top_k"] = min(self.defaults["top_k"], self._vocab_size)
        self._context_length = model.context_length or 2**31
        # A tokenizer may end texts by a token that its model doesn't have.
        self.eos_token_ids = frozenset(i for i in tokenizer.eos_token_ids if self._is_token(i))
        self._new_pool()
        groups = [
            CacheGroup(blocks, plan.block_size, window)
            for blocks, window in zip(plan.num_blocks, model.cache.windows, strict=True)
        ]
        self.scheduler = Scheduler(
            groups,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            prefix_cache=PrefixCache(groups) if prefix_cache else None,
        )
        self._requests: dict[int, Request] = {}
        self._choices: dict[int, tuple[Request, Choice]] = {}
        """By the ids of their sequences, until they end."""
        self._in_flight: list[Started] = []
        """Steps whose results nobody has read yet, oldest first."""
        self._ids = itertools.count()
        self._seeds = random.Random(seed)
        self._counts = {"steps": 0, "prompt_tokens": 0, "output_tokens": 0, "failed_steps": 0}
        self._peak_blocks = 0

    def request(
        self,
        prompt: list[int],
        params: SamplingParams,
        on_event: Callable[[StreamEvent], None],
        *,
        priority: int = 0,
    ) -> Request:
        """Checks a prompt of token ids and makes it a request, to be given to `add`.

        Raises InvalidRequest if it can never be served.
        """
        params = params.with_defaults(self.defaults)
        self._check_tokens(prompt, params)
        choices = []
        for index, of_choice in enumerate(_params_of_choices(params)):
            options = self._options(len(prompt), of_choice, priority)
            seq = Sequence(next(self._ids), prompt, of_choice, **options)
            choices.append(self._choice(index, seq))
        first, *others = (choice.seq for choice in choices)
        first.forks = others
        self.scheduler.check_capacity(first)
        return Request(params, choices, on_event)

    def _options(self, prompt: int, params: SamplingParams, priority: int) -> dict[str, Any]:
        eos = frozenset() if params.ignore_eos else self.eos_token_ids
        return {
            "max_length": self._max_length(prompt, params.max_tokens),
            "stop_token_ids": eos | frozenset(params.stop_token_ids),
            "priority": priority,
        }

    def _choice(self, index: int, seq: Sequence) -> Choice:
        params = seq.params
        text_stream = self.tokenizer.stream(params.stop, params.skip_special_tokens)
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

    def _max_length(self, prompt: int, max_tokens: int | None) -> int:
        """Prompt and output together: as asked, but no longer than the model's context; if nothing
        was asked, no longer than the pool either."""
        context = self._context_length
        if prompt >= context:
            raise InvalidRequest(
                f"the prompt has {prompt:,} tokens; the model's context of {context:,} must hold "
                f"it and at least one more. Shorten the prompt."
            )
        if max_tokens is not None:
            return min(prompt + max_tokens, context)
        return max(prompt + 1, min(context, self.scheduler.max_tokens_of_a_sequence()))

    def add(self, request: Request) -> int:
        """Queues a request; its events come from `step`. Returns its id."""
        self._begin(request, lambda: self.scheduler.add(request.choices[0].seq))
        return request.id

    def _begin(self, request: Request, start: Callable[[], None]) -> None:
        seed = request.params.seed
        seed = self._seeds.getrandbits(64) if seed is None else seed
        for choice in request.choices:
            # A choice is what its seed gives alone.
            of_choice = (seed + choice.index) % 2**64
            choice.seq.params = replace(choice.seq.params, seed=of_choice)
        start()
        self._requests[request.id] = request
        for choice in request.choices:
            self._choices[choice.seq.id] = request, choice

    def fork(
        self,
        request_id: int,
        params: SamplingParams | None,
        on_event: Callable[[StreamEvent], None],
    ) -> Request:
        """Branches a request that is being served: another one with the same prompt and the same
        tokens so far, in the same blocks, that goes on with params and a seed of its own.

        Without `params` they are those of the first, but for the seed. `max_tokens` counts from the
        prompt on. Only what is new comes as events; the output has everything.
        Raises InvalidRequest if the request has no token yet or has ended, has several choices, or
        can't go on so.
        """
        parent = self._requests.get(request_id)
        if parent is None or all(choice.seq.finish_reason for choice in parent.choices):
            raise InvalidRequest(
                f"request {request_id} has ended or was never added. Give its tokens as a prompt: "
                "what is still cached of them isn't computed again."
            )
        if parent.choices[0].seq.num_output_tokens == 0:
            raise InvalidRequest(
                f"the prompt of request {request_id} is still being computed; fork it after its "
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
        self._begin(fork, lambda: self.scheduler.fork(choice.seq, seq))
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

    def abort(self, request_id: int) -> None:
        """Ends a request, with what it has so far; does nothing if it has ended already."""
        if request := self._requests.get(request_id):
            self._end(request)

    def abort_all(self, error: MlxpageError | None = None) -> None:
        for request in list(self._requests.values()):
            self._end(request, error)

    def close(self) -> None:
        """Gives the memory of weights and pool back."""
        mx.synchronize()
        self._in_flight.clear()
        if self.model is not None:
            self.model.bind(None)  # compiled functions and the model hold each other
        self.model = None
        mx.clear_cache()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    def step(self) -> None:
        """One turn of the crank: starts a step, and hands out what the one before it gave.

        The next step is planned and dispatched before the tokens of the last are read, so that a
        GPU never waits for Python. Whatever fails in a step fails its own requests only.
        """
        schedule = self.scheduler.schedule()
        self._peak_blocks = max(self._peak_blocks, self._largest_pool().num_used)
        ahead = 0
        if schedule:
            self._note_start(schedule)
            try:
                self._in_flight.append(self._start(schedule))
            except Exception as error:
                self._collect_all()
                self._fail([schedule], error)
            ahead = self.backend.ops.LOOK_AHEAD
        while len(self._in_flight) > ahead:
            self._collect()

    # -- compute --

    def _start(self, schedule: Schedule) -> Started:
        if self.model.cache is None:
            self._new_pool()
        last = self._in_flight[-1] if self._in_flight else None
        batch = Batch.of(
            schedule, self.plan.block_size, *((last.batch, last.tokens) if last else ())
        )
        logits = self.model(batch.rows)
        num_sampled = len(batch.sampling)
        tokens = None
        chosen = scored = ()
        if num_sampled:
            tokens = sample(logits[:num_sampled], batch.choices)
            if (top := _most_logprobs(seq.params.logprobs for seq in batch.sampling)) is not None:
                chosen = logprobs(logits[:num_sampled], tokens, top)
        if batch.scoring:
            targets = mx.array(batch.scored_tokens)
            top = _most_logprobs(seq.params.prompt_logprobs for seq, _ in batch.scoring)
            scored = logprobs(logits[num_sampled:], targets, top)
        # The pools too: a write that nobody reads must happen all the same.
        results = [array for array in (tokens, *chosen, *scored) if array is not None]
        results += self.model.cache.written()
        (mx.async_eval if self.backend.ops.LOOK_AHEAD else mx.eval)(*results)
        return Started(schedule, batch, tokens, chosen, scored)

    def _new_pool(self) -> None:
        self.model.bind(
            KVCache(
                self.model.specs,
                self.plan.num_blocks,
                self.plan.block_size,
                self.backend.ops,
                fetches=self.model.fetches,
            )
        )

    def _note_start(self, schedule: Schedule) -> None:
        now = time.perf_counter()
        for part in schedule.scheduled:
            _, choice = self._choices[part.seq.id]
            timings = choice.timings
            timings.scheduled = timings.scheduled or now

    # -- results --

    def _collect_all(self) -> None:
        while self._in_flight:
            self._collect()

    def _collect(self) -> None:
        """Reads the results of the oldest step in flight and hands them out."""
        started = self._in_flight.pop(0)
        try:
            self._record(started)
        except Exception as error:
            later = [started.schedule for started in self._in_flight]
            self._in_flight.clear()
            self._fail([started.schedule, *later], error)

    def _record(self, started: Started) -> None:
        batch = started.batch
        tokens = [] if started.tokens is None else started.tokens.tolist()
        now = time.perf_counter()
        self._counts["steps"] += 1
        self._fail_broken(batch.sampling, tokens)
        scored = _as_logprobs(batch.scored_tokens, started.prompt_logprobs)
        for (seq, position), entry in zip(batch.scoring, scored, strict=True):
            request, _ = self._choices.get(seq.id, (None, None))
            # A preempted prompt is computed again.
            if request and position == len(request.prompt_logprobs):
                request.prompt_logprobs.append(_first(entry, seq.params.prompt_logprobs))
        if started.logprobs:
            chosen = _as_logprobs(tokens, started.logprobs)
            for seq, entry in zip(batch.sampling, chosen, strict=True):
                _, choice = self._choices.get(seq.id, (None, None))
                if choice and seq.params.logprobs is not None:
                    choice.logprobs.append(_first(entry, seq.params.logprobs))
        for seq, token in self.scheduler.update(started.schedule, tokens):
            # What hears of one request may abort another.
            if seq.id in self._choices:
                self._hand_out(*self._choices[seq.id], token, now)

    def _fail_broken(self, sampling: list[Sequence], tokens: list[int]) -> None:
        """Fails the requests that got no token because their logits were not finite."""
        for seq, token in zip(sampling, tokens, strict=True):
            if token < 0 and seq.id in self._choices:
                dtype = str(self.model.logits_dtype).removeprefix("mlx.core.")
                error = EngineError(
                    f"the model's logits are not finite after {len(seq.token_ids):,} tokens; "
                    f"computed in {dtype}. Its numbers may pass that type's range: try "
                    "dtype='bfloat16' or 'float32'."
                )
                request, _ = self._choices[seq.id]
                for choice in request.choices:
                    self.scheduler.withdraw(choice.seq)
                self._end(request, error)

    def _hand_out(self, request: Request, choice: Choice, token: int, now: float) -> None:
        seq = choice.seq
        choice.timings.first_token = choice.timings.first_token or now
        ended_by_token = seq.finish_reason == "stop"
        text = "" if ended_by_token else choice.text_stream.add(token)
        if seq.finish_reason or choice.text_stream.stopped:
            self._finish(request, choice, seq.finish_reason or "stop", text, [token])
        else:
            choice.text += text
            request.on_event(StreamEvent(text, [token], choice=choice.index))

    def _end(self, request: Request, error: MlxpageError | None = None) -> None:
        for choice in request.choices:
            if choice.seq.id in self._choices:
                self._finish(request, choice, "abort", error=error)

    def _finish(
        self,
        request: Request,
        choice: Choice,
        reason: FinishReason,
        text: str = "",
        token_ids: list[int] | None = None,
        error: MlxpageError | None = None,
    ) -> None:
        seq = choice.seq
        if error is None:
            text += choice.text_stream.finish()
        self.scheduler.finish(seq, reason)
        del self._choices[seq.id]
        if choice.text_stream.stopped:
            seq.finish_reason = "stop"
        choice.text += text
        choice.timings.finished = time.perf_counter()
        if seq.finish_reason != "abort":
            if choice.index == 0 and not choice.num_taken_over:
                self._counts["prompt_tokens"] += seq.num_prompt_tokens
            self._counts["output_tokens"] += seq.num_output_tokens - choice.num_taken_over
        request.num_unfinished -= 1
        output = None
        if request.num_unfinished == 0:
            del self._requests[request.id]
            output = request.output()
        ids, reason = token_ids or [], seq.finish_reason
        request.on_event(StreamEvent(text, ids, reason, output, error, choice.index))

    def _fail(self, schedules: list[Schedule], error: Exception) -> None:
        """Fails the requests of steps that raised, and drops the pool, which the next step makes
        anew: its arrays may be unusable. Everyone else computes again."""
        self._counts["failed_steps"] += 1
        failure = EngineError(f"a step failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        self.scheduler.restart()
        self.model.bind(None)
        forget_locals(error)
        mx.clear_cache()
        for part in (part for schedule in schedules for part in schedule.scheduled):
            if part.seq.id in self._choices:
                self._end(self._choices[part.seq.id][0], failure)

    # -- facts --

    def stats(self) -> dict[str, Any]:
        """Counters and the state of the pool. Block counts are those of the largest group: cached
        ones are free too, but still hold a prefix. Prompt tokens that were found in the pool are
        hits, of all that were looked for when a request was first admitted."""
        pool = self._largest_pool()
        return {
            **self._counts,
            "preemptions": self.scheduler.num_preemptions,
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "blocks": {
                "total": pool.num_blocks,
                "used": pool.num_used,
                "cached": pool.num_free_cached,
                "free": pool.num_free - pool.num_free_cached,
                "peak_used": self._peak_blocks,
            },
            "block_size": self.plan.block_size,
            "prefix_cache": self._prefix_stats(),
            "backend": {
                "name": self.backend.name,
                "why": self.backend.why,
                "not_compiled": self.model.not_compiled,
            },
            "bytes": {
                "budget": self.plan.budget,
                "weights": self.plan.weights,
                "scratch": self.plan.scratch,
                "pool": self.plan.pool,
                "active": mx.get_active_memory(),
                "peak": mx.get_peak_memory(),
            },
        }

    def _prefix_stats(self) -> dict[str, int] | None:
        cache = self.scheduler.prefix_cache
        if cache is None:
            return None
        return {
            "queried_tokens": cache.num_queried_tokens,
            "hit_tokens": cache.num_hit_tokens,
            "evictions": cache.num_evictions,
        }

    def _largest_pool(self) -> BlockPool:
        return max((group.pool for group in self.scheduler.groups), key=lambda p: p.num_blocks)


def _params_of_choices(params: SamplingParams) -> list[SamplingParams]:
    """The first one computes the prompt, so its log-probabilities are with it. To choose the best
    takes those of all tokens."""
    first = params
    count = params.best_of or params.n
    if count > params.n and params.logprobs is None:
        first = replace(params, logprobs=0)
    return [first, *[replace(first, prompt_logprobs=None)] * (count - 1)]


def forget_locals(error: BaseException | None) -> None:
    """Empties the frames that an error came through: who keeps the error must not keep arrays."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _most_logprobs(wanted) -> int | None:
    return max((count for count in wanted if count is not None), default=None)


def _as_logprobs(tokens: list[int], arrays: tuple) -> list[TokenLogprobs]:
    if not arrays:
        return []
    chosen, ids, values = (array.tolist() for array in arrays)
    return [
        TokenLogprobs(token, logprob, tuple(zip(top, of_top, strict=True)))
        for token, logprob, top, of_top in zip(tokens, chosen, ids, values, strict=True)
    ]


def _first(entry: TokenLogprobs, count: int) -> TokenLogprobs:
    """The batch computed as many as its most curious request wants."""
    return replace(entry, top=entry.top[:count])
