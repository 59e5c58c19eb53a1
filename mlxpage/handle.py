"""A request that was submitted: what has come of it, and three ways to hear of that."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlxpage.awaiting import Signal, outcome
from mlxpage.errors import EngineError, MlxpageError
from mlxpage.events import Done, Error, Event, Prefill, Tokens
from mlxpage.outputs import FinishReason, RequestOutput, StreamEvent, Timings, TokenLogprobs

if TYPE_CHECKING:
    from mlxpage.home import EngineControl, Home

Wake = Callable[[], None]
_END = object()
"""Read when the last event has been."""


class Handle:
    """A request that was submitted. Listen to it in one of these ways, from any thread:

        for event in handle: ...            # as it comes; `async for` in asyncio or trio
        output = handle.result()            # when it has ended; or `await handle`
        engine.submit(prompt, on_event=f)   # by a function, given when it is submitted

    Events are those of `mlxpage.events`. One that wasn't read yet takes up what comes after it, so
    a slow reader gets fewer and larger ones: of each kind and choice there is one unread at most.
    Each event is read once; `result` may be asked for as often as you like, beside a loop as well.
    Loops and `result` raise the error with which a request ends: `TimedOut` if it took too long,
    `InvalidRequest` if it can't be served, `EngineError` if a step failed or the engine is closed.

    A request is cancelled by `cancel`, by leaving a `with` block of its handle, when a task or a
    thread is interrupted while it waits for it, and when nobody holds the handle any more, unless
    it has an `on_event`.
    """

    def __init__(self, mailbox: Mailbox, thread: Home):
        self._mailbox = mailbox
        self._thread = thread  # serves as long as there is a handle

    @property
    def is_done(self) -> bool:
        """Whether the request has ended, in whatever way."""
        return self._mailbox.result.done()

    def cancel(self) -> None:
        """Ends the request, with what it has so far and the finish reason "abort"; does nothing if
        it has ended. Doesn't wait: a step that is under way ends first, and then its blocks are
        free. One that no step has begun, as while the model loads, has ended at once."""
        self._mailbox.cancel()

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Waits for the end. Raises TimeoutError after `timeout` seconds; the request goes on."""
        try:
            return self._mailbox.result.result(timeout)
        except KeyboardInterrupt:
            self.cancel()
            raise

    def __await__(self):
        return self._result().__await__()

    async def _result(self) -> RequestOutput:
        with self._cancelling():
            return await outcome(self._mailbox.result)

    @contextmanager
    def _cancelling(self) -> Iterator[None]:
        """Who is interrupted while they wait, by Ctrl-C or as a task, wants no result any more."""
        try:
            yield
        except BaseException:
            self.cancel()
            raise

    # -- events, one after the other --

    def __iter__(self) -> Handle:
        return self

    def __next__(self) -> Event:
        woken = threading.Event()
        while (event := self._mailbox.read(woken.set)) is None:
            with self._cancelling():
                woken.wait()
            woken.clear()
        if event is _END:
            raise StopIteration
        return _raise_error(event)

    def __aiter__(self) -> Handle:
        return self

    async def __anext__(self) -> Event:
        woken = Signal()
        while (event := self._mailbox.read(woken.give)) is None:
            with self._cancelling():
                await woken.wait()
            woken = Signal()
        if event is _END:
            raise StopAsyncIteration
        return _raise_error(event)

    # -- leaving --

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_) -> None:
        self.cancel()

    async def __aenter__(self) -> Handle:
        return self

    async def __aexit__(self, *_) -> None:
        self.cancel()

    def __del__(self) -> None:
        if not (self._mailbox.has_listener or self.is_done):
            # The garbage collector calls this, on any thread, which may hold any lock.
            self._thread.call(self._mailbox.abort)


