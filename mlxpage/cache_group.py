"""The blocks of the layers that share one attention window, and who holds them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from mlxpage.block_pool import NULL_BLOCK, BlockPool


class CacheGroup:
    """A block pool with the rules of one window.

    A block table maps a sequence's positions to blocks: position `p` lives in
    `table[p // block_size]`. Layers with a sliding window of `window` tokens read positions
    `p - window < k <= p`; blocks before that are given back and become NULL_BLOCK in the table.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        window: int | None = None,
        *,
        limit: int | None = None,
    ):
        self.pool = BlockPool(num_blocks, limit)
        self.block_size = block_size
        self.window = window

    def blocks_for(self, num_tokens: int, chunk: int) -> int:
        """The most blocks that a sequence holds while it grows to `num_tokens` in steps of at
        most `chunk` tokens."""
        blocks = -(-num_tokens // self.block_size)
        if self.window is None:
            return blocks
        # A chunk's first row reads window - 1 older positions; both ends may be cut by a block.
        return min(blocks, -(-(self.window - 1 + chunk) // self.block_size) + 1)

    def has_place(self, table: list[int], num_computed_tokens: int, num_tokens: int) -> bool:
        """Whether the positions from the one to the other number have a place in a block that is
        begun and nobody else's: nothing is `wanted`."""
        size = self.block_size
        if num_tokens > len(table) * size:
            return False
        return self.pool.is_private(table[num_computed_tokens // size])

    def wanted(self, table: list[int], num_computed_tokens: int, num_tokens: int) -> int:
        """Blocks to take before the positions from the one to the other number have a place that
        nobody shares."""
        return max(0, self.missing(table, num_tokens)) + self.is_shared(table, num_computed_tokens)

    def is_shared(self, table: list[int], num_computed_tokens: int) -> bool:
        """Whether the block of the next position is begun already, and not `table`'s alone."""
        index = num_computed_tokens // self.block_size
        return index < len(table) and not self.pool.is_private(table[index])

    def missing(self, table: list[int], num_tokens: int) -> int:
        """Blocks to add before `num_tokens` positions have a place."""
        return -(-num_tokens // self.block_size) - len(table)

    def held(self, table: list[int]) -> int:
        """Blocks that `table` has of those that its sequence will ever hold at once."""
        if self.window is None:
            return len(table)
        # What was given back is at the front. In the place of what others share come new blocks
        # one day, and the pool doesn't get the old ones for them.
        own = table[bisect_left(table, True, key=bool) :]
        return sum(self.pool.num_owners(block) == 1 for block in own)

    def grow(self, table: list[int], count: int) -> None:
        table += self.pool.allocate(count)

    def copy_shared(self, table: list[int], num_computed_tokens: int) -> tuple[int, int]:
        """Puts a block of its own in the place of the one that `is_shared`; returns both."""
        index = num_computed_tokens // self.block_size
        source, (target,) = table[index], self.pool.allocate(1)
        table[index] = target
        self.pool.free([source])
        return source, target

    def branch(self, table: list[int], num_tokens: int) -> list[int] | None:
        """A table that shares what a sequence with so many tokens computed needs of `table`; None
        if some of it has been given back already."""
        first = self.first_readable(num_tokens)
        shared = table[first : -(-num_tokens // self.block_size)]
        if NULL_BLOCK in shared:
            return None
        self.pool.share(shared)
        return [NULL_BLOCK] * first + shared

    def give_back(self, table: list[int], num_computed_tokens: int) -> None:
        """Frees what no row from position `num_computed_tokens` on can read any more."""
        first = unreadable = self.first_readable(num_computed_tokens)
        while first > 0 and table[first - 1] != NULL_BLOCK:
            first -= 1
        if first < unreadable:
            self.pool.free(table[first:unreadable])
            table[first:unreadable] = [NULL_BLOCK] * (unreadable - first)

    def drop(self, table: list[int], count: int) -> None:
        """Frees the first `count` blocks of a table, wherever some have been given back."""
        self.pool.free(table[:count])
        table[:count] = [NULL_BLOCK] * count

    def take_over(self, table: list[int], index: int, block: int) -> None:
        """Puts a cached block in the place of an empty one of the table's own."""
        self.pool.share([block])
        self.pool.free([table[index]])
        table[index] = block

    def first_readable(self, num_computed_tokens: int) -> int:
        """Index of the first block that rows from position `num_computed_tokens` on can read."""
        if self.window is None:
            return 0
        return max(0, num_computed_tokens - self.window + 1) // self.block_size

    def held_prefix(self, keys: list[bytes], holds: Callable[[bytes], bool]) -> int:
        """The most of the first blocks, by their `keys`, after which a sequence could go on: those
        that their next row can read are all held."""
        if self.window is None:
            return next((i for i, key in enumerate(keys) if not holds(key)), len(keys))
        length = len(keys)
        while length:
            needed = range(length - 1, self.first_readable(length * self.block_size) - 1, -1)
            gap = next((i for i in needed if not holds(keys[i])), None)
            if gap is None:
                break
            length = gap  # anything longer reads the gap too
        return length

    def release(self, table: list[int]) -> None:
        self.pool.free(table)
        table.clear()
