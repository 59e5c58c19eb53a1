"""Several generations of one prompt: each is what its seed gives alone, the prompt exists once."""

import functools
from dataclasses import replace

import numpy as np
import prose
import pytest
import serving
import tiny_models

from mlxpage.errors import InvalidRequest
from mlxpage.sampling_params import SamplingParams

TEXT = list(prose.text().encode("ascii", "replace"))


@functools.cache
def tiny(family):
    return tiny_models.make(family)


def prompts(count, seed=0):
    return prose.prompts(count, 1, 90, TEXT, np.random.default_rng(seed))


def sampled(temperature=4, **options):
    return SamplingParams(temperature=temperature, max_tokens=24, logprobs=0, **options)


def each(output):
    return [output, *output.choices]


def alone(model, prompt, params, count):
    """What `count` requests with the seeds of the choices give, one after another."""
    engine = serving.engine(model, prefix_cache=False)
    singly = (replace(params, seed=params.seed + index, n=1) for index in range(count))
    return [serving.serve(engine, [prompt], one)[0] for one in singly]


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("num_blocks", [4096, 10])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_a_choice_is_what_its_seed_gives_alone(family, num_blocks, prefix_cache):
    model = tiny(family)
    # Some are so sure of themselves that they say the same again.
    params = sampled(temperature=40 if family == "gemma3_text" else 4, seed=5, n=4)
    wanted = [[out.token_ids for out in alone(model, p, params, 4)] for p in prompts(5)]
    limits = {"num_blocks": num_blocks, "max_num_seqs": 6, "max_num_batched_tokens": 40}
    engine = serving.engine(model, prefix_cache=prefix_cache, **limits)
    outputs = serving.serve(engine, prompts(5), params)
    assert [[choice.token_ids for choice in each(out)] for out in outputs] == wanted
    assert [len({tuple(tokens) for tokens in of_prompt}) for of_prompt in wanted] == [4] * 5
    if num_blocks == 10:
        assert engine.scheduler.num_preemptions > 0


def test_the_prompt_is_computed_once_and_its_full_blocks_exist_once():
    engine = serving.engine(tiny("llama"), prefix_cache=False, max_num_seqs=8)
    rows, used = [], []
    start = engine._start
    engine._start = lambda schedule: rows.append(schedule.num_scheduled_tokens) or start(schedule)
    prompt = TEXT[:70]  # four full blocks and six tokens
    pool = engine.scheduler.groups[0].pool
    (output,) = serving.serve(
        engine, [prompt], sampled(n=8), on_step=lambda _: used.append(pool.num_used)
    )
    assert rows[:3] == [70, 8, 8], "the seven others computed the last token of it again"
    assert used[1] == 4 + 8
    assert [choice.num_cached_tokens for choice in each(output)] == [0] + [69] * 7


def test_the_likeliest_on_average_are_the_best():
    model = tiny("llama")
    (prompt,) = prompts(2)[1:]
    ranked = sorted(
        alone(model, prompt, sampled(seed=1), 6),
        key=lambda out: -np.mean([entry.logprob for entry in out.logprobs]),
    )
    engine = serving.engine(model)
    given = SamplingParams(temperature=4, max_tokens=24, seed=1, n=2, best_of=6)
    (output,) = serving.serve(engine, [prompt], given)
    assert [out.token_ids for out in each(output)] == [out.token_ids for out in ranked[:2]]
    assert output.logprobs is None, "nobody asked"


def events_of(engine, prompt, params, on_event=lambda event: None):
    events = []
    request = engine.request(prompt, params, lambda e: (events.append(e), on_event(e)))
    engine.add(request)
    return request, events


def test_events_say_which_choice_they_are_of_and_the_last_one_brings_everything():
    engine = serving.engine(tiny("llama"))
    _, events = events_of(engine, TEXT[:20], sampled(n=3, prompt_logprobs=0))
    while engine.has_work:
        engine.step()
    (output,) = [event.output for event in events if event.output is not None]
    assert events[-1].output is output
    for index, choice in enumerate(each(output)):
        of_choice = [event for event in events if event.choice == index]
        assert [t for event in of_choice for t in event.token_ids] == choice.token_ids
        assert "".join(event.text for event in of_choice) == choice.text
        assert [event.finish_reason for event in of_choice if event.finish_reason] == ["length"]
        assert len(choice.logprobs) == 24
        assert len(choice.prompt_logprobs) == 20
    stats = engine.stats()
    assert (stats["prompt_tokens"], stats["output_tokens"]) == (20, 72)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_abort_ends_all_choices(steps):
    engine = serving.engine(tiny("llama"), max_num_batched_tokens=32)
    request, events = events_of(engine, TEXT[:60], sampled(n=3))
    for _ in range(steps):
        engine.step()
    engine.abort(request.id)
    assert not engine.has_work
    engine.scheduler.check()
    assert engine.scheduler.groups[0].pool.num_used == 0
    assert [event.finish_reason for event in events[-3:]] == ["abort"] * 3
    assert [event.output is not None for event in events[-3:]] == [False, False, True]


def test_a_step_that_fails_ends_all_choices_and_no_other_request():
    engine = serving.engine(tiny("llama"), max_num_batched_tokens=60)
    _, broken = events_of(engine, TEXT[:60], sampled(n=3))
    _, waiting = events_of(engine, TEXT[:60], sampled(n=3))
    model, engine.model = engine.model, None  # whatever is computed now raises
    schedule = engine.scheduler.schedule()
    try:
        engine._start(schedule)
    except AttributeError as error:
        engine.model = model
        engine._fail([schedule], error)
    assert [event.finish_reason for event in broken] == ["abort"] * 3
    assert all("a step failed" in str(event.error) for event in broken)
    while engine.has_work:
        engine.step()
        engine.scheduler.check()
    assert waiting[-1].output.finish_reason == "length" and len(waiting[-1].output.choices) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0; it must be from 1 to 128"),
        ({"n": 129}, "n is 129"),
        ({"n": 3, "best_of": 2}, "best_of is 2; it must be from 3 to 128"),
        ({"n": True}, "n must be an integer"),
    ],
)
def test_impossible_counts_are_refused(options, message):
    with pytest.raises(InvalidRequest, match=message):
        SamplingParams(**options)
