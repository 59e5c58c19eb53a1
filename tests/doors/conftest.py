"""A tiny model on disk, what is made of it, and the command line as a function."""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny_folder as tiny

import mlxpage

ROOT = Path(__file__).parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def make_llm(tiny_folder):
    """make_llm(folder, **options); at the end all of them must be idle, and are closed."""
    from mlxpage import LLM

    made = []

    def make(folder=tiny_folder, **options):
        made.append(LLM(folder, **{"num_blocks": 128, **options}))
        return made[-1]

    yield make
    for llm in made:
        if llm._thread.is_running:
            assert_idle(llm)
            llm.close()


@pytest.fixture
def llm(make_llm):
    return make_llm()


@pytest.fixture
def is_idle():
    """is_idle(llm): asserts that nothing runs, waits or holds a block."""
    return assert_idle


def assert_idle(llm) -> None:
    stats = llm.stats()
    assert (stats["running"], stats["waiting"], stats["blocks"]["used"]) == (0, 0, 0)
    llm._thread.call(lambda engine: engine.scheduler.check()).result()


@pytest.fixture(autouse=True, scope="session")
def runtime_folder():
    """Where engines can be seen by others: not where those of people are. A socket's path is short,
    and pytest's folders aren't."""
    before = os.environ.get("MLXPAGE_RUNTIME")
    with tempfile.TemporaryDirectory(prefix="mlxpage") as folder:
        os.environ["MLXPAGE_RUNTIME"] = folder
        yield
    os.environ.pop("MLXPAGE_RUNTIME")
    if before is not None:
        os.environ["MLXPAGE_RUNTIME"] = before


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def error(self) -> list[str]:
        """The lines of the error message, without the usage that click puts above it."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return [line for line in lines if not line.startswith(("Usage:", "Try "))]


@pytest.fixture
def cli(capsys, monkeypatch):
    """cli(*arguments, stdin="") runs the command line in this process."""
    from huggingface_hub import constants

    from mlxpage.cli.main import run

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("MLXPAGE_DEBUG", raising=False)

    def ran(*arguments, stdin: str | bytes = "") -> Ran:
        data = stdin.encode() if isinstance(stdin, str) else stdin
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))
            capsys.readouterr()
            code = run([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return ran


@pytest.fixture
def python():
    """python(code, *arguments) runs a program of its own; the result's streams are text."""

    def run(code: str, *arguments, **options) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            **({"stdin": subprocess.DEVNULL} if "input" not in options else {}),
            **{"cwd": ROOT, "env": os.environ | OFFLINE, "timeout": 60, **options},
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def letters(monkeypatch):
    """Answers are of letters alone: no newline of the tiny model's mixes with ours."""
    other = {i: -100.0 for i in range(tiny.VOCAB) if i not in set(tiny.ids("abcdefghijklmnop"))}
    make = mlxpage.SamplingParams
    monkeypatch.setattr(
        mlxpage, "SamplingParams", lambda **given: make(logit_bias=other, **given), raising=False
    )


@pytest.fixture
def untemplated_folder(tiny_folder, tmp_path) -> Path:
    """A model that doesn't chat."""
    folder = shutil.copytree(tiny_folder, tmp_path / "untemplated")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    tiny.write(folder / "tokenizer_config.json", config)
    return folder
