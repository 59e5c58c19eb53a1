"""`mlxpage rm`: models off this machine."""

from __future__ import annotations

import difflib
import sys

import click

from mlxpage.cli.options import model_argument
from mlxpage.cli.output import say
from mlxpage.errors import InvalidRequest, ModelNotFound
from mlxpage.sizes import gigabytes


@click.command()
@model_argument
@click.option("-y", "--yes", is_flag=True, help="Don't ask.")
def command(model, yes):
    """Remove MODEL, a demo model or one of the hub, from this machine.

    All of it goes: other revisions, and what a download has begun. A folder of your own is never
    removed.
    """
    from mlxpage import model_store

    if folder := model_store.local_folder(model):
        raise InvalidRequest(
            f"{folder} is a folder of yours, and mlxpage removes only what it has fetched. Remove "
            "it yourself, or give the name of a model (`mlxpage ls`)"
        )
    removals = model_store.removals(model)
    if not removals:
        near = difflib.get_close_matches(model, model_store.names(), n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}?" if near else "`mlxpage ls` lists what is."
        raise ModelNotFound(f"{model} is not on this machine. {hint}")
    size = gigabytes(sum(removal.size for removal in removals))
    if not yes:
        _ask(f"Remove {model}, {size}?")
    for removal in removals:
        try:
            removal.do()
        except OSError as error:
            raise InvalidRequest(
                f"can't remove all of {removal.folder}: {error.strerror or error}"
            ) from None
    say(f"removed {model}: {size} freed")


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise InvalidRequest(f"{question} There is no terminal to answer on: give --yes to mean it")
    if not click.confirm(question, err=True):
        say("nothing is removed")
        raise click.exceptions.Exit(1)
