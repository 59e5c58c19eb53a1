"""Beam search gives what a straightforward search over whole sequences gives."""

import math

import numpy as np
import prose
import pytest

from mlxpage import LLM, BeamSearchParams, InvalidRequest, SamplingParams
from mlxpage.metal.backend import mlx_lm_utils, mx


def logprobs_after(module, tokens: list[int]) -> np.ndarray:
    """By mlx-lm alone, without a cache: the whole sequence is computed anew."""
    logits = module(mx.array(tokens)[None])[0, -1].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits))


def plain_search(module, prompt, ends, params: BeamSearchParams) -> list[tuple[list[int], float]]:
    """(tokens, cumulative log-probability) of the best results, best first: every extension of
    every beam is looked at, and nothing ends before all has been tried."""
    width = params.beam_width
    score = lambda result: result[1] / len(result[0]) ** params.length_penalty  # noqa: E731
    beams, finished = [([], 0.0)], []
    for _ in range(params.max_tokens):
        extended = []
        for tokens, total in beams:
            for token, logprob in enumerate(logprobs_after(module, prompt + tokens)):
                extended.append(([*tokens, token], total + float(logprob)))
        extended.sort(key=lambda result: -result[1])
        finished += [result for result in extended[:width] if result[0][-1] in ends]
        beams = [result for result in extended if result[0][-1] not in ends][:width]
        if params.early_stopping and len(finished) >= width:
            beams = []
            break
    finished += beams
    return sorted(finished, key=lambda result: -score(result))[:width]


CASES = [
    {},
    {"beam_width": 1},
    {"beam_width": 3, "length_penalty": 0.0},
    {"beam_width": 6, "length_penalty": 2.0},
    {"beam_width": 5, "length_penalty": -1.0},
    {"beam_width": 4, "early_stopping": True},
    {"beam_width": 10, "ignore_eos": True},
]


@pytest.fixture(scope="module")
def module(tiny_folder):
    return mlx_lm_utils().load_model(tiny_folder)[0]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_results_are_those_of_a_plain_search(llm, module, options):
    prompts = [[5, 6, 7], list(range(20, 60)), list(range(3, 20))]
    greedy = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    # What is likely, or nothing would end.
    likely = {
        output.token_ids[index] for output in llm.generate(prompts, greedy) for index in (2, 4)
    }
    ends = set() if options.get("ignore_eos") else likely
    params = BeamSearchParams(max_tokens=9, stop_token_ids=tuple(ends), **options)
    for prompt, output in zip(prompts, llm.beam_search(prompts, params), strict=True):
        ends |= set() if params.ignore_eos else llm._engine.eos_token_ids
        expected = plain_search(module, prompt, ends, params)
        found = [output, *output.choices]
        assert [result.token_ids for result in found] == [tokens for tokens, _ in expected]
        for result, (tokens, total) in zip(found, expected, strict=True):
            assert math.isclose(
                sum(entry.logprob for entry in result.logprobs), total, abs_tol=1e-3
            )
            assert result.finish_reason == ("stop" if tokens[-1] in ends else "length")
            assert result.prompt_token_ids == prompt


def test_a_beam_of_one_without_ends_is_greedy(llm):
    params = BeamSearchParams(beam_width=1, max_tokens=12, ignore_eos=True)
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    found, expected = llm.beam_search("abc", params), llm.generate("abc", greedy)
    assert (found.token_ids, found.text) == (expected.token_ids, expected.text)
    assert found.choices == []


def test_beams_compute_one_token_each_and_share_their_blocks(tiny_folder):
    with LLM(tiny_folder, max_num_seqs=8) as llm:
        prompt, params = list(range(40)), BeamSearchParams(max_tokens=40, ignore_eos=True)
        llm.beam_search(prompt, params)
        stats = llm.stats()
        steps = 39  # after the first, which computes the prompt
        hits, queried = stats["prefix_cache"]["hit_tokens"], stats["prefix_cache"]["queried_tokens"]
        assert queried - hits == 40 + steps * 4
        # Four beams of 80 tokens alone are 20 blocks.
        assert stats["blocks"]["peak_used"] <= 14


def test_beams_find_the_same_in_a_small_pool_and_without_the_cache(tiny_folder):
    prompts, params = ["abc", "defgh"], BeamSearchParams(max_tokens=24, ignore_eos=True)
    found = []
    for options in ({}, {"num_blocks": 5, "max_num_seqs": 3}, {"prefix_cache": False}):
        with LLM(tiny_folder, **options) as llm:
            outputs = llm.beam_search(prompts, params)
        found.append([[r.token_ids for r in (out, *out.choices)] for out in outputs])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_width": 0}, "beam_width is 0; it must be from 1 to 20"),
        ({"beam_width": 21}, "beam_width is 21"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"length_penalty": float("nan")}, "length_penalty must be a number"),
        ({"early_stopping": 1}, "early_stopping must be True or False"),
    ],
)
def test_params_out_of_range_are_refused(options, message):
    with pytest.raises(InvalidRequest, match=message):
        BeamSearchParams(**options)


def test_what_can_not_be_served_is_refused_before_the_first_step(llm):
    before = llm.stats()["steps"]
    for prompt in ("", [10**6]):
        with pytest.raises(InvalidRequest):
            llm.beam_search(["abc", prompt])
    with pytest.raises(InvalidRequest, match="params are BeamSearchParams, not SamplingParams"):
        llm.beam_search("abc", SamplingParams())
    with pytest.raises(
        InvalidRequest, match=r"beam_width is 18 and there are . end and stop tokens"
    ):
        llm.beam_search("abc", BeamSearchParams(beam_width=18, stop_token_ids=(4, 5, 6)))
    assert llm.stats()["steps"] == before
    assert llm.beam_search([]) == []


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_smollm2_finds_what_a_plain_search_finds(smollm2_folder):
    params = BeamSearchParams(beam_width=4, max_tokens=24)
    with LLM(smollm2_folder) as llm:
        text = prose.text()
        prompts = [llm.tokenizer.encode(text[start : start + 300]) for start in (0, 9000, 50_000)]
        outputs = llm.beam_search(prompts, params)
        ends = llm._engine.eos_token_ids
    module = mlx_lm_utils().load_model(smollm2_folder)[0]
    module.set_dtype(mx.float32)
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = plain_search(module, prompt, ends, params)
        assert [r.token_ids for r in (output, *output.choices)] == [t for t, _ in expected]
