"""How short of memory this machine is, as macOS tells it."""

from __future__ import annotations

import ctypes
import sys

NORMAL, WARNING, CRITICAL = 1, 2, 4
"""Values of kern.memorystatus_vm_pressure_level: green, yellow and red in Activity Monitor."""


def level() -> int:
    """NORMAL, WARNING or CRITICAL; NORMAL on systems that don't tell."""
    if sys.platform != "darwin":
        return NORMAL
    value = ctypes.c_int(NORMAL)
    size = ctypes.c_size_t(ctypes.sizeof(value))
    name = b"kern.memorystatus_vm_pressure_level"
    ctypes.CDLL(None).sysctlbyname(
        name, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t()
    )
    return value.value
