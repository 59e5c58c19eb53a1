"""A conversation with a model, and its file."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from mlxpage.cli.files import told
from mlxpage.errors import InvalidRequest

SCHEMA = "mlxpage.chat/1"
LARGEST_FILE = 64 * 2**20

Message = dict[str, str]


@dataclass(frozen=True)
class Conversation:
    """What was said. Its methods give another one."""

    system: str | None = None
    turns: tuple[tuple[str, str], ...] = ()
    """Questions with their answers."""

    @property
    def messages(self) -> list[Message]:
        found = [_message("system", self.system)] if self.system is not None else []
        for question, answer in self.turns:
            found += [_message("user", question), _message("assistant", answer)]
        return found

    def asking(self, question: str) -> list[Message]:
        """The messages to be answered."""
        return [*self.messages, _message("user", question)]

    def with_turn(self, question: str, answer: str) -> Conversation:
        return replace(self, turns=(*self.turns, (question, answer)))

    def without_last(self) -> tuple[Conversation, str]:
        """The conversation before the last turn, and that one's question. Raises InvalidRequest if
        there is none."""
        if not self.turns:
            raise InvalidRequest("nothing was said yet; write a message first")
        return replace(self, turns=self.turns[:-1]), self.turns[-1][0]

    # -- files --

    def save(self, path: str, model: str) -> None:
        """Writes a file that only its owner can read; it is there as a whole or not at all. Raises
        InvalidRequest if it can't be written."""
        record = {"schema": SCHEMA, "model": model, "messages": self.messages}
        with told("write", path) as path:
            file, temporary = tempfile.mkstemp(dir=os.path.dirname(path) or ".")
            try:
                with open(file, "w", encoding="utf-8") as written:
                    json.dump(record, written, ensure_ascii=False, indent=1)
                    written.flush()
                    os.fsync(file)
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary)
                raise

    @classmethod
    def load(cls, path: str) -> Conversation:
        """Raises InvalidRequest for what is no file of `save`."""
        with told("read", path) as path, open(path, encoding="utf-8") as file:
            text = file.read(LARGEST_FILE + 1)
        if len(text) > LARGEST_FILE:
            raise InvalidRequest(f"{path} is longer than {LARGEST_FILE:,} characters")
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{path} is no JSON: {error}") from None
        found = record.get("schema") if isinstance(record, dict) else None
        if found != SCHEMA:
            raise InvalidRequest(f"{path} has the schema {found!r:.80}; /save writes {SCHEMA!r}")
        return cls._of(record.get("messages"), path)

    @classmethod
    def _of(cls, messages: Any, path: str) -> Conversation:
        found = cls()
        if not isinstance(messages, list):
            raise InvalidRequest(f"{path} has no list of messages")
        if messages and _is_message(messages[0], "system"):
            found = cls(messages[0]["content"])
            messages = messages[1:]
        for at in range(0, len(messages), 2):
            turn = messages[at : at + 2]
            if not (
                len(turn) == 2
                and _is_message(turn[0], "user")
                and _is_message(turn[1], "assistant")
            ):
                raise InvalidRequest(
                    f"{path}: after a system message, if any, come a user's and the assistant's in "
                    f"turn, each with a content, unlike {turn!r:.80}"
                )
            found = found.with_turn(turn[0]["content"], turn[1]["content"])
        return found


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _is_message(value: Any, role: str) -> bool:
    return (
        isinstance(value, dict)
        and value.get("role") == role
        and isinstance(value.get("content"), str)
    )
