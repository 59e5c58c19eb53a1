"""Every family of mlx-lm generates over a block pool what it generates alone, or is refused.

Each with a batch of prompts that are computed in chunks beside each other's single tokens, in a
pool so small that somebody has to start again.
"""

import functools

import numpy as np
import oracle
import pytest
import serving
from families import zoo
from mlx_lm.models.cache import make_prompt_cache

from mlxpage.errors import InvalidModel, UnsupportedModel
from mlxpage.metal import self_check
from mlxpage.metal.backend import mx
from mlxpage.metal.layout import Shape
from mlxpage.metal.model import Model
from mlxpage.sampling_params import SamplingParams

pytestmark = pytest.mark.full

# Families that don't take each token as a row of its own, but
_OTHERWISE = {
    Shape.CHUNKS: [
        "deepseek_v3",
        "deepseek_v32",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "kimi_k25",
        "kimi_vl",
        "longcat_flash",
        "mistral3 of mistral4",
        "mistral4",
        "plamo",
        "stablelm",
    ],
    Shape.SEQUENCES: ["afm7", "gemma2", "gpt_bigcode", "llama4"],
}
# Why a family is refused, as its users read it.
_REFUSED = {
    "keeps its state in ArraysCache": [
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
    ],
    "keeps its state in LayerCache": ["deepseek_v41"],
    "keep K without V": ["minimax_m3_vl"],
    "layers that share K and V": ["nemotron-nas, linear"],
    "reads 25 positions in a layer whose cache keeps 24": ["plamo3"],
    "dynamic NTK RoPE": ["qwen2, dynamic rope"],
    # It adds the name of its mask to its scores.
    "mlx-lm can't run olmo": ["olmo"],
    # It takes tokens out by making their logits infinite.
    "logits are not finite": ["phi3small"],
}
SHAPES = {case: Shape.ROWS for case in zoo.CASES} | {
    case: shape for shape, cases in _OTHERWISE.items() for case in cases
}
REASONS = {case: reason for reason, cases in _REFUSED.items() for case in cases}
# Their modules call kernels of their own.
NEED_METAL = {"bitnet", "muse_spark"}

LENGTHS = (3, 70, 9, 17, 31, 24, 45, 14)
NEW = 12
# The longest prompt and what is generated after it take 21.
BLOCK_SIZE, BLOCKS, CHUNK = 4, 22, 32
LOGPROB_ERROR = 2e-3


def every_case(test):
    cases = [
        pytest.param(case, marks=[pytest.mark.skip("needs Metal")])
        if case in NEED_METAL and not mx.metal.is_available()
        else case
        for case in zoo.CASES
    ]
    return pytest.mark.parametrize("case", cases)(test)


def test_what_is_expected_is_of_families_that_are_there():
    assert set(SHAPES) | set(REASONS) == set(zoo.CASES)
    assert all(SHAPES[case] is Shape.ROWS for case in REASONS)


@functools.cache
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, length).tolist() for length in LENGTHS]


@every_case
def test_a_family_generates_what_mlx_lm_generates_or_is_refused(case):
    if case in REASONS:
        with pytest.raises((UnsupportedModel, InvalidModel), match=REASONS[case]):
            self_check.check(Model(*zoo.make(case)), 16)
        return
    model = Model(*zoo.make(case))
    self_check.check(model, 16)
    assert model.shape is SHAPES[case]
    # A module that nothing of ours has touched.
    untouched, _ = zoo.make(case)
    expected = [oracle.generate(untouched, prompt, NEW) for prompt in prompts()]
    engine = serving.engine(
        model, num_blocks=BLOCKS, block_size=BLOCK_SIZE, max_num_batched_tokens=CHUNK
    )
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0)
    outputs = serving.serve(engine, prompts(), params)
    comparison = oracle.compare(outputs, expected)
    print(f"\n{case}: {comparison}, {engine.scheduler.num_preemptions} preemptions")
    assert not comparison.wrong
    assert comparison.logprob_error < LOGPROB_ERROR
    assert engine.scheduler.num_preemptions > 0


# Of the largest logit: a wrong K, V or state has to change more than rounding does.
_MATTERS = 2e-3


def logits(module, tokens, cache=None) -> np.ndarray:
    """(T, vocab), without the tokens that a family never gives."""
    found = np.array(module(mx.array(tokens)[None], cache=cache)[0])
    return found[:, ~np.isneginf(found).all(axis=0)]


def change(found: np.ndarray, expected: np.ndarray) -> float:
    return np.abs(found - expected).max() / np.abs(expected).max()


@every_case
def test_what_a_tiny_model_generates_depends_on_all_that_it_has_read(case):
    if case == "olmo":
        pytest.skip("mlx-lm can't run it")
    module, _ = zoo.make(case)
    tokens = np.random.default_rng(2).integers(0, 256, 200)
    found = logits(module, tokens, make_prompt_cache(module))
    assert np.isfinite(found).all() and np.abs(found).max() < 100
    generated = oracle.generate(module, tokens[:40].tolist(), 16).tokens
    assert len(set(generated)) > 1, "it repeats itself"

    for position in (10, 30, 40):
        other = tokens[:48].copy()
        other[position] ^= 77
        found_then = logits(module, other, make_prompt_cache(module))[-1]
        assert change(found_then, found[47]) > _MATTERS, f"token {position} doesn't matter"
    other = tokens[:48].copy()
    other[[20, 21]] = other[[21, 20]]
    found_then = logits(module, other, make_prompt_cache(module))[-1]
    assert change(found_then, found[47]) > _MATTERS, "the order of tokens doesn't matter"


def states(caches) -> list:
    """What layers keep that isn't K and V."""
    from mlx_lm.models.cache import ArraysCache, CacheList

    found = []
    for cache in caches:
        if isinstance(cache, CacheList):
            found += states(cache.caches)
        elif isinstance(cache, ArraysCache):
            found.append(cache)
    return found


@every_case
def test_what_a_tiny_model_keeps_beside_k_and_v_matters(case):
    module, _ = zoo.make(case)
    tokens = np.random.default_rng(3).integers(0, 256, 48)
    kept = make_prompt_cache(module)
    if not states(kept):
        pytest.skip("it keeps nothing else")
    forgotten = make_prompt_cache(module)
    for cache in (kept, forgotten):
        mx.eval(module(mx.array(tokens)[None], cache=cache))
    for state in states(forgotten):
        state.cache = [array if array is None else mx.zeros_like(array) for array in state.cache]
    after = [logits(module, [7], cache) for cache in (forgotten, kept)]
    assert change(*after) > 10 * _MATTERS
