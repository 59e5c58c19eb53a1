"""Attention by the kernels is what its definition says, whatever the shapes and options."""

from __future__ import annotations

import itertools
from dataclasses import replace

import metal_sim
import numpy as np
import paging
import pytest
from metal.test_reference import defined
from paging import ONE_RUN, TOLERANCE

from mlxpage.errors import UnsupportedModel
from mlxpage.metal import kernels
from mlxpage.metal.backend import mx
from mlxpage.metal.layout import Format


@pytest.fixture(autouse=True)
def fresh_kernels(metal):
    with paging.fresh_kernels():
        yield


# Of the queries and of the pool.
DTYPES = {
    "float32": (mx.float32, mx.float32),
    "float16": (mx.float16, mx.float16),
    "bfloat16": (mx.bfloat16, mx.bfloat16),
    "float32 over float16": (mx.float32, mx.float16),
    "float32 over bfloat16": (mx.float32, mx.bfloat16),
}
# Of K's and V's codes.
BITS = {"plain": (None, None), "8": (8, 8), "4": (4, 4), "8/plain": (8, None), "plain/4": (None, 4)}
VALUES = {
    "dtype": list(DTYPES),
    "bits": list(BITS),
    "head": [64, 80, 96, 112, 128, 192, 256, "192/128"],
    "group": [1, 2, 3, 4, 6, 7, 8, 12, 16],
    "block_size": [16, 32],
    "rows": ["one", "appended", "several"],
    "window": [None, 1, 13, 100],
    "sinks": [False, True],
    "softcap": [0.0, 1.5],
    "split": [False, True],
    "batch": [1, 3, 9],
    "tiling": ["metal", "cuda"],
    "order": ["forward", "reverse", "shuffled"],
}


def is_possible(setting: dict) -> bool:
    """A window of one position is a single run of keys. Codes come in groups of 32 or 64, and are
    written before."""
    if setting.get("split") and setting.get("window") == 1:
        return False
    is_quantised = setting.get("bits", "plain") != "plain"
    return not is_quantised or (
        setting.get("head") not in (80, 112) and setting.get("rows") != "appended"
    )


def name(setting: dict) -> str:
    return ", ".join(str(value) for value in setting.values())


