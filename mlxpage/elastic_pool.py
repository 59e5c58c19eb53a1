"""The blocks of an engine: as numbers, as arrays, and how many there are."""

from __future__ import annotations

import warnings
from contextlib import suppress
from types import ModuleType

from mlxpage.cache_group import CacheGroup, StateGroup
from mlxpage.metal.backend import mx
from mlxpage.metal.kv_cache import KVCache
from mlxpage.metal.layout import group_nbytes
from mlxpage.metal.model import Model
from mlxpage.metal.plan import GroupKind, Plan
from mlxpage.sizes import gigabytes


class ElasticPool:
    """Keeps the arrays as large as the cache groups say. It belongs to the engine's thread."""

    def __init__(self, model: Model, plan: Plan, ops: ModuleType):
        self._model: Model | None = model
        self._ops = ops
        self.groups = cache_groups(plan)
        self.block_nbytes = group_nbytes(model.specs, plan.block_size)
        """Of one block of each group, in all its layers."""
        self.num_grown = self.num_shrunk = 0
        self.has_failed = False
        """Whether a pool could not grow, and is at its limit now: some requests may not fit."""
        self.make_arrays()

    @property
    def num_blocks(self) -> list[int]:
        return [group.pool.num_blocks for group in self.groups]

    @property
    def used_nbytes(self) -> int:
        """Of the blocks that somebody uses."""
        pairs = zip(self.groups, self.block_nbytes, strict=True)
        return sum(group.pool.num_used * nbytes for group, nbytes in pairs)

    @property
    def nbytes(self) -> int:
        cache = self._model and self._model.cache
        return cache.nbytes if cache else 0

    def make_arrays(self) -> None:
        """Full of zeros, as large as the groups are."""
        block_size, fetches = self.groups[0].block_size, self._model.fetches
        specs, num_blocks = self._model.specs, self.num_blocks
        self._model.bind(KVCache(specs, num_blocks, block_size, self._ops, fetches=fetches))

    def follow(self, plan: Plan) -> None:
        """Takes the room to begin with, which a trimmed pool keeps, from another plan."""
        for group, start in zip(self.groups, plan.start, strict=True):
            group.pool.start = start

    def grow(self, group: int, num_blocks: int, *, in_flight: bool = False) -> bool:
        """Makes the arrays of a group so large. False if that can't be: there is no memory for it,
        whatever the budget says, and the group's pool is at its limit then; or a step `in_flight`
        has failed, and who reads its results will tell."""
        if self._model.cache is None:  # they are made before the next step
            return True
        try:
            mx.synchronize()
        except Exception as error:
            if not in_flight:
                self._stay(group, num_blocks, error)
            return False
        sizes = self.num_blocks
        sizes[group] = num_blocks
        try:
            self._model.cache.resize(sizes)
        except Exception as error:  # MLX raises RuntimeError, and others
            self._stay(group, num_blocks, error)
            return False
        self.num_grown += 1
        return True

    def _stay(self, group: int, wanted: int, error: Exception) -> None:
        pool = self.groups[group].pool
        pool.limit = pool.num_blocks
        self.has_failed = True
        with suppress(RuntimeWarning):  # where warnings are errors, all requests would end by it
            warnings.warn(
                f"the pool can't grow from {pool.num_blocks:,} blocks to {wanted:,}, though the "
                f"budget allows it: {type(error).__name__}: {error}. It stays at "
                f"{gigabytes(self.nbytes)}; set_memory lets it try again.",
                RuntimeWarning,
                stacklevel=2,
            )

    def shrink(self, moves: list[list[tuple[int, int]]]) -> None:
        """Makes the arrays as small as the groups are now, moving what these have moved. If it
        raises, what the blocks hold is lost."""
        if self._model.cache is not None:
            mx.synchronize()
            self._model.cache.resize(self.num_blocks, moves)
        self.num_shrunk += 1

    def close(self) -> None:
        self._model = None


def cache_groups(plan: Plan) -> list[CacheGroup]:
    """What counts the blocks of a plan."""
    return [
        _group(kind, start, plan.block_size, limit)
        for kind, start, limit in zip(plan.kinds, plan.start, plan.num_blocks, strict=True)
    ]


def _group(kind: GroupKind, num_blocks: int, block_size: int, limit: int) -> CacheGroup:
    if kind.has_states:
        return StateGroup(num_blocks, block_size, limit=limit)
    return CacheGroup(num_blocks, block_size, kind.window, limit=limit)
