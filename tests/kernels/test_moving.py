"""Writing, gathering and copying move what they should, and touch nothing else."""

from __future__ import annotations

import numpy as np
import paging
import pytest

from mlxpage.metal import kernels, reference
from mlxpage.metal.backend import mx
from mlxpage.metal.kernels.launch import padded
from mlxpage.metal.kernels.work import RunCost
from mlxpage.metal.layout import Blocks, Format
from mlxpage.metal.quantised import dequantised


@pytest.fixture(autouse=True)
def fresh_kernels(metal):
    with paging.fresh_kernels():
        yield


DTYPES = [mx.float32, mx.float16, mx.bfloat16]
PLAIN = (None, None)
# kv_heads, K's and V's head size, block size; bits of K's and V's codes
SHAPES = [
    ((1, 64, 64, 16), PLAIN),
    ((3, 80, 96, 32), PLAIN),
    ((2, 16, 24, 16), PLAIN),
    ((2, 192, 128, 16), PLAIN),
    ((1, 64, 64, 16), (8, 8)),
    ((3, 96, 32, 32), (4, 8)),
    ((2, 192, 128, 16), (4, 4)),
    ((2, 64, 24, 16), (8, None)),
    ((2, 80, 64, 16), (None, 4)),
]


def random_blocks(rng, shape, bits, dtype, num_blocks=12) -> Blocks:
    kv_heads, k_dim, v_dim, block_size = shape
    sizes = (num_blocks + 1, kv_heads, block_size)
    pools = [rng.standard_normal((*sizes, dim)) for dim in (k_dim, v_dim)]
    return paging.blocks_of(*pools, dtype, bits)


def parts(blocks: Blocks):
    return zip((blocks.k, blocks.v), (blocks.kind.k, blocks.kind.v), strict=True)


def elements(pool: mx.array, part: Format, block_size: int) -> np.ndarray:
    """(num_blocks + 1, kv_heads, block_size, head_dim)"""
    return paging.floats(dequantised(pool, part, block_size, mx.float32) if part.bits else pool)


