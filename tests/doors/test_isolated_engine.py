"""An engine in a process of its own: what the other process does, the app survives and is told."""

import gc
import inspect
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import deque
from contextlib import contextmanager
from multiprocessing import Pipe, set_executable
from multiprocessing.spawn import get_executable

import psutil
import pytest
import tiny_folder as tiny
from doors.conftest import OFFLINE, ROOT
from trouble import fail, in_thread, wait_until

from mlxpage import (
    AsyncEngine,
    EngineError,
    InvalidModel,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    SamplingParams,
    child,
    engine_process,
    far_engine,
    messages,
)
from mlxpage.door import Door
from mlxpage.events import Done, Error, Tokens

SECONDS = 120  # a new process imports for as long as the machine is busy
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=480, ignore_eos=True)


class App:
    """What an app is told beside events."""

    def __init__(self):
        self.status, self.loaded, self.stalled = [], [], []

    def tell(self, line: str) -> None:
        self.status.append(line)

    def options(self) -> dict:
        return {
            "isolate": True,
            "on_status": self.tell,
            "on_loaded": lambda done, total: self.loaded.append((done, total)),
            "on_stall": self.stalled.append,
            "stall_after": 0.0,
        }


@pytest.fixture(scope="module")
def app():
    return App()


@pytest.fixture(scope="module")
def shared(app, tiny_folder):
    with AsyncEngine.load(tiny_folder, **app.options()) as engine:
        yield engine


@pytest.fixture
def engine(shared):
    """Ready, however often it was killed before."""
    shared._thread._keeper._deaths.clear()
    yield shared.wait(SECONDS)
    shared.wait(SECONDS)
    shared.trim()  # between two steps
    stats = shared.stats()
    counts = stats["running"], stats["waiting"], stats["blocks"]["used"], stats["open"]
    assert counts == (0, 0, 0, 0)


@pytest.fixture
def load():
    """load(folder, **options), closed in the end."""
    made = []

    def loading(folder, **options):
        made.append(AsyncEngine.load(folder, **{"num_blocks": 64, "isolate": True, **options}))
        return made[-1]

    yield loading
    for engine in made:
        engine.close()


def pid_of(engine) -> int:
    wait_until(lambda: engine._thread._keeper._child)
    return engine._thread._keeper._child._process.pid


def signalled(number):
    return lambda engine: os.kill(pid_of(engine), number)


