"""Where something was measured: what every record says of it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import version
from typing import Any

import psutil

import mlxpage
from mlxpage.metal.backend import BLAS, device


def machine() -> dict[str, Any]:
    """Chip, cores, memory in bytes, system, power and the device that MLX computes on."""
    return {
        "chip": chip(),
        "cores": os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.mac_ver()[0] or platform.release()}",
        "architecture": platform.machine(),
        "power": power(),
        "device": f"{device().kind} ({device().name})",
        "blas": BLAS and os.path.basename(str(BLAS)),
    }


def versions() -> dict[str, str]:
    return {
        "mlxpage": mlxpage.__version__,
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "python": platform.python_version(),
    }


def chip() -> str:
    if platform.system() == "Darwin":
        return _said("sysctl", "-n", "machdep.cpu.brand_string").strip() or platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            found = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def power() -> str | None:
    """Where a Mac's power comes from, and whether it saves it; None elsewhere."""
    if platform.system() != "Darwin":
        return None
    return power_of(_said("pmset", "-g", "batt"), _said("pmset", "-g"))


def power_of(battery: str, settings: str) -> str | None:
    """Of what `pmset -g batt` and `pmset -g` say."""
    source = re.search(r"drawing from '([^']+)'", battery)
    if source is None:
        return None
    is_low = re.search(r"^\s*(?:lowpowermode|powermode)\s+1\b", settings, re.MULTILINE)
    return f"{source[1]}{', low power mode' if is_low else ''}"


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
