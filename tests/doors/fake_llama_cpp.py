"""A pretend llama-cpp-python, whose model's next token is a sum: its C interface, and its rules."""

import ctypes
from collections import Counter
from types import SimpleNamespace

import numpy as np

VOCAB_SIZE = 5000


def next_token(tokens: list[int]) -> int:
    return (sum(tokens) * 31 + len(tokens)) % VOCAB_SIZE


def generated(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class FakeLlamaCpp:
    """Stands for the module. `steps`: (single tokens, tokens of prompts) of each batch."""

    __version__ = "0.3.99"

    def __init__(self, vocab_size: int = VOCAB_SIZE):
        self.vocab_size = vocab_size
        self.steps: list[tuple[int, int]] = []
        self.most_cells = 0
        self.open: Counter[str] = Counter()
        self.fails_at: int | None = None

    def llama_log_callback(self, function):
        return function

    def llama_log_set(self, callback, data):
        self.hear = callback

    def llama_backend_init(self): ...

    def llama_max_parallel_sequences(self):
        return 64

    def llama_model_default_params(self):
        return SimpleNamespace()

    def llama_context_default_params(self):
        return SimpleNamespace(kv_unified=False)

    def llama_model_load_from_file(self, path, params):
        assert isinstance(path, bytes) and params.n_gpu_layers > 1000
        if b"broken" in path:
            self.hear(4, b"no magic in it\n", None)
            return None
        self.open["model"] += 1
        return "model"

    def llama_model_free(self, model):
        self.open["model"] -= 1

    def llama_model_get_vocab(self, model):
        return "vocab"

    def llama_vocab_n_tokens(self, vocab):
        return self.vocab_size

    def llama_model_desc(self, model, words, size):
        words.value = b"llama 0B of sums"

    def llama_init_from_model(self, model, params):
        if params.n_ctx > 10**6:
            return None
        self.params = params
        self.sequences = [[] for _ in range(params.n_seq_max)]
        self.open["context"] += 1
        return "context"

    def llama_free(self, context):
        self.open["context"] -= 1

    def llama_batch_init(self, size, embd, n_seq_max):
        assert size <= self.params.n_batch
        self.open["batch"] += 1
        return SimpleNamespace(
            n_tokens=0,
            token=[None] * size,
            pos=[None] * size,
            n_seq_id=[None] * size,
            seq_id=[[None] * n_seq_max for _ in range(size)],
            logits=[None] * size,
        )

    def llama_batch_free(self, batch):
        self.open["batch"] -= 1

    def llama_decode(self, context, batch):
        if self.fails_at == len(self.steps):
            return -3
        assert 0 < batch.n_tokens <= self.params.n_batch
        self.logits = {}
        counts = [0] * len(self.sequences)
        for row in range(batch.n_tokens):
            assert batch.n_seq_id[row] == 1
            tokens = self.sequences[batch.seq_id[row][0]]
            assert batch.pos[row] == len(tokens), "positions follow each other"
            tokens.append(batch.token[row])
            counts[batch.seq_id[row][0]] += 1
            if batch.logits[row]:
                values = np.zeros(self.vocab_size, dtype=np.float32)
                values[next_token(tokens) % self.vocab_size] = 1
                self.logits[row] = values
        cells, params = sum(map(len, self.sequences)), self.params
        assert cells <= params.n_ctx, "no cell is free"
        if not params.kv_unified:
            assert max(map(len, self.sequences)) <= params.n_ctx // params.n_seq_max
        self.most_cells = max(self.most_cells, cells)
        singles = sum(count == 1 for count in counts)
        self.steps.append((singles, batch.n_tokens - singles))
        return 0

    def llama_get_logits_ith(self, context, row):
        return self.logits[row].ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    def llama_get_memory(self, context):
        return "memory"

    def llama_memory_seq_rm(self, memory, seq_id, begin, end):
        assert (begin, end) == (-1, -1)
        self.sequences[seq_id] = []
