"""From a model's folder to an engine that serves it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from mlxpage import disk_tier
from mlxpage.block_store import BlockStore
from mlxpage.engine import Engine
from mlxpage.errors import EngineError
from mlxpage.metal import choice
from mlxpage.metal import memory as sizing
from mlxpage.metal import model as models
from mlxpage.model_store import fingerprint
from mlxpage.text import Tokenizer


def load_engine(
    closing: threading.Event,
    *,
    folder: Path,
    adapter: Path | None,
    sizes: dict[str, Any],
    limits: dict[str, int],
    prefix_cache: bool,
    disk: tuple[Path, int] | None,
    dtype: str | None,
    kv_bits: tuple[int | None, int | None],
    seed: int | None,
    max_inter_token_ms: float | Literal["auto"] | None,
    defaults: dict[str, Any],
    backend: str | None,
    on_status: Callable[[str], None] | None,
    on_loaded: Callable[[int, int], None] | None,
) -> Engine:
    """`sizes` are for the plan alone, `limits` for the engine too; `disk` is the folder of the
    prefix cache's second tier, and its limit in bytes. Ends with EngineError when `closing` is
    set."""

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
    before = disk and _fingerprint(folder, adapter)
    loaded = models.load(folder, adapter=adapter, dtype=dtype, on_bytes=on_bytes)
    loaded.quantise_cache(*kv_bits)
    served = choice.checked(loaded, sizes["block_size"], backend, on_status)
    # What a step takes depends on what the check has found.
    plan = sizing.plan(loaded, **sizes, **limits)
    tokenizer = Tokenizer(folder, loaded.config.get("eos_token_id"))
    options = {"defaults": defaults, "seed": seed, "backend": served, "prefix_cache": prefix_cache}
    options["max_inter_token_ms"] = max_inter_token_ms
    if before is not None and _fingerprint(folder, adapter) != before:
        _warn_of_no_disk(f"{folder} has changed while it was loaded")
        before = None
    if before is None:
        return Engine(loaded, tokenizer, plan, **options, **limits)
    told = disk_tier.facts(loaded, before, plan.block_size)
    queue_bytes = disk_tier.queue_bytes(loaded, plan.block_size)
    store = BlockStore(disk[0], told, disk[1], queue_bytes=queue_bytes)  # closed with the engine
    try:
        tier = disk_tier.DiskTier(store)
        return Engine(loaded, tokenizer, plan, tier=tier, **options, **limits)
    except BaseException:
        store.close()
        raise


def _fingerprint(folder: Path, adapter: Path | None) -> str | None:
    try:
        return fingerprint(folder, adapter)
    except (OSError, ValueError) as error:
        _warn_of_no_disk(f"{folder} can't be told from other models: {error}")
        return None


def _warn_of_no_disk(reason: str) -> None:
    with suppress(RuntimeWarning):  # where warnings are errors, the model is served all the same
        warnings.warn(
            f"{reason}. Blocks are neither stored in cache_dir nor read from it.",
            RuntimeWarning,
            stacklevel=2,
        )
