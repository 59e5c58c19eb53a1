"""Blocks on disk: how fast they are written and read, and what a checksum and `fsync` cost.

Why: a block that is read back must cost less than computing it again, and one that is written must
not hold up the engine's thread.

    python benchmarks/block_store.py [--folder .] [--blocks 200] [--files 100000] [--repeats 5]

- "put" is the caller's own time; "written" counts until `flush` returns, and "get" reads what the
  system still holds in memory: the disk's own time comes on top.
- Other checksums take SHA-256's place in turns, in the same run.
- "raw" writes and reads the same files without checksum, and with each kind of `fsync`.
- "open" is the listing of a folder of many small blocks, until the first can be written.

Medians. The last line is JSON.
"""

import argparse
import hashlib
import json
import os
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from about import about

from mlxpage.block_store import BlockStore, format

SIZES = (400_000, 2_000_000)
PLENTY = 10**12


class Crc32:
    digest_size = 32

    def __init__(self, data: bytes):
        self.value = zlib.crc32(data)

    def update(self, data) -> None:
        self.value = zlib.crc32(data, self.value)

    def digest(self) -> bytes:
        return self.value.to_bytes(32, "little")


CHECKSUMS = {
    "sha256": hashlib.sha256,
    "blake2b": lambda data: hashlib.blake2b(data, digest_size=32),
    "crc32": Crc32,
}


def store_row(folder: Path, size: int, blocks: int, checksum: str) -> dict:
    """MB/s of a store with this checksum, and microseconds of a `put` on the caller's thread."""
    payloads = [os.urandom(size) for _ in range(8)]
    real = format._checksum
    format._checksum = lambda fields, key, payload: digest(
        CHECKSUMS[checksum], fields, key, payload
    )
    try:
        with BlockStore(folder / "store", {}, PLENTY, queue_bytes=PLENTY) as store:
            store.flush()
            begin = time.perf_counter()
            for number in range(blocks):
                store.put(number.to_bytes(164, "little"), payloads[number % 8])
            put = time.perf_counter() - begin
            store.flush()
            written = time.perf_counter() - begin
            begin = time.perf_counter()
            for number in range(blocks):
                assert store.get(number.to_bytes(164, "little")) is not None
            read = time.perf_counter() - begin
    finally:
        format._checksum = real
        shutil.rmtree(folder / "store")
    each = size * blocks / 1e6
    return {"written": each / written, "get": each / read, "put_us": put / blocks * 1e6}


def digest(make: Callable, fields: bytes, key: bytes, payload) -> bytes:
    checksum = make(fields)
    checksum.update(key)
    checksum.update(payload)
    return checksum.digest()


def raw_row(folder: Path, size: int, blocks: int, sync: str) -> dict:
    """MB/s of plain files in the same folders, with `sync`: nothing, files, "files, folders"
    after each, or "files, batch" with the folders once at the end."""
    payload = os.urandom(size)
    names = [hashlib.sha256(bytes([n % 256, n // 256])).hexdigest() for n in range(blocks)]
    for name in names:
        (folder / "raw" / name[:2]).mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    for name in names:
        path = f"{folder}/raw/{name[:2]}/{name}"
        file = os.open(path + ".tmp", os.O_CREAT | os.O_WRONLY)
        os.write(file, payload)
        if sync != "nothing":
            os.fsync(file)
        os.close(file)
        os.replace(path + ".tmp", path)
        if sync == "files, folders":
            format.sync_folder(os.path.dirname(path))
    if sync == "files, batch":
        for shard in {name[:2] for name in names}:
            format.sync_folder(f"{folder}/raw/{shard}")
    written = time.perf_counter() - begin
    shutil.rmtree(folder / "raw")
    return {"written": size * blocks / 1e6 / written}


def open_seconds(folder: Path, files: int, repeats: int) -> list[float]:
    home = folder / "many" / ("a" * 64)
    for number in range(files):
        name = hashlib.sha256(number.to_bytes(4, "little")).hexdigest()
        if number < 256 * 40:
            (home / name[:2]).mkdir(parents=True, exist_ok=True)
        (home / name[:2] / name).touch()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        with BlockStore(folder / "many", {}, PLENTY) as store:
            store.flush()
            seconds.append(time.perf_counter() - begin)
            assert store.stats()["blocks"] == files
    shutil.rmtree(folder / "many")
    return seconds


def medians(rows: list[dict]) -> dict:
    return {name: round(statistics.median(row[name] for row in rows), 1) for name in rows[0]}


def in_turns(arms: dict[str, Callable[[], dict]], repeats: int) -> dict[str, dict]:
    rows = [{name: arm() for name, arm in arms.items()} for _ in range(repeats)]
    return {name: medians([row[name] for row in rows]) for name in arms}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default=None)
    parser.add_argument("--blocks", type=int, default=200)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    report = about("block_store.py")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        for size in SIZES:
            print(f"\n{size / 1e6:.1f} MB blocks, {given.blocks} of them, MB/s")
            arms = {
                checksum: lambda checksum=checksum, size=size: store_row(
                    folder, size, given.blocks, checksum
                )
                for checksum in CHECKSUMS
            } | {
                f"raw, sync {sync}": lambda sync=sync, size=size: raw_row(
                    folder, size, given.blocks, sync
                )
                for sync in ("nothing", "files", "files, folders", "files, batch")
            }
            report[f"{size}"] = in_turns(arms, given.repeats)
            for arm, row in report[f"{size}"].items():
                print(f"  {arm:26}", "  ".join(f"{key} {value:,.1f}" for key, value in row.items()))
        if given.files:
            seconds = open_seconds(folder, given.files, given.repeats)
            report["open_s"] = round(statistics.median(seconds), 3)
            print(f"\nopening {given.files:,} files: {report['open_s']:.2f} s")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
