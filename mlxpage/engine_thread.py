"""The one thread that owns an engine, and with it every call of MLX."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from mlxpage.backend import mx
from mlxpage.engine import Engine
from mlxpage.errors import EngineError

T = TypeVar("T")


class EngineThread:
    """Runs an engine: steps while there is work, sleeps while there is none.

    Functions given to `call` run between steps. The thread ends with `close`, at the latest when
    the interpreter does, and frees the engine's memory: MLX's streams belong to threads, and a
    thread that is still in MLX while the interpreter is torn down ends the process with a crash.
    """

    def __init__(self, make_engine: Callable[[threading.Event], Engine]):
        """Makes the engine on the new thread and waits for it; raises what `make_engine` does.

        The event that `make_engine` gets is set when nobody wants the engine any more.
        """
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        closing = threading.Event()
        ready: Future[Engine] = Future()
        thread = threading.Thread(
            target=_run,
            args=(make_engine, self._inbox, ready, closing),
            name="mlxpage-engine",
            daemon=True,
        )
        thread.start()
        # Runs when this object goes or the interpreter ends, whichever comes first.
        self.close = weakref.finalize(self, _stop, thread, self._inbox, closing)
        try:
            self.engine = ready.result()
        except BaseException:
            self.close()
            raise

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Runs `function(engine)` on the thread, between steps."""
        if not self.close.alive:
            raise EngineError("the engine is closed")
        future: Future[T] = Future()
        self._inbox.put((function, future))
        return future


def _stop(thread: threading.Thread, inbox: queue.SimpleQueue, closing: threading.Event) -> None:
    closing.set()
    inbox.put(None)
    thread.join()


def _run(make_engine, inbox: queue.SimpleQueue, ready: Future, closing: threading.Event) -> None:
    try:
        engine = make_engine(closing)
    except BaseException as error:
        ready.set_exception(error)
    else:
        ready.set_result(engine)
        del ready
        while _serve_calls(engine, inbox):
            if engine.has_work:
                engine.step()
        engine.abort_all()
        engine.close()
        del engine
    mx.clear_cache()
    mx.clear_streams()


def _serve_calls(engine: Engine, inbox: queue.SimpleQueue) -> bool:
    """Runs what is in the inbox, and waits for something if there is no work; False to end."""
    while True:
        try:
            item = inbox.get(block=not engine.has_work)
        except queue.Empty:
            return True
        if item is None:
            return False
        function, future = item
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(function(engine))
        except BaseException as error:
            future.set_exception(error)
