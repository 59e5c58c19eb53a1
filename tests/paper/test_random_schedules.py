"""Random loads on small pools: no slot is shared by mistake, everyone finishes with its tokens.

`World` asserts the rules of each step; what is said here is what goes in.
"""

import itertools
import random
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from world import Request, Shelf, World

from mlxpage.cache_group import CacheGroup, StateGroup
from mlxpage.prefix_cache import PrefixCache
from mlxpage.scheduler import Scheduler


def counts(default):
    """A default number of cases, always the same ones, and ten times as many for `full`."""
    full = [pytest.mark.full, pytest.mark.timeout(3600)]
    return [default, pytest.param(10 * default, marks=full)]


def need(request: Request, group: CacheGroup, chunk: int) -> int:
    return group.blocks_for(request.prompt + request.new, chunk)


STATES = "states"
"""In the place of a window."""


def group_of(num_blocks: int, block_size: int, window, limit: int | None = None) -> CacheGroup:
    if window == STATES:
        return StateGroup(num_blocks, block_size, limit=limit)
    return CacheGroup(num_blocks, block_size, window, limit=limit)


def pool_for(
    requests: list[Request], block_size: int, window, chunk: int, share: float
) -> CacheGroup:
    """A pool of `share` of what all `requests` want at once, but enough for the largest."""
    group = group_of(0, block_size, window)
    needs = [need(request, group, chunk) for request in requests]
    return group_of(max(max(needs), round(share * sum(needs))), block_size, window)


# -- loads drawn by hypothesis --


@dataclass
class Load:
    groups: list[tuple]  # block size, window or STATES, share of the demand
    max_num_seqs: int
    max_num_batched_tokens: int
    depth: int
    prefix_cache: bool
    arrivals: list[tuple[int, Request]]  # by step
    aborts: list[tuple[int, int, bool]]  # step, which request, after planning
    branches: list[tuple[int, int]]  # step, which request
    max_chunk: int | None = None
    breaks: float | None = None  # of what is read from a second tier; None: there is none
    start: float = 1  # what each pool has at first, of what it may have
    trims: list[tuple[int, bool]] = field(default_factory=list)  # step, cached ones too
    limits: list[tuple[int, float]] = field(default_factory=list)  # step, share of the first ones
    refusals: list[int] = field(default_factory=list)  # steps in which no pool can grow


@st.composite
def loads(draw):
    # A crowd comes at once with short prompts and long outputs: it outgrows its pool.
    crowd = draw(st.booleans())
    prefix_cache = draw(st.booleans())
    block_sizes = st.sampled_from([1, 2, 3, 4, 8, 16, 32])
    group = st.tuples(
        st.just(draw(block_sizes)) if prefix_cache else block_sizes,
        st.none() | st.integers(1, 64) | st.just(STATES),
        st.sampled_from([0, 0.25] if crowd else [0, 0.1, 0.25, 0.5, 1]),
    )
    request = st.builds(
        Request,
        prompt=st.integers(1, 8 if crowd else 80),
        new=st.integers(40 if crowd else 1, 100 if crowd else 40),
        stop_after=st.none() | st.integers(0, 99),
        priority=st.sampled_from([0, 0, 0, 0, 1, -1]),
        prompt_logprobs=st.sampled_from([False, False, True]),
        family=st.integers(0, 1),
        common=st.sampled_from([0, 8, 40, 80]),
        salt=st.sampled_from([None, None, None, "salt"]),
        forks=st.sampled_from([0, 0, 0, 1, 3]),
    )
    arrival = st.tuples(st.integers(0, 5 if crowd else 60), request)
    abort = st.tuples(st.integers(0, 200), st.integers(0, 15), st.booleans())
    max_num_seqs = draw(st.integers(6 if crowd else 1, 12))
    return Load(
        groups=draw(st.lists(group, min_size=1, max_size=3)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_seqs + draw(st.integers(0, 80)),
        depth=draw(st.integers(0, 2)),
        prefix_cache=prefix_cache,
        arrivals=draw(st.lists(arrival, min_size=8 if crowd else 1, max_size=12)),
        aborts=draw(st.lists(abort, max_size=3)),
        branches=draw(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 15)), max_size=6)),
        max_chunk=draw(st.none() | st.integers(0, 40)),
    )


