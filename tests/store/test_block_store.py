"""Blocks on disk: what is put is found, by whom, and what has to go for it."""

import array
import os
import random
import stat
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import mlxpage.block_store
from mlxpage.block_store import BlockStore, folder, format, store

ROOT = Path(__file__).parents[2]
FACTS = {"model": "tiny", "dtype": "float16", "block_size": 16}
PLENTY = 10**9


@pytest.fixture
def make_store(tmp_path):
    """make_store(facts=FACTS, limit=PLENTY, **options): a store in the test's folder, listed and
    ready to write unless another one writes; closed at the end."""
    made = []

    def make(facts=FACTS, limit=PLENTY, **options) -> BlockStore:
        made.append(BlockStore(tmp_path / "blocks", facts, limit, **options))
        made[-1].flush()
        return made[-1]

    yield make
    for each in made:
        each.close()


def files(path: Path) -> list[Path]:
    """Everything in a folder of blocks but the lock and the facts."""
    found = [file for file in path.rglob("*") if file.is_symlink() or not file.is_dir()]
    return [file for file in found if file.name not in ("lock", "facts.json")]


def put_all(into: BlockStore, blocks: dict) -> None:
    for key, payload in blocks.items():
        assert into.put(key, payload)
    into.flush()


def held(of: BlockStore, keys) -> list:
    return [key for key in keys if key in of]


def letters(size: int, of: str = "abcdefgh") -> dict[bytes, bytes]:
    """Blocks whose files are of `size` bytes."""
    return {c.encode(): c.encode() * (size - format.HEADER_BYTES - 1) for c in of}


def python(code: str, *arguments, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        **{"cwd": ROOT, "timeout": 60, "capture_output": True, "text": True, **options},
    )


# -- what is put is found --


def random_blocks(count: int, seed: int) -> dict[bytes, bytes]:
    rng = random.Random(seed)
    sizes = [0, 1, 7, 4095, 4096, 4097, 300_000]
    return {
        rng.randbytes(rng.choice([1, 32, 96, 160, 164]))
        + index.to_bytes(2, "little"): rng.randbytes(
            rng.choice(sizes) if index % 50 == 0 else rng.randrange(3000)
        )
        for index in range(count)
    }


def test_every_payload_comes_back_as_it_was_put_and_after_a_restart_too(make_store):
    blocks = random_blocks(2000, seed=1)
    first = make_store()
    put_all(first, blocks)
    assert all(first.get(key) == payload for key, payload in blocks.items())
    first.close()
    second = make_store()
    assert all(key in second and second.get(key) == payload for key, payload in blocks.items())
    stats = second.stats()
    assert (stats["blocks"], stats["hits"], stats["misses"]) == (2000, 2000, 0)
    assert stats["bytes"] == sum(
        len(key) + len(payload) + format.HEADER_BYTES for key, payload in blocks.items()
    )


@pytest.mark.parametrize(
    "payload",
    [
        bytearray(b"xyz"),
        memoryview(b"abcdef")[1:4],
        array.array("i", [1, -2, 3]),
        np.arange(24, dtype=np.float16).reshape(2, 3, 4),
        np.zeros((0, 3), np.float32),
        b"",
    ],
    ids=lambda payload: type(payload).__name__,
)
def test_a_payload_is_anything_that_has_bytes(make_store, payload):
    blocks = make_store()
    put_all(blocks, {b"key": payload})
    assert blocks.get(b"key") == bytes(payload)


def test_what_is_put_is_there_before_it_is_written(make_store, monkeypatch):
    blocks, go_on = make_store(), threading.Event()
    real = store.write_block
    monkeypatch.setattr(store, "write_block", lambda *args: go_on.wait(30) and real(*args))
    payload = bytearray(b"payload")
    assert blocks.put(b"key", payload) and b"key" in blocks
    early = blocks.get(b"key")
    assert early == b"payload" and not files(Path(blocks.folder))
    go_on.set()
    blocks.flush()
    payload[:] = b"changed"  # its owner may, now that it's written
    assert early == blocks.get(b"key") == b"payload"


