"""Which sequences compute which tokens in the next step, and where their K and V go."""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from mlxpage.block_manager import BlockManager, Copy, Load
from mlxpage.cache_group import CacheGroup
from mlxpage.errors import InvalidRequest
from mlxpage.outputs import FinishReason
from mlxpage.prefix_cache import PrefixCache
from mlxpage.sequence import Sequence, Status

# Rows of a step whose prompt log-probabilities are wanted: their logits, vocabulary-sized, exist at
# once. Every running sequence gets a row beyond that, so that nobody stands still.
MAX_SCORED_TOKENS = 64


@dataclass(slots=True)
class Scheduled:
    """One sequence's part of a step: the positions `start` to `start + num_tokens`."""

    seq: Sequence
    start: int
    num_tokens: int
    samples: bool
    """The last row is the sequence's newest token, so the step samples the one after it."""

    @property
    def num_output_tokens(self) -> int:
        """Before the one that this part samples, read or not."""
        return self.start + self.num_tokens - self.seq.num_prompt_tokens


@dataclass(slots=True)
class Schedule:
    """The plan of one step."""

    scheduled: list[Scheduled] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)
    num_scheduled_tokens: int = 0
    num_scored_tokens: int = 0
    """Of them, those whose prompt log-probabilities are wanted."""
    copies: list[Copy] = field(default_factory=list)
    """To be made in this order, before anything is written."""
    loads: list[Load] = field(default_factory=list)
    """To be made after the copies and before the rows of this step are written."""
    num_restored_tokens: int = 0
    """Positions that are found or read instead of computed, by who was admitted to do so."""

    def __bool__(self) -> bool:
        return bool(self.scheduled or self.num_restored_tokens)


