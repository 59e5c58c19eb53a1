"""How a decode step grows with contexts, with sequences and with the pool: along straight lines.

Why: a list searched, a table copied or a pool moved in every step goes unnoticed in a short
benchmark, and ends a long conversation.

    python benchmarks/growth.py [--steps 60] [--json FILE] [--png FILE]

A tiny Llama with random weights, so that what grows is the engine's own: schedule, block tables,
attention over them. For each sweep, medians of steps in which nothing begins or ends; `line` is a
fit by least squares and how far the worst point lies off it, of the largest. A term that is
quadratic shows there.
"""

import argparse
import json
import statistics
import time

import numpy as np
from about import about
from decode import NoText

from mlxpage.engine import Engine
from mlxpage.metal import choice, memory
from mlxpage.metal.backend import mlx_lm_utils, mx
from mlxpage.metal.model import Model
from mlxpage.sampling_params import SamplingParams

SWEEPS = {
    "context": {"values": [1024, 2048, 4096, 8192, 16384, 32768], "unit": "tokens of each"},
    "sequences": {"values": [1, 32, 64, 96, 128, 192, 256], "unit": "at once"},
    "pool": {"values": [4096, 8192, 16384, 32768, 65536, 131072], "unit": "blocks"},
}
USUAL = {"context": 256, "sequences": 16, "pool": 8192}
# Prompts take the square of their length.
ALONE = {"context": {"sequences": 1}}


def make_model() -> Model:
    mlx_lm_utils()
    from mlx_lm.models import llama

    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "vocab_size": 256,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": True,
    }
    module = llama.Model(llama.ModelArgs.from_dict(config))
    mx.eval(module.parameters())
    return Model(module, config)


class Arm:
    """An engine in the middle of its decode steps."""

    def __init__(self, model, backend, context: int, sequences: int, pool: int):
        limits = {"max_num_seqs": sequences, "max_num_batched_tokens": max(2048, sequences)}
        plan = memory.plan(model, memory="90%", num_blocks=pool, **limits)
        self.engine = Engine(model, NoText(), plan, seed=0, backend=backend, **limits)
        rng = np.random.default_rng(0)
        params = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
        for _ in range(sequences):
            prompt = rng.integers(0, model.vocab_size, context).tolist()
            self.engine.add(self.engine.request(prompt, params, lambda event: None))
        while not self._decodes(sequences):
            self.engine.step()

    def _decodes(self, sequences: int) -> bool:
        running = self.engine.scheduler.running
        return len(running) == sequences and all(seq.num_output_tokens > 2 for seq in running)

    def times(self, steps: int) -> list[float]:
        spent = []
        for _ in range(steps):
            start = time.perf_counter()
            self.engine.step()
            spent.append((time.perf_counter() - start) * 1e3)
        return spent


def sweep(model, backend, name: str, steps: int) -> dict:
    row = {"unit": SWEEPS[name]["unit"], "values": SWEEPS[name]["values"], "step ms": []}
    for value in row["values"]:
        size = USUAL | ALONE.get(name, {}) | {name: value}
        size["pool"] = max(size["pool"], size["sequences"] * (size["context"] // 16 + 130))
        arm = Arm(model, backend, **size)
        arm.times(5)
        row["step ms"].append(round(statistics.median(arm.times(steps)), 3))
        arm.engine.close()
        mx.clear_cache()
        print(f"{name:10} {value:7,} {row['unit']:15} {row['step ms'][-1]:8.3f} ms", flush=True)
    row["line"] = line(row["values"], row["step ms"])
    print(f"{name:10} {row['line']}", flush=True)
    return row


def line(x: list[int], y: list[float]) -> dict:
    slope, start = np.polyfit(x, y, 1)
    off = np.abs(np.polyval([slope, start], x) - y).max() / max(y)
    return {
        "ms at 0": round(float(start), 3),
        "us for each": round(float(slope) * 1e3, 4),
        "worst off": round(float(off), 3),
    }


def plot(record: dict, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for axes, (name, row) in zip(figure.subplots(1, 3), record["sweeps"].items(), strict=True):
        fit = row["line"]
        ends = np.array([0, row["values"][-1]])
        axes.plot(ends, fit["ms at 0"] + ends * fit["us for each"] / 1e3, color="0.75")
        axes.plot(row["values"], row["step ms"], "o", color="#1f5fa8")
        axes.set(xlabel=f"{name} ({row['unit']})", ylabel="ms of a step")
        axes.set_ylim(0, 1.1 * max(row["step ms"]))
        axes.locator_params(axis="x", nbins=4)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--json", help="where the record goes")
    parser.add_argument("--png", help="where a plot goes; takes matplotlib")
    args = parser.parse_args()
    model = make_model()
    backend = choice.checked(model, 16, None, print)
    record = about("growth.py") | {"usual": USUAL}
    record["sweeps"] = {name: sweep(model, backend, name, args.steps) for name in args.sweeps}
    if args.json:
        with open(args.json, "w") as file:
            file.write(json.dumps(record, indent=1) + "\n")
    if args.png:
        plot(record, args.png)


if __name__ == "__main__":
    main()
