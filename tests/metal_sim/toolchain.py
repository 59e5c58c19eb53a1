"""Finds clang, a linker, libclang and MLX's own Metal headers, and keeps a cache of what they make.

clang is, in this order: what ``METAL_SIM_CLANG`` names, a clang or a zig; clang 17 or newer on
PATH; PyPI's ``ziglang``, whose ``zig`` has a clang and an lld in it. Older ones lack arithmetic on
``__bf16``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from .errors import SimulatorError, ToolchainMissing

INSTALL = f"{sys.executable} -m pip install 'ziglang>=0.15' libclang"
OLDEST_CLANG = 17
NEWEST_CLANG = 30
DAYS_IN_CACHE = 30


@dataclass(frozen=True)
class Toolchain:
    """Commands, each to be followed by arguments."""

    clang: tuple[str, ...]
    compile_c: tuple[str, ...]
    link: tuple[str, ...]
    version: str


def run(command: list[str]) -> str:
    """What the command printed; an error with all of it if it failed."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SimulatorError(f"{shlex.join(command)}\n{result.stdout}{result.stderr}")
    return result.stdout


@functools.cache
def find() -> Toolchain:
    """The toolchain of this machine."""
    if sys.platform != "linux":
        raise ToolchainMissing("The simulator runs on Linux; a Mac runs the kernels themselves.")
    if command := shlex.split(os.environ.get("METAL_SIM_CLANG", "")):
        is_zig = Path(command[0]).name == "zig"
        return _from_zig(command[0]) if is_zig else _from_clang(command)
    if clang := _clang_on_path():
        return _from_clang([clang])
    if zig := _zig():
        return _from_zig(zig)
    raise ToolchainMissing(
        f"Running Metal kernels on Linux needs clang {OLDEST_CLANG} or newer. Either install one "
        f"(apt-get install clang-19), or:\n    {INSTALL}"
    )


def _from_clang(clang: list[str]) -> Toolchain:
    version = run([*clang, "--version"])
    link = (*clang, "-shared", "-nostdlib")
    return Toolchain(tuple(clang), tuple(clang), link, version)


def _from_zig(zig: str) -> Toolchain:
    version = run([zig, "clang", "--version"])
    # `zig cc` would build a C library before it links, which takes seconds; lld needs none.
    compile_c = (zig, "cc", "-fno-sanitize=all")
    return Toolchain((zig, "clang"), compile_c, (zig, "ld.lld", "-shared"), version)


def _clang_on_path() -> str | None:
    names = [f"clang-{number}" for number in range(NEWEST_CLANG, OLDEST_CLANG - 1, -1)]
    for name in ["clang", *names]:
        if (path := shutil.which(name)) and _clang_version(path) >= OLDEST_CLANG:
            return path
    return None


def _clang_version(path: str) -> int:
    found = re.search(r"clang version (\d+)", run([path, "--version"]))
    return int(found[1]) if found else 0


def _zig() -> str | None:
    spec = importlib.util.find_spec("ziglang")
    for folder in (spec and spec.submodule_search_locations) or ():
        zig = Path(folder) / "zig"
        if zig.exists():
            return str(zig)
    return shutil.which("zig")


def libclang():
    """The module ``clang.cindex``."""
    try:
        import clang.cindex
    except ImportError:
        raise ToolchainMissing(
            f"Checking Metal kernels on Linux needs PyPI's libclang:\n    {INSTALL}"
        ) from None
    return clang.cindex


def mlx_headers() -> Path:
    """The include folder of the installed MLX."""
    import mlx

    for folder in mlx.__path__:
        include = Path(folder) / "include"
        if (include / "mlx/backend/metal/kernels/utils.h").exists():
            return include
    raise SimulatorError("The installed MLX comes without its Metal headers.")


@functools.cache
def cache() -> Path:
    """The folder for compiled kernels: $METAL_SIM_CACHE, or one in the user's cache folder."""
    named = os.environ.get("METAL_SIM_CACHE")
    folder = Path(named) if named else platformdirs.user_cache_path("mlxpage") / "metal_sim"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        folder = Path(tempfile.gettempdir()) / f"metal_sim_{os.getuid()}"
        folder.mkdir(parents=True, exist_ok=True)
    _forget_old_files(folder)
    # /proc/self/maps, where launch.py looks for libraries, has real paths.
    return folder.resolve()


def _forget_old_files(folder: Path) -> None:
    oldest = time.time() - DAYS_IN_CACHE * 24 * 3600
    for entry in os.scandir(folder):
        if entry.stat().st_mtime > oldest:
            continue
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            Path(entry).unlink(missing_ok=True)


def cached(name: str, make) -> Path:
    """The file ``name`` of the cache, which ``make(path)`` writes if it isn't there yet."""
    path = cache() / name
    if path.exists():
        os.utime(path)
        return path
    # Several test processes may make it at once: each on its own, the last one stays.
    handle, partial = tempfile.mkstemp(dir=cache(), prefix="partial-", suffix=path.suffix)
    os.close(handle)
    try:
        make(Path(partial))
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
    return path


def digest(*parts: str | bytes) -> str:
    """A name for this content."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()[:24]
