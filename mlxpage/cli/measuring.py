"""What the commands of `mlxpage bench` have in common: options, progress, and the results."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlxpage.cli.loading import load_llm, loaded
from mlxpage.cli.options import options
from mlxpage.cli.output import is_terminal, say
from mlxpage.cli.progress import bar
from mlxpage.errors import InvalidRequest

if TYPE_CHECKING:
    from mlxpage.bench.runs import Arm
    from mlxpage.bench.workloads import Item

FELL_BELOW = 7
"""Exit code: slower than `--fail-below` allows."""

_FILE = click.Path(dir_okay=False, path_type=Path)
_ENGINE = ("adapter_path", "memory", "num_blocks", "block_size", "kv_bits", "backend", "dtype")
_ENGINE += ("max_num_batched_tokens",)
_REPORTING = ("form", "json_file", "compare_with", "fail_below", "plot", "png", "quiet")


class Integers(click.ParamType):
    name = "n,..."

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        try:
            numbers = [int(part) for part in str(value).split(",")]
        except ValueError:
            numbers = []
        if not numbers or min(numbers) < 1:
            self.fail(f"{value!r} must be whole numbers from 1 on, as in 1,2,4", param, ctx)
        return numbers


class Rates(click.ParamType):
    name = "rate,..."

    def convert(self, value, param, ctx):
        if isinstance(value, list):
            return value
        try:
            rates = [float(part) for part in str(value).split(",")]
        except ValueError:
            rates = []
        if not rates or not all(rate > 0 for rate in rates):
            self.fail(f"{value!r} must be requests a second, as in 1,2.5 or inf", param, ctx)
        return rates


class Gap(click.ParamType):
    name = "ms|auto|none"

    def convert(self, value, param, ctx):
        words = {"auto": "auto", "none": None}
        if (word := str(value).lower()) in words:
            return words[word]
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} must be milliseconds, auto or none", param, ctx)


def measuring(repeats: int, *names: str):
    """How often everything is done."""
    return options(
        click.option(
            *names,
            "-r",
            "--repeats",
            "repeats",
            type=click.IntRange(1),
            default=repeats,
            show_default=True,
            help="Times that each is measured.",
        ),
        click.option(
            "--delay",
            type=click.FloatRange(0),
            default=0.0,
            help="Seconds to cool down before each.",
        ),
        click.option("--no-warm-up", is_flag=True, help="Measure from the first moment on."),
    )


reporting = options(
    click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same work."),
    click.option(
        "-o",
        "--output",
        "form",
        type=click.Choice(["md", "csv", "json", "jsonl"]),
        default="md",
        show_default=True,
        help="What stdout gets.",
    ),
    click.option("--json", "json_file", type=_FILE, help="Write the whole record there too."),
    click.option("--compare", "compare_with", type=_FILE, help="A record to compare with."),
    click.option(
        "--fail-below", type=float, help="Exit with 7 if any ratio to --compare is less: 0.95."
    ),
    click.option("--plot", is_flag=True, help="Draw the results in the terminal."),
    click.option("--png", type=_FILE, help="Draw them into a file."),
    click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors."),
)
"""What becomes of the results."""

steps = click.option(
    "--max-num-batched-tokens",
    type=int,
    default=512,
    show_default=True,
    help="Tokens of prompts in a step.",
)


def workload(num_prompts: int):
    """What is served."""
    return options(
        click.option(
            "--dataset",
            type=click.Choice(["random", "text", "shared-prefix", "sharegpt", "replay"]),
            default="random",
            show_default=True,
            help="What prompts are made of.",
        ),
        click.option("--dataset-path", type=_FILE, help="The file of text, sharegpt or replay."),
        click.option(
            "--num-prompts", type=int, default=num_prompts, show_default=True, help="Requests."
        ),
        click.option(
            "--input-len", type=int, default=256, show_default=True, help="Tokens of a prompt."
        ),
        click.option(
            "--output-len", type=int, default=64, show_default=True, help="Tokens after it."
        ),
        click.option(
            "--range-ratio", type=float, default=0.0, help="Spread of both: 0.5 is ±50 %."
        ),
        click.option("--chat-lengths", type=int, help="Lengths like ShareGPT's, up to so many."),
        click.option(
            "--prefix-len",
            type=int,
            default=256,
            show_default=True,
            help="Tokens of a shared prefix.",
        ),
        click.option(
            "--num-prefixes",
            type=int,
            default=1,
            show_default=True,
            help="Shared prefixes.",
        ),
    )


def goals_of(written: tuple[str, ...]) -> dict[str, float]:
    """Milliseconds of "ttft:500" and the like."""
    from mlxpage.bench.timeline import GOALS

    goals = {}
    for part in " ".join(written).replace(",", " ").split():
        name, _, limit = part.partition(":")
        try:
            goals[name] = float(limit)
        except ValueError:
            goals[name] = 0.0
        if name not in GOALS or not goals[name] > 0:
            raise InvalidRequest(
                f"--goodput is {part!r}; it must be milliseconds for {', '.join(GOALS)}: ttft:500"
            )
    return goals


class Measurement:
    """One run of a command: its options, the model before and while it is loaded, its record."""

    def __init__(self, benchmark: str, model: str | None, given: dict[str, Any]):
        """`given` are the options that commands have in common."""
        self.benchmark, self.model = benchmark, model
        self._reporting = {name: given.pop(name) for name in _REPORTING}
        self.quiet = self._reporting["quiet"]
        self.engine = {name: given.pop(name) for name in _ENGINE if name in given}
        self.settings = given
        self.facts: dict[str, Any] = {"command": shlex.join(["mlxpage", *sys.argv[1:]])}
        self._check()
        if model is not None:
            from mlxpage.bench.subject import look_at

            self.subject = look_at(model, on_status=self._say, **self.engine)

    def _say(self, line: str) -> None:
        if not self.quiet:
            say(line, dim=True)

    def _check(self) -> None:
        """What would be found out when all has been measured."""
        from mlxpage.bench import figures, record

        given = self._reporting
        if given["fail_below"] is not None and given["compare_with"] is None:
            raise InvalidRequest("--fail-below needs a record to compare with: --compare FILE")
        if given["compare_with"] is not None:
            record.read(given["compare_with"])
        if given["plot"]:
            figures.check_installed("plotext")
        if given["png"] is not None:
            figures.check_installed("matplotlib")
        for path in (given["json_file"], given["png"]):
            if path is not None and not path.parent.is_dir():
                raise InvalidRequest(f"can't write {path}: {path.parent} is no folder")

    # -- the model and its work --

    def items(self) -> list[Item]:
        from mlxpage.bench import workloads

        given = self.settings
        lengths = ("input_len", "output_len", "range_ratio", "chat_lengths")
        items = workloads.items(
            given["dataset"],
            tokenizer=self.subject.tokenizer,
            vocab_size=self.subject.model.vocab_size,
            num_prompts=given["num_prompts"],
            lengths=workloads.Lengths(**{name: given[name] for name in lengths}),
            seed=given["seed"],
            path=given["dataset_path"],
            prefix_len=given["prefix_len"],
            num_prefixes=given["num_prefixes"],
        )
        self.subject.check_lengths(items)
        self.facts["workload"] = workloads.described(items)
        return items

    def make_room(self, num_seqs: int, num_blocks: int) -> None:
        """For so many sequences at once, and unless its size was given, a pool that has its blocks
        from the start: growing would be measured, too."""
        engine = self.engine
        if engine["memory"] is None and engine["num_blocks"] is None:
            engine["num_blocks"] = num_blocks
        engine["max_num_seqs"] = num_seqs
        engine["max_num_batched_tokens"] = max(engine["max_num_batched_tokens"], num_seqs)

    @contextmanager
    def loaded(self, load: Callable = load_llm, **more: Any) -> Iterator[Any]:
        with loaded(self.model, self.quiet, load, **self.engine, **more) as door:
            yield door
            self.facts["engine"] = _engine_facts(door)

    # -- measuring --

    def measure(self, arms: list[Arm], *, watched: bool = True) -> None:
        """In turns; without `watched`, somebody else shows how far it is."""
        from mlxpage.bench.runs import in_turns

        given = self.settings
        total = len(arms) * given["repeats"]
        with self.progress("runs", total, watched) as advance:
            in_turns(
                arms,
                given["repeats"],
                warm_up=not given["no_warm_up"],
                delay=given["delay"],
                on_run=advance,
            )

    @contextmanager
    def progress(self, what: str, total: int, watched: bool = True) -> Iterator[Callable]:
        if self.quiet or not watched or not is_terminal(sys.stderr):
            yield lambda: None
            return
        from rich.progress import MofNCompleteColumn

        with bar(MofNCompleteColumn()) as shown:
            task = shown.add_task(what, total=total)
            yield lambda: shown.advance(task)

    # -- the results --

    def report(self, arms: list[Arm], **settings: Any) -> None:
        """`settings` are the command's own ones. Ends with FELL_BELOW if something fell."""
        from mlxpage.bench import figures, record, tables

        settings = {**self.settings, **self.engine, **settings}
        if settings.get("dataset_path") is not None:
            settings["dataset_path"] = str(settings["dataset_path"])
        made = record.make(self.benchmark, self.model, settings, arms, **self.facts)
        given = self._reporting
        click.echo(tables.text_of(made, given["form"]), nl=False)
        for line in _notes(made):
            self._say(line)
        if given["json_file"] is not None:
            _write(given["json_file"], tables.text_of(made, "json"))
        if given["plot"]:
            click.echo(figures.in_terminal(made), err=True)
        if given["png"] is not None:
            figures.to_png(made, given["png"])
        if given["compare_with"] is not None:
            self._compare(record.read(given["compare_with"]), made)

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        from mlxpage.bench import record

        changes = record.compare(old, new)
        path, least_allowed = self._reporting["compare_with"], self._reporting["fail_below"]
        self._say(f"beside {path}, of {old['date']}; above 1 is better:")
        for line in record.differences(old, new):
            self._say(f"  {line}")
        for change in changes:
            self._say(f"  {change.describe()}")
        least = min(change.ratio for change in changes)
        if least_allowed is not None and least < least_allowed:
            say(f"Error: the least ratio is {least:.3f}, below {least_allowed}", fg="red")
            raise click.exceptions.Exit(FELL_BELOW)


