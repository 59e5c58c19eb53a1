"""`mlxpage top` finds engines and shows them."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest

from mlxpage import SamplingParams, monitor

LONG = SamplingParams(max_tokens=400, ignore_eos=True)
SECONDS = 60  # far more than anything here takes


@pytest.fixture(autouse=True)
def folder(runtime_folder, monkeypatch, tmp_path_factory):
    """Of the sockets, for each test its own."""
    made = os.path.join(os.environ["MLXPAGE_RUNTIME"], f"{time.monotonic_ns():x}")
    monkeypatch.setenv("MLXPAGE_RUNTIME", made)


@pytest.fixture
def terminal():
    """terminal(*arguments): `mlxpage top` in a terminal of its own."""
    made = []

    def start(*arguments, **environment) -> "Terminal":
        made.append(Terminal(arguments, environment))
        return made[-1]

    yield start
    for each in made:
        each.process.kill()
        each.process.wait()
        os.close(each.end)


def busy(make_llm):
    """An engine with work for a while, and what ends it when it's closed."""
    llm = make_llm(monitor=True, max_num_seqs=2)
    stream = llm.stream_many(["One, two, three, four"] * 100, LONG)
    next(stream)
    return llm, stream


class Terminal:
    def __init__(self, arguments, environment):
        self.end, there = pty.openpty()
        size = {"COLUMNS": "100", "LINES": "30", "TERM": "xterm-256color", "NO_COLOR": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlxpage", "top", *arguments],
            **{"stdin": there, "stdout": there, "stderr": there},
            env=os.environ | size | environment,
            start_new_session=True,
        )
        os.close(there)
        self.heard = ""

    @property
    def shown(self) -> str:
        """Without what moves the cursor and what colours."""
        return re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", self.heard)

    def until(self, text: str) -> str:
        """What has been shown, once `text` has."""
        end = time.monotonic() + SECONDS
        while text not in self.shown:
            assert time.monotonic() < end, self.shown
            if select.select([self.end], [], [], 0.1)[0]:
                assert self.hears(), self.shown
        return self.shown

    def hears(self) -> bool:
        """Waits for more; False when the process has ended."""
        try:
            heard = os.read(self.end, 2**16).decode(errors="replace")
        except OSError:
            return False
        self.heard += heard
        return bool(heard)

    def ended(self) -> int:
        """The exit code, once all that was shown is read."""
        while self.hears():
            pass
        return self.process.wait(SECONDS)

    def press(self, keys: bytes) -> None:
        os.write(self.end, keys)


def test_one_look_tells_what_an_engine_does(make_llm, cli):
    _, stream = busy(make_llm)
    looked = cli("top", "--once", "--json")
    taken = json.loads(looked.out)
    assert (looked.code, looked.err) == (0, "")
    assert taken["schema"] == monitor.SCHEMA and taken["pid"] == os.getpid()
    assert {each["state"] for each in taken["sequences"]} == {"running", "waiting"}
    assert taken["sequences"][0]["max_output_tokens"] == 400
    frame = cli("top", "--once").out
    assert "2 running" in frame and "# used" in frame and frame.isascii()
    stream.close()
    assert "sequences  none" in cli("top", "--once", str(os.getpid())).out


def test_in_another_process_it_looks_again_and_again_until_the_engine_ends(make_llm):
    llm = make_llm(monitor=True)
    command = [sys.executable, "-m", "mlxpage", "top", "--json", "--interval", "0.1"]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True) as top:
        times = [json.loads(top.stdout.readline())["time"] for _ in range(3)]
        llm.close()
        out, err = top.communicate(timeout=SECONDS)
    assert times == sorted(set(times)) and top.returncode == 0
    assert all(json.loads(line) for line in out.splitlines())
    assert "has ended" in err and len(err.splitlines()) == 1


def test_without_an_engine_it_says_how_there_can_be_one(cli):
    looked = cli("top", "--once")
    assert looked.code == 6 and looked.out == ""
    assert "monitor=True" in looked.error[0]


