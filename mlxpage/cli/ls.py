"""`mlxpage ls`: the models on this machine."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict

import click

from mlxpage.cli import aliases
from mlxpage.cli.output import say, table
from mlxpage.errors import MlxpageError
from mlxpage.sizes import gigabytes


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(as_json):
    """The models on this machine.

    Demo models, those of the hub's cache that are whole, and what aliases stand for, by the names
    that other commands take.
    """
    from mlxpage import model_store

    models = model_store.models()
    known = aliases.read()
    if as_json:
        told = [asdict(model) | {"folder": str(model.folder)} for model in models]
        click.echo(json.dumps({"schema": "mlxpage.ls/1", "models": told, "aliases": known}))
        return
    if not models and not known:
        say("no models yet; `mlxpage pull smollm2-135m` fetches a small one", dim=True)
        return
    rows = [_row(model.name, model) for model in models]
    found = {model.name: model for model in models}
    for name in sorted(known):
        target = known[name]
        rows.append(_row(name, found.get(target) or _elsewhere(target), f"alias of {target}"))
    header = ["NAME", "SIZE", "FAMILY", "QUANTISATION", "LAST USED", ""]
    click.echo(table([header, *rows]))


def _row(name: str, model, note: str = "") -> list[str]:
    if model is None:
        return [name, "-", "-", "-", "-", f"{note}, which isn't here"]
    size, last_used = gigabytes(model.size), _ago(model.last_used)
    return [name, size, model.family, model.quantisation, last_used, note]


def _elsewhere(model: str):
    """A model that an alias stands for and the list hasn't by that name, such as a folder."""
    from mlxpage import model_store

    with suppress(MlxpageError, OSError):
        if folder := model_store.find(model):
            return model_store.Found.of(model, folder)
    return None


def _ago(seconds: float) -> str:
    days = int(max(0.0, time.time() - seconds) // 86_400)
    return "today" if days == 0 else f"{days:,} day{'' if days == 1 else 's'} ago"
