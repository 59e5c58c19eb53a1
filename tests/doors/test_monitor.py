"""Other processes see an engine as it is, and only see it."""

import json
import os
import shutil
import socket
import stat
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import serving
import tiny_models
from trouble import in_thread

from mlxpage import AsyncEngine, SamplingParams, monitor, snapshot
from mlxpage.block_pool import CACHED, FREE, SHARED, USED, BlockPool

pytestmark = pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
LONG = SamplingParams(max_tokens=300, ignore_eos=True, temperature=0)
SECONDS = 30  # far more than an answer takes


@pytest.fixture(autouse=True)
def folder(monkeypatch):
    """Of the sockets; a short path, as they need one."""
    made = Path(tempfile.mkdtemp(prefix="top")) / "run"
    monkeypatch.setenv("MLXPAGE_RUNTIME", str(made))
    yield made
    shutil.rmtree(made.parent)


@pytest.fixture
def watch():
    """watch(engine=0): one of the engines that can be seen."""
    watches = []

    def connect(index=0) -> monitor.Watch:
        watches.extend(monitor.engines())
        return watches[index - len(monitor.engines())]

    yield lambda index=0: connect(index)
    for each in watches:
        each.close()


def look(watch: monitor.Watch) -> dict:
    watch.ask()
    taken = watch.receive(SECONDS)
    assert taken is not None, "no answer"
    return taken


def monitor_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mlxpage-monitor"]


# -- what is seen --


def recounted(group, tables) -> dict[str, int]:
    """A cache group's blocks, counted from the tables of all sequences."""
    owners = Counter(block for table in tables for block in table if block)
    free = [block for block in range(1, group.pool.num_blocks + 1) if block not in owners]
    cached = {block for block, _ in group.pool.free_cached()}
    return {
        "total": group.pool.num_blocks,
        "limit": group.pool.limit,
        "used": len(owners),
        "shared": sum(count > 1 for count in owners.values()),
        "cached": len(cached & set(free)),
        "free": len(set(free) - cached),
    }


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_snapshot_is_what_the_pool_holds_at_every_step(family):
    engine = serving.engine(tiny_models.make(family), num_blocks=13, max_num_seqs=4)
    seen = Counter()

    def check(engine):
        taken = json.loads(json.dumps(snapshot.take(engine)))
        stats = json.loads(json.dumps(engine.stats()))
        assert {**taken["stats"], "bytes": 0} == {**stats, "bytes": 0}
        sequences = sorted((choice.seq for choice in engine.choices), key=_order)
        check_groups(taken["groups"], engine.scheduler.groups, sequences)
        check_sequences(taken["sequences"], sequences)
        states = Counter(told["state"] for told in taken["sequences"])
        assert states["running"] == stats["running"]
        assert states["waiting"] + states["preempted"] == stats["waiting"]
        seen.update(states)
        for group in taken["groups"]:
            seen.update(group["map"])

    prompts = [[*range(1, 41), number] for number in range(8)]
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    serving.serve(engine, prompts, params, on_step=check)
    wanted = {FREE, CACHED, USED, SHARED, "running", "waiting", "preempted"}
    assert wanted <= set(seen), wanted - set(seen)
    totals = engine.stats()
    assert totals["sampled_tokens"] >= totals["output_tokens"] == 8 * 60
    assert totals["computed_tokens"] > totals["sampled_tokens"]


def check_groups(told, groups, sequences):
    for index, (shown, group) in enumerate(zip(told, groups, strict=True)):
        tables = [seq.block_tables[index] for seq in sequences]
        counted = recounted(group, tables)
        assert shown["blocks"] == counted
        letters = Counter(shown["map"])
        assert letters[SHARED] == counted["shared"]
        assert letters[USED] == counted["used"] - counted["shared"]
        assert letters[CACHED] == counted["cached"] and letters[FREE] == counted["free"]
        for block in (block for table in tables for block in table if block):
            assert shown["map"][block - 1] in USED + SHARED


