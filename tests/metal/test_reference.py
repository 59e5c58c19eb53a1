"""Paged attention in plain MLX against its definition in NumPy, float64.

The definition knows no blocks: it has each sequence's K and V in one piece. The pool is built from
those, and whatever must not be read in it is huge.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from mlxpage.metal import reference
from mlxpage.metal.backend import mx
from mlxpage.metal.layout import Blocks

HUGE = 1e30  # squared it's still a float32
NULL_BLOCK = 0


@dataclass
class Case:
    """Sequences as (context, rows), their K and V in one piece, and the same in a pool."""

    sequences: list[tuple[int, int]]
    block_size: int
    window: int | None
    scale: float
    q: np.ndarray  # (T, heads, k_dim)
    keys: list[np.ndarray]  # per sequence (context, kv_heads, k_dim)
    values: list[np.ndarray]
    sinks: np.ndarray | None
    k_pool: np.ndarray  # (num_blocks + 1, kv_heads, block_size, k_dim)
    v_pool: np.ndarray
    tables: np.ndarray  # (S, M)

    @property
    def starts(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum([rows for _, rows in self.sequences])]).astype(
            np.int32
        )

    @property
    def contexts(self) -> np.ndarray:
        return np.array([context for context, _ in self.sequences], np.int32)

    def __repr__(self) -> str:
        shape = (*self.q.shape[1:], self.keys[0].shape[1], self.values[0].shape[2])
        return f"{shape} {self.block_size=} {self.window=} {self.sequences} {self.sinks is None=}"


def make(rng, sequences, *, block_size=16, window=None, sinks=False, heads=None, garbage=HUGE):
    """A random case; `heads` is (kv_heads, group, k_dim, v_dim)."""
    kv_heads, group, k_dim, v_dim = heads or (
        int(rng.integers(1, 5)),
        int(rng.integers(1, 9)),
        *rng.choice([16, 24, 32, 64, 80, 128], 2).tolist(),
    )
    sequences = sorted(sequences, key=lambda s: (s[1] > 1, s[0]))
    keys = [rng.standard_normal((context, kv_heads, k_dim)) for context, _ in sequences]
    values = [rng.standard_normal((context, kv_heads, v_dim)) for context, _ in sequences]
    needed = [-(-context // block_size) for context, _ in sequences]
    num_blocks = sum(needed) + 3
    ids = iter((rng.permutation(num_blocks) + 1).tolist())
    k_pool = np.full((num_blocks + 1, kv_heads, block_size, k_dim), garbage, np.float32)
    v_pool = np.full((num_blocks + 1, kv_heads, block_size, v_dim), garbage, np.float32)
    tables = np.full((len(sequences), max(needed)), NULL_BLOCK, np.int32)
    for i, (context, rows) in enumerate(sequences):
        # What no row of the sequence can read has been given back.
        readable = 0 if window is None else max(0, context - rows - window + 1)
        for block in range(readable // block_size, needed[i]):
            tables[i, block] = next(ids)
            for p in range(block * block_size, min((block + 1) * block_size, context)):
                k_pool[tables[i, block], :, p % block_size] = keys[i][p]
                v_pool[tables[i, block], :, p % block_size] = values[i][p]
    total = sum(rows for _, rows in sequences)
    return Case(
        sequences,
        block_size,
        window,
        # Scores of a few units: no position drowns and none rules.
        float(rng.uniform(0.5, 2)) / np.sqrt(k_dim),
        rng.standard_normal((total, kv_heads * group, k_dim)),
        keys,
        values,
        rng.standard_normal(kv_heads * group) if sinks else None,
        k_pool,
        v_pool,
        tables,
    )


def defined(case: Case) -> np.ndarray:
    """softmax(q k / sqrt(d)) v, row by row and head by head."""
    heads, kv_heads = case.q.shape[1], case.keys[0].shape[1]
    out = np.zeros((len(case.q), heads, case.values[0].shape[2]))
    row = 0
    for (context, rows), keys, values in zip(case.sequences, case.keys, case.values, strict=True):
        for position in range(context - rows, context):
            first = 0 if case.window is None else max(0, position - case.window + 1)
            for head in range(heads):
                kv = head * kv_heads // heads
                scores = [
                    case.scale * (keys[k, kv] @ case.q[row, head])
                    for k in range(first, position + 1)
                ]
                weights = np.exp(scores)
                total = weights.sum()
                if case.sinks is not None:
                    total += np.exp(case.sinks[head])
                out[row, head] = weights @ values[first : position + 1, kv] / total
            row += 1
    return out


def paged(case: Case, dtype=mx.float32, **changes) -> np.ndarray:
    """The same through `plan` and `paged_attention`; `changes` are of the plan's arguments."""
    arguments = {
        "starts": case.starts,
        "contexts": case.contexts,
        "tables": case.tables,
        "block_size": case.block_size,
        "window": case.window,
        "heads": case.q.shape[1],
    }
    spans = reference.plan(**arguments | changes)
    covered = [row for span in spans for row in range(span.rows.start, span.rows.stop)]
    assert covered == list(range(len(case.q))), "each row is attended once, in order"
    out = reference.paged_attention(
        mx.array(case.q.astype(np.float32)).astype(dtype),
        Blocks.plain(*(mx.array(pool).astype(dtype) for pool in (case.k_pool, case.v_pool))),
        spans,
        scale=case.scale,
        sinks=None if case.sinks is None else mx.array(case.sinks.astype(np.float32)).astype(dtype),
    )
    assert out.dtype == dtype
    return np.array(out.astype(mx.float32))


