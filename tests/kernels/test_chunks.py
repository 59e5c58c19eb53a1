"""How sequences with chunks of prompts are attended: alone, or several in one padded launch."""

import numpy as np
import paging
import pytest

from mlxpage.metal.backend import mx
from mlxpage.metal.kernels.chunks import attend_chunk, plan_chunks

BLOCK = 16


def planned(rows: list[int], computed: list[int] | None = None) -> list[int]:
    """How many sequences each launch has, of chunks of `rows` after `computed` positions."""
    contexts = np.add(rows, computed or [0] * len(rows))
    width = -(-int(contexts.max()) // BLOCK)
    tables = 1 + np.arange(len(rows) * width).reshape(len(rows), width)
    starts = np.cumsum([0, *rows])
    chunks = plan_chunks(starts, contexts, tables, BLOCK, None, 2**30)
    assert [chunk.rows.start for chunk in chunks] == [
        starts[sum(c.shape[0] for c in chunks[:i])] for i in range(len(chunks))
    ], "in order, and all of them"
    return [chunk.shape[0] for chunk in chunks]


@pytest.mark.parametrize("length, launches", [(32, 1), (128, 1), (256, 8), (1024, 8)])
def test_short_chunks_are_computed_together_and_long_ones_alone(length, launches):
    assert len(planned([length] * 8)) == launches


def test_a_long_chunk_among_short_ones_is_computed_alone():
    assert planned([64, 64, 64, 2000, 64, 64]) == [3, 1, 2]


def test_a_few_rows_after_a_long_context_are_a_long_chunk():
    assert planned([8, 8, 8], [30_000, 30_000, 0]) == [1, 1, 1]


def test_what_one_launch_pads_to_has_a_limit():
    counts = planned([128] * 600)
    assert len(counts) > 1 and max(counts) * 128 * 128 <= 2**22


@pytest.mark.parametrize("rows", [(12, 12, 12), (9, 12, 2)], ids=["of one length", "of several"])
@pytest.mark.parametrize("window", [None, 13])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_chunks_that_are_computed_together_are_what_the_definition_says(metal, rows, window, dtype):
    sequences = list(zip((40, 12, 33), rows, strict=True))
    options = {"heads": (3, 1, 24, 8), "window": window, "sinks": True}
    case = paging.case(np.random.default_rng(5), sequences, dtype, **options)
    blocks = paging.blocks_of(case.k_pool, case.v_pool, dtype, (None, None))
    arguments = case.starts, case.contexts, case.tables, case.block_size, window
    (chunk,) = plan_chunks(*arguments, 2**30)
    q, sinks = (paging.array(each, dtype) for each in (case.q[:, :, None], case.sinks))
    with paging.fresh_kernels():
        out = attend_chunk(q, blocks, chunk, paging.FENCE, scale=case.scale, sinks=sinks)
        out = paging.floats(out[:, :, 0])
    assert paging.error(out, paging.exact(case)) < paging.TOLERANCE[dtype]
