"""Where the command line begins and ends: its commands, and the exit codes of what goes wrong."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import click

import mlxpage
from mlxpage.cli import settings
from mlxpage.cli.output import forget_output, say, show_error
from mlxpage.errors import MlxpageError

INTERRUPTED = 130  # 128 + SIGINT
BROKEN_PIPE = 141  # 128 + SIGPIPE

COMMANDS = [
    "alias",
    "batch",
    "bench",
    "cache",
    "chat",
    "completion",
    "config",
    "doctor",
    "generate",
    "info",
    "ls",
    "pull",
    "rm",
    "show",
    "top",
]
"""Each is `command` in the module of its name, and returns its exit code or nothing."""


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: a model's file must not take its place
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # what a terminal can't show is no failure
    warnings.showwarning = lambda message, *_: say(f"Warning: {message}")
    try:
        code = run(sys.argv[1:])
    except (click.Abort, KeyboardInterrupt):
        say("interrupted")
        os._exit(INTERRUPTED)  # Python's own end waits for the step that is being computed
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Runs a command; returns the exit code (`mlxpage.errors` has the table). Ctrl-C goes through,
    as click's `Abort`."""
    try:
        code = cli.main(arguments, prog_name="mlxpage", standalone_mode=False)
        sys.stdout.flush()
        return code or 0  # of the command, or of click's `Exit`
    except click.Abort:
        raise
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        _show_usage(error)
        return error.exit_code
    except ReaderGone:
        forget_output()
        return BROKEN_PIPE
    except OSError as error:  # of stdout: those of model files come as errors of our own
        forget_output()
        show_error(f"can't write to standard output: {error.strerror or error}", error)
        return 1
    except MlxpageError as error:
        show_error("\n".join([str(error), *getattr(error, "__notes__", ())]), error)
        return error.exit_code
    except Exception as error:
        show_error(f"{type(error).__name__}: {error}", error)
        say("This is a bug in mlxpage. Set MLXPAGE_DEBUG=1 to see where it happened.")
        return 1


def _show_usage(error: click.ClickException) -> None:
    """What click says itself, with its message in a line."""
    if context := getattr(error, "ctx", None):
        help = f"'{context.command_path} {context.help_option_names[0]}'"
        say(f"{context.get_usage()}\nTry {help} for help.\n")
    show_error(" ".join(error.format_message().split()), error)


class ReaderGone(Exception):
    """Whoever read the answer has enough of it."""


class _Modules(Mapping[str, click.Command]):
    """Commands by name, each imported when it is asked for."""

    def __getitem__(self, name: str) -> click.Command:
        if name not in COMMANDS:
            raise KeyError(name)
        command = importlib.import_module(f"mlxpage.cli.{name}").command
        command.name = name
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


class _Commands(click.Group):
    def invoke(self, context: click.Context) -> Any:
        # click would end the process by itself, with 1.
        try:
            return super().invoke(context)
        except BrokenPipeError:
            raise ReaderGone from None
        except MlxpageError as error:
            settings.explain(context, error)
            raise


@click.group(
    cls=_Commands,
    commands=_Modules(),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(mlxpage.__version__, prog_name="mlxpage")
def cli() -> None:
    """Run language models on a Mac, many prompts at once, over a paged K/V cache.

    MODEL is a folder, an alias, a model of the Hugging Face hub, or a demo model: smollm2-135m,
    smollm2-135m-4bit, gemma3-270m.
    """
