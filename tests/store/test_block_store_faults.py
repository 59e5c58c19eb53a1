"""Blocks on disk when a process is killed, a file damaged, a disk full: misses and no more."""

import errno
import functools
import os
import random
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from mlxpage.block_store import BlockStore, folder, format

ROOT = Path(__file__).parents[2]
FACTS = {"model": "tiny"}
KEYS = 60


def full(short: int, long: int):
    marks = [pytest.mark.full, pytest.mark.timeout(7200)]
    return pytest.mark.parametrize("count", [short, pytest.param(long, marks=marks)])


def files(path: Path) -> list[Path]:
    return [file for file in path.glob("*/*/*") if file.is_symlink() or not file.is_dir()]


# -- killed --

KILLED_LIMIT = 600_000

KILLED = """
import random, sys
sys.path.insert(0, sys.argv[1])
from test_block_store_faults import FACTS, KEYS, KILLED_LIMIT, killed_payload
from mlxpage.block_store import BlockStore
store = BlockStore(sys.argv[2], FACTS, KILLED_LIMIT, queue_bytes=200_000)
print("ready", flush=True)
while True:
    key = b"%d" % random.randrange(KEYS)
    if random.random() < 0.8:
        store.put(key, killed_payload(key))
    else:
        assert store.get(key) in (None, killed_payload(key))
"""


@functools.cache
def killed_payload(key: bytes) -> bytes:
    rng = random.Random(key)
    return rng.randbytes(rng.choice([0, 100, 5_000, 50_000]))


@full(30, 500)
def test_a_writer_may_be_killed_at_any_moment(tmp_path, count):
    rng, path = random.Random(4), tmp_path / "blocks"
    found = leftovers = 0
    for _ in range(count):
        command = [sys.executable, "-c", KILLED, Path(__file__).parent, path]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0, 0.06))
            process.kill()
        left = files(path)
        leftovers += sum(file.name.endswith(".tmp") for file in left)
        assert sum(file.stat().st_size for file in left) <= KILLED_LIMIT
        with BlockStore(path, FACTS, KILLED_LIMIT) as store:
            store.flush()
            assert store.why_not_writing is None
            left = files(path)
            assert not any(file.name.endswith(".tmp") for file in left)
            assert store.stats()["bytes"] == sum(file.stat().st_size for file in left)
            for number in range(KEYS):
                payload = store.get(b"%d" % number)
                assert payload in (None, killed_payload(b"%d" % number))
                found += payload is not None
            assert store.stats()["damaged"] == 0
    assert found > 5 * count and leftovers > 0


# -- damaged --

BLOCKS = {b"key %d" % n: random.Random(n).randbytes(2000 * n) for n in range(6)}
PATTERNS = BLOCKS | {b"zeros": bytes(9000), b"text": b"as long as it takes " * 400}


def resealed(content: bytes, **fields) -> bytes:
    """A file with other fields in its header and the checksum that they ask for."""
    names = ("magic", "version", "header", "key", "payload", "identity")
    size = format._FIELDS.size
    values = dict(zip(names, format._FIELDS.unpack(content[:size]), strict=True)) | fields
    head, rest = format._FIELDS.pack(*values.values()), content[format.HEADER_BYTES :]
    return head + format._checksum(head, b"", rest) + rest


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 20])):
        # Half of them in the header and the key.
        end = len(changed) if rng.random() < 0.5 else 90
        changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice([rng.randrange(len(content)), rng.randrange(100)])]


def lengthen(content: bytes, rng: random.Random) -> bytes:
    return content + rng.choice([b"\0", rng.randbytes(100), content])


