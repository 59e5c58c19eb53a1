"""A pool that grows and shrinks under load: same tokens, nothing lost, no memory beyond a layer."""

import functools
import itertools
import random
import warnings
from dataclasses import replace

import pytest
import serving
import tiny_models

from mlxpage.engine import Engine
from mlxpage.errors import EngineError, InvalidRequest, OutOfMemory
from mlxpage.metal import memory, reference
from mlxpage.metal.backend import mx
from mlxpage.metal.kv_cache import KVCache
from mlxpage.metal.layout import Pool, group_kinds
from mlxpage.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=40)


@functools.cache
def tiny(family):
    return tiny_models.make(family, vocab_size=128)


def engine(model, limit=400, start=10, **limits) -> Engine:
    return serving.elastic_engine(model, start=start, num_blocks=limit, **limits)


def tokens(outputs) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def expected(family, params=GREEDY, **limits) -> list[list[int]]:
    """What `prompts` give in a pool of a fixed size. Before another engine takes the model."""
    return tokens(serving.serve(serving.engine(tiny(family), **limits), prompts(), params))


def prompts(count=24, longest=120) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(128) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def largest_array(engine) -> int:
    return max(array.nbytes for array in engine.model.cache.arrays())


def held(engine) -> int:
    """Bytes of the blocks that the groups count."""
    plan, specs = engine.plan, engine.model.specs
    return memory._pool_bytes(specs, engine.pool.num_blocks, plan.block_size)


