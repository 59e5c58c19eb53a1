"""A record drawn: in the terminal, or into a PNG file."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlxpage.bench.kinds import KINDS
from mlxpage.bench.tables import value_of
from mlxpage.errors import InvalidRequest

ROOFLINE = "roofline,"
"""How lines are called that show it."""


@dataclass(slots=True)
class Figure:
    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[Any, float]]] = field(default_factory=dict)
    """Points of each; bars if their x are words."""

    @property
    def has_bars(self) -> bool:
        return any(isinstance(x, str) for points in self.lines.values() for x, _ in points)

    @property
    def labels(self) -> list[str]:
        """Of bars."""
        return list(dict.fromkeys(str(x) for points in self.lines.values() for x, _ in points))

    def heights(self, line: str) -> list[float]:
        """Of the bars at each of the labels."""
        at = {str(x): y for x, y in self.lines[line]}
        return [at.get(label, 0.0) for label in self.labels]


def figure_of(record: dict[str, Any]) -> Figure:
    kind = KINDS[record["benchmark"]]
    title = f"{record['benchmark']} {record['model'] or ''}".strip()
    figure = Figure(title, kind.x, kind.y)
    for row in record["rows"]:
        name = kind.y if kind.line is None else f"{kind.line} {value_of(row, kind.line)}"
        y = value_of(row, kind.y)
        if y is None:
            continue
        x = value_of(row, kind.x)
        figure.lines.setdefault(name, []).append((x, y))
        if percent := value_of(row, "roofline_percent"):
            line = f"{ROOFLINE} {name}"
            figure.lines.setdefault(line, []).append((x, 100 * y / percent))
    return figure


def check_installed(package: str) -> None:
    """Raises InvalidRequest without `package`."""
    if find_spec(package) is None:
        raise InvalidRequest(
            f"to draw, {package} must be installed, and isn't: pip install 'mlxpage[plots]'"
        )


def in_terminal(record: dict[str, Any]) -> str:
    """By plotext."""
    import plotext

    figure = figure_of(record)
    plotext.clear_figure()
    plotext.plot_size(80, 20)
    plotext.theme("clear")
    if figure.has_bars:
        heights = [figure.heights(name) for name in figure.lines]
        plotext.multiple_bar(figure.labels, heights, labels=list(figure.lines))
    else:
        for name, points in figure.lines.items():
            plotext.plot(*_columns(points), label=name, marker="braille")
    plotext.title(figure.title)
    plotext.xlabel(figure.x)
    plotext.ylabel(figure.y)
    return plotext.build()


def to_png(record: dict[str, Any], path: Path) -> None:
    """By matplotlib. Raises InvalidRequest if the file can't be written."""
    from matplotlib.figure import Figure as Canvas

    figure = figure_of(record)
    canvas = Canvas(figsize=(8, 5), layout="constrained")
    axes = canvas.add_subplot()
    if figure.has_bars:
        width = 0.8 / len(figure.lines)
        for index, name in enumerate(figure.lines):
            places = [place + index * width for place in range(len(figure.labels))]
            axes.bar(places, figure.heights(name), width, label=name)
        middle = (len(figure.lines) - 1) * width / 2
        axes.set_xticks([place + middle for place in range(len(figure.labels))], figure.labels)
    else:
        for name, points in figure.lines.items():
            style = "--" if name.startswith(ROOFLINE) else "o-"
            axes.plot(*_columns(points), style, label=name)
    axes.set(title=figure.title, xlabel=figure.x, ylabel=figure.y)
    axes.set_ylim(bottom=0)
    axes.legend()
    try:
        canvas.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise InvalidRequest(f"can't write {path}: {error.strerror or error}") from None


def _columns(points: list[tuple[Any, float]]) -> tuple[list[Any], list[float]]:
    ordered = sorted(points)
    return [x for x, _ in ordered], [y for _, y in ordered]
