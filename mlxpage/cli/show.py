"""`mlxpage show`: how a model would be served, and how it would fit."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

import click

from mlxpage.cli import options
from mlxpage.cli.output import table
from mlxpage.cli.settings import setting
from mlxpage.sizes import gigabytes

if TYPE_CHECKING:
    from mlxpage.fitting import Fit


_ARITHMETIC = """\
Arithmetic of the plan that loading makes, for up to 32 sequences; not measured on a Mac. A budget
is half of what the GPU may use, or --memory."""


@click.command()
@options.model_argument
@click.option("--fit", "with_fit", is_flag=True, help="How many sequences Macs would hold.")
@options.memory
@options.block_size
@setting("--max-num-seqs", type=int, default=32, show_default=True, help="At once.")
@options.kv_bits
@options.dtype
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(model, with_fit, as_json, max_num_seqs, **planned):
    """How MODEL would be served here, and how it would fit into memory.

    It has to be on this machine, but no weights are loaded. --fit tells of Macs too: how many
    sequences of some lengths they would hold at once. That is arithmetic of the plan that loading
    makes, not measured on any of them.
    """
    from mlxpage import describe, fitting

    facts = describe.model(model, max_num_seqs=max_num_seqs, **planned)
    fits = list(fitting.fits(model, **planned)) if with_fit else []
    if as_json:
        record = {"schema": "mlxpage.show/1", **facts}
        click.echo(json.dumps(record | ({"fit": [_record(fit) for fit in fits]} if fits else {})))
        return
    click.echo(table([[name, str(value)] for name, value in facts.items()]))
    for kv_bits, group in groupby(fits, lambda fit: fit.kv_bits):
        kept = "as they are" if kv_bits is None else f"in {kv_bits} bits"
        click.echo(f"\nsequences at once, with K and V {kept}\n{_fit_table(group)}")
    if fits:
        click.echo(f"\n{_ARITHMETIC}")


def _fit_table(fits: Iterable[Fit]) -> str:
    rows = []
    for (machine, budget), group in groupby(fits, lambda fit: (fit.machine, fit.budget)):
        of_machine = list(group)
        if not rows:
            lengths = [f"{fit.context:,} tokens" for fit in of_machine]
            rows.append(["MACHINE", "BUDGET", *lengths])
        rows.append([machine, gigabytes(budget), *map(_cell, of_machine)])
    return table(rows)


def _cell(fit: Fit) -> str:
    return str(fit.most) if fit.most else f"needs {gigabytes(fit.needs)}"


def _record(fit: Fit) -> dict:
    at_once = [{"max_num_seqs": n, "sequences": sequences} for n, sequences in fit.at_once]
    return asdict(fit) | {"at_once": at_once}
