"""The texts in metal/, compiled for Metal or CUDA, and how they are launched."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlxpage.metal.backend import mx

# MLX passes arrays of fewer elements in another address space, and would compile again for it.
LEAST = 8
_THREADS = 256


# -- texts --


def _text(name: str) -> str:
    """A file of metal/: in the package when it is installed, else beside it.

    Without comments: MLX hashes the text at every call, and takes names in it for attributes.
    """
    package = Path(__file__).resolve().parents[2]
    for folder in (package / "metal", package.parent / "metal"):
        if (folder / name).is_file():
            lines = (folder / name).read_text(encoding="ascii").splitlines()
            return "\n".join(line.partition("//")[0].strip() for line in lines) + "\n"
    raise FileNotFoundError(
        f"{name} is neither in {package / 'metal'} nor in {package.parent / 'metal'}"
    )


def to_cuda(text: str) -> str:
    """Metal text as CUDA: pointers have no address spaces, threadgroup variables are shared."""
    text = re.sub(r"\b(device|constant|thread)\b ?", "", text)
    return re.sub(r"\bthreadgroup\b", "__shared__", text)


# Inputs and outputs, in the order of the texts.
_SIGNATURES = {
    "write_kv": ("k, v, k_pool, v_pool, slots, ints, after", "fence"),
    "gather_blocks": ("k_pool, v_pool, block_tables, lengths, ints, fence", "k, v"),
    "copy_blocks": ("k_from, v_from, k_pool, v_pool, pairs, ints, after", "fence"),
    "paged_attention": (
        "q, k, v, k_pool, v_pool, block_tables, work, ints, floats, sinks, after",
        "out, stats",
    ),
    "latent_attention": (
        "q, q_v, k_pool, v_pool, block_tables, work, ints, floats, after",
        "out, stats",
    ),
    "merge_partials": (
        "partials, stats, owners, row_starts, partial_starts, sinks, ints",
        "out",
    ),
}


@cache
def _kernel(name: str):
    inputs, outputs = (names.split(", ") for names in _SIGNATURES[name])
    source, header = _text(f"{name}.metal"), _text("common.h")
    make = mx.fast.metal_kernel
    if on_cuda():
        source, header = to_cuda(source), _text("cuda.h") + to_cuda(header)
        make = mx.fast.cuda_kernel
    return make(
        name=f"mlxpage_{name}",
        input_names=inputs,
        output_names=outputs,
        source=source,
        header=header,
    )


@cache
def on_cuda() -> bool:
    return mx.cuda.is_available()


class Launch(NamedTuple):
    """All of a call but its inputs, which is made once for every shape: a step has hundreds."""

    name: str
    template: list
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    output_shapes: list
    output_dtypes: list

    def __call__(self, *inputs: mx.array) -> list[mx.array]:
        return _kernel(self.name)(
            inputs=inputs,
            template=self.template,
            grid=self.grid,
            threadgroup=self.threadgroup,
            output_shapes=self.output_shapes,
            output_dtypes=self.output_dtypes,
        )


def one_thread_a_piece(name: str, template: dict, pieces: int, *outputs) -> Launch:
    threads = -(-pieces // _THREADS) * _THREADS
    return launch(name, template, (threads, 1, 1), _THREADS, *outputs)


def launch(name: str, template: dict, grid, threads: int, *outputs) -> Launch:
    """`grid` is in threads, `threads` are a threadgroup's, `outputs` (shape, dtype) pairs."""
    shapes, dtypes = zip(*outputs, strict=True)
    return Launch(name, list(template.items()), grid, (threads, 1, 1), shapes, dtypes)


def padded(array: np.ndarray) -> mx.array:
    """As an MLX array of at least 8 elements."""
    flat = array.reshape(-1)
    if flat.size < LEAST:
        flat = np.concatenate([flat, np.zeros(LEAST - flat.size, flat.dtype)])
    return mx.array(flat)


def at_least_8(array: mx.array) -> mx.array:
    return array if array.size >= LEAST else mx.pad(array.reshape(-1), (0, LEAST - array.size))