def serve(load: Load) -> World:
    requests = [request for _, request in load.arrivals]
    chunk = load.max_num_batched_tokens
    groups = [pool_for(requests, size, window, chunk, share) for size, window, share in load.groups]
    first_limits = [group.pool.limit for group in groups]
    if load.start < 1:
        groups = [
            group_of(max(1, int(load.start * n)), size, window, limit=n)
            for (size, window, _), n in zip(load.groups, first_limits, strict=True)
        ]
    scheduler = Scheduler(
        groups,
        max_num_seqs=load.max_num_seqs,
        max_num_batched_tokens=load.max_num_batched_tokens,
        prefix_cache=PrefixCache(groups, shelf(load)) if load.prefix_cache else None,
        shares_in_step=not any(group.is_state for group in groups),
        make_larger=lambda *wanted: world.make_larger(*wanted),
    )
    world = World(scheduler, load.depth)
    if load.max_chunk is not None:  # 0 stands for a pace that looks at steps without any
        world.keep_pace(itertools.cycle([load.max_chunk or 8, load.max_chunk]))
    dated = [*load.arrivals, *load.aborts, *load.branches, *load.trims, *load.limits]
    last = max([step for step, *_ in dated] + load.refusals)
    for step in range(last + 1):
        world.refuses_to_grow = step in load.refusals
        for when, cached in load.trims:
            if when == step:
                world.trim(cached=cached)
        for when, share in load.limits:
            if when == step:
                to_come = [request for arrival, request in load.arrivals if arrival >= step]
                limits = [
                    max([1, round(share * first), *(need(r, group, chunk) for r in to_come)])
                    for first, group in zip(first_limits, groups, strict=True)
                ]
                world.set_limits(limits)
        for arrival, request in load.arrivals:
            if arrival == step:
                world.add(continued(world, request))
        for when, number in load.branches:
            if when == step and number < len(world.sequences):
                world.fork(world.sequences[number])
        abort(world, load, step, after_planning=False)
        plan = world.plan()
        abort(world, load, step, after_planning=True)
        world.deliver(plan)
    world.refuses_to_grow = False
    world.run()
    return world


def shelf(load: Load) -> Shelf | None:
    rng = random.Random(len(load.arrivals))
    return None if load.breaks is None else Shelf(lambda: rng.random() < load.breaks)


def continued(world: World, request: Request) -> Request:
    """The next turn of a conversation, if the request wants to be one, there is one that has ended
    with the same salt, and it isn't too long."""
    if request.family == 0:
        return request
    for seq, earlier in zip(world.sequences, world.requests, strict=True):
        tokens = tuple(seq.token_ids)
        if seq.finish_reason and earlier.salt == request.salt and len(tokens) < request.prompt:
            return replace(request, earlier=tokens)
    return request


def abort(world: World, load: Load, step: int, after_planning: bool) -> None:
    for when, number, after in load.aborts:
        if when == step and after == after_planning and number < len(world.sequences):
            world.abort(world.sequences[number])


