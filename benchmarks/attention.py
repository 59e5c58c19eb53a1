"""Decode attention through block tables: microseconds and GB/s, against what else could be done.

Why: a decode step reads all K and V once, so the kernel's bandwidth is the speed of long contexts.
An M4 or an H100 copies at a known rate; attention can come close to it and can't pass it.

    python benchmarks/attention.py [--quick] [--shape NAME ...]

Arms, in turns in one process: our kernel over scattered blocks; as a decode uses it, with the
newest row appended on the way; over consecutive blocks; over blocks of 8 and of 4 bits; MLX's
attention over contiguous K and V; MLX's after our gather; and where torch and flashinfer are
installed, FlashInfer's paged decode. GB/s are of the bytes that an arm's K and V have.
Each measurement chains launches, the output of one being the queries of the next, and K and V of at
least 256 MB are in rotation, so that no cache holds them. Medians with p10 and p90; per cent are of
this GPU's copy speed, measured here (bytes read and written). The last line is JSON.
"""

import argparse
import json
import statistics
import time

import numpy as np

from mlxpage.metal import kernels
from mlxpage.metal.backend import device, mx
from mlxpage.metal.kernels.pool import as_input
from mlxpage.metal.layout import Blocks, Format, PoolKind
from mlxpage.metal.quantised import quantised_blocks

# batch, context, query heads, KV heads, head size, block size
SHAPES = {
    "target": (32, 4096, 32, 8, 128, 16),
    "block 32": (32, 4096, 32, 8, 128, 32),
    "one long": (1, 32768, 32, 8, 128, 16),
    "one short": (1, 1024, 32, 8, 128, 16),
    "few": (8, 8192, 32, 8, 128, 16),
    "many": (64, 1024, 32, 8, 128, 16),
    "group of 3": (32, 4096, 24, 8, 128, 16),
    "group of 8": (32, 4096, 32, 4, 128, 16),
    "no group": (32, 1024, 32, 32, 80, 16),
    "64 wide": (32, 4096, 64, 8, 64, 16),
    "256 wide": (32, 4096, 16, 8, 256, 16),
    "ragged": (32, None, 32, 8, 128, 16),
}
ROTATION = 256e6
DTYPE = mx.bfloat16


class Case:
    """Random K and V of one shape, several times over, and every arm's view of them."""

    def __init__(self, batch, context, heads, kv_heads, head_dim, block_size, seed=0):
        rng = np.random.default_rng(seed)
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.block_size = block_size
        if context is None:
            self.contexts = np.sort(rng.integers(64, 8192, batch)).astype(np.int32)
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

    def _tables(self, order) -> np.ndarray:
        tables = np.zeros((len(self.blocks), self.blocks.max()), np.int32)
        ends = np.cumsum(self.blocks)
        for row, end, count in zip(tables, ends, self.blocks, strict=True):
            row[:count] = order[end - count : end]
        return tables

    def bytes_of(self, bits) -> int:
        part = Format(self.head_dim, DTYPE, bits)
        return 2 * int(self.contexts.sum()) * self.kv_heads * part.nbytes

    def _pools(self, bits) -> list[Blocks]:
        """As many as it takes for no cache to hold them."""
        part = Format(self.head_dim, DTYPE, bits)
        kind = PoolKind(self.kv_heads, self.block_size, part, part)
        pools = []
        for _ in range(max(1, round(ROTATION / self.bytes_of(bits) + 0.5))):
            pair = [_random(self.shape) for _ in range(2)]
            if bits:
                pair = [quantised_blocks(rows, part) for rows in pair]
            mx.eval(pair)
            pools.append(Blocks(*map(as_input, pair), kind))
        return pools

    def paged(self, tables, *, append=False, bits=None):
        pools = self._pools(bits) if bits else self.pools
        cost = kernels.run_cost(pools[0].kind, self.heads)
        work = kernels.plan_work(self.starts, self.contexts, tables, self.block_size, None, cost)

        new = tuple(_random((len(self.q), self.kv_heads, 1, self.head_dim)) for _ in range(2))
        mx.eval(new)
        options = {"scale": self.scale, "new": new if append else None}

        def attend(q, i):
            return kernels.paged_attention(q, pools[i % len(pools)], work, self.fence, **options)[0]

        return attend

    def gathered(self):
        arrays = mx.array(self.scattered), mx.array(np.append(self.contexts, [0] * 8))
        shape = (*self.scattered.shape, int(self.contexts.max()))
        mask = self._mask()

        def attend(q, i):
            k, v = kernels.gather(self.pools[i % len(self.pools)], *arrays, shape, self.fence)
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=self.scale, mask=mask)

        return attend

    def contiguous(self):
        shape = (len(self.contexts), self.kv_heads, int(self.contexts.max()), self.head_dim)
        sets = [(_random(shape), _random(shape)) for _ in range(len(self.pools))]
        mx.eval(sets)
        mask = self._mask()

        def attend(q, i):
            return mx.fast.scaled_dot_product_attention(
                q, *sets[i % len(self.pools)], scale=self.scale, mask=mask
            )

        return attend

    def _mask(self):
        if (self.contexts == self.contexts[0]).all():
            return None
        return mx.array((np.arange(self.contexts.max()) < self.contexts[:, None])[:, None, None])

    def arms(self):
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


