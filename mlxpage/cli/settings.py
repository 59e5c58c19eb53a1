"""Options that can be set beside the command line: by variables of the environment, and by files.

A setting of the name --max-tokens is MLXPAGE_MAX_TOKENS, and `max-tokens` in a file: at its top for
all commands that have it, in a table `[generate]` for that one. The command line comes before the
environment, that before `mlxpage.toml` in the current folder, and that before the user's own file.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
from click.core import ParameterSource

from mlxpage.errors import InvalidRequest

PROJECT_FILE = "mlxpage.toml"
MAX_FILE_BYTES = 1 << 20

Table = dict[str, Any]


class Stated(NamedTuple):
    """A value as it is written somewhere, and where."""

    value: Any
    origin: str


class Setting(click.Option):
    """An option that says how a model is served or answers. Others concern one call alone, and are
    plain options: what is removed or overwritten is never set from elsewhere."""

    def __init__(self, *args, is_place: bool = False, **options):
        """`is_place`: it says what is loaded, or where to write. The file of a project may be that
        of a stranger, who doesn't decide on those."""
        super().__init__(*args, **options)
        self.is_place = is_place
        self.envvar = f"MLXPAGE_{self.name.upper()}"

    @property
    def key(self) -> str:
        """Its name in a file."""
        return self.name.replace("_", "-")

    def value_from_envvar(self, ctx):
        value = self.resolve_envvar_value(ctx)
        return [value] if value is not None and self.multiple else value

    def consume_value(self, ctx, opts):
        value, source = super().consume_value(ctx, opts)
        _stated(ctx).pop(self.name, None)  # another command's
        if source is ParameterSource.ENVIRONMENT:
            _stated(ctx)[self.name] = Stated(self.resolve_envvar_value(ctx), self.envvar)
        elif source is ParameterSource.DEFAULT and (stated := _in_files(ctx, self.key)):
            _stated(ctx)[self.name] = stated
            return self._as_on_the_command_line(stated), ParameterSource.DEFAULT_MAP
        return value, source

    def type_cast_value(self, ctx, value):
        try:
            return super().type_cast_value(ctx, value)
        except click.BadParameter as error:
            stated = _stated(ctx).get(self.name)
            if stated is None:
                raise
            raise self._refusal(stated, error.message) from None

    def _as_on_the_command_line(self, stated: Stated) -> Any:
        """So one parser reads all values, and 1.5 is no number of tokens here either."""
        value = stated.value
        if self.is_flag:
            if not isinstance(value, bool):
                raise self._refusal(stated, "It must be true or false.")
            return value
        if isinstance(value, list) and not self.multiple:
            raise self._refusal(stated, "It takes one value, and this is a list.")
        texts = [_text(each) for each in (value if isinstance(value, list) else [value])]
        return texts if self.multiple else texts[0]

    def _refusal(self, stated: Stated, reason: str) -> Exception:
        return InvalidRequest(
            f"{self.key} is {stated.value!r:.80} in {stated.origin}. {reason} Correct it there, or "
            f"give --{self.key}."
        )


setting = partial(click.option, cls=Setting)


def settings_of(command: click.Command) -> dict[str, Setting]:
    """Key -> setting, of a command or of all commands of a group."""
    found = {each.key: each for each in command.params if isinstance(each, Setting)}
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            found |= settings_of(inner)
    return found


def origin(ctx: click.Context, name: str) -> str:
    """Where the value of a setting comes from: a variable, a file, or "default"."""
    stated = _stated(ctx).get(name)
    return stated.origin if stated else "default"


def explain(ctx: click.Context, error: Exception) -> None:
    """Notes where those settings come from that the message of an error names."""
    for name, stated in _stated(ctx).items():
        if re.search(rf"\b{name}\b", str(error)) and stated.origin not in str(error):
            error.add_note(f"{name} is {stated.value!r:.80} in {stated.origin}.")


