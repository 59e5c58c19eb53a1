"""Tiny models made on the spot: a folder as mlx-lm reads it, and GGUF files."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

CONFIG = {"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1}
WEIGHTS = {
    "model.embed_tokens.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "model.norm.weight": np.ones(4, np.float16),
}
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 64, 4, 2, 16, 96


@pytest.fixture
def make_model():
    """make_model(folder) writes a sound model folder and returns it."""

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        (folder / "tokenizer.json").write_text("{}")
        save_file(WEIGHTS, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture
def model(make_model, tmp_path) -> Path:
    return make_model(tmp_path / "model")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of this package."""
    monkeypatch.setenv("MLXPAGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def exact_weights():
    """exact_weights(rows, columns): float32 that Q8_0 holds without loss (its scale is 1)."""
    random = np.random.default_rng(7)

    def make(rows: int, columns: int) -> np.ndarray:
        values = random.integers(-126, 127, (rows, columns)).astype(np.float32)
        values[:, ::32] = 127.0
        return values

    return make


@pytest.fixture
def llama_gguf(tmp_path, exact_weights):
    """(a GGUF file of one llama layer in Q8_0 and F32, the weights as mlx-lm should have them)"""
    weights = _llama_weights(exact_weights)
    return _write_llama(tmp_path / "llama.gguf", weights, {}), weights


@pytest.fixture
def llama_q4_gguf(tmp_path):
    """A GGUF file of one llama layer in Q4_1, with an embedding in Q8_0; nothing in it is round."""
    random = np.random.default_rng(8)
    weights = _llama_weights(lambda *shape: random.normal(0.1, 0.02, shape).astype(np.float32))
    matrices = [name for name in weights if name.endswith("proj.weight")]
    return _write_llama(tmp_path / "q4.gguf", weights, dict.fromkeys(matrices, "Q4_1"))


def _llama_weights(matrix) -> dict[str, np.ndarray]:
    """`matrix(rows, columns)` makes those of two dimensions."""
    layer = "model.layers.0."
    return {
        "model.embed_tokens.weight": matrix(len(_llama_tokens()), HIDDEN),
        "model.norm.weight": np.arange(HIDDEN, dtype=np.float32) / 64 + 0.5,
        **_layer_weights(matrix),
        layer + "post_attention_layernorm.weight": np.full(HIDDEN, 3.0, np.float32),
    }


def _llama_tokens() -> list[str]:
    alphabet = gguf_alphabet()
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "he", "ll", "12"]


def _write_llama(path: Path, weights: dict[str, np.ndarray], kinds: dict[str, str]) -> Path:
    import gguf

    tokens = _llama_tokens()
    writer = gguf.GGUFWriter(path, "llama")
    _add_sizes(writer)
    writer.add_rope_freq_base(100000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "l l", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")

    layer = "model.layers.0."
    stored = {
        **weights,
        layer + "self_attn.q_proj.weight": permute(
            weights[layer + "self_attn.q_proj.weight"], HEADS
        ),
        layer + "self_attn.k_proj.weight": permute(
            weights[layer + "self_attn.k_proj.weight"], KV_HEADS
        ),
    }
    names = {layer + "post_attention_layernorm.weight": "blk.0.ffn_norm.weight"}
    return _write(writer, stored, names, kinds)


@pytest.fixture
def gemma3_gguf(tmp_path, exact_weights):
    """The same for a layer of gemma3."""
    import gguf

    pieces = ["▁", "a", "b", "c", "ab", "bc", "▁ab"]
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{n:02X}>" for n in range(256)), *pieces]
    writer = gguf.GGUFWriter(tmp_path / "gemma3.gguf", "gemma3")
    _add_sizes(writer)
    writer.add_key_length(HEAD_DIM)
    writer.add_sliding_window(512)
    writer.add_rope_freq_base(1000000.0)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 4 + [6] * 256 + [1] * len(pieces))
    writer.add_token_scores([0.0] * (len(tokens) - 3) + [-2.0, -1.0, -3.0])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)

    layer = "model.layers.0."
    gguf_norms = {
        layer + "self_attn.q_norm.weight": "blk.0.attn_q_norm.weight",
        layer + "self_attn.k_norm.weight": "blk.0.attn_k_norm.weight",
        layer + "post_attention_layernorm.weight": "blk.0.post_attention_norm.weight",
        layer + "pre_feedforward_layernorm.weight": "blk.0.ffn_norm.weight",
        layer + "post_feedforward_layernorm.weight": "blk.0.post_ffw_norm.weight",
    }
    weights = {
        "model.embed_tokens.weight": exact_weights(len(tokens), HIDDEN),
        "model.norm.weight": np.full(HIDDEN, 0.25, np.float32),
        **_layer_weights(exact_weights),
        **{name: np.full(HIDDEN, 2.0 + i, np.float32) for i, name in enumerate(gguf_norms)},
    }
    stored = {k: v + 1 if k.endswith("norm.weight") else v for k, v in weights.items()}
    return _write(writer, stored, gguf_norms), weights


@pytest.fixture
def values_in_mlx_lm():
    """values_in_mlx_lm(folder): name -> float32 of the weights, out of the model that mlx-lm makes
    of the folder: of quantised modules, what their codes stand for."""

    def values(folder: Path) -> dict[str, np.ndarray]:
        from mlx.utils import tree_flatten

        from mlxpage.metal.backend import mlx_lm_utils, mx

        module, _ = mlx_lm_utils().load_model(folder)
        module.set_dtype(mx.float32)
        found = dict(tree_flatten(module.parameters()))
        for name, part in module.named_modules():
            if "scales" in part:
                codes, *sides = (found.pop(f"{name}.{k}") for k in ("weight", "scales", "biases"))
                found[f"{name}.weight"] = mx.dequantize(codes, *sides, part.group_size, part.bits)
        return {name: np.array(array) for name, array in found.items()}

    return values


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """As llama.cpp's converter does it to Q and K."""
    split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def gguf_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _add_sizes(writer) -> None:
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)


def _layer_weights(exact_weights) -> dict[str, np.ndarray]:
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    weights = {f"model.layers.0.{k}.weight": exact_weights(*v) for k, v in shapes.items()}
    return weights | {"model.layers.0.input_layernorm.weight": np.full(HIDDEN, 2.0, np.float32)}


_GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
}


def _write(
    writer,
    stored: dict[str, np.ndarray],
    names: dict[str, str],
    kinds: dict[str, str] | None = None,
) -> Path:
    """Matrices are in Q8_0, but for those that `kinds` names."""
    import gguf

    for name, values in stored.items():
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType[(kinds or {}).get(name, "Q8_0")]
            blocks = gguf.quants.quantize(values, kind)
            writer.add_tensor((_GGUF_NAMES | names)[name], blocks, raw_dtype=kind)
        else:
            writer.add_tensor((_GGUF_NAMES | names)[name], values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return writer.path
