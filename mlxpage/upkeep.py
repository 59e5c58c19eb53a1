"""What an engine does between steps: stores what is cached, and gives memory back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from mlxpage.memory_pressure import CRITICAL, NORMAL

if TYPE_CHECKING:
    from mlxpage.engine import Engine

PRESSURE_SECONDS = 1.0  # how often memory pressure is looked at
STORE_EVERY = 0.02  # some of it
STORE_AFTER = 1.0  # seconds without work, before what is cached is stored


class Upkeep:
    """Lets an idle engine store what is cached and trims it, and any engine when memory gets
    short."""

    def __init__(
        self,
        trim_after: float | None = None,
        pressure: Callable[[], int] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`trim_after`: seconds without work after which empty blocks are given back, None: never.
        `pressure` is `memory_pressure.level`, or None to take no notice of it."""
        self._trim_after = trim_after
        self._pressure = pressure
        self._clock = clock
        self._idle_since: float | None = None
        self._num_steps = 0
        self._is_trimmed = self._is_stored = False
        self._looked_at = -PRESSURE_SECONDS
        self._level = NORMAL

    def run(self, engine: Engine) -> float | None:
        """Does what is due. Returns the seconds after which something will be if nothing happens
        until then, None for never."""
        now = self._clock()
        waits = [self._when_idle(engine, now), self._under_pressure(engine, now)]
        return min((seconds for seconds in waits if seconds is not None), default=None)

    def _when_idle(self, engine: Engine, now: float) -> float | None:
        if engine.has_work or engine.num_steps != self._num_steps:
            # A request may begin and end between two looks.
            self._idle_since, self._num_steps = None, engine.num_steps
        if engine.has_work:
            return None
        if self._idle_since is None:
            self._idle_since, self._is_trimmed = now, False
            self._is_stored = not engine.has_disk
        waits = [self._store(engine, now), self._trim(engine, now)]
        return min((seconds for seconds in waits if seconds is not None), default=None)

    def _store(self, engine: Engine, now: float) -> float | None:
        if self._is_stored:
            return None
        left = self._idle_since + STORE_AFTER - now
        if left <= 0:
            # Some at a time: a request may come between.
            self._is_stored = not engine.store_cached()
            left = None if self._is_stored else STORE_EVERY
        return left

    def _trim(self, engine: Engine, now: float) -> float | None:
        if self._trim_after is None or self._is_trimmed:
            return None
        left = self._idle_since + self._trim_after - now
        if left <= 0:
            engine.trim()
            self._is_trimmed = True
        return None if self._is_trimmed else left

    def _under_pressure(self, engine: Engine, now: float) -> float | None:
        """A warning costs the empty blocks, and no pool grows to keep what is cached while it
        lasts; a critical level costs what is cached as well. Once each: blocks that are needed
        again at once would only be copied to and fro."""
        if self._pressure is None:
            return None
        if now - self._looked_at >= PRESSURE_SECONDS:
            self._looked_at = now
            before, self._level = self._level, self._pressure()
            engine.scheduler.blocks.keeps_cached = self._level <= NORMAL
            if self._level > before:
                engine.trim(cached=self._level >= CRITICAL)
        return self._looked_at + PRESSURE_SECONDS - now
