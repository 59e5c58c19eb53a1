"""How long running streams wait for their next tokens while a long prompt is computed.

Why: whoever reads an answer sees it stop while another's prompt is computed, by as much as a step
takes. Streams run; then a long prompt comes, again and again. Told are the gaps between a stream's
tokens, before the prompt and beside it, and how long the prompt's first token took.

    python benchmarks/gaps.py [MODEL] [--streams 8] [--bounds none auto 150]

A bound is what max_inter_token_ms is set to. The last line is JSON.
"""

import argparse
import json
import threading
import time

import numpy as np
from about import about

from mlxpage import AsyncEngine, SamplingParams
from mlxpage.events import Done, Error, Tokens

IDLE_SECONDS = 8
ENDLESS = SamplingParams(temperature=0, max_tokens=4000, ignore_eos=True)


class Stream:
    """An answer whose tokens' times are kept."""

    def __init__(self, engine: AsyncEngine, prompt: str):
        self.times: list[float] = []
        self.end: Done | Error | None = None
        self._began = threading.Event()
        self._handle = engine.submit(prompt, ENDLESS, on_event=self._hear)

    def _hear(self, event) -> None:
        if isinstance(event, Tokens):
            self.times += [time.perf_counter()] * len(event.token_ids)
            self._began.set()
        elif isinstance(event, Done | Error):
            self.end = event
            self._began.set()

    def wait_for_token(self) -> None:
        assert self._began.wait(600)

    def gaps(self, begin: float, end: float) -> np.ndarray:
        """Between tokens, as far as they end in that time; in milliseconds."""
        if isinstance(self.end, Error):
            raise SystemExit(f"A stream failed: {self.end.error}")
        if self.end:
            raise SystemExit(
                f"A stream ended meanwhile; it has {ENDLESS.max_tokens:,} tokens at most. "
                "Take fewer --prompts or a larger model."
            )
        times = np.array(self.times)
        return np.diff(times)[(times[1:] >= begin) & (times[1:] <= end)] * 1e3


def told(streams: list[Stream], begin: float, end: float) -> dict[str, float]:
    gaps = np.concatenate([stream.gaps(begin, end) for stream in streams])
    p50, p95, p99 = np.percentile(gaps, [50, 95, 99])
    late = {"p50": p50, "p95": p95, "p99": p99, "max": gaps.max(), "gaps": len(gaps)}
    return {name: round(float(value), 1) for name, value in late.items()}


def prompt_of(engine: AsyncEngine, length: int, number: int) -> list[int]:
    """Real words in an order of their own, so that nothing of it is cached."""
    text = f"Report {number}. " + " ".join(f"Line {n} of {number} says so." for n in range(length))
    return engine.tokenizer.encode(text)[:length]


def bound(name: str) -> float | str | None:
    return {"none": None, "auto": "auto"}[name] if name in ("none", "auto") else float(name)


def measure(args, bound: float | str | None) -> dict:
    longest = [ENDLESS.max_tokens + 32] * args.streams + [args.prompt_len + 32]
    limits = {
        "max_num_seqs": len(longest),
        "num_blocks": sum(longest) // 16,  # of one size: a pool that grows takes time
        "max_inter_token_ms": bound,
    }
    with AsyncEngine.load(args.model, **limits) as engine:
        streams = [
            Stream(engine, f"This is story number {n}. Once upon a time")
            for n in range(args.streams)
        ]
        for stream in streams:
            stream.wait_for_token()
        firsts, idle, beside = [], [], []
        for number in range(args.prompts):
            prompt = prompt_of(engine, args.prompt_len, number)
            time.sleep(1)
            began = time.perf_counter()
            time.sleep(IDLE_SECONDS)
            idle.append(told(streams, began, time.perf_counter()))
            began = time.perf_counter()
            engine.submit(prompt, SamplingParams(temperature=0, max_tokens=1)).result()
            ended = time.perf_counter()
            firsts.append(round(ended - began, 2))
            beside.append(told(streams, began, ended))
    ratios = [round(b["p95"] / a["p95"], 2) for a, b in zip(idle, beside, strict=True)]
    return {
        "idle_ms": idle,
        "beside_ms": beside,
        "p95_ratio": ratios,
        "first_token_s": firsts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-len", type=int, default=4000)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--bounds", nargs="+", default=["none", "auto", "150"])
    args = parser.parse_args()

    results = {}
    for name in args.bounds:
        results[name] = result = measure(args, bound(name))
        print(f"max_inter_token_ms={name}, ms between tokens:")
        columns = ("idle_ms", "beside_ms", "p95_ratio", "first_token_s")
        for idle, beside, ratio, first in zip(*(result[name] for name in columns), strict=True):
            print(f"  before a prompt: {idle}")
            print(f"  beside it: {beside}, p95 {ratio} x; its first token after {first} s")
    given = {"streams": args.streams, "prompt_len": args.prompt_len}
    print(json.dumps(about("gaps.py") | given | results))


if __name__ == "__main__":
    main()
