"""What every command prints with."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from typing import Any

import click

import mlxpage
from mlxpage.outputs import RequestOutput


def color() -> bool | None:
    """Whether to colour lines, as click takes it; None: on a terminal."""
    return False if os.environ.get("NO_COLOR") else None


def say(line: str, **style: Any) -> None:
    click.secho(line, err=True, color=color(), **style)


def can_draw() -> bool:
    """Whether stderr is a terminal on which a bar can be drawn again and again."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def show_error(message: str, error: Exception) -> None:
    if os.environ.get("MLXPAGE_DEBUG"):
        traceback.print_exception(error)
    say(f"Error: {message}", fg="red")


def forget_output() -> None:
    """The interpreter flushes stdout once more when it ends, and must not fail on it again."""
    with suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def answer(output: RequestOutput) -> dict[str, Any]:
    """A generation, as JSON has it."""
    return {
        "text": output.text,
        "finish_reason": output.finish_reason,
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(output.token_ids),
            "cached_tokens": output.num_cached_tokens,
        },
        "timings": {
            "queue_s": round(output.timings.queue_s, 4),
            "ttft_s": round(output.timings.ttft_s, 4),
            "total_s": round(output.timings.total_s, 4),
        },
    }


def table(rows: list[list[str]]) -> str:
    """Lines with their cells below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"mlxpage": mlxpage.__version__, "mlx": version("mlx"), "mlx_lm": version("mlx-lm")}