class Resizer:
    """Grows and shrinks an engine's pool by turns, and watches what it costs."""

    def __init__(self, engine, every: int = 4):
        self.engine, self.every = engine, every  # steps
        self.steps = itertools.count(1)
        self.worst = 0.0
        self.returned = []

    def __call__(self, engine) -> None:
        step = next(self.steps)
        if step % self.every:
            return
        if step // self.every % 2:
            for index, group in enumerate(engine.scheduler.groups):
                if group.pool.num_to_come:
                    self.watch(lambda i=index: engine.scheduler.blocks.enlarge(i, 2**30))
        else:
            self.watch(lambda: engine.trim(cached=step // self.every % 4 == 2))
        engine.scheduler.check()
        assert engine.model.cache.num_blocks == engine.pool.num_blocks

    def watch(self, resize) -> None:
        mx.clear_cache()
        before = mx.get_active_memory()
        sizes, arrays = [held(self.engine)], [largest_array(self.engine)]
        mx.reset_peak_memory()
        given = resize()
        peak = mx.get_peak_memory() - before + sizes[0]
        sizes.append(held(self.engine))
        arrays.append(largest_array(self.engine))
        # An array of the larger pool is there beside the same one of the smaller.
        self.worst = max(self.worst, (peak - max(sizes)) / min(arrays))
        if given is not True:
            freed = before - mx.get_active_memory()
            assert abs(freed - given) <= 0.1 * given
            assert mx.get_cache_memory() <= 0.1 * max(arrays), "MLX keeps it"
            self.returned.append(given)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("limit", [400, pytest.param(None, marks=pytest.mark.full)])
def test_a_pool_grows_and_shrinks_20_times_under_load_at_the_cost_of_an_array(family, limit):
    """The full form has a pool of 2 GB."""
    model = tiny(family)
    if limit is None:
        block = memory._pool_bytes(model.specs, [0] * len(group_kinds(model.specs)), 16)
        limit = 2 * 10**9 // block
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
    params = replace(GREEDY, max_tokens=60)
    fixed = expected(family, params, **limits)
    elastic = engine(model, limit, **limits)
    resizer = Resizer(elastic)
    served = serving.serve(elastic, prompts(), params, on_step=resizer)
    assert tokens(served) == fixed
    resizes = elastic.stats()["resizes"]
    print(f"{resizes}, at most {resizer.worst:.2f} arrays beside the pool")
    assert resizes["grown"] >= 20 and resizes["shrunk"] >= 20
    assert resizer.worst <= 1.1
    assert sum(resizer.returned) > 0


def test_a_pool_grows_before_anybody_waits_is_preempted_or_loses_what_is_cached():
    served = engine(tiny("llama"))
    most = 0

    def watch(served):
        nonlocal most
        most = max(most, len(served.scheduler.running))

    serving.serve(served, prompts(), GREEDY, on_step=watch)
    serving.serve(served, [[token] * 100 for token in range(10)], GREEDY, on_step=watch)
    stats = served.stats()
    assert stats["preemptions"] == stats["prefix_cache"]["evictions"] == 0
    assert most == 24
    assert 10 < stats["blocks"]["total"] < stats["blocks"]["limit"] == 400
    assert stats["bytes"]["pool"] == held(served) < served.plan.pool
    assert 1 <= stats["resizes"]["grown"] <= 10, "by more than is needed at the moment"


def test_a_fixed_pool_stays_as_it_is():
    served = serving.engine(tiny("llama"), num_blocks=50)
    serving.serve(served, prompts(4), GREEDY)
    assert served.trim(cached=True) == 0
    assert served.stats()["blocks"]["total"] == 50
    with pytest.raises(InvalidRequest, match="50 blocks because num_blocks says so"):
        served.set_memory("1GB")


def test_trim_keeps_what_is_cached_until_it_is_asked_for():
    served = engine(tiny("llama"))
    serving.serve(served, prompts(), GREEDY)
    cached = served.stats()["blocks"]["cached"]
    assert served.trim() > 0 and served.trim() == 0
    blocks = served.stats()["blocks"]
    assert (blocks["cached"], blocks["free"]) == (cached, 10)
    again = serving.serve(served, prompts(), GREEDY)
    assert sum(output.num_cached_tokens for output in again) > 0.8 * sum(map(len, prompts()))
    served.trim(cached=True)
    assert served.stats()["blocks"]["total"] == 1
    assert tokens(serving.serve(served, prompts(), GREEDY)) == tokens(again)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_bytes_in_use_at_most_do_not_depend_on_what_became_of_the_pool(family):
    served = engine(tiny(family))
    most = 0

    def watch(served):
        nonlocal most
        plan, specs = served.plan, served.model.specs
        used = [group.pool.num_used for group in served.scheduler.groups]
        null = memory._pool_bytes(specs, [0] * len(used), plan.block_size)
        most = max(most, memory._pool_bytes(specs, used, plan.block_size) - null)

    serving.serve(served, prompts(3), replace(GREEDY, max_tokens=2), on_step=watch)
    peak = served.stats()["bytes"]["pool_peak_used"]
    assert 0 < most <= peak <= served.stats()["bytes"]["pool"]
    served.trim(cached=True)
    assert served.stats()["bytes"]["pool_peak_used"] == peak


# -- another budget --


def budget(served, blocks: int) -> int:
    """That allows so many blocks."""
    scheduler = served.scheduler
    plan = memory.plan(
        served.model,
        num_blocks=blocks,
        max_num_seqs=scheduler.max_num_seqs,
        max_num_batched_tokens=scheduler.max_num_batched_tokens,
    )
    return plan.weights + plan.scratch + plan.pool


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_smaller_budget_takes_cached_blocks_then_preempts_and_all_end_the_same(family):
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
    fixed = expected(family, **limits)
    served = engine(tiny(family), **limits)
    steps = itertools.count()

    def shrink(served):
        if next(steps) == 40:
            before = served.stats()
            assert before["running"] >= 6 and before["blocks"]["cached"]
            served.set_memory(budget(served, 24))
            after = served.stats()
            assert after["blocks"]["total"] == after["blocks"]["limit"] < before["blocks"]["used"]
            assert after["bytes"]["pool"] == held(served) < before["bytes"]["pool"]
            assert after["bytes"]["pool"] == served.plan.pool
            assert after["preemptions"] and after["running"]

    outputs = serving.serve(served, prompts(), GREEDY, on_step=shrink)
    assert tokens(outputs) == fixed
    served.set_memory(budget(served, 300))
    assert served.stats()["blocks"]["limit"] > 250 > served.stats()["blocks"]["total"]


def test_a_budget_in_which_a_request_could_never_end_is_refused_and_changes_nothing():
    served = engine(tiny("llama"), max_num_seqs=4, max_num_batched_tokens=64)
    small = budget(served, 20)
    outputs = []
    served.add(served.request([1] * 100, replace(GREEDY, max_tokens=900), outputs.append))
    for _ in range(3):
        served.step()
    plan, stats = served.plan, served.stats()["blocks"]
    with pytest.raises(InvalidRequest, match=r"1,000 tokens; .* at most [34]\d\d\. Give it more"):
        served.set_memory(small)
    for nonsense in ("lots", -1, True, "200%", []):
        with pytest.raises(InvalidRequest, match="memory is"):
            served.set_memory(nonsense)
    with pytest.raises(OutOfMemory, match="the budget is"):
        served.set_memory(1000)
    assert served.plan is plan and served.stats()["blocks"] == stats
    served.abort_all()
    served.set_memory(small)


def test_a_request_without_max_tokens_ends_where_the_smaller_pool_does():
    served = engine(tiny("llama"), max_num_seqs=4, max_num_batched_tokens=64)
    events = []
    served.add(served.request([1] * 100, SamplingParams(temperature=0), events.append))
    for _ in range(3):
        served.step()
    served.set_memory(budget(served, 20))
    longest = served.scheduler.blocks.longest_sequence()
    for _ in range(longest):
        served.step()
    assert not served.has_work
    assert events[-1].finish_reason == "length"
    assert 100 + len(events[-1].output.token_ids) == longest < 400


def test_a_trimmed_pool_keeps_the_room_to_begin_with_of_its_last_budget():
    served = engine(tiny("llama"), max_num_seqs=4, max_num_batched_tokens=64)
    served.set_memory(budget(served, 300))
    serving.serve(served, prompts(), GREEDY)
    served.scheduler.prefix_cache.clear()
    for blocks in (300, 30):
        served.set_memory(budget(served, blocks))
        served.trim()
        assert served.stats()["blocks"]["total"] == max(served.plan.start) != 10


@pytest.mark.parametrize("look_ahead", [0, 1])
@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_a_request_without_max_tokens_that_is_too_long_for_a_smaller_pool_ends_at_once(
    monkeypatch, beyond, look_ahead
):
    monkeypatch.setattr(reference, "LOOK_AHEAD", look_ahead)
    served = engine(tiny("llama"), max_num_seqs=4, max_num_batched_tokens=64)
    small = budget(served, 20)
    longest = memory.plan(
        served.model, memory=small, max_num_seqs=4, max_num_batched_tokens=64
    ).tokens
    events = []
    request = served.request([1] * 100, SamplingParams(temperature=0, n=2), events.append)
    served.add(request)
    while len(request.choices[1].seq.token_ids) < longest + beyond:
        served.step()
    served.set_memory(small)
    for _ in range(5):
        served.step()
        served.scheduler.check()
    assert not served.has_work
    assert [event.finish_reason for event in events if event.finish_reason] == ["length"] * 2
    output = events[-1].output
    for choice, each in enumerate([output, *output.choices]):
        told = [token for event in events if event.choice == choice for token in event.token_ids]
        assert told == each.token_ids
        assert longest <= 100 + len(each.token_ids) <= longest + max(1, beyond + 1)


def test_a_request_made_before_the_pool_got_smaller_can_be_added_after():
    served = engine(tiny("llama"), max_num_seqs=4, max_num_batched_tokens=64)
    events = []
    request = served.request([1] * 30, SamplingParams(temperature=0, n=2), events.append)
    served.set_memory(budget(served, 20))
    served.add(request)
    longest = served.scheduler.blocks.longest_sequence()
    for _ in range(2 * longest):
        served.step()
    assert not served.has_work
    assert len(events[-1].output.token_ids) == longest - 30


def test_a_closed_engine_says_so():
    served = engine(tiny_models.make("llama"))
    served.close()
    for call in (served.trim, lambda: served.set_memory("1GB")):
        with pytest.raises(EngineError, match="closed"):
            call()


# -- no memory after all --


def fail_once(monkeypatch, after: int) -> list:
    """Resizing raises at its array number `after`, once."""
    resize, calls, failed = Pool.resize, itertools.count(), []

    def failing(self, *arguments):
        if next(calls) == after and not failed:
            failed.append(True)
            raise RuntimeError("[malloc] Unable to allocate")
        return resize(self, *arguments)

    monkeypatch.setattr(Pool, "resize", failing)
    return failed


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_pool_that_cannot_grow_stays_and_requests_go_on(monkeypatch, layer):
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
    fixed = expected("llama", **limits)
    served = engine(tiny("llama"), start=20, **limits)
    failed = fail_once(monkeypatch, layer)
    with pytest.warns(RuntimeWarning, match=r"can't grow from 20 blocks .* Unable to allocate"):
        outputs = serving.serve(served, prompts(), GREEDY)
    assert failed and tokens(outputs) == fixed
    blocks = served.stats()["blocks"]
    assert blocks["total"] == blocks["limit"] == 20
    assert {len(layer.pool.k) for layer in served.model.cache.layers} == {21}
    served.set_memory(budget(served, 300))
    serving.serve(served, prompts(), GREEDY)
    assert served.stats()["blocks"]["total"] > 20


def test_what_never_fits_in_a_pool_that_cannot_grow_fails_alone(monkeypatch):
    served = engine(tiny("llama"), start=6, max_num_seqs=8, max_num_batched_tokens=64)
    fail_once(monkeypatch, 0)
    ends = {}
    wanted = {"long": replace(GREEDY, max_tokens=200), "open": SamplingParams(temperature=0)}
    for name, params in {**wanted, "short": GREEDY}.items():
        take = functools.partial(lambda name, event: ends.__setitem__(name, event), name)
        served.add(served.request([1] * 20, params, take))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(1000):
            served.step()
            served.scheduler.check()
    assert not served.has_work
    assert isinstance(ends["long"].error, OutOfMemory)
    assert "220 tokens" in str(ends["long"].error) and "96" in str(ends["long"].error)
    assert len(ends["short"].output.token_ids) == 40
    assert len(ends["open"].output.token_ids) == 76


def test_a_device_that_does_not_answer_fails_who_needs_a_larger_pool(monkeypatch):
    served = engine(tiny("llama"), start=4, max_num_seqs=4, max_num_batched_tokens=64)

    def broken():
        raise RuntimeError("device lost")

    monkeypatch.setattr(mx, "synchronize", broken)
    events = []
    served.add(served.request([1] * 100, GREEDY, events.append))
    with pytest.warns(RuntimeWarning, match="can't grow from 4 blocks .* device lost"):
        for _ in range(5):
            served.step()
    assert not served.has_work
    assert isinstance(events[-1].error, OutOfMemory)


def test_requests_go_on_in_a_pool_that_cannot_grow_where_warnings_are_errors(monkeypatch):
    served = engine(tiny("llama"), start=20, max_num_seqs=8, max_num_batched_tokens=64)
    failed = fail_once(monkeypatch, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outputs = serving.serve(served, prompts(), GREEDY)
    assert failed and all(len(output.token_ids) == 40 for output in outputs)


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_a_request_without_max_tokens_ends_where_the_pool_that_cannot_grow_does(
    monkeypatch, look_ahead
):
    monkeypatch.setattr(reference, "LOOK_AHEAD", look_ahead)
    served = engine(tiny("llama"), max_num_seqs=4, max_num_batched_tokens=64)
    fail_once(monkeypatch, 0)
    events = []
    served.add(served.request([1] * 100, SamplingParams(temperature=0), events.append))
    with pytest.warns(RuntimeWarning, match="can't grow"):
        for _ in range(200):
            served.step()
    assert not served.has_work
    assert (events[-1].finish_reason, events[-1].error) == ("length", None)
    assert 60 <= len(events[-1].output.token_ids) <= 61


def test_a_pool_that_cannot_shrink_is_made_anew_and_what_ran_is_computed_again(monkeypatch):
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
    fixed = expected("llama", **limits)
    served = engine(tiny("llama"), **limits)
    steps = itertools.count()
    resize = KVCache._resize

    def failing(self, moves):
        if any(moves):
            raise RuntimeError("no")
        resize(self, moves)

    def shrink(served):
        if next(steps) == 40:
            monkeypatch.setattr(KVCache, "_resize", failing)
            served.trim(cached=True)
            assert served.stats()["bytes"]["pool"] == 0
            monkeypatch.setattr(KVCache, "_resize", resize)

    outputs = serving.serve(served, prompts(), GREEDY, on_step=shrink)
    assert tokens(outputs) == fixed
    assert served.stats()["bytes"]["pool"] == held(served)
    assert served.scheduler.num_preemptions


@pytest.mark.parametrize("resize", [False, True])
def test_a_step_in_flight_is_not_lost(monkeypatch, resize):
    """With look-ahead, whose results are read when the pool has another size already."""
    limits = {"max_num_seqs": 8, "max_num_batched_tokens": 64}
    fixed = expected("llama", **limits)
    monkeypatch.setattr(reference, "LOOK_AHEAD", 1)
    served = engine(tiny("llama"), **limits)
    flights = []

    def watch(served):
        flights.append(len(served._in_flight))
        if resize and len(flights) % 7 == 0:
            served.trim(cached=len(flights) % 2 == 0)

    outputs = serving.serve(served, prompts(), GREEDY, on_step=watch)
    assert max(flights) == 1
    assert tokens(outputs) == fixed
