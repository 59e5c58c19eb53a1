"""What goes on in a chat: answers, and the commands that begin with a slash."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import click

import mlxpage
from mlxpage.cli.conversation import Conversation
from mlxpage.cli.output import say, show_error, timings
from mlxpage.cli.progress import PrefillBar
from mlxpage.errors import EngineError, InvalidRequest
from mlxpage.events import Done, Prefill, Tokens
from mlxpage.outputs import RequestOutput
from mlxpage.sampling_params import NEUTRAL
from mlxpage.sizes import gigabytes

QUOTES = '"""'
NONE = "none"
SETTINGS = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("seed", "max_tokens", "stop"),
)
"""Fields of `SamplingParams` that /set changes."""


class Command(NamedTuple):
    argument: str
    help: str
    run: Callable[[Talk, str], None]


COMMANDS: dict[str, Command] = {}
ALIASES = {"/?": "/help", "/bye": "/exit", "/quit": "/exit"}


def _command(name: str, argument: str = ""):
    def add(method):
        COMMANDS[name] = Command(argument, method.__doc__, method)
        return method

    return add


def is_open(text: str) -> bool:
    """Whether a message goes on in the next line: it began with quotes, and they aren't closed."""
    text = text.strip()
    return text.startswith(QUOTES) and not (len(text) >= 6 and text.endswith(QUOTES))


class Talk:
    """A conversation with a model, and what people do to it between its turns."""

    def __init__(
        self,
        engine: mlxpage.AsyncEngine,
        model: str,
        params: mlxpage.SamplingParams,
        system: str | None,
        *,
        stats: bool,
    ):
        """`stats`: whether there is a line of figures after each answer. Raises InvalidRequest if
        the model can't talk."""
        self._engine, self._model, self._params = engine, model, params
        self._conversation = Conversation()
        self._shows_stats = stats
        self._totals = _Totals()
        self._last: Prefill | None = None
        self.is_over = False
        self._set_system(system)

    @property
    def gauge(self) -> str:
        """How full the context is, and how much of the last prompt was cached."""
        used = f"{self._num_tokens(self._conversation):,}/{self._engine.context_length:,} tok"
        if self._last is None:
            return used
        share = self._last.num_cached_tokens / self._last.num_prompt_tokens
        return f"{used}, {share * 100:.0f} % cached"

    def _num_tokens(self, conversation: Conversation) -> int:
        turns = conversation.turns
        return len(self._engine.chat_prompt(conversation.messages)) if turns else 0

    def take(self, text: str) -> None:
        """What somebody wrote: a message, a command, or nothing."""
        text = text.strip()
        try:
            if text.startswith(QUOTES):
                text = text.removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
            elif text.startswith("/"):
                return self._obey(*text.split(maxsplit=1))
            if text.strip():
                self._answer(self._conversation, text)
        except (InvalidRequest, EngineError) as error:
            show_error(str(error), error)

    # -- answers --

    def _answer(self, before: Conversation, question: str) -> None:
        """Prints the answer, and makes both the next turn after `before`."""
        prompt = self._engine.chat_prompt(before.asking(question))
        if len(prompt) >= (context := self._engine.context_length):
            raise InvalidRequest(
                f"the conversation with this message has {len(prompt):,} tokens; the context of "
                f"{context:,} must hold it and at least one more. Write less, take turns back with "
                "/undo, or begin anew with /clear."
            )
        self._last, output, text = None, None, ""
        try:
            with PrefillBar(len(prompt)) as bar, self._engine.submit(prompt, self._params) as asked:
                for event in asked:
                    match event:
                        case Prefill():
                            self._last = event
                            bar.show(event)
                        case Tokens():
                            bar.hide()
                            text += event.text
                            click.echo(event.text, nl=False)
                        case Done():
                            output = event.output
        except KeyboardInterrupt:
            pass
        except EngineError:
            click.echo()
            raise
        self._conversation = before.with_turn(question, text)
        click.echo()
        if output is None:
            say("(stopped)", dim=True)
        else:
            self._tell(output)

    def _tell(self, output: RequestOutput) -> None:
        self._totals.add(output)
        if self._shows_stats:
            say(_line(output), dim=True)
        is_cut = output.finish_reason == "length"
        if is_cut and len(output.token_ids) != self._params.max_tokens:
            say("The context is full: take turns back with /undo, or begin anew with /clear.")

    # -- commands --

    def _obey(self, name: str, argument: str = "") -> None:
        name = ALIASES.get(name, name)
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, 1)
            hint = f"Did you mean {near[0]}?" if near else "/help lists them."
            raise InvalidRequest(
                f"{name} is no command. {hint} For a message that begins so, write {QUOTES} before "
                "and behind it."
            )
        COMMANDS[name].run(self, argument.strip())

    @_command("/help")
    def help(self, _: str) -> None:
        """These commands; /? too."""
        left = {name: f"{name} {command.argument}" for name, command in COMMANDS.items()}
        width = max(map(len, left.values()))
        for name, command in COMMANDS.items():
            say(f"{left[name]:{width}}  {command.help}")
        say(f"A message in {QUOTES} may have several lines; in a terminal, Alt-Enter begins one.")
        say("Ctrl-C stops an answer, Ctrl-D ends the chat.")

    @_command("/set", "[NAME VALUE]")
    def set(self, argument: str) -> None:
        """Shows how tokens are chosen, or changes it; none takes a value back."""
        name, _, value = argument.partition(" ")
        if not name:
            for name in SETTINGS:
                say(f"{name:{max(map(len, SETTINGS))}}  {self._setting(name)}")
            return
        if name not in SETTINGS:
            raise InvalidRequest(f"{name} can't be set; these can: {', '.join(SETTINGS)}")
        if not (value := value.strip()):
            raise InvalidRequest(f"no value for {name}; write /set {name} VALUE, or {NONE}")
        self._params = replace(self._params, **{name: _value(name, value)})
        say(f"{name}  {self._setting(name)}")

    def _setting(self, name: str) -> str:
        value = getattr(self._params, name)
        if value is None and name in NEUTRAL:
            return "as the model has it"
        return _shown(value)

    @_command("/system", "[TEXT]")
    def system(self, argument: str) -> None:
        """Shows the system message, or changes it from the next answer on; none: without."""
        if argument:
            self._set_system(None if argument == NONE else argument)
        say(_shown(self._conversation.system))

    def _set_system(self, system: str | None) -> None:
        changed = replace(self._conversation, system=system or None)
        self._engine.chat_prompt(changed.asking("Hi"))  # the model's template may refuse it
        self._conversation = changed

    @_command("/undo")
    def undo(self, _: str) -> None:
        """Takes the last turn back."""
        self._conversation, question = self._conversation.without_last()
        say(f"took back: {' '.join(question.split())[:60]}")

    @_command("/retry")
    def retry(self, _: str) -> None:
        """Another answer instead of the last."""
        self._answer(*self._conversation.without_last())

    @_command("/clear")
    def clear(self, _: str) -> None:
        """Forgets the conversation, but for the system message."""
        self._conversation = replace(self._conversation, turns=())

    @_command("/save", "FILE")
    def save(self, path: str) -> None:
        """Writes the conversation to a file."""
        self._conversation.save(path, self._model)
        say(f"saved {_turns(len(self._conversation.turns))} to {path}")

    @_command("/load", "FILE")
    def load(self, path: str) -> None:
        """Goes on with the conversation in a file."""
        found = Conversation.load(path)
        tokens = self._num_tokens(found)  # the model's template may refuse it
        self._conversation = found
        say(f"loaded {_turns(len(found.turns))}, {tokens:,} tokens")

    @_command("/stats")
    def stats(self, _: str) -> None:
        """Figures of this chat, its context and the memory."""
        facts = self._engine.stats()
        blocks, size = facts["blocks"], facts["bytes"]
        say(str(self._totals))
        say(f"context   {self.gauge}")
        say(
            f"pool      {blocks['total']:,} of at most {blocks['limit']:,} blocks of "
            f"{facts['block_size']} tokens; {blocks['cached']:,} cached"
        )
        say(f"memory    {gigabytes(size['active'])}, at most {gigabytes(size['peak'])} so far")

    @_command("/exit")
    def exit(self, _: str) -> None:
        """Ends the chat; /bye and /quit too."""
        self.is_over = True


