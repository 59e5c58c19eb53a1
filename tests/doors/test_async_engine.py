"""The engine for apps: three faces of a request, and what one request does to others: nothing."""

import asyncio
import gc
import itertools
import random
import threading
import time
import weakref
from collections import Counter
from contextlib import contextmanager

import pytest
import tiny_folder as tiny
from trouble import ERRORS, SECONDS, STEPS, fail, in_thread, press_ctrl_c, wait_until

from mlxpage import (
    AsyncEngine,
    EngineError,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    SamplingParams,
    TimedOut,
    UnsupportedModel,
    async_engine,
)
from mlxpage.engine_thread import EngineThread
from mlxpage.events import Done, Error, Preempted, Prefill, Queued, Tokens
from mlxpage.handle import Mailbox
from mlxpage.metal.backend import mx

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
MEDIUM = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=480, ignore_eos=True)
CONVERSATION = [{"role": "user", "content": "Hi"}]


def hot(seed: int, max_tokens: int = 24, **changes) -> SamplingParams:
    return SamplingParams(
        temperature=1.5, max_tokens=max_tokens, ignore_eos=True, seed=seed, **changes
    )


@pytest.fixture
def make_engine(tiny_folder):
    """make_engine(folder, **options), still loading; at the end all must be idle and are closed."""
    made = []

    def make(folder=tiny_folder, **options):
        made.append(AsyncEngine.load(folder, **{"num_blocks": 256, **options}))
        return made[-1]

    yield make
    for engine in made:
        if engine.state == "ready":
            check_idle(engine)
        engine.close()


@pytest.fixture
def near(make_engine):
    return make_engine().wait(SECONDS)


@pytest.fixture(scope="module")
def far(tiny_folder):
    """In a process of its own, which takes a moment to start."""
    with AsyncEngine.load(tiny_folder, num_blocks=256, isolate=True) as engine:
        yield engine


@pytest.fixture(params=["near", "far"])
def engine(request):
    engine = request.getfixturevalue(request.param)
    yield engine
    check_idle(engine)


def check_idle(engine) -> None:
    """Nothing runs, waits or holds a block, and none of them is lost."""
    engine.trim()  # between two steps
    if isinstance(engine._thread, EngineThread):
        engine._call(lambda engine: engine.scheduler.check())
    stats = engine.stats()
    assert (stats["running"], stats["waiting"], stats["blocks"]["used"]) == (0, 0, 0)
    assert engine.stats()["open"] == 0


def tokens_of(events) -> list[int]:
    return [token for event in events if isinstance(event, Tokens) for token in event.token_ids]


def names_of(events) -> list[str]:
    """The kinds of events, in their order, each once."""
    return [name for name, _ in itertools.groupby(type(event).__name__ for event in events)]


@contextmanager
def held(engine):
    """The engine's thread does nothing meanwhile."""
    gate, there = threading.Event(), threading.Event()
    engine._thread.call(lambda engine: (there.set(), gate.wait(SECONDS)))
    assert there.wait(SECONDS)
    try:
        yield
    finally:
        gate.set()


# -- the same tokens --


def test_tokens_are_those_of_llm(engine, make_llm):
    prompts = ["abc", "a longer prompt than that", [5, 6, 7], "x" * 100]
    params = [hot(1), GREEDY, hot(2, n=2), hot(3, logprobs=2, prompt_logprobs=1)]
    llm = make_llm()
    expected = [llm.generate(*pair) for pair in zip(prompts, params, strict=True)]
    handles = [engine.submit(*pair) for pair in zip(prompts, params, strict=True)]
    for handle, output in zip(handles, expected, strict=True):
        same = handle.result(SECONDS)
        assert (same.text, same.token_ids) == (output.text, output.token_ids)
        assert [c.token_ids for c in same.choices] == [c.token_ids for c in output.choices]
        assert (same.logprobs is None) == (output.logprobs is None)
        assert len(same.prompt_logprobs or ()) == len(output.prompt_logprobs or ())


def test_a_conversation_is_a_prompt(engine, make_llm):
    expected = make_llm().chat(CONVERSATION, GREEDY)
    output = engine.submit(CONVERSATION, GREEDY).result(SECONDS)
    assert output.prompt_token_ids == expected.prompt_token_ids == engine.chat_prompt(CONVERSATION)
    assert output.token_ids == expected.token_ids


def test_the_tokenizer_and_the_plan_are_those_of_llm(engine, make_llm):
    llm = make_llm(num_blocks=256)
    assert engine.plan == llm.plan
    text = "how they tell"
    ids = engine.tokenizer.encode(text)
    assert ids == llm.tokenizer.encode(text)
    assert engine.tokenizer.decode(ids) == text
    for fact in ("eos_token_ids", "has_chat_template"):
        assert getattr(engine.tokenizer, fact) == getattr(llm.tokenizer, fact)
    with pytest.raises(InvalidRequest, match="message"):
        engine.chat_prompt([5])


