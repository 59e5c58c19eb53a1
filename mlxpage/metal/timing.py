"""How fast a GPU reads K and V: through block tables, and by what else could be done.

Each measurement chains launches, the output of one being the queries of the next, and K and V of at
least 256 MB are in rotation, so that no cache holds them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np

from mlxpage.metal import kernels
from mlxpage.metal.backend import mx
from mlxpage.metal.kernels import pool
from mlxpage.metal.layout import Blocks, Format, PoolKind
from mlxpage.metal.quantised import quantised_blocks

ROTATION = 256e6
_RAGGED = 64, 8192  # tokens of sequences, from and below
DTYPE = mx.bfloat16

# (queries, number of the launch) -> the next queries
Attend = Callable[[mx.array, int], mx.array]


class AttentionCase:
    """Random K and V of one shape, several times over, and every arm's view of them."""

    def __init__(self, batch, context, heads, kv_heads, head_dim, block_size, seed=0):
        """`context` is the tokens of each sequence of the batch; None: ragged."""
        rng = np.random.default_rng(seed)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.block_size = block_size
        if context is None:
            self.contexts = np.sort(rng.integers(*_RAGGED, batch)).astype(np.int32)
        else:
            self.contexts = np.full(batch, context, np.int32)
        self.blocks = -(-self.contexts // block_size)
        self.num_blocks = int(self.blocks.sum())
        self.nbytes = self.bytes_of(None)
        self.scale = head_dim**-0.5
        self.shape = (self.num_blocks + 1, kv_heads, block_size, head_dim)
        self.pools = self._pools(None)
        self.q = _random((batch, heads, 1, head_dim))
        self.fence = mx.zeros(8, mx.int32)
        self.starts = np.arange(batch + 1, dtype=np.int32)
        self.scattered = self._tables(rng.permutation(self.num_blocks) + 1)
        self.consecutive = self._tables(np.arange(self.num_blocks) + 1)
        mx.eval(self.q, self.fence)

    def _tables(self, order: np.ndarray) -> np.ndarray:
        tables = np.zeros((len(self.blocks), self.blocks.max()), np.int32)
        ends = np.cumsum(self.blocks)
        for row, end, count in zip(tables, ends, self.blocks, strict=True):
            row[:count] = order[end - count : end]
        return tables

    def bytes_of(self, bits: int | None) -> int:
        """Of all K and V that one launch reads."""
        part = Format(self.head_dim, DTYPE, bits)
        return 2 * int(self.contexts.sum()) * self.kv_heads * part.nbytes

    def _pools(self, bits: int | None) -> list[Blocks]:
        """As many as it takes for no cache to hold them."""
        part = Format(self.head_dim, DTYPE, bits)
        kind = PoolKind(self.kv_heads, self.block_size, part, part)
        pools = []
        for _ in range(max(1, round(ROTATION / self.bytes_of(bits) + 0.5))):
            pair = [_random(self.shape) for _ in range(2)]
            if bits:
                pair = [quantised_blocks(rows, part) for rows in pair]
            mx.eval(pair)
            pools.append(Blocks(*map(pool.as_input, pair), kind))
        return pools

    def paged(self, tables, *, append=False, bits=None) -> Attend:
        pools = self._pools(bits) if bits else self.pools
        cost = kernels.run_cost(pools[0].kind, self.heads)
        work = kernels.plan_work(self.starts, self.contexts, tables, self.block_size, None, cost)

        new = tuple(_random((len(self.q), self.kv_heads, 1, self.head_dim)) for _ in range(2))
        mx.eval(new)
        options = {"scale": self.scale, "new": new if append else None}

        def attend(q, i):
            return kernels.paged_attention(q, pools[i % len(pools)], work, self.fence, **options)[0]

        return attend

    def gathered(self) -> Attend:
        arrays = mx.array(self.scattered), mx.array(np.append(self.contexts, [0] * 8))
        shape = (*self.scattered.shape, int(self.contexts.max()))
        mask = self._mask()

        def attend(q, i):
            k, v = kernels.gather(self.pools[i % len(self.pools)], *arrays, shape, self.fence)
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask)

        return attend

    def contiguous(self) -> Attend:
        shape = (len(self.contexts), self.kv_heads, int(self.contexts.max()), self.head_dim)
        sets = [(_random(shape), _random(shape)) for _ in range(len(self.pools))]
        mx.eval(sets)
        mask = self._mask()

        def attend(q, i):
            return mx.fast.scaled_dot_product_attention(
                q, *sets[i % len(self.pools)], scale=self.scale, mask=mask
            )

        return attend

    def _mask(self) -> mx.array | None:
        if (self.contexts == self.contexts[0]).all():
            return None
        return mx.array((np.arange(self.contexts.max()) < self.contexts[:, None])[:, None, None])

    def arms(self) -> dict[str, Attend]:
        return {
            "ours": self.paged(self.scattered),
            "ours, appending": self.paged(self.scattered, append=True),
            "ours, consecutive": self.paged(self.consecutive),
            **{
                f"ours, {bits} bits": self.paged(self.scattered, bits=bits)
                for bits in (8, 4)
                if self.head_dim % 32 == 0
            },
            "MLX, contiguous": self.contiguous(),
            "gather + MLX": self.gathered(),
        }


def _random(shape: tuple[int, ...]) -> mx.array:
    return mx.random.normal(shape).astype(DTYPE)


def time_chain(attend: Attend, case, launches: int) -> float:
    """Microseconds of one of `launches`, each after the other; the first takes `case.q`."""
    q = case.q
    for i in range(launches):
        q = attend(q, i)
    start = time.perf_counter()
    mx.eval(q)
    mx.synchronize()
    return (time.perf_counter() - start) / launches * 1e6


def in_turns(case, arms: dict[str, Attend], launches: int, repeats: int) -> dict[str, list[float]]:
    """Microseconds of every arm, `repeats` times, after one that doesn't count."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name, attend in arms.items():
            taken = time_chain(attend, case, launches)
            if repeat:
                times[name].append(taken)
    return times


def summary(values: list[float], nbytes: int) -> dict[str, float]:
    """Of at least two measurements that read `nbytes` each."""
    p10, *_, p90 = statistics.quantiles(values, n=10)
    median = statistics.median(values)
    return {
        "us": round(median, 1),
        "p10": round(p10, 1),
        "p90": round(p90, 1),
        "GB/s": round(nbytes / median / 1e3, 1),
    }


def copy_speed(repeats: int = 30, elements: int = 256 << 20) -> float:
    """GB/s of a large elementwise copy, bytes read and written."""
    x = mx.random.normal((elements,)).astype(DTYPE)
    mx.eval(x)
    times = []
    for _ in range(repeats):
        mx.synchronize()
        start = time.perf_counter()
        for _ in range(8):
            x = x + 1
        mx.eval(x)
        mx.synchronize()
        times.append((time.perf_counter() - start) / 8)
    return 2 * x.nbytes / statistics.median(times) / 1e9
