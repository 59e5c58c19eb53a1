"""Options that several commands have."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import click
from click.shell_completion import CompletionItem

from mlxpage.cli import aliases
from mlxpage.cli.settings import setting
from mlxpage.errors import InvalidRequest, MlxpageError


def options(*options):
    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


class ModelName(click.ParamType):
    """A folder, an alias, a demo model or one of the hub; an alias becomes what it stands for."""

    name = "model"

    def convert(self, value, param, ctx):
        return aliases.expand(value)

    def shell_complete(self, ctx, param, incomplete):
        """Folders, and what is on this machine."""
        from mlxpage import model_store

        known = {*model_store.DEMO_MODELS, *model_store.names()}
        with suppress(MlxpageError):
            known |= set(aliases.read())
        fitting = [name for name in sorted(known) if name.startswith(incomplete)]
        # Folders first: bash forgets what came before them.
        return [CompletionItem(incomplete, type="dir"), *map(CompletionItem, fitting)]


model_argument = click.argument("model", type=ModelName())

sampling_options = options(
    setting("--temp", "--temperature", "temperature", type=float, help="0 is greedy."),
    setting("--top-p", type=float, help="Keep the likeliest tokens up to this probability."),
    setting("--top-k", type=int, help="Keep this many of the likeliest tokens."),
    setting("--min-p", type=float, help="Drop tokens below this share of the likeliest."),
    setting("--repetition-penalty", type=float, help="Above 1: less repetition."),
    setting("--seed", type=int, help="Same seed, same answer."),
    setting("--stop", multiple=True, help="End the answer before this text; repeatable."),
)


class _KVBits(click.ParamType):
    name = "bits"

    def convert(self, value, param, ctx):
        """8, 4, or a pair: as `LLM` takes them, which says what is wrong with others."""
        parts = [self._one(part.strip()) for part in str(value).split(",")]
        return parts[0] if len(parts) == 1 else tuple(parts)

    @staticmethod
    def _one(text: str):
        if text.lower() == "none":
            return None
        with suppress(ValueError):  # of more digits than Python reads, too
            return int(text)
        return text


memory = setting("--memory", help="Budget for weights, pool and scratch: 4GB or 50%.")
block_size = setting(
    "--block-size", type=int, default=16, show_default=True, help="16 or 32 tokens."
)
dtype = setting("--dtype", help="float32, float16 or bfloat16.")
kv_bits = setting("--kv-bits", type=_KVBits(), help="Bits of K and V, 8 or 4; for each: 8,4.")

_pool = (
    setting("--adapter-path", is_place=True, help="Folder of an adapter that mlx-lm has trained."),
    memory,
    setting("--num-blocks", type=int, help="Size of the pool in blocks, instead of a budget."),
    block_size,
    kv_bits,
)
_disk = (
    setting("--cache-dir", is_place=True, help="Folder for blocks that outlive the process."),
    setting("--cache-disk", help="What it may take, 20GB; alone: a folder in the cache."),
)
_backend = (
    setting("--backend", help="metal, cuda or reference; else the best there is."),
    dtype,
)
engine_options = options(*_pool, *_disk, *_backend)
measured_engine_options = options(*_pool, *_backend)
"""Without a disk, which would be measured too."""

stats = setting("--stats/--no-stats", default=None, help="Figures after an answer, on stderr.")


def split(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of sampling, and of the engine."""
    engine_names = (
        *("memory", "num_blocks", "block_size", "kv_bits"),
        *("adapter_path", "cache_dir", "cache_disk", "backend", "dtype"),
    )
    engine = {name: options.pop(name) for name in engine_names}
    return options, engine


def read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is no text in {error.encoding}") from None
