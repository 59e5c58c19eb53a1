"""A chat window, with what Python brings along: tkinter and one AsyncEngine.

    python docs/examples/desktop_app.py [MODEL] [--memory 4GB] [--max-tokens 1024]

Return sends, Shift-Return begins a new line, Escape stops. You may ask while the model loads.

Tk belongs to the thread that made it. A call from another thread, `event_generate` too, waits until
Tk's loop gets to it, which it never does while that loop's thread waits for an engine to close. So
the engine's threads touch no widget: they put functions into a queue, and the window's own timer
calls them (`Calls`). `Chat` has the conversation and knows no widget; `App` has the widgets.
"""

from __future__ import annotations

import argparse
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from mlxpage import AsyncEngine, Handle, MlxpageError, SamplingParams
from mlxpage.events import Done, Error, Event, Preempted, Prefill, Queued, Tokens

try:
    import tkinter as tk
    from tkinter import font, ttk
except ImportError:  # of Python's library, but Debian and Homebrew keep it in a package of its own
    tk = None

NO_TKINTER = (
    "this Python has no tkinter. "
    "Debian: apt-get install python3-tk; Homebrew: brew install python-tk"
)
POLL_MS = 15  # how often the window looks for calls: about each frame


class Window(Protocol):
    """What a `Chat` tells, always on the window's own thread."""

    def show_progress(self, text: str, done: int = 0, of: int = 0) -> None:
        """Something takes its time; `of` is 0 as long as nobody knows how much there is."""

    def show_text(self, text: str) -> None:
        """More of the answer."""

    def show_stats(self, text: str) -> None: ...

    def show_end(self, note: str) -> None:
        """The answer has ended, with a word about it unless it ended by itself."""

    def show_failure(self, reason: str) -> None:
        """There is no model, and won't be."""


class Chat:
    """A conversation. Its methods are called on the window's thread, and so is the window:
    `call_soon` takes a function from any thread and has it called there."""

    def __init__(
        self,
        model: str,
        window: Window,
        call_soon: Callable[[Callable[[], None]], None],
        params: SamplingParams,
        **options,
    ):
        self._window = window
        self._call_soon = call_soon
        self._params = params
        self._messages: list[dict[str, str]] = []
        self._answer: Answer | None = None
        self._engine = AsyncEngine.load(
            model,
            on_status=lambda text: call_soon(partial(window.show_progress, text)),
            on_loaded=lambda done, of: call_soon(partial(self._show_loaded, done, of)),
            **options,
        )
        threading.Thread(target=self._wait_for_model, daemon=True).start()

    def _wait_for_model(self) -> None:
        try:
            self._engine.wait()
        except MlxpageError as error:
            self._call_soon(partial(self._fail, str(error)))
        else:
            self._call_soon(self._show_ready)

    def _fail(self, reason: str) -> None:
        self._answer = None
        self._window.show_failure(reason)

    def _show_ready(self) -> None:
        if self._engine.state == "ready" and not self.is_answering:
            self._window.show_progress("Ready")

    def _show_loaded(self, done: int, of: int) -> None:
        text = f"Loading the model: {done / 1e6:,.0f} of {of / 1e6:,.0f} MB"
        self._window.show_progress(text, done, of)

    @property
    def is_answering(self) -> bool:
        return self._answer is not None

    def send(self, text: str) -> None:
        """Asks; the answer comes piece by piece."""
        self._messages.append({"role": "user", "content": text})
        self._answer = answer = Answer()
        try:
            answer.handle = self._engine.submit(
                list(self._messages),
                self._params,
                on_event=partial(self._hear, answer),
                dispatch=self._call_soon,
            )
        except MlxpageError as error:  # a conversation that the pool has no room for, say
            self._refuse(error)

    def stop(self) -> None:
        """Ends the answer, at once for the window: the engine's step under way ends by itself."""
        if self._answer is not None and self._answer.handle is not None:
            self._answer.handle.cancel()
            self._end("Stopped")

    def forget(self) -> None:
        """Begins a new conversation."""
        self.stop()
        self._messages.clear()

    def close(self) -> None:
        """Ends everything. Waits for the engine's step under way, and for nothing else."""
        self._answer = None
        self._engine.close()

    def _hear(self, answer: Answer, event: Event) -> None:
        if answer is not self._answer:
            return  # it was stopped, and this was under way
        match event:
            case Queued() if self._engine.state == "ready":
                self._window.show_progress("Reading")
            case Prefill(num_computed_tokens=done, num_prompt_tokens=of, num_cached_tokens=cached):
                answer.num_prompt_tokens, answer.num_cached_tokens = of, cached
                self._window.show_progress(f"Reading: {done:,} of {of:,} tokens", done, of)
            case Tokens(text=text, token_ids=ids):
                answer.add(text, len(ids))
                self._window.show_text(text)
                self._window.show_progress("Answering")
                self._window.show_stats(answer.stats())
            case Preempted():
                self._window.show_progress("Waiting for memory")
            case Done(output=output):
                cut = output.finish_reason == "length"
                self._end(f"Cut short after {len(output.token_ids):,} tokens" if cut else "")
            case Error(error=error):
                self._refuse(error)

    def _refuse(self, error: MlxpageError) -> None:
        if self._engine.state != "failed":  # which is told once, not for each question
            self._end(str(error))

    def _end(self, note: str) -> None:
        answer, self._answer = self._answer, None
        if answer.text:
            self._messages.append({"role": "assistant", "content": answer.text})
        else:  # two questions in a row are more than many chat templates take
            self._messages.pop()
        self._window.show_end(note)
        self._show_ready()


