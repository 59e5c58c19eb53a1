"""An engine in another process, as those see it who ask and submit."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlxpage import messages
from mlxpage.arguments import Prompt
from mlxpage.door import Messages
from mlxpage.errors import EngineError, InvalidRequest, MlxpageError
from mlxpage.events import Event
from mlxpage.sampling_params import SamplingParams

if TYPE_CHECKING:
    from mlxpage.handle import Mailbox
    from mlxpage.metal.plan import Plan

STATS_SECONDS = 1.0  # for an answer that a process gives at once, unless it hangs

numbers = itertools.count()
"""Of requests and questions: no two have the same."""
Ask = Callable[..., Future]
"""Calls a method of the engine by its name, as `messages.Ask` says."""


class FarEngine:
    """What may be asked of an engine in another process, from any thread. All answers are waited
    for: some milliseconds, and for as long as the process takes if it hangs."""

    def __init__(self, ask: Ask, facts: messages.Loaded):
        self._ask = ask
        self.tokenizer = FarTokenizer(ask, facts)

    @property
    def plan(self) -> Plan:
        return self._ask("plan").result()

    @property
    def context_length(self) -> int:
        return self._ask("context_length").result()

    def stats(self) -> dict[str, Any]:
        """Raises EngineError if the process hangs so badly that it can't answer."""
        try:
            stats = self._ask("stats").result(STATS_SECONDS)
        except NoAnswer:
            raise EngineError("the engine's process doesn't answer") from None
        # Requests are counted here, where they may have ended and nobody has told the process.
        return {name: stats[name] for name in stats if name not in ("state", "open", "queued")}


class FarTokenizer:
    """The tokenizer of a model in another process, safe to use from any thread."""

    def __init__(self, ask: Ask, facts: messages.Loaded):
        self._ask = ask
        self.eos_token_ids = facts.eos_token_ids
        self.has_chat_template = facts.has_chat_template

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the model expects around a prompt, unless it has them."""
        return self._ask("tokenizer.encode", text=text).result()

    def decode(self, token_ids: list[int]) -> str:
        return self._ask("tokenizer.decode", token_ids=token_ids).result()

    def apply_chat_template(self, messages: Messages) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn."""
        return self._ask("tokenizer.apply_chat_template", messages=messages).result()


@dataclass(slots=True, eq=False)
class FarRequest:
    """A request for an engine in another process, which is the first to look at it."""

    id: int
    order: bytes
    """As in `messages.Begin`."""
    put: Callable[[Event], None]
    reason: MlxpageError | None = None
    """The error that it was cancelled with."""
    prompt_token_ids: tuple[()] = ()
    """Not known here."""


def far_request(
    prompt: Prompt | Messages, params: SamplingParams, priority: int, engine: Any, mailbox: Mailbox
) -> FarRequest:
    try:
        order = pickle.dumps((prompt, params, priority))
    except Exception as error:
        raise InvalidRequest(
            f"the request can't be sent to the engine's process: {type(error).__name__}: {error}. "
            "Give it plain texts, lists and dicts."
        ) from error
    return FarRequest(next(numbers), order, mailbox.put)
