"""Loads a compiled kernel and runs it on buffers, with all checks of runtime.c."""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from . import headers, line_coverage
from .build import Program, runtime
from .debug_lines import DebugLines
from .errors import KernelFault, SimulatorError
from .options import Options
from .text import Place

MAX_THREADS = 1024
# Buffers from this size on are used where they lie, without the gaps around them: copies would
# take too much time and memory.
LARGE = 256 << 20
_READ_ONLY, _INITIALISED, _UNCHECKED = 1, 2, 4
_ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
# One run at a time: the runtime's state is the process's.
_lock = threading.Lock()


@dataclass
class Buffer:
    """Memory that a kernel gets: ``address`` is the host's copy.

    ``initialised``: it has content before the run. ``writable``: the content after it counts.
    ``must_be_written``: all of it, by the kernel. ``floats``: it holds floating-point numbers.
    ``skew``: by how much it misses a multiple of 16 bytes.
    """

    name: str
    address: int
    size: int
    element: int
    initialised: bool = True
    writable: bool = False
    must_be_written: bool = False
    floats: bool = False
    skew: int = 0
    keep: object = field(default=None, repr=False)

    @property
    def flags(self) -> int:
        return (0 if self.writable else _READ_ONLY) | (_INITIALISED if self.initialised else 0)

    def values(self) -> np.ndarray:
        """The host's copy, as unsigned numbers."""
        memory = (ctypes.c_uint8 * self.size).from_address(self.address)
        return np.frombuffer(memory, f"u{self.element}")


class Statistics(NamedTuple):
    """What a run did."""

    accesses: int
    switches: int
    collectives: int
    threadgroup_bytes: int


class _Place(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint32) for name in ("pc", "line", "statement")]


class _Fault(ctypes.Structure):
    _fields_ = [("kind", ctypes.c_char_p), ("place", _Place), ("text", ctypes.c_char * 2048)]


class _Run(ctypes.Structure):
    _fields_ = [
        ("entry", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("statements_run", ctypes.c_void_p),
        ("time_limit", ctypes.c_double),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        *[(name, ctypes.c_uint32) for name in ("statement_count", "order", "seed", "checked")],
    ]


@functools.cache
def _runtime() -> ctypes.CDLL:
    # Kernels find the runtime's functions, and the mathematical ones, among the global symbols.
    ctypes.CDLL("libm.so.6", mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(runtime()), mode=ctypes.RTLD_GLOBAL)
    number, pointer = ctypes.c_uint32, ctypes.c_void_p
    library.sim_object.argtypes = [pointer, pointer]
    library.sim_buffer.argtypes = [
        *(ctypes.c_char_p, ctypes.c_size_t, number, number, number, pointer)
    ]
    library.sim_buffer.restype = pointer
    library.sim_run.argtypes = [ctypes.POINTER(_Run)]
    library.sim_fault.restype = ctypes.POINTER(_Fault)
    library.sim_unwritten.argtypes = [pointer, ctypes.POINTER(ctypes.c_uint64)]
    library.sim_unwritten.restype = ctypes.c_uint64
    library.sim_ones.argtypes = [pointer, ctypes.POINTER(number)]
    library.sim_ones.restype = ctypes.c_uint64
    library.sim_statistics.argtypes = [ctypes.POINTER(ctypes.c_uint64)]
    return library


class _Loaded:
    """A program's library in this process."""

    def __init__(self, program: Program):
        _runtime()
        self.program = program
        library = ctypes.CDLL(str(program.library))
        self.entry = ctypes.cast(library.__getattr__("__sim_entry"), ctypes.c_void_p)
        self.start, self.end = _mapped_at(str(program.library))
        self.statements_run = (ctypes.c_uint8 * (len(program.statement_lines) + 1))()

    @functools.cached_property
    def debug_lines(self) -> DebugLines:
        return DebugLines(self.program.library)

    def place(self, pc: int, line: int, statement: int) -> tuple[Place, str]:
        """Where in whose text, and the text there."""
        if not 0 < line < headers.FIRST_MLX_LINE:
            line = 0
        if not line and pc:
            # The address is the one that the call returns to, so it is behind what happened.
            file, found = self.debug_lines.lookup(pc - 1)
            line = found if file == "kernel" else 0
        if not line and statement:
            line = self.program.statement_lines[statement - 1]
        return self.program.text.place(line), self.program.text.line_text(line)


def _mapped_at(path: str) -> tuple[int, int]:
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(path)]
    return min(int(start, 16) for start, _ in ranges), max(int(end, 16) for _, end in ranges)


@functools.cache
def _load(program: Program) -> _Loaded:
    return _Loaded(program)


def launch(
    program: Program,
    buffers: Mapping[int, Buffer],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    options: Options,
) -> Statistics:
    """Runs the program, buffers by their index; writes back what is writable."""
    # MLX does the same: a threadgroup is never larger than the grid.
    threadgroup = tuple(min(a, b) for a, b in zip(threadgroup, grid, strict=True))
    _check_sizes(program, grid, threadgroup)
    with _lock:
        return _Launch(_load(program), buffers, options).run(grid, threadgroup)


def _check_sizes(program: Program, grid, threadgroup) -> None:
    file, threads = program.text.file, threadgroup[0] * threadgroup[1] * threadgroup[2]
    if min(grid) < 1:
        raise SimulatorError(f"{file}: an empty grid: {grid}")
    if threads > MAX_THREADS:
        text = f"{threads} threads in a threadgroup of {threadgroup}, but Metal has {MAX_THREADS}"
        raise KernelFault("threadgroup size", file, 0, text)


