"""The command line: answers and JSON on stdout, everything for people on stderr."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from typing import Any

import click

import mlxpage
from mlxpage.errors import EngineError, InvalidRequest, MlxpageError
from mlxpage.sizes import gigabytes

INTERRUPTED = 130  # 128 + SIGINT
BROKEN_PIPE = 141  # 128 + SIGPIPE


def main() -> None:
    """Runs the command line and ends the process with its exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed: a model's file must not take its place
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # what a terminal can't show is no failure
    try:
        code = run(sys.argv[1:])
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        os._exit(INTERRUPTED)  # Python's own end waits for the step that is being computed
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Runs a command; returns the exit code (`mlxpage.errors` has the table). Ctrl-C goes through,
    as click's `Abort`."""
    try:
        cli.main(arguments, prog_name="mlxpage", standalone_mode=False)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.Abort:
        raise
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except _ReaderGone:
        _forget_output()
        return BROKEN_PIPE
    except OSError as error:  # of stdout: those of model files come as errors of our own
        _forget_output()
        _show(str(error), error)
        return 1
    except MlxpageError as error:
        _show(str(error), error)
        return error.exit_code
    except Exception as error:
        _show(f"{type(error).__name__}: {error}", error)
        _say("This is a bug in mlxpage. Set MLXPAGE_DEBUG=1 to see where it happened.")
        return 1


def _say(line: str, **style: Any) -> None:
    color = False if os.environ.get("NO_COLOR") else None
    click.secho(line, err=True, color=color, **style)


def _show(message: str, error: Exception) -> None:
    if os.environ.get("MLXPAGE_DEBUG"):
        traceback.print_exception(error)
    _say(f"Error: {message}", fg="red")


