"""Which statements of kernels have run, over many runs."""

from __future__ import annotations

from dataclasses import dataclass

from .build import Program


@dataclass(frozen=True)
class Line:
    """A line that has statements which never ran: ``count`` of ``total``."""

    file: str
    line: int
    text: str
    count: int
    total: int

    def __str__(self) -> str:
        part = f" ({self.count} of {self.total} statements)" if self.total > 1 else ""
        return f"{self.file}:{self.line}: never ran{part}: {self.text}"


class Coverage:
    """Collects while it is the target of a ``with``.

        with metal_sim.coverage() as covered:
            ...  # kernels run
        assert covered.files and not covered.missing(), covered.report()

    A statement counts as run when any instance of the kernel's templates has run it, in any run.
    Which lines hold statements is known from the text, so what no instance compiles is missing too.
    """

    def __init__(self) -> None:
        # By file and line: whether each statement of it ran, and the line's text.
        self._ran: dict[tuple[str, int], list[bool]] = {}
        self._text: dict[tuple[str, int], str] = {}

    def __enter__(self) -> Coverage:
        _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _active.remove(self)

    @property
    def files(self) -> list[str]:
        """The files of the kernels that have run."""
        return sorted({file for file, _ in self._ran})

    def missing(self, file: str | None = None) -> list[Line]:
        """The lines with statements that never ran, of all files or of one."""
        return [
            Line(*key, self._text[key], ran.count(False), len(ran))
            for key, ran in sorted(self._ran.items())
            if not all(ran) and file in (None, key[0])
        ]

    def report(self) -> str:
        """A line per file, then the missing ones."""
        summary = []
        for file in self.files:
            lines = [all(ran) for (of, _), ran in self._ran.items() if of == file]
            summary.append(f"{file}: {sum(lines)} of {len(lines)} lines ran")
        return "\n".join([*summary, *map(str, self.missing())])

    def _add(self, program: Program, statements_run) -> None:
        by_line: dict[int, list[bool]] = {}
        for number, line in enumerate(program.statement_lines, 1):
            by_line.setdefault(line, []).append(bool(statements_run[number]))
        for line, ran in by_line.items():
            place = program.text.place(line)
            key = (place.file, place.line)
            before = self._ran.get(key, [False] * len(ran))
            self._ran[key] = [a or b for a, b in zip(before, ran, strict=True)]
            self._text[key] = program.text.line_text(line).strip()


_active: list[Coverage] = []


def add(program: Program, statements_run) -> None:
    """Takes down what a run has run, and clears it for the next one."""
    for coverage in _active:
        coverage._add(program, statements_run)
    for number in range(len(statements_run)):
        statements_run[number] = 0
