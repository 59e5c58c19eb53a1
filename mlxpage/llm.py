"""The synchronous face of an engine, for scripts and apps."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Literal, overload

from mlxpage import beams
from mlxpage.arguments import (
    KVBits,
    Prompt,
    check_integer,
    check_streamed,
    is_prompt,
    loading_options,
    params_list,
    prompt_list,
    type_name,
)
from mlxpage.door import Door, Messages, find_files, start_thread, token_ids
from mlxpage.errors import EngineError, InvalidRequest
from mlxpage.outputs import RequestOutput, StreamEvent
from mlxpage.sampling_params import BeamSearchParams, SamplingParams

ALIVE_SECONDS = 1.0  # how often a caller that waits looks whether the engine's thread still runs


class LLM(Door):
    """A model that generates, many prompts at once.

        with LLM("smollm2-135m", memory="2GB") as llm:
            outputs = llm.generate(["One", "Two"], SamplingParams(temperature=0, max_tokens=64))

    Args:
        model: a folder, a model of the Hugging Face hub, or the name of a demo model.
        adapter_path: a folder that mlx-lm has trained an adapter for the model into.
        memory: budget for weights, pool and scratch: "4GB", "50%" of the machine's, or bytes.
            None: at most half, and no larger a pool than the sequences usually need. Within it the
            pool starts small and grows when a request would wait or something cached be lost.
        num_blocks: size of the pool in blocks, from the start and for good.
        block_size: tokens in a block, 16 or 32.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens computed in a step; longer prompts come in chunks.
        max_inter_token_ms: milliseconds that generations under way should wait for their next
            tokens at most, while the prompts of others are computed: in smaller chunks, if need be.
            A step without any may take longer by itself. "auto": three times as long as those.
            None: as long as a step of `max_num_batched_tokens` takes.
        kv_bits: 8 or 4 keeps K and V as codes of so many bits, in groups of 64 elements of a head
            (32, where 64 doesn't divide it) with a scale and a bias each: about half and 0.28
            times the bytes of 16 bits. A pair is for K and V apart, as in (8, 4) or (None, 8).
        prefix_cache: whether blocks keep what they hold after their sequence has ended, until they
            are needed: a prompt that begins alike isn't computed again.
        cache_dir: a folder for blocks that the pool has no room for, or that are to be found again
            after a restart: read back, they aren't computed again. None: none, unless `cache_disk`
            says how much; then a folder in the user's cache.
        cache_disk: bytes that the folder may take, as in "20GB", which is what None means.
        backend: "metal", "cuda" or "reference". None: MLXPAGE_BACKEND, or the kernels of this
            machine's GPU, which check themselves when the model is loaded. Where they fail, the
            reference serves, and `on_status` or a RuntimeWarning says so.
        dtype: "float32", "float16" or "bfloat16" for the weights; None as they are stored, on a
            CPU float32.
        seed: of the requests that bring none.
        trim_after: seconds without work after which empty blocks are given back; None: never.
        memory_pressure: whether to `trim` when macOS says that memory gets short: at its first
            warning the empty blocks go, and at a critical level what is cached as well. Elsewhere
            nobody says so.
        monitor: whether `mlxpage top`, run by the same user, can show the engine: its blocks and
            how far its sequences are, no texts. It takes a thread, and time only while somebody
            looks. Without a place for its socket there is a RuntimeWarning, and no monitor.
        on_status: called with a line of text while the model is fetched and loaded.
        on_loaded: called with the bytes of weights loaded so far and in all; an error it raises
            ends the loading, with EngineError.

    Every method may be called from any thread.

    Raises ModelNotFound, InvalidModel, UnsupportedModel, OutOfMemory or InvalidRequest.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        adapter_path: str | os.PathLike[str] | None = None,
        memory: str | int | None = None,
        num_blocks: int | None = None,
        block_size: int = 16,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        max_inter_token_ms: float | Literal["auto"] | None = None,
        kv_bits: KVBits = None,
        prefix_cache: bool = True,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_disk: str | int | None = None,
        backend: str | None = None,
        dtype: str | None = None,
        seed: int | None = None,
        trim_after: float | None = 60.0,
        memory_pressure: bool = False,
        monitor: bool = False,
        on_status: Callable[[str], None] | None = None,
        on_loaded: Callable[[int, int], None] | None = None,
    ):
        options = loading_options(
            model,
            adapter_path=adapter_path,
            memory=memory,
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_inter_token_ms=max_inter_token_ms,
            kv_bits=kv_bits,
            prefix_cache=prefix_cache,
            cache_dir=cache_dir,
            cache_disk=cache_disk,
            backend=backend,
            dtype=dtype,
            seed=seed,
            trim_after=trim_after,
            memory_pressure=memory_pressure,
            monitor=monitor,
        )
        files = find_files(model, adapter_path, on_status)
        self.folder, self.defaults = files["folder"], files["defaults"]

        from mlxpage.loading import load_engine

        load = partial(load_engine, **files, **options, on_status=on_status, on_loaded=on_loaded)
        self._thread = start_thread(
            load,
            model=model,
            trim_after=trim_after,
            memory_pressure=memory_pressure,
            monitor=monitor,
        )
        self.family = self._thread.wait().model.family

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

        One prompt gives one output; a list of prompts gives their outputs in the same order. What
        `n` asks for beside the first generation is in its `choices`.
        `params` is for all of them, or a list with one for each. All prompts are checked before
        the first is computed. Ctrl-C ends them all. Lower `priority` is served first.
        """
        if is_prompt(prompts):
            return self._run([prompts], params_list(params, 1), priority)[0]
        prompts = prompt_list(prompts)
        return self._run(prompts, params_list(params, len(prompts)), priority)

    @overload
    def beam_search(
        self, prompts: Prompt, params: BeamSearchParams | None = None, *, priority: int = 0
    ) -> RequestOutput: ...

    @overload
    def beam_search(
        self,
        prompts: list[str] | list[list[int]],
        params: BeamSearchParams | None = None,
        *,
        priority: int = 0,
    ) -> list[RequestOutput]: ...

    def beam_search(self, prompts, params=None, *, priority=0):
        """The likeliest continuations that a beam search finds: the best one, with the others as
        its `choices`, each with the log-probabilities of its tokens.

        Prompts are as in `generate`. Beams share the blocks of what they have in common; a step
        computes one token of each as long as the pool keeps what is theirs, which takes
        `prefix_cache`.
        """
        params = BeamSearchParams() if params is None else params
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequest(f"params are BeamSearchParams, not {type_name(params)}")
        if is_prompt(prompts):
            return self._search([prompts], params, priority)[0]
        return self._search(prompt_list(prompts), params, priority)

    def _search(self, prompts, params: BeamSearchParams, priority) -> list[RequestOutput]:
        def run(sequences: list[list[int]], step: SamplingParams) -> list[RequestOutput]:
            return self._run(sequences, [step] * len(sequences), priority)

        return beams.search(self._engine, map(self._token_ids, prompts), params, run)

    def chat(
        self, messages: Messages, params: SamplingParams | None = None, *, priority: int = 0
    ) -> RequestOutput:
        """The assistant's next turn in a conversation of {"role": ..., "content": ...}."""
        return self.generate(self.chat_prompt(messages), params, priority=priority)

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0
    ) -> Generation:
        """A generation as it comes. Leaving the loop ends it. For a conversation, give
        `chat_prompt(messages)`. With `n` in its params, events say which `choice` they are of."""
        if not is_prompt(prompt):
            raise InvalidRequest("stream takes one prompt, a text or a list of token ids")
        (params,) = params_list(params, 1)
        check_streamed(params)
        requests, events = self._requests([prompt], [params], priority)
        return Generation(self, requests[0].id, self._follow(requests, events))

    def stream_many(
        self,
        prompts: Iterable[Prompt],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        priority: int = 0,
    ) -> Iterator[tuple[int, StreamEvent]]:
        """Generations as they come: (index of the prompt, event). Leaving the loop ends all."""
        prompts = prompt_list(prompts)
        params = params_list(params, len(prompts))
        for given in params:
            check_streamed(given)
        return self._events(prompts, params, priority)

    def _run(self, prompts, params, priority) -> list[RequestOutput]:
        outputs: list[RequestOutput | None] = [None] * len(prompts)
        for index, event in self._events(prompts, params, priority):
            if event.output is not None:
                outputs[index] = event.output
        return outputs

    def _events(self, prompts, params, priority) -> Iterator[tuple[int, StreamEvent]]:
        return self._follow(*self._requests(prompts, params, priority))

    def _requests(self, prompts, params, priority):
        check_integer("priority", priority)
        self._check_open()
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
        return requests, events

    def _fork(self, request_id: int, params: SamplingParams | None) -> Generation:
        self._check_open()
        events: queue.SimpleQueue[tuple[int, StreamEvent]] = queue.SimpleQueue()

        def fork(engine):
            return engine.fork(request_id, params, lambda event: events.put((0, event)))

        forked = self._thread.call(fork)
        try:
            request = forked.result()
        except BaseException:  # Ctrl-C while this waits: nobody would ever hear of it
            self._thread.call(lambda engine: forked.exception() or engine.abort(forked.result().id))
            raise
        following = self._follow([request], events, has_begun=True)
        next(following)
        return Generation(self, request.id, following)

    def _follow(self, requests, events, *, has_begun=False) -> Iterator[tuple[int, StreamEvent]]:
        unfinished = len(requests)
        try:
            if has_begun:
                yield  # from here on, whoever drops this ends the requests
            else:
                self._thread.call(lambda engine: [engine.add(r) for r in requests]).result()
            while unfinished:
                index, event = self._next(events)
                if event.error is not None:
                    raise event.error
                unfinished -= event.output is not None
                yield index, event
        finally:
            if unfinished:
                self._abort([request.id for request in requests])

    def _next(self, events: queue.SimpleQueue) -> tuple[int, StreamEvent]:
        while True:
            running = self._thread.is_running  # if not, the last events are there already
            try:
                return events.get(timeout=ALIVE_SECONDS if running else 0)
            except queue.Empty:
                if not running:
                    raise EngineError("the engine is closed") from None

    def _abort(self, ids: list[int]) -> None:
        """Ends requests. Their blocks are free afterwards, unless the garbage collector found an
        abandoned stream on the engine's own thread: it can't wait for itself."""
        ended = self._thread.call(lambda engine: [engine.abort(i) for i in ids])
        if not self._thread.is_current:
            ended.exception()  # a closed engine has ended them already

    def _token_ids(self, prompt: Prompt) -> list[int]:
        return token_ids(self.tokenizer, prompt)

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Generation:
    """What `LLM.stream` gives: the events of one generation, as they come."""

    def __init__(self, llm: LLM, request_id: int, events: Iterator[tuple[int, StreamEvent]]):
        self._llm, self._request_id, self._events = llm, request_id, events

    def __iter__(self) -> Generation:
        return self

    def __next__(self) -> StreamEvent:
        return next(self._events)[1]

    def close(self) -> None:
        """Ends it, if it hasn't ended."""
        self._events.close()

    def fork(self, params: SamplingParams | None = None) -> Generation:
        """A second generation with the same prompt and the tokens so far, which goes its own way.

        The two share their blocks: of what has been computed only the last token is computed again,
        and only the last block copied. Without `params` they are those of this one, but for the
        seed. `max_tokens` counts from the prompt on. The fork begins where the engine is, which may
        be further than what was read of this one. Its events bring what is new in it, its output
        everything.

        Raises InvalidRequest if this one has no token yet or has ended, or has several choices.
        """
        return self._llm._fork(self._request_id, params)