class Answer:
    """What has come so far, and how fast."""

    def __init__(self):
        self.handle: Handle | None = None
        self.text = ""
        self.num_prompt_tokens = self.num_cached_tokens = 0
        self._num_tokens = 0
        self._num_first = 0
        self._asked = self._first = self._last = time.perf_counter()

    def add(self, text: str, num_tokens: int) -> None:
        self._last = time.perf_counter()
        if not self._num_tokens:
            self._first, self._num_first = self._last, num_tokens
        self.text += text
        self._num_tokens += num_tokens

    def stats(self) -> str:
        parts = [f"{self._num_tokens:,} tokens"]
        if self._last > self._first:  # the first tokens are the prompt's time, not the answer's
            rate = (self._num_tokens - self._num_first) / (self._last - self._first)
            parts.append(f"{rate:,.1f} tok/s")
        parts.append(f"first after {(self._first - self._asked) * 1e3:,.0f} ms")
        parts.append(
            f"{self.num_cached_tokens:,} of {self.num_prompt_tokens:,} prompt tokens cached"
        )
        return "  ·  ".join(parts)


class Calls:
    """Functions that other threads want called on the window's thread."""

    def __init__(self, root: tk.Tk):
        self._root = root
        self._queue: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.put = self._queue.put  # from any thread; never waits
        self._timer = root.after(POLL_MS, self._poll)

    def _poll(self) -> None:
        self._timer = self._root.after(POLL_MS, self._poll)  # first: a call may raise
        for _ in range(self._queue.qsize()):  # no more, so that clicks get their turn
            self._queue.get()()

    def stop(self) -> None:
        self._root.after_cancel(self._timer)


INK, FAINT, ACCENT = "#1d1d1f", "#6b7280", "#2563eb"
PAPER, PALE, LINE = "#ffffff", "#eef2f7", "#d5dce6"


