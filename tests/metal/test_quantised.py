"""K and V as codes: what a pool of them holds, how near it comes, what attention reads of it."""

from __future__ import annotations

import numpy as np
import pytest
from metal.test_reference import defined, make

from mlxpage.errors import UnsupportedModel
from mlxpage.metal import reference
from mlxpage.metal.backend import mx
from mlxpage.metal.layout import Blocks, Format, LayerSpec, PoolKind
from mlxpage.metal.quantised import dequantised, quantise, quantised_blocks

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def floats(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32), np.float64)


def rows(rng, *shape, dtype=mx.float32, offset=0.0) -> mx.array:
    return mx.array((rng.standard_normal(shape) + offset).astype(np.float32)).astype(dtype)


def back(words: mx.array, part: Format) -> mx.array:
    """The elements of rows of words, each of which is a block of one position."""
    return dequantised(words, part, 1, mx.float32)[..., 0, :]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 192])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_an_element_is_off_by_half_a_code_at_most(head_dim, bits, dtype, offset):
    part = Format(head_dim, dtype, bits)
    given = rows(np.random.default_rng(0), 50, 3, head_dim, dtype=dtype, offset=offset)
    words = quantise(given, part)
    assert words.dtype == mx.uint32
    assert words.shape == (50, 3, part.row_words + part.side_words)
    groups = floats(given).reshape(50, 3, -1, part.group_size)
    step = (groups.max(-1) - groups.min(-1)) / (2**bits - 1)
    error = np.abs(floats(back(words, part)).reshape(groups.shape) - groups).max(-1)
    # Scale and bias have 8 bits of their own in bfloat16, 11 in float16: at the far end of a group
    # that's another half of a code of 8 bits.
    rounding = 2.0**-9 if dtype == mx.bfloat16 else 2.0**-12
    ends = np.abs(groups).max(-1) * (2.0**-12 if dtype == mx.float32 else 0)
    assert (error <= step * (0.501 + rounding * (2**bits - 1)) + ends + 1e-6).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_codes_are_nearer_than_those_of_mlx(bits):
    given = rows(np.random.default_rng(1), 500, 128, dtype=mx.bfloat16)
    part = Format(128, mx.bfloat16, bits)
    theirs = mx.dequantize(*mx.quantize(given, group_size=64, bits=bits), group_size=64, bits=bits)
    ours, theirs = back(quantise(given, part), part), floats(theirs)
    assert np.linalg.norm(floats(ours) - floats(given)) < np.linalg.norm(theirs - floats(given))


@pytest.mark.parametrize("value", [0.0, -3.5, 6e4])
def test_a_group_whose_elements_are_alike_is_kept(value):
    part = Format(64, mx.float32, 8)
    assert (floats(back(quantise(mx.full((2, 64), value), part), part)) == value).all()


@pytest.mark.parametrize("bits, share", [(8, 0.54), (4, 0.29)])
def test_what_a_position_takes_of_the_bytes_of_bfloat16(bits, share):
    plain = LayerSpec(None, 8, 128, 128, mx.bfloat16)
    coded = plain.quantised(bits, bits)
    assert coded.bytes_per_token <= share * plain.bytes_per_token
    pools = [reference.Pool(spec, 9, 16) for spec in (plain, coded)]
    held = [pool.k.nbytes + pool.v.nbytes for pool in pools]
    assert held == [10 * 16 * spec.bytes_per_token for spec in (plain, coded)]
    only_v = plain.quantised(None, bits)
    assert 2 * only_v.bytes_per_token == plain.bytes_per_token + coded.bytes_per_token


def test_a_head_takes_groups_of_64_or_else_of_32_or_is_refused():
    assert [Format(size, mx.float16, 8).group_size for size in (64, 128, 256)] == [64] * 3
    assert [Format(size, mx.float16, 8).group_size for size in (32, 96, 160)] == [32] * 3
    spec = LayerSpec(None, 2, 80, 64, mx.float16)
    with pytest.raises(UnsupportedModel, match=r"K has heads of 80 .* no multiple of 32"):
        spec.quantised(8, 8)
    assert spec.quantised(None, 4).v_bits == 4, "V alone can be"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (8, None), (None, 4)], ids=str)
def test_attention_reads_what_the_codes_stand_for(bits, dtype):
    rng = np.random.default_rng(2)
    case = make(rng, [(40, 1), (70, 1), (33, 20)], heads=(2, 3, 64, 32), garbage=1e3)
    formats = [Format(size, dtype, each) for size, each in zip((64, 32), bits, strict=True)]
    pools, held = [], []
    for pool, part in zip((case.k_pool, case.v_pool), formats, strict=True):
        blocks = mx.array(pool.astype(np.float32)).astype(dtype)
        blocks = quantised_blocks(blocks, part) if part.bits else blocks
        pools.append(blocks)
        held.append(floats(dequantised(blocks, part, 16) if part.bits else blocks))
    for index, table in enumerate(case.tables):
        length = case.sequences[index][0]
        for pool, sequences in zip(held, (case.keys, case.values), strict=True):
            read = pool[table].swapaxes(1, 2).reshape(-1, *pool.shape[1::2])
            sequences[index] = read[:length]
    kind = PoolKind(2, 16, *formats)
    plan = reference.plan(case.starts, case.contexts, case.tables, 16, None, heads=6)
    q = mx.array(case.q.astype(np.float32)).astype(dtype)
    case.q = floats(q)
    out = reference.paged_attention(q, Blocks(*pools, kind), plan, scale=case.scale)
    tolerance = {mx.float32: 1e-5, mx.float16: 4e-3, mx.bfloat16: 3e-2}[dtype]
    assert np.abs(floats(out) - defined(case)).max() < tolerance


def test_rows_are_written_in_place_as_codes_and_a_begun_block_is_cleared():
    part = Format(64, mx.float32, 8)
    rng = np.random.default_rng(3)
    before = rows(rng, 6, 2, 16, 64)
    pool = quantised_blocks(before, part)
    pool[3] = 0xFFFFFFFF  # NaN, as far as scales and biases go
    new = rows(rng, 3, 2, 64)
    blocks, offsets = mx.array([2, 3, 5]), mx.array([7, 0, 15])
    pool = reference.write(pool, new, part, blocks, offsets, mx.array([3]))
    held = floats(dequantised(pool, part, 16))
    expected = floats(back(quantise(before, part), part))
    expected[3] = 0
    expected[[2, 3, 5], :, [7, 0, 15]] = floats(back(quantise(new, part), part))
    assert np.abs(held - expected).max() < 1e-6
