"""Rows and blocks go where they belong, bit by bit, and nothing else changes."""

from __future__ import annotations

import itertools

import numpy as np
import paging
import pytest
from paging import FENCE, bits

from mlxpage import kernels
from mlxpage.backend import mx

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# Of K and V: what the widest load divides, and what only a narrow one does.
HEADS = [(64, 64), (80, 80), (96, 96), (112, 112), (192, 128), (256, 256), (36, 4), (2, 6)]
SETTINGS = paging.cover(
    {"dtype": DTYPES, "head": HEADS, "kv_heads": [1, 2, 3], "block_size": [16, 32]},
    2,
    lambda setting: True,
)
every_setting = pytest.mark.parametrize(
    "setting", SETTINGS, ids=lambda s: ", ".join(map(str, s.values())).replace("mlx.core.", "")
)


@pytest.fixture(autouse=True)
def fresh_kernels(metal):
    with paging.fresh_kernels():
        yield


def pools(rng, setting: dict, num_blocks: int = 9) -> list[mx.array]:
    """K and V of random bits, many of them NaN."""
    shape = num_blocks + 1, setting["kv_heads"], setting["block_size"]
    return [random(rng, (*shape, dim), setting["dtype"]) for dim in setting["head"]]


def random(rng, shape, dtype: mx.Dtype) -> mx.array:
    unsigned = np.uint32 if dtype.size == 4 else np.uint16
    numbers = rng.integers(0, np.iinfo(unsigned).max, shape, dtype=unsigned)
    array = mx.array(numbers).view(dtype)
    mx.eval(array)
    return array


def same(arrays, expected) -> bool:
    return all(np.array_equal(bits(a), b) for a, b in zip(arrays, expected, strict=True))


def assert_fence(fence: mx.array) -> None:
    assert fence.dtype == mx.int32
    assert fence.tolist() == [1] * 8


def written(rng, setting: dict, slots: list[int]) -> None:
    """Writes a row to each of the slots and compares both pools as a whole."""
    dtype, kv_heads, block_size = (setting[n] for n in ("dtype", "kv_heads", "block_size"))
    both = pools(rng, setting)
    rows = [random(rng, (len(slots), kv_heads, 1, dim), dtype) for dim in setting["head"]]
    expected = [bits(pool).copy() for pool in both]
    for pool, new in zip(expected, rows, strict=True):
        for row, slot in enumerate(slots):
            pool[slot // block_size, :, slot % block_size] = bits(new)[row, :, 0]
    given = np.array(slots + [3] * max(0, 8 - len(slots)), np.int32)
    assert_fence(kernels.write(*rows, *both, mx.array(given), FENCE))
    assert same(both, expected)


@every_setting
def test_a_write_changes_its_slots_and_nothing_else(setting):
    rng = np.random.default_rng(1)
    places = 9 * setting["block_size"]
    written(rng, setting, (setting["block_size"] + rng.permutation(places)[:13]).tolist())


@pytest.mark.parametrize("rows", [1, 7, 8, 9])
def test_any_number_of_rows_is_written_in_any_order_of_threads(rows, thread_order):
    setting = {"dtype": mx.float16, "head": (80, 64), "kv_heads": 2, "block_size": 16}
    rng = np.random.default_rng(rows)
    # The first slot that there is, and the last.
    written(rng, setting, [16, 9 * 16 + 15, *(17 + rng.permutation(100)).tolist()][:rows])


def copied(rng, setting: dict, pairs: list[tuple[int, int]]) -> None:
    both = pools(rng, setting)
    expected = [bits(pool).copy() for pool in both]
    for pool in expected:
        for source, target in pairs:
            pool[target] = pool[source]
    assert_fence(kernels.copy_blocks(*both, np.array(pairs, np.int32), FENCE))
    assert same(both, expected)


@every_setting
def test_a_copy_changes_its_targets_and_nothing_else(setting):
    copied(np.random.default_rng(2), setting, [(1, 4), (1, 9), (7, 2)])


@pytest.mark.parametrize("pairs", [[(3, 5)], [(1, 2), (9, 3), (4, 5), (6, 7), (4, 8)]])
def test_any_number_of_blocks_is_copied_in_any_order_of_threads(pairs, thread_order):
    setting = {"dtype": mx.float32, "head": (36, 4), "kv_heads": 3, "block_size": 16}
    copied(np.random.default_rng(len(pairs)), setting, pairs)


def gathered(rng, setting: dict, lengths: list[int], positions: int) -> None:
    """What is beyond a length isn't looked at: it's NaN, and the tables lead nowhere."""
    block_size = setting["block_size"]
    both = pools(rng, setting, num_blocks=20)
    width = -(-positions // block_size)
    tables = np.full((len(lengths), width), 2**30, np.int32)
    order = iter(rng.permutation(20) + 1)
    for table, length in zip(tables, lengths, strict=True):
        count = -(-length // block_size)
        table[:count] = [next(order) for _ in range(count)]
    padded = np.concatenate([tables.ravel(), np.full(8, 2**30, np.int32)])
    out = kernels.gather(
        *both,
        mx.array(padded),
        mx.array(np.array(lengths + [0] * 8, np.int32)),
        (len(lengths), width, positions),
        FENCE,
    )
    expected = []
    for pool in map(bits, both):
        shape = len(lengths), pool.shape[1], positions, pool.shape[3]
        expected.append(np.zeros(shape, pool.dtype))
        for sequence, length in enumerate(lengths):
            for p in range(length):
                block = tables[sequence, p // block_size]
                expected[-1][sequence, :, p] = pool[block, :, p % block_size]
    assert same(out, expected)


@every_setting
def test_a_gather_gives_sequences_in_order_and_zeros_behind_them(setting):
    gathered(np.random.default_rng(3), setting, [5, 40, 33], positions=45)


@pytest.mark.parametrize("lengths", [[1], [16], [0, 3], [7, 17, 1, 32, 31, 2, 33, 16, 9]])
def test_any_number_of_sequences_is_gathered_in_any_order_of_threads(lengths, thread_order):
    setting = {"dtype": mx.bfloat16, "head": (2, 6), "kv_heads": 2, "block_size": 16}
    gathered(np.random.default_rng(len(lengths)), setting, lengths, positions=max(lengths))


def test_what_a_gather_leaves_empty_is_zero_over_a_pool_of_nan():
    shape = 3, 1, 16, 64
    nan = mx.full(shape, float("nan"), mx.float16)
    lengths = mx.array(np.array([2] + [0] * 7, np.int32))
    tables = mx.array(np.ones(8, np.int32))
    k, v = kernels.gather(nan, nan + 0, tables, lengths, (1, 1, 16), FENCE)
    for gathered in (k, v):
        assert np.isnan(paging.floats(gathered)[:, :, :2]).all()
        assert not bits(gathered)[:, :, 2:].any()


@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_load_is_as_wide_as_all_its_heads_allow(itemsize):
    for sizes in itertools.product(range(2, 40, 2), repeat=2):
        width = kernels._width(*sizes, itemsize=itemsize)
        assert 4 <= width * itemsize <= 16
        assert all(size % width == 0 for size in sizes)
