"""Blocks of K/V cache, counted: ids, references, contents and the queue of free ones.

A block is `block_size` consecutive token positions of one sequence, for every layer of a cache
group. Here it is only a number; the arrays behind it live in `kv_cache.py`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from itertools import islice

NULL_BLOCK = 0
"""Never handed out, so that padding and given-back entries of a table may point at it."""

FREE, CACHED, USED, SHARED = ".c#S"
"""What `BlockPool.states` says of a block."""


class BlockPool:
    """Hands out the blocks 1 to `num_blocks`, each in O(1), and may `grow` to `limit` of them.

    A block is free, or used by as many owners as its reference count says. A full block may be
    cached besides, under a key that stands for its tokens and all before them: it can be found
    then, and keeps its content while it is free, until it is handed out again.

    The free queue is in the order of reuse: its front is taken next. Blocks with nothing in them
    come first, then cached ones, longest free first. A freed table goes in back to front, so that
    the head of a prompt, which other prompts may share, outlives its tail.
    """

    def __init__(self, num_blocks: int, limit: int | None = None):
        """Without a `limit`, the pool stays as large as it is."""
        self.num_blocks = self.start = num_blocks
        self.limit = num_blocks if limit is None else limit
        self.num_evictions = 0
        """Cached blocks that were handed out again."""
        self.evicted: list[tuple[int, bytes]] | None = None
        """They and their keys, if somebody wants to know and takes them away from here."""
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks + 1))
        self._references = [0] * (num_blocks + 1)
        self._cached: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}  # of the cached blocks
        self._num_free_cached = 0

    @property
    def num_free(self) -> int:
        """Blocks that can be handed out, cached ones among them."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_free_cached(self) -> int:
        return self._num_free_cached

    @property
    def num_empty(self) -> int:
        """Free blocks with nothing in them."""
        return len(self._free) - self._num_free_cached

    @property
    def num_to_come(self) -> int:
        """Blocks that the pool may still grow by."""
        return max(0, self.limit - self.num_blocks)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks, each with one owner; the caller has asked `num_free` before."""
        assert count <= len(self._free), f"{count} blocks wanted, {len(self._free)} free"
        take, references = self._free.popitem, self._references
        blocks = [take(last=False)[0] for _ in range(count)]
        for block in blocks:
            references[block] = 1
            key = self._keys.get(block)
            if self.forget(block):
                if self.evicted is not None:
                    self.evicted.append((block, key))
                self.num_evictions += 1
                self._num_free_cached -= 1
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Adds an owner to each block; NULL_BLOCK entries are passed over."""
        for block in blocks:
            if block == NULL_BLOCK:
                continue
            if self._references[block] == 0:
                assert block in self._keys, f"block {block} is free and can't be shared"
                del self._free[block]
                self._num_free_cached -= 1
            self._references[block] += 1

    def free(self, table: list[int]) -> None:
        """Takes one owner from each block of `table`; NULL_BLOCK entries are passed over."""
        references = self._references
        for block in reversed(table):
            if block == NULL_BLOCK:
                continue
            assert references[block] > 0, f"block {block} is freed twice"
            references[block] -= 1
            if references[block] == 0:
                self._free[block] = None
                if block in self._keys:
                    self._num_free_cached += 1
                else:
                    self._free.move_to_end(block, last=False)

    def num_owners(self, block: int) -> int:
        return self._references[block]

    def states(self) -> str:
        """A letter for each of the blocks 1 to `num_blocks`: FREE with nothing in it, free but
        CACHED, USED by one owner, or SHARED by several."""
        of_count = ord(FREE), ord(USED)
        states = bytearray([of_count[n] if n < 2 else ord(SHARED) for n in self._references])
        for block in self._keys:
            if self._references[block] == 0:
                states[block] = ord(CACHED)
        return states[1:].decode()

    # -- contents --

    def is_private(self, block: int) -> bool:
        """Whether its one owner may change what it holds."""
        return self._references[block] == 1 and block not in self._keys

    def find(self, key: bytes) -> int | None:
        """The block that is cached under `key`, used or free."""
        return self._cached.get(key)

    def cache(self, block: int, key: bytes) -> None:
        """Makes a block that somebody uses known under `key`, if no other is."""
        assert self._references[block] > 0, f"block {block} is free and can't be cached"
        if key not in self._cached:
            assert block not in self._keys, f"block {block} is cached under another key"
            self._cached[key] = block
            self._keys[block] = key

    def forget(self, block: int) -> bool:
        """Takes a block out of the cache; False if it wasn't there."""
        key = self._keys.pop(block, None)
        if key is None:
            return False
        del self._cached[key]
        if block in self._free:
            self._num_free_cached -= 1
            self._free.move_to_end(block, last=False)
        return True

    def forget_all(self) -> None:
        for block in list(self._keys):
            self.forget(block)

    def free_cached(self) -> Iterator[tuple[int, bytes]]:
        """The cached blocks that nobody uses, with their keys; what is handed out first comes
        first."""
        return ((block, self._keys[block]) for block in self._free if block in self._keys)

    def used_cached(self) -> Iterator[tuple[int, bytes]]:
        return ((block, key) for block, key in self._keys.items() if block not in self._free)

    # -- size --

    def grow(self, num_blocks: int) -> None:
        """Adds empty blocks, up to so many in all."""
        assert self.num_blocks <= num_blocks <= self.limit, f"{num_blocks} of {self.limit} blocks"
        for block in range(num_blocks, self.num_blocks, -1):
            self._free[block] = None
            self._free.move_to_end(block, last=False)
        self._references += [0] * (num_blocks - self.num_blocks)
        self.num_blocks = num_blocks

    def shrink(self, num_blocks: int) -> list[tuple[int, int]]:
        """Gives up the blocks above `num_blocks`; what they hold moves to lower ones.

        What is used moves, and what is cached, as far as there is room: what was used last stays.
        Returns the moves, (source, target) each; whoever has a table has to follow them.
        """
        assert self.num_used <= num_blocks <= self.num_blocks, f"{self.num_used} blocks are used"
        self._forget_oldest(self._num_free_cached - (num_blocks - self.num_used))
        above = range(num_blocks + 1, self.num_blocks + 1)
        sources = [b for b in above if self._references[b] or b in self._keys]
        empty = [b for b in self._free if b <= num_blocks and b not in self._keys]
        moves = dict(zip(sources, sorted(empty), strict=False))
        for source, target in moves.items():
            self._references[target] = self._references[source]
            if (key := self._keys.pop(source, None)) is not None:
                self._keys[target] = key
                self._cached[key] = target
        taken = set(moves.values())
        self._free = OrderedDict.fromkeys(
            moves.get(block, block)
            for block in self._free
            if block in moves or (block <= num_blocks and block not in taken)
        )
        del self._references[num_blocks + 1 :]
        self.num_blocks = num_blocks
        return list(moves.items())

    def _forget_oldest(self, count: int) -> None:
        cached = (block for block in self._free if block in self._keys)
        for block in list(islice(cached, max(0, count))):
            self.forget(block)

    def check(self, tables: Iterable[list[int]]) -> None:
        """Recounts everything against the `tables` of all owners; AssertionError if it's off."""
        owners = Counter(block for table in tables for block in table if block != NULL_BLOCK)
        for block in range(1, self.num_blocks + 1):
            counted, owned = self._references[block], owners[block]
            assert counted == owned, f"block {block}: {counted} references, {owned} owners"
            if owned:
                assert block not in self._free, f"block {block} is used and free"
            else:
                assert block in self._free, f"block {block} is lost: neither used nor free"
        in_use = len(owners)
        assert in_use + self.num_free == self.num_blocks, (
            f"{in_use} used + {self.num_free} free blocks; the pool has {self.num_blocks}"
        )
        known = {block: key for key, block in self._cached.items()}
        assert known == self._keys, "a cached block isn't the one that its key finds"
        empty = [block not in self._keys for block in self._free]
        assert sum(empty) == self.num_empty, f"{sum(empty)} empty blocks, {self.num_empty} counted"
        assert empty == sorted(empty, reverse=True), "a cached block is reused before an empty one"
