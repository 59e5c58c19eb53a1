"""`mlxpage info`: the machine."""

from __future__ import annotations

import json

import click

from mlxpage.cli.output import table


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(as_json):
    """What this machine is, and what computes attention here.

    Of a model, `mlxpage show MODEL` tells.
    """
    from mlxpage import describe

    facts = describe.machine()
    if as_json:
        click.echo(json.dumps({"schema": "mlxpage.info/1", **facts}))
    else:
        click.echo(table([[name, str(value)] for name, value in facts.items()]))
