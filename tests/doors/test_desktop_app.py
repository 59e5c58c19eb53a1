"""docs/examples/desktop_app.py: its conversation without a window, and with `full` its window."""

import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import window_driver
from trouble import SECONDS, in_thread, wait_until

import mlxpage.engine
import mlxpage.metal.model
from mlxpage import SamplingParams

HERE = Path(__file__).parent
NO_DISPLAY = (
    "a window needs a display, and there is neither Xvfb nor DISPLAY. Install Xvfb (Debian: "
    "apt-get install xvfb), or run this in a graphical session."
)


class FakeWindow:
    """What was told, and the thread that may tell it."""

    def __init__(self):
        self.told: list[tuple] = []
        self.calls: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.current_thread()

    def __getattr__(self, name: str):
        def tell(*arguments):
            assert threading.current_thread() is self._thread
            self.told.append((name, *arguments))

        return tell

    def run_until(self, condition) -> None:
        """A window's main loop."""
        limit = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < limit, f"waited in vain: {self.told[-5:]}"
            try:
                self.calls.get(timeout=0.01)()
            except queue.Empty:
                continue

    def of(self, name: str) -> list[tuple]:
        return [arguments for told, *arguments in self.told if told == name]

    @property
    def text(self) -> str:
        return "".join(text for (text,) in self.of("show_text"))

    @property
    def progress(self) -> list[str]:
        """The beginnings of what was said of progress, each once in a row."""
        words = [text.split()[0].rstrip(":") for text, *_ in self.of("show_progress")]
        return [word for index, word in enumerate(words) if words[index - 1 : index] != [word]]


@pytest.fixture
def example():
    return window_driver.load_example()


@pytest.fixture
def window():
    return FakeWindow()


@pytest.fixture
def make_chat(example, window, tiny_folder):
    """make_chat(model): a chat that `window` shows; closed at the end."""
    made = []

    def make(model=tiny_folder):
        params = SamplingParams(max_tokens=24, ignore_eos=True)
        made.append(example.Chat(str(model), window, window.calls.put, params, num_blocks=64))
        return made[-1]

    yield make
    for chat in made:
        chat.close()


@pytest.fixture
def chat(make_chat, window):
    chat = make_chat()
    window.run_until(lambda: ("show_progress", "Ready") in window.told)
    return chat


def ask(chat, window, text: str) -> None:
    """Sends, and runs the window until the answer has ended."""
    chat.send(text)
    window.run_until(lambda: not chat.is_answering)


@pytest.fixture
def hold_steps(monkeypatch):
    """hold_steps(after): that many steps run, the next one waits: (it has begun, it may go on)."""
    begun, go_on = threading.Event(), threading.Event()
    start = mlxpage.engine.Engine._start

    def hold(after: int = 0):
        steps = itertools.count()

        def waiting(self, batch):
            if next(steps) >= after:
                begun.set()
                assert go_on.wait(SECONDS)
            return start(self, batch)

        monkeypatch.setattr(mlxpage.engine.Engine, "_start", waiting)
        return begun, go_on

    yield hold
    go_on.set()


# -- the conversation --


def test_a_question_asked_while_the_model_loads_is_answered(make_chat, window):
    chat = make_chat()
    ask(chat, window, "Hello")
    assert window.text
    progress = window.progress
    assert progress.index("Loading") < progress.index("Reading") < progress.index("Answering")
    assert progress[-1] == "Ready"
    done, of = window.of("show_progress")[progress.index("Loading")][1:]
    assert 0 < done <= of
    assert len(window.of("show_end")) == 1


def test_the_next_question_finds_the_conversation_in_the_cache(chat, window):
    ask(chat, window, "A first question, long enough for a few blocks of tokens")
    ask(chat, window, "And a second one")
    cached = [line.split("  ·  ")[-1] for (line,) in window.of("show_stats")]
    assert cached[0].startswith("0 of ")
    assert cached[-1].endswith(" prompt tokens cached")
    assert int(cached[-1].split()[0]) >= 64


def test_the_rate_leaves_out_what_the_prompt_took(example):
    answer = example.Answer()
    answer._asked -= 100
    answer.add("abc", 3)
    answer._first = answer._last = answer._asked + 50
    assert answer.stats().startswith("3 tokens  ·  first after 50,000 ms")
    answer.add("d", 4)
    answer._last = answer._first + 2
    assert "7 tokens  ·  2.0 tok/s" in answer.stats()


def test_a_stopped_answer_has_ended_for_the_window_at_once(chat, window, hold_steps):
    begun, go_on = hold_steps()
    chat.send("Hello")
    assert begun.wait(SECONDS)  # its prompt is being computed
    chat.stop()
    assert window.told[-2:] == [("show_end", "Stopped"), ("show_progress", "Ready")]
    assert not chat.is_answering
    go_on.set()
    wait_until(lambda: not chat._engine.stats()["open"])
    assert chat._engine.stats()["output_tokens"] <= 1
    ask(chat, window, "Hello again")
    assert window.of("show_end")[1] == ["Cut short after 24 tokens"]
    assert chat._messages[0]["content"] == "Hello again"  # the other had no answer


