"""An engine in a process of its own, as `AsyncEngine` sees it: the place of an `EngineThread`."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from multiprocessing import Pipe, spawn
from typing import Any, TypeVar

from mlxpage import messages
from mlxpage.engine_thread import Pulse, closed, refuse_calls
from mlxpage.errors import EngineError, MlxpageError
from mlxpage.events import Done, Error, Event
from mlxpage.far_engine import FarEngine, FarRequest, numbers

T = TypeVar("T")

MOST_DEATHS, WITHIN_SECONDS = 3, 300.0
"""So many in that time, and the process isn't started again."""
EXIT_SECONDS = 5.0  # for a process that has closed its end of the pipe

_CODE = "import sys; sys.path[:] = sys.argv[1:]; from mlxpage.child import main; main()"
ENDS = (Done, Error)


def command() -> list[str]:
    """What starts a process for an engine: Python, or an app that is frozen into a program and
    calls `freeze_support`. Nothing of the app's own code runs in it."""
    executable = spawn.get_executable()  # `multiprocessing.set_executable` may have changed it
    if not executable:
        raise EngineError(
            "Python doesn't know its own executable, to run an engine in another process. Tell it "
            "by multiprocessing.set_executable, or load the model without isolate."
        )
    executable = os.fsdecode(executable)
    if getattr(sys, "frozen", False) and executable == sys.executable:
        return [executable, messages.FLAG]
    return [executable, "-c", _CODE, *map(str, sys.path)]


class EngineProcess:
    """Runs an engine in a child process, and a new one when that dies.

    What an `EngineThread` is for an engine in this process. Functions given to `call` get a `Child`
    in the place of an `Engine`. Two threads belong to it: one starts the process, waits for its end
    and sends what there is to send, the other hears what it tells. Neither waits for anyone who
    reads events, and neither keeps this object: with it the process ends, or with the interpreter.
    """

    def __init__(
        self,
        options: dict[str, Any],
        on_status: Callable[[str], None] | None,
        on_loaded: Callable[[int, int], None] | None,
    ):
        """`options` of `AsyncEngine.load`, which can be pickled. Starts to load, and returns."""
        self.callbacks = {"on_status": on_status, "on_loaded": on_loaded}
        self._keeper = keeper = Keeper(options, weakref.ref(self))
        # Runs when this object goes or the interpreter ends, whichever comes first.
        self.close = weakref.finalize(self, keeper.close)
        keeper.thread.start()

    @property
    def ready(self) -> Future[FarEngine]:
        """Of the process that runs now: another one after each death."""
        return self._keeper.ready

    @property
    def engine(self) -> FarEngine:
        """Raises EngineError while the model is loaded, also when it is loaded again."""
        ready = self.ready
        if not ready.done():
            raise EngineError("the model is still loading; wait for it")
        if ready.exception() is not None:
            raise self.refusal()
        return ready.result()

    @property
    def pulse(self) -> Pulse:
        """Of steps that take longer than `stall_after`."""
        return self._keeper.pulse

    def refusal(self) -> EngineError:
        return closed(self.ready)

    @property
    def is_running(self) -> bool:
        """False once it has been closed, or given up; in a forked process too."""
        return self._keeper.is_running

    def call(self, function: Callable[[Child], T]) -> Future:
        """Runs `function(child)`, which doesn't wait, as soon as a model is loaded. If it gives a
        future, what that gives."""
        return self._keeper.call(function)

    def restart(self) -> None:
        if not self.is_running:
            raise self.refusal()
        self._keeper.restart()


