"""The folder of all blocks: what lies in it, and who writes.

    lock                     held by the one process that writes
    <identity>/facts.json    what the blocks beside it are of, for people
    <identity>/<2 digits>/<64 digits>        a block; the longer ago its time of change, the
                                             earlier it goes
    <identity>/<2 digits>/<64 digits>.tmp    one that is being written

Digits are hexadecimal. Whatever else lies there is left alone.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from typing import Any

from mlxpage.block_store.format import (
    TEMPORARY,
    VERSION,
    Damaged,
    make_folder,
    read_block,
)

FACTS = "facts.json"
_DIGEST = re.compile("[0-9a-f]{64}")
_SHARD = re.compile("[0-9a-f]{2}")
_FILE = re.compile("[0-9a-f]{64}(" + re.escape(TEMPORARY) + ")?")


def identity_of(facts: dict[str, Any]) -> bytes:
    """The digest of facts, which JSON can hold, and of the version of the files."""
    return sha256(_as_text(facts).encode()).digest()


def write_facts(home: str, facts: dict[str, Any]) -> None:
    make_folder(home)
    path = f"{home}/{FACTS}"
    if _read_text(path) != _as_text(facts):
        with open(path + TEMPORARY, "w", encoding="utf-8", opener=_private) as file:
            file.write(_as_text(facts))
        os.replace(path + TEMPORARY, path)


def take_lock(folder: str) -> int | None:
    """An open file that keeps other processes from writing until it is closed; None if another
    one has it. Raises OSError where nobody could write."""
    lock = os.open(f"{folder}/lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    except OSError:
        os.close(lock)
        raise
    return lock


def release(lock: int) -> None:
    # Closing it isn't enough: a child that this process has forked has it open too.
    fcntl.flock(lock, fcntl.LOCK_UN)
    os.close(lock)


def walk(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """What has the name and the place of a block or of one that is being written, whatever it is;
    links aren't followed. Raises OSError when something can't be listed."""
    for home in homes(folder):
        for shard in _folders(home, _SHARD):
            for entry in _entries(shard, _FILE):
                try:  # not `suppress`, of which a hundred thousand take their time
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                yield entry.path, status


def is_block(path: str, status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and not path.endswith(TEMPORARY)


def remove(path: str) -> None:
    """A file, or what has taken its place. Raises OSError if it's still there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError:  # a folder
        shutil.rmtree(path)


def remove_empty(home: str) -> None:
    """The folder of an identity, with its facts, if it has no blocks."""
    for shard in _folders(home, _SHARD):
        with suppress(OSError):
            os.rmdir(shard)
    if not _entries(home, _SHARD):
        for name in (FACTS, FACTS + TEMPORARY):
            with suppress(OSError):
                os.unlink(f"{home}/{name}")
        with suppress(OSError):
            os.rmdir(home)


def homes(folder: str) -> list[str]:
    """The folders of the identities."""
    return _folders(folder, _DIGEST)


def stats(folder: str) -> dict[str, Any]:
    """Counts blocks and their bytes, those of each identity too, without reading them.
    `last_used` is in seconds since 1970. Raises OSError."""
    found: dict[str, dict[str, Any]] = {
        home: {"identity": os.path.basename(home), "facts": _read_facts(home)}
        | {"blocks": 0, "bytes": 0, "last_used": None}
        for home in homes(folder)
    }
    for path, status in walk(folder):
        home = found.get(_home_of(path))
        if home is not None and is_block(path, status):
            home["blocks"] += 1
            home["bytes"] += status.st_size
            home["last_used"] = max(home["last_used"] or 0.0, status.st_mtime)
    identities = sorted(found.values(), key=lambda home: home["bytes"], reverse=True)
    return {
        "blocks": sum(home["blocks"] for home in identities),
        "bytes": sum(home["bytes"] for home in identities),
        "identities": identities,
    }


def clear(folder: str) -> dict[str, int]:
    """Removes all blocks; tells how many, and their bytes. Whoever uses them meanwhile finds
    nothing. Raises OSError."""
    removed, size = 0, 0
    try:
        lock = take_lock(folder)
    except FileNotFoundError:
        return {"blocks": 0, "bytes": 0}
    try:
        for path, status in walk(folder):
            if is_block(path, status):
                removed += 1
                size += status.st_size
            elif lock is None:
                continue  # it's being written
            remove(path)
        if lock is not None:
            for home in homes(folder):
                remove_empty(home)
    finally:
        if lock is not None:
            release(lock)
    return {"blocks": removed, "bytes": size}


def verify(folder: str) -> dict[str, int]:
    """Reads every block of every identity, and removes those that aren't whole. Tells how many
    are, their bytes, how many were removed and how many couldn't be read. Raises OSError."""
    counts = {"blocks": 0, "bytes": 0, "damaged": 0, "unreadable": 0}
    for path, status in walk(folder):
        if path.endswith(TEMPORARY):
            continue
        try:
            read_block(path, bytes.fromhex(os.path.basename(_home_of(path))))
        except Damaged:
            remove(path)
            counts["damaged"] += 1
        except FileNotFoundError:
            continue
        except OSError:
            counts["unreadable"] += 1
        else:
            counts["blocks"] += 1
            counts["bytes"] += status.st_size
    return counts


def _home_of(path: str) -> str:
    return os.path.dirname(os.path.dirname(path))


def _entries(folder: str, name: re.Pattern) -> list[os.DirEntry]:
    """Of a folder that may be gone by now, or never was one."""
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if name.fullmatch(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _folders(folder: str, name: re.Pattern) -> list[str]:
    entries = _entries(folder, name)
    return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _as_text(facts: dict[str, Any]) -> str:
    return json.dumps({"format": VERSION, **facts}, indent=2, sort_keys=True) + "\n"


def _read_text(path: str) -> str | None:
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(2**16)
    except (OSError, UnicodeDecodeError):
        return None


def _read_facts(home: str) -> dict[str, Any]:
    try:
        facts = json.loads(_read_text(f"{home}/{FACTS}") or "")
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}