def test_a_question_can_be_stopped_while_the_model_loads(make_chat, window, monkeypatch):
    go_on = threading.Event()
    evaluate = mlxpage.metal.model._evaluate

    def waiting(module, on_bytes):
        assert go_on.wait(SECONDS)
        evaluate(module, on_bytes)

    monkeypatch.setattr(mlxpage.metal.model, "_evaluate", waiting)
    chat = make_chat()
    chat.send("Hello")
    chat.stop()
    assert window.of("show_end") == [["Stopped"]]
    assert ("show_progress", "Ready") not in window.told  # it still loads
    go_on.set()
    window.run_until(lambda: window.told[-1] == ("show_progress", "Ready"))
    assert window.text == ""


def test_what_was_stopped_is_part_of_the_conversation(chat, window, hold_steps):
    hold_steps(after=12)
    chat.send("Hello")
    window.run_until(lambda: window.text)
    chat.stop()
    shown = window.text
    assert chat._messages[1] == {"role": "assistant", "content": shown}
    chat.forget()
    assert chat._messages == []


def test_a_model_that_cannot_be_loaded_is_told_once_also_to_who_has_asked(make_chat, window):
    chat = make_chat("/nowhere/at/all")
    chat.send("Hello")
    window.run_until(lambda: window.of("show_failure"))
    assert "/nowhere/at/all" in window.of("show_failure")[0][0]
    assert not chat.is_answering
    assert window.of("show_end") == []


def test_a_conversation_that_is_too_long_is_told_and_the_next_is_answered(chat, window):
    chat.send("x" * 600)  # a token each, and the model's context is 512
    assert "512" in window.of("show_end")[0][0]
    ask(chat, window, "Hello")
    assert len(window.of("show_end")) == 2
    assert window.text


def test_closing_in_the_middle_of_an_answer_ends_all_and_tells_nothing_more(
    chat, window, hold_steps
):
    _, go_on = hold_steps(after=12)
    chat.send("Hello")
    window.run_until(lambda: window.text)
    closing = in_thread(chat.close)
    go_on.set()
    closing.result(SECONDS)
    told = len(window.told)
    while not window.calls.empty():
        window.calls.get()()
    assert len(window.told) == told
    assert chat._engine.state == "closed"


# -- the window --


@pytest.fixture(scope="module")
def display():
    """The environment of a program that opens windows."""
    if sys.platform == "darwin":
        yield dict(os.environ)
    elif xvfb := shutil.which("Xvfb"):
        reading, writing = os.pipe()
        command = [xvfb, "-displayfd", str(writing), "-screen", "0", "1024x768x24"]
        server = subprocess.Popen(command, pass_fds=[writing], stderr=subprocess.DEVNULL)
        os.close(writing)
        with open(reading) as number:
            yield os.environ | {"DISPLAY": f":{number.readline().strip()}"}
        server.terminate()
        server.wait()
    elif os.environ.get("DISPLAY"):
        yield dict(os.environ)
    else:
        pytest.fail(NO_DISPLAY)


@pytest.fixture
def use(display, tiny_folder):
    """use(scenario): does that to the app, in a process of its own; gives what came of it."""

    def run(scenario, model=tiny_folder):
        command = [sys.executable, HERE / "window_driver.py", str(model), scenario.__name__]
        ran = subprocess.run(command, env=display, capture_output=True, text=True, timeout=200)
        assert (ran.returncode, ran.stderr) == (0, ""), ran.stdout + ran.stderr
        return json.loads(ran.stdout) if ran.stdout else None

    return run


@pytest.mark.full
def test_a_window_shows_a_conversation(use):
    seen = use(window_driver.conversation)
    assert seen["asked"] == "Hello"
    question, answer, *rest = seen["page"].split("\n")
    assert question == "Hello"
    assert answer
    assert "And then?" in rest
    first, second = seen["stats"]
    assert "tok/s" in first
    assert "  0 of " in first
    assert "  0 of " not in second


@pytest.mark.full
def test_a_window_stops_by_its_button_and_by_escape(use):
    seen = use(window_driver.stopping)
    assert seen["buttons"] == [True, False]
    assert seen["status"] == "Ready"
    assert seen["page"].count("Stopped") == 2


@pytest.mark.full
@pytest.mark.parametrize(
    "scenario",
    [
        window_driver.closing_while_answering,
        window_driver.closing_while_loading,
        window_driver.ctrl_c,
    ],
    ids=lambda scenario: scenario.__name__,
)
def test_a_window_that_is_closed_ends_the_program_cleanly(use, scenario):
    assert use(scenario) is None


@pytest.mark.full
def test_a_window_says_why_there_is_no_model(use):
    seen = use(window_driver.a_model_that_is_not_there, model="/nowhere/at/all")
    assert "/nowhere/at/all" in seen["page"]
    assert seen["send"] is True


@pytest.mark.skipif(sys.platform == "darwin", reason="windows on a Mac need no DISPLAY")
def test_without_a_display_the_app_says_so(python):
    code = "import sys; from window_driver import load_example; sys.exit(load_example().main([]))"
    env = {name: value for name, value in os.environ.items() if name != "DISPLAY"}
    ran = python(code, cwd=HERE, env=env)
    assert ran.returncode == 1
    assert ran.stderr.startswith("no window can be opened: ")


def test_without_tkinter_the_app_says_where_to_get_it(python):
    code = (
        "import sys; sys.modules['tkinter'] = None; from window_driver import load_example; "
        "sys.exit(load_example().main([]))"
    )
    ran = python(code, cwd=HERE)
    assert ran.returncode == 1
    assert ran.stderr.startswith("no window can be opened: this Python has no tkinter. Debian: ")
    assert ran.stderr.count("\n") == 1
