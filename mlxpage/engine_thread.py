"""The one thread that owns an engine, and with it every call of MLX."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from mlxpage.errors import EngineError, forget_locals
from mlxpage.monitor import start as start_monitor
from mlxpage.upkeep import Upkeep

if TYPE_CHECKING:
    from mlxpage.engine import Engine

T = TypeVar("T")


class Pulse:
    """What other threads see of an engine's thread."""

    step_began: float | None = None
    """`time.monotonic` when the step that is under way began; None between steps."""


class EngineThread:
    """Runs an engine: steps while there is work, sleeps while there is none.

    Functions given to `call` run between steps. The thread ends with `close`, at the latest when
    the interpreter does, and frees the engine's memory: MLX's streams belong to threads, and a
    thread that is still in MLX while the interpreter is torn down ends the process with a crash.
    """

    def __init__(
        self,
        make_engine: Callable[[threading.Event], Engine],
        upkeep: Upkeep | None = None,
        monitor: str | None = None,
    ):
        """Makes the engine on the new thread; `wait` for it. With a `monitor`, which is the name of
        its model, other processes of this user can watch it.

        The event that `make_engine` gets is set when nobody wants the engine any more. It is this
        thread that imports MLX, if nobody has: whoever starts it goes on at once.
        """
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        # Not as an argument: a thread keeps those, and what they refer to, as long as it runs.
        self._inbox.put(make_engine)
        closing = threading.Event()
        self._ended = threading.Event()
        self.ready: Future[Engine] = Future()
        self.ready.set_running_or_notify_cancel()  # nobody who waits may cancel it for the others
        self.pulse = Pulse()
        self._thread = threading.Thread(
            target=_run,
            args=(
                *(self._inbox, self.ready, closing, self._ended),
                *(upkeep or Upkeep(), monitor, self.pulse),
            ),
            name="mlxpage-engine",
            daemon=True,
        )
        # Runs when this object goes or the interpreter ends, whichever comes first.
        self.close = weakref.finalize(self, _stop, self._thread, self._inbox, closing)
        self._thread.start()

    def wait(self) -> Engine:
        """The engine, when it is made; raises what `make_engine` does. To be interrupted, by Ctrl-C
        say, closes it."""
        try:
            return self.ready.result()
        except BaseException:
            self.close()
            raise

    @property
    def engine(self) -> Engine:
        """Raises EngineError unless it is made."""
        if not self.ready.done():
            raise EngineError("the model is still loading; wait for it")
        if self.ready.exception() is not None:
            raise self.refusal()
        return self.ready.result()

    def refusal(self) -> EngineError:
        """What to tell those who come when it has ended."""
        return closed(self.ready)

    @property
    def is_running(self) -> bool:
        """False once it has ended, and in a forked child, where it never was."""
        return self._thread.is_alive() and not self._ended.is_set()

    @property
    def is_current(self) -> bool:
        return self._thread is threading.current_thread()

    def restart(self) -> None:
        raise EngineError(
            "a thread can't be ended from outside: only an engine in a process of its own can be "
            "restarted. Load it with isolate=True."
        )

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Runs `function(engine)` on the thread, between steps, or as soon as there is an engine.
        The future fails with `EngineError` when the engine is closed before that."""
        future = _call(self._inbox, function)
        if not self.is_running:  # who ended it may have emptied the inbox just before
            refuse_calls(self._inbox, self.ready)
        return future


def _call(inbox: queue.SimpleQueue, function: Callable[[Engine], T]) -> Future[T]:
    future: Future[T] = Future()
    inbox.put((function, future))
    return future


def closed(ready: Future) -> EngineError:
    """What to tell those who come when an engine has ended, or never was."""
    failure = ready.exception() if ready.done() else None
    if failure is None:
        return EngineError("the engine is closed")
    error = EngineError(f"the model could not be loaded: {failure}")
    error.__cause__ = failure
    return error


def _stop(thread: threading.Thread, inbox: queue.SimpleQueue, closing: threading.Event) -> None:
    closing.set()
    inbox.put(None)
    # The garbage collector may call this on any thread, Ctrl-C before the thread has begun.
    if thread.is_alive() and thread is not threading.current_thread():
        thread.join()


def _run(
    inbox: queue.SimpleQueue,
    ready: Future,
    closing: threading.Event,
    ended: threading.Event,
    upkeep: Upkeep,
    monitor: str | None,
    pulse: Pulse,
) -> None:
    streams = None
    try:
        from mlxpage.metal import streams

        streams.borrow()
        engine = inbox.get()(closing)
    except BaseException as error:
        # Who catches the error must not keep the weights that were loaded so far.
        forget_locals(error)
        ready.set_exception(error)
    else:
        watched = None if monitor is None else start_monitor(monitor, partial(_call, inbox))
        ready.set_result(engine)
        _serve(engine, inbox, upkeep, pulse)
        if watched is not None:
            watched.close()
        engine.close()
        del engine
    finally:
        ended.set()
        refuse_calls(inbox, ready)
        if streams is not None:
            streams.hand_back()


# Seconds until an idle engine is looked after again: not at once, for that may be what has failed.
_AFTER_FAILURE = 1.0


def _serve(engine: Engine, inbox: queue.SimpleQueue, upkeep: Upkeep, pulse: Pulse) -> None:
    seconds: float | None = 0.0
    while _answer_calls(engine, inbox, seconds):
        try:
            if engine.has_work:
                pulse.step_began = time.monotonic()
                engine.step()
            pulse.step_began = None
            seconds = upkeep.run(engine)
        except Exception as error:  # a step fails its own requests; this one couldn't
            failure = EngineError(f"the engine failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            engine.abort_all(failure)
            pulse.step_began = None
            seconds = _AFTER_FAILURE
    engine.abort_all()


def _answer_calls(engine: Engine, inbox: queue.SimpleQueue, seconds: float | None) -> bool:
    """Runs what is in the inbox; if there is no work, waits for something, so many seconds or as
    long as it takes. False to end."""
    try:
        call = inbox.get(block=not engine.has_work, timeout=seconds)
        while call is not None:
            _answer(engine, *call)
            call = inbox.get(block=False)
    except queue.Empty:
        return True
    return False


def _answer(engine: Engine, function: Callable, future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function(engine))
    except BaseException as error:
        future.set_exception(error)


def refuse_calls(inbox: queue.SimpleQueue, ready: Future) -> None:
    """Ends the calls that nobody answers any more."""
    try:
        while True:
            call = inbox.get_nowait()
            if isinstance(call, tuple) and call[1].set_running_or_notify_cancel():
                call[1].set_exception(closed(ready))
    except queue.Empty:
        pass
