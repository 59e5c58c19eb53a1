"""What the prefix cache is worth when many prompts begin alike, against mlx-lm's server.

Why: a system prompt, a document or a few examples come again with every request. Computed once and
kept once, they should cost neither time nor memory again.

    python benchmarks/shared_prefix.py [MODEL] [--requests 64] [--prefix 1024] [--quick]

All prompts share a prefix of real text, Python's own reference manual, and end with a question of
16 to 24 tokens. Request 1 is alone until its first token; then all others arrive at once. Arms, in
one process, on the same weights, in turns, each with nothing cached at its start:

- this engine, with the prefix cache and without it;
- mlx-lm as its server does it: `LRUPromptCache` finds the nearest cache, `BatchGenerator` goes on
  from a copy of it, and what was computed is stored at the end of the system prompt, of the prompt
  and of the answer. Limits are that server's defaults. HTTP and text are left out; this engine does
  make text.

Times to first token are from the moment a request arrives. "Blocks that hold the prefix" are the
different ones in the tables of all running sequences. K/V of running sequences is the blocks in
use, or mlx-lm's padded batches; K/V kept is free blocks with known content at the end, or the most
that its `LRUPromptCache` held besides. Those entries are slices that nobody has evaluated yet: they
keep whole batches alive, which shows in the peak in all.

The tokens of all arms are compared. A request may differ where two tokens are as good as equal, so
the gap between their logits is told. The last line is JSON.
"""

import argparse
import gc
import itertools
import json
import random
import statistics
import time
from dataclasses import dataclass
from pydoc_data.topics import topics

import numpy as np
from about import about

from mlxpage import model_store
from mlxpage.engine import Engine
from mlxpage.metal import choice, memory
from mlxpage.metal.backend import mlx_lm_utils, mx
from mlxpage.metal.model import Model, load
from mlxpage.sampling_params import SamplingParams
from mlxpage.text import Tokenizer

BLOCK = 16
# Defaults of mlx_lm.server.
STORED_CACHES, PROMPTS_AT_ONCE, PREFILL_STEP = 10, 8, 2048


@dataclass
class Work:
    """What every arm serves, and with what."""

    model: Model
    tokenizer: Tokenizer
    backend: choice.Backend
    prompts: list[list[int]]
    prefix: int  # tokens
    new: int
    max_num_seqs: int


class Log:
    """When requests came, and what was answered when."""

    def __init__(self, work: Work):
        self.new = work.new
        self.arrived = [0.0] * len(work.prompts)
        self.first = [0.0] * len(work.prompts)
        self.tokens: list[list[int]] = [[] for _ in work.prompts]
        self.last = 0.0

    def hear(self, index: int, tokens: list[int]) -> None:
        self.last = time.perf_counter()
        if tokens and not self.tokens[index]:
            self.first[index] = self.last
        self.tokens[index] += tokens

    @property
    def is_complete(self) -> bool:
        return all(len(tokens) == self.new for tokens in self.tokens)

    def times(self) -> dict:
        waits = np.subtract(self.first, self.arrived)
        seconds = self.last - self.arrived[0]
        return {
            "first_ttft_s": float(waits[0]),
            "others_ttft_median_s": float(np.median(waits[1:])),
            "others_ttft_p90_s": float(np.quantile(waits[1:], 0.9)),
            "seconds": seconds,
            "tok_s": sum(map(len, self.tokens)) / seconds,
        }


# -- the arms --