def _random(shape):
    return mx.random.normal(shape).astype(DTYPE)


def time_chain(attend, case, launches) -> float:
    """Microseconds of one of `launches`, each after the other."""
    q = case.q
    for i in range(launches):
        q = attend(q, i)
    start = time.perf_counter()
    mx.eval(q)
    mx.synchronize()
    return (time.perf_counter() - start) / launches * 1e6


def measure(case, launches, repeats) -> dict:
    arms = case.arms()
    for attend in arms.values():
        time_chain(attend, case, launches)
    times = {name: [] for name in arms}
    for _ in range(repeats):
        for name, attend in arms.items():
            times[name].append(time_chain(attend, case, launches))
    times |= flashinfer(case, launches, repeats)
    bits = {"ours, 8 bits": 8, "ours, 4 bits": 4}
    return {name: _summary(values, case.bytes_of(bits.get(name))) for name, values in times.items()}


def _summary(values, nbytes) -> dict:
    p10, *_, p90 = statistics.quantiles(values, n=10)
    median = statistics.median(values)
    return {
        "us": round(median, 1),
        "p10": round(p10, 1),
        "p90": round(p90, 1),
        "GB/s": round(nbytes / median / 1e3, 1),
    }


def flashinfer(case, launches, repeats) -> dict:
    """FlashInfer's paged decode on the same shape; {} where it isn't installed."""
    try:
        import flashinfer as fi
        import torch
    except ImportError:
        return {}
    to = {"device": "cuda"}
    shape = (case.num_blocks + 1, 2, case.kv_heads, case.block_size, case.head_dim)
    pools = [torch.randn(shape, dtype=torch.bfloat16, **to) for _ in range(len(case.pools))]
    indices = torch.tensor(
        np.concatenate([row[:n] for row, n in zip(case.scattered, case.blocks, strict=True)]), **to
    )
    indptr = torch.tensor(np.append(0, np.cumsum(case.blocks)), dtype=torch.int32, **to)
    last = torch.tensor((case.contexts - 1) % case.block_size + 1, dtype=torch.int32, **to)
    workspace = torch.empty(256 << 20, dtype=torch.uint8, **to)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=False)
    wrapper.plan(
        *(indptr, indices, last, case.heads, case.kv_heads, case.head_dim, case.block_size),
        q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )
    q = torch.randn(len(case.contexts), case.heads, case.head_dim, dtype=torch.bfloat16, **to)

    def chain() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        x = q
        for i in range(launches):
            x = wrapper.run(x, pools[i % len(case.pools)])
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / launches * 1e3

    chain()
    return {"FlashInfer": [chain() for _ in range(repeats)]}


def copy_speed(repeats=30) -> float:
    """GB/s of a large elementwise copy, bytes read and written."""
    x = mx.random.normal((256 << 20,)).astype(DTYPE)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--shape", action="append", choices=SHAPES)
    parser.add_argument("--launches", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    copy = copy_speed()
    record = {"device": device().name, "mlx": mx.__version__, "copy GB/s": round(copy, 1)}
    print(f"{record['device']}, MLX {mx.__version__}, copy {copy:.0f} GB/s")
    record["shapes"] = {}
    names = args.shape or (["target"] if args.quick else list(SHAPES))
    for name in names:
        case = Case(*SHAPES[name])
        launches = max(4, min(args.launches * 4, round(args.launches * 5e8 / case.nbytes)))
        results = measure(case, launches, args.repeats)
        record["shapes"][name] = {"shape": SHAPES[name], "arms": results}
        print(f"\n{name}: {SHAPES[name]}, {case.nbytes / 1e6:.0f} MB of K and V")
        for arm, r in results.items():
            share = r["GB/s"] / copy
            print(
                f"  {arm:20} {r['us']:9.1f} us ({r['p10']:.1f} to {r['p90']:.1f})"
                f" {r['GB/s']:8.1f} GB/s {share:5.0%}"
            )
        del case
        mx.clear_cache()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
