"""MLX on this machine: every module of ours takes `mx` from here.

Importing it loads a fast BLAS first where MLX runs on the CPU, which must come before MLX.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass
from types import ModuleType

from mlxpage import blas

BLAS = blas.load()

import mlx.core as mx  # noqa: E402
import psutil  # noqa: E402

__all__ = ["BLAS", "Device", "device", "mlx_lm_utils", "mx"]


@dataclass(frozen=True, slots=True)
class Device:
    """Where MLX computes, and how much memory it may use there."""

    kind: str  # "metal", "cuda" or "cpu"
    name: str
    memory: int
    """Bytes that the device can work with: of unified memory on a Mac, Metal's recommended part."""
    max_buffer: int
    """The largest single array, in bytes."""


def device() -> Device:
    """The default device of this process."""
    info = mx.device_info()
    name = str(info.get("device_name", "CPU"))
    installed = psutil.virtual_memory().total
    if mx.default_device() == mx.cpu:
        return Device("cpu", name, installed, 2**63)
    kind = "metal" if mx.metal.is_available() else "cuda"
    recommended = info.get("max_recommended_working_set_size")  # Metal
    memory = int(recommended or info.get("total_memory") or installed)
    return Device(kind, name, memory, int(info.get("max_buffer_length") or 2**63))


def mlx_lm_utils() -> ModuleType:
    """`mlx_lm.utils`, which takes a second or two to import.

    Its import lowers RLIMIT_NOFILE of the process, the hard limit too, which an ordinary user
    can't raise again. A host app keeps its own.
    """
    set_limit = resource.setrlimit
    resource.setrlimit = lambda *_: None
    try:
        import mlx_lm.utils
    finally:
        resource.setrlimit = set_limit
    return mlx_lm.utils
