"""llama.cpp on the same requests, through llama-cpp-python: a rival with a cache of its own.

The order of its server: a step decodes a token of each sequence that has its prompt behind it, and
is filled up with prompts. A cell of its cache is for a token; K and V are float16 there, its
default. It can't preempt, so a request comes in when all the cells are free that it may come to
need.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlxpage.bench.offline import Comparison, Ran
from mlxpage.bench.runs import Arm
from mlxpage.bench.workloads import Item, longest
from mlxpage.errors import EngineError, InvalidRequest
from mlxpage.metal.model import Model

CELLS_STEP = 256
"""What llama.cpp rounds a sequence's cells up to."""

_said: list[str] = []
"""By llama.cpp: the last lines of its log, for when it fails."""
_listening = []
"""The function that its C code calls for them, as long as there are models and afterwards."""


@dataclass(slots=True)
class _Running:
    place: int
    item: Item
    seq_id: int
    num_computed: int = 0
    tokens: list[int] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return len(self.item.prompt) + len(self.tokens) - self.num_computed

    def next_tokens(self, most: int) -> list[int]:
        prompt, begin = self.item.prompt, self.num_computed
        return prompt[begin : begin + most] if begin < len(prompt) else self.tokens[-1:]


def _library():
    """llama-cpp-python, which keeps quiet. Raises InvalidRequest without it."""
    try:
        import llama_cpp
    except ImportError as error:
        raise InvalidRequest(
            f"--rival llama.cpp needs llama-cpp-python ({error}): pip install llama-cpp-python"
        ) from None
    except (OSError, RuntimeError) as error:  # its library is missing, or for another machine
        raise InvalidRequest(f"llama-cpp-python can't be loaded: {error}") from None
    if not hasattr(llama_cpp, "llama_memory_seq_rm"):
        raise InvalidRequest(
            f"llama-cpp-python {llama_cpp.__version__} is too old: pip install -U llama-cpp-python"
        )

    hear = llama_cpp.llama_log_callback(_hear)
    llama_cpp.llama_log_set(hear, None)
    _listening[:] = [hear]
    llama_cpp.llama_backend_init()
    return llama_cpp


def _hear(level: int, text: bytes, data) -> None:
    _said[:] = [*_said[-3:], text.decode(errors="replace").strip()]


