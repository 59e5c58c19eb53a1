"""The tables for a terminal, and docs/paper.md."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from benchmarks.paper.paged import BLOCK
from benchmarks.paper.serving import SLOTS
from benchmarks.paper.tables import Table, tables

LEFT_OUT = {
    "22 times FasterTransformer, and requests per second as such": (
        "They are of the software of 2023 on an A100. The cost model above has one speed for all."
    ),
    "Swapping against computing again (figure 19)": (
        "Swapping is over PCIe there. On Apple silicon the memory is one; blocks go to a disk "
        "instead, which benchmarks/block_store.py measures."
    ),
    "Chatbot (figure 17)": (
        "Twice the rate of all three Orcas, which all reserve 1,024 tokens of output there. Not "
        "run: conversations come back here with their blocks still cached, which is another "
        "experiment (benchmarks/shared_prefix.py)."
    ),
    "OPT-66B and OPT-175B": (
        "Other numbers of slots on several GPUs; nothing here would differ but the constants."
    ),
}

_HEAD = """\
# The PagedAttention paper's tables, on this engine

The paper (Kwon et al., SOSP 2023, arXiv 2309.06180) tells what blocks are worth. Here are its
tables again, by one command, in a few minutes of any CPU:

    python -m benchmarks.paper                                   # the tables
    python -m benchmarks.paper --json benchmarks/results/paper.json
    python -m benchmarks.paper --document > docs/paper.md        # this page, of that file

- **mlxpage** is this engine: its scheduler, block manager, pool and prefix cache as they are, over
  {blocks} blocks of {size} tokens, the null block among them. Requests have the lengths below;
  tokens are made up, and the scheduler learns of an output's end by a stop token, as from a model.
- **mlxpage, no room kept** is the same with one rule off: it admits what fits now, as the paper's
  system does. Ours keeps a block of growth for each running sequence, more after preemptions. So
  part of the pool is free, and most preemptions don't happen.
- **Orca** is simulated as the paper describes it: each request has one chunk of a buddy allocator
  over the same {slots:,} slots (12 GiB of OPT-13B), for 2,048 tokens (*Max*), for its prompt and
  its output rounded up to a power of two (*Pow2*), or for what it will need exactly (*Oracle*).
- **Time** is that of a cost model of OPT-13B on an A100, the same for all: a step takes 2 ms, then
  as long as reading 26 GB of weights or multiplying its rows with them, then as long as reading its
  K and V (75 % of 1.555 TB/s, 45 % of 312 TFLOP/s). Nothing was fitted to the paper. No speed here
  is measured but that of the kernels.

In brackets are the paper's numbers. What is more than 10 % away from them has a letter, and the
reason stands below its table.
"""


def document(record: dict) -> str:
    """docs/paper.md."""
    keys = ("chip", "cores", "os", "architecture", "python", "mlxpage")
    versions = ", ".join(f"{key} {record[key]}" for key in keys)
    made = (
        f"Made by `{record['command']}` ({versions}) in {record['cpu_seconds']:.0f} s of CPU time."
    )
    head = _HEAD.format(blocks=SLOTS // BLOCK, size=BLOCK, slots=SLOTS)
    parts = [head, made, ""]
    for table in tables(record):
        parts += [f"## {table.title}", ""]
        parts += [table.about, ""] if table.about else []
        parts += [*_markdown(table), ""]
        parts += [line for note in table.notes() for line in (note, "")]
    parts += ["## What is left out", ""]
    parts += [f"- **{what}.** {why}" for what, why in LEFT_OUT.items()]
    return "\n".join(parts) + "\n"


def _markdown(table: Table) -> list[str]:
    lines = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.cells()]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def show(record: dict, console: Console) -> None:
    """The tables for people."""
    console.print("In brackets the paper's numbers; a letter: more than 10 % away, see below.")
    for table in tables(record):
        drawn = RichTable(title=table.title, title_justify="left", box=box.SIMPLE)
        for number, column in enumerate(table.columns):
            drawn.add_column(column, justify="right" if number else "left", overflow="fold")
        for cells in table.cells():
            drawn.add_row(*cells)
        console.print()
        console.print(drawn)
        for line in filter(None, (table.about, *table.notes())):
            console.print(line, highlight=False)
    console.print("\nLeft out:")
    for what, why in LEFT_OUT.items():
        console.print(f"- {what}: {why}", highlight=False)
