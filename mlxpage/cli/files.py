"""Files that people name on the command line, which may be anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from mlxpage.errors import InvalidRequest


@contextmanager
def told(action: str, path: str, hint: str = "") -> Iterator[str]:
    """The path, with the user's home; what can't be done with the file becomes InvalidRequest.
    `hint` is the way out."""
    if not path:
        hint = hint or "write its name behind the command"
        raise InvalidRequest(f"no file is named to {action}; {hint}")
    hint = f"; {hint}" if hint else ""
    try:
        yield os.path.expanduser(path)
    except InvalidRequest:  # a ValueError too
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"can't {action} {path}: {reason}{hint}") from None
