"""The pool against a model of it that only knows the rules."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from mlxpage.block_pool import NULL_BLOCK, BlockPool


def test_a_new_pool_hands_out_its_blocks_in_order():
    assert BlockPool(4).allocate(4) == [1, 2, 3, 4]


def cached(pool: BlockPool, count: int) -> list[int]:
    """So many blocks, each cached under its own number."""
    table = pool.allocate(count)
    for block in table:
        pool.cache(block, b"%d" % block)
    return table


def test_a_freed_table_is_reused_back_to_front():
    pool = BlockPool(3)
    pool.free(cached(pool, 3))
    assert pool.allocate(3) == [3, 2, 1]


def test_free_blocks_are_reused_before_freshly_freed_ones():
    pool = BlockPool(4)
    pool.free(cached(pool, 2))
    assert pool.allocate(4) == [3, 4, 2, 1]


def test_empty_blocks_are_reused_before_cached_ones():
    pool = BlockPool(4)
    pool.free(cached(pool, 2))
    pool.free(pool.allocate(2))
    assert pool.allocate(4) == [3, 4, 2, 1]
    assert pool.num_evictions == 2


def test_a_cached_block_is_found_until_it_is_handed_out_again():
    pool = BlockPool(2)
    pool.free(cached(pool, 1))
    assert pool.find(b"1") == 1 and pool.num_free_cached == 1
    assert pool.allocate(1) == [2]
    assert pool.find(b"1") == 1
    pool.share([1])
    assert pool.num_free == 0 and pool.num_owners(1) == 1
    pool.free([1])
    assert pool.allocate(1) == [1]
    assert pool.find(b"1") is None and pool.num_evictions == 1


def test_the_first_block_of_a_content_stays_the_one_that_is_found():
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.cache(first, b"key")
    pool.cache(second, b"key")
    assert pool.find(b"key") == first


def test_what_is_forgotten_is_not_found_and_is_reused_first():
    pool = BlockPool(3)
    pool.free(cached(pool, 3))
    assert pool.forget(1) and not pool.forget(1)
    assert pool.find(b"1") is None
    assert pool.allocate(1) == [1]
    pool.forget_all()
    assert pool.num_free_cached == 0
    assert pool.num_evictions == 0


def test_a_shared_block_is_free_after_its_last_owner():
    pool = BlockPool(2)
    table = pool.allocate(2)
    pool.share(table)
    pool.free(table)
    assert pool.num_free == 0
    pool.free(table)
    assert pool.num_free == 2


def test_null_entries_of_a_table_are_passed_over():
    pool = BlockPool(2)
    table = [NULL_BLOCK, *pool.allocate(1), NULL_BLOCK]
    pool.share(table)
    pool.free(table)
    pool.check([table])
    pool.free(table)
    assert sorted(pool.allocate(2)) == [1, 2]


def test_taking_more_than_is_free_is_our_mistake_and_takes_nothing():
    pool = BlockPool(2)
    with pytest.raises(AssertionError, match="3 blocks wanted, 2 free"):
        pool.allocate(3)
    assert pool.allocate(2) == [1, 2]


def test_a_block_is_not_freed_twice():
    pool = BlockPool(2)
    table = pool.allocate(1)
    pool.free(table)
    with pytest.raises(AssertionError, match="block 1 is freed twice"):
        pool.free(table)


def test_a_free_block_is_not_shared():
    with pytest.raises(AssertionError, match="block 2 is free"):
        BlockPool(2).share([2])


def test_what_a_pool_grows_by_is_empty_and_reused_before_what_is_cached():
    pool = BlockPool(2, limit=5)
    pool.free(cached(pool, 2))
    pool.grow(4)
    assert (pool.num_blocks, pool.num_empty, pool.num_to_come) == (4, 2, 1)
    assert pool.allocate(4) == [3, 4, 2, 1]
    with pytest.raises(AssertionError, match="6 of 5 blocks"):
        pool.grow(6)


def test_what_is_used_moves_to_the_front_with_its_key_and_its_owners():
    pool = BlockPool(6)
    first, table = pool.allocate(3), pool.allocate(3)
    pool.cache(table[1], b"5")
    pool.share(table[1:])
    pool.free(first)
    assert pool.shrink(3) == [(4, 1), (5, 2), (6, 3)]
    assert pool.num_blocks == 3 and pool.find(b"5") == 2
    assert [pool.num_owners(block) for block in (1, 2, 3)] == [1, 2, 2]
    pool.check([[1, 2, 3], [2, 3]])


def test_what_was_freed_last_stays_cached_when_a_pool_shrinks():
    pool = BlockPool(6)
    table = cached(pool, 5)
    pool.free(table)  # reused in the order 6, 5, 4, 3, 2, 1
    assert pool.shrink(2) == []
    assert [pool.find(b"%d" % n) for n in range(1, 6)] == [1, 2, None, None, None]
    pool = BlockPool(6)
    first, second = cached(pool, 3), cached(pool, 3)
    pool.free(second)
    pool.free(first)
    pool.share(second)
    pool.free(second)  # reused in the order 3, 2, 1, 6, 5, 4
    assert pool.shrink(4) == [(5, 2), (6, 3)]
    assert [pool.find(b"%d" % n) for n in range(1, 7)] == [1, None, None, 4, 2, 3]
    assert pool.num_evictions == 0
    assert pool.allocate(4) == [1, 3, 2, 4]


def test_a_pool_does_not_shrink_below_what_is_used():
    pool = BlockPool(4)
    pool.allocate(3)
    with pytest.raises(AssertionError, match="3 blocks are used"):
        pool.shrink(2)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pool, table: pool._free.pop(5), "block 5 is lost"),
        (lambda pool, table: table.pop(), "block 3: 1 references, 0 owners"),
        (lambda pool, table: table.append(2), "block 2: 1 references, 2 owners"),
        (lambda pool, table: table.append(5), "block 5: 0 references, 1 owners"),
        (lambda pool, table: pool._references.__setitem__(2, 2), "block 2: 2 references, 1 own"),
        (lambda pool, table: pool._free.__setitem__(2, None), "block 2 is used and free"),
        (lambda pool, table: pool._free.__setitem__(NULL_BLOCK, None), "3 used . 4 free .* has 6"),
        (lambda pool, table: table.append(7), "4 used . 3 free blocks; the pool has 6"),
        (lambda pool, table: pool._cached.__setitem__(b"1", 2), "isn't the one that its key finds"),
        (lambda pool, table: pool._free.move_to_end(4, last=False), "before an empty one"),
        (lambda pool, table: setattr(pool, "_num_free_cached", 0), "2 empty blocks, 3 counted"),
    ],
    ids=[
        "lost block",
        "forgotten table entry",
        "double owner",
        "free block in a table",
        "stale count",
        "used block in the free queue",
        "null block in the free queue",
        "unknown block in a table",
        "key of another block",
        "cached block at the front of the free queue",
        "stale count of empty blocks",
    ],
)
def test_check_finds(damage, message):
    pool = BlockPool(6)
    table = pool.allocate(4)
    pool.cache(table[0], b"1")
    pool.cache(table[3], b"4")
    pool.free([table.pop()])
    pool.check([table])
    damage(pool, table)
    with pytest.raises(AssertionError, match=message):
        pool.check([table])


# -- random use --


class Model:
    """Owners as a list of tables, free blocks as a list in the order of reuse, keys by block."""

    def __init__(self, num_blocks: int):
        self.free = list(range(1, num_blocks + 1))
        self.tables: list[list[int]] = []
        self.keys: dict[int, bytes] = {}
        self.evictions = 0

    def owners(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables)

    def allocate(self, count: int) -> list[int]:
        taken, self.free = self.free[:count], self.free[count:]
        self.tables.append(taken)
        self.evictions += sum(block in self.keys for block in taken)
        self.keys = {block: key for block, key in self.keys.items() if block not in taken}
        return list(taken)

    def put(self, block: int) -> None:
        """Into the free blocks, where it belongs."""
        self.free.insert(len(self.free) if block in self.keys else 0, block)

    def take(self, block: int) -> list[int]:
        if block in self.free:
            self.free.remove(block)
        self.tables.append([block])
        return [block]

    def forget_what_has_no_room(self, num_blocks: int) -> None:
        used = len({block for table in self.tables for block in table if block})
        cached = [block for block in self.free if block in self.keys]
        for block in cached[: max(0, used + len(cached) - num_blocks)]:
            del self.keys[block]

    def share(self, index: int, count: int) -> list[int]:
        self.tables.append(self.tables[index][:count])
        return list(self.tables[-1])

    def release(self, index: int, first: int, last: int) -> list[int]:
        """Entries `first` to `last` of a table become NULL_BLOCK; returns what they were."""
        table = self.tables[index]
        released = table[first:last]
        for position in reversed(range(first, last)):
            block, table[position] = table[position], NULL_BLOCK
            if block != NULL_BLOCK and self.owners(block) == 0:
                self.put(block)
        if not any(table):
            del self.tables[index]
        return released


class PoolAgainstModel(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(1, 40))
    def make(self, num_blocks):
        self.num_blocks = num_blocks
        self.pool = BlockPool(num_blocks, limit=60)
        self.model = Model(num_blocks)

    def draw_table(self, data) -> int:
        return data.draw(st.integers(0, len(self.model.tables) - 1), label="table")

    @precondition(lambda self: self.model.free)
    @rule(data=st.data())
    def allocate(self, data):
        count = data.draw(st.integers(1, len(self.model.free)), label="count")
        used = set().union(*self.model.tables)
        blocks = self.pool.allocate(count)
        assert blocks == self.model.allocate(count), "the front of the free queue is taken next"
        assert NULL_BLOCK not in blocks and used.isdisjoint(blocks)

    @precondition(lambda self: self.model.tables)
    @rule(data=st.data())
    def share_the_front_of_a_table(self, data):
        index = self.draw_table(data)
        count = data.draw(st.integers(1, len(self.model.tables[index])), label="count")
        if any(self.model.tables[index][:count]):
            self.pool.share(self.model.share(index, count))

    @precondition(lambda self: self.model.tables)
    @rule(data=st.data())
    def free_a_whole_table(self, data):
        index = self.draw_table(data)
        self.pool.free(self.model.release(index, 0, len(self.model.tables[index])))

    @precondition(lambda self: self.model.tables)
    @rule(data=st.data())
    def free_a_part_of_a_table(self, data):
        index = self.draw_table(data)
        last = data.draw(st.integers(1, len(self.model.tables[index])), label="last")
        first = data.draw(st.integers(0, last - 1), label="first")
        self.pool.free(self.model.release(index, first, last))

    @precondition(lambda self: self.model.tables)
    @rule(data=st.data(), key=st.binary(min_size=1, max_size=1))
    def cache(self, data, key):
        used = sorted({block for table in self.model.tables for block in table if block})
        block = data.draw(st.sampled_from(used), label="block")
        if block in self.model.keys:
            return
        self.pool.cache(block, key)
        if key not in self.model.keys.values():
            self.model.keys[block] = key

    @precondition(lambda self: self.model.keys)
    @rule(data=st.data())
    def use_what_is_cached(self, data):
        key = data.draw(st.sampled_from(sorted(self.model.keys.values())), label="key")
        block = self.pool.find(key)
        assert self.model.keys[block] == key
        self.pool.share(self.model.take(block))

    @precondition(lambda self: self.model.keys)
    @rule(data=st.data())
    def forget(self, data):
        block = data.draw(st.sampled_from(sorted(self.model.keys)), label="block")
        assert self.pool.forget(block)
        del self.model.keys[block]
        if block in self.model.free:
            self.model.free.remove(block)
            self.model.put(block)

    @rule(data=st.data())
    def grow(self, data):
        before = self.num_blocks
        self.num_blocks = data.draw(st.integers(before, 60), label="num_blocks")
        self.pool.grow(self.num_blocks)
        self.model.free = [*range(before + 1, self.num_blocks + 1), *self.model.free]

    @rule(data=st.data())
    def shrink(self, data):
        used = len({block for table in self.model.tables for block in table if block})
        num_blocks = data.draw(st.integers(max(1, used), self.num_blocks), label="num_blocks")
        self.model.forget_what_has_no_room(num_blocks)
        moves = dict(self.pool.shrink(num_blocks))
        occupied = {block for table in self.model.tables for block in table} | set(self.model.keys)
        kept = {block for block in occupied if block and block <= num_blocks}
        assert moves.keys() == {block for block in occupied if block > num_blocks}
        assert all(1 <= target <= num_blocks for target in moves.values())
        assert len({*moves.values(), *kept}) == len(moves) + len(kept), "moved onto something"
        cached = [moves.get(b, b) for b in self.model.free if b in self.model.keys]
        empty = [block for block in self.pool._free if block not in cached]
        assert len(empty) == num_blocks - len(occupied - {NULL_BLOCK})
        self.model.tables = [[moves.get(b, b) for b in table] for table in self.model.tables]
        self.model.keys = {moves.get(b, b): key for b, key in self.model.keys.items()}
        self.model.free = empty + cached
        self.num_blocks = num_blocks

    @invariant()
    def contents_agree(self):
        for block, key in self.model.keys.items():
            assert self.pool.find(key) == block
        assert self.pool.num_free_cached == len(self.model.keys.keys() & set(self.model.free))
        assert self.pool.num_evictions == self.model.evictions

    @invariant()
    def counts_agree(self):
        assert self.pool.num_free == len(self.model.free)
        assert self.pool.num_used == self.num_blocks - len(self.model.free)
        for block in range(1, self.num_blocks + 1):
            assert self.pool.num_owners(block) == self.model.owners(block)
        assert self.pool.num_owners(NULL_BLOCK) == 0
        self.pool.check(self.model.tables)

    def teardown(self):
        if hasattr(self, "pool"):
            assert self.pool.allocate(self.pool.num_free) == self.model.free


@pytest.mark.parametrize("examples", [200, pytest.param(2000, marks=pytest.mark.full)])
def test_the_pool_does_what_its_model_does(examples):
    run_state_machine_as_test(
        PoolAgainstModel,
        settings=settings(
            max_examples=examples,
            stateful_step_count=50,
            deadline=None,
            database=None,
            derandomize=examples == 200,
        ),
    )