def test_one_of_several_is_named(make_llm, tiny_folder, cli):
    first, second = make_llm(monitor=True), make_llm(monitor=True, num_blocks=64)
    looked = cli("top", "--once")
    assert looked.code == 2 and "2 engines run; name one" in looked.error[0]
    name = looked.error[2].split()[0]
    assert name in looked.error[2] and str(tiny_folder) in looked.error[2]
    taken = json.loads(cli("top", name, "--once", "--json").out)
    assert taken["groups"][0]["blocks"]["total"] == 64
    assert cli("top", str(os.getpid()), "--once").code == 2
    nobody = cli("top", "1", "--once")
    assert nobody.code == 6 and "no engine 1;" in nobody.error[0] and name in nobody.err
    first.close()
    second.close()


def test_it_draws_on_terminals_alone(make_llm, cli):
    make_llm(monitor=True)
    looked = cli("top")
    assert looked.code == 2 and "--once or --json" in looked.error[0]


def test_in_a_terminal_it_shows_pages_until_q_is_pressed(make_llm, terminal):
    llm, stream = busy(make_llm)
    top = terminal("--interval", "0.1")
    shown = top.until("just taken")
    assert "■" in shown and "q quits" in shown and "2 running" in shown
    top.press(b"q")
    assert top.ended() == 0
    assert "\x1b[?1049l" in top.heard  # the terminal is as it was
    assert llm.stats()["running"] == 2
    stream.close()


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"PYTHONIOENCODING": "ascii"}])
def test_where_there_is_no_colour_or_no_unicode_it_shows_letters(make_llm, terminal, environment):
    make_llm(monitor=True)
    top = terminal(**environment)
    assert "■" not in top.until("c cached")
    os.kill(top.process.pid, signal.SIGINT)
    assert top.ended() == 130


def test_when_the_engine_ends_it_says_so(make_llm, terminal):
    llm = make_llm(monitor=True)
    top = terminal()
    top.until("pages")
    llm.close()
    assert top.ended() == 0 and "has ended" in top.shown


def test_in_a_terminal_it_asks_which_engine(make_llm, terminal):
    make_llm(monitor=True)
    make_llm(monitor=True, num_blocks=64)
    top = terminal()
    shown = top.until("Which")
    name = shown.split()[2]
    top.press(name.encode() + b"\n")
    top.until("of 64 used")
    top.press(b"q")
    assert top.ended() == 0


def test_commands_can_be_watched_unless_told_not_to(cli, tiny_folder, monkeypatch):
    from mlxpage import AsyncEngine

    seen = []
    submit = AsyncEngine.submit

    def look(engine, *arguments, **options):
        seen.append(monitor.engines())
        return submit(engine, *arguments, **options)

    monkeypatch.setattr(AsyncEngine, "submit", look)
    assert cli("generate", tiny_folder, "hello", "-n", "2").code == 0
    assert [watch.hello["model"] for watch in seen.pop()] == [str(tiny_folder)]
    assert monitor.engines() == []
    monkeypatch.setenv("MLXPAGE_MONITOR", "off")
    assert cli("generate", tiny_folder, "hello", "-n", "2").code == 0 and seen == [[]]
    monkeypatch.delenv("MLXPAGE_MONITOR")
    monkeypatch.setenv("MLXPAGE_RUNTIME", "/nowhere/" + "x" * 200)
    answered = cli("generate", tiny_folder, "hello", "-n", "2", "-q")
    assert (answered.code, answered.err) == (0, "")


def test_a_command_that_ctrl_c_ends_leaves_no_socket(tiny_folder):
    command = [sys.executable, "-m", "mlxpage", "generate", tiny_folder, "hello", "-n", "400"]
    with subprocess.Popen([*command, "--raw"], stdout=-1, stderr=-1) as generate:
        end = time.monotonic() + SECONDS
        while not (found := monitor.engines()) and time.monotonic() < end:
            time.sleep(0.01)
        generate.send_signal(signal.SIGINT)
        generate.communicate(timeout=SECONDS)
    assert found and generate.returncode in (130, 0)
    assert not list(monitor.folder().iterdir())