def test_two_engines_in_one_process(make_engine, tmp_path):
    engines = make_engine(), make_engine(tiny.make(tmp_path / "other", seed=1))
    first, other = [engine.submit("abc", GREEDY) for engine in engines]
    assert first.result(SECONDS).token_ids != other.result(SECONDS).token_ids
    engines[0].close()
    again = engines[1].submit("abc", GREEDY).result(SECONDS)
    assert again.token_ids == other.result().token_ids


# -- three faces --


def check_events(events, output) -> None:
    assert names_of(events) == ["Queued", "Prefill", "Tokens", "Done"]
    assert events[-1] == Done(output)
    assert tokens_of(events) == output.token_ids
    parts = [event for event in events if isinstance(event, Tokens)]
    assert "".join(part.text for part in parts) == output.text
    assert [entry for part in parts for entry in part.logprobs] == output.logprobs
    assert parts[-1].finish_reason == output.finish_reason == "length"


def test_a_loop_gets_all_events_and_result_the_output_as_often_as_asked(engine):
    handle = engine.submit("abc", hot(1, logprobs=1))
    events = list(handle)
    check_events(events, handle.result(SECONDS))
    assert handle.is_done
    assert handle.result() is handle.result()
    assert list(handle) == []


def test_an_async_loop_gets_all_events_and_await_the_output(make_engine):
    async def app():
        async with make_engine() as engine:
            handle = engine.submit("abc", hot(1, logprobs=1))
            events = [event async for event in handle]
            check_events(events, await handle)
            assert await handle is handle.result()
            outputs = await asyncio.gather(*(engine.submit("abc", GREEDY) for _ in range(20)))
            assert len({tuple(output.token_ids) for output in outputs}) == 1

    asyncio.run(app())


def test_a_function_gets_all_events_on_one_thread_of_the_engines(engine):
    events, threads = [], set()

    def on_event(event):
        threads.add(threading.current_thread().name)
        events.append(event)

    output = engine.submit("abc", hot(1, logprobs=1), on_event=on_event).result(SECONDS)
    wait_until(lambda: events and isinstance(events[-1], Done))
    check_events(events, output)
    (name,) = threads
    assert name.startswith("mlxpage-callbacks")


def test_dispatch_says_where_a_function_is_called(engine):
    async def app():
        events, loop = [], asyncio.get_running_loop()
        done = loop.create_future()

        def on_event(event):
            assert asyncio.get_running_loop() is loop
            events.append(event)
            if isinstance(event, Done):
                done.set_result(None)

        engine.submit(
            "abc", hot(1, logprobs=1), on_event=on_event, dispatch=loop.call_soon_threadsafe
        )
        await asyncio.wait_for(done, SECONDS)
        check_events(events, events[-1].output)

    asyncio.run(app())


def test_each_choice_has_events_of_its_own(engine):
    handle = engine.submit("abc", hot(1, n=3))
    events = list(handle)
    for index, output in enumerate([handle.result(), *handle.result().choices]):
        own = [e for e in events if isinstance(e, Tokens) and e.choice == index]
        assert tokens_of(own) == output.token_ids
        assert own[-1].finish_reason == "length"


def test_the_best_of_several_is_known_at_the_end(engine):
    handle = engine.submit("abc", hot(1, best_of=3))
    assert names_of(handle) == ["Queued", "Prefill", "Done"]
    assert len(handle.result().token_ids) == 24


def test_prefill_tells_how_far_a_prompt_is_and_what_was_found(make_engine):
    engine = make_engine(max_num_batched_tokens=32).wait(SECONDS)
    prompt = list(range(5, 105))
    with held(engine):
        seen = []
        handle = engine.submit(prompt, GREEDY, on_event=seen.append)
    handle.result(SECONDS)
    wait_until(lambda: seen and isinstance(seen[-1], Done))
    done = [event for event in seen if isinstance(event, Prefill)]
    assert {event.num_prompt_tokens for event in done} == {100}
    computed = [event.num_computed_tokens for event in done]
    assert computed == sorted(set(computed)) and computed[-1] == 100 and len(computed) > 1
    again = [e for e in engine.submit(prompt, GREEDY) if isinstance(e, Prefill)]
    assert again[-1].num_cached_tokens >= 96


