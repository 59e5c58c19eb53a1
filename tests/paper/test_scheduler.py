"""The scheduler's rules, one by one. Random loads are in `test_random_schedules.py`."""

import pytest
from world import STOP, Request, World

from mlxpage.cache_group import CacheGroup
from mlxpage.errors import InvalidRequest
from mlxpage.prefix_cache import PrefixCache
from mlxpage.sampling_params import SamplingParams
from mlxpage.scheduler import MAX_SCORED_TOKENS, Scheduler
from mlxpage.sequence import Sequence, Status

TOKEN = 7


def make(num_blocks=100, block_size=4, window=None, *, seqs=8, tokens=32) -> Scheduler:
    group = CacheGroup(num_blocks, block_size, window)
    return Scheduler([group], max_num_seqs=seqs, max_num_batched_tokens=tokens)


def sequence(id: int, prompt: int, new: int = 50, *, priority: int = 0, **params) -> Sequence:
    return Sequence(
        id,
        list(range(100, 100 + prompt)),
        SamplingParams(**params),
        max_length=prompt + new,
        stop_token_ids=frozenset([STOP]),
        priority=priority,
    )


def add(scheduler: Scheduler, *sequences: Sequence) -> None:
    for seq in sequences:
        scheduler.add(seq)


def parts(plan) -> list[tuple[int, int, int]]:
    return [(part.seq.id, part.start, part.num_tokens) for part in plan.scheduled]


def give(scheduler: Scheduler, plan, token: int = TOKEN):
    return scheduler.update(plan, [token for part in plan.scheduled if part.samples])


def step(scheduler: Scheduler, token: int = TOKEN):
    plan = scheduler.schedule()
    give(scheduler, plan, token)
    scheduler.check()
    return plan


def step_until_preemption(scheduler: Scheduler):
    for _ in range(1000):
        plan = step(scheduler)
        if plan.preempted:
            return plan
    raise AssertionError("nobody is preempted")


# -- the token budget --


def test_a_prompt_is_computed_in_chunks_and_its_last_one_samples():
    scheduler = make(tokens=32)
    add(scheduler, sequence(0, 70))
    plans = [step(scheduler) for _ in range(4)]
    assert [parts(plan) for plan in plans] == [
        [(0, 0, 32)],
        [(0, 32, 32)],
        [(0, 64, 6)],
        [(0, 70, 1)],
    ]
    assert [plan.scheduled[0].samples for plan in plans] == [False, False, True, True]


def test_decoding_goes_on_while_a_long_prompt_is_computed():
    scheduler = make(tokens=16)
    add(scheduler, sequence(0, 3), sequence(1, 3))
    step(scheduler)
    add(scheduler, sequence(2, 100))
    for number in range(7):
        chunk = min(14, 100 - 14 * number)
        assert parts(step(scheduler)) == [
            (0, 3 + number, 1),
            (1, 3 + number, 1),
            (2, 14 * number, chunk),
        ]


def test_a_prompt_ahead_leaves_a_token_for_each_of_those_behind():
    scheduler = make(tokens=16)
    add(scheduler, sequence(0, 3, priority=1))
    step(scheduler)
    add(scheduler, sequence(1, 100))
    assert parts(step(scheduler)) == [(0, 3, 1), (1, 0, 15)]
    assert parts(step(scheduler)) == [(1, 15, 15), (0, 4, 1)]


def test_a_chunk_beside_decoding_is_as_small_as_it_must_be():
    scheduler = make(tokens=32)
    add(scheduler, sequence(0, 4))
    step(scheduler)
    scheduler.chunk_beside = lambda waiting: 5
    add(scheduler, sequence(1, 30), sequence(2, 30))
    assert parts(step(scheduler)) == [(0, 4, 1), (1, 0, 5)]
    # Both wait for the one that decodes; the second prompt begins when the first is computed.
    assert parts(step(scheduler)) == [(0, 5, 1), (1, 5, 5)]


def test_with_nobody_to_wait_a_chunk_takes_all_of_a_step():
    scheduler = make(tokens=32)
    scheduler.chunk_beside = lambda waiting: 5
    add(scheduler, sequence(0, 60))
    assert parts(step(scheduler)) == [(0, 0, 32)]


