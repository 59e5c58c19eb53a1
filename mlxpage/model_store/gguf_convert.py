"""A pinned GGUF file as an ordinary folder for mlx-lm, in float32 or quantised as it is.

The values are exactly those of the quantised weights. Only what the demo models need is here:
the architectures llama and gemma3, with tied embeddings; quantised, matrices of Q4_1 and Q8_0.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpage.model_store.gguf_blocks import GROUP_SIZE, repacked
from mlxpage.model_store.gguf_tokenizer import build_tokenizer, tokenizer_config

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class _Architecture:
    model_type: str
    class_name: str
    layer: Mapping[str, str]
    """GGUF's names of a layer's tensors beside those of every architecture -> mlx-lm's."""
    fix: Callable[[str, Any, Mapping], Any]
    """(mlx-lm's name, array, the file's metadata) -> array as mlx-lm has it. Of a matrix, it may
    get the codes, the scales and the biases instead: their rows are the matrix's."""
    config: Callable[[Mapping], dict]


def convert(
    gguf_file: Path, folder: Path, generation: Mapping[str, object], *, quantised: bool = False
) -> None:
    """Writes config, weights and tokenizer into the empty `folder`.

    `generation` is added to generation_config.json. `quantised` keeps the file's codes, and in
    float16 the rest; else all is float32. Raises OSError when the disk is full.
    """
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    metadata = {key: value.contents() for key, value in reader.fields.items()}
    weights, config = _weights(reader.tensors, metadata, quantised)
    config = _config(metadata) | config
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", tokens | dict(generation))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(metadata))
    (folder / "tokenizer.json").write_text(build_tokenizer(metadata).to_str(pretty=True))
    file = folder / "model.safetensors"
    _write_weights(file, weights)
    shutil.copymode(folder / "config.json", file)  # safetensors makes it private


def _weights(tensors: Iterable, metadata: Mapping, quantised: bool) -> tuple[dict, dict]:
    """mlx-lm's name -> array, of all tensors of a GGUF file; and what config.json says of them."""
    import numpy as np

    architecture = _ARCHITECTURES[metadata["general.architecture"]]
    weights, bits = {}, {}
    for tensor in tensors:
        name = _mlx_name(tensor.name, architecture.layer)
        if quantised and len(tensor.shape) == 2:
            stem = name.removesuffix(".weight")
            affine = repacked(tensor.data, tensor.tensor_type.name)
            bits[stem] = affine.bits
            parts = {
                name: affine.words,
                f"{stem}.scales": affine.scales,
                f"{stem}.biases": affine.biases,
            }
        else:
            parts = {name: _values(tensor)}
        for part, values in parts.items():
            fixed = architecture.fix(name, values, metadata)
            if quantised and fixed.dtype == np.float32:
                fixed = fixed.astype(np.float16)
            weights[part] = np.ascontiguousarray(fixed)
    return weights, _quantisation(bits) if quantised else {"torch_dtype": "float32"}


def _values(tensor):
    """float32, in the shape that mlx-lm has."""
    import gguf
    import numpy as np

    shape = [int(n) for n in reversed(tensor.shape)]
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return values.astype(np.float32, copy=False)


def _quantisation(bits: Mapping[str, int]) -> dict:
    """config.json's part: 4 bits, but where a module, by its name, has others."""

    def of(bits: int) -> dict:
        return {"group_size": GROUP_SIZE, "bits": bits}

    others = {module: of(n) for module, n in bits.items() if n != 4}
    return {"torch_dtype": "float16", "quantization": of(4) | others}


def _mlx_name(name: str, layer: Mapping[str, str]) -> str:
    stem, suffix = name.rsplit(".", 1)
    if stem in _TOP:
        return f"{_TOP[stem]}.{suffix}"
    _, index, part = stem.split(".", 2)
    return f"model.layers.{index}.{(_LAYER | layer)[part]}.{suffix}"


def _unpermute_rotary(name: str, values, metadata: Mapping):
    """llama: GGUF pairs the rows (x0, y0, x1, y1, ..) of Q and K, mlx-lm has (x0, x1, .., y0, ..).

    values: (heads * head_dim, hidden).
    """
    if name.endswith("self_attn.q_proj.weight"):
        heads = metadata["llama.attention.head_count"]
    elif name.endswith("self_attn.k_proj.weight"):
        heads = metadata["llama.attention.head_count_kv"]
    else:
        return values
    pairs = values.reshape(heads, -1, 2, values.shape[-1])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _norms_from_zero(name: str, values, metadata: Mapping):
    """gemma3: GGUF stores 1 + w of a norm."""
    return values - 1.0 if name.endswith("norm.weight") else values


def _config(metadata: Mapping) -> dict:
    name = metadata["general.architecture"]
    architecture = _ARCHITECTURES[name]

    def model(key: str):
        return metadata[f"{name}.{key}"]

    def token(key: str):
        return metadata.get(f"tokenizer.ggml.{key}_token_id")

    heads = model("attention.head_count")
    head_dim = metadata.get(f"{name}.attention.key_length", model("embedding_length") // heads)
    return {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        "hidden_size": model("embedding_length"),
        "num_hidden_layers": model("block_count"),
        "intermediate_size": model("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": model("attention.head_count_kv"),
        "head_dim": head_dim,
        "rms_norm_eps": _short_float(model("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short_float(model("rope.freq_base")),
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "max_position_embeddings": model("context_length"),
        "tie_word_embeddings": True,
        "bos_token_id": token("bos"),
        "eos_token_id": token("eos"),
        "pad_token_id": token("padding"),
        **architecture.config(metadata | {"head_dim": head_dim}),
    }


def _gemma3_config(metadata: Mapping) -> dict:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": metadata["gemma3.attention.sliding_window"],
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 10000.0,
        "query_pre_attn_scalar": metadata["head_dim"],
    }


_ARCHITECTURES = {
    "llama": _Architecture(
        model_type="llama",
        class_name="LlamaForCausalLM",
        layer={"ffn_norm": "post_attention_layernorm"},
        fix=_unpermute_rotary,
        config=lambda metadata: {"hidden_act": "silu"},
    ),
    "gemma3": _Architecture(
        model_type="gemma3_text",
        class_name="Gemma3ForCausalLM",
        layer={
            "attn_q_norm": "self_attn.q_norm",
            "attn_k_norm": "self_attn.k_norm",
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
        fix=_norms_from_zero,
        config=_gemma3_config,
    ),
}


def _short_float(value: float) -> float:
    """1e-05 rather than 9.999999747378752e-06, which is what a float32 reads as."""
    import numpy as np

    return float(str(np.float32(value)))


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(path: Path, weights: Mapping[str, Any]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        save_file(dict(weights), path, metadata={"format": "mlx"})
    except SafetensorError as error:  # wraps the system's error
        raise OSError(str(error)) from None
