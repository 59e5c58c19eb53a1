"""A block as a file: a header, the key, the payload, and nothing after it.

Little-endian, 88 bytes of header:

    8   magic             b"mlxpgblk"
    2   version           1
    2   header length     88
    4   key length        bytes
    8   payload length    bytes
    32  identity          what the payload is of: SHA-256 of a model's facts
    32  checksum          SHA-256 of the 56 bytes before it, the key and the payload

The key is kept whole, so that a match is one of every byte and not of a digest. The payload isn't
aligned: it is read into a buffer of its own, and a mapped file that somebody shortens would end
the process.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from contextlib import suppress
from hashlib import sha256

MAGIC = b"mlxpgblk"
VERSION = 1
MAX_PAYLOAD = 2**31 - 2**16
"""Bytes; what one read gives on every system."""
TEMPORARY = ".tmp"
_FIELDS = struct.Struct("<8sHHIQ32s")
HEADER_BYTES = _FIELDS.size + sha256().digest_size
# How opening what is no file, or only points at one, fails.
_NO_FILE = {errno.ELOOP, errno.ENXIO, errno.EISDIR}


class Damaged(Exception):
    """The file isn't what was written for this key; never leaves this package."""


def file_name(identity: bytes, key: bytes) -> str:
    return sha256(identity + key).hexdigest()


def write_block(path: str, identity: bytes, key: bytes, payload: memoryview, stamp: int) -> None:
    """Puts a block in its place, whole or not at all: what it holds is on the disk before it gets
    its name. Its time of change is `stamp`, in nanoseconds. Raises OSError."""
    fields = _FIELDS.pack(MAGIC, VERSION, HEADER_BYTES, len(key), len(payload), identity)
    head = fields + _checksum(fields, key, payload) + key
    temporary = path + TEMPORARY
    file = _create(temporary)
    try:
        try:
            _write_all(file, memoryview(head))
            _write_all(file, payload)
            os.utime(file, ns=(stamp, stamp))
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def read_block(path: str, identity: bytes, key: bytes | None = None) -> tuple[bytes, bytes]:
    """The key and payload of a file, when all of it is as it was written.

    Without a `key`, any that fits the file's name will do. Raises Damaged when something is off,
    and OSError when the file isn't there or can't be read.
    """
    # A link isn't followed, and a pipe isn't waited for.
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise Damaged from None
        raise
    try:
        return _read(file, os.path.basename(path), identity, key)
    finally:
        os.close(file)


def sync_folder(path: str) -> None:
    """Puts the names in a folder on the disk, where the file system can do that."""
    with suppress(OSError):
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def make_folder(path: str) -> None:
    """With those above it that aren't there; nobody else may look into them. `path` is absolute."""
    if not os.path.isdir(path):
        make_folder(os.path.dirname(path))
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)


def _read(file: int, name: str, identity: bytes, key: bytes | None) -> tuple[bytes, bytes]:
    status = os.fstat(file)
    head = os.read(file, HEADER_BYTES) if stat.S_ISREG(status.st_mode) else b""
    if len(head) != HEADER_BYTES:
        raise Damaged
    fields, checksum = head[: _FIELDS.size], head[_FIELDS.size :]
    magic, version, header_bytes, key_bytes, payload_bytes, owner = _FIELDS.unpack(fields)
    if (magic, version, header_bytes, owner) != (MAGIC, VERSION, HEADER_BYTES, identity):
        raise Damaged
    # Before anything is read by these lengths, they must be the file's.
    if HEADER_BYTES + key_bytes + payload_bytes != status.st_size or payload_bytes > MAX_PAYLOAD:
        raise Damaged
    found = os.read(file, key_bytes)
    payload = os.read(file, payload_bytes)
    if key is None and file_name(identity, found) != name:
        raise Damaged
    if key is not None and found != key:
        raise Damaged
    if len(payload) != payload_bytes or checksum != _checksum(fields, found, payload):
        raise Damaged
    return found, payload


def _checksum(fields: bytes, key: bytes, payload: memoryview | bytes) -> bytes:
    checksum = sha256(fields)
    checksum.update(key)
    checksum.update(payload)
    return checksum.digest()


def _create(path: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o600)
    except FileNotFoundError:
        make_folder(os.path.dirname(path))
        return os.open(path, flags, 0o600)


def _write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]