class Keeper:
    """Keeps a child process going, on a thread of its own."""

    def __init__(self, options: dict[str, Any], owner: weakref.ref[EngineProcess]):
        self._options = options
        self._owner = owner
        self._folder = os.getcwd()  # paths are relative to it, whenever the process is started
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        """Calls, children of which there is something new, and None to end."""
        self._early: deque[tuple[Callable, Future]] = deque()
        """Calls that wait for a model."""
        self._deaths: list[float] = []
        self._child: Child | None = None
        self._ended = threading.Event()
        self.pulse = Pulse()
        self.ready = _promise()
        self.thread = threading.Thread(target=self._run, name="mlxpage-keeper", daemon=True)

    # -- on any thread --

    @property
    def is_running(self) -> bool:
        return self.thread.is_alive() and not self._ended.is_set()

    def call(self, function: Callable[[Child], T]) -> Future:
        future: Future = Future()
        self._inbox.put((function, future))
        if not self.is_running:  # who ended it may have emptied the inbox just before
            refuse_calls(self._inbox, self.ready)
        return future

    def _ask(self, method: str, **arguments) -> Future:
        return self.call(lambda running: running.ask(method, **arguments))

    def restart(self) -> None:
        if (running := self._child) is not None:
            running.kill(is_death=False)

    def close(self) -> None:
        self._inbox.put(None)
        # The garbage collector may call this on any thread, and a callback on the reader's.
        mine = self.thread, self._child and self._child.reader
        if self.thread.is_alive() and threading.current_thread() not in mine:
            self.thread.join(messages.CLOSE_SECONDS + EXIT_SECONDS)
            # It is still sending, if it hasn't ended: to a process that hangs and reads nothing.
            self.restart()
            self.thread.join()

    # -- on its own --

    def _run(self) -> None:
        # A new process begins with them blocked, until it has a mind to ignore them.
        signal.pthread_sigmask(signal.SIG_BLOCK, messages.IGNORED)
        try:
            goes_on = self._start()
            while goes_on and (item := self._inbox.get()) is not None:
                goes_on = self._take(item)
            if goes_on:
                self._end()
        finally:
            if not self.ready.done():
                self.ready.set_exception(EngineError("closed while the model was loading"))
            while self._early:
                self._inbox.put(self._early.popleft())
            self._ended.set()
            refuse_calls(self._inbox, self.ready)

    def _start(self) -> bool:
        try:
            self._child = Child(self, self._folder, dict(self._options))
        except (OSError, RuntimeError, EngineError) as error:
            failure = EngineError(f"no process for the engine can be started: {error}")
            failure.__cause__ = error
            self.ready.set_exception(failure)
            return False
        return True

    def _take(self, item: Any) -> bool:
        """False to end."""
        if isinstance(item, Child):
            if item is not self._child:
                return True
            return self._after_death(item) if item.has_ended else self._after_loading(item)
        if self.ready.done():
            _answer(self._child, *item)
        else:
            self._early.append(item)
        return True

    def _after_loading(self, loaded: Child) -> bool:
        self.ready.set_result(FarEngine(self._ask, loaded.facts))
        while self._early:
            _answer(loaded, *self._early.popleft())
        return True

    def _after_death(self, dead: Child) -> bool:
        # In this order: who hears of it sees what has become of the engine.
        self.pulse.step_began = None
        if self.ready.done():
            self.ready = _promise()
        failure, told = dead.failure, f"the engine's process {dead.end}"
        if failure is None and dead.is_death and self._is_given_up():
            failure = EngineError(
                f"{told}. It was the last of {MOST_DEATHS} ends within {WITHIN_SECONDS / 60:.0f} "
                "minutes, and none is started again. See what it wrote to the standard error; then "
                "close this engine and load another, with less memory perhaps."
            )
        if failure is None:
            failure = self.tell("on_status", f"{told}; the model is loaded again")
        if failure is not None:
            self.ready.set_exception(failure)
        dead.fail(EngineError(f"{told} before the request had ended"))
        return failure is None and self._start()

    def _is_given_up(self) -> bool:
        now = time.monotonic()
        self._deaths = [*(at for at in self._deaths if now - at < WITHIN_SECONDS), now]
        return len(self._deaths) >= MOST_DEATHS

    def tell(self, name: str, *arguments) -> EngineError | None:
        """Calls one of the app's functions; the error that this ends the loading with."""
        owner = self._owner()
        function = owner and owner.callbacks[name]
        del owner
        try:
            if function is not None:
                function(*arguments)
        except Exception as error:
            failure = EngineError(f"{name} raised {type(error).__name__}: {error}")
            failure.__cause__ = error
            return failure
        return None

    def _end(self) -> None:
        """Asks the process to end, and sees to it that it does."""
        ending = self._child
        ending.send(messages.Close())
        if not self._has_ended(ending, messages.CLOSE_SECONDS):
            ending.kill()
        self.pulse.step_began = None
        if not self.ready.done() and ending.failure is not None:
            self.ready.set_exception(ending.failure)
        ending.fail(EngineError("the engine is closed"))

    def _has_ended(self, ending: Child, seconds: float) -> bool:
        limit = time.monotonic() + seconds
        while not ending.has_ended:
            try:
                item = self._inbox.get(timeout=max(0.0, limit - time.monotonic()))
            except queue.Empty:
                return False
            if isinstance(item, tuple):
                self._early.append(item)
        return True

    def news_of(self, told: Child) -> None:
        self._inbox.put(told)

    def keep_option(self, name: str, value: Any) -> None:
        """For the processes to come."""
        self._options[name] = value


