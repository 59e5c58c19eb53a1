"""Blocks of K and V on the disk, found by their keys: the cache that outlives a process."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mlxpage.block_store import folder as folders
from mlxpage.block_store.format import (
    HEADER_BYTES,
    MAX_PAYLOAD,
    Damaged,
    file_name,
    make_folder,
    read_block,
    sync_folder,
    write_block,
)

OTHER_WRITER = "another engine writes"
# Who only reads asks again after so many seconds, when it has something to write.
_ASK_AGAIN = 30.0
_COUNTS = ("hits", "misses", "damaged", "written", "dropped", "evicted")


@dataclass(slots=True, eq=False)
class _File:
    size: int  # bytes, with header and key


class BlockStore:
    """A folder of blocks, never larger than its limit: what was put there, or touched, longest ago
    goes first.

    One store of a folder writes, on a thread of its own; others, in this process or another, read
    what it has written, and one of them takes its place when it's closed. The thread begins by
    listing the folder; until it has, and in a store that only reads, the file system itself is
    asked. All blocks count towards the limit, but only those of the same `facts` are ever found.

    It's a cache: what can't be read is a miss, what is damaged is deleted, and what can't be
    written ends the writing, with one RuntimeWarning. Nothing of that raises. All methods may be
    called from any thread.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        facts: dict[str, Any],
        limit_bytes: int,
        *,
        queue_bytes: int = 256_000_000,
    ):
        """`facts` says all that the payloads depend on (the model and its revision, dtype, block
        size, layout); JSON must be able to hold it. The limit counts whole files; at most
        `queue_bytes` of payloads wait to be written."""
        self.folder = os.path.abspath(folder)
        self.limit_bytes = limit_bytes
        self.queue_bytes = queue_bytes
        self.identity = folders.identity_of(facts)
        self.why_not_writing: str | None = None
        """None while this store writes."""
        self._facts = facts
        self._home = os.path.join(self.folder, self.identity.hex())
        self._changed = threading.Condition()  # guards all below
        self._files: OrderedDict[str, _File] | None = None  # by path, last touched last
        self._bytes = 0  # of them
        self._queue: dict[str, tuple[bytes, memoryview]] = {}
        self._queued_bytes = 0
        self._last_stamp = 0
        self._counts: Counter[str] = Counter()
        self._idle = True
        self._closing = False
        self._thread: threading.Thread | None = None
        self._ask_at = 0.0
        self._process = os.getpid()
        self._start_writing()

    def put(self, key: bytes, payload: Any) -> bool:
        """Whether the block is stored or will be. The payload is anything whose bytes can be read
        in order; it isn't copied, so nobody may change it before it is written.

        False if the writing has ended, the queue is full or the block is larger than the limit.
        """
        payload = memoryview(payload)
        payload = payload.cast("B") if payload.nbytes else memoryview(b"")
        path = self._path(key)
        with self._changed:
            self._ask_again()
            if path in self._queue or self._has_file(path):
                return True
            if (
                self.why_not_writing is not None
                or self._queued_bytes + len(payload) > self.queue_bytes
                or _file_bytes(key, payload) > self.limit_bytes
                or len(payload) > MAX_PAYLOAD
            ):
                self._counts["dropped"] += 1
                return False
            self._queue[path] = key, payload
            self._queued_bytes += len(payload)
            self._changed.notify_all()
            return True

    def may_write(self) -> bool:
        """Whether this store writes, or does from now on because nobody else does any more."""
        with self._changed:
            self._ask_again()
            return self.why_not_writing is None

    def room(self) -> int:
        """How many bytes more the queue takes."""
        with self._changed:
            return self.queue_bytes - self._queued_bytes

    def get(self, key: bytes) -> memoryview | None:
        """The payload that was put under `key`, byte for byte; None if there's none to be had."""
        path = self._path(key)
        with self._changed:
            if path in self._queue:
                self._counts["hits"] += 1
                # Once it's written, its owner may do with it what they like.
                return memoryview(bytes(self._queue[path][1]))
            file = self._files.get(path) if self._files is not None else None
            if file is None and self._files is not None:
                self._counts["misses"] += 1
                return None
        try:
            _, payload = read_block(path, self.identity, key)
        except (OSError, Damaged) as error:
            self._missed(path, file, error)
            return None
        with self._changed:
            self._counts["hits"] += 1
        return memoryview(payload)

    def touch(self, keys: Iterable[bytes]) -> None:
        """Makes these the last ones to go, the last of them the very last."""
        for path in map(self._path, keys):
            with self._changed:
                if self._files is not None:
                    if path not in self._files:
                        continue
                    self._files.move_to_end(path)
                stamp = self._stamp()
            with suppress(OSError):
                os.utime(path, ns=(stamp, stamp), follow_symlinks=False)

    def __contains__(self, key: bytes) -> bool:
        """Whether `get` would find it, unless it's damaged; no file is read."""
        path = self._path(key)
        with self._changed:
            return path in self._queue or self._has_file(path)

    def discard(self, key: bytes) -> None:
        """Takes a block away, whose content has proved wrong."""
        path = self._path(key)
        with self._changed:
            if (queued := self._queue.pop(path, None)) is not None:
                self._queued_bytes -= len(queued[1])
            if self._files is not None and path in self._files:
                self._forget(path)
            with suppress(OSError):
                folders.remove(path)

    def flush(self, seconds: float | None = None) -> None:
        """Waits until everything put so far is on the disk, so many seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._idle and not self._queue, seconds)

    def close(self, seconds: float | None = None) -> None:
        """Writes what is queued, for so many seconds at most, and ends the writing. What there is
        can still be read."""
        if os.getpid() != self._process:  # forked: the thread isn't here, nor who has the lock
            return
        with self._changed:
            self._closing = True
            self.why_not_writing = "closed"
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._queue, seconds)
            self._drop_queue()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> BlockStore:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def clear(self) -> None:
        """Removes the blocks of all identities. Raises OSError."""
        with self._changed:
            self._empty_queue()
            if self._files is not None:
                self._files.clear()
                self._bytes = 0
        folders.clear(self.folder)

    def stats(self) -> dict[str, Any]:
        """What there is, and counts since the store was opened. `blocks` and `bytes` are of all
        identities, and None in a store that only reads."""
        with self._changed:
            listed = self._files is not None
            return {
                "folder": self.folder,
                "why_not_writing": self.why_not_writing,
                "limit_bytes": self.limit_bytes,
                "blocks": len(self._files) if listed else None,
                "bytes": self._bytes if listed else None,
                "queued": len(self._queue),
                "queued_bytes": self._queued_bytes,
                **{name: self._counts[name] for name in _COUNTS},
            }

    # -- what is found --

    def _path(self, key: bytes) -> str:
        name = file_name(self.identity, key)
        return f"{self._home}/{name[:2]}/{name}"

    def _has_file(self, path: str) -> bool:
        return path in self._files if self._files is not None else os.path.lexists(path)

    def _missed(self, path: str, file: _File | None, error: Exception) -> None:
        with self._changed:
            self._counts["misses"] += 1
            self._counts["damaged"] += isinstance(error, Damaged)
            if self._files is not None and self._files.get(path) is not file:
                return  # it has been replaced, or the folder listed, meanwhile
            with suppress(OSError):  # what stays on the disk keeps its place in the count
                if isinstance(error, Damaged):
                    folders.remove(path)
                if isinstance(error, Damaged | FileNotFoundError) and file is not None:
                    self._forget(path)

    def _forget(self, path: str) -> None:
        self._bytes -= self._files.pop(path).size

    def _stamp(self) -> int:
        """Later than all before it, those of earlier processes too, whatever the clock does."""
        self._last_stamp = max(time.time_ns(), self._last_stamp + 1)
        return self._last_stamp

    # -- the writer --

    def _ask_again(self) -> None:
        if self.why_not_writing == OTHER_WRITER and time.monotonic() >= self._ask_at:
            self._start_writing()

    def _start_writing(self) -> None:
        self._ask_at = time.monotonic() + _ASK_AGAIN
        try:
            make_folder(self.folder)
            lock = folders.take_lock(self.folder)
        except OSError as error:
            self._stop_writing(error)
            return
        self.why_not_writing = OTHER_WRITER if lock is None else None
        if lock is not None:
            self._thread = threading.Thread(
                target=self._write_on, args=(lock,), name="mlxpage-blocks", daemon=True
            )
            self._idle = False
            try:
                self._thread.start()
            except RuntimeError as error:  # at the interpreter's end, say
                folders.release(lock)
                self._idle, self._thread = True, None
                self._stop_writing(OSError(str(error)))

    def _write_on(self, lock: int) -> None:
        try:
            self._list_files()
            while paths := self._next_paths():
                for path in paths:
                    self._write(path)
                # Once for all of a batch: each by itself takes up to a fifth of the time.
                for shard in {os.path.dirname(path) for path in paths}:
                    sync_folder(shard)
        except OSError as error:
            self._stop_writing(error)
        finally:
            folders.release(lock)
            with self._changed:
                self.why_not_writing = self.why_not_writing or "the writer has failed"
                self._drop_queue()
                self._idle = True
                self._changed.notify_all()

    def _list_files(self) -> None:
        folders.write_facts(self._home, self._facts)
        found = []
        for path, status in folders.walk(self.folder):
            if folders.is_block(path, status):
                found.append((status.st_mtime_ns, path, status.st_size))
            else:  # what a dead process was writing
                folders.remove(path)
        found.sort()
        for home in folders.homes(self.folder):
            if home != self._home:
                folders.remove_empty(home)
        with self._changed:
            self._files = OrderedDict((path, _File(size)) for _, path, size in found)
            self._bytes = sum(size for *_, size in found)
            self._last_stamp = max(self._last_stamp, found[-1][0] if found else 0)
        self._make_room(0)

    def _next_paths(self) -> list[str]:
        """Waits for something to write; nothing when there's none and the store is closed."""
        with self._changed:
            self._idle = not self._queue
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._queue or self._closing)
            self._idle = not self._queue
            return list(self._queue)

    def _write(self, path: str) -> None:
        with self._changed:
            if path not in self._queue:
                return  # cleared meanwhile
            queued = key, payload = self._queue[path]
            stamp = self._stamp()
        size = _file_bytes(key, payload)
        self._make_room(size)
        write_block(path, self.identity, key, payload, stamp)
        with self._changed:
            if self._queue.get(path) is not queued:  # discarded meanwhile
                folders.remove(path)
                return
            self._files[path] = _File(size)
            self._bytes += size
            self._counts["written"] += 1
            del self._queue[path]
            self._queued_bytes -= len(payload)

    def _make_room(self, size: int) -> None:
        victims = []
        with self._changed:
            while self._files and self._bytes + size > self.limit_bytes:
                path = next(iter(self._files))
                self._forget(path)
                victims.append(path)
            self._counts["evicted"] += len(victims)
        for path in victims:
            folders.remove(path)

    def _stop_writing(self, error: OSError) -> None:
        self.why_not_writing = reason = error.strerror or str(error)
        with suppress(RuntimeWarning):  # where warnings are errors, nobody here could handle it
            warnings.warn(
                f"No more blocks of the prefix cache are written to {self.folder}: {reason}. Those "
                "in it are still read. Free some space there, or choose another folder.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _drop_queue(self) -> None:
        self._counts["dropped"] += len(self._queue)
        self._empty_queue()

    def _empty_queue(self) -> None:
        self._queue.clear()
        self._queued_bytes = 0


def _file_bytes(key: bytes, payload: memoryview) -> int:
    return HEADER_BYTES + len(key) + len(payload)