class Ours:
    """This engine."""

    def __init__(self, work: Work, log: Log, *, prefix_cache: bool):
        longest = max(map(len, work.prompts)) + work.new
        blocks = work.max_num_seqs * -(-longest // BLOCK)  # as many as it takes without sharing
        self.plan = memory.plan(
            work.model, num_blocks=blocks, block_size=BLOCK, max_num_seqs=work.max_num_seqs
        )
        self.engine = Engine(
            work.model,
            work.tokenizer,
            self.plan,
            max_num_seqs=work.max_num_seqs,
            backend=work.backend,
            prefix_cache=prefix_cache,
        )
        self.work, self.log = work, log
        self.outputs = []
        self.error = None
        self.most_used = self.prefix_blocks = self.running = 0

    def add(self, index: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=self.work.new, ignore_eos=True)

        def on_event(event):
            self.error = self.error or event.error
            self.log.hear(index, event.token_ids)
            if event.output:
                self.outputs.append(event.output)

        self.engine.add(self.engine.request(self.work.prompts[index], params, on_event))

    def step(self) -> None:
        self.engine.step()
        if self.error:
            raise self.error
        scheduler = self.engine.scheduler
        used = scheduler.groups[0].pool.num_used
        self.running = max(self.running, len(scheduler.running))
        if used >= self.most_used:
            self.most_used = used
            count = self.work.prefix // BLOCK
            held = {b for seq in scheduler.running for b in seq.block_tables[0][:count]}
            self.prefix_blocks = max(self.prefix_blocks, len(held))

    def facts(self) -> dict:
        stats = self.engine.stats()
        blocks = stats["blocks"]
        block_bytes = self.plan.pool / (self.plan.num_blocks[0] + 1)
        held = int(blocks["peak_used"] * block_bytes)
        cached = sum(output.num_cached_tokens for output in self.outputs)
        return {
            "computed_prompt_tokens": sum(map(len, self.work.prompts)) - cached,
            "sequences_at_once": self.running,
            "peak_blocks": blocks["peak_used"],
            "prefix_blocks": self.prefix_blocks,
            "prefix_copies": self.prefix_blocks // (self.work.prefix // BLOCK),
            "peak_kv_bytes": held,
            "kept_kv_bytes": int(blocks["cached"] * block_bytes),
            "peak_bytes": mx.get_peak_memory() - self.plan.pool + held,
            "preemptions": stats["preemptions"],
        }

    def close(self) -> None:
        self.work.model.bind(None)


class MlxLmServer:
    """What the generating thread of mlx_lm.server does with requests that it can batch."""

    def __init__(self, work: Work, log: Log):
        from mlx_lm.generate import BatchGenerator
        from mlx_lm.models.cache import LRUPromptCache

        self.work, self.log = work, log
        self.stored = LRUPromptCache(STORED_CACHES)
        self.generator = BatchGenerator(
            work.model.module,
            completion_batch_size=work.max_num_seqs,
            prefill_batch_size=min(PROMPTS_AT_ONCE, work.max_num_seqs),
            prefill_step_size=PREFILL_STEP,
            stream=mx.default_stream(mx.default_device()),
        )
        self.indices: dict[int, int] = {}
        self.kinds: dict[int, list[str]] = {}
        self.computed = self.held = self.kept = self.running = self.copies = 0

    def add(self, index: int) -> None:
        prompt, length = self.work.prompts[index], self.work.prefix
        cache, rest = self.stored.fetch_nearest_cache("model", prompt)
        found = len(prompt) - len(rest)
        segments = [(prompt[found:length], "system"), (prompt[max(found, length) :], "user")]
        segments = [(tokens, kind) for tokens, kind in segments if tokens]
        (uid,) = self.generator.insert_segments(
            segments=[[tokens for tokens, _ in segments]],
            max_tokens=[self.work.new],
            caches=[cache],
            all_tokens=[prompt[:found]],
        )
        self.indices[uid] = index
        self.kinds[uid] = [kind for _, kind in reversed(segments)]
        self.computed += len(rest)

    def step(self) -> None:
        prompts, answers = self.generator.next()
        ended = [
            r.uid for r in prompts if r.end_of_segment and not r.end_of_prompt and self.kinds[r.uid]
        ]
        for uid, (cache, tokens) in self.generator.extract_cache(ended).items():
            kind = self.kinds[uid].pop()
            self.stored.insert_cache("model", tokens[:], cache, cache_type=kind)
        for r in answers:
            self.log.hear(self.indices[r.uid], [r.token])
            if r.finish_reason is not None:
                tokens = r.all_tokens[:]
                self.stored.insert_cache("model", tokens, r.prompt_cache, cache_type="assistant")
        self._measure()

    def _measure(self) -> None:
        # What waits isn't counted: its caches share the memory of a stored one until they are
        # merged into a batch.
        batches = self.generator._prompt_batch, self.generator._generation_batch
        held = sum(cache.nbytes for batch in batches for cache in batch.prompt_cache)
        running = sum(map(len, batches))
        self.held = max(self.held, held)
        self.kept = max(self.kept, self.stored.nbytes)
        self.running = max(self.running, running)
        self.copies = max(self.copies, running + len(self.stored))

    def facts(self) -> dict:
        return {
            "computed_prompt_tokens": self.computed,
            "sequences_at_once": self.running,
            "prefix_copies": self.copies,
            "peak_kv_bytes": self.held,
            "kept_kv_bytes": self.kept,
            "peak_bytes": mx.get_peak_memory(),
        }

    def close(self) -> None:
        self.generator.close()


ARMS = {
    "mlxpage": lambda work, log: Ours(work, log, prefix_cache=True),
    "no prefix cache": lambda work, log: Ours(work, log, prefix_cache=False),
    "mlx-lm server": MlxLmServer,
}


def run(name: str, work: Work) -> tuple[dict, list[list[int]]]:
    """An arm's figures, and the tokens of each request."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    log = Log(work)
    arm = ARMS[name](work, log)
    serve(arm, log)
    result = log.times() | arm.facts()
    arm.close()
    return result, log.tokens


def serve(arm, log: Log) -> None:
    log.arrived[0] = time.perf_counter()
    arm.add(0)
    while not log.tokens[0]:
        arm.step()
    others = range(1, len(log.tokens))
    log.arrived[1:] = [time.perf_counter()] * len(others)
    for index in others:
        arm.add(index)
    while not log.is_complete:
        arm.step()


# -- what is served --


def make_prompts(tokenizer: Tokenizer, requests: int, prefix: int) -> list[list[int]]:
    """A prefix of the manual and a question about two of its topics, different for each request."""
    names = sorted(topics)
    manual = "\n".join(topics[name] for name in names)
    begin = tokenizer.encode(manual[: 8 * prefix])[:prefix]  # a token has four characters or so
    if len(begin) < prefix:
        raise SystemExit(f"--prefix is {prefix}; the manual has {len(begin)} tokens")
    pairs = list(itertools.combinations(names, 2))
    random.Random(0).shuffle(pairs)
    texts = (f"\n\nQuestion: how do {a} and {b} differ in Python?\nAnswer:" for a, b in pairs)
    questions = (tokenizer.encode(text) for text in texts)
    fitting = (question for question in questions if 16 <= len(question) <= 24)
    prompts = [begin + question for question in itertools.islice(fitting, requests)]
    if len(prompts) < requests:
        raise SystemExit(f"--requests is {requests}; there are {len(prompts)} different questions")
    return prompts


def differing(model: Model, prompts, one, other) -> list[dict]:
    """Where two arms' answers part, and how far apart the two best logits are there."""
    found = []
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            at = next(i for i, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1])
            gap = best_two_gap(model, prompts[index] + a[:at])
            found.append({"request": index + 1, "token": at + 1, "gap": gap})
    return found


