"""What parallel sampling and beam search save by sharing blocks, beside the PagedAttention paper.

Why: generations of one prompt have its blocks in common, and beams most of what came after it too.
The paper (vLLM, SOSP 2023, section 6.3, figure 15) tells how much of the memory that saves.

    python benchmarks/sharing.py [MODEL] [--requests 12] [--longest 256] [--quick]

After each planned step the tables of the running sequences are looked at. Blocks without sharing
are the entries of all tables, blocks with sharing the different ones among them; the copy of a
last block that two have gone on from is a block of its own. The saving of a step is the blocks
saved / the blocks without sharing, and an arm's saving the mean over its steps. "By blocks" is the
same of all steps together, where a step counts as much as it holds: what a server under steady load
would see, where short and long sequences run side by side. Every prompt has a `cache_salt` of its
own, so what different prompts have in common is never shared, nor counted.

Prompts are pieces of real English text, Python's own reference manual. Lengths are like Alpaca's in
the paper: log-normal with means of 19.31 tokens in and 58.45 out. The spread is not in the paper;
sigma is taken as 0.5 and 0.9. One length is drawn, with a seed, from each of as many equally likely
parts of the distribution as there are requests; all are scaled to the mean, and clipped to 4 to 128
tokens in, 4 to --longest out. All arms have the same prompts and lengths, and nothing ends early.

Arms:

- parallel sampling: `n` generations at temperature 1, as many requests at once as
  `max_num_seqs` has room for all `n` of;
- beam search: `LLM.beam_search`, one prompt at a time. A step of it here is a request of one token
  for each beam, whose K and V are found through the prefix cache.

Output tokens are those of all generations, or of all beams in the end. Rows are tokens that the
model computed. Computed again are those beyond each prompt once, and once each token of a
generation or beam but the last. The last line is JSON.
"""

import argparse
import functools
import json
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pydoc_data.topics import topics

import numpy as np
from about import about

from mlxpage import LLM, BeamSearchParams, RequestOutput, SamplingParams
from mlxpage.block_pool import NULL_BLOCK
from mlxpage.engine import Engine
from mlxpage.scheduler import Schedule, Scheduler

BLOCK = 16
SHORTEST, LONGEST_PROMPT = 4, 128
ALPACA_IN, ALPACA_OUT = (19.31, 0.5), (58.45, 0.9)  # mean and sigma
PAPER = {  # figure 15, Alpaca: the saving in %
    "sampling": {2: 6.09, 4: 8.53, 6: 9.79},
    "beams": {2: 37.56, 4: 53.13, 6: 55.16},
}


@dataclass
class Work:
    """A prompt, and how many tokens are wanted after it."""

    prompt: list[int]
    new: int
    salt: str


@dataclass
class Step:
    """What a planned step computes and holds."""

    rows: int
    entries: int  # blocks without sharing
    blocks: int  # blocks with sharing

    @property
    def saving(self) -> float:
        return 100 * (1 - self.blocks / self.entries)


# -- looking at steps --


@contextmanager
def watched(scheduler: Scheduler) -> Iterator[list[Step]]:
    """The steps that are planned meanwhile."""
    steps, plan = [], scheduler.schedule

    def schedule() -> Schedule:
        planned = plan()
        if planned:
            steps.append(look(scheduler, planned))
        return planned

    scheduler.schedule = schedule
    try:
        yield steps
    finally:
        scheduler.schedule = plan


def look(scheduler: Scheduler, planned: Schedule) -> Step:
    entries = [
        (seq.params.cache_salt, group, block)
        for seq in scheduler.running
        for group, table in enumerate(seq.block_tables)
        for block in table
        if block != NULL_BLOCK
    ]
    return Step(planned.num_scheduled_tokens, len(entries), len(set(entries)))


# -- the arms --


