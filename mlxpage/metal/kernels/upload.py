"""Arrays that the host makes, where kernels read them fast."""

from __future__ import annotations

import os
from functools import cache, lru_cache

import numpy as np

from mlxpage.metal.backend import mx
from mlxpage.metal.kernels.launch import LEAST, on_cuda, padded


def upload(*arrays: np.ndarray) -> list[mx.array]:
    """Arrays of one dtype, each as a flat MLX array of at least 8 elements, brought together.

    On CUDA what `mx.array` makes is managed memory: pages that lie where they were last touched. A
    kernel that reads one after the host has written to it waits some 100 us, and those of all such
    arrays, of this step and the next, lie side by side. What MLX loads from a file it copies into
    memory of the GPU, so these go by a file, which is in memory too.
    """
    if not _goes_by_file():
        return [padded(array) for array in arrays]
    counts = [max(LEAST, array.size) for array in arrays]
    starts = np.cumsum([0, *(-(-count // LEAST) * LEAST for count in counts)]).tolist()
    flat = np.zeros(starts[-1], arrays[0].dtype)
    for array, start in zip(arrays, starts, strict=False):
        flat[start : start + array.size] = array.reshape(-1)
    together = _loaded(flat)
    return [together[start : start + count] for start, count in zip(starts, counts, strict=False)]


@lru_cache(4096)
def ints(*values: int) -> mx.array:
    return _kept(np.array(values, np.int32))


@lru_cache(256)
def floats(scale: float, softcap: float) -> mx.array:
    return _kept(np.array([scale, softcap], np.float32))


def _kept(array: np.ndarray) -> mx.array:
    """For steps to come, of any thread."""
    (kept,) = upload(array)
    mx.eval(kept)
    return kept


@cache
def _goes_by_file() -> bool:
    return on_cuda() and hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")


def _loaded(flat: np.ndarray) -> mx.array:
    with open(os.memfd_create("mlxpage"), "wb", buffering=0) as file:
        file.write(_header(flat.size, flat.dtype.str) + flat.tobytes())
        path = f"/proc/self/fd/{file.fileno()}"
        array = mx.load(path, format="npy", stream=_stream())  # has the file open too
    mx.async_eval(array)
    return array


@cache
def _stream() -> mx.ThreadLocalStream:
    """Of copies alone: one from memory that the GPU can't read waits, and the host with it, for all
    that its stream has before."""
    return mx.new_thread_local_stream(mx.default_device())


@lru_cache(1024)
def _header(count: int, descr: str) -> bytes:
    """Of a file in NumPy's format, version 1."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': ({count},), }}"
    text += " " * (-(len(text) + 11) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
