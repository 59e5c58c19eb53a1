"""Apps that PyInstaller freezes: what mlxpage's hook collects, and with `full` such an app."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import tiny_folder as tiny
from PyInstaller.building.datastruct import toc_process_symbolic_links
from test_package import build

from mlxpage import _pyinstaller, blas

ROOT = Path(__file__).parent.parent
MINUTES = 40
"""More than it takes: following transformers' imports is a minute of CPU time and more."""


def test_the_kernels_texts_come_along_from_a_checkout():
    collected = _pyinstaller.kernels()
    assert {Path(file) for file, _ in collected} == {
        file for file in (ROOT / "metal").iterdir() if file.suffix in (".metal", ".h")
    }
    assert {folder for _, folder in collected} == {"mlxpage/metal"}


def test_on_macos_mlx_finds_its_kernels_beside_the_link_to_its_library_as_well(
    tmp_path, monkeypatch
):
    spec = ModuleSpec("mlx", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "site" / "mlx")]
    monkeypatch.setattr(_pyinstaller, "find_spec", lambda name: spec)
    library = tmp_path / "site" / "mlx" / "lib" / "mlx.metallib"
    library.parent.mkdir(parents=True)
    library.write_text("kernels")
    for _ in range(2):  # a second build finds the links of the first
        collected = _pyinstaller.metallibs(tmp_path / "work")
    files = [(str(Path(folder, Path(file).name)), file, "DATA") for file, folder in collected]
    assert toc_process_symbolic_links(files) == [
        ("mlx/lib/mlx.metallib", str(library), "DATA"),
        ("mlx.metallib", "mlx/lib/mlx.metallib", "SYMLINK"),
    ]


@pytest.mark.parametrize(
    "library, collected",
    [
        ("/usr/lib/libopenblas.so.0", [("/usr/lib/libopenblas.so.0", ".")]),
        ("/venv/lib/libmkl_rt.so.2", []),
        (None, []),
    ],
)
def test_openblas_comes_along_and_no_other(monkeypatch, library, collected):
    monkeypatch.setattr(blas, "load", lambda: library)
    assert _pyinstaller.openblas() == collected


APP = """
import importlib, json, sys

import chats  # docs/examples/chats.py


def check(modules):
    from mlxpage import blas
    from mlxpage.metal.backend import mlx_lm_utils
    from mlxpage.metal.kernels.launch import _text

    mlx_lm_utils()
    for module in modules:
        importlib.import_module(module)
    print(json.dumps([blas.load(), len(_text("paged_attention.metal")), len(_text("cuda.h"))]))


if __name__ == "__main__":
    if sys.argv[1] == "--check":
        sys.exit(check(json.loads(sys.argv[2])))
    sys.exit(chats.main(sys.argv[1:]))
"""
# One end of a name that mlx-lm puts together, of each of its folders of modules.
MODULES = ["mlx_lm.models.qwen3", "mlx_lm.models.deepseek_v3", "mlx_lm.models.mamba2"]
MODULES += ["mlx_lm.tool_parsers.json_tools", "mlx_lm.chat_templates.deepseek_v32"]


@pytest.fixture(scope="module")
def app(tmp_path_factory) -> Path:
    """An app with the wheel of mlxpage, frozen with no word about mlxpage."""
    folder = tmp_path_factory.mktemp("frozen")
    with zipfile.ZipFile(build("wheel", ROOT, folder / "wheel")) as wheel:
        wheel.extractall(folder / "site")
    (folder / "app.py").write_text(APP)
    command = [sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level", "WARN"]
    command += ["--paths", str(ROOT / "docs" / "examples"), "app.py"]
    paths = os.pathsep.join([str(folder / "site"), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=MINUTES * 60,
    )
    assert ran.returncode == 0, ran.stderr
    return folder / "dist" / "app" / "app"


def run(app: Path, folder: Path, *arguments) -> str:
    """What the app prints, in another folder and with nothing in its environment."""
    folder.mkdir()
    ran = subprocess.run(
        [app, *map(str, arguments)],
        cwd=folder,
        env={"HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.full
@pytest.mark.timeout(MINUTES * 60 + 600)
def test_a_frozen_app_serves_a_model_and_has_what_it_may_need_later(app, tmp_path):
    model = tiny.make(tmp_path / "model")
    out = run(app, tmp_path / "serving", model, "--chats", "4", "--turns", "2", "--max-tokens", "6")
    assert "8 answers, " in out
    library, *lengths = json.loads(run(app, tmp_path / "checking", "--check", json.dumps(MODULES)))
    texts = [(ROOT / "metal" / name).read_text() for name in ("paged_attention.metal", "cuda.h")]
    assert all(0 < length <= len(text) for length, text in zip(lengths, texts, strict=True))
    if blas.load():
        assert Path(library).parent == app.parent / "_internal"
