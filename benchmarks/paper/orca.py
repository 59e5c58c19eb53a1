"""The paper's baselines: Orca, which gives each request one piece of memory for all its tokens.

The authors of the paper wrote Orca anew, with a buddy allocator, and let it know more or less of
how long an output will be. So here: a request is served once the allocator has a chunk for what it
reserves, first come, first served, and keeps the chunk to its end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from benchmarks.paper.serving import CONTEXT, Memory, Request, Step


class Buddies:
    """Chunks of powers of two, cut in halves and joined with their other half again."""

    def __init__(self, size: int):
        """What isn't a power of two begins as several chunks, the largest first."""
        self._free: dict[int, set[int]] = {1 << power: set() for power in range(size.bit_length())}
        """Size of the chunks -> where they begin."""
        start = 0
        for chunk in sorted(self._free, reverse=True):
            if size & chunk:
                self._free[chunk].add(start)
                start += chunk

    def take(self, size: int) -> tuple[int, int] | None:
        """(start, size) of the smallest chunk that holds `size`; None if there is none."""
        wanted = 1 << (size - 1).bit_length()
        found = next((s for s in self._free if s >= wanted and self._free[s]), None)
        if found is None:
            return None
        start = self._free[found].pop()
        while found > wanted:
            found //= 2
            self._free[found].add(start + found)
        return start, wanted

    def give_back(self, start: int, size: int) -> None:
        # Chunks lie at multiples of their size, for the largest come first.
        while (buddy := start ^ size) in self._free[size]:
            self._free[size].remove(buddy)
            start, size = min(start, buddy), 2 * size
        self._free[size].add(start)


def of_longest(request: Request) -> int:
    return CONTEXT


def of_power_of_two(request: Request) -> int:
    """The output's length is known up to a factor of two."""
    output = 1 << (request.output - 1).bit_length()
    return min(request.prompt + output, CONTEXT)


def of_oracle(request: Request) -> int:
    """The output's length is known."""
    return request.prompt + request.output


RESERVES = {"Orca Max": of_longest, "Orca Pow2": of_power_of_two, "Orca Oracle": of_oracle}


class Running:
    __slots__ = ("chunk", "generated", "request", "reserved")

    def __init__(self, request: Request, chunk: tuple[int, int], reserved: int):
        self.request, self.chunk, self.reserved = request, chunk, reserved
        self.generated = 0


class Orca:
    def __init__(self, slots: int, reserve: Callable[[Request], int]):
        self._slots = slots
        self._reserve = reserve
        self._arena = Buddies(slots)
        self._waiting: deque[Request] = deque()
        self._running: list[Running] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> None:
        self._waiting.append(request)

    def step(self) -> Step:
        rows = len(self._running) + self._admit()
        context = sum(each.request.prompt + each.generated for each in self._running)
        step = Step(rows, context, len(self._running), self._memory(context))
        for each in self._running:
            each.generated += 1
            if each.generated == each.request.output:
                self._arena.give_back(*each.chunk)
                step.finished.append(each.request)
        if step.finished:
            self._running = [e for e in self._running if e.generated < e.request.output]
        return step

    def _admit(self) -> int:
        """Tokens of the prompts that are computed now."""
        rows = 0
        while self._waiting:
            request = self._waiting[0]
            reserved = self._reserve(request)
            chunk = self._arena.take(reserved)
            if chunk is None:
                break
            self._running.append(Running(self._waiting.popleft(), chunk, reserved))
            rows += request.prompt
        return rows

    def _memory(self, used: int) -> Memory:
        reserved = sum(each.reserved for each in self._running)
        final = sum(each.request.prompt + each.request.output for each in self._running)
        return Memory(used, final - used, reserved - final, self._slots - reserved)
