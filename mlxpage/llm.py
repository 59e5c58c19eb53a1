"""The synchronous face of an engine, for scripts and apps."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from mlxpage.beam_search import Beam, BeamSearch, Likeliest, carry_out
from mlxpage.errors import EngineError, InvalidRequest
from mlxpage.outputs import RequestOutput, StreamEvent
from mlxpage.sampling_params import MAX_LOGPROBS, BeamSearchParams, SamplingParams

Prompt = str | list[int]
Messages = list[dict[str, Any]]

ALIVE_SECONDS = 1.0  # how often a caller that waits looks whether the engine's thread still runs


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
        prefix_cache: whether blocks keep what they hold after their sequence has ended, until they
            are needed: a prompt that begins alike isn't computed again.
        backend: "metal", "cuda" or "reference". None: MLXPAGE_BACKEND, or the kernels of this
            machine's GPU, which check themselves when the model is loaded. Where they fail, the
            reference serves, and `on_status` or a RuntimeWarning says so.
        dtype: "float32", "float16" or "bfloat16" for the weights; None as they are stored, on a
            CPU float32.
        seed: of the requests that bring none.
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
        memory: str | int | None = None,
        num_blocks: int | None = None,
        block_size: int = 16,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        prefix_cache: bool = True,
        backend: str | None = None,
        dtype: str | None = None,
        seed: int | None = None,
        on_status: Callable[[str], None] | None = None,
        on_loaded: Callable[[int, int], None] | None = None,
    ):
        check_options(
            model,
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            prefix_cache=prefix_cache,
            backend=backend,
            dtype=dtype,
            seed=seed,
        )
        from mlxpage import model_store

        folder = model_store.resolve(model, on_status=on_status)
        config = model_store.check_folder(folder)
        self.folder = folder
        self.defaults = model_store.generation_defaults(folder)

        from mlxpage.engine_thread import EngineThread

        limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
        self._thread = EngineThread(
            _engine_maker(
                folder,
                {"memory": memory, "num_blocks": num_blocks, "block_size": block_size},
                limits,
                prefix_cache=prefix_cache,
                dtype=dtype,
                seed=seed,
                defaults=self.defaults,
                backend=backend,
                on_status=on_status,
                on_loaded=on_loaded,
            )
        )
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

        One prompt gives one output; a list of prompts gives their outputs in the same order. What
        `n` asks for beside the first generation is in its `choices`.
        `params` is for all of them, or a list with one for each. All prompts are checked before
        the first is computed. Ctrl-C ends them all. Lower `priority` is served first.
        """
        if _is_prompt(prompts):
            return self._run([prompts], _each(params, 1), priority)[0]
        prompts = _many(prompts)
        return self._run(prompts, _each(params, len(prompts)), priority)

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
            raise InvalidRequest(f"params are BeamSearchParams, not {_type(params)}")
        if _is_prompt(prompts):
            return self._search([prompts], params, priority)[0]
        return self._search(_many(prompts), params, priority)

    def _search(self, prompts, params: BeamSearchParams, priority) -> list[RequestOutput]:
        ends = set() if params.ignore_eos else set(self._engine.eos_token_ids)
        ends.update(params.stop_token_ids)
        if params.beam_width + len(ends) > MAX_LOGPROBS:
            raise InvalidRequest(
                f"beam_width is {params.beam_width} and there are {len(ends)} end and stop tokens; "
                f"together they may be {MAX_LOGPROBS}"
            )
        searches = [self._beam_search(self._token_ids(prompt), params, ends) for prompt in prompts]
        step = SamplingParams(
            temperature=0,
            max_tokens=1,
            logprobs=params.beam_width + len(ends),
            ignore_eos=True,
            cache_salt=params.cache_salt,
        )
        firsts: list[RequestOutput] = []

        def after(sequences: list[list[int]]) -> list[Likeliest]:
            outputs = self._run(sequences, [step] * len(sequences), priority)
            firsts.extend(() if firsts else outputs)
            return [output.logprobs[0].top for output in outputs]

        carry_out(searches, after)
        pairs = zip(searches, firsts, strict=True)
        return [self._found(search, first, params) for search, first in pairs]

    def _beam_search(self, prompt, params: BeamSearchParams, ends: set[int]) -> BeamSearch:
        whole = SamplingParams(max_tokens=params.max_tokens, stop_token_ids=params.stop_token_ids)
        # Refuses what can't be served before the first step.
        request = self._engine.request(prompt, whole, lambda event: None)
        max_tokens = request.choices[0].seq.max_length - len(prompt)
        return BeamSearch(prompt, params, ends, max_tokens)

    def _found(self, search: BeamSearch, first: RequestOutput, params) -> RequestOutput:
        """`first` is what the first step gave."""
        timings = replace(first.timings, finished=time.perf_counter())
        best, *others = (
            replace(
                first,
                text=self._text(beam, params.skip_special_tokens),
                token_ids=beam.token_ids,
                finish_reason=beam.finish_reason,
                timings=timings,
                logprobs=beam.logprobs,
            )
            for beam in search.finished
        )
        best.choices = others
        return best

    def _text(self, beam: Beam, skip_special_tokens: bool) -> str:
        stream = self.tokenizer.stream((), skip_special_tokens)
        shown = beam.token_ids[:-1] if beam.finish_reason == "stop" else beam.token_ids
        return "".join(map(stream.add, shown)) + stream.finish()

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
    ) -> Generation:
        """A generation as it comes. Leaving the loop ends it. For a conversation, give
        `chat_prompt(messages)`. With `n` in its params, events say which `choice` they are of."""
        if not _is_prompt(prompt):
            raise InvalidRequest("stream takes one prompt, a text or a list of token ids")
        (params,) = _each(params, 1)
        _check_streamed(params)
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
        prompts = _many(prompts)
        params = _each(params, len(prompts))
        for given in params:
            _check_streamed(given)
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
        _integer("priority", priority)
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

    def _check_open(self) -> None:
        if not self._thread.is_running:
            raise EngineError("the engine is closed")

    def _token_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if not isinstance(prompt, (list, tuple)):
            raise InvalidRequest(
                f"a prompt is a text or a list of token ids, not {_type(prompt)}; for a "
                "conversation there is chat"
            )
        return [int(token) if _is_integer(token) else token for token in prompt]

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


