"""What every command prints with."""

from __future__ import annotations

import os
import re
import sys
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

import click

if TYPE_CHECKING:
    from mlxpage.outputs import RequestOutput

_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LONG_WORD = re.compile(r"\S{300,}")


def color() -> bool | None:
    """Whether to colour lines, as click takes it; None: on a terminal."""
    return False if os.environ.get("NO_COLOR") or _is_dumb() else None


def say(line: str, **style: Any) -> None:
    click.secho(harmless(line), err=True, color=color(), **style)


def harmless(text: str) -> str:
    """With escapes for what a terminal could take for a command: names of models, files and
    settings are shown, and anybody may have chosen them."""
    return _COMMANDS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def is_terminal(stream: TextIO) -> bool:
    """Whether it shows bars and colours, and not only lines."""
    return stream.isatty() and not _is_dumb()


def _is_dumb() -> bool:
    return os.environ.get("TERM") in ("dumb", "unknown")


def show_error(message: str, error: Exception) -> None:
    if os.environ.get("MLXPAGE_DEBUG"):
        traceback.print_exception(error)
    say(f"Error: {_LONG_WORD.sub(_shortened, message)}", fg="red")


def _shortened(word: re.Match[str]) -> str:
    return f"{word[0][:100]}...{word[0][-50:]}"


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
        "timings": timings(output),
    }


def table(rows: list[list[str]]) -> str:
    """Lines with their cells below each other."""
    rows = [[harmless(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


def timings(output: RequestOutput) -> dict[str, float | None]:
    """Seconds of a generation, and tokens per second: of its prompt, those that were computed, and
    of the answer, those after the first. None where there are none."""
    times, num_prompt = output.timings, len(output.prompt_token_ids)
    first, last = times.first_token, times.finished
    return {
        "queue_s": round(times.queue_s, 4),
        "ttft_s": round(times.ttft_s, 4),
        "total_s": round(times.total_s, 4),
        "prefill_tps": _rate(num_prompt - output.num_cached_tokens, times.scheduled, first),
        "decode_tps": _rate(len(output.token_ids) - 1, first, last),
    }


def _rate(tokens: int, began: float | None, ended: float | None) -> float | None:
    if tokens < 1 or began is None or ended is None or ended <= began:
        return None
    return round(tokens / (ended - began), 2)
