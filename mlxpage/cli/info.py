"""`mlxpage info`: the machine, and how a model would be served."""

from __future__ import annotations

import json

import click

from mlxpage.cli import options
from mlxpage.cli.output import say


@click.command()
@click.argument("model", required=False)
@click.option("--memory", help="Budget for weights, pool and scratch: 4GB or 50%.")
@click.option("--block-size", type=int, default=16, show_default=True, help="16 or 32 tokens.")
@click.option("--max-num-seqs", type=int, default=32, show_default=True, help="At once.")
@options.kv_bits
@click.option("--dtype", help="float32, float16 or bfloat16.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(model, memory, block_size, max_num_seqs, kv_bits, dtype, as_json):
    """What this machine is, how MODEL would be served, and how it would fit into memory.

    No weights are loaded.
    """
    from mlxpage import describe

    facts = describe.machine()
    if model is not None:
        facts |= describe.model(
            model,
            memory=memory,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            kv_bits=kv_bits,
            dtype=dtype,
            on_status=lambda line: say(line, dim=True),
        )
    if as_json:
        click.echo(json.dumps({"schema": "mlxpage.info/1", **facts}))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            click.echo(f"{name:{width}}  {value}")
