"""A model, loaded for a command while people watch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import contextmanager

import mlxpage
from mlxpage import monitor
from mlxpage.cli.output import can_draw, say
from mlxpage.cli.pull import fetched


@contextmanager
def loaded(model: str, quiet: bool, load: Callable | None = None, **options):
    """A model in an `LLM`, or in what `load` makes of it."""
    load = load or mlxpage.LLM
    # Nobody has asked for a monitor, and needn't hear that there can't be one.
    warnings.filterwarnings("ignore", "mlxpage top", RuntimeWarning)
    shown = os.environ.get("MLXPAGE_MONITOR") != "off"
    status = None if quiet else lambda line: say(line, dim=True)
    folder = fetched(model, quiet)
    with _loading_bar(quiet) as on_loaded:
        told = {"on_status": status, "on_loaded": on_loaded}
        llm = load(folder, monitor=shown, **told, **options)
    try:
        if not quiet:
            say(llm.plan.describe(), dim=True)
        yield llm
    except KeyboardInterrupt:
        # Without waiting for the step that is being computed: `main` ends the process.
        monitor.remove_sockets()
        raise
    except BaseException:
        llm.close()
        raise
    llm.close()


@contextmanager
def _loading_bar(quiet: bool):
    if quiet or not can_draw():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = TextColumn("loading"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
