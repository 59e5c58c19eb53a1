"""Blocks of K and V in files, so that a prefix is found again after a restart; no MLX here.

BlockStore(folder, facts, limit_bytes)   put, get: what an engine uses
stats, clear, verify                     of a folder, whoever uses it
"""

from pathlib import Path

from mlxpage.block_store.folder import clear, stats, verify
from mlxpage.block_store.store import BlockStore

__all__ = ["BlockStore", "clear", "default_folder", "stats", "verify"]


def default_folder() -> Path:
    """`blocks` in this package's folder of the user's cache."""
    from mlxpage.model_store import cache_dir

    return cache_dir() / "blocks"
