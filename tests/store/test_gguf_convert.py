"""The converter against tiny GGUF files whose values are known."""

import json

import numpy as np
from safetensors import safe_open
from tokenizers import Tokenizer

from mlxpage.model_store.check import check_folder
from mlxpage.model_store.gguf_convert import convert


def converted(gguf_file, tmp_path, generation=None, **options):
    folder = tmp_path / "out"
    folder.mkdir(exist_ok=True)
    convert(gguf_file, folder, generation or {}, **options)
    return folder


def read_weights(folder):
    with safe_open(folder / "model.safetensors", "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == np.float32, name
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_llama_weights_come_back_exactly_with_rotary_rows_in_place(llama_gguf, tmp_path):
    gguf_file, expected = llama_gguf
    assert_same(read_weights(converted(gguf_file, tmp_path)), expected)


def test_gemma3_weights_come_back_exactly_with_norms_around_zero(gemma3_gguf, tmp_path):
    gguf_file, expected = gemma3_gguf
    assert_same(read_weights(converted(gguf_file, tmp_path)), expected)


def test_mlx_lm_finds_the_values_of_the_file_in_quantised_weights(
    llama_q4_gguf, tmp_path, values_in_mlx_lm
):
    expected = read_weights(converted(llama_q4_gguf, tmp_path))
    folder = converted(llama_q4_gguf, tmp_path, quantised=True)
    assert_same(values_in_mlx_lm(folder), expected)


def test_quantised_weights_are_words_and_all_else_is_float16(llama_q4_gguf, tmp_path):
    kept = read_weights(converted(llama_q4_gguf, tmp_path, quantised=True))
    words = {name for name, values in kept.items() if values.dtype == np.uint32}
    assert words == {n for n in kept if n.endswith(("proj.weight", "embed_tokens.weight"))}
    assert {kept[name].dtype.name for name in kept.keys() - words} == {"float16"}


def test_config_names_the_bits_of_modules_that_have_others(llama_q4_gguf, tmp_path):
    config = check_folder(converted(llama_q4_gguf, tmp_path, quantised=True))
    assert config["torch_dtype"] == "float16"
    assert config["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "model.embed_tokens": {"group_size": 32, "bits": 8},
    }


def test_llama_config_holds_the_sizes_of_the_file(llama_gguf, tmp_path):
    config = check_folder(converted(llama_gguf[0], tmp_path))
    wanted = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 1,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "vocab_size": 3 + 256 + 3,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in wanted} == wanted


def test_gemma3_config_has_the_sliding_window(gemma3_gguf, tmp_path):
    config = check_folder(converted(gemma3_gguf[0], tmp_path))
    assert (config["model_type"], config["sliding_window"]) == ("gemma3_text", 512)
    assert (config["head_dim"], config["query_pre_attn_scalar"]) == (16, 16)


def test_generation_config_joins_token_ids_and_the_authors_defaults(llama_gguf, tmp_path):
    folder = converted(llama_gguf[0], tmp_path, {"top_k": 64})
    assert json.loads((folder / "generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "top_k": 64,
    }


def test_byte_level_tokenizer_merges_splits_digits_and_keeps_special_tokens(llama_gguf, tmp_path):
    folder = converted(llama_gguf[0], tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("hello 12<|im_end|>").tokens == [
        *["he", "ll", "o", "Ġ", "1", "2", "<|im_end|>"]
    ]
    assert tokenizer.decode(tokenizer.encode("schön 你好").ids) == "schön 你好"
    named = json.loads((folder / "tokenizer_config.json").read_text())
    assert (named["eos_token"], named["bos_token"]) == ("<|im_end|>", "<|im_start|>")
    assert named["chat_template"] == "{{ messages }}"
    assert named["model_max_length"] == 128


def test_sentencepiece_tokenizer_puts_bos_in_front_and_falls_back_to_bytes(gemma3_gguf, tmp_path):
    folder = converted(gemma3_gguf[0], tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("ab abé").tokens == ["<bos>", "ab", "▁ab", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("ab abé").ids) == "ab abé"


def test_sentencepiece_tokenizer_merges_the_best_score_first(gemma3_gguf, tmp_path):
    folder = converted(gemma3_gguf[0], tmp_path)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("abc ab").tokens == ["<bos>", "a", "bc", "▁ab"]
