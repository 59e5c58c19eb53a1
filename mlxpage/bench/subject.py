"""The model that is measured, before its weights are loaded: what workloads and pools go by."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpage import model_store
from mlxpage.arguments import KVBits, check_options, kv_bits_pair
from mlxpage.bench.workloads import Item, longest
from mlxpage.errors import InvalidRequest
from mlxpage.metal import model as models
from mlxpage.metal.layout import group_nbytes
from mlxpage.metal.model import Model
from mlxpage.sizes import in_bytes
from mlxpage.text import Tokenizer


@dataclass(frozen=True, slots=True)
class Subject:
    folder: Path
    model: Model
    """Without weights."""
    tokenizer: Tokenizer
    block_size: int

    @property
    def block_nbytes(self) -> int:
        """Of a block in each cache group together."""
        return sum(group_nbytes(self.model.specs, self.block_size))

    def blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def blocks_of(self, kv_memory: str) -> int:
        """Blocks that fit into a size like "1GB"."""
        size = in_bytes(kv_memory)
        if size is None or size < self.block_nbytes:
            raise InvalidRequest(
                f"--kv-memory is {kv_memory!r}; write it like 512MB, and at least "
                f"{self.block_nbytes:,} bytes, which is a block"
            )
        return size // self.block_nbytes

    def room_for(self, num_seqs: int, num_tokens: int) -> int:
        """Blocks with which so many sequences of so many tokens never wait for one, nor the copies
        of the blocks in which they part from what is cached."""
        return num_seqs * (self.blocks(num_tokens) + 2) + 1

    def check_lengths(self, items: list[Item]) -> None:
        """Raises InvalidRequest for what is longer than the model's context."""
        context = self.model.context_length
        if context is not None and (most := longest(items)) > context:
            raise InvalidRequest(
                f"the longest request has {most:,} tokens, prompt and output; the model's context "
                f"is {context:,}. Ask for shorter ones."
            )


def look_at(
    model: str | os.PathLike[str],
    *,
    dtype: str | None,
    kv_bits: KVBits,
    block_size: int,
    on_status: Callable[[str], None] | None,
    **_: Any,
) -> Subject:
    """Raises what loading the model would, as far as that shows without its weights."""
    check_options(model, dtype=dtype, kv_bits=kv_bits, block_size=block_size, max_num_seqs=1)
    folder = model_store.resolve(model, on_status=on_status)
    model_store.check_folder(folder)
    sketch = models.load(folder, dtype=dtype, weights=False)
    sketch.quantise_cache(*kv_bits_pair(kv_bits))
    tokenizer = Tokenizer(folder, sketch.config.get("eos_token_id"))
    return Subject(folder, sketch, tokenizer, block_size)
