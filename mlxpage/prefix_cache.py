"""Which blocks hold the K and V of which tokens, so that what begins alike is computed once."""

from __future__ import annotations

from array import array
from hashlib import sha256

from mlxpage.block_pool import NULL_BLOCK
from mlxpage.cache_group import CacheGroup
from mlxpage.sequence import Sequence


class PrefixCache:
    """Finds blocks by their tokens, and all tokens before them.

    A block's key is the digest of the key before it, then the block's own tokens as they are: to
    find a key is to compare token by token. A chain of keys begins with the sequence's salt, and
    nobody finds what was computed under another one. What is cached stays in its place, with the
    sequences that use it or in the free queue, until the pool needs the block.

    Full blocks are shared. The last block of a sequence that has ended, which is not full, is its
    tail: who has the same tokens takes a copy, and goes on in that.
    """

    def __init__(self, groups: list[CacheGroup]):
        assert len({group.block_size for group in groups}) == 1, "a key stands for a block of each"
        self._groups = groups
        self._block_size = groups[0].block_size
        self.num_queried_tokens = 0
        """Of the prompts that were admitted."""
        self.num_hit_tokens = 0
        """Of them, those that were found."""

    @property
    def num_evictions(self) -> int:
        return sum(group.pool.num_evictions for group in self._groups)

    def match(self, seq: Sequence) -> list[list[int]]:
        """For each group the blocks of the longest prefix of `seq` that all groups hold: all of
        them or, in a group with a window, those that the next token can read, after NULL_BLOCKs.

        The last token is never part of it: somebody has to compute what comes after it.
        """
        keys = self._keys(seq, (len(seq.token_ids) - 1) // self._block_size)
        length, before = len(keys), None
        while length != before:
            before = length
            for group in self._groups:
                length = group.held_prefix(keys[:length])
        tables = []
        for group in self._groups:
            first = group.first_readable(length * self._block_size)
            found = [group.pool.find(key) for key in keys[first:length]]
            tables.append([NULL_BLOCK] * first + found)
        return tables

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
        seq.num_committed_blocks = last

    def withdraw(self, seq: Sequence) -> None:
        """Forgets all that was computed of a sequence, whose K and V can't be trusted."""
        for group in self._groups:
            for key in seq.block_keys:
                if (block := group.pool.find(key)) is not None:
                    group.pool.forget(block)

    def clear(self) -> None:
        for group in self._groups:
            group.pool.forget_all()

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
