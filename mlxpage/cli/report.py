"""A report to send: a page for people, with all of it as JSON at its end, and nothing of theirs."""

from __future__ import annotations

import getpass
import json
import os
import platform
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Row = Iterable[Any]


def clean(value: Any, folders: dict[str, str] | None = None) -> Any:
    """`value` without names of users, machines and folders in its strings."""
    folders = _folders() if folders is None else folders
    if isinstance(value, dict):
        return {key: clean(item, folders) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item, folders) for item in value]
    if not isinstance(value, str):
        return value
    for folder in sorted(folders, key=len, reverse=True):
        value = value.replace(folder, folders[folder])
    value = re.sub(r"/(?:Users|home)/[^/\s:;,'\")\]]+", "~", value)
    # Of other paths, the last part: a library, say.
    value = re.sub(r"(?<![\w.~>/:])(?:/[^/\s:;,'\")\]]+)+/([^/\s:;,'\")\]]+)", r".../\1", value)
    for name in _names():
        value = re.sub(rf"\b{re.escape(name)}\b", "<name>", value)
    return value


def _folders() -> dict[str, str]:
    """What stands for folders that may be anywhere."""
    found = {str(Path.home()): "~", os.getcwd(): "<folder>", tempfile.gettempdir(): "<temporary>"}
    for variable in ("MLXPAGE_CACHE", "HF_HOME", "HF_HUB_CACHE"):
        if folder := os.environ.get(variable):
            found[folder] = f"<{variable}>"
    return {folder: label for folder, label in found.items() if len(folder) > 1}


def _names() -> set[str]:
    try:
        user = getpass.getuser()
    except (OSError, KeyError):
        user = ""
    node = platform.node()
    return {name for name in (user, node, node.partition(".")[0]) if len(name) > 3} - {"localhost"}


def failures(parts: dict[str, Any]) -> list[str]:
    """What is wrong in what was measured."""
    wrong = [f"{part}: {found['error']}" for part, found in parts.items() if "error" in found]
    cases = parts.get("kernels", {}).get("cases", {})
    wrong += [f"kernels, {case}: {error}" for case, error in cases.items() if error]
    runs = parts.get("same_tokens", {}).get("concurrency", {})
    return wrong + [
        f"same tokens: {len(run['different'])} of {run['prompts']} prompts got others, {n} at once"
        for n, run in runs.items()
        if run["different"]
    ]


def page(record: dict[str, Any]) -> str:
    """Markdown of a record."""
    parts = record["parts"]
    lines = [
        "# mlxpage report",
        "",
        f"{record['created']}, {record['seconds']} s"
        + ("" if record["is_complete"] else ", interrupted: not all of it was measured"),
        "",
        "Nothing in here is of you: no names, no folders, no prompts. Please read it before you "
        "send it.",
        "",
        *(f"- **{line}**" for line in record["failures"]),
        "",
        *_table(
            ("check", "", "found"), ((c["name"], c["state"], c["found"]) for c in record["checks"])
        ),
    ]
    sections = {
        "kernels": _kernels,
        "attention": _attention,
        "model": _model,
        "same_tokens": _same_tokens,
        "decode": _decode,
        "prefill": _prefill,
    }
    for name, section in sections.items():
        lines += ["", f"## {name.replace('_', ' ').capitalize()}", ""]
        found = parts.get(name)
        if found is None:
            lines.append("not measured")
        elif why := found.get("error") or found.get("skipped"):
            lines.append(why)
        else:
            lines += section(found)
    lines += ["", "## All of it", "", "```json", json.dumps(record), "```", ""]
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: Iterable[Row]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def _kernels(found: dict[str, Any]) -> Iterator[str]:
    return _table(
        ("case", ""), ((case, error or "right") for case, error in found["cases"].items())
    )


def _attention(found: dict[str, Any]) -> Iterator[str]:
    yield f"This GPU copies {found['copy_gb_s']} GB/s, bytes read and written."
    yield ""
    yield from _table(
        ("sequences x tokens", "by", "µs", "GB/s", "% of a copy"),
        (
            (shape, arm, run["us"], run["gb_s"], run["copy_percent"])
            for shape, arms in found["shapes"].items()
            for arm, run in arms.items()
        ),
    )


def _model(found: dict[str, Any]) -> Iterator[str]:
    return _table(("", ""), found.items())


def _same_tokens(found: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{found['tokens']} greedy tokens after each prompt, against mlx-lm's own; logits closer "
        f"than {found['near_tie']:.2g} are a tie."
    )
    yield ""
    yield from _table(
        ("at once", "prompts", "same", "near ties", "different"),
        (
            (n, run["prompts"], run["same"], len(run["near_ties"]), len(run["different"]))
            for n, run in found["concurrency"].items()
        ),
    )


def _decode(found: dict[str, Any]) -> Iterator[str]:
    return _table(
        ("sequences", "by", "tok/s", "of", "peak memory MB"),
        (
            (n, arm, run["tok_s"], run["runs"], round(run["peak_bytes"] / 1e6))
            for n, arms in found["concurrency"].items()
            for arm, run in arms.items()
        ),
    )


def _prefill(found: dict[str, Any]) -> Iterator[str]:
    runs = [(arm, found[arm]) for arm in ("mlxpage", "mlx_lm")]
    return _table(
        ("tokens", "by", "tok/s", "of", "peak memory MB"),
        (
            (found["prompt_tokens"], arm, run["tok_s"], run["runs"], round(run["peak_bytes"] / 1e6))
            for arm, run in runs
        ),
    )
