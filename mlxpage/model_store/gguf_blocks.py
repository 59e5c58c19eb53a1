"""Quantised blocks of a GGUF file in MLX's affine format, not a bit of them changed.

Both cut a row into groups of 32 elements, each of them `code * scale + bias`. MLX has the codes of
a row in uint32 words, the first one in the lowest bits, and scales and biases apart. GGUF's blocks
hold float16, and so do scales and biases here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

GROUP_SIZE = 32


class Affine(NamedTuple):
    """A matrix (rows, columns) as MLX keeps it."""

    bits: int
    words: Any  # (rows, columns * bits / 32) uint32
    scales: Any  # (rows, columns / 32) float16
    biases: Any  # likewise


def repacked(blocks, kind: str) -> Affine:
    """`blocks` (rows, bytes of a row) uint8, of the GGUF type `kind`: Q4_1 or Q8_0."""
    return {"Q4_1": _q4_1, "Q8_0": _q8_0}[kind](blocks)


def _q4_1(blocks) -> Affine:
    """A scale, a bias, then byte i holds the codes of the elements i and 16 + i."""
    import numpy as np

    sides, codes = _cut(blocks, sides=2, code_bytes=16)
    codes = np.concatenate([codes & 15, codes >> 4], axis=-1)
    codes = codes[..., ::2] | codes[..., 1::2] << 4
    return Affine(4, _words(codes), sides[..., 0], sides[..., 1])


def _q8_0(blocks) -> Affine:
    """A scale, then int8. With codes of 0 and more there's a bias."""
    import numpy as np

    sides, codes = _cut(blocks, sides=1, code_bytes=32)
    scales = sides[..., 0]
    return Affine(8, _words(codes ^ 128), scales, scales * np.float16(-128))


def _cut(blocks, sides: int, code_bytes: int):
    """float16 (rows, groups, sides) and uint8 (rows, groups, code_bytes)"""
    import numpy as np

    blocks = blocks.reshape(len(blocks), -1, 2 * sides + code_bytes)
    floats = np.ascontiguousarray(blocks[..., : 2 * sides]).view(np.float16)
    return floats, blocks[..., 2 * sides :]


def _words(codes):
    """Bytes (rows, groups, bytes of a group) -> uint32 (rows, words)"""
    import numpy as np

    return np.ascontiguousarray(codes).reshape(len(codes), -1).view(np.uint32)
