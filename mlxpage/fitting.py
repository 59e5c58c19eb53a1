"""How many sequences a model's pool holds, on this machine and on Macs: by the plan that loading
makes. Nothing is measured. On a Mac, weights keep the dtype that they are stored in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mlxpage import model_store
from mlxpage.arguments import KVBits, check_options, kv_bits_pair
from mlxpage.elastic_pool import cache_groups
from mlxpage.errors import InvalidRequest, OutOfMemory, UnsupportedModel
from mlxpage.metal import memory as sizing
from mlxpage.metal import model as models
from mlxpage.metal.backend import Device, device
from mlxpage.metal.model import Model
from mlxpage.metal.plan import Plan

MACS = (8, 16, 24, 32, 48, 64, 96, 128)
"""Gigabytes of memory."""
CONTEXTS = (2048, 8192, 32_768)
"""Tokens of each sequence; and the most that the model takes."""
AT_ONCE = (1, 4, 16, 32)
"""`max_num_seqs`."""
_CHUNK = 512  # max_num_batched_tokens, which the command line leaves as it is


@dataclass(frozen=True, slots=True)
class Fit:
    """How many sequences of so many tokens a machine holds."""

    machine: str
    memory: int
    """What the GPU may use, in bytes."""
    budget: int
    """What the engine may use of it."""
    kv_bits: KVBits
    context: int
    at_once: list[tuple[int, int]]
    """(max_num_seqs, sequences of this length that the pool holds at once), of each of AT_ONCE."""
    needs: int
    """Bytes of the budget that one such sequence takes: weights, scratch and its blocks."""

    @property
    def most(self) -> int:
        """Sequences, 0 if not a single one fits."""
        return max(sequences for _, sequences in self.at_once)


def mac(gigabytes: int) -> Device:
    """A Mac with so much memory: what its GPU may use of it unless iogpu.wired_limit_mb is set, two
    thirds, or three quarters of more than 32 GB. The largest have been seen to allow more."""
    installed = gigabytes * 2**30
    usable = installed * 2 // 3 if gigabytes <= 32 else installed * 3 // 4
    return Device("metal", f"{gigabytes} GB Mac", usable, installed // 2)


def machines() -> list[Device]:
    """Macs, and this machine."""
    here = device()
    return [*map(mac, MACS), replace(here, name=f"this machine ({here.kind})")]


def fits(
    name: str | os.PathLike[str],
    *,
    memory: str | int | None = None,
    block_size: int = 16,
    dtype: str | None = None,
    kv_bits: KVBits = None,
) -> Iterator[Fit]:
    """Of a model that is on this machine, for all `machines` that can give the budget: `memory`,
    None means half. Without `kv_bits`, with all that the model can be served with. Raises what
    loading would, as far as it shows without weights, but for `OutOfMemory`."""
    check_options(name, dtype=dtype, kv_bits=kv_bits, block_size=block_size, max_num_seqs=1)
    folder = model_store.located(name)
    model_store.check_folder(folder)
    memory = f"{sizing.DEFAULT_SHARE:.0%}" if memory is None else memory
    for bits in _bits(models.load(folder, dtype=dtype, weights=False), kv_bits):
        loaded: dict[str, Model] = {}
        for machine in machines():
            if machine.kind not in loaded:
                model = models.load(folder, dtype=dtype, weights=False, machine=machine)
                model.quantise_cache(*kv_bits_pair(bits))
                loaded[machine.kind] = model
            yield from _on(machine, loaded[machine.kind], memory, block_size, bits)


def sequences(plan: Plan, num_tokens: int) -> int:
    """How many sequences of so many tokens the pool of a plan holds at once. One of them may be in
    the middle of a chunk of its prompt, for which a window keeps some blocks more."""
    found = []
    for group in cache_groups(plan):
        growing, at_rest = (group.blocks_for(num_tokens, chunk) for chunk in (_CHUNK, 1))
        others = (group.pool.limit - growing) // at_rest
        found.append(max(0, 1 + others))
    return min(found)


def _bits(model: Model, wanted: KVBits) -> list[KVBits]:
    """What the model can be served with."""
    if wanted is not None:
        return [wanted]
    found: list[KVBits] = [None]
    for bits in (8, 4):
        try:
            model.quantised_specs(bits, bits)
        except UnsupportedModel:
            continue
        found.append(bits)
    return found


def _on(
    machine: Device, model: Model, memory: str | int, block_size: int, kv_bits: KVBits
) -> Iterator[Fit]:
    try:
        budget = sizing.parse(memory, machine.memory)
    except InvalidRequest:
        if machine.name == machines()[-1].name:
            raise
        return  # it has less
    longest = model.context_length or CONTEXTS[-1]
    options = {"block_size": block_size, "max_num_batched_tokens": _CHUNK, "machine": machine}
    plans: list[tuple[int, Plan | None]] = []
    for max_num_seqs in AT_ONCE:
        try:
            plan = sizing.plan(model, memory=budget, max_num_seqs=max_num_seqs, **options)
        except OutOfMemory:
            plan = None
        plans.append((max_num_seqs, plan))
    for context in sorted({longest, *(each for each in CONTEXTS if each < longest)}):
        at_once = [(n, min(n, sequences(plan, context)) if plan else 0) for n, plan in plans]
        needs = _needs(model, context, **options)
        yield Fit(machine.name, machine.memory, budget, kv_bits, context, at_once, needs)


def _needs(model: Model, context: int, *, block_size: int, machine: Device, **options) -> int:
    endless = replace(machine, memory=2**62, max_buffer=2**62)
    plan = sizing.plan(
        model,
        memory=endless.memory,
        num_blocks=-(-context // block_size),
        max_num_seqs=1,
        block_size=block_size,
        machine=endless,
        **options,
    )
    return plan.weights + plan.scratch + plan.pool
