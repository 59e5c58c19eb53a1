"""A pool far too small, requests that come, end and are aborted, steps that raise: every token that
is served has to be the one that mlx-lm gives.

What it is for is the order of reads and writes. A block is somebody else's as soon as its sequence
ends, with the step that reads it still in flight, and prompts are computed in steps that give no
token. As a command it says what happens with and without the fences that carry that order:

    PYTHONPATH=tests python tests/kernels/stress.py [--requests 300] [--cut]
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest.mock import patch

import numpy as np
import oracle
import serving
import tiny_models
from families import zoo

from mlxpage.metal import choice
from mlxpage.metal.backend import mx
from mlxpage.metal.kernels import chunks, pool
from mlxpage.metal.model import Model
from mlxpage.sampling_params import SamplingParams

CHUNK = 48
# On CUDA, MLX's RoPE fails for heads of 16 elements in many rows, and what it gives for 64 rows and
# experts or more, which mlx-lm sorts, is garbage now and then.
OPTIONS = {
    "llama": {"hidden_size": 128},
    "gemma3_text": {"head_dim": 32},
    "gpt_oss": {"head_dim": 32, "num_experts_per_tok": 1},
    # Latent attention, no experts.
    "deepseek_v3": {"kv_lora_rank": 64, "qk_rope_head_dim": 32, "first_k_dense_replace": 99},
    "qwen3": {"head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 2},
}
LIMITS = {"max_num_seqs": 5, "max_num_batched_tokens": CHUNK}
NUM_BLOCKS = 16
LONGEST = 130
NEW = 24


@dataclass
class Outcome:
    """What became of the requests, and of their tokens."""

    served: int = 0
    aborted: int = 0
    failed: int = 0
    tokens: int = 0
    ties: int = 0
    wrong: list = field(default_factory=list)  # (request, position, gap of the two best logits)
    errors: set = field(default_factory=set)  # other than those that were injected
    preemptions: int = 0
    prefill_steps: int = 0  # that gave no token
    found: int = 0  # prompt tokens that were in the pool
    copies: int = 0  # of blocks


class Injected(Exception):
    pass


@contextmanager
def failing(rng: random.Random, share: float) -> Iterator[None]:
    """Forwards raise now and then, before or after their graph is built."""
    call = Model.__call__

    def flaky(*arguments):
        luck = rng.random()
        if luck < share / 2:
            raise Injected
        logits = call(*arguments)
        if luck < share:
            raise Injected
        return logits

    with patch.object(Model, "__call__", flaky):
        yield


@contextmanager
def cut_fences() -> Iterator[None]:
    """Nothing waits for anything: what the kernels take for a fence is a constant."""
    constant = mx.zeros(8, mx.int32)

    def without(module, name, place):
        call = getattr(module, name)

        def cut(*args, **options):
            return call(*args[:place], constant, *args[place + 1 :], **options)

        return patch.object(module, name, cut)

    with ExitStack() as stack:
        for module, name, place in (
            (pool, "write", 5),
            (pool, "paged_attention", 4),
            (pool, "gather", 5),
            (pool, "copy_blocks", 3),
            (chunks, "gather", 5),
        ):
            stack.enter_context(without(module, name, place))
        yield


def make_model(family: str = "llama") -> Model:
    """One that MLX 0.32.4 can compute on CUDA."""
    if family in tiny_models.CONFIGS:
        model = tiny_models.make(family, **OPTIONS[family])
    else:
        model = Model(*zoo.make(family, **OPTIONS[family]))
    model.fetches = False  # as the self-check finds of these
    return model


def run(model: Model, backend: choice.Backend, requests: int, seed: int) -> Outcome:
    rng = random.Random(seed)
    numbers = np.random.default_rng(seed)
    # Each serves several requests: mlx-lm takes its time with every one.
    prompts = [numbers.integers(0, 256, n).tolist() for n in numbers.integers(1, LONGEST, 40)]
    for index in range(0, len(prompts), 2):  # half of them begin alike
        prompts[index][:-1] = prompts[1][: len(prompts[index]) - 1]
    expected = [oracle.generate(model.module, prompt, NEW, CHUNK) for prompt in prompts]
    engine = serving.engine(model, num_blocks=NUM_BLOCKS, backend=backend, **LIMITS)
    outcome, open_requests = Outcome(), {}

    def add() -> None:
        which = rng.randrange(len(prompts))
        n = rng.choice([1, 1, 1, 2, 3])
        params = SamplingParams(temperature=0, max_tokens=rng.randint(1, NEW), n=n)
        tokens: list[list[int]] = [[] for _ in range(n)]

        def take(event) -> None:
            tokens[event.choice].extend(event.token_ids)
            if event.output is not None:
                ended(open_requests.pop(number), event, tokens)

        number = engine.add(engine.request(prompts[which], params, take))
        open_requests[number] = which, params

    def ended(request, event, tokens) -> None:
        which, params = request
        for of_choice in tokens:
            compare(which, of_choice)
        if event.error is not None:
            outcome.failed += 1
            if not isinstance(event.error.__cause__, Injected):
                outcome.errors.add(str(event.error))
        elif event.finish_reason == "abort":
            outcome.aborted += 1
        else:
            outcome.served += 1
            if any(len(of_choice) != params.max_tokens for of_choice in tokens):
                outcome.errors.add(f"{list(map(len, tokens))} tokens of {params.max_tokens}")

    def compare(which, tokens) -> None:
        outcome.tokens += len(tokens)
        for position, (token, gap) in enumerate(zip(tokens, expected[which].gaps, strict=False)):
            if token != expected[which].tokens[position]:
                if gap < oracle.NEAR_TIE:
                    outcome.ties += 1
                else:
                    outcome.wrong.append((which, position, gap))
                return

    left = requests
    with failing(rng, 0.02):
        while left or engine.has_work:
            # In bursts, so that now and then nothing but prompts is computed.
            if left and (not engine.has_work or rng.random() < 0.15):
                burst = min(left, rng.randint(1, 6))
                left -= burst
                for _ in range(burst):
                    add()
            engine.step()
            outcome.prefill_steps += any(s.tokens is None for s in engine._in_flight)
            outcome.copies += sum(len(s.schedule.copies) for s in engine._in_flight)
            engine.scheduler.check()
            if open_requests and rng.random() < 0.02:
                engine.abort(rng.choice(list(open_requests)))
    outcome.preemptions = engine.scheduler.num_preemptions
    outcome.found = engine.scheduler.prefix_cache.num_hit_tokens
    assert all(group.pool.num_used == 0 for group in engine.scheduler.groups), "blocks leaked"
    assert not open_requests
    engine.close()
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--families", nargs="+", default=["llama", "gemma3_text", "gpt_oss"])
    parser.add_argument("--cut", action="store_true", help="cut the fences")
    args = parser.parse_args()
    backend = choice.wanted()
    for family in args.families:
        for seed in range(args.seeds):
            begin = time.perf_counter()
            with cut_fences() if args.cut else ExitStack():
                outcome = run(make_model(family), backend, args.requests, seed)
            seconds = time.perf_counter() - begin
            outcome.wrong = [*outcome.wrong[:3], len(outcome.wrong)]
            print(f"{family} {backend.name} seed {seed}: {outcome} in {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
