"""Prompts that begin alike share blocks, and generate what they generate alone.

Random cases: prompts on a few common beginnings come in waves, once or several times each, in
chunks of any size, into pools that are too small for all of them, or that grow and are trimmed in
the middle of a run. Greedy tokens have to be those of
an engine without a prefix cache, but where the two best logits lie within rounding of each other.
"""

import functools
import random
import tempfile
from dataclasses import replace
from typing import NamedTuple

import oracle
import prose
import pytest
import serving
import tiny_models
from families import zoo

from mlxpage.metal import choice, self_check
from mlxpage.metal import model as models
from mlxpage.metal.model import Model
from mlxpage.sampling_params import SamplingParams
from mlxpage.text import Tokenizer

BACKEND = choice.wanted()
FAMILIES = ["llama", "gemma3_text", "gpt_oss", "qwen3"]
# Beside K and V, and alone.
WITH_STATES = ["qwen3_next", "falcon_h1", "mamba2"]
LOGPROB_ERROR = 2e-3


def backend_of(model):
    return choice.REFERENCE if model.state_specs else BACKEND


@functools.cache
def tiny(family):
    if family in WITH_STATES:
        model = Model(*zoo.make(family))
        self_check.check(model, 16)
        return model
    # MLX's RoPE of heads of 16 is wrong on CUDA.
    return tiny_models.make(family, **({} if BACKEND.name == "reference" else {"head_dim": 32}))


@functools.cache
def text_of(folder=None) -> list[int]:
    if folder is None:
        return list(prose.text().encode("ascii", "replace"))
    return Tokenizer(folder, None).encode(prose.text())


@functools.cache
def real(folder):
    return models.load(folder, dtype="float32")


class Sizes(NamedTuple):
    """Of a case, at most; and how many tokens a step may have beside one of each sequence."""

    new: int
    waves: int
    prompts: int
    chunks: tuple[int, ...]


TINY = Sizes(new=60, waves=3, prompts=5, chunks=(0, 7, 16, 60, 200))
# A step takes a hundred times as long.
REAL = Sizes(new=31, waves=2, prompts=3, chunks=(16, 60, 200))


