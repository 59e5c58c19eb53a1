"""Decode steps of the whole engine on a GPU, against mlx-lm's own, and where their time goes.

Why: a decode step of a large model reads its weights once, so it should take as long as that. What
it takes longer is the host's: building the graph, dispatching it, scheduling and sampling.

    python benchmarks/decode.py [--batches 1 8 32 64] [--context 1000] [--steps 160] [--profile]
        [--kv-bits 8]

The model has the shape of Llama 3 8B and random weights in bfloat16. Arms, in one process: this
engine through `Engine.step`; mlx-lm's own caches, as its generation loop drives them; and the same
model with attention removed, which is what MLX and mlx-lm alone cost: K and V are computed, and go
nowhere. Contexts grow during the timed steps, from half their number below the given one to half
above it. Steps that take far longer than the median come in bursts, in all arms: MLX instantiates
another CUDA graph. `--profile` adds what the GPU does in a step (with torch, on CUDA). The roofline
is the time that copying takes here for the bytes that a step must read: every weight but the
embedding's, and each sequence's K and V. The last line is JSON.
"""

import argparse
import contextlib
import json
import statistics
import time

import numpy as np

from mlxpage.bench import bandwidth
from mlxpage.engine import Engine
from mlxpage.metal import choice, memory
from mlxpage.metal.backend import device, mlx_lm_utils, mx
from mlxpage.metal.model import Model
from mlxpage.sampling_params import SamplingParams

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 16384,
}


WARM_UP = 40


class NoText:
    """A tokenizer for token ids alone."""

    eos_token_ids = frozenset()

    def stream(self, stop, skip_special_tokens):
        return self

    stopped = False

    def add(self, token):
        return ""

    def finish(self):
        return ""


def make_model(layers: int) -> Model:
    mlx_lm_utils()
    from mlx_lm.models import llama

    config = LLAMA_8B | {"num_hidden_layers": layers}
    module = llama.Model(llama.ModelArgs.from_dict(config))
    module.set_dtype(mx.bfloat16)
    mx.eval(module.parameters())
    return Model(module, config)