def best_two_gap(model: Model, tokens: list[int]) -> float:
    from mlx_lm.models.cache import make_prompt_cache

    logits = model.module(mx.array([tokens]), cache=make_prompt_cache(model.module))[0, -1]
    second, first = mx.sort(logits.astype(mx.float32))[-2:].tolist()
    return first - second


# -- the report --

ROWS = [
    ("first token of request 1, s", "first_ttft_s", "{:.3f}", 1),
    ("first token of the others, median s", "others_ttft_median_s", "{:.3f}", 1),
    ("first token of the others, p90 s", "others_ttft_p90_s", "{:.3f}", 1),
    ("total, s", "seconds", "{:.1f}", 1),
    ("output tok/s", "tok_s", "{:.1f}", 1),
    ("prompt tokens computed", "computed_prompt_tokens", "{:,.0f}", 1),
    ("sequences at once, at most", "sequences_at_once", "{:.0f}", 1),
    ("blocks in use, at most", "peak_blocks", "{:,.0f}", 1),
    ("blocks that hold the prefix", "prefix_blocks", "{:,.0f}", 1),
    ("copies of the prefix", "prefix_copies", "{:.0f}", 1),
    ("K/V of running sequences, MB", "peak_kv_bytes", "{:,.0f}", 1e6),
    ("K/V kept, MB", "kept_kv_bytes", "{:,.0f}", 1e6),
    ("peak in all, MB", "peak_bytes", "{:,.0f}", 1e6),
]


