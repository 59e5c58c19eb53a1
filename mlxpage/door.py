"""What every face of a loaded model has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from mlxpage.arguments import Prompt, check_bool, is_integer, type_name
from mlxpage.errors import EngineError, InvalidRequest
from mlxpage.home import EngineControl, EngineView, Home

if TYPE_CHECKING:
    from mlxpage.engine import Engine
    from mlxpage.engine_thread import EngineThread
    from mlxpage.metal.plan import Plan
    from mlxpage.text import Tokenizer

T = TypeVar("T")
Messages = list[dict[str, Any]]


def find_files(model, adapter_path, on_status: Callable[[str], None] | None) -> dict[str, Any]:
    """What `load_engine` reads: fetched if it isn't here, and checked."""
    from mlxpage import model_store

    folder = model_store.resolve(model, on_status=on_status)
    model_store.check_folder(folder)
    return {
        "folder": folder,
        "adapter": None if adapter_path is None else model_store.check_adapter(adapter_path),
        "defaults": model_store.generation_defaults(folder),
    }


def start_thread(
    make_engine: Callable[..., Engine],
    *,
    model: Any,
    trim_after: float | None,
    memory_pressure: bool,
    monitor: bool,
) -> EngineThread:
    from mlxpage.engine_thread import EngineThread
    from mlxpage.memory_pressure import level
    from mlxpage.upkeep import Upkeep

    upkeep = Upkeep(trim_after, level if memory_pressure else None)
    return EngineThread(make_engine, upkeep, str(model) if monitor else None)


def token_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """A prompt, as an engine takes it."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if not isinstance(prompt, (list, tuple)):
        raise InvalidRequest(
            f"a prompt is a text or a list of token ids, not {type_name(prompt)}; for a "
            "conversation there is chat"
        )
    return [int(token) if is_integer(token) else token for token in prompt]


class Door:
    """What serves a model, and what doesn't depend on how one asks it.

    Nothing that a thread of the home keeps may know an object of this class: the engine ends when
    nobody else does.
    """

    _thread: Home

    @property
    def _engine(self) -> EngineView:
        return self._thread.engine

    def _call(self, function: Callable[[EngineControl], T]) -> T:
        return self._thread.call(function).result()

    def _check_open(self) -> None:
        if not self._thread.is_running:
            raise EngineError("the engine is closed")

    @property
    def tokenizer(self) -> Tokenizer:
        """mlx-lm's, safe to use from any thread."""
        return self._engine.tokenizer

    def chat_prompt(self, messages: Messages) -> list[int]:
        """A conversation as token ids, by the model's own chat template."""
        return self.tokenizer.apply_chat_template(messages)

    @property
    def plan(self) -> Plan:
        """How the budget is divided, in bytes and blocks."""
        return self._engine.plan

    @property
    def context_length(self) -> int:
        """Tokens that a prompt and its answer may have together: the model's context, or what the
        pool may grow to hold, if that is less."""
        return self._engine.context_length

    def trim(self, *, cached: bool = False) -> int:
        """Gives blocks that nobody uses back to the system; returns the bytes.

        Empty ones go, but for the room that a new pool has. With `cached`, what is only kept to be
        found again goes too, and that room. The pool grows again when it has to. One whose size was
        given as `num_blocks` stays as it is, and 0 is returned.
        """
        check_bool("cached", cached)
        return self._call(lambda engine: engine.trim(cached=cached))

    def set_memory(self, memory: str | int | None) -> None:
        """Changes the budget, as `memory` at the start. Requests go on.

        A pool that is larger than the new budget allows shrinks at once: what is cached goes first,
        longest unused before others, then the newest generations are interrupted, to be computed
        again later. Those without `max_tokens` may end earlier, or at once if they're longer than
        the new pool.

        Raises InvalidRequest for what is no size, if a request could never end in the new pool, or
        if `num_blocks` was given; OutOfMemory if weights and a usable pool don't fit. Then nothing
        has changed.
        """
        self._call(lambda engine: engine.set_memory(memory))

    def stats(self) -> Mapping[str, Any]:
        """Counters, blocks and bytes, taken between two steps."""
        return self._call(lambda engine: engine.stats())

    def close(self) -> None:
        """Ends what is running and gives the memory back; a second call does nothing."""
        self._thread.close()