class App:
    """The window: a conversation, a line to write in, and what is going on."""

    def __init__(self, model: str, params: SamplingParams, **options):
        self.root = root = tk.Tk()
        root.title(f"mlxpage - {model}")
        root.geometry("760x560")
        root.minsize(480, 320)
        root.protocol("WM_DELETE_WINDOW", self.close)
        if root.tk.call("tk", "windowingsystem") == "aqua":  # Cmd-Q would end the process
            root.createcommand("::tk::mac::Quit", self.close)
        _style(root)
        self._make_header(model)
        self._make_status()
        self._make_entry()
        self._make_page()
        self.calls = Calls(root)
        self.show_progress("Looking for the model")
        self.chat = Chat(model, self, self.calls.put, params, **options)
        self._update_buttons()

    # -- widgets --

    def _make_header(self, model: str) -> None:
        row = ttk.Frame(self.root, padding=(26, 12, 16, 8))
        ttk.Label(row, text=model, style="Title.TLabel").pack(side="left")
        ttk.Button(row, text="New chat", command=self.forget).pack(side="right")
        row.pack(side="top", fill="x")
        tk.Frame(self.root, height=1, background=LINE).pack(side="top", fill="x")

    def _make_status(self) -> None:
        row = ttk.Frame(self.root, padding=(26, 8, 16, 12))
        self.status = ttk.Label(row, style="Faint.TLabel")
        self.bar = ttk.Progressbar(row, length=160)
        self.stats = ttk.Label(row, style="Faint.TLabel")
        self.status.pack(side="left")
        self.stats.pack(side="right")
        row.pack(side="bottom", fill="x")

    def _make_entry(self) -> None:
        row = ttk.Frame(self.root, padding=(16, 8, 16, 0))
        self.entry = tk.Text(row, height=3, **_text_options(), padx=10, pady=8)
        self.entry.configure(
            highlightthickness=1, highlightbackground=LINE, highlightcolor=ACCENT, width=1
        )
        self.entry.bind("<Return>", self._on_return)
        self.root.bind("<Escape>", lambda _: self.stop())
        self.send_button = ttk.Button(row, text="Send", command=self.send, style="Send.TButton")
        self.stop_button = ttk.Button(row, text="Stop", command=self.stop)
        row.columnconfigure(0, weight=1)
        self.entry.grid(row=0, column=0, rowspan=2, sticky="nsew")
        self.send_button.grid(row=0, column=1, sticky="nsew", padx=(8, 0))
        self.stop_button.grid(row=1, column=1, sticky="nsew", padx=(8, 0), pady=(6, 0))
        row.pack(side="bottom", fill="x")
        self.entry.focus_set()

    def _make_page(self) -> None:
        frame = ttk.Frame(self.root)
        self.page = tk.Text(frame, **_text_options(), padx=16, pady=12, state="disabled")
        self.page.configure(highlightthickness=0, cursor="arrow", spacing2=4)
        self.page.bind("<Button-1>", lambda _: self.page.focus_set())  # text can be copied then
        sides = {"lmargin1": 10, "lmargin2": 10, "rmargin": 10}
        self.page.tag_configure("question", background=PALE, spacing1=7, spacing3=7, **sides)
        self.page.tag_configure("answer", spacing1=8, spacing3=8, **sides)
        self.page.tag_configure("note", foreground=FAINT, spacing3=8, **sides)
        self.page.tag_raise("sel")
        scroll = ttk.Scrollbar(frame, command=self.page.yview)
        self.page.configure(yscrollcommand=scroll.set)
        scroll.pack(side="right", fill="y")
        self.page.pack(fill="both", expand=True)
        frame.pack(side="top", fill="both", expand=True)

    def _write(self, text: str, tag: str) -> None:
        follows = self.page.yview()[1] == 1.0  # unless somebody has scrolled back to read
        self.page.configure(state="normal")
        self.page.insert("end", text, tag)
        self.page.configure(state="disabled")
        if follows:
            self.page.see("end")

    def _update_buttons(self) -> None:
        answering = self.chat.is_answering
        self.send_button.state(["disabled" if answering else "!disabled"])
        self.stop_button.state(["!disabled" if answering else "disabled"])

    # -- what people do --

    def _on_return(self, event: tk.Event) -> str | None:
        shift = event.state & 1
        if not shift:
            self.send()
        return None if shift else "break"

    def send(self) -> None:
        text = self.entry.get("1.0", "end").strip()
        if not text or self.chat.is_answering:
            return
        self.entry.delete("1.0", "end")
        self._write(f"{text}\n", "question")
        self.stats.configure(text="")
        self.chat.send(text)
        self._update_buttons()

    def stop(self) -> None:
        self.chat.stop()

    def forget(self) -> None:
        self.chat.forget()
        self.page.configure(state="normal")
        self.page.delete("1.0", "end")
        self.page.configure(state="disabled")
        self.stats.configure(text="")

    def close(self) -> None:
        """The window is gone at once, the engine when its step has ended."""
        self.root.withdraw()
        self.root.update_idletasks()
        self.calls.stop()
        self.chat.close()
        self.root.destroy()

    # -- what the chat tells --

    def show_progress(self, text: str, done: int = 0, of: int = 0) -> None:
        self.status.configure(text=text)
        if of:
            self.bar.configure(maximum=of, value=done)
            self.bar.pack(side="left", padx=(0, 12), before=self.status)
        else:
            self.bar.pack_forget()

    def show_text(self, text: str) -> None:
        self._write(text, "answer")

    def show_stats(self, text: str) -> None:
        self.stats.configure(text=text)

    def show_end(self, note: str) -> None:
        if self.page.get("end-2c") != "\n":
            self._write("\n", "answer")
        if note:
            self._write(f"{note}\n", "note")
        self._update_buttons()

    def show_failure(self, reason: str) -> None:
        self._write(f"{reason}\n", "note")
        self.show_progress("No model")
        self.send_button.state(["disabled"])
        self.stop_button.state(["disabled"])