def test_a_key_is_written_once(make_store):
    blocks = make_store()
    put_all(blocks, {b"key": b"first"})
    put_all(blocks, {b"key": b"second"})
    assert blocks.get(b"key") == b"first"
    blocks.close()
    again = make_store()
    put_all(again, {b"key": b"third"})
    assert (again.get(b"key"), again.stats()["written"]) == (b"first", 0)


def test_keys_that_begin_alike_are_different_keys(make_store):
    blocks = make_store()
    put_all(blocks, {b"a": b"1", b"aa": b"2", b"": b"3", b"a\0": b"4"})
    assert [blocks.get(key) for key in (b"a", b"aa", b"", b"a\0")] == [b"1", b"2", b"3", b"4"]


def test_blocks_of_other_facts_are_not_found(make_store):
    one = make_store()
    put_all(one, {b"key": b"float16"})
    one.close()
    other = make_store(FACTS | {"dtype": "float32"})
    assert b"key" not in other and other.get(b"key") is None
    put_all(other, {b"key": b"float32"})
    other.close()
    assert make_store().get(b"key") == b"float16"


def test_the_facts_of_an_identity_lie_beside_its_blocks(make_store):
    blocks = make_store()
    put_all(blocks, {b"key": b"payload"})
    (found,) = folder.stats(blocks.folder)["identities"]
    assert found["facts"] == {"format": 1, **FACTS}
    assert (found["blocks"], found["identity"]) == (1, blocks.identity.hex())
    assert abs(found["last_used"] - time.time()) < 60


def test_nobody_else_may_look_into_it(make_store, tmp_path):
    mask = os.umask(0)
    try:
        put_all(make_store(), {b"%d" % n: b"payload" for n in range(80)})  # some in one folder
    finally:
        os.umask(mask)
    for path in [tmp_path / "blocks", *(tmp_path / "blocks").rglob("*")]:
        wanted = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


# -- the limit --


@pytest.fixture
def most_bytes(monkeypatch):
    """The most that a folder held at the moments when a file was complete, or had its name."""
    seen = [0]
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def watched(*args, real=real):
            result = real(*args)
            seen[0] = max(seen[0], sum(file.stat().st_size for file in files(watched.path)))
            return result

        monkeypatch.setattr(os, name, watched)
        seen.append(watched)

    def watch(path) -> list[int]:
        for watched in seen[1:]:
            watched.path = Path(path)
        return seen

    return watch


def test_the_folder_is_never_larger_than_its_limit(make_store, most_bytes, tmp_path):
    seen = most_bytes(tmp_path / "blocks")
    blocks, rng = make_store(limit=100_000), random.Random(2)
    for number in range(120):
        assert blocks.put(number.to_bytes(2, "little"), rng.randbytes(rng.randrange(30_000)))
        if number % 7 == 0:
            blocks.flush()
    blocks.flush()
    assert 70_000 < seen[0] <= 100_000
    stats = blocks.stats()
    assert stats["bytes"] == sum(file.stat().st_size for file in files(tmp_path / "blocks"))
    assert stats["evicted"] == 120 - stats["blocks"] > 80


def test_a_block_that_is_larger_than_the_limit_is_dropped(make_store):
    blocks = make_store(limit=1000)
    put_all(blocks, letters(500, "ab"))
    assert not blocks.put(b"c", b"c" * 1000)
    assert held(blocks, letters(500, "abc")) == [b"a", b"b"] and blocks.stats()["dropped"] == 1
    assert blocks.put(b"d", b"d" * (1000 - format.HEADER_BYTES - 1))


def test_what_was_touched_longest_ago_goes_first(make_store):
    blocks = make_store(limit=3000)
    put_all(blocks, letters(1000, "abc"))
    blocks.touch([b"a", b"is not there"])
    assert blocks.get(b"b") is not None, "who reads them says in which order they go"
    put_all(blocks, letters(1000, "d"))
    assert held(blocks, letters(1000)) == [b"a", b"c", b"d"]


def test_the_order_outlives_the_process(make_store):
    with make_store(limit=4000) as blocks:
        put_all(blocks, letters(1000, "abcd"))
        blocks.touch([b"c", b"a"])
    again = make_store(limit=4000)
    put_all(again, letters(1000, "efg"))
    assert held(again, letters(1000)) == [b"a", b"e", b"f", b"g"]


