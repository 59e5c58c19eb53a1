"""Waiting in an app's event loop, be it asyncio's or trio's, for what another thread does."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import nullcontext, suppress
from typing import Any, TypeVar

T = TypeVar("T")


def _trio() -> Any:
    """The module, in a task of trio's."""
    trio = sys.modules.get("trio")
    return trio if trio is not None and trio.lowlevel.in_trio_task() else None


class Signal:
    """Given once, by any thread, to the task that has made it."""

    def __init__(self):
        if (trio := _trio()) is not None:
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
    """What `function` gives, on a thread of its own, which goes on when nobody waits any more.
    In a cancelled scope of trio's it's waited for all the same: each wait there is cancelled anew,
    also that of an `async with` at its end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="mlxpage-awaited").start()
    with trio.CancelScope(shield=True) if (trio := _trio()) else nullcontext():
        return await outcome(future)