@pytest.mark.parametrize("count", counts(300))
def test_what_was_handed_out_again_is_read_where_it_is_stored(count):
    read = broken = preempted = 0

    @st.composite
    def loads_with_a_shelf(draw):
        drawn = replace(
            draw(elastic_loads() if draw(st.booleans()) else loads()),
            breaks=draw(st.sampled_from([0, 0, 0.05, 0.3])),
            prefix_cache=True,
        )
        # Blocks of groups that share a prefix cache are of one size.
        size = drawn.groups[0][0]
        return replace(drawn, groups=[(size, *rest) for _, *rest in drawn.groups])

    @settings(max_examples=count, deadline=None, database=None, derandomize=count == 300)
    @given(loads_with_a_shelf())
    def check(load):
        nonlocal read, broken, preempted
        world = serve(load)
        read += world.shelf.num_read
        broken += world.shelf.num_broken
        preempted += world.scheduler.num_preemptions

    check()
    print(f"{read} blocks read, {broken} not to be read, {preempted} preemptions")
    assert min(read, preempted) > count and broken > count / 10, "the loads test nothing"


@st.composite
def elastic_loads(draw):
    """Loads on pools that start small, are trimmed, get other limits and can't always grow."""
    step = st.integers(0, 120)
    return replace(
        draw(loads()),
        start=draw(st.sampled_from([0, 0.1, 0.5])),
        trims=draw(st.lists(st.tuples(step, st.booleans()), max_size=8)),
        limits=draw(
            st.lists(st.tuples(step, st.sampled_from([0.3, 0.6, 0.9, 1, 1.5])), max_size=4)
        ),
        refusals=draw(st.lists(step, max_size=10)),
    )


@pytest.mark.parametrize("count", counts(300))
def test_any_load_is_served_on_pools_that_grow_and_shrink_meanwhile(count):
    moved = changed = refused = grown = 0

    @settings(max_examples=count, deadline=None, database=None, derandomize=count == 300)
    @given(elastic_loads())
    def check(load):
        nonlocal moved, changed, refused, grown
        world = serve(load)
        moved += world.num_moved
        changed += world.num_limits
        refused += world.num_refused_limits
        grown += world.num_grown

    check()
    print(f"{moved} blocks moved, {changed} limits changed, {refused} refused, {grown} grown")
    assert min(moved, changed, refused, grown) > count / 4, "the loads test nothing"


@pytest.mark.parametrize("count", counts(600))
def test_any_load_is_served_without_a_slot_shared_or_a_token_lost(count):
    held_up = 0

    @settings(max_examples=count, deadline=None, database=None, derandomize=count == 600)
    @given(loads())
    def check(load):
        nonlocal held_up
        held_up += serve(load).num_held_up

    check()
    assert held_up > count / 10, "no pace holds a prompt up"


# -- pools that are too small --


def crowd(seed: int, share: float) -> World:
    """16 requests of random lengths within a few steps, on pools of `share` of what they want."""
    rng = random.Random(seed)
    requests = [
        Request(prompt=rng.randint(1, 120), new=rng.randint(1, 120), stop_after=rng.randint(0, 200))
        for _ in range(16)
    ]
    chunk, block_size = 64, rng.choice([4, 8, 16])
    windows = rng.choice([[None], [None, 32], [16, None, 64]])
    scheduler = Scheduler(
        [pool_for(requests, block_size, window, chunk, share) for window in windows],
        max_num_seqs=16,
        max_num_batched_tokens=chunk,
    )
    world = World(scheduler, depth=seed % 2)
    for request in requests:
        world.add(request)
        if rng.random() < 0.5:
            world.step()
    world.run()
    return world


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("count", counts(70))
def test_all_finish_in_a_part_of_the_pool_they_want(share, count):
    """With their own tokens and at most four preemptions each, says `World`. Without room kept
    for growth a quarter of all tokens would be computed twice."""
    worlds = [crowd(seed, share) for seed in range(count)]
    computed = sum(world.num_computed for world in worlds)
    again = sum(world.num_recomputed for world in worlds)
    assert 0 < again < 0.2 * computed


