"""Uses the window of docs/examples/desktop_app.py as people do: clicks, keys, its close button.

    python window_driver.py MODEL SCENARIO

A scenario is a generator, run between Tk's events, that yields what it waits for. The window is
closed at its end, and the last line of the output is what it returned, as JSON.
"""

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

from mlxpage.engine import Engine

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "desktop_app.py"
SECONDS = 120
Scenario = Generator[Callable[[], bool], None, object]


def load_example():
    spec = importlib.util.spec_from_file_location("desktop_app", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def click(button) -> None:
    for event in ("<Enter>", "<ButtonPress-1>", "<ButtonRelease-1>", "<Leave>"):
        button.event_generate(event, x=5, y=5)


def ask(app, text: str) -> None:
    app.entry.insert("end", text)
    click(app.send_button)


def press(app, key: str) -> None:
    app.entry.focus_force()
    app.root.update()
    app.entry.event_generate(key)


def close_window(app) -> None:
    app.root.eval(app.root.protocol("WM_DELETE_WINDOW"))


def page(app) -> str:
    return app.page.get("1.0", "end").strip()


def ready(app) -> bool:
    return app.status.cget("text") == "Ready"


def text_longer_than(app, number: int) -> Callable[[], bool]:
    return lambda: len(page(app)) > number


def conversation(app) -> Scenario:
    ask(app, "Hello")  # while the model loads
    asked = page(app)
    yield lambda: ready(app)
    first = app.stats.cget("text")
    app.entry.insert("end", "And then?")
    press(app, "<Return>")
    yield lambda: not ready(app)
    yield lambda: ready(app)
    return {"asked": asked, "page": page(app), "stats": [first, app.stats.cget("text")]}


def stopping(app) -> Scenario:
    yield lambda: ready(app)
    ask(app, "Hello")
    yield text_longer_than(app, len("Hello") + 4)
    buttons = [button.instate(["disabled"]) for button in (app.send_button, app.stop_button)]
    click(app.stop_button)
    told = app.status.cget("text"), page(app)
    ask(app, "Again")
    yield text_longer_than(app, len(told[1]) + len("Again") + 4)
    press(app, "<Escape>")
    return {"buttons": buttons, "status": told[0], "page": page(app)}


def closing_while_answering(app) -> Scenario:
    ask(app, "Hello")
    yield text_longer_than(app, len("Hello") + 4)
    close_window(app)


def closing_while_loading(app) -> Scenario:
    yield lambda: app.status.cget("text").startswith("Loading")
    ask(app, "Hello")
    close_window(app)


def ctrl_c(app) -> Scenario:
    ask(app, "Hello")
    yield text_longer_than(app, len("Hello") + 4)
    os.kill(os.getpid(), signal.SIGINT)
    yield lambda: False


def a_model_that_is_not_there(app) -> Scenario:
    yield lambda: app.status.cget("text") == "No model"
    return {"page": page(app), "send": app.send_button.instate(["disabled"])}


def drive(app, scenario: Scenario) -> None:
    """Lets the scenario go on whenever what it waits for has come."""
    limit = time.monotonic() + SECONDS

    def step(waits_for: Callable[[], bool]) -> None:
        if time.monotonic() > limit:
            print(f"waited in vain; the page is {page(app)!r}", file=sys.stderr, flush=True)
            os._exit(3)
        try:
            while waits_for():
                waits_for = next(scenario)
        except StopIteration as end:
            if end.value is None:  # it has closed the window itself
                return
            print(json.dumps(end.value))
            app.close()
            return
        app.root.after(10, step, waits_for)

    app.root.after(0, step, lambda: True)


def slow_steps() -> None:
    """So that there is time to stop an answer."""
    start = Engine._start

    def slowly(self, batch):
        time.sleep(0.02)
        return start(self, batch)

    Engine._start = slowly


def main(model: str, scenario: str) -> int:
    example = load_example()
    make = example.App

    def made(model, params, **options):
        params = replace(params, max_tokens=100, ignore_eos=True)
        app = make(model, params, num_blocks=64, **options)
        drive(app, globals()[scenario](app))
        return app

    example.App = made
    slow_steps()
    code = example.main([model])
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("mlxpage")]
    assert not left or scenario == "closing_while_loading", left
    return code


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