def test_a_small_chunk_leaves_a_token_for_each_who_runs():
    scheduler = make(tokens=100)
    add(scheduler, sequence(0, 4))
    step(scheduler)
    add(scheduler, *(sequence(n, 80, prompt_logprobs=0) for n in (1, 2, 3)))
    step(scheduler)  # whose prompts are computed at once, in chunks
    scheduler.chunk_beside = lambda waiting: 1
    assert parts(step(scheduler)) == [(0, 5, 1), (1, 64, 1), (2, 1, 1), (3, 1, 1)]


def test_without_a_chunk_prompts_are_held_up():
    scheduler = make(tokens=100)
    add(scheduler, sequence(0, 4))
    step(scheduler)
    add(scheduler, *(sequence(n, 80, prompt_logprobs=0) for n in (1, 2)))
    step(scheduler)
    add(scheduler, sequence(3, 10))
    scheduler.chunk_beside = lambda waiting: 0
    assert parts(step(scheduler)) == [(0, 5, 1)]
    scheduler.chunk_beside = None
    assert parts(step(scheduler)) == [(0, 6, 1), (1, 64, 16), (2, 1, 48), (3, 0, 10)]


def test_several_prompts_share_a_step():
    scheduler = make(tokens=32)
    add(scheduler, sequence(0, 10), sequence(1, 10), sequence(2, 30))
    assert parts(step(scheduler)) == [(0, 0, 10), (1, 0, 10), (2, 0, 12)]


def test_prompt_logprobs_are_computed_in_small_chunks():
    scheduler = make(tokens=512)
    add(scheduler, sequence(0, 150, prompt_logprobs=1), sequence(1, 100))
    assert MAX_SCORED_TOKENS == 64
    assert parts(step(scheduler)) == [(0, 0, 64), (1, 0, 100)]
    assert parts(step(scheduler)) == [(0, 64, 64), (1, 100, 1)]
    assert parts(step(scheduler)) == [(0, 128, 22), (1, 101, 1)]
    assert parts(step(scheduler)) == [(0, 150, 1), (1, 102, 1)]


def test_prompts_with_logprobs_share_the_rows_that_are_scored_at_once():
    scheduler = make(200, tokens=512)
    add(scheduler, *(sequence(i, 100, prompt_logprobs=1) for i in range(3)), sequence(3, 100))
    assert parts(step(scheduler)) == [(0, 0, 64), (1, 0, 1), (2, 0, 1), (3, 0, 100)]
    assert parts(step(scheduler)) == [(0, 64, 36), (1, 1, 28), (2, 1, 1), (3, 100, 1)]


def test_outputs_after_a_prompt_with_logprobs_are_computed_again_at_once():
    scheduler = make(tokens=512)
    add(scheduler, sequence(0, 10, new=200, prompt_logprobs=1))
    for _ in range(150):
        step(scheduler)
    scheduler.restart()
    assert parts(step(scheduler)) == [(0, 0, 64)]
    assert parts(step(scheduler)) == [(0, 64, 96)]


# -- the order of service --


def test_no_more_run_than_max_num_seqs():
    scheduler = make(seqs=2)
    add(scheduler, sequence(0, 3, new=2), sequence(1, 3), sequence(2, 3))
    assert parts(step(scheduler)) == [(0, 0, 3), (1, 0, 3)]
    assert parts(step(scheduler)) == [(0, 3, 1), (1, 3, 1)]
    assert parts(step(scheduler)) == [(1, 4, 1), (2, 0, 3)]


def test_first_come_is_first_served_even_if_a_later_one_would_fit():
    scheduler = make(num_blocks=12)
    add(scheduler, sequence(0, 20, new=8))
    step(scheduler)
    add(scheduler, sequence(1, 24, new=8), sequence(2, 1, new=1))
    assert parts(step(scheduler)) == [(0, 20, 1)]
    assert sorted(scheduler.waiting) == scheduler.waiting


def test_lower_priority_numbers_are_served_first():
    scheduler = make(seqs=1)
    for id, priority in enumerate([5, 0, -3, 0]):
        add(scheduler, sequence(id, 3, new=1, priority=priority))
    assert [parts(step(scheduler))[0][0] for _ in range(4)] == [2, 1, 3, 0]