def _forget_output() -> None:
    """The interpreter flushes stdout once more when it ends, and must not fail on it again."""
    with suppress(OSError, AttributeError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _ReaderGone(Exception):
    """Whoever read the answer has enough of it."""


class _Commands(click.Group):
    def invoke(self, context: click.Context) -> Any:
        # click would end the process by itself, with 1.
        try:
            return super().invoke(context)
        except BrokenPipeError:
            raise _ReaderGone from None


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(mlxpage.__version__, prog_name="mlxpage")
def cli() -> None:
    """Run language models on a Mac, many prompts at once, over a paged K/V cache.

    MODEL is a folder, a model of the Hugging Face hub, or a demo model: smollm2-135m,
    smollm2-135m-4bit, gemma3-270m.
    """


def _options(*options):
    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_sampling_options = _options(
    click.option("--temp", "--temperature", "temperature", type=float, help="0 is greedy."),
    click.option("--top-p", type=float, help="Keep the likeliest tokens up to this probability."),
    click.option("--top-k", type=int, help="Keep this many of the likeliest tokens."),
    click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest."),
    click.option("--repetition-penalty", type=float, help="Above 1: less repetition."),
    click.option("--seed", type=int, help="Same seed, same answer."),
    click.option("--stop", multiple=True, help="End the answer before this text; repeatable."),
)


class _KVBits(click.ParamType):
    name = "bits"

    def convert(self, value, param, ctx):
        """8, 4, or a pair: as `LLM` takes them, which says what is wrong with others."""
        parts = [self._one(part.strip()) for part in str(value).split(",")]
        return parts[0] if len(parts) == 1 else tuple(parts)

    @staticmethod
    def _one(text: str):
        if text.lower() == "none":
            return None
        return int(text) if text.isdecimal() else text


_kv_bits = click.option("--kv-bits", type=_KVBits(), help="Bits of K and V, 8 or 4; for each: 8,4.")

_engine_options = _options(
    click.option("--adapter-path", help="Folder of an adapter that mlx-lm has trained."),
    click.option("--memory", help="Budget for weights, pool and scratch: 4GB or 50%."),
    click.option("--num-blocks", type=int, help="Size of the pool in blocks, instead of a budget."),
    click.option("--block-size", type=int, default=16, show_default=True, help="16 or 32 tokens."),
    _kv_bits,
    click.option("--cache-dir", help="Folder for blocks that outlive the process."),
    click.option("--cache-disk", help="What it may take, 20GB; alone: a folder in the cache."),
    click.option("--backend", help="metal, cuda or reference; else the best there is."),
    click.option("--dtype", help="float32, float16 or bfloat16."),
)


@cli.command()
@click.argument("model")
@click.argument("prompts", metavar="PROMPT...", nargs=-1)
@click.option("-n", "--max-tokens", type=int, default=256, show_default=True, help="Per answer.")
@_sampling_options
@click.option("-s", "--system", help="System message, for models that chat.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without chat template.")
@click.option("--max-num-seqs", type=int, help="Answers computed at once; all, up to 32.")
@_engine_options
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
def generate(model, prompts, max_tokens, system, raw, max_num_seqs, as_json, quiet, **options):
    """Answer one or many PROMPTs at once.

    A PROMPT of '-', or none at all with piped input, reads standard input. A model with a chat
    template gets the prompt as a user's message, unless --raw is given.
    """
    params, engine = _split(options)
    params = mlxpage.SamplingParams(max_tokens=max_tokens, **params)
    prompts = [_read_stdin() if prompt == "-" else prompt for prompt in _given(prompts)]
    if not raw and not all(prompt.strip() for prompt in prompts):
        raise InvalidRequest("a PROMPT is empty; write something, or give --raw to mean it")
    engine["max_num_seqs"] = min(32, len(prompts)) if max_num_seqs is None else max_num_seqs
    with _loaded(model, quiet, **engine) as llm:
        raw = raw or not llm.tokenizer.has_chat_template
        ids = [_prompt_ids(llm, prompt, system, raw) for prompt in prompts]
        started = time.perf_counter()
        outputs = _answer(llm, prompts, ids, params, as_json)
        seconds = time.perf_counter() - started
        stats = llm.stats()
        if as_json:
            record = _generate_record(llm, model, prompts, outputs, seconds, stats, raw)
            click.echo(json.dumps(record))
        if not quiet:
            _say(_summary(outputs, seconds, stats), dim=True)


def _given(prompts: tuple[str, ...]) -> list[str]:
    if prompts:
        return list(prompts)
    if sys.stdin.isatty():
        raise click.UsageError("no PROMPT given: write it after MODEL, or pipe it in")
    return ["-"]


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is no text in {error.encoding}") from None


def _split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of sampling, and of the engine."""
    engine_names = (
        *("memory", "num_blocks", "block_size", "kv_bits"),
        *("adapter_path", "cache_dir", "cache_disk", "backend", "dtype"),
    )
    engine = {name: options.pop(name) for name in engine_names}
    return options, engine


@contextmanager
def _loaded(model: str, quiet: bool, **options):
    status = None if quiet else lambda line: _say(line, dim=True)
    with _loading_bar(quiet) as on_loaded:
        llm = mlxpage.LLM(model, on_status=status, on_loaded=on_loaded, **options)
    try:
        if not quiet:
            _say(llm.plan.describe(), dim=True)
        yield llm
    except KeyboardInterrupt:
        raise  # without waiting for the step that is being computed: `main` ends the process
    except BaseException:
        llm.close()
        raise
    llm.close()


@contextmanager
def _loading_bar(quiet: bool):
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

    columns = TextColumn("loading"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _prompt_ids(llm, prompt: str, system: str | None, raw: bool) -> list[int]:
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
            {
                "prompt": prompt,
                "text": output.text,
                "finish_reason": output.finish_reason,
                "usage": {
                    "prompt_tokens": len(output.prompt_token_ids),
                    "completion_tokens": len(output.token_ids),
                    "cached_tokens": output.num_cached_tokens,
                },
                "timings": {
                    "queue_s": round(output.timings.queue_s, 4),
                    "ttft_s": round(output.timings.ttft_s, 4),
                    "total_s": round(output.timings.total_s, 4),
                },
            }
            for prompt, output in zip(prompts, outputs, strict=True)
        ],
        "seconds": round(seconds, 4),
        "output_tokens_per_second": round(sum(len(o.token_ids) for o in outputs) / seconds, 2),
        "pool": stats["blocks"] | {"block_size": stats["block_size"]},
        "bytes": stats["bytes"],
        "versions": _versions(),
    }


@cli.command()
@click.argument("model")
@click.option("-n", "--max-tokens", type=int, help="Per answer; none: until the model ends.")
@_sampling_options
@click.option("-s", "--system", help="System message.")
@_engine_options
def chat(model, max_tokens, system, **options):
    """Talk with MODEL.

    Ctrl-C stops an answer, Ctrl-D or /exit ends the talk, /clear forgets it.
    """
    params, engine = _split(options)
    params = mlxpage.SamplingParams(max_tokens=max_tokens, **params)
    begin = [{"role": "system", "content": system}] if system else []
    messages = list(begin)
    with _loaded(model, False, max_num_seqs=1, **engine) as llm:
        llm.chat_prompt([*begin, {"role": "user", "content": "Hi"}])  # has it a chat template?
        while (line := _ask()) is not None:
            if line == "/exit":
                break
            if line == "/clear":
                messages = list(begin)
            elif line.startswith("/"):
                _say(f"{line.split()[0]} is no command; there are /clear and /exit")
            elif line:
                messages = _turn(llm, messages, line, params)


def _ask() -> str | None:
    """The user's next line, None at its end."""
    if sys.stdin.isatty():
        click.echo("> ", nl=False, err=True)
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        click.echo(err=True)
        return ""
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is no text in {error.encoding}") from None
    if not line:
        return None
    return line.strip()


def _turn(llm, messages, line: str, params) -> list[dict[str, str]]:
    """Prints the answer to `line`; returns the conversation with both, or as it was."""
    asked = [*messages, {"role": "user", "content": line}]
    text = ""
    try:
        for event in llm.stream(llm.chat_prompt(asked), params):
            text += event.text
            click.echo(event.text, nl=False)
    except KeyboardInterrupt:
        _say(" (stopped)", dim=True)
    except InvalidRequest as error:
        _show(f"{error} /clear begins a new conversation.", error)
        return messages
    except EngineError as error:
        click.echo()
        _show(str(error), error)
        return messages
    click.echo()
    return [*asked, {"role": "assistant", "content": text}]


@cli.command()
@click.argument("model", required=False)
@click.option("--memory", help="Budget for weights, pool and scratch: 4GB or 50%.")
@click.option("--block-size", type=int, default=16, show_default=True, help="16 or 32 tokens.")
@click.option("--max-num-seqs", type=int, default=32, show_default=True, help="At once.")
@_kv_bits
@click.option("--dtype", help="float32, float16 or bfloat16.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def info(model, memory, block_size, max_num_seqs, kv_bits, dtype, as_json):
    """What this machine is, how MODEL would be served, and how it would fit into memory.

    No weights are loaded.
    """
    from mlxpage import describe

    facts = describe.machine()
    if model is not None:
        facts |= describe.model(
            model,
            memory=memory,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            kv_bits=kv_bits,
            dtype=dtype,
            on_status=lambda line: _say(line, dim=True),
        )
    if as_json:
        click.echo(json.dumps({"schema": "mlxpage.info/1", **facts}))
    else:
        width = max(map(len, facts))
        for name, value in facts.items():
            click.echo(f"{name:{width}}  {value}")


@cli.command()
@click.argument("action", type=click.Choice(["stats", "clear", "verify"]), metavar="ACTION")
@click.option("--dir", "folder", help="The folder of the blocks, if it isn't the usual one.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def cache(action, folder, as_json):
    """What the prefix cache keeps on disk.

    ACTION is stats, which counts its blocks; clear, which removes them all; or verify, which reads
    them and removes those that are damaged. Any of them may run beside an engine.
    """
    from mlxpage import block_store

    folder = folder if folder is not None else str(block_store.default_folder())
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise InvalidRequest(f"{folder} is no folder; give the one of the blocks (--dir)")
    act = {"stats": block_store.stats, "clear": block_store.clear, "verify": block_store.verify}
    try:
        found = act[action](folder)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"can't {action} the blocks in {folder}: {reason}") from None
    if as_json:
        record = {"schema": "mlxpage.cache/1", "action": action, "folder": folder, **found}
        click.echo(json.dumps(record))
    else:
        click.echo("\n".join(_cache_lines(action, folder, found)))


def _cache_lines(action: str, folder: str, found: dict[str, Any]) -> list[str]:
    blocks = _blocks(found)
    if action == "clear":
        return [f"removed {blocks}, from {folder}"]
    if action == "verify":
        line = f"{folder}: {blocks} whole; {found['damaged']:,} damaged and removed"
        return [f"{line}; {found['unreadable']:,} can't be read" if found["unreadable"] else line]
    return [f"{folder}: {blocks}", *map(_identity_line, found["identities"])]


def _identity_line(found: dict[str, Any]) -> str:
    facts = json.dumps(found["facts"])  # escapes what a terminal could take for a command
    if found["last_used"] is None:
        return f"  no blocks  {facts}"
    days = max(0.0, time.time() - found["last_used"]) / 86_400
    return f"  {_blocks(found)}, last used {days:,.1f} days ago  {facts}"


def _blocks(found: dict[str, Any]) -> str:
    count = found["blocks"]
    return f"{count:,} block{'' if count == 1 else 's'}, {gigabytes(found['bytes'])}"


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"mlxpage": mlxpage.__version__, "mlx": version("mlx"), "mlx_lm": version("mlx-lm")}
