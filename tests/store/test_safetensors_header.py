"""Hostile and damaged safetensors files, none of whose tensors is ever loaded."""

import json
import random
import struct

import numpy as np
import pytest
import safetensors

from mlxpage.errors import InvalidModel, MlxpageError
from mlxpage.model_store import safetensors_header
from mlxpage.model_store.safetensors_header import read_header

HEADER = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "empty": {"dtype": "U8", "shape": [0], "data_offsets": [32, 32]},
}


def pack(header, data=b"\0" * 32) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def refusal(tmp_path):
    """refusal(content) is the message with which a file of this content is refused."""
    file = tmp_path / "model.safetensors"

    def read(content: bytes) -> str:
        file.write_bytes(content)
        with pytest.raises(InvalidModel) as caught:
            read_header(file)
        assert file.name in str(caught.value)
        assert str(caught.value).count("\n") == 0 and len(str(caught.value)) < 500
        return str(caught.value)

    return read


def test_a_sound_header_gives_its_tensors_without_the_metadata(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(pack({"__metadata__": {"format": "mlx"}, **HEADER}))
    assert read_header(file) == HEADER


def changed(**entry):
    return pack({**HEADER, "a": {**HEADER["a"], **entry}})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "truncated"),
        (b"\1\0\0", "truncated"),
        (pack(HEADER)[:40], "truncated"),
        (pack(HEADER)[:-1], "31 of 32 bytes"),
        (pack(HEADER) + b"\0", "1 bytes follow"),
        (struct.pack("<Q", 2**63) + b"{}", "truncated"),
        (pack(b"{nonsense"), "no valid JSON"),
        (pack(b'{"a": "\xff"}'), "no valid JSON"),
        (pack(b"[" * 200_000), "no valid JSON"),
        (pack(b"[1]", b""), "no JSON object"),
        (pack({"a": 5}, b""), "no JSON object"),
        (changed(dtype="F64"), "'F64', unknown to MLX"),
        (changed(dtype=["F32"]), "unknown to MLX"),
        (changed(shape=[2, -3]), "[2, -3]"),
        (changed(shape=[2.0, 3]), "[2.0, 3]"),
        (changed(shape=[True, 6]), "[True, 6]"),
        (changed(shape="23"), "shape '23'"),
        (changed(shape=[6] + [1] * 16), "the shape"),
        (changed(shape=[0, 2**31]), "2147483648"),
        (changed(shape=[2, 2]), "needs 16 bytes for its shape and has 24"),
        (changed(data_offsets=[24, 0]), "data_offsets [24, 0]"),
        (changed(data_offsets=[0]), "data_offsets [0]"),
        (changed(data_offsets=None), "data_offsets None"),
        (changed(data_offsets=[8, 32]), "begins at byte 8 and not at 0"),
        (changed(shape=[2], data_offsets=[0, 8]), "begins at byte 24 and not at 8"),
        (changed(shape=[8], data_offsets=[0, 32]), "begins at byte 24 and not at 32"),
        (changed(data_offsets=[0, 10**4000]), "data_offsets [0, 1000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_header_is_refused_with_the_reason(refusal, content, told):
    assert told in refusal(content)


def test_a_header_over_the_limit_is_not_parsed(refusal, monkeypatch):
    monkeypatch.setattr(safetensors_header, "MAX_HEADER_BYTES", 100)
    assert "over 100" in refusal(pack(HEADER))


def test_control_characters_of_a_hostile_name_do_not_reach_the_terminal(refusal):
    assert "\x1b" not in refusal(pack({"\x1b[2J" * 1000: {"dtype": "F64"}}))


def test_every_dtype_that_mlx_reads_is_let_through(tmp_path):
    file = tmp_path / "model.safetensors"
    for dtype, size in safetensors_header.DTYPE_BYTES.items():
        header = {"x": {"dtype": dtype, "shape": [3], "data_offsets": [0, 3 * size]}}
        file.write_bytes(pack(header, b"\0" * 3 * size))
        assert read_header(file) == header


def test_mutated_files_are_refused_cleanly_whenever_safetensors_itself_refuses(tmp_path):
    tensors = {"w": np.zeros((3, 4), np.float32), "b": np.zeros(4, np.float16)}
    good = safetensors.numpy.save(tensors, {"format": "mlx"})
    file = tmp_path / "model.safetensors"
    random_ = random.Random(20)
    refused = 0
    for _ in range(600):
        content = mutated(good, random_)
        file.write_bytes(content)
        try:
            read_header(file)
        except MlxpageError:
            refused += 1
        else:
            safetensors.deserialize(content)
    assert 300 < refused < 600


def mutated(content: bytes, random_: random.Random) -> bytes:
    end_of_header = 8 + int.from_bytes(content[:8], "little")
    changed = bytearray(content)
    for _ in range(random_.randint(1, 3)):
        at = random_.randrange(min(end_of_header + 4, len(changed)))
        kind = random_.randrange(4)
        if kind == 0:
            changed[at] = random_.randrange(256)
        elif kind == 1:
            changed[at] = random_.choice(b"0123456789[]{},:-")
        elif kind == 2:
            del changed[at : at + random_.randint(1, 4)]
        elif random_.random() < 0.5:
            del changed[len(changed) - at // 2 :]
        else:
            changed[at:at] = random_.randbytes(2)
        if len(changed) < 9:
            break
    return bytes(changed)
