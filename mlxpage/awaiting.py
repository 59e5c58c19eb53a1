"""Waiting in an app's event loop, be it asyncio's or trio's, for what another thread does."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


class Signal:
    """Given once, by any thread, to the task that has made it."""

    def __init__(self):
        trio = sys.modules.get("trio")
        if trio is not None and trio.lowlevel.in_trio_task():
            self._event = trio.Event()
            self._call_soon = trio.lowlevel.current_trio_token().run_sync_soon
        else:
            self._event = asyncio.Event()
            self._call_soon = asyncio.get_running_loop().call_soon_threadsafe

    def give(self) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody waits in it
            self._call_soon(self._event.set)

    async def wait(self) -> None:
        await self._event.wait()


async def outcome(future: Future[T]) -> T:
    """What `future` comes to. Who gives up waiting doesn't cancel it."""
    signal = Signal()
    future.add_done_callback(lambda _: signal.give())
    await signal.wait()
    return future.result()


async def in_thread(function: Callable[[], T]) -> T:
    """What `function` gives, on a thread of its own, which goes on when nobody waits any more."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="mlxpage-awaited").start()
    return await outcome(future)
