"""Paged attention in plain MLX against its definition in NumPy, float64.

The definition knows no blocks: it has each sequence's K and V in one piece. The pool is built from
those, and whatever must not be read in it is huge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from mlxpage.metal import cascade, reference
from mlxpage.metal.backend import mx
from mlxpage.metal.layout import Blocks, Format, PoolKind
from mlxpage.metal.quantised import dequantised, quantised_blocks

HUGE = 1e30  # squared it's still a float32
NULL_BLOCK = 0


only_on_a_cpu = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="nothing is shared there")


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


def share(case: Case, members: list[int], begin: int, end: int) -> None:
    """Lets the members hold the same blocks in these columns, as far as each has them at all."""
    size = case.block_size
    for column in range(begin, end):
        holders = [i for i in members if column < case.tables.shape[1] and case.tables[i, column]]
        if not holders:
            continue
        # Of the one that has the most of the block.
        giver = max(holders, key=lambda i: case.sequences[i][0])
        for i in holders:
            positions = slice(column * size, min((column + 1) * size, case.sequences[i][0]))
            case.tables[i, column] = case.tables[giver, column]
            case.keys[i][positions] = case.keys[giver][positions]
            case.values[i][positions] = case.values[giver][positions]


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
                scores = case.scale * (keys[first : position + 1, kv] @ case.q[row, head])
                weights = np.exp(scores)
                total = weights.sum()
                if case.sinks is not None:
                    total += np.exp(case.sinks[head])
                out[row, head] = weights @ values[first : position + 1, kv] / total
            row += 1
    return out


def planned(case: Case, **changes) -> reference.Plan:
    """`changes` are of the plan's arguments."""
    arguments = {
        "starts": case.starts,
        "contexts": case.contexts,
        "tables": case.tables,
        "block_size": case.block_size,
        "window": case.window,
        "heads": case.q.shape[1],
    }
    return reference.plan(**arguments | changes)


