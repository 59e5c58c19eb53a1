"""A step may be dispatched before the tokens of the last are read: it shows in nothing.

The reference backend waits for each step, because a step ahead of it would copy the pool; it is
right all the same, so here it looks ahead.
"""

import pytest
import serving
import tiny_models

from mlxpage.errors import EngineError, InvalidRequest
from mlxpage.metal import layer_cache, reference
from mlxpage.metal.backend import mx
from mlxpage.metal.model import Model
from mlxpage.sampling_params import SamplingParams


@pytest.fixture(params=["at once", "in stretches"], autouse=True)
def dispatched(request, monkeypatch):
    """How a step is: as a whole, or each layer by itself, the results of the step before read in
    the middle of it."""
    if request.param == "in stretches":
        monkeypatch.setattr(layer_cache, "_STRETCH", 1)
        monkeypatch.setattr(layer_cache, "_LEAST_OF_A_LAYER", 1)
        monkeypatch.setattr(layer_cache, "_STRETCHES_AHEAD", 1)
    return request.param


PROMPTS = [[7], list(range(15)), list(range(100)), list(range(50, 90)), [1, 2, 3], [9] * 33]
GREEDY = SamplingParams(temperature=0, max_tokens=24, logprobs=1)
MANY = [
    GREEDY,
    SamplingParams(temperature=1, seed=5, max_tokens=30, top_p=0.9, logprobs=0),
    SamplingParams(temperature=0, max_tokens=1),
    SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.4, presence_penalty=0.5),
    SamplingParams(temperature=1, seed=8, max_tokens=25, frequency_penalty=1.0, min_tokens=5),
    SamplingParams(temperature=0, max_tokens=9, prompt_logprobs=2),
]


@pytest.fixture(scope="module")
def model():
    return tiny_models.make("gpt_oss")


def run(model, monkeypatch, ahead, params, num_blocks=60, prompts=PROMPTS, chunk=32):
    monkeypatch.setattr(reference, "LOOK_AHEAD", ahead)
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": chunk}
    engine = serving.engine(model, num_blocks=num_blocks, **limits)
    outputs = serving.serve(engine, prompts, params)
    return engine, [
        (o.token_ids, o.text, o.finish_reason, o.logprobs, o.prompt_logprobs) for o in outputs
    ]


def same(model, monkeypatch, params, **options):
    _, waiting = run(model, monkeypatch, 0, params, **options)
    engine, ahead = run(model, monkeypatch, 1, params, **options)
    for ours, theirs in zip(ahead, waiting, strict=True):
        assert ours[:3] == theirs[:3]
        for entries, expected in zip(ours[3:], theirs[3:], strict=True):
            assert (entries is None) == (expected is None)
            for entry, other in zip(entries or (), expected or (), strict=True):
                assert (entry is None) == (other is None)
                if entry is not None:
                    assert entry.token_id == other.token_id
                    assert entry.logprob == pytest.approx(other.logprob, abs=1e-3)
    assert not engine.has_work
    return engine, ahead


def test_mixed_requests(model, monkeypatch):
    same(model, monkeypatch, MANY)


def test_a_crowded_pool(model, monkeypatch):
    params = SamplingParams(temperature=0, max_tokens=40)
    engine, _ = same(model, monkeypatch, params, num_blocks=9, prompts=PROMPTS[:2] + PROMPTS[4:])
    assert engine.scheduler.num_preemptions > 0


def test_generations_that_end_in_the_middle(model, monkeypatch):
    _, outputs = run(model, monkeypatch, 0, GREEDY)
    tokens, text = outputs[2][0], outputs[3][1]
    first = next(i for i, token in enumerate(tokens) if i > 1 and token not in tokens[:i])
    by_id = SamplingParams(temperature=0, max_tokens=24, stop_token_ids=(tokens[first],))
    by_text = SamplingParams(temperature=0, max_tokens=24, stop=text[4:7])
    _, ended = same(model, monkeypatch, [GREEDY, GREEDY, by_id, by_text, GREEDY, by_text])
    assert ended[2][0] == tokens[: first + 1] and ended[2][2] == "stop"
    assert ended[3][1] == text[: text.index(text[4:7])] and ended[3][2] == "stop"


