"""What an engine does with requests that a step can't serve."""

import random
import warnings
from types import SimpleNamespace

import pytest
import serving
import tiny_models

from mlxpage.disk_tier import DiskTier
from mlxpage.errors import EngineError
from mlxpage.metal.backend import mx
from mlxpage.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=8)


def test_a_request_whose_numbers_overflow_fails_alone_and_names_the_way_out():
    model = tiny_models.make("llama", dtype=mx.float16, tie_word_embeddings=False)
    embedding = model.module.model.embed_tokens
    embedding.weight[7] = float("inf")
    expected = serving.serve(serving.engine(model), [[1, 2, 3], [4, 5]], GREEDY)

    engine = serving.engine(model, num_blocks=8)
    events = {}
    for name, prompt in {"sound": [1, 2, 3], "broken": [6, 7], "next": [4, 5]}.items():
        request = engine.request(
            prompt, GREEDY, lambda event, name=name: events.setdefault(name, []).append(event)
        )
        engine.add(request)
    while engine.has_work:
        engine.step()
        engine.scheduler.check()
    error = events["broken"][-1].error
    with pytest.raises(
        EngineError, match=r"not finite after 2 tokens; computed in float16.*dtype="
    ):
        raise error
    assert events["broken"][-1].output.token_ids == []
    for name, output in zip(("sound", "next"), expected, strict=True):
        assert events[name][-1].output.token_ids == output.token_ids
    assert all(group.pool.num_used == 0 for group in engine.scheduler.groups)


def test_who_hears_of_a_request_may_abort_another():
    model = tiny_models.make("llama")
    engine = serving.engine(model, num_blocks=20)
    ends = {}
    ids = []

    def first(event):
        engine.abort(ids[1])
        ends[0] = event.output

    def second(event):
        ends[1] = event.output

    for take in (first, second):
        ids.append(engine.add(engine.request([1, 2, 3], GREEDY, take)))
    while engine.has_work:
        engine.step()
        engine.scheduler.check()
    assert ends[0].finish_reason == "length" and len(ends[0].token_ids) == 8
    assert ends[1].finish_reason == "abort"
    assert engine.stats()["failed_steps"] == 0


def test_a_closed_engine_leaves_nothing_in_its_model():
    model = tiny_models.make("llama")
    engine = serving.engine(model, num_blocks=20)
    serving.serve(engine, [[1, 2, 3]], GREEDY)
    compiled = model._compiled
    engine.close()
    assert model.cache is None
    assert model._compiled is not compiled, "its functions hold the model"
    engine.close()


def test_a_tier_that_stops_reading_does_not_raise_where_warnings_are_errors():
    tier = DiskTier(SimpleNamespace(folder="blocks"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tier.stop_reading(RuntimeError("no way in"))


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(n, marks=pytest.mark.full) for n in range(4, 100))]
)
def test_a_prompt_aborted_in_its_middle_goes_on_from_there(seed):
    rng = random.Random(seed)
    model = tiny_models.make("llama")
    engine = serving.engine(
        model, num_blocks=64, max_num_seqs=1, max_num_batched_tokens=rng.choice([16, 40, 64])
    )
    prompt = [rng.randrange(1, 60) for _ in range(rng.randrange(200, 500))]
    (expected,) = serving.serve(serving.engine(model), [prompt], GREEDY)
    told = []
    request = engine.request(prompt, GREEDY, lambda event: None)
    request.on_progress = told.append
    engine.add(request)
    least = rng.randrange(48, 190)
    while not told or told[-1].num_computed_tokens < least:
        engine.step()
    computed = told[-1].num_computed_tokens
    engine.abort(request.id)
    engine.step()
    engine.scheduler.check()
    assert all(group.pool.num_used == 0 for group in engine.scheduler.groups)
    (output,) = serving.serve(engine, [prompt], GREEDY)
    assert output.num_cached_tokens >= computed // 16 * 16
    assert output.token_ids == expected.token_ids
