"""Attention of a few rows of each sequence to what its blocks hold."""

from __future__ import annotations

from functools import lru_cache

from mlxpage.metal.backend import mx
from mlxpage.metal.kernels.launch import Launch, at_least_8, launch, on_cuda
from mlxpage.metal.kernels.moving import pool_template
from mlxpage.metal.kernels.upload import floats, ints
from mlxpage.metal.kernels.work import Work, tiling
from mlxpage.metal.layout import Blocks, PoolKind


def paged_attention(
    q: mx.array,
    blocks: Blocks,
    work: Work,
    after: mx.array,
    *,
    scale: float,
    sinks: mx.array | None = None,
    softcap: float = 0.0,
    new: tuple[mx.array, mx.array] | None = None,
) -> tuple[mx.array, mx.array]:
    """Attention of the rows of `work` to their own sequences.

    Args:
        q: (rows, heads, 1, k_dim), float32, float16 or bfloat16.
        after: int32, 8 elements or more; all is read and written once it's computed.
        scale: factor of the scores.
        sinks: (heads,) a logit in each head's softmax that has no value.
        softcap: scores become softcap * tanh(score / softcap); 0 is off.
        new: K (rows, kv_heads, 1, k_dim) and V (rows, kv_heads, 1, v_dim) of the rows, in the
            pool's dtype, one row to a sequence: they are written too, in place. Without it they
            are in the pool already. Not for a quantised pool.

    Returns:
        (rows, heads, 1, v_dim), and a fence, as `write` does.
    """
    if new is not None and work.max_rows > 1:
        raise ValueError(f"a sequence has {work.max_rows} rows; only one of each can be appended")
    if new is not None and blocks.kind.is_quantised:
        raise ValueError("rows can't be appended to a quantised pool; write them")
    heads = q.shape[1]
    attend, merge = _attention_launches(
        (q.dtype, heads, sinks is not None, softcap > 0, new is not None),
        blocks.kind,
        (work.rows, work.max_rows, work.items, work.partial_rows),
    )
    numbers = floats(scale, softcap)
    sinks = numbers if sinks is None else at_least_8(sinks)
    k, v = new or (q, q)  # not read
    out, stats = attend(q, k, v, blocks.k, blocks.v, *work.inputs, numbers, sinks, after)
    fence = at_least_8(stats).view(mx.int32)
    if merge is not None:
        (out,) = merge(out, stats, *work.merge_inputs, sinks, ints(work.rows))
    return out, fence


@lru_cache(1024)
def _attention_launches(queries, kind: PoolKind, work) -> tuple[Launch, Launch | None]:
    """The launch of paged_attention, and that of merge_partials if there is something to merge."""
    dtype, heads, has_sinks, has_softcap, appends = queries
    rows, max_rows, items, partial_rows = work
    group, v_dim = heads // kind.kv_heads, kind.v.head_dim
    shape = tiling(kind.k, kind.v, group * max_rows, kind.block_size, on_cuda())
    out_dtype = mx.float32 if partial_rows else dtype
    template = {
        **pool_template(kind),
        "T": dtype,
        "Out": out_dtype,
        "GROUP": group,
        **{name.upper(): value for name, value in shape._asdict().items()},
        "SINKS": has_sinks,
        "SOFTCAP": has_softcap,
        "SPLIT": partial_rows > 0,
        "APPEND": appends,
    }
    threads = shape.simd_groups * 32
    passes = -(-group * max_rows // shape.queries)
    results = partial_rows or rows, heads
    attend = launch(
        "paged_attention",
        template,
        (items * threads, kind.kv_heads * passes, 1),
        threads,
        ((*results, 1, v_dim), out_dtype),
        ((*results, 2), mx.float32),
    )
    if not partial_rows:
        return attend, None
    return attend, merge_launch(rows, heads, v_dim, dtype, has_sinks)


def merge_launch(rows: int, heads: int, v_dim: int, dtype: mx.Dtype, has_sinks: bool) -> Launch:
    """Puts the partial results of rows together."""
    template = {"T": dtype, "HEADS": heads, "V_DIM": v_dim, "SINKS": has_sinks, "SIMD_GROUPS": 4}
    threadgroups = -(-rows * heads // 4)
    out = (rows, heads, 1, v_dim), dtype
    return launch("merge_partials", template, (threadgroups * 128, 1, 1), 128, out)