def _text_options() -> dict:
    return {
        "wrap": "word",
        "font": "TkTextFont",
        "relief": "flat",
        "borderwidth": 0,
        "background": PAPER,
        "foreground": INK,
        "insertbackground": INK,
    }


def _style(root: tk.Tk) -> None:
    style = ttk.Style(root)
    bold = font.nametofont("TkDefaultFont").copy()
    bold.configure(weight="bold")
    root.bold = bold  # a font lives as long as somebody holds it
    if root.tk.call("tk", "windowingsystem") == "x11":  # macOS and Windows have looks of their own
        style.theme_use("clam")
        flat = {"borderwidth": 0, "relief": "flat", "focuscolor": ACCENT}
        style.configure(".", background=PAPER, foreground=INK)
        style.configure("TButton", background=PALE, padding=(16, 6), **flat)
        style.map("TButton", background=[("active", LINE)], foreground=[("disabled", "#9ca3af")])
        style.configure("Send.TButton", background=ACCENT, foreground=PAPER)
        style.map("Send.TButton", background=[("disabled", PALE), ("active", "#1d4ed8")])
        edges = {"borderwidth": 0, "bordercolor": PALE, "lightcolor": ACCENT, "darkcolor": ACCENT}
        style.configure("TProgressbar", background=ACCENT, troughcolor=PALE, thickness=8, **edges)
        edges = {"bordercolor": PAPER, "lightcolor": LINE, "darkcolor": LINE, "gripcount": 0}
        style.configure("TScrollbar", background=LINE, troughcolor=PAPER, **edges)
        hidden = {name: [("disabled", PAPER)] for name in ("background", "lightcolor", "darkcolor")}
        style.map("TScrollbar", **hidden)
        thumb = ("Vertical.Scrollbar.thumb", {"expand": True, "sticky": "nswe"})
        trough = ("Vertical.Scrollbar.trough", {"sticky": "ns", "children": [thumb]})
        style.layout("Vertical.TScrollbar", [trough])  # no arrows
    style.configure("Faint.TLabel", foreground=FAINT)
    style.configure("Title.TLabel", font=bold)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--memory", help='budget, as in "4GB"')
    parser.add_argument("--max-tokens", type=int, default=1024, help="of an answer")
    given = parser.parse_args(arguments)
    if tk is None:
        print(f"no window can be opened: {NO_TKINTER}", file=sys.stderr)
        return 1
    try:
        app = App(given.model, SamplingParams(max_tokens=given.max_tokens), memory=given.memory)
    except tk.TclError as error:  # no display
        print(f"no window can be opened: {error}", file=sys.stderr)
        return 1
    except MlxpageError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    # As an exception, Ctrl-C would end up in whichever of Tk's callbacks runs, and be swallowed.
    signal.signal(signal.SIGINT, lambda *_: app.calls.put(app.close))
    app.root.mainloop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
