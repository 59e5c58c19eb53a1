"""The engine for apps that have a thread or an event loop of their own to keep going."""

from __future__ import annotations

import inspect
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from mlxpage.arguments import (
    Prompt,
    check_bool,
    check_callable,
    check_integer,
    check_seconds,
    is_conversation,
    loading_options,
    params_list,
    type_name,
)
from mlxpage.awaiting import in_thread, outcome
from mlxpage.door import Door, Messages, find_files, start_thread, token_ids
from mlxpage.errors import EngineError, InvalidRequest, QueueFull, TimedOut
from mlxpage.events import Error, Event, Queued
from mlxpage.handle import Handle, Mailbox
from mlxpage.home import Home
from mlxpage.llm import LLM
from mlxpage.sampling_params import SamplingParams

if TYPE_CHECKING:
    from mlxpage.engine import Engine

WATCH_SECONDS = 0.05  # how often deadlines and steps are looked at while there are requests


class AsyncEngine(Door):
    """A model that serves requests on a thread or in a process of its own, for apps.

        async with AsyncEngine.load("smollm2-135m", memory="2GB") as engine:
            async for event in engine.submit("Once upon a time"):
                if isinstance(event, Tokens):
                    print(event.text, end="")

    All methods may be called from any thread and any event loop; none waits for the engine unless
    it says so. Several engines may live in one process. Thread and process end with `close`, when
    nobody holds the engine or a handle any more, or with the interpreter.
    """

    def __init__(
        self,
        home: Home,
        make_request: Callable,
        requests: OpenRequests,
        watch: threading.Thread,
    ):
        """For `load`, which makes them."""
        self._thread = home
        self._make_request = make_request
        self._requests = requests
        self._watch = watch
        self._callbacks = ThreadPoolExecutor(1, thread_name_prefix="mlxpage-callbacks")

    # -- from loading to closing --

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        *,
        isolate: bool = False,
        max_inter_token_ms: float | Literal["auto"] | None = "auto",
        max_queued: int = 1024,
        stall_after: float | None = 30.0,
        on_stall: Callable[[float], None] | None = None,
        **options,
    ) -> AsyncEngine:
        """Starts to load a model, and returns at once. Requests may be submitted already.

        Args:
            model: as for `LLM`, and so are the `options`: memory, num_blocks, max_num_seqs, ...
                `on_status` and `on_loaded` tell how far it is, on threads of the engine; an error
                that `on_loaded` raises ends the loading.
            isolate: whether the engine runs in a process of its own. This one imports no MLX, its
                event loop never waits for the engine's Python, and it survives whatever ends the
                other: requests that were open end with EngineError, `on_status` tells of it, and
                the model is loaded again, with the same options. After three such ends within five
                minutes it isn't, and the state is "failed".
            max_inter_token_ms: as for `LLM`, but "auto" unless given: what people read goes on
                while others' prompts are computed. None computes prompts soonest.
            max_queued: requests that may wait to be begun; one more is refused with QueueFull.
            stall_after: seconds after which a step counts as stalled, None: never.
            on_stall: called once for such a step, on a thread of the engine, with the seconds so
                far. Nothing is ended: a step can't be, short of its process, as by `restart`.

        To wait for the model: `wait`, `await engine`, or enter the engine as a context; it's they
        that raise ModelNotFound, InvalidModel, UnsupportedModel or OutOfMemory. Closing the engine
        ends the loading; only a download that is under way goes on by itself until it has ended.

        Raises InvalidRequest for options that make no sense.
        """
        check_bool("isolate", isolate)
        check_integer("max_queued", max_queued, least=1)
        check_seconds("stall_after", stall_after)
        check_callable("on_stall", on_stall)
        options["max_inter_token_ms"] = max_inter_token_ms
        arguments = inspect.signature(LLM).bind(model, **options)
        arguments.apply_defaults()
        given = arguments.arguments
        told = {name: given.pop(name) for name in ("on_status", "on_loaded")}
        checked = loading_options(**given)
        if isolate:
            from mlxpage.engine_process import EngineProcess
            from mlxpage.far_engine import far_request

            home: Home = EngineProcess({**given, "stall_after": stall_after}, **told)
            make_request = far_request
        else:
            load = partial(
                _load, model=model, adapter_path=given["adapter_path"], options=checked, **told
            )
            of_thread = {name: given[name] for name in ("trim_after", "memory_pressure", "monitor")}
            home, make_request = start_thread(load, model=model, **of_thread), _request
        requests = OpenRequests(max_queued)
        watch = threading.Thread(
            target=_watch,
            args=(weakref.ref(home), requests, stall_after, on_stall),
            name="mlxpage-watch",
            daemon=True,
        )
        watch.start()
        weakref.finalize(home, requests.close).atexit = False
        return cls(home, make_request, requests, watch)

    @property
    def state(self) -> str:
        """ "loading", also when a process has died and the next one loads; "ready", "failed" if the
        model could not be loaded or the engine was closed before, or "closed"."""
        ready = self._thread.ready
        if ready.done() and ready.exception() is not None:
            return "failed"
        if not self._thread.is_running:
            return "closed"
        return "ready" if ready.done() else "loading"

    def wait(self, timeout: float | None = None) -> AsyncEngine:
        """Waits until the model is loaded, and raises why it isn't. TimeoutError after `timeout`
        seconds; the loading goes on."""
        self._thread.ready.result(timeout)
        return self

    def __await__(self):
        return self._wait().__await__()

    async def _wait(self) -> AsyncEngine:
        await outcome(self._thread.ready)
        return self

    def restart(self) -> None:
        """Ends the engine's process, whatever it does, and loads the model again in another one:
        for a step that stalls. Requests that are open end with EngineError. Doesn't wait.

        Raises EngineError without `isolate`: a thread can't be ended.
        """
        self._thread.restart()

    def close(self) -> None:
        """Ends what is running or loading and gives the memory back; a second call does nothing.

        Requests end with what they have, and the finish reason "abort". Waits for the step that is
        under way, and what is cached to be stored if there is a `cache_dir`: in an event loop, use
        `aclose`.
        """
        self._thread.close()
        self._requests.close()
        if self._watch is not threading.current_thread():
            self._watch.join()
        self._callbacks.shutdown(wait=False)

    async def aclose(self) -> None:
        """`close`, while the event loop goes on."""
        await in_thread(self.close)

    def __enter__(self) -> AsyncEngine:
        """Waits until the model is loaded."""
        try:
            return self.wait()
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_) -> None:
        self.close()

    async def __aenter__(self) -> AsyncEngine:
        """Waits until the model is loaded."""
        try:
            return await self
        except BaseException:
            await self.aclose()
            raise

    async def __aexit__(self, *_) -> None:
        await self.aclose()

    # -- requests --

    def submit(
        self,
        prompt: Prompt | Messages,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        on_event: Callable[[Event], None] | None = None,
        dispatch: Callable[[Callable[[], None]], Any] | None = None,
    ) -> Handle:
        """Queues a request and returns its handle at once.

        Args:
            prompt: a text, a list of token ids, or a conversation as for `LLM.chat`. A text becomes
                tokens on the caller's thread, in about a millisecond for a page, or else in the
                engine's process.
            params: what the model's own defaults are not good for.
            priority: lower is served first; 0 is for somebody who waits, 1 for the background.
            timeout: seconds from now after which the request ends with TimedOut.
            on_event: called with each event, the last one a Done or an Error. If it raises, that
                request ends with EngineError, and no other.
            dispatch: takes a function and has it called, soon and elsewhere, on the thread that
                `on_event` is to be called on: `loop.call_soon_threadsafe` for asyncio, a trio
                token's `run_sync_soon`, a GUI's call-me-later. None: a thread of the engine, whose
                callbacks wait for each other.

        With `best_of`, which tokens count is known at the end: then there are no Tokens events.

        Raises InvalidRequest for what can never be served, with the tokens that the pool can hold;
        QueueFull if too many requests wait; EngineError if the engine is closed. While the model
        loads, and always with `isolate`, it is the handle that raises the first.
        """
        if not isinstance(prompt, (str, list, tuple)):
            raise InvalidRequest(
                "a prompt is a text, a list of token ids or a conversation, not "
                f"{type_name(prompt)}"
            )
        check_integer("priority", priority)
        check_seconds("timeout", timeout)
        check_callable("on_event", on_event)
        check_callable("dispatch", dispatch)
        (params,) = params_list(params, 1)
        thread = self._thread
        if not thread.is_running:
            raise thread.refusal()
        mailbox = Mailbox(
            thread,
            partial(self._make_request, prompt, params, priority),
            on_end=self._requests.remove,
            deadline=None if timeout is None else time.monotonic() + timeout,
            wants_tokens=(params.best_of or 0) <= params.n,
        )
        ready = thread.ready
        if ready.done() and not ready.exception():
            mailbox.prepare(ready.result())
        self._requests.add(mailbox)
        if on_event is not None:
            mailbox.listen(on_event, dispatch or self._callbacks.submit)
        thread.call(mailbox.begin).add_done_callback(mailbox.after_begin)
        return Handle(mailbox, thread)

    def stats(self) -> Mapping[str, Any]:
        """The engine's counters, blocks and bytes as they are now, without waiting for a step; in
        the middle of one they may differ from each other. Beside them `state`, the requests that
        are `open` and those of them that are `queued`, and `step_s`: the seconds that the step
        under way has taken so far, None between steps. While there is no engine, only those; nor if
        its process can't answer, which is given a second and usually takes some milliseconds.
        """
        began = self._thread.pulse.step_began
        own = {
            "state": self.state,
            "open": len(self._requests),
            "queued": self._requests.num_queued,
            "step_s": began and time.monotonic() - began,
        }
        try:
            return own | self._engine.stats()
        except EngineError:
            return own


