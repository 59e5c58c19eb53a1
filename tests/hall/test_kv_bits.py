"""What a model is with K and V in 8 bits: within half a per cent of its perplexity."""

from __future__ import annotations

import math

import numpy as np
import prose
import pytest
import serving

from mlxpage.metal import model as models
from mlxpage.sampling_params import SamplingParams
from mlxpage.text import Tokenizer

SCORED = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)


def perplexity(folder, bits, length: int, pieces: int) -> float:
    model = models.load(folder, dtype="float32")
    model.quantise_cache(bits, bits)
    engine = serving.engine(model, num_blocks=256, max_num_batched_tokens=256)
    tokens = Tokenizer(folder, None).encode(prose.text())
    step = len(tokens) // pieces
    prompts = [tokens[i * step : i * step + length] for i in range(pieces)]
    outputs = serving.serve(engine, prompts, SCORED)
    logprobs = [e.logprob for output in outputs for e in output.prompt_logprobs[1:]]
    return math.exp(-np.mean(logprobs))


@pytest.mark.parametrize(
    "length, pieces, most",
    [(160, 1, 0.01), pytest.param(1024, 4, 0.005, marks=[pytest.mark.full])],
    ids=["short", "full"],
)
def test_eight_bits_hardly_change_the_perplexity_of_real_text(smollm2_folder, length, pieces, most):
    plain, coded = (perplexity(smollm2_folder, bits, length, pieces) for bits in (None, 8))
    print(f"perplexity {plain:.4f}, with 8 bits {coded:.4f}")
    assert plain != coded
    assert abs(coded / plain - 1) <= most
