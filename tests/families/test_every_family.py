"""Every family of mlx-lm generates over a block pool what it generates alone, or is refused.

Each with a batch of prompts that are computed in chunks beside each other's single tokens, in a
pool so small, or made so small, that somebody has to start again.
"""

import functools
from pathlib import Path

import numpy as np
import oracle
import pytest
import serving
from families import document, zoo
from families.outcomes import NEED_METAL, REFUSALS, SHAPES, WITH_STATES
from mlx_lm.models.cache import make_prompt_cache

from mlxpage.errors import InvalidModel, UnsupportedModel
from mlxpage.metal import self_check
from mlxpage.metal.backend import mx
from mlxpage.metal.layout import Shape
from mlxpage.metal.model import Model
from mlxpage.sampling_params import SamplingParams

LENGTHS = (3, 70, 9, 17, 31, 24, 45, 14)
NEW = 12
# The longest prompt and what is generated after it take 21.
BLOCK_SIZE, BLOCKS, CHUNK = 4, 22, 32
LOGPROB_ERROR = 2e-3


# Some of each kind: the rest takes a minute or two.
_QUICK = {
    *("llama", "gemma3n", "gemma4_text", "iquestloopcoder", "mimo_v2_flash", "minicpm3", "phi3"),
    *("deepseek_v3", "deepseek_v32", "longcat_flash", "stablelm"),
    *("afm7", "gemma2", "gpt_bigcode", "llama4"),
    *("mamba", "qwen3_next", "plamo3", "olmo"),
}


def of_cases(cases):
    def marks(case):
        if case in NEED_METAL and not mx.metal.is_available():
            yield pytest.mark.skip("needs Metal")
        if case not in _QUICK:
            yield pytest.mark.full

    return pytest.mark.parametrize(
        "case", [pytest.param(case, marks=list(marks(case))) for case in cases]
    )


def test_what_is_expected_is_of_families_that_are_there():
    assert {*SHAPES, *REFUSALS} == set(zoo.CASES) >= NEED_METAL
    assert not SHAPES.keys() & REFUSALS.keys()
    assert set(zoo.CASES) >= _QUICK


def test_users_are_told_what_becomes_of_each():
    written = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    assert written == document.document(), f"see {document.__name__}"


@functools.cache
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, length).tolist() for length in LENGTHS]


def shrink_below_what_is_used(engine):
    """Once: windows and states can't run out of room that was kept for them."""
    groups = engine.scheduler.groups
    if engine.num_steps == 8 and all(group.window is not None for group in groups):
        engine._shrink([max(1, group.pool.num_used - 1) for group in groups])


@of_cases(zoo.CASES)
def test_a_family_generates_what_mlx_lm_generates_or_is_refused(case):
    if case in REFUSALS:
        with pytest.raises((UnsupportedModel, InvalidModel), match=REFUSALS[case].error):
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
    outputs = serving.serve(engine, prompts(), params, on_step=shrink_below_what_is_used)
    comparison = oracle.compare(outputs, expected)
    print(f"\n{case}: {comparison}, {engine.scheduler.num_preemptions} preemptions")
    assert not comparison.wrong
    assert comparison.logprob_error < LOGPROB_ERROR
    assert engine.scheduler.num_preemptions > 0


# Rows compute, and something else: numbers alone show it.
_LOOK_LIKE_ROWS = {"afm7"}


@pytest.mark.parametrize("case", [case for case in SHAPES if case not in NEED_METAL])
def test_whether_a_family_takes_rows_shows_before_its_weights_are_there(case):
    reason = self_check.why_not_rows(Model(*zoo.make(case)), 16)
    assert (reason is None) == (SHAPES[case] is Shape.ROWS or case in _LOOK_LIKE_ROWS), reason


# In one forward all are alike.
@of_cases(case for case, shape in SHAPES.items() if shape is not Shape.ROWS)
def test_prompts_that_begin_alike_share_blocks_and_branch(case):
    model = Model(*zoo.make(case))
    self_check.check(model, 16)
    untouched, _ = zoo.make(case)
    beginning = prompts()[1][:45]
    alike = [beginning + prompt[:20] for prompt in prompts()[:5]] * 2
    expected = [oracle.generate(untouched, prompt, NEW) for prompt in alike for _ in range(2)]
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=0, n=2)
    engine = serving.engine(model, num_blocks=256, max_num_seqs=6, max_num_batched_tokens=64)
    outputs = serving.serve(engine, alike, params)
    choices = [choice for output in outputs for choice in (output, *output.choices)]
    comparison = oracle.compare(choices, expected)
    assert not comparison.wrong and comparison.logprob_error < LOGPROB_ERROR
    assert sum(output.num_cached_tokens for output in outputs) >= 5 * 32


# Of the largest logit: a wrong K, V or state has to change more than rounding does.
_MATTERS = 2e-3


def logits(module, tokens, cache=None) -> np.ndarray:
    """(T, vocab), without the tokens that a family never gives."""
    found = np.array(module(mx.array(tokens)[None], cache=cache)[0])
    return found[:, ~np.isneginf(found).all(axis=0)]


def change(found: np.ndarray, expected: np.ndarray) -> float:
    return np.abs(found - expected).max() / np.abs(expected).max()


@of_cases(case for case in zoo.CASES if case != "olmo")  # which mlx-lm can't run
def test_what_a_tiny_model_generates_depends_on_all_that_it_has_read(case):
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


@of_cases(case for case in zoo.CASES if case in WITH_STATES)
def test_what_a_tiny_model_keeps_beside_k_and_v_matters(case):
    module, _ = zoo.make(case)
    tokens = np.random.default_rng(3).integers(0, 256, 48)
    kept = make_prompt_cache(module)
    assert states(kept)
    forgotten = make_prompt_cache(module)
    for cache in (kept, forgotten):
        mx.eval(module(mx.array(tokens)[None], cache=cache))
    for state in states(forgotten):
        state.cache = [array if array is None else mx.zeros_like(array) for array in state.cache]
    after = [logits(module, [7], cache) for cache in (forgotten, kept)]
    assert change(*after) > 10 * _MATTERS
