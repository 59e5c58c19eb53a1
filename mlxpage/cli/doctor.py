"""`mlxpage doctor`: what is in the way, and a report to send."""

from __future__ import annotations

import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any, TextIO

import click

from mlxpage.cli import report
from mlxpage.cli.files import told
from mlxpage.cli.output import color, say
from mlxpage.errors import InvalidRequest

FAILED = 7  # the exit code when a check finds a problem
_COLOURS = {"ok": "green", "advice": "yellow", "problem": "red", "unknown": "cyan"}
_NEW = "mlxpage-report-%Y%m%d-%H%M%S.md"


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option(
    "--report",
    "target",
    metavar="[FILE]",
    is_flag=False,
    flag_value="",
    help="Measure too, some minutes, and write one file to send.",
)
@click.option("--model", help="What the report measures.  [default: smollm2-135m]")
def command(as_json, target, model):
    """Whether this machine can serve models, and what is in the way.

    Each check is ok, an advice, a problem or unknown; with a problem, the exit code is 7. Nothing
    is changed.

    With --report, the demo model is loaded as well, its tokens are compared with those of mlx-lm,
    and both are timed. The FILE, or a new one, has all results, and no names, folders or prompts.
    """
    if model is not None and target is None:
        raise InvalidRequest("--model is what a report measures; give --report too")
    if as_json and target == "-":
        raise InvalidRequest("--json and a report to '-' are both for standard output; give a FILE")
    if target is None:
        return _examine(as_json)[0]
    began, created = time.perf_counter(), datetime.now(UTC)
    target = target or created.strftime(_NEW)
    with _new_file(target) as file:
        code, checks = _examine(as_json, is_shown=target != "-")
        record = {"schema": "mlxpage.report/1", "created": created.isoformat(timespec="seconds")}
        record |= {"is_complete": False, "checks": checks, "parts": {}}
        try:
            _measure(model, record["parts"])
            record["is_complete"] = True
        finally:  # Ctrl-C too: what there is
            record["failures"] = report.failures(record["parts"])
            record["seconds"] = round(time.perf_counter() - began, 1)
            file.write(report.page(report.clean(record)))
            file.flush()
            if target != "-":
                say(f"{target} is there to be sent; it has no names, folders or prompts of yours")
    return FAILED if record["failures"] else code


def _examine(as_json: bool, is_shown: bool = True) -> tuple[int, list[dict[str, Any]]]:
    """The exit code, and all checks; each is shown as soon as it's known."""
    from mlxpage import doctor

    checks = []
    for check in doctor.examine():
        checks.append(asdict(check))
        if is_shown and not as_json:
            _show(check)
    if as_json:
        click.echo(json.dumps({"schema": "mlxpage.doctor/1", "checks": checks}))
    return FAILED if any(c["state"] == "problem" for c in checks) else 0, checks


def _show(check) -> None:
    click.secho(f"{check.state:8}", fg=_COLOURS[check.state], nl=False, color=color())
    click.echo(f" {check.name:13}  {check.found}")
    if check.way_out:
        click.echo(f"{'':22}  -> {check.way_out}")


def _new_file(target: str) -> AbstractContextManager[TextIO]:
    """Opened before anything is measured: it could be in vain."""
    if target == "-":
        return nullcontext(sys.stdout)
    with told("write", target, "give a FILE that isn't there yet") as path:
        return open(path, "x", encoding="utf-8")


def _measure(model: str | None, parts: dict[str, Any]) -> None:
    try:
        from mlxpage import acceptance
    except Exception as error:  # MLX can't be imported: a check has told why
        parts["model"] = {"error": f"{type(error).__name__}: {error}"}
        return
    acceptance.measure(model or acceptance.DEMO, parts, on_status=lambda line: say(line, dim=True))
