"""How the memory of an engine is divided; without MLX, for those who only read of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from mlxpage.sizes import gigabytes


class GroupKind(NamedTuple):
    """What the layers have in common that share block tables."""

    window: int | None = None
    """Positions that a row reads, its own among them; None: all."""
    has_states: bool = False
    """Whether they keep states instead of K and V."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The memory of an engine, in bytes: weights, pool and scratch stay within the budget, even
    when the pool is as large as it may be, and while it grows."""

    budget: int
    weights: int
    scratch: int
    pool: int
    block_size: int
    num_blocks: list[int]
    """Per cache group, as in `group_kinds`: what a pool may grow to."""
    start: list[int]
    """What it has at first; all of them if the number of blocks was given."""
    tokens: int
    """The longest sequence that the pool holds when it's alone."""
    kinds: list[GroupKind]
    is_fixed: bool = False
    """Whether the number of blocks was given: such a pool neither grows nor shrinks."""

    def describe(self) -> str:
        """One line for people."""
        size = gigabytes(self.pool) if self.is_fixed else f"up to {gigabytes(self.pool)}"
        pairs = list(zip(self.kinds, self.num_blocks, strict=True))
        parts = [f"{blocks:,} states" for kind, blocks in pairs if kind.has_states]
        if blocks := max((blocks for kind, blocks in pairs if not kind.has_states), default=0):
            parts.insert(0, f"{blocks:,} blocks x {self.block_size} tokens")
            parts[-1] += (
                f" = {self.tokens:,} tokens, room for {max(1, self.tokens // 1024):,} sequences of "
                "1,024"
            )
        return (
            f"pool {size} = {' and '.join(parts)}; weights {gigabytes(self.weights)}, "
            f"scratch {gigabytes(self.scratch)}, budget {gigabytes(self.budget)}"
        )