def assert_as_defined(case: Case, dtype=mx.float32, tolerance=2e-5) -> None:
    difference = np.abs(paged(case, dtype) - defined(case)).max()
    assert difference < tolerance, f"{difference:.2g} {case}"


def contexts(rng, count: int, block_size: int, longest: int) -> list[int]:
    """Some at the edges of a block, some of a few tokens, some long."""
    edge = rng.integers(1, 4, count) * block_size + rng.integers(-1, 2, count)
    short = rng.integers(1, 2 * block_size, count)
    long = rng.integers(1, longest + 1, count)
    kind = rng.integers(0, 3, count)
    return np.choose(kind, [edge, short, long]).clip(1).tolist()


def sequences(rng, kind: str, block_size: int) -> list[tuple[int, int]]:
    if kind == "decode":
        # Few, or so many and so different that they fall into several buckets.
        count, longest = (3, 60) if rng.random() < 0.5 else (40, 400)
        return [(c, 1) for c in contexts(rng, int(rng.integers(1, count + 1)), block_size, longest)]
    if kind == "chunk":
        chosen = contexts(rng, int(rng.integers(1, 4)), block_size, 60)
        return [(c + 1, int(rng.integers(2, c + 2))) for c in chosen]
    return [*sequences(rng, "decode", block_size), *sequences(rng, "chunk", block_size)]


BLOCK_SIZES = [16, 16, 16, 32, 32, 1, 3, 8]
WINDOWS = {"all": (None, None), "one": (1, 2), "small": (2, 20), "large": (20, 500)}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("kind", ["decode", "chunk", "mixed"])
def test_attention_is_what_its_definition_says(kind, window):
    rng = np.random.default_rng([len(kind), len(window)])
    low, high = WINDOWS[window]
    for _ in range(25):
        block_size = int(rng.choice(BLOCK_SIZES))
        case = make(
            rng,
            sequences(rng, kind, block_size),
            block_size=block_size,
            window=None if low is None else int(rng.integers(low, high)),
            sinks=bool(rng.integers(0, 2)),
        )
        assert_as_defined(case)


