"""The header of a safetensors file, checked against the file before anything is loaded.

A file is an 8-byte little-endian length, a JSON object of that length and the data:

    {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}

Offsets count from the data's first byte. The tensors fill the data without gap or overlap.
"""

import json
import math
from pathlib import Path
from typing import Any

from mlxpage.errors import InvalidModel

# The hub refuses longer ones too. Parsing one of this size takes 0.4 GB and a few seconds.
MAX_HEADER_BYTES = 25_000_000
MAX_DIMENSION = 2**31 - 1  # of an MLX array
MAX_RANK = 16

# Bytes of the dtypes that MLX can read.
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "C64"), 8),
}


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Tensor name -> {"dtype": str, "shape": list[int], "data_offsets": [begin, end]}.

    Raises `InvalidModel`, naming the file, when it is truncated or damaged.
    """
    try:
        data_bytes, tensors = _parse(file)
        tensors.pop("__metadata__", None)
        for name, tensor in tensors.items():
            _check_tensor(name, tensor)
        _check_layout(tensors, data_bytes)
    except OSError as error:
        raise InvalidModel(f"{file} can't be read: {error.strerror}.") from None
    except _DamageError as damage:
        raise InvalidModel(f"{file} is damaged: {damage}. Fetch the model again.") from None
    return tensors


class _DamageError(Exception):
    """What is wrong with the file."""


def _parse(file: Path) -> tuple[int, dict[str, Any]]:
    """(bytes of data after the header, the header's object)"""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise _DamageError(f"it is truncated, as it has {size:,} bytes and no whole header")
        if length > MAX_HEADER_BYTES:
            raise _DamageError(f"its header has {length:,} bytes, over {MAX_HEADER_BYTES:,}")
        text = stream.read(length)
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        raise _DamageError("its header is no valid JSON") from None
    if not isinstance(header, dict):
        raise _DamageError("its header is no JSON object")
    return size - 8 - length, header


def _check_tensor(name: str, tensor: Any) -> None:
    if not isinstance(tensor, dict):
        raise _DamageError(f"the entry of {name!r:.80} is no JSON object")
    dtype, shape, offsets = (tensor.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _DamageError(f"{name!r:.80} has the dtype {dtype!r:.40}, unknown to MLX")
    if not _are_sizes(shape, MAX_DIMENSION) or len(shape) > MAX_RANK:
        raise _DamageError(f"{name!r:.80} has the shape {shape!r:.80}")
    if not _are_sizes(offsets, 2**63 - 1) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _DamageError(f"{name!r:.80} has the data_offsets {offsets!r:.80}")
    needed, given = math.prod(shape) * DTYPE_BYTES[dtype], offsets[1] - offsets[0]
    if needed != given:
        raise _DamageError(f"{name!r:.80} needs {needed:,} bytes for its shape and has {given:,}")


def _are_sizes(value: Any, most: int) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= most for n in value)


def _check_layout(tensors: dict[str, dict[str, Any]], data_bytes: int) -> None:
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        begin, next_end = tensor["data_offsets"]
        if begin != end:
            raise _DamageError(f"{name!r:.80} begins at byte {begin:,} and not at {end:,}")
        end = next_end
    if end > data_bytes:
        raise _DamageError(f"it is truncated: {data_bytes:,} of {end:,} bytes of data are there")
    if end < data_bytes:
        raise _DamageError(f"{data_bytes - end:,} bytes follow the last tensor")