def test_who_only_reads_touches_too(make_store):
    writes, reads = make_store(limit=3000), make_store(limit=3000)
    put_all(writes, letters(1000, "abc"))
    reads.touch([b"a", b"is not there"])
    writes.close()
    again = make_store(limit=3000)
    put_all(again, letters(1000, "d"))
    assert held(again, letters(1000)) == [b"a", b"c", b"d"]


def test_the_order_is_kept_by_a_clock_that_jumps_back(make_store, monkeypatch):
    now = time.time_ns()
    with make_store(limit=3000) as blocks:
        monkeypatch.setattr(time, "time_ns", lambda: now + 10**18)
        put_all(blocks, letters(1000, "ab"))
        monkeypatch.setattr(time, "time_ns", lambda: now)
        put_all(blocks, letters(1000, "c"))
    with make_store(limit=3000) as blocks:
        monkeypatch.setattr(time, "time_ns", lambda: now - 10**18)
        blocks.touch([b"a"])
    again = make_store(limit=3000)
    put_all(again, letters(1000, "de"))
    assert held(again, letters(1000)) == [b"a", b"d", b"e"]


def test_blocks_of_other_facts_count_and_go_like_others(make_store):
    with make_store({"model": "old"}, limit=3000) as other:
        put_all(other, letters(1000, "abc"))
    with make_store(limit=3000) as blocks:
        put_all(blocks, letters(1000, "de"))
        assert blocks.stats()["blocks"] == 3
    assert held(make_store({"model": "old"}, limit=3000), letters(1000)) == [b"c"]


def test_a_smaller_limit_holds_when_the_folder_is_opened(make_store):
    with make_store() as blocks:
        put_all(blocks, letters(1000))
    again = make_store(limit=2500)
    assert held(again, letters(1000)) == [b"g", b"h"]
    assert len(files(Path(again.folder))) == 2


def test_an_identity_without_blocks_leaves_nothing_behind(make_store):
    with make_store({"model": "old"}, limit=2000) as other:
        put_all(other, letters(1000, "ab"))
    with make_store(limit=2000) as blocks:
        put_all(blocks, letters(1000, "cd"))
    blocks = make_store(limit=2000)
    assert folder.homes(blocks.folder) == [f"{blocks.folder}/{blocks.identity.hex()}"]


def test_a_full_queue_drops_blocks_and_never_waits(make_store, monkeypatch):
    blocks, go_on = make_store(queue_bytes=1000), threading.Event()
    real = store.write_block
    monkeypatch.setattr(store, "write_block", lambda *args: go_on.wait(30) and real(*args))
    put = [blocks.put(bytes([n]), b"x" * 300) for n in range(5)]
    assert put == [True, True, True, False, False]
    assert blocks.stats()["queued_bytes"] == 900 and blocks.stats()["dropped"] == 2
    go_on.set()
    blocks.flush()
    assert blocks.stats()["queued_bytes"] == 0 and blocks.put(b"\4", b"x" * 1000)


# -- processes and threads --

WRITER = """
import sys
from mlxpage.block_store import BlockStore
with BlockStore(sys.argv[1], {"model": "tiny", "dtype": "float16", "block_size": 16}, 10**9) as s:
    for line in sys.stdin:
        s.put(line.strip().encode(), line.strip().encode() * 1000)
        s.flush()
        print(s.why_not_writing, flush=True)
"""