def test_a_full_pool_is_told_and_costs_no_token(make_engine, make_llm):
    expected = [make_llm().generate("abc", hot(n, 150)).token_ids for n in range(8)]
    engine = make_engine(num_blocks=24).wait(SECONDS)
    told = Counter()
    outputs = [[] for _ in range(8)]

    def on_event(n, event):
        told[n] += isinstance(event, Preempted)
        outputs[n] += tokens_of([event])

    handles = [
        engine.submit("abc", hot(n, 150), on_event=lambda event, n=n: on_event(n, event))
        for n in range(8)
    ]
    preemptions = sum(handle.result(SECONDS).num_preemptions for handle in handles)
    wait_until(lambda: outputs == expected)
    assert preemptions > 0 and sum(told.values()) > 0
    assert sum(told.values()) <= preemptions


# -- many callers --


def test_threads_and_two_event_loops_at_once(engine):
    expected = [engine.submit("abc", hot(n)).result(SECONDS).token_ids for n in range(4)]

    def on_a_thread():
        handles = [engine.submit("abc", hot(n)) for n in range(4)]
        return [tokens_of(handle) for handle in handles]

    async def one(n):
        return tokens_of([event async for event in engine.submit("abc", hot(n))])

    async def app():
        return await asyncio.gather(*map(one, range(4)))

    callers = [in_thread(on_a_thread) for _ in range(3)]
    callers += [in_thread(lambda: asyncio.run(app())) for _ in range(2)]
    for caller in callers:
        assert caller.result(SECONDS) == expected


def test_a_handle_may_be_read_in_another_loop_than_it_was_submitted_in(engine):
    async def submit():
        return engine.submit("abc", GREEDY)

    async def read(handle):
        return [event async for event in handle]

    handle = asyncio.run(submit())
    assert len(tokens_of(asyncio.run(read(handle)))) == 12


def test_who_is_in_front_is_served_first(make_engine):
    engine = make_engine(max_num_seqs=1).wait(SECONDS)
    ended = []

    def submit(name, priority):
        return engine.submit(
            name,
            GREEDY,
            priority=priority,
            on_event=lambda event: isinstance(event, Done) and ended.append(name),
        )

    with held(engine):
        handles = [submit(*each) for each in [("b1", 1), ("b2", 1), ("f1", 0), ("f2", 0)]]
    for handle in handles:
        handle.result(SECONDS)
    wait_until(lambda: len(ended) == 4)
    assert ended == ["f1", "f2", "b1", "b2"]


# -- readers --


def test_a_slow_reader_gets_fewer_larger_events_and_keeps_nobody_up(engine):
    expected = engine.submit("abc", LONG).result(SECONDS)
    slow = engine.submit("abc", LONG)
    assert isinstance(next(slow), Queued)
    assert engine.submit("abc", LONG).result(SECONDS).token_ids == expected.token_ids
    assert slow.result(SECONDS).token_ids == expected.token_ids
    assert len(slow._mailbox._unread) <= 3
    rest = list(slow)
    assert [type(event) for event in rest] == [Prefill, Tokens, Done]
    assert rest[1].text == expected.text
    assert list(rest[1].token_ids) == expected.token_ids


def test_a_loop_that_is_busy_gets_one_call_at_a_time(near):
    waiting = []
    events = []
    with held(near):
        handle = near.submit("abc", LONG, on_event=events.append, dispatch=waiting.append)
        waiting.pop()()
        assert events == [Queued(0)]
    output = handle.result(SECONDS)
    assert len(waiting) == 1
    while waiting:
        waiting.pop()()
    assert [type(event) for event in events] == [Queued, Prefill, Tokens, Done]
    assert tokens_of(events) == output.token_ids


def test_a_function_that_blocks_keeps_no_request_up(engine):
    gate = threading.Event()
    blocked = engine.submit("abc", GREEDY, on_event=lambda event: gate.wait(SECONDS))
    try:
        assert len(engine.submit("def", GREEDY).result(SECONDS).token_ids) == 12
        assert len(blocked.result(SECONDS).token_ids) == 12
    finally:
        gate.set()


@pytest.mark.parametrize("at", [0, 1, 5])
def test_an_error_of_a_function_ends_its_own_request_only(engine, at):
    expected = engine.submit("def", MEDIUM).result(SECONDS).token_ids
    calls = itertools.count()

    def on_event(event):
        if next(calls) == at:
            raise ZeroDivisionError("mine")

    other = engine.submit("def", MEDIUM)
    handle = engine.submit("abc", LONG, on_event=on_event)
    with pytest.raises(EngineError, match="on_event raised ZeroDivisionError: mine") as caught:
        handle.result(SECONDS)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert next(calls) == at + 1
    assert other.result(SECONDS).token_ids == expected


