"""What a forward comes to depends on every read of its pools, so no later write overtakes one."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models

from mlxpage import kernels
from mlxpage.backend import mx
from mlxpage.kernels.launch import Launch
from mlxpage.kv_cache import KVCache
from mlxpage.layout import Rows


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


def forward(model, position: int, count: int) -> None:
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
