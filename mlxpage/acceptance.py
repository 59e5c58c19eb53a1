"""Does a model serve on this machine as it should: the tokens of mlx-lm, and how fast?

Every function measures one thing, and gives what JSON can hold. Speeds are of both engines in one
process and on the same weights, in turns. MLX computes on the thread that calls.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mlxpage import model_store
from mlxpage.bench import attention as timing
from mlxpage.bench import bandwidth, runs
from mlxpage.engine import Engine
from mlxpage.metal import choice, memory, self_check
from mlxpage.metal import model as models
from mlxpage.metal.backend import device, mx
from mlxpage.metal.choice import Backend
from mlxpage.metal.model import Model
from mlxpage.outputs import StreamEvent
from mlxpage.sampling_params import SamplingParams
from mlxpage.text import Tokenizer

DEMO = "smollm2-135m"
CONCURRENCY = (1, 4, 16)
BLOCK_SIZE, CHUNK = 16, 512

_CHARACTERS = 24_000  # some thousand tokens
_NO_GPU = {"skipped": "there is no GPU"}
# Two logits closer than this may change places by rounding, whatever mlx-lm's own noise is.
_LEAST_TIE = 1e-4
# That noise is of one logit and of one way to compute it; two of them differ, in two ways.
_SLACK = 4

ATTENTION_SHAPES = {
    "8 x 1,024": timing.Shape(8, 1024, 32, 8, 128, BLOCK_SIZE),
    "32 x 2,048": timing.Shape(32, 2048, 32, 8, 128, BLOCK_SIZE),
    "1 x 16,384": timing.Shape(1, 16384, 32, 8, 128, BLOCK_SIZE),
    "16 x 2,048, heads of 64": timing.Shape(16, 2048, 24, 8, 64, BLOCK_SIZE),
}


@dataclass
class Subject:
    """A model that passed its check, and what serves it."""

    model: Model
    tokenizer: Tokenizer
    backend: Backend

    def prompts(self, count: int, shortest: int, longest: int) -> list[list[int]]:
        """Pieces of real text, which every Python carries, of so many tokens."""
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
        ids = self.tokenizer.encode(text[:_CHARACTERS])
        rng = np.random.default_rng(count)
        lengths = rng.integers(shortest, longest + 1, count)
        starts = rng.integers(0, len(ids) - longest, count)
        return [ids[a : a + n] for a, n in zip(starts.tolist(), lengths.tolist(), strict=True)]

    def facts(self) -> dict[str, Any]:
        return {
            "family": self.model.family,
            "layers": self.model.num_layers,
            "weight_bytes": self.model.nbytes,
            "dtypes": sorted({str(spec.dtype).split(".")[-1] for spec in self.model.specs}),
            "backend": self.backend.name,
            "why": self.backend.why,
        }


def load(name: str, on_status: Callable[[str], None] | None = None) -> Subject:
    """Raises what loading it for an `LLM` does."""
    folder = model_store.resolve(name, on_status=on_status)
    model_store.check_folder(folder)
    model = models.load(folder)
    backend = choice.checked(model, BLOCK_SIZE, None, on_status)
    return Subject(model, Tokenizer(folder, model.config.get("eos_token_id")), backend)


@contextmanager
def engine(subject: Subject, sequences: int, length: int) -> Iterator[Engine]:
    """For so many sequences at once, of so many tokens at most."""
    limits = {"max_num_seqs": sequences, "max_num_batched_tokens": CHUNK}
    blocks = sequences * -(-length // BLOCK_SIZE)
    plan = memory.plan(subject.model, num_blocks=blocks, block_size=BLOCK_SIZE, **limits)
    made = Engine(subject.model, subject.tokenizer, plan, backend=subject.backend, **limits)
    try:
        yield made
    finally:
        made.close()


class Served:
    """Greedy generations of `count` tokens, as an engine computes them."""

    def __init__(self, made: Engine, prompts: list[list[int]], count: int):
        self._engine = made
        self._new = 0
        self._error: Exception | None = None
        self.tokens: list[list[int]] = [[] for _ in prompts]
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        for place, prompt in enumerate(prompts):
            made.add(made.request(prompt, params, partial(self._take, place)))

    def _take(self, place: int, event: StreamEvent) -> None:
        self._error = self._error or event.error
        self._new += len(event.token_ids)
        self.tokens[place] += event.token_ids

    def step(self) -> int | None:
        """Computes a step. The number of new tokens, None when all have ended; raises what a
        request failed with."""
        if not self._engine.has_work:
            return None
        self._new = 0
        self._engine.step()
        if self._error is not None:
            raise self._error
        return self._new


# -- tokens --


@dataclass
class Greedy:
    """What mlx-lm generates by itself, after one prompt."""

    tokens: list[int]
    gaps: list[float]
    """Between the two best logits, for each token."""
    noise: float
    """The most that a logit differs by when all is computed in one forward."""


def greedy_of_mlx_lm(model: Model, prompt: list[int], count: int) -> Greedy:
    """With its own caches, one token after the other."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model.module)
    found = Greedy([], [], 0.0)
    rows = []
    inputs = prompt
    for _ in range(count):
        logits = model.module(mx.array(inputs)[None], cache=cache)[0, -1].astype(mx.float32)
        second, best = sorted(mx.topk(logits, 2).tolist())
        rows.append(logits)
        found.gaps.append(best - second)
        found.tokens.append(int(mx.argmax(logits)))
        inputs = found.tokens[-1:]
    whole = mx.array(prompt + found.tokens[:-1])[None]
    again = model.module(whole, cache=make_prompt_cache(model.module))[0, -count:]
    found.noise = mx.abs(again.astype(mx.float32) - mx.stack(rows)).max().item()
    return found