def test_a_request_waits_for_room_to_grow():
    scheduler = make(num_blocks=4)
    add(scheduler, sequence(0, 8, new=8), sequence(1, 4, new=8))
    # Three blocks hold both prompts, but each of them needs another one for its next tokens.
    assert parts(step(scheduler)) == [(0, 0, 8)]


def test_room_to_grow_is_no_more_than_the_request_can_use():
    scheduler = make(num_blocks=3)
    add(scheduler, sequence(0, 7, new=1), sequence(1, 3, new=1))
    assert parts(step(scheduler)) == [(0, 0, 7), (1, 0, 3)]


def test_room_to_grow_counts_the_blocks_that_a_window_still_holds():
    """Not those that it gave back: the running sequence holds one block and will need two."""
    for spare, admitted in ((1, [0]), (2, [0, 1])):
        scheduler = make(num_blocks=20, window=4)
        add(scheduler, sequence(0, 1))
        for _ in range(11):
            step(scheduler)
        add(scheduler, sequence(1, 4))
        pool = scheduler.groups[0].pool
        pool.allocate(pool.num_free - spare)
        plan = scheduler.schedule()
        assert scheduler.groups[0].held(scheduler.running[0].block_tables[0]) == 1
        assert [part.seq.id for part in plan.scheduled] == admitted


# -- preemption --


def test_the_newest_is_preempted():
    scheduler = make(num_blocks=8)
    first, second = sequence(0, 8, new=24), sequence(1, 8, new=24)
    add(scheduler, first, second)
    plan = step_until_preemption(scheduler)
    assert plan.preempted == [second] and [part.seq for part in plan.scheduled] == [first]
    assert second.status is Status.WAITING and second.block_tables == [[]]
    assert (second.num_computed_tokens, second.num_preemptions, scheduler.num_preemptions) == (
        0,
        1,
        1,
    )


def test_the_worst_priority_is_preempted_before_the_newest():
    scheduler = make(num_blocks=8)
    first, second = sequence(0, 8, new=24, priority=1), sequence(1, 8, new=24)
    add(scheduler, first, second)
    assert step_until_preemption(scheduler).preempted == [first]


def test_the_newest_is_preempted_by_its_own_need_too():
    scheduler = make(num_blocks=8)
    first, second = sequence(0, 10, new=22), sequence(1, 11, new=21)
    add(scheduler, first, second)
    plan = step_until_preemption(scheduler)
    assert plan.preempted == [second] and parts(plan) == [(0, 15, 1)]


def test_nobody_is_admitted_in_a_step_that_preempts():
    scheduler = make(num_blocks=8, seqs=2)
    add(scheduler, sequence(0, 8, new=24), sequence(1, 8, new=24))
    step(scheduler)
    add(scheduler, sequence(2, 1, new=1, priority=-1))
    plan = step_until_preemption(scheduler)
    assert [part.seq.id for part in plan.scheduled] == [0]
    assert [part.seq.id for part in step(scheduler).scheduled] == [0, 2]


def test_recompute_gives_a_preempted_sequence_its_place_back():
    scheduler = make(num_blocks=8, seqs=2)
    first, second, third = (sequence(id, 8, new=24) for id in range(3))
    add(scheduler, first, second, third)
    step_until_preemption(scheduler)
    assert [seq.id for seq in sorted(scheduler.waiting)] == [1, 2]
    known = list(second.token_ids)
    scheduler.finish(first, "abort")
    assert parts(step(scheduler))[0] == (1, 0, len(known))
    assert second.token_ids == [*known, TOKEN]
    assert scheduler.running[0] is second


@pytest.mark.parametrize(
    ("preemptions", "growth"), [(0, 1), (1, 4), (2, 16), (3, 64), (4, 500), (9, 500)]
)
def test_the_room_to_grow_is_four_times_as_much_after_each_preemption(preemptions, growth):
    for short, admitted in ((1, [0]), (0, [0, 1])):
        scheduler = make(num_blocks=1200)
        first, second = sequence(0, 3, new=2001), sequence(1, 4, new=2000)
        second.num_preemptions = preemptions
        add(scheduler, first, second)
        pool = scheduler.groups[0].pool
        pool.allocate(pool.num_free - 2 * (1 + growth) + short)
        assert [part.seq.id for part in scheduler.schedule().scheduled] == admitted