@pytest.mark.parametrize("pieces", [1, 4, 70])
@pytest.mark.parametrize("window", [None, 1, 13, 300])
def test_a_chunk_with_too_many_scores_is_cut(monkeypatch, window, pieces):
    rng = np.random.default_rng(pieces)
    for chunk in [(70, 70), (70, 33), (33, 2), (17, 17)]:
        case = make(rng, [(5, 1), chunk], window=window, heads=(2, 3, 32, 16))
        context, rows = chunk
        monkeypatch.setattr(reference, "MAX_SCORES", -(-rows * context * 6 // pieces))
        spans = reference.plan(case.starts, case.contexts, case.tables, 16, window, heads=6)
        assert len(spans) - 1 >= min(pieces, rows)
        assert_as_defined(case)


@pytest.mark.parametrize("window", [None, 13])
def test_the_pieces_of_a_chunk_share_what_they_gather(monkeypatch, window):
    monkeypatch.setattr(reference, "MAX_SCORES", 300)
    gather, gathered = reference.gather, []
    monkeypatch.setattr(reference, "gather", lambda *of: gathered.append(of) or gather(*of))
    case = make(np.random.default_rng(0), [(70, 70), (40, 21)], window=window, heads=(2, 3, 32, 16))
    assert_as_defined(case)
    assert len(gathered) == 2, "once for each chunk"


@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_attention_spread_over_streams_is_the_same(monkeypatch, count, window):
    streams = [None, *(mx.new_thread_local_stream(mx.cpu) for _ in range(count - 1))]
    monkeypatch.setattr(reference, "_streams", lambda: streams)
    monkeypatch.setattr(reference, "MAX_SCORES", 8000)
    rng = np.random.default_rng(count)
    for _ in range(5):
        case = make(rng, [*sequences(rng, "mixed", 16), *[(200, 1)] * 4], window=window)
        heads = case.q.shape[1]
        spans = reference.plan(case.starts, case.contexts, case.tables, 16, window, heads)
        assert {span.stream for span in spans} == set(range(count))
        assert_as_defined(case)


@pytest.mark.parametrize("dtype, tolerance", [(mx.float16, 4e-3), (mx.bfloat16, 3e-2)])
def test_attention_of_16_bits_differs_by_rounding_only(dtype, tolerance):
    rng = np.random.default_rng(2)
    for window in (None, 20):
        for sinks in (False, True):
            case = make(
                rng,
                sequences(rng, "mixed", 16),
                window=window,
                sinks=sinks,
                heads=(2, 2, 32, 32),
                garbage=6e4,  # near the largest float16
            )
            assert_as_defined(case, dtype, tolerance)


def test_queries_of_another_dtype_do_not_cost_a_copy_of_the_pool():
    """Some models make their queries float32 over K and V of 16 bits."""
    rng = np.random.default_rng(3)
    case = make(rng, [(20, 1), (40, 1), (30, 9)], heads=(2, 2, 32, 32), garbage=6e4)
    blocks = mx.zeros((4000, 2, 16, 32), mx.float16)
    k_pool, v_pool = (
        mx.concatenate([mx.array(pool).astype(mx.float16), blocks])
        for pool in (case.k_pool, case.v_pool)
    )
    spans = reference.plan(case.starts, case.contexts, case.tables, 16, None, heads=4)
    q = mx.array(case.q.astype(np.float32))
    mx.eval(q, k_pool, v_pool)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    out = reference.paged_attention(q, Blocks.plain(k_pool, v_pool), spans, scale=case.scale)
    assert np.abs(np.array(out) - defined(case)).max() < 4e-3
    assert mx.get_peak_memory() - before < k_pool.nbytes / 4


def test_decoding_sequences_of_very_different_length_share_no_padding_to_speak_of():
    lengths = np.array(sorted([1, 5, 16, 17, 40, 64, 300, 301, 5000, 20_000]), np.int32)
    tables = np.ones((len(lengths), 20_000 // 16), np.int32)
    spans = reference.plan(np.arange(len(lengths) + 1), lengths, tables, 16, None, heads=6)
    read = sum(span.tables.size for span in spans)
    assert read <= sum(-(-n // 16) for n in lengths.tolist()) + 64 * len(spans)
    assert 1 < len(spans) < len(lengths)


@pytest.fixture(scope="module")
def mixed():
    rng = np.random.default_rng(7)
    sizes = [(1, 1), (16, 1), (33, 1), (90, 1), (40, 12), (64, 64)]
    case = make(rng, sizes, window=None, heads=(2, 2, 16, 16))
    assert_as_defined(case)
    return case


def differing(case: Case, out: np.ndarray) -> list[int]:
    """The sequences of which a row differs from the definition."""
    rows = np.flatnonzero(~(np.abs(out - defined(case)).max(axis=(1, 2)) < 1e-3))
    return np.unique(np.searchsorted(case.starts, rows, side="right") - 1).tolist()


def test_a_foreign_block_in_a_table_shows_in_its_sequence_only(mixed):
    for victim, donor in [(2, 3), (3, 5), (4, 2), (5, 4)]:
        tables = mixed.tables.copy()
        tables[victim, 0] = tables[donor, 0]
        assert differing(mixed, paged(mixed, tables=tables)) == [victim]


def test_blocks_of_a_chunk_in_the_wrong_order_show(mixed):
    tables = mixed.tables.copy()
    tables[5, [0, 1]] = tables[5, [1, 0]]
    assert differing(mixed, paged(mixed, tables=tables)) == [5]


@pytest.mark.parametrize("off", [-1, 1])
def test_a_context_off_by_one_shows(mixed, off):
    for index in range(1, len(mixed.sequences)):
        moved = mixed.contexts
        moved[index] += off
        if -(-int(moved[index]) // mixed.block_size) > np.count_nonzero(mixed.tables[index]):
            continue  # the next block isn't there to be read
        assert differing(mixed, paged(mixed, contexts=moved)) == [index]


@pytest.mark.parametrize("off", [-1, 1])
def test_a_window_off_by_one_shows(off):
    rng = np.random.default_rng(3)
    sizes = [(20, 1), (33, 1), (90, 1), (40, 12), (64, 64)]
    case = make(rng, sizes, window=18, heads=(2, 2, 16, 16))
    assert_as_defined(case)
    # Without the blocks that were given back: what is one too far holds a value of its own.
    full = make(np.random.default_rng(3), sizes, window=None, heads=(2, 2, 16, 16))
    full.window = 18
    assert_as_defined(full)
    assert differing(full, paged(full, window=18 + off)) == [0, 1, 2, 3, 4]


def test_a_sink_that_is_forgotten_shows(mixed):
    rng = np.random.default_rng(4)
    case = make(rng, mixed.sequences, sinks=True, heads=(2, 2, 16, 16))
    assert_as_defined(case)
    sinks, case.sinks = case.sinks, None
    out = paged(case)
    case.sinks = sinks
    assert differing(case, out) == list(range(len(case.sequences)))


def test_garbage_in_a_read_slot_shows(mixed):
    """The pool's huge values are what the other tests rely on: one of them read is seen."""
    for index, (context, _) in enumerate(mixed.sequences):
        for position in {0, context // 2, context - 1}:
            block = mixed.tables[index, position // 16]
            pool = mixed.v_pool.copy()
            pool[block, :, position % 16] = HUGE
            changed = Case(**{**vars(mixed), "v_pool": pool})
            assert differing(mixed, paged(changed)) == [index]
