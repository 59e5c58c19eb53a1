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

import numpy as np

from mlxpage.metal.backend import device, mx
from mlxpage.metal.timing import AttentionCase, copy_speed, in_turns, summary

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
BITS = {"ours, 8 bits": 8, "ours, 4 bits": 4}


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
        case = AttentionCase(*SHAPES[name])
        launches = max(4, min(args.launches * 4, round(args.launches * 5e8 / case.nbytes)))
        times = in_turns(case, case.arms(), launches, args.repeats)
        times |= flashinfer(case, launches, args.repeats)
        results = {arm: summary(t, case.bytes_of(BITS.get(arm))) for arm, t in times.items()}
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