@dataclass
class _Totals:
    """Of the answers that came to their end."""

    answers: int = 0
    tokens: int = 0
    prompt: int = 0
    cached: int = 0

    def add(self, output: RequestOutput) -> None:
        self.answers += 1
        self.tokens += len(output.token_ids)
        self.prompt += len(output.prompt_token_ids)
        self.cached += output.num_cached_tokens

    def __str__(self) -> str:
        return (
            f"answers   {self.answers:,}, of {self.tokens:,} tokens; prompts of {self.prompt:,} "
            f"tokens, {self.cached:,} of them cached"
        )


def _line(output: RequestOutput) -> str:
    """The figures of an answer."""
    times = timings(output)
    is_cut = output.finish_reason == "length"
    parts = [f"{len(output.token_ids):,} tok{', cut short' if is_cut else ''}"]
    if times["decode_tps"]:
        parts.append(f"{times['decode_tps']:.1f} tok/s")
    parts.append(f"TTFT {times['ttft_s'] * 1000:,.0f} ms")
    parts.append(f"prompt {len(output.prompt_token_ids):,} ({output.num_cached_tokens:,} cached)")
    return " · ".join(parts)


def _value(name: str, text: str) -> int | float | str | None:
    """As `SamplingParams` takes it, which says what is wrong with others."""
    if text == NONE:
        return () if name == "stop" else None
    if name == "stop":
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _shown(value) -> str:
    if isinstance(value, tuple):
        value = ", ".join(map(repr, value))
    return NONE if value in (None, "") else str(value)


def _turns(count: int) -> str:
    return "1 turn" if count == 1 else f"{count} turns"