def _engine_facts(door) -> dict[str, Any]:
    stats = door.stats()
    return {
        "backend": stats["backend"]["name"],
        "why": stats["backend"]["why"],
        "step": stats["backend"]["shape"],
        "pool_blocks": stats["blocks"]["limit"],
        "block_size": stats["block_size"],
        "weights_bytes": stats["bytes"]["weights"],
        "preemptions": stats["preemptions"],
        "resizes": stats["resizes"],
    }


def _notes(record: dict[str, Any]) -> Iterator[str]:
    here, versions = record["machine"], record["versions"]
    power = f", {here['power']}" if here["power"] else ""
    yield (
        f"{here['chip']}, {here['cores']} cores, {here['memory'] / 1e9:.0f} GB, {here['os']}{power}"
        f"; mlxpage {versions['mlxpage']}, MLX {versions['mlx']}, mlx-lm {versions['mlx_lm']}"
    )
    if speed := record.get("copy_bytes_per_s"):
        yield f"copies {speed / 1e9:.1f} GB/s, bytes read and written"
    if record["drift"] is not None:
        yield f"last by first repetition: {record['drift']:.3f}"
    if preemptions := record.get("engine", {}).get("preemptions"):
        yield f"{preemptions:,} preemptions: the pool was too small for all that ran"
    for row in record["rows"]:
        yield from row.get("facts", {}).get("errors", ())


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InvalidRequest(f"can't write {path}: {error.strerror or error}") from None
