"""What a forward comes to depends on every read of its pools, so no later write overtakes one.

Arrays that are not numbers show it: whatever is computed of one is none either.
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models

from mlxpage.metal import kernels
from mlxpage.metal.backend import mx
from mlxpage.metal.kernels.launch import Launch
from mlxpage.metal.kv_cache import KVCache
from mlxpage.metal.layout import Rows


@pytest.fixture(scope="module")
def model():
    return tiny_models.make("llama")


class Tainted:
    """Stands in for the kernels: reads give zeros, but NaN where a layer of the first forward
    reads. It notes what each write waits for."""

    def __init__(self, monkeypatch, cache: KVCache, layer: int):
        self.pool = cache.layers[layer].pool.inputs()[0]
        self.is_first = True
        self.waited_for: list[mx.array] = []
        monkeypatch.setattr(Launch, "__call__", lambda launch, *i: self.run(launch, i))

    def run(self, launch, inputs) -> list[mx.array]:
        writes = launch.name == "write_kv" or dict(launch.template).get("APPEND")
        if writes and not self.is_first:
            self.waited_for.append(inputs[-1])
        reads = launch.name in ("paged_attention", "gather_blocks")
        is_tainted = reads and self.is_first and any(array is self.pool for array in inputs)
        value = float("nan") if is_tainted else 0.0
        results = zip(launch.output_shapes, launch.output_dtypes, strict=True)
        return [mx.full(shape, value, dtype) for shape, dtype in results]


def forward(model, position: int, count: int, copies=()) -> None:
    """Of `count` tokens of one sequence."""
    tables = np.array([[1, 2, 3]], np.int32)
    model(
        Rows(
            tokens=np.arange(count, dtype=np.int32),
            positions=np.arange(position, position + count, dtype=np.int32),
            starts=np.array([0, count], np.int32),
            contexts=np.array([position + count], np.int32),
            block_tables=[tables],
            sample_rows=np.array([count - 1], np.int32),
            copies=[np.array(copies, np.int32)] if copies else [],
        )
    )


@pytest.mark.parametrize("count", [1, 9], ids=["a decode", "a chunk"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_write_waits_for_the_reads_of_every_layer_in_the_forward_before(
    model, monkeypatch, layer, count
):
    cache = KVCache(model.specs, [3], 16, kernels)
    model.bind(cache)
    try:
        tainted = Tainted(monkeypatch, cache, layer)
        forward(model, 0, count)
        tainted.is_first = False
        forward(model, count, 1)
    finally:
        model.bind(None)
    assert len(tainted.waited_for) == len(cache.layers)
    for array in tainted.waited_for:
        # Fences are integers: the bits of what the forward came to.
        numbers = array.view(mx.float32)
        assert mx.isnan(numbers).any().item(), "computed from what the layer has read"


@pytest.mark.parametrize("count", [1, 9], ids=["a decode", "a chunk"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_copy_waits_for_the_forward_before_and_every_write_for_the_copies(
    model, monkeypatch, layer, count
):
    cache = KVCache(model.specs, [3], 16, kernels)
    pool = cache.layers[layer].pool.inputs()[0]
    begun_after, written_after = [], []

    def run(launch, *inputs):
        value = 0.0
        if launch.name == "copy_blocks":
            begun_after.append(inputs[-1])
            value = float("nan") if inputs[0] is pool else inputs[-1].view(mx.float32).sum()
        elif launch.name == "write_kv" or dict(launch.template).get("APPEND"):
            written_after.append(inputs[-1])
        shapes = zip(launch.output_shapes, launch.output_dtypes, strict=True)
        return [
            mx.full(shape, value).view(dtype) if dtype == mx.int32 else mx.zeros(shape, dtype)
            for shape, dtype in shapes
        ]

    monkeypatch.setattr(Launch, "__call__", run)
    model.bind(cache)
    try:
        forward(model, 0, 10)
        before = cache.after
        written_after.clear()
        forward(model, 10, count, copies=[(3, 2), (1, 3)])
    finally:
        model.bind(None)
    # In two launches a layer: block 3 is read before it is written.
    assert len(begun_after) == 2 * len(cache.layers) and begun_after[0] is before
    assert len(written_after) == len(cache.layers)
    for array in written_after:
        assert mx.isnan(array.view(mx.float32)).any().item(), "it doesn't wait for the copies"


# -- of compiled forwards, whose launches a trace has made once --


class Traceable:
    """Stands in for the kernels with operations of MLX, so that a forward can be compiled on a CPU:
    what a launch gives is NaN if an input is, fences included, or the first block of a pool."""

    def __init__(self, monkeypatch):
        self.launches = 0
        monkeypatch.setattr(Launch, "__call__", lambda launch, *i: self.run(launch, i))

    def run(self, launch, inputs) -> list[mx.array]:
        self.launches += 1
        numbers = [array for array in inputs if array.dtype != mx.int32]
        if launch.name != "merge_partials":
            # Of the one layer whose pool holds ones.
            is_marked = inputs[3 if launch.name == "paged_attention" else 2].max() > 0.5
            numbers.append(mx.where(is_marked, inputs[-1].view(mx.float32), 0))
        nothing = sum(array.sum() * 0 for array in numbers)
        results = zip(launch.output_shapes, launch.output_dtypes, strict=True)
        return [
            (mx.zeros(shape) + nothing).view(dtype)
            if dtype == mx.int32
            else (mx.zeros(shape) + nothing).astype(dtype)
            for shape, dtype in results
        ]


def mark(cache: KVCache, layer: int, value: float) -> None:
    pool = cache.layers[layer].pool
    pool.fill(mx.full(pool.k.shape, value, pool.k.dtype), pool.v)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_compiled_forward_reads_after_the_last_one_and_comes_to_all_of_its_reads(
    model, monkeypatch, layer
):
    cache = KVCache(model.specs, [3], 16, kernels, fetches=False)
    model.bind(cache)
    try:
        traceable = Traceable(monkeypatch)
        for position in range(4):
            forward(model, position, 1)
        assert model._compiled.error is None and model._compiled._functions
        launches = traceable.launches

        mx.eval(cache.after)
        mark(cache, layer, float("nan"))
        forward(model, 4, 1)
        assert mx.isnan(cache.after.view(mx.float32)).any().item(), "it comes to what it has read"
        assert all(layer.pool.fence is cache.after for layer in cache.layers)

        mark(cache, layer, 1.0)
        forward(model, 5, 1)
        assert mx.isnan(cache.after.view(mx.float32)).any().item(), "it takes what came before it"
        assert traceable.launches == launches, "all of this is compiled"

        cache._forward.after = mx.zeros_like(cache.after)
        forward(model, 6, 1)
        assert not mx.isnan(cache.after.view(mx.float32)).any().item()
    finally:
        model.bind(None)
