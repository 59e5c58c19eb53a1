"""The chunk of a prompt beside which others get their next tokens in time."""

import pytest
import tiny_models
from serving import engine, serve

from mlxpage.pace import LEAST, START, Pace
from mlxpage.sampling_params import SamplingParams
from mlxpage.scheduler import Schedule, Scheduled


def mixed(chunk: int, waiting: int = 2) -> Schedule:
    """A step with a chunk of a prompt, beside the next tokens of others."""
    parts = [Scheduled(None, 0, chunk, False)] if chunk else []
    parts += [Scheduled(None, 50, 1, True)] * waiting
    return Schedule(parts, num_scheduled_tokens=chunk + waiting)


def settled(pace: Pace, per_token: float, base: float = 0.0, steps: int = 100) -> list[float]:
    """The seconds of the last steps, on a machine that takes so long."""
    seconds = []
    for _ in range(steps):
        chunk = pace.chunk(2)
        seconds.append(base + per_token * chunk)
        pace.note(mixed(chunk), seconds[-1])
    return seconds[-20:]


@pytest.mark.parametrize("per_token", [1e-4, 5e-4, 2e-3])
def test_steps_come_to_take_about_as_long_as_they_may_and_no_longer(per_token):
    last = settled(Pace(0.1, 2048), per_token, base=0.02)
    assert min(last) > 0.06 and max(last) <= 0.1


def test_a_slower_machine_is_followed_and_a_faster_one_again():
    pace = Pace(0.1, 2048)
    settled(pace, 1e-4)
    fast = pace.chunk(2)
    settled(pace, 1e-3)
    assert pace.chunk(2) < fast / 5
    settled(pace, 1e-4)
    assert pace.chunk(2) > fast / 2


def test_prompts_go_on_where_nothing_is_in_time():
    pace = Pace(0.001, 512)
    settled(pace, 1.0)
    assert pace.chunk(2) == LEAST


def test_the_budget_of_a_step_is_the_most():
    pace = Pace(1.0, 100)
    settled(pace, 1e-9)
    assert pace.chunk(2) == 100


def test_what_nobody_waits_for_and_steps_without_a_chunk_tell_nothing():
    pace = Pace(0.1, 512)
    before = pace.chunk(2)
    pace.note(mixed(400, waiting=0), 60.0)
    pace.note(mixed(0), 60.0)
    pace.note(mixed(before // 2), 0.01)  # room that wasn't used
    assert pace.chunk(2) == before


@pytest.mark.parametrize("per_token", [1e-4, 5e-4, 2e-3])
@pytest.mark.parametrize("alone", [0.05, 0.2])
def test_left_to_itself_a_step_takes_up_to_three_times_as_long_as_without_a_chunk(per_token, alone):
    last = settled(Pace(None, 4096), per_token, base=alone)
    assert 1.7 * alone < max(last) <= 3 * alone


def look(pace: Pace, waiting: int, seconds: float) -> None:
    """Steps without a chunk, until it knows how long they take."""
    for _ in range(3):
        assert pace.chunk(waiting) == 0
        pace.note(mixed(0, waiting=waiting), seconds)
    assert pace.chunk(waiting) > 0


def test_it_looks_first_how_long_steps_take_without_a_chunk():
    pace = Pace(None, 512)
    look(pace, 8, 0.1)
    assert pace.chunk(8) == START and pace.chunk(9) == START


def test_prompts_go_on_while_others_keep_coming_and_going():
    pace = Pace(None, 512)
    chunks = []
    for waiting in [1, 2] * 20:
        chunks.append(pace.chunk(waiting))
        pace.note(mixed(chunks[-1], waiting=waiting), 0.1)
    assert [chunk > 0 for chunk in chunks[:18]] == [*[False] * 8, True] * 2


def test_a_prompt_of_one_token_beside_another_tells_nothing():
    pace = Pace(None, 512)
    pace.note(mixed(400, waiting=1), 1.0)
    assert pace.chunk(1) == 0


def test_an_engine_begins_with_prompts_of_one_token_and_longer_ones():
    params = SamplingParams(temperature=0, max_tokens=5)
    made = engine(tiny_models.make("llama"), max_inter_token_ms="auto")
    outputs = serve(made, [[5], list(range(5, 45)), [6, 7]], params)
    assert [len(output.token_ids) for output in outputs] == [5, 5, 5]


def test_it_looks_again_when_others_have_come_or_gone():
    pace = Pace(None, 512)
    look(pace, 8, 0.1)
    assert pace.chunk(4) == 0
    look(pace, 16, 0.2)
    assert pace.chunk(8) == 0
    pace.note(mixed(START, waiting=16), 0.45)  # too long for what 8 take
    assert pace.chunk(16) == START


def test_it_looks_again_when_steps_may_have_become_slower():
    pace = Pace(None, 4096)
    last = settled(pace, 1e-3, base=0.1)
    slower = settled(pace, 1e-3, base=0.4, steps=200)
    assert max(last) <= 0.3 and 0.7 < max(slower) <= 1.2


def test_a_step_that_something_else_has_slowed_down_lets_no_chunk_be_larger():
    pace = Pace(None, 4096)
    for seconds in (5.0, 0.1, 0.1):
        pace.note(mixed(0), seconds)
    assert max(settled(pace, 1e-3, base=0.1)) <= 0.3


def test_chunks_that_end_with_a_block_grow_too():
    pace = Pace(0.1, 512)
    for _ in range(40):
        pace.note(mixed(max(16, pace.chunk(2) // 16 * 16)), 0.01)
    assert pace.chunk(2) == 512


def test_an_engine_that_keeps_a_pace_computes_in_smaller_chunks_and_gives_the_same_tokens():
    prompts = [[5 + n] * 3 for n in range(2)] + [list(range(5, 125))]
    params = SamplingParams(temperature=0, max_tokens=30)

    def run(**options):
        chunks = []
        made = engine(tiny_models.make("llama"), max_num_batched_tokens=256, **options)
        real = made.scheduler.schedule

        def schedule():
            plan = real()
            chunks.append(max((part.num_tokens for part in plan.scheduled), default=0))
            return plan

        made.scheduler.schedule = schedule
        outputs = serve(made, prompts[:2], params)
        made.add(made.request(prompts[0], params, lambda event: None))
        made.step()
        chunks.clear()
        return outputs + serve(made, prompts[2:], params), chunks

    free, large = run()
    paced, small = run(max_inter_token_ms=1e-6)
    by_itself, looked = run(max_inter_token_ms="auto")
    expected = [output.token_ids for output in free]
    assert [output.token_ids for output in paced] == expected
    assert [output.token_ids for output in by_itself] == expected
    assert max(large) > 100
    assert small[0] == START and max(small[1:]) == LEAST
    assert looked[:3] == [1, 1, 1] and 1 < max(looked) < 120  # alone, then beside a chunk