def test_a_loop_that_has_gone_ends_what_it_listened_to(near):
    async def submit():
        loop = asyncio.get_running_loop()
        return near.submit("abc", LONG, on_event=print, dispatch=loop.call_soon_threadsafe)

    with held(near):
        handle = asyncio.run(submit())
    with pytest.raises(EngineError, match="dispatch raised RuntimeError"):
        handle.result(SECONDS)


# -- cancelling --


def seen(handle, kind) -> None:
    """Reads until an event of this kind."""
    for event in handle:
        if isinstance(event, kind):
            return
    raise AssertionError(f"no {kind.__name__}")


@pytest.mark.parametrize("stage", [Queued, Prefill, Tokens], ids=lambda kind: kind.__name__)
def test_cancelling_ends_a_request_within_a_step(make_engine, stage):
    engine = make_engine(max_num_batched_tokens=32).wait(SECONDS)
    handle = engine.submit(list(range(5, 205)), LONG)
    seen(handle, stage)
    handle.cancel()
    handle.cancel()
    check_idle(engine)  # which comes after the cancelling, at the next end of a step
    output = handle.result(0)
    assert output.finish_reason == "abort"
    assert output.prompt_token_ids == list(range(5, 205))
    assert names_of(handle)[-1] == "Done"
    handle.cancel()
    assert handle.result(0) is output


def test_what_waits_in_the_queue_is_cancelled_at_once(near):
    with held(near):
        handle = near.submit("abc", LONG)
        handle.cancel()
        output = handle.result(0)
        assert (output.finish_reason, output.token_ids) == ("abort", [])
        assert output.prompt_token_ids == tiny.ids("abc")
    check_idle(near)
    assert near.stats()["steps"] == 0


def test_cancelling_after_the_end_does_nothing(engine):
    handle = engine.submit("abc", GREEDY)
    output = handle.result(SECONDS)
    handle.cancel()
    check_idle(engine)
    assert handle.result() is output and output.finish_reason == "length"


def test_leaving_a_block_cancels(engine):
    with engine.submit("abc", LONG) as handle:
        seen(handle, Tokens)
    assert handle.result(SECONDS).finish_reason == "abort"

    async def app():
        async with engine.submit("abc", LONG) as handle:
            async for event in handle:
                if isinstance(event, Tokens):
                    break
        return await handle

    assert asyncio.run(app()).finish_reason == "abort"


def test_a_handle_that_nobody_holds_cancels_unless_a_function_listens(engine):
    for event in engine.submit("abc", LONG):
        if isinstance(event, Tokens):
            break
    gc.collect()
    check_idle(engine)
    done = threading.Event()
    engine.submit("abc", GREEDY, on_event=lambda event: isinstance(event, Done) and done.set())
    gc.collect()
    assert done.wait(SECONDS)


@pytest.mark.parametrize("how", ["await", "async for"])
def test_a_task_that_is_cancelled_cancels_what_it_waits_for(engine, how):
    async def use(handle):
        if how == "await":
            return await handle
        return [event async for event in handle]

    async def app():
        handle = engine.submit("abc", LONG)
        task = asyncio.create_task(use(handle))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return handle

    assert asyncio.run(app()).result(SECONDS).finish_reason == "abort"


@pytest.mark.parametrize("wait", [lambda handle: handle.result(), list], ids=["result", "loop"])
def test_ctrl_c_cancels_what_is_waited_for(engine, wait):
    handle = engine.submit("abc", LONG)
    interrupt = in_thread(lambda: (seen(engine.submit("x", LONG), Tokens), press_ctrl_c()))
    with pytest.raises(KeyboardInterrupt):
        wait(handle)
        time.sleep(SECONDS)  # where it comes a moment late
    interrupt.result(SECONDS)
    assert handle.result(SECONDS).finish_reason == "abort"


def cancelling(handles: dict, n: int, at: int, stages: Counter):
    """An `on_event` that cancels request `n` when it hears its event number `at`."""
    count = itertools.count(1)

    def on_event(event):
        if next(count) == at:
            wait_until(lambda: n in handles)
            stages[type(event).__name__] += 1
            handles[n].cancel()

    return on_event


def cancel_some(engine, requests, expected, rng, stages: Counter) -> int:
    """Submits all, cancels half of them at random, and says how many that ended."""
    victims = {n: rng.randrange(1, 12) for n in rng.sample(range(64), 32)}
    handles: dict = {}
    for n, request in enumerate(requests):
        listener = cancelling(handles, n, victims[n], stages) if n in victims else None
        handles[n] = engine.submit(*request, on_event=listener)
    for n in rng.sample(sorted(victims), 3):
        handles[n].cancel()
    outputs = {n: handle.result(SECONDS) for n, handle in handles.items()}
    ended = {n for n, output in outputs.items() if output.finish_reason == "abort"}
    assert ended <= set(victims)
    for n, output in outputs.items():
        whole = expected[n]
        assert output.token_ids == (whole[: len(output.token_ids)] if n in ended else whole)
    return len(ended)


