"""What a machine says of itself: commands and their answers, and files."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path

from mlxpage import __version__

CHIP = ("sysctl", "-n", "machdep.cpu.brand_string")
TRANSLATED = ("sysctl", "-n", "sysctl.proc_translated")
WIRED_LIMIT = ("sysctl", "-n", "iogpu.wired_limit_mb")
GPU = ("ioreg", "-r", "-d", "1", "-c", "AGXAccelerator")
POWER_SOURCE = ("pmset", "-g", "batt")
POWER_SETTINGS = ("pmset", "-g")

_SECONDS = 5  # for a command: these answer at once
_DAY = 86_400


def versions() -> dict[str, str]:
    """Of this package, what it stands on, and Python."""
    from importlib.metadata import version  # takes as long as all of this module

    return {
        "mlxpage": __version__,
        "mlx": version("mlx"),
        "mlx_lm": version("mlx-lm"),
        "python": platform.python_version(),
    }


def ask(command: tuple[str, ...]) -> str | None:
    """What a command prints; None if it isn't there, fails or doesn't answer."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


# Each reads one of the answers, and gives None for what it can't read.


def line(text: str | None) -> str | None:
    return (text or "").strip().partition("\n")[0] or None


def number(text: str | None) -> int | None:
    found = line(text) or ""
    return int(found) if found.isdecimal() else None


def cpu_model(cpuinfo: str | None) -> str | None:
    """Of /proc/cpuinfo."""
    found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", cpuinfo or "", re.MULTILINE)
    return found and found[1].strip()


def gpu_cores(ioreg: str | None) -> int | None:
    found = re.search(r'"gpu-core-count"\s*=\s*([0-9]+)', ioreg or "")
    return found and int(found[1])


def is_on_battery(source: str | None) -> bool | None:
    found = re.search(r"drawing from '([^']+)'", source or "")
    return found and found[1] == "Battery Power"


def saves_power(settings: str | None) -> bool | None:
    """Whether the low-power mode is on, as macOS has named it at different times."""
    found = re.search(r"^\s*(?:lowpowermode|powermode)\s+([0-9]+)", settings or "", re.MULTILINE)
    return found and found[1] == "1"


def recent_panics(folder: Path, days: int) -> int | None:
    """How many reports of kernel panics are there that are no older. They aren't read."""
    oldest = time.time() - days * _DAY
    try:
        with os.scandir(folder) as files:
            panics = [file for file in files if file.name.endswith(".panic")]
            return sum(file.stat().st_mtime >= oldest for file in panics)
    except OSError:
        return None