def preempted_four_times() -> tuple[Scheduler, Sequence, Sequence]:
    """An older sequence, and one beside it that is admitted after its fourth preemption."""
    scheduler = make(num_blocks=40, block_size=1, tokens=16)
    older, victim = sequence(0, 4, new=16), sequence(1, 4, new=16)
    victim.num_preemptions = 4
    add(scheduler, older, victim)
    step(scheduler)
    assert scheduler.running == [older, victim]
    return scheduler, older, victim


def test_those_who_come_later_cannot_cost_a_fifth_preemption():
    scheduler, _, victim = preempted_four_times()
    add(scheduler, *(sequence(id, 4, new=16) for id in range(2, 6)))
    while victim.status is not Status.FINISHED:
        step(scheduler)
    assert victim.num_preemptions == 4 and scheduler.num_preemptions > 0


def test_a_newcomer_of_better_priority_can_cost_one_more():
    scheduler, _, victim = preempted_four_times()
    add(scheduler, sequence(2, 4, new=16, priority=-1))
    while scheduler.has_work:
        step(scheduler)
    assert victim.num_preemptions == 5 and victim.num_output_tokens == 16


def test_blocks_outside_the_window_are_given_back_before_anyone_is_preempted():
    """The second sequence still holds a long chunk when the first one needs a block."""
    scheduler = make(num_blocks=20, window=4)
    first, second = sequence(0, 3), sequence(1, 40)
    add(scheduler, first)
    step(scheduler)
    add(scheduler, second)
    assert parts(step(scheduler)) == [(0, 3, 1), (1, 0, 31)]
    pool = scheduler.groups[0].pool
    pool.allocate(pool.num_free)
    plan = scheduler.schedule()
    assert not plan.preempted and parts(plan) == [(0, 4, 1), (1, 31, 9)]


# -- look-ahead --


def test_a_step_is_planned_before_the_token_of_the_last_one_is_known():
    scheduler = make()
    seq = sequence(0, 5)
    add(scheduler, seq)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert [parts(first), parts(second)] == [[(0, 0, 5)], [(0, 5, 1)]]
    assert (len(seq.token_ids), len(seq), seq.num_pending) == (5, 7, 2)
    assert give(scheduler, first) == [(seq, TOKEN)]
    assert give(scheduler, second) == [(seq, TOKEN)]
    assert (len(seq.token_ids), len(seq), seq.num_pending) == (7, 7, 0)


def test_the_late_token_of_a_finished_sequence_is_dropped():
    scheduler = make()
    seq, other = sequence(0, 5), sequence(1, 5)
    add(scheduler, seq, other)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert scheduler.update(first, [STOP, TOKEN]) == [(seq, STOP), (other, TOKEN)]
    assert scheduler.update(second, [TOKEN, TOKEN]) == [(other, TOKEN)]
    assert (seq.output_token_ids, seq.finish_reason) == ([STOP], "stop")


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("new", [1, 2, 3, 9])
def test_max_tokens_is_never_overrun(depth, new):
    world = World(make(), depth)
    world.add(Request(prompt=5, new=new))
    world.run()
    assert world.num_computed == 5 + new - 1, "nothing is computed for tokens that nobody wants"


def preempted_in_flight(new: int = 24):
    """A sequence that is preempted while its last step is still in flight."""
    scheduler = make(num_blocks=8)
    first, second = sequence(0, 8, new=24), sequence(1, 8, new=new)
    add(scheduler, first, second)
    plan = scheduler.schedule()
    while True:
        ahead = scheduler.schedule()
        if ahead.preempted:
            assert ahead.preempted == [second] and second.num_pending == 1
            return scheduler, first, second, plan, ahead
        give(scheduler, plan)
        plan = ahead


def test_a_preempted_sequence_keeps_its_late_token():
    scheduler, first, second, plan, ahead = preempted_in_flight()
    known = second.num_output_tokens
    give(scheduler, plan)
    assert second.num_output_tokens == known + 1 and second.num_pending == 0
    give(scheduler, ahead)
    scheduler.finish(first, "abort")
    assert parts(step(scheduler)) == [(1, 0, 8 + known + 1)]


def test_a_preempted_sequence_is_not_computed_before_its_late_token_is_known():
    scheduler, first, second, plan, _ = preempted_in_flight()
    scheduler.finish(first, "abort")
    assert not scheduler.schedule(), "there is room, but the token after the last is unknown"
    give(scheduler, plan)
    assert parts(scheduler.schedule())[0][0] == second.id


