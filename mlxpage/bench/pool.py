"""What a pool of blocks holds, and what it would hold if each sequence had one piece of memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from mlxpage import LLM
from mlxpage.bench.driver import forget, serve
from mlxpage.bench.runs import Arm
from mlxpage.bench.workloads import Item
from mlxpage.block_pool import NULL_BLOCK
from mlxpage.engine import Engine

PAGED = "blocks"
EXACT = "contiguous, exact"
POWER_OF_2 = "contiguous, power of 2"
LONGEST = "contiguous, longest"


def reservations(longest: int) -> dict[str, Callable[[int, int], int]]:
    """Slots that a contiguous cache reserves for a prompt and an output: as if the length of the
    output were known; that rounded up to a power of two; or `longest`, whatever comes."""
    return {
        EXACT: lambda prompt, output: prompt + output,
        POWER_OF_2: lambda prompt, output: prompt + (1 << max(0, output - 1).bit_length()),
        LONGEST: lambda prompt, output: longest,
    }


@dataclass(slots=True)
class Look:
    """What running sequences held after a step, in blocks and slots (the place of a token)."""

    sequences: int
    entries: int
    """Blocks that they would hold if none were shared."""
    blocks: int
    filled: int
    """Slots with something in them, a shared one once."""
    computed: int
    """The same, once for each sequence."""
    reserved: dict[str, int]
    """Slots of each contiguous cache."""


@dataclass(slots=True)
class Watch:
    """Looks at an engine after each step."""

    engine: Engine
    longest: int
    looks: list[Look] = field(default_factory=list)

    def __call__(self) -> None:
        if running := self.engine.scheduler.running:
            self.looks.append(self._look(running))

    def _look(self, running) -> Look:
        group = widest(self.engine)
        size = self.engine.plan.block_size
        filled: dict[int, int] = {}
        entries = 0
        for seq in running:
            for index, block in enumerate(seq.block_tables[group]):
                if block != NULL_BLOCK:
                    entries += 1
                    here = min(size, max(0, seq.num_computed_tokens - index * size))
                    filled[block] = max(here, filled.get(block, 0))
        wanted = [(s.num_prompt_tokens, s.max_length - s.num_prompt_tokens) for s in running]
        return Look(
            len(running),
            entries,
            len(filled),
            sum(filled.values()),
            sum(seq.num_computed_tokens for seq in running),
            {
                name: sum(itertools.starmap(reserve, wanted))
                for name, reserve in reservations(self.longest).items()
            },
        )


def widest(engine: Engine) -> int:
    """The cache group of K and V with the most blocks: that of full attention, if there is one."""
    groups = engine.scheduler.groups
    of_kv = [index for index, group in enumerate(groups) if not group.is_state]
    return max(of_kv, key=lambda index: groups[index].pool.limit)


def capacity(items: list[Item], slots: int, reserve: Callable[[int, int], int]) -> int:
    """Sequences that fit into so many slots at once: the items in order, again and again."""
    wanted = (reserve(len(item.prompt), item.output_len) for item in itertools.cycle(items))
    taken = itertools.takewhile(lambda total: total <= slots, itertools.accumulate(wanted))
    return sum(1 for _ in taken)


def arms(llm: LLM, items: list[Item], longest: int, choices: int) -> list[Arm]:
    """One for each way to reserve. The engine runs for the first; the others are counted on the
    same steps."""
    size = llm.plan.block_size
    slots = max(llm.plan.num_blocks) * size
    looked: list[Look] = []

    def run() -> dict[str, float]:
        watch, preemptions = llm._call(lambda engine: _watched(engine, items, longest, choices))
        looked[:] = watch.looks
        held = sum(look.blocks for look in looked) * size
        entries = sum(look.entries for look in looked)
        return {
            "used_percent": 100 * sum(look.filled for look in looked) / held,
            "saved_percent": 100 * (1 - held / size / entries),
            "fit": capacity(items, slots, lambda prompt, output: _whole(prompt + output, size)),
            "running_at_most": max(look.sequences for look in looked),
            "blocks_at_most": max(look.blocks for look in looked),
            "preemptions": preemptions,
            "steps": len(looked),
        }

    def counted(name: str, reserve: Callable[[int, int], int]) -> Arm:
        def count() -> dict[str, float]:
            computed = sum(look.computed for look in looked)
            return {
                "used_percent": 100 * computed / sum(look.reserved[name] for look in looked),
                "fit": capacity(items, slots, reserve),
            }

        return Arm({"reserves": name}, count)

    others = [counted(name, reserve) for name, reserve in reservations(longest).items()]
    return [Arm({"reserves": PAGED}, run), *others]


def _whole(tokens: int, size: int) -> int:
    return -(-tokens // size) * size


def _watched(engine: Engine, items, longest: int, choices: int) -> tuple[Watch, int]:
    forget(engine)
    watch, before = Watch(engine, longest), engine.scheduler.num_preemptions
    params = {"n": choices, "temperature": 1.0, "seed": 0} if choices > 1 else {}
    serve(engine, items, after_step=watch, **params)
    return watch, engine.scheduler.num_preemptions - before