def user_folder() -> Path:
    """Where the user's own file and aliases are; `MLXPAGE_CONFIG` moves it."""
    import platformdirs

    chosen = os.environ.get("MLXPAGE_CONFIG")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_config_dir("mlxpage"))


def user_file() -> Path:
    return user_folder() / "config.toml"


def files() -> dict[str, Path]:
    """The files that may hold settings, whether they are there or not; the first one wins."""
    return {"project": Path.cwd() / PROJECT_FILE, "user": user_file()}


# -- what files say --


def _stated(ctx: click.Context) -> dict[str, Stated]:
    """What the settings of this call have been set to, but for the command line."""
    return ctx.meta.setdefault("mlxpage.stated", {})


def _in_files(ctx: click.Context, key: str) -> Stated | None:
    if ctx.resilient_parsing:  # a shell completes a line
        return None
    path = _path(ctx)
    for file, table in _read(ctx):
        tables = [table]
        for name in path:
            tables.append(tables[-1].get(name, {}))
        for place in reversed(tables):  # the innermost wins
            if key in place:
                return Stated(place[key], str(file))
    return None


def _path(ctx: click.Context) -> list[str]:
    """The names of a command: of the group that it is in, and its own."""
    return [] if ctx.parent is None else [*_path(ctx.parent), ctx.command.name]


def _read(ctx: click.Context) -> list[tuple[Path, Table]]:
    """The files that there are, checked."""
    if "mlxpage.files" not in ctx.meta:
        group = ctx.find_root().command
        ctx.meta["mlxpage.files"] = list(_checked_files(group))
    return ctx.meta["mlxpage.files"]


def _checked_files(group: click.Command) -> Iterator[tuple[Path, Table]]:
    for file in files().values():
        if os.path.lexists(file):
            table = _parse(file)
            _check(file, table, group, "")
            yield file, table


def _parse(file: Path) -> Table:
    import tomllib

    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_FILE_BYTES + 1)
        if len(text) > MAX_FILE_BYTES:
            raise InvalidRequest(f"{file} is larger than {MAX_FILE_BYTES >> 10} KiB; shorten it")
        return tomllib.loads(text.decode("utf-8-sig"))
    except OSError as error:
        raise InvalidRequest(f"{file} can't be read: {error.strerror}; mend or move it") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{file} is no valid TOML: {str(error)[:200]}; mend it") from None


def _check(file: Path, table: Table, command: click.Command, name: str) -> None:
    """Raises InvalidRequest for a key or a table that no command would ever read."""
    keys = settings_of(command)
    inner = command.commands if isinstance(command, click.Group) else {}
    where = f"{file}, in [{name}]" if name else str(file)
    for key, value in table.items():
        if isinstance(value, dict):
            if key not in inner or not settings_of(inner[key]):
                tables = {each: each for each in inner if settings_of(inner[each])}
                raise InvalidRequest(f"{where}: there is no table {_unknown(key, tables)}")
            _check(file, value, inner[key], f"{name}.{key}".lstrip("."))
        elif key not in keys:
            spelled = {name.lstrip("-"): k for k, each in keys.items() for name in each.opts}
            raise InvalidRequest(f"{where}: there is no setting {_unknown(key, spelled)}")
        elif keys[key].is_place and file == files()["project"]:
            raise InvalidRequest(
                f"{where}: {key} isn't taken from a project's file, which may be a stranger's. "
                f"Set it in {user_file()} or by {keys[key].envvar}, or give --{key}."
            )


def _unknown(key: str, known: dict[str, str]) -> str:
    """`known`: what it may be called -> its name."""
    if near := difflib.get_close_matches(key.lower().replace("_", "-"), known, n=1):
        return f"{key!r:.80}. Did you mean {known[near[0]]}?"
    return f"{key!r:.80}; there are {', '.join(sorted({*known.values()})) or 'none'}"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