def test_a_late_token_can_end_a_preempted_sequence():
    scheduler, _, second, plan, ahead = preempted_in_flight()
    scheduler.update(plan, [TOKEN, STOP])
    assert (second.status, second.finish_reason) == (Status.FINISHED, "stop")
    assert scheduler.waiting == []
    give(scheduler, ahead)
    scheduler.check()


def test_an_empty_schedule_means_nothing_to_compute_before_the_next_update():
    scheduler = make()
    assert not scheduler.schedule() and not scheduler.has_work
    add(scheduler, sequence(0, 5, new=1))
    plan = scheduler.schedule()
    assert plan and not scheduler.schedule() and scheduler.has_work
    give(scheduler, plan)
    assert not scheduler.schedule() and not scheduler.has_work


# -- ends --


def test_a_stop_token_ends_a_sequence_and_counts_as_output():
    scheduler = make()
    seq = sequence(0, 5)
    add(scheduler, seq)
    step(scheduler)
    step(scheduler, STOP)
    assert (seq.output_token_ids, seq.finish_reason) == ([TOKEN, STOP], "stop")
    assert scheduler.groups[0].pool.num_used == 0 and not scheduler.has_work


def test_a_stop_token_before_min_tokens_is_a_token_like_others():
    scheduler = make()
    seq = sequence(0, 5, min_tokens=2)
    add(scheduler, seq)
    for _ in range(3):
        assert seq.finish_reason is None
        step(scheduler, STOP)
    assert (seq.num_output_tokens, seq.finish_reason) == (3, "stop")


def test_a_stop_token_in_the_last_place_is_a_stop():
    scheduler = make()
    seq = sequence(0, 5, new=1)
    add(scheduler, seq)
    step(scheduler, STOP)
    assert seq.finish_reason == "stop"


def test_abort_while_waiting():
    scheduler = make(seqs=1)
    seqs = [sequence(id, 5) for id in range(3)]
    add(scheduler, *seqs)
    step(scheduler)
    scheduler.finish(seqs[1], "abort")
    assert scheduler.waiting == [seqs[2]] and seqs[1].finish_reason == "abort"
    scheduler.finish(seqs[0], "abort")
    assert parts(step(scheduler)) == [(2, 0, 5)]


def test_abort_of_one_that_waits_keeps_the_order_of_the_others():
    scheduler = make(seqs=1)
    seqs = [
        sequence(id, 5, new=1, priority=place) for id, place in enumerate([1, 5, 2, 6, 7, 3, 4])
    ]
    add(scheduler, *seqs)
    scheduler.finish(seqs[0], "abort")
    assert [step(scheduler).scheduled[0].seq.priority for _ in range(6)] == [2, 3, 4, 5, 6, 7]


def test_abort_while_running_frees_the_blocks_at_once():
    scheduler = make()
    seq, other = sequence(0, 5), sequence(1, 5)
    add(scheduler, seq, other)
    step(scheduler)
    used = scheduler.groups[0].pool.num_used
    scheduler.finish(seq, "abort")
    assert scheduler.groups[0].pool.num_used == used / 2
    assert parts(step(scheduler)) == [(1, 5, 1)]


def test_abort_in_the_middle_of_a_prompt():
    scheduler = make(tokens=8)
    seq = sequence(0, 50)
    add(scheduler, seq)
    step(scheduler)
    scheduler.finish(seq, "abort")
    assert not scheduler.has_work and scheduler.groups[0].pool.num_used == 0


def test_abort_with_a_token_in_flight_drops_the_token():
    scheduler = make()
    seq = sequence(0, 5)
    add(scheduler, seq)
    plan = scheduler.schedule()
    scheduler.finish(seq, "abort")
    assert give(scheduler, plan) == []
    assert (seq.output_token_ids, seq.finish_reason) == ([], "abort")


def test_abort_of_a_preempted_sequence_with_a_token_in_flight():
    scheduler, first, second, plan, ahead = preempted_in_flight()
    scheduler.finish(second, "abort")
    assert give(scheduler, plan) == [(first, TOKEN)]
    give(scheduler, ahead)
    scheduler.check()
    assert scheduler.waiting == []


