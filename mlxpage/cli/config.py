"""`mlxpage config`: what is set, and where."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import click

from mlxpage.cli import settings
from mlxpage.cli.output import table


@click.group()
def command():
    """What is set outside the command line.

    Options of how a model is served and how it answers can be set by variables of the environment,
    such as MLXPAGE_MAX_TOKENS, and in files: mlxpage.toml in the current folder, and your own.
    """


@command.command("show")
@click.option("--origin", is_flag=True, help="Where each value comes from.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.pass_context
def show(context, origin, as_json):
    """The settings that hold here, for which commands.

    An option on the command line comes before what is set here. Of the others, the environment
    comes first, mlxpage.toml next, and then the user's file.
    """
    root = context.find_root()
    found = list(_of_commands(root.command, root, ""))
    if as_json:
        files = {name: str(file) for name, file in settings.files().items() if file.is_file()}
        record = {"schema": "mlxpage.config/1", "files": files}
        click.echo(json.dumps(record | {"settings": [each._asdict() for each in found]}))
        return
    commands: dict[tuple[str, ...], list[str]] = {}
    for each in found:
        row = each.key, _told(each.value), *([each.origin] if origin else [])
        commands.setdefault(row, []).append(each.command)
    rows = [[*row, ", ".join(names)] for row, names in sorted(commands.items())]
    click.echo(table([["SETTING", "VALUE", *(["ORIGIN"] if origin else []), "COMMANDS"], *rows]))


@command.command("path")
def path():
    """Where the user's file is, or would be."""
    click.echo(str(settings.user_file()))


class _Holding(NamedTuple):
    """A setting as a command gets it."""

    command: str
    key: str
    value: Any
    origin: str


def _of_commands(command: click.Command, context: click.Context, name: str) -> Iterator[_Holding]:
    """Raises what the commands would, of a value that they can't take."""
    for each in command.params:
        if isinstance(each, settings.Setting):
            each.handle_parse_result(context, {}, [])
            value = context.params[each.name]
            if not isinstance(value, (str, int, float, list, tuple)):
                value = None  # click has a value of its own for none
            yield _Holding(name, each.key, value, settings.origin(context, each.name))
    if isinstance(command, click.Group):
        for inner_name, inner in command.commands.items():
            inner_context = click.Context(inner, parent=context, info_name=inner_name)
            yield from _of_commands(inner, inner_context, f"{name} {inner_name}".strip())


def _told(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)) and value:
        return ",".join(map(_told, value))
    return "none" if value in (None, (), []) else str(value)
