"""Lets the other processes of a user watch an engine, over a local socket: `mlxpage top` does.

    who watches             the engine's monitor
      connects                -> {"schema": "mlxpage.top/1", "engine": "4242-1", "model": ...}
      a line, of whatever     -> {the same, "groups": [...], "sequences": [...], "stats": {...}}

Each line asks for one snapshot, which is taken between two steps, and answered by one line of JSON.
Who watches can change nothing, and is told nothing of what is generated. Only this user can
connect: the socket lies in a folder that is closed to everybody else.
"""

from __future__ import annotations

import itertools
import json
import os
import selectors
import socket
import stat
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxpage import __version__, snapshot

if TYPE_CHECKING:
    from mlxpage.engine import Engine

SCHEMA = "mlxpage.top/1"
MOST_BYTES_OF_PATH = 103  # of a socket on macOS; on Linux it's four more
SEND_SECONDS = 1.0  # for a snapshot that nobody takes off the line
HELLO_SECONDS = 2.0  # a monitor needs no step for its first line

Call = Callable[[Callable[["Engine"], dict[str, Any]]], "Future[dict[str, Any]]"]

_numbers = itertools.count(1)


def folder() -> Path:
    """Where the sockets are: `run` in the user's cache, which is the same for all processes of a
    user, unlike folders for temporary files. `MLXPAGE_RUNTIME` names another one."""
    import platformdirs

    chosen = os.environ.get("MLXPAGE_RUNTIME")
    if chosen:
        return Path(chosen).expanduser()
    return Path(platformdirs.user_cache_dir("mlxpage")) / "run"


# -- in the engine's process --


def start(model: str, call: Call) -> Monitor | None:
    """A monitor for an engine of `model`; `call` runs a function on the engine's thread, between
    steps. A warning, and None, where there is no place for a socket."""
    try:
        return Monitor(model, call)
    except (OSError, RuntimeError) as error:  # no place for a socket, no thread to be had
        with suppress(RuntimeWarning):  # where warnings are errors, the engine serves all the same
            warnings.warn(
                f"mlxpage top can't show this engine: {error}. Set MLXPAGE_RUNTIME to a folder of "
                "your own that may hold a socket.",
                RuntimeWarning,
                stacklevel=2,
            )
        return None


def remove_sockets() -> None:
    """Those of this process, which is about to end without closing its engines."""
    for path in folder().glob(f"{os.getpid()}-*.sock"):
        path.unlink(missing_ok=True)


