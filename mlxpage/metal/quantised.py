"""Rows of K and V as codes with scales and biases, and back: what `layout.Format` describes."""

from __future__ import annotations

from mlxpage.metal.backend import mx
from mlxpage.metal.layout import Format

_SMALLEST_SCALE = 1e-7  # of a group whose elements are all alike


def quantise(rows: mx.array, part: Format) -> mx.array:
    """Words of rows (..., head_dim): codes, then scales and biases, (..., row_words + side_words).

    The least element of a group is its bias. Codes are nearest to the scale and bias as they are
    stored, rounded; `mx.quantize` takes those of before, which costs it half a code in bfloat16.
    """
    groups = rows.astype(mx.float32)
    groups = groups.reshape(*rows.shape[:-1], part.side_words, part.group_size)
    most = 2**part.bits - 1
    low = groups.min(axis=-1, keepdims=True)
    bias = low.astype(part.side_dtype)
    scale = (groups.max(axis=-1, keepdims=True) - low) / most
    scale = mx.maximum(scale, _SMALLEST_SCALE).astype(part.side_dtype)
    codes = mx.round((groups - bias.astype(mx.float32)) / scale.astype(mx.float32))
    codes = mx.clip(codes, 0, most).astype(mx.uint32)
    shifts = mx.arange(0, 32, part.bits, dtype=mx.uint32)
    words = (codes.reshape(*rows.shape[:-1], part.row_words, -1) << shifts).sum(axis=-1)
    halves = [side.squeeze(-1).view(mx.uint16).astype(mx.uint32) for side in (scale, bias)]
    return mx.concatenate([words, halves[0] | halves[1] << 16], axis=-1)


def dequantised(
    blocks: mx.array, part: Format, block_size: int, dtype: mx.Dtype | None = None
) -> mx.array:
    """The elements of blocks of a head (..., block_size * (row_words + side_words)), as
    (..., block_size, head_dim) of `dtype`, else of what they were."""
    cut = block_size * part.row_words
    codes = blocks[..., :cut].reshape(*blocks.shape[:-1], block_size, part.row_words)
    sides = blocks[..., cut:].reshape(*blocks.shape[:-1], block_size, part.side_words)
    scales, biases = (
        half.astype(mx.uint16).view(part.side_dtype).astype(dtype or part.dtype)
        for half in (sides & 0xFFFF, sides >> 16)
    )
    return mx.dequantize(codes, scales, biases, group_size=part.group_size, bits=part.bits)


def quantised_blocks(rows: mx.array, part: Format) -> mx.array:
    """Blocks of a head (..., block_size * (row_words + side_words)) that hold rows (...,
    block_size, head_dim)."""
    words = quantise(rows, part)
    parts = words[..., : part.row_words], words[..., part.row_words :]
    return mx.concatenate([each.flatten(-2) for each in parts], axis=-1)


def columns(part: Format, offsets: mx.array, block_size: int) -> mx.array:
    """(T, row_words + side_words) where the words of rows at `offsets` (T,) lie in their block."""
    codes = offsets[:, None] * part.row_words + mx.arange(part.row_words)
    sides = offsets[:, None] * part.side_words + mx.arange(part.side_words)
    return mx.concatenate([codes, sides + block_size * part.row_words], axis=1)
