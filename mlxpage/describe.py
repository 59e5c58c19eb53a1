"""What `mlxpage info` tells of the machine, and `mlxpage show` of how a model would be served and
would fit, before weights are loaded."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

import mlxpage
from mlxpage import model_store
from mlxpage.arguments import KVBits, check_options, kv_bits_pair
from mlxpage.metal import anatomy, choice, self_check
from mlxpage.metal import memory as sizing
from mlxpage.metal import model as models
from mlxpage.metal.backend import BLAS, device
from mlxpage.metal.layout import group_kinds
from mlxpage.metal.model import Model
from mlxpage.metal.plan import GroupKind


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
) -> dict[str, Any]:
    """The shape and the memory plan of a model that is on this machine. Raises what loading it
    would, as far as that shows without its weights; `OutOfMemory` is told instead."""
    options = {"block_size": block_size, "max_num_seqs": max_num_seqs}
    check_options(name, dtype=dtype, kv_bits=kv_bits, **options)
    folder = model_store.located(name)
    model_store.check_folder(folder)
    loaded = models.load(folder, dtype=dtype, weights=False)
    loaded.quantise_cache(*kv_bits_pair(kv_bits))
    states = sum(sum(spec.block_nbytes(block_size)) for spec in loaded.state_specs)
    facts = {
        "model": str(folder),
        "family": loaded.family,
        "layers": loaded.num_layers,
        "heads of K and V": ", ".join(
            sorted({f"{s.kv_heads} x {s.k_head_dim}" for s in loaded.kv_specs})
        )
        or "none",
        "windows": ", ".join(
            f"{sum(s.group == kind for s in loaded.specs)} layers {_named(kind)}"
            for kind in group_kinds(loaded.specs)
        ),
        **structure(loaded, block_size),
        "context": f"{loaded.context_length:,} tokens" if loaded.context_length else "not stated",
        "vocabulary": f"{loaded.vocab_size:,} tokens",
        "K/V of a token": f"{sum(s.bytes_per_token for s in loaded.kv_specs):,} bytes",
        "states of a sequence": f"{states:,} bytes" if states else "none",
        "sampling defaults": model_store.generation_defaults(folder) or "greedy",
    }
    try:
        plan = sizing.plan(loaded, memory=memory, **options)
        facts["fits"] = plan.describe()
    except mlxpage.OutOfMemory as error:
        facts["fits"] = f"no: {error}"
    return facts


def structure(loaded: Model, block_size: int = 16) -> dict[str, str]:
    """How a model will be served, as far as its structure shows: its weights may be unread."""
    why_not_rows = self_check.why_not_rows(loaded, block_size)
    ends = ", and states at the ends of blocks" if loaded.state_specs else ""
    return {
        "attention": anatomy.attention_kinds(loaded.specs, loaded.config),
        "step": "rows; the check at load decides"
        if why_not_rows is None
        else f"chunks or sequences, as the check at load decides: {why_not_rows}",
        "backend for it": _backend(loaded, block_size, why_not_rows),
        "prefix cache": f"of blocks of {block_size} tokens{ends}",
        "kv_bits": _quantisable(loaded),
    }


def _backend(loaded: Model, block_size: int, why_not_rows: str | None) -> str:
    reason = choice.why_no_kernels(loaded)
    if reason or why_not_rows:
        return f"reference, on a GPU too ({reason or 'kernels serve rows alone'})"
    wanted = choice.wanted()
    backend = choice.proven(wanted, lambda: self_check.check_kernels(loaded, block_size))
    on_a_gpu = "; kernels serve it on a GPU" if wanted.ops is choice.REFERENCE.ops else ""
    return f"{backend.name} ({backend.why}{on_a_gpu})"


def _quantisable(loaded: Model) -> str:
    """Of what K and V can be kept in 8 or 4 bits."""
    refusals = []
    for which, bits in (("K and V", (8, 8)), ("V alone", (None, 8)), ("K alone", (8, None))):
        try:
            loaded.quantised_specs(*bits)
        except mlxpage.UnsupportedModel as error:
            refusals.append(str(error))
        else:
            return f"8 or 4, of {which}" + "".join(f": {reason}" for reason in refusals[:1])
    return f"no: {refusals[0]}"


def _named(kind: GroupKind) -> str:
    if kind.has_states:
        return "with states"
    return "full" if kind.window is None else str(kind.window)
