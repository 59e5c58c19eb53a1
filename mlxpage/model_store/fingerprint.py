"""Which model a folder holds, without reading all of it."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

_SAMPLES = 64
_SAMPLE_BYTES = 4096


def fingerprint(folder: Path) -> str:
    """A digest of a model's configuration and weights, in hex: of all headers and sizes, and of 64
    pieces of each file of weights. Two trainings of one architecture differ in nearly every
    number, so they differ in those."""
    digest = sha256()
    for file in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            if file.suffix == ".json":
                digest.update(opened.read())
                continue
            header = int.from_bytes(opened.read(8), "little")
            digest.update(opened.read(min(header, size)))
            for sample in range(_SAMPLES):
                opened.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()
