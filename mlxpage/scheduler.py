"""Which sequences compute which tokens in the next step, and where their K and V go."""

from __future__ import annotations

import heapq
import math
from bisect import insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

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
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    """(cache group, source, target): blocks to copy, in this order, before anything is written."""
    loads: list[tuple[int, int, memoryview]] = field(default_factory=list)
    """(cache group, block, content): what to put into blocks, after the copies and before the
    rows of this step are written."""
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

    A pool below its limit grows before a request waits, a sequence is preempted or a cached block
    is handed out. So what is cached may fill the limit: it spares somebody the time of computing
    it again, and the limit is the memory that was allowed. `keeps_cached` turns that off.
    """

    def __init__(
        self,
        groups: list[CacheGroup],
        *,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        prefix_cache: PrefixCache | None = None,
        make_larger: Callable[[int, int], bool] = lambda group, num_blocks: True,
    ):
        """`make_larger(group, num_blocks)` makes what is behind a group's blocks so large, at once,
        while a step is being planned; or it says False, and the pool stays as it is."""
        if not 0 < max_num_seqs <= max_num_batched_tokens:
            raise InvalidRequest(
                f"max_num_seqs is {max_num_seqs}; it must be from 1 to max_num_batched_tokens "
                f"({max_num_batched_tokens}): every running sequence needs a token a step."
            )
        self.groups = groups
        self._has_windows = any(group.window is not None for group in groups)
        self.prefix_cache = prefix_cache
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Sequence] = []
        """A heap, in the order of service."""
        self.running: list[Sequence] = []
        """Sorted in the order of service: the last one is preempted first."""
        self.num_preemptions = 0
        self.keeps_cached = True
        """Whether a pool grows rather than hand out what is cached."""
        self._make_larger = make_larger
        self._num_ended = 0
        """Times that a sequence has given its blocks up."""
        self._refused: tuple = ()
        """Of the sequence that didn't fit last: its id, `_num_ended`, and the key of the first full
        block that wasn't found, if there is one."""

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def limits(self) -> list[int]:
        """How many blocks each group's pool may have."""
        return [group.pool.limit for group in self.groups]

    def max_tokens_of_a_sequence(self, limits: list[int] | None = None) -> int:
        """The longest sequence that the pools, or pools of such `limits`, can hold when it's
        alone. Safe from any thread."""
        chunk = self.max_num_batched_tokens
        longest = []
        for group, blocks in zip(self.groups, limits or self.limits, strict=True):
            if group.window is None or blocks < group.blocks_for(2**62, chunk):
                longest.append(blocks * group.block_size)
        return min(longest, default=2**62)

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
        limits = self.limits  # once: another thread may change them
        longest = self.max_tokens_of_a_sequence(limits)
        for each in (seq, *seq.forks):
            _shorten(each, longest)
        for group, limit in zip(self.groups, limits, strict=True):
            need = group.blocks_for(seq.max_length, self.max_num_batched_tokens)
            if need > limit:
                raise InvalidRequest(
                    f"the prompt's {seq.num_prompt_tokens:,} tokens and up to "
                    f"{seq.max_length - seq.num_prompt_tokens:,} new ones need {need:,} blocks of "
                    f"{group.block_size} tokens; the pool holds {limit:,} (a "
                    f"sequence of at most {longest:,} tokens). Shorten the prompt, lower "
                    f"max_tokens, or give the pool more (memory or num_blocks)."
                )

    def schedule(self) -> Schedule:
        """Plans a step. An empty schedule: nothing to compute before the next `update`."""
        schedule = Schedule()
        self._continue_running(schedule)
        if not schedule.preempted:
            self._admit_waiting(schedule)
        for part in schedule.scheduled:
            if part.samples and part.seq.forks:
                self._branch_off(part.seq, schedule)
        return schedule

    def _continue_running(self, schedule: Schedule) -> None:
        if self.prefix_cache is not None:
            size = self.groups[0].block_size
            for seq in self.running:
                if seq.num_computed_tokens >= (seq.num_committed_blocks + 1) * size:
                    self._commit(seq)
        if self._has_windows:
            # The steps that still read it have been planned.
            for seq in self.running:
                self._give_back(seq)
        running = self.running
        budget = self.max_num_batched_tokens
        index = 0
        while index < len(running):
            seq = running[index]
            index += 1
            if not self._restore(seq, schedule):
                continue
            # One token is kept back for each of those that follow: nobody stands still.
            granted = self._grant(seq, budget - (len(running) - index), schedule)
            if granted and self._make_room(seq, granted, schedule):
                budget -= granted
                self._plan(schedule, seq, granted)

    def _admit_waiting(self, schedule: Schedule) -> None:
        running = self.running
        while self.waiting and len(running) < self.max_num_seqs:
            seq = self.waiting[0]
            budget = self.max_num_batched_tokens - schedule.num_scheduled_tokens
            # A preempted sequence may still wait for its last token: it can't be fed before.
            if not budget or seq.num_pending or self._still_has_no_room(seq):
                break
            self._take_cached(seq)
            if not self._grant(seq, budget, schedule) or not self._fits(seq):
                found = seq.num_committed_blocks
                self._release(seq)
                self._refused = (seq.id, self._num_ended, *seq.block_keys[found : found + 1])
                break
            heapq.heappop(self.waiting)
            seq.status = Status.RUNNING
            insort(running, seq)
            self._take_tail(seq, schedule)
            self._count_cached(seq)
            if not self._restore(seq, schedule):
                continue
            granted = self._grant(seq, budget, schedule)
            self._grow(seq, granted)
            self._plan(schedule, seq, granted)

    def _grant(self, seq: Sequence, budget: int, schedule: Schedule) -> int:
        """How many tokens `seq` computes in this step, 0 if its newest one is still unknown and
        will be its last."""
        if seq.num_tokens >= seq.max_length:
            return 0
        granted = min(seq.num_tokens - seq.num_computed_tokens, budget)
        if seq.is_scored:
            granted = min(granted, max(1, MAX_SCORED_TOKENS - schedule.num_scored_tokens))
        return granted

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
        # All rows of chunks are written before any row of the step reads. A single row is written
        # by its own attention: others may read it in the next step.
        if granted > 1:
            self._commit(seq)

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
        room; otherwise it has to wait, and will find what is cached then.

        It computes its last token again, for what comes after it. Whoever writes first into a
        block of both gets a copy.
        """
        is_next = not self.waiting or child < self.waiting[0]
        has_seat = len(self.running) < self.max_num_seqs
        if not (is_next and has_seat and parent.status is Status.RUNNING):
            return False
        computed = min(parent.num_computed_tokens, len(child.token_ids) - 1)
        tables = zip(self.groups, parent.block_tables, strict=True)
        branches = [group.branch(table, computed) for group, table in tables]
        child.block_tables = [branch or [] for branch in branches]
        child.block_keys = parent.block_keys[: computed // self.groups[0].block_size]
        child.num_computed_tokens = computed
        child.num_committed_blocks = min(
            parent.num_committed_blocks, computed // self.groups[0].block_size
        )
        if None in branches or not self._fits(child):
            self._release(child)
            return False
        child.num_cached_tokens = min(computed, child.num_prompt_tokens)
        child.status = Status.RUNNING
        insort(self.running, child)
        return True

    # -- prefixes --

    def _take_cached(self, seq: Sequence) -> None:
        """Gives `seq` what is cached of its tokens, unless their logits are wanted too."""
        if self.prefix_cache is None or seq.is_scored:
            return
        seq.block_tables = self.prefix_cache.match(seq)
        for group, table in zip(self.groups, seq.block_tables, strict=True):
            group.pool.share(table)
        size = self.groups[0].block_size
        seq.num_committed_blocks = len(seq.block_tables[0])
        seq.num_computed_tokens = seq.num_committed_blocks * size
        # What is read is a chunk of whole blocks; pools are sized for chunks that are computed.
        if self.max_num_batched_tokens >= size:
            seq.num_stored_tokens = self.prefix_cache.match_stored(seq) * size

    def _take_tail(self, seq: Sequence, schedule: Schedule) -> None:
        """Lets `seq` go on in a copy of a cached tail, if there is one. The next block to be handed
        out may be that tail itself: whoever gets it writes after it was copied."""
        if self.prefix_cache is None or seq.is_scored:
            return
        if seq.num_stored_tokens > seq.num_computed_tokens:
            return
        num_tokens, sources = self.prefix_cache.match_tail(seq)
        if not num_tokens:
            return
        for index, (table, source) in enumerate(zip(seq.block_tables, sources, strict=True)):
            self._take(index, table, 1)
            schedule.copies.append((index, source, table[-1]))
        seq.num_computed_tokens += num_tokens
        self._give_back(seq)

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
        first, until = seq.num_computed_tokens // size, seq.num_stored_tokens // size
        last, loads = self.prefix_cache.restore(seq, first, first + count, until)
        if last < first + count:
            seq.num_stored_tokens = last * size
            self._truncate(seq, last)
            if self._has_windows:  # a shorter prefix needs what wasn't read, or is given up already
                self._release(seq)
                self._take_cached(seq)
                self._count_restored(seq)
                return seq.num_computed_tokens >= seq.num_stored_tokens
        for group, table in zip(self.groups, seq.block_tables, strict=True):
            group.drop(table, min(last, group.first_readable(until * size)))
        schedule.loads += loads
        schedule.num_restored_tokens += (last - first) * size
        seq.num_computed_tokens = last * size
        self._commit(seq)
        self._count_restored(seq)
        return seq.num_computed_tokens >= seq.num_stored_tokens

    def _truncate(self, seq: Sequence, count: int) -> None:
        """Gives back the blocks after the first `count`."""
        for group, table in zip(self.groups, seq.block_tables, strict=True):
            group.pool.free(table[count:])
            del table[count:]

    def _count_restored(self, seq: Sequence) -> None:
        if seq.num_preemptions == 0:
            cached = min(seq.num_computed_tokens, seq.num_prompt_tokens)
            self.prefix_cache.num_hit_tokens += cached - seq.num_cached_tokens
            seq.num_cached_tokens = cached

    def _still_has_no_room(self, seq: Sequence) -> bool:
        """Whether `seq` was refused before and nothing has changed for it: to look for a long
        prefix in each step takes time. Without windows, running sequences only want more."""
        if not self.running or self._has_windows or self.prefix_cache is None:
            return False
        if self._refused[:2] != (seq.id, self._num_ended):
            return False
        return all(
            group.pool.find(key) is None for group in self.groups for key in self._refused[2:]
        )

    def _count_cached(self, seq: Sequence) -> None:
        was_looked_for = self.prefix_cache is not None and not seq.is_scored
        if was_looked_for and seq.num_preemptions == 0:
            # A fork that had to wait may find what its parent has generated, too.
            seq.num_cached_tokens = min(seq.num_computed_tokens, seq.num_prompt_tokens)
            self.prefix_cache.num_queried_tokens += seq.num_prompt_tokens
            self.prefix_cache.num_hit_tokens += seq.num_cached_tokens

    def _commit(self, seq: Sequence) -> None:
        if self.prefix_cache is not None:
            self.prefix_cache.commit(seq, seq.num_computed_tokens)

    def withdraw(self, seq: Sequence) -> None:
        """Makes nobody else find the K and V of `seq`, which have proved wrong."""
        if self.prefix_cache is not None:
            self.prefix_cache.withdraw(seq)
            # Not again when it ends.
            seq.num_committed_blocks = seq.max_length

    # -- blocks --

    def _give_back(self, seq: Sequence) -> None:
        """Frees what has left the windows."""
        for group, table in zip(self.groups, seq.block_tables, strict=True):
            if group.window is not None:
                group.give_back(table, seq.num_computed_tokens)

    def _make_room(self, seq: Sequence, granted: int, schedule: Schedule) -> bool:
        """Gives `seq` the blocks for its next tokens, preempting the newest sequences if it must;
        False if that took `seq` itself."""
        start, end = seq.num_computed_tokens, seq.num_computed_tokens + granted
        for group, table in zip(self.groups, seq.block_tables, strict=True):
            if not group.has_place(table, start, end):
                break
        else:
            return True
        while not self._has_room(seq, granted):
            victim = self.running.pop()
            self._preempt(victim, schedule)
            if victim is seq:
                return False
        for index, (group, table) in enumerate(zip(self.groups, seq.block_tables, strict=True)):
            if group.is_shared(table, start):
                self._keep_cached(index, 1)
                copied = group.copy_shared(table, start)
                schedule.copies.append((index, *copied))
        self._grow(seq, granted)
        return True

    def _has_room(self, seq: Sequence, granted: int) -> bool:
        start = seq.num_computed_tokens
        return self._find_room(
            group.wanted(table, start, start + granted)
            for group, table in zip(self.groups, seq.block_tables, strict=True)
        )

    def _grow(self, seq: Sequence, granted: int) -> None:
        for index, (group, table) in enumerate(zip(self.groups, seq.block_tables, strict=True)):
            if (missing := group.missing(table, seq.num_computed_tokens + granted)) > 0:
                self._take(index, table, missing)

    def _take(self, index: int, table: list[int], count: int) -> None:
        self._keep_cached(index, count)
        self.groups[index].grow(table, count)

    def _find_room(self, wanted: Iterable[int]) -> bool:
        """Whether each group has so many free blocks, once those that have too few have grown;
        none grows in vain."""
        missing = [
            max(0, count - group.pool.num_free)
            for group, count in zip(self.groups, wanted, strict=True)
        ]
        if any(
            count > group.pool.num_to_come
            for group, count in zip(self.groups, missing, strict=True)
        ):
            return False
        return all(not count or self._enlarge(index, count) for index, count in enumerate(missing))

    def _keep_cached(self, index: int, count: int) -> None:
        """Makes so many blocks ready to be taken without a cached one among them, if it can."""
        pool = self.groups[index].pool
        if count > pool.num_empty and pool.num_to_come and self.keeps_cached:
            self._enlarge(index, count - pool.num_empty)

    def _enlarge(self, index: int, count: int) -> bool:
        """Adds `count` blocks to a pool, or all that may come if that's fewer; and always half of
        what it has, so that not every step copies it."""
        pool = self.groups[index].pool
        least = max(pool.num_blocks + max(count, pool.num_blocks // 2), pool.start)
        num_blocks = min(least, pool.limit)
        if not self._make_larger(index, num_blocks):
            return False
        pool.grow(num_blocks)
        return True

    def _preempt(self, seq: Sequence, schedule: Schedule) -> None:
        self._give_up(seq)
        seq.num_preemptions += 1
        seq.status = Status.WAITING
        heapq.heappush(self.waiting, seq)
        schedule.preempted.append(seq)
        self.num_preemptions += 1

    def _give_up(self, seq: Sequence) -> None:
        """Releases the blocks of `seq`, which others, or itself, may find again."""
        if self.prefix_cache is not None and seq.num_computed_tokens:
            self._commit(seq)
            self.prefix_cache.commit_tail(seq)
        self._num_ended += 1
        self._release(seq)

    def _release(self, seq: Sequence) -> None:
        for group, table in zip(self.groups, seq.block_tables, strict=True):
            group.release(table)
        seq.num_computed_tokens = seq.num_committed_blocks = seq.num_stored_tokens = 0

    def _fits(self, seq: Sequence) -> bool:
        """Whether `seq` can be admitted and everyone, with it, can grow for a while.

        A sequence admitted into the last free blocks is the newest, so the next one to be
        preempted: its prompt would be computed over and over. The room kept for growth starts
        with a block each and is four times as much after each preemption of `seq`; after the
        fourth it is all that anyone can ever ask for. Who comes later is preempted earlier, so
        there is no fifth; only a newcomer of better priority can cost one more.
        """
        ahead = self._reserve(seq)
        wanted = []
        for index, group in enumerate(self.groups):
            room = most = group.pool.num_free + group.pool.num_to_come
            for other in (seq, *self.running):
                end = min(other.max_length, other.num_tokens + ahead * group.block_size)
                table = other.block_tables[index]
                chunk = min(
                    other.num_tokens - other.num_computed_tokens, self.max_num_batched_tokens
                )
                room -= max(0, group.blocks_for(end, chunk) - group.held(table))
                room -= group.is_shared(table, other.num_computed_tokens)
                if room < 0:
                    return False
            wanted.append(most - room)
        return self._find_room(wanted)

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
        longest = self.max_tokens_of_a_sequence(limits)
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
        return [
            seq
            for seq in self._unfinished()
            if any(
                group.blocks_for(least_length(seq), self.max_num_batched_tokens) > limit
                for group, limit in zip(self.groups, limits, strict=True)
            )
        ]

    def _unfinished(self) -> Iterator[Sequence]:
        for seq in (*self.running, *self.waiting):
            yield seq
            yield from seq.forks

    def shrink(self, sizes: list[int]) -> list[list[tuple[int, int]]]:
        """Makes each group's pool so small, between two steps, and returns what each has to move,
        as `BlockPool.shrink` does. The newest sequences are preempted until the rest fits."""
        while any(g.pool.num_used > n for g, n in zip(self.groups, sizes, strict=True)):
            self._preempt(self.running.pop(), Schedule())
        moves = [g.pool.shrink(n) for g, n in zip(self.groups, sizes, strict=True)]
        targets = [dict(each) for each in moves]
        for seq in self.running:
            for table, renamed in zip(seq.block_tables, targets, strict=True):
                table[:] = [renamed.get(block, block) for block in table]
        self._refused = ()
        return moves

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
        sequences = [*self.running, *self.waiting]
        for index, group in enumerate(self.groups):
            tables = [seq.block_tables[index] for seq in sequences]
            group.pool.check(tables)


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