def paged(case: Case, dtype=mx.float32, **changes) -> np.ndarray:
    """The same through `plan` and `paged_attention`."""
    plan = planned(case, **changes)
    covered = [row for span in plan.spans for row in range(span.rows.start, span.rows.stop)]
    assert covered == list(range(len(case.q))), "each row is attended once, in order"
    out = reference.paged_attention(
        mx.array(case.q.astype(np.float32)).astype(dtype),
        Blocks.plain(*(mx.array(pool).astype(dtype) for pool in (case.k_pool, case.v_pool))),
        plan,
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
        plan = reference.plan(case.starts, case.contexts, case.tables, 16, window, heads=6)
        assert len(plan.spans) - 1 >= min(pieces, rows)
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
    monkeypatch.setattr(reference, "cpu_streams", lambda: streams)
    monkeypatch.setattr(reference, "MAX_SCORES", 8000)
    rng = np.random.default_rng(count)
    for _ in range(5):
        case = make(rng, [*sequences(rng, "mixed", 16), *[(200, 1)] * 4], window=window)
        heads = case.q.shape[1]
        plan = reference.plan(case.starts, case.contexts, case.tables, 16, window, heads)
        assert {span.stream for span in plan.spans} == set(range(count))
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
    plan = reference.plan(case.starts, case.contexts, case.tables, 16, None, heads=4)
    q = mx.array(case.q.astype(np.float32))
    mx.eval(q, k_pool, v_pool)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    out = reference.paged_attention(q, Blocks.plain(k_pool, v_pool), plan, scale=case.scale)
    assert np.abs(np.array(out) - defined(case)).max() < 4e-3
    assert mx.get_peak_memory() - before < k_pool.nbytes / 4


def test_decoding_sequences_of_very_different_length_share_no_padding_to_speak_of():
    lengths = np.array(sorted([1, 5, 16, 17, 40, 64, 300, 301, 5000, 20_000]), np.int32)
    tables = np.ones((len(lengths), 20_000 // 16), np.int32)
    plan = reference.plan(np.arange(len(lengths) + 1), lengths, tables, 16, None, heads=6)
    read = sum(span.tables.size for span in plan.spans)
    assert read <= sum(-(-n // 16) for n in lengths.tolist()) + 64 * len(plan.spans)
    assert 1 < len(plan.spans) < len(lengths)


# -- latent attention --


def assert_latent_as_defined(case: Case, rng, dtype=mx.float32, tolerance=2e-5, bits=None):
    """Scores are of K and V, values are K."""
    q_v = rng.standard_normal((*case.q.shape[:2], case.values[0].shape[2])) / 4
    parts = zip(case.keys, case.values, strict=True)
    meant = replace(
        case,
        q=np.concatenate([case.q * case.scale, q_v], axis=-1),
        keys=[np.concatenate(part, axis=-1) for part in parts],
        values=case.keys,
        scale=1.0,
    )
    pools = [mx.array(pool).astype(dtype) for pool in (case.k_pool, case.v_pool)]
    blocks = Blocks.plain(*pools)
    if bits:
        formats = [Format(pool.shape[3], dtype, bits) for pool in pools]
        held = map(quantised_blocks, pools, formats)
        blocks = Blocks(*held, PoolKind(*case.k_pool.shape[1:3], *formats))
    q, q_v = (mx.array(each.astype(np.float32)).astype(dtype) for each in (case.q, q_v))
    out = reference.paged_attention(q, blocks, planned(case), scale=case.scale, q_v=q_v)
    assert out.dtype == dtype
    difference = np.abs(np.array(out.astype(mx.float32)) - defined(meant)).max()
    assert difference < tolerance, f"{difference:.2g} {case}"


@pytest.mark.parametrize("heads", [1, 4, 40])
@pytest.mark.parametrize("kind", ["decode", "chunk", "mixed"])
def test_latent_attention_is_what_its_definition_says(kind, heads):
    rng = np.random.default_rng([len(kind), heads])
    for k_dim, v_dim in ((64, 32), (32, 64), (8, 16), (128, 16)):
        cases = sequences(rng, kind, 16)
        assert_latent_as_defined(make(rng, cases, heads=(1, heads, k_dim, v_dim)), rng)


@pytest.mark.parametrize("dtype, tolerance", [(mx.float16, 4e-3), (mx.bfloat16, 3e-2)])
def test_latent_attention_of_16_bits_differs_by_rounding_only(dtype, tolerance):
    rng = np.random.default_rng(2)
    for heads in (4, 40):
        cases = sequences(rng, "mixed", 16)
        case = make(rng, cases, heads=(1, heads, 64, 32), garbage=6e4)
        assert_latent_as_defined(case, rng, dtype, tolerance)


def test_latent_attention_reads_quantised_blocks():
    rng = np.random.default_rng(3)
    case = make(rng, sequences(rng, "mixed", 16), heads=(1, 4, 64, 32), garbage=0)
    assert_latent_as_defined(case, rng, tolerance=3e-2, bits=8)


@pytest.mark.parametrize("kind", ["decode", "chunk", "mixed"])
@pytest.mark.parametrize("heads", [4, 40])
def test_latent_attention_reads_what_is_shared_once(monkeypatch, heads, kind):
    worth(monkeypatch, 1)
    rng = np.random.default_rng([heads, len(kind)])
    chunks = {"decode": 0, "chunk": 5, "mixed": 2}[kind]
    for blocks in (1, 7, 20):
        case = prefixed(rng, 5, blocks, chunks=chunks, heads=(1, heads, 64, 32))
        assert_latent_as_defined(case, rng)


# -- what sequences share --


def shared_keys(case: Case, **changes) -> list[int]:
    """What is read together, in products: rows times keys."""
    levels = planned(case, **changes).levels
    return [span.cost for span in levels[0].spans] if len(levels) > 1 else []


def worth(monkeypatch, least: int) -> None:
    """Lets whatever is shared save the reading of so many blocks."""
    monkeypatch.setattr(
        cascade, "_saved", lambda blocks, sequences: blocks * (sequences - 1) - least + 1
    )


def prefixed(rng, count: int, blocks: int, *, chunks: int = 0, **options) -> Case:
    """Sequences that begin with the same blocks and go on by some tokens each, in any order."""
    more = rng.integers(1, 60, count).tolist()
    sizes = [(blocks * 16 + each, 1) for each in more[chunks:]]
    sizes += [(blocks * 16 + each + 1, int(rng.integers(2, each + 2))) for each in more[:chunks]]
    case = make(rng, sizes, **options)
    share(case, list(range(count)), 0, blocks)
    return case


@only_on_a_cpu
def test_what_sequences_share_is_read_once():
    case = prefixed(np.random.default_rng(0), 8, 20, heads=(2, 3, 32, 16))
    assert sum(shared_keys(case)) == 8 * 20 * 16
    read = sum(span.tables.size for span in planned(case).spans)
    assert read <= 8 * 5, "of its own each has a few blocks"
    assert_as_defined(case, tolerance=1e-5)


@pytest.mark.parametrize("window", [None, 90, 300, 1000])
@pytest.mark.parametrize("kind", ["decode", "chunk", "mixed"])
def test_shared_blocks_are_attended_as_the_definition_says(monkeypatch, kind, window):
    worth(monkeypatch, 1)
    rng = np.random.default_rng([len(kind), window or 0])
    for _ in range(12):
        count = int(rng.integers(2, 9))
        chunks = {"decode": 0, "chunk": count, "mixed": count // 2}[kind]
        sinks = bool(rng.integers(0, 2))
        blocks = int(rng.integers(1, 25))
        assert_as_defined(
            prefixed(rng, count, blocks, chunks=chunks, window=window, sinks=sinks), tolerance=1e-5
        )


@only_on_a_cpu
@pytest.mark.parametrize("window, keys", [(None, 320), (400, 320), (200, 128), (100, 64), (40, 0)])
def test_only_what_every_window_holds_entirely_is_shared(monkeypatch, window, keys):
    """Contexts end anywhere, so windows begin within a block, or in different ones."""
    worth(monkeypatch, 1)
    rng = np.random.default_rng(1)
    case = make(rng, [(n, 1) for n in (330, 335, 341)], window=window, heads=(2, 2, 16, 32))
    share(case, [0, 1, 2], 0, 20)
    assert sum(shared_keys(case)) == 3 * keys
    assert_as_defined(case, tolerance=1e-5)
    full = make(np.random.default_rng(1), [(n, 1) for n in (330, 335, 341)], heads=(2, 2, 16, 32))
    share(full, [0, 1, 2], 0, 20)
    full.window = window  # keys that are out of reach are no longer huge
    assert_as_defined(full, tolerance=1e-5)


@only_on_a_cpu
def test_several_prefixes_are_shared_by_sequences_that_do_not_stand_together(monkeypatch):
    worth(monkeypatch, 32)
    rng = np.random.default_rng(2)
    sizes = [(700 + 3 * i, 1) for i in range(12)] + [(640 + 5 * i, 5) for i in range(3)]
    for sinks in (False, True):
        case = make(rng, sizes, heads=(2, 3, 32, 16), sinks=sinks)
        share(case, [0, 3, 5, 8, 13], 0, 40)
        share(case, [1, 2, 9, 11, 12], 0, 30)
        share(case, [4, 7], 0, 36)
        rows = [1, 1, 1, 1, 5], [1, 1, 1, 1, 5], [1, 1]
        expected = zip(rows, (40, 30, 36), strict=True)
        assert sum(shared_keys(case)) == sum(sum(each) * n * 16 for each, n in expected)
        assert_as_defined(case, tolerance=1e-5)


@only_on_a_cpu
def test_what_is_nested_is_shared_where_that_saves_the_most(monkeypatch):
    worth(monkeypatch, 32)
    rng = np.random.default_rng(3)
    for together, saved_by_all in ((40, True), (12, False)):
        case = make(rng, [(1000, 1)] * 6 + [(650, 1)] * 2, heads=(1, 2, 16, 16))
        share(case, list(range(8)), 0, together)
        share(case, [2, 3, 4], 0, 62)
        share(case, [5, 6, 7], 0, 62)
        expected = 8 * together if saved_by_all else 6 * 62
        assert sum(shared_keys(case)) == expected * 16
        assert_as_defined(case, tolerance=1e-5)


@pytest.mark.parametrize("sinks", [False, True])
def test_parts_of_very_different_scores_are_merged(monkeypatch, sinks):
    """Exponentials of the one or the other part alone would overflow, or all vanish."""
    worth(monkeypatch, 1)
    rng = np.random.default_rng(12)
    for further in (12, -12):
        case = prefixed(rng, 6, 20, chunks=1, heads=(2, 2, 16, 16), sinks=sinks)
        case.scale = 1.0
        case.q[..., 0] = 12
        for keys, table in zip(case.keys, case.tables, strict=True):
            keys[:320, :, 0] = further  # scores of 144, and about 0 of the others
            keys[320:, :, 0] = 0
            for p, key in enumerate(keys):
                case.k_pool[table[p // 16], :, p % 16] = key
        assert_as_defined(case, tolerance=1e-3)


@pytest.mark.parametrize("last", [32 * 16, 32 * 16 - 1, 31 * 16 + 1])
def test_a_sequence_may_be_shared_up_to_its_last_block(monkeypatch, last):
    worth(monkeypatch, 1)
    case = make(np.random.default_rng(4), [(last, 1)] * 3 + [(600, 1)], heads=(2, 2, 32, 32))
    share(case, [0, 1, 2, 3], 0, 32)
    assert_as_defined(case, tolerance=1e-5)


@only_on_a_cpu
def test_a_block_in_common_is_not_shared_in_another_place(monkeypatch):
    """Nor after the first one that differs."""
    worth(monkeypatch, 1)
    case = make(np.random.default_rng(5), [(1000, 1)] * 4, heads=(2, 2, 32, 32))
    share(case, [0, 1, 2, 3], 1, 60)
    assert shared_keys(case) == []
    moved = case.tables.copy()
    moved[1] = np.roll(moved[0], 1)
    assert shared_keys(case, tables=moved) == []
    assert_as_defined(case, tolerance=1e-5)


@only_on_a_cpu
def test_a_little_in_common_is_not_worth_a_call():
    for count, blocks in [(2, 60), (4, 20), (8, 12), (32, 6)]:
        case = make(np.random.default_rng(6), [(1000, 1)] * count, heads=(1, 2, 16, 16))
        share(case, list(range(count)), 0, blocks)
        assert shared_keys(case) == []
        assert planned(case).places is None
    share(case, list(range(count)), 0, 20)
    assert shared_keys(case)


@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize(
    "dtype, tolerance", [(mx.float32, 1e-5), (mx.float16, 4e-3), (mx.bfloat16, 3e-2)]
)
def test_shared_blocks_may_be_of_16_bits_and_quantised(monkeypatch, dtype, tolerance, bits):
    worth(monkeypatch, 1)
    rng = np.random.default_rng(7)
    options = {"heads": (2, 2, 64, 32), "garbage": 1e3}
    case = prefixed(rng, 7, 20, chunks=2, sinks=True, **options)
    case.q = np.array(mx.array(case.q.astype(np.float32)).astype(dtype).astype(mx.float32))
    kind, pools = PoolKind(2, 16, Format(64, dtype, bits), Format(32, dtype, bits)), []
    for pool, part, own in (
        (case.k_pool, kind.k, case.keys),
        (case.v_pool, kind.v, case.values),
    ):
        blocks = mx.array(pool).astype(dtype)
        blocks = quantised_blocks(blocks, part) if bits else blocks
        pools.append(blocks)
        held = dequantised(blocks, part, 16) if bits else blocks
        held = np.array(held.astype(mx.float32))
        for i, (context, _) in enumerate(case.sequences):
            own[i] = held[case.tables[i]].swapaxes(1, 2).reshape(-1, *pool.shape[1::2])[:context]
    sinks = mx.array(case.sinks.astype(np.float32)).astype(dtype)
    case.sinks = np.array(sinks.astype(mx.float32))
    out = reference.paged_attention(
        mx.array(case.q).astype(dtype),
        Blocks(*pools, kind),
        planned(case),
        scale=case.scale,
        sinks=sinks,
    )
    assert out.dtype == dtype
    assert np.abs(np.array(out.astype(mx.float32)) - defined(case)).max() < tolerance


@only_on_a_cpu
def test_quantised_blocks_that_are_shared_are_unpacked_once(monkeypatch):
    gather, gathered = reference.gather, []
    monkeypatch.setattr(
        reference, "gather", lambda blocks, at: gathered.append(at.size) or gather(blocks, at)
    )
    case = prefixed(np.random.default_rng(8), 16, 20, heads=(1, 2, 32, 32), garbage=1e3)
    part = Format(32, mx.float32, 8)
    pools = [quantised_blocks(mx.array(pool), part) for pool in (case.k_pool, case.v_pool)]
    plan = planned(case)
    blocks = Blocks(*pools, PoolKind(1, 16, part, part))
    reference.paged_attention(mx.array(case.q.astype(np.float32)), blocks, plan, scale=case.scale)
    assert gathered.count(20) == 1
    assert sum(gathered) <= 20 + 16 * 5


@only_on_a_cpu
@pytest.mark.parametrize("most", [2**10, 2**13, 2**16])
def test_many_rows_of_shared_keys_are_cut(monkeypatch, most):
    monkeypatch.setattr(reference, "MAX_SCORES", most)
    case = prefixed(np.random.default_rng(9), 12, 20, chunks=3, heads=(2, 3, 32, 16))
    rows = len(case.q)
    assert all(cost * 6 <= most + 320 * 6 for cost in shared_keys(case)), "at most a row more"
    assert sum(shared_keys(case)) == rows * 320
    assert_as_defined(case, tolerance=1e-5)


@only_on_a_cpu
@pytest.mark.parametrize("count", [1, 2, 4])
def test_shared_keys_are_spread_over_streams(monkeypatch, count):
    streams = [None, *(mx.new_thread_local_stream(mx.cpu) for _ in range(count - 1))]
    monkeypatch.setattr(reference, "cpu_streams", lambda: streams)
    monkeypatch.setattr(reference, "_SCORES_TO_SPREAD", 1000)
    rng = np.random.default_rng(10)
    case = prefixed(rng, 12, 20, chunks=3, heads=(2, 3, 32, 16), sinks=True)
    shared, own = planned(case).levels
    assert {span.stream for span in shared.spans} == set(range(count))
    assert {span.stream for span in own.spans} == set(range(count))
    assert_as_defined(case, tolerance=1e-5)


@pytest.mark.parametrize("sinks", [False, True])
def test_what_serves_on_a_gpu_shares_nothing(monkeypatch, sinks):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    case = prefixed(np.random.default_rng(13), 8, 20, chunks=3, window=200, sinks=sinks)
    assert shared_keys(case) == []
    assert_as_defined(case)


def test_sequences_that_share_at_random():
    rng = np.random.default_rng(11)
    for _ in range(20):
        sizes = sequences(rng, "mixed", 16)
        window = None if rng.random() < 0.6 else int(rng.integers(20, 500))
        case = make(rng, sizes, window=window, sinks=bool(rng.integers(0, 2)))
        for _ in range(int(rng.integers(1, 4))):
            members = rng.permutation(len(sizes))[: int(rng.integers(2, 12))].tolist()
            share(case, members, 0, int(rng.integers(1, 25)))
        # Whoever got a block of another one by that has its K and V.
        for i, (context, _) in enumerate(case.sequences):
            for p in range(context):
                if case.tables[i, p // 16]:
                    case.keys[i][p] = case.k_pool[case.tables[i, p // 16], :, p % 16]
                    case.values[i][p] = case.v_pool[case.tables[i, p // 16], :, p % 16]
        for least in (1, 5, 40):
            with pytest.MonkeyPatch.context() as patch:
                worth(patch, least)
                assert_as_defined(case)


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
