"""What doctor and benchmarks run on a GPU: every kernel in its cases, and arms that are timed."""

import mlx.core as mx
import numpy as np
import paging
import pytest

from mlxpage import acceptance
from mlxpage.bench import attention, bandwidth, runs
from mlxpage.cli import report
from mlxpage.metal import self_check
from mlxpage.metal.backend import Device


@pytest.fixture(autouse=True)
def fresh_kernels(metal):
    with paging.fresh_kernels():
        yield


@pytest.fixture
def gpu(monkeypatch):
    """One that has small caches, and short sequences."""
    here = Device("metal", "a GPU", 10**9, 10**9)
    monkeypatch.setattr(attention, "device", lambda: here)
    monkeypatch.setattr(attention, "ROTATION", 1)
    monkeypatch.setattr(attention, "RAGGED", (3, 70))


SHORT = ["8 x 128, float16", "copies of blocks"]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in SHORT else pytest.mark.full)
        for name in self_check.CASES
    ],
)
def test_the_kernels_are_right_in_every_case(monkeypatch, name):
    monkeypatch.setattr(self_check, "CASES", {name: self_check.CASES[name]})
    assert self_check.run_cases() == {name: None}


@pytest.mark.parametrize(
    "name, kernel, old, new",
    [
        ("copies of blocks", "copy_blocks.metal", "pairs[", "pairs[0 * "),
        ("8 x 128, float16", "write_kv.metal", "= slot % BLOCK_SIZE;", "= 0 * slot;"),
        ("8 x 128, float16", "merge_partials.metal", "run < runs; run++", "run + 1 < runs; run++"),
    ],
)
def test_a_wrong_kernel_is_named_by_its_case(monkeypatch, name, kernel, old, new):
    monkeypatch.setattr(self_check, "CASES", {name: self_check.CASES[name]})
    with paging.text_changed(kernel, old, new):
        assert self_check.run_cases()[name]


@pytest.mark.parametrize("context", [40, None], ids=["alike", "ragged"])
def test_what_is_timed_computes_the_same_thing(monkeypatch, gpu, context):
    case = attention.Case(attention.Shape(3, context, 4, 2, 64, 16), rotation=1)
    arms = case.arms()
    assert {attention.OURS, attention.APPENDING, attention.GATHERED} < set(arms)
    read = [arms[name](case.q, 0) for name in (attention.OURS, attention.GATHERED)]
    ours, gathered = (np.array(out.astype(mx.float32)) for out in read)
    assert np.abs(ours - gathered).max() <= paging.TOLERANCE[mx.bfloat16] * np.abs(gathered).max()
    for name in (attention.APPENDING, attention.CONTIGUOUS):
        assert arms[name](case.q, 0).shape == case.q.shape


def test_a_report_times_the_kernels_where_there_is_a_gpu(monkeypatch, gpu):
    monkeypatch.setattr(acceptance, "device", attention.device)
    monkeypatch.setattr(bandwidth, "copy_speed", lambda *_: 99.96e9)
    shape = attention.Shape(2, 20, 2, 1, 64, 16)
    monkeypatch.setattr(acceptance, "ATTENTION_SHAPES", {"2 x 20": shape})
    monkeypatch.setattr(runs, "WARM_UP_SECONDS", 0)
    monkeypatch.setattr(self_check, "CASES", {"one": lambda: None})
    assert acceptance.kernels() == {"cases": {"one": None}}
    found = acceptance.attention(repeats=2, launches=1)
    assert found["copy_gb_s"] == 100.0
    arms = found["shapes"]["2 x 20"]
    assert {attention.OURS, attention.CONTIGUOUS, attention.GATHERED} < set(arms)
    assert all(arm["us"] > 0 and arm["gb_s"] >= 0 for arm in arms.values())
    parts = {"kernels": acceptance.kernels(), "attention": found}
    record = {"created": "", "seconds": 1, "is_complete": True, "failures": [], "checks": []}
    assert "| 2 x 20 | gathered, then MLX | " in report.page(record | {"parts": parts})
