"""The engine on the kernels, as it is used: the tokens are mlx-lm's. On a GPU in earnest; where
there is none, the simulator runs the same with fewer and shorter requests."""

from __future__ import annotations

import numpy as np
import oracle
import paging
import prose
import pytest
import serving
import stress

from mlxpage.metal import choice, kernels, kv_cache, layer_cache
from mlxpage.metal.backend import mx
from mlxpage.sampling_params import SamplingParams

ON_A_GPU = mx.metal.is_available() or mx.cuda.is_available()
FAMILIES = ["llama", "gemma3_text", "gpt_oss", "deepseek_v3"]


@pytest.fixture(autouse=True)
def fresh_kernels(metal):
    with paging.fresh_kernels():
        yield


@pytest.fixture
def backend():
    return choice.wanted() if ON_A_GPU else choice.Backend("metal", kernels, "the tests")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_prompts_of_any_length_give_the_tokens_of_mlx_lm(family, share, backend):
    """With all the blocks that they want, and with some of them."""
    check_prompts_of_any_length(family, share, backend)


@pytest.fixture
def in_stretches(monkeypatch):
    """Each layer is dispatched by itself."""
    monkeypatch.setattr(layer_cache, "_STRETCH", 1)
    monkeypatch.setattr(layer_cache, "_LEAST_OF_A_LAYER", 1)


def test_so_do_prompts_whose_layers_are_dispatched_one_by_one(backend, in_stretches):
    cache = check_prompts_of_any_length("gemma3_text", 0.3, backend)
    assert len(cache._forward.ahead) == layer_cache._STRETCHES_AHEAD


def check_prompts_of_any_length(family, share, backend) -> kv_cache.KVCache:
    count, longest, new, running = (64, 600, 64, 16) if ON_A_GPU else (6, 90, 8, 3)
    chunk = 128 if ON_A_GPU and family != "gpt_oss" else stress.CHUNK
    model = stress.make_model(family)
    ids = list(prose.text().encode("ascii", "replace"))
    prompts = prose.prompts(count, 1, longest, ids, np.random.default_rng(0))
    expected = [oracle.generate(model.module, prompt, new, chunk) for prompt in prompts]
    need = sorted(-(-(len(prompt) + new) // 16) for prompt in prompts)
    served = serving.engine(
        model,
        num_blocks=max(int(share * sum(need[-running:])), need[-1]),
        backend=backend,
        max_num_seqs=running,
        max_num_batched_tokens=chunk,
    )
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, logprobs=0)
    comparison = oracle.compare(serving.serve(served, prompts, params), expected)
    assert not comparison.wrong
    assert len(comparison.ties) <= count // 16
    assert comparison.logprob_error < 2e-3
    if ON_A_GPU:
        assert model._compiled._functions and model._compiled.error is None
    return model.cache


@pytest.mark.parametrize("family", FAMILIES)
def test_no_token_is_wrong_while_blocks_change_hands_and_steps_raise(family, backend):
    check_a_stress(family, backend)


def test_nor_is_one_of_layers_that_are_dispatched_one_by_one(backend, in_stretches):
    check_a_stress("deepseek_v3", backend)


def check_a_stress(family, backend):
    requests = 400 if ON_A_GPU else 40
    outcome = stress.run(stress.make_model(family), backend, requests, seed=0)
    assert not outcome.wrong and not outcome.errors
    assert outcome.served > requests // 2
    assert outcome.ties <= 1 + requests // 50
    assert outcome.found and outcome.copies
    if ON_A_GPU:
        assert outcome.failed and outcome.aborted and outcome.preemptions and outcome.prefill_steps


if ON_A_GPU:  # tests/metal has the same of the reference

    def test_no_step_of_two_hundred_costs_a_layers_pool(backend):
        model = stress.make_model()
        # A layer's pool is larger than everything that a step computes.
        served = serving.engine(model, num_blocks=20_000, backend=backend, max_num_seqs=4)
        layer = model.cache.layers[0].pool
        params = SamplingParams(temperature=0, max_tokens=240, ignore_eos=True)
        for prompt in ([1, 2, 3], list(range(100)), [5]):
            served.add(served.request(prompt, params, lambda event: None))
        for _ in range(20):
            served.step()
        mx.synchronize()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        for _ in range(200):
            served.step()
        assert mx.get_peak_memory() - before < layer.k.nbytes
        served.close()
