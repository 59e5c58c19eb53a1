"""How kernels run: `with metal_sim.options(order="reverse"): ...`."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

ORDERS = ("forward", "reverse", "shuffled")


@dataclass(frozen=True)
class Run:
    """One launch of a kernel."""

    name: str
    text: str
    accesses: int
    switches: int
    collectives: int
    threadgroup_bytes: int


@dataclass(frozen=True)
class Options:
    """
    order, seed
        In which order threadgroups, SIMD-groups and lanes run: ``forward``, ``reverse`` or
        ``shuffled``.
    writable
        Names of inputs that kernels are meant to write in place, by casting the const away. What
        they write is then in the arrays, as it would be on a Mac. Any other write to an input is a
        fault.
    allow_unwritten
        Names of outputs that may keep elements that no thread has written.
    checked
        False: faster, and nothing but the watchdog looks on. A wild access may end the process.
    max_seconds
        A kernel that runs longer than this hangs.
    runs
        Filled with a Run for each launch within the ``with``.
    """

    order: str = "forward"
    seed: int = 0
    writable: tuple[str, ...] = ()
    allow_unwritten: tuple[str, ...] = ()
    checked: bool = True
    max_seconds: float = 60.0
    runs: list[Run] = field(default_factory=list, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order {self.order!r}: choose one of {', '.join(ORDERS)}")
        for name in ("writable", "allow_unwritten"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name} takes several names: {name}=({getattr(self, name)!r},)")


_current: contextvars.ContextVar[Options] = contextvars.ContextVar("options")


def current() -> Options:
    """The options of the innermost ``with``."""
    return _current.get(_DEFAULTS)


_DEFAULTS = Options()


@contextlib.contextmanager
def options(**changes: object) -> Iterator[Options]:
    """Changes options within a ``with``; the others stay those of the ``with`` around it."""
    changed = dataclasses.replace(current(), runs=[], **changes)
    token = _current.set(changed)
    try:
        yield changed
    finally:
        _current.reset(token)
