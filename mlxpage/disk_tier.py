"""Blocks of K and V on the disk, as the prefix cache's second tier."""

from __future__ import annotations

import time
import warnings
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from mlxpage.block_store import BlockStore
from mlxpage.metal.kv_cache import KVCache
from mlxpage.metal.layout import Spec, StateSpec, group_nbytes
from mlxpage.metal.model import Model
from mlxpage.prefix_cache import PrefixCache
from mlxpage.scheduler import Schedule

_AT_ONCE = 32  # blocks that are read from the pools together
_FILE_BYTES = 400  # of a file beside the content, and more
_LOOKED_AT = 128  # cached blocks in each pool, when some of them may be stored ahead


Found = tuple[int, int, bytes]
"""Cache group, block and key."""


class DiskTier:
    """The blocks of a store, by cache group and key; and what is put there of the pools.

    A block is stored when it's handed out again, at the latest, if the store's queue has room for
    it. To read it, the steps under way have to end, so those that are next in line go with it. What
    the pools hold and the store doesn't is stored when there's time.

    In the store goes first what the pools let go first: the end of a prompt before its head.
    """

    def __init__(self, store: BlockStore):
        self.store = store
        self._is_read = True
        self._unreadable: set[bytes] = set()
        """What is there and couldn't be read: nobody has to try again."""
        self._left: list[tuple[int, bytes]] | None = None
        """Cache groups and keys still to be stored when there's time, the first one last; None:
        nobody has looked since the last step."""

    # -- for the prefix cache --

    def holds(self, group: int, key: bytes) -> bool:
        name = _name(group, key)
        return self._is_read and name in self.store and name not in self._unreadable

    def keeps(self, group: int, key: bytes) -> bool:
        return _name(group, key) in self.store

    def read(self, group: int, key: bytes) -> memoryview | None:
        name = _name(group, key)
        content = self.store.get(name)
        if content is None and name in self.store:
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
        begins. Nobody waits for the disk: what its queue hasn't room for is lost."""
        self._left = None
        evicted = prefixes.take_evicted()
        kept = [_name(group, key) for group, _, key in evicted if self.keeps(group, key)]
        self.store.touch(kept)
        if len(kept) == len(evicted) or not self.store.may_write():
            return
        evicted = [each for each in evicted if not self.keeps(each[0], each[2])]
        # Not what is in use: the step that is about to begin may be the one that computes it. Nor
        # what is yet to be loaded, for somebody who was preempted meanwhile.
        loads = {load[:2] for load in schedule.loads}
        ahead = [each for each in prefixes.next_in_line(_LOOKED_AT) if each[:2] not in loads]
        self._store(cache, self._fitting([*evicted, *ahead[:_AT_ONCE]], cache))

    def store_some(self, prefixes: PrefixCache, cache: KVCache) -> bool:
        """Stores some of what is cached, as far as the queue has room for it, what was used last
        at last; True if there is more, now or when the queue has room."""
        if not self.store.may_write():
            return False
        if self._left is None:
            self._left = self._worth_storing(prefixes, cache)
        self._store_next(self._left, prefixes, cache)
        return bool(self._left)

    def store_within(self, seconds: float, prefixes: PrefixCache, cache: KVCache) -> None:
        """The same at once and as far as there is time, what was used last first."""
        end = time.monotonic() + seconds
        worth = self._worth_storing(prefixes, cache)
        left = worth[::-1]
        while left and self.store.may_write() and (rest := end - time.monotonic()) > 0:
            if not self._store_next(left, prefixes, cache):
                self.store.flush(rest)
        self.store.flush(max(0.0, end - time.monotonic()))
        self.store.touch(_name(*each) for each in reversed(worth))

    def _store_next(
        self, left: list[tuple[int, bytes]], prefixes: PrefixCache, cache: KVCache
    ) -> bool:
        """Takes from the end of `left` what can be stored at once; False if the queue has no room
        for the next of it."""
        blocks, room, sizes = [], self.store.room(), _block_sizes(cache)
        while left and len(blocks) < _AT_ONCE:
            group, key = left[-1]
            block = prefixes.find(group, key)
            if block is not None and not self.keeps(group, key):
                room -= sizes[group]
                if room < 0:
                    break
                blocks.append((group, block, key))
            left.pop()
        if not self._store(cache, blocks):
            left.clear()
        return bool(blocks) or not left

    def _worth_storing(self, prefixes: PrefixCache, cache: KVCache) -> list[tuple[int, bytes]]:
        """What was used last first, as much as the store may hold: more would drive that out."""
        found, left = [], self.store.limit_bytes
        sizes = _block_sizes(cache)
        if max(sizes) > self.store.queue_bytes:
            return []
        for group, _, key in prefixes.cached():
            left -= sizes[group] + _FILE_BYTES
            if left < 0:
                break
            found.append((group, key))
        return found

    def _fitting(self, blocks: list[Found], cache: KVCache) -> list[Found]:
        """Those that the queue takes. To read more would only cost time, and all that is read at
        once is in memory until the last of it is written."""
        fitting, room, sizes = [], self.store.room(), _block_sizes(cache)
        if max(sizes) > self.store.queue_bytes:
            return []
        for each in blocks:
            if sizes[each[0]] <= room:
                room -= sizes[each[0]]
                fitting.append(each)
        return fitting

    def _store(self, cache: KVCache, blocks: list[Found]) -> bool:
        """False if a step under way has failed: who reads its results will tell, and nothing that
        the pools hold can be trusted."""
        for group in {group for group, *_ in blocks}:
            own = [(block, key) for index, block, key in blocks if index == group]
            for start in range(0, len(own), _AT_ONCE):
                some = own[start : start + _AT_ONCE]
                try:
                    contents = cache.read(group, [block for block, _ in some])
                except Exception:
                    return False
                for (_, key), content in zip(some, contents, strict=True):
                    name = _name(group, key)
                    if self.store.put(name, content):
                        self._unreadable.discard(name)
        return True


def _block_sizes(cache: KVCache) -> list[int]:
    return [cache.block_nbytes(group) for group in range(len(cache.num_blocks))]


def _name(group: int, key: bytes) -> bytes:
    return bytes([group]) + key


def queue_bytes(model: Model, block_size: int, usual: int = 256_000_000) -> int:
    """For a store's queue: as much as usual, or a block, for states of large models are larger."""
    return max(usual, *group_nbytes(model.specs, block_size))


# Of what blocks hold, and of how a model is run: to be raised when either changes.
_LAYOUT = 1


def facts(model: Model, fingerprint: str, block_size: int) -> dict[str, Any]:
    """All that the content of a block depends on, beside its tokens and the salt in its key."""
    return {
        "layout": _LAYOUT,
        "mlx_lm": version("mlx-lm"),
        "model": fingerprint,
        "family": model.family,
        "logits": _dtype(model.logits_dtype),
        "block_size": block_size,
        "layers": [_of_layer(spec) for spec in model.specs],
    }


def _of_layer(spec: Spec) -> dict[str, Any]:
    if isinstance(spec, StateSpec):
        return {"states": [[list(array.shape), _dtype(array.dtype)] for array in spec.kept]}
    return {
        "window": spec.window,
        "kv_heads": spec.kv_heads,
        "head_dim": [spec.k_head_dim, spec.v_head_dim],
        "dtype": _dtype(spec.dtype),
        "bits": [spec.k_bits, spec.v_bits],
    }


def _dtype(dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")