def random(rng, shape, dtype) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, bits", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 5, 40])
def test_rows_land_in_their_slots_and_nowhere_else(shape, bits, dtype, count, thread_order):
    rng = np.random.default_rng(count)
    kv_heads, k_dim, v_dim, block_size = shape
    blocks = random_blocks(rng, shape, bits, dtype)
    k, v = (random(rng, (count, kv_heads, 1, d), dtype) for d in (k_dim, v_dim))
    slots = rng.permutation(12 * block_size)[:count] + block_size
    where = mx.array(slots // block_size), mx.array(slots % block_size)
    expected = [
        reference.write(pool + 0, rows[:, :, 0], part, *where, None)
        for (pool, part), rows in zip(parts(blocks), (k, v), strict=True)
    ]
    fence = kernels.write(k, v, blocks, padded(slots.astype(np.int32)), mx.zeros(8))
    mx.eval(fence)
    assert fence.size >= 8
    for pool, then in zip(blocks[:2], expected, strict=True):
        assert np.array_equal(paging.contents(pool), paging.contents(then))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, bits", SHAPES, ids=str)
@pytest.mark.parametrize("lengths", [[1], [16, 40, 33], list(range(1, 60, 7))], ids=len)
def test_a_gathered_sequence_is_in_order_and_zero_behind_its_end(
    shape, bits, dtype, lengths, thread_order
):
    rng = np.random.default_rng(len(lengths))
    kv_heads, k_dim, v_dim, block_size = shape
    width = -(-max(lengths) // block_size)
    count = len(lengths) * width
    pools = [rng.standard_normal((count + 1, kv_heads, block_size, d)) for d in (k_dim, v_dim)]
    tables = (rng.permutation(count) + 1).reshape(len(lengths), width)
    for row, length in zip(tables, lengths, strict=True):
        row[-(-length // block_size) :] = 0
        last, used = row[(length - 1) // block_size], (length - 1) % block_size + 1
        for pool in pools:
            pool[last, :, used:] = np.nan
    blocks = paging.blocks_of(*pools, dtype, bits)
    positions = max(lengths)
    gathered = kernels.gather(
        blocks,
        padded(tables.astype(np.int32)),
        padded(np.array(lengths, np.int32)),
        (len(lengths), width, positions),
        paging.FENCE,
    )
    for (pool, part), out in zip(parts(blocks), gathered, strict=True):
        expected = elements(pool, part, block_size)[tables]  # (S, M, kv_heads, block_size, d)
        expected = expected.swapaxes(1, 2).reshape(*out.shape[:2], -1, out.shape[3])
        expected = paging.rounded(expected[:, :, :positions], dtype)
        for row, length in zip(expected, lengths, strict=True):
            row[:, length:] = 0
        # A GPU may add the bias before it rounds the product.
        assert np.allclose(paging.floats(out), expected, rtol=2**-8 if part.bits else 0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, bits", SHAPES, ids=str)
@pytest.mark.parametrize("pairs", [[(1, 2)], [(3, 4), (3, 5), (6, 1), (7, 12), (9, 8)]], ids=len)
def test_copied_blocks_are_the_same_and_the_others_are_as_they_were(
    shape, bits, dtype, pairs, thread_order
):
    blocks = random_blocks(np.random.default_rng(0), shape, bits, dtype)
    expected = [np.array(paging.contents(pool)) for pool in blocks[:2]]
    for pool in expected:
        for source, target in pairs:
            pool[target] = pool[source]
    fence = kernels.copy_blocks(blocks, np.array(pairs, np.int32), mx.zeros(8))
    mx.eval(fence)
    for pool, then in zip(blocks[:2], expected, strict=True):
        assert np.array_equal(paging.contents(pool), then)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, bits", SHAPES, ids=str)
def test_blocks_of_other_arrays_are_copied_into_a_pool(shape, bits, dtype, thread_order):
    rng = np.random.default_rng(1)
    blocks = random_blocks(rng, shape, bits, dtype)
    others = random_blocks(rng, shape, bits, dtype, num_blocks=2)
    expected = [np.array(paging.contents(pool)) for pool in blocks[:2]]
    for pool, other in zip(expected, others[:2], strict=True):
        pool[[12, 5, 1]] = paging.contents(other)
    pairs = np.array([(0, 12), (1, 5), (2, 1)], np.int32)
    mx.eval(kernels.copy_blocks(blocks, pairs, mx.zeros(8), others))
    for pool, then in zip(blocks[:2], expected, strict=True):
        assert np.array_equal(paging.contents(pool), then)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_elements_that_are_all_alike_are_kept(bits, dtype):
    blocks = random_blocks(np.random.default_rng(0), (1, 64, 64, 16), (bits, bits), dtype)
    k, v = mx.zeros((1, 1, 1, 64), dtype), mx.full((1, 1, 1, 64), -2.5, dtype)
    mx.eval(kernels.write(k, v, blocks, padded(np.array([17], np.int32)), mx.zeros(8)))
    for (pool, part), value in zip(parts(blocks), (0, -2.5), strict=True):
        assert (elements(pool, part, 16)[1, 0, 1] == value).all()


@pytest.mark.full
@pytest.mark.parametrize("name", ["write", "copy", "gather", "attend"])
def test_a_pool_may_have_more_elements_than_32_bits_count(name):
    """4.3 GB of pool each, of which the tests touch the last blocks only."""
    kv_heads, block_size, dim = 32, 32, 256
    last = 2**31 // (kv_heads * block_size * dim) + 2
    shape = last + 1, kv_heads, block_size, dim
    k_pool, v_pool = mx.zeros(shape, mx.float16), mx.zeros(shape, mx.float16)
    mx.eval(k_pool, v_pool)
    blocks = Blocks.plain(k_pool, v_pool)
    rng = np.random.default_rng(0)
    rows = random(rng, (2, kv_heads, 1, dim), mx.float16)
    where = np.array([last * block_size + 5, last * block_size + 6], np.int32)
    if name == "write":
        mx.eval(kernels.write(rows, -rows, blocks, padded(where), mx.zeros(8)))
        assert np.array_equal(
            paging.floats(k_pool[last, :, 5:7]), paging.floats(rows)[:, :, 0].swapaxes(0, 1)
        )
        assert not k_pool[: last - 1].any().item()
        return
    k_pool[last, :, :2] = rows[:, :, 0].swapaxes(0, 1)
    v_pool[last, :, :2] = -rows[:, :, 0].swapaxes(0, 1)
    mx.eval(k_pool, v_pool)
    blocks = Blocks.plain(k_pool, v_pool)
    if name == "copy":
        pairs = np.array([(last, last - 1)], np.int32)
        mx.eval(kernels.copy_blocks(blocks, pairs, mx.zeros(8)))
        for pool in (k_pool, v_pool):
            assert np.array_equal(paging.floats(pool[last - 1]), paging.floats(pool[last]))
            assert not pool[: last - 1].any().item()
        return
    table, length = np.array([[last]], np.int32), np.array([2], np.int32)
    if name == "gather":
        tables, lengths = padded(table), padded(length)
        k, v = kernels.gather(blocks, tables, lengths, (1, 1, 2), paging.FENCE)
        assert np.array_equal(paging.floats(k)[0], paging.floats(rows)[:, :, 0].swapaxes(0, 1))
        assert np.array_equal(paging.floats(v), -paging.floats(k))
        return
    starts, cost = np.array([0, 1], np.int32), RunCost(1, 1, 1)
    work = kernels.plan_work(starts, length, table, block_size, None, cost)
    q = random(rng, (1, kv_heads, 1, dim), mx.float16)
    out, _ = kernels.paged_attention(q, blocks, work, paging.FENCE, scale=0.1)
    k = paging.floats(rows)[:, :, 0]  # (2, kv_heads, dim)
    weights = np.exp(0.1 * (paging.floats(q)[0, :, 0] * k).sum(-1))
    expected = -(weights[:, :, None] * k).sum(0) / weights.sum(0)[:, None]
    assert paging.error(paging.floats(out)[0, :, 0], expected) < paging.TOLERANCE[mx.float16]
