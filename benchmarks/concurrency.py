"""Throughput and memory by how many sequences run at once: README's figure.

Why: what blocks are for is more sequences in the same memory. The same requests, of lengths like
ShareGPT's, are served with so many at once, by this engine and by mlx-lm's BatchGenerator in turns,
each number of sequences in a process of its own (`mlxpage bench throughput`).

    python benchmarks/concurrency.py [--at-once 1 2 4 8 16] [--json FILE] [--png FILE]
    python benchmarks/concurrency.py --of benchmarks/results/concurrency-smollm2.json --png FILE

Draws with matplotlib. K/V is what each held at most. The roofline is what there would be if every
step took as long as copying here takes for the bytes that it reads, weights and K and V of the mean
context, and prompts took no time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from about import about

from mlxpage import model_store
from mlxpage.bench.bandwidth import copy_speed, step_bytes
from mlxpage.metal import model as models

COLOURS = {"mlxpage": "#1f5fa8", "mlx-lm BatchGenerator": "#c2601f"}
PANELS = {
    "output_tokens_per_second": ("output tok/s", 1),
    "peak_kv_bytes": ("most K/V held, MB", 1e-6),
}


def measure(model: str, at_once: int, num_prompts: int, longest: int) -> dict:
    """Metrics of each arm, and tokens of the mean context."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "record.json")
        command = [
            *(sys.executable, "-m", "mlxpage", "bench", "throughput", model, "-r", "1"),
            *("--dataset", "text", "--chat-lengths", str(longest)),
            *("--num-prompts", str(num_prompts), "--max-num-seqs", str(at_once)),
            *("--rival", "batch-generator", "--json", str(file)),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        record = json.loads(file.read_text())
    work = record["workload"]
    context = (work["prompt_tokens"] + work["output_tokens"] / 2) / work["num_prompts"]
    arms = {row["case"]["arm"]: row["metrics"] | row.get("facts", {}) for row in record["rows"]}
    return {"arms": arms, "context": context}


def plot(record: dict, path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    rows = list(record["at_once"].values())
    numbers = [int(at_once) for at_once in record["at_once"]]
    for axes, (name, (label, scale)) in zip(
        figure.subplots(1, len(PANELS)), PANELS.items(), strict=True
    ):
        for arm, colour in COLOURS.items():
            heights = [row["arms"][arm][name] * scale for row in rows]
            axes.plot(numbers, heights, "o-", color=colour, label=arm)
        axes.set(xlabel="sequences at once", ylabel=label, xticks=numbers)
        axes.spines[["top", "right"]].set_visible(False)
    speed, memory = figure.axes
    speed.plot(numbers, [row["roofline"] for row in rows], "--", color="0.6", label="roofline")
    speed.set_yscale("log")
    speed.yaxis.set_major_formatter("{x:,.0f}")
    figure.legend(
        *speed.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False
    )
    memory.set_ylim(bottom=0)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--num-prompts", type=int, default=32)
    parser.add_argument("--longest", type=int, default=400, help="prompt, and as much output")
    parser.add_argument("--of", help="a record to draw, instead of measuring")
    parser.add_argument("--json", help="where the record goes")
    parser.add_argument("--png", help="where the figure goes; takes matplotlib")
    args = parser.parse_args()
    if args.of:
        record = json.loads(Path(args.of).read_text())
    else:
        sketch = models.load(model_store.resolve(args.model), weights=False)
        speed = copy_speed()
        record = about("concurrency.py") | {"model": args.model, "copy_bytes_per_s": speed}
        record["at_once"] = {}
        for number in args.at_once:
            row = measure(args.model, number, args.num_prompts, args.longest)
            row["roofline"] = number * speed / step_bytes(sketch, number, row["context"])
            record["at_once"][str(number)] = row
            for arm, metrics in row["arms"].items():
                rate, held = metrics["output_tokens_per_second"], metrics["peak_kv_bytes"]
                print(
                    f"{number:3} at once, {arm}: {rate:.1f} tok/s, {held / 1e6:.0f} MB", flush=True
                )
    if args.json:
        Path(args.json).write_text(json.dumps(record, indent=1) + "\n")
    if args.png:
        plot(record, args.png)


if __name__ == "__main__":
    main()
