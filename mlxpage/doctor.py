"""What `mlxpage doctor` looks at: whether this machine can serve models, and what is in the way."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

import mlxpage
from mlxpage import model_store, probes
from mlxpage.sizes import gigabytes

State = Literal["ok", "advice", "problem", "unknown"]


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    state: State
    found: str
    way_out: str | None = None


@dataclass
class Host:
    """The machine, as the checks ask it."""

    system: str = field(default_factory=platform.system)
    machine: str = field(default_factory=platform.machine)
    macos: str = field(default_factory=lambda: platform.mac_ver()[0].replace("10.16", ""))
    """Old Pythons are told that all later ones are 10.16; "" where it isn't known."""
    ask: Callable[[tuple[str, ...]], str | None] = probes.ask
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    panics: Path = Path("/Library/Logs/DiagnosticReports")
    cpuinfo: Path = Path("/proc/cpuinfo")

    @property
    def is_mac(self) -> bool:
        return self.system == "Darwin"


class Range(NamedTuple):
    """Versions that are known to serve: from `least` on, and below `below`."""

    least: str
    below: str | None
    outside: State
    why: str


VERSIONS = {
    "mlx": Range(
        "0.32.4",
        None,
        "problem",
        "earlier ones take kernels of one name for each other, or end the process when the GPU "
        "fails",
    ),
    "mlx-lm": Range(
        "0.32.2",
        "0.33",
        "advice",
        "attention is reached by a name inside mlx-lm; the tests have seen these versions only",
    ),
}
_LEAST_MACOS = "14"  # what MLX's wheels are built for
_SPARE_MEMORY = 2e9
_SPARE_DISK = 5e9
_PANIC_DAYS = 30
# K, or V, of a token in a layer, and its layers times two: Llama 3 8B in 16 bits.
_TYPICAL_ROW, _TYPICAL_ARRAYS = 2048, 64


def examine(host: Host | None = None) -> Iterator[Check]:
    """Looks at one thing after the other. Whatever fails to be looked at is unknown."""
    host = host or Host()
    for name, check in (_CHECKS | (_CHECKS_OF_A_MAC if host.is_mac else {})).items():
        try:
            found = check(host)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            found = "unknown", f"can't be looked at: {type(error).__name__}: {reason}"
        if found is not None:
            yield Check(name, *found)


# Each gives a state, what it found, and where there is one the way out; None where it has no say.
Found = tuple[State, str] | tuple[State, str, str] | None


def _mlxpage(host: Host) -> Found:
    system = f"macOS {host.macos}" if host.is_mac else platform.platform(terse=True)
    found = f"{mlxpage.__version__}, Python {platform.python_version()}, {system} {host.machine}"
    if host.is_mac and probes.number(host.ask(probes.TRANSLATED)) == 1:
        return "problem", f"{found}, translated by Rosetta", "install a Python for arm64"
    if host.is_mac and host.macos and _parts(host.macos) < _parts(_LEAST_MACOS):
        return "problem", found, f"MLX needs macOS {_LEAST_MACOS} or later"
    return "ok", found


def _chip(host: Host) -> Found:
    if host.is_mac:
        name, cores = probes.line(host.ask(probes.CHIP)), probes.gpu_cores(host.ask(probes.GPU))
        gpu = f", {cores} GPU cores" if cores else ""
    else:
        name, gpu = probes.cpu_model(host.cpuinfo.read_text()), ""
    if name is None:
        return "unknown", "the machine doesn't say"
    return "ok", f"{name}, {os.cpu_count()} CPU cores{gpu}"


def _version(name: str, host: Host) -> Found:
    known = VERSIONS[name]
    span = f"{known.least} or later" + (f", below {known.below}" if known.below else "")
    way_out = f"install {name} {span}: {known.why}"
    try:
        found = version(name)
    except PackageNotFoundError:
        return "problem", "not installed", way_out
    is_below = known.below is None or _parts(found) < _parts(known.below)
    if _parts(found) >= _parts(known.least) and is_below:
        return "ok", found
    return known.outside, found, way_out


def _parts(number: str) -> list[int]:
    """Of a version, as far as it is numbers: 0.32.4.dev1 is 0.32.4."""
    found = re.match(r"[0-9]+(?:\.[0-9]+)*", number)
    return [int(part) for part in found[0].split(".")] if found else []


def _device(host: Host) -> Found:
    try:
        from mlxpage.metal.backend import device
    except Exception as error:
        extra = "mlx" if host.is_mac else "mlxpage[cpu], or [cuda13] for a GPU"
        reason = " ".join(str(error).split())[:300]
        return "problem", f"MLX can't be imported: {reason}", f"install {extra}"
    here = device()
    if host.is_mac and here.kind == "cpu":
        return (
            "advice",
            "MLX computes on the CPU",
            "it finds no Metal: in a virtual machine there may be none",
        )
    return "ok", f"{here.kind} ({here.name})"


def _backend(host: Host) -> Found:
    from mlxpage.metal import choice

    try:
        wanted = choice.wanted()
    except mlxpage.InvalidRequest as error:
        return "problem", str(error), "unset MLXPAGE_BACKEND"
    found = f"{wanted.name} ({wanted.why})"
    if wanted.name == "reference" and choice.device().kind != "cpu":
        return "advice", found, "unset MLXPAGE_BACKEND to have the kernels of the GPU"
    return "ok", found


