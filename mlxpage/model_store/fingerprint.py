"""Which model a folder holds, without reading all of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from mlxpage.model_store.check import ADAPTER_FILES, weight_files

_PIECES = 4
_PIECE_BYTES = 1024


def fingerprint(folder: Path, adapter: Path | None = None) -> str:
    """A digest of a model's configuration and weights, and its adapter's, in hex. Of weights it
    takes the header, four pieces of each tensor, and the file's size and time of change: a training
    may leave most of a tensor as it was. The copy of a model, with another time, is another one.

    Raises OSError or ValueError for files that can't be read.
    """
    configs = sorted(path for path in folder.glob("*.json") if path.is_file())
    weights = weight_files(folder)
    if adapter is not None:
        configs.append(adapter / ADAPTER_FILES[0])
        weights.append(adapter / ADAPTER_FILES[1])
    digest = sha256()
    for file in configs:
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    for file in weights:
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns} ".encode())
        for part in _parts(file):
            digest.update(part)
    return digest.hexdigest()


def _parts(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        header = opened.read(int.from_bytes(opened.read(8), "little"))
        yield header
        start = opened.tell()
        for name, tensor in sorted(json.loads(header).items()):
            if name == "__metadata__":
                continue
            first, last = tensor["data_offsets"]
            last_piece = max(first, last - _PIECE_BYTES)
            for piece in range(_PIECES):
                at = first + (last_piece - first) * piece // (_PIECES - 1)
                opened.seek(start + at)
                yield opened.read(min(_PIECE_BYTES, last - at))