def table(medians: dict[str, dict]) -> None:
    width = max(len(title) for title, *_ in ROWS)
    print("\n" + " " * width + "".join(f"{name:>17}" for name in medians))
    for title, key, form, unit in ROWS:
        cells = (form.format(row[key] / unit) if key in row else "-" for row in medians.values())
        print(f"{title:{width}}" + "".join(f"{cell:>17}" for cell in cells))


def tell_differences(pairs: dict[str, list[list[dict]]], requests: int) -> None:
    for name, runs in pairs.items():
        counts = ", ".join(str(len(run)) for run in runs)
        print(f"\nanswers other than with the cache, {name}: {counts} of {requests} requests")
        for part in itertools.chain(*runs):
            print("  request {request}, token {token}: best two {gap:.1e} apart".format(**part))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prefix", type=int, default=1024)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", help="as stored if left out, on a CPU float32")
    parser.add_argument("--quick", action="store_true", help="8 requests, a prefix of 256, once")
    args = parser.parse_args()
    if args.quick:
        args.requests, args.prefix, args.repeats = 8, 256, 1
    if args.requests < 2 or args.prefix < BLOCK:
        parser.error(f"--requests must be at least 2 and --prefix at least {BLOCK}")
    return args


def main() -> None:
    args = parse_args()
    mlx_lm_utils()
    folder = model_store.resolve(args.model)
    model = load(folder, dtype=args.dtype)
    tokenizer = Tokenizer(folder, model.config.get("eos_token_id"))
    backend = choice.checked(model, BLOCK, None, print)
    prompts = make_prompts(tokenizer, args.requests, args.prefix)
    record = about("shared_prefix.py") | {"backend": backend.why, "settings": vars(args)}
    print(", ".join(f"{key} {value}" for key, value in record.items() if key != "settings"))

    common = model, tokenizer, backend
    warm_up = Work(*common, [p[-32:] for p in prompts[:4]], BLOCK, 4, args.max_num_seqs)
    work = Work(*common, prompts, args.prefix, args.new, args.max_num_seqs)
    for name in ARMS:
        run(name, warm_up)
    runs, answers = {name: [] for name in ARMS}, {name: [] for name in ARMS}
    for _ in range(args.repeats):
        for name in ARMS:
            result, tokens = run(name, work)
            runs[name].append(result)
            answers[name].append(tokens)
            print(f"{name:16}{result['seconds']:8.1f} s{result['tok_s']:8.1f} tok/s", flush=True)

    medians = {
        name: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for name, results in runs.items()
    }
    pairs = {
        name: [
            differing(model, prompts, *both)
            for both in zip(answers["mlxpage"], answers[name], strict=True)
        ]
        for name in ARMS
        if name != "mlxpage"
    }
    table(medians)
    tell_differences(pairs, args.requests)
    lengths = [len(prompt) for prompt in prompts]
    record["prompt_tokens"] = {"sum": sum(lengths), "from": min(lengths), "to": max(lengths)}
    print(json.dumps(record | {"medians": medians, "differing": pairs, "runs": runs}))


if __name__ == "__main__":
    main()