class LlamaCpp:
    """A model of llama.cpp, with room for so many cells, sequences at once and tokens in a step.

    `shares_cells`: any sequence takes any cell, and attention goes over those of all and masks
    most of them; or else each has its part of them, which is faster.
    Raises InvalidRequest without llama-cpp-python, and for a file that it can't load or that isn't
    the same model.
    """

    def __init__(
        self,
        gguf: Path,
        model: Model,
        *,
        cells: int,
        at_once: int,
        chunk: int,
        shares_cells: bool,
    ):
        self._lib = lib = _library()
        most = lib.llama_max_parallel_sequences()
        if at_once > most:
            raise InvalidRequest(
                f"--max-num-seqs is {at_once}; llama.cpp runs {most} sequences at once"
            )
        self.cells, self.at_once, self.shares_cells = cells, at_once, shares_cells
        self.num_threads = _num_threads()
        self.version = lib.__version__
        self._chunk = max(chunk, at_once)
        self._cell_nbytes = cell_nbytes(model)
        self._model = self._context = self._batch = None
        try:
            self._load(gguf, model.vocab_size)
        except BaseException:
            self.close()
            raise

    def _load(self, gguf: Path, vocab_size: int) -> None:
        lib = self._lib
        params = lib.llama_model_default_params()
        params.n_gpu_layers = 2**31 - 1  # where there is a GPU, as it was built
        self._model = lib.llama_model_load_from_file(os.fsencode(gguf), params)
        if not self._model:
            raise InvalidRequest(f"llama.cpp can't load {gguf}: {' '.join(_said)}")
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        if self._vocab_size != vocab_size:
            raise InvalidRequest(
                f"{gguf} has {self._vocab_size:,} tokens and the model {vocab_size:,}; give "
                "--gguf a file of the same model"
            )
        self._context = lib.llama_init_from_model(self._model, self._context_params())
        if not self._context:
            raise InvalidRequest(
                f"llama.cpp makes no cache of {self.cells:,} cells: {' '.join(_said)}"
            )
        self._batch = lib.llama_batch_init(self._chunk, 0, 1)

    def _context_params(self):
        params = self._lib.llama_context_default_params()
        params.n_ctx = self.cells
        params.n_batch = params.n_ubatch = self._chunk
        params.n_seq_max = self.at_once
        params.n_threads = params.n_threads_batch = self.num_threads
        params.kv_unified = self.shares_cells
        return params

    def close(self) -> None:
        if self._batch:
            self._lib.llama_batch_free(self._batch)
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._model = self._context = self._batch = None

    def arm(self, comparison: Comparison) -> Arm:
        arm = comparison.arm("llama.cpp", lambda _, items: self.serve(items))
        arm.facts |= {
            "at_once": self.at_once,
            "cells": self.cells,
            "shares_cells": self.shares_cells,
            "threads": self.num_threads,
            "version": self.version,
            "weights": self._weights(),
        }
        return arm

    def _weights(self) -> str:
        """What they are, in llama.cpp's words."""
        words = ctypes.create_string_buffer(128)
        self._lib.llama_model_desc(self._model, words, len(words))
        return words.value.decode(errors="replace")

    def serve(self, items: list[Item]) -> Ran:
        """All of them at once, in their order, greedily, each to its full length. Raises
        InvalidRequest for one that is longer than the cells, EngineError for a step that fails."""
        if longest(items) > self.cells:
            raise InvalidRequest(
                f"the longest request has {longest(items):,} tokens; in --kv-memory llama.cpp has "
                f"room for {self.cells:,}. Give more, or ask for shorter ones."
            )
        waiting = deque(enumerate(items))
        free = list(range(self.at_once))
        running: list[_Running] = []
        tokens: list[list[int]] = [[] for _ in items]
        held = 0
        began = time.perf_counter()
        while waiting or running:
            left = self.cells - sum(seq.item.length for seq in running)
            while waiting and free and waiting[0][1].length <= left:
                seq = _Running(*waiting.popleft(), free.pop())
                running.append(seq)
                left -= seq.item.length
            self._step(running)
            held = max(held, sum(seq.num_computed for seq in running))
            for seq in running:
                if len(seq.tokens) == seq.item.output_len:
                    tokens[seq.place] = seq.tokens
                    self._forget(seq.seq_id)
                    free.append(seq.seq_id)
            running = [seq for seq in running if len(seq.tokens) < seq.item.output_len]
        seconds = time.perf_counter() - began
        return Ran(seconds, tokens, held * self._cell_nbytes, None)

    def _step(self, running: list[_Running]) -> None:
        self._batch.n_tokens = 0
        sampling = []
        for seq in sorted(running, key=lambda seq: seq.num_left > 1):  # prompts last
            given = seq.next_tokens(self._chunk - self._batch.n_tokens)
            self._add(seq, given)
            if given and not seq.num_left:
                sampling.append((seq, self._batch.n_tokens - 1))
                self._batch.logits[self._batch.n_tokens - 1] = True
        if code := self._lib.llama_decode(self._context, self._batch):
            raise EngineError(f"llama.cpp couldn't compute a step: llama_decode returned {code}")
        for seq, row in sampling:
            logits = self._lib.llama_get_logits_ith(self._context, row)
            seq.tokens.append(int(np.ctypeslib.as_array(logits, (self._vocab_size,)).argmax()))

    def _add(self, seq: _Running, tokens: list[int]) -> None:
        batch = self._batch
        for token in tokens:
            row = batch.n_tokens
            batch.token[row] = token
            batch.pos[row] = seq.num_computed
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = seq.seq_id
            batch.logits[row] = False
            batch.n_tokens += 1
            seq.num_computed += 1

    def _forget(self, seq_id: int) -> None:
        memory = self._lib.llama_get_memory(self._context)
        self._lib.llama_memory_seq_rm(memory, seq_id, -1, -1)


def _num_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cell_nbytes(model: Model) -> int:
    """Of a token in all layers, in float16. Raises InvalidRequest for a model that has states."""
    if model.state_specs or not model.kv_specs:
        raise InvalidRequest("--rival llama.cpp is for models that have K and V alone, no states")
    return 2 * sum(s.kv_heads * (s.k_head_dim + s.v_head_dim) for s in model.kv_specs)