def test_a_second_end_changes_nothing():
    scheduler = make()
    seq = sequence(0, 5)
    add(scheduler, seq)
    step(scheduler, STOP)
    scheduler.finish(seq, "abort")
    assert seq.finish_reason == "stop"
    scheduler.check()


def test_a_step_updates_once():
    scheduler = make()
    add(scheduler, sequence(0, 5))
    plan = step(scheduler)
    with pytest.raises(AssertionError, match="expects no token"):
        give(scheduler, plan)


def test_a_step_takes_a_token_for_each_part_that_samples():
    scheduler = make(tokens=8)
    add(scheduler, sequence(0, 5), sequence(1, 5))
    with pytest.raises(ValueError, match="argument 2 is longer"):
        scheduler.update(scheduler.schedule(), [TOKEN, TOKEN])


def test_restart_computes_again_what_ran_and_expects_no_lost_token():
    scheduler, first, second, _, _ = preempted_in_flight()
    known = [len(seq.token_ids) for seq in (first, second)]
    scheduler.restart()
    scheduler.check()
    assert scheduler.groups[0].pool.num_used == 0
    assert [len(seq) for seq in (first, second)] == known
    assert parts(step(scheduler)) == [(0, 0, known[0])]


# -- what can never fit --


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    scheduler = make(num_blocks=10, block_size=4)
    scheduler.add(sequence(0, 30, new=10))
    with pytest.raises(InvalidRequest) as refusal:
        scheduler.add(sequence(1, 1030, new=11, max_tokens=11))
    for fact in ("1,030 tokens", "11 new", "261 blocks of 4", "holds 10 ", "at most 40 tokens"):
        assert fact in str(refusal.value)
    assert len(scheduler.waiting) == 1


def test_every_group_must_hold_a_request():
    groups = [CacheGroup(100, 4), CacheGroup(10, 4)]
    scheduler = Scheduler(groups, max_num_seqs=4, max_num_batched_tokens=16)
    assert scheduler.blocks.longest_sequence() == 40
    scheduler.add(sequence(0, 30, new=10))
    with pytest.raises(InvalidRequest, match="11 blocks of 4 tokens; the pool holds 10 "):
        scheduler.add(sequence(1, 30, new=11, max_tokens=11))


def test_a_windowed_group_holds_any_length_if_it_holds_a_window_and_a_chunk():
    # 11 positions before the chunk, 16 in it, a block cut at each end: 27 // 4 + 2 blocks.
    assert make(8, 4, window=12, tokens=16).blocks.longest_sequence() > 10**9
    scheduler = make(7, 4, window=12, tokens=16)
    assert scheduler.blocks.longest_sequence() == 28
    scheduler.add(sequence(0, 20, new=8))
    with pytest.raises(InvalidRequest, match="8 blocks of 4 tokens; the pool holds 7 "):
        scheduler.add(sequence(1, 20, new=9, max_tokens=9))


def test_the_longest_sequence_that_fits_is_served_alone():
    world = World(make(num_blocks=10, block_size=4))
    longest = world.scheduler.blocks.longest_sequence()
    world.add(Request(prompt=30, new=longest - 30))
    world.add(Request(prompt=1, new=longest - 1))
    world.run()


@pytest.mark.parametrize(("seqs", "tokens"), [(0, 8), (-1, 8), (9, 8)])
def test_max_num_seqs_is_from_1_to_max_num_batched_tokens(seqs, tokens):
    with pytest.raises(InvalidRequest, match=rf"max_num_seqs is {seqs}; .* \({tokens}\)"):
        make(seqs=seqs, tokens=tokens)


@pytest.mark.parametrize(("prompt", "new"), [(0, 5), (5, 0)])
def test_a_sequence_has_a_prompt_and_room_for_a_token(prompt, new):
    with pytest.raises(AssertionError, match="a prompt and room"):
        sequence(0, prompt, new)


# -- memory --


