"""The one thread that owns an engine, and with it every call of MLX."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from mlxpage.engine import Engine, forget_locals
from mlxpage.errors import EngineError
from mlxpage.metal.backend import mx
from mlxpage.upkeep import Upkeep

T = TypeVar("T")


class EngineThread:
    """Runs an engine: steps while there is work, sleeps while there is none.

    Functions given to `call` run between steps. The thread ends with `close`, at the latest when
    the interpreter does, and frees the engine's memory: MLX's streams belong to threads, and a
    thread that is still in MLX while the interpreter is torn down ends the process with a crash.
    """

    def __init__(
        self, make_engine: Callable[[threading.Event], Engine], upkeep: Upkeep | None = None
    ):
        """Makes the engine on the new thread and waits for it; raises what `make_engine` does.

        The event that `make_engine` gets is set when nobody wants the engine any more.
        """
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        # Not as an argument: a thread keeps those, and what they refer to, as long as it runs.
        self._inbox.put(make_engine)
        closing = threading.Event()
        self._ended = threading.Event()
        ready: Future[Engine] = Future()
        self._thread = threading.Thread(
            target=_run,
            args=(self._inbox, ready, closing, self._ended, upkeep or Upkeep()),
            name="mlxpage-engine",
            daemon=True,
        )
        # Runs when this object goes or the interpreter ends, whichever comes first.
        self.close = weakref.finalize(self, _stop, self._thread, self._inbox, closing)
        try:  # Ctrl-C may come at any moment from here on
            self._thread.start()
            self.engine = ready.result()
        except BaseException:
            self.close()
            raise

    @property
    def is_running(self) -> bool:
        """False once it has ended, and in a forked child, where it never was."""
        return self._thread.is_alive() and not self._ended.is_set()

    @property
    def is_current(self) -> bool:
        return self._thread is threading.current_thread()

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Runs `function(engine)` on the thread, between steps. The future fails with
        `EngineError` when the engine is closed before that."""
        future: Future[T] = Future()
        self._inbox.put((function, future))
        if not self.is_running:  # who ended it may have emptied the inbox just before
            _refuse_calls(self._inbox)
        return future


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
) -> None:
    try:
        engine = inbox.get()(closing)
    except BaseException as error:
        # Who catches the error must not keep the weights that were loaded so far.
        forget_locals(error)
        ready.set_exception(error)
    else:
        ready.set_result(engine)
        _serve(engine, inbox, upkeep)
        engine.close()
        del engine
    finally:
        ended.set()
        _refuse_calls(inbox)
        mx.clear_cache()
        mx.clear_streams()


# Seconds until an idle engine is looked after again: not at once, for that may be what has failed.
_AFTER_FAILURE = 1.0


def _serve(engine: Engine, inbox: queue.SimpleQueue, upkeep: Upkeep) -> None:
    seconds: float | None = 0.0
    while _answer_calls(engine, inbox, seconds):
        try:
            if engine.has_work:
                engine.step()
            seconds = upkeep.run(engine)
        except Exception as error:  # a step fails its own requests; this one couldn't
            failure = EngineError(f"the engine failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
            engine.abort_all(failure)
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


def _refuse_calls(inbox: queue.SimpleQueue) -> None:
    try:
        while True:
            call = inbox.get_nowait()
            if isinstance(call, tuple) and call[1].set_running_or_notify_cancel():
                call[1].set_exception(EngineError("the engine is closed"))
    except queue.Empty:
        pass
