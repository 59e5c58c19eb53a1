"""Latent attention of single rows to what their blocks hold."""

from __future__ import annotations

from functools import lru_cache

from mlxpage.metal.backend import mx
from mlxpage.metal.kernels.attention import merge_launch
from mlxpage.metal.kernels.launch import Launch, at_least_8, launch, on_cuda
from mlxpage.metal.kernels.moving import pool_template
from mlxpage.metal.kernels.upload import floats, ints
from mlxpage.metal.kernels.work import Work, latent_tiling
from mlxpage.metal.layout import Blocks, PoolKind


def latent_attention(
    q: mx.array, q_v: mx.array, blocks: Blocks, work: Work, after: mx.array, *, scale: float
) -> tuple[mx.array, mx.array]:
    """Latent attention of the rows of `work`, one of each sequence: their scores are
    `scale * q @ K + q_v @ V`, their values K.

    Args:
        q: (rows, heads, 1, k_dim), float32, float16 or bfloat16.
        q_v: (rows, heads, 1, v_dim), of the same type.
        blocks: not quantised, with the rows of this forward.
        after: int32, 8 elements or more; all is read once it's computed.

    Returns:
        (rows, heads, 1, k_dim), and a fence, as `write` does.
    """
    shape = work.rows, work.items, work.partial_rows
    attend, merge = _launches(q.dtype, q.shape[1], blocks.kind, shape)
    numbers = floats(scale, 0.0)
    out, stats = attend(q, q_v, blocks.k, blocks.v, *work.inputs, numbers, after)
    fence = at_least_8(stats).view(mx.int32)
    if merge is not None:
        (out,) = merge(out, stats, *work.merge_inputs, numbers, ints(work.rows))
    return out, fence


@lru_cache(1024)
def _launches(dtype: mx.Dtype, heads: int, kind: PoolKind, work) -> tuple[Launch, Launch | None]:
    rows, items, partial_rows = work
    shape = latent_tiling(kind, heads, on_cuda())
    out_dtype = mx.float32 if partial_rows else dtype
    template = {
        **pool_template(kind),
        "T": dtype,
        "Out": out_dtype,
        "HEADS": heads,
        **{name.upper(): value for name, value in shape._asdict().items()},
        "SPLIT": partial_rows > 0,
    }
    threads, results = shape.simd_groups * 32, (partial_rows or rows, heads)
    attend = launch(
        "latent_attention",
        template,
        (items * threads, shape.passes(heads), 1),
        threads,
        ((*results, 1, kind.k.head_dim), out_dtype),
        ((*results, 2), mx.float32),
    )
    merges = partial_rows > 0
    return attend, merge_launch(rows, heads, kind.k.head_dim, dtype, False) if merges else None
