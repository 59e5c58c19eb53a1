"""What a benchmark leaves behind, and how two of them compare."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlxpage import probes
from mlxpage.bench import machine
from mlxpage.bench.kinds import KINDS
from mlxpage.bench.runs import Arm, drift
from mlxpage.errors import InvalidRequest

SCHEMA = "mlxpage.bench/1"


def make(
    benchmark: str,
    model: str | None,
    settings: dict[str, Any],
    arms: list[Arm],
    **facts: Any,
) -> dict[str, Any]:
    """`docs/bench.md` explains every key."""
    return {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "model": model,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.machine(),
        "versions": probes.versions(),
        "settings": settings,
        **facts,
        "rows": [arm.row() for arm in arms],
        "drift": drift(arms, KINDS[benchmark].main),
        "better": KINDS[benchmark].better,
    }


def read(path: Path) -> dict[str, Any]:
    """Raises InvalidRequest for anything but a record."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"can't read {path}: {reason}") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise InvalidRequest(
            f"{path} is no record of a benchmark ({SCHEMA}); make one with --json FILE"
        )
    return record


@dataclass(frozen=True, slots=True)
class Change:
    """Of one metric of one row."""

    case: dict[str, Any]
    metric: str
    old: float
    new: float
    ratio: float
    """Above 1 is better, whether higher or lower values are."""
    overlap: bool | None
    """Whether the 95 % intervals do; None without intervals."""

    def describe(self) -> str:
        """One line for people."""
        case = ", ".join(f"{name} {value}" for name, value in self.case.items())
        within = ", within what runs differ by" if self.overlap else ""
        change = f"{self.old:,.4g} to {self.new:,.4g}"
        return f"{self.ratio:.3f}  {self.metric}: {change}{within} ({case})"


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """The metrics of rows with the same `case`. Raises InvalidRequest if there are none."""
    if old["benchmark"] != new["benchmark"]:
        raise InvalidRequest(
            f"a record of bench {old['benchmark']} can't be compared with bench {new['benchmark']}"
        )
    before = {_key(row["case"]): row for row in old["rows"]}
    changes = [
        _change(metric, better, before[_key(row["case"])], row)
        for row in new["rows"]
        if _key(row["case"]) in before
        for metric, better in new["better"].items()
        if metric in row["metrics"] and metric in before[_key(row["case"])]["metrics"]
    ]
    if not changes:
        raise InvalidRequest(
            "the two records have no row of the same settings: run it with those of the first"
        )
    return changes


def _key(case: dict[str, Any]) -> str:
    return json.dumps(case, sort_keys=True)


def _change(metric: str, better: str, old: dict[str, Any], new: dict[str, Any]) -> Change:
    was, now = old["metrics"][metric], new["metrics"][metric]
    above, below = (now, was) if better == "higher" else (was, now)
    ratio = above / below if below else math.inf if above else 1.0
    ends = old["interval"].get(metric), new["interval"].get(metric)
    overlap = None
    if all(ends):
        (a, b), (c, d) = ends
        overlap = a <= d and c <= b
    return Change(new["case"], metric, was, now, ratio, overlap)


_SAME = ("model", "machine", "versions", "settings")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What else the two records differ in, a line each."""
    found = []
    for part in _SAME:
        was, now = old.get(part), new.get(part)
        if not (isinstance(was, dict) and isinstance(now, dict)):
            was, now = {part: was}, {part: now}
        found += [
            f"{name} was {was.get(name)}, is {now.get(name)}"
            for name in dict.fromkeys([*was, *now])
            if was.get(name) != now.get(name)
        ]
    return found
