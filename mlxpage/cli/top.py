"""`mlxpage top`: an engine at work."""

from __future__ import annotations

import json
import math
import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from mlxpage import monitor
from mlxpage.cli.output import say
from mlxpage.errors import InvalidRequest, Unreachable

ANSWER_SECONDS = 60.0  # a snapshot waits for the step that is under way
REDRAW_SECONDS = 0.5  # while it does, and for a terminal whose size changes
FRAME_LINES = 48  # of a frame that no terminal limits


class _Seconds(click.FloatRange):
    name = "number"

    def convert(self, value, param, ctx):
        seconds = super().convert(value, param, ctx)
        if math.isnan(seconds):  # which is in no range, and outside of none
            self.fail(f"{value!r} is no number.", param, ctx)
        return seconds


@click.command()
@click.argument("pid", required=False)
@click.option(
    *("--interval", "seconds"),
    type=_Seconds(0.1, 60),
    metavar="SECONDS",
    default=0.5,
    show_default=True,
    help="From one look to the next.",
)
@click.option("--once", is_flag=True, help="Look once, and print that.")
@click.option("--json", "as_json", is_flag=True, help="A line of JSON for each look.")
def command(pid, seconds, once, as_json):
    """Watch an engine of yours: its pages, its sequences, and what they take.

    That is one that another command has loaded, or a program with LLM(..., monitor=True). PID says
    which, if there are several. q ends it, and the engine goes on.
    """
    if not (once or as_json or _can_be_drawn_on()):
        raise InvalidRequest("top draws on a terminal, and this is none; give --once or --json")
    watch = _choose(pid, asks=not (once or as_json))
    try:
        if as_json:
            _print_json(watch, seconds, once)
        elif once:
            _print_frame(watch)
        else:
            _draw(watch, seconds)
    except EOFError:
        say(f"engine {watch.hello['engine']} ({watch.hello['model']}) has ended")


def _can_be_drawn_on() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown", "", None)


# -- which --


def _choose(pid: str | None, *, asks: bool) -> monitor.Watch:
    found = monitor.engines()
    if not found:
        raise Unreachable(
            "no engine runs that could be shown. Those of other commands can be, unless "
            "MLXPAGE_MONITOR=off, and those of programs with LLM(..., monitor=True)."
        )
    named = [watch for watch in found if pid is None or pid in _names(watch)]
    if not named:
        raise Unreachable(f"there is no engine {pid}; there are\n{_listed(found)}")
    if len(named) > 1 and asks and sys.stdin.isatty():
        say(_listed(named))
        engines = {watch.hello["engine"]: watch for watch in named}
        return engines[click.prompt("Which", type=click.Choice(list(engines)), err=True)]
    if len(named) > 1:
        raise InvalidRequest(f"{len(named)} engines run; name one of them:\n{_listed(named)}")
    return named[0]


def _names(watch: monitor.Watch) -> tuple[str, str]:
    return watch.hello["engine"], str(watch.hello["pid"])


def _listed(watches: list[monitor.Watch]) -> str:
    return "\n".join(f"  {w.hello['engine']:<12}  {w.hello['model']}" for w in watches)


# -- looks --


def _look(watch: monitor.Watch) -> dict:
    watch.ask()
    snapshot = watch.receive(ANSWER_SECONDS)
    if snapshot is None:
        raise Unreachable(
            f"engine {watch.hello['engine']} hasn't answered in {ANSWER_SECONDS:.0f} s; a step of "
            "it takes that long, or its process is stopped"
        )
    return snapshot


def _print_json(watch: monitor.Watch, seconds: float, once: bool) -> None:
    while True:
        click.echo(json.dumps(_look(watch)))
        if once:
            return
        time.sleep(seconds)


def _print_frame(watch: monitor.Watch) -> None:
    from rich.console import Console

    from mlxpage.cli import top_view

    console = Console(highlight=False)
    history = top_view.History()
    history.add(_look(watch))
    height = console.height if console.is_terminal else FRAME_LINES
    for line in top_view.lines(history, console.width, height, letters=_needs_letters(console)):
        line.rstrip()
        console.print(line, no_wrap=True, crop=False)


def _draw(watch: monitor.Watch, seconds: float) -> None:
    """Until q is pressed. Raises EOFError when the engine ends."""
    from rich.console import Console, Group
    from rich.live import Live

    from mlxpage.cli import top_view

    console = Console(highlight=False)
    letters = _needs_letters(console)
    history = top_view.History()
    with _keys() as keys, Live(console=console, screen=True, auto_refresh=False) as live:
        asked, next_look = None, 0.0
        while True:
            now = time.monotonic()
            if asked is None and now >= next_look:
                watch.ask()
                asked, next_look = now, now + seconds
            wait = REDRAW_SECONDS if asked is not None else min(REDRAW_SECONDS, next_look - now)
            ready, _, _ = select.select([watch, *keys], [], [], wait)
            if keys and keys[0] in ready and _is_quit(keys):
                return
            if watch in ready and (snapshot := watch.receive(0)) is not None:
                history.add(snapshot)
                asked = None
            if history.snapshot is not None:
                late = time.monotonic() - asked if asked is not None else 0.0
                note = f"a step takes {late:.0f} s  q quits" if late >= 1 else "q quits"
                size = console.size
                drawn = top_view.lines(history, *size, letters=letters, note=note)
                live.update(Group(*drawn), refresh=True)


def _needs_letters(console) -> bool:
    return console.no_color or console.color_system is None or console.options.ascii_only


@contextmanager
def _keys() -> Iterator[list[int]]:
    """Keys as they are pressed, without Return and unseen, if there is a keyboard."""
    if not sys.stdin.isatty():
        yield []
        return
    import termios
    import tty

    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    try:
        yield [keyboard]
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _is_quit(keys: list[int]) -> bool:
    pressed = os.read(keys[0], 64)
    if not pressed:  # nobody is there any more
        keys.clear()
    return b"q" in pressed.lower()