class Scheduler:
    """Continuous batching over a pool of blocks.

    There is no prefill phase and no decode phase. A sequence has `num_computed_tokens`, and every
    step lets it catch up with its `num_tokens`; a chunk of a prompt, the one token of a decode,
    and everything again after a preemption are the same case.

    Planning moves the state on as if the step had run already, so that a step may be planned
    while the one before it is still computing; `update` brings the tokens later.
    """

    def __init__(
        self,
        groups: list[CacheGroup],
        *,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        prefix_cache: PrefixCache | None = None,
        shares_in_step: bool = True,
        make_larger: Callable[[int, int], bool] = lambda group, num_blocks: True,
    ):
        """`shares_in_step`: whether a step writes the rows of all chunks before it reads any, so
        that its sequences may share them. `make_larger`: see `BlockManager`; it is called while a
        step is being planned."""
        if not 0 < max_num_seqs <= max_num_batched_tokens:
            raise InvalidRequest(
                f"max_num_seqs is {max_num_seqs}; it must be from 1 to max_num_batched_tokens "
                f"({max_num_batched_tokens}): every running sequence needs a token a step."
            )
        self.groups = groups
        self.prefix_cache = prefix_cache
        self.blocks = BlockManager(groups, max_num_batched_tokens, prefix_cache, make_larger)
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.chunk_beside: Callable[[int], int] | None = None
        """Tokens that a step computes at most beside the next ones of so many running sequences,
        which wait for it: 0 holds prompts up, or else each that runs gets one at least. None: as
        many as there are left."""
        self._shares_in_step = shares_in_step
        self.waiting: list[Sequence] = []
        """A heap, in the order of service."""
        self.running: list[Sequence] = []
        """Sorted in the order of service: the last one is preempted first."""
        self.num_preemptions = 0
        self._num_ended = 0
        """Times that a sequence has given its blocks up."""
        self._refused: tuple = ()
        """Of the sequence that didn't fit last: its id, `_num_ended`, and the key of the first full
        block that wasn't found, if there is one."""

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def add(self, seq: Sequence) -> None:
        """Queues a sequence. Raises `InvalidRequest` if the pools can never hold it."""
        self.limit_length(seq)
        for each in (seq, *seq.forks):
            each.block_tables = [[] for _ in self.groups]
        heapq.heappush(self.waiting, seq)

    def limit_length(self, seq: Sequence) -> None:
        """Lets `seq` and its forks end where the pools do, if they have no `max_tokens`. Raises
        `InvalidRequest` if the pools can never hold `seq`. Safe from any thread before it's added.
        """
        limits = self.blocks.limits  # once: another thread may change them
        longest = self.blocks.longest_sequence(limits)
        for each in (seq, *seq.forks):
            _shorten(each, longest)
        if overrun := self.blocks.overrun(seq.max_length, limits):
            need, limit = overrun
            raise InvalidRequest(
                f"the prompt's {seq.num_prompt_tokens:,} tokens and up to "
                f"{seq.max_length - seq.num_prompt_tokens:,} new ones need {need:,} blocks of "
                f"{self.groups[0].block_size} tokens; the pool holds {limit:,} (a "
                f"sequence of at most {longest:,} tokens). Shorten the prompt, lower "
                f"max_tokens, or give the pool more (memory or num_blocks)."
            )

    def schedule(self) -> Schedule:
        """Plans a step. An empty schedule: nothing to compute before the next `update`, or those
        who waited for this step have been preempted."""
        schedule = Schedule()
        budget = self._budget()
        self._continue_running(schedule, budget)
        if not schedule.preempted:
            self._admit_waiting(schedule, budget)
        for part in schedule.scheduled:
            if part.samples and part.seq.forks:
                self._branch_off(part.seq, schedule)
        return schedule

    def _budget(self) -> int:
        """Tokens of the next step: at least one for each that runs, or without a chunk one for each
        that waits for it, and no others."""
        if self.chunk_beside is None:
            return self.max_num_batched_tokens
        next_ones = sum(
            seq.num_uncomputed_tokens == 1 and seq.num_tokens < seq.max_length
            for seq in self.running
        )
        if not next_ones:
            return self.max_num_batched_tokens
        chunk = self.chunk_beside(next_ones)
        if not chunk:
            return next_ones
        return min(max(next_ones + chunk, len(self.running)), self.max_num_batched_tokens)

    def _continue_running(self, schedule: Schedule, budget: int) -> None:
        if self.prefix_cache is not None:
            size = self.groups[0].block_size
            for seq in self.running:
                if seq.num_computed_tokens >= (seq.num_committed_blocks + 1) * size:
                    self.blocks.commit(seq)
        if self.blocks.has_windows:
            # The steps that still read it have been planned.
            for seq in self.running:
                self.blocks.give_back(seq)
        running = self.running
        holds_up = budget < len(running)
        index = 0
        while index < len(running):
            seq = running[index]
            index += 1
            if holds_up and seq.num_uncomputed_tokens > 1:
                continue
            if not self._restore(seq, schedule):
                continue
            # One token is kept back for each of those that follow: nobody stands still.
            granted = self._grant(seq, max(1, budget - (len(running) - index)), schedule)
            if granted and self._make_room(seq, granted, schedule):
                budget -= granted
                self._plan(schedule, seq, granted)

    def _admit_waiting(self, schedule: Schedule, budget: int) -> None:
        running = self.running
        while self.waiting and len(running) < self.max_num_seqs:
            seq = self.waiting[0]
            left = budget - schedule.num_scheduled_tokens
            # A preempted sequence may still wait for its last token: it can't be fed before.
            if not left or seq.num_pending or self._still_has_no_room(seq):
                break
            self.blocks.share_cached(seq)
            if not self._grant(seq, left, schedule) or not self._fits(seq):
                found = seq.num_committed_blocks
                self.blocks.release(seq)
                self._refused = (seq.id, self._num_ended, *seq.block_keys[found : found + 1])
                break
            heapq.heappop(self.waiting)
            seq.status = Status.RUNNING
            insort(running, seq)
            schedule.copies += self.blocks.copy_tail(seq)
            self.blocks.count_cached(seq)
            if not self._restore(seq, schedule):
                continue
            granted = self._grant(seq, left, schedule)
            schedule.copies += self.blocks.allocate(seq, granted)
            self._plan(schedule, seq, granted)

    def _grant(self, seq: Sequence, budget: int, schedule: Schedule) -> int:
        """How many tokens `seq` computes in this step, 0 if its newest one is still unknown and
        will be its last."""
        if seq.num_tokens >= seq.max_length:
            return 0
        granted = min(seq.num_uncomputed_tokens, budget)
        if seq.is_scored:
            granted = min(granted, max(1, MAX_SCORED_TOKENS - schedule.num_scored_tokens))
        start = seq.num_computed_tokens
        return self.blocks.end_of_chunk(start, start + granted, seq.num_tokens) - start

    def _plan(self, schedule: Schedule, seq: Sequence, granted: int) -> None:
        if seq.is_scored:
            schedule.num_scored_tokens += granted
        start = seq.num_computed_tokens
        seq.num_computed_tokens = end = start + granted
        samples = end == seq.num_tokens
        if samples:
            seq.num_tokens += 1
            seq.num_pending += 1
        schedule.scheduled.append(Scheduled(seq, start, granted, samples))
        schedule.num_scheduled_tokens += granted
        # A single row is written by its own attention: others may read it in the next step.
        if granted > 1 and self._shares_in_step:
            self.blocks.commit(seq)

    # -- forks --

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Adds `child`, whose tokens `parent` has or had, on the blocks of `parent` where it can.
        Raises as `add` does."""
        self.limit_length(child)
        self._start_fork(parent, child)

    def _start_fork(self, parent: Sequence, child: Sequence) -> None:
        child.block_tables = [[] for _ in self.groups]
        if not self._branch(parent, child):
            heapq.heappush(self.waiting, child)

    def _branch_off(self, seq: Sequence, schedule: Schedule) -> None:
        forks, seq.forks = seq.forks, []
        for child in forks:
            if child.status is Status.FINISHED:
                continue
            if schedule.preempted:
                heapq.heappush(self.waiting, child)
            else:
                self._start_fork(seq, child)

    def _branch(self, parent: Sequence, child: Sequence) -> bool:
        """Lets `child` run on the blocks of `parent`, if it's its turn and there is a seat and
        room; otherwise it has to wait, and will find what is cached then."""
        is_next = not self.waiting or child < self.waiting[0]
        has_seat = len(self.running) < self.max_num_seqs
        if not (is_next and has_seat and parent.status is Status.RUNNING):
            return False
        if not self.blocks.branch(parent, child):
            return False
        if not self._fits(child):
            self.blocks.release(child)
            return False
        child.num_cached_tokens = min(child.num_computed_tokens, child.num_prompt_tokens)
        child.status = Status.RUNNING
        insort(self.running, child)
        return True

    # -- blocks --

    def _restore(self, seq: Sequence, schedule: Schedule) -> bool:
        """Reads what is stored of the next tokens of `seq`, at most as many as a step computes, in
        blocks of its own. False if it can't compute anything in this step: there is more to read,
        or it had to give its blocks up."""
        left = seq.num_stored_tokens - seq.num_computed_tokens
        if left <= 0:
            return True
        size = self.groups[0].block_size
        count = min(left, self.max_num_batched_tokens - schedule.num_restored_tokens) // size
        if count == 0 or not self._make_room(seq, count * size, schedule):
            return False
        restored, loads = self.blocks.restore(seq, count * size)
        schedule.loads += loads
        schedule.num_restored_tokens += restored
        return seq.num_computed_tokens >= seq.num_stored_tokens

    def _still_has_no_room(self, seq: Sequence) -> bool:
        """Whether `seq` was refused before and nothing has changed for it: to look for a long
        prefix in each step takes time. Without windows, running sequences only want more."""
        if not self.running or self.blocks.has_windows or self.prefix_cache is None:
            return False
        if self._refused[:2] != (seq.id, self._num_ended):
            return False
        return all(
            group.pool.find(key) is None for group in self.groups for key in self._refused[2:]
        )

    def _make_room(self, seq: Sequence, granted: int, schedule: Schedule) -> bool:
        """Gives `seq` the blocks for its next tokens, preempting the newest sequences if it must;
        False if that took `seq` itself."""
        if self.blocks.has_place(seq, granted):
            return True
        while not self.blocks.find_room(seq, granted):
            victim = self.running.pop()
            self._preempt(victim, schedule)
            if victim is seq:
                return False
        schedule.copies += self.blocks.allocate(seq, granted)
        return True

    def _preempt(self, seq: Sequence, schedule: Schedule) -> None:
        self._give_up(seq)
        seq.num_preemptions += 1
        seq.status = Status.WAITING
        heapq.heappush(self.waiting, seq)
        schedule.preempted.append(seq)
        self.num_preemptions += 1

    def _give_up(self, seq: Sequence) -> None:
        self._num_ended += 1
        self.blocks.give_up(seq)

    def _fits(self, seq: Sequence) -> bool:
        """Whether `seq` can be admitted and everyone, with it, can grow for a while.

        A sequence admitted into the last free blocks is the newest, so the next one to be
        preempted: its prompt would be computed over and over. The room kept for growth starts
        with a block each and is four times as much after each preemption of `seq`; after the
        fourth it is all that anyone can ever ask for. Who comes later is preempted earlier, so
        there is no fifth; only a newcomer of better priority can cost one more.
        """
        return self.blocks.find_room_to_grow([seq, *self.running], self._reserve(seq))

    def _reserve(self, seq: Sequence) -> float:
        """Blocks of growth for each running sequence; infinite: up to their `max_length`.

        A fork may come after those that are behind it, who count on the room kept for them."""
        behind = (each for each in self.running if seq < each and seq.priority == each.priority)
        most = max(each.num_preemptions for each in (seq, *behind))
        return 4**most if most < 4 else math.inf

    # -- size --

    def set_limits(self, limits: list[int]) -> list[Sequence]:
        """Lets each group's pool have so many blocks; one that is larger has to `shrink` now.

        What was added without `max_tokens` ends where the new pools do. Returns the sequences that
        are that long already: they have ended. Raises InvalidRequest, and changes nothing, if a
        sequence could never end in the new pools.
        """
        longest = self.blocks.longest_sequence(limits)
        if outgrowing := self.outgrowing(limits):
            raise InvalidRequest(
                f"a request needs room for {least_length(outgrowing[0]):,} tokens; the pool would "
                f"hold a sequence of at most {longest:,}. Give it more, or try again when the "
                "request has ended, or abort it."
            )
        ended = []
        for seq in list(self._unfinished()):
            if seq.params.max_tokens is None and len(seq.token_ids) >= longest:
                self.finish(seq, "length")
                ended.append(seq)
            else:
                _shorten(seq, longest)
        for group, limit in zip(self.groups, limits, strict=True):
            group.pool.limit = limit
        self._refused = ()
        return ended

    def outgrowing(self, limits: list[int]) -> list[Sequence]:
        """The sequences that could never end in pools of such `limits`."""
        return [seq for seq in self._unfinished() if self.blocks.overrun(least_length(seq), limits)]

    def _unfinished(self) -> Iterator[Sequence]:
        for seq in (*self.running, *self.waiting):
            yield seq
            yield from seq.forks

    def shrink(self, sizes: list[int]) -> list[list[tuple[int, int]]]:
        """Makes each group's pool so small, between two steps, and returns what each has to move,
        as `BlockPool.shrink` does. The newest sequences are preempted until the rest fits."""
        while self.blocks.is_over(sizes):
            self._preempt(self.running.pop(), Schedule())
        self._refused = ()
        return self.blocks.shrink(sizes, self.running)

    # -- results --

    def update(self, schedule: Schedule, tokens: list[int]) -> list[tuple[Sequence, int]]:
        """Takes the sampled tokens of a step, one for each part of it that samples, in order.

        Returns the (sequence, token) pairs that count: the late token of a sequence that has
        ended in the meantime is dropped. Sequences that the token ends are finished here.
        """
        sampling = [part.seq for part in schedule.scheduled if part.samples]
        pairs = []
        for seq, token in zip(sampling, tokens, strict=True):
            if seq.status is Status.FINISHED:
                continue
            reason = seq.append(token)
            pairs.append((seq, token))
            if reason:
                self._end(seq, reason)
        if any(seq.status is Status.FINISHED for seq, _ in pairs):
            self._forget_finished()
        return pairs

    def finish(self, seq: Sequence, reason: FinishReason) -> None:
        """Ends a sequence in whatever state and frees its blocks; a second call does nothing."""
        if seq.status is not Status.FINISHED:
            self._end(seq, reason)
            self._forget_finished()

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        self._give_up(seq)
        seq.status = Status.FINISHED
        seq.finish_reason = reason

    def restart(self) -> None:
        """Makes every running sequence compute its tokens again: their K and V are gone, and
        tokens on their way won't arrive."""
        while self.running:
            self._preempt(self.running.pop(), Schedule())
        if self.prefix_cache is not None:
            self.prefix_cache.clear()
        for seq in self.waiting:
            seq.num_tokens -= seq.num_pending
            seq.num_pending = 0

    def _forget_finished(self) -> None:
        self.running = [seq for seq in self.running if seq.status is Status.RUNNING]
        if any(seq.status is Status.FINISHED for seq in self.waiting):
            self.waiting = [seq for seq in self.waiting if seq.status is Status.WAITING]
            heapq.heapify(self.waiting)

    def check(self) -> None:
        """Recounts every pool; AssertionError if a block is lost or unknown."""
        self.blocks.check([*self.running, *self.waiting])


def least_length(seq: Sequence) -> int:
    """The room without which `seq` isn't what was asked for. Without `max_tokens` that is a token
    of output; who has one may end at any time."""
    if seq.params.max_tokens is not None:
        return seq.max_length
    return 0 if seq.num_output_tokens else seq.num_prompt_tokens + 1


def _shorten(seq: Sequence, longest: int) -> None:
    """Lets `seq` end where the pools do, but not before its next token, if it may end there."""
    if seq.params.max_tokens is None:
        seq.max_length = min(seq.max_length, max(longest, len(seq.token_ids) + 1))
