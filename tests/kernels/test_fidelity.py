"""MLX's own attention kernels, unmodified, compute in the simulator what MLX computes.

They are the text closest to ours that runs on every Mac, so what the simulator misreads shows here.
A new MLX may need a new function in metal_sim/include: this is the test that says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import metal_sim
import mlx.core as mx
import numpy as np
import pytest
from metal_sim.buffers import Output, input_buffer
from metal_sim.build import build
from metal_sim.launch import launch
from metal_sim.options import current
from metal_sim.text import KernelText
from metal_sim.toolchain import mlx_headers

NAMES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t"}
TOLERANCE = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}


@pytest.fixture(scope="module")
def text():
    path = mlx_headers() / "mlx/backend/metal/kernels/sdpa_vector.h"
    return KernelText(path.read_text(), path.name)


@dataclass
class Attention:
    """Arguments of an attention, and what MLX makes of them."""

    dtype: mx.Dtype
    dim: int
    heads: int = 4
    kv_heads: int = 2
    rows: int = 1
    keys_count: int = 70
    causal: bool = False
    mask: str | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.dim + self.rows)

        def normal(*shape: int) -> mx.array:
            return mx.array(rng.standard_normal(shape, np.float32)).astype(self.dtype)

        self.scale = self.dim**-0.5
        self.q = normal(1, self.heads, self.rows, self.dim)
        self.k = normal(1, self.kv_heads, self.keys_count, self.dim)
        self.v = normal(1, self.kv_heads, self.keys_count, self.dim)
        self.sink_values = normal(self.heads) if self.sinks else None
        self.mask_values = None
        if self.mask == "bool":
            chosen = rng.random((1, self.heads, self.rows, self.keys_count)) < 0.7
            self.mask_values = mx.array(chosen)
        elif self.mask == "float":
            self.mask_values = normal(1, self.heads, self.rows, self.keys_count)

    @property
    def constants(self) -> dict[str, bool]:
        return {
            "has_mask": self.mask is not None,
            "query_transposed": False,
            "do_causal": self.causal,
            "bool_mask": self.mask == "bool",
            "float_mask": self.mask == "float",
            "has_sinks": self.sinks,
        }

    @property
    def strides(self) -> list[int]:
        """Of heads and rows, for keys and then for values."""
        return [self.keys_count * self.dim, self.dim] * 2

    @property
    def mask_strides(self) -> list[int]:
        """Of keys, of queries and of heads."""
        return [1, self.keys_count, self.rows * self.keys_count]

    def expected(self) -> mx.array:
        mask = "causal" if self.causal else self.mask_values
        if self.mask == "float":
            mask = mask.astype(mx.float32)
        q, k, v = (array.astype(mx.float32) for array in (self.q, self.k, self.v))
        sinks = self.sink_values.astype(mx.float32) if self.sinks else None
        return mx.fast.scaled_dot_product_attention(
            q, k, v, scale=self.scale, mask=mask, sinks=sinks
        )

    def check(self, out: mx.array) -> None:
        error = mx.abs(out.astype(mx.float32).reshape(self.q.shape) - self.expected()).max()
        assert error.item() < TOLERANCE[self.dtype] * 2


def run(text, kernel, template, arguments, grid, threadgroup, constants=None):
    """``arguments`` are arrays and Outputs by buffer index; what is None isn't bound."""
    program = build(text, kernel, template=template, constants=constants)
    buffers = {}
    for index, value in arguments.items():
        if isinstance(value, Output):
            buffers[index] = value.buffer
        elif value is not None:
            buffers[index] = input_buffer(f"buffer {index}", value)
    launch(program, buffers, grid, threadgroup, current())


def ints(*values):
    return [mx.array([value], mx.int32) for value in values]


def sizes(*values):
    return [mx.array([value], mx.uint64) for value in values]