def marathon(seed: int, priorities: list[int]) -> World:
    """14 requests whose outputs are hundreds of blocks long, on an eighth of what they want."""
    rng = random.Random(seed)
    requests = [
        Request(
            prompt=rng.randint(1, 4), new=rng.randint(150, 300), priority=rng.choice(priorities)
        )
        for _ in range(14)
    ]
    chunk = 64
    pool = pool_for(requests, 1, None, chunk, share=0.12)
    world = World(Scheduler([pool], max_num_seqs=14, max_num_batched_tokens=chunk), seed % 2)
    for request in requests:
        world.add(request)
        for _ in range(rng.randint(0, 60)):
            world.step()
    world.run()
    return world


@pytest.mark.parametrize("priorities", [[0], [0, 1, 2]], ids=["equal", "priorities"])
@pytest.mark.parametrize("count", counts(8))
def test_nobody_is_preempted_a_fifth_time_in_a_pool_that_is_much_too_small(priorities, count):
    """Or only by newcomers of better priority, once each: `World` says so. Here it comes to the
    fourth."""
    worlds = [marathon(seed, priorities) for seed in range(count)]
    most = max(seq.num_preemptions for world in worlds for seq in world.sequences)
    assert most == 4 if priorities == [0] else most >= 4


def test_a_saturated_queue_does_not_thrash():
    """Short outputs, a queue that never empties: preempting the newest and admitting it again at
    once would cost a preemption every few steps."""
    rng = random.Random(0)
    pool = CacheGroup(100, 16)
    world = World(Scheduler([pool], max_num_seqs=64, max_num_batched_tokens=256), depth=1)
    filled = 0
    for _ in range(2000):
        while len(world.scheduler.waiting) < 4:
            output = min(500, round(rng.lognormvariate(3.6, 0.95)))
            world.add(Request(prompt=rng.randint(1, 40), new=1000, stop_after=output))
        world.step()
        filled += sum(seq.num_computed_tokens for seq in world.scheduler.running)
    ended = sum(seq.finish_reason is not None for seq in world.sequences)
    print(
        world.scheduler.num_preemptions,
        ended,
        world.num_recomputed / world.num_computed,
        filled / 2000 / 1600,
    )
    assert world.scheduler.num_preemptions < 0.05 * ended
    assert world.num_recomputed < 0.05 * world.num_computed
    assert filled > 0.7 * 2000 * 100 * 16, "the pool stands empty instead"


def test_a_branch_goes_on_where_its_parent_has_got_to():
    """Its parent is in the middle of its prompt, as it is when it has been preempted."""
    once = Request(prompt=1, new=1)
    world = serve(
        Load(
            groups=[(1, None, 1)],
            max_num_seqs=2,
            max_num_batched_tokens=2,
            depth=0,
            prefix_cache=False,
            arrivals=[(0, once), (10, replace(once, prompt=4)), (12, once)],
            aborts=[],
            branches=[(11, 1)],
        )
    )
    assert world.branched_at == {2: 2}


def test_a_branch_of_a_branch_goes_on_where_that_began():
    one, later = Request(prompt=1, new=1), Request(prompt=1, new=1, priority=1)
    world = serve(
        Load(
            groups=[(1, None, 0)],
            max_num_seqs=2,
            max_num_batched_tokens=2,
            depth=0,
            prefix_cache=False,
            arrivals=[
                (0, Request(prompt=2, new=1, forks=1)),
                *[(2, one)] * 2,
                *[(0, later)] * 2,
                (0, replace(later, new=4)),
                *[(2, one)] * 4,
            ],
            aborts=[],
            branches=[(1, 1)],
            start=0,
        )
    )
    assert list(world.branched_at.values()) == [1]


def test_who_waits_for_a_step_may_be_preempted_in_it():
    """Its step has nothing else, as the prompt of better priority is held up for it."""
    world = World(Scheduler([CacheGroup(44, 1)], max_num_seqs=4, max_num_batched_tokens=16))
    world.add(Request(prompt=1, new=42))
    world.step()
    world.keep_pace(itertools.chain([4], itertools.repeat(0)))
    world.add(Request(prompt=30, new=2, priority=-1))
    world.run()
    assert world.scheduler.num_preemptions == 1
