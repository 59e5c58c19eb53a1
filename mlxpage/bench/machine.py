"""Where something was measured: what every record says of it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil

from mlxpage import probes
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


def chip() -> str:
    if platform.system() == "Darwin":
        found = probes.line(probes.ask(probes.CHIP))
    else:
        found = probes.cpu_model(_cpuinfo())
    return found or platform.processor() or platform.machine()


def _cpuinfo() -> str | None:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def power() -> str | None:
    """Where a Mac's power comes from, and whether it saves it; None elsewhere."""
    if platform.system() != "Darwin":
        return None
    return power_of(probes.ask(probes.POWER_SOURCE), probes.ask(probes.POWER_SETTINGS))


def power_of(source: str | None, settings: str | None) -> str | None:
    """Of what `pmset -g batt` and `pmset -g` say."""
    on_battery = probes.is_on_battery(source)
    if on_battery is None:
        return None
    told = "battery" if on_battery else "mains"
    return f"{told}, low-power mode" if probes.saves_power(settings) else told
