"""Latent attention by its kernel is what its definition says, whatever the shapes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import paging
import pytest
from paging import FENCE, ONE_RUN, TOLERANCE, array, floats

from mlxpage.errors import UnsupportedModel
from mlxpage.metal import kernels
from mlxpage.metal.backend import mx
from mlxpage.metal.kernels import chunks, work
from mlxpage.metal.layout import Format, PoolKind


@pytest.fixture(autouse=True)
def fresh_kernels(metal):
    with paging.fresh_kernels():
        yield


F32, F16, BF16 = mx.float32, mx.float16, mx.bfloat16


def latent_case(rng, sequences, dtypes, heads: int, k_dim: int, v_dim: int, **options):
    """A case, and the queries of its V. NaN is wherever nothing may be read."""
    case = paging.case(rng, sequences, *dtypes, heads=(1, heads, k_dim, v_dim), **options)
    q_v = rng.standard_normal((*case.q.shape[:2], v_dim)) / np.sqrt(v_dim)
    return case, paging.rounded(q_v, dtypes[0])


def exact(case, q_v: np.ndarray) -> np.ndarray:
    """In float64: as attention of one head, of K and V side by side, whose values are K."""
    parts = zip(case.keys, case.values, strict=True)
    both = [np.concatenate(part, axis=-1) for part in parts]
    q = np.concatenate([case.q * case.scale, q_v], axis=-1)
    return paging.exact(replace(case, q=q, keys=both, values=case.keys, scale=1.0))


def attended(case, q_v: np.ndarray, dtypes, *, split: bool = False) -> np.ndarray:
    arguments = case.starts, case.contexts, case.tables, case.block_size
    planned = kernels.plan_work(*arguments, None, work.RunCost(1, 1, 1))
    assert (planned.partial_rows > 0) == split, "the case has as many runs as it is meant to have"
    blocks = paging.blocks_of(case.k_pool, case.v_pool, dtypes[1], (None, None))
    q, q_v = (array(each, dtypes[0])[:, :, None] for each in (case.q, q_v))
    out, fence = kernels.latent_attention(q, q_v, blocks, planned, FENCE, scale=case.scale)
    assert out.dtype == dtypes[0]
    mx.eval(out, fence)
    assert fence.dtype == mx.int32 and fence.size >= 8
    return floats(out[:, :, 0])


def check(
    contexts, dtypes, heads, k_dim, v_dim, run=ONE_RUN, cuda=False, scale=None, **options
) -> None:
    rng = np.random.default_rng([*contexts, heads])
    sequences = [(context, 1) for context in contexts]
    case, q_v = latent_case(rng, sequences, dtypes, heads, k_dim, v_dim, **options)
    case.scale = scale or case.scale
    with paging.cut(run, cuda):
        out = attended(case, q_v, dtypes, split=run < ONE_RUN)
    error = paging.error(out, exact(case, q_v))
    # A large score has fewer bits behind the point.
    assert error < TOLERANCE[dtypes[0]] * max(1, (scale or 0) / 10), f"{error:.2g} {case}"


# Their smallest numbers, a model's, and what a few lanes share.
SIZES = {"32/16": (32, 16), "512/64": (512, 64), "96/32": (96, 32), "64/128": (64, 128)}
DTYPES = {
    "float32": (F32, F32),
    "float16": (F16, F16),
    "bfloat16": (BF16, BF16),
    "float32 over bfloat16": (F32, BF16),
}
CONTEXTS = {"one token": [1], "full blocks": [16, 32, 64], "ragged": [1, 5, 15, 17, 33, 90, 201]}


@pytest.mark.parametrize("cuda", [False, True], ids=["metal", "cuda"])
@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_latent_attention_is_right(size, dtypes, contexts, cuda):
    heads = {"one token": 4, "full blocks": 16, "ragged": 6}[contexts]
    check(CONTEXTS[contexts], DTYPES[dtypes], heads, *SIZES[size], cuda=cuda)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 12, 20, 64, 128])
@pytest.mark.parametrize("cuda", [False, True], ids=["metal", "cuda"])
def test_of_any_number_of_heads(heads, cuda):
    check([3, 40], (F32, F32), heads, 64, 32, cuda=cuda)


@pytest.mark.parametrize("cuda", [False, True], ids=["metal", "cuda"])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
def test_runs_of_keys_are_merged(dtypes, block_size, cuda):
    contexts = [1, 63, 64, 65, 129, 300]
    options = {"run": 64, "cuda": cuda, "block_size": block_size}
    check(contexts, DTYPES[dtypes], 8, 128, 64, **options)


def test_threads_may_run_in_any_order(thread_order):
    check([1, 16, 90, 201], (F32, F32), 8, 64, 32, cuda=True)
    check([1, 16, 90, 201], (F16, F16), 8, 512, 64, run=48)


@pytest.mark.parametrize("run", [ONE_RUN, 32], ids=["one run", "several runs"])
@pytest.mark.parametrize("scale", [1e-6, 30.0, 3000.0])
def test_scores_of_any_size(scale, run):
    check([77, 150], (F32, F32), 4, 64, 32, run=run, cuda=True, scale=scale)


def test_the_sequences_of_a_step_may_share_blocks():
    dtypes = F32, F32
    rng = np.random.default_rng(3)
    case, q_v = latent_case(rng, [(64, 1), (70, 1)], dtypes, 4, 64, 32)
    case.tables[1, :4] = case.tables[0, :4]
    case.keys[1][:64], case.values[1][:64] = case.keys[0], case.values[0]
    with paging.cut():
        out = attended(case, q_v, dtypes)
    assert paging.error(out, exact(case, q_v)) < TOLERANCE[F32]


@pytest.mark.parametrize("most_scores", [2**40, 100])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "sequences", [[(70, 33)], [(40, 9), (33, 12), (12, 12)], [(40, 12), (12, 12)]]
)
def test_chunks_are_gathered(sequences, dtypes, most_scores):
    dtypes = DTYPES[dtypes]
    rng = np.random.default_rng(4)
    case, q_v = latent_case(rng, sequences, dtypes, 4, 64, 32)
    arguments = case.starts, case.contexts, case.tables, case.block_size, None
    blocks = paging.blocks_of(case.k_pool, case.v_pool, dtypes[1], (None, None))
    q, of_v = (array(each, dtypes[0])[:, :, None] for each in (case.q, q_v))
    out = [
        chunks.attend_chunk(
            q[chunk.rows], blocks, chunk, FENCE, scale=case.scale, q_v=of_v[chunk.rows]
        )
        for chunk in chunks.plan_chunks(*arguments, most_scores)
    ]
    out = floats(mx.concatenate(out)[:, :, 0])
    assert paging.error(out, exact(case, q_v)) < TOLERANCE[dtypes[0]]


def test_what_the_kernel_cannot_read_is_refused():
    def kind(k=512, v=64, bits=None, kv_heads=1):
        return PoolKind(kv_heads, 16, Format(k, BF16, bits), Format(v, BF16))

    with pytest.raises(UnsupportedModel, match="quantised"):
        kernels.latent_tiling(kind(bits=8), 16, False)
    with pytest.raises(UnsupportedModel, match="has 2 heads"):
        kernels.latent_tiling(kind(kv_heads=2), 16, False)
    with pytest.raises(UnsupportedModel, match="not multiples of 4"):
        kernels.latent_tiling(kind(v=36), 16, False)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_every_tiling_serves_each_head_once(dtype, cuda):
    for k, v in SIZES.values():
        kind = PoolKind(1, 16, Format(k, dtype), Format(v, dtype))
        for heads in range(1, 129):
            shape = kernels.latent_tiling(kind, heads, cuda)
            assert heads % shape.queries == 0
            taken = shape.passes(heads) * shape.simd_groups * shape.queries
            assert heads <= taken < heads + shape.simd_groups * shape.queries
            assert shape.queries <= shape.lanes and shape.queries * shape.keys <= 32
            assert 16 % shape.keys == 0
