"""What README and docs say was measured stands in a record, beside the command that measured it.

`docs/paper.md` is made of its record, and is compared with it elsewhere. `docs/log.md` is a diary,
and says so: of what was tried once, by code that is mostly gone.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`[^`]*`|^ {4}.*$", re.MULTILINE)
RECORD = re.compile(r"\]\((?:\.\./)*(benchmarks/results/[\w.-]+\.json)\)")
NUMBER = r"\d[\d,]*(?:\.\d+)?"
FIGURE = re.compile(rf"({NUMBER})\s(?:tok/s|ms|µs|%|GB/s)(?!\w)")
MEASURED = re.compile(rf"({NUMBER})\s(?:tok/s|ms|µs|%|GB/s|s|MB|GB)(?!\w)")
"""In a passage that names a record. Elsewhere, sizes and seconds are what somebody may ask for."""
DEFINED = {"docs/bench.md": {"95"}, "docs/embedding.md": {"5"}}
"""No measurements: intervals of 95 %, and the time after which Python's threads take turns."""
PAGES = [
    "README.md",
    "docs/bench.md",
    "docs/cli.md",
    "docs/embedding.md",
    "docs/examples/README.md",
    "docs/examples/packaging.md",
    "docs/models.md",
]
CELL = re.compile(NUMBER)
# As they are, in per cent, and as thousands, millions or billions of what the record counts.
SCALES = (1, 100, 1e3, 1e-3, 1e-6, 1e-9)


def passages(page: str) -> Iterator[str]:
    """Paragraphs, each with the table that it introduces."""
    blocks = re.split(r"\n\s*\n", FENCED.sub("", page))
    for block, following in zip(blocks, [*blocks[1:], ""], strict=True):
        if not block.startswith("|"):
            yield f"{block}\n{following}" if following.startswith("|") else block


def figures(passage: str, *, is_measured: bool) -> list[str]:
    """Numbers with a unit, and all in a table of what was measured but for its first column."""
    unit = MEASURED if RECORD.search(passage) else FIGURE
    found = unit.findall(CODE.sub("", passage))
    if is_measured:
        rows = [line.split("|")[2:] for line in passage.splitlines() if line.startswith("|")]
        found += [number for row in rows[2:] for cell in row for number in CELL.findall(cell)]
    return found


def numbers(value) -> Iterator[float]:
    if isinstance(value, dict):
        value = value.values()
    elif isinstance(value, (int, float)):
        yield abs(value)
        return
    elif isinstance(value, str) or value is None:
        return
    for inner in value:
        yield from numbers(inner)


def has(record, figure: str) -> bool:
    shown = float(figure.replace(",", ""))
    digits = len(figure.partition(".")[2])
    half = 0.5 * 10**-digits * (1 + 1e-9)
    return any(abs(value * scale - shown) <= half for value in numbers(record) for scale in SCALES)


def claims(page: str) -> list[tuple[str, list[str], str]]:
    """(figure, the records that its passage names, the passage)"""
    found = []
    before, _, measured = page.partition("\n## Measured\n")
    for text, is_measured in ((before, False), (measured, True)):
        for passage in passages(text):
            names = RECORD.findall(passage)
            found += [(f, names, passage) for f in figures(passage, is_measured=is_measured)]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_stands_in_a_record_that_is_named_beside_it(page):
    found = claims((ROOT / page).read_text(encoding="utf-8"))
    for figure, names, passage in found:
        if figure in DEFINED.get(page, ()):
            continue
        assert names, f"{figure} has no record: name one of benchmarks/results in\n{passage}"
        records = [json.loads((ROOT / name).read_text()) for name in names]
        assert any(has(record, figure) for record in records), f"{figure} is not in {names}"


def test_no_page_is_left_out():
    pages = {"README.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))}
    assert pages - set(PAGES) == {"docs/log.md", "docs/paper.md"}


def test_every_record_has_its_command():
    records = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert records
    for record in records:
        assert json.loads(record.read_text())["command"], record.name


def test_figures_are_found_where_they_stand():
    for page, least in [("README.md", 60), ("docs/embedding.md", 10)]:
        assert len(claims((ROOT / page).read_text(encoding="utf-8"))) >= least, page


def test_a_figure_is_found_as_it_was_rounded():
    record = {"a": [{"rate": 1076.6, "share": 0.7913}], "bytes": 180_355_072}
    assert has(record, "1,077") and has(record, "79") and has(record, "180")
    assert not has(record, "1,078") and not has(record, "79.5")
