"""How late an app's timer is while its event loop reads many streams.

Why: an app embeds the engine only if its windows stay smooth. A timer of 60 Hz, a frame's length,
runs in the loop that reads all streams; how late it wakes is what the app's user would feel. The
timer alone is measured too, for the machine's own share of that. The engine runs in the app's
process first, and then in one of its own (`isolate=True`).

    python benchmarks/event_loop.py [MODEL] [--streams 32] [--tokens 200] [--switch-ms 5]

Python lets a thread compute for 5 ms before another gets its turn (`sys.setswitchinterval`), and
the engine's is such a thread where it isn't isolated: an app that minds sets a shorter one, which
--switch-ms tries.
The last line is JSON.
"""

import argparse
import asyncio
import json
import sys
import time

import numpy as np
from about import about

from mlxpage import AsyncEngine, SamplingParams
from mlxpage.events import Tokens

HZ = 60


async def timer(delays: list[float]) -> None:
    """Appends by how many seconds each tick was late, until it is cancelled."""
    began = time.perf_counter()
    for tick in range(1, sys.maxsize):
        due = began + tick / HZ
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        delays.append(time.perf_counter() - due)


async def read(engine: AsyncEngine, prompt: str, params: SamplingParams) -> tuple[int, int]:
    """Events and tokens of a stream."""
    events = tokens = 0
    async for event in engine.submit(prompt, params):
        events += 1
        tokens += len(event.token_ids) if isinstance(event, Tokens) else 0
    return events, tokens


async def beside(work) -> tuple[dict, float, list]:
    """Runs `work` beside the timer: its delays in milliseconds, the seconds, what work gave."""
    delays: list[float] = []
    ticking = asyncio.create_task(timer(delays))
    began = time.perf_counter()
    results = await work
    seconds = time.perf_counter() - began
    ticking.cancel()
    ms = np.array(delays) * 1e3
    p50, p90, p99 = np.percentile(ms, [50, 90, 99])
    late = {"p50": p50, "p90": p90, "p99": p99, "max": ms.max()}
    return {name: round(float(value), 3) for name, value in late.items()}, seconds, results


async def measure(args, isolate: bool) -> dict:
    params = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True)
    prompts = [f"This is story number {n}. Once upon a time" for n in range(args.streams)]
    options = {"max_num_seqs": args.streams, "dtype": args.dtype, "isolate": isolate}
    async with AsyncEngine.load(args.model, **options) as engine:
        await engine.submit("Warm up", SamplingParams(max_tokens=4))
        alone, _, _ = await beside(asyncio.sleep(5))
        steps = engine.stats()["steps"]
        streams = asyncio.gather(*(read(engine, prompt, params) for prompt in prompts))
        late, seconds, read_ = await beside(streams)
        steps = engine.stats()["steps"] - steps
    events, tokens = (sum(column) for column in zip(*read_, strict=True))
    return {
        "delay_ms": late,
        "delay_ms_alone": alone,
        "seconds": round(seconds, 2),
        "tok_s": round(tokens / seconds, 1),
        "events": events,
        "tokens": tokens,
        "step_ms": round(seconds / steps * 1e3, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--switch-ms", type=float, default=sys.getswitchinterval() * 1e3)
    parser.add_argument("--dtype", default=None)
    args = parser.parse_args()
    sys.setswitchinterval(args.switch_ms / 1e3)

    results = {}
    for arm, isolate in (("in_process", False), ("isolated", True)):
        results[arm] = result = asyncio.run(measure(args, isolate))
        print(arm.replace("_", " "))
        for name, late in (("alone", "delay_ms_alone"), ("beside the streams", "delay_ms")):
            told = ", ".join(f"{key} {value:.2f}" for key, value in result[late].items())
            print(f"  timer of {HZ} Hz {name}: ms late: {told}")
        print(
            f"  {result['tokens']:,} tokens in {result['events']:,} events, {result['tok_s']} "
            f"tok/s, {result['step_ms']} ms a step"
        )
    given = {"streams": args.streams, "switch_ms": args.switch_ms}
    print(json.dumps(about("event_loop.py") | given | results))


if __name__ == "__main__":
    main()