def test_two_steps_are_in_flight_at_most_and_one_in_the_middle(model, monkeypatch, dispatched):
    monkeypatch.setattr(reference, "LOOK_AHEAD", 1)
    engine = serving.engine(model, num_blocks=60)
    flights, left = [], []
    start = engine._start

    def noting(schedule):
        flights.append(len(engine._in_flight))
        started = start(schedule)
        left.append(len(engine._in_flight))
        return started

    engine._start = noting
    serving.serve(engine, PROMPTS, GREEDY)
    assert flights[0] == 0 and set(flights[1:]) == {1}
    assert set(left[1:]) == ({0} if dispatched == "in stretches" else {1})


PENALTIES = {
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "repetition": {"repetition_penalty": 1.6},
    "a reward": {"presence_penalty": -1.0, "frequency_penalty": -0.5},
    "with biases": {"repetition_penalty": 1.3, "logit_bias": dict.fromkeys(range(0, 256, 3), 1.5)},
    "with a forbidden end": {
        "presence_penalty": 2.0,
        "stop_token_ids": (40, 41, 42),
        "min_tokens": 12,
    },
    "all": {"presence_penalty": 0.4, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("which", PENALTIES)
def test_penalties_count_the_token_that_nobody_has_read(model, monkeypatch, which, temperature):
    params = [
        SamplingParams(temperature=temperature, seed=i, max_tokens=40, **PENALTIES[which])
        for i in range(len(PROMPTS) - 1)
    ]
    _, outputs = same(model, monkeypatch, [*params, GREEDY])
    _, without = run(model, monkeypatch, 0, SamplingParams(temperature=0, max_tokens=40))
    assert temperature or [o[0] for o in outputs] != [o[0] for o in without]


def follow(engine, prompts, params, on_step=lambda steps, ids: None):
    """Runs requests of which some may fail: the tokens, or the error, of each."""
    ends = [None] * len(prompts)
    ids = []
    for index, prompt in enumerate(prompts):

        def take(event, index=index):
            if event.error is not None:
                ends[index] = event.error
            elif event.output is not None and ends[index] is None:
                ends[index] = event.output.token_ids

        ids.append(engine.add(engine.request(prompt, params, take)))
    steps = 0
    while engine.has_work:
        engine.step()
        engine.scheduler.check()
        steps += 1
        on_step(steps, ids)
        assert steps < 10_000
    assert all(group.pool.num_used == 0 for group in engine.scheduler.groups)
    return ends


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 13, 21])
def test_a_step_that_raises_while_another_is_in_flight_fails_its_own_requests(
    model, monkeypatch, at
):
    _, expected = run(model, monkeypatch, 0, GREEDY)
    monkeypatch.setattr(reference, "LOOK_AHEAD", 1)
    call, calls = Model.__call__, iter(range(1, 10**6))

    def flaky(*arguments):
        if next(calls) == at:
            raise RuntimeError("injected")
        return call(*arguments)

    engine = serving.engine(model, num_blocks=60, max_num_seqs=2, max_num_batched_tokens=32)
    monkeypatch.setattr(Model, "__call__", flaky)
    ends = follow(engine, PROMPTS, GREEDY)
    failed = [end for end in ends if isinstance(end, Exception)]
    assert 1 <= len(failed) <= 2 and all("injected" in str(error) for error in failed)
    for end, (tokens, *_) in zip(ends, expected, strict=True):
        assert isinstance(end, Exception) or end == tokens


