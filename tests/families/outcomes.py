"""What becomes of each family of mlx-lm: how it takes a step, or why it is refused.

`test_every_family.py` finds out whether that is so, `document.py` tells it to users.
"""

from __future__ import annotations

from typing import NamedTuple

from families import zoo

from mlxpage.metal.layout import Shape


class Refusal(NamedTuple):
    error: str
    """What the error says, a regular expression."""
    lacks: str
    """What would have to be there, as users read it."""
    cases: list[str]


# They keep a state (recurrent, convolution, token ids) for each sequence beside K and V, or instead
# of them.
WITH_STATES = [
    "baichuan_m1",
    "bailing_hybrid",
    "bailing_moe_linear",
    "bailing_moe_v3",
    "falcon_h1",
    "gear",
    "granitemoehybrid",
    "jamba",
    "kimi_k3",
    "kimi_linear",
    "lfm2",
    "lfm2-vl",
    "lfm2_moe",
    "longcat_flash_ngram",
    "mamba",
    "mamba2",
    "nemotron_h",
    "olmo_hybrid",
    "plamo2",
    "prism_hadamard_qwen35",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "recurrent_gemma",
    "rwkv7",
]

# All others take each token as a row of its own.
_OTHERWISE = {
    Shape.CHUNKS: [
        *WITH_STATES,
        "deepseek_v32",
        "glm_moe_dsa",
        "plamo",
        "stablelm",
    ],
    Shape.SEQUENCES: ["afm7", "gemma2", "gpt_bigcode", "llama4", "minimax_m3_vl"],
}

_REFUSED = [
    Refusal(
        "keeps what it has read in LayerCache",
        "It keeps windows, compressed groups and pending rows in a cache of its own kind.",
        ["deepseek_v41"],
    ),
    Refusal(
        "reads 25 positions in a layer whose cache keeps 24",
        "Its mask is one position wider than mlx-lm's cache of it, so mlx-lm's own result depends "
        "on how a prompt is cut.",
        ["plamo3"],
    ),
    Refusal(
        "dynamic NTK RoPE",
        "Dynamic NTK RoPE depends on the length of a forward, so mlx-lm's own result depends on "
        "how a prompt is cut.",
        ["qwen2, dynamic rope"],
    ),
    Refusal(
        "mlx-lm can't run olmo",
        "mlx-lm can't run it: it adds the name of its mask to its scores.",
        ["olmo"],
    ),
    Refusal(
        "logits are not finite",
        "mlx-lm adds its boolean mask to the scores, so that it isn't causal; and it makes logits "
        "infinite.",
        ["phi3small"],
    ),
]

REFUSALS = {case: refusal for refusal in _REFUSED for case in refusal.cases}
SHAPES = {
    **{case: Shape.ROWS for case in zoo.CASES if case not in REFUSALS},
    **{case: shape for shape, cases in _OTHERWISE.items() for case in cases},
}
# Their modules call kernels of their own.
NEED_METAL = {"bitnet", "muse_spark"}
