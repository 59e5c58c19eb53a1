"""The memory of arrays, MLX's and numpy's, as buffers of a kernel."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .launch import Buffer

# numpy has no bfloat16, and a byte that isn't 0 or 1 is no bool.
_BITS = {mx.bfloat16: np.uint16, mx.bool_: np.uint8}

Array = mx.array | np.ndarray


def as_array(value: object) -> Array:
    """Numbers become arrays, as in MLX. numpy's are for sizes that memory hasn't room for."""
    return value if isinstance(value, (mx.array, np.ndarray)) else mx.array(value)


def dtype_of(array: Array) -> mx.Dtype:
    """MLX's name for it."""
    if isinstance(array, mx.array):
        return array.dtype
    return getattr(mx, "bool_" if array.dtype == bool else array.dtype.name)


def is_contiguous(array: Array) -> bool:
    """Row-contiguous; evaluates the array."""
    if isinstance(array, mx.array):
        mx.eval(array)
    return array.size == 0 or memoryview(array).c_contiguous


def contiguous(array: Array) -> Array:
    """A copy that is."""
    return np.ascontiguousarray(array) if isinstance(array, np.ndarray) else mx.contiguous(array)


def input_buffer(name: str, array: Array, *, writable: bool = False) -> Buffer:
    """The array's own memory, so that what the kernel writes there is in the array."""
    if not is_contiguous(array):
        raise ValueError(f"'{name}' isn't row-contiguous")
    address = _address(array)
    skew = (address - _alignment()) % 16 if isinstance(array, mx.array) else 0
    return Buffer(
        *(name, address, array.nbytes, array.itemsize),
        writable=writable,
        floats=mx.issubdtype(dtype_of(array), mx.floating),
        skew=skew if array.size else 0,
        keep=array,
    )


def _address(array: Array) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(array)) if array.size else 0


@functools.cache
def _alignment() -> int:
    """Where MLX's own memory begins, modulo 16: on a CPU not at 0, as it would for Metal.

    What begins elsewhere is a slice, and a kernel would get it as it is, aligned or not.
    """
    whole = mx.zeros(4)
    mx.eval(whole)
    return _address(whole) % 16


def description(name: str, of: Array, what: str) -> Buffer:
    """``shape``, ``strides`` or ``ndim`` of an input that is row-contiguous."""
    shape = of.shape
    if what == "shape":
        values = np.array(shape, np.int32)
    elif what == "strides":
        values = np.array([math.prod(shape[i + 1 :]) for i in range(len(shape))], np.int64)
    else:
        values = np.array(len(shape), np.int32)
    return Buffer(name, values.ctypes.data, values.nbytes, values.itemsize, keep=values)


class Output:
    """Memory for an output; ``array`` makes MLX's array of it."""

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        dtype: mx.Dtype,
        *,
        init_value: float | None = None,
        may_stay_unwritten: bool = False,
    ):
        self.dtype = dtype
        if init_value is None:
            bits = _BITS.get(dtype) or np.array(mx.zeros((), dtype)).dtype
            self.values = np.empty(tuple(shape), bits)
        else:
            filled = mx.full(tuple(shape), init_value, dtype)
            self.values = np.array(filled.view(mx.uint16) if dtype == mx.bfloat16 else filled)
        self.buffer = Buffer(
            name,
            self.values.ctypes.data,
            self.values.nbytes,
            self.values.itemsize,
            initialised=init_value is not None,
            writable=True,
            must_be_written=init_value is None and not may_stay_unwritten,
            floats=mx.issubdtype(dtype, mx.floating),
            keep=self.values,
        )

    def array(self) -> mx.array:
        array = mx.array(self.values)
        return array.view(self.dtype) if self.dtype in _BITS else array
