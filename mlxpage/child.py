"""The process that an app keeps its engine in, with `AsyncEngine.load(isolate=True)`.

It does what an app does that embeds an engine: it submits requests and hears of their events. The
place where those are dispatched to is a pipe. What the other end hasn't read yet is kept as for
every slow reader: taken together, at most one event of each kind for each request.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from operator import attrgetter, methodcaller
from typing import Any
from weakref import WeakValueDictionary

from mlxpage import messages
from mlxpage.errors import EngineError, InvalidRequest
from mlxpage.events import Error, Event, Queued
from mlxpage.handle import why_not_queued

_BETWEEN_STEPS = {"trim", "set_memory"}


def freeze_support() -> None:
    """For an app that is frozen into a program of its own, as by PyInstaller: to be called at the
    beginning of its main module. Where the program was started to be the process of an engine, this
    serves the engine and doesn't return; everywhere else it does nothing."""
    if sys.argv[1:2] == [messages.FLAG]:
        main()


def main() -> None:
    """Serves until the app's process says so or ends. The pipe to it is the standard input."""
    for number in messages.IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, messages.IGNORED)  # blocked by who has started this
    if sys.stderr is not None:
        faulthandler.enable()  # says where Python was when a driver ended it
    connection = Connection(os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    _Server(connection).run()
    # Nothing is left to do, and what a GPU's driver does when Python is torn down is not always
    # good: people would be told of a crash.
    os._exit(0)


class _Server:
    def __init__(self, connection: Connection):
        self._connection = connection
        self._outbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        """Functions that put messages into the batch."""
        self._batch: list[Any] = []
        # A mailbox is kept by its engine until it has ended.
        self._mailboxes: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def run(self) -> None:
        from mlxpage.async_engine import AsyncEngine

        received = self._receive()
        if (load := next(received, None)) is None:
            return
        sender = threading.Thread(target=self._send_all, name="mlxpage-sender", daemon=True)
        sender.start()
        self._engine = AsyncEngine.load(
            **load.options,  # which the app's process has checked
            max_queued=sys.maxsize,  # and it counts the requests
            on_status=partial(self._tell_loading, "on_status"),
            on_loaded=partial(self._tell_loading, "on_loaded"),
            on_stall=lambda seconds: self._tell(messages.Stalled(time.monotonic() - seconds)),
        )
        self._engine._thread.ready.add_done_callback(self._tell_loaded)
        for message in received:
            match message:
                case messages.Begin():
                    self._begin(message)
                case messages.Cancel(number, fails):
                    if (mailbox := self._mailboxes.get(number)) is not None:
                        mailbox.cancel(EngineError("cancelled") if fails else None)
                case messages.Ask():
                    self._ask(message)
        # A step that hangs, or a pipe that nobody reads.
        last = threading.Timer(messages.CLOSE_SECONDS, os._exit, [1])
        last.daemon = True
        last.start()
        self._engine.close()
        self._outbox.put(None)
        sender.join()
        last.cancel()

    def _receive(self) -> Iterator[Any]:
        """Messages, until there won't be any."""
        parent = os.getppid()
        try:
            while True:
                while not self._connection.poll(messages.PEER_SECONDS):
                    if os.getppid() != parent:
                        return
                message = self._connection.recv()
                if isinstance(message, messages.Close):
                    return
                yield message
        except (EOFError, OSError):
            return

    # -- answers --

    def _begin(self, message: messages.Begin) -> None:
        tell = partial(self._tell_event, message.number)
        try:
            prompt, params, priority = _read(message.order)
            handle = self._engine.submit(
                prompt, params, priority=priority, on_event=tell, dispatch=self._outbox.put
            )
        except Exception as error:  # it must not end the others with the process
            self._outbox.put(partial(tell, Error(why_not_queued(error))))
        else:
            self._mailboxes[message.number] = handle._mailbox

    def _ask(self, message: messages.Ask) -> None:
        method, arguments = message.method, message.arguments
        if method in _BETWEEN_STEPS:
            asked = self._engine._thread.call(methodcaller(method, **arguments))
        else:
            asked = Future()
            try:
                value = attrgetter(method)(self._engine)
                asked.set_result(value(**arguments) if callable(value) else value)
            except Exception as error:
                asked.set_exception(error)
        asked.add_done_callback(partial(self._tell_answer, message.number))

    def _tell_answer(self, number: int, asked: Future) -> None:
        if (error := asked.exception()) is not None:
            self._tell(messages.Answer(number, error=messages.portable(error)))
        else:
            self._tell(messages.Answer(number, asked.result()))

    # -- news --

    def _tell(self, message: Any) -> None:
        self._outbox.put(partial(self._put, message))

    def _put(self, message: Any) -> None:
        self._batch.append(message)

    def _tell_loading(self, callback: str, *arguments) -> None:
        self._tell(messages.Loading(callback, arguments))

    def _tell_loaded(self, ready: Future) -> None:
        if (error := ready.exception()) is not None:
            self._tell(messages.Failed(messages.portable(error)))
        else:
            tokenizer = ready.result().tokenizer
            self._tell(messages.Loaded(tokenizer.eos_token_ids, tokenizer.has_chat_template))

    def _tell_event(self, number: int, event: Event) -> None:
        """On the sender's thread."""
        if isinstance(event, Error):
            event = replace(event, error=messages.portable(event.error))
        if not isinstance(event, Queued):  # which the app has been told when it submitted
            self._put(messages.Happened(number, event))

    def _send_all(self) -> None:
        """Sends what there is, all at once, and waits for more. Whoever is slow to read is waited
        for here, while events are taken together in their mailboxes."""
        goes_on = True
        try:
            while goes_on:
                goes_on = self._fill(self._outbox.get())
                with suppress(queue.Empty):
                    while goes_on:
                        goes_on = self._fill(self._outbox.get_nowait())
                batch, self._batch = self._batch, []
                if batch:
                    self._connection.send(batch)
        except OSError:
            return  # nobody hears it any more
        except Exception:
            # Better no process than one that nobody hears of: the app starts another.
            traceback.print_exc()
            os._exit(1)

    def _fill(self, put: Callable[[], None] | None) -> bool:
        if put is not None:
            put()
        return put is not None


def _read(order: bytes) -> tuple:
    try:
        return pickle.loads(order)
    except Exception as error:
        raise InvalidRequest(
            f"the engine's process can't read the request: {type(error).__name__}: {error}. Give "
            "it plain texts, lists and dicts, and nothing of a class that only the app has."
        ) from error
