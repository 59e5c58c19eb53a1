"""What the process of an app and that of its engine tell each other.

Messages are pickled: the two trust each other. Those to the app come in lists, of what there was at
the same time.
"""

from __future__ import annotations

import pickle
import signal
import traceback
from dataclasses import dataclass
from typing import Any

from mlxpage.errors import EngineError
from mlxpage.events import Event

IGNORED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
"""Ctrl-C and the end of a terminal or a service come to all its processes. When the engine ends is
for the app to say; and it ends with the app, however that does."""
FLAG = "--mlxpage-engine"
"""What a frozen app is started with, to be the process of an engine."""
PEER_SECONDS = 1.0
"""How often who waits for a message looks whether the other process still lives. The end of the
pipe tells at once, unless a process that the app has forked keeps it open."""
CLOSE_SECONDS = 40.0
"""What closing may take: the step under way, and ten seconds to store what is cached."""

# -- to the engine --


@dataclass(frozen=True, slots=True)
class Load:
    """The first one."""

    options: dict[str, Any]
    """Of `AsyncEngine.load`, without functions."""


@dataclass(frozen=True, slots=True)
class Begin:
    number: int
    """Of the request, which no other one ever has."""
    order: bytes
    """(prompt, params, priority), pickled by themselves: if they can't be read, only this request
    fails."""


@dataclass(frozen=True, slots=True)
class Cancel:
    number: int
    fails: bool
    """Whether it ends with an error, which the app's process keeps, or with what it has."""


@dataclass(frozen=True, slots=True)
class Ask:
    """Calls a method of the engine, or of its tokenizer as in "tokenizer.encode"."""

    number: int
    """Of the question."""
    method: str
    arguments: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Close:
    """The last one; the end of the pipe means the same."""


# -- to the app --


@dataclass(frozen=True, slots=True)
class Loading:
    """What `on_status` or `on_loaded` is to be called with."""

    callback: str
    arguments: tuple


@dataclass(frozen=True, slots=True)
class Loaded:
    """From now on there is an engine."""

    eos_token_ids: frozenset[int]
    has_chat_template: bool


@dataclass(frozen=True, slots=True)
class Failed:
    """There never will be one."""

    error: Exception


@dataclass(frozen=True, slots=True)
class Happened:
    number: int
    """Of the request."""
    event: Event


@dataclass(frozen=True, slots=True)
class Answer:
    number: int
    value: Any = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Stalled:
    """A step takes longer than `stall_after`; it is over when something happens."""

    began: float
    """`time.monotonic`, which all processes of a machine share."""


def portable(error: BaseException) -> Exception:
    """An error for another process: of its own class if that is one of ours or Python's, and else
    an EngineError that says which. What has caused it comes along as a note."""
    try:
        known = type(error).__module__ in ("mlxpage.errors", "builtins")
        if not (known and isinstance(error, Exception)):
            raise TypeError("a class that the other process may not have")
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = EngineError(f"{type(error).__name__}: {error}")
    if (cause := error.__cause__) is not None:
        lines = traceback.format_exception(cause)
        copy.add_note("In the engine's process it came from:\n" + "".join(lines).rstrip())
    return copy