def _load(closing: threading.Event, *, model, adapter_path, options, on_status, on_loaded):
    files = _unless(closing, partial(find_files, model, adapter_path, on_status))
    from mlxpage.loading import load_engine

    return load_engine(closing, **files, **options, on_status=on_status, on_loaded=on_loaded)


def _unless(closing: threading.Event, function: Callable[[], Any]) -> Any:
    """`function()`, but no longer than until `closing` is set. A download can't be interrupted, but
    left alone."""
    found: Future = Future()

    def work() -> None:
        try:
            found.set_result(function())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=work, name="mlxpage-find", daemon=True).start()
    while not wait([found], WATCH_SECONDS).done:
        if closing.is_set():
            raise EngineError("closed while the model was looked for")
    return found.result()


def _request(prompt, params: SamplingParams, priority: int, engine: Engine, mailbox: Mailbox):
    if is_conversation(prompt):
        ids = engine.tokenizer.apply_chat_template(prompt)
    else:
        ids = token_ids(engine.tokenizer, prompt)
    progress = mailbox.put
    return engine.request(ids, params, mailbox.put_step, priority=priority, on_progress=progress)


class OpenRequests:
    """Those of an engine that haven't ended."""

    def __init__(self, max_queued: int):
        self._max_queued = max_queued
        self._mailboxes: set[Mailbox] = set()
        self._changed = threading.Condition()
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._mailboxes)

    def all(self) -> list[Mailbox]:
        with self._changed:
            return list(self._mailboxes)

    @property
    def num_queued(self) -> int:
        return sum(mailbox.is_queued for mailbox in self.all())

    def add(self, mailbox: Mailbox) -> None:
        with self._changed:
            ahead = self.num_queued
            if ahead >= self._max_queued:
                raise QueueFull(
                    f"{ahead:,} requests wait already, which is max_queued. Submit it again when "
                    "one of them has begun, or load the model with a larger max_queued."
                )
            self._mailboxes.add(mailbox)
            self._changed.notify_all()
        mailbox.put(Queued(ahead))

    def remove(self, mailbox: Mailbox) -> None:
        with self._changed:
            self._mailboxes.discard(mailbox)

    def end_overdue(self, now: float) -> None:
        for mailbox in self.all():
            if mailbox.deadline is not None and now >= mailbox.deadline:
                mailbox.deadline = None
                mailbox.cancel(TimedOut("the request took longer than its timeout"))

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def sleep(self) -> bool:
        """A moment while there are requests; without any, until there are. False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._mailboxes or self._is_closed)
            return not self._changed.wait_for(lambda: self._is_closed, WATCH_SECONDS)


def _watch(
    reference: weakref.ref[Home],
    requests: OpenRequests,
    stall_after: float | None,
    on_stall: Callable[[float], None] | None,
) -> None:
    """Ends requests whose time is up, and all if the engine has ended without a word;
    tells of a step that stalls."""
    stalled = None
    while requests.sleep() and (thread := reference()) is not None and thread.is_running:
        now, began = time.monotonic(), thread.pulse.step_began
        del thread  # it ends when nobody holds it
        requests.end_overdue(now)
        if stall_after is None or began in (None, stalled) or now - began < stall_after:
            continue
        stalled = began
        if on_stall is not None:
            _call(on_stall, now - began)
    for mailbox in requests.all():
        mailbox.put(Error(EngineError("the engine is closed")))


def _call(function: Callable, *arguments) -> None:
    """An error is told as one that ends a thread, but this one goes on."""
    try:
        function(*arguments)
    except Exception:
        told = threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread()))
        threading.excepthook(told)