def sdpa_vector(text, case: Attention) -> mx.array:
    out = Output("out", case.q.shape, case.dtype)
    numbers = [
        *ints(case.heads // case.kv_heads, case.keys_count),
        *sizes(*case.strides),
        mx.array([case.scale], mx.float32),
    ]
    masked = [None, None, None, None, None]
    if case.mask:
        masks = [case.mask_values, None] if case.mask == "bool" else [None, case.mask_values]
        masked = [*masks, *ints(*case.mask_strides)]
    sinks = [case.sink_values, *ints(case.heads)] if case.sinks else []
    arguments = dict(enumerate([case.q, case.k, case.v, out, *numbers, *masked, *sinks]))
    template = f"<{NAMES[case.dtype]}, {case.dim}>"
    grid = (case.heads * 1024, case.rows, 1)
    run(text, "sdpa_vector", template, arguments, grid, (1024, 1, 1), case.constants)
    return out.array()


class TwoPasses:
    """The first pass leaves a partial result for each block of keys, the second merges them."""

    def __init__(self, text, case: Attention, blocks: int):
        self.text, self.case, self.blocks = text, case, blocks
        shape = (case.heads, case.rows, blocks)
        self.partials = Output("partials", (*shape, case.dim), case.dtype)
        self.sums = Output("sums", shape, mx.float32)
        self.maxima = Output("maxima", shape, mx.float32)
        self.outputs = [self.partials, self.sums, self.maxima]

    def arguments(self) -> dict[int, object]:
        case = self.case
        numbers = [
            *ints(case.keys_count),
            *sizes(*case.strides),
            mx.array([case.scale], mx.float32),
        ]
        tensors = dict(enumerate([case.q, case.k, case.v, *self.outputs]))
        return tensors | dict(enumerate(numbers, 7))

    def first(self) -> None:
        case = self.case
        arguments = self.arguments()
        if case.mask:
            arguments[13 if case.mask == "bool" else 14] = case.mask_values
            arguments |= dict(enumerate(ints(*case.mask_strides), 15))
        if case.sinks:
            arguments[18] = case.sink_values
        template = f"<{NAMES[case.dtype]}, {case.dim}>"
        shared = case.heads // case.kv_heads
        grid = (case.kv_heads * 32, shared, self.blocks * case.rows)
        constants = case.constants | {"blocks": self.blocks}
        threadgroup = (32, shared, case.rows)
        run(
            *(self.text, "sdpa_vector_2pass_1", template, arguments),
            *(grid, threadgroup, constants),
        )

    def first_shared(self, per_simdgroup: int) -> None:
        """The variant that reads keys once for all heads of a group."""
        case = self.case
        shared = case.heads // case.kv_heads
        name = NAMES[case.dtype]
        template = f"<{name}, {case.dim}, {case.dim}, {shared}, {per_simdgroup}>"
        grid = (case.kv_heads * 32, shared, self.blocks)
        run(
            *(self.text, "sdpa_vector_2pass_1_gqa", template, self.arguments()),
            *(grid, (32, shared, 1)),
        )

    def second(self) -> mx.array:
        case = self.case
        out = Output("out", case.q.shape, case.dtype)
        partials, sums, maxima = (output.array() for output in self.outputs)
        arguments = dict(enumerate([partials, sums, maxima, out, *ints(self.blocks)]))
        template = f"<{NAMES[case.dtype]}, {case.dim}>"
        grid = (case.heads * 1024, case.rows, 1)
        run(self.text, "sdpa_vector_2pass_2", template, arguments, grid, (1024, 1, 1))
        return out.array()


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_attention_agrees_with_mlx_in_each_type_and_size(text, dtype, dim):
    case = Attention(dtype, dim)
    case.check(sdpa_vector(text, case))


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize(
    "changes",
    [
        {"rows": 4, "causal": True},
        {"mask": "bool"},
        {"mask": "float", "rows": 2},
        {"sinks": True},
        {"heads": 8, "kv_heads": 1},
    ],
    ids=["causal", "bool mask", "float mask", "sinks", "one kv head"],
)
def test_attention_agrees_with_mlx_with_all_its_options(text, dtype, changes):
    case = Attention(dtype, 64, **changes)
    case.check(sdpa_vector(text, case))


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rows": 2, "causal": True, "keys_count": 300},
        {"mask": "bool"},
        {"mask": "float"},
        {"sinks": True},
    ],
    ids=["plain", "causal", "bool mask", "float mask", "sinks"],
)
def test_attention_in_two_passes_agrees_with_mlx(text, dtype, changes):
    case = Attention(dtype, 64, **changes)
    passes = TwoPasses(text, case, blocks=32)
    passes.first()
    case.check(passes.second())


@pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
def test_attention_for_a_group_of_heads_at_once_agrees_with_mlx(text, dtype):
    case = Attention(dtype, 128, heads=8, kv_heads=1, keys_count=300)
    passes = TwoPasses(text, case, blocks=64)
    passes.first_shared(per_simdgroup=2)
    case.check(passes.second())


def test_a_barrier_taken_out_of_mlx_s_kernel_is_found(text):
    barrier = "    threadgroup_barrier(mem_flags::mem_threadgroup);\n"
    after = "  }\n\n  // And write the output"
    assert barrier + after in text.text
    broken = KernelText(text.text.replace(barrier + after, after), "broken.h")
    with pytest.raises(metal_sim.KernelFault, match=r"race: .* of 'outputs'"):
        sdpa_vector(broken, Attention(mx.float32, 64))
