"""What callers pass, checked before a file is opened or a token computed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from mlxpage.block_store import default_folder
from mlxpage.errors import InvalidRequest
from mlxpage.sampling_params import SamplingParams
from mlxpage.sizes import in_bytes

Prompt = str | list[int]
_CACHE_DISK = "20GB"
_TO_ENGINE = ("prefix_cache", "backend", "dtype", "seed", "max_inter_token_ms")
KVBits = int | tuple[int | None, int | None] | None


# -- of a model to be loaded --


def check_options(
    model: Any,
    *,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int = 512,
    dtype: str | None,
    adapter_path: Any = None,
    kv_bits: KVBits = None,
    num_blocks: int | None = None,
    prefix_cache: bool = True,
    cache_dir: Any = None,
    cache_disk: str | int | None = None,
    backend: str | None = None,
    seed: int | None = None,
    trim_after: float | None = None,
    memory_pressure: bool = False,
    monitor: bool = False,
    max_inter_token_ms: float | Literal["auto"] | None = None,
) -> None:
    """Raises InvalidRequest for what no model can be loaded with."""
    if not isinstance(model, (str, os.PathLike)):
        raise InvalidRequest(f"model is {model!r:.80}; it must be a folder or a name")
    _check_folder("adapter_path", adapter_path)
    _check_one_of("block_size", block_size, (16, 32))
    _check_one_of("dtype", dtype, (None, "float32", "float16", "bfloat16"))
    kv_bits_pair(kv_bits)
    check_bool("prefix_cache", prefix_cache)
    if disk_of(cache_dir, cache_disk) and not prefix_cache:
        raise InvalidRequest(
            "cache_dir and cache_disk keep the prefix cache on a disk; prefix_cache is False"
        )
    check_bool("memory_pressure", memory_pressure)
    check_bool("monitor", monitor)
    check_seconds("trim_after", trim_after)
    if max_inter_token_ms not in (None, "auto") and not (
        type(max_inter_token_ms) in (int, float) and 0 < max_inter_token_ms < math.inf
    ):
        raise InvalidRequest(
            f"max_inter_token_ms is {max_inter_token_ms!r:.80}; it must be milliseconds above 0, "
            "'auto' or None"
        )
    _check_one_of("backend", backend, (None, "metal", "cuda", "reference"))
    check_integer("max_num_batched_tokens", max_num_batched_tokens, least=1)
    check_integer("max_num_seqs", max_num_seqs, least=1)
    if max_num_seqs > max_num_batched_tokens:
        raise InvalidRequest(
            f"max_num_seqs is {max_num_seqs}; it must be from 1 to max_num_batched_tokens "
            f"({max_num_batched_tokens})"
        )
    if num_blocks is not None:
        check_integer("num_blocks", num_blocks, least=1)
    if seed is not None:
        check_integer("seed", seed)


def loading_options(
    model: Any,
    *,
    memory: str | int | None,
    num_blocks: int | None,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    kv_bits: KVBits,
    cache_dir: Any,
    cache_disk: str | int | None,
    **options,
) -> dict[str, Any]:
    """What every face of a model is loaded with, checked, as `load_engine` takes it. Raises
    InvalidRequest."""
    limits = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    disk = {"cache_dir": cache_dir, "cache_disk": cache_disk}
    sizes = {"num_blocks": num_blocks, "block_size": block_size}
    check_options(model, kv_bits=kv_bits, **sizes, **limits, **disk, **options)
    return {
        "sizes": sizes | {"memory": memory},
        "limits": limits,
        "disk": disk_of(**disk),
        "kv_bits": kv_bits_pair(kv_bits),
        **{name: options[name] for name in _TO_ENGINE},
    }


def kv_bits_pair(kv_bits: KVBits) -> tuple[int | None, int | None]:
    """Bits of K and of V; None: not quantised."""
    pair = tuple(kv_bits) if isinstance(kv_bits, (list, tuple)) else (kv_bits, kv_bits)
    known = [type(bits) in (int, type(None)) and bits in (None, 8, 4) for bits in pair]
    if len(pair) != 2 or not all(known):
        raise InvalidRequest(
            f"kv_bits is {kv_bits!r:.80}; it must be 8 or 4, a pair of those for K and V with None "
            "for what isn't quantised, or None"
        )
    return pair


def disk_of(cache_dir: Any, cache_disk: str | int | None) -> tuple[Path, int] | None:
    """Folder and limit in bytes of the prefix cache's second tier; None: there is none."""
    if cache_dir is None and cache_disk is None:
        return None
    _check_folder("cache_dir", cache_dir)
    cache_disk = _CACHE_DISK if cache_disk is None else cache_disk
    if isinstance(cache_disk, bool) or not in_bytes(cache_disk):
        raise InvalidRequest(f"cache_disk is {cache_disk!r:.80}; write it like '20GB'")
    return Path(cache_dir or default_folder()).expanduser(), in_bytes(cache_disk)


def _check_folder(name: str, value: Any) -> None:
    if value is None:
        return
    path = os.fsdecode(value) if isinstance(value, (str, os.PathLike)) else ""
    if not path or "\0" in path:
        raise InvalidRequest(f"{name} is {value!r:.80}; it must be a folder")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} is {value!r:.80}; it must be True or False")


def check_seconds(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 10**6:
        raise InvalidRequest(
            f"{name} is {value!r:.80}; it must be seconds, from 0 to 1,000,000, or None"
        )


def check_callable(name: str, value: Any) -> None:
    if value is not None and not callable(value):
        raise InvalidRequest(f"{name} is {value!r:.80}; it must be a function, or None")


def check_integer(name: str, value: Any, least: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} is {value!r:.80}; it must be an integer")
    if least is not None and value < least:
        raise InvalidRequest(f"{name} is {value}; it must be at least {least}")


def _check_one_of(name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed or isinstance(value, float):
        options = ", ".join(str(option) for option in allowed)
        raise InvalidRequest(f"{name} is {value!r:.80}; it must be one of {options}")


# -- of generations --


def is_prompt(value: Any) -> bool:
    """Whether it is one prompt, and not several."""
    if isinstance(value, (list, tuple)):
        return bool(value) and is_integer(value[0])
    return isinstance(value, str)


def is_conversation(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping)


def prompt_list(prompts: Iterable[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise InvalidRequest(
            f"prompts are a text, a list of token ids or a list of those, not {type_name(prompts)}"
        )
    return list(prompts)


def params_list(params: Any, count: int) -> list[SamplingParams]:
    """One for each of `count` prompts."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if not isinstance(params, (list, tuple)):
        found = type_name(params)
        raise InvalidRequest(f"params are SamplingParams or a list of them, not {found}")
    for given in params:
        if not isinstance(given, SamplingParams):
            raise InvalidRequest(f"a list of params holds SamplingParams, not {type_name(given)}")
    if len(params) != count:
        raise InvalidRequest(f"{len(params)} params for {count} prompts; give one, or one for each")
    return list(params)


def check_streamed(params: SamplingParams) -> None:
    if (params.best_of or 0) > params.n:
        raise InvalidRequest(
            f"best_of is {params.best_of} and n is {params.n}: which are best is known when all "
            "have ended. Use generate, or leave best_of out."
        )


def is_integer(value: Any) -> bool:
    """NumPy's integers too."""
    return hasattr(value, "__index__") and not hasattr(value, "__len__")


def type_name(value: Any) -> str:
    return type(value).__name__
