"""A generation branched while it runs: both go on as if the other weren't there."""

import functools
from dataclasses import replace

import pytest
import serving
import tiny_models
from hall.test_choices import TEXT, alone, events_of, sampled

from mlxpage.errors import InvalidRequest

PARAMS = sampled(seed=3)


@functools.cache
def tiny(family):
    return tiny_models.make(family)


def temperature(family):
    return 40 if family == "gemma3_text" else 4


def finish(engine):
    while engine.has_work:
        engine.step()
        engine.scheduler.check()


def branch(engine, request, params=None):
    events = []
    return engine.fork(request.id, params, events.append), events


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("num_blocks", [4096, 12])
@pytest.mark.parametrize("prompt", [15, 16, 61])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_fork_with_the_same_seed_goes_the_same_way(family, prompt, num_blocks, prefix_cache):
    params = replace(PARAMS, temperature=temperature(family), max_tokens=60)
    prompt = TEXT[:prompt]
    (expected,) = alone(tiny(family), prompt, params, 1)
    engine = serving.engine(tiny(family), num_blocks=num_blocks, prefix_cache=prefix_cache)
    request, events = events_of(engine, prompt, params)
    forks = []
    while engine.has_work:
        engine.step()
        engine.scheduler.check()
        if len(forks) < 6 and len(events) % 9 == 1 and events[-1].output is None:
            forks.append(branch(engine, request, params))
    outputs = [events[-1].output, *(events[-1].output for _, events in forks)]
    assert len(outputs) == 7
    assert [output.token_ids for output in outputs] == [expected.token_ids] * 7
    assert [output.text for output in outputs] == [expected.text] * 7
    assert [len(output.logprobs) for output in outputs] == [60] * 7
    assert engine.scheduler.groups[0].pool.num_used == 0


def test_a_fork_computes_one_token_again_and_shares_every_full_block():
    engine = serving.engine(tiny("llama"), prefix_cache=False)
    request, _ = events_of(engine, TEXT[:40], PARAMS)
    for _ in range(10):
        engine.step()
    pool = engine.scheduler.groups[0].pool
    before = pool.num_used
    rows = []
    start = engine._start
    engine._start = lambda schedule: rows.append(schedule.num_scheduled_tokens) or start(schedule)
    branch(engine, request)
    engine.step()
    assert rows == [2]
    assert pool.num_used == before + 1
    finish(engine)


def test_a_fork_without_params_has_another_seed():
    engine = serving.engine(tiny("llama"))
    request, events = events_of(engine, TEXT[:40], PARAMS)
    for _ in range(8):
        engine.step()
    known = [token for event in events for token in event.token_ids]
    _, others = branch(engine, request)
    finish(engine)
    first, second = events[-1].output, others[-1].output
    assert first.token_ids[: len(known)] == second.token_ids[: len(known)] == known
    assert first.token_ids != second.token_ids
    assert [token for event in others for token in event.token_ids] == second.token_ids[
        len(known) :
    ]
    assert len(second.token_ids) == PARAMS.max_tokens
    stats = engine.stats()
    assert stats["prompt_tokens"] == 40
    assert stats["output_tokens"] == len(known) + 2 * (PARAMS.max_tokens - len(known))


def test_the_end_of_one_does_not_end_the_other():
    (expected,) = alone(tiny("llama"), TEXT[:40], PARAMS, 1)
    for aborted in (0, 1):
        engine = serving.engine(tiny("llama"))
        request, events = events_of(engine, TEXT[:40], PARAMS)
        for _ in range(8):
            engine.step()
        fork, others = branch(engine, request, PARAMS)
        engine.step()
        engine.abort([request.id, fork.id][aborted])
        finish(engine)
        assert [events, others][aborted][-1].finish_reason == "abort"
        assert [others, events][aborted][-1].output.token_ids == expected.token_ids


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (replace(PARAMS, max_tokens=3), "max_tokens is 3 and the request has 8 tokens already"),
        (replace(PARAMS, n=2), "only a request with n=1"),
        (replace(PARAMS, stop=("\n", *map(chr, range(1, 256, 9)))), "holds a stop string already"),
    ],
)
def test_what_can_not_go_on_is_refused_and_nothing_is_left(params, message):
    engine = serving.engine(tiny("llama"))
    request, _ = events_of(engine, TEXT[:40], replace(PARAMS, logprobs=None))
    for _ in range(8):
        engine.step()
    with pytest.raises(InvalidRequest, match=message):
        branch(engine, request, replace(params, logprobs=None))
    with pytest.raises(InvalidRequest, match="logprobs only if"):
        branch(engine, request, PARAMS)
    assert engine.scheduler.running == [request.choices[0].seq]
    finish(engine)
    with pytest.raises(InvalidRequest, match="has ended or was never added"):
        branch(engine, request)


def test_a_request_without_a_token_is_not_forked():
    engine = serving.engine(tiny("llama"), max_num_batched_tokens=32)
    request, _ = events_of(engine, TEXT[:40], PARAMS)
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="still being computed; fork it after"):
            branch(engine, request)
        engine.step()
    branch(engine, request)
    finish(engine)
