"""Which blocks sequences hold, in all cache groups side by side: found, taken, copied, freed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mlxpage.cache_group import CacheGroup
from mlxpage.prefix_cache import PrefixCache
from mlxpage.sequence import Sequence

Copy = tuple[int, int, int]
"""Cache group, source and target of a block to copy."""
Load = tuple[int, int, memoryview]
"""Cache group, block, and what to put into it."""


class BlockManager:
    """Gives sequences blocks for their tokens, the same positions in every cache group.

    A pool below its limit grows before a request waits, a sequence is preempted or a cached block
    is handed out. So what is cached may fill the limit: it spares somebody the time of computing
    it again, and the limit is the memory that was allowed. `keeps_cached` turns that off.
    """

    def __init__(
        self,
        groups: list[CacheGroup],
        chunk: int,
        prefix_cache: PrefixCache | None = None,
        make_larger: Callable[[int, int], bool] = lambda group, num_blocks: True,
    ):
        """`chunk`: the most tokens that a step computes. `make_larger(group, num_blocks)` makes
        what is behind a group's blocks so large, at once; or it says False, and the pool stays as
        it is."""
        self.groups = groups
        self.prefix_cache = prefix_cache
        self.has_windows = any(group.window is not None for group in groups)
        self._state_groups = [group for group in groups if group.is_state]
        self.keeps_cached = True
        """Whether a pool grows rather than hand out what is cached."""
        self._chunk = chunk
        self._block_size = groups[0].block_size
        self._make_larger = make_larger

    # -- limits --

    @property
    def limits(self) -> list[int]:
        """How many blocks each group's pool may have."""
        return [group.pool.limit for group in self.groups]

    def longest_sequence(self, limits: list[int] | None = None) -> int:
        """Tokens of the longest sequence that the pools, or pools of such `limits`, can hold when
        it's alone. Safe from any thread."""
        longest = []
        for group, blocks in zip(self.groups, limits or self.limits, strict=True):
            if group.window is None or blocks < group.blocks_for(2**62, self._chunk):
                longest.append(blocks * group.block_size)
        return min(longest, default=2**62)

    def overrun(self, length: int, limits: list[int]) -> tuple[int, int] | None:
        """How many blocks a sequence of `length` tokens may hold at once and how many it can have,
        in the first group whose limit is too low for it; None if it fits."""
        for group, limit in zip(self.groups, limits, strict=True):
            if (need := group.blocks_for(length, self._chunk)) > limit:
                return need, limit
        return None

    # -- prefixes --

    def _looks_for(self, seq: Sequence) -> bool:
        """Whether `seq` may have what is cached: not if the logits of its tokens are wanted."""
        return self.prefix_cache is not None and not seq.is_scored

    def share_cached(self, seq: Sequence) -> None:
        """Gives `seq` what is cached of its tokens."""
        if not self._looks_for(seq):
            return
        seq.block_tables = self.prefix_cache.match(seq)
        for group, table in zip(self.groups, seq.block_tables, strict=True):
            group.pool.share(table)
        size = self._block_size
        seq.num_committed_blocks = len(seq.block_tables[0])
        seq.num_computed_tokens = seq.num_committed_blocks * size
        # What is read is a chunk of whole blocks; pools are sized for chunks that are computed.
        if self._chunk >= size:
            seq.num_stored_tokens = self.prefix_cache.match_stored(seq) * size

    def copy_tail(self, seq: Sequence) -> list[Copy]:
        """Lets `seq` go on in a copy of a cached tail, if there is one. The next block to be handed
        out may be that tail itself: whoever gets it writes after it was copied."""
        if not self._looks_for(seq) or seq.num_stored_tokens > seq.num_computed_tokens:
            return []
        num_tokens, sources = self.prefix_cache.match_tail(seq)
        copies = []
        if num_tokens:
            for index, (table, source) in enumerate(zip(seq.block_tables, sources, strict=True)):
                self._take(index, table, seq.num_computed_tokens + num_tokens)
                copies.append((index, source, table[-1]))
            seq.num_computed_tokens += num_tokens
            self.give_back(seq)
        return copies

    def restore(self, seq: Sequence, num_tokens: int) -> tuple[int, list[Load]]:
        """Fills the blocks of the next `num_tokens` tokens of `seq`, which it has and which are
        empty, with what is stored of them.

        Returns how many tokens that were, and what has to be loaded. Fewer, if something can't be
        read: then `seq` has less to restore, or begins again with what is cached of it.
        """
        size = self._block_size
        first, until = seq.num_computed_tokens // size, seq.num_stored_tokens // size
        wanted = first + num_tokens // size
        last, loads = self.prefix_cache.restore(seq, first, wanted, until)
        if last < wanted:
            seq.num_stored_tokens = last * size
            self._truncate(seq, last)
            if self.has_windows:  # a shorter prefix needs what wasn't read, or is given up already
                self.release(seq)
                self.share_cached(seq)
                self._count_restored(seq)
                return 0, []
        for group, table in zip(self.groups, seq.block_tables, strict=True):
            group.drop(table, min(last, group.first_readable(until * size)))
        seq.num_computed_tokens = last * size
        self.commit(seq)
        self._count_restored(seq)
        return (last - first) * size, loads

    def _truncate(self, seq: Sequence, count: int) -> None:
        """Gives back the blocks after the first `count`."""
        for group, table in zip(self.groups, seq.block_tables, strict=True):
            group.pool.free(table[count:])
            del table[count:]

    def count_cached(self, seq: Sequence) -> None:
        """Notes what a sequence that is admitted for the first time has found of its prompt."""
        if self._looks_for(seq) and seq.num_preemptions == 0:
            # A fork that had to wait may find what its parent has generated, too.
            seq.num_cached_tokens = min(seq.num_computed_tokens, seq.num_prompt_tokens)
            self.prefix_cache.num_queried_tokens += seq.num_prompt_tokens
            self.prefix_cache.num_hit_tokens += seq.num_cached_tokens

    def _count_restored(self, seq: Sequence) -> None:
        if seq.num_preemptions == 0:
            cached = min(seq.num_computed_tokens, seq.num_prompt_tokens)
            self.prefix_cache.num_hit_tokens += cached - seq.num_cached_tokens
            seq.num_cached_tokens = cached

    def commit(self, seq: Sequence) -> None:
        """Lets others find the full blocks of `seq`."""
        if self.prefix_cache is not None:
            self.prefix_cache.commit(seq, seq.num_computed_tokens)

    def withdraw(self, seq: Sequence) -> None:
        """Makes nobody else find the K and V of `seq`, which have proved wrong."""
        if self.prefix_cache is not None:
            self.prefix_cache.withdraw(seq)
            # Not again when it ends.
            seq.num_committed_blocks = seq.max_length

    # -- taking and giving back --

    def branch(self, parent: Sequence, child: Sequence) -> bool:
        """Lets `child` have the blocks of `parent`, but compute its last token again, for what
        comes after it; with states, all tokens after the last block end. Whoever writes first into
        a block of both gets a copy. False, and `child` has nothing, if it needs what has left the
        window of `parent`."""
        computed = min(parent.num_computed_tokens, len(child.token_ids) - 1)
        for group in self._state_groups:
            computed = group.last_branch(computed, parent.num_computed_tokens)
        full = computed // self._block_size
        tables = zip(self.groups, parent.block_tables, strict=True)
        branches = [group.branch(table, computed) for group, table in tables]
        child.block_tables = [branch or [] for branch in branches]
        child.block_keys = parent.block_keys[:full]
        child.num_computed_tokens = computed
        child.num_committed_blocks = min(parent.num_committed_blocks, full)
        if None in branches:
            self.release(child)
            return False
        return True

    def end_of_chunk(self, start: int, end: int, length: int) -> int:
        """Where a chunk from position `start` ends, that may go as far as `end`, in a sequence of
        `length` tokens."""
        for group in self._state_groups:
            end = group.end_of_chunk(start, end, length)
        return end

    def has_place(self, seq: Sequence, num_tokens: int) -> bool:
        """Whether the next `num_tokens` tokens of `seq` have their place already."""
        start, end = seq.num_computed_tokens, seq.num_computed_tokens + num_tokens
        for group, table in zip(self.groups, seq.block_tables, strict=True):
            if not group.has_place(table, start, end):
                return False
        return True

    def find_room(self, seq: Sequence, num_tokens: int) -> bool:
        """Whether there are blocks for the next `num_tokens` tokens of `seq`, once pools have
        grown for them."""
        start = seq.num_computed_tokens
        return self._find_room(
            group.wanted(table, start, start + num_tokens)
            for group, table in zip(self.groups, seq.block_tables, strict=True)
        )

    def allocate(self, seq: Sequence, num_tokens: int) -> list[Copy]:
        """Gives `seq` the blocks of its next `num_tokens` tokens; there has to be room. What it
        shared and is going to write into has to be copied first."""
        start, copies = seq.num_computed_tokens, []
        for index, (group, table) in enumerate(zip(self.groups, seq.block_tables, strict=True)):
            if group.is_shared(table, start):
                self._keep_cached(index, 1)
                copies.append((index, *group.copy_shared(table, start)))
            if group.missing(table, start + num_tokens) > 0:
                self._take(index, table, start + num_tokens)
        return copies

    def find_room_to_grow(self, sequences: list[Sequence], ahead: float) -> bool:
        """Whether there is room for the known tokens of all `sequences` and `ahead` more blocks of
        each, or all that it may ever need if that's fewer; once pools have grown for it."""
        wanted = []
        for index, group in enumerate(self.groups):
            room = most = group.pool.num_free + group.pool.num_to_come
            for seq in sequences:
                end = min(seq.max_length, seq.num_tokens + ahead * group.block_size)
                table = seq.block_tables[index]
                chunk = min(seq.num_uncomputed_tokens, self._chunk)
                room -= max(0, group.blocks_for(end, chunk) - group.held(table))
                room -= group.is_shared(table, seq.num_computed_tokens)
                if room < 0:
                    return False
            wanted.append(most - room)
        return self._find_room(wanted)

    def give_back(self, seq: Sequence) -> None:
        """Frees what has left the windows."""
        for group, table in zip(self.groups, seq.block_tables, strict=True):
            if group.window is not None:
                group.give_back(table, seq.num_computed_tokens)

    def give_up(self, seq: Sequence) -> None:
        """Releases the blocks of `seq`, which others, or itself, may find again."""
        if self.prefix_cache is not None and seq.num_computed_tokens:
            self.commit(seq)
            self.prefix_cache.commit_tail(seq)
        self.release(seq)

    def release(self, seq: Sequence) -> None:
        for group, table in zip(self.groups, seq.block_tables, strict=True):
            group.release(table)
        seq.num_computed_tokens = seq.num_committed_blocks = seq.num_stored_tokens = 0

    # -- sizes --

    def _take(self, index: int, table: list[int], num_tokens: int) -> None:
        group = self.groups[index]
        self._keep_cached(index, group.missing(table, num_tokens))
        group.grow(table, num_tokens)

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
        return all(not count or self.enlarge(index, count) for index, count in enumerate(missing))

    def _keep_cached(self, index: int, count: int) -> None:
        """Makes so many blocks ready to be taken without a cached one among them, if it can."""
        pool = self.groups[index].pool
        if count > pool.num_empty and pool.num_to_come and self.keeps_cached:
            self.enlarge(index, count - pool.num_empty)

    def enlarge(self, index: int, count: int) -> bool:
        """Adds `count` blocks to a pool, or all that may come if that's fewer; and always half of
        what it has, so that not every step copies it."""
        pool = self.groups[index].pool
        least = max(pool.num_blocks + max(count, pool.num_blocks // 2), pool.start)
        num_blocks = min(least, pool.limit)
        if not self._make_larger(index, num_blocks):
            return False
        pool.grow(num_blocks)
        return True

    def is_over(self, sizes: list[int]) -> bool:
        """Whether more blocks are in use than pools of such `sizes` have."""
        return any(g.pool.num_used > n for g, n in zip(self.groups, sizes, strict=True))

    def shrink(self, sizes: list[int], sequences: list[Sequence]) -> list[list[tuple[int, int]]]:
        """Makes each group's pool so small and lets the tables of `sequences`, who hold all that
        is in use, follow; returns what each group has to move, as `BlockPool.shrink` does."""
        moves = [g.pool.shrink(n) for g, n in zip(self.groups, sizes, strict=True)]
        targets = [dict(each) for each in moves]
        for seq in sequences:
            for table, renamed in zip(seq.block_tables, targets, strict=True):
                table[:] = [renamed.get(block, block) for block in table]
        return moves

    def check(self, sequences: list[Sequence]) -> None:
        """Recounts every pool, all of whose used blocks `sequences` hold; AssertionError if one is
        lost or unknown."""
        for index, group in enumerate(self.groups):
            group.pool.check([seq.block_tables[index] for seq in sequences])
