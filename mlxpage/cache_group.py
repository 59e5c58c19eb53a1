"""The blocks of the layers that share one attention window, or keep states, and who holds them."""

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

    is_state = False

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

    def end_of_chunk(self, start: int, end: int, length: int) -> int:
        """Where a chunk from `start` that may end at `end` does end, in a sequence so long."""
        return end

    def held(self, table: list[int]) -> int:
        """Blocks that `table` has of those that its sequence will ever hold at once."""
        if self.window is None:
            return len(table)
        # What was given back is at the front. In the place of what others share come new blocks
        # one day, and the pool doesn't get the old ones for them.
        own = table[bisect_left(table, True, key=bool) :]
        return sum(self.pool.num_owners(block) == 1 for block in own)

    def grow(self, table: list[int], num_tokens: int) -> None:
        """Adds what is `missing`."""
        table += self.pool.allocate(self.missing(table, num_tokens))

    def copy_shared(self, table: list[int], num_computed_tokens: int) -> tuple[int, int]:
        """Puts a block of its own in the place of the one that `is_shared`; returns both."""
        index = num_computed_tokens // self.block_size
        source, (target,) = table[index], self.pool.allocate(1)
        table[index] = target
        self.pool.free([source])
        return source, target

    def last_branch(self, num_tokens: int, num_computed_tokens: int) -> int:
        """The most tokens, up to `num_tokens`, after which a branch of a sequence with so many
        computed may go on."""
        return num_tokens

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


class StateGroup(CacheGroup):
    """The blocks of layers that keep a state: recurrent, of a convolution, or the last token ids.

    A block holds the state after its last position, or after the last one that is computed of it:
    there a sequence updates it in place. It stays behind as a checkpoint when the sequence goes on
    to the next block, found, shared and stored under the same key as the K and V of its tokens. To
    go on is to read the state after one token less, as if in a window of two.

    Between the ends of two chunks there are no checkpoints, and no blocks: NULL_BLOCK. So that what
    is full is a checkpoint, chunks end where blocks do; and before the last token, which those who
    share all tokens compute again.
    """

    is_state = True

    def __init__(self, num_blocks: int, block_size: int, *, limit: int | None = None):
        super().__init__(num_blocks, block_size, window=2, limit=limit)
        self._widest_gap = 0
        """Empty entries between two blocks of a table."""

    def blocks_for(self, num_tokens: int, chunk: int) -> int:
        """The one that is read and the one that is written."""
        return min(2, -(-num_tokens // self.block_size))

    def missing(self, table: list[int], num_tokens: int) -> int:
        return int(super().missing(table, num_tokens) > 0)

    def end_of_chunk(self, start: int, end: int, length: int) -> int:
        size = self.block_size
        if start % size:  # within its block, or that would be full without being a checkpoint
            return min(end, (start // size + 1) * size)
        whole = min(end, length - 1) // size * size
        return whole if whole > start else end

    def grow(self, table: list[int], num_tokens: int) -> None:
        blocks = self.pool.allocate(self.missing(table, num_tokens))
        empty = super().missing(table, num_tokens) - len(blocks)
        table += [NULL_BLOCK] * empty + blocks
        self._widest_gap = max(self._widest_gap, empty)

    def last_branch(self, num_tokens: int, num_computed_tokens: int) -> int:
        if num_tokens == num_computed_tokens:
            return num_tokens
        return num_tokens // self.block_size * self.block_size

    def give_back(self, table: list[int], num_computed_tokens: int) -> None:
        end = self.first_readable(num_computed_tokens)
        first = max(0, end - 1 - self._widest_gap)
        if any(table[first:end]):
            self.pool.free(table[first:end])
            table[first:end] = [NULL_BLOCK] * (end - first)
