"""Writing, gathering and copying move what they should, and touch nothing else."""

from __future__ import annotations

import numpy as np
import paging
import pytest

from mlxpage.metal import kernels
from mlxpage.metal.backend import mx
from mlxpage.metal.kernels.launch import padded
from mlxpage.metal.kernels.work import RunCost


@pytest.fixture(autouse=True)
def fresh_kernels(metal):
    with paging.fresh_kernels():
        yield


DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# kv_heads, K's and V's head size, block size
SHAPES = [(1, 64, 64, 16), (3, 80, 96, 32), (2, 16, 24, 16), (2, 192, 128, 16)]


def pools(rng, shape, dtype, num_blocks=12) -> tuple[mx.array, mx.array]:
    kv_heads, k_dim, v_dim, block_size = shape
    made = [random(rng, (num_blocks + 1, kv_heads, block_size, d), dtype) for d in (k_dim, v_dim)]
    mx.eval(made)
    return made[0], made[1]


def random(rng, shape, dtype) -> mx.array:
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("count", [1, 5, 40])
def test_rows_land_in_their_slots_and_nowhere_else(shape, dtype, count, thread_order):
    rng = np.random.default_rng(count)
    kv_heads, k_dim, v_dim, block_size = shape
    k_pool, v_pool = pools(rng, shape, dtype)
    expected = [paging.floats(pool) for pool in (k_pool, v_pool)]
    k, v = (random(rng, (count, kv_heads, 1, d), dtype) for d in (k_dim, v_dim))
    slots = rng.permutation(12 * block_size)[:count] + block_size
    for pool, rows in zip(expected, (k, v), strict=True):
        pool[slots // block_size, :, slots % block_size] = paging.floats(rows)[:, :, 0]
    after = mx.zeros(8)
    fence = kernels.write(k, v, k_pool, v_pool, padded(slots.astype(np.int32)), after)
    mx.eval(fence)
    assert fence.size >= 8
    assert np.array_equal(paging.floats(k_pool), expected[0])
    assert np.array_equal(paging.floats(v_pool), expected[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("lengths", [[1], [16, 40, 33], list(range(1, 60, 7))], ids=len)
def test_a_gathered_sequence_is_in_order_and_zero_behind_its_end(
    shape, dtype, lengths, thread_order
):
    rng = np.random.default_rng(len(lengths))
    block_size = shape[3]
    width = -(-max(lengths) // block_size)
    k_pool, v_pool = pools(rng, shape, dtype, len(lengths) * width)
    tables = (rng.permutation(len(lengths) * width) + 1).reshape(len(lengths), width)
    for row, length in zip(tables, lengths, strict=True):
        row[-(-length // block_size) :] = 0
        last, used = row[(length - 1) // block_size], (length - 1) % block_size + 1
        k_pool[last, :, used:] = float("nan")
        v_pool[last, :, used:] = float("nan")
    positions = max(lengths)
    gathered = kernels.gather(
        *(k_pool, v_pool),
        padded(tables.astype(np.int32)),
        padded(np.array(lengths, np.int32)),
        (len(lengths), width, positions),
        paging.FENCE,
    )
    for pool, out in zip((k_pool, v_pool), gathered, strict=True):
        blocks = paging.floats(pool)[tables]  # (S, M, kv_heads, block_size, d)
        expected = blocks.swapaxes(1, 2).reshape(*out.shape[:2], -1, out.shape[3])
        expected = expected[:, :, :positions]
        for row, length in zip(expected, lengths, strict=True):
            row[:, length:] = 0
        assert np.array_equal(paging.floats(out), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pairs", [[(1, 2)], [(3, 4), (3, 5), (6, 1), (7, 12), (9, 8)]], ids=len)
def test_copied_blocks_are_the_same_and_the_others_are_as_they_were(
    shape, dtype, pairs, thread_order
):
    k_pool, v_pool = pools(np.random.default_rng(0), shape, dtype)
    expected = [paging.floats(pool) for pool in (k_pool, v_pool)]
    for pool in expected:
        for source, target in pairs:
            pool[target] = pool[source]
    fence = kernels.copy_blocks(k_pool, v_pool, np.array(pairs, np.int32), mx.zeros(8))
    mx.eval(fence)
    assert np.array_equal(paging.floats(k_pool), expected[0])
    assert np.array_equal(paging.floats(v_pool), expected[1])


@pytest.mark.full
@pytest.mark.parametrize("name", ["write", "copy", "gather", "attend"])
def test_a_pool_may_have_more_elements_than_32_bits_count(name):
    """4.3 GB of pool each, of which the tests touch the last blocks only."""
    kv_heads, block_size, dim = 32, 32, 256
    last = 2**31 // (kv_heads * block_size * dim) + 2
    shape = last + 1, kv_heads, block_size, dim
    k_pool, v_pool = mx.zeros(shape, mx.float16), mx.zeros(shape, mx.float16)
    mx.eval(k_pool, v_pool)
    rng = np.random.default_rng(0)
    rows = random(rng, (2, kv_heads, 1, dim), mx.float16)
    where = np.array([last * block_size + 5, last * block_size + 6], np.int32)
    if name == "write":
        mx.eval(kernels.write(rows, -rows, k_pool, v_pool, padded(where), mx.zeros(8)))
        assert np.array_equal(
            paging.floats(k_pool[last, :, 5:7]), paging.floats(rows)[:, :, 0].swapaxes(0, 1)
        )
        assert not k_pool[: last - 1].any().item()
        return
    k_pool[last, :, :2] = rows[:, :, 0].swapaxes(0, 1)
    v_pool[last, :, :2] = -rows[:, :, 0].swapaxes(0, 1)
    mx.eval(k_pool, v_pool)
    if name == "copy":
        pairs = np.array([(last, last - 1)], np.int32)
        mx.eval(kernels.copy_blocks(k_pool, v_pool, pairs, mx.zeros(8)))
        for pool in (k_pool, v_pool):
            assert np.array_equal(paging.floats(pool[last - 1]), paging.floats(pool[last]))
            assert not pool[: last - 1].any().item()
        return
    table, length = np.array([[last]], np.int32), np.array([2], np.int32)
    if name == "gather":
        tables, lengths = padded(table), padded(length)
        k, v = kernels.gather(k_pool, v_pool, tables, lengths, (1, 1, 2), paging.FENCE)
        assert np.array_equal(paging.floats(k)[0], paging.floats(rows)[:, :, 0].swapaxes(0, 1))
        assert np.array_equal(paging.floats(v), -paging.floats(k))
        return
    starts, cost = np.array([0, 1], np.int32), RunCost(1, 1, 1)
    work = kernels.plan_work(starts, length, table, block_size, None, cost)
    q = random(rng, (1, kv_heads, 1, dim), mx.float16)
    out, _ = kernels.paged_attention(q, k_pool, v_pool, work, paging.FENCE, scale=0.1)
    k = paging.floats(rows)[:, :, 0]  # (2, kv_heads, dim)
    weights = np.exp(0.1 * (paging.floats(q)[0, :, 0] * k).sum(-1))
    expected = -(weights[:, :, None] * k).sum(0) / weights.sum(0)[:, None]
    assert paging.error(paging.floats(out)[0, :, 0], expected) < paging.TOLERANCE[mx.float16]