def _kernels(host: Host) -> Found:
    from mlxpage.metal import self_check
    from mlxpage.metal.backend import device

    if device().kind == "cpu":
        return "ok", "none: there is no GPU, and the reference serves"
    results = self_check.run_cases()
    failed = [f"{name}: {error}" for name, error in results.items() if error]
    if not failed:
        return "ok", f"compiled, and right in {len(results)} cases"
    return (
        "problem",
        f"{len(failed)} of {len(results)} cases fail: {'; '.join(failed)}",
        "models of such shapes are served by the reference, slower; please send a report: mlxpage "
        "doctor --report",
    )


def _blas(host: Host) -> Found:
    from mlxpage.metal.backend import BLAS, device

    if host.is_mac or device().kind != "cpu":
        return None
    if BLAS is not None:
        return "ok", BLAS
    found = "MLX's own, some 30 times slower"
    if host.environ.get("MLXPAGE_BLAS") == "off":
        return "advice", f"{found}: MLXPAGE_BLAS is off", "unset MLXPAGE_BLAS"
    return (
        "advice",
        found,
        "install OpenBLAS: libopenblas0-pthread on Debian, openblas on Fedora, or mlxpage[mkl] "
        "from PyPI",
    )


def _memory(host: Host) -> Found:
    from mlxpage.metal.backend import device

    memory = psutil.virtual_memory()
    found = f"{gigabytes(memory.total)}, {gigabytes(memory.available)} of it available"
    if (usable := device().memory) != memory.total:
        found += f"; the GPU should have {gigabytes(usable)} of it at most"
    if memory.available < _SPARE_MEMORY:
        return "advice", found, "close what you don't need, or take a small model"
    return "ok", found


def _largest_array(host: Host) -> Found:
    from mlxpage.metal.backend import device

    here = device()
    if here.kind == "cpu":
        return None
    wanted = here.memory // _TYPICAL_ARRAYS
    found = (
        f"{gigabytes(here.max_buffer)}; K of a layer of an 8B model takes up to "
        f"{gigabytes(wanted)} ({wanted // _TYPICAL_ROW:,} tokens)"
    )
    if wanted > here.max_buffer:
        return "advice", found, "a pool has fewer tokens than the memory has room for"
    return "ok", found


def _cache(host: Host) -> Found:
    return _folder(model_store.cache_dir(), "MLXPAGE_CACHE")


def _hub_cache(host: Host) -> Found:
    from huggingface_hub import constants

    return _folder(Path(constants.HF_HUB_CACHE), "HF_HOME")


def _folder(folder: Path, variable: str) -> Found:
    """A cache that is, or will be, in `folder`."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    other = f"set {variable} to another folder"
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        return "problem", f"{folder} can't be written: {error.strerror}", other
    free = shutil.disk_usage(there).free
    found = f"{folder}, {gigabytes(free)} free"
    if free < _SPARE_DISK:
        return "advice", found, f"make room for models, or {other}"
    return "ok", found


# -- of a Mac --


def _wired_limit(host: Host) -> Found:
    limit = probes.number(host.ask(probes.WIRED_LIMIT))
    if limit is None:
        return "unknown", "macOS doesn't say"
    if limit == 0:
        return "ok", "macOS chooses (iogpu.wired_limit_mb is 0)"
    return "ok", f"{limit:,} MB, set by somebody (iogpu.wired_limit_mb)"


def _power(host: Host) -> Found:
    on_battery = probes.is_on_battery(host.ask(probes.POWER_SOURCE))
    saves = probes.saves_power(host.ask(probes.POWER_SETTINGS))
    source = {True: "battery", False: "mains", None: "source unknown"}[on_battery]
    mode = {True: "on", False: "off", None: "unknown"}[saves]
    found = f"{source}, low-power mode {mode}"
    if on_battery or saves:
        return "advice", found, "plug it in and turn low-power mode off before you measure"
    return ("unknown" if on_battery is None and saves is None else "ok"), found


_RELAX = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"


def _watchdog(host: Host) -> Found:
    if host.environ.get(_RELAX) == "1":
        return "ok", f"{_RELAX}=1 is set: macOS waits longer for the GPU, and the screen with it"
    return (
        "ok",
        "macOS ends GPU work that keeps the screen waiting for some seconds; steps are cut to be "
        f"much shorter. If you still see 'Impacting Interactivity', {_RELAX}=1 in the environment "
        "makes macOS wait longer, and the screen may stand still meanwhile. mlxpage never sets it.",
    )


def _panics(host: Host) -> Found:
    count = probes.recent_panics(host.panics, _PANIC_DAYS)
    if count is None:
        return "unknown", f"{host.panics} can't be read"
    found = f"{count} kernel panic{'' if count == 1 else 's'} in {_PANIC_DAYS} days"
    if not count:
        return "ok", found
    return (
        "advice",
        found,
        "if one came while a model was running, keep to one process with a model at a time, give "
        "it less memory (--memory), and update macOS",
    )


_CHECKS: dict[str, Callable[[Host], Found]] = {
    "mlxpage": _mlxpage,
    "chip": _chip,
    **{name: partial(_version, name) for name in VERSIONS},
    "device": _device,
    "backend": _backend,
    "kernels": _kernels,
    "BLAS": _blas,
    "memory": _memory,
    "largest array": _largest_array,
    "cache": _cache,
    "hub cache": _hub_cache,
}
_CHECKS_OF_A_MAC: dict[str, Callable[[Host], Found]] = {
    "wired limit": _wired_limit,
    "power": _power,
    "watchdog": _watchdog,
    "panics": _panics,
}