def ours(model, batch, context, steps, backend, profiled=False) -> dict:
    first = context - steps // 2
    prompt_length = max(1, first - batch // 2 - WARM_UP)
    limits = {"max_num_seqs": batch, "max_num_batched_tokens": max(2048, batch)}
    # More than any sequence comes to: the first one goes on while the others' prompts are computed.
    prompt_steps = batch * prompt_length // (limits["max_num_batched_tokens"] - batch)
    new = 2 * (first - prompt_length) + prompt_steps + steps + 20
    blocks = batch * (-(-(prompt_length + new) // 16))
    plan = memory.plan(model, memory="95%", num_blocks=blocks, **limits)
    engine = Engine(model, NoText(), plan, seed=0, backend=backend, **limits)
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    for _ in range(batch):
        prompt = rng.integers(0, model.vocab_size, prompt_length).tolist()
        engine.add(engine.request(prompt, params, lambda event: None))
    # While the last prompts are computed the first sequences go on, so count the positions.
    while _mean_length(engine, batch) < first:
        engine.step()
    parts = _Parts(engine, model)
    mx.synchronize()
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    with parts:
        times = _timed(engine.step, steps)
    peak = mx.get_peak_memory() - base
    assert len(engine.scheduler.running) == batch, "some have ended"
    row = _row(times, batch) | {"host ms": parts.medians(), "peak over start MB": _mb(peak)}
    if profiled:
        row["gpu"] = gpu_profile(engine.step)
    engine.close()
    mx.clear_cache()
    return row


def _mean_length(engine, batch) -> float:
    running = engine.scheduler.running
    if len(running) < batch:
        return 0.0
    return statistics.mean(seq.num_computed_tokens for seq in running)


class _Parts:
    """Times of what a step does on the host; of what calls another, all is the caller's."""

    def __init__(self, engine, model):
        from mlxpage.batch import Batch

        self.seconds: dict[str, list[float]] = {}
        self._is_timing = False
        self._patched = [
            (engine.scheduler, "schedule", "schedule"),
            (Batch, "of", "batch"),
            (type(model), "__call__", "build"),
            (mx, "async_eval", "dispatch"),
            (engine, "_collect", "collect"),
        ]

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        for owner, name, label in self._patched:
            original = getattr(owner, name)
            setattr(owner, name, self._timing(original, label))
            self._stack.callback(setattr, owner, name, original)
        return self

    def __exit__(self, *_):
        self._stack.close()

    def _timing(self, function, label):
        spent = self.seconds.setdefault(label, [])

        def timed(*args, **kwargs):
            if self._is_timing:
                return function(*args, **kwargs)
            self._is_timing = True
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent.append(time.perf_counter() - start)
                self._is_timing = False

        return timed

    def medians(self) -> dict:
        return {k: round(statistics.median(v) * 1e3, 3) for k, v in self.seconds.items() if v}


def mlx_lm(model, batch, context, steps, profiled=False) -> dict:
    """Its caches, filled at random, and the loop of its `generate_step`."""
    from mlx_lm.models.cache import BatchKVCache, KVCache

    caches = []
    for spec in model.specs:
        cache = BatchKVCache([0] * batch) if batch > 1 else KVCache()
        shape = (batch, spec.kv_heads, context - steps // 2 - WARM_UP, spec.k_head_dim)
        cache.update_and_fetch(*(mx.random.normal(shape).astype(mx.bfloat16) for _ in range(2)))
        mx.eval(cache.keys, cache.values)
        caches.append(cache)
    step = _loop(lambda y: model.module(y, cache=caches), batch)
    _timed(step, WARM_UP)
    mx.synchronize()
    mx.reset_peak_memory()
    base = mx.get_active_memory()
    times = _timed(step, steps)
    row = _row(times, batch) | {"peak over start MB": _mb(mx.get_peak_memory() - base)}
    return row | ({"gpu": gpu_profile(step)} if profiled else {})


def without_attention(model, batch, context, steps, profiled=False) -> dict:
    """Each layer's attention gives its queries back; no cache is kept."""
    computed = []

    class Nothing:
        offset = mx.full((batch,), context, mx.int32)

        def make_mask(self, *_, **__):
            return None

        def update_and_fetch(self, k, v):
            computed.extend((k, v))
            return k, v

    def forward(y):
        computed.clear()
        return model.module(y, cache=[Nothing()] * len(model.specs))

    original = mx.fast.scaled_dot_product_attention
    mx.fast.scaled_dot_product_attention = lambda q, k, v, **_: q
    try:
        step = _loop(forward, batch, computed)
        _timed(step, WARM_UP)
        row = _row(_timed(step, steps), batch)
        return row | ({"gpu": gpu_profile(step)} if profiled else {})
    finally:
        mx.fast.scaled_dot_product_attention = original


def _loop(forward, batch, computed=()):
    y = mx.zeros((batch, 1), mx.int32)
    previous = None

    def step():
        nonlocal y, previous
        y = mx.argmax(forward(y)[:, -1], axis=-1)[:, None]
        mx.async_eval(y, *computed)
        if previous is not None:
            previous.tolist()
        previous = y

    return step


def _timed(step, count) -> list[float]:
    times = []
    last = time.perf_counter()
    for _ in range(count):
        step()
        now = time.perf_counter()
        times.append(now - last)
        last = now
    return times


def _row(times, batch) -> dict:
    p10, *_, p90 = statistics.quantiles(times, n=10)
    mean, median = statistics.mean(times), statistics.median(times)
    return {
        "step ms": round(median * 1e3, 3),
        "p10 to p90": [round(p10 * 1e3, 3), round(p90 * 1e3, 3)],
        "mean ms": round(mean * 1e3, 3),
        "tok/s": round(batch / median, 1),
        "tok/s by mean": round(batch / mean, 1),
    }


def _mb(nbytes) -> int:
    return round(nbytes / 1e6)


def gpu_profile(step, count=10) -> dict:
    """What the GPU does in a step: milliseconds at work, and of the kernels that take most."""
    from torch.profiler import ProfilerActivity, profile

    step()
    mx.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        _timed(step, count)
        mx.synchronize()
    spent: dict[str, list[float]] = {}
    busy, until = 0.0, 0.0
    events = [event for event in profiler.events() if "CUDA" in str(event.device_type)]
    for event in sorted(events, key=lambda event: event.time_range.start):
        begin, end = event.time_range.start, event.time_range.end
        spent.setdefault(event.name[:60], []).append(end - begin)
        busy += max(0.0, end - max(begin, until))
        until = max(end, until)
    most = sorted(spent, key=lambda name: -sum(spent[name]))[:10]
    return {
        "busy ms": round(busy / count / 1e3, 3),
        "launches": sum(map(len, spent.values())) / count,
        "kernels ms": {name: round(sum(spent[name]) / count / 1e3, 3) for name in most},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--kv-bits", type=int, choices=(8, 4), help="of this engine's pool")
    args = parser.parse_args()
    model = make_model(args.layers)
    model.quantise_cache(args.kv_bits, args.kv_bits)
    backend = choice.checked(model, 16, None, print)
    record = {"device": device().name, "mlx": mx.__version__, "backend": backend.why}
    record |= {"context": args.context, "layers": args.layers, "kv_bits": args.kv_bits}
    copy = bandwidth.copy_speed()
    record |= {"copy GB/s": round(copy / 1e9, 1), "batches": {}}
    print(
        f"{device().name}, MLX {mx.__version__}, {model.nbytes / 1e9:.1f} GB of weights, "
        f"copy {copy / 1e9:.0f} GB/s"
    )
    for batch in args.batches:
        shape = batch, args.context, args.steps
        arms = {
            "ours": ours(model, *shape, backend, args.profile),
            "mlx-lm": mlx_lm(model, *shape, args.profile),
            "no attention": without_attention(model, *shape, args.profile),
        }
        for name, row in arms.items():
            context = 0 if name == "no attention" else args.context
            floor = bandwidth.step_bytes(model, batch, context) / copy
            row["of roofline"] = round(floor * 1e3 / row["step ms"], 3)
        for name in ("mlx-lm", "no attention"):
            arms["ours"][f"over {name}"] = round(arms[name]["step ms"] / arms["ours"]["step ms"], 3)
        record["batches"][batch] = arms
        for name, row in arms.items():
            print(f"batch {batch:3} {name:13} {row}", flush=True)
        mx.clear_cache()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
