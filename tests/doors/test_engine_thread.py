"""One thread owns the engine: who may call it, what ends it, and what a failure leaves behind."""

import gc
import itertools
import queue
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import tiny_folder as tiny
from mlx_lm import generate as mlx_lm_generate
from mlx_lm import load as mlx_lm_load
from trouble import ERRORS, SECONDS, STEPS, fail, in_thread, press_ctrl_c, wait_until

from mlxpage import EngineError, InvalidRequest, SamplingParams, UnsupportedModel, engine_thread
from mlxpage.engine_thread import Pulse
from mlxpage.metal.backend import mx
from mlxpage.upkeep import Upkeep

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=480, ignore_eos=True)
MEDIUM = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


# -- many callers --


def test_eight_threads_get_what_one_gets(make_llm):
    llm = make_llm(max_num_seqs=4)
    params = [
        SamplingParams(temperature=1.5, max_tokens=10, ignore_eos=True, seed=n) for n in range(8)
    ]
    prompts = [f"{n} " * (n + 1) for n in range(8)]
    expected = [llm.generate(prompts[n], params[n]).token_ids for n in range(8)]

    def caller(n):
        return [llm.generate(prompts[n], params[n]).token_ids for _ in range(4)]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(caller, range(8))) == [[tokens] * 4 for tokens in expected]


def test_a_waiting_caller_is_served_while_another_streams(make_llm):
    llm = make_llm()
    for count, _ in enumerate(llm.stream("abc", MEDIUM)):
        if count == 3:
            assert len(llm.generate("def", GREEDY).token_ids) == 12
    assert count == 99


def test_two_models_in_one_process(make_llm, tmp_path):
    one, other = make_llm(), make_llm(tiny.make(tmp_path / "other", seed=1))
    expected = one.generate("abc", GREEDY).token_ids, other.generate("abc", GREEDY).token_ids
    assert expected[0] != expected[1]
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(llm.generate, ["abc"] * 4, GREEDY) for llm in (one, other)]
        for future, tokens in zip(both, expected, strict=True):
            assert [output.token_ids for output in future.result()] == [tokens] * 4
    one.close()
    assert other.generate("abc", GREEDY).token_ids == expected[1]


def test_mlx_lm_on_the_main_thread_works_beside_it_as_before(make_llm, tiny_folder):
    model, tokenizer = mlx_lm_load(str(tiny_folder))

    def text():
        return mlx_lm_generate(model, tokenizer, "hello", max_tokens=12)

    before = text()
    llm = make_llm()
    expected = llm.generate("abc", MEDIUM).token_ids
    stream = llm.stream("abc", MEDIUM)
    next(stream)
    assert text() == text() == before
    assert [token for event in stream for token in event.token_ids] == expected[1:]
    llm.close()
    assert text() == before


def test_the_apps_random_numbers_are_left_alone(make_llm):
    def numbers(between):
        mx.random.seed(5)
        first = mx.random.uniform().item()
        between()
        return first, mx.random.uniform().item()

    def use():
        make_llm().generate("abc", SamplingParams(temperature=1, max_tokens=3, seed=1))

    assert numbers(use) == numbers(lambda: None)


# -- leaving --


@pytest.mark.parametrize("events", [0, 1, 5])
def test_leaving_a_stream_ends_it_and_frees_its_blocks(llm, is_idle, events):
    for count, _ in enumerate(llm.stream("abc", LONG)):
        if count == events:
            break
    is_idle(llm)
    assert llm.stats()["output_tokens"] == 0  # those of whole generations


def test_leaving_a_stream_of_many_ends_them_all(make_llm, is_idle):
    llm = make_llm(max_num_seqs=2)
    stream = llm.stream_many(["a", "b", "c", "d"], LONG)
    next(stream)
    assert llm.stats()["running"] == 2
    stream.close()
    is_idle(llm)


def test_a_stream_that_is_never_read_costs_nothing(llm, is_idle):
    stream = llm.stream("abc", LONG)
    is_idle(llm)
    del stream
    assert llm.stats()["steps"] == 0


def test_an_error_in_the_callers_loop_ends_the_stream(llm, is_idle):
    with pytest.raises(ZeroDivisionError):
        for _ in llm.stream("abc", LONG):
            _ = 1 / 0
    is_idle(llm)


def test_an_abandoned_stream_may_be_collected_on_the_engines_own_thread(llm, is_idle):
    stream = llm.stream("abc", LONG)
    next(stream)
    llm._thread.call(lambda engine: stream.close()).result(SECONDS)
    is_idle(llm)


