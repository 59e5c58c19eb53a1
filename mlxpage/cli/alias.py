"""`mlxpage alias`: names of one's own for models."""

from __future__ import annotations

import difflib
import json
import os

import click

from mlxpage.cli import aliases
from mlxpage.cli.options import model_argument
from mlxpage.cli.output import say, table
from mlxpage.errors import InvalidRequest


@click.group()
def command():
    """Names of your own for models.

    They may be given wherever a command takes MODEL. A folder of that name comes before an alias,
    and an alias before a model of the hub.
    """


@command.command("set")
@click.argument("name")
@model_argument
def set_(name, model):
    """Let NAME stand for MODEL.

    An alias of the name is replaced. A MODEL of the hub isn't fetched, or asked for.
    """
    from mlxpage import model_store

    aliases.check_name(name)
    model_store.find(model)  # or it can be no model
    if folder := model_store.local_folder(model):
        model = os.path.abspath(folder)
    aliases.write(aliases.read() | {name: model})
    say(f"{name} stands for {model}")


@command.command("ls")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def ls(as_json):
    """The aliases, and what they stand for."""
    known = aliases.read()
    if as_json:
        click.echo(json.dumps({"schema": "mlxpage.alias/1", "aliases": known}))
    elif known:
        click.echo(table([[name, known[name]] for name in sorted(known)]))
    else:
        say("no aliases; `mlxpage alias set NAME MODEL` makes one", dim=True)


@command.command("rm")
@click.argument("name")
def rm(name):
    """Remove the alias NAME.

    The model stays: `mlxpage rm` removes models.
    """
    known = aliases.read()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "`mlxpage alias ls` lists them"
        raise InvalidRequest(f"there is no alias {name!r:.80}; {hint}")
    model = known.pop(name)
    aliases.write(known)
    say(f"{name} stands for {model} no more")
