"""The command line as a process: signals, pipes, closed streams and terminals."""

import contextlib
import fcntl
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import tiny_folder as tiny

ROOT = Path(__file__).parents[2]
SECONDS = 30

# Patches put before the command line runs, so that there is time to interrupt it.
SLOW_LOADING = """
import time, mlxpage.metal.model
def slowly(module, on_bytes):
    print("LOADING", file=sys.stderr, flush=True)
    for done in range(1000):
        time.sleep(0.02)
        on_bytes(done, 1000)
mlxpage.metal.model._evaluate = slowly
"""
SLOW_STEPS = """
import time, mlxpage.engine
compute = mlxpage.engine.Engine._start
def slowly(self, batch):
    time.sleep(SECONDS)
    return compute(self, batch)
mlxpage.engine.Engine._start = slowly
"""
MAIN = "from mlxpage.cli.main import main\nsys.argv[0] = 'mlxpage'\nmain()"


class Process:
    """A running command line; what it writes is read as it comes."""

    def __init__(self, arguments, patch="", environment=None, **streams):
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"import sys\n{patch}\n{MAIN}", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"} | (environment or {}),
            **{
                "stdin": subprocess.DEVNULL,
                "stdout": subprocess.PIPE,
                "stderr": subprocess.PIPE,
                **streams,
            },
        )

    def wait_for(self, stream, text: bytes) -> None:
        seen = b""
        while text not in seen:
            piece = os.read(stream.fileno(), 4096)
            assert piece, f"ended without {text!r}: {seen!r}"
            seen += piece

    def interrupt(self, *, times: int = 1) -> "Process":
        for _ in range(times):
            self.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        return self

    def end(self) -> tuple[int, str, str]:
        """Exit code and what else was written. Fails if it doesn't end in a few seconds."""
        try:
            out, err = self.process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, (out or b"").decode(), (err or b"").decode()


@pytest.fixture
def start():
    """start(*arguments, patch="", environment={}, **streams) -> Process, ended with the test"""
    with contextlib.ExitStack() as ends:

        def started(*arguments, **options) -> Process:
            process = Process(arguments, **options)
            ends.callback(process.process.wait)
            ends.callback(process.process.kill)
            return process

        yield started


# -- Ctrl-C --


def test_ctrl_c_while_a_model_loads(start, tiny_folder):
    process = start("generate", tiny_folder, "hello", patch=SLOW_LOADING)
    process.wait_for(process.process.stderr, b"LOADING")
    code, out, err = process.interrupt().end()
    assert (code, out, err.split()) == (130, "", ["interrupted"])


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_an_answer_comes(start, tiny_folder, times):
    # Pressed twice it doesn't wait for the step that is being computed.
    patch = SLOW_STEPS.replace("SECONDS", "0.1" if times == 1 else "5")
    process = start("generate", tiny_folder, "hello", "-n", "400", patch=patch)
    process.wait_for(process.process.stderr, b"pool ")
    time.sleep(0.3)
    began = time.monotonic()
    code, _, err = process.interrupt(times=times).end()
    assert (code, err.split()[-1:]) == (130, ["interrupted"])
    assert "Traceback" not in err
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("count", [4, pytest.param(200, marks=pytest.mark.full)])
def test_a_signal_at_any_moment_ends_it_and_all_that_it_has_started(start, tiny_folder, count):
    rng = random.Random(1)
    began = time.monotonic()
    assert start("generate", tiny_folder, "hello", "-n", "400").end()[0] == 0
    whole = time.monotonic() - began
    for _ in range(count):
        process = start("generate", tiny_folder, "hello", "-n", "400", start_new_session=True)
        time.sleep(rng.uniform(0, whole))
        sent = rng.choice([signal.SIGINT, signal.SIGTERM])
        process.process.send_signal(sent)
        code, _, err = process.end()
        # The signal itself: before Python has a handler for it, or after it has taken it away.
        assert code in (0, 130, -sent), err
        with pytest.raises(ProcessLookupError):
            os.killpg(process.process.pid, 0)


def test_ctrl_c_at_the_chats_prompt_of_a_pipe_and_its_end(start, tiny_folder):
    process = start("chat", tiny_folder, "-n", "4", stdin=subprocess.PIPE)
    process.wait_for(process.process.stderr, b"pool ")
    time.sleep(0.3)
    process.interrupt()
    process.process.stdin.write(b"hello\n/exit\n")
    process.process.stdin.close()
    process.process.stdin = None
    code, out, err = process.end()
    assert code == 0 and out and "Traceback" not in err


def test_sigterm_ends_it_at_once(start, tiny_folder):
    process = start("generate", tiny_folder, "hello", patch=SLOW_LOADING)
    process.wait_for(process.process.stderr, b"LOADING")
    process.process.send_signal(signal.SIGTERM)
    assert process.end()[::2] == (-signal.SIGTERM, "")


# -- pipes and files --


def test_a_reader_that_has_enough_ends_it_quietly(start, tiny_folder):
    patch = SLOW_STEPS.replace("SECONDS", "0.01")
    process = start("generate", tiny_folder, "hello", "--raw", "-n", "400", patch=patch)
    assert process.process.stdout.read(1)
    process.process.stdout.close()
    process.process.stdout = None
    code, _, err = process.end()
    assert code == 141
    assert err.startswith("pool ") and err.count("\n") == 1


