"""Messages from a terminal: edited over several lines, remembered, completed."""

from __future__ import annotations

import os
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from platformdirs import user_state_path
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.output import create_output

from mlxpage.cli.output import say
from mlxpage.cli.talk import ALIASES, COMMANDS, SETTINGS, is_open


class LineEditor:
    """Asks on stderr: stdout is for the answers."""

    def __init__(self, *, history: bool):
        """`history`: whether messages are kept in a file, for the next chat."""
        self._session = PromptSession(
            message="\n> ",
            prompt_continuation=". ",
            multiline=Condition(lambda: is_open(self._session.default_buffer.text)),
            completer=_Commands(),
            complete_while_typing=False,
            history=_history() if history else InMemoryHistory(),
            key_bindings=_keys(),
            enable_suspend=True,
            output=create_output(sys.stderr),
        )

    def ask(self, gauge: str) -> str | None:
        """The next message, an empty one after Ctrl-C, None at the end."""
        try:
            return self._session.prompt(bottom_toolbar=gauge)
        except KeyboardInterrupt:
            return ""
        except EOFError:
            return None


@contextmanager
def held_typing() -> Iterator[None]:
    """What is typed while an answer comes doesn't mix with it; the next message begins with it."""
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~(termios.ECHO | termios.ICANON)  # a terminal that waits for lines eats a Ctrl-D
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("escape", "enter")  # Alt-Enter, as terminals send it
    def _(event) -> None:
        event.current_buffer.newline()

    return keys


# -- history --


def _history() -> History:
    file = user_state_path("mlxpage") / "chat_history"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
        file.chmod(0o600)
    except OSError as error:
        say(f"{file} can't be written, so this chat's lines aren't kept: {error.strerror}")
        return InMemoryHistory()
    return _File(file)


class _File(FileHistory):
    def __init__(self, file: Path):
        super().__init__(str(file))

    def store_string(self, string: str) -> None:
        with suppress(OSError):  # a disk that is full is no reason to end a chat
            super().store_string(string)


# -- completion --


class _Commands(Completer):
    """Of commands, of what can be set, and of files."""

    _files = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        name, space, argument = text.partition(" ")
        if not space:
            yield from _beginning_with(name, [*COMMANDS, *ALIASES] if name else [])
        elif name == "/set":
            yield from _beginning_with(argument, SETTINGS)
        elif name in ("/save", "/load"):
            yield from self._files.get_completions(Document(argument), event)


def _beginning_with(text: str, words) -> Iterator[Completion]:
    return (Completion(word, -len(text)) for word in words if word.startswith(text))