class Child:
    """A process, from its start to its end. It belongs to the keeper's thread, and what it tells is
    heard on one of its own."""

    def __init__(self, keeper: Keeper, folder: str, options: dict[str, Any]):
        """Raises OSError, RuntimeError or EngineError if it can't be started."""
        self._keeper = keeper
        self._requests: dict[int, FarRequest] = {}
        self._questions: dict[int, Future] = {}
        self.facts: messages.Loaded | None = None
        self.failure: Exception | None = None
        """Why it can't load the model; None: it may be that the next one can."""
        self.is_death = True
        """Whether its end counts as one: nobody has asked for it."""
        self.has_ended = False
        self.end = ""
        """In words, once it has come."""
        self._connection, theirs = Pipe()
        self.reader = threading.Thread(target=self._hear, name="mlxpage-reader", daemon=True)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command(), stdin=theirs.fileno(), stdout=subprocess.DEVNULL, cwd=folder
                )
            self.reader.start()
        except BaseException:
            self._connection.close()  # which ends the process, if there is one
            raise
        self.send(messages.Load(options))

    def send(self, message: Any) -> None:
        with suppress(OSError):  # it has died, which the reader is about to hear
            self._connection.send(message)

    def kill(self, *, is_death: bool = True) -> None:
        """On any thread."""
        self.is_death = is_death
        self._process.kill()

    def fail(self, error: EngineError) -> None:
        """Ends everything that waits for it, once it has ended itself or been killed."""
        self.reader.join()
        self._connection.close()
        for request in list(self._requests.values()):
            request.put(Error(error))
        for question in list(self._questions.values()):
            question.set_exception(error)

    # -- what is asked of an engine --

    def add(self, request: FarRequest) -> None:
        self._requests[request.id] = request
        self.send(messages.Begin(request.id, request.order))

    def abort(self, number: int, error: MlxpageError | None = None) -> None:
        if (request := self._requests.get(number)) is not None:
            request.reason = error
            self.send(messages.Cancel(number, error is not None))

    def ask(self, method: str, **arguments) -> Future:
        question = _promise()
        number = next(numbers)
        self._questions[number] = question
        self.send(messages.Ask(number, method, arguments))
        return question

    def trim(self, *, cached: bool) -> Future[int]:
        return self.ask("trim", cached=cached)

    def set_memory(self, memory: str | int | None) -> Future[None]:
        changed = self.ask("set_memory", memory=memory)
        keep = partial(self._keeper.keep_option, "memory", memory)
        changed.add_done_callback(lambda changed: changed.exception() or keep())
        return changed

    # -- what it tells --

    def _hear(self) -> None:
        try:
            while True:
                while not self._connection.poll(messages.PEER_SECONDS):
                    if self._process.poll() is not None:
                        raise EOFError
                for message in self._connection.recv():
                    self._take(message)
        except (EOFError, OSError):
            pass
        finally:
            self.end = _in_words(self._wait())
            self.has_ended = True
            self._keeper.news_of(self)

    def _wait(self) -> int:
        try:
            return self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _take(self, message: Any) -> None:
        match message:
            case messages.Happened(number, event):
                self._keeper.pulse.step_began = None
                if (request := self._requests.get(number)) is not None:
                    self._pass_on(request, event)
            case messages.Answer(number, value, error):
                question = self._questions.pop(number)
                question.set_exception(error) if error else question.set_result(value)
            case messages.Stalled(began):
                self._keeper.pulse.step_began = began
            case messages.Loading(callback, arguments):
                if failure := self._keeper.tell(callback, *arguments):
                    self._end_loading(failure)
            case messages.Loaded():
                self.facts = message
                self._keeper.news_of(self)
            case messages.Failed(error):
                self._end_loading(error)

    def _pass_on(self, request: FarRequest, event: Event) -> None:
        if isinstance(event, ENDS):
            del self._requests[request.id]
        if isinstance(event, Error) and request.reason is not None:
            event = Error(request.reason, event.output)
        request.put(event)

    def _end_loading(self, failure: Exception) -> None:
        self.failure = self.failure or failure
        self._process.kill()


def _promise() -> Future:
    """One that nobody who waits can cancel for the others."""
    future: Future = Future()
    future.set_running_or_notify_cancel()
    return future


def _answer(running: Child, function: Callable, future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function(running)
    except BaseException as error:
        future.set_exception(error)
        return
    if isinstance(result, Future):
        result.add_done_callback(partial(_hand_on, future))
    else:
        future.set_result(result)


def _hand_on(future: Future, done: Future) -> None:
    if (error := done.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(done.result())


def _in_words(code: int) -> str:
    if code >= 0:
        return f"ended by itself, with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