def test_ctrl_c_ends_all_that_generate_had_begun(make_llm, is_idle):
    llm = make_llm(max_num_seqs=2)

    def interrupt():
        wait_until(lambda: llm.stats()["running"] == 2)
        press_ctrl_c()

    begun = in_thread(interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["abc"] * 40, LONG)
    begun.result(SECONDS)
    is_idle(llm)
    assert len(llm.generate("abc", GREEDY).token_ids) == 12


def test_a_generation_aborted_by_its_neighbour_only_is_not_touched(make_llm):
    llm = make_llm()
    expected = llm.generate("abc", MEDIUM).token_ids
    rest = in_thread(lambda: llm.generate("abc", MEDIUM).token_ids)
    for _ in range(8):
        next(llm.stream("another", LONG))
    assert rest.result(SECONDS) == expected


# -- closing --


def test_closing_twice_does_nothing_and_a_with_block_closes(tiny_folder, make_llm):
    with make_llm() as llm:
        llm.generate("abc", GREEDY)
    llm.close()
    llm.close()
    assert not llm._thread.is_running


@pytest.mark.parametrize(
    "use",
    [
        lambda llm: llm.generate("abc"),
        lambda llm: llm.generate(["abc", "def"]),
        lambda llm: llm.chat([{"role": "user", "content": "Hi"}]),
        lambda llm: llm.stream("abc"),
        lambda llm: llm.stream_many(["abc"]),
        lambda llm: llm.stats(),
    ],
    ids=["generate", "generate many", "chat", "stream", "stream many", "stats"],
)
def test_what_is_closed_says_so(llm, use):
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        use(llm)


def test_a_stream_made_before_closing_says_so_when_it_is_read(llm):
    stream = llm.stream("abc", GREEDY)
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        next(stream)


def test_closing_ends_a_generation_of_another_thread_with_what_it_has(llm):
    running = in_thread(lambda: llm.generate(["abc"] * 8, LONG))
    wait_until(lambda: llm.stats()["output_tokens"] or llm.stats()["steps"] > 5)
    llm.close()
    outputs = running.result(SECONDS)
    assert {output.finish_reason for output in outputs} == {"abort"}
    assert any(output.token_ids for output in outputs)


def test_closing_in_the_middle_of_a_stream_ends_the_stream(llm):
    reasons = []
    for event in llm.stream("abc", LONG):
        llm.close()
        reasons.append(event.finish_reason)
    assert reasons[-1] == "abort"
    assert len(reasons) < 480


def test_a_stream_dropped_after_closing_is_quiet(llm, recwarn):
    stream = llm.stream("abc", LONG)
    next(stream)
    llm.close()
    stream.close()


def test_callers_that_come_while_it_closes_end_too(make_llm):
    # Each of them is served, aborted or refused; none waits for ever.
    for _ in range(5):
        llm = make_llm()
        go = threading.Event()

        def caller(llm=llm, go=go):
            go.wait()
            try:
                return llm.generate("abc", GREEDY).finish_reason
            except EngineError as error:
                return str(error)

        callers = [in_thread(caller) for _ in range(8)]
        closing = in_thread(lambda llm=llm, go=go: (go.wait(), llm.close()))
        go.set()
        closing.result(SECONDS)
        ends = {future.result(SECONDS) for future in callers}
        assert ends <= {"length", "abort", "the engine is closed"}


def test_a_call_that_came_too_late_fails_instead_of_waiting(llm):
    thread = llm._thread
    llm.close()
    with pytest.raises(EngineError, match="closed"):
        thread.call(lambda engine: None).result(SECONDS)


def test_an_llm_that_nobody_holds_ends_its_thread(tiny_folder):
    from mlxpage import LLM

    llm = LLM(tiny_folder, num_blocks=16, on_loaded=lambda done, total: None)
    llm.generate("abc", GREEDY)
    thread, gone = llm._thread._thread, weakref.ref(llm)
    del llm
    gc.collect()
    assert gone() is None
    thread.join(SECONDS)
    assert not thread.is_alive()


def test_an_llm_in_a_cycle_may_be_collected_on_its_own_thread(llm):
    thread = llm._thread
    thread.call(lambda engine: thread.close()).result(SECONDS)
    thread._thread.join(SECONDS)
    assert not thread.is_running


# -- loading --


def test_a_load_that_fails_leaves_no_thread_and_no_memory(make_llm, tmp_path, monkeypatch):
    before, active = threading.active_count(), mx.get_active_memory()
    folder = tiny.make(tmp_path / "dynamic", rope_scaling={"type": "dynamic", "factor": 2.0})
    with pytest.raises(UnsupportedModel) as caught:
        make_llm(folder)
    assert threading.active_count() == before
    assert mx.get_active_memory() <= active, f"{caught.value} holds the weights"