class Case:
    """Waves of prompts, and an engine's limits."""

    def __init__(self, seed: int, text: list[int], sizes: Sizes):
        rng, longest = random.Random(seed), 90

        def piece(shortest, longest):
            start = rng.randrange(len(text) - longest)
            return text[start : start + rng.randint(shortest, longest)]

        beginnings = [piece(17, longest) for _ in range(rng.randint(1, 3))]
        self.waves = [
            [
                rng.choice(beginnings)[: rng.choice([None, None, rng.randint(1, longest)])]
                + piece(0, 20)
                for _ in range(rng.randint(1, sizes.prompts))
            ]
            for _ in range(rng.randint(1, sizes.waves))
        ]
        self.waves = [[prompt or [1] for prompt in wave] for wave in self.waves]
        self.new = rng.choice([rng.randint(1, 20), rng.randint(30, sizes.new)])
        self.n = rng.choice([1, 1, 1, 2, 3])
        self.block_size = rng.choice([16, 16, 32])
        need = [-(-(len(prompt) + self.new) // self.block_size) for w in self.waves for prompt in w]
        seqs = rng.randint(1, 5)
        self.limits = {
            "num_blocks": rng.choice([max(need), max(need) + rng.randint(0, 8), 4 * max(need)]),
            "max_num_seqs": seqs,
            "max_num_batched_tokens": seqs + rng.choice(sizes.chunks),
        }
        # How often a step is followed by a trim, of cached blocks too or not.
        self.resizes = rng.choice([0, 0.03, 0.3])
        # Whether there is a disk, and each wave is served by another engine over it.
        self.has_disk, self.restarts = rng.choice([(False, False), (True, False), (True, True)])
        self.rng = rng

    def alone(self, model):
        """Without a cache, in a pool that holds everything."""
        backend = backend_of(model)
        engine = serving.engine(model, num_blocks=64, backend=backend, prefix_cache=False)
        params = SamplingParams(temperature=0, max_tokens=self.new, logprobs=2)
        return [out for wave in self.waves for out in serving.serve(engine, wave, params)]

    def serve(self, model):
        """The outputs, and the engines that gave them."""
        params = SamplingParams(temperature=0, max_tokens=self.new, logprobs=2, n=self.n)
        engines, outputs = [], []
        with tempfile.TemporaryDirectory() as folder:
            for wave in self.waves:
                if not engines or self.restarts:
                    engines.append(self.engine(model, folder))
                on_step = self.maybe_trim if self.resizes else None
                outputs += serving.serve(engines[-1], wave, params, on_step=on_step)
                if self.restarts:
                    engines[-1].store_cached()
                    engines[-1]._tier.store.close()
            if self.has_disk:
                engines[-1]._tier.store.close()
        return engines, outputs

    def engine(self, model, folder: str):
        options = {"block_size": self.block_size}
        tier = serving.disk_tier(folder, model, **options) if self.has_disk else None
        options["backend"] = backend_of(model)
        engine = serving.engine(model, tier=tier, **options, **self.limits)
        if self.resizes:
            make_elastic(engine)
        return engine

    def maybe_trim(self, engine) -> None:
        if self.rng.random() < self.resizes:
            engine.trim(cached=self.rng.random() < 0.3)


def make_elastic(engine) -> None:
    """Lets the pool have as many blocks as it has, but none to begin with."""
    engine.plan = replace(engine.plan, is_fixed=False)
    for group in engine.pool.groups:
        group.pool.start = 0
    engine.trim(cached=True)


def compare(model, text, seeds, sizes=TINY) -> None:
    found = evicted = preempted = resized = restored = 0
    for seed in seeds:
        case = Case(seed, text, sizes)
        expected = [as_greedy(output) for output in case.alone(model)]
        engines, outputs = case.serve(model)
        comparison = oracle.compare(
            [choice for output in outputs for choice in (output, *output.choices)],
            [greedy for greedy in expected for _ in range(case.n)],
        )
        assert not comparison.wrong, f"case {seed}: {comparison}"
        assert comparison.logprob_error < LOGPROB_ERROR, f"case {seed}: {comparison}"
        caches = [engine.scheduler.prefix_cache for engine in engines]
        hits = sum(cache.num_hit_tokens for cache in caches)
        if case.n == 1:
            assert sum(output.num_cached_tokens for output in outputs) == hits
        found += hits
        evicted += sum(cache.num_evictions for cache in caches)
        restored += sum(cache.num_restored_tokens for cache in caches)
        preempted += sum(engine.scheduler.num_preemptions for engine in engines)
        resized += sum(min(engine.stats()["resizes"].values()) for engine in engines)
    if len(seeds) < 6:
        return  # too few to say that they do all that they may
    assert restored > len(seeds), "nothing comes from the disk"
    # Of windows and states nobody can run out, once room is kept for them.
    may_run_out = any(spec.window is None for spec in model.kv_specs)
    preempts = preempted or len(seeds) < 50 or not may_run_out
    assert found and evicted and preempts, "the cases test nothing"
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


def cases(*parts: range):
    """Some at a time, and 450 of them for `full`."""
    full = [pytest.mark.full, pytest.mark.timeout(7200)]
    return pytest.mark.parametrize("seeds", [*parts, pytest.param(range(450), marks=full)], ids=str)


@pytest.mark.parametrize("family", FAMILIES)
@cases(range(25), range(25, 50))
def test_tiny_models_generate_the_same_with_and_without_the_cache(family, seeds):
    compare(tiny(family), text_of(), seeds)


@pytest.mark.parametrize("family", WITH_STATES)
@cases(range(10))
def test_models_with_states_generate_the_same_with_and_without_the_cache(family, seeds):
    compare(tiny(family), text_of(), seeds)


@pytest.mark.parametrize(
    "count", [3, pytest.param(100, marks=[pytest.mark.full, pytest.mark.timeout(7200)])]
)
def test_smollm2_generates_the_same_with_and_without_the_cache(smollm2_folder, count):
    compare(real(smollm2_folder), text_of(smollm2_folder), range(count), REAL)


@pytest.mark.gemma
@pytest.mark.parametrize(
    "count", [6, pytest.param(100, marks=[pytest.mark.full, pytest.mark.timeout(7200)])]
)
def test_gemma3_generates_the_same_with_and_without_the_cache(gemma3_folder, count):
    compare(real(gemma3_folder), text_of(gemma3_folder), range(count), REAL)