def count_of(kind: type) -> int:
    return sum(isinstance(each, kind) for each in gc.get_objects())


def run_random_cancels(make_engine, count: int) -> None:
    engine = make_engine(num_blocks=96, max_num_seqs=16, max_num_batched_tokens=64).wait(SECONDS)
    rng = random.Random(7)
    prompts = [[rng.randrange(5, 250) for _ in range(rng.randrange(1, 90))] for _ in range(64)]
    requests = [(prompt, hot(n, rng.randrange(4, 40))) for n, prompt in enumerate(prompts)]
    expected = [engine.submit(*request).result(SECONDS).token_ids for request in requests]
    done, stages, nbytes, threads = 0, Counter(), [], set()
    while done < count:
        done += cancel_some(engine, requests, expected, rng, stages)
        check_idle(engine)
        wait_until(lambda: gc.collect() >= 0 and not count_of(Mailbox))
        nbytes.append(mx.get_active_memory())
        threads.add(threading.active_count())
    assert {"Queued", "Prefill", "Tokens"} <= set(stages)
    assert len(threads) == 1
    assert max(nbytes) <= nbytes[0] + 4096, "half a block"


def test_a_hundred_random_cancels_leak_nothing_and_change_no_other_stream(make_engine):
    run_random_cancels(make_engine, 100)


@pytest.mark.full
def test_nor_do_a_thousand(make_engine):
    run_random_cancels(make_engine, 1000)


# -- time and room --


def test_a_request_that_takes_too_long_ends_with_what_it_has(engine):
    handle = engine.submit("abc", LONG, timeout=0.3)
    events = []
    with pytest.raises(TimedOut, match="timeout"):
        events += handle
    with pytest.raises(TimeoutError):
        handle.result()
    told = []
    slow = engine.submit("abc", LONG, timeout=0.3, on_event=told.append)
    other = engine.submit("def", LONG, timeout=SECONDS)
    assert isinstance(slow._mailbox.result.exception(SECONDS), TimedOut)
    wait_until(lambda: told and isinstance(told[-1], Error))
    assert told[-1].output.token_ids == tokens_of(told)
    assert len(other.result(SECONDS).token_ids) == 480


def test_a_timeout_ends_what_waits_too(near):
    with held(near):
        handle = near.submit("abc", LONG, timeout=0.05)
        with pytest.raises(TimedOut):
            handle.result(SECONDS)
    check_idle(near)


def test_result_may_be_waited_for_in_vain(engine):
    handle = engine.submit("abc", LONG)
    with pytest.raises(TimeoutError):
        handle.result(0.01)
    assert handle.result(SECONDS).finish_reason == "length"


def test_a_full_queue_is_told_at_once(make_engine):
    engine = make_engine(max_queued=3, max_num_seqs=1).wait(SECONDS)
    with held(engine):
        handles = [engine.submit("abc", MEDIUM) for _ in range(3)]
        assert [next(handle) for handle in handles] == [Queued(0), Queued(1), Queued(2)]
        with pytest.raises(QueueFull, match=r"3 requests wait .* max_queued"):
            engine.submit("abc", MEDIUM)
        assert engine.stats()["queued"] == 3
    seen(handles[0], Prefill)
    assert engine.submit("abc", GREEDY).result(SECONDS)
    for handle in handles:
        handle.result(SECONDS)
    assert engine.stats()["queued"] == 0


def test_what_can_never_be_served_is_refused_at_once_with_the_room_there_is(make_engine):
    engine = make_engine(num_blocks=8).wait(SECONDS)
    with pytest.raises(InvalidRequest, match="at most 128 tokens"):
        engine.submit("abc", SamplingParams(max_tokens=200))
    check_idle(engine)