def parallel_sampling(llm: LLM, work: list[Work], n: int, at_once: int) -> list[RequestOutput]:
    # On the engine's thread, so that requests come at the same steps in every run.
    run = functools.partial(serve, work=work, n=n, at_once=max(1, at_once // n))
    return llm._thread.call(run).result()


def serve(engine: Engine, work: list[Work], n: int, at_once: int) -> list[RequestOutput]:
    waiting, outputs, errors = deque(enumerate(work)), [], []
    added = 0

    def on_event(event) -> None:
        outputs.extend([event.output] if event.output else [])
        errors.extend([event.error] if event.error else [])

    while len(outputs) < len(work):
        while waiting and added - len(outputs) < at_once:
            index, item = waiting.popleft()
            engine.add(engine.request(item.prompt, sampling_params(item, n, index * n), on_event))
            added += 1
        engine.step()
        if errors:
            raise errors[0]
    return outputs


def sampling_params(item: Work, n: int, seed: int) -> SamplingParams:
    return SamplingParams(
        temperature=1,
        top_p=1,
        top_k=0,
        min_p=0,
        repetition_penalty=1,
        n=n,
        seed=seed,
        max_tokens=item.new,
        ignore_eos=True,
        cache_salt=item.salt,
    )


def beam_search(llm: LLM, work: list[Work], width: int, at_once: int) -> list[RequestOutput]:
    return [
        llm.beam_search(
            item.prompt,
            BeamSearchParams(
                beam_width=width, max_tokens=item.new, ignore_eos=True, cache_salt=item.salt
            ),
        )
        for item in work
    ]


ARMS = {"sampling": parallel_sampling, "beams": beam_search}


def run(llm: LLM, kind: str, count: int, lengths: list[Work], at_once: int) -> dict:
    """An arm's figures."""
    # Nothing is found of what an arm before has cached.
    work = [Work(w.prompt, w.new, f"{kind} {count}, {w.salt}") for w in lengths]
    before = llm.stats()["preemptions"]
    with watched(llm._engine.scheduler) as steps:
        started = time.perf_counter()
        outputs = ARMS[kind](llm, work, count, at_once)
        seconds = time.perf_counter() - started
    tokens = sum(len(o.token_ids) for first in outputs for o in [first, *first.choices])
    if tokens != count * sum(w.new for w in work):
        raise SystemExit(f"{kind}, {count}: {tokens} output tokens; some ended early")
    return figures(steps, work, count, tokens, seconds) | {
        "paper_percent": PAPER[kind].get(count),
        "preemptions": llm.stats()["preemptions"] - before,
    }


def figures(steps: list[Step], work: list[Work], count: int, tokens: int, seconds: float) -> dict:
    rows = sum(step.rows for step in steps)
    needed = sum(len(w.prompt) + count * (w.new - 1) for w in work)
    blocks, entries = (sum(getattr(step, name) for step in steps) for name in ("blocks", "entries"))
    return {
        "saving_percent": statistics.fmean(step.saving for step in steps),
        "saving_by_blocks_percent": 100 * (1 - blocks / entries),
        "steps": len(steps),
        "seconds": seconds,
        "output_tokens": tokens,
        "tok_s": tokens / seconds,
        "rows": rows,
        "rows_per_output_token": rows / tokens,
        "computed_again": rows - needed,
        "most_blocks": max(step.blocks for step in steps),
        "most_blocks_without_sharing": max(step.entries for step in steps),
    }


# -- what is served --


def make_work(tokenizer, requests: int, longest: int, seed: int) -> list[Work]:
    rng = np.random.default_rng(seed)
    prompts = draw(rng, requests, *ALPACA_IN, LONGEST_PROMPT)
    news = draw(rng, requests, *ALPACA_OUT, longest)
    pairs = enumerate(zip(prompts, news, strict=True))
    return [Work(piece(tokenizer, rng, p), new, f"prompt {index}") for index, (p, new) in pairs]


def draw(rng: np.random.Generator, count: int, mean, sigma, longest: int) -> list[int]:
    """Log-normal lengths, one from each of `count` equally likely parts, in random order."""
    shares = (rng.permutation(count) + rng.uniform(0.01, 0.99, count)) / count
    normal = [statistics.NormalDist().inv_cdf(share) for share in shares]
    lengths = np.exp(sigma * np.array(normal))
    lengths *= mean / lengths.mean()
    return np.clip(np.rint(lengths), SHORTEST, longest).astype(int).tolist()


def piece(tokenizer, rng: np.random.Generator, length: int) -> list[int]:
    """Tokens of the manual from some word on."""
    manual = "\n".join(topics[name] for name in sorted(topics))
    characters = 16 * length  # a token has four or so
    start = manual.index(" ", rng.integers(len(manual) // 2)) + 1
    return tokenizer.encode(manual[start : start + characters])[:length]


# -- the report --

COLUMNS = [
    ("saving %", "saving_percent", "{:.2f}"),
    ("paper %", "paper_percent", "{:.2f}"),
    ("by blocks %", "saving_by_blocks_percent", "{:.2f}"),
    ("tok/s", "tok_s", "{:.1f}"),
    ("rows/token", "rows_per_output_token", "{:.3f}"),
    ("computed again", "computed_again", "{:,}"),
    ("steps", "steps", "{:,}"),
]


def line(name: str, cells) -> str:
    widths = (max(len(title), 9) + 2 for title, *_ in COLUMNS)
    return f"{name:14}" + "".join(f"{c:>{w}}" for c, w in zip(cells, widths, strict=True))


def report(name: str, result: dict) -> str:
    cells = ("-" if result[key] is None else form.format(result[key]) for _, key, form in COLUMNS)
    return line(name, cells)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--longest", type=int, default=256, help="tokens out, at most")
    parser.add_argument("--counts", type=int, nargs="+", default=[2, 4, 6], help="n, beam width")
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", help="as stored if left out, on a CPU float32")
    parser.add_argument("--quick", action="store_true", help="2 requests, --longest 48, 2 and 4")
    args = parser.parse_args()
    if args.quick:
        args.requests, args.longest, args.counts = 2, 48, [2, 4]
    if args.requests < 1 or args.longest < SHORTEST:
        parser.error(f"--requests must be at least 1 and --longest at least {SHORTEST}")
    if not 1 <= min(args.counts) <= max(args.counts) <= args.max_num_seqs:
        parser.error("--counts must be from 1 to --max-num-seqs")
    return args


def measure(llm: LLM, work: list[Work], args: argparse.Namespace) -> dict[str, dict]:
    for kind in ARMS:  # warm-up
        run(llm, kind, 2, [Work(work[0].prompt, 4, "warm-up")], args.max_num_seqs)
    results = {}
    print("\n" + line("", (title for title, *_ in COLUMNS)))
    for kind in ARMS:
        for count in args.counts:
            name = f"{kind}, {count}"
            results[name] = run(llm, kind, count, work, args.max_num_seqs)
            print(report(name, results[name]), flush=True)
    return results


def main() -> None:
    args = parse_args()
    longest = LONGEST_PROMPT + args.longest
    llm = LLM(
        args.model,
        num_blocks=args.max_num_seqs * -(-longest // BLOCK),  # as many as it takes without sharing
        block_size=BLOCK,
        max_num_seqs=args.max_num_seqs,
        dtype=args.dtype,
    )
    with llm:
        work = make_work(llm.tokenizer, args.requests, args.longest, args.seed)
        record = about("sharing.py") | {"backend": llm.stats()["backend"]["why"]}
        print(", ".join(f"{key} {value}" for key, value in record.items()))
        sizes = {"in": [len(w.prompt) for w in work], "out": [w.new for w in work]}
        for name, lengths in sizes.items():
            print(f"tokens {name}: mean {statistics.fmean(lengths):.2f}, {sorted(lengths)}")
        results = measure(llm, work, args)
    record |= {"settings": vars(args), "lengths": sizes, "results": results}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
