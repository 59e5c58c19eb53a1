"""An engine as it is between two steps, in numbers: no prompts, no texts, no token ids."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from mlxpage.block_pool import CACHED, FREE, SHARED
from mlxpage.sequence import Status

if TYPE_CHECKING:
    from mlxpage.cache_group import CacheGroup
    from mlxpage.engine import Engine
    from mlxpage.request import Choice


def take(engine: Engine) -> dict[str, Any]:
    """What JSON can hold: its cache groups, its sequences in the order of service, those that run
    before those that wait, and its `stats`. Changes nothing."""
    now = time.perf_counter()
    choices = sorted(engine.choices, key=lambda c: (c.seq.status is not Status.RUNNING, c.seq))
    sizes = engine.pool.block_nbytes
    return {
        "time": time.time(),
        "groups": [_group(*each) for each in zip(engine.scheduler.groups, sizes, strict=True)],
        "sequences": [_sequence(choice, now) for choice in choices],
        "stats": engine.stats(),
    }


def _group(group: CacheGroup, block_bytes: int) -> dict[str, Any]:
    pool, states = group.pool, group.pool.states()
    return {
        "kind": "states" if group.is_state else "window" if group.window else "all",
        "window": None if group.is_state else group.window,
        "block_size": group.block_size,
        "block_bytes": block_bytes,
        "blocks": {
            "total": pool.num_blocks,
            "limit": pool.limit,
            "used": pool.num_used,
            "shared": states.count(SHARED),
            "cached": states.count(CACHED),
            "free": states.count(FREE),
        },
        "map": states,
    }


def _sequence(choice: Choice, now: float) -> dict[str, Any]:
    seq = choice.seq
    waits = "preempted" if seq.num_preemptions else "waiting"
    return {
        "id": seq.id,
        "state": "running" if seq.status is Status.RUNNING else waits,
        "prompt_tokens": seq.num_prompt_tokens,
        "cached_tokens": seq.num_cached_tokens,
        "computed_tokens": seq.num_computed_tokens,
        "output_tokens": seq.num_output_tokens,
        "max_output_tokens": seq.max_length - seq.num_prompt_tokens,
        "preemptions": seq.num_preemptions,
        "age_s": round(now - choice.timings.arrived, 3),
        "tables": [list(table) for table in seq.block_tables],
    }
