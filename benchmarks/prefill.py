"""Prompts computed on a GPU: tokens per second of the whole engine, against mlx-lm's own caches.

    python benchmarks/prefill.py [--shapes 1x4096 8x1024] [--chunk 2048] [--repeats 7]

A shape is prompts x tokens. The model has the shape of Llama 3 8B and random weights in bfloat16.
Arms, in one process and in turns: this engine through `Engine.step`, from the request to the first
token of each prompt; mlx-lm's caches, in chunks of as many tokens of each prompt, all side by side,
as its `BatchGenerator` computes prompts of one length. The last line is JSON.
"""

import argparse
import json
import statistics
import time

import numpy as np
from decode import NoText, make_model

from mlxpage.engine import Engine
from mlxpage.metal import choice, memory
from mlxpage.metal.backend import device, mx
from mlxpage.sampling_params import SamplingParams


class Ours:
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


class MlxLm:
    def __init__(self, model, prompts, chunk):
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

    def close(self) -> None:
        pass


def measure(arms: dict, repeats: int, tokens: int) -> dict:
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 2):
        for name, arm in arms.items():
            mx.synchronize()
            start = time.perf_counter()
            arm.run()
            mx.synchronize()
            if repeat >= 2:  # kernels and graphs are made
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "tok/s": round(tokens / statistics.median(spent)),
            "ms": round(statistics.median(spent) * 1e3, 1),
            "least and most ms": [round(min(spent) * 1e3, 1), round(max(spent) * 1e3, 1)],
        }
        for name, spent in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["1x1024", "1x4096", "8x1024"])
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", type=int, default=32)
    args = parser.parse_args()
    model = make_model(args.layers)
    backend = choice.checked(model, 16, None, print)
    record = {"device": device().name, "mlx": mx.__version__, "backend": backend.why}
    record |= {"chunk": args.chunk, "layers": args.layers, "shapes": {}}
    rng = np.random.default_rng(0)
    for shape in args.shapes:
        batch, length = map(int, shape.split("x"))
        prompts = rng.integers(0, model.vocab_size, (batch, length)).tolist()
        arms = {
            "ours": Ours(model, prompts, args.chunk, backend),
            "mlx-lm": MlxLm(model, prompts, args.chunk),
        }
        record["shapes"][shape] = measure(arms, args.repeats, batch * length)
        for name, row in record["shapes"][shape].items():
            print(f"{shape:>8} {name:8} {row}", flush=True)
        arms["ours"].close()
        mx.clear_cache()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