def greedy_of_mlxpage(
    subject: Subject, prompts: list[list[int]], count: int, concurrency: int
) -> list[list[int]]:
    """Tokens after each prompt, so many prompts at once."""
    with engine(subject, concurrency, max(map(len, prompts)) + count) as made:
        served = Served(made, prompts, count)
        while served.step() is not None:
            pass
    return served.tokens


def same_tokens(subject: Subject, count: int, longest: int = 96) -> dict[str, Any]:
    """Compares greedy tokens, up to the first that differs in each prompt. Where the two best
    logits lie closer than rounding, it is a near tie; else they are different, which is a fault."""
    prompts = subject.prompts(max(CONCURRENCY), 4, longest)
    expected = [greedy_of_mlx_lm(subject.model, prompt, count) for prompt in prompts]
    tie = max(_LEAST_TIE, _SLACK * max(found.noise for found in expected))
    runs = {}
    for concurrency in CONCURRENCY:
        some = prompts[: max(4, concurrency)]
        ours = greedy_of_mlxpage(subject, some, count, concurrency)
        runs[str(concurrency)] = compared(ours, expected[: len(some)], tie)
    return {"tokens": count, "near_tie": tie, "concurrency": runs}


def compared(ours: list[list[int]], theirs: list[Greedy], tie: float) -> dict[str, Any]:
    result: dict[str, Any] = {"prompts": len(ours), "same": 0, "near_ties": [], "different": []}
    for number, (tokens, greedy) in enumerate(zip(ours, theirs, strict=True)):
        pairs = enumerate(zip(tokens, greedy.tokens, strict=True))
        at = next((place for place, (a, b) in pairs if a != b), None)
        if at is None:
            result["same"] += 1
            continue
        kind = "near_ties" if greedy.gaps[at] < tie else "different"
        result[kind].append({"prompt": number, "position": at, "gap": greedy.gaps[at]})
    return result


# -- speed --


def decode_speed(step: Callable[[], int | None], sequences: int) -> float:
    """Tokens per second from when every sequence has its first. `step` computes, and gives the
    number of new tokens; None when there are no more."""
    count, began = 0, None
    while (new := step()) is not None:
        count += new
        if began is None and count >= sequences:
            began, first = time.perf_counter(), count
    return (count - first) / (time.perf_counter() - began)


def decode_of_mlxpage(subject: Subject, prompts: list[list[int]], count: int) -> float:
    with engine(subject, len(prompts), max(map(len, prompts)) + count) as made:
        return decode_speed(Served(made, prompts, count).step, len(prompts))


def decode_of_mlx_lm(subject: Subject, prompts: list[list[int]], count: int) -> float:
    from mlx_lm.generate import BatchGenerator

    generator = BatchGenerator(
        subject.model.module,
        completion_batch_size=len(prompts),
        prefill_batch_size=len(prompts),
        prefill_step_size=CHUNK,
    )
    generator.insert(prompts, [count] * len(prompts))
    return decode_speed(lambda: len(generator.next_generated()) or None, len(prompts))


def prefill_of_mlxpage(subject: Subject, prompt: list[int]) -> float:
    """Tokens of the prompt per second until the first of the answer is there."""
    with engine(subject, 1, len(prompt) + 1) as made:
        began = time.perf_counter()
        served = Served(made, [prompt], 1)
        while served.step() is not None:
            pass
        return len(prompt) / (time.perf_counter() - began)


