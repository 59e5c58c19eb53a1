"""llama.cpp on the same requests, through llama-cpp-python: a rival with a cache of its own.

The order of its server: a step decodes a token of each sequence that has its prompt behind it, and
is filled up with prompts. Cells of its cache, of a token each, are for whatever sequence (its
`kv_unified`); K and V are float16 there, its default. It can't preempt, so a request comes in when
all the cells are free that it may come to need.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mlxpage.bench.offline import Ran
from mlxpage.bench.workloads import Item, longest
from mlxpage.errors import EngineError, InvalidRequest
from mlxpage.metal.model import Model


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


class LlamaCpp:
    """A model of llama.cpp, with room for so many cells, sequences at once and tokens in a step.

    Raises InvalidRequest without llama-cpp-python, and for a file that it can't load or that isn't
    the same model.
    """

    def __init__(self, gguf: Path, model: Model, *, cells: int, at_once: int, chunk: int):
        try:
            import llama_cpp
        except ImportError:
            raise InvalidRequest(
                "--rival llama.cpp needs llama-cpp-python, which isn't installed: "
                "pip install llama-cpp-python"
            ) from None
        self.cells, self.at_once = cells, at_once
        self._chunk = max(chunk, at_once)
        self._lib = lib = llama_cpp
        self._cell_nbytes = cell_nbytes(model)
        self._hush = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(self._hush, None)
        lib.llama_backend_init()
        self._context = None
        self._model = lib.llama_model_load_from_file(
            os.fsencode(gguf), lib.llama_model_default_params()
        )
        if not self._model:
            raise InvalidRequest(f"llama.cpp can't load {gguf}")
        self._vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        if self._vocab_size != model.vocab_size:
            raise InvalidRequest(
                f"{gguf} has {self._vocab_size:,} tokens and the model {model.vocab_size:,}; give "
                "--gguf a file of the same model"
            )
        self._context = lib.llama_init_from_model(self._model, self._context_params())
        if not self._context:
            raise InvalidRequest(f"llama.cpp has no room for {cells:,} tokens of {gguf}")
        self._batch = lib.llama_batch_init(self._chunk, 0, 1)

    def _context_params(self):
        params = self._lib.llama_context_default_params()
        params.n_ctx = self.cells
        params.n_batch = params.n_ubatch = self._chunk
        params.n_seq_max = self.at_once
        params.n_threads = params.n_threads_batch = os.cpu_count()
        params.kv_unified = True
        return params

    def close(self) -> None:
        if self._context:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self._context)
            self._context = None
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None

    def weights(self) -> str:
        """What they are, in llama.cpp's words."""
        import ctypes

        words = ctypes.create_string_buffer(128)
        self._lib.llama_model_desc(self._model, words, len(words))
        return words.value.decode(errors="replace")

    def serve(self, items: list[Item]) -> Ran:
        """All of them at once, in their order, greedily, each to its full length."""
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


def cell_nbytes(model: Model) -> int:
    """Of a token in all layers, in float16."""
    return 2 * sum(s.kv_heads * (s.k_head_dim + s.v_head_dim) for s in model.kv_specs)
