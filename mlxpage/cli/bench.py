"""`mlxpage bench`: how fast, how much at once, in how much memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click

from mlxpage.cli.loading import load_async_engine
from mlxpage.cli.measuring import (
    Gap,
    Integers,
    Measurement,
    Rates,
    goals_of,
    measuring,
    reporting,
    steps,
    workload,
)
from mlxpage.cli.options import measured_engine_options, model_argument
from mlxpage.cli.output import say
from mlxpage.errors import InvalidRequest


@click.group()
def command():
    """Measure MODEL: latency, throughput, serving, memory.

    Results go to stdout, as a table to paste or in the format of -o.
    """


@command.command()
@model_argument
@click.option(
    "-p",
    "--prompt-tokens",
    type=Integers(),
    default="512",
    show_default=True,
    help="Its length.",
)
@click.option(
    "-g",
    "--generation-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="How many follow.",
)
@click.option(
    "-b",
    "--batch-size",
    type=Integers(),
    default="1",
    show_default=True,
    help="Prompts at once.",
)
@steps
@measured_engine_options
@measuring(5, "-n", "--num-trials")
@reporting
def latency(model, prompt_tokens, generation_tokens, batch_size, **given):
    """How long a prompt takes, and the tokens after it.

    Options and names are those of mlx_lm.benchmark: -p, -g, -b and -n; prompt_tps, generation_tps
    and peak_memory. Prompts are random tokens; -p and -b may be lists.
    """
    from mlxpage.bench.batches import Batch, latency_figures

    grid = [
        (
            Batch(pp, generation_tokens, b),
            {"prompt_tokens": pp, "generation_tokens": generation_tokens, "batch_size": b},
        )
        for pp in prompt_tokens
        for b in batch_size
    ]
    _batches("latency", model, grid, latency_figures, given)


@command.command()
@model_argument
@click.option(
    "-npp", type=Integers(), default="128,256", show_default=True, help="Tokens of a prompt."
)
@click.option("-ntg", type=Integers(), default="128", show_default=True, help="Tokens after each.")
@click.option(
    "-npl",
    type=Integers(),
    default="1,2,4,8,16,32",
    show_default=True,
    help="Prompts at once.",
)
@click.option("-pps", is_flag=True, help="All have the same prompt, which is computed once.")
@steps
@measured_engine_options
@measuring(3)
@reporting
def batched(model, npp, ntg, npl, pps, **given):
    """Prompts and generation by the size of the batch.

    Options and columns are those of llama-batched-bench. N_KV is PP + TG for each of B sequences,
    with -pps PP once.
    """
    from mlxpage.bench.batches import Batch, batched_figures

    grid = []
    for pp in npp:
        for tg in ntg:
            for pl in npl:
                batch = Batch(pp, tg, pl, pps)
                case = {"pp": pp, "tg": tg, "pl": pl, "is_pp_shared": pps, "n_kv": batch.num_tokens}
                grid.append((batch, case))
    _batches("batched", model, grid, batched_figures, given)


def _batches(name: str, model: str, grid: list, figures: Callable, given: dict[str, Any]) -> None:
    from mlxpage.bench import batches
    from mlxpage.bench.bandwidth import copy_speed
    from mlxpage.bench.workloads import Item, plain_ids

    run = Measurement(name, model, given)
    subject = run.subject
    subject.check_lengths([Item([0] * batch.pp, batch.tg + 1) for batch, _ in grid])
    blocks = [subject.room_for(batch.sequences, batch.pp + batch.tg + 1) for batch, _ in grid]
    run.make_room(max(batch.sequences for batch, _ in grid), max(blocks))
    ids = plain_ids(subject.model.vocab_size, subject.tokenizer.special_ids)
    with run.loaded() as llm:
        speed = run.facts["copy_bytes_per_s"] = llm._call(lambda _: copy_speed())
        options = {"bytes_per_s": speed, "seed": run.settings["seed"]}
        arms = [batches.arm(llm, batch, case, figures, ids, **options) for batch, case in grid]
        run.measure(arms)
    run.report(arms)


@command.command()
@model_argument
@workload(32)
@click.option("--max-num-seqs", type=int, default=32, show_default=True, help="Sequences at once.")
@steps
@click.option(
    "--rival",
    type=click.Choice(["mlx-lm", "batch-generator", "llama.cpp"]),
    help="Measure that too.",
)
@click.option(
    "--gguf",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The same model for llama.cpp.",
)
@click.option(
    "--kv-memory", help="The same for K/V of both: 500MB; else the same number of sequences."
)
@measured_engine_options
@measuring(3)
@reporting
def throughput(model, max_num_seqs, rival, gguf, kv_memory, **given):
    """How much is done when all requests are there at once.

    With --rival mlx-lm, its BatchGenerator and its generation one at a time get the same requests,
    on the same weights in this process, in turns; and their tokens are compared. With --rival
    batch-generator only that, as one at a time takes long. With --rival llama.cpp, that gets them
    through llama-cpp-python, with a file of its own.
    """
    from mlxpage.bench.offline import Comparison, at_once_within
    from mlxpage.bench.workloads import longest

    if (rival == "llama.cpp") != (gguf is not None):
        raise InvalidRequest(
            "--rival llama.cpp and --gguf FILE, the model that it runs, go together"
        )
    run = Measurement("throughput", model, given)
    subject, items = run.subject, run.items()
    at_once, kv_bytes = max_num_seqs, None
    if kv_memory is not None:
        if run.engine["num_blocks"] is not None:
            raise InvalidRequest("--kv-memory and --num-blocks both say how large the pool is")
        blocks = run.engine["num_blocks"] = subject.blocks_of(kv_memory)
        kv_bytes = blocks * subject.block_nbytes
        at_once = at_once_within(subject.model, items, kv_bytes, max_num_seqs)
    run.make_room(max_num_seqs, subject.room_for(max_num_seqs, longest(items)))
    with ExitStack() as stack:
        chunk = run.engine["max_num_batched_tokens"]
        if rival == "llama.cpp":
            theirs = _llama_cpp(gguf, subject.model, items, max_num_seqs, chunk, kv_bytes)
            stack.callback(theirs.close)
        comparison = Comparison(stack.enter_context(run.loaded()), items, chunk)
        arms = [comparison.ours()]
        if rival == "llama.cpp":
            arms.append(theirs.arm(comparison))
        elif rival:
            arms.append(comparison.batch_generator(at_once))
        if rival == "mlx-lm":
            arms.append(comparison.one_at_a_time())
        run.measure(arms)
        for arm in arms[1:]:
            arm.facts |= comparison.same_tokens(arm.case["arm"])
    run.report(arms, rival=rival, gguf=gguf and str(gguf), kv_memory=kv_memory)


def _llama_cpp(gguf, model, items, at_once: int, chunk: int, kv_bytes: int | None):
    """Its cache in as many bytes for all, or room in it for each to be as long as the longest."""
    from mlxpage.bench.llamacpp import CELLS_STEP, LlamaCpp, cell_nbytes
    from mlxpage.bench.workloads import longest

    room = {"at_once": at_once, "chunk": chunk}
    if kv_bytes is not None:
        cells = kv_bytes // cell_nbytes(model)
        return LlamaCpp(gguf, model, cells=cells, shares_cells=True, **room)
    each = -(-longest(items) // CELLS_STEP) * CELLS_STEP
    return LlamaCpp(gguf, model, cells=at_once * each, shares_cells=False, **room)


@command.command(name="serve-sim")
@model_argument
@workload(32)
@click.option(
    "--request-rate",
    type=Rates(),
    default="inf",
    show_default=True,
    help="Requests a second; inf: all at once.",
)
@click.option(
    "--burstiness", type=float, default=1.0, show_default=True, help="1: Poisson; less: in bursts."
)
@click.option("--max-concurrency", type=click.IntRange(1), help="Requests under way at once.")
@click.option(
    "--goodput",
    multiple=True,
    help="Count requests that meet it, in ms: ttft:500, tpot:50 or e2el:9000; repeatable.",
)
@click.option(
    "--max-num-seqs", type=int, default=32, show_default=True, help="Sequences in a step."
)
@click.option(
    "--max-inter-token-ms",
    type=Gap(),
    default="auto",
    show_default=True,
    help="Smaller chunks, if tokens wait longer; or none.",
)
@steps
@measured_engine_options
@measuring(1)
@reporting
def serve_sim(
    model,
    request_rate,
    burstiness,
    max_concurrency,
    goodput,
    max_num_seqs,
    max_inter_token_ms,
    **given,
):
    """Requests that come by and by, as to a server, but in this process.

    They arrive whether or not earlier ones have ended. Names and definitions are those of vLLM's
    bench serve: TTFT, TPOT, ITL and E2EL, throughput, goodput.
    """
    from mlxpage.bench import serving
    from mlxpage.bench.workloads import longest

    goals = goals_of(goodput)
    run = Measurement("serve-sim", model, given)
    items = run.items()
    run.make_room(max_num_seqs, run.subject.room_for(max_num_seqs, longest(items)))
    run.engine["max_inter_token_ms"] = max_inter_token_ms
    total = len(request_rate) * run.settings["repeats"] * len(items)
    with (
        run.loaded(load_async_engine, max_queued=len(items)) as engine,
        run.progress("requests", total) as advance,
    ):
        arms = [
            serving.arm(
                engine,
                items,
                rate=rate,
                burstiness=burstiness,
                max_concurrency=max_concurrency,
                goals=goals,
                seed=run.settings["seed"],
                on_end=advance,
            )
            for rate in request_rate
        ]
        run.measure(arms, watched=False)
    own = {"burstiness": burstiness, "max_concurrency": max_concurrency, "goodput": goals}
    run.report(arms, **own)


@command.command()
@model_argument
@workload(16)
@click.option(
    "--choices",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Generations of each prompt.",
)
@click.option("--longest", type=int, help="What a contiguous cache reserves; else the context.")
@steps
@measured_engine_options
@reporting
def memory(model, choices, longest, **given):
    """What the pool holds, what is shared, and how many sequences fit.

    All requests are served at once, over the real pool; after each step its blocks are counted. A
    contiguous cache that knew the length of the output, or reserved for a power of two, or for
    --longest, is counted on the same steps.
    """
    from mlxpage.bench import pool
    from mlxpage.bench.runs import in_turns
    from mlxpage.bench.workloads import longest as longest_of

    run = Measurement("memory", model, given)
    if not run.subject.model.kv_specs:
        raise InvalidRequest(f"{run.subject.model.family} keeps no K and V, which this counts")
    items = run.items()
    most, needed = min(256, choices * len(items)), longest_of(items)
    longest = longest or run.subject.model.context_length or needed
    if longest < needed:
        raise InvalidRequest(f"--longest is {longest}; the longest request has {needed} tokens")
    run.make_room(most, run.subject.room_for(most, needed))
    with run.loaded() as llm:
        arms = pool.arms(llm, items, longest, choices)
        in_turns(arms, 1, warm_up=False)  # nothing is timed
    run.report(arms, choices=choices, longest=longest)


@command.command()
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    help="A name, or batch,context,heads,KV heads,head size,block size; repeatable. All, if none.",
)
@click.option(
    "--launches",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    help="In a row, of a large shape.",
)
@click.option("--rotation", help="Bytes of K and V in turn, so that no cache holds them: 256MB.")
@measuring(10)
@reporting
def attention(shapes, launches, rotation, **given):
    """Attention through block tables, beside MLX's over contiguous K and V.

    On a GPU the kernels; on a CPU the reference, over a few small shapes.
    """
    from mlxpage.bench import attention as kernels
    from mlxpage.bench.bandwidth import copy_speed
    from mlxpage.metal.backend import device
    from mlxpage.sizes import in_bytes

    run = Measurement("attention", None, given)
    wanted = [kernels.shape_of(name) for name in shapes or kernels.shapes()]
    nbytes = None if rotation is None else in_bytes(rotation)
    if rotation is not None and not nbytes:
        raise InvalidRequest(f"--rotation is {rotation!r}; write it like 256MB")
    if device().kind == "cpu" and not run.quiet:
        say("there is no GPU: this measures the reference, which serves CPUs, on small shapes")
    speed = run.facts["copy_bytes_per_s"] = copy_speed()
    arms = []
    with run.progress("shapes", len(wanted)) as advance:
        for name, shape in wanted:  # one after the other: their K and V are large
            case = kernels.Case(shape, run.settings["seed"], nbytes)
            of_shape = kernels.arms(name, case, speed, launches)
            run.measure(of_shape, watched=False)
            for arm in of_shape:
                arm.run = arm.warm_up = None  # they hold K and V
            arms += of_shape
            advance()
    own = {"shapes": {name: list(shape) for name, shape in wanted}}
    run.report(arms, **own, launches=launches, rotation=nbytes)
