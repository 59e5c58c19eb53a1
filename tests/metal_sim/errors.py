"""What the simulator raises.

SimulatorError
    ToolchainMissing    no compiler; says how to get one
    StaticFault         the text isn't Metal, or isn't within its rules
    KernelFault         the kernel did something wrong while it ran
"""

from __future__ import annotations

from dataclasses import dataclass


class SimulatorError(Exception):
    """The root of the simulator's errors."""


class ToolchainMissing(SimulatorError):
    """A compiler or library that the simulator needs isn't installed."""


@dataclass(frozen=True)
class Message:
    """One thing that is wrong with a kernel's text, at a line of it."""

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


class StaticFault(SimulatorError):
    """The kernel's text breaks rules that need no run to see."""

    def __init__(self, messages: list[Message]):
        super().__init__("\n".join(map(str, messages)))
        self.messages = messages


class KernelFault(SimulatorError):
    """A check failed during a run.

    ``kind`` is one of: bounds, race, uninitialised, alignment, divergence, overflow, read-only,
    unwritten, threadgroup memory, threadgroup size, hang, memory.
    """

    def __init__(self, kind: str, file: str, line: int, text: str, source_line: str = ""):
        where = f"{file}:{line}" if line else file
        quoted = f"\n    | {source_line.strip()}" if source_line.strip() else ""
        super().__init__(f"{where}: {kind}: {text}{quoted}")
        self.kind = kind
        self.file = file
        self.line = line