class Exits:
    """Ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (7,)


def exits(engine):
    engine.submit([Exits()])


def hangs_and_is_restarted(engine):
    os.kill(pid_of(engine), signal.SIGSTOP)
    engine.restart()


def until(handle, kind) -> None:
    assert any(isinstance(event, kind) for event in handle)


# -- its process dies --


@pytest.mark.parametrize(
    "end, told",
    [
        (signalled(signal.SIGKILL), "was ended by SIGKILL"),
        (exits, "ended by itself, with exit code 7"),
        (hangs_and_is_restarted, "was ended by SIGKILL"),
        pytest.param(signalled(signal.SIGSEGV), "by SIGSEGV", marks=pytest.mark.full),
        pytest.param(signalled(signal.SIGABRT), "by SIGABRT", marks=pytest.mark.full),
    ],
)
def test_when_its_process_dies_requests_end_and_the_next_ones_are_served(engine, app, end, told):
    expected = engine.submit("abc", GREEDY).result(SECONDS).token_ids
    dead = pid_of(engine)
    open_ = [engine.submit("abc", LONG) for _ in range(4)]
    listened = []
    engine.submit("abc", LONG, on_event=listened.append)
    until(open_[0], Tokens)
    end(engine)
    for handle in open_:
        with pytest.raises(EngineError, match=f"{told} before the request had ended"):
            handle.result(SECONDS)
    assert engine.state == "loading"
    meanwhile = engine.submit("abc", GREEDY)
    cancelled = engine.submit("abc", GREEDY)
    cancelled.cancel()
    assert cancelled.result(0).finish_reason == "abort"
    assert meanwhile.result(SECONDS).token_ids == expected
    assert engine.state == "ready" and pid_of(engine) != dead
    assert isinstance(listened[-1], Error)
    assert told in app.status[-1]
    assert not psutil.pid_exists(dead), "a zombie"


@pytest.mark.full
def test_fifty_kills_at_any_moment_are_survived_and_leave_nothing(engine, monkeypatch):
    monkeypatch.setattr(engine_process, "MOST_DEATHS", 1000)
    rng = random.Random(3)
    expected = engine.submit("abc", GREEDY).result(SECONDS).token_ids
    here = psutil.Process()
    before, failed = None, 0
    for _ in range(50):
        handles = [engine.submit("abc", LONG) for _ in range(8)]
        time.sleep(rng.random() / 5)
        os.kill(pid_of(engine), rng.choice([signal.SIGKILL, signal.SIGSEGV]))
        for handle in handles:
            error = handle._mailbox.result.exception(SECONDS)
            assert error is None or "before the request had ended" in str(error)
            failed += error is not None
        assert engine.submit("abc", GREEDY).result(SECONDS).token_ids == expected
        gc.collect()
        now = here.num_fds(), threading.active_count(), len(here.children())
        before = before or now
        assert now == before
    assert failed > 50


def test_a_process_that_dies_three_times_is_given_up(load, tiny_folder):
    told = []
    engine = load(tiny_folder, on_status=told.append)
    handle = engine.submit("abc")
    for _ in range(3):
        dead = pid_of(engine)
        os.kill(dead, signal.SIGKILL)
        wait_until(lambda dead=dead: pid_of(engine) != dead or engine.state == "failed")
    with pytest.raises(EngineError, match=r"SIGKILL. It was the last of 3 ends within 5 minutes"):
        engine.wait(SECONDS)
    assert engine.state == "failed"
    with pytest.raises(EngineError, match="load another"):
        handle.result(SECONDS)
    with pytest.raises(EngineError, match="load another"):
        engine.submit("abc")
    again = "the engine's process was ended by SIGKILL; the model is loaded again"
    assert told.count(again) == 2


def test_deaths_of_long_ago_do_not_count(engine, monkeypatch):
    keeper = engine._thread._keeper
    monkeypatch.setattr(engine_process, "WITHIN_SECONDS", -1.0)
    assert [keeper._is_given_up() for _ in range(5)] == [False] * 5


def test_a_thread_cannot_be_restarted(tiny_folder):
    engine = AsyncEngine.load(tiny_folder, num_blocks=64)
    with engine, pytest.raises(EngineError, match="isolate=True"):
        engine.restart()


def test_the_next_process_has_the_memory_that_was_set(engine):
    with pytest.raises(OutOfMemory):
        engine.set_memory("1MB")
    engine.set_memory("60MB")
    engine.restart()
    wait_until(lambda: engine.state == "loading")
    assert engine.wait(SECONDS).plan.budget == 60e6


def test_what_an_engine_says_of_itself_is_asked_of_its_process(engine):
    """Whatever a `Door` reads of the engine that it has."""
    far, read = engine._engine, set(re.findall(r"self\._engine\.(\w+)", inspect.getsource(Door)))
    assert read and all(hasattr(far, name) for name in read)
    assert engine.context_length == min(tiny.CONTEXT, engine.plan.tokens)


# -- loading --


@pytest.mark.parametrize(
    "options, error",
    [({"model": "/no/such/folder"}, ModelNotFound), ({"memory": "100KB"}, OutOfMemory)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_model_that_cannot_be_loaded_says_why_and_is_not_tried_again(
    load, tiny_folder, options, error
):
    engine = load(options.pop("model", tiny_folder), **{"num_blocks": None, **options})
    handle = engine.submit("abc")
    with pytest.raises(error):
        engine.wait(SECONDS)
    assert engine.state == "failed"
    with pytest.raises(EngineError, match="could not be loaded"):
        handle.result(SECONDS)
    with pytest.raises(EngineError, match="could not be loaded"):
        engine.submit("abc")


def test_signals_to_all_of_an_apps_processes_end_none_that_has_hardly_begun(load):
    told = []
    engine = load("/no/such/folder", on_status=told.append)
    for number in messages.IGNORED:
        os.kill(pid_of(engine), number)
    with pytest.raises(ModelNotFound):
        engine.wait(SECONDS)
    assert told == []


def test_an_app_is_told_how_far_it_is_and_of_steps_that_stall(engine, app):
    assert app.loaded[-1][0] == app.loaded[-1][1] == engine.plan.weights
    # Looked for now and then, so that short steps are seen by chance: there have to be many.
    handles = [engine.submit("abc", LONG) for _ in range(200)]
    wait_until(lambda: app.stalled)
    for handle in handles:
        handle.cancel()


def test_an_error_of_on_loaded_ends_the_loading(load, tiny_folder):
    engine = load(tiny_folder, on_loaded=lambda done, total: 1 / 0)
    with pytest.raises(EngineError, match="on_loaded raised ZeroDivisionError"):
        engine.wait(SECONDS)
    assert engine.state == "failed"


def test_python_that_cannot_be_started_is_told(load, tiny_folder, executable):
    executable("/no/such/python")
    with pytest.raises(EngineError, match=r"no process for the engine can be started: .*python"):
        load(tiny_folder).wait(SECONDS)
    executable("")
    with pytest.raises(EngineError, match="set_executable"):
        load(tiny_folder).wait(SECONDS)


@pytest.fixture
def executable():
    """Says what Python is, as an app does that has one of its own."""
    before = get_executable()
    yield set_executable
    set_executable(before)


def test_an_app_that_is_one_program_serves_engines_by_itself(
    load, tmp_path, monkeypatch, executable
):
    app = tmp_path / "app"
    app.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path[:] = {sys.path}\n"
        "from mlxpage import freeze_support\nfreeze_support()\nsys.exit('the app begins')\n"
    )
    app.chmod(0o755)
    executable(str(app))
    monkeypatch.setattr(sys, "executable", str(app))
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert engine_process.command() == [str(app), "--mlxpage-engine"]
    with pytest.raises(ModelNotFound):
        load("/no/such/folder").wait(SECONDS)
    ended = subprocess.run([app], capture_output=True, text=True, timeout=SECONDS)
    assert (ended.returncode, ended.stderr) == (1, "the app begins\n")


# -- closing --


def test_closing_ends_streams_with_what_they_have_and_the_process(load, tiny_folder):
    here = psutil.Process()
    before = here.num_fds(), threading.active_count()
    engine = load(tiny_folder, num_blocks=256).wait(SECONDS)
    process = psutil.Process(pid_of(engine))
    handles = [engine.submit("abc", LONG) for _ in range(4)]
    until(handles[0], Tokens)
    engine.close()
    assert not process.is_running()
    assert engine.state == "closed"
    for handle in handles:
        assert handle.result(0).finish_reason == "abort"
        assert isinstance(list(handle)[-1], Done)
    assert handles[0].result().token_ids
    with pytest.raises(EngineError, match="closed"):
        engine.submit("abc")
    assert engine.stats() == {"state": "closed", "open": 0, "queued": 0, "step_s": None}
    wait_until(lambda: (here.num_fds(), threading.active_count()) == before)


def test_a_process_that_does_not_end_when_asked_is_killed(load, tiny_folder, monkeypatch):
    monkeypatch.setattr(messages, "CLOSE_SECONDS", 0.1)
    engine = load(tiny_folder)
    process = psutil.Process(pid_of(engine))
    handle = engine.submit("abc")
    process.suspend()
    engine.close()
    assert not process.is_running()
    with pytest.raises(EngineError, match="closed while"):
        engine.wait()
    with pytest.raises(EngineError, match="closed while"):
        handle.result(0)


def test_a_process_that_hangs_and_reads_nothing_can_be_closed(load, tiny_folder, monkeypatch):
    monkeypatch.setattr(messages, "CLOSE_SECONDS", 0.1)
    monkeypatch.setattr(engine_process, "EXIT_SECONDS", 0.1)
    engine = load(tiny_folder).wait(SECONDS)
    process = psutil.Process(pid_of(engine))
    process.suspend()
    handles = [engine.submit("x" * 10**6) for _ in range(3)]  # more than fits into a pipe
    monkeypatch.setattr(far_engine, "STATS_SECONDS", 0.1)
    assert engine.stats() == {"state": "ready", "open": 3, "queued": 3, "step_s": None}
    engine.close()
    assert not process.is_running()
    for handle in handles:
        with pytest.raises(EngineError, match="the engine is closed"):
            handle.result(SECONDS)


def test_an_engine_that_nobody_holds_ends_its_process(tiny_folder):
    before = threading.active_count()
    app = App()
    app.engine = AsyncEngine.load(tiny_folder, **app.options())  # which the engine knows in turn
    process = psutil.Process(pid_of(app.engine))
    del app
    gc.collect()
    wait_until(lambda: not process.is_running() and threading.active_count() == before)


@pytest.mark.full
@pytest.mark.parametrize("waits, count", [(True, 20), (False, 100)], ids=["loaded", "loading"])
def test_loading_and_closing_leaks_nothing(tiny_folder, waits, count):
    here = psutil.Process()
    before = None
    for _ in range(count):
        engine = AsyncEngine.load(tiny_folder, num_blocks=64, isolate=True)
        if waits:
            engine.wait(SECONDS).submit("abc", GREEDY).result(SECONDS)
        engine.close()
        del engine
        gc.collect()
        now = here.num_fds(), threading.active_count(), len(here.children())
        before = before or now
        assert now == before


# -- its app --

BEGIN = """
import os, signal, sys, time
print("begins", flush=True)
from mlxpage import AsyncEngine, SamplingParams
long = SamplingParams(max_tokens=480, ignore_eos=True)
engine = AsyncEngine.load(sys.argv[1], num_blocks=256, isolate=True).wait()
process = engine._thread._keeper._child._process.pid
stream = engine.submit("abc", long)
for event in stream:
    if type(event).__name__ == "Tokens":
        break
