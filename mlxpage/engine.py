"""The batching loop: plan a step, compute it, hand out the tokens."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from mlxpage.batch import Batch, copies_of
from mlxpage.block_pool import BlockPool
from mlxpage.disk_tier import DiskTier
from mlxpage.elastic_pool import ElasticPool
from mlxpage.errors import (
    EngineError,
    InvalidRequest,
    MlxpageError,
    OutOfMemory,
    forget_locals,
)
from mlxpage.events import Preempted, Prefill
from mlxpage.intake import Intake
from mlxpage.metal import memory as sizing
from mlxpage.metal.backend import mx
from mlxpage.metal.choice import REFERENCE, Backend
from mlxpage.metal.layout import Shape
from mlxpage.metal.model import Model
from mlxpage.metal.plan import Plan
from mlxpage.outputs import StreamEvent
from mlxpage.pace import Pace
from mlxpage.prefix_cache import PrefixCache
from mlxpage.request import Choice, Request
from mlxpage.sampling_params import SamplingParams
from mlxpage.scheduler import Schedule, Scheduler, least_length
from mlxpage.sequence import Sequence
from mlxpage.served import Served
from mlxpage.started import Started
from mlxpage.text import Tokenizer

_STORING_SECONDS = 10.0  # before the pool goes, for what is cached in it


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
        tier: DiskTier | None = None,
        max_inter_token_ms: float | Literal["auto"] | None = None,
    ):
        """`tier` is the prefix cache's second one, which is closed with the engine."""
        self.model = model
        self.backend = backend
        self.tokenizer = tokenizer
        self.plan = plan
        self.pool = ElasticPool(model, plan, backend.ops)
        self.scheduler = Scheduler(
            self.pool.groups,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            prefix_cache=PrefixCache(self.pool.groups, tier) if prefix_cache else None,
            shares_in_step=model.shape is Shape.ROWS,
            make_larger=self._make_larger,
        )
        self._intake = Intake(
            tokenizer,
            self.scheduler,
            vocab_size=model.vocab_size,
            context_length=model.context_length,
            defaults=defaults,
        )
        self.defaults = self._intake.defaults
        self.eos_token_ids = self._intake.eos_token_ids
        self._served = Served(self.scheduler, seed)
        self._tier = tier
        self._pace: Pace | None = None
        if max_inter_token_ms is not None:
            seconds = None if max_inter_token_ms == "auto" else max_inter_token_ms / 1e3
            self._pace = Pace(seconds, max_num_batched_tokens)
            self.scheduler.chunk_beside = self._pace.chunk
        self._recorded = 0.0
        """`time.perf_counter` when the results of the last step were there."""
        self._in_flight: list[Started] = []
        """Steps whose results nobody has read yet, oldest first."""
        self._is_building = False
        """Whether there is a step whose forward isn't dispatched as a whole yet."""
        self.num_steps = 0
        self._num_computed_tokens = self._num_sampled_tokens = 0
        self._num_failed_steps = 0
        self._peak_blocks = self._peak_bytes = 0

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and what comes of it may have together: the model's context, or
        what the pool may grow to hold, if that is less. Safe from any thread."""
        context = self.model.context_length if self.model else None
        return min(context or 2**31, self.scheduler.blocks.longest_sequence())

    def request(
        self,
        prompt: list[int],
        params: SamplingParams,
        on_event: Callable[[StreamEvent], None],
        *,
        priority: int = 0,
        on_progress: Callable[[Prefill | Preempted], None] | None = None,
    ) -> Request:
        """Checks a prompt of token ids and makes it a request, to be given to `add`. Its functions
        are called on the engine's thread, while a step is built or computed: they may add, fork and
        abort requests, but not resize the pool or close the engine.

        Raises InvalidRequest if it can never be served.
        """
        request = self._intake.request(prompt, params, on_event, priority)
        request.on_progress = on_progress
        return request

    def add(self, request: Request) -> int:
        """Queues a request; its events come from `step`. Returns its id."""
        self.scheduler.add(request.choices[0].seq)
        self._served.begin(request)
        return request.id

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
        parent = self._served.find(request_id)
        if parent is None or all(choice.seq.finish_reason for choice in parent.choices):
            raise InvalidRequest(
                f"request {request_id} has ended or was never added. Give its tokens as a prompt: "
                "what is still cached of them isn't computed again."
            )
        fork = self._intake.fork(parent, params, on_event)
        self.scheduler.fork(parent.choices[0].seq, fork.choices[0].seq)
        self._served.begin(fork)
        return fork

    def abort(self, request_id: int, error: MlxpageError | None = None) -> None:
        """Ends a request, with what it has so far, and with `error` if there is a reason; does
        nothing if it has ended already."""
        if request := self._served.find(request_id):
            self._served.end(request, error)

    def abort_all(self, error: MlxpageError | None = None) -> None:
        self._served.end_all(error)

    def close(self) -> None:
        """Gives the memory of weights and pool back. What is cached goes to the disk before, if
        there is a tier there and as far as there is time."""
        if self._tier is not None:
            end = time.monotonic() + _STORING_SECONDS
            try:
                self._store_all()
            finally:
                self._tier.store.close(max(0.0, end - time.monotonic()))
                self._tier = None
        mx.synchronize()
        self._in_flight.clear()
        if self.model is not None:
            self.model.bind(None)  # compiled functions and the model hold each other
        self.model = None
        self.pool.close()
        mx.clear_cache()

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight)

    def step(self) -> None:
        """One turn of the crank: starts a step, and hands out what the one before it gave.

        The next step is planned and dispatched before the tokens of the last are read, so that a
        GPU never waits for Python. Whatever fails in a step fails its own requests only.
        """
        if self.pool.has_failed:
            self._end_what_outgrows()
        try:
            schedule = self._plan()
        except Exception as error:
            # What was planned never runs: nobody may find its blocks.
            self._collect_all()
            self._drop_pool(error)
            raise
        ahead = 0
        loaded = not schedule.loads or self._load(schedule)
        if schedule.scheduled and loaded:
            self._served.note_start(schedule)
            try:
                self._in_flight.append(self._start(schedule))
            except Exception as error:
                self._collect_all()
                self._fail([schedule], error)
            ahead = self.backend.ops.LOOK_AHEAD
        while len(self._in_flight) > ahead:
            self._collect()
        self._served.tell_preemptions()

    def _plan(self) -> Schedule:
        schedule = self.scheduler.schedule()
        self._peak_blocks = max(self._peak_blocks, self._largest_pool().num_used)
        self._peak_bytes = max(self._peak_bytes, self.pool.used_nbytes)
        if self._tier is not None and self.model.cache is not None:
            self._tier.store_evicted(self.scheduler.prefix_cache, self.model.cache, schedule)
        return schedule

    # -- compute --

    def _start(self, schedule: Schedule) -> Started:
        began = time.perf_counter()
        if self.model.cache is None:
            self.pool.make_arrays()
        last = self._in_flight[-1] if self._in_flight else None
        batch = Batch.of(
            schedule, self.plan.block_size, *((last.batch, last.tokens) if last else ())
        )
        started = Started(schedule, batch, began)
        ahead = bool(self.backend.ops.LOOK_AHEAD)
        self._is_building = True
        try:
            started.dispatch(self.model, ahead=ahead, before_waiting=self._collect_before_waiting)
        finally:
            self._is_building = False
        return started

    def _load(self, schedule: Schedule) -> bool:
        """Puts what was read from the disk into the pool, after the copies of the plan, which come
        first. If that can't be, everybody computes again, and nothing is read any more; False."""
        groups = len(self.pool.groups)
        try:
            if self.model.cache is None:
                self.pool.make_arrays()
            cache = self.model.cache
            cache.copy(copies_of(schedule, groups))
            schedule.copies.clear()
            for group in range(groups):
                loads = [load[1:] for load in schedule.loads if load[0] == group]
                if loads:
                    cache.load(group, *zip(*loads, strict=True))
            schedule.loads.clear()
        except Exception as error:
            failed_before = self._num_failed_steps
            self._collect_all()
            if self._num_failed_steps == failed_before:  # it isn't the error of a step under way
                self._tier.stop_reading(error)
            self._drop_pool(error)
            return False
        return True

    @property
    def has_disk(self) -> bool:
        """Whether there is a place to store what is cached."""
        return self._tier is not None

    def store_cached(self) -> bool:
        """Stores some of what only the pool holds, for when there's nothing else to do; True if
        there is more."""
        cache = self.model and self.model.cache
        if self._tier is None or cache is None:
            return False
        return self._tier.store_some(self.scheduler.prefix_cache, cache)

    def _store_all(self) -> None:
        self._collect_all()  # a step that has failed shows in its results
        if self.model.cache is not None:
            prefixes = self.scheduler.prefix_cache
            self._tier.store_within(_STORING_SECONDS, prefixes, self.model.cache)

    # -- results --

    def _collect_all(self) -> None:
        while self._in_flight:
            self._collect()

    def _collect_before_waiting(self) -> None:
        """When a step that is built is about to wait for the GPU: what the step before it gave
        isn't kept back meanwhile, and its error isn't taken for one of this step."""
        if self._in_flight and (error := self._collect()):
            raise error

    def _collect(self) -> Exception | None:
        """Reads the results of the oldest step in flight and hands them out; returns the error if
        it has failed, and all later ones with it."""
        started = self._in_flight.pop(0)
        try:
            self._record(started)
        except Exception as error:
            later = [started.schedule for started in self._in_flight]
            self._in_flight.clear()
            self._fail([started.schedule, *later], error)
            return error
        return None

    def _record(self, started: Started) -> None:
        batch = started.batch
        tokens = started.read_tokens()
        now = time.perf_counter()
        if self._pace:  # a step that was dispatched ahead has waited for the one before it
            self._pace.note(started.schedule, now - max(started.began, self._recorded))
        self._recorded = now
        self.num_steps += 1
        self._num_computed_tokens += started.schedule.num_scheduled_tokens
        self._num_sampled_tokens += len(tokens)
        self._fail_broken(batch.sampling, tokens)
        self._served.tell_progress(started.schedule)
        self._served.take_prompt_logprobs(batch.scoring, started.read_prompt_logprobs())
        if started.logprobs:
            self._served.take_logprobs(batch.sampling, started.read_logprobs(tokens))
        for seq, token in self.scheduler.update(started.schedule, tokens):
            self._served.take_token(seq, token, now)

    @property
    def _is_quantised(self) -> bool:
        return any(spec.k_bits or spec.v_bits for spec in self.model.kv_specs)

    def _fail_broken(self, sampling: list[Sequence], tokens: list[int]) -> None:
        """Fails the requests that got no token because their logits were not finite."""
        for seq, token in zip(sampling, tokens, strict=True):
            if token < 0 and (request := self._served.request_of(seq)):
                dtype = str(self.model.logits_dtype).removeprefix("mlx.core.")
                error = EngineError(
                    f"the model's logits are not finite after {len(seq.token_ids):,} tokens; "
                    f"computed in {dtype}. Its numbers may pass that type's range: try "
                    "dtype='bfloat16' or 'float32'"
                    + (", or leave kv_bits out." if self._is_quantised else ".")
                )
                for choice in request.choices:
                    self.scheduler.blocks.withdraw(choice.seq)
                self._served.end(request, error)

    def _fail(self, schedules: list[Schedule], error: Exception) -> None:
        """Fails the requests of steps that raised, and drops the pool, which the next step makes
        anew: its arrays may be unusable. Everyone else computes again."""
        self._num_failed_steps += 1
        failure = EngineError(f"a step failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        self._drop_pool(error)
        for part in (part for schedule in schedules for part in schedule.scheduled):
            if request := self._served.request_of(part.seq):
                self._served.end(request, failure)

    def _drop_pool(self, error: Exception) -> None:
        self._in_flight.clear()
        self.scheduler.restart()
        self.model.bind(None)
        forget_locals(error)
        mx.clear_cache()

    # -- the size of the pool --

    def _make_larger(self, group: int, num_blocks: int) -> bool:
        in_flight = bool(self._in_flight) or self._is_building
        return self.pool.grow(group, num_blocks, in_flight=in_flight)

    def trim(self, *, cached: bool = False) -> int:
        """Gives back blocks that nobody uses, but for room to begin with; `cached` ones, and that
        room, only if asked. The pool grows again when it has to. Returns the bytes given back.

        Raises EngineError while a step is built, as when a function of a request calls it.
        """
        self._check_may_resize()
        if self.plan.is_fixed:
            return 0
        pools = [group.pool for group in self.pool.groups]
        if cached:
            sizes = [max(1, pool.num_used) for pool in pools]
        else:
            sizes = [pool.num_blocks - pool.num_empty + pool.start for pool in pools]
        return self._shrink(sizes)

    def set_memory(self, memory: str | int | None) -> None:
        """Makes `memory` the budget, as when the model was loaded. If the pool is larger than that
        allows, it shrinks: cached blocks go first, then the newest sequences are preempted.

        Raises InvalidRequest for what is no size, or if a request could never end in it any more;
        OutOfMemory if it doesn't hold the weights and a usable pool; EngineError as `trim` does.
        Then nothing has changed.
        """
        self._check_may_resize()
        if self.plan.is_fixed:
            raise InvalidRequest(
                f"the pool has {max(self.plan.num_blocks):,} blocks because num_blocks says so; "
                "leave num_blocks out for a pool that memory can change"
            )
        plan = sizing.plan(
            self.model,
            memory=memory,
            block_size=self.plan.block_size,
            max_num_seqs=self.scheduler.max_num_seqs,
            max_num_batched_tokens=self.scheduler.max_num_batched_tokens,
        )
        self._set_limits(plan.num_blocks)
        self.plan = plan
        self.pool.follow(plan)
        self._shrink(plan.num_blocks)

    def _set_limits(self, limits: list[int]) -> None:
        for seq in self.scheduler.set_limits(limits):
            self._served.take_end(seq)

    def _check_may_resize(self) -> None:
        if self.model is None:
            raise EngineError("the engine is closed")
        if self._is_building:
            raise EngineError(
                "the pool can't be resized by a function of a request: call trim or set_memory "
                "between two steps"
            )

    def _shrink(self, sizes: list[int]) -> int:
        """Makes the pools so small, where they are larger; returns the bytes given back."""
        before, had = self.pool.nbytes, self.pool.num_blocks
        sizes = [min(pair) for pair in zip(sizes, had, strict=True)]
        if sizes == had:
            return 0
        moves = self.scheduler.shrink(sizes)
        try:
            self.pool.shrink(moves)
        except Exception as error:  # nobody's fault: all that was running is computed again
            self._drop_pool(error)
        return before - self.pool.nbytes

    def _end_what_outgrows(self) -> None:
        """Fails what was added when the pool could still grow, and will never fit."""
        self.pool.has_failed = False
        limits = self.scheduler.blocks.limits
        for seq in self.scheduler.outgrowing(limits):
            if request := self._served.request_of(seq):
                longest = self.scheduler.blocks.longest_sequence()
                error = OutOfMemory(
                    f"the request may need {least_length(seq):,} tokens; the pool could not grow, "
                    f"and holds a sequence of at most {longest:,}. Free memory on this machine and "
                    "call set_memory, or ask for less."
                )
                self._served.end(request, error)
        self._set_limits(limits)

    # -- facts --

    @property
    def choices(self) -> list[Choice]:
        """The generations that haven't ended."""
        return self._served.choices()

    def stats(self) -> dict[str, Any]:
        """Counters and the state of the pool. Block counts are those of the largest group: `total`
        now, `limit` at most; cached ones are free too, but still hold a prefix. Prompt tokens that
        were found in the pool are hits, of all that were looked for when a request was first
        admitted. Prompt and output tokens count when a generation has ended; `computed_tokens` are
        the positions of all steps, `sampled_tokens` what came of them. On another thread, counts
        may differ from each other by what a step is doing."""
        model = self.model
        if model is None:
            raise EngineError("the engine is closed")
        pool = self._largest_pool()
        return {
            "steps": self.num_steps,
            "prompt_tokens": self._served.num_prompt_tokens,
            "output_tokens": self._served.num_output_tokens,
            "computed_tokens": self._num_computed_tokens,
            "sampled_tokens": self._num_sampled_tokens,
            "failed_steps": self._num_failed_steps,
            "preemptions": self.scheduler.num_preemptions,
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "blocks": {
                "total": pool.num_blocks,
                "limit": pool.limit,
                "used": pool.num_used,
                "cached": pool.num_free_cached,
                "free": pool.num_free - pool.num_free_cached,
                "peak_used": self._peak_blocks,
            },
            "block_size": self.plan.block_size,
            "resizes": {"grown": self.pool.num_grown, "shrunk": self.pool.num_shrunk},
            "prefix_cache": self._prefix_stats(),
            "backend": {
                "name": self.backend.name,
                "why": self.backend.why,
                "not_compiled": model.not_compiled,
                "shape": model.shape.name.lower(),
                "why_not_rows": model.why_not_rows,
            },
            "bytes": {
                "budget": self.plan.budget,
                "weights": self.plan.weights,
                "scratch": self.plan.scratch,
                "pool": self.pool.nbytes,
                "pool_peak_used": self._peak_bytes,
                "active": mx.get_active_memory(),
                "peak": mx.get_peak_memory(),
            },
        }

    def _prefix_stats(self) -> dict[str, Any] | None:
        cache, tier = self.scheduler.prefix_cache, self._tier
        if cache is None:
            return None
        return {
            "queried_tokens": cache.num_queried_tokens,
            "hit_tokens": cache.num_hit_tokens,
            "evictions": cache.num_evictions,
            "restored_tokens": cache.num_restored_tokens,
            "disk": tier and tier.store.stats(),
        }

    def _largest_pool(self) -> BlockPool:
        return max((group.pool for group in self.scheduler.groups), key=lambda p: p.limit)