@pytest.mark.parametrize("at", [1, 4, 9, 27])  # in the step after 27 a request joins
def test_results_that_cannot_be_read_fail_both_steps_in_flight(model, monkeypatch, at):
    _, expected = run(model, monkeypatch, 0, GREEDY)
    monkeypatch.setattr(reference, "LOOK_AHEAD", 1)
    engine = serving.engine(model, num_blocks=60, max_num_seqs=2, max_num_batched_tokens=32)
    record, calls = engine._record, iter(range(1, 10**6))

    def broken(started):
        if next(calls) == at:
            raise RuntimeError("the GPU is gone")
        return record(started)

    engine._record = broken
    ends = follow(engine, PROMPTS, GREEDY)
    failed = [end for end in ends if isinstance(end, Exception)]
    assert failed and all(str(e) == "a step failed: RuntimeError: the GPU is gone" for e in failed)
    for end, (tokens, *_) in zip(ends, expected, strict=True):
        assert isinstance(end, Exception) or end == tokens


@pytest.mark.parametrize("name", ["async_eval", "eval"])
@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 13, 21])
def test_an_evaluation_that_raises_in_the_middle_fails_its_own_requests(
    model, monkeypatch, name, at, dispatched
):
    _, expected = run(model, monkeypatch, 0, GREEDY)
    monkeypatch.setattr(reference, "LOOK_AHEAD", 1)
    engine = serving.engine(model, num_blocks=60, max_num_seqs=2, max_num_batched_tokens=32)
    real, calls = getattr(mx, name), iter(range(1, 10**6))
    go_on, is_going_on = layer_cache.Forward.go_on, []

    def going_on(*arguments):
        is_going_on.append(True)
        go_on(*arguments)
        is_going_on.pop()

    def flaky(*arrays):
        if is_going_on and next(calls) == at:
            raise RuntimeError("injected")
        return real(*arrays)

    monkeypatch.setattr(layer_cache.Forward, "go_on", going_on)
    monkeypatch.setattr(mx, name, flaky)
    ends = follow(engine, PROMPTS, GREEDY)
    failed = [end for end in ends if isinstance(end, Exception)]
    assert (1 if dispatched == "in stretches" else 0) <= len(failed) <= 2
    assert all("injected" in str(error) for error in failed)
    for end, (tokens, *_) in zip(ends, expected, strict=True):
        assert isinstance(end, Exception) or end == tokens


def test_a_pool_keeps_its_size_while_a_step_is_built_over_it(model, monkeypatch, dispatched):
    monkeypatch.setattr(reference, "LOOK_AHEAD", 1)
    engine = serving.engine(model, num_blocks=60)
    told, seen = [], []
    monkeypatch.setattr(engine.pool, "grow", lambda *_, in_flight: seen.append(in_flight))

    def resize(event):
        engine._make_larger(0, 70)  # as a fork may
        for change in (engine.trim, lambda: engine.set_memory("50%")):
            with pytest.raises((EngineError, InvalidRequest)) as raised:
                change()
                raise InvalidRequest("num_blocks says so")  # what trim does silently
            told.append(str(raised.value))

    engine.add(engine.request(PROMPTS[2], SamplingParams(max_tokens=9, temperature=0), resize))
    while engine.has_work:
        engine.step()
    refused = ["between two steps" in why for why in told]
    assert len(told) == 18 and model.cache._forward.before_waiting is None
    # The last token comes when there is nothing more to build.
    assert seen == [True] * 8 + [False]
    assert refused == [dispatched == "in stretches"] * 16 + [False] * 2
    assert engine.stats()["failed_steps"] == 0
    engine.close()


@pytest.mark.parametrize("at", range(1, 8))
def test_a_request_that_is_aborted_in_flight_leaves_the_others_alone(model, monkeypatch, at):
    _, expected = run(model, monkeypatch, 0, GREEDY)
    monkeypatch.setattr(reference, "LOOK_AHEAD", 1)
    engine = serving.engine(model, num_blocks=60, max_num_seqs=4, max_num_batched_tokens=32)
    ends = follow(
        *(engine, PROMPTS, GREEDY), lambda steps, ids: engine.abort(ids[1]) if steps == at else None
    )
    for index, (end, (tokens, *_)) in enumerate(zip(ends, expected, strict=True)):
        assert end == tokens or (index == 1 and end == tokens[: len(end)])
