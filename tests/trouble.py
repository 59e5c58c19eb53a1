"""Waiting for what other threads do, and making things fail."""

import importlib
import itertools
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

SECONDS = 30


def wait_until(condition) -> None:
    limit = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.002)


def in_thread(function) -> ThreadPoolExecutor:
    """The future of `function()` on a thread of its own."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(function)
    pool.shutdown(wait=False)
    return future


def press_ctrl_c() -> None:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)


STEPS = [
    "mlxpage.batch.Batch.of",
    "mlxpage.batch.copies_of",
    "mlxpage.metal.kv_cache.KVCache.begin",
    "mlxpage.metal.kv_cache.KVCache.copy",
    "mlxpage.metal.kv_cache.KVCache.written",
    "mlxpage.metal.layer_cache.LayerCache.update_and_fetch",
    "mlxpage.metal.layer_cache.LayerCache.attend",
    "mlxpage.metal.model.Model.__call__",
    "mlxpage.started.sample",
    "mlxpage.metal.backend.mx.eval",
    "mlxpage.engine.Engine._plan",
    "mlxpage.engine.Engine._start",
    "mlxpage.engine.Engine._record",
    "mlxpage.engine.Engine._fail_broken",
    "mlxpage.served.Served.tell_progress",
    "mlxpage.scheduler.Scheduler.schedule",
    "mlxpage.scheduler.Scheduler.update",
    "mlxpage.block_manager.BlockManager.allocate",
    "mlxpage.prefix_cache.PrefixCache.match",
    "mlxpage.text.TextStream.add",
    "mlxpage.text.TextStream.finish",
]
ERRORS = [
    RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory"),
    TypeError("something is None"),
    MemoryError(),
]


def fail(monkeypatch, name: str, error: Exception, at: int = 0, times: int = 1) -> None:
    """Makes calls number `at` to `at + times - 1` of a function raise."""
    owner, _, attribute = name.rpartition(".")
    owner = _resolve(owner)
    real = getattr(owner, attribute)
    calls = itertools.count()

    def flaky(*args, **kwargs):
        if at <= next(calls) < at + times:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, attribute, flaky)


def _resolve(name: str):
    parts = name.split(".")
    found = importlib.import_module(".".join(parts[:2]))
    for part in parts[2:]:
        found = getattr(found, part)
    return found