def test_an_answer_that_cannot_be_written_is_an_error(start, tiny_folder, tmp_path):
    with open(tmp_path / "answer", "w") as file:
        process = start(
            "generate",
            tiny_folder,
            "hello",
            "-n",
            "2",
            "-q",
            stdout=file,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)),
        )
        code, _, err = process.end()
    assert (code, err) == (1, "Error: can't write to standard output: File too large\n")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_commands_without_a_model_bear_closed_streams_too(start, closed):
    process = start("config", "show", preexec_fn=lambda: [*map(os.close, closed)])
    code, out, err = process.end()
    assert (code, err) == (0, "")
    assert bool(out) == (1 not in closed)


def test_bare_surroundings_are_no_failure(tmp_path):
    """Neither a home nor a terminal, a language or a width."""
    for arguments in (["ls"], ["generate", "--help"], ["rm", "日本", "-y"]):
        ran = subprocess.run(
            [sys.executable, "-m", "mlxpage", *arguments],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "LC_ALL": "C", "COLUMNS": "1", "HF_HUB_CACHE": "none"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
        )
        assert ran.returncode == (3 if "rm" in arguments else 0), ran.stderr
        assert b"Traceback" not in ran.stderr and b"Warning" not in ran.stderr


def test_a_warning_is_a_line(start, tiny_folder, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    process = start("generate", tiny_folder, "hello", "-n", "1", "-q", "--cache-dir", file)
    code, _, err = process.end()
    assert code == 0
    assert err.startswith("Warning: No more blocks of the prefix cache are written to")
    assert err.count("\n") == 1


@pytest.mark.parametrize("closed", [(0,), (0, 1, 2)], ids=str)
def test_closed_streams_are_like_empty_ones(start, tiny_folder, closed):
    # A file that is opened next would else take their numbers: MLX refuses weights with number 0.
    process = start(
        "generate", tiny_folder, "hello", "-n", "4", preexec_fn=lambda: [*map(os.close, closed)]
    )
    code, out, err = process.end()
    assert code == 0, err
    assert bool(out) == (1 not in closed) and bool(err) == (2 not in closed)


def test_it_runs_as_a_module_and_replaces_what_the_output_cannot_show(tiny_folder):
    ran = subprocess.run(
        [sys.executable, "-m", "mlxpage", "generate", tiny_folder, "日本", "b", "-n", "2", "-q"],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "latin-1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=SECONDS,
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert ran.stdout.startswith(b"==> ??\n")


# -- a terminal --


@pytest.fixture
def on_terminal(start, tmp_path, tiny_folder):
    """on_terminal(*arguments, steps=seconds of each, **environment) -> (Process, its Screen)"""
    with contextlib.ExitStack() as ends:

        def started(*arguments, steps=0.02, **environment):
            main, side = os.openpty()
            ends.callback(os.close, main)
            fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("4H", 30, 100, 0, 0))
            given = {"TERM": "xterm", "HOME": str(tmp_path), "XDG_STATE_HOME": "", "NO_COLOR": ""}
            process = start(
                *arguments,
                patch=SLOW_STEPS.replace("SECONDS", str(steps)),
                environment=given | environment,
                **dict.fromkeys(("stdin", "stdout", "stderr"), side),
            )
            os.close(side)
            return process, Screen(main)

        yield started


def histories(folder: Path) -> list[Path]:
    return list(folder.rglob("chat_history"))


def test_a_talk_on_a_terminal(on_terminal, tiny_folder, tmp_path):
    process, screen = on_terminal("chat", tiny_folder, "-n", "300", "--temp", "0")
    screen.wait_for("loading", "0/512 tok").type("hello\r")
    screen.wait_for("hello", "\x1b[?2004l")  # the prompt is over
    time.sleep(0.5)
    screen.type("typed ahead")
    process.interrupt()
    screen.wait_for("(stopped)")
    assert b"typed" not in screen.seen[: screen.read_to]
    screen.wait_for("> typed ahead", "/512 tok, 0 % cached")
    screen.type("\x03/undo\r").wait_for("took back: hello")
    screen.type("/set max_tokens 4\r").wait_for("max_tokens  4")
    screen.type('"""one\rtwo\x1b\rthree\r"""\r').wait_for("4 tok, cut short · ", "(0 cached)")
    screen.type("/ret\t").wait_for("/ret", "ry").type("\r").wait_for(
        "4 tok, cut short · ", "(16 cached)"
    )
    screen.type("\x04")
    assert process.end()[0] == 0
    assert b"Traceback" not in screen.seen
    (file,) = histories(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    kept = [line[1:] for line in file.read_text().splitlines() if line.startswith("+")]
    assert kept == [
        *("hello", "/undo", "/set max_tokens 4"),
        *('"""one', "two", "three", '"""', "/retry"),
    ]


def test_what_was_typed_comes_back_in_the_next_talk(on_terminal, tiny_folder):
    process, screen = on_terminal("chat", tiny_folder)
    screen.wait_for("tok").type("/stats\r").wait_for("answers ").type("/bye\r")
    assert process.end()[0] == 0
    process, screen = on_terminal("chat", tiny_folder)
    screen.wait_for("tok").type("\x1b[A\x1b[A").wait_for("/stats").type("\r").wait_for("answers ")
    screen.type("\x04")
    assert process.end()[0] == 0


def test_a_terminal_that_can_do_nothing_gets_plain_lines(on_terminal, tiny_folder, tmp_path):
    process, screen = on_terminal("chat", tiny_folder, "-n", "4", TERM="dumb")
    screen.wait_for("> ").type("hello\n").wait_for("4 tok, cut short", "> ").type("\x04")
    assert process.end()[0] == 0
    assert b"\x1b" not in screen.seen and not histories(tmp_path)


def test_neither_colours_nor_a_history_if_they_are_not_wanted(on_terminal, tiny_folder, tmp_path):
    process, screen = on_terminal("chat", tiny_folder, "-n", "4", "--no-history", NO_COLOR="1")
    screen.wait_for("0/512 tok").type("hello\r/none\r").wait_for("TTFT", "Error: ").type("\x04")
    assert process.end()[0] == 0
    assert set(re.findall(rb"\x1b\[[\d;]*m", screen.seen)) <= {b"\x1b[0m", b"\x1b[0;7m"}
    assert not histories(tmp_path)


def test_a_long_prompt_has_a_bar_that_is_gone_with_the_first_token(on_terminal, tmp_path):
    folder = tiny.make(tmp_path / "long", max_position_embeddings=2048)
    process, screen = on_terminal(*("generate", folder, "x" * 1500, "--raw", "-n", "4"), steps=0.4)
    screen.wait_for("reading", " 512/1500", "1024/1500", "1 answer")
    assert process.end()[0] == 0
    answer = re.search(rb"\x1b\[1A\x1b\[2K([^\x1b]+)\r\n\x1b\[2m1 answer", screen.seen)
    assert answer and b"reading" not in answer[1]


@pytest.mark.full
def test_the_screen_of_a_talk_is_in_order(tiny_folder, tmp_path):
    """In a real terminal: what is redrawn leaves nothing behind."""
    assert shutil.which("tmux"), "install tmux, which this looks at: by apt or Homebrew"
    socket = f"mlxpage-test-{os.getpid()}"

    def tmux(*arguments) -> str:
        command = ["tmux", "-L", socket, "-f", os.devnull, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def screen(until: str) -> list[str]:
        limit = time.monotonic() + 2 * SECONDS
        while until not in (shown := tmux("capture-pane", "-p")):
            assert time.monotonic() < limit, shown
            time.sleep(0.1)
        lines = [line.rstrip() for line in shown.splitlines()]
        return [line for line in lines if line]

    chat = [sys.executable, "-m", "mlxpage", "chat", tiny_folder, "--no-history", "-n", "4"]
    command = f"cd {ROOT}; exec {shlex.join(map(str, [*chat, '--temp', '0', '--stop', ' ']))}"
    try:
        tmux("new-session", "-d", "-x", "160", "-y", "30", "-e", "HF_HUB_OFFLINE=1", command)
        pool, hint, prompt, gauge = screen("0/512 tok")
        assert pool.startswith("pool up to ") and hint.startswith("/help lists")
        assert (prompt, gauge) == (">", "0/512 tok")
        tmux("send-keys", "/se", "Tab", "t max_tokens 3", "Enter")
        tmux("send-keys", '"""one', "Enter", "two", "M-Enter", 'three"""', "Enter")
        lines = screen("cached)")
        assert lines[2:7] == [
            "> /set max_tokens 3",
            "max_tokens  3",
            '> """one',
            ". two",
            '. three"""',
        ]
        tmux("send-keys", "/undo", "Enter")
        *_, undo, told, prompt, gauge = screen("\n0/512 tok, 0 % cached")
        assert (undo, told, prompt) == ("> /undo", "took back: one two three", ">")
        assert gauge == "0/512 tok, 0 % cached"
    finally:
        tmux("kill-server")


class Screen:
    def __init__(self, terminal: int):
        self.terminal = terminal
        self.seen = b""
        self.read_to = 0

    def type(self, text: str) -> "Screen":
        os.write(self.terminal, text.encode())
        return self

    def wait_for(self, *texts: str) -> "Screen":
        """Reads on until each comes after what was waited for before it."""
        for text in map(str.encode, texts):
            while (at := self.seen.find(text, self.read_to)) < 0:
                assert self.read(), f"no {text!r} in {self.seen[self.read_to :]!r}"
            self.read_to = at + len(text)
        return self

    def read(self) -> bytes:
        """What is there now, or comes soon; nothing at the end."""
        if not select.select([self.terminal], [], [], SECONDS)[0]:
            return b""
        try:
            new = os.read(self.terminal, 4096)
        except OSError:  # nobody has the other side any more
            new = b""
        self.seen += new
        for _ in range(new.count(b"\x1b[6n")):  # where is the cursor?
            self.type("\x1b[9;1R")
        return new
