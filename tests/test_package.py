"""What is in the built packages. Built with hatchling as it is installed here: no network."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(target: str, source: Path, out: Path) -> Path:
    """Build ``target`` (wheel, sdist) from the tree in ``source``; return the file."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    (file,) = out.iterdir()
    return file


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def tree(folder: str) -> set[str]:
    """The files of a folder of this checkout, relative to it."""
    files = (ROOT / folder).rglob("*")
    return {
        file.relative_to(ROOT / folder).as_posix()
        for file in files
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith(".")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


def test_wheel_holds_the_package_and_the_kernels_and_nothing_else(wheel):
    package = {name for name in names(wheel) if ".dist-info/" not in name}
    modules = {f"mlxpage/{file}" for file in tree("mlxpage")}
    kernels = {f"mlxpage/metal/{file}" for file in tree("metal")}
    assert package == modules | kernels


def test_wheel_holds_the_licence_and_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        assert b"mlxpage = mlxpage.__main__:main" in archive.read(f"{info}/entry_points.txt")


def test_wheel_from_the_sdist_is_the_same(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # from Python 3.11.4 on
        archive.extractall(tmp_path / "source")
    (source,) = (tmp_path / "source").iterdir()
    assert names(build("wheel", source, tmp_path / "wheel")) == names(wheel)


def test_sdist_holds_what_its_readers_need(sdist):
    with tarfile.open(sdist) as archive:
        held = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"} <= held
    assert {f"tests/{file}" for file in tree("tests")} <= held
    assert not {name for name in held if name.startswith((".venv", ".git/", "dist"))}
