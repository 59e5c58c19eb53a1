"""An engine for tests, stepped by hand, that checks its pool after every step."""

import functools
from dataclasses import replace

from mlxpage.block_store import BlockStore
from mlxpage.disk_tier import DiskTier, facts
from mlxpage.engine import Engine
from mlxpage.metal import choice, memory
from mlxpage.sampling_params import SamplingParams


class ByteTokenizer:
    """Token ids are bytes; nothing ends a generation."""

    eos_token_ids = frozenset()

    def stream(self, stop, skip_special_tokens):
        from mlxpage.text import TextStream

        return TextStream(_ByteDetokenizer(), stop, frozenset())


class _ByteDetokenizer:
    last_segment = ""
    offset = 0

    def add_token(self, token):
        self.last_segment = chr(token)

    def finalize(self):
        self.last_segment = ""


def engine(
    model,
    tokenizer=None,
    *,
    num_blocks=4096,
    block_size=16,
    backend=choice.REFERENCE,
    prefix_cache=True,
    tier=None,
    max_inter_token_ms=None,
    **limits,
) -> Engine:
    plan = memory.plan(model, num_blocks=num_blocks, block_size=block_size, **limits)
    options = {"seed": 0, "backend": backend, "prefix_cache": prefix_cache, "tier": tier}
    options["max_inter_token_ms"] = max_inter_token_ms
    return Engine(model, tokenizer or ByteTokenizer(), plan, **options, **limits)


def disk_tier(folder, model, *, block_size=16, limit=10**9, name="a model") -> DiskTier:
    return DiskTier(BlockStore(folder, facts(model, name, block_size), limit))


def elastic_engine(model, *, start, num_blocks, backend=choice.REFERENCE, **limits) -> Engine:
    """With pools of `start` blocks that may grow to `num_blocks`."""
    plan = memory.plan(model, num_blocks=num_blocks, **limits)
    sizes = [min(start, most) for most in plan.num_blocks]
    plan = replace(plan, is_fixed=False, start=sizes)
    return Engine(model, ByteTokenizer(), plan, seed=0, backend=backend, **limits)


def serve(engine: Engine, prompts, params, *, on_step=None) -> list:
    """Runs prompts to their ends; `params` is one for all or one each. The last events' outputs."""
    if isinstance(params, SamplingParams):
        params = [params] * len(prompts)
    outputs = [None] * len(prompts)

    def take(index, event):
        if event.error is not None:
            raise event.error
        outputs[index] = event.output or outputs[index]

    for index, (prompt, given) in enumerate(zip(prompts, params, strict=True)):
        engine.add(engine.request(prompt, given, functools.partial(take, index)))
    steps = 0
    while engine.has_work:
        engine.step()
        engine.scheduler.check()
        steps += 1
        assert steps < 100_000, "no end in sight"
        if on_step:
            on_step(engine)
    assert all(group.pool.num_used == 0 for group in engine.scheduler.groups), "blocks leaked"
    return outputs