def test_loading_again_and_again_leaves_no_thread_of_mlx(make_llm):
    process, counts = psutil.Process(), []
    for _ in range(10):
        with make_llm() as llm:
            llm.generate("Hello", SamplingParams(max_tokens=2))
        counts.append(process.num_threads())
    assert counts[-1] < counts[0] + 5, "those that were joined may still be about to end"


def test_a_model_that_fails_in_its_check_is_unsupported(make_llm, monkeypatch):
    error = ValueError("one position only")
    fail(monkeypatch, "mlxpage.metal.model.Model.__call__", error, times=10)
    with pytest.raises(UnsupportedModel, match="one position only"):
        make_llm()


def test_ctrl_c_while_a_model_loads_ends_the_load(make_llm, monkeypatch):
    from mlxpage.metal import model

    begun = threading.Event()

    def endless(module, on_bytes):
        for done in itertools.count():
            begun.set()
            time.sleep(0.01)
            on_bytes(done, 0)

    monkeypatch.setattr(model, "_evaluate", endless)
    before = threading.active_count()
    interrupt = in_thread(lambda: (begun.wait(SECONDS), press_ctrl_c()))
    with pytest.raises(KeyboardInterrupt):
        make_llm()
    interrupt.result(SECONDS)
    wait_until(lambda: threading.active_count() == before)


def test_loading_tells_how_far_it_is(make_llm):
    told = []
    llm = make_llm(on_loaded=lambda done, total: told.append((done, total)))
    dones, totals = zip(*told, strict=True)
    assert list(dones) == sorted(dones)
    assert {dones[-1]} == set(totals) == {llm.plan.weights}


