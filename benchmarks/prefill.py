"""Prompts computed on a GPU: tokens per second of the whole engine, against mlx-lm's own caches.

    python benchmarks/prefill.py [--shapes 1x4096 8x1024] [--chunk 2048] [--repeats 7] [--profile]
        [--arms ours batch-generator side-by-side]

A shape is prompts x tokens. The model has the shape of Llama 3 8B and random weights in bfloat16.
Arms, in one process and in turns, from the request to the first token of each prompt: this engine
through `Engine.step`, with at most `--chunk` tokens of all prompts in a step; mlx-lm's
`BatchGenerator`, which takes eight prompts at a time unless told otherwise, and up to `--chunk`
tokens of each in a forward; and mlx-lm's caches, with such parts of all prompts side by side in one
forward. A turn is a run that isn't timed, after which an arm finds the caches of MLX's allocator as
it left them, and one that is. Peaks are of what is allocated beside what was there before: caches
that an arm makes anew are in them. `--profile` adds what the GPU does in a run (with torch, on
CUDA). The last line is JSON.
"""

import argparse
import json
import statistics
import time

import numpy as np
from decode import NoText, gpu_profile, make_model

from mlxpage.engine import Engine
from mlxpage.metal import choice, memory
from mlxpage.metal.backend import device, mx
from mlxpage.sampling_params import SamplingParams


class Arm:
    def run(self) -> None:
        """All prompts, to the first token of each."""

    def settle(self) -> None:
        """Waits for what `run` began and nobody asked for."""

    def close(self) -> None: ...


class Ours(Arm):
    def __init__(self, model, prompts, chunk, backend):
        limits = {"max_num_seqs": len(prompts), "max_num_batched_tokens": chunk}
        blocks = len(prompts) * (len(prompts[0]) // 16 + 2)
        plan = memory.plan(model, memory="95%", num_blocks=blocks, **limits)
        options = {"seed": 0, "backend": backend, "prefix_cache": False}
        self.engine = Engine(model, NoText(), plan, **options, **limits)
        self.prompts = prompts

    def run(self) -> None:
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        for prompt in self.prompts:
            self.engine.add(self.engine.request(prompt, params, lambda event: None))
        while self.engine.has_work:
            self.engine.step()

    def close(self) -> None:
        self.engine.close()


class Generator(Arm):
    """mlx-lm's `BatchGenerator`."""

    def __init__(self, model, prompts, chunk, backend):
        from mlx_lm.generate import BatchGenerator

        self.generator = BatchGenerator(model.module, max_tokens=1, prefill_step_size=chunk)
        self.prompts = prompts

    def run(self) -> None:
        unfinished = set(self.generator.insert(self.prompts))
        while unfinished:
            unfinished -= {r.uid for r in self.generator.next_generated() if r.finish_reason}

    def settle(self) -> None:
        """It has begun with each prompt's second token."""
        mx.synchronize(self.generator.stream)

    def close(self) -> None:
        self.generator.close()


class SideBySide(Arm):
    """mlx-lm's caches, all prompts of which are computed together."""

    def __init__(self, model, prompts, chunk, backend):
        self.model, self.prompts = model, mx.array(prompts)
        self.chunk = chunk

    def run(self) -> None:
        from mlx_lm.models.cache import BatchKVCache, KVCache

        batch, length = self.prompts.shape
        caches = [BatchKVCache([0] * batch) if batch > 1 else KVCache() for _ in self.model.specs]
        for start in range(0, length - 1, self.chunk):
            tokens = self.prompts[:, start : min(start + self.chunk, length - 1)]
            self.model.module(tokens, cache=caches)
            mx.eval([cache.state for cache in caches])
        mx.argmax(self.model.module(self.prompts[:, -1:], cache=caches)[:, -1], axis=-1).tolist()


ARMS = {"ours": Ours, "batch-generator": Generator, "side-by-side": SideBySide}


def measure(arms: dict[str, Arm], repeats: int, tokens: int) -> dict:
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    peaks = dict.fromkeys(arms, 0)
    for repeat in range(repeats + 1):
        for name, arm in arms.items():
            arm.run()
            arm.settle()
            mx.synchronize()
            before = mx.get_active_memory()
            mx.reset_peak_memory()
            start = time.perf_counter()
            arm.run()
            end = time.perf_counter()  # each has read its tokens
            arm.settle()
            mx.synchronize()
            if repeat:  # kernels and graphs are made
                seconds[name].append(end - start)
                peaks[name] = max(peaks[name], mx.get_peak_memory() - before)
    return {
        name: {
            "tok/s": round(tokens / statistics.median(spent)),
            "ms": round(statistics.median(spent) * 1e3, 1),
            "least and most ms": [round(min(spent) * 1e3, 1), round(max(spent) * 1e3, 1)],
            "peak over start MB": round(peaks[name] / 1e6),
        }
        for name, spent in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["1x1024", "1x4096", "8x1024"])
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    model = make_model(args.layers)
    backend = choice.checked(model, 16, None, print)
    record = {"device": device().name, "mlx": mx.__version__, "backend": backend.why}
    record |= {"chunk": args.chunk, "layers": args.layers, "shapes": {}}
    rng = np.random.default_rng(0)
    for shape in args.shapes:
        batch, length = map(int, shape.split("x"))
        prompts = rng.integers(0, model.vocab_size, (batch, length)).tolist()
        arms = {name: ARMS[name](model, prompts, args.chunk, backend) for name in args.arms}
        record["shapes"][shape] = measure(arms, args.repeats, batch * length)
        for name, row in record["shapes"][shape].items():
            print(f"{shape:>8} {name:15} {row}", flush=True)
        if args.profile:
            for name, arm in arms.items():
                record["shapes"][shape][name]["gpu"] = gpu_profile(arm.run)
        for arm in arms.values():
            arm.close()
        mx.clear_cache()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
