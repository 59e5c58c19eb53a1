"""What doctor and benchmarks run on a GPU: every kernel in its cases, and arms that are timed."""

import mlx.core as mx
import numpy as np
import paging
import pytest

from mlxpage import acceptance
from mlxpage.cli import report
from mlxpage.metal import self_check, timing
from mlxpage.metal.backend import Device


@pytest.fixture(autouse=True)
def fresh_kernels(metal):
    with paging.fresh_kernels():
        yield


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
def test_what_is_timed_computes_the_same_thing(monkeypatch, context):
    monkeypatch.setattr(timing, "ROTATION", 0)
    if context is None:  # long ones take long in the simulator
        monkeypatch.setattr(timing, "_RAGGED", (3, 70))
    case = timing.AttentionCase(3, context, 4, 2, 64, 16)
    read = [attend(case.q, 0) for attend in (case.paged(case.scattered), case.gathered())]
    ours, gathered = (np.array(out.astype(mx.float32)) for out in read)
    assert np.abs(ours - gathered).max() <= paging.TOLERANCE[mx.bfloat16] * np.abs(gathered).max()
    appending = case.paged(case.scattered, append=True)(case.q, 0)
    assert appending.shape == case.contiguous()(case.q, 0).shape == case.q.shape


def test_arms_are_timed_in_turns_and_the_first_turn_does_not_count():
    turns = []

    class Case:
        q = mx.zeros(8)

    def arm(name):
        return lambda q, i: turns.append((name, i)) or q + 1

    times = timing.in_turns(Case, {"a": arm("a"), "b": arm("b")}, launches=2, repeats=3)
    assert turns == [("a", 0), ("a", 1), ("b", 0), ("b", 1)] * 4
    assert [len(times[name]) for name in "ab"] == [3, 3]
    summary = timing.summary([1.0, 2.0, 3.0], 4000)
    assert (summary["us"], summary["GB/s"]) == (2.0, 2.0)


def test_a_report_times_the_kernels_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(acceptance, "device", lambda: Device("metal", "a GPU", 10**9, 10**9))
    monkeypatch.setattr(timing, "ROTATION", 0)
    monkeypatch.setattr(timing, "copy_speed", lambda *_: 99.96)
    monkeypatch.setattr(acceptance, "ATTENTION_SHAPES", {"2 x 20": (2, 20, 2, 1, 64, 16)})
    monkeypatch.setattr(self_check, "CASES", {"one": lambda: None})
    assert acceptance.kernels() == {"cases": {"one": None}}
    found = acceptance.attention(repeats=2, launches=1)
    assert found["copy_gb_s"] == 100.0
    arms = found["shapes"]["2 x 20"]
    assert set(arms) == {"mlxpage", "gather + MLX", "MLX, contiguous"}
    assert all(arm["us"] > 0 and arm["GB/s"] >= 0 for arm in arms.values())
    parts = {"kernels": acceptance.kernels(), "attention": found}
    record = {"created": "", "seconds": 1, "is_complete": True, "failures": [], "checks": []}
    assert "| 2 x 20 | gather + MLX | " in report.page(record | {"parts": parts})
