"""The CPU's streams of a thread. MLX runs each on a thread of its own, which it never ends
(mlx/scheduler.cpp), so a thread that ends leaves its streams to those that come after it."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from functools import cache, partial

from mlxpage.metal.backend import mx

_MAX_STREAMS = 4  # of a thread
_MAX_BORROWERS = 4  # at once


class _Borrowed(threading.local):
    streams: list[mx.Stream] | None = None


def _num_streams() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MAX_STREAMS)


# All of them now: MLX looks such streams up without a lock, so none may be made while others are in
# use. Each gets its thread when it is used, or all do: without a GPU, `mx.clear_cache` waits for
# every stream of the process, used or not.
_idle = [
    [mx.new_thread_unsafe_stream(mx.cpu) for _ in range(_num_streams())]
    for _ in range(_MAX_BORROWERS)
]
os.register_at_fork(after_in_child=_idle.clear)  # their threads aren't there
_borrowed = _Borrowed()


def borrow() -> None:
    """Gives the calling thread the CPU's streams of one that has ended; it must `hand_back` when it
    ends itself. If there are too many at once, it has its own, whose threads stay."""
    with suppress(IndexError):
        _borrowed.streams = _idle.pop()
        mx.set_default_stream(_borrowed.streams[0])


def hand_back() -> None:
    """Ends the calling thread's use of MLX: what it borrowed is still its default stream, but may
    be another's now."""
    streams, _borrowed.streams = _borrowed.streams, None
    used = (streams or [])[: None if mx.default_device() == mx.cpu else 1]
    # A failure that nobody has read yet is raised by whatever waits for its stream next, and that
    # should not be the next thread; clearing the cache waits for everybody's.
    for wait in (*(partial(mx.synchronize, stream) for stream in used), mx.clear_cache):
        with suppress(Exception):
            wait()
    mx.clear_streams()  # what is the thread's own: the GPU's, and compiled functions
    if streams is not None:
        _idle.append(streams)


def cpu_streams() -> list[mx.Stream | mx.ThreadLocalStream | None]:
    """One for each of the CPU's cores, of the calling thread: MLX runs the operations of a stream
    one after the other, each on a single core. None is the default stream; on a GPU it's the only
    one."""
    if mx.default_device() != mx.cpu:
        return [None]
    return [None, *(_borrowed.streams or _own())[1:]]


@cache
def _own() -> list[mx.ThreadLocalStream]:
    """Of every thread that has borrowed none."""
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(_num_streams())]
