"""Tiny models of many families, with weights that make attention matter.

Freshly initialised models barely depend on attention and repeat one token; these have larger
queries and keys, so that a wrong block, position or window changes what they generate.
"""

import importlib

import numpy as np

from mlxpage.metal.backend import mlx_lm_utils, mx
from mlxpage.metal.model import Model

mlx_lm_utils()

_COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 256,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}

CONFIGS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma3_text": {
        "head_dim": 16,
        "num_key_value_heads": 1,
        "sliding_window": 48,
        "sliding_window_pattern": 3,
    },
    "phi3": {"rope_scaling": None},
    "olmo2": {"tie_word_embeddings": False},
    "starcoder2": {"norm_epsilon": 1e-5},
    "cohere2": {
        "head_dim": 16,
        "sliding_window": 40,
        "sliding_window_pattern": 3,
        "logit_scale": 1.0,
    },
    "gpt_oss": {
        "head_dim": 16,
        "sliding_window": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "tie_word_embeddings": False,
    },
    "granite": {
        "logits_scaling": 1.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "smollm3": {"no_rope_layer_interval": 3, "tie_word_embeddings": True},
}

_ATTENTION = ("q_proj", "k_proj", "qkv")


def make(family: str, seed: int = 0, dtype: mx.Dtype = mx.float32, **changes) -> Model:
    """A `Model` of `family`; `changes` go into its config."""
    config = {"model_type": family, **_COMMON, **CONFIGS[family], **changes}
    architecture = importlib.import_module(f"mlx_lm.models.{family}")
    module = architecture.Model(architecture.ModelArgs.from_dict(config))
    if hasattr(module, "sanitize") and "lm_head" not in config:
        module.sanitize({})
    randomise(module, seed, dtype)
    return Model(module, config)


def randomise(module, seed: int, dtype: mx.Dtype = mx.float32) -> None:
    from mlx.utils import tree_flatten, tree_unflatten

    rng = np.random.default_rng(seed)
    parameters = []
    for name, old in tree_flatten(module.parameters()):
        values = rng.standard_normal(old.shape)
        if "embed" in name:
            pass
        elif old.ndim >= 2:
            values *= (3 if any(part in name for part in _ATTENTION) else 1) / np.sqrt(
                old.shape[-1]
            )
        elif name.endswith("bias") or name.endswith("sinks"):
            values *= 0.3
        else:
            values = 1 + 0.1 * values
        parameters.append((name, mx.array(values.astype(np.float32)).astype(dtype)))
    module.update(tree_unflatten(parameters))
    mx.eval(module.parameters())
