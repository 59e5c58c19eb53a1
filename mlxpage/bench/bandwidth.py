"""How fast this machine moves memory, and how fast that would let a model decode."""

from __future__ import annotations

import os
import statistics
import time
from contextlib import nullcontext

from mlxpage.metal.backend import device, mx
from mlxpage.metal.model import Model

COPY_BYTES = 256 << 20
COPIES = 16
"""In a chain, each of the last one: one alone is over before a GPU has its full speed."""


def copy_speed(nbytes: int = COPY_BYTES, repeats: int = 5) -> float:
    """Bytes a second of a large elementwise copy, read and written ones, the median of some. On a
    CPU, where an operation of MLX has one core, every core copies a part."""
    streams = [None]
    if device().kind == "cpu":
        streams = [mx.new_thread_local_stream(mx.cpu) for _ in range(os.cpu_count() or 1)]
    parts = [mx.zeros((max(1, nbytes // 4 // len(streams)),), mx.float32) for _ in streams]
    mx.eval(parts)
    seconds = []
    for _ in range(repeats + 1):
        mx.synchronize()
        began = time.perf_counter()
        for _ in range(COPIES):
            for index, stream in enumerate(streams):
                with mx.stream(stream) if stream else nullcontext():
                    parts[index] = parts[index] + 1
        mx.eval(parts)
        mx.synchronize()
        seconds.append((time.perf_counter() - began) / COPIES)
    return 2 * sum(part.nbytes for part in parts) / statistics.median(seconds[1:])


def weight_bytes(model: Model) -> int | None:
    """Of the weights that a decode step reads: all but the embedding, if that isn't the head too.
    None for a mixture of experts, which reads as many as its tokens ask for."""
    import mlx.nn as nn
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    modules = [module for _, module in model.module.named_modules()]
    if any(isinstance(module, (SwitchLinear, QuantizedSwitchLinear)) for module in modules):
        return None
    embeddings = [m for m in modules if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding))]
    linears = [m for m in modules if isinstance(m, (nn.Linear, nn.QuantizedLinear))]
    heads = {linear.weight.shape[0] for linear in linears}
    unread = [m for m in embeddings if m.weight.shape[0] in heads]
    return model.nbytes - sum(_nbytes(module) for module in unread)


def _nbytes(module) -> int:
    return sum(value.nbytes for value in module.values() if isinstance(value, mx.array))


def cache_bytes(model: Model, num_tokens: float) -> float:
    """Of K, V and states that a decode step reads of a sequence so long; a state is written too."""
    kv = sum(
        spec.bytes_per_token * min(num_tokens, spec.window or num_tokens) for spec in model.kv_specs
    )
    return kv + 2 * sum(sum(spec.block_nbytes(1)) for spec in model.state_specs)


def step_bytes(model: Model, sequences: int, own: float, shared: float = 0.0) -> float | None:
    """Of a decode step: the weights once, and what `sequences` hold of `own` tokens each beyond
    what they share, which is read once."""
    weights = weight_bytes(model)
    if weights is None:
        return None
    together = cache_bytes(model, shared) if shared else 0.0
    return weights + together + sequences * (cache_bytes(model, shared + own) - together)
