"""Finds what sequences have in common: runs of blocks in several tables, to be read once for all.

Attention to a shared prefix is one dense product for the queries of all sequences, merged with each
one's attention to the rest by the sums of their exponentials: Hydragen (arXiv:2402.05099), which
FlashInfer and vLLM call cascade attention.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

# What a call of its own, and for each sequence the merging, cost about as much as reading: blocks.
_CALL_BLOCKS = 64
_MERGE_BLOCKS = 8
# Calls that read what is shared, one on each stream.
_READERS = 2
# Windows begin where their sequences happen to be: looked for is what a few blocks hold in common
# from a multiple of this on.
_STRETCH = 4


class Run(NamedTuple):
    """Some columns that hold the same blocks in the tables of some sequences."""

    sequences: np.ndarray  # two or more, ascending
    begin: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.begin


def common_runs(tables: np.ndarray, first: np.ndarray, last: np.ndarray) -> list[Run]:
    """The runs that save the most reading, none or one for each sequence.

    Args:
        tables: (S, M) block ids. A block is in the same column of all tables that have it.
        first: (S,) the first column that all rows of a sequence may read entirely.
        last: (S,) the column after the last one.
    """
    begin = -(-first // _STRETCH) * _STRETCH
    some = _not_alone(tables, begin, last)
    if not len(some):
        return []
    begin, last = begin[some], last[some]
    columns = begin[:, None] + np.arange((last - begin).max() + 1)
    taken = np.take_along_axis(tables[some], np.minimum(columns, tables.shape[1] - 1), axis=1)
    # What isn't to be read is like nothing else.
    taken = np.where(columns < last[:, None], taken, -1 - np.arange(len(some))[:, None])
    taken = taken.astype(np.int32)
    # Sorted, those with the longest runs in common are neighbours.
    order = taken.view(f"V{taken.itemsize * taken.shape[1]}").ravel().argsort()
    taken = taken[order]
    alike = (taken[1:] == taken[:-1]).argmin(axis=1)
    runs = []
    for i, j, length in _groups(alike):
        first = int(begin[order[i]])
        runs.append(Run(np.sort(some[order[i:j]]), first, first + length))
    return runs


def _not_alone(tables: np.ndarray, begin: np.ndarray, last: np.ndarray) -> np.ndarray:
    """The sequences whose first block is that of another one too: mostly none, and that is all
    that has to be known."""
    some = np.flatnonzero(begin < last)
    blocks = tables[some, begin[some]]
    _, which, counts = np.unique(blocks, return_inverse=True, return_counts=True)
    return some[counts[which] > 1]


def _groups(alike: np.ndarray) -> list[tuple[int, int, int]]:
    """Cuts a row of sequences, neighbours of which have `alike` (S - 1,) blocks in common, where
    that saves the most: (begin, end, blocks in common) of each group that saves something."""
    best = np.zeros(len(alike) + 2, np.int64)  # of the sequences before each place
    last = [(0, 0), (0, 0)]  # begin of the last group there, and its blocks
    for end in range(2, len(best)):
        # Of groups of two, three and more sequences.
        common = np.minimum.accumulate(alike[end - 2 :: -1])
        saved = best[end - 2 :: -1] + _saved(common, np.arange(2, end + 1))
        most = int(saved.argmax())
        saves = saved[most] > best[end - 1]
        best[end] = saved[most] if saves else best[end - 1]
        last.append((end - 2 - most, int(common[most])) if saves else (end - 1, 0))
    groups, end = [], len(alike) + 1
    while end:
        begin, blocks = last[end]
        if blocks:
            groups.append((begin, end, blocks))
        end = begin
    return groups


def _saved(blocks: np.ndarray, sequences: np.ndarray) -> np.ndarray:
    """Blocks that need not be read if so many sequences share so many, less what that costs."""
    return (blocks - _MERGE_BLOCKS) * (sequences - _READERS) - _CALL_BLOCKS


def without(tables: np.ndarray, runs: list[Run]) -> np.ndarray:
    """The tables (S, M) with the runs cut out, padded."""
    tables = tables.copy()
    for sequences, begin, end in runs:
        width = tables.shape[1] - end
        tables[sequences, begin : begin + width] = tables[sequences, end:]
        tables[sequences, begin + width :] = 0
    return tables
