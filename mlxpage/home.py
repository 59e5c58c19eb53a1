"""Where an engine runs, as those see it who submit requests: in this process, or in another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from mlxpage.errors import EngineError, MlxpageError

if TYPE_CHECKING:
    from mlxpage.engine_thread import Pulse
    from mlxpage.metal.plan import Plan

T = TypeVar("T")


class EngineView(Protocol):
    """An engine, for questions that wait for no step."""

    @property
    def plan(self) -> Plan: ...

    @property
    def context_length(self) -> int | None: ...

    @property
    def tokenizer(self) -> Any: ...

    def stats(self) -> Mapping[str, Any]: ...


class EngineControl(Protocol):
    """An engine, or what talks with its process, between two steps."""

    def add(self, request: Any) -> None: ...

    def abort(self, request_id: int, error: MlxpageError | None = None) -> None: ...

    def trim(self, *, cached: bool) -> Any: ...

    def set_memory(self, memory: str | int | None) -> Any: ...


class Home(Protocol):
    """An `EngineThread`, or an `EngineProcess`."""

    ready: Future
    """The engine, or why there is none."""
    pulse: Pulse

    @property
    def engine(self) -> EngineView: ...

    @property
    def is_running(self) -> bool: ...

    def call(self, function: Callable[[EngineControl], T]) -> Future[T]: ...

    def refusal(self) -> EngineError: ...

    def restart(self) -> None: ...

    def close(self) -> None: ...
