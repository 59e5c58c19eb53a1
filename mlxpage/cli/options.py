"""Options that several commands have."""

from __future__ import annotations

import sys
from typing import Any

import click

from mlxpage.errors import InvalidRequest


def options(*options):
    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


sampling_options = options(
    click.option("--temp", "--temperature", "temperature", type=float, help="0 is greedy."),
    click.option("--top-p", type=float, help="Keep the likeliest tokens up to this probability."),
    click.option("--top-k", type=int, help="Keep this many of the likeliest tokens."),
    click.option("--min-p", type=float, help="Drop tokens below this share of the likeliest."),
    click.option("--repetition-penalty", type=float, help="Above 1: less repetition."),
    click.option("--seed", type=int, help="Same seed, same answer."),
    click.option("--stop", multiple=True, help="End the answer before this text; repeatable."),
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
        return int(text) if text.isdecimal() else text


kv_bits = click.option("--kv-bits", type=_KVBits(), help="Bits of K and V, 8 or 4; for each: 8,4.")

engine_options = options(
    click.option("--adapter-path", help="Folder of an adapter that mlx-lm has trained."),
    click.option("--memory", help="Budget for weights, pool and scratch: 4GB or 50%."),
    click.option("--num-blocks", type=int, help="Size of the pool in blocks, instead of a budget."),
    click.option("--block-size", type=int, default=16, show_default=True, help="16 or 32 tokens."),
    kv_bits,
    click.option("--cache-dir", help="Folder for blocks that outlive the process."),
    click.option("--cache-disk", help="What it may take, 20GB; alone: a folder in the cache."),
    click.option("--backend", help="metal, cuda or reference; else the best there is."),
    click.option("--dtype", help="float32, float16 or bfloat16."),
)


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
