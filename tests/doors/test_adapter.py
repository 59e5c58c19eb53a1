"""Adapters that mlx-lm has trained: with its tokens, and never mistaken for the bare model."""

import json
import shutil

import numpy as np
import oracle
import pytest
import tiny_folder as tiny
from mlx_lm import load as mlx_lm_load
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlxpage import LLM, InvalidModel, InvalidRequest, SamplingParams
from mlxpage.metal.backend import mx
from mlxpage.model_store.check import ADAPTER_FILES

PROMPT = "the shell he called " * 4
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def make(folder, model_folder, kind: str = "lora"):
    """Writes what `mlx_lm.lora` does; its values are large enough to matter."""
    from mlx.utils import tree_flatten

    folder.mkdir(parents=True)
    module, _ = mlx_lm_load(str(model_folder))
    config = {"fine_tune_type": kind, "num_layers": 2}
    config["lora_parameters"] = {"rank": 4, "scale": 10.0, "dropout": 0.5}
    if kind == "full":
        names = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    else:
        linear_to_lora_layers(module, 2, config["lora_parameters"], use_dora=kind == "dora")
        names = [name for name, _ in tree_flatten(module.parameters()) if "lora_" in name]
    rng = np.random.default_rng(0)
    known = dict(tree_flatten(module.parameters()))
    weights = {
        name: mx.array(rng.standard_normal(known[name].shape).astype(np.float32)) * 0.3
        for name in names
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_folder):
    return make(tmp_path_factory.mktemp("adapters") / "lora", tiny_folder)


def tokens(model_folder, **options) -> list[int]:
    with LLM(model_folder, **options) as llm:
        return llm.generate(PROMPT, GREEDY).token_ids


def expected_tokens(model_folder, path) -> list[int]:
    module, tokenizer = mlx_lm_load(str(model_folder), adapter_path=str(path))
    return oracle.generate(module, tokenizer.encode(PROMPT), 12).tokens


@pytest.mark.parametrize("kind", ["lora", "dora", "full"])
def test_an_adapter_gives_the_tokens_of_mlx_lm(tmp_path, tiny_folder, kind):
    path = make(tmp_path / kind, tiny_folder, kind)
    expected = expected_tokens(tiny_folder, path)
    assert tokens(tiny_folder, adapter_path=path) == expected
    assert tokens(tiny_folder) != expected, "it changes nothing"


def test_an_adapter_of_a_quantised_model_gives_the_tokens_of_mlx_lm(tmp_path, tiny_folder):
    from mlx_lm.utils import quantize_model, save_model

    folder = shutil.copytree(tiny_folder, tmp_path / "quantised")
    module, _, config = mlx_lm_load(str(folder), return_config=True)
    module, config = quantize_model(module, config, group_size=32, bits=4)
    (folder / "model.safetensors").unlink()
    save_model(folder, module)
    (folder / "config.json").write_text(json.dumps(config))
    path = make(tmp_path / "lora", folder)
    assert tokens(folder, adapter_path=path) == expected_tokens(folder, path)


def test_nobody_finds_the_blocks_of_another_adapter_on_a_disk(tmp_path, tiny_folder, adapter):
    other = make(tmp_path / "other", tiny_folder, "dora")
    everyone = [{}, {"adapter_path": adapter}, {"adapter_path": other}]
    expected = [tokens(tiny_folder, **options) for options in everyone]
    disk = {"cache_dir": tmp_path / "blocks"}
    assert [tokens(tiny_folder, **options, **disk) for options in everyone] == expected
    with LLM(tiny_folder, adapter_path=adapter, **disk) as llm:
        output = llm.generate(PROMPT, GREEDY)
    assert output.token_ids == expected[1] and output.num_cached_tokens > 0


def test_no_adapter_is_told_with_the_way_out(tmp_path, tiny_folder, adapter):
    with pytest.raises(InvalidModel, match="nowhere is no adapter: it lacks adapter"):
        LLM(tiny_folder, adapter_path=tmp_path / "nowhere")
    with pytest.raises(InvalidRequest, match="adapter_path is 5"):
        LLM(tiny_folder, adapter_path=5)
    for name in ADAPTER_FILES:
        folder = shutil.copytree(adapter, tmp_path / f"without {name}")
        (folder / name).unlink()
        with pytest.raises(InvalidModel, match=f"it lacks {name}. Give the folder"):
            LLM(tiny_folder, adapter_path=folder)
        (folder / name).write_bytes(b"\x08")
        with pytest.raises(InvalidModel, match=name):
            LLM(tiny_folder, adapter_path=folder)


@pytest.mark.parametrize("half", ["lora_a", "lora_b"])
def test_half_an_adapter_is_told(tmp_path, tiny_folder, adapter, half):
    folder = shutil.copytree(adapter, tmp_path / "half")
    weights = mx.load(str(folder / "adapters.safetensors"))
    rest = {name: array for name, array in weights.items() if not name.endswith(half)}
    mx.save_safetensors(str(folder / "adapters.safetensors"), rest)
    with pytest.raises(InvalidModel, match=f"is incomplete: it has .* without its {half}"):
        LLM(tiny_folder, adapter_path=folder)


def test_a_home_of_nobody_is_told(tiny_folder):
    with pytest.raises(InvalidModel, match="~nobody-by-this-name/lora is no adapter"):
        LLM(tiny_folder, adapter_path="~nobody-by-this-name/lora")


def test_an_adapter_of_another_model_is_told(tmp_path, adapter):
    wide = tiny.make(tmp_path / "wide", hidden_size=128)
    with pytest.raises(InvalidModel, match="lora doesn't fit the model"):
        LLM(wide, adapter_path=adapter)
