"""Output tokens per second and peak memory, against mlx-lm's own batching.

Why: continuous batching over blocks has to pay on the same device, model and prompts. Both engines
run in this process, in turns, on the same weights; `BatchGenerator` is mlx-lm's continuous
batching, with contiguous caches padded to the longest sequence.

    python benchmarks/throughput.py [MODEL] [--requests 32] [--concurrency 16] [--repeats 3]

Prompts are pieces of real text with lengths like ShareGPT's (log-normal, cut at --longest), output
lengths likewise. K/V is what the sequences really hold: the blocks in use, or mlx-lm's caches.
The last line is JSON.
"""

import argparse
import json
import statistics
import time
from pydoc_data.topics import topics

import numpy as np

from mlxpage import model_store
from mlxpage.engine import Engine
from mlxpage.metal.backend import BLAS, device, mx
from mlxpage.metal.memory import plan
from mlxpage.metal.model import load
from mlxpage.sampling_params import SamplingParams
from mlxpage.text import Tokenizer


def workload(tokenizer, requests: int, longest: int, seed: int):
    """[(prompt token ids, output tokens)], log-normal around ShareGPT's means."""
    rng = np.random.default_rng(seed)
    ids = tokenizer.encode("\n".join(topics[name] for name in sorted(topics)))
    lengths = np.clip(rng.lognormal(4.6, 1.0, (requests, 2)), 4, longest).astype(int)
    starts = rng.integers(0, len(ids) - longest, requests)
    return [(ids[s : s + p], int(n)) for s, (p, n) in zip(starts, lengths.tolist(), strict=True)]


def run_ours(model, tokenizer, work, args) -> dict:
    sizing = plan(
        model,
        num_blocks=args.num_blocks,
        max_num_seqs=args.concurrency,
        max_num_batched_tokens=args.chunk,
    )
    engine = Engine(
        model,
        tokenizer,
        sizing,
        max_num_seqs=args.concurrency,
        max_num_batched_tokens=args.chunk,
    )
    held = 0
    mx.reset_peak_memory()
    started = time.perf_counter()
    outputs = []
    for prompt, count in work:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        engine.add(engine.request(prompt, params, lambda event: outputs.append(event.output)))
    while engine.has_work:
        engine.step()
        held = max(held, engine.scheduler.groups[0].pool.num_used)
    seconds = time.perf_counter() - started
    tokens = sum(len(output.token_ids) for output in outputs if output)
    block_bytes = sizing.pool / (sizing.num_blocks[0] + 1)
    result = {
        "seconds": seconds,
        "output_tokens": tokens,
        "tok_s": tokens / seconds,
        "peak_kv_bytes": int(held * block_bytes),
        "peak_bytes": mx.get_peak_memory() - sizing.pool + int(held * block_bytes),
    }
    model.cache = None
    mx.clear_cache()
    return result


def run_mlx_lm(model, tokenizer, work, args) -> dict:
    from mlx_lm.generate import BatchGenerator

    mx.reset_peak_memory()
    started = time.perf_counter()
    generator = BatchGenerator(
        model.module,
        completion_batch_size=args.concurrency,
        prefill_batch_size=8,
        prefill_step_size=args.chunk,
    )
    generator.insert([prompt for prompt, _ in work], [count for _, count in work])
    tokens, held = 0, 0
    while responses := generator.next_generated():
        tokens += len(responses)
        held = max(held, generator.prompt_cache_nbytes)
    seconds = time.perf_counter() - started
    result = {
        "seconds": seconds,
        "output_tokens": tokens,
        "tok_s": tokens / seconds,
        "peak_kv_bytes": int(held),
        "peak_bytes": mx.get_peak_memory(),
    }
    del generator
    mx.clear_cache()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--longest", type=int, default=768)
    parser.add_argument("--chunk", type=int, default=512)
    parser.add_argument("--num-blocks", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()

    folder = model_store.resolve(args.model)
    model = load(folder, dtype=args.dtype)
    tokenizer = Tokenizer(folder, model.config.get("eos_token_id"))
    work = workload(tokenizer, args.requests, args.longest, seed=0)
    arms = {"mlxpage": run_ours, "mlx_lm": run_mlx_lm}
    results = {name: [] for name in arms}
    for arm in arms.values():  # warm-up
        arm(model, tokenizer, [(p[:32], 8) for p, _ in work[:4]], args)
    for _ in range(args.repeats):
        for name, arm in arms.items():
            results[name].append(arm(model, tokenizer, work, args))
            print(f"{name:8s} {results[name][-1]}", flush=True)

    median = {n: statistics.median(r["tok_s"] for r in runs) for n, runs in results.items()}
    memory = {n: max(r["peak_kv_bytes"] for r in runs) for n, runs in results.items()}
    print(f"output tok/s: {median}, ratio {median['mlxpage'] / median['mlx_lm']:.2f}")
    print(f"K/V held: {memory}, ratio {memory['mlxpage'] / memory['mlx_lm']:.2f}")
    print(
        json.dumps(
            {
                "settings": vars(args),
                "device": device().name,
                "blas": BLAS,
                "prompt_tokens": sum(len(p) for p, _ in work),
                "ratio": median["mlxpage"] / median["mlx_lm"],
                "runs": results,
            }
        )
    )


if __name__ == "__main__":
    main()
