"""What is computed once and found again, and what must not be found."""

import pytest
from world import Request, World

from mlxpage.block_pool import NULL_BLOCK
from mlxpage.cache_group import CacheGroup
from mlxpage.prefix_cache import PrefixCache
from mlxpage.sampling_params import SamplingParams
from mlxpage.scheduler import Scheduler
from mlxpage.sequence import Sequence

SIZE = 4


def make_world(num_blocks=100, windows=(None,), depth=0, **limits) -> World:
    groups = [CacheGroup(num_blocks, SIZE, window) for window in windows]
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, **limits}
    return World(Scheduler(groups, prefix_cache=PrefixCache(groups), **limits), depth)


def alike(prompt: int, new: int = 1, **options) -> Request:
    """A prompt of which any longer one is a continuation."""
    return Request(prompt=prompt, new=new, common=prompt, **options)


def run_one(world: World, request: Request) -> Sequence:
    seq = world.add(request)
    world.run()
    return seq


@pytest.mark.parametrize(
    ("prompt", "found"), [(3, 0), (4, 0), (5, 4), (16, 12), (17, 16), (18, 16), (19, 18), (25, 18)]
)
def test_blocks_are_found_and_the_last_token_is_computed(prompt, found):
    """Full blocks, and the tail of two tokens."""
    world = make_world()
    run_one(world, alike(18))
    assert run_one(world, alike(prompt)).num_cached_tokens == found


def test_what_differs_in_one_token_is_computed():
    world = make_world()
    run_one(world, alike(20))
    assert run_one(world, Request(prompt=20, new=1, common=11)).num_cached_tokens == 8


def test_the_next_turn_of_a_conversation_goes_on_in_a_copy_of_the_tail():
    world = make_world(windows=[None, 6])
    first = run_one(world, alike(17, new=10))
    # The last output was never fed: 26 tokens have K and V, two of them in a block that isn't full.
    turn = Request(prompt=40, new=4, earlier=tuple(first.token_ids))
    seqs = [world.add(turn), world.add(turn)]
    plan = world.step()
    assert [seq.num_cached_tokens for seq in seqs] == [26, 26]
    assert [copy[0] for copy in plan.copies] == [0, 1, 0, 1]
    assert len({target for group, _, target in plan.copies if group == 0}) == 2
    world.run()


def test_a_tail_may_be_handed_out_in_the_step_that_copies_it():
    world = make_world(num_blocks=8)
    run_one(world, alike(18))  # four full blocks and a tail
    # All eight blocks, the tail's own among them.
    assert run_one(world, alike(31)).num_cached_tokens == 18
    assert world.num_copies == 1


def test_requests_of_one_step_share_what_the_first_of_them_computes():
    world = make_world()
    seqs = [world.add(alike(17, new=3)) for _ in range(3)]
    plan = world.step()
    assert [part.num_tokens for part in plan.scheduled] == [17, 1, 1]
    (table,) = seqs[0].block_tables
    assert all(seq.block_tables[0][:4] == table[:4] for seq in seqs)
    assert [world.scheduler.groups[0].pool.num_owners(block) for block in table] == [3, 3, 3, 3, 1]
    world.run()


def test_a_block_that_a_decode_fills_is_found_a_step_later():
    world = make_world()
    seq = world.add(alike(7, new=9))
    world.step()  # computes 7 tokens and samples the first output
    follower = Request(prompt=9, new=1, common=7)  # its 8th and 9th token are its own
    keys = world.scheduler.prefix_cache
    same = Sequence(99, [*seq.token_ids, 0], SamplingParams(), max_length=10)
    world.step()  # fills the second block
    assert len(keys.match(same)[0]) == 1
    world.step()
    assert keys.match(same)[0] == seq.block_tables[0][:2]
    assert run_one(world, follower).num_cached_tokens == 4


def test_outputs_are_found_too():
    world = make_world()
    first = run_one(world, alike(6, new=11))
    again = Sequence(9, [*first.token_ids, 0], SamplingParams(), max_length=99)
    # The last output was never fed: 16 of the 17 tokens have K and V.
    assert len(world.scheduler.prefix_cache.match(again)[0]) == 4


@pytest.mark.parametrize("salts", [("a", "b"), ("a", None), (None, "a"), ("\ud800", "a")])
def test_another_salt_finds_nothing(salts):
    world = make_world()
    first, second = salts
    run_one(world, alike(17, salt=first))
    assert run_one(world, alike(17, salt=second)).num_cached_tokens == 0
    assert run_one(world, alike(17, salt=first)).num_cached_tokens == 16


def test_a_prompt_whose_logprobs_are_wanted_is_computed_and_then_found_by_others():
    world = make_world()
    run_one(world, alike(17))
    assert run_one(world, alike(25, prompt_logprobs=True)).num_cached_tokens == 0
    assert run_one(world, alike(25)).num_cached_tokens == 24


def test_the_longest_unused_blocks_go_first_and_of_a_prompt_its_tail():
    world = make_world(num_blocks=12)
    run_one(world, alike(17, family=0))  # four full blocks
    run_one(world, alike(17, family=1))
    run_one(world, Request(prompt=24, new=1))  # needs six: two are empty
    cache = world.scheduler.prefix_cache
    assert cache.num_evictions == 4  # the first one's tail, and three of its blocks
    for family, left in ((0, 1), (1, 4)):
        like = Sequence(99, [1000 + family] * 17, SamplingParams(), max_length=99)
        assert len(cache.match(like)[0]) == left


