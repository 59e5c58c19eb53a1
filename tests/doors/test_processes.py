"""The command line as a process: signals, pipes, closed streams and terminals."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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

    def __init__(self, arguments, patch="", **streams):
        self.process = subprocess.Popen(
            [sys.executable, "-c", f"import sys\n{patch}\n{MAIN}", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
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
    """start(*arguments, patch="", **streams) -> Process, ended with the test"""
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


@pytest.mark.full
def test_ctrl_c_at_any_moment(start, tiny_folder):
    # -2: before Python has a handler for it, or after it has taken it away.
    for tenths in range(1, 31):
        process = start("generate", tiny_folder, "hello", "-n", "400")
        time.sleep(tenths / 10)
        code, _, _ = process.interrupt().end()
        assert code in (0, 130, -signal.SIGINT)


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
    assert (code, err) == (1, "Error: [Errno 27] File too large\n")


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


def test_a_talk_on_a_terminal(start, tiny_folder):
    main, side = os.openpty()
    patch = SLOW_STEPS.replace("SECONDS", "0.02")
    process = start(
        "chat", tiny_folder, "-n", "300", patch=patch, stdin=side, stdout=side, stderr=side
    )
    os.close(side)
    screen = Screen(main)
    screen.wait_for(b"> ")
    os.write(main, b"hello\n")
    screen.wait_for(b"hello")
    time.sleep(0.5)
    process.interrupt()
    screen.wait_for(b"(stopped)")
    screen.wait_for(b"> ")
    os.write(main, b"\x04")
    assert process.end()[0] == 0
    os.close(main)
    assert b"loading" in screen.seen and b"Traceback" not in screen.seen


class Screen:
    def __init__(self, terminal: int):
        self.terminal = terminal
        self.seen = b""
        self.read_to = 0

    def wait_for(self, text: bytes) -> None:
        """Reads on until `text` comes after what was waited for last."""
        while (at := self.seen.find(text, self.read_to)) < 0:
            self.seen += os.read(self.terminal, 4096)
        self.read_to = at + len(text)