def prefill_of_mlx_lm(subject: Subject, prompt: list[int]) -> float:
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(subject.model.module)
    began = time.perf_counter()
    for start in range(0, len(prompt), CHUNK):
        logits = subject.model.module(mx.array(prompt[start : start + CHUNK])[None], cache=cache)
        mx.eval([each.state for each in cache])
    mx.argmax(logits[0, -1]).item()
    return len(prompt) / (time.perf_counter() - began)


def in_turns(arms: dict[str, Callable[[], float]], repeats: int) -> dict[str, Any]:
    """The median speed of each arm, all of them, and the most memory that MLX had meanwhile."""
    made = {name: runs.Arm({}, partial(_run, arm), arm) for name, arm in arms.items()}
    runs.in_turns(list(made.values()), repeats)
    found = {}
    for name, arm in made.items():
        speeds, peaks = ([run[key] for run in arm.runs] for key in ("tok_s", "peak_bytes"))
        found[name] = {"tok_s": statistics.median(speeds), "runs": speeds, "peak_bytes": max(peaks)}
    return found


def _run(arm: Callable[[], float]) -> dict[str, float]:
    mx.clear_cache()
    mx.reset_peak_memory()
    return {"tok_s": round(arm(), 2), "peak_bytes": mx.get_peak_memory()}


def decode(subject: Subject, count: int, length: int = 32, repeats: int = 3) -> dict[str, Any]:
    """So many tokens of each sequence, at each concurrency."""
    result = {}
    for concurrency in CONCURRENCY:
        prompts = subject.prompts(concurrency, length, length)
        arms = {
            "mlxpage": partial(decode_of_mlxpage, subject, prompts, count),
            "mlx_lm": partial(decode_of_mlx_lm, subject, prompts, count),
        }
        result[str(concurrency)] = in_turns(arms, repeats)
    return {"tokens": count, "prompt_tokens": length, "concurrency": result}


def prefill(subject: Subject, length: int = CHUNK, repeats: int = 3) -> dict[str, Any]:
    length = min(length, (subject.model.context_length or length + 1) - 1)
    (prompt,) = subject.prompts(1, length, length)
    arms = {
        "mlxpage": partial(prefill_of_mlxpage, subject, prompt),
        "mlx_lm": partial(prefill_of_mlx_lm, subject, prompt),
    }
    return {"prompt_tokens": length, **in_turns(arms, repeats)}


def kernels() -> dict[str, Any]:
    """Whether they are right in the cases that `self_check` has."""
    if device().kind == "cpu":
        return dict(_NO_GPU)
    return {"cases": self_check.run_cases()}


def attention(repeats: int = 10, launches: int = 20) -> dict[str, Any]:
    """Microseconds and GB/s of the kernels, and of what else could be done, as `mlxpage bench
    attention` has them. Nothing without a GPU."""
    if device().kind == "cpu":
        return dict(_NO_GPU)
    speed = bandwidth.copy_speed()
    result: dict[str, Any] = {"copy_gb_s": round(speed / 1e9, 1), "shapes": {}}
    for name, shape in ATTENTION_SHAPES.items():
        arms = timing.arms(name, timing.Case(shape), speed, launches)
        runs.in_turns(arms, repeats)
        result["shapes"][name] = {
            arm.case["arm"]: {k: round(v, 1) for k, v in arm.row()["metrics"].items()}
            for arm in arms
        }
        del arms
        mx.clear_cache()
    return result


# -- all of it --

# New tokens of a prompt: on a CPU, all parts should take no more than some minutes.
_TOKENS, _TOKENS_ON_A_CPU = 32, 12


def measure(
    name: str, record: dict[str, Any], on_status: Callable[[str], None] | None = None
) -> None:
    """Fills `record` with every part, each of them with its seconds, or with why it failed, which
    the others survive. What is there when it is interrupted is whole."""
    subjects: list[Subject] = []

    def loaded() -> dict[str, Any]:
        subjects.append(load(name, on_status))
        return subjects[0].facts()

    count = _TOKENS_ON_A_CPU if device().kind == "cpu" else _TOKENS
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "kernels": kernels,
        "attention": attention,
        "model": loaded,
        "same_tokens": lambda: same_tokens(*subjects, count),
        "decode": lambda: decode(*subjects, count),
        "prefill": lambda: prefill(*subjects),
    }
    for part, function in parts.items():
        if on_status:
            on_status(f"measuring: {part.replace('_', ' ')}")
        began = time.perf_counter()
        try:
            needs_model = part in ("same_tokens", "decode", "prefill")
            found = {"skipped": "there is no model"} if needs_model and not subjects else function()
        except Exception as error:  # of MLX, a driver, a model: to be told, whatever it is
            reason = " ".join(str(error).split())[:500]
            found = {"error": f"{type(error).__name__}: {reason}"}
        record[part] = found | {"seconds": round(time.perf_counter() - began, 1)}
