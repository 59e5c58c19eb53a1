"""Which blocks hold the K and V of which tokens, so that what begins alike is computed once."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from itertools import chain, islice, zip_longest
from typing import Protocol

from mlxpage.block_pool import NULL_BLOCK
from mlxpage.cache_group import CacheGroup
from mlxpage.sequence import Sequence


class Tier(Protocol):
    """Where blocks may be found that the pools have handed out again: on a disk, say."""

    def holds(self, group: int, key: bytes) -> bool:
        """Whether `read` may find it."""

    def keeps(self, group: int, key: bytes) -> bool:
        """Whether it is there and needn't be stored, even if nobody can read it."""

    def read(self, group: int, key: bytes) -> memoryview | None:
        """What the block holds; None if it can't be had after all."""

    def discard(self, group: int, key: bytes) -> None: ...


class PrefixCache:
    """Finds blocks by their tokens, and all tokens before them.

    A block's key is the digest of the key before it, then the block's own tokens as they are: to
    find a key is to compare token by token. A chain of keys begins with the sequence's salt, and
    nobody finds what was computed under another one. What is cached stays in its place, with the
    sequences that use it or in the free queue, until the pool needs the block.

    Blocks that the pools have handed out again may be found in a second tier, and are read into
    empty blocks instead of being computed.

    Full blocks are shared. The last block of a sequence that has ended, which is not full, is its
    tail: who has the same tokens takes a copy, and goes on in that.
    """

    def __init__(self, groups: list[CacheGroup], tier: Tier | None = None):
        assert len({group.block_size for group in groups}) == 1, "a key stands for a block of each"
        self._groups = groups
        self.tier = tier
        if tier is not None:
            for group in groups:
                group.pool.evicted = []
        self._block_size = groups[0].block_size
        self.num_queried_tokens = 0
        """Of the prompts that were admitted."""
        self.num_hit_tokens = 0
        """Of them, those that were found."""
        self.num_restored_tokens = 0
        """Tokens whose K and V came from the second tier."""

    @property
    def num_evictions(self) -> int:
        return sum(group.pool.num_evictions for group in self._groups)

    def match(self, seq: Sequence) -> list[list[int]]:
        """For each group the blocks of the longest prefix of `seq` that all groups hold: all of
        them or, in a group with a window, those that the next token can read, after NULL_BLOCKs.

        The last token is never part of it: somebody has to compute what comes after it.
        """
        keys = self._keys_of_match(seq)
        length = self._longest(keys, lambda index, key: self._has(index, key))
        tables = []
        for group in self._groups:
            first = group.first_readable(length * self._block_size)
            found = [group.pool.find(key) for key in keys[first:length]]
            tables.append([NULL_BLOCK] * first + found)
        return tables

    def match_stored(self, seq: Sequence) -> int:
        """How many of the first blocks of `seq` a match would have if the second tier's were in the
        pools."""
        if self.tier is None:
            return 0
        tier = self.tier
        return self._longest(
            self._keys_of_match(seq),
            lambda index, key: self._has(index, key) or tier.holds(index, key),
        )

    def _keys_of_match(self, seq: Sequence) -> list[bytes]:
        return self._keys(seq, (len(seq.token_ids) - 1) // self._block_size)

    def _has(self, index: int, key: bytes) -> bool:
        return self.find(index, key) is not None

    def _longest(self, keys: list[bytes], has: Callable[[int, bytes], bool]) -> int:
        """The most of the first blocks that all groups have what they need of."""
        length, before = len(keys), None
        while length != before:
            before = length
            for index, group in enumerate(self._groups):
                length = group.held_prefix(keys[:length], partial(has, index))
        return length

    def restore(
        self, seq: Sequence, first: int, last: int, until: int
    ) -> tuple[int, list[tuple[int, int, memoryview]]]:
        """Lets the blocks from `first` to `last` of the tables of `seq`, which are empty, hold what
        is cached or stored of them, as far as it's needed by a sequence that is going to have its
        first `until` blocks.

        Returns how many of its first blocks it has then, `last` unless something can't be read, and
        what has to be loaded: (cache group, block, content).
        """
        keys, loads = self._keys(seq, last), {}
        for index, (group, table) in enumerate(zip(self._groups, seq.block_tables, strict=True)):
            needed = max(first, group.first_readable(until * self._block_size))
            for at in range(needed, last):
                if (block := group.pool.find(keys[at])) is not None:
                    group.take_over(table, at, block)
                elif (content := self.tier.read(index, keys[at])) is not None:
                    loads[at, index] = index, table[at], content
                else:
                    last = at
                    break
        kept = {place: load for place, load in loads.items() if place[0] < last}
        self.num_restored_tokens += len({at for at, _ in kept}) * self._block_size
        return last, list(kept.values())

    def take_evicted(self) -> list[tuple[int, int, bytes]]:
        """(cache group, block, key) of the full blocks that were handed out again since the last
        call: they keep what they hold until the next step."""
        evicted = []
        for index, group in enumerate(self._groups):
            evicted += [(index, block, key) for block, key in group.pool.evicted or ()]
            if group.pool.evicted:
                group.pool.evicted = []
        return [each for each in evicted if self._is_full(each[2])]

    def next_in_line(self, looked_at: int) -> list[tuple[int, int, bytes]]:
        """(cache group, block, key) of the full blocks that will be handed out next and aren't in
        the second tier; so many of each pool are looked at."""
        return [
            (index, block, key)
            for index, group in enumerate(self._groups)
            for block, key in islice(group.pool.free_cached(), looked_at)
            if self._is_full(key) and not self.tier.keeps(index, key)
        ]

    def cached(self) -> list[tuple[int, int, bytes]]:
        """(cache group, block, key) of all full blocks that can be found, once the steps that have
        been planned are over: those in use first, then what was used last, of all groups side by
        side."""
        pools = [group.pool for group in self._groups]
        found = [
            [(index, *each) for each in chain(pool.used_cached(), [*pool.free_cached()][::-1])]
            for index, pool in enumerate(pools)
        ]
        side_by_side = chain.from_iterable(zip_longest(*found))
        return [each for each in side_by_side if each and self._is_full(each[2])]

    def find(self, index: int, key: bytes) -> int | None:
        """The block of a group that is cached under `key`."""
        return self._groups[index].pool.find(key)

    def _is_full(self, key: bytes) -> bool:
        """Whether a key is not a tail's, which is shorter."""
        return len(key) == sha256().digest_size + 4 * self._block_size

    def match_tail(self, seq: Sequence) -> tuple[int, list[int]]:
        """How many tokens a cached tail has that go on where the full blocks of `seq` end, and its
        block in each group; 0 tokens if there's none."""
        start = seq.num_committed_blocks * self._block_size
        longest = min(self._block_size, len(seq.token_ids) - start) - 1
        if longest > 0:
            digest = _digest(seq, self._keys(seq, seq.num_committed_blocks))
            tokens = array("i", seq.token_ids[start : start + longest]).tobytes()
            for length in range(longest, 0, -1):
                key = digest + tokens[: 4 * length]
                blocks = [group.pool.find(key) for group in self._groups]
                if None not in blocks:
                    return length, blocks
        return 0, []

    def commit_tail(self, seq: Sequence) -> None:
        """Makes the last block of a sequence that gives its blocks back known, if it isn't full."""
        known = min(seq.num_computed_tokens, len(seq.token_ids))
        full, length = divmod(known, self._block_size)
        if length == 0 or seq.num_committed_blocks != full:
            return
        if known < seq.num_computed_tokens and any(group.is_state for group in self._groups):
            return  # a state is already that after a token that nobody knows
        tokens = array("i", seq.token_ids[known - length : known])
        key = _digest(seq, self._keys(seq, full)) + tokens.tobytes()
        for group, table in zip(self._groups, seq.block_tables, strict=True):
            # Not the block of somebody else as well, who goes on in it.
            if group.pool.is_private(table[full]):
                group.pool.cache(table[full], key)

    def commit(self, seq: Sequence, num_tokens: int) -> None:
        """Makes the full blocks of the first `num_tokens` tokens known, if all of their tokens
        are; the step that computes them has been planned at least."""
        first = seq.num_committed_blocks
        last = min(num_tokens, len(seq.token_ids)) // self._block_size
        if first >= last:
            return
        keys = self._keys(seq, last)
        for group, table in zip(self._groups, seq.block_tables, strict=True):
            for index in range(first, last):
                if table[index] != NULL_BLOCK:
                    group.pool.cache(table[index], keys[index])
            if group.is_state:
                self._forget_overtaken(seq, group, first, last)
        seq.num_committed_blocks = last

    def _forget_overtaken(self, seq: Sequence, group: CacheGroup, first: int, last: int) -> None:
        """Of the checkpoints in what is being generated, only the last is worth its block: who goes
        on from there hardly ever begins before it, and a prompt's would have to go for them."""
        of_prompt = seq.num_prompt_tokens // self._block_size
        for key in seq.block_keys[max(first - 1, of_prompt) : last - 1]:
            if (block := group.pool.find(key)) is not None:
                group.pool.forget(block)

    def withdraw(self, seq: Sequence) -> None:
        """Forgets all that was computed of a sequence, whose K and V can't be trusted."""
        for index, group in enumerate(self._groups):
            for key in seq.block_keys:
                if (block := group.pool.find(key)) is not None:
                    group.pool.forget(block)
                if self.tier is not None:
                    self.tier.discard(index, key)

    def clear(self) -> None:
        for group in self._groups:
            group.pool.forget_all()
            if group.pool.evicted:
                group.pool.evicted = []

    def _keys(self, seq: Sequence, count: int) -> list[bytes]:
        """Of its first blocks, `count` of them."""
        keys, size = seq.block_keys, self._block_size
        for index in range(len(keys), count):
            tokens = array("i", seq.token_ids[index * size : (index + 1) * size])
            keys.append(_digest(seq, keys) + tokens.tobytes())
        return keys[:count]


def _digest(seq: Sequence, keys: list[bytes]) -> bytes:
    """What the key after `keys` begins with."""
    # Hashed before the hash, the salt can't be taken for a key.
    salt = (seq.params.cache_salt or "").encode("utf-8", "surrogatepass")
    parent = keys[-1] if keys else sha256(salt).digest()
    return sha256(parent).digest()
