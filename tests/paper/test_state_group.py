"""States lie in blocks as K and V do: which exist, which are found, and which are let go."""

import pytest
from world import Request, World

from mlxpage.block_pool import NULL_BLOCK
from mlxpage.cache_group import CacheGroup, StateGroup
from mlxpage.prefix_cache import PrefixCache
from mlxpage.scheduler import Schedule, Scheduler

SIZE = 4


def make_world(num_states=20, depth=0, prefix_cache=True, **limits) -> World:
    groups = [CacheGroup(200, SIZE), StateGroup(num_states, SIZE)]
    cache = PrefixCache(groups) if prefix_cache else None
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64, **limits}
    return World(Scheduler(groups, prefix_cache=cache, shares_in_step=False, **limits), depth)


def alike(prompt: int, new: int = 1, **options) -> Request:
    """A prompt of which any longer one is a continuation."""
    return Request(prompt=prompt, new=new, common=prompt, **options)


def run_one(world: World, request: Request):
    seq = world.add(request)
    world.run()
    return seq


def keys_of_states(world: World) -> int:
    return len(world.scheduler.groups[1].pool._cached)


@pytest.mark.parametrize(
    ("start", "end", "length", "until"),
    [
        (0, 3, 3, 3),
        (0, 4, 4, 4),
        (0, 4, 5, 4),
        (0, 5, 5, 4),
        (0, 8, 8, 4),
        (0, 8, 9, 8),
        (4, 8, 8, 8),
        (0, 15, 15, 12),
        (4, 15, 20, 12),
        (12, 15, 15, 15),
        (5, 15, 15, 8),
        (5, 7, 15, 7),
    ],
)
def test_chunks_end_where_blocks_do(start, end, length, until):
    """Or within the block that they begin in; and a token before the end."""
    assert StateGroup(9, SIZE).end_of_chunk(start, end, length) == until
    assert CacheGroup(9, SIZE).end_of_chunk(start, end, length) == end


def test_a_sequence_holds_the_state_that_it_reads_and_the_one_that_it_writes():
    world = make_world()
    seq = world.add(Request(prompt=30, new=20))
    world.step()
    assert [bool(block) for block in seq.block_tables[1]] == [False] * 6 + [True]
    world.step()
    first, second = seq.block_tables[1][-2:]
    assert first and second, "it goes on from the last block's end, which is kept"
    for _ in range(2):
        world.step()
        assert seq.block_tables[1] == [NULL_BLOCK] * 7 + [second], "in place"
    world.run()


@pytest.mark.parametrize("prompt", [29, 33, 40])
def test_a_prompt_is_found_up_to_its_last_whole_block(prompt):
    world = make_world(max_num_batched_tokens=16)
    run_one(world, alike(30))
    # The chunks ended at 16 and 28, the prompt at 30.
    assert run_one(world, alike(prompt)).num_cached_tokens == (28 if prompt < 31 else 30)


def test_a_shorter_prompt_is_found_where_a_chunk_of_the_longer_one_ended():
    world = make_world(max_num_batched_tokens=16)
    run_one(world, alike(30))
    assert run_one(world, alike(27)).num_cached_tokens == 16


def test_of_what_is_generated_only_the_last_states_are_kept():
    """Those after its last whole block and after its end, beside the prompt's."""
    world = make_world()
    seq = run_one(world, alike(9, new=49))
    assert keys_of_states(world) == 3
    again = Request(prompt=70, new=1, earlier=tuple(seq.token_ids))
    assert run_one(world, again).num_cached_tokens == 57
    assert run_one(world, alike(12)).num_cached_tokens == 8


def test_what_others_generate_leaves_a_prompts_states_alone():
    world = make_world(num_states=8)
    run_one(world, alike(16))
    for _ in range(2):
        run_one(world, Request(prompt=2, new=40))
    assert run_one(world, alike(20)).num_cached_tokens == 16


def test_forks_of_a_prompt_go_on_from_its_last_whole_block():
    world = make_world()
    seq = world.add(Request(prompt=14, new=5, forks=2))
    world.step()
    world.step()
    children = world.sequences[1:]
    assert [child.num_computed_tokens for child in children] == [12, 12]
    shared = seq.block_tables[1][2]
    assert shared and all(child.block_tables[1] == [0, 0, shared] for child in children)
    world.run()


@pytest.mark.parametrize("prompt", [15, 16, 17])
def test_whoever_has_the_same_prompt_computes_at_most_a_block_of_it_again(prompt):
    world = make_world()
    world.add(alike(prompt, forks=5))
    world.run()
    run_one(world, alike(prompt))
    assert world.num_computed <= prompt + 6 * SIZE


def test_a_fork_between_two_steps_goes_on_from_the_very_token():
    """In a copy, for its parent goes on in the same block."""
    world = make_world(prefix_cache=False)
    seq = world.add(Request(prompt=14, new=9))
    for _ in range(3):
        world.step()
    world.fork(seq)
    assert world.sequences[1].num_computed_tokens == seq.num_computed_tokens == 15
    assert [copy[0] for copy in world.step().copies] == [0, 1]
    world.run()


def test_a_state_that_has_read_an_unknown_token_is_not_the_tail_of_the_known_ones():
    world = make_world(depth=2)
    seq = world.add(alike(5, new=30, stop_after=20))
    while not seq.finish_reason:
        assert seq.num_computed_tokens <= len(seq.token_ids) + 1
        behind = seq.num_computed_tokens > len(seq.token_ids)
        world.step()
    assert behind, "it was known too late that it ended"
    world.run()
    turn = Request(prompt=40, new=1, earlier=tuple(seq.token_ids))
    assert run_one(world, turn).num_cached_tokens % SIZE == 0


def test_a_preempted_sequence_goes_on_from_its_own_state():
    world = make_world()
    seq = world.add(Request(prompt=10, new=30))
    for _ in range(12):
        world.step()
    computed = seq.num_computed_tokens
    world.scheduler._preempt(world.scheduler.running.pop(), Schedule())
    assert seq.num_preemptions == 1
    world.run()
    assert computed == 20 and world.num_recomputed == 0
