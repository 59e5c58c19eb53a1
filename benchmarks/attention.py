"""`mlxpage bench attention`, and FlashInfer's paged decode beside it where that is installed.

Why: a decode step reads all K and V once, so the kernel's bandwidth is the speed of long contexts.
An M4 or an H100 copies at a known rate; attention can come close to it and can't pass it.

    python benchmarks/attention.py [--shape NAME ...] [--repeats 30]

Arms, in turns in one process: our kernel over scattered blocks; as a decode uses it, with the
newest row appended on the way; over consecutive blocks; over blocks of 8 and of 4 bits; MLX's
attention over contiguous K and V; MLX's after our gather; and FlashInfer's, on K and V of its own.
GB/s are of the bytes that an arm's K and V have, per cent of this GPU's copy speed, measured here
(bytes read and written). The last line is JSON: a record as `docs/bench.md` explains it.
"""

import argparse
import json

import numpy as np
from about import command

from mlxpage.bench import attention, record, tables
from mlxpage.bench.bandwidth import copy_speed
from mlxpage.bench.runs import Arm, in_turns
from mlxpage.metal.backend import mx


def flashinfer(name: str, case: attention.Case, speed: float, launches: int) -> list[Arm]:
    """FlashInfer's paged decode on the same shape; none where it isn't installed."""
    try:
        import flashinfer as fi
        import torch
    except ImportError:
        return []
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
    count = attention.launches_of(case, launches)

    def chain() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        x = q
        for i in range(count):
            x = wrapper.run(x, pools[i % len(case.pools)])
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / count * 1e3

    return [attention.timed_arm(name, "FlashInfer", chain, case, speed)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", action="append", help="a name or numbers; all, if none")
    parser.add_argument("--launches", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    speed = copy_speed()
    arms = []
    for name, shape in map(attention.shape_of, args.shape or attention.shapes()):
        case = attention.Case(shape)
        of_shape = attention.arms(name, case, speed, args.launches)
        of_shape += flashinfer(name, case, speed, args.launches)
        in_turns(of_shape, args.repeats)
        for arm in of_shape:
            arm.run = arm.warm_up = None  # they hold K and V
        arms += of_shape
        del case
        mx.clear_cache()
    facts = {"command": command("attention.py"), "copy_bytes_per_s": speed}
    made = record.make("attention", None, vars(args), arms, **facts)
    print(tables.markdown(made))
    print(json.dumps(made))


if __name__ == "__main__":
    main()
