"""Weights in few bits, as mlx-lm writes and reads them, give the tokens that mlx-lm gives."""

import json
import shutil

import oracle
import pytest
import tiny_folder as tiny
from mlx_lm import load as mlx_lm_load
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.utils import quantize_model, save_model

from mlxpage import LLM, SamplingParams

PROMPTS = ["the shell he called ", "hello, ", "a" * 70]


def quantised(source, folder, mixed: str | None = None, **how):
    shutil.copytree(source, folder)
    module, _, config = mlx_lm_load(str(folder), return_config=True)
    if mixed:
        how["quant_predicate"] = mixed_quant_predicate_builder(mixed, module, 32)
    module, config = quantize_model(module, config, **how)
    (folder / "model.safetensors").unlink()
    save_model(folder, module)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "how",
    [
        {"group_size": 32, "bits": 4},
        {"group_size": 64, "bits": 8},
        {"group_size": 32, "bits": 3},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        {"group_size": 32, "bits": 8, "mode": "mxfp8"},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        {"group_size": 32, "bits": 4, "mixed": "mixed_3_6"},
    ],
    ids=lambda how: how.get("mode") or how.get("mixed") or f"{how['bits']} bits",
)
def test_weights_of_few_bits_give_the_tokens_of_mlx_lm(tmp_path, how):
    # Wide enough for all groups.
    source = tiny.make(tmp_path / "source", hidden_size=128, intermediate_size=192)
    folder = quantised(source, tmp_path / "quantised", **how)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    with LLM(folder, max_num_batched_tokens=32) as llm:
        outputs = llm.generate(PROMPTS, params)
    module, tokenizer = mlx_lm_load(str(folder))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.token_ids == oracle.generate(module, tokenizer.encode(prompt), 12).tokens