def sequences(rng, setting: dict) -> list[tuple[int, int]]:
    """As (context, rows). The first one's window begins in the block before its end; those beyond
    two are shorter, with a row each, for the sake of time."""
    count, block_size = setting["batch"], setting["block_size"]
    contexts = rng.integers(1, 601, count)
    contexts[2:] = -(-contexts[2:] // 4)
    if setting["split"]:
        contexts[0] = block_size * rng.integers(6, 600 // block_size) + rng.integers(1, 12)
    rows = np.ones(count, int)
    if setting["rows"] == "several":
        rows[:2] = rng.integers([1, 2], 9)[:count]
    return [(c, min(c, r)) for c, r in zip(contexts.tolist(), rows.tolist(), strict=True)]


def check(setting: dict, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dtype, kv_dtype = DTYPES[setting["dtype"]]
    k_dim, _, v_dim = str(setting["head"]).partition("/")
    kv_heads = int(rng.integers(1, 4 if setting["group"] < 4 else 3))
    case = paging.case(
        rng,
        sequences(rng, setting),
        dtype,
        kv_dtype,
        block_size=setting["block_size"],
        window=setting["window"],
        sinks=setting["sinks"],
        heads=(kv_heads, setting["group"], int(k_dim), int(v_dim or k_dim)),
    )
    bits = BITS[setting["bits"]]
    run_length = setting["block_size"] if setting["window"] == 13 else 64
    softcap = setting["softcap"]
    with (
        paging.cut(run_length if setting["split"] else ONE_RUN, setting["tiling"] == "cuda"),
        metal_sim.options(order=setting["order"], seed=seed),
    ):
        out = paging.attended(
            *(case, dtype, kv_dtype),
            softcap=softcap,
            split=setting["split"],
            bits=bits,
            append=setting["rows"] == "appended",
        )
    error = paging.error(out, paging.exact(paging.coded_case(case, kv_dtype, bits), softcap))
    assert error < TOLERANCE[dtype], f"{error:.2g} {case}"


def covering(strength: int):
    settings = paging.cover(VALUES, strength, is_possible)
    return [pytest.param(each, i, id=name(each)) for i, each in enumerate(settings)]


@pytest.mark.parametrize("setting, seed", covering(2))
def test_attention_is_right_with_every_two_values_together(setting, seed):
    check(setting, seed)


@pytest.mark.full
@pytest.mark.parametrize("setting, seed", covering(3))
def test_attention_is_right_with_every_three_values_together(setting, seed):
    check(setting, 1000 + seed)


@pytest.mark.parametrize("strength", [2, 3])
def test_the_settings_leave_out_no_combination(strength):
    settings = [each.values[0] for each in covering(strength)]
    assert all(is_possible(setting) for setting in settings)
    for names in itertools.combinations(VALUES, strength):
        together = {tuple(setting[n] for n in names) for setting in settings}
        wanted = set(itertools.product(*(VALUES[n] for n in names)))
        missing = wanted - together
        assert not any(is_possible(dict(zip(names, m, strict=True))) for m in missing), names


def test_the_oracle_of_these_tests_is_the_one_of_the_reference():
    rng = np.random.default_rng(5)
    for window, sinks in itertools.product([None, 1, 13], [False, True]):
        case = paging.case(
            *(rng, [(40, 1), (70, 8), (9, 9)]),
            window=window,
            sinks=sinks,
            heads=(2, 3, 16, 24),
        )
        assert paging.error(paging.exact(case), defined(case)) < 1e-14


# -- plain cases --

# Queries of a group and rows that fill their registers, and that don't; runs that are merged.
PLAIN = {
    "one position": ([(1, 1)], {}),
    "a full block": ([(16, 1)], {}),
    "a block and one": ([(17, 1), (33, 2)], {}),
    "all rows of a sequence": ([(8, 8), (3, 3)], {}),
    "rows on both sides of a block's end": ([(18, 5)], {"window": 3}),
    "a window longer than everything": ([(20, 1), (90, 1)], {"window": 1000}),
    "a window that ends where a block begins": ([(48, 1), (49, 1), (50, 1)], {"window": 16}),
    "one head of everything": ([(300, 1), (2, 1)], {"heads": (1, 1, 64, 64)}),
    "a group of many heads": ([(100, 3)], {"heads": (1, 20, 64, 32)}),
    "a last run of a single key": ([(193, 1), (65, 1)], {"run": 64}),
    "sequences that are not cut beside one that is": ([(5, 1), (64, 1), (599, 1)], {"run": 64}),
    "several rows of runs": ([(200, 4), (40, 8), (7, 1)], {"run": 32, "sinks": True}),
    "a run that no window reaches": ([(70, 8)], {"run": 16, "window": 2, "sinks": True}),
}


@pytest.mark.parametrize("cuda", [False, True], ids=["metal's tiling", "cuda's tiling"])
@pytest.mark.parametrize("which", PLAIN)
def test_attention_of_plain_cases(which, cuda, thread_order):
    sequences, options = PLAIN[which]
    options = {"heads": (2, 3, 64, 64), "run": ONE_RUN} | options
    run = options.pop("run")
    case = paging.case(np.random.default_rng(len(which)), sequences, **options)
    with paging.cut(run, cuda):
        out = paging.attended(case, mx.float32, mx.float32, split=run < ONE_RUN)
    assert paging.error(out, paging.exact(case)) < TOLERANCE[mx.float32]


APPENDED = {
    "a first row behind one that fills a block": ([(1, 1), (16, 1)], {"heads": (1, 3, 64, 64)}),
    "a first row and a last run of nothing else": ([(1, 1), (65, 1), (33, 1)], {"run": 32}),
    "a first row in a window": ([(1, 1), (17, 1), (48, 1)], {"window": 1}),
}  # fmt: skip


@pytest.mark.parametrize("cuda", [False, True], ids=["metal's tiling", "cuda's tiling"])
@pytest.mark.parametrize("which", APPENDED)
def test_attention_of_rows_that_are_appended(which, cuda, thread_order):
    sequences, options = APPENDED[which]
    options = {"heads": (2, 3, 64, 64), "run": ONE_RUN} | options
    run = options.pop("run")
    case = paging.case(np.random.default_rng(1), sequences, **options)
    if which == "a first row behind one that fills a block":
        case = side_by_side(case)
    with paging.cut(run, cuda):
        out = paging.attended(case, mx.float32, mx.float32, split=run < ONE_RUN, append=True)
    assert paging.error(out, paging.exact(case)) < TOLERANCE[mx.float32]


def side_by_side(case):
    """The first sequence's only block comes right behind the second one's."""
    first, second = case.tables[:, 0].tolist()
    others = [i for i in range(1, len(case.k_pool)) if i not in (first, second)]
    order = [0, second, first, *others]
    pools = {"k_pool": case.k_pool[order], "v_pool": case.v_pool[order]}
    return replace(case, **pools, tables=np.argsort(order).astype(np.int32)[case.tables])


@pytest.mark.parametrize("run", [ONE_RUN, 32], ids=["one run", "several runs"])
@pytest.mark.parametrize("size", [1e-6, 30.0, 3000.0])
@pytest.mark.parametrize("bits", [BITS["plain"], (8, 4)], ids=["plain", "8/4"])
def test_scores_of_any_size(bits, size, run):
    """From all alike to a single one that counts, with partial results that differ by e^1000s."""
    rng = np.random.default_rng(1)
    case = paging.case(rng, [(150, 1), (77, 2)], heads=(2, 3, 64, 64), sinks=True)
    case.scale = size
    with paging.cut(run):
        out = paging.attended(case, mx.float32, mx.float32, split=run < ONE_RUN, bits=bits)
    expected = paging.exact(paging.coded_case(case, mx.float32, bits))
    # A large score has fewer bits behind the point.
    assert paging.error(out, expected) < TOLERANCE[mx.float32] * max(1, size / 10)


@pytest.mark.parametrize("run", [ONE_RUN, 32], ids=["one run", "several runs"])
@pytest.mark.parametrize("sink", [-1e4, 60.0, 1e4])
def test_sinks_that_take_nothing_or_all(sink, run):
    rng = np.random.default_rng(2)
    case = paging.case(rng, [(150, 1), (77, 2)], heads=(2, 3, 64, 64), sinks=True)
    case.sinks = case.sinks * 0 + sink
    with paging.cut(run):
        out = paging.attended(case, mx.float32, mx.float32, split=run < ONE_RUN)
    if sink == 1e4:
        assert not out.any()
    else:
        assert paging.error(out, paging.exact(case)) < TOLERANCE[mx.float32]


def test_the_sequences_of_a_step_may_share_blocks():
    rng = np.random.default_rng(3)
    case = paging.case(rng, [(64, 1), (70, 1)], heads=(2, 3, 64, 64))
    case.tables[1, :4] = case.tables[0, :4]
    case.keys[1][:64], case.values[1][:64] = case.keys[0], case.values[0]
    with paging.cut():
        out = paging.attended(case, mx.float32, mx.float32)
    assert paging.error(out, paging.exact(case)) < TOLERANCE[mx.float32]


@pytest.mark.parametrize("head, itemsize", [((66, 64), 4), ((64, 100), 2), ((20, 20), 2)])
def test_a_head_size_that_the_lanes_cannot_share_is_refused(head, itemsize):
    dtype = {2: mx.float16, 4: mx.float32}[itemsize]
    with pytest.raises(UnsupportedModel, match=f"heads of {head[0]} and {head[1]} elements"):
        kernels.tiling(*(Format(size, dtype) for size in head), 1, 16, False)


def test_every_tiling_fits_into_a_threadgroup():
    heads = [8, 12, 20, 24, 64, 80, 96, 112, 128, 192, 256]
    formats = [*((mx.float32, None), (mx.float16, None), (mx.float16, 8), (mx.float16, 4))]
    sizes = itertools.product(heads, range(1, 129), formats, [16, 32])
    for head, queries, (dtype, bits), block_size in sizes:
        part = Format(head, dtype, bits)
        if head * part.element_bits % 128 or (bits and head % 32):
            continue
        for cuda in (False, True):
            shape = kernels.tiling(part, part, queries, block_size, cuda)
            assert part.group_size % shape.k_width == 0, "a load has one scale"
            assert shape.queries <= shape.padded_queries <= min(8, shape.lanes)
            assert block_size % shape.keys == 0
            assert shape.simd_groups * shape.queries * (head + 2) * 4 <= 32 * 1024
