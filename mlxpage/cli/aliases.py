"""Names that a user has given to models."""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from pathlib import Path

from mlxpage.cli import settings
from mlxpage.errors import InvalidRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def file() -> Path:
    return settings.user_folder() / "aliases.json"


def read() -> dict[str, str]:
    """Alias -> the model that it stands for. Raises InvalidRequest for a damaged file."""
    try:
        found = json.loads(file().read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise InvalidRequest(f"{file()} can't be read: {error.strerror}; mend or move it") from None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        raise InvalidRequest(f"{file()} is no list of aliases; mend it, or remove it and set anew")
    return found


def write(aliases: dict[str, str]) -> None:
    """Replaces the file at once, or leaves it as it is. Raises InvalidRequest."""
    new = file().with_name(f".{file().name}.{os.getpid()}")
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(json.dumps(aliases, indent=2, sort_keys=True) + "\n", "utf-8")
        new.replace(file())
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        raise InvalidRequest(
            f"{file()} can't be written: {error.strerror}; MLXPAGE_CONFIG moves its folder"
        ) from None


def check_name(name: str) -> None:
    """Raises InvalidRequest for what could not be told from other names of models."""
    from mlxpage.model_store import DEMO_MODELS

    if not _NAME.fullmatch(name):
        raise InvalidRequest(
            f"{name!r:.80} can't be an alias: take up to 64 letters, digits and ._-, and begin "
            "with a letter or digit"
        )
    if name.lower() in DEMO_MODELS:
        raise InvalidRequest(f"{name} is the name of a demo model; take another alias")


def expand(model: str) -> str:
    """The model that an alias stands for; anything else stays. A folder comes first."""
    if os.path.isdir(os.path.expanduser(model)):
        return model
    return read().get(model, model)