def test_an_error_of_the_callers_own_function_ends_the_loading(make_llm):
    def cancel(done, total):
        raise TimeoutError("enough")

    with pytest.raises(EngineError, match="on_loaded raised TimeoutError: enough"):
        make_llm(on_loaded=cancel)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"num_blocks": 0}, "num_blocks"),
        ({"num_blocks": "5"}, "num_blocks"),
        ({"num_blocks": 1.5}, "num_blocks"),
        ({"block_size": 8}, "block_size"),
        ({"block_size": "16"}, "block_size"),
        ({"block_size": 16.0}, "block_size"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": None}, "max_num_seqs"),
        ({"max_num_seqs": 1000}, "max_num_seqs"),
        ({"max_num_batched_tokens": -1}, "max_num_batched_tokens"),
        ({"memory": "lots"}, "memory"),
        ({"memory": -5}, "memory"),
        ({"memory": True}, "memory"),
        ({"memory": "9" * 400 + "GB"}, "memory"),
        ({"dtype": "float8"}, "dtype"),
        ({"dtype": "array"}, "dtype"),
        ({"backend": "cuda9"}, "backend"),
        ({"seed": "x"}, "seed"),
        ({"trim_after": "1"}, "trim_after"),
        ({"trim_after": -1}, "trim_after"),
        ({"trim_after": float("nan")}, "trim_after"),
        ({"trim_after": float("inf")}, "trim_after"),
        ({"trim_after": True}, "trim_after"),
        ({"memory_pressure": 1}, "memory_pressure"),
        ({"monitor": 1}, "monitor"),
        ({"max_inter_token_ms": 0}, "max_inter_token_ms"),
        ({"max_inter_token_ms": "1"}, "max_inter_token_ms"),
        ({"folder": None}, "model"),
        ({"folder": 5}, "model"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_that_make_no_sense_are_refused_by_name(make_llm, options, named):
    with pytest.raises(InvalidRequest, match=named):
        make_llm(**options)


# -- failures --


def check_failure(llm, is_idle, monkeypatch, step: str, error: Exception, at: int) -> None:
    prompts = ["abc", "a longer one"]
    expected = [output.token_ids for output in llm.generate(prompts, GREEDY)]
    with monkeypatch.context() as patch:
        fail(patch, step, error, at)
        with pytest.raises(EngineError, match=type(error).__name__) as caught:
            for _ in range(1 + at):
                llm.generate(prompts, GREEDY)
    assert caught.value.__cause__ is error
    is_idle(llm)
    assert [output.token_ids for output in llm.generate(prompts, GREEDY)] == expected


@pytest.mark.parametrize("step", STEPS, ids=lambda name: name.removeprefix("mlxpage."))
def test_a_step_that_fails_fails_its_requests_and_the_next_one_succeeds(
    make_llm, is_idle, monkeypatch, step
):
    error = ERRORS[STEPS.index(step) % len(ERRORS)]
    at = 1 if step.endswith("finish") else 3
    check_failure(make_llm(), is_idle, monkeypatch, step, error, at)


@pytest.mark.full
@pytest.mark.parametrize("step", STEPS, ids=lambda name: name.removeprefix("mlxpage."))
def test_and_so_it_is_wherever_it_fails(make_llm, is_idle, monkeypatch, step):
    llm = make_llm()
    for at, error in itertools.product(range(25), ERRORS):
        check_failure(llm, is_idle, monkeypatch, step, error, at)


def test_a_text_that_always_fails_fails_its_own_request_only_once(make_llm, monkeypatch):
    llm = make_llm()
    with monkeypatch.context() as patch:
        fail(patch, "mlxpage.text.TextStream.finish", KeyError("no such letter"), times=10**6)
        for _ in range(2):
            with pytest.raises(EngineError, match="no such letter"):
                llm.generate("abc", GREEDY)
    assert len(llm.generate("abc", GREEDY).token_ids) == 12


def test_a_failed_step_leaves_waiting_requests_alone(make_llm, monkeypatch):
    llm = make_llm(max_num_seqs=1)
    expected = llm.generate("other", GREEDY).token_ids
    fail(monkeypatch, "mlxpage.metal.model.Model.__call__", RuntimeError("no"), at=80)

    def first():
        with pytest.raises(EngineError, match="no"):
            llm.generate("abc", MEDIUM)

    failing = in_thread(first)
    wait_until(lambda: llm.stats()["running"])
    assert llm.generate("other", GREEDY).token_ids == expected
    failing.result(SECONDS)
    assert llm.stats()["failed_steps"] == 1


def test_who_keeps_the_error_of_a_step_does_not_keep_its_arrays(make_llm, monkeypatch):
    llm = make_llm(num_blocks=4096)
    llm.generate("abc", GREEDY)
    before = llm.stats()["bytes"]["active"]
    with monkeypatch.context() as patch:
        fail(patch, "mlxpage.metal.backend.mx.eval", RuntimeError("no"), at=2)
        with pytest.raises(EngineError) as caught:
            llm.generate("abc", GREEDY)
    llm.generate("abc", GREEDY)
    grown = llm.stats()["bytes"]["active"] - before
    assert grown < llm.plan.pool / 4, f"{caught.value} holds a pool"


def test_a_pool_that_cannot_be_made_again_fails_requests_until_it_can(make_llm, monkeypatch):
    llm = make_llm()
    expected = llm.generate("abc", GREEDY).token_ids
    with monkeypatch.context() as patch:
        fail(patch, "mlxpage.metal.model.Model.__call__", RuntimeError("no"))
        fail(patch, "mlxpage.elastic_pool.KVCache", RuntimeError("no memory"), times=2)
        for told in "no", "no memory", "no memory":
            with pytest.raises(EngineError, match=told):
                llm.generate("abc", GREEDY)
        assert llm.generate("abc", GREEDY).token_ids == expected


def test_a_request_that_cannot_be_queued_fails_at_once(llm, monkeypatch):
    with monkeypatch.context() as patch:
        fail(patch, "mlxpage.scheduler.Scheduler.add", TypeError("no order"))
        with pytest.raises(TypeError, match="no order"):
            llm.generate("abc", GREEDY)
    assert len(llm.generate("abc", GREEDY).token_ids) == 12


def test_callers_are_told_when_the_thread_itself_dies(make_llm, monkeypatch):
    from mlxpage import engine
    from mlxpage import llm as doors

    monkeypatch.setattr(doors, "ALIVE_SECONDS", 0.05)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    llm = make_llm()
    monkeypatch.setattr(engine.Engine, "abort_all", lambda *_: 1 / 0)
    fail(monkeypatch, "mlxpage.scheduler.Scheduler.schedule", RuntimeError("broken"), at=3)
    with pytest.raises(EngineError, match="closed"):
        in_thread(lambda: llm.generate("abc", GREEDY)).result(SECONDS)
    with pytest.raises(EngineError, match="closed"):
        llm.stats()
    llm._thread._thread.join(SECONDS)


def test_an_engine_that_has_failed_is_looked_after_when_it_is_idle():
    class Engine:
        """Fails in its third step, and has nothing to do any more."""

        has_work, has_disk, num_steps = True, False, 0

        def step(self):
            self.num_steps += 1
            if self.num_steps == 3:
                raise MemoryError("no plan")

        def abort_all(self, error=None):
            self.has_work = False

        def trim(self):
            inbox.put(None)

    inbox = queue.SimpleQueue()
    serving = threading.Thread(
        target=engine_thread._serve, args=(Engine(), inbox, Upkeep(0.1), Pulse())
    )
    serving.start()
    serving.join(30)
    alive = serving.is_alive()
    inbox.put(None)
    serving.join(30)
    assert not alive, "nobody calls, so it sleeps for ever"