def check_sequences(told, sequences):
    for shown, seq in zip(told, sequences, strict=True):
        counted = {
            "id": seq.id,
            "prompt_tokens": seq.num_prompt_tokens,
            "computed_tokens": seq.num_computed_tokens,
            "cached_tokens": seq.num_cached_tokens,
            "output_tokens": len(seq.token_ids) - 41,
            "max_output_tokens": 60,
            "preemptions": seq.num_preemptions,
            "tables": seq.block_tables,
        }
        assert counted.items() <= shown.items() and shown["age_s"] >= 0


def _order(seq):
    return seq.status.name != "RUNNING", seq.priority, seq.arrival


def test_a_block_with_hundreds_of_owners_is_shared():
    pool = BlockPool(3)
    (block,) = pool.allocate(1)
    for _ in range(400):
        pool.share([block])
    assert pool.states() == SHARED + FREE + FREE


def test_nothing_of_a_prompt_or_an_answer_is_told(make_llm, watch):
    llm = make_llm(monitor=True)
    stream = llm.stream("a secret of mine", LONG)
    text = next(stream).text
    taken = json.dumps(look(watch()))
    assert "secret" not in taken and (not text.strip() or json.dumps(text)[1:-1] not in taken)
    ids = llm.tokenizer.encode("a secret of mine")
    assert json.dumps(ids)[1:-1] not in taken
    stream.close()


# -- who may see it --


def test_nobody_else_can_connect(make_llm, folder):
    make_llm(monitor=True)
    (path,) = folder.iterdir()
    assert path.name == f"{os.getpid()}-{path.stem.split('-')[1]}.sock"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_folder_that_is_open_to_others_is_not_used(make_llm, folder):
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    with pytest.warns(RuntimeWarning, match="open to other users .mode 755"):
        llm = make_llm(monitor=True)
    assert llm.generate("abc", SamplingParams(max_tokens=2)).token_ids
    assert not list(folder.iterdir()) and not monitor_threads()


@pytest.mark.parametrize("place", ["x" * 120, "file/run"])
def test_without_a_place_for_a_socket_the_engine_serves_and_a_warning_says_why(
    make_llm, folder, monkeypatch, place
):
    folder.mkdir()
    (folder / "file").touch()
    monkeypatch.setenv("MLXPAGE_RUNTIME", str(folder / place))
    with pytest.warns(RuntimeWarning, match="mlxpage top can't show .*MLXPAGE_RUNTIME"):
        llm = make_llm(monitor=True)
    assert llm.generate("abc", SamplingParams(max_tokens=2)).token_ids
    with warnings.catch_warnings():  # where they are errors, too
        warnings.simplefilter("error")
        assert make_llm(monitor=True).stats()["running"] == 0


# -- from the beginning to the end --


def test_an_engine_that_is_not_to_be_seen_has_no_thread_and_no_socket(make_llm, folder):
    make_llm().generate("abc", SamplingParams(max_tokens=2))
    assert not monitor_threads() and not folder.exists()


def test_a_monitor_that_nobody_looks_at_does_nothing(make_llm, monkeypatch):
    taken = []
    monkeypatch.setattr(snapshot, "take", taken.append)
    llm = make_llm(monitor=True)
    (thread,) = monitor_threads()
    clock = time.pthread_getcpuclockid(thread.ident)
    before = 0.0
    while before != (before := time.clock_gettime(clock)):  # until it has come to rest
        time.sleep(0.1)
    llm.generate(["abc"] * 4, SamplingParams(max_tokens=20))
    assert time.clock_gettime(clock) == before and not taken


def test_two_engines_are_seen_apart_until_each_is_closed(make_llm, tiny_folder, folder):
    first = make_llm(monitor=True)
    second = AsyncEngine.load(tiny_folder, num_blocks=64, monitor=True).wait()
    watches = monitor.engines()
    assert len({watch.hello["engine"] for watch in watches}) == 2
    totals = [look(watch)["groups"][0]["blocks"]["total"] for watch in watches]
    assert totals == [128, 64]
    for engine, watch in zip((first, second), watches, strict=True):
        engine.close()
        with pytest.raises(EOFError):
            look(watch)
        watch.close()
    assert not list(folder.iterdir()) and not monitor_threads()


