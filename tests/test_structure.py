"""The house stands: imports run one way, and importing the package does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mlxpage

ROOT = Path(__file__).parent.parent

# A module may import its own layer and those that its layer stands on; a folder counts as one name.
MODULES = {
    "common": {"errors", "sampling_params", "outputs", "events", "blas", "sizes", "probes"}
    | {"model_store", "block_store"},
    "paper": {"beam_search", "block_pool", "block_manager", "cache_group", "prefix_cache"}
    | {"sequence", "scheduler"},
    "metal": {"metal"},
    "hall": {
        "batch",
        "request",
        "text",
        "intake",
        "served",
        "elastic_pool",
        "memory_pressure",
        "upkeep",
        "disk_tier",
        "pace",
        "started",
        "engine",
        "loading",
        "engine_thread",
        "snapshot",
        "monitor",
        "beams",
    },
    "doors": {"arguments", "home", "door", "llm", "awaiting", "handle", "async_engine", "describe"}
    | {
        "fitting",
        "messages",
        "far_engine",
        "engine_process",
        "child",
        "acceptance",
        "doctor",
        "bench",
        "cli",
    }
    | {"_pyinstaller"}
    | {"__main__", "__init__"},
}
STANDS_ON = {
    "common": set(),
    "paper": {"common"},
    "metal": {"common"},
    "hall": {"common", "paper", "metal"},
    "doors": {"common", "paper", "metal", "hall"},
}
MLX = {"mlx", "mlx_lm"}
# It loads a fast BLAS first, so MLX comes from there. Other modules may import more of it
# inside a function; the paper wing and what everyone stands on have no use for it at all.
HOME_OF_MLX = Path("metal/backend.py")
NEVER_MLX = MODULES["common"] | MODULES["paper"]
# What runs before a model is loaded: `import mlxpage` and `mlxpage --help` stay quick.
LIGHT = NEVER_MLX | {
    "arguments",
    "home",
    "door",
    "llm",
    "awaiting",
    "handle",
    "async_engine",
    "messages",
    "far_engine",
    "engine_process",
    "child",
    "engine_thread",
    "upkeep",
    "snapshot",
    "monitor",
}
LIGHT |= {"beams", "cli", "__main__", "__init__"}

TABLE = Path(__file__).name
FILES = sorted((ROOT / "mlxpage").rglob("*.py"))
LAYERS = {module: layer for layer, modules in MODULES.items() for module in modules}


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, bool]]:
    """Each imported name, dotted and absolute, and whether that runs when the module is loaded."""

    def visit(node: ast.AST, at_load: bool) -> Iterator[tuple[str, bool]]:
        match node:
            case ast.Import():
                yield from ((alias.name, at_load) for alias in node.names)
            case ast.ImportFrom():
                base = package.split(".")[: 1 - node.level or None] if node.level else []
                base += [node.module] if node.module else []
                yield from ((".".join([*base, alias.name]), at_load) for alias in node.names)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                at_load = False
            case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
                at_load = False
        for child in ast.iter_child_nodes(node):
            yield from visit(child, at_load)

    return visit(tree, True)


def faults(file: Path, source: str) -> list[str]:
    """What is wrong with the imports of a module in ``mlxpage/``, one line each."""
    parts = file.with_suffix("").parts
    module = parts[0]
    if module not in LAYERS:
        return [f"mlxpage/{file} is in no layer: add {module!r} to MODULES in tests/{TABLE}"]
    layer = LAYERS[module]
    wrong = []
    for name, at_load in imports(ast.parse(source), ".".join(["mlxpage", *parts[:-1]])):
        top, *rest = name.split(".")
        if top == "mlxpage" and rest != ["__version__"]:
            # What isn't a module is a public name, and those come from mlxpage/__init__.py.
            other = rest[0] if rest and rest[0] in LAYERS else "__init__"
            if LAYERS[other] not in STANDS_ON[layer] | {layer}:
                wrong.append(f"mlxpage/{file} ({layer}) imports {name} ({LAYERS[other]})")
        elif top in MLX and module in NEVER_MLX:
            wrong.append(f"mlxpage/{file} ({layer}) imports {name}: it has no use for MLX")
        elif top in MLX and file != HOME_OF_MLX and at_load:
            wrong.append(f"mlxpage/{file} imports {name} when loaded: take it from {HOME_OF_MLX}")
    return wrong


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file: Path):
    assert not faults(file.relative_to(ROOT / "mlxpage"), file.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "file, source",
    [
        ("scheduler.py", "from mlxpage.engine import Engine"),
        ("scheduler.py", "from mlxpage.metal.kv_cache import KVCache"),
        ("scheduler.py", "from mlxpage.metal import kv_cache"),
        ("scheduler.py", "from .metal import kv_cache"),
        ("scheduler.py", "from .metal.kv_cache import KVCache"),
        ("scheduler.py", "import mlxpage.metal.kv_cache"),
        ("scheduler.py", "def f():\n  import mlx.core as mx"),
        ("metal/kv_cache.py", "def f():\n  from mlxpage.sequence import Sequence"),
        ("errors.py", "from mlxpage import LLM"),
        ("errors.py", "if TYPE_CHECKING:\n  from mlxpage.llm import LLM"),
        ("model_store/hub.py", "from mlxpage.metal.kernels import launch"),
        ("model_store/hub.py", "from ..metal.kernels import launch"),
        ("model_store/hub.py", "def f():\n  import mlx_lm"),
        ("metal/kv_cache.py", "import mlx.core as mx"),
        ("engine.py", "class A:\n  import mlx_lm"),
        ("cli.py", "try:\n  from mlx import core\nexcept ImportError:\n  pass"),
        ("attic.py", ""),
    ],
)
def test_imports_that_run_back_are_found(file: str, source: str):
    assert len(faults(Path(file), source)) == 1


@pytest.mark.parametrize(
    "file, source",
    [
        ("scheduler.py", "from mlxpage.errors import InvalidRequest"),
        ("scheduler.py", "from mlxpage.sequence import Sequence"),
        ("metal/backend.py", "from mlxpage import blas\nimport mlx.core as mx"),
        (
            "metal/kv_cache.py",
            "from mlxpage.metal.backend import mx\ndef f():\n  import mlx.nn as nn",
        ),
        ("engine.py", "from mlxpage import metal, scheduler"),
        ("model_store/hub.py", "from .gguf import read\nfrom ..errors import ModelNotFound"),
        ("model_store/hub.py", "from mlxpage import __version__"),
        ("cli.py", "def f():\n  import mlx.core as mx"),
        ("engine.py", "if TYPE_CHECKING:\n  import mlx.core as mx"),
        ("llm.py", "from mlxpage.engine import Engine\nimport mlxlike"),
    ],
)
def test_imports_that_run_the_right_way_pass(file: str, source: str):
    assert not faults(Path(file), source)


def run(code: str) -> str:
    """Run ``code`` in a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_changes_nothing_in_the_host_app():
    out = run("""
import logging, os, resource, signal, sys, threading

def state():
    return {
        "environment": dict(os.environ),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "signals": {s: signal.getsignal(s) for s in signal.valid_signals()},
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "threads": threading.enumerate(),
        "folder": os.getcwd(),
    }

before, modules = state(), set(sys.modules)
import mlxpage
after = state()
print([name for name in before if before[name] != after[name]])
heavy = {"mlx", "mlx_lm", "transformers", "numpy", "huggingface_hub", "click"}
print(sorted(heavy & {name.split(".")[0] for name in set(sys.modules) - modules}))
""")
    assert out.split("\n")[:2] == ["[]", "[]"]


def test_what_runs_before_a_model_is_loaded_loads_no_mlx():
    # The imports above by what happens, so a detour through a third module is found too.
    files = [file.relative_to(ROOT / "mlxpage").with_suffix("") for file in FILES]
    modules = [".".join(["mlxpage", *file.parts]) for file in files if file.parts[0] in LIGHT]
    modules = [module.removesuffix(".__init__") for module in modules]
    out = run(f"""
import importlib, sys
for module in {modules}:
    importlib.import_module(module)
print(sorted({{"mlx", "mlx_lm", "transformers"}} & {{name.split(".")[0] for name in sys.modules}}))
""")
    assert out.strip() == "[]"


def test_public_names_are_sorted_and_there():
    assert mlxpage.__all__ == sorted(mlxpage.__all__)
    assert {"LLM", "SamplingParams"} <= set(mlxpage.__all__)
    for name in mlxpage.__all__:
        assert getattr(mlxpage, name) is not None


def test_a_public_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Engin"):
        _ = mlxpage.Engin