def why_not_queued(error: BaseException) -> MlxpageError:
    """What a request ends with that couldn't begin because of `error`."""
    if isinstance(error, MlxpageError):
        return error
    failure = EngineError(f"the request can't be queued: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _raise_error(event: Event) -> Event:
    if isinstance(event, Error):
        raise event.error
    return event


class Mailbox:
    """What a request has told and nobody has read yet. The engine's thread puts it in, and never
    waits for who reads."""

    def __init__(
        self,
        thread: Home,
        make_request: Callable[[Any, Mailbox], Any],
        *,
        on_end: Callable[[Mailbox], None],
        deadline: float | None,
        wants_tokens: bool,
    ):
        self.result: Future[RequestOutput] = Future()
        self.result.set_running_or_notify_cancel()  # a task that is cancelled mustn't cancel this
        self.deadline = deadline
        """`time.monotonic` when it must have ended."""
        self._arrived = time.perf_counter()
        self.is_queued = True
        """No step has computed any of it yet."""
        self._thread = weakref.ref(thread)  # which keeps this object: it couldn't end
        self._make_request = make_request
        self._on_end = on_end
        self._wants_tokens = wants_tokens
        self._lock = threading.RLock()
        self._unread: dict[tuple, Event | _Unread] = {}
        self._wakers: list[Wake] = []
        self._on_event: Callable[[Event], None] | None = None
        self._dispatch: Callable[[Wake], Any] | None = None
        self._has_ended = False
        self._request: Any = None
        self._has_begun = self._is_given_up = False

    # -- on the engine's thread, or that which talks with its process --

    def prepare(self, engine: Any) -> None:
        """Makes the request; on any thread, as that is. Raises InvalidRequest."""
        self._request = self._make_request(engine, self)

    def begin(self, engine: EngineControl) -> None:
        with self._lock:
            if self._is_given_up:
                return
            self._has_begun = True
        if self._request is None:
            self.prepare(engine)
        engine.add(self._request)

    def abort(self, engine: EngineControl, error: MlxpageError | None = None) -> None:
        if (request := self._request) is not None:
            engine.abort(request.id, error)

    def after_begin(self, begun: Future) -> None:
        """A request that couldn't begin has ended."""
        if (error := begun.exception()) is not None:
            self.put(Error(why_not_queued(error)))

    def put_step(self, event: StreamEvent) -> None:
        """What one step added to a generation."""
        if self._wants_tokens and (event.text or event.token_ids or event.output is None):
            logprobs = None if event.logprobs is None else tuple(event.logprobs)
            ids, reason = tuple(event.token_ids), event.finish_reason
            self.put(Tokens(event.text, ids, logprobs, reason, event.choice))
        if event.output is not None:
            done = Done(event.output)
            self.put(Error(event.error, event.output) if event.error else done)

    def put(self, event: Event) -> None:
        with self._lock:
            if self._has_ended:
                return
            self._keep(event)
            self._has_ended = ends = isinstance(event, (Done, Error))
            wakers, self._wakers = self._wakers, []
        if isinstance(event, (Prefill, Tokens)):
            self.is_queued = False
        elif isinstance(event, Done):
            self.result.set_result(event.output)
        elif isinstance(event, Error):
            self.result.set_exception(event.error)
        if ends:
            self._request = None  # they know each other
            self._on_end(self)
        for wake in wakers:
            wake()

    def _keep(self, event: Event) -> None:
        key = type(event), getattr(event, "choice", 0)
        if isinstance(event, Tokens):
            self._unread.setdefault(key, _Unread(event.choice)).add(event)
        else:
            self._unread[key] = event

    # -- on any thread --

    def read(self, wake: Wake) -> Any:
        """The oldest event. None if there is none: then `wake` is called once there is. `_END` if
        there never will be."""
        with self._lock:
            if self._unread:
                event = self._unread.pop(next(iter(self._unread)))
                return event.tokens() if isinstance(event, _Unread) else event
            if self._has_ended:
                return _END
            self._wakers.append(wake)
            return None

    def listen(self, on_event: Callable[[Event], None], dispatch: Callable[[Wake], Any]) -> None:
        """Calls `on_event` with each event, by `dispatch`; an error of either ends the request."""
        self._on_event, self._dispatch = on_event, dispatch
        self._call_listener()

    @property
    def has_listener(self) -> bool:
        return self._on_event is not None

    def _call_listener(self) -> None:
        try:
            self._dispatch(self._tell_all)
        except Exception as error:
            self._fail("dispatch", error)

    def _tell_all(self) -> None:
        while (event := self.read(self._call_listener)) not in (None, _END):
            try:
                self._on_event(event)
            except BaseException as error:
                self._fail("on_event", error)
                raise

    def _fail(self, name: str, error: BaseException) -> None:
        failure = EngineError(f"{name} raised {type(error).__name__}: {error}")
        failure.__cause__ = error
        self.cancel(failure)

    def cancel(self, error: MlxpageError | None = None) -> None:
        with self._lock:
            self._is_given_up = True
            has_begun = self._has_begun
        thread = self._thread()
        if not has_begun:
            self.put(Error(error) if error else Done(self._nothing()))
        elif thread is not None and not self._has_ended:
            thread.call(lambda engine: self.abort(engine, error))

    def _nothing(self) -> RequestOutput:
        """Of a request that was cancelled before it began."""
        prompt = self._request.prompt_token_ids if self._request else []
        timings = Timings(self._arrived, finished=time.perf_counter())
        return RequestOutput(list(prompt), "", [], "abort", 0, 0, timings)


class _Unread:
    """Tokens of one choice that nobody has read yet."""

    def __init__(self, choice: int):
        self._choice = choice
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._reason: FinishReason | None = None
        self._has_logprobs = False

    def add(self, new: Tokens) -> None:
        self._texts.append(new.text)
        self._ids += new.token_ids
        self._has_logprobs = new.logprobs is not None
        self._logprobs += new.logprobs or ()
        self._reason = new.finish_reason

    def tokens(self) -> Tokens:
        logprobs = tuple(self._logprobs) if self._has_logprobs else None
        return Tokens("".join(self._texts), tuple(self._ids), logprobs, self._reason, self._choice)