def test_a_window_needs_only_what_it_can_read():
    world = make_world(windows=[6])
    seq = world.add(alike(33, new=8))
    for _ in range(8):
        world.step()
    # Positions from 27 on are read by the 34th row: blocks 6 and 7.
    cache, pool = world.scheduler.prefix_cache, world.scheduler.groups[0].pool
    longer = Sequence(99, [*seq.token_ids[:33], 0], SamplingParams(), max_length=99)
    (table,) = cache.match(longer)
    assert table[:6] == [NULL_BLOCK] * 6 and all(table[6:]) and len(table) == 8
    world.run()
    assert pool.forget(table[6])
    # 28 tokens would need the block of position 23 as well: it's the one before.
    (table,) = cache.match(longer)
    assert len(table) == 6 and table[:4] == [NULL_BLOCK] * 4 and all(table[4:])


def test_all_groups_have_to_hold_a_prefix():
    world = make_world(windows=[None, 6])
    run_one(world, alike(33))
    cache = world.scheduler.prefix_cache
    longer = Sequence(99, [1000] * 34, SamplingParams(), max_length=99)
    whole, windowed = cache.match(longer)
    assert len(whole) == len(windowed) == 8 and all(whole)
    pools = [group.pool for group in world.scheduler.groups]
    pools[1].forget(windowed[7])
    assert [len(table) for table in cache.match(longer)] == [7, 7]
    pools[0].forget(whole[5])
    assert [len(table) for table in cache.match(longer)] == [5, 5]
    pools[0].forget(whole[0])
    assert cache.match(longer) == [[], []]


def test_a_preempted_sequence_finds_its_own_blocks():
    world = make_world(num_blocks=14)
    world.add(Request(prompt=9, new=40))
    younger = world.add(Request(prompt=17, new=20))
    world.run()
    assert younger.num_preemptions == 1
    assert younger.num_cached_tokens == 0, "that is what it found when it came"
    # Of its 32 tokens, those in blocks that the older one hasn't taken meanwhile.
    assert (world.num_found, world.num_recomputed) == (8, 24)


def test_after_a_failed_step_nothing_is_found():
    world = make_world()
    run_one(world, alike(17))
    world.scheduler.restart()
    assert world.scheduler.groups[0].pool.num_free_cached == 0
    assert run_one(world, alike(17)).num_cached_tokens == 0


def test_what_is_withdrawn_is_not_found_nor_put_back():
    world = make_world()
    seq = world.add(alike(17, new=20))
    world.step()
    world.scheduler.blocks.withdraw(seq)
    for _ in range(6):
        world.step()
    world.abort(seq)
    assert run_one(world, alike(17)).num_cached_tokens == 0


def test_statistics_count_prompts_when_they_are_first_admitted():
    world = make_world()
    for _ in range(3):
        run_one(world, alike(18, new=4))
    run_one(world, alike(18, prompt_logprobs=True))  # nobody looks for it
    cache = world.scheduler.prefix_cache
    assert (cache.num_queried_tokens, cache.num_hit_tokens) == (54, 32)


def test_a_pool_that_is_full_of_what_is_cached_serves_as_if_it_were_empty():
    world = make_world(num_blocks=20)
    for family in range(10):
        run_one(world, alike(40, new=8, family=family))
    assert world.scheduler.num_preemptions == 0


def test_what_has_left_the_window_is_withdrawn_too():
    world = make_world(windows=[6])
    seq = world.add(alike(33, new=20))
    for _ in range(12):
        world.step()
    assert world.scheduler.groups[0].pool.num_free_cached, "blocks were given back"
    world.scheduler.blocks.withdraw(seq)
    world.abort(seq)
    assert world.scheduler.groups[0].pool.num_free_cached == 0


@pytest.mark.parametrize("forks", [0, 7])
def test_shared_blocks_of_a_window_are_no_room_to_grow(forks):
    """Who shares them gets blocks of its own in their place, and the pool nothing back."""
    group = CacheGroup(61, SIZE, 128)
    scheduler = Scheduler([group], max_num_seqs=8, max_num_batched_tokens=64)
    scheduler.prefix_cache = None if forks else PrefixCache([group])
    world = World(scheduler)
    for _ in range(1 if forks else 8):
        world.add(Request(prompt=192, new=500, common=192, forks=forks))
    world.run()
    assert scheduler.num_preemptions == 0


def test_forks_leave_the_room_that_was_kept_for_those_who_came_after_them():
    groups = [CacheGroup(50, 4)]
    scheduler = Scheduler(groups, max_num_seqs=8, max_num_batched_tokens=64)
    world = World(scheduler)
    world.add(Request(prompt=70, new=30, forks=4))
    world.plan()  # the prompt isn't computed yet
    later = world.add(Request(prompt=1, new=60))
    later.num_preemptions = 4  # admitted only if all that is running may grow to its end
    world.run()
    assert later.num_preemptions == 4
