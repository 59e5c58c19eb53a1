"""`mlxpage chat`: a talk with a model."""

from __future__ import annotations

import sys

import click

import mlxpage
from mlxpage.cli.loading import loaded
from mlxpage.cli.options import engine_options, model_argument, sampling_options, split
from mlxpage.cli.output import say, show_error
from mlxpage.cli.settings import setting
from mlxpage.errors import EngineError, InvalidRequest


@click.command()
@model_argument
@setting("-n", "--max-tokens", type=int, help="Per answer; none: until the model ends.")
@sampling_options
@setting("-s", "--system", help="System message.")
@engine_options
def command(model, max_tokens, system, **options):
    """Talk with MODEL.

    Ctrl-C stops an answer, Ctrl-D or /exit ends the talk, /clear forgets it.
    """
    params, engine = split(options)
    params = mlxpage.SamplingParams(max_tokens=max_tokens, **params)
    begin = [{"role": "system", "content": system}] if system else []
    messages = list(begin)
    with loaded(model, False, max_num_seqs=1, **engine) as llm:
        llm.chat_prompt([*begin, {"role": "user", "content": "Hi"}])  # has it a chat template?
        while (line := _ask()) is not None:
            if line == "/exit":
                break
            if line == "/clear":
                messages = list(begin)
            elif line.startswith("/"):
                say(f"{line.split()[0]} is no command; there are /clear and /exit")
            elif line:
                messages = _turn(llm, messages, line, params)


def _ask() -> str | None:
    """The user's next line, None at its end."""
    if sys.stdin.isatty():
        click.echo("> ", nl=False, err=True)
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        click.echo(err=True)
        return ""
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is no text in {error.encoding}") from None
    if not line:
        return None
    return line.strip()


def _turn(llm, messages, line: str, params) -> list[dict[str, str]]:
    """Prints the answer to `line`; returns the conversation with both, or as it was."""
    asked = [*messages, {"role": "user", "content": line}]
    text = ""
    try:
        for event in llm.stream(llm.chat_prompt(asked), params):
            text += event.text
            click.echo(event.text, nl=False)
    except KeyboardInterrupt:
        say(" (stopped)", dim=True)
    except InvalidRequest as error:
        show_error(f"{error} /clear begins a new conversation.", error)
        return messages
    except EngineError as error:
        click.echo()
        show_error(str(error), error)
        return messages
    click.echo()
    return [*asked, {"role": "assistant", "content": text}]
