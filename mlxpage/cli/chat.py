"""`mlxpage chat`: a talk with a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

import mlxpage
from mlxpage.cli import options
from mlxpage.cli.loading import loaded
from mlxpage.cli.output import is_terminal, say
from mlxpage.cli.settings import setting
from mlxpage.cli.talk import QUOTES, Talk, is_open
from mlxpage.errors import InvalidRequest


@click.command()
@options.model_argument
@setting("-n", "--max-tokens", type=int, help="Per answer; none: until the model ends.")
@options.sampling_options
@setting("-s", "--system", help="System message.")
@options.engine_options
@setting("--no-history", is_flag=True, help="Don't keep what is typed for the next chat.")
@options.stats
def command(model, max_tokens, system, no_history, stats, **given):
    """Talk with MODEL.

    Ctrl-C stops an answer, Ctrl-D or /exit ends the talk, /clear forgets it; /help tells more. A
    message that begins with three quotes goes on until three quotes end it.
    """
    params, engine = options.split(given)
    params = mlxpage.SamplingParams(max_tokens=max_tokens, **params)
    stats = sys.stderr.isatty() if stats is None else stats
    with loaded(model, False, max_num_seqs=1, **engine) as engine:
        talk = Talk(engine, model, params, system, stats=stats)
        with _reader(history=not no_history) as ask:
            while not talk.is_over:
                try:
                    if (text := ask(talk)) is None:
                        break
                    talk.take(text)
                except KeyboardInterrupt:  # of a line that was begun, not of the chat
                    click.echo(err=True)


@contextmanager
def _reader(*, history: bool) -> Iterator[Callable[[Talk], str | None]]:
    """A function that asks for the next message of a talk; None at the end."""
    if not (sys.stdin.isatty() and is_terminal(sys.stderr)):
        yield lambda talk: _ask()
        return
    from mlxpage.cli.line_editor import LineEditor, held_typing

    editor = LineEditor(history=history)
    say("/help lists commands, Ctrl-D ends the chat.", dim=True)
    with held_typing():
        yield lambda talk: editor.ask(talk.gauge)


def _ask() -> str | None:
    """The next message as plain lines, from a pipe or a terminal that shows nothing else."""
    text = _read_line("> ")
    while text is not None and is_open(text):
        if (line := _read_line(". ")) is None:
            raise InvalidRequest(f"a message begins with {QUOTES} and never ends; add {QUOTES}")
        text += line
    return text


def _read_line(prompt: str) -> str | None:
    if sys.stdin.isatty():
        click.echo(prompt, nl=False, err=True)
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is no text in {error.encoding}") from None
    if not line and sys.stdin.isatty():
        click.echo(err=True)  # behind Ctrl-D
    return line or None