@pytest.mark.parametrize(
    "prompt, options, named",
    [
        ("abc", {"priority": 1.5}, "priority"),
        ("abc", {"timeout": "1"}, "timeout"),
        ("abc", {"timeout": -1}, "timeout"),
        ("abc", {"on_event": 5}, "on_event"),
        ("abc", {"dispatch": 5}, "dispatch"),
        ("abc", {"params": 5}, "params"),
        (5, {}, "prompt"),
        (None, {}, "prompt"),
        ([], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([{"role": 5}], {}, "message"),
    ],
    ids=str,
)
def test_requests_that_make_no_sense_are_refused_by_name(engine, prompt, options, named):
    with pytest.raises(InvalidRequest, match=named):
        engine.submit(prompt, **options).result(SECONDS)
    assert engine.stats()["open"] == 0


# -- loading --


@contextmanager
def endless_loading(monkeypatch):
    """Models load until they are told not to."""
    from mlxpage.metal import model

    begun, gate = threading.Event(), threading.Event()
    real = model._evaluate

    def slow(module, on_bytes):
        begun.set()
        while not gate.wait(0.01):
            on_bytes(0, 1)
        return real(module, on_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(model, "_evaluate", slow)
        yield begun, gate
        gate.set()


def test_loading_is_told_and_requests_wait_for_it(make_engine, monkeypatch):
    told = []
    with endless_loading(monkeypatch) as (begun, gate):
        engine = make_engine(on_loaded=lambda done, total: told.append((done, total)))
        assert engine.state == "loading"
        handle = engine.submit("abc", GREEDY)
        bad = engine.submit("abc", SamplingParams(max_tokens=10, top_k=10**6))
        assert next(handle) == Queued(0)
        with pytest.raises(TimeoutError):
            engine.wait(0.01)
        with pytest.raises(EngineError, match="loading"):
            _ = engine.plan
        assert engine.stats() == {"state": "loading", "open": 2, "queued": 2, "step_s": None}
        assert begun.wait(SECONDS)
        gate.set()
        assert engine.wait(SECONDS) is engine
    assert engine.state == "ready"
    assert told[-1][0] == told[-1][1] == engine.plan.weights
    assert len(handle.result(SECONDS).token_ids) == 12
    with pytest.raises(InvalidRequest, match="top_k"):
        bad.result(SECONDS)


def test_requests_may_be_cancelled_and_time_out_while_the_model_loads(make_engine, monkeypatch):
    with endless_loading(monkeypatch):
        engine = make_engine()
        cancelled, late = engine.submit("abc"), engine.submit("abc", timeout=0.01)
        cancelled.cancel()
        assert cancelled.result(0).finish_reason == "abort"
        with pytest.raises(TimedOut):
            late.result(SECONDS)
        assert engine.state == "loading"
    engine.wait(SECONDS)
    check_idle(engine)
    assert engine.stats()["steps"] == 0


def test_closing_ends_the_loading(make_engine, monkeypatch):
    before = threading.active_count()
    with endless_loading(monkeypatch) as (begun, _):
        engine = make_engine()
        handle = engine.submit("abc")
        assert begun.wait(SECONDS)
        engine.close()
        assert engine.state == "failed"
    with pytest.raises(EngineError, match="closed while the model was loading"):
        engine.wait()
    with pytest.raises(EngineError, match="closed while"):
        handle.result(SECONDS)
    with pytest.raises(EngineError, match="closed while"):
        engine.submit("abc")
    wait_until(lambda: threading.active_count() == before)


def test_a_download_is_left_alone_when_it_is_not_wanted_any_more(monkeypatch):
    from mlxpage import model_store

    begun, gate = threading.Event(), threading.Event()
    monkeypatch.setattr(
        model_store, "resolve", lambda *_, **__: (begun.set(), gate.wait(SECONDS), 1 / 0)
    )
    engine = AsyncEngine.load("some/model")
    assert begun.wait(SECONDS)
    engine.close()
    gate.set()
    with pytest.raises(EngineError, match="closed while"):
        engine.wait()


def test_a_task_that_is_cancelled_while_it_waits_for_a_model_ends_the_loading(
    make_engine, monkeypatch
):
    made = []

    async def app():
        made.append(make_engine())
        async with made[0]:
            raise AssertionError("it never loads")

    async def main():
        task = asyncio.create_task(app())
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with endless_loading(monkeypatch):
        asyncio.run(main())
        assert made[0].state == "failed"


def test_two_tasks_wait_for_a_model_and_one_gives_up(make_engine, monkeypatch):
    async def app(gate):
        engine = make_engine()
        waiting = [asyncio.ensure_future(engine) for _ in range(2)]
        await asyncio.sleep(0.05)
        waiting[0].cancel()
        gate.set()
        assert await waiting[1] is engine

    with endless_loading(monkeypatch) as (_, gate):
        asyncio.run(app(gate))


@pytest.mark.parametrize("face", ["wait", "with", "await", "async with"])
def test_a_model_that_cannot_be_loaded_says_why(make_engine, monkeypatch, tmp_path, face):
    folder = tiny.make(tmp_path / "dynamic", rope_scaling={"type": "dynamic", "factor": 2.0})
    with endless_loading(monkeypatch):
        engine = make_engine(folder)
        handle = engine.submit("abc")

    async def app():
        if face == "await":
            await engine
        async with engine:
            pass

    with pytest.raises(UnsupportedModel):
        if face == "wait":
            engine.wait(SECONDS)
        elif face == "with":
            with engine:
                pass
        else:
            asyncio.run(app())
    assert engine.state == "failed"
    with pytest.raises(EngineError, match="could not be loaded"):
        handle.result(SECONDS)
    with pytest.raises(EngineError, match="could not be loaded"):
        engine.submit("abc")


def test_options_are_those_of_llm_and_checked_at_once(make_engine):
    for options, named in [
        ({"block_size": 8}, "block_size"),
        ({"block_size": 8, "isolate": True}, "block_size"),
        ({"isolate": 1}, "isolate"),
        ({"max_queued": 0}, "max_queued"),
        ({"stall_after": "x"}, "stall_after"),
        ({"on_stall": 5}, "on_stall"),
    ]:
        with pytest.raises(InvalidRequest, match=named):
            make_engine(**options)
    with pytest.raises(TypeError, match="num_block"):
        make_engine(num_block=5)
    with pytest.raises(ModelNotFound):
        make_engine("/no/such/folder").wait(SECONDS)


# -- closing --


def test_closing_ends_open_streams_with_what_they_have(make_engine):
    before = threading.active_count()
    active = mx.get_active_memory()
    engine = make_engine(max_num_seqs=4).wait(SECONDS)
    told = []
    handles = [engine.submit("abc", LONG) for _ in range(8)]
    engine.submit("abc", LONG, on_event=told.append)
    seen(handles[0], Tokens)
    engine.close()
    engine.close()
    assert engine.state == "closed"
    for handle in handles:
        assert handle.result(0).finish_reason == "abort"
        assert isinstance(list(handle)[-1], Done)
    assert handles[0].result().token_ids
    wait_until(lambda: isinstance(told[-1], Done))
    with pytest.raises(EngineError, match="closed"):
        engine.submit("abc")
    assert engine.stats() == {"state": "closed", "open": 0, "queued": 0, "step_s": None}
    wait_until(lambda: threading.active_count() == before)
    assert mx.get_active_memory() <= active


def test_an_async_block_closes_while_the_loop_goes_on(make_engine):
    async def app():
        async with make_engine() as engine:
            handle = engine.submit("abc", LONG)
        assert (await handle).finish_reason == "abort"
        assert engine.state == "closed"

    asyncio.run(app())


def test_it_may_be_closed_by_a_function_that_it_calls(make_engine):
    engine = make_engine().wait(SECONDS)
    closed = threading.Event()

    def on_event(event):
        if isinstance(event, Tokens) and not closed.is_set():
            engine.close()
            closed.set()

    handle = engine.submit("abc", LONG, on_event=on_event)
    assert handle.result(SECONDS).finish_reason == "abort"
    assert closed.wait(SECONDS)


def test_an_engine_that_nobody_holds_ends_its_threads(tiny_folder):
    before = threading.active_count()
    engine = AsyncEngine.load(tiny_folder, num_blocks=64)
    handle = engine.submit("abc", MEDIUM)
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    assert len(handle.result(SECONDS).token_ids) == 100  # the handle keeps it going
    del handle
    gc.collect()
    wait_until(lambda: threading.active_count() == before)


def test_requests_end_when_the_thread_itself_dies(make_engine, monkeypatch):
    from mlxpage import engine as engines

    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    engine = make_engine().wait(SECONDS)
    monkeypatch.setattr(engines.Engine, "abort_all", lambda *_: 1 / 0)
    fail(monkeypatch, "mlxpage.scheduler.Scheduler.schedule", RuntimeError("broken"), at=3)
    handle = engine.submit("abc", LONG)
    with pytest.raises(EngineError, match="closed"):
        handle.result(SECONDS)
    assert engine.state == "closed"


def test_the_app_it_lives_in_stays_as_it_is(python, tiny_folder):
    ended = python(
        """
import logging, os, resource, signal, sys, threading

def state():
    return {
        "environment": dict(os.environ),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "signals": {s: signal.getsignal(s) for s in signal.valid_signals()},
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "threads": threading.enumerate(),
        "folder": os.getcwd(),
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook),
        "switching": sys.getswitchinterval(),
    }

before = state()
from mlxpage import AsyncEngine, SamplingParams
with AsyncEngine.load(sys.argv[1], num_blocks=64) as engine:
    engine.submit("abc", SamplingParams(max_tokens=4)).result()
after = state()
print([name for name in before if before[name] != after[name]])
""",
        tiny_folder,
    )
    assert ended.stdout == "[]\n", ended.stderr
    assert ended.stderr == ""


# -- failures --


def run_failures(make_engine, monkeypatch, count: int) -> None:
    engine = make_engine().wait(SECONDS)
    rng = random.Random(5)
    prompts = ["abc", "a longer one", "x" * 40]
    expected = [engine.submit(prompt, GREEDY).result(SECONDS).token_ids for prompt in prompts]
    threads, failed, tried = threading.active_count(), 0, 0
    while failed < count:
        tried += 1
        assert tried < 3 * count, "most of the steps don't fail"
        error = rng.choice(ERRORS)
        with monkeypatch.context() as patch:
            fail(patch, rng.choice(STEPS), error, at=rng.randrange(25))
            handles = [engine.submit(prompt, GREEDY) for prompt in prompts]
            ends = [handle._mailbox.result.exception(SECONDS) for handle in handles]
        for end, handle, tokens in zip(ends, handles, expected, strict=True):
            if end is None:
                assert handle.result().token_ids == tokens
            else:
                assert isinstance(end, EngineError) and end.__cause__ is error
        failed += any(ends)
        again = [engine.submit(prompt, GREEDY) for prompt in prompts]
        assert [handle.result(SECONDS).token_ids for handle in again] == expected
        check_idle(engine)
    assert threading.active_count() == threads


def test_after_each_of_a_hundred_failed_steps_the_next_request_succeeds(make_engine, monkeypatch):
    run_failures(make_engine, monkeypatch, 100)


@pytest.mark.full
def test_and_after_each_of_a_thousand(make_engine, monkeypatch):
    run_failures(make_engine, monkeypatch, 1000)


def test_a_step_that_fails_leaves_what_waits_alone(make_engine, monkeypatch):
    engine = make_engine(max_num_seqs=1).wait(SECONDS)
    expected = engine.submit("def", GREEDY).result(SECONDS).token_ids
    with monkeypatch.context() as patch:
        fail(patch, "mlxpage.metal.model.Model.__call__", RuntimeError("no"), at=6)
        with held(engine):
            fails, waits = engine.submit("abc", GREEDY), engine.submit("def", GREEDY)
        with pytest.raises(EngineError, match="no"):
            fails.result(SECONDS)
        assert waits.result(SECONDS).token_ids == expected


def test_an_error_event_has_what_there_was_until_then(near, monkeypatch):
    told = []
    with monkeypatch.context() as patch:
        fail(patch, "mlxpage.metal.model.Model.__call__", RuntimeError("no"), at=6)
        handle = near.submit("abc", GREEDY, on_event=told.append)
        with pytest.raises(EngineError, match="a step failed: RuntimeError: no"):
            handle.result(SECONDS)
    wait_until(lambda: isinstance(told[-1], Error))
    assert told[-1].output.token_ids == tokens_of(told)
    assert len(tokens_of(told)) == 6


def test_a_step_that_stalls_is_told_once_and_nothing_is_ended(make_engine, monkeypatch):
    from mlxpage.engine import Engine

    told, gate, began = [], threading.Event(), threading.Event()
    engine = make_engine(stall_after=0.1, on_stall=told.append).wait(SECONDS)
    real = Engine.step

    def stall(self):
        began.set()
        gate.wait(SECONDS)
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stall)
        handle = engine.submit("abc", GREEDY)
        assert began.wait(SECONDS)
        wait_until(lambda: told)
        assert engine.stats()["step_s"] >= told[0] >= 0.1  # which waits for nobody
        time.sleep(4 * async_engine.WATCH_SECONDS)
        assert len(told) == 1
        gate.set()
        assert len(handle.result(SECONDS).token_ids) == 12
    assert engine.stats()["step_s"] is None


def test_a_watcher_that_raises_goes_on_watching(make_engine, monkeypatch):
    hooked = []
    monkeypatch.setattr(threading, "excepthook", hooked.append)
    engine = make_engine(stall_after=0, on_stall=lambda seconds: 1 / 0).wait(SECONDS)
    handle = engine.submit("abc", LONG, timeout=0.5)
    with pytest.raises(TimedOut):
        handle.result(SECONDS)
    assert hooked[0].exc_type is ZeroDivisionError


def test_all_options_of_llm_are_heeded(make_engine):
    engine = make_engine(num_blocks=None, memory="50MB", max_num_seqs=3, prefix_cache=False)
    stats = engine.wait(SECONDS).stats()
    assert stats["bytes"]["budget"] == 50e6
    assert stats["prefix_cache"] is None
    assert engine._engine.scheduler.max_num_seqs == 3
