"""Tiny models of families that aren't served, or whose layers differ from each other."""

import importlib

import tiny_models

from mlxpage.metal.backend import mx

_PLAIN = {
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
_LATENT = {
    "moe_intermediate_size": 32,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 8,
}

CONFIGS = {
    # K and V of different head_dim.
    "deepseek_v2": {**_PLAIN, **_LATENT, "rope_scaling": {"type": "yarn", "factor": 2.0}},
    # Each layer's cache is used once a loop: more caches than layers.
    "nanbeige": {**_PLAIN, "num_loops": 2},
    # Later layers read the last one's K and V and count them for their positions.
    "afm7": {
        "vocab_size": 256,
        "hidden_dim": 64,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    # Later layers read an earlier one's K and V, and say from which position.
    "gemma4_text": {
        **_PLAIN,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "num_global_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 256,
    },
    # K is cast to float32 on its way to the attention.
    "stablelm": {
        **_PLAIN,
        "partial_rotary_factor": 0.25,
        "layer_norm_eps": 1e-5,
        "use_qkv_bias": True,
    },
    # Latent attention: K and V come from the cache multiplied.
    "deepseek_v3": {
        **_PLAIN,
        **_LATENT,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "rope_scaling": None,
    },
    # Its positions come from one number.
    "gpt_bigcode": {
        "n_embd": 64,
        "n_layer": 2,
        "n_inner": 96,
        "n_head": 4,
        "n_positions": 1000,
        "layer_norm_epsilon": 1e-5,
        "vocab_size": 256,
    },
    # Its mask is one position wider than its cache.
    "plamo3": {
        **_PLAIN,
        "head_dim": 16,
        "window_size": 24,
        "sliding_window": 24,
        "sliding_window_pattern": 2,
    },
    "mamba": {
        "vocab_size": 64,
        "use_bias": False,
        "use_conv_bias": True,
        "conv_kernel": 4,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "state_size": 4,
        "intermediate_size": 32,
        "time_step_rank": 2,
    },
    "recurrent_gemma": {
        **_PLAIN,
        "attention_bias": False,
        "conv1d_width": 3,
        "logits_soft_cap": 1.0,
        "attention_window_size": 64,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "baichuan_m1": {
        **_PLAIN,
        "sliding_window": 24,
        "sliding_window_layers": [0, 2],
        "conv_window": 2,
    },
}


def module(family: str, dtype: mx.Dtype = mx.float32, **changes):
    """mlx-lm's own module with weights that make attention matter, and its config."""
    known = CONFIGS.get(family) or tiny_models._COMMON | tiny_models.CONFIGS[family]
    config = {"model_type": family, **known, **changes}
    architecture = importlib.import_module(f"mlx_lm.models.{family}")
    made = architecture.Model(architecture.ModelArgs.from_dict(config))
    tiny_models.randomise(made, 0, dtype)
    return made, config
