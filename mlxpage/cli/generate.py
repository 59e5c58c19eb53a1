"""`mlxpage generate`: prompts in, answers out."""

from __future__ import annotations

import json
import queue
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import click

import mlxpage
from mlxpage import probes
from mlxpage.cli import options
from mlxpage.cli.loading import loaded
from mlxpage.cli.output import answer, say
from mlxpage.cli.progress import PrefillBar
from mlxpage.cli.settings import setting
from mlxpage.errors import InvalidRequest
from mlxpage.events import Done, Error, Event, Preempted, Prefill, Tokens
from mlxpage.outputs import RequestOutput

Show = Callable[[int, Event], None]
"""What is done with the events of prompts: (index of the prompt, event)."""


@click.command()
@options.model_argument
@click.argument("prompts", metavar="PROMPT...", nargs=-1)
@setting("-n", "--max-tokens", type=int, default=256, show_default=True, help="Per answer.")
@options.sampling_options
@setting("-s", "--system", help="System message, for models that chat.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without chat template.")
@setting("--max-num-seqs", type=int, help="Answers computed at once; all, up to 32.")
@options.engine_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("--jsonl", "as_events", is_flag=True, help="Events on stdout, a JSON line for each.")
@options.stats
@setting("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
def command(
    model,
    prompts,
    max_tokens,
    system,
    raw,
    max_num_seqs,
    as_json,
    as_events,
    stats,
    quiet,
    **given,
):
    """Answer one or many PROMPTs at once.

    A PROMPT of '-', or none at all with piped input, reads standard input. A model with a chat
    template gets the prompt as a user's message, unless --raw is given.
    """
    params, engine = options.split(given)
    params = mlxpage.SamplingParams(max_tokens=max_tokens, **params)
    if as_json and as_events:
        raise click.UsageError("--json or --jsonl, not both: stdout has one form")
    prompts = [options.read_stdin() if prompt == "-" else prompt for prompt in _given(prompts)]
    if not raw and not all(prompt.strip() for prompt in prompts):
        raise InvalidRequest("a PROMPT is empty; write something, or give --raw to mean it")
    engine["max_num_seqs"] = min(32, len(prompts)) if max_num_seqs is None else max_num_seqs
    began = time.perf_counter()
    engine |= {"max_queued": len(prompts), "max_inter_token_ms": None}  # all of it soonest
    with loaded(model, quiet, **engine) as engine:
        load_s = time.perf_counter() - began
        raw = raw or not engine.tokenizer.has_chat_template
        ids = [prompt_ids(engine, prompt, system, raw) for prompt in prompts]
        about = {"model": model, "chat_template": not raw, "load_s": round(load_s, 4)}
        started = time.perf_counter()
        events = _submit(engine, ids, params)
        if as_events:
            _print_line("begin", **about, versions=probes.versions())
        show = _print_event if as_events else _nothing if as_json else _InOrder(prompts).show
        bar = PrefillBar(sum(map(len, ids)), quiet=quiet or as_events)
        outputs = _answer(events, len(ids), show, bar)
        seconds = time.perf_counter() - started
        facts = engine.stats()
        whole = _of_the_whole(outputs, seconds, facts)
        if as_json:
            records = [
                {"prompt": prompt, **answer(output)}
                for prompt, output in zip(prompts, outputs, strict=True)
            ]
            record = {"schema": "mlxpage.generate/1", **about, "outputs": records, **whole}
            click.echo(json.dumps(record | {"versions": probes.versions()}))
        if as_events:
            _print_line("end", **whole)
        if not quiet if stats is None else stats:
            say(_summary(outputs, seconds, facts), dim=True)


def _given(prompts: tuple[str, ...]) -> list[str]:
    if prompts:
        return list(prompts)
    if sys.stdin.isatty():
        raise click.UsageError("no PROMPT given: write it after MODEL, or pipe it in")
    return ["-"]


def prompt_ids(engine, prompt: str, system: str | None, raw: bool) -> list[int]:
    if raw:
        if system:
            raise InvalidRequest("--system needs a model with a chat template, and no --raw")
        return engine.tokenizer.encode(prompt)
    messages = [{"role": "system", "content": system}] if system else []
    return engine.chat_prompt([*messages, {"role": "user", "content": prompt}])


def _submit(engine, prompts: list[list[int]], params) -> Iterator[tuple[int, Event]]:
    """Begins all; (index of the prompt, event) as they come, without an end."""
    events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    for index, prompt in enumerate(prompts):
        engine.submit(prompt, params, on_event=lambda event, i=index: events.put((i, event)))
    return iter(events.get, None)


def _answer(events, count: int, show: Show, bar: PrefillBar) -> list[RequestOutput]:
    """The outputs of `count` prompts, once they are all there."""
    outputs: dict[int, RequestOutput] = {}
    with bar:
        while len(outputs) < count:
            index, event = next(events)
            match event:
                case Prefill():
                    bar.show(event, index)
                case Tokens():
                    bar.hide()
                case Done(output=output):
                    outputs[index] = output
            show(index, event)
            if isinstance(event, Error):
                raise event.error
    return [outputs[index] for index in range(count)]


# -- as text --


class _InOrder:
    """Texts on stdout in the order of the prompts: the first that isn't finished as it comes, the
    others behind it."""

    def __init__(self, prompts: list[str]):
        self._prompts = prompts
        self._held = [""] * len(prompts)
        self._ended = [False] * len(prompts)
        self._current = 0
        self._headline()

    def show(self, index: int, event: Event) -> None:
        if isinstance(event, Tokens):
            self._held[index] += event.text
        elif isinstance(event, Done):
            self._ended[index] = True
        while self._current < len(self._prompts):
            current = self._current
            click.echo(self._held[current], nl=False)
            self._held[current] = ""
            if not self._ended[current]:
                break
            click.echo()
            self._current += 1
            self._headline()

    def _headline(self) -> None:
        if len(self._prompts) > 1 and self._current < len(self._prompts):
            prompt = " ".join(self._prompts[self._current].split())
            click.secho(f"{chr(10) if self._current else ''}==> {prompt}")


def _summary(outputs, seconds: float, stats) -> str:
    tokens = sum(len(output.token_ids) for output in outputs)
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    first = min(output.timings.ttft_s for output in outputs)
    blocks = stats["blocks"]
    answers = "1 answer" if len(outputs) == 1 else f"{len(outputs)} answers"
    if cut := sum(output.finish_reason == "length" for output in outputs):
        answers += f" ({cut} cut short by --max-tokens or the context)"
    return (
        f"{answers}, {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:.1f} tok/s, "
        f"first token after {first * 1000:.0f} ms; {prompt:,} prompt tokens; pool in use at most "
        f"{blocks['peak_used']:,} of {blocks['limit']:,} blocks "
        f"({stats['bytes']['pool_peak_used'] / 1e6:.0f} MB)"
    )


# -- as JSON --


def _nothing(index: int, event: Event) -> None: ...


def _print_event(index: int, event: Event) -> None:
    match event:
        case Prefill(computed, of, cached):
            tokens = {"computed_tokens": computed, "prompt_tokens": of, "cached_tokens": cached}
            _print_line("prefill", index=index, **tokens)
        case Tokens(text, token_ids):
            _print_line("tokens", index=index, text=text, token_ids=token_ids)
        case Preempted(count):
            _print_line("preempted", index=index, preemptions=count)
        case Done(output):
            _print_line("done", index=index, **answer(output))
        case Error(error):
            _print_line("error", index=index, error=str(error), exit_code=error.exit_code)


def _print_line(type: str, **facts) -> None:
    click.echo(json.dumps({"schema": "mlxpage.event/1", "type": type, **facts}))


def _of_the_whole(outputs, seconds: float, stats) -> dict[str, Any]:
    return {
        "seconds": round(seconds, 4),
        "output_tokens_per_second": round(sum(len(o.token_ids) for o in outputs) / seconds, 2),
        "pool": stats["blocks"] | {"block_size": stats["block_size"]},
        "bytes": stats["bytes"],
    }
