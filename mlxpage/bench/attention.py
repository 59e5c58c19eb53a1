"""Decode attention through block tables: microseconds and GB/s, against what else could be done.

A decode step reads all K and V once, so attention's bandwidth is the speed of long contexts. Each
measurement chains launches, the output of one being the queries of the next, and there are so many
K and V in rotation that no cache holds them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from mlxpage.bench.runs import Arm
from mlxpage.errors import InvalidRequest
from mlxpage.metal import kernels, reference
from mlxpage.metal.backend import device, mx
from mlxpage.metal.kernels import pool
from mlxpage.metal.layout import Blocks, Format, PoolKind
from mlxpage.metal.quantised import quantised_blocks


class Shape(NamedTuple):
    batch: int
    context: int | None
    """None: drawn from `RAGGED`."""
    heads: int
    kv_heads: int
    head_dim: int
    block_size: int


SHAPES = {
    "target": Shape(32, 4096, 32, 8, 128, 16),
    "block 32": Shape(32, 4096, 32, 8, 128, 32),
    "one long": Shape(1, 32768, 32, 8, 128, 16),
    "one short": Shape(1, 1024, 32, 8, 128, 16),
    "few": Shape(8, 8192, 32, 8, 128, 16),
    "many": Shape(64, 1024, 32, 8, 128, 16),
    "group of 3": Shape(32, 4096, 24, 8, 128, 16),
    "group of 8": Shape(32, 4096, 32, 4, 128, 16),
    "no group": Shape(32, 1024, 32, 32, 80, 16),
    "64 wide": Shape(32, 4096, 64, 8, 64, 16),
    "256 wide": Shape(32, 4096, 16, 8, 256, 16),
    "ragged": Shape(32, None, 32, 8, 128, 16),
}
SHAPES_OF_A_CPU = {
    "one": Shape(1, 4096, 9, 3, 64, 16),
    "few": Shape(8, 1024, 9, 3, 64, 16),
    "many": Shape(32, 256, 9, 3, 64, 16),
}
ROTATION = 256 * 10**6
ROTATION_OF_A_CPU = 64 * 10**6
RAGGED = 64, 8192
"""Tokens of sequences, from and below."""

OURS = "blocks"
APPENDING = "blocks, appending"
CONSECUTIVE = "blocks, consecutive"
BITS = {"blocks, 8 bits": 8, "blocks, 4 bits": 4}
CONTIGUOUS = "MLX, contiguous"
GATHERED = "gathered, then MLX"

Attend = Callable[[mx.array, int], mx.array]
"""Queries, and the number of the launch, to what the next launch takes as queries."""


def shapes() -> dict[str, Shape]:
    """Those that are for this machine's device."""
    return SHAPES_OF_A_CPU if device().kind == "cpu" else SHAPES


def shape_of(written: str) -> tuple[str, Shape]:
    """A name of `shapes`, or batch,context,heads,KV heads,head size,block size."""
    if written in shapes():
        return written, shapes()[written]
    try:
        shape = Shape(*map(int, written.split(",")))
        is_one = min(shape) > 0 and shape.heads % shape.kv_heads == 0
    except (TypeError, ValueError):
        is_one = False
    if not is_one:
        names = ", ".join(shapes())
        raise InvalidRequest(
            f"--shape is {written!r}; it must be one of {names}; or batch,context,heads,KV heads,"
            "head size,block size, as in 8,1024,32,8,128,16, with heads a multiple of KV heads"
        )
    return written, shape


