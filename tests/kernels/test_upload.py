"""Arrays of the host on their way to a GPU: by a file on CUDA, as one parameter has it anywhere."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest

from mlxpage.metal.backend import mx
from mlxpage.metal.kernels import upload as module
from mlxpage.metal.kernels.upload import floats, ints, upload

needs_files_in_memory = pytest.mark.skipif(
    not hasattr(os, "memfd_create"), reason="CUDA is Linux's"
)


@pytest.fixture(params=["as they are", pytest.param("by a file", marks=needs_files_in_memory)])
def way(request, monkeypatch):
    monkeypatch.setattr(module, "_goes_by_file", lambda: request.param == "by a file")
    ints.cache_clear()
    floats.cache_clear()
    yield request.param
    ints.cache_clear()
    floats.cache_clear()


def test_arrays_come_flat_and_with_8_elements_at_least(way):
    rng = np.random.default_rng(0)
    for _ in range(20):
        shapes = [(1,), (3, 5), (8,), (64, 32), (9,), (7,)][: rng.integers(1, 7)]
        arrays = [rng.integers(0, 2**31, shape, dtype=np.int32) for shape in shapes]
        for array, came in zip(arrays, upload(*arrays), strict=True):
            assert came.dtype == mx.int32
            assert came.shape == (max(8, array.size),)
            assert np.array_equal(np.array(came)[: array.size], array.reshape(-1))


def test_what_is_kept_for_other_steps_is_computed_once(way):
    assert np.array(ints(5, -7))[:2].tolist() == [5, -7]
    assert ints(5, -7) is ints(5, -7)
    kept = np.array(floats(0.1, 30.0))
    assert kept.dtype == np.float32
    assert len(kept) == 8
    assert np.array_equal(kept[:2], np.array([0.1, 30.0], np.float32))


def test_an_earlier_array_stays_what_it_was(way):
    first = upload(np.arange(1000, dtype=np.int32))[0]
    second = upload(np.zeros(1000, np.int32))[0]
    assert np.array_equal(np.array(first), np.arange(1000))
    assert not np.array(second).any()


def test_a_trace_may_keep_some(way):
    @mx.compile
    def add(x):
        return x + ints(3, 4)

    for _ in range(2):
        assert np.array(add(mx.zeros(8, mx.int32)))[:2].tolist() == [3, 4]


def test_threads_bring_their_own(way):
    came = {}

    def bring(number):
        for _ in range(50):
            array = np.full(100 + number, number, np.int32)
            came.setdefault(number, []).append(np.array(upload(array)[0]))
        mx.clear_streams()

    threads = [threading.Thread(target=bring, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, arrays in came.items():
        assert len(arrays) == 50
        assert all((array == number).all() and len(array) == 100 + number for array in arrays)


@needs_files_in_memory
def test_no_file_stays_open(monkeypatch):
    monkeypatch.setattr(module, "_goes_by_file", lambda: True)
    kept = upload(np.arange(3, dtype=np.int32))
    before = len(os.listdir("/proc/self/fd"))
    for i in range(100):
        kept += upload(np.array([i], np.int32), np.array([i], np.int32))
        mx.eval(kept)
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # of what came last
    thread = threading.Thread(target=lambda: mx.eval(upload(np.zeros(8, np.int32))))
    thread.start()
    thread.join()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