@pytest.mark.parametrize("block_size", [16, 32])
def test_a_windowed_group_holds_a_window_and_two_blocks_while_decoding(block_size):
    groups = [CacheGroup(5000 // block_size, block_size), CacheGroup(60, block_size, window=512)]
    world = World(Scheduler(groups, max_num_seqs=1, max_num_batched_tokens=64))
    seq = world.add(Request(prompt=1, new=4000))
    most = 0
    while world.scheduler.has_work:
        world.step()
        most = max(most, groups[1].pool.num_used)
    assert -(-512 // block_size) <= most <= -(-512 // block_size) + 2
    assert seq.num_output_tokens == 4000


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("chunk", [1, 100, 512])
def test_a_windowed_group_holds_a_window_and_a_chunk_during_a_prompt(block_size, chunk):
    group = CacheGroup(100, block_size, window=512)
    world = World(Scheduler([group], max_num_seqs=1, max_num_batched_tokens=chunk))
    world.add(Request(prompt=4000, new=4))
    most = 0
    while world.scheduler.has_work:
        world.step()
        most = max(most, group.pool.num_used)
    assert (512 + chunk) // block_size <= most <= -(-(512 + chunk) // block_size) + 2


@pytest.mark.parametrize("num_seqs", [1, 4, 16, 64])
def test_less_than_a_block_is_wasted_per_sequence(num_seqs):
    block_size = 16
    scheduler = make(2000 // block_size, block_size, seqs=num_seqs, tokens=256)
    world = World(scheduler)
    for id in range(2 * num_seqs):
        world.add(Request(prompt=1 + id * 37 % 90, new=1 + id * 53 % 70))
    pool = scheduler.groups[0].pool
    while scheduler.has_work:
        world.step()
        allocated = pool.num_used * block_size
        filled = sum(seq.num_computed_tokens for seq in scheduler.running)
        assert 0 <= allocated - filled <= (block_size - 1) * len(scheduler.running)
    world.run()


def test_sequences_that_gave_everything_back_share_nothing():
    """With a window of one token nothing is left to read before the last token is known."""
    world = World(make(num_blocks=4, block_size=1, window=1), depth=1)
    for _ in range(2):
        world.add(Request(prompt=1, new=2))
    for _ in range(3):
        world.step()
    world.run()


def test_check_finds_blocks_that_nobody_gave_back():
    scheduler = make()
    seq = sequence(0, 5)
    add(scheduler, seq)
    step(scheduler)
    seq.block_tables = [[]]
    with pytest.raises(AssertionError, match="1 references, 0 owners"):
        scheduler.check()


# -- a pool that may grow --


def make_elastic(num_blocks, limit, *, prefix_cache=False, grown=None, **options) -> Scheduler:
    """Notes in `grown` what the pool is made as large as; None there refuses."""
    group = CacheGroup(num_blocks, 4, limit=limit)

    def make_larger(index, num_blocks):
        if grown is not None:
            grown.append(num_blocks)
        return grown is not None

    return Scheduler(
        [group],
        max_num_seqs=8,
        max_num_batched_tokens=32,
        prefix_cache=PrefixCache([group]) if prefix_cache else None,
        make_larger=make_larger,
    )


def test_a_pool_grows_before_a_request_waits_and_by_half_at_least():
    grown = []
    scheduler = make_elastic(10, 100, grown=grown)
    add(scheduler, sequence(0, 30), sequence(1, 4))
    assert len(parts(step(scheduler))) == 2
    assert grown == [15]
    add(scheduler, sequence(2, 120))
    step(scheduler)
    assert grown == [15, 43], "9, 3 and 31: what they have, and a block each to grow"


def test_a_pool_grows_before_a_sequence_is_preempted():
    grown = []
    scheduler = make_elastic(4, 26, grown=grown)
    add(scheduler, sequence(0, 1), sequence(1, 1))
    while scheduler.has_work:
        assert not step(scheduler).preempted
    assert grown == [6, 9, 13, 19, 26]


def test_a_pool_does_not_grow_in_vain():
    grown = []
    scheduler = make_elastic(10, 20, grown=grown)
    add(scheduler, sequence(0, 30), sequence(1, 60, new=20))
    assert parts(step(scheduler)) == [(0, 0, 30)] and grown == []
    assert [seq.id for seq in scheduler.waiting] == [1]


def test_a_pool_that_cannot_grow_preempts_as_a_full_one_does():
    scheduler = make_elastic(14, 100)
    add(scheduler, sequence(0, 4), sequence(1, 4))
    assert [seq.id for seq in step_until_preemption(scheduler).preempted] == [1]
    assert scheduler.groups[0].pool.num_blocks == 14


@pytest.mark.parametrize("keeps_cached", [True, False])
def test_a_pool_grows_rather_than_lose_what_is_cached_unless_it_is_told(keeps_cached):
    grown = []
    scheduler = make_elastic(10, 100, prefix_cache=True, grown=grown)
    scheduler.blocks.keeps_cached = keeps_cached
    for id in (0, 1):
        add(scheduler, sequence(id, 24 + id, new=1))
        while scheduler.has_work:
            step(scheduler)
    pool = scheduler.groups[0].pool
    assert pool.num_free_cached == 7 and not grown
    add(scheduler, Sequence(2, [5] * 30, SamplingParams(), max_length=31))
    step(scheduler)
    assert grown == ([15] if keeps_cached else [])
    assert pool.num_evictions == (0 if keeps_cached else 5)


def test_capacity_is_what_a_pool_may_grow_to():
    scheduler = make_elastic(2, 20)
    assert scheduler.blocks.longest_sequence() == 80
    scheduler.limit_length(sequence(0, 30, new=50, max_tokens=50))
    with pytest.raises(InvalidRequest, match="need 21 blocks of 4 tokens; the pool holds 20"):
        scheduler.limit_length(sequence(0, 31, new=50, max_tokens=50))


def test_limits_in_which_a_sequence_could_never_end_are_refused():
    scheduler = make_elastic(20, 20)
    add(scheduler, sequence(0, 10, new=20, max_tokens=20), sequence(1, 8, new=30))
    step(scheduler)
    for limit, told in ((7, "room for 30 tokens; .* at most 28"), (2, "Give it more")):
        with pytest.raises(InvalidRequest, match=told):
            scheduler.set_limits([limit])
    assert scheduler.blocks.limits == [20]
    scheduler.set_limits([8])
    assert [seq.max_length for seq in scheduler.running] == [30, 32], "asked for, and not"


@pytest.mark.parametrize("pending", [0, 1])
@pytest.mark.parametrize("tokens", [11, 12, 13])
def test_what_may_end_at_any_time_ends_when_it_is_as_long_as_a_smaller_pool(tokens, pending):
    scheduler = make_elastic(20, 20)
    seq = sequence(0, 8)
    add(scheduler, seq)
    while len(seq.token_ids) < tokens:
        step(scheduler)
    plan = scheduler.schedule() if pending else None
    ended = scheduler.set_limits([3])
    scheduler.shrink([3])
    if plan:
        give(scheduler, plan)
    for _ in range(3):
        step(scheduler)
    assert not scheduler.has_work
    assert ended == ([seq] if tokens >= 12 else [])
    assert (len(seq.token_ids), seq.finish_reason) == (max(tokens, 12), "length")


def test_a_smaller_pool_is_refused_while_it_holds_no_token_of_a_request():
    scheduler = make_elastic(20, 20)
    add(scheduler, sequence(0, 12))
    plan = scheduler.schedule()
    with pytest.raises(InvalidRequest, match=r"room for 13 tokens; .* at most 12"):
        scheduler.set_limits([3])
    give(scheduler, plan)
    scheduler.set_limits([3])
    assert not scheduler.has_work


def test_what_may_end_at_any_time_is_made_to_fit_when_it_is_added():
    scheduler = make_elastic(10, 10)
    first, child, other = (sequence(id, 8) for id in range(3))
    first.forks = [child]
    add(scheduler, first)
    step(scheduler)
    scheduler.fork(first, other)
    assert [seq.max_length for seq in (first, child, other)] == [40] * 3
    other = sequence(3, 40)
    with pytest.raises(InvalidRequest, match="up to 1 new ones need 11 blocks"):
        scheduler.fork(first, other)


def test_who_is_in_the_way_of_a_smaller_pool_is_preempted_newest_first():
    scheduler = make_elastic(20, 20)
    add(scheduler, *(sequence(id, 8 + id, new=12) for id in range(3)))
    step(scheduler)
    (moves,) = scheduler.shrink([6])
    assert [seq.id for seq in scheduler.running] == [0, 1]
    assert scheduler.groups[0].pool.num_blocks == 6
    assert all(target <= 6 < source for source, target in moves)
    scheduler.check()
    scheduler.set_limits([6])
    while scheduler.has_work:
        step(scheduler)
