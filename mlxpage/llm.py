"""The synchronous face of an engine, for scripts and apps."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, overload

from mlxpage.errors import EngineError, InvalidRequest
from mlxpage.outputs import RequestOutput, StreamEvent
from mlxpage.sampling_params import SamplingParams

Prompt = str | list[int]
Messages = list[dict[str, Any]]


class LLM:
    """A model that generates, many prompts at once.

        with LLM("smollm2-135m", memory="2GB") as llm:
            outputs = llm.generate(["One", "Two"], SamplingParams(temperature=0, max_tokens=64))

    Args:
        model: a folder, a model of the Hugging Face hub, or the name of a demo model.
        memory: budget for weights, pool and scratch: "4GB", "50%" of the machine's, or bytes.
            None: at most half, and no larger a pool than the sequences usually need.
        num_blocks: size of the pool in blocks, instead of what the budget allows.
        block_size: tokens in a block, 16 or 32.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens computed in a step; longer prompts come in chunks.
        backend: "reference", the only one so far.
        dtype: "float32", "float16" or "bfloat16" for the weights; None as they are stored, on a
            CPU float32.
        seed: of the requests that bring none.
        on_status: called with a line of text while the model is fetched and loaded.
        on_loaded: called with the bytes of weights loaded so far and in all.

    Every method may be called from any thread.

    Raises ModelNotFound, InvalidModel, UnsupportedModel, OutOfMemory or InvalidRequest.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        memory: str | int | None = None,
        num_blocks: int | None = None,
        block_size: int = 16,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        backend: str | None = None,
        dtype: str | None = None,
        seed: int | None = None,
        on_status: Callable[[str], None] | None = None,
        on_loaded: Callable[[int, int], None] | None = None,
    ):
        _one_of("block_size", block_size, (16, 32))
        _one_of("backend", backend, (None, "reference"))
        _one_of("dtype", dtype, (None, "float32", "float16", "bfloat16"))
        from mlxpage import model_store

        folder = model_store.resolve(model, on_status=on_status)
        config = model_store.check_folder(folder)
        self.folder = folder
        self.defaults = model_store.generation_defaults(folder)

        def make_engine(closing: threading.Event):
            from mlxpage import memory as sizing
            from mlxpage import model as models
            from mlxpage import self_check
            from mlxpage.engine import Engine
            from mlxpage.text import Tokenizer

            def on_bytes(done: int, total: int) -> None:
                if closing.is_set():
                    raise EngineError("closed while the model was loading")
                if on_loaded:
                    on_loaded(done, total)

            sizing.check_weights(folder, memory)
            loaded = models.load(folder, dtype=dtype, on_bytes=on_bytes)
            limits = {
                "max_num_seqs": max_num_seqs,
                "max_num_batched_tokens": max_num_batched_tokens,
            }
            plan = sizing.plan(
                loaded, memory=memory, num_blocks=num_blocks, block_size=block_size, **limits
            )
            self_check.check(loaded, block_size)
            tokenizer = Tokenizer(folder, loaded.config.get("eos_token_id"))
            return Engine(loaded, tokenizer, plan, defaults=self.defaults, seed=seed, **limits)

        from mlxpage.engine_thread import EngineThread

        self._thread = EngineThread(make_engine)
        self._engine = self._thread.engine
        self.plan = self._engine.plan
        self.family = config["model_type"]
        self.tokenizer = self._engine.tokenizer

    # -- generate --

    @overload
    def generate(
        self, prompts: Prompt, params: SamplingParams | None = None, *, priority: int = 0
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: list[str] | list[list[int]],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        priority: int = 0,
    ) -> list[RequestOutput]: ...

    def generate(self, prompts, params=None, *, priority=0):
        """Continues prompts, each a text or a list of token ids.

        One prompt gives one output; a list of prompts gives their outputs in the same order.
        `params` is for all of them, or a list with one for each. All prompts are checked before
        the first is computed. Ctrl-C ends them all.
        """
        if _is_prompt(prompts):
            return self._run([prompts], _each(params, 1), priority)[0]
        prompts = list(prompts)
        return self._run(prompts, _each(params, len(prompts)), priority)

    def chat(
        self, messages: Messages, params: SamplingParams | None = None, *, priority: int = 0
    ) -> RequestOutput:
        """The assistant's next turn in a conversation of {"role": ..., "content": ...}."""
        return self.generate(self.chat_prompt(messages), params, priority=priority)

    def chat_prompt(self, messages: Messages) -> list[int]:
        """A conversation as token ids, by the model's own chat template."""
        return self.tokenizer.apply_chat_template(messages)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0
    ) -> Iterator[StreamEvent]:
        """A generation as it comes. Leaving the loop ends it. For a conversation, give
        `chat_prompt(messages)`."""
        if not _is_prompt(prompt):
            raise InvalidRequest("stream takes one prompt, a text or a list of token ids")
        events = self._events([prompt], _each(params, 1), priority)
        return (event for _, event in events)

    def stream_many(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        priority: int = 0,
    ) -> Iterator[tuple[int, StreamEvent]]:
        """Generations as they come: (index of the prompt, event). Leaving the loop ends all."""
        prompts = list(prompts)
        return self._events(prompts, _each(params, len(prompts)), priority)

    def _run(self, prompts, params, priority) -> list[RequestOutput]:
        outputs: list[RequestOutput | None] = [None] * len(prompts)
        for index, event in self._events(prompts, params, priority):
            if event.output is not None:
                outputs[index] = event.output
        return outputs

    def _events(self, prompts, params, priority) -> Iterator[tuple[int, StreamEvent]]:
        events: queue.SimpleQueue[tuple[int, StreamEvent]] = queue.SimpleQueue()
        requests = [
            self._engine.request(
                self._token_ids(prompt),
                given,
                lambda event, index=index: events.put((index, event)),
                priority=priority,
            )
            for index, (prompt, given) in enumerate(zip(prompts, params, strict=True))
        ]
        return self._follow(requests, events)

    def _follow(self, requests, events) -> Iterator[tuple[int, StreamEvent]]:
        ids = self._thread.call(lambda engine: [engine.add(request) for request in requests])
        unfinished = len(requests)
        try:
            while unfinished:
                index, event = events.get()
                if event.error is not None:
                    raise event.error
                unfinished -= event.finish_reason is not None
                yield index, event
        finally:
            if unfinished:
                self._thread.call(lambda engine: [engine.abort(i) for i in ids.result()]).result()

    def _token_ids(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)

    # -- the rest --

    def stats(self) -> Mapping[str, Any]:
        """Counters, blocks and bytes, taken between two steps."""
        return self._thread.call(lambda engine: engine.stats()).result()

    def close(self) -> None:
        """Ends what is running and gives the memory back; a second call does nothing."""
        self._thread.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _is_prompt(value) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and isinstance(value[0], int)
    )


def _each(params, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    params = list(params)
    if len(params) != count:
        raise InvalidRequest(f"{len(params)} params for {count} prompts; give one, or one for each")
    return params


def _one_of(name: str, value, allowed: tuple) -> None:
    if value not in allowed:
        options = ", ".join(str(option) for option in allowed)
        raise InvalidRequest(f"{name} is {value!r}; it must be one of {options}")