class _Launch:
    def __init__(self, loaded: _Loaded, buffers: Mapping[int, Buffer], options: Options):
        self.runtime = _runtime()
        self.loaded = loaded
        self.program = loaded.program
        self.buffers = buffers
        self.options = options
        self.addresses: dict[int, int] = {}

    def run(self, grid, threadgroup) -> Statistics:
        self.runtime.sim_reset()
        self.runtime.sim_object(self.loaded.start, self.loaded.end)
        arguments = (ctypes.c_uint64 * 32)()
        self._unbound(arguments)
        # An array that is given twice is the same memory twice, as on a GPU: what is written to it
        # as the one is read as the other.
        memory: dict[tuple[int, int], int] = {}
        for index, buffer in sorted(self.buffers.items(), key=lambda each: not each[1].writable):
            key = buffer.address, buffer.size
            if key not in memory or not buffer.size:
                memory[key] = self._register(buffer)
            arguments[index] = self.addresses[index] = memory[key]
        run = _Run(
            entry=self.loaded.entry.value,
            arguments=ctypes.addressof(arguments),
            statements_run=ctypes.addressof(self.loaded.statements_run),
            time_limit=self.options.max_seconds,
            grid=(ctypes.c_uint32 * 3)(*grid),
            threadgroup=(ctypes.c_uint32 * 3)(*threadgroup),
            statement_count=len(self.loaded.statements_run),
            order=_ORDERS[self.options.order],
            seed=self.options.seed,
            checked=self.program.checked,
        )
        failed = self.runtime.sim_run(ctypes.byref(run))
        line_coverage.add(self.program, self.loaded.statements_run)
        if failed:
            raise self._fault(self.runtime.sim_fault().contents)
        for index, buffer in self.buffers.items():
            self._take_back(buffer, self.addresses[index])
        numbers = (ctypes.c_uint64 * 4)()
        self.runtime.sim_statistics(numbers)
        return Statistics(*numbers)

    def _register(self, buffer: Buffer) -> int:
        # MLX aligns memory to 8 bytes on a CPU, but to pages for Metal.
        borrows = buffer.size >= LARGE and buffer.address % 16 == 0
        borrowed = buffer.address if borrows else None
        flags = buffer.flags | (0 if self.program.checked else _UNCHECKED)
        address = self.runtime.sim_buffer(
            buffer.name.encode(), buffer.size, buffer.element, flags, buffer.skew, borrowed
        )
        if not address:
            raise SimulatorError(f"No memory for the buffer '{buffer.name}', {buffer.size:,} bytes")
        if borrowed or not buffer.size:
            return address
        if buffer.initialised:
            ctypes.memmove(address, buffer.address, buffer.size)
        else:
            ctypes.memset(address, 0xFF, buffer.size)
        return address

    def _unbound(self, arguments) -> None:
        """The optimiser may load through a reference that nobody uses, so it needs a target."""
        for parameter in self.program.parameters:
            if parameter.is_reference and parameter.index not in self.buffers:
                flags = _READ_ONLY | _INITIALISED
                address = self.runtime.sim_buffer(b"(unbound)", 64, 1, flags, 0, None)
                arguments[parameter.index] = address

    def _take_back(self, buffer: Buffer, address: int) -> None:
        if not buffer.writable or not buffer.size:
            return
        if self.program.checked and buffer.must_be_written:
            self._check_written(buffer, address)
        if self.program.checked and buffer.floats:
            self._check_set(buffer, address)
        if address != buffer.address:
            ctypes.memmove(buffer.address, address, buffer.size)

    def _check_written(self, buffer: Buffer, address: int) -> None:
        first = ctypes.c_uint64()
        count = self.runtime.sim_unwritten(address, ctypes.byref(first))
        if count:
            text = (
                f"{count} of {buffer.size // buffer.element} elements of the output "
                f"'{buffer.name}' were never written, the first of them element {first.value}"
            )
            raise KernelFault("unwritten", self.program.text.file, 0, text)

    def _check_set(self, buffer: Buffer, address: int) -> None:
        """Variables that nobody has set hold a NaN of ones only, which arithmetic hands on."""
        pc = ctypes.c_uint32()
        element = self.runtime.sim_ones(address, ctypes.byref(pc)) - 1
        if element < 0 or self._inputs_hold_ones():
            return
        place, line = self.loaded.place(pc.value, 0, 0)
        text = (
            f"'{buffer.name}' element {element} was computed from a variable that nothing has set"
        )
        raise KernelFault("uninitialised", place.file, place.line, text, line)

    def _inputs_hold_ones(self) -> bool:
        return any(
            (~buffer.values() == 0).any()
            for buffer in self.buffers.values()
            if buffer.initialised and buffer.floats and buffer.size
        )

    def _fault(self, fault: _Fault) -> KernelFault:
        place, line = self.loaded.place(fault.place.pc, fault.place.line, fault.place.statement)

        def other(match: re.Match) -> str:
            return str(self.loaded.place(*map(int, match.groups()))[0])

        text = re.sub(r"<<(\d+) (\d+) (\d+)>>", other, fault.text.decode(errors="replace"))
        return KernelFault(fault.kind.decode(), place.file, place.line, text, line)