def _check_streamed(params: SamplingParams) -> None:
    if (params.best_of or 0) > params.n:
        raise InvalidRequest(
            f"best_of is {params.best_of} and n is {params.n}: which are best is known when all "
            "have ended. Use generate, or leave best_of out."
        )


def check_options(
    model: Any,
    *,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int = 512,
    dtype: str | None,
    num_blocks: int | None = None,
    prefix_cache: bool = True,
    backend: str | None = None,
    seed: int | None = None,
) -> None:
    """Raises InvalidRequest for what no model can be loaded with, before a file is opened."""
    if not isinstance(model, (str, os.PathLike)):
        raise InvalidRequest(f"model is {model!r:.80}; it must be a folder or a name")
    _one_of("block_size", block_size, (16, 32))
    _one_of("dtype", dtype, (None, "float32", "float16", "bfloat16"))
    if not isinstance(prefix_cache, bool):
        raise InvalidRequest(f"prefix_cache is {prefix_cache!r:.80}; it must be True or False")
    _one_of("backend", backend, (None, "metal", "cuda", "reference"))
    _integer("max_num_batched_tokens", max_num_batched_tokens, least=1)
    _integer("max_num_seqs", max_num_seqs, least=1)
    if max_num_seqs > max_num_batched_tokens:
        raise InvalidRequest(
            f"max_num_seqs is {max_num_seqs}; it must be from 1 to max_num_batched_tokens "
            f"({max_num_batched_tokens})"
        )
    if num_blocks is not None:
        _integer("num_blocks", num_blocks, least=1)
    if seed is not None:
        _integer("seed", seed)


def _engine_maker(
    folder: Path,
    sizes: dict[str, Any],
    limits: dict[str, int],
    *,
    prefix_cache: bool,
    dtype: str | None,
    seed: int | None,
    defaults: dict[str, Any],
    backend: str | None,
    on_status: Callable[[str], None] | None,
    on_loaded: Callable[[int, int], None] | None,
) -> Callable[[threading.Event], Any]:
    """What the engine's thread runs first. It must not know the `LLM`: the thread would keep it,
    and never end."""

    def make(closing: threading.Event):
        from mlxpage.engine import Engine
        from mlxpage.metal import choice
        from mlxpage.metal import memory as sizing
        from mlxpage.metal import model as models
        from mlxpage.text import Tokenizer

        def on_bytes(done: int, total: int) -> None:
            if closing.is_set():
                raise EngineError("closed while the model was loading")
            if on_loaded:
                try:
                    on_loaded(done, total)
                except Exception as error:
                    reason = f"on_loaded raised {type(error).__name__}: {error}"
                    raise EngineError(reason) from error

        sizing.check_weights(folder, sizes["memory"])
        loaded = models.load(folder, dtype=dtype, on_bytes=on_bytes)
        plan = sizing.plan(loaded, **sizes, **limits)
        served = choice.checked(loaded, sizes["block_size"], backend, on_status)
        tokenizer = Tokenizer(folder, loaded.config.get("eos_token_id"))
        options = {"defaults": defaults, "seed": seed, "backend": served}
        return Engine(loaded, tokenizer, plan, prefix_cache=prefix_cache, **options, **limits)

    return make


def _is_prompt(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and _is_integer(value[0])
    return isinstance(value, str)


def _is_integer(value: Any) -> bool:
    """NumPy's integers too."""
    return hasattr(value, "__index__") and not hasattr(value, "__len__")


def _many(prompts: Iterable[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise InvalidRequest(
            f"prompts are a text, a list of token ids or a list of those, not {_type(prompts)}"
        )
    return list(prompts)


def _each(params: Any, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, (list, tuple)):
        raise InvalidRequest(f"params are SamplingParams or a list of them, not {_type(params)}")
    for given in params:
        if not isinstance(given, SamplingParams):
            raise InvalidRequest(f"a list of params holds SamplingParams, not {_type(given)}")
    if len(params) != count:
        raise InvalidRequest(f"{len(params)} params for {count} prompts; give one, or one for each")
    return list(params)


def _one_of(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed or isinstance(value, float):
        options = ", ".join(str(option) for option in allowed)
        raise InvalidRequest(f"{name} is {value!r:.80}; it must be one of {options}")


def _integer(name: str, value: Any, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} is {value!r:.80}; it must be an integer")
    if least is not None and value < least:
        raise InvalidRequest(f"{name} is {value}; it must be at least {least}")


def _type(value: Any) -> str:
    return type(value).__name__
