"""Text to token ids and back, by mlx-lm's tokenizer wrapper."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from mlxpage.errors import InvalidModel, InvalidRequest
from mlxpage.metal.backend import mlx_lm_utils


class Tokenizer:
    """mlx-lm's `TokenizerWrapper`, safe to use from any thread."""

    def __init__(self, folder: Path, eos_token_ids: int | list[int] | None):
        # Neither code of the model's repository, nor questions about it, nor the network.
        options = {"trust_remote_code": False, "local_files_only": True}
        try:
            self._wrapper = mlx_lm_utils().load_tokenizer(folder, options, eos_token_ids)
        except Exception as error:  # transformers raises whatever its tokenizer code raises
            reason = " ".join(str(error).split())[:300]
            raise InvalidModel(f"the tokenizer in {folder} can't be loaded: {reason}") from error
        self._lock = threading.Lock()
        self.eos_token_ids = frozenset(self._wrapper.eos_token_ids)
        self.has_chat_template = bool(self._wrapper.has_chat_template)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Those that the configuration names, and those that only the tokenizer marks."""
        added = self._wrapper.added_tokens_decoder
        marked = {token_id for token_id, token in added.items() if token.special}
        return frozenset(marked | set(self._wrapper.all_special_ids))

    def encode(self, text: str) -> list[int]:
        """With the special tokens that the model expects around a prompt, unless it has them."""
        _check_text(text)
        bos = self._wrapper.bos_token
        with self._lock:
            return self._wrapper.encode(
                text, add_special_tokens=bos is None or not text.startswith(bos)
            )

    def decode(self, token_ids: list[int]) -> str:
        with self._lock:
            return self._wrapper.decode(token_ids)

    def apply_chat_template(self, messages: list[dict[str, Any]]) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn."""
        _check_messages(messages)
        if not self.has_chat_template:
            raise InvalidRequest(
                "the model has no chat template: it continues text. Use generate with a prompt."
            )
        try:
            with self._lock:
                ids = self._wrapper.apply_chat_template(list(messages), add_generation_prompt=True)
        except Exception as error:  # a template's own errors, and messages of a wrong shape
            reason = " ".join(str(error).split())[:300]
            raise InvalidRequest(
                f"the model's chat template refuses the messages: {reason}"
            ) from error
        return list(ids)

    def stream(self, stop: tuple[str, ...], skip_special_tokens: bool) -> TextStream:
        """A new stream for one generation."""
        with self._lock:
            detokenizer = self._wrapper.detokenizer
            # Decoders trim the space before the first word of a text, but a generation goes on
            # after a prompt: begin with a word, and drop it.
            for token in self._wrapper.encode("a", add_special_tokens=False):
                detokenizer.add_token(token)
            _ = detokenizer.last_segment
        skipped = self.special_ids if skip_special_tokens else frozenset()
        return TextStream(detokenizer, stop, skipped, len(self._wrapper))


def _check_messages(messages) -> None:
    example = '[{"role": "user", "content": "Hi"}]'
    if not isinstance(messages, (list, tuple)) or not messages:
        raise InvalidRequest(f"a conversation is a list of messages like {example}")
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(f"{message!r:.80} is no message of a conversation like {example}")
        for value in message.values():
            if isinstance(value, str):
                _check_text(value)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"the prompt is no Unicode text: {text[error.start]!r} at {error.start:,} is half a "
            "character, or a byte of a text that isn't UTF-8"
        ) from None


class TextStream:
    """The text of one generation, token by token, held back where a stop string may have begun."""

    def __init__(
        self,
        detokenizer,
        stop: tuple[str, ...],
        skipped: frozenset[int],
        num_tokens: int = 2**31,
    ):
        """`skipped` ids and those from `num_tokens` on, which pad a model's vocabulary, give no
        text."""
        from mlx_lm.generate import TextStateMachine

        self._detokenizer = detokenizer
        self._skipped = skipped
        self._num_tokens = num_tokens
        self._machine = TextStateMachine({"normal": [(text, None) for text in stop]})
        self._state = self._machine.make_state()
        self.stopped = False
        """A stop string is complete; it and what follows are not part of the text."""

    def add(self, token: int) -> str:
        """The text that is certain now and wasn't before."""
        if token in self._skipped or token >= self._num_tokens:
            return ""
        self._detokenizer.add_token(token)
        return self._pass(self._segment())

    def finish(self) -> str:
        """The rest, when the generation ends, without the first bytes of a character that it
        cuts."""
        with suppress(KeyError):  # an added token's letters are no bytes
            self._detokenizer.finalize()
        text = self._pass(self._segment().rstrip("\ufffd"))
        if not self.stopped:
            self._state, held, _ = self._machine.flush(self._state)
            text += held
        return text

    def _segment(self) -> str:
        """What the detokenizer shows now and didn't before. A decoder with byte fallback takes
        characters back while the next one is incomplete; they must not come twice."""
        shown = self._detokenizer.offset
        segment = self._detokenizer.last_segment
        self._detokenizer.offset = max(shown, self._detokenizer.offset)
        return segment

    def _pass(self, segment: str) -> str:
        if self.stopped:
            return ""
        self._state, text, name = self._machine.step(self._state, segment)
        self.stopped = name is None
        return text
