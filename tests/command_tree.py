"""The commands of the command line, those of groups too."""

import click

from mlxpage.cli.main import cli


def commands(command: click.Command = cli, name: str = "") -> dict[str, click.Command]:
    """Words behind `mlxpage` -> command; the group of all has none."""
    found = {name: command}
    if isinstance(command, click.Group):
        for inner in command.commands:
            found |= commands(command.commands[inner], f"{name} {inner}".strip())
    return found