@contextmanager
def writer(path):
    """A process that writes blocks named by the lines that it is told."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, path], cwd=ROOT, text=True, stdin=-1, stdout=-1
    ) as process:

        def tell(key: str) -> str:
            process.stdin.write(f"{key}\n")
            process.stdin.flush()
            return process.stdout.readline().strip()

        yield tell
        process.stdin.close()
        assert process.wait(30) == 0


def test_one_process_writes_and_another_reads_what_it_writes(make_store, tmp_path, monkeypatch):
    with writer(tmp_path / "blocks") as tell:
        assert tell("a") == "None"
        blocks = make_store()
        assert blocks.why_not_writing == "another engine writes"
        assert blocks.get(b"a") == b"a" * 1000 and b"b" not in blocks
        tell("b")
        assert b"b" in blocks and blocks.get(b"b") == b"b" * 1000 and blocks.get(b"c") is None
        assert not blocks.put(b"c", b"c") and blocks.put(b"a", b"is there")
        assert blocks.stats()["dropped"] == 1 and blocks.stats()["blocks"] is None
        (file,) = [
            f
            for f in files(tmp_path / "blocks")
            if f.name == format.file_name(blocks.identity, b"a")
        ]
        file.write_bytes(b"damaged")
        assert blocks.get(b"a") is None and not file.exists()
    assert not blocks.put(b"c", b"c"), "it doesn't ask for the lock each time"
    monkeypatch.setattr(store, "_ASK_AGAIN", 0)
    blocks._ask_at = 0
    assert blocks.put(b"c", b"c") and blocks.why_not_writing is None
    blocks.flush()
    assert blocks.stats()["blocks"] == 2 and blocks.get(b"c") == b"c"


def test_a_closed_store_still_reads_and_lets_another_write(make_store):
    first = make_store()
    put_all(first, {b"key": b"payload"})
    first.close()
    first.close()
    assert first.why_not_writing == "closed" and not first.put(b"other", b"")
    second = make_store()
    assert second.why_not_writing is None
    put_all(second, {b"other": b""})
    assert first.get(b"key") == b"payload"


def test_a_reader_that_is_closed_never_begins_to_write(make_store, monkeypatch):
    first, second = make_store(), make_store()
    assert second.why_not_writing == "another engine writes"
    second.close()
    first.close()
    monkeypatch.setattr(store, "_ASK_AGAIN", 0)
    second._ask_at = 0
    assert not second.put(b"key", b"payload")


def test_a_closed_store_has_written_what_was_queued(make_store):
    expected = {b"%d" % n: b"%d" % n * 10_000 for n in range(100)}
    with make_store() as blocks:
        for key, payload in expected.items():
            blocks.put(key, payload)
    assert all(blocks.get(key) == payload for key, payload in expected.items())


def test_a_slow_disk_is_waited_for_as_long_as_was_said(make_store, monkeypatch):
    blocks, go_on = make_store(), threading.Event()
    real = store.write_block
    monkeypatch.setattr(store, "write_block", lambda *args: go_on.wait(30) and real(*args))
    for key, payload in letters(1000, "abc").items():
        blocks.put(key, payload)
    blocks.flush(0.01)
    assert blocks.stats()["queued"] == 3
    ending = threading.Thread(target=blocks.close, args=(0.01,))
    ending.start()
    while blocks.stats()["queued"]:
        time.sleep(0.001)
    go_on.set()
    ending.join(30)
    assert not ending.is_alive() and blocks.stats()["dropped"] == 3
    assert not files(Path(blocks.folder))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_does_not_keep_others_from_writing(tmp_path):
    ended = python(
        "import os, sys; from mlxpage.block_store import BlockStore\n"
        f"s = BlockStore(sys.argv[1], {FACTS}, 10**9)\n"
        "ends, holds = os.pipe()\n"
        "if (child := os.fork()) == 0: os.close(holds); os.read(ends, 1); os._exit(0)\n"
        "s.close(); print(BlockStore(sys.argv[1], {}, 10**9).why_not_writing)\n"
        "os.close(holds); os.waitpid(child, 0)",
        tmp_path / "blocks",
    )
    assert (ended.returncode, ended.stdout) == (0, "None\n"), ended.stderr


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_ends_and_its_parent_writes_on(tmp_path):
    ended = python(
        "import os, sys; from mlxpage.block_store import BlockStore\n"
        f"s = BlockStore(sys.argv[1], {FACTS}, 10**9)\n"
        "s.put(b'a', b'a' * 10**6); s.flush()\n"
        "from threading import Event, Thread; held, go_on = Event(), Event()\n"
        "def hold():\n"
        "    with s._changed: held.set(); go_on.wait()\n"
        "Thread(target=hold).start(); held.wait()\n"
        "child = os.fork()\n"
        "go_on.set()\n"
        "if child:\n"
        "    assert os.waitpid(child, 0)[1] == 0\n"
        "    s.put(b'b', b'b'); s.flush(); print(s.stats()['blocks'])",
        tmp_path / "blocks",
    )
    assert (ended.returncode, ended.stdout) == (0, "2\n"), ended.stderr


def test_many_threads_put_and_get_at_once(make_store):
    blocks, wrong = make_store(limit=400_000), []
    expected = random_blocks(400, seed=3)

    def work(seed: int) -> None:
        rng, keys = random.Random(seed), list(expected)
        for _ in range(1000):
            key = rng.choice(keys)
            if rng.random() < 0.5:
                blocks.put(key, expected[key])
            elif (found := blocks.get(key)) is not None and found != expected[key]:
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    blocks.flush()
    assert not wrong
    stats = blocks.stats()
    on_disk = [file.stat().st_size for file in files(Path(blocks.folder))]
    assert (stats["blocks"], stats["bytes"]) == (len(on_disk), sum(on_disk))
    assert stats["bytes"] <= 400_000 and stats["damaged"] == 0
    assert stats["hits"] > 100 and stats["evicted"] > 100


def during_a_read(monkeypatch, happens, error: type[Exception] | None = None) -> None:
    """`happens` once, when a file has been read and nobody knows yet; `error` is what it told."""
    real = store.read_block

    def read(*args):
        monkeypatch.setattr(store, "read_block", real)
        found = real(*args)
        happens()
        if error:
            raise error
        return found

    monkeypatch.setattr(store, "read_block", read)


@pytest.mark.parametrize("error", [format.Damaged, FileNotFoundError])
def test_what_is_written_anew_during_a_read_stays(make_store, monkeypatch, error):
    blocks = make_store(limit=1000)
    put_all(blocks, letters(1000, "a"))

    def evict_and_put_again():
        put_all(blocks, letters(1000, "b"))
        put_all(blocks, letters(1000, "a"))

    during_a_read(monkeypatch, evict_and_put_again, error)
    assert blocks.get(b"a") is None
    assert blocks.get(b"a") is not None and blocks.stats()["bytes"] == 1000


def test_what_is_evicted_during_a_read_was_found(make_store, monkeypatch):
    blocks = make_store(limit=1000)
    put_all(blocks, letters(1000, "a"))
    during_a_read(monkeypatch, lambda: put_all(blocks, letters(1000, "b")))
    assert blocks.get(b"a") == letters(1000)[b"a"]
    assert blocks.get(b"a") is None and held(blocks, letters(1000)) == [b"b"]


# -- a folder as people see it --


def test_what_is_discarded_while_it_is_written_is_gone_and_may_be_put_anew(make_store, monkeypatch):
    blocks = make_store()
    write, begun, go_on = store.write_block, threading.Event(), threading.Event()

    def slow(*arguments):
        begun.set()
        go_on.wait(10)
        write(*arguments)

    monkeypatch.setattr(store, "write_block", slow)
    for key in (b"only discarded", b"put anew"):
        begun.clear()
        go_on.clear()
        assert blocks.put(key, b"wrong")
        assert begun.wait(10)
        blocks.discard(key)
        if key == b"put anew":
            assert blocks.put(key, b"right")
        go_on.set()
        blocks.flush()
    assert blocks.get(b"only discarded") is None
    assert bytes(blocks.get(b"put anew")) == b"right"


def test_what_is_discarded_is_gone_wherever_it_is(make_store):
    blocks = make_store()
    blocks.put(b"written", b"wrong")
    blocks.flush()
    blocks.discard(b"written")
    blocks.discard(b"never put")
    assert b"written" not in blocks and blocks.get(b"written") is None
    assert blocks.stats()["bytes"] == 0


def test_clear_removes_all_and_a_store_that_is_open_goes_on(make_store, tmp_path):
    with make_store({"model": "old"}) as other:
        put_all(other, letters(1000, "ab"))
    blocks = make_store()
    put_all(blocks, letters(1000, "cde"))
    assert mlxpage.block_store.clear(tmp_path / "blocks") == {"blocks": 5, "bytes": 5000}
    assert blocks.get(b"c") is None and not files(tmp_path / "blocks")
    put_all(blocks, letters(1000, "c"))
    assert blocks.get(b"c") is not None
    blocks.close()
    assert mlxpage.block_store.clear(tmp_path / "blocks")["blocks"] == 1
    assert os.listdir(tmp_path / "blocks") == ["lock"]


def test_clear_leaves_alone_what_is_being_written(make_store, monkeypatch):
    blocks, began, go_on = make_store(), threading.Event(), threading.Event()
    real = os.replace

    def waits(*args):
        began.set()
        go_on.wait(30)
        real(*args)

    monkeypatch.setattr(os, "replace", waits)
    assert blocks.put(b"key", b"payload") and began.wait(30)
    assert mlxpage.block_store.clear(blocks.folder)["blocks"] == 0
    go_on.set()
    blocks.flush()
    assert blocks.why_not_writing is None and blocks.get(b"key") == b"payload"


def test_clear_of_a_store_forgets_what_is_queued_too(make_store, monkeypatch):
    blocks, go_on = make_store(), threading.Event()
    put_all(blocks, letters(1000, "ab"))
    real = store.write_block
    monkeypatch.setattr(store, "write_block", lambda *args: go_on.wait(30) and real(*args))
    assert blocks.put(b"c", b"c") and blocks.put(b"d", b"d")
    blocks.clear()
    assert held(blocks, letters(1000)) == []
    go_on.set()
    blocks.flush()
    stats = blocks.stats()
    on_disk = [file.stat().st_size for file in files(Path(blocks.folder))]
    assert (stats["blocks"], stats["bytes"]) == (len(on_disk), sum(on_disk)) and len(on_disk) < 2


def test_a_folder_that_is_taken_away_is_made_again(make_store, tmp_path):
    blocks = make_store()
    put_all(blocks, {b"a": b"a"})
    (tmp_path / "blocks").rename(tmp_path / "away")
    assert blocks.get(b"a") is None
    put_all(blocks, {b"b": b"b"})
    assert blocks.get(b"b") == b"b" and blocks.why_not_writing is None


def test_verify_reads_all_and_removes_what_is_damaged(make_store, tmp_path):
    with make_store({"model": "old"}) as other:
        put_all(other, letters(1000, "ab"))
    with make_store() as blocks:
        put_all(blocks, letters(1000, "cde"))
    whole = sorted(files(tmp_path / "blocks"))
    flipped, moved = whole[0], whole[4]
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    moved = moved.rename(moved.with_name("0" * 64))
    before = {file: file.stat().st_mtime_ns for file in whole[1:4]}
    found = mlxpage.block_store.verify(tmp_path / "blocks")
    assert found == {"blocks": 3, "bytes": 3000, "damaged": 2, "unreadable": 0}
    assert sorted(files(tmp_path / "blocks")) == whole[1:4]
    assert before == {file: file.stat().st_mtime_ns for file in whole[1:4]}, "that was no use"


def test_a_folder_that_is_not_there_has_no_blocks(tmp_path):
    nowhere = tmp_path / "nowhere"
    assert mlxpage.block_store.stats(nowhere) == {"blocks": 0, "bytes": 0, "identities": []}
    assert mlxpage.block_store.clear(nowhere) == {"blocks": 0, "bytes": 0}
    assert mlxpage.block_store.verify(nowhere)["blocks"] == 0
    assert not nowhere.exists()


def test_files_of_others_are_left_alone(make_store, tmp_path):
    theirs = [
        tmp_path / "blocks" / "notes.txt",
        tmp_path / "blocks" / ("a" * 64) / "notes.txt",
        tmp_path / "blocks" / ("a" * 64) / "ab" / "notes.txt",
        tmp_path / "blocks" / ("b" * 63) / "ab" / ("c" * 64),
    ]
    for file in theirs:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    linked = tmp_path / "linked" / "ab" / ("d" * 64)
    linked.parent.mkdir(parents=True)
    linked.write_text("mine")
    (tmp_path / "blocks" / ("d" * 64)).symlink_to(tmp_path / "linked")
    with make_store() as blocks:
        put_all(blocks, letters(1000))
    make_store(limit=1).close()
    mlxpage.block_store.verify(tmp_path / "blocks")
    mlxpage.block_store.clear(tmp_path / "blocks")
    assert all(file.read_text() == "mine" for file in [*theirs, linked])
