"""What counting costs, and how often a full pool makes the engine compute something twice.

Everything here is plain Python and runs between two steps of the model, where the GPU may have to
wait for it: a decode step of a batch takes 5 to 100 ms, so a plan should take well under one.

1. A step: `schedule` and `update` with every running sequence decoding and a prefix cache, for
   one cache group and for two (the second with a window of 512), and with 1,000 requests waiting
   whose first one doesn't fit. That one has been preempted four times, so its room is counted
   over the whole batch: the dearest case.
2. The pool: nanoseconds per block to allocate and to free, in tables of 64 blocks. The work
   doesn't depend on the size of the pool: with a free queue in order, a thousand times as many
   blocks cost about twice as much each. Shuffled, what belongs to neighbours in the queue lies
   far apart in memory, and a large pool adds cache misses.
3. Recompute thrash: a saturated queue in front of 15,728 slots (12 GiB of OPT-13B, as in the
   PagedAttention paper), lengths lognormal with the means of ShareGPT and Alpaca, ends unknown to
   the scheduler. Preempted sequences are computed again, so the room that admission keeps for
   growth trades batch size for wasted work. "useful" is the share of slots that hold a token.

    python benchmarks/scheduler.py

A table for people; the last line is JSON.
"""

from __future__ import annotations

import json
import math
import platform
import random
from collections.abc import Callable
from statistics import quantiles
from time import perf_counter_ns

from mlxpage.block_pool import BlockPool
from mlxpage.cache_group import CacheGroup
from mlxpage.prefix_cache import PrefixCache
from mlxpage.sampling_params import SamplingParams
from mlxpage.scheduler import Schedule, Scheduler
from mlxpage.sequence import Sequence

PARAMS = SamplingParams()
TOKEN, STOP = 1, 2


# -- a step --


