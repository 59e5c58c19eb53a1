"""Paged, batched, chunked, preempted: the tokens are those of mlx-lm alone.

Greedy tokens have to be the same prompt by prompt; where one differs, the two best logits there
lie within rounding of each other. The log-probabilities of all tokens agree too: tokens alone
would hide small errors.
"""

import functools

import numpy as np
import oracle
import prose
import pytest
import serving
import tiny_models

from mlxpage.metal import model as models
from mlxpage.sampling_params import SamplingParams
from mlxpage.text import Tokenizer

LOGPROB_ERROR = 2e-3

SHORT = {"count": 10, "longest": 200, "new": 12, "running": 6, "chunk": 48}
FULL = {"count": 64, "longest": 1500, "new": 64, "running": 16, "chunk": 128}
# For weights in few bits: a CPU takes long for each token of them, of a prompt too.
FEW = {"count": 2, "longest": 8, "new": 12, "running": 2, "chunk": 8}
# Generations that outgrow what is free when they are admitted.
GROWING = {"count": 12, "longest": 60, "new": 70, "running": 8, "chunk": 48}


def both(test, short=SHORT):
    """The shortened form in the default run, the whole one under the marker `full`."""
    sizes = [
        pytest.param(short, id="short"),
        pytest.param(FULL, id="full", marks=[pytest.mark.full, pytest.mark.timeout(7200)]),
    ]
    return pytest.mark.parametrize("size", sizes)(test)


@functools.cache
def tiny(family):
    return tiny_models.make(family)


@functools.cache
def real(folder):
    loaded = models.load(folder, dtype="float32")
    return loaded, Tokenizer(folder, loaded.config.get("eos_token_id"))


@functools.cache
def case(model, tokenizer, count, longest, new, **_):
    """Prompts of real text and what mlx-lm generates after them."""
    ids = (
        tokenizer.encode(prose.text())
        if tokenizer
        else list(prose.text().encode("ascii", "replace"))
    )
    prompts = prose.prompts(count, 1, longest, ids, np.random.default_rng(count))
    return prompts, [oracle.generate(model.module, prompt, new) for prompt in prompts]


def compare(model, tokenizer, size, *, block_size=16, shuffled=False, share=None):
    """Serves the case's prompts; `share` is the pool's size as a share of what its running
    sequences want at most, but no less than what the longest needs."""
    prompts, expected = case(model, tokenizer, **size)
    order = np.random.default_rng(1).permutation(len(prompts)) if shuffled else range(len(prompts))
    need = sorted(-(-(len(prompt) + size["new"]) // block_size) for prompt in prompts)
    wanted = sum(need[-size["running"] :])
    blocks = wanted if share is None else max(int(wanted * share), need[-1])
    engine = serving.engine(
        model,
        tokenizer,
        num_blocks=blocks,
        block_size=block_size,
        max_num_seqs=size["running"],
        max_num_batched_tokens=size["chunk"],
    )
    params = SamplingParams(temperature=0, max_tokens=size["new"], ignore_eos=True, logprobs=0)
    outputs = serving.serve(engine, [prompts[i] for i in order], params)
    comparison = oracle.compare(outputs, [expected[i] for i in order])
    print(f"\n{model.family}: {comparison}, {engine.scheduler.num_preemptions} preemptions")
    assert not comparison.wrong
    assert comparison.logprob_error < LOGPROB_ERROR
    return engine, outputs


@both
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("family", sorted(tiny_models.CONFIGS))
def test_tiny_models_generate_what_mlx_lm_generates(family, block_size, size):
    compare(tiny(family), None, size, block_size=block_size, shuffled=block_size == 32)


@both
@pytest.mark.parametrize("block_size", [16, 32])
def test_smollm2_generates_what_mlx_lm_generates(smollm2_folder, block_size, size):
    compare(*real(smollm2_folder), size, block_size=block_size, shuffled=block_size == 32)


def test_smollm2_of_4_bits_generates_what_mlx_lm_generates(smollm2_4bit_folder):
    compare(*real(smollm2_4bit_folder), FEW)


@both
@pytest.mark.gemma
@pytest.mark.parametrize("block_size", [16, 32])
def test_gemma3_generates_what_mlx_lm_generates(gemma3_folder, block_size, size):
    compare(*real(gemma3_folder), size, block_size=block_size, shuffled=block_size == 32)


@functools.partial(both, short=GROWING)
@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss"])
def test_a_pool_too_small_for_all_changes_no_token(family, share, size):
    engine, outputs = compare(tiny(family), None, size, share=share)
    # Long prompts with short outputs fit as admitted, unless the pool is very small.
    assert engine.scheduler.num_preemptions > 0 or (size is FULL and share > 0.1)
    assert max(output.num_preemptions for output in outputs) <= 4


@pytest.mark.full
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
def test_smollm2_in_a_small_pool_generates_the_same(smollm2_folder, share):
    _, outputs = compare(*real(smollm2_folder), FULL, share=share)
    assert max(output.num_preemptions for output in outputs) <= 4


@pytest.mark.full
@pytest.mark.gemma
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("share", [0.5, 0.25, 0.1])
def test_gemma3_in_a_small_pool_generates_the_same(gemma3_folder, share):
    _, outputs = compare(*real(gemma3_folder), FULL, share=share)
    assert max(output.num_preemptions for output in outputs) <= 4