def test_who_comes_and_goes_changes_no_token(make_llm):
    expected = make_llm().generate(["abc", "abd", "x"], LONG)
    llm = make_llm(monitor=True)
    stop = threading.Event()
    looks = []

    def come_and_go():
        while not stop.is_set():
            (watch,) = monitor.engines()
            looks.append(look(watch))
            watch.ask()  # and goes without waiting for the answer
            watch.close()

    watcher = threading.Thread(target=come_and_go)
    watcher.start()
    found = llm.generate(["abc", "abd", "x"], LONG)
    stop.set()
    watcher.join()
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert any(taken["stats"]["running"] == 3 for taken in looks)


def test_who_asks_and_never_reads_is_left_alone(make_llm, watch, monkeypatch):
    monkeypatch.setattr(monitor, "SEND_SECONDS", 0.05)
    llm = make_llm(monitor=True, num_blocks=4096)
    deaf = watch()
    for _ in range(400):
        deaf._socket.setblocking(False)
        try:
            deaf._socket.send(b"\n")
        except OSError:
            break
        look_at = watch()
        look(look_at)
        look_at.close()
    assert llm.generate("abc", SamplingParams(max_tokens=2)).token_ids


def test_sockets_of_processes_that_ended_without_a_word_are_removed(python, tiny_folder, folder):
    ended = python(
        "import os, sys\n"
        "from mlxpage import LLM\n"
        "llm = LLM(sys.argv[1], num_blocks=64, monitor=True)\n"
        "os._exit(3)",
        tiny_folder,
    )
    assert ended.returncode == 3 and len(list(folder.iterdir())) == 1
    assert monitor.engines() == [] and not list(folder.iterdir())


def test_a_forked_child_neither_removes_the_socket_nor_keeps_it_open(python, tiny_folder):
    ended = python(
        """
import os, sys, warnings
warnings.simplefilter("ignore")
from mlxpage import LLM, monitor
llm = LLM(sys.argv[1], num_blocks=64, monitor=True)
first = os.fork()
if first == 0:
    sys.exit(0)  # with all that Python does at its end
assert os.waitpid(first, 0)[1] == 0
(watch,) = monitor.engines()
watch.ask()
print(watch.receive(30)["stats"]["running"])
go, waits = os.pipe()
second = os.fork()
if second == 0:
    os.close(waits)
    os.read(go, 1)
    os._exit(0)
llm.close()
print(os.listdir(monitor.folder()))
try:
    watch.receive(30)  # the child has its connection open
except EOFError:
    print("ended")
os.close(waits)
os.waitpid(second, 0)
""",
        tiny_folder,
    )
    assert ended.stdout.split() == ["0", "[]", "ended"], ended.stderr


def test_a_program_that_closes_nothing_leaves_nothing(python, tiny_folder, folder):
    ended = python(
        "import sys\n"
        "from mlxpage import AsyncEngine, SamplingParams\n"
        "engine = AsyncEngine.load(sys.argv[1], num_blocks=64, monitor=True).wait()\n"
        "handle = engine.submit('abc', SamplingParams(max_tokens=400, ignore_eos=True))",
        tiny_folder,
    )
    assert (ended.returncode, ended.stderr) == (0, "") and not list(folder.iterdir())


def test_the_folder_of_sockets_may_be_given_as_in_a_shell(monkeypatch):
    monkeypatch.setenv("MLXPAGE_RUNTIME", "~/run")
    assert monitor.folder() == Path.home() / "run"


def test_what_is_no_monitor_is_passed_over(folder):
    folder.mkdir(mode=0o700)
    (folder / "1-1.sock").touch()
    mute = socket.socket(socket.AF_UNIX)
    mute.bind(str(folder / "2-1.sock"))
    mute.close()
    assert monitor.engines() == []


@pytest.mark.parametrize("said", [b"hello\n", b"[]\n", b'{"schema": "mlxpage.top/0"}\n'])
def test_who_speaks_otherwise_is_passed_over(folder, said):
    """An engine of another version, say."""
    folder.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "1-1.sock"))
        listener.listen()
        told = in_thread(lambda: listener.accept()[0].sendall(said))
        assert monitor.engines() == []
        told.result(SECONDS)
    assert (folder / "1-1.sock").exists(), "it may be of use to others"
