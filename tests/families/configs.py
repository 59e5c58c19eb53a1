"""A tiny config for every model family of mlx-lm.

Small enough for a hundred of them in a minute, and with all that a family does: a layer of each
kind, windows and chunks that short prompts pass, experts of which not all are used.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

Config = dict[str, Any]

WINDOW = 24

# What most families call things. `ModelArgs.from_dict` takes what it knows and drops the rest.
_PLAIN = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "tie_word_embeddings": False,
}
_GPT2 = {
    "vocab_size": 256,
    "n_embd": 64,
    "n_layer": 3,
    "n_inner": 96,
    "n_head": 4,
    "n_positions": 1000,
    "n_ctx": 1000,
    "layer_norm_epsilon": 1e-5,
}
_EXPERTS = {
    **_PLAIN,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "num_shared_expert": 1,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "use_qk_norm": True,
}
# K and V from a latent vector, only that and a rotated key in the cache.
_LATENT = {
    **_EXPERTS,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
# Latent attention to those positions that an indexer picks.
_INDEXED = {
    **_LATENT,
    "index_head_dim": 32,
    "index_n_heads": 2,
    "index_topk": 16,
}
_LONGCAT = {
    **_LATENT,
    "num_layers": 2,
    "ffn_hidden_size": 64,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 32,
    "zero_expert_num": 2,
    "zero_expert_type": "identity",
    "attention_method": "MLA",
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": True,
    "full_attention_interval": 2,
}
_KDA = {
    "linear_attn_config": {
        "kda_layers": [1, 3],
        "full_attn_layers": [2],
        "num_heads": 4,
        "head_dim": 16,
        "short_conv_kernel_size": 4,
    },
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_ssm": 128,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_groups": 2,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "mamba_expand": 2,
    "state_size": 16,
    "ssm_state_size": 16,
    "time_step_rank": 4,
    "conv_kernel": 4,
    "n_groups": 2,
    "use_conv_bias": True,
}
_SLIDING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
# Every third layer sees all.
_PATTERN = {"sliding_window": WINDOW, "sliding_window_pattern": 3}
_GRANITE = {
    "logits_scaling": 1.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
}
_MINICPM = {"dim_model_base": 32, "scale_depth": 1.4, "scale_emb": 2.0}
_LFM2 = {
    "layer_types": ["conv", "full_attention", "conv"],
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 64,
    "block_multiple_of": 16,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "num_dense_layers": 1,
    "use_expert_bias": True,
}
# The last two layers read the K and V of those before.
_GEMMA4 = {
    **_PLAIN,
    "num_hidden_layers": 4,
    "num_key_value_heads": 1,
    "num_global_key_value_heads": 1,
    "global_head_dim": 32,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 256,
}
_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 100000.0},
}
# Dynamic by name only: its base is fixed.
_ALPHA = {"alpha": 2.0, "factor": 1.0, "type": "dynamic"}
# Queries grow with their position.
_LLAMA_4_SCALED = {
    "rope_theta": 10000.0,
    "type": "yarn",
    "factor": 4.0,
    "llama_4_scaling_beta": 0.1,
    "original_max_position_embeddings": 32,
}


def _with_text(text: Config, **more) -> Config:
    """What a model that sees as well has for its text."""
    text = {"model_type": "text", **text}
    return {"text_config": text, "vocab_size": text["vocab_size"], **more}


_CONFIGS: dict[str, Config] = {
    # -- plain attention --
    "apertus": {**_PLAIN, "post_norm": False, "qk_norm": True},
    "bitnet": _PLAIN,
    "cohere": {**_PLAIN, "logit_scale": 1.0, "use_qk_norm": True},
    "ernie4_5": _PLAIN,
    "exaone": {**_PLAIN, "num_layers": 3},
    "gemma": _PLAIN,
    "gemma2": {**_PLAIN, "query_pre_attn_scalar": 16.0},
    "glm": _PLAIN,
    "glm4": {**_PLAIN, "partial_rotary_factor": 0.5},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neox": {**_PLAIN, "rotary_emb_base": 10000, "rotary_pct": 0.25},
    "gptj": {**_GPT2, "rotary_dim": 8},
    "granite": {**_PLAIN, **_GRANITE},
    "helium": _PLAIN,
    "hunyuan_v1_dense": {**_PLAIN, "rope_scaling": _ALPHA},
    "internlm2": _PLAIN,
    "internlm3": _PLAIN,
    "lille-130m": {
        **_GPT2,
        "block_size": 512,
        "layer_norm_eps": 1e-5,
        "n_kv_heads": 2,
        "rope_theta": 10000.0,
    },
    "llama": _PLAIN,
    "mimo": _PLAIN,
    "minicpm": {**_PLAIN, **_MINICPM},
    "mistral3": _with_text(_PLAIN),
    "nanochat": _PLAIN,
    "nemotron": {**_PLAIN, "hidden_act": "relu2"},
    "nemotron-nas": {
        **_PLAIN,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"no_op": True}, "ffn": {"replace_with_linear": True}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        ],
    },
    "olmo": {
        "vocab_size": 256,
        "embedding_size": 256,
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "mlp_hidden_size": 96,
    },
    "olmo2": _PLAIN,
    "openelm": {
        "vocab_size": 256,
        "head_dim": 16,
        "num_transformer_layers": 3,
        "model_dim": 64,
        "ffn_dim_divisor": 16,
        "num_query_heads": [4, 4, 2],
        "num_kv_heads": [2, 4, 1],
        "ffn_multipliers": [1.0, 1.5, 2.0],
    },
    "phi": {**_PLAIN, "partial_rotary_factor": 0.5},
    "phi3": _PLAIN,
    # Its head takes tokens out by number, far beyond a smaller vocabulary's end.
    "phi3small": {
        **_PLAIN,
        "vocab_size": 100352,
        "ff_intermediate_size": 96,
        "dense_attention_every_n_layers": 2,
        "gegelu_limit": 20.0,
        "mup_embedding_multiplier": 1.0,
        "mup_attn_multiplier": 8.0,
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 1,
        "blocksparse_vert_stride": 2,
    },
    "pixtral": _with_text(_PLAIN),
    "plamo": {**_PLAIN, "n_shared_head": 2},
    "qwen": {**_PLAIN, "kv_channels": 16, "intermediate_size": 192},
    "qwen2": _PLAIN,
    "qwen2_vl": _with_text(_PLAIN),
    "qwen3": _PLAIN,
    "qwen3_vl": _with_text(_PLAIN),
    "seed_oss": _PLAIN,
    "smollm3": {**_PLAIN, "no_rope_layer_interval": 3},
    "stablelm": {**_PLAIN, "partial_rotary_factor": 0.25, "use_qkv_bias": True},
    "starcoder2": {**_PLAIN, "norm_epsilon": 1e-5},
    "talkie": {**_PLAIN, "num_key_value_heads": 4},
    "telechat3": _PLAIN,
    # -- windows --
    "cohere2": {**_PLAIN, **_PATTERN, "logit_scale": 1.0},
    "exaone4": {**_PLAIN, "sliding_window": WINDOW, "sliding_window_pattern": "LGL"},
    "gemma3": _with_text({**_PLAIN, **_PATTERN, "query_pre_attn_scalar": 16}),
    "gemma3_text": {**_PLAIN, **_PATTERN, "query_pre_attn_scalar": 16},
    "gpt_oss": {**_EXPERTS, **_SLIDING},
    "ministral3": {**_PLAIN, **_SLIDING, "rope_parameters": _LLAMA_4_SCALED},
    "muse_glimmer": {**_PLAIN, **_SLIDING},
    "olmo3": {**_PLAIN, **_SLIDING},
    # Its mask is one position wider than its cache.
    "plamo3": {**_PLAIN, **_PATTERN, "window_size": WINDOW},
    "spark2_5": {**_PLAIN, **_SLIDING, "rope_parameters": _ROPES},
    # -- experts --
    "Klear": _EXPERTS,
    "afmoe": {**_EXPERTS, **_SLIDING, "num_dense_layers": 1},
    "bailing_moe": {**_EXPERTS, "score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "dbrx": {
        "vocab_size": 256,
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek": _EXPERTS,
    "dots1": _EXPERTS,
    "ernie4_5_moe": {
        **_EXPERTS,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "exaone_moe": {**_EXPERTS, **_SLIDING, "is_moe_layer": [False, True, True]},
    "glm4_moe": {**_EXPERTS, "partial_rotary_factor": 0.5},
    "granitemoe": {**_EXPERTS, **_GRANITE},
    "hunyuan": {
        **_EXPERTS,
        "moe_topk": 2,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": _ALPHA,
    },
    "laguna": {
        **_EXPERTS,
        **_SLIDING,
        "rope_parameters": _ROPES,
        "num_attention_heads_per_layer": [4, 2, 4],
    },
    "llama4": _with_text(
        {
            **_EXPERTS,
            "model_type": "llama4_text",
            "num_hidden_layers": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": WINDOW,
            "interleave_moe_layer_step": 2,
            "intermediate_size_mlp": 96,
            # Positions from which on queries are scaled.
            "floor_scale": 16,
        }
    ),
    "llama4_text": {
        **_PLAIN,
        "intermediate_size_mlp": 96,
        "no_rope_layers": [1, 0, 1],
        "use_qk_norm": True,
    },
    "mellum": {**_EXPERTS, **_SLIDING, "rope_parameters": _ROPES},
    "mimo_v2_flash": {
        **_EXPERTS,
        "hybrid_layer_pattern": [1, 0, 1],
        "moe_layer_freq": [0, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": WINDOW,
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 32,
        "v_head_dim": 16,
        "swa_v_head_dim": 16,
        "head_dim": 32,
        "partial_rotary_factor": 0.5,
        "num_key_value_heads": 1,
    },
    "minimax": {**_EXPERTS, "rotary_dim": 8},
    "mixtral": _EXPERTS,
    "muse_spark": _with_text(
        {
            **_EXPERTS,
            **_SLIDING,
            "post_norm_eps": 1e-8,
            "rope_parameters": {"rope_theta": 10000.0},
            "layer_rope_theta": [10000.0, 0.0, 10000.0],
            "final_logit_softcapping": 20.0,
            "output_multiplier": 1.0,
            "moe_hidden_size": 32,
            "num_shared_experts": 0,
        }
    ),
    "olmoe": _EXPERTS,
    "phimoe": {
        **_EXPERTS,
        "original_max_position_embeddings": 32,
        "rope_scaling": {
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + i / 2 for i in range(8)],
            "long_mscale": 1.1,
            "short_mscale": 1.0,
        },
    },
    "phixtral": {
        "num_vocab": 256,
        "model_dim": 64,
        "num_heads": 4,
        "num_layers": 3,
        "rotary_dim": 8,
    },
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "qwen3_vl_moe": _with_text({**_EXPERTS, "model_type": "qwen3_vl_moe_text"}),
    "solar_open": {**_EXPERTS, "partial_rotary_factor": 1.0},
    "step3p5": {
        **_EXPERTS,
        **_SLIDING,
        "num_attention_groups": 2,
        "attention_other_setting": {"num_attention_heads": 8, "num_attention_groups": 2},
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "share_expert_dim": 32,
        "moe_layers_enum": "1,2",
    },
    # -- K and V from a latent vector, kept whole --
    "deepseek_v2": {**_LATENT, "rope_scaling": {"type": "yarn", "factor": 2.0}},
    "minicpm3": {
        **_LATENT,
        **_MINICPM,
        "rope_scaling": {
            "type": "longrope",
            "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + i / 2 for i in range(8)],
        },
    },
    "youtu_llm": _LATENT,
    # -- the latent vector in the cache --
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": _LATENT,
    "kimi_k25": _with_text(_LATENT),
    "kimi_vl": _with_text(_LATENT),
    "mistral4": {**_LATENT, "rope_parameters": _LLAMA_4_SCALED},
    "longcat_flash": _LONGCAT,
    # -- attention to positions that are picked --
    "deepseek_v32": _INDEXED,
    "glm_moe_dsa": {
        **_INDEXED,
        "moe_layer_freq": 1,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "minimax_m3_vl": _with_text(
        {
            **_EXPERTS,
            "dense_intermediate_size": 96,
            "moe_layer_freq": [0, 1, 1],
            "layer_types": ["full_attention", "sparse", "sparse"],
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_block_size": 8,
            "index_topk_blocks": 2,
        }
    ),
    "deepseek_v41": {
        **_EXPERTS,
        "num_hidden_layers": 4,
        "head_dim": 32,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 16,
        "o_groups": 2,
        "o_lora_rank": 16,
        "sliding_window": WINDOW,
        "compress_ratios": [0, 4, 4, 1],
        "kv_source_layer_ids": [1, 3],
        "index_source_layer_ids": [1, 3],
        "index_n_heads": 2,
        "index_head_dim": 32,
        "index_topk": 4,
        "scoring_func": "sqrtsoftplus",
        "hc_mult": 2,
        "hc_sinkhorn_iters": 4,
    },
    # -- layers that share K and V, or have them twice --
    "afm7": {
        "vocab_size": 256,
        "hidden_dim": 64,
        "num_layers": 4,
        "num_kv_reuse_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
    },
    "gemma3n": _with_text(
        {
            **_PLAIN,
            "num_hidden_layers": 6,
            "intermediate_size": [96] * 6,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 256,
            "sliding_window": WINDOW,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 16,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
        }
    ),
    "gemma4": _with_text(_GEMMA4),
    "gemma4_text": _GEMMA4,
    "iquestloopcoder": {**_PLAIN, "loop_window_size": WINDOW},
    "nanbeige": {**_PLAIN, "num_loops": 2},
    # -- a state beside K and V, or instead of them --
    "baichuan_m1": {
        **_PLAIN,
        "sliding_window": WINDOW,
        "sliding_window_layers": [0, 2],
        "conv_window": 2,
    },
    "bailing_hybrid": {
        **_LATENT,
        "num_hidden_layers": 4,
        "layer_group_size": 2,
        "group_norm_size": 2,
    },
    "bailing_moe_linear": {
        **_EXPERTS,
        "num_hidden_layers": 4,
        "layer_group_size": 2,
        "group_norm_size": 2,
        "score_function": "sigmoid",
    },
    "bailing_moe_v3": {**_LATENT, "num_hidden_layers": 4, "layer_group_size": 2},
    "falcon_h1": {
        **_PLAIN,
        **_MAMBA,
        "attention_in_multiplier": 1.0,
        "key_multiplier": 1.0,
        "lm_head_multiplier": 1.0,
    },
    "gear": {
        **_PLAIN,
        "layer_types": ["sliding_attention", "conv_mixer", "full_attention"],
        "sliding_window": WINDOW,
    },
    "granitemoehybrid": {
        **_EXPERTS,
        **_GRANITE,
        **_MAMBA,
        "layer_types": ["mamba", "attention", "mamba"],
    },
    "jamba": {
        **_EXPERTS,
        **_MAMBA,
        "layers_block_type": ["mamba", "attention", "mamba"],
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
    },
    "kimi_k3": _with_text(
        {
            **_LATENT,
            **_KDA,
            "hidden_act": "situ",
            "activation_situ_beta": 1.0,
            "attn_res_block_size": 2,
            "num_experts_per_token": 2,
        }
    ),
    "kimi_linear": {
        **_LATENT,
        **_KDA,
        "num_experts_per_token": 2,
        "model_max_length": 4096,
        "q_lora_rank": None,
    },
    "lfm2": {**_PLAIN, **_LFM2},
    "lfm2-vl": _with_text({**_PLAIN, **_LFM2}),
    "lfm2_moe": {**_EXPERTS, **_LFM2},
    "longcat_flash_ngram": {
        **_LONGCAT,
        "ngram_vocab_size_ratio": 2,
        "emb_neighbor_num": 3,
        "emb_split_num": 2,
    },
    "mamba": {**_PLAIN, **_MAMBA, "intermediate_size": 128},
    "mamba2": {
        **_PLAIN,
        **_MAMBA,
        "num_heads": 8,
        "intermediate_size": 128,
        "time_step_limit": (0.0, float("inf")),
    },
    "nemotron_h": {
        **_EXPERTS,
        **_MAMBA,
        "hybrid_override_pattern": ["M", "*", "-", "M", "E"],
        "moe_shared_expert_intermediate_size": 32,
        "time_step_min": 0.001,
        "time_step_max": 0.1,
    },
    "olmo_hybrid": {
        **_PLAIN,
        **_LINEAR,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "plamo2": {**_PLAIN, **_MAMBA, "hidden_size_per_head": 16, "mamba_step": 2},
    # What its packed layers take is a multiple of 128 wide.
    "prism_hadamard_qwen35": _with_text(
        {**_PLAIN, **_LINEAR, "hidden_size": 128, "intermediate_size": 512},
        schema_version=1,
        tensor_namespace="mlx-lm-text",
        quantization={"bits": 2, "group_size": 128, "mode": "affine"},
        modules=[
            {
                "path": f"model.layers.{i}.mlp.{name}",
                "embedding": False,
                "dtype": "float16",
                "block": block,
            }
            for i in range(3)
            for name, block in (("gate_proj", 0), ("down_proj", 512))
        ],
    ),
    "qwen3_5": _with_text({**_PLAIN, **_LINEAR}),
    "qwen3_5_moe": _with_text({**_EXPERTS, **_LINEAR}),
    "qwen3_next": {**_EXPERTS, **_LINEAR, "partial_rotary_factor": 0.5},
    "recurrent_gemma": {
        **_PLAIN,
        "num_key_value_heads": 1,
        "conv1d_width": 4,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv7": {
        **_PLAIN,
        "a_low_rank_dim": 16,
        "v_low_rank_dim": 16,
        "gate_low_rank_dim": 16,
        "decay_low_rank_dim": 16,
    },
}

# What else a family does, where one config can't show it.
VARIANTS: dict[str, tuple[str, Config]] = {
    "gemma4_text, no shared layers": ("gemma4_text", {"num_kv_shared_layers": 0}),
    "hunyuan, no shared layers": ("hunyuan", {"use_cla": False}),
    "llama, sliding": ("llama", _SLIDING),
    "minimax_m3_vl, full attention": (
        "minimax_m3_vl",
        _with_text({**_EXPERTS, "dense_intermediate_size": 96}),
    ),
    "mistral3 of ministral3": (
        "mistral3",
        _with_text({**_CONFIGS["ministral3"], "model_type": "ministral3"}),
    ),
    "mistral3 of mistral4": (
        "mistral3",
        _with_text({**_CONFIGS["mistral4"], "model_type": "mistral4"}),
    ),
    "nanbeige, one loop": ("nanbeige", {"num_loops": 1}),
    "nemotron-nas, linear": (
        "nemotron-nas",
        {
            "block_configs": [
                {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
                {"attention": {"replace_with_linear": True}, "ffn": {"ffn_mult": 1.0}},
                {"attention": {"n_heads_in_group": 4}, "ffn": {"ffn_mult": 1.0}},
            ],
        },
    ),
    "qwen2, dynamic rope": ("qwen2", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}),
}

KNOWN = frozenset(_CONFIGS)


def config(family: str, **changes) -> Config:
    """A tiny config of a family, or of one of its variants; `changes` go into it."""
    known, more = VARIANTS.get(family, (family, {}))
    return {"model_type": known, **deepcopy(_CONFIGS[known]), **deepcopy(more), **changes}
