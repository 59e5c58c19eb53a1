"""`mlxpage pull`: a model onto this machine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from mlxpage.cli.options import model_argument
from mlxpage.cli.output import is_terminal, say
from mlxpage.cli.progress import bar
from mlxpage.cli.settings import setting
from mlxpage.errors import InvalidModel
from mlxpage.sizes import gigabytes


@click.command()
@model_argument
@setting("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
def command(model, quiet):
    """Fetch MODEL, check its files and print its folder.

    Ctrl-C may end it: the files that are whole are not fetched again by the next one.
    """
    from mlxpage import model_store

    is_here = model_store.find(model) is not None
    folder = fetched(model, quiet)
    try:
        model_store.check_folder(folder)
    except InvalidModel as error:
        if model_store.local_folder(model) is None:
            error.add_note(f"`mlxpage rm {model}` removes it, to be fetched again.")
        raise
    if is_here and not quiet:
        say(f"{model} is here already", dim=True)
    click.echo(str(folder))


def fetched(model: str, quiet: bool) -> Path:
    """The folder of a model, fetched while people watch if it isn't here."""
    from mlxpage import model_store

    if folder := model_store.find(model):
        return folder
    with _progress(quiet) as (on_status, on_bytes):
        return model_store.resolve(model, on_status=on_status, on_bytes=on_bytes)


@contextmanager
def _progress(quiet: bool) -> Iterator[tuple[Callable[[str], None], Callable[[int, int], None]]]:
    """What to call with lines, and with bytes done and in all."""
    if quiet:
        yield lambda line: None, lambda done, total: None
    elif not is_terminal(sys.stderr):
        yield lambda line: say(line), _Tenths()
    else:
        from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

        with bar(DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as shown:
            task = shown.add_task("fetching", total=None)
            yield (
                lambda line: shown.console.print(line, style="dim", highlight=False, markup=False),
                lambda done, total: shown.update(task, completed=done, total=total),
            )


class _Tenths:
    """Says how far it is in at most ten lines: for logs."""

    def __init__(self):
        self._told = 0

    def __call__(self, done: int, total: int) -> None:
        tenths = 10 * done // max(total, 1)
        if tenths > self._told:
            self._told = tenths
            say(f"{gigabytes(done)} of {gigabytes(total)}")