def time_steps(
    num_running: int, *, num_groups: int, num_waiting: int = 0, repeats: int = 400
) -> list[float]:
    """Microseconds of each of `repeats` decode steps, with some 1,000 tokens a sequence."""
    prompt, longest, block_size = 1000, 1000 + repeats + 40, 16
    full = -(-longest // block_size) * (num_running + 1)
    # One block less than the first of the waiting would need, after everyone else.
    groups = [CacheGroup(full - 1, block_size), CacheGroup(full, block_size, window=512)]
    groups = groups[:num_groups]
    scheduler = Scheduler(
        groups,
        max_num_seqs=num_running + 1,
        max_num_batched_tokens=8192,
        prefix_cache=PrefixCache(groups),
    )
    for id in range(num_running):  # no two share a block
        scheduler.add(Sequence(id, [TOKEN + id] * prompt, PARAMS, max_length=longest))
    while not all(seq.num_output_tokens for seq in scheduler.running) or scheduler.waiting:
        step(scheduler)
    for id in range(num_running, num_running + num_waiting):
        seq = Sequence(id, [TOKEN + id] * prompt, PARAMS, max_length=longest)
        seq.num_preemptions = 4
        scheduler.add(seq)
    times = []
    for _ in range(repeats):
        begin = perf_counter_ns()
        plan = scheduler.schedule()
        planned = perf_counter_ns()
        tokens = [TOKEN] * num_running
        sampled = perf_counter_ns()
        scheduler.update(plan, tokens)
        times.append((perf_counter_ns() - sampled + planned - begin) / 1000)
    assert len(scheduler.running) == num_running, "the benchmark doesn't measure what it says"
    return times


def step(scheduler: Scheduler) -> None:
    plan = scheduler.schedule()
    scheduler.update(plan, [TOKEN] * sum(part.samples for part in plan.scheduled))


def step_rows() -> list[dict]:
    rows = []
    for num_groups, num_waiting in ((1, 0), (2, 0), (1, 1000), (2, 1000)):
        for num_running in (1, 16, 64, 256):
            times = time_steps(num_running, num_groups=num_groups, num_waiting=num_waiting)
            p10, *_, p90 = deciles = quantiles(times, n=10)
            rows.append(
                {
                    "running": num_running,
                    "groups": num_groups,
                    "waiting": num_waiting,
                    "median_us": deciles[4],
                    "p10_us": p10,
                    "p90_us": p90,
                }
            )
    return rows


# -- the pool --


def pool_row(num_blocks: int, order: str, *, num_tables: int = 4000, size: int = 64) -> dict:
    """Nanoseconds per block, over `num_tables` tables in turns of what half the pool holds."""
    rng = random.Random(0)
    pool = BlockPool(num_blocks)
    if order == "shuffled":
        blocks = pool.allocate(num_blocks)
        rng.shuffle(blocks)
        pool.free(blocks)
    turn = max(1, min(num_tables, num_blocks // 2 // size))
    allocating = freeing = 0
    for _ in range(num_tables // turn):
        begin = perf_counter_ns()
        tables = [pool.allocate(size) for _ in range(turn)]
        allocated = perf_counter_ns()
        for table in tables:
            pool.free(table)
        freeing += perf_counter_ns() - allocated
        allocating += allocated - begin
    count = num_tables // turn * turn * size
    return {
        "blocks": num_blocks,
        "order": order,
        "allocate_ns": allocating / count,
        "free_ns": freeing / count,
    }


# -- recompute thrash --


class NoReserve(Scheduler):
    """Admits whatever has room for its own known tokens."""

    def _reserve(self, seq: Sequence) -> int | None:
        return 0


class OneBlockEach(Scheduler):
    def _reserve(self, seq: Sequence) -> int | None:
        return 1


# name: mean prompt, mean output, spread (the sigma of the lognormal)
WORKLOADS = {"ShareGPT-like": (161, 338, 0.8), "Alpaca-like": (19, 58, 0.95)}
POLICIES = {"none": NoReserve, "1 block each": OneBlockEach, "mlxpage": Scheduler}
CONTEXT = 2048


def lengths(rng: random.Random, mean: float, sigma: float) -> Callable[[], int]:
    mu = math.log(mean) - sigma * sigma / 2
    return lambda: max(1, min(CONTEXT // 2, round(rng.lognormvariate(mu, sigma))))


def thrash_row(workload: str, policy: str, *, warm_up: int = 1500, measured: int = 4500) -> dict:
    rng = random.Random(1)
    mean_prompt, mean_output, sigma = WORKLOADS[workload]
    prompt_length = lengths(rng, mean_prompt, sigma)
    output_length = lengths(rng, mean_output, sigma)
    slots, block_size = 15_728, 16
    scheduler = POLICIES[policy](
        [CacheGroup(slots // block_size, block_size)],
        max_num_seqs=256,
        max_num_batched_tokens=512,
    )
    ends: dict[Sequence, int] = {}  # total length at which the sequence will stop
    reached: dict[Sequence, int] = {}  # tokens computed at least once
    count = dict.fromkeys(
        ("useful", "batch", "computed", "again", "preempted", "most", "finished"), 0
    )
    num_added = 0
    for number in range(warm_up + measured):
        if number == warm_up:
            count = dict.fromkeys(count, 0)
        while len(scheduler.waiting) < 8:
            prompt = [TOKEN] * prompt_length()
            seq = Sequence(
                num_added, prompt, PARAMS, max_length=CONTEXT, stop_token_ids=frozenset([STOP])
            )
            ends[seq] = len(prompt) + output_length()
            scheduler.add(seq)
            num_added += 1
        plan = scheduler.schedule()
        count["useful"] += sum(seq.num_computed_tokens for seq in scheduler.running)
        count["batch"] += len(scheduler.running)
        count["computed"] += plan.num_scheduled_tokens
        count["again"] += recomputed(plan, reached)
        count["preempted"] += len(plan.preempted)
        tokens = [
            STOP if part.start + part.num_tokens + 1 == ends[part.seq] else TOKEN
            for part in plan.scheduled
            if part.samples
        ]
        for seq, _ in scheduler.update(plan, tokens):
            if seq.finish_reason:
                count["finished"] += 1
                count["most"] = max(count["most"], seq.num_preemptions)
                del ends[seq], reached[seq]
    scheduler.check()
    return {
        "workload": workload,
        "reserve": policy,
        "useful_percent": 100 * count["useful"] / measured / slots,
        "mean_batch": count["batch"] / measured,
        "finished_per_100_steps": 100 * count["finished"] / measured,
        "preemptions_per_request": count["preempted"] / count["finished"],
        "most_preemptions": count["most"],
        "recomputed_percent": 100 * count["again"] / count["computed"],
    }


def recomputed(plan: Schedule, reached: dict[Sequence, int]) -> int:
    """How many of the plan's tokens had been computed before."""
    again = 0
    for part in plan.scheduled:
        end, before = part.start + part.num_tokens, reached.get(part.seq, 0)
        again += max(0, min(end, before) - part.start)
        reached[part.seq] = max(end, before)
    return again


# -- the report --


def table(title: str, rows: list[dict]) -> None:
    print(f"\n{title}")
    cells = [list(rows[0])] + [
        [f"{value:,.2f}" if isinstance(value, float) else f"{value}" for value in row.values()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> None:
    report = {"python": platform.python_version(), "machine": platform.machine()}
    report["step"] = step_rows()
    table("A step: schedule and update", report["step"])
    report["pool"] = [
        pool_row(num_blocks, order)
        for order in ("in order", "shuffled")
        for num_blocks in (1_000, 100_000, 1_000_000)
    ]
    table("The pool: nanoseconds per block", report["pool"])
    report["thrash"] = [thrash_row(work, policy) for work in WORKLOADS for policy in POLICIES]
    table(
        "Recompute thrash: 15,728 slots, blocks of 16, a queue that never empties", report["thrash"]
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
