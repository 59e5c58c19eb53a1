"""`mlxpage cache`: blocks on disk."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import click

from mlxpage.cli.files import told
from mlxpage.errors import InvalidRequest
from mlxpage.sizes import gigabytes

_VERBS = {"stats": "count the blocks in", "clear": "clear", "verify": "verify"}


@click.command()
@click.argument("action", type=click.Choice(["stats", "clear", "verify"]), metavar="ACTION")
@click.option("--dir", "folder", help="The folder of the blocks, if it isn't the usual one.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def command(action, folder, as_json):
    """What the prefix cache keeps on disk.

    ACTION is stats, which counts its blocks; clear, which removes them all; or verify, which reads
    them and removes those that are damaged. Any of them may run beside an engine.
    """
    from mlxpage import block_store

    folder = folder if folder is not None else str(block_store.default_folder())
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InvalidRequest(f"{folder} is no folder; give the one of the blocks (--dir)")
    act = {"stats": block_store.stats, "clear": block_store.clear, "verify": block_store.verify}
    with told(_VERBS[action], folder, "give the folder of the blocks (--dir)") as path:
        found = act[action](path)
    if as_json:
        record = {"schema": "mlxpage.cache/1", "action": action, "folder": folder, **found}
        click.echo(json.dumps(record))
    else:
        click.echo("\n".join(_cache_lines(action, folder, found)))


def _cache_lines(action: str, folder: str, found: dict[str, Any]) -> list[str]:
    blocks = _blocks(found)
    if action == "clear":
        return [f"removed {blocks}, from {folder}"]
    if action == "verify":
        line = f"{folder}: {blocks} whole; {found['damaged']:,} damaged and removed"
        return [f"{line}; {found['unreadable']:,} can't be read" if found["unreadable"] else line]
    return [f"{folder}: {blocks}", *map(_identity_line, found["identities"])]


def _identity_line(found: dict[str, Any]) -> str:
    facts = json.dumps(found["facts"])  # escapes what a terminal could take for a command
    if found["last_used"] is None:
        return f"  no blocks  {facts}"
    days = max(0.0, time.time() - found["last_used"]) / 86_400
    return f"  {_blocks(found)}, last used {days:,.1f} days ago  {facts}"


def _blocks(found: dict[str, Any]) -> str:
    count = found["blocks"]
    return f"{count:,} block{'' if count == 1 else 's'}, {gigabytes(found['bytes'])}"
