"""What `mlxpage info` tells: the machine, and how a model would fit, before weights are loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import mlxpage
from mlxpage import model_store
from mlxpage.arguments import KVBits, check_options, kv_bits_pair
from mlxpage.metal import choice, self_check
from mlxpage.metal import memory as sizing
from mlxpage.metal import model as models
from mlxpage.metal.backend import BLAS, device
from mlxpage.metal.layout import GroupKind, group_kinds


def machine() -> dict[str, Any]:
    """Versions, device and memory; which backend, and why. Kernels are tried on a common shape."""
    here = device()
    backend = choice.proven(choice.wanted(), self_check.check_attention)
    facts = {
        "mlxpage": mlxpage.__version__,
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
        "device": f"{here.kind} ({here.name})",
        "memory": sizing.gigabytes(here.memory),
        "backend": f"{backend.name} ({backend.why})",
        "cache folder": str(model_store.cache_dir()),
    }
    if here.kind == "cpu":
        facts["BLAS"] = BLAS or "MLX's own, slow (install OpenBLAS)"
    return facts


def model(
    name: str | os.PathLike[str],
    *,
    memory: str | int | None = None,
    block_size: int = 16,
    max_num_seqs: int = 32,
    dtype: str | None = None,
    kv_bits: KVBits = None,
    on_status: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """A model's shape and its memory plan. Raises what loading it would, as far as that shows
    without its weights; `OutOfMemory` is told instead."""
    options = {"block_size": block_size, "max_num_seqs": max_num_seqs}
    check_options(name, dtype=dtype, kv_bits=kv_bits, **options)
    folder = model_store.resolve(name, on_status=on_status)
    model_store.check_folder(folder)
    loaded = models.load(folder, dtype=dtype, weights=False)
    loaded.quantise_cache(*kv_bits_pair(kv_bits))
    facts = {
        "model": str(folder),
        "family": loaded.family,
        "layers": len(loaded.specs),
        "heads of K and V": ", ".join(
            sorted({f"{s.kv_heads} x {s.k_head_dim}" for s in loaded.kv_specs})
        )
        or "none",
        "windows": ", ".join(
            f"{sum(s.group == kind for s in loaded.specs)} layers {_named(kind)}"
            for kind in group_kinds(loaded.specs)
        ),
        "context": f"{loaded.context_length:,} tokens" if loaded.context_length else "not stated",
        "vocabulary": f"{loaded.vocab_size:,} tokens",
        "K/V of a token": f"{sum(s.bytes_per_token for s in loaded.kv_specs):,} bytes",
        "sampling defaults": model_store.generation_defaults(folder) or "greedy",
    }
    if (wanted := choice.wanted()).ops is not choice.REFERENCE.ops:
        backend = choice.proven(wanted, lambda: self_check.check_kernels(loaded, block_size))
        facts["backend for it"] = f"{backend.name} ({backend.why})"
    try:
        plan = sizing.plan(loaded, memory=memory, **options)
        facts["fits"] = plan.describe()
    except mlxpage.OutOfMemory as error:
        facts["fits"] = f"no: {error}"
    return facts


def _named(kind: GroupKind) -> str:
    if kind.has_states:
        return "with states"
    return "full" if kind.window is None else str(kind.window)
