"""Threads that come and go leave MLX's streams, and their threads, to those that come later."""

import subprocess
import sys
import threading

import psutil
import pytest

from mlxpage.metal import streams
from mlxpage.metal.backend import mx


def on_threads(count, function=lambda: None):
    """Computes on each of the streams of so many threads at once, then calls `function`; what
    streams they had, once all have ended."""
    used, all_began = [], threading.Barrier(count, timeout=60)

    def run():
        streams.borrow()
        try:
            all_began.wait()
            mine = [mx.default_stream(mx.cpu), *streams.cpu_streams()[1:]]
            for stream in mine:  # `mx.stream` would change the default device of all threads
                assert mx.arange(1, 11, stream=stream).tolist() == list(range(1, 11))
            used.append(mine)
            function()
        finally:
            streams.hand_back()

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return used


def test_threads_one_after_the_other_use_the_same_streams():
    first = on_threads(1)
    before = psutil.Process().num_threads()
    for _ in range(20):
        assert on_threads(1) == first
    # One that was joined may still be about to end.
    assert psutil.Process().num_threads() < before + 10


def test_threads_at_once_have_streams_of_their_own():
    used = [str(stream) for each in on_threads(3) for stream in each]
    assert len(used) == len(set(used)) == 3 * len(streams.cpu_streams())


def test_more_threads_than_there_are_streams_for_have_others():
    count = streams._MAX_BORROWERS + 3
    assert len(on_threads(count)) == count
    assert len(streams._idle) == streams._MAX_BORROWERS


def test_a_failure_that_nobody_has_read_is_not_handed_on():
    singular = mx.zeros((2, 2))
    mx.eval(singular)

    def fail():
        mx.eval(mx.ones(1000) + 1)  # leaves something in MLX's cache: without, it waits for nobody
        for stream in streams.cpu_streams():
            failing = mx.linalg.inv(singular, stream=stream or mx.default_stream(mx.cpu))
            mx.async_eval(failing)

    first = on_threads(1, fail)
    assert len(first) == 1
    assert len(streams._idle) == streams._MAX_BORROWERS
    assert on_threads(1) == first


FORK = """
import os
from mlxpage.metal import streams
before = len(streams._idle)
child = os.fork()
if child == 0:
    os._exit(len(streams._idle))
print(before, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(streams._idle))
"""


def test_a_forked_child_borrows_nothing_of_its_parent():
    run = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    most = streams._MAX_BORROWERS
    assert run.stdout == f"{most} 0 {most}\n", run.stderr


@pytest.mark.parametrize("device", [mx.cpu, mx.gpu])
def test_a_gpu_has_one_stream(monkeypatch, device):
    monkeypatch.setattr(mx, "default_device", lambda: device)
    spread = streams.cpu_streams()
    assert spread[0] is None
    assert len(spread) == (streams._num_streams() if device == mx.cpu else 1)
