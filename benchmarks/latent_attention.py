"""Latent attention of a decode: microseconds and GB/s, against gathering and MLX's own attention.

Why: a latent is small and all heads read it, so what they compute of it takes longer than reading
it does, the more heads there are. It tells from how many on the kernel is worth less than products
of matrices.

    python benchmarks/latent_attention.py [--contexts 4096] [--heads 16 128] [--tune]

32 sequences, latents of 512 and 64 elements, bfloat16, scattered blocks of 16. The arms alternate
in one process; launches are chained, over pools of 256 MB at least in rotation. GB/s are of the
latents read once. `--tune` tries other divisions of the kernel's work. The last line is JSON.
"""

import argparse
import json
import statistics
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np

from mlxpage.bench.attention import time_chain
from mlxpage.metal import kernels
from mlxpage.metal.backend import device, mx
from mlxpage.metal.kernels import latent, work
from mlxpage.metal.kernels.pool import as_input
from mlxpage.metal.layout import Blocks, Format, PoolKind

SIZES, BLOCK_SIZE, BATCH = (512, 64), 16, 32
KIND = PoolKind(1, BLOCK_SIZE, *(Format(size, mx.bfloat16) for size in SIZES))
SCALE = 192**-0.5
ROTATION = 256e6


def random(*shape):
    return mx.random.normal(shape).astype(mx.bfloat16)


class Case:
    def __init__(self, context: int, heads: int):
        columns = -(-context // BLOCK_SIZE)
        self.nbytes = BATCH * context * sum(SIZES) * 2
        self.heads = heads
        self.contexts = np.full(BATCH, context, np.int32)
        order = np.random.default_rng(0).permutation(BATCH * columns) + 1
        self.tables = order.reshape(BATCH, columns).astype(np.int32)
        count = round(ROTATION / self.nbytes + 0.5)
        shape = BATCH * columns + 1, 1, BLOCK_SIZE
        self.pools = [
            Blocks(*(as_input(random(*shape, size)) for size in SIZES), KIND) for _ in range(count)
        ]
        self.q, self.q_v = (random(BATCH, heads, 1, size) for size in SIZES)
        self.fence = mx.zeros(8, mx.int32)
        mx.eval([pool[:2] for pool in self.pools], self.q, self.q_v, self.fence)

    def kernel(self):
        starts = np.arange(BATCH + 1, dtype=np.int32)
        cost = kernels.latent_cost(KIND, self.heads)
        planned = kernels.plan_work(starts, self.contexts, self.tables, BLOCK_SIZE, None, cost)

        def attend(q, i):
            pool = self.pools[i % len(self.pools)]
            return kernels.latent_attention(q, self.q_v, pool, planned, self.fence, scale=SCALE)[0]

        return attend

    def gathered(self):
        arrays = mx.array(self.tables), mx.array(np.append(self.contexts, [0] * 8))
        shape = (*self.tables.shape, int(self.contexts.max()))

        def attend(q, i):
            k, v = kernels.gather(self.pools[i % len(self.pools)], *arrays, shape, self.fence)
            mask = self.q_v @ v.swapaxes(-1, -2)  # as mlx-lm does it
            return mx.fast.scaled_dot_product_attention(q, k, k, scale=SCALE, mask=mask)

        return attend


@contextmanager
def tiled(change: dict):
    """The kernel's work is divided otherwise."""
    usual = kernels.latent_tiling

    def other(*arguments):
        return usual(*arguments)._replace(**change)

    with patch.object(work, "latent_tiling", other), patch.object(latent, "latent_tiling", other):
        latent._launches.cache_clear()
        yield
    latent._launches.cache_clear()


# queries, keys, SIMD groups
DIVISIONS = [(4, 2, 1), (4, 4, 2), (4, 4, 4), (2, 4, 2), (8, 2, 1)]


def divisions(heads: int, tune: bool) -> dict[str, dict]:
    found = {"kernel": {}}
    for queries, keys, groups in DIVISIONS if tune else ():
        if heads % queries == 0 and queries * groups <= heads:
            name = f"{queries} queries, {keys} keys, {groups} groups"
            found[name] = {"queries": queries, "keys": keys, "simd_groups": groups}
    return found


def measure(context: int, heads: int, tune: bool, launches: int, repeats: int) -> dict:
    case = Case(context, heads)
    arms = {}
    for name, change in divisions(heads, tune).items():
        with tiled(change):
            arms[name] = change, case.kernel()
    arms["gather + MLX"] = {}, case.gathered()
    times = {name: [] for name in arms}
    for _ in range(repeats + 1):  # the first one compiles
        for name, (change, attend) in arms.items():
            with tiled(change):
                times[name].append(time_chain(attend, case, launches))
    medians = {name: statistics.median(each[1:]) for name, each in times.items()}
    return {
        name: {"us": round(us, 1), "GB/s": round(case.nbytes / us / 1e3)}
        for name, us in medians.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096])
    parser.add_argument("--heads", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--launches", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    record = {"device": device().name, "mlx": mx.__version__, "shapes": []}
    print(f"{record['device']}, MLX {mx.__version__}")
    for context in args.contexts:
        for heads in args.heads:
            arms = measure(context, heads, args.tune, args.launches, args.repeats)
            record["shapes"].append({"context": context, "heads": heads, "arms": arms})
            print(f"\n{BATCH} sequences of {context} tokens, {heads} heads")
            for name, found in arms.items():
                print(f"  {name:32} {found['us']:9.1f} us {found['GB/s']:6} GB/s")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
