"""A model, loaded for a command while people watch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlxpage
from mlxpage import monitor
from mlxpage.cli.output import say
from mlxpage.cli.progress import loading_bar
from mlxpage.cli.pull import fetched


def load_llm(model: str, **options: Any):
    return mlxpage.LLM(model, **options)


def load_async_engine(model: str, **options: Any):
    return mlxpage.AsyncEngine.load(model, **options).wait()


@contextmanager
def loaded(model: str, quiet: bool, load: Callable = load_async_engine, **options) -> Iterator[Any]:
    # Nobody has asked for a monitor, and needn't hear that there can't be one.
    warnings.filterwarnings("ignore", "mlxpage top", RuntimeWarning)
    shown = os.environ.get("MLXPAGE_MONITOR") != "off"
    status = None if quiet else lambda line: say(line, dim=True)
    fetched(model, quiet)
    with loading_bar(quiet) as on_loaded:
        told = {"on_status": status, "on_loaded": on_loaded}
        engine = load(model, monitor=shown, **told, **options)
    try:
        if not quiet:
            say(engine.plan.describe(), dim=True)
        yield engine
    except KeyboardInterrupt:
        # Without waiting for the step that is being computed: `main` ends the process.
        monitor.remove_sockets()
        raise
    except BaseException:
        engine.close()
        raise
    engine.close()
