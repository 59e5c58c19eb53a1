"""Bars for people who wait: on a terminal's stderr, and gone when they are done."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mlxpage.cli.output import is_terminal
from mlxpage.events import Prefill

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def loading_bar(quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A function that takes the bytes loaded so far and in all, if somebody watches."""
    if quiet or not is_terminal(sys.stderr):
        yield None
        return
    from rich.progress import DownloadColumn

    with bar(DownloadColumn()) as shown:
        task = shown.add_task("loading", total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


class PrefillBar:
    """How many tokens of the prompts are computed, where that takes more than a step."""

    def __init__(self, num_tokens: int, *, quiet: bool = False):
        """`num_tokens` of all prompts."""
        self._total = num_tokens
        self._done: dict[int, int] = {}
        self._bar: Progress | None = None
        self._is_over = quiet or not is_terminal(sys.stderr)

    def show(self, event: Prefill, index: int = 0) -> None:
        """`index` is of the prompt."""
        self._done[index] = event.num_computed_tokens
        done = sum(self._done.values())
        if self._is_over or (self._bar is None and done == self._total):
            return
        if self._bar is None:
            from rich.progress import MofNCompleteColumn, TextColumn

            self._bar = bar(MofNCompleteColumn(), TextColumn("tokens"))
            self._bar.add_task("reading", total=self._total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done)

    def hide(self) -> None:
        """Before something else is printed; it doesn't come back."""
        self._is_over = True
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> PrefillBar:
        return self

    def __exit__(self, *_) -> None:
        self.hide()


def bar(*figures) -> Progress:
    """What a task is called, a bar, and figures of it: columns of rich's."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *figures,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # to stderr: an answer isn't to go there
    )
