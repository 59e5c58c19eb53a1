"""Every error that mlxpage raises on purpose.

    MlxpageError                    exit code of the command line
    ├── InvalidRequest      (ValueError)   2   a prompt or a parameter that can't be served
    ├── ModelNotFound                      3   no such model, or it can't be downloaded now
    ├── InvalidModel                       4   the model's files are damaged or incomplete
    │   └── UnsupportedModel               4   a sound model that can't be paged
    ├── OutOfMemory                        5   doesn't fit in the memory budget
    ├── Unreachable                        6   no engine that could be watched, or no answer
    ├── QueueFull                          1   too many requests wait already
    ├── TimedOut            (TimeoutError) 1   a request took longer than it was given
    └── EngineError                        1   the engine failed or was closed

A message names the value, the limit and the way out.
"""

from __future__ import annotations

import traceback


class MlxpageError(Exception):
    """Base of all errors of this package; ``exit_code`` is what the command line returns."""

    exit_code = 1


class InvalidRequest(MlxpageError, ValueError):
    """A prompt or a parameter that can't be served."""

    exit_code = 2


class ModelNotFound(MlxpageError):
    """No such model, or it isn't on this machine and can't be downloaded now."""

    exit_code = 3


class InvalidModel(MlxpageError):
    """The model's files are damaged, incomplete or of a kind that is never loaded."""

    exit_code = 4


class UnsupportedModel(InvalidModel):
    """A sound model whose architecture can't be run over a block pool."""


class OutOfMemory(MlxpageError):
    """Doesn't fit in the memory budget."""

    exit_code = 5


class Unreachable(MlxpageError):
    """There is no engine to be watched, or it doesn't answer."""

    exit_code = 6


class QueueFull(MlxpageError):
    """Too many requests wait already; one may be submitted when another has begun or ended."""


class TimedOut(MlxpageError, TimeoutError):
    """A request took longer than the `timeout` it was submitted with."""


class EngineError(MlxpageError):
    """The engine failed in a step, or was closed."""


def forget_locals(error: BaseException | None) -> None:
    """Empties the frames that an error came through: who keeps the error must not keep arrays."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
