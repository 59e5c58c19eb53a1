"""`mlxpage generate`: prompts in, answers out."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import click

import mlxpage
from mlxpage.cli.loading import loaded
from mlxpage.cli.options import (
    engine_options,
    model_argument,
    read_stdin,
    sampling_options,
    split,
)
from mlxpage.cli.output import answer, say, versions
from mlxpage.cli.settings import setting
from mlxpage.errors import InvalidRequest


@click.command()
@model_argument
@click.argument("prompts", metavar="PROMPT...", nargs=-1)
@setting("-n", "--max-tokens", type=int, default=256, show_default=True, help="Per answer.")
@sampling_options
@setting("-s", "--system", help="System message, for models that chat.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without chat template.")
@setting("--max-num-seqs", type=int, help="Answers computed at once; all, up to 32.")
@engine_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@setting("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
def command(model, prompts, max_tokens, system, raw, max_num_seqs, as_json, quiet, **options):
    """Answer one or many PROMPTs at once.

    A PROMPT of '-', or none at all with piped input, reads standard input. A model with a chat
    template gets the prompt as a user's message, unless --raw is given.
    """
    params, engine = split(options)
    params = mlxpage.SamplingParams(max_tokens=max_tokens, **params)
    prompts = [read_stdin() if prompt == "-" else prompt for prompt in _given(prompts)]
    if not raw and not all(prompt.strip() for prompt in prompts):
        raise InvalidRequest("a PROMPT is empty; write something, or give --raw to mean it")
    engine["max_num_seqs"] = min(32, len(prompts)) if max_num_seqs is None else max_num_seqs
    with loaded(model, quiet, **engine) as llm:
        raw = raw or not llm.tokenizer.has_chat_template
        ids = [prompt_ids(llm, prompt, system, raw) for prompt in prompts]
        started = time.perf_counter()
        outputs = _answer(llm, prompts, ids, params, as_json)
        seconds = time.perf_counter() - started
        stats = llm.stats()
        if as_json:
            record = _generate_record(llm, model, prompts, outputs, seconds, stats, raw)
            click.echo(json.dumps(record))
        if not quiet:
            say(_summary(outputs, seconds, stats), dim=True)


def _given(prompts: tuple[str, ...]) -> list[str]:
    if prompts:
        return list(prompts)
    if sys.stdin.isatty():
        raise click.UsageError("no PROMPT given: write it after MODEL, or pipe it in")
    return ["-"]


def prompt_ids(llm, prompt: str, system: str | None, raw: bool) -> list[int]:
    if raw:
        if system:
            raise InvalidRequest("--system needs a model with a chat template, and no --raw")
        return llm.tokenizer.encode(prompt)
    messages = [{"role": "system", "content": system}] if system else []
    return llm.chat_prompt([*messages, {"role": "user", "content": prompt}])


def _answer(llm, prompts, ids, params, as_json) -> list:
    """All outputs. Texts go to stdout in the order of the prompts: the first that isn't finished
    as it comes, the others behind it."""
    outputs: list = [None] * len(ids)
    held = [""] * len(ids)
    current = 0

    def headline(index: int) -> None:
        if len(prompts) > 1:
            click.secho(f"{'' if index == 0 else chr(10)}==> {' '.join(prompts[index].split())}")

    if not as_json:
        headline(0)
    for index, event in llm.stream_many(ids, params):
        outputs[index] = event.output
        held[index] += event.text
        if as_json:
            continue
        while current < len(ids):
            click.echo(held[current], nl=False)
            held[current] = ""
            if outputs[current] is None:
                break
            click.echo()
            current += 1
            if current < len(ids):
                headline(current)
    return outputs


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


def _generate_record(llm, model, prompts, outputs, seconds, stats, raw) -> dict[str, Any]:
    return {
        "schema": "mlxpage.generate/1",
        "model": model,
        "chat_template": not raw,
        "outputs": [
            {"prompt": prompt} | answer(output)
            for prompt, output in zip(prompts, outputs, strict=True)
        ],
        "seconds": round(seconds, 4),
        "output_tokens_per_second": round(sum(len(o.token_ids) for o in outputs) / seconds, 2),
        "pool": stats["blocks"] | {"block_size": stats["block_size"]},
        "bytes": stats["bytes"],
        "versions": versions(),
    }