class Monitor:
    """The end of an engine: a thread that sleeps until somebody connects or asks."""

    def __init__(self, model: str, call: Call):
        """Raises OSError if there can be no socket."""
        name = f"{os.getpid()}-{next(_numbers)}"
        self.path = _own_folder() / f"{name}.sock"
        self._call = call
        self._hello = {
            "schema": SCHEMA,
            "engine": name,
            "pid": os.getpid(),
            "model": model,
            "mlxpage": __version__,
            "started": time.time(),
        }
        self._listener = _listen(self.path)
        # What wakes the thread, beside those who watch.
        self._bell, self._ears = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, self._greet)
        self._selector.register(self._ears, selectors.EVENT_READ, self._answer)
        self._is_closed = False
        self._asking: set[socket.socket] = set()
        self._snapshot: Future[dict[str, Any]] | None = None
        self._thread = threading.Thread(target=self._run, name="mlxpage-monitor", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and removes the socket; doesn't wait for a snapshot."""
        self._is_closed = True
        self._ring()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._is_closed:
                for key, _ in self._selector.select():
                    if key.fileobj.fileno() >= 0:  # not dropped since it was selected
                        key.data(key.fileobj)
        finally:
            self.path.unlink(missing_ok=True)
            for key in list(self._selector.get_map().values()):
                with suppress(OSError):  # who listens has no connection
                    key.fileobj.shutdown(socket.SHUT_RDWR)  # a forked child has it open, too
                key.fileobj.close()
            self._selector.close()
            self._bell.close()

    def _greet(self, listener: socket.socket) -> None:
        try:
            watcher, _ = listener.accept()
        except OSError:  # no more files may be open, or whoever it was has gone
            time.sleep(SEND_SECONDS)
            return
        watcher.settimeout(SEND_SECONDS)
        self._selector.register(watcher, selectors.EVENT_READ, self._listen_to)
        self._send(watcher, self._hello)

    def _listen_to(self, watcher: socket.socket) -> None:
        try:
            heard = watcher.recv(4096)
        except OSError:
            heard = b""
        if not heard:
            self._drop(watcher)
        elif b"\n" in heard:
            self._asking.add(watcher)
            if self._snapshot is None:
                self._snapshot = self._call(snapshot.take)
                self._snapshot.add_done_callback(self._ring)

    def _ring(self, _=None) -> None:
        with suppress(OSError):  # the thread has ended
            self._bell.send(b"!")

    def _answer(self, ears: socket.socket) -> None:
        ears.recv(4096)
        if self._is_closed or self._snapshot is None or not self._snapshot.done():
            return
        try:
            taken = self._hello | self._snapshot.result()
        except Exception:  # the engine is closed, or can't be read: who watches is told by the end
            self._is_closed = True
            return
        asking, self._asking, self._snapshot = self._asking, set(), None
        for watcher in asking:
            self._send(watcher, taken)

    def _send(self, watcher: socket.socket, record: dict[str, Any]) -> None:
        try:
            watcher.sendall(json.dumps(record).encode() + b"\n")
        except OSError:
            self._drop(watcher)

    def _drop(self, watcher: socket.socket) -> None:
        self._asking.discard(watcher)
        self._selector.unregister(watcher)
        watcher.close()


def _own_folder() -> Path:
    place = folder()
    place.parent.mkdir(parents=True, exist_ok=True)
    place.mkdir(mode=0o700, exist_ok=True)
    found = os.lstat(place)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(f"{place} is no folder of this user")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise PermissionError(f"{place} is open to other users (mode {mode:o}, instead of 700)")
    return place


def _listen(path: Path) -> socket.socket:
    if (length := len(os.fsencode(path))) > MOST_BYTES_OF_PATH:
        raise OSError(f"{path} has {length} bytes, a socket's path {MOST_BYTES_OF_PATH} at most")
    begun = path.with_suffix(".new")  # who finds a socket that doesn't listen yet takes it for dead
    begun.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(begun))
        os.chmod(begun, 0o600)
        listener.listen()
        os.replace(begun, path)
    except BaseException:
        listener.close()
        begun.unlink(missing_ok=True)
        raise
    return listener


# -- in the process that watches --


def engines() -> list[Watch]:
    """All engines of this user that run and have a monitor of this schema, oldest first. Sockets of
    those that have ended without a word are removed."""
    found = []
    for path in folder().glob("*.sock"):
        try:
            found.append(Watch(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)
        except (OSError, EOFError, ValueError):  # it ends just now, is stopped, or of another kind
            continue
    return sorted(found, key=lambda watch: watch.hello["started"])


class Watch:
    """The other end."""

    def __init__(self, path: Path):
        """Raises OSError if it can't be reached, EOFError if it ends meanwhile, and ValueError if
        it isn't of this schema, as an engine of another version may be."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._heard = bytearray()
        try:
            self._socket.settimeout(HELLO_SECONDS)
            self._socket.connect(str(path))
            hello = self.receive(HELLO_SECONDS)
            if hello is None:
                raise TimeoutError(f"{path} doesn't answer")
            if not isinstance(hello, dict) or hello.get("schema") != SCHEMA:
                raise ValueError(f"{path} is no monitor of {SCHEMA}")
            self.hello = hello
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def ask(self) -> None:
        """For a snapshot, which `receive` returns when it's there. Raises EOFError if the engine
        has ended."""
        try:
            self._socket.sendall(b"\n")
        except OSError:
            raise EOFError from None

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """The next line; None if it hasn't come after so many seconds. Raises EOFError if the
        engine has ended."""
        end = time.monotonic() + seconds
        while b"\n" not in self._heard:
            self._socket.settimeout(max(0.0, end - time.monotonic()))
            try:
                heard = self._socket.recv(2**20)
            except (TimeoutError, BlockingIOError):
                return None
            except OSError:
                raise EOFError from None
            if not heard:
                raise EOFError
            self._heard += heard
        line, _, self._heard = self._heard.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        self._socket.close()