def zero(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    end = rng.randint(start + 1, len(content))
    return content[:start] + bytes(end - start) + content[end:]


def scramble(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + rng.randbytes(len(content) - start)


def swap(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    other = rng.choice(others)
    at = rng.choice([0, format.HEADER_BYTES, len(content) // 2])
    return content[:at] + other[at:]


def reseal(content: bytes, rng: random.Random) -> bytes:
    """Whole by its checksum, and still not what is asked for."""
    rest = content[format.HEADER_BYTES :]
    return rng.choice(
        [
            lambda: resealed(content, version=rng.choice([0, 2, 65535])),
            lambda: resealed(content, identity=rng.randbytes(32)),
            lambda: resealed(content, magic=b"mlxpgblq"),
            lambda: resealed(content, header=rng.choice([0, 87, 89, 4096])),
            lambda: resealed(content, key=rng.choice([0, 4, 2**32 - 1])),
            lambda: resealed(content, payload=rng.choice([0, 2**31, 2**62, 2**64 - 1])),
            lambda: resealed(content[: format.HEADER_BYTES] + bytes([rest[0] ^ 1]) + rest[1:]),
        ]
    )()


CONTENT = [flip_bits, cut, lengthen, zero, scramble, swap, reseal]


def take_its_place(path: Path, rng: random.Random, aside: Path) -> None:
    """Puts something in the place of a file that is no file, or not this one."""
    content = path.read_bytes()
    path.unlink()
    match rng.randrange(6):
        case 0:
            path.mkdir()
        case 1:
            path.mkdir()
            (path / "x").write_bytes(content)
        case 2:  # to a sound block
            aside.write_bytes(content)
            path.symlink_to(aside)
        case 3:
            path.symlink_to(rng.choice(["/nowhere", path, path.parent, "/dev/zero"]))
        case 4:
            os.mkfifo(path)
        case 5:
            path.touch()


def mutate(path: Path, rng: random.Random, others: list[bytes], aside: Path) -> None:
    content = path.read_bytes()
    if rng.random() < 0.15:
        take_its_place(path, rng, aside)
        return
    changed = content
    while changed == content:
        kind = rng.choice(CONTENT)
        changed = kind(content, rng, others) if kind is swap else kind(content, rng)
    path.write_bytes(changed)


@full(500, 5000)
def test_a_damaged_file_is_a_miss_and_deleted(tmp_path, count):
    rng, keys = random.Random(5), list(PATTERNS)
    with (
        BlockStore(tmp_path / "blocks", FACTS, 10**9) as writer,
        BlockStore(tmp_path / "blocks", FACTS, 10**9) as reader,
    ):
        for key, payload in PATTERNS.items():
            writer.put(key, payload)
        writer.flush()
        others = [Path(writer._path(key)).read_bytes() for key in keys]
        for number in range(count):
            key, store = rng.choice(keys), rng.choice([writer, reader])
            path = Path(writer._path(key))
            mutate(path, rng, others, tmp_path / "aside")
            assert store.get(key) is None, number
            assert not os.path.lexists(path)
            assert key not in store
            other = rng.choice(keys)
            assert other == key or store.get(other) == PATTERNS[other]
            writer.get(key)  # it may not know yet
            assert writer.put(key, PATTERNS[key])
            writer.flush()
            assert writer.get(key) == PATTERNS[key]
        assert writer.stats()["damaged"] + reader.stats()["damaged"] == count
        on_disk = [file.stat().st_size for file in files(tmp_path / "blocks")]
        assert (writer.stats()["blocks"], writer.stats()["bytes"]) == (len(keys), sum(on_disk))
        assert writer.why_not_writing is None and reader.why_not_writing is not None


def test_damage_from_before_is_found_when_the_folder_is_opened(tmp_path):
    rng, path = random.Random(6), tmp_path / "blocks"
    for _ in range(20):
        with BlockStore(path, FACTS, 10**9) as store:
            for key, payload in PATTERNS.items():
                assert store.put(key, payload)
        damaged = rng.sample(list(PATTERNS), 3)
        others = [file.read_bytes() for file in files(path)]
        for number, key in enumerate(damaged):
            mutate(Path(store._path(key)), rng, others, tmp_path / f"aside {number}")
        with BlockStore(path, FACTS, 10**9) as store:
            store.flush()
            for key, payload in PATTERNS.items():
                assert store.get(key) == (None if key in damaged else payload)
            assert store.stats()["blocks"] == len(PATTERNS) - 3 == len(files(path))


def test_verify_removes_every_damaged_file(tmp_path):
    rng, path = random.Random(7), tmp_path / "blocks"
    for _ in range(20):
        with BlockStore(path, FACTS, 10**9) as store:
            for key, payload in PATTERNS.items():
                assert store.put(key, payload)
        others = [file.read_bytes() for file in files(path)]
        for number, key in enumerate(rng.sample(list(PATTERNS), 3)):
            mutate(Path(store._path(key)), rng, others, tmp_path / f"aside {number}")
        found = folder.verify(path)
        assert (found["blocks"], found["damaged"]) == (len(PATTERNS) - 3, 3)
        assert len(files(path)) == len(PATTERNS) - 3


@pytest.mark.parametrize("facts", [b"", b"[1]", b"{", b"\xff", b"[" * 10**5, None])
def test_damaged_facts_are_written_anew(tmp_path, facts):
    with BlockStore(tmp_path, FACTS, 10**9) as store:
        store.put(b"key", b"payload")
    path = tmp_path / store.identity.hex() / "facts.json"
    path.unlink()
    if facts is not None:
        path.write_bytes(facts)
    assert folder.stats(tmp_path)["identities"][0]["facts"] == {}
    with BlockStore(tmp_path, FACTS, 10**9) as store:
        assert store.get(b"key") == b"payload"
    assert folder.stats(tmp_path)["identities"][0]["facts"] == {"format": 1, **FACTS}


# -- a disk that is full, or not to be written to --


@pytest.fixture
def store(tmp_path):
    with BlockStore(tmp_path / "blocks", FACTS, 10**9) as store:
        store.put(b"before", b"payload")
        store.flush()
        yield store


def assert_only_reads(store: BlockStore, why: str) -> None:
    assert store.why_not_writing == why
    assert store.get(b"before") == b"payload"
    assert not store.put(b"later", b"x" * 10) and store.get(b"later") is None
    store.flush()
    assert not [file for file in files(Path(store.folder)) if file.name.endswith(".tmp")]
    assert store.stats()["queued_bytes"] == 0


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "utime", "open"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_what_can_not_be_written_ends_the_writing_with_one_warning(store, monkeypatch, call, code):
    real, calls = getattr(os, call), []

    def fails(*args, **options):
        if call == "open" and not args[1] & os.O_CREAT:
            return real(*args, **options)
        calls.append(args)
        if call == "write" and len(calls) < 3:
            return real(args[0], args[1][:10])  # as much as there's room for
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch, pytest.warns(RuntimeWarning) as told:
        patch.setattr(os, call, fails)
        for number in range(5):
            store.put(b"%d" % number, b"x" * 1000)
        store.flush()
    assert len(told) == 1
    assert store.folder in str(told[0].message) and os.strerror(code) in str(told[0].message)
    assert store.stats()["dropped"] == 5
    assert_only_reads(store, os.strerror(code))
    assert [store.get(b"%d" % number) for number in range(5)] == [None] * 5


def test_a_block_that_can_not_be_removed_ends_the_writing(tmp_path, monkeypatch):
    with BlockStore(tmp_path, FACTS, 1000) as store:
        store.put(b"before", b"payload")
        store.flush()
        monkeypatch.setattr(folder, "remove", lambda path: no(errno.EPERM))
        with pytest.warns(RuntimeWarning, match="not permitted"):
            store.put(b"large", b"x" * 900)
            store.flush()
        assert len(files(tmp_path)) == 1, "the limit holds"


def no(code: int):
    raise OSError(code, os.strerror(code))


def test_files_that_may_not_be_large_end_the_writing_and_nothing_else(tmp_path):
    code = (
        "import resource, sys, warnings; from mlxpage.block_store import BlockStore\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "with BlockStore(sys.argv[1], {'model': 'tiny'}, 10**9) as store:\n"
        "    store.put(b'before', b'payload'); store.flush()\n"
        "    store.put(b'large', b'x' * 200_000); store.flush()\n"
        "    print(store.why_not_writing, bytes(store.get(b'before')), store.get(b'large'))\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0
    assert ended.stdout == "File too large b'payload' None\n"
    assert ended.stderr.count("RuntimeWarning") == 1 and "Traceback" not in ended.stderr
    assert [file.name for file in files(tmp_path)] == [
        format.file_name(folder.identity_of(FACTS), b"before")
    ]


def test_where_warnings_are_errors_none_is_raised(tmp_path):
    (tmp_path / "file").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = BlockStore(tmp_path / "file", FACTS, 10**9)
    assert not store.put(b"key", b"payload")


@pytest.mark.parametrize("place", ["file", "file/blocks", "link"])
def test_a_folder_that_can_not_be_made_is_a_warning(tmp_path, place):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "link")
    with pytest.warns(RuntimeWarning, match="choose another folder") as told:
        store = BlockStore(tmp_path / place, FACTS, 10**9)
        assert not store.put(b"key", b"payload")
        assert store.get(b"key") is None and b"key" not in store
        store.flush()
        store.close()
    assert len(told) == 1


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOLCK])
def test_a_folder_that_is_not_to_be_written_to_is_read(tmp_path, monkeypatch, code):
    with BlockStore(tmp_path, FACTS, 10**9) as store:
        store.put(b"before", b"payload")
    monkeypatch.setattr(folder, "take_lock", lambda path: no(code))
    with pytest.warns(RuntimeWarning, match=os.strerror(code)) as told:
        store = BlockStore(tmp_path, FACTS, 10**9)
        assert_only_reads(store, os.strerror(code))
    assert len(told) == 1


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_file_that_can_not_be_read_now_is_a_miss_and_stays(store, monkeypatch, code):
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *args: no(code))
        assert store.get(b"before") is None
    assert store.get(b"before") == b"payload"
    assert store.stats()["damaged"] == 0


def test_a_damaged_file_that_can_not_be_removed_still_counts(store, monkeypatch):
    Path(store._path(b"before")).write_bytes(b"damaged")
    size = store.stats()["bytes"]
    with monkeypatch.context() as patch:
        patch.setattr(folder, "remove", lambda path: no(errno.EPERM))
        assert store.get(b"before") is None and store.stats()["bytes"] == size
    assert store.get(b"before") is None and store.stats()["bytes"] == 0


def test_a_file_that_somebody_deleted_is_a_miss_and_may_be_put_again(store):
    shutil.rmtree(store._home)
    assert store.get(b"before") is None and store.stats()["bytes"] == 0
    assert store.put(b"before", b"payload")
    store.flush()
    assert store.get(b"before") == b"payload"


def test_a_bug_in_the_writer_lets_nobody_wait(tmp_path, monkeypatch):
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    monkeypatch.setattr(BlockStore, "_write", lambda self, path: 1 / 0)
    with BlockStore(tmp_path, FACTS, 10**9) as store:
        store.put(b"key", b"payload")
        store.flush()
        assert store.why_not_writing == "the writer has failed" and not store.put(b"other", b"")


def test_what_a_dead_writer_left_is_removed(store):
    store.close()
    left = Path(store._path(b"before") + ".tmp")
    left.write_bytes(b"half")
    with BlockStore(store.folder, FACTS, 10**9) as again:
        again.flush()
        assert not left.exists() and again.get(b"before") == b"payload"
