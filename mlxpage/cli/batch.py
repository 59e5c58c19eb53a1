"""`mlxpage batch`: a file of requests in, a file of answers out."""

from __future__ import annotations

import io
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import click

import mlxpage
from mlxpage.cli import batch_lines as lines
from mlxpage.cli.batch_lines import AnswerFile, Line
from mlxpage.cli.files import told
from mlxpage.cli.generate import prompt_ids
from mlxpage.cli.loading import loaded
from mlxpage.cli.options import engine_options, model_argument, sampling_options, split
from mlxpage.cli.output import is_terminal, say
from mlxpage.cli.progress import bar
from mlxpage.cli.settings import setting
from mlxpage.errors import InvalidRequest, MlxpageError
from mlxpage.events import Done, Error, Tokens

FAILED = 1  # the exit code when a line has no answer
_NAMED = 5  # failed lines that the summary names


@click.command()
@model_argument
@click.argument("source", metavar="IN")
@click.option("-o", "--output", "target", metavar="OUT", help="File for the answers, not stdout.")
@click.option("--resume", is_flag=True, help="Go on where the answers in OUT end.")
@click.option("--ordered", is_flag=True, help="Answers in the order of IN, not as they end.")
@setting("-n", "--max-tokens", type=int, default=256, show_default=True, help="Per answer.")
@sampling_options
@setting("-s", "--system", help="System message beside prompts, for models that chat.")
@click.option("--raw", is_flag=True, help="Continue prompts as they are, without chat template.")
@setting("--max-num-seqs", type=int, default=32, show_default=True, help="Computed at once.")
@click.option("--max-queued", type=int, help="Lines read ahead; 4 for each computed at once.")
@engine_options
@setting("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
def command(
    model, source, target, resume, ordered, system, raw, max_num_seqs, max_queued, quiet, **options
):
    """Answer the requests in IN, a file with a JSON object on each line.

    IN or OUT may be '-', which is standard input and output. A line has a prompt or messages, and
    may have an id and options of its own: {"id": 1, "prompt": "Why?", "max_tokens": 9}. An answer
    has the number of its line and that id. What can't be answered gets an error in its place, and
    the exit code is 1 then.

    OUT is whole to the last answer at any time. With --resume, an interrupted run is taken up:
    what is answered is left out.
    """
    params, engine = split(options)
    mlxpage.SamplingParams(**params)
    if max_queued is not None and max_queued < 1:
        raise InvalidRequest(f"--max-queued is {max_queued}; it must be at least 1")
    window = 4 * max(1, max_num_seqs) if max_queued is None else max_queued
    engine |= {"max_num_seqs": max_num_seqs, "max_queued": window, "max_inter_token_ms": None}
    basis = json.dumps([model, params, system, raw, engine["adapter_path"]])
    with _input(source) as stream, _answers(source, target, resume) as answers:
        run = _Run(params, answers, window, ordered)
        run.read(lines.unanswered(lines.read_lines(stream, basis), answers.done))
        if not run.has_lines():
            if not answers.done:
                raise InvalidRequest(f"{_name(source)} is empty: there is no line with a request")
            return _say_all_done(answers, quiet)
        with _telling_how_to_resume(run, target), loaded(model, quiet, **engine) as llm:
            raw = raw or not llm.tokenizer.has_chat_template
            prompt_ids(llm, "Hi", system, raw)  # has it a chat template, if there is a system?
            total = None if quiet else _count(source)
            with _bar(quiet, target, total, len(answers.done)) as on_change:
                run.serve(llm, partial(_ids, llm, system, raw), on_change)
        if not quiet:
            say(run.summary(), dim=True)
        return FAILED if run.failed else 0


def _ids(llm, system: str | None, raw: bool, asked: lines.Asked) -> list[int]:
    if asked.messages is not None:
        return llm.chat_prompt(asked.messages)
    if not isinstance(asked.prompt, str):
        return asked.prompt
    raw = raw or asked.is_raw
    if not raw and not asked.prompt.strip():
        raise InvalidRequest("the prompt is empty; write something, or give --raw to mean it")
    return prompt_ids(llm, asked.prompt, None if asked.is_raw else system, raw)


# -- files --


@contextmanager
def _input(source: str) -> Iterator[BinaryIO]:
    if source == "-":
        yield _stdin()
        return
    with told("read", source, "IN is a file of requests, or '-' for standard input") as path:
        stream = open(path, "rb")  # noqa: SIM115
    with stream:
        yield stream


def _stdin() -> BinaryIO:
    """One of our own: Python, when it ends, must not wait for a thread that reads its own."""
    try:
        return open(sys.stdin.fileno(), "rb", closefd=False)
    except io.UnsupportedOperation:
        return sys.stdin.buffer


class _Stdout:
    """Answers that are printed."""

    path = None
    done: dict[int, str] = {}  # noqa: RUF012

    def write(self, line: str) -> None:
        click.echo(line)

    def close(self) -> None:
        pass


@contextmanager
def _answers(source: str, target: str | None, resume: bool) -> Iterator[AnswerFile | _Stdout]:
    if target in (None, "-"):
        if resume:
            raise InvalidRequest("--resume needs a file of answers: give it as -o OUT")
        yield _Stdout()
        return
    if source != "-" and os.path.exists(target) and os.path.samefile(source, target):
        raise InvalidRequest(f"{target} is IN and OUT; write the answers to another file")
    with told("write", target, "give a file that can be written, as -o OUT") as path:
        answers = AnswerFile(Path(path), resume)
    try:
        yield answers
    finally:
        answers.close()


def _count(source: str) -> int | None:
    """The lines of a file, for the bar; None of what is no file."""
    if not os.path.isfile(source):
        return None
    with open(source, "rb") as stream:
        return sum(not line.isspace() for line in stream)


def _name(source: str) -> str:
    return "standard input" if source == "-" else source


# -- the run --


@dataclass
class _Run:
    """Requests and their answers. A thread reads lines, as many as the window has room for; this
    one submits and writes; what they and the engine have to tell comes through one inbox."""

    options: dict[str, Any]
    answers: AnswerFile | _Stdout
    window: int
    ordered: bool
    tokens: int = 0
    """Generated so far."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    written: int = 0
    """Lines whose answer, or error, is out."""
    failed: list[int] = field(default_factory=list)
    """The numbers of lines that have no answer."""
    open: dict[int, Line] = field(default_factory=dict)
    """By number: lines that the engine has."""
    began: float = 0.0

    def __post_init__(self):
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()
        self._room = threading.Semaphore(self.window)
        self._held: dict[int, dict[str, Any]] = {}

    def read(self, found: Iterator[Line]) -> None:
        threading.Thread(target=self._read, args=(found,), name="batch-in", daemon=True).start()

    def _read(self, found: Iterator[Line]) -> None:
        try:
            for line in found:
                self._room.acquire()
                self._inbox.put(line)
            self._inbox.put(None)
        except BaseException as error:
            self._inbox.put(error)

    def has_lines(self) -> bool:
        """Waits for the first one."""
        self._first = self._next()
        return self._first is not None

    def _next(self) -> Line | tuple | None:
        told = self._inbox.get()
        if isinstance(told, OSError):
            raise InvalidRequest(f"can't read the requests: {told.strerror}") from told
        if isinstance(told, BaseException):
            raise told
        return told

    def serve(self, llm, ids: Callable[[lines.Asked], list[int]], on_change: Callable) -> None:
        """Until all is read and answered."""
        self.began = time.perf_counter()
        is_reading, told = True, self._first
        while True:
            if told is None:
                is_reading = False
            elif isinstance(told, Line):
                self._submit(llm, ids, told)
            else:
                self._take(*told)
            on_change(self)
            if not (is_reading or self.open):
                return
            told = self._next()

    def _submit(self, llm, ids: Callable[[lines.Asked], list[int]], line: Line) -> None:
        try:
            asked = lines.understand(line)
            params = mlxpage.SamplingParams(**self._options(line, asked))
            llm.submit(ids(asked), params, on_event=lambda event: self._inbox.put((line, event)))
        except InvalidRequest as error:
            self._fail(line, error)
        else:
            line.data = b""
            self.open[line.number] = line

    def _options(self, line: Line, asked: lines.Asked) -> dict[str, Any]:
        options = self.options | asked.options
        if self.options["seed"] is not None and "seed" not in asked.options:
            options["seed"] = lines.seed_of(self.options["seed"], line)
        return options

    def _take(self, line: Line, event) -> None:
        match event:
            case Tokens(token_ids=ids):
                self.tokens += len(ids)
            case Done(output):
                del self.open[line.number]
                self.prompt_tokens += len(output.prompt_token_ids)
                self.cached_tokens += output.num_cached_tokens
                self._put(line, lines.answered(line, output))
            case Error(error):
                del self.open[line.number]
                self._fail(line, error)

    def _fail(self, line: Line, error: MlxpageError) -> None:
        self.failed.append(line.number)
        self._put(line, lines.failed(line, error))

    def _put(self, line: Line, record: dict[str, Any]) -> None:
        """Writes what may be written now."""
        self._held[line.position] = record
        place = self.written if self.ordered else line.position
        while (record := self._held.pop(place, None)) is not None:
            self._write(json.dumps(record))
            place += 1

    def _write(self, text: str) -> None:
        try:
            self.answers.write(text)
        except BrokenPipeError:
            raise
        except OSError as error:
            where = self.answers.path or "standard output"
            raise MlxpageError(
                f"can't write to {where}: {error.strerror}. {self.written:,} answers are whole; "
                "with -o OUT, --resume goes on from there."
            ) from None
        self.written += 1
        self._room.release()

    def summary(self) -> str:
        seconds = time.perf_counter() - self.began
        count = self.written - len(self.failed)
        answers = "1 answer" if count == 1 else f"{count:,} answers"
        if self.failed:
            named = ", ".join(f"{number:,}" for number in sorted(self.failed)[:_NAMED])
            more = ", ..." if len(self.failed) > _NAMED else ""
            ending = "" if len(self.failed) == 1 else "s"
            answers += f" and {len(self.failed):,} error{ending} (line{ending} {named}{more})"
        if self.answers.done:
            answers += f", {len(self.answers.done):,} there already"
        return (
            f"{answers}; {self.tokens:,} tokens in {seconds:.1f} s, "
            f"{self.tokens / seconds:.1f} tok/s; {self.prompt_tokens:,} prompt tokens, "
            f"{self.cached_tokens:,} of them cached"
        )


# -- what people see --


@contextmanager
def _telling_how_to_resume(run: _Run, target: str | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        told = f"{run.written:,} answers were written"
        if run.answers.path is not None:
            told += f" to {target}; the same command with --resume goes on from there"
        say(told)
        raise


def _say_all_done(answers: AnswerFile, quiet: bool) -> None:
    if not quiet:
        say(f"all {len(answers.done):,} lines are answered in {answers.path} already", dim=True)


@contextmanager
def _bar(quiet: bool, target: str | None, total: int | None, done: int):
    """A function that shows how far a run is, on a terminal that shows nothing else."""
    prints = target in (None, "-") and sys.stdout.isatty()
    if quiet or prints or not is_terminal(sys.stderr):
        yield lambda run: None
        return
    from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn

    speed = TextColumn("{task.fields[speed]:,.1f} tok/s, {task.fields[open]} in flight")
    with bar(MofNCompleteColumn(), speed, TextColumn("ETA"), TimeRemainingColumn()) as progress:
        task = progress.add_task("answers", total=total, completed=done, speed=0.0, open=0)

        def show(run: _Run) -> None:
            speed = run.tokens / max(1e-9, time.perf_counter() - run.began)
            progress.update(task, completed=done + run.written, speed=speed, open=len(run.open))

        yield show
