"""The pool's size through the front door."""

import time

import pytest

from mlxpage import EngineError, InvalidRequest, OutOfMemory, SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
ELASTIC = {"num_blocks": None, "max_num_seqs": 8, "max_num_batched_tokens": 64}


def blocks(llm) -> dict[str, int]:
    return llm.stats()["blocks"]


def test_a_pool_starts_small_grows_is_trimmed_and_serves_on(make_llm):
    llm = make_llm(**ELASTIC, trim_after=None)
    start = blocks(llm)
    assert start["total"] == 68 < start["limit"] == max(llm.plan.num_blocks)
    prompts = [[token] * 200 for token in range(3, 11)]
    outputs = llm.generate(prompts, GREEDY)
    grown = llm.stats()
    assert 68 < grown["blocks"]["total"] <= start["limit"]
    active = grown["bytes"]["active"]
    given = llm.trim(cached=True)
    after = llm.stats()
    assert given == grown["bytes"]["pool"] - after["bytes"]["pool"] > 0
    assert abs(active - after["bytes"]["active"] - given) <= 0.1 * given
    assert after["blocks"]["total"] == 1 and after["resizes"]["shrunk"] == 1
    again = llm.generate(prompts, GREEDY)
    assert [output.token_ids for output in again] == [output.token_ids for output in outputs]


def test_a_budget_changes_while_generations_run(make_llm):
    llm = make_llm(**ELASTIC)
    long = SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)
    expected = llm.generate([[3] * 20, [4] * 20], long)
    need = llm.plan.weights + llm.plan.scratch
    streams = [llm.stream([token] * 20, long) for token in (3, 4)]
    for stream in streams:
        next(stream)
    before = llm.plan
    with pytest.raises(OutOfMemory):
        llm.set_memory(1000)
    assert llm.plan is before
    llm.set_memory(int(need * 0.9))
    assert llm.plan.budget == int(need * 0.9) and blocks(llm)["limit"] < max(before.num_blocks)
    for stream, output in zip(streams, expected, strict=True):
        *_, last = stream
        assert last.output.token_ids == output.token_ids
    llm.set_memory("50%")


def test_a_pool_is_planned_by_what_the_check_has_found(make_llm):
    llm = make_llm(**ELASTIC, memory="100MB")
    planned = llm.plan
    llm.set_memory("100MB")
    assert llm.plan == planned


def test_an_idle_engine_gives_empty_blocks_back_by_itself(make_llm):
    llm = make_llm(**ELASTIC, trim_after=0.2, prefix_cache=False)
    llm.generate([[token] * 200 for token in range(3, 11)], GREEDY)
    until = time.monotonic() + 30
    while llm.stats()["resizes"]["shrunk"] == 0:  # to ask isn't work
        assert time.monotonic() < until
        time.sleep(0.05)
    assert blocks(llm)["total"] == 68


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda llm: llm.set_memory("lots"), "memory is 'lots'"),
        (lambda llm: llm.set_memory(-1), "memory is -1"),
        (lambda llm: llm.set_memory("101%"), "this machine has"),
        (lambda llm: llm.trim(cached="yes"), "cached is 'yes'"),
    ],
)
def test_nonsense_is_refused_by_name(make_llm, call, told):
    llm = make_llm(**ELASTIC)
    with pytest.raises(InvalidRequest, match=told):
        call(llm)
    assert llm.generate("abc", GREEDY)


def test_a_pool_of_given_size_keeps_it(llm):
    assert llm.trim(cached=True) == 0 and blocks(llm)["total"] == 128
    with pytest.raises(InvalidRequest, match="128 blocks because num_blocks says so"):
        llm.set_memory("1GB")


def test_a_closed_engine_has_no_pool_to_change(make_llm):
    llm = make_llm(**ELASTIC)
    llm.close()
    for call in (llm.trim, lambda: llm.set_memory("1GB")):
        with pytest.raises(EngineError, match="closed"):
            call()
