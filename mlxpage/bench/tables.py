"""A record as text: a Markdown table, CSV, JSON or JSON lines."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from mlxpage.bench.kinds import KINDS, Column, Kind


def text_of(record: dict[str, Any], form: str) -> str:
    """Ends with a newline."""
    match form:
        case "json":
            return json.dumps(record) + "\n"
        case "jsonl":
            return "".join(json.dumps(line) + "\n" for line in lines(record))
        case "csv":
            return _csv(record)
    return markdown(record)


def lines(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Each row with what a reader needs who has nothing else."""
    common = {name: record[name] for name in ("schema", "benchmark", "model", "date")}
    common |= {"chip": record["machine"]["chip"], "device": record["machine"]["device"]}
    common |= {"mlxpage": record["versions"]["mlxpage"]}
    return [common | flat(row) for row in record["rows"]]


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row on one level, the ends of intervals as `NAME_low` and `NAME_high`."""
    result = row["case"] | row["metrics"] | row.get("facts", {})
    for name, ends in row["interval"].items():
        if ends is not None:
            result |= {f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return result


def _csv(record: dict[str, Any]) -> str:
    rows = lines(record)
    names = dict.fromkeys(name for row in rows for name in row)
    out = io.StringIO()
    writer = csv.DictWriter(out, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def markdown(record: dict[str, Any]) -> str:
    kind = KINDS[record["benchmark"]]
    rows = record["rows"]
    extra = [c for c in kind.extra if any(value_of(row, c.key) is not None for row in rows)]
    columns = [*kind.columns, *extra]
    cells = [[column.title for column in columns]]
    cells += [[cell(row, column, kind) for column in columns] for row in rows]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(columns))]
    are_words = [all(isinstance(value_of(row, c.key), str) for row in rows) for c in columns]
    rule = [
        f"{'-' * (w - 1)}{'-' if words else ':'}"
        for w, words in zip(widths, are_words, strict=True)
    ]
    cells.insert(1, rule)
    return "".join(
        "| "
        + " | ".join(
            part.ljust(width) if words else part.rjust(width)
            for part, width, words in zip(line, widths, are_words, strict=True)
        )
        + " |\n"
        for line in cells
    )


def value_of(row: dict[str, Any], key: str) -> Any:
    for part in ("case", "metrics", "facts"):
        if key in row.get(part, {}):
            return row[part][key]
    return None


def cell(row: dict[str, Any], column: Column, kind: Kind) -> str:
    """The median, and for what is compared the 95 % interval of the mean, if there is one."""
    value = value_of(row, column.key)
    if value is None:
        return ""
    text = shown(value, column.form)
    ends = row["interval"].get(column.key) if column.key in kind.better else None
    if ends is None:
        return text
    return f"{text} ({shown(ends[0], column.form)} to {shown(ends[1], column.form)})"


def shown(value: Any, form: str) -> str:
    if isinstance(value, str):
        return value
    if form == "mega":
        return f"{value / 1e6:,.1f}"
    return f"{value:{form}}"
