"""What every command prints with."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from typing import Any

import click

import mlxpage


def say(line: str, **style: Any) -> None:
    color = False if os.environ.get("NO_COLOR") else None
    click.secho(line, err=True, color=color, **style)


def show_error(message: str, error: Exception) -> None:
    if os.environ.get("MLXPAGE_DEBUG"):
        traceback.print_exception(error)
    say(f"Error: {message}", fg="red")


def forget_output() -> None:
    """The interpreter flushes stdout once more when it ends, and must not fail on it again."""
    with suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"mlxpage": mlxpage.__version__, "mlx": version("mlx"), "mlx_lm": version("mlx-lm")}
