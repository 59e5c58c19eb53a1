"""Blocks of K and V on the disk, as the prefix cache's second tier."""

from __future__ import annotations

import time
import warnings
from contextlib import suppress
from typing import Any

from mlxpage.block_store import BlockStore
from mlxpage.metal.kv_cache import KVCache
from mlxpage.metal.model import Model
from mlxpage.prefix_cache import PrefixCache
from mlxpage.scheduler import Schedule

_AT_ONCE = 32  # blocks that are read from the pools together
_LOOKED_AT = 128  # cached blocks in each pool, when some of them may be stored ahead


class DiskTier:
    """The blocks of a store, by cache group and key; and what is put there of the pools.

    A block is stored when it's handed out again, at the latest. To read it, the steps under way
    have to end, so those that are next in line go with it. What the pools hold and the store
    doesn't is stored when there's time.
    """

    def __init__(self, store: BlockStore):
        self.store = store
        self._is_read = True
        self._unreadable: set[bytes] = set()
        """What is there and couldn't be read: nobody has to try again."""

    # -- for the prefix cache --

    def holds(self, group: int, key: bytes) -> bool:
        name = _name(group, key)
        return self._is_read and name in self.store and name not in self._unreadable

    def read(self, group: int, key: bytes) -> memoryview | None:
        name = _name(group, key)
        content = self.store.get(name)
        if content is None:
            self._unreadable.add(name)
        return content

    def discard(self, group: int, key: bytes) -> None:
        self.store.discard(_name(group, key))

    def stop_reading(self, error: Exception) -> None:
        """Tells once that what is stored can't be used, and why."""
        self._is_read = False
        with suppress(RuntimeWarning):  # where warnings are errors, all requests would end by it
            warnings.warn(
                f"blocks from {self.store.folder} can't be put into the pool: "
                f"{type(error).__name__}: {error}. They aren't used any more; prompts are computed "
                "instead.",
                RuntimeWarning,
                stacklevel=2,
            )

    # -- from the pools --

    def store_evicted(self, prefixes: PrefixCache, cache: KVCache, schedule: Schedule) -> None:
        """Stores what the plan of a step has handed out again; to be called before that step
        begins."""
        if evicted := prefixes.take_evicted():
            # Not what is in use: the step that is about to begin may be the one that computes it.
            blocks = [*evicted, *prefixes.next_in_line(_LOOKED_AT)[:_AT_ONCE]]
            # Nor what is yet to be loaded, for somebody who was preempted meanwhile.
            loads = {load[:2] for load in schedule.loads}
            self._store(cache, [block for block in blocks if block[:2] not in loads])

    def store_some(self, prefixes: PrefixCache, cache: KVCache) -> bool:
        """Stores some of what only the pools hold; True if there is more."""
        if self.store.why_not_writing is not None:
            return False
        alone = prefixes.cached_alone()
        self._store(cache, alone[:_AT_ONCE])
        return len(alone) > _AT_ONCE

    def store_within(self, seconds: float, prefixes: PrefixCache, cache: KVCache) -> None:
        """Stores what only the pools hold, what was used last first, as far as there is time."""
        end = time.monotonic() + seconds
        alone = prefixes.cached_alone()[::-1]
        while alone and time.monotonic() < end and self.store.why_not_writing is None:
            self._store(cache, alone[:_AT_ONCE])
            del alone[:_AT_ONCE]

    def _store(self, cache: KVCache, blocks: list[tuple[int, int, bytes]]) -> None:
        """`blocks` are (cache group, block, key) each."""
        for group in {group for group, *_ in blocks}:
            own = [(block, key) for index, block, key in blocks if index == group]
            for start in range(0, len(own), _AT_ONCE):
                some = own[start : start + _AT_ONCE]
                try:
                    contents = cache.read(group, [block for block, _ in some])
                except Exception:
                    return  # a step under way has failed: who reads its results will tell
                for (_, key), content in zip(some, contents, strict=True):
                    self._put(_name(group, key), content)

    def _put(self, name: bytes, content: memoryview) -> None:
        self._unreadable.discard(name)
        if not self.store.put(name, content) and self.store.why_not_writing is None:
            self.store.flush()  # its queue was full
            self.store.put(name, content)


def _name(group: int, key: bytes) -> bytes:
    return bytes([group]) + key


def facts(model: Model, fingerprint: str, block_size: int) -> dict[str, Any]:
    """All that the content of a block depends on, beside its tokens and the salt in its key."""
    return {
        "model": fingerprint,
        "family": model.family,
        "logits": _dtype(model.logits_dtype),
        "block_size": block_size,
        "layers": [
            {
                "window": spec.window,
                "kv_heads": spec.kv_heads,
                "head_dim": [spec.k_head_dim, spec.v_head_dim],
                "dtype": _dtype(spec.dtype),
                "bits": [spec.k_bits, spec.v_bits],
            }
            for spec in model.specs
        ],
    }


def _dtype(dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