"""


@contextmanager
def program(tmp_path, folder, code: str):
    """A script of its own group of processes, without a guard around what it does."""
    script = tmp_path / "app.py"
    script.write_text(BEGIN + textwrap.dedent(code))
    running = subprocess.Popen(
        [sys.executable, script, folder],
        cwd=ROOT,
        env=os.environ | OFFLINE | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def test_the_process_ends_with_an_app_that_is_killed(tmp_path, tiny_folder):
    code = """
    print(process, flush=True)
    time.sleep(60)
    """
    with program(tmp_path, tiny_folder, code) as running:
        assert running.stdout.readline() == "begins\n"
        process = psutil.Process(int(running.stdout.readline()))
        running.kill()
        wait_until(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE)


def test_ctrl_c_in_a_terminal_is_for_the_app_alone(tmp_path, tiny_folder):
    code = """
    import threading
    last = [engine.submit("abc", long, priority=1) for _ in range(60)][-1]  # of some seconds
    threading.Timer(0.5, print, ["waits"], {"flush": True}).start()  # while the main thread does
    try:
        last.result()
        time.sleep(60)
    except KeyboardInterrupt:
        print(last.result().finish_reason)
    again = engine.submit("abc", SamplingParams(max_tokens=4, ignore_eos=True)).result()
    print(len(again.token_ids), process == engine._thread._keeper._child._process.pid)
    print({name.partition(".")[0] for name in sys.modules} & {"mlx", "mlx_lm", "transformers"})
    sys.exit(7)
    """
    with program(tmp_path, tiny_folder, code) as running:
        # Once: the script isn't run again in the engine's process.
        assert running.stdout.readline() == "begins\n"
        assert running.stdout.readline() == "waits\n"
        for number in messages.IGNORED - {signal.SIGINT}:
            for process in psutil.Process(running.pid).children():
                process.send_signal(number)
        os.killpg(running.pid, signal.SIGINT)
        out, err = running.communicate(timeout=SECONDS)
    assert (running.returncode, err) == (7, "")
    assert out == "abort\n4 True\nset()\n"


# -- the other side of the pipe, in this process --


@contextmanager
def served(folder, **options):
    """(send, receive, server): a server on a thread, and what its app does."""
    ours, theirs = Pipe()
    server = child._Server(theirs)
    ended = in_thread(server.run)
    received = deque()

    def receive():
        if not received:
            assert ours.poll(SECONDS)
            received.extend(ours.recv())
        return received.popleft()

    try:
        ours.send(messages.Load({"model": folder, "num_blocks": 256, **options}))
        yield ours.send, receive, server
    finally:
        ours.close()
        ended.result(SECONDS)
        theirs.close()


def begin(number: int, *order) -> messages.Begin:
    return messages.Begin(number, pickle.dumps(order))


def events_of(number: int, receive) -> list:
    events = []
    while not (events and isinstance(events[-1], (Done, Error))):
        message = receive()
        if isinstance(message, messages.Happened) and message.number == number:
            events.append(message.event)
    return events


def test_what_an_app_does_not_read_is_taken_together(tiny_folder):
    curious = SamplingParams(temperature=0, max_tokens=480, ignore_eos=True, logprobs=20)
    with served(tiny_folder) as (send, receive, server):
        while not isinstance(receive(), messages.Loaded):
            pass
        for number in range(4):
            send(begin(number, "abc", curious, 0))
        wait_until(lambda: server._engine.stats()["output_tokens"] == 4 * 480)
        events = events_of(3, receive)
    tokens = [event for event in events if isinstance(event, Tokens)]
    assert len(tokens) < 240
    assert [t for event in tokens for t in event.token_ids] == events[-1].output.token_ids
    assert len(events[-1].output.logprobs) == 480


def test_a_failed_step_is_told_with_what_it_came_from(tiny_folder, monkeypatch):
    with served(tiny_folder) as (send, receive, _):
        fail(monkeypatch, "mlxpage.metal.model.Model.__call__", RuntimeError("no"), at=6)
        send(begin(1, "abc", LONG, 0))
        events = events_of(1, receive)
    failed = events[-1]
    assert type(failed.error) is EngineError
    assert str(failed.error) == "a step failed: RuntimeError: no"
    assert "RuntimeError: no" in failed.error.__notes__[0]
    assert failed.output.token_ids


def test_a_request_that_cannot_be_read_fails_alone(tiny_folder):
    with served(tiny_folder) as (send, receive, _):
        send(begin(1, "abc", GREEDY, 0))
        send(messages.Begin(2, b"\x80"))
        (unread,) = events_of(2, receive)
        assert isinstance(unread.error, InvalidRequest)
        send(begin(3, [5, 6], GREEDY, 0))
        assert isinstance(events_of(3, receive)[-1], Done)


def test_a_request_that_fails_unforeseen_fails_alone(tiny_folder, monkeypatch):
    with served(tiny_folder) as (send, receive, _):
        while not isinstance(receive(), messages.Loaded):
            pass
        with monkeypatch.context() as patch:
            fail(patch, "mlxpage.text.Tokenizer.encode", RuntimeError("no"))
            send(begin(1, "abc", GREEDY, 0))
            (failed,) = events_of(1, receive)
        assert type(failed.error) is EngineError and "RuntimeError: no" in str(failed.error)
        send(begin(2, "abc", GREEDY, 0))
        assert isinstance(events_of(2, receive)[-1], Done)


def test_a_request_that_cannot_be_sent_is_refused_at_once(engine):
    with pytest.raises(InvalidRequest, match="can't be sent"):
        engine.submit([threading.Lock()])
    assert engine.stats()["open"] == 0


@pytest.mark.parametrize(
    "error, kind",
    [
        (InvalidModel("no"), InvalidModel),
        (TimeoutError("no"), TimeoutError),
        (psutil.NoSuchProcess(5, msg="no"), EngineError),
        (ValueError(threading.Lock(), "no"), EngineError),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_errors_cross_as_what_the_other_side_can_raise(error, kind):
    crossed = pickle.loads(pickle.dumps(messages.portable(error)))
    assert type(crossed) is kind and "no" in str(crossed)
