"""Prompts that begin alike share blocks, and generate what they generate alone.

Random cases: prompts on a few common beginnings come in waves, once or several times each, in
chunks of any size, into pools that are too small for all of them, or that grow and are trimmed in
the middle of a run. Greedy tokens have to be those of
an engine without a prefix cache, but where the two best logits lie within rounding of each other.
"""

import functools
import random
from dataclasses import replace

import oracle
import prose
import pytest
import serving
import tiny_models

from mlxpage.metal import model as models
from mlxpage.sampling_params import SamplingParams
from mlxpage.text import Tokenizer

FAMILIES = ["llama", "gemma3_text", "gpt_oss", "qwen3"]
LOGPROB_ERROR = 2e-3


@functools.cache
def tiny(family):
    return tiny_models.make(family)


@functools.cache
def text_of(folder=None) -> list[int]:
    if folder is None:
        return list(prose.text().encode("ascii", "replace"))
    return Tokenizer(folder, None).encode(prose.text())


@functools.cache
def real(folder):
    return models.load(folder, dtype="float32")


class Case:
    """Waves of prompts, and an engine's limits."""

    def __init__(self, seed: int, text: list[int], longest: int, most_new: int):
        rng = random.Random(seed)

        def piece(shortest, longest):
            start = rng.randrange(len(text) - longest)
            return text[start : start + rng.randint(shortest, longest)]

        beginnings = [piece(17, longest) for _ in range(rng.randint(1, 3))]
        self.waves = [
            [
                rng.choice(beginnings)[: rng.choice([None, None, rng.randint(1, longest)])]
                + piece(0, 20)
                for _ in range(rng.randint(1, 5))
            ]
            for _ in range(rng.randint(1, 3))
        ]
        self.waves = [[prompt or [1] for prompt in wave] for wave in self.waves]
        self.new = rng.choice([rng.randint(1, 20), rng.randint(30, most_new)])
        self.n = rng.choice([1, 1, 1, 2, 3])
        self.block_size = rng.choice([16, 16, 32])
        need = [-(-(len(prompt) + self.new) // self.block_size) for w in self.waves for prompt in w]
        seqs = rng.randint(1, 5)
        self.limits = {
            "num_blocks": rng.choice([max(need), max(need) + rng.randint(0, 8), 4 * max(need)]),
            "max_num_seqs": seqs,
            "max_num_batched_tokens": seqs + rng.choice([0, 7, 16, 60, 200]),
        }
        # How often a step is followed by a trim, of cached blocks too or not.
        self.resizes = rng.choice([0, 0.03, 0.3])
        self.rng = rng

    def serve(self, model, *, prefix_cache: bool):
        limits = self.limits if prefix_cache else {"num_blocks": 64}
        engine = serving.engine(
            model, block_size=self.block_size, prefix_cache=prefix_cache, **limits
        )
        n = self.n if prefix_cache else 1
        params = SamplingParams(temperature=0, max_tokens=self.new, logprobs=2, n=n)
        on_step = None
        if prefix_cache and self.resizes:
            make_elastic(engine)
            on_step = self.maybe_trim
        outputs = [
            out
            for wave in self.waves
            for out in serving.serve(engine, wave, params, on_step=on_step)
        ]
        return engine, outputs

    def maybe_trim(self, engine) -> None:
        if self.rng.random() < self.resizes:
            engine.trim(cached=self.rng.random() < 0.3)


def make_elastic(engine) -> None:
    """Lets the pool have as many blocks as it has, but none to begin with."""
    engine.plan = replace(engine.plan, is_fixed=False)
    for group in engine.pool.groups:
        group.pool.start = 0
    engine.trim(cached=True)


def compare(model, text, seeds, *, longest=90, most_new=60) -> None:
    found = evicted = preempted = resized = 0
    for seed in seeds:
        case = Case(seed, text, longest, most_new)
        _, alone = case.serve(model, prefix_cache=False)
        expected = [as_greedy(output) for output in alone]
        engine, outputs = case.serve(model, prefix_cache=True)
        comparison = oracle.compare(
            [choice for output in outputs for choice in (output, *output.choices)],
            [greedy for greedy in expected for _ in range(case.n)],
        )
        assert not comparison.wrong, f"case {seed}: {comparison}"
        assert comparison.logprob_error < LOGPROB_ERROR, f"case {seed}: {comparison}"
        cache = engine.scheduler.prefix_cache
        if case.n == 1:
            assert sum(output.num_cached_tokens for output in outputs) == cache.num_hit_tokens
        found += cache.num_hit_tokens
        evicted += cache.num_evictions
        preempted += engine.scheduler.num_preemptions
        resized += min(engine.stats()["resizes"].values())
    assert found and evicted and (preempted or len(seeds) < 20), "the cases test nothing"
    assert resized >= len(seeds), "and resize nothing"


def as_greedy(output) -> oracle.Greedy:
    gaps = [entry.top[0][1] - entry.top[1][1] for entry in output.logprobs]
    return oracle.Greedy(output.token_ids, gaps, [entry.logprob for entry in output.logprobs])


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_prefix_of_many_requests_is_computed_once_and_exists_once(family):
    """64 requests that share 1,024 tokens of real text."""
    prefix, text = text_of()[:1024], text_of()
    prompts = [prefix + text[start : start + 20] for start in range(2000, 2000 + 64 * 30, 30)]
    engine = serving.engine(tiny(family), max_num_seqs=64, max_num_batched_tokens=256)
    full = next(i for i, group in enumerate(engine.scheduler.groups) if group.window is None)
    rows, most = 0, 0
    start = engine._start

    def count(schedule):
        nonlocal rows
        rows += schedule.num_scheduled_tokens
        return start(schedule)

    def watch(engine):
        nonlocal most
        running = engine.scheduler.running
        heads = {block for seq in running for block in seq.block_tables[full][:64]}
        assert len(heads) <= 64, "somebody has a copy"
        most = max(most, len(running))

    engine._start = count
    params = SamplingParams(temperature=0, max_tokens=8)
    outputs = serving.serve(engine, prompts, params, on_step=watch)
    assert most == 64, "all of them at once"
    assert [output.num_cached_tokens for output in outputs] == [0] + [1024] * 63
    assert rows == 1024 + 64 * (20 + 7)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "count", [47, pytest.param(450, marks=[pytest.mark.full, pytest.mark.timeout(7200)])]
)
def test_tiny_models_generate_the_same_with_and_without_the_cache(family, count):
    compare(tiny(family), text_of(), range(count))


@pytest.mark.parametrize(
    "count", [6, pytest.param(100, marks=[pytest.mark.full, pytest.mark.timeout(7200)])]
)
def test_smollm2_generates_the_same_with_and_without_the_cache(smollm2_folder, count):
    compare(real(smollm2_folder), text_of(smollm2_folder), range(count), most_new=30)


@pytest.mark.gemma
@pytest.mark.parametrize(
    "count", [6, pytest.param(100, marks=[pytest.mark.full, pytest.mark.timeout(7200)])]
)
def test_gemma3_generates_the_same_with_and_without_the_cache(gemma3_folder, count):
    compare(real(gemma3_folder), text_of(gemma3_folder), range(count), most_new=30)
