"""What models are on this machine, and their removal."""

import json
import os

import pytest
from huggingface_hub import constants

from mlxpage import model_store
from mlxpage.errors import ModelNotFound
from mlxpage.model_store import demo_models

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def in_the_hub(hub_cache, make_model):
    """in_the_hub(name, **config) -> the folder of a snapshot in the hub's cache."""

    def make(name, **config):
        repository = hub_cache / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(SHA)
        folder = make_model(repository / "snapshots" / SHA)
        stated = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(stated))
        return folder

    return make


def test_demo_models_and_those_of_the_hub_are_found_by_names_that_resolve_takes(
    in_the_hub, make_model, cache
):
    folders = {
        "org/One": in_the_hub("org/One", quantization={"bits": 4, "group_size": 64}),
        "plain": in_the_hub("plain"),  # as old ones are called
        "smollm2-135m": make_model(cache / "models" / "smollm2-135m"),
        "two/other": in_the_hub("two/other", torch_dtype="bfloat16"),
    }
    found = model_store.models()
    assert {model.name: model.folder for model in found} == folders
    assert [model.name for model in found] == list(folders)
    for model in found:
        assert model_store.resolve(model.name) == model_store.find(model.name) == model.folder
        assert model.family == "llama"
        assert model.size == sum(file.stat().st_size for file in model.folder.iterdir())
    assert [model.quantisation for model in found] == ["4 bits", "?", "?", "bfloat16"]


def test_when_a_model_was_used_is_when_its_weights_were_read(in_the_hub):
    folder = in_the_hub("org/one")
    os.utime(folder / "model.safetensors", (2_000_000_000, 1_000_000_000))
    assert model_store.models()[0].last_used == 2_000_000_000
    os.utime(folder / "model.safetensors", (1, 1_000_000_000))  # where that isn't noted
    assert model_store.models()[0].last_used == 1_000_000_000


def test_what_cannot_be_served_is_not_found(in_the_hub, hub_cache, cache):
    (in_the_hub("org/part") / "model.safetensors").unlink()
    (in_the_hub("org/broken") / "config.json").write_text("[]")
    (hub_cache / "models--no--name--!!").mkdir()
    (cache / "models" / "smollm2-135m").mkdir(parents=True)
    assert model_store.models() == []
    assert model_store.find("org/part") is model_store.find("smollm2-135m") is None


def test_without_a_cache_there_is_nothing(hub_cache):
    assert not hub_cache.exists()
    assert model_store.models() == model_store.removals("org/one") == []
    assert model_store.find("org/one") is None


def test_nothing_is_fetched_to_find_a_model(hub_cache, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: pytest.fail("asked"))
    monkeypatch.setattr(demo_models, "_make", lambda *a: pytest.fail("made"))
    for name in ("org/one", "smollm2-135m", "smollm2-135m-4bit"):
        assert model_store.find(name) is None
    with pytest.raises(ModelNotFound, match="org/name"):
        model_store.find("not a name")


def test_all_of_a_model_is_removed_and_nothing_else(in_the_hub, make_model, cache, hub_cache):
    folder = make_model(cache / "models" / "smollm2-135m")
    hub_name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    in_the_hub(hub_name)
    in_the_hub("org/one")
    size = sum(file.stat().st_size for file in folder.iterdir())
    for name in ("smollm2-135m", hub_name):
        removals = model_store.removals(name)
        assert len(removals) == 2 and removals[0].size == size < removals[1].size + 100
    for removal in removals:
        removal.do()
        assert not removal.folder.exists()
    assert [model.name for model in model_store.models()] == ["org/one"]
    assert model_store.removals("smollm2-135m") == []


def test_what_is_there_in_part_can_be_removed(in_the_hub, hub_cache):
    (in_the_hub("org/part") / "model.safetensors").unlink()
    begun = hub_cache / "models--org--begun" / "blobs"
    begun.mkdir(parents=True)
    (begun / "x.incomplete").write_bytes(b"x" * 1000)
    for name in ("org/part", "org/begun"):
        (removal,) = model_store.removals(name)
        removal.do()
    assert list(hub_cache.iterdir()) == []


@pytest.mark.parametrize(
    "config, told",
    [
        ({"quantization": {"bits": 8, "group_size": 64}}, "8 bits"),
        ({"quantization_config": {"bits": 4, "quant_method": "gptq"}}, "4 bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization": "odd", "dtype": "float16"}, "float16"),
        ({"text_config": {"torch_dtype": "bfloat16"}}, "bfloat16"),
        ({"text_config": None}, "?"),
    ],
)
def test_how_weights_are_stored_is_read_from_the_config(config, told):
    assert model_store.quantisation(config) == told
