"""Reads which address of a shared object came from which line: its .debug_line section, DWARF 4.

Only as much of ELF and DWARF as the simulator's own objects have: 64 bits, little-endian,
version 4.
"""

from __future__ import annotations

import bisect
import struct
from pathlib import Path


class DebugLines:
    """``lookup`` takes an offset into the object as it is loaded."""

    def __init__(self, path: Path):
        section = _section(path.read_bytes(), ".debug_line")
        rows: list[tuple[int, str, int]] = []
        at = 0
        while at < len(section):
            (length,) = struct.unpack_from("<I", section, at)
            rows += _Program(section[at + 4 : at + 4 + length]).rows()
            at += 4 + length
        self.rows = sorted(rows)
        self.addresses = [row[0] for row in self.rows]

    def lookup(self, address: int) -> tuple[str, int]:
        """File and line; line 0 if it is unknown."""
        i = bisect.bisect_right(self.addresses, address) - 1
        return self.rows[i][1:] if i >= 0 else ("", 0)


def _section(data: bytes, name: str) -> bytes:
    (headers,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)

    def header(i: int) -> tuple[int, int, int]:
        offset = headers + i * size
        (name_at,) = struct.unpack_from("<I", data, offset)
        return name_at, *struct.unpack_from("<QQ", data, offset + 0x18)

    strings = header(names)[1]
    for i in range(count):
        name_at, offset, length = header(i)
        start = strings + name_at
        if data[start : data.index(b"\0", start)].decode() == name:
            return data[offset : offset + length]
    return b""


class _Program:
    """The line number program of one compilation unit."""

    def __init__(self, data: bytes):
        self.data = data
        version, header_length = struct.unpack_from("<HI", data)
        assert version == 4, f"DWARF {version}, not 4"
        self.at = 6
        self.instruction = self._byte()
        self._byte()  # operations per instruction: 1
        self._byte()  # whether rows are statements at first
        self.line_base = struct.unpack("<b", bytes([self._byte()]))[0]
        self.line_range = self._byte()
        self.opcode_base = self._byte()
        self.operands = [self._byte() for _ in range(self.opcode_base - 1)]
        while self._string():
            pass  # folders
        self.files = [""]
        while name := self._string():
            self.files.append(name)
            for _ in range(3):
                self._number()
        self.at = 6 + header_length

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _string(self) -> str:
        end = self.data.index(b"\0", self.at)
        text = self.data[self.at : end].decode()
        self.at = end + 1
        return text

    def _number(self, signed: bool = False) -> int:
        """LEB128."""
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value - (1 << shift) if signed and byte & 0x40 else value

    def rows(self) -> list[tuple[int, str, int]]:
        self.found: list[tuple[int, str, int]] = []
        self._reset()
        while self.at < len(self.data):
            opcode = self._byte()
            if opcode >= self.opcode_base:
                self._special(opcode)
            elif opcode == 0:
                self._extended()
            else:
                self._standard(opcode)
        return self.found

    def _reset(self) -> None:
        self.address, self.file, self.line = 0, 1, 1

    def _row(self) -> None:
        self.found.append((self.address, self.files[self.file], self.line))

    def _advance(self, opcode: int) -> None:
        self.address += (opcode - self.opcode_base) // self.line_range * self.instruction

    def _special(self, opcode: int) -> None:
        self._advance(opcode)
        self.line += self.line_base + (opcode - self.opcode_base) % self.line_range
        self._row()

    def _extended(self) -> None:
        end = self._number() + self.at
        opcode = self._byte()
        if opcode == 1:  # the end of a sequence
            self.found.append((self.address, "", 0))
            self._reset()
        elif opcode == 2:
            (self.address,) = struct.unpack_from("<Q", self.data, self.at)
        self.at = end

    def _standard(self, opcode: int) -> None:
        if opcode == 1:
            self._row()
        elif opcode == 2:
            self.address += self._number() * self.instruction
        elif opcode == 3:
            self.line += self._number(signed=True)
        elif opcode == 4:
            self.file = self._number()
        elif opcode == 8:
            self._advance(255)
        elif opcode == 9:
            self.address += struct.unpack_from("<H", self.data, self.at)[0]
            self.at += 2
        else:  # columns and the like
            for _ in range(self.operands[opcode - 1]):
                self._number()