class Case:
    """Random K and V of one shape, several times over, and every arm's view of them."""

    def __init__(self, shape: Shape, seed: int = 0, rotation: int | None = None):
        """`rotation`: bytes of K and V at least; None: as many as this machine's caches need."""
        rng = np.random.default_rng(seed)
        mx.random.seed(seed)
        on_cpu = device().kind == "cpu"
        self._rotation = rotation or (ROTATION_OF_A_CPU if on_cpu else ROTATION)
        self.dtype = mx.float32 if on_cpu else mx.bfloat16
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.head_dim, self.block_size = shape.head_dim, shape.block_size
        if shape.context is None:
            self.contexts = np.sort(rng.integers(*RAGGED, shape.batch)).astype(np.int32)
        else:
            self.contexts = np.full(shape.batch, shape.context, np.int32)
        self.blocks = -(-self.contexts // self.block_size)
        self.num_blocks = int(self.blocks.sum())
        self.scale = self.head_dim**-0.5
        self.pools = self._pools(None)
        self.q = self.random((shape.batch, self.heads, 1, self.head_dim))
        self.fence = mx.zeros(8, mx.int32)
        self.starts = np.arange(shape.batch + 1, dtype=np.int32)
        self.scattered = self._tables(rng.permutation(self.num_blocks) + 1)
        self.consecutive = self._tables(np.arange(self.num_blocks) + 1)
        mx.eval(self.q, self.fence)

    def random(self, shape) -> mx.array:
        return mx.random.normal(shape).astype(self.dtype)

    def _tables(self, order) -> np.ndarray:
        tables = np.zeros((len(self.blocks), self.blocks.max()), np.int32)
        ends = np.cumsum(self.blocks)
        for row, end, count in zip(tables, ends, self.blocks, strict=True):
            row[:count] = order[end - count : end]
        return tables

    def bytes_of(self, bits: int | None = None) -> int:
        """Of K and V that attention reads."""
        part = Format(self.head_dim, self.dtype, bits)
        return 2 * int(self.contexts.sum()) * self.kv_heads * part.nbytes

    def _pools(self, bits: int | None) -> list[Blocks]:
        """As many as it takes for no cache to hold them."""
        part = Format(self.head_dim, self.dtype, bits)
        kind = PoolKind(self.kv_heads, self.block_size, part, part)
        shape = (self.num_blocks + 1, self.kv_heads, self.block_size, self.head_dim)
        pools = []
        for _ in range(max(1, round(self._rotation / self.bytes_of(bits) + 0.5))):
            pair = [self.random(shape) for _ in range(2)]
            if bits:
                pair = [quantised_blocks(rows, part) for rows in pair]
            mx.eval(pair)
            pools.append(
                Blocks(*map(pool.as_input, pair), kind) if self._on_gpu else Blocks(*pair, kind)
            )
        return pools

    @property
    def _on_gpu(self) -> bool:
        return device().kind != "cpu"

    # -- arms --

    def arms(self) -> dict[str, Attend]:
        if not self._on_gpu:
            return {
                OURS: self._by_reference(self.scattered),
                CONTIGUOUS: self._contiguous(),
                GATHERED: self._gathered_by_reference(),
            }
        return {
            OURS: self._paged(self.scattered),
            APPENDING: self._paged(self.scattered, append=True),
            CONSECUTIVE: self._paged(self.consecutive),
            **{
                name: self._paged(self.scattered, bits=bits)
                for name, bits in BITS.items()
                if self.head_dim % 32 == 0
            },
            CONTIGUOUS: self._contiguous(),
            GATHERED: self._gathered(),
        }

    def _paged(self, tables, *, append: bool = False, bits: int | None = None) -> Attend:
        pools = self._pools(bits) if bits else self.pools
        cost = kernels.run_cost(pools[0].kind, self.heads)
        work = kernels.plan_work(self.starts, self.contexts, tables, self.block_size, None, cost)
        new = tuple(self.random((len(self.q), self.kv_heads, 1, self.head_dim)) for _ in range(2))
        mx.eval(new)
        options = {"scale": self.scale, "new": new if append else None}

        def attend(q, i):
            return kernels.paged_attention(q, pools[i % len(pools)], work, self.fence, **options)[0]

        return attend

    def _gathered(self) -> Attend:
        arrays = mx.array(self.scattered), mx.array(np.append(self.contexts, [0] * 8))
        shape = (*self.scattered.shape, int(self.contexts.max()))
        mask = self._mask(shape[-1])

        def attend(q, i):
            k, v = kernels.gather(self.pools[i % len(self.pools)], *arrays, shape, self.fence)
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask)

        return attend

    def _by_reference(self, tables) -> Attend:
        plan = reference.plan(self.starts, self.contexts, tables, self.block_size, None, self.heads)

        def attend(q, i):
            blocks = self.pools[i % len(self.pools)]
            return reference.paged_attention(q[:, :, 0], blocks, plan, scale=self.scale)[:, :, None]

        return attend

    def _gathered_by_reference(self) -> Attend:
        heads = np.arange(self.kv_heads, dtype=np.int32)
        indices = mx.array(self.scattered[:, None] * self.kv_heads + heads[:, None])
        mask = self._mask(self.scattered.shape[1] * self.block_size)

        def attend(q, i):
            k, v = reference.gather(self.pools[i % len(self.pools)], indices)
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask)

        return attend

    def _contiguous(self) -> Attend:
        shape = (len(self.contexts), self.kv_heads, int(self.contexts.max()), self.head_dim)
        sets = [(self.random(shape), self.random(shape)) for _ in range(len(self.pools))]
        mx.eval(sets)
        mask = self._mask(shape[2])

        def attend(q, i):
            return mx.fast.scaled_dot_product_attention(
                q, *sets[i % len(sets)], scale=self.scale, mask=mask
            )

        return attend

    def _mask(self, positions: int) -> mx.array | None:
        readable = np.arange(positions) < self.contexts[:, None]
        return None if readable.all() else mx.array(readable[:, None, None])


def time_chain(attend: Attend, case, launches: int) -> float:
    """Microseconds of one of `launches`, each after the other."""
    q = case.q
    for i in range(launches):
        q = attend(q, i)
    start = time.perf_counter()
    mx.eval(q)
    mx.synchronize()
    return (time.perf_counter() - start) / launches * 1e6


def launches_of(case: Case, launches: int) -> int:
    """More of small ones, so that a measurement isn't over at once."""
    return max(4, min(launches * 4, math.ceil(launches * 5e8 / case.bytes_of())))


def arms(name: str, case: Case, bytes_per_s: float, launches: int) -> list[Arm]:
    """An arm of each way to attend, all on the same K and V."""
    count = launches_of(case, launches)
    return [
        timed_arm(name, arm, partial(time_chain, attend, case, count), case, bytes_per_s)
        for arm, attend in case.arms().items()
    ]


def timed_arm(
    name: str, arm: str, time_it: Callable[[], float], case: Case, bytes_per_s: float
) -> Arm:
    """Of something that takes so many microseconds."""
    nbytes = case.bytes_of(BITS.get(arm))

    def run() -> dict[str, float]:
        us = time_it()
        rate = nbytes / us * 1e6
        return {"us": us, "gb_s": rate / 1e9, "copy_percent": 100 * rate / bytes_per_s}

    return Arm({"shape": name, "arm": arm}, run, run)
