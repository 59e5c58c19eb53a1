"""Rows land in their slots, tags survive nothing but being handed on, and no step copies a pool."""

from __future__ import annotations

import gc
import itertools
import operator
import weakref
from dataclasses import replace

import numpy as np
import pytest
import serving
import tiny_models
from families import zoo

from mlxpage.errors import UnsupportedModel
from mlxpage.metal import kernels, layer_cache, layout, reference, seam, self_check
from mlxpage.metal.backend import mx
from mlxpage.metal.kv_cache import KVCache
from mlxpage.metal.layout import Attention, LayerSpec, Rows
from mlxpage.metal.model import Model
from mlxpage.metal.plan import GroupKind
from mlxpage.metal.tagged import MaskTag, Tagged
from mlxpage.sampling_params import SamplingParams

BLOCK_SIZE = 16


def rows(sequences, tables, groups: int = 1) -> Rows:
    """`sequences` as (context, rows), those of one row first; `tables` for each group or all."""
    counts = [count for _, count in sequences]
    tables = tables if isinstance(tables, list) else [tables] * groups
    positions = np.concatenate([np.arange(c - n, c) for c, n in sequences]).astype(np.int32)
    return Rows(
        tokens=np.zeros(sum(counts), np.int32),
        positions=positions,
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
        contexts=np.array([context for context, _ in sequences], np.int32),
        block_tables=tables,
        sample_rows=np.zeros(0, np.int32),
    )


def tables(rng, sequences, num_blocks: int) -> np.ndarray:
    needed = [-(-context // BLOCK_SIZE) for context, _ in sequences]
    ids = iter((rng.permutation(num_blocks) + 1).tolist())
    table = np.zeros((len(sequences), max(needed)), np.int32)
    for row, count in zip(table, needed, strict=True):
        row[:count] = [next(ids) for _ in range(count)]
    return table


def filled(rng, specs, num_blocks, backend=reference) -> KVCache:
    cache = KVCache(specs, num_blocks, BLOCK_SIZE, backend)
    for layer in cache.layers:
        k, v = (rng.standard_normal(pool.shape) for pool in (layer.pool.k, layer.pool.v))
        layer.pool.fill(mx.array(k.astype(np.float32)), mx.array(v.astype(np.float32)))
    mx.eval(cache.arrays())
    return cache


SEQUENCES = [(1, 1), (16, 1), (17, 1), (50, 1), (5, 5), (32, 20), (60, 3)]
FULL = LayerSpec(None, 2, 16, 24, mx.float32)
WINDOWED = LayerSpec(20, 3, 8, 8, mx.float32)


# -- another size --


@pytest.mark.parametrize("backend", [reference, kernels])
def test_a_cache_keeps_what_its_blocks_hold_when_it_grows(backend):
    rng = np.random.default_rng(0)
    cache = filled(rng, [FULL, WINDOWED], [9, 5], backend)
    before = [(np.array(layer.pool.k), np.array(layer.pool.v)) for layer in cache.layers]
    cache.resize([20, 5])
    assert cache.num_blocks == [20, 5]
    for layer, length, (k, v) in zip(cache.layers, (21, 6), before, strict=True):
        for now, was in ((layer.pool.k, k), (layer.pool.v, v)):
            now = np.array(now)
            assert now.shape == (length, *was.shape[1:])
            assert np.array_equal(now[: len(was)], was) and not now[len(was) :].any()


@pytest.mark.parametrize("backend", [reference, kernels])
def test_blocks_move_before_a_cache_shrinks_and_all_memory_is_given_back(backend):
    rng = np.random.default_rng(0)
    cache = filled(rng, [FULL, WINDOWED], [2000, 1000], backend)
    before = [(np.array(layer.pool.k), np.array(layer.pool.v)) for layer in cache.layers]
    mx.clear_cache()
    active, nbytes = mx.get_active_memory(), cache.nbytes
    cache.resize([4, 3], [[(2000, 1), (7, 4)], [(999, 3)]])
    assert active - mx.get_active_memory() > 0.95 * (nbytes - cache.nbytes)
    assert mx.get_cache_memory() == 0
    orders = [0, 2000, 2, 3, 7], [0, 1, 2, 999]
    for layer, order, (k, v) in zip(cache.layers, orders, before, strict=True):
        assert np.array_equal(np.array(layer.pool.k), k[order])
        assert np.array_equal(np.array(layer.pool.v), v[order])


def test_a_pool_of_any_type_and_shape_can_be_resized():
    pool = reference.Pool(FULL, 3, BLOCK_SIZE)
    words = mx.arange(4 * 2 * 5, dtype=mx.uint32).reshape(4, 2, 5)
    pool.fill(words, words[:, :, :3])
    pool.resize(5, [])
    pool.resize(2, [(3, 1)])
    assert pool.k.dtype == mx.uint32
    assert mx.array_equal(pool.k, mx.stack([words[0], words[3], words[2]]))
    assert mx.array_equal(pool.v, mx.stack([words[0], words[3], words[2]])[:, :, :3])


def failing_at(call: int):
    """`mx.pad` that raises at one of its calls."""
    pad, calls = mx.pad, itertools.count()

    def failing(*arguments):
        if next(calls) == call:
            raise RuntimeError("no memory")
        return pad(*arguments)

    return failing


@pytest.mark.parametrize("broken", range(6))
def test_a_cache_that_cannot_grow_is_as_it_was(monkeypatch, broken):
    cache = filled(np.random.default_rng(0), [FULL, WINDOWED, FULL], [9, 5])
    before = [np.array(array) for array in cache.arrays()]
    failing = failing_at(broken)
    monkeypatch.setattr(layout.mx, "pad", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        cache.resize([20, 20])
    assert cache.num_blocks == [9, 5]
    for array, was in zip(cache.arrays(), before, strict=True):
        assert np.array_equal(np.array(array), was)


@pytest.mark.parametrize("broken", range(6))
def test_a_cache_that_cannot_become_as_it_was_tells_why_it_could_not_grow(monkeypatch, broken):
    cache = filled(np.random.default_rng(0), [FULL, WINDOWED, FULL], [9, 5])
    before = [np.array(array) for array in cache.arrays()]
    failing = failing_at(broken)

    def shrinking(*arguments, **options):
        raise RuntimeError("nor for this")

    with monkeypatch.context() as patched:
        patched.setattr(layout.mx, "pad", failing)
        patched.setattr(layout.mx, "take", shrinking)
        with pytest.raises(RuntimeError, match="no memory"):
            cache.resize([20, 20])
    assert cache.num_blocks == [9, 5]
    for array, was in zip(cache.arrays(), before, strict=True):
        assert np.array_equal(np.array(array)[: len(was)], was)
    cache.resize([20, 20])
    assert {len(array) for array in cache.arrays()} == {21}


def test_what_mlx_keeps_goes_before_the_first_array_is_made(monkeypatch):
    cache = filled(np.random.default_rng(0), [FULL], [9])
    called = []
    for name in ("clear_cache", "pad"):
        function = getattr(mx, name)
        monkeypatch.setattr(
            layout.mx,
            name,
            lambda *arguments, name=name, function=function: (
                called.append(name) or function(*arguments)
            ),
        )
    cache.resize([20])
    assert called[:2] == ["clear_cache", "pad"]


# -- writing --


def test_rows_land_in_their_slots_and_clear_the_rest_of_a_block_that_they_begin():
    rng = np.random.default_rng(0)
    cache = filled(rng, [FULL, WINDOWED, FULL], [40, 30])
    step = rows(SEQUENCES, [tables(rng, SEQUENCES, 40), tables(rng, SEQUENCES, 30)])
    cache.begin(step)
    for layer in cache.layers:
        group = 0 if layer.spec.window is None else 1
        owners = np.repeat(np.arange(len(SEQUENCES)), np.diff(step.starts))
        for pool, head_dim in (("k", layer.spec.k_head_dim), ("v", layer.spec.v_head_dim)):
            expected = np.array(getattr(layer.pool, pool))
            new = rng.standard_normal((len(owners), layer.spec.kv_heads, 1, head_dim))
            table = step.block_tables[group]
            begun = [table[0, 0], table[2, 1], table[4, 0]]  # of the contexts 1, 17 and 5
            expected[begun] = 0
            for i, (owner, position) in enumerate(zip(owners, step.positions, strict=True)):
                block = step.block_tables[group][owner, position // BLOCK_SIZE]
                expected[block, :, position % BLOCK_SIZE] = new[i, :, 0]
            new = mx.array(new.astype(np.float32))
            other = mx.zeros((len(owners), layer.spec.kv_heads, 1, 40 - head_dim))
            before = {name: np.array(getattr(layer.pool, name)) for name in "kv"}
            if pool == "k":
                other = mx.zeros((*other.shape[:3], layer.spec.v_head_dim))
                layer.update_and_fetch(new, other)
            else:
                other = mx.zeros((*other.shape[:3], layer.spec.k_head_dim))
                layer.update_and_fetch(other, new)
            assert np.array_equal(np.array(getattr(layer.pool, pool)), expected)
            setattr(layer.pool, "kv".replace(pool, ""), mx.array(before["kv".replace(pool, "")]))


def test_layers_of_one_window_share_a_group_and_keep_pools_of_their_own():
    specs = [WINDOWED, FULL, WINDOWED, FULL]
    cache = KVCache(specs, [5, 7], BLOCK_SIZE)
    assert cache.kinds == [GroupKind(20), GroupKind(None)]
    assert [layer.pool.k.shape[0] for layer in cache.layers] == [6, 8, 6, 8]
    assert len({id(array) for array in cache.arrays()}) == 8
    assert cache.nbytes == sum(
        (blocks + 1) * BLOCK_SIZE * spec.bytes_per_token
        for blocks, spec in zip([5, 7, 5, 7], specs, strict=True)
    )


@pytest.mark.parametrize("family, dtype", [("gpt_oss", mx.float32), ("gemma3_text", mx.float16)])
def test_what_a_freed_block_holds_never_reaches_its_next_owner(family, dtype):
    """Not even a NaN, which a weight of zero would let through."""
    model = tiny_models.make(family, dtype=dtype)
    prompts = [[7], list(range(15)), list(range(100))]
    params = SamplingParams(temperature=0, max_tokens=40, logprobs=0)
    outputs = []
    for garbage in (0, np.nan):
        engine = serving.engine(model, num_blocks=40, max_num_batched_tokens=64)
        for layer in model.cache.layers:
            layer.pool.k[1:] = garbage
            layer.pool.v[1:] = garbage
        outputs.append(serving.serve(engine, prompts, params))
    for clean, dirty in zip(*outputs, strict=True):
        assert dirty.token_ids == clean.token_ids
        assert dirty.logprobs == clean.logprobs


def test_a_row_without_a_block_is_an_error_and_not_a_write():
    cache = KVCache([FULL], [5], BLOCK_SIZE)
    with pytest.raises(IndexError, match="no block"):
        cache.begin(rows([(17, 1)], np.array([[1, 0]], np.int32)))
    with pytest.raises(IndexError):
        cache.begin(rows([(33, 1)], np.array([[1, 2]], np.int32)))


def test_a_block_that_the_pool_does_not_have_is_an_error_and_not_a_write():
    cache = KVCache([FULL, WINDOWED], [5, 2], BLOCK_SIZE)
    good = np.array([[1, 2]], np.int32)
    cache.begin(rows([(17, 1)], [good, good]))
    for bad in ([good, good + 1], [good + 4, good], [good, -good]):
        with pytest.raises(IndexError, match="block"):
            cache.begin(rows([(17, 1)], bad))


@pytest.mark.parametrize("pair", [[0, 1], [1, 0], [1, 6], [6, 1], [-1, 1]], ids=str)
def test_a_copy_of_what_is_not_there_is_an_error_and_nothing_is_copied(pair):
    cache = KVCache([FULL], [5], BLOCK_SIZE)
    sound = rows([(17, 1)], np.array([[1, 2]], np.int32))
    with pytest.raises(IndexError, match="a pool of those from 1 to 5"):
        cache.begin(replace(sound, copies=[np.array([[1, 2], pair], np.int32)]))
    cache.begin(replace(sound, copies=[np.array([[1, 2], [5, 3]], np.int32)]))


def test_a_row_that_is_not_there_is_not_sampled():
    cache = KVCache([FULL], [5], BLOCK_SIZE)
    sound = rows([(17, 2)], np.array([[1, 2]], np.int32))
    with pytest.raises(IndexError, match="row 2 of 2"):
        cache.begin(replace(sound, sample_rows=np.array([0, 2], np.int32)))


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_token_that_the_model_does_not_have_is_an_error_before_a_step(token):
    model = tiny_models.make("llama")
    model.bind(KVCache(model.specs, [4], BLOCK_SIZE))
    found = rows([(1, 1)], np.ones((1, 1), np.int32))
    with pytest.raises(IndexError, match="of a vocabulary of"):
        model(replace(found, tokens=np.array([token], np.int32)))


# -- tags --

NUMBERS = mx.array([[1.0, 2.0], [3.0, 5.0]])
IN_PLACE = {
    "iadd": (NUMBERS, 2),
    "isub": (NUMBERS, NUMBERS * 3),
    "imul": (NUMBERS, 2),
    "imatmul": (NUMBERS, NUMBERS),
    "itruediv": (NUMBERS, 2),
    "ifloordiv": (NUMBERS, 2),
    "imod": (NUMBERS, 2),
    "ipow": (NUMBERS, 2),
    "iand": (mx.array([True, False, True]), mx.array([True, True, False])),
    "ior": (mx.array([True, False, False]), mx.array([True, True, False])),
    "ixor": (mx.array([1, 2, 3]), mx.array([7, 6, 5])),
    "ilshift": (mx.array([1, 2, 3]), 2),
    "irshift": (mx.array([8, 16, 32]), 2),
}


def test_every_operator_that_works_in_place_is_tried_here():
    known = {f"__{name}__" for name in IN_PLACE}
    others = {"__index__", "__init__", "__init_subclass__", "__int__", "__invert__", "__iter__"}
    assert {name for name in dir(mx.array) if name.startswith("__i")} == known | others


@pytest.mark.parametrize("name", IN_PLACE)
def test_an_operator_in_place_gives_the_right_values_without_the_tag(name):
    array, other = IN_PLACE[name]
    tagged = Tagged.of(array * 1, "tag")  # a lazy array, as K and V are
    expected = getattr(operator, name)(mx.array(array), other)
    result = getattr(operator, name)(tagged, other)
    assert type(result) is mx.array
    assert result.tolist() == expected.tolist()


def test_an_assigned_item_takes_the_tag_off():
    for index in (0, (slice(None), 1), mx.array([1, 0]), NUMBERS > 2, ...):
        tagged, plain = Tagged.of(NUMBERS * 1, "tag"), NUMBERS * 1
        tagged[index] = 7
        plain[index] = 7
        assert tagged.tag is None
        assert tagged.tolist() == plain.tolist()


OPERATIONS = {
    "slice": lambda a: a[:],
    "reshape": lambda a: a.reshape(a.shape),
    "transpose": lambda a: a.transpose(0, 1),
    "swapaxes": lambda a: a.swapaxes(0, 1),
    "squeeze": lambda a: a.squeeze(),
    "same dtype": lambda a: a.astype(a.dtype),
    "view": lambda a: a.view(mx.int32),
    "add": lambda a: a + 0,
    "from the right": lambda a: 0 + a,
    "negate": lambda a: -a,
    "at": lambda a: a.at[0].add(1),
    "repeat": lambda a: mx.repeat(a, 2, axis=0),
    "concatenate": lambda a: mx.concatenate([a]),
    "broadcast": lambda a: mx.broadcast_to(a, a.shape),
    "contiguous": mx.contiguous,
    "stop_gradient": mx.stop_gradient,
    "depends": lambda a: mx.depends([a], [NUMBERS])[0],
    "array": mx.array,
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_gives_a_plain_array_with_the_same_values(operation):
    apply = OPERATIONS[operation]
    tagged = Tagged.of(NUMBERS * 1, "tag")
    assert type(apply(tagged)) is mx.array
    assert apply(tagged).tolist() == apply(NUMBERS).tolist()
    assert tagged.tag == "tag"


# -- what a model that looks at K, V and the mask sees --


def one_layer(spec, window=None):
    """A filled cache with one layer, its step begun; q for its rows."""
    rng = np.random.default_rng(1)
    cache = filled(rng, [spec], [40])
    step = rows(SEQUENCES, tables(rng, SEQUENCES, 40))
    cache.begin(step)
    (layer,) = cache.layers
    new = [
        mx.array(rng.standard_normal((len(step.positions), spec.kv_heads, 1, dim)))
        for dim in (spec.k_head_dim, spec.v_head_dim)
    ]
    k, v = layer.update_and_fetch(*(array.astype(mx.float32) for array in new))
    mask = layer.make_mask(1, window_size=window)
    q = rng.standard_normal((len(step.positions), spec.kv_heads * 4, 1, spec.k_head_dim))
    return layer, step, mx.array(q.astype(np.float32)), k, v, mask


@pytest.mark.parametrize("sinks", [None, mx.arange(8) / 4])
@pytest.mark.parametrize("window", [None, 1, 20, 40])
def test_the_gathered_k_and_v_attend_as_the_pool_does(window, sinks):
    layer, _, q, k, v, mask = one_layer(FULL, window)
    paged = layer.attend(q, mask.tag.window, 0.25, sinks)
    options = {"scale": 0.25, "mask": mask, "sinks": sinks}
    gathered = reference.dense_attention(q, k * 1, v * 1, **options)
    assert mx.abs(paged - gathered).max() < 1e-5
    # The same by hand, as a model does that knows nothing of MLX's function.
    if sinks is None:
        scores = (q * 0.25) @ mx.repeat(k, 4, axis=1).swapaxes(2, 3)
        weights = mx.softmax(mx.where(mask, scores, -mx.inf), axis=-1)
        assert mx.abs(paged - weights @ mx.repeat(v, 4, axis=1)).max() < 1e-5


def test_the_window_of_a_group_is_in_its_mask_and_may_be_narrowed_only():
    layer, step, *_ = one_layer(WINDOWED)
    positions = step.positions[:, None]
    keys = np.arange(step.block_tables[0].shape[1] * BLOCK_SIZE)[None, :]
    for asked, used in ((None, 20), (20, 20), (7, 7)):
        mask = layer.make_mask(1, window_size=asked)
        assert mask.tag == MaskTag(layer.step, used)
        expected = (keys <= positions) & (keys > positions - used)
        assert np.array_equal(np.array(mask)[:, 0, 0], expected)
    with pytest.raises(UnsupportedModel, match=r"reads 21 positions .* keeps 20"):
        layer.make_mask(1, window_size=21)


def test_only_what_comes_untouched_from_one_layer_reads_the_pool():
    rng = np.random.default_rng(2)
    cache = filled(rng, [FULL, FULL, WINDOWED], [40, 40])
    table = tables(rng, SEQUENCES, 40)
    cache.begin(rows(SEQUENCES, [table, table]))
    (k, v), (other_k, other_v), _ = (layer.keys_and_values() for layer in cache.layers)
    one, _, windowed = cache.layers
    mask, foreign = one.make_mask(1), windowed.make_mask(1)
    q = mx.array(rng.standard_normal((len(cache.layers[0].offset), 8, 1, 16)).astype(np.float32))

    def attended(*arrays, **options) -> bool:
        before = [layer.num_attended for layer in cache.layers]
        out = mx.fast.scaled_dot_product_attention(*arrays, scale=0.25, **options)
        if hooked := [layer.num_attended for layer in cache.layers] != before:
            options["mask"] = mask  # what its rows' positions say anyway
        plain = [array * 1 for array in arrays]
        expected = reference.dense_attention(*plain, scale=0.25, **options)
        assert mx.abs(out - expected).max() < 1e-5
        return hooked

    seam.install()
    assert attended(q, k, v, mask=mask)
    assert attended(q, k, v)
    assert attended(q, k, v, mask="causal")
    assert not attended(q, k * 2, v, mask=mask)
    assert not attended(q, k, v * 2, mask=mask)
    assert not attended(q, k, other_v, mask=mask)
    assert not attended(q, other_k, v, mask=mask)
    assert not attended(q, k, v, mask=mask & True)
    assert not attended(q, k, v, mask=foreign)
    assert not attended(q, k, v, mask=mask, stream=mx.cpu)
    stale = one.make_mask(1)
    cache.begin(rows(SEQUENCES, [table, table]))
    k, v = one.keys_and_values()
    assert not attended(q, k, v, mask=stale)


LATENT = LayerSpec(None, 1, 32, 16, mx.float32)


@pytest.mark.parametrize("fetches", [False, True])
def test_a_mask_of_scores_with_v_makes_it_latent_attention(fetches):
    """And nothing that is like it. Unread K and V are NaN, which gets into all that reads them."""
    rng = np.random.default_rng(4)
    cache = filled(rng, [LATENT, LATENT], [40])
    cache._forward.fetches = fetches
    cache.begin(rows(SEQUENCES, [tables(rng, SEQUENCES, 40)]))
    layer, other = cache.layers
    count = len(layer.offset)
    q, q_v = (
        mx.array(rng.standard_normal((count, 4, 1, size)).astype(np.float32)) for size in (32, 16)
    )
    new = [mx.array(rng.standard_normal((count, 1, 1, size))) for size in (32, 16)]
    k, v = layer.update_and_fetch(*(array.astype(mx.float32) for array in new))
    other_k, other_v = other.keys_and_values()
    mask = layer.make_mask(1, return_array=True)
    assert (mask is None) is not fetches

    def scores(v, axes=(-1, -2)):
        return q_v @ v.swapaxes(*axes)

    def attended(k, v, mask, q=q, **options) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask=mask, **options)

    seam.install()
    cache._forward.fetches = True
    gathered_k, gathered_v = (array * 1 for array in layer.keys_and_values())
    real_mask = layer.make_mask(1)
    by_hand = (q * 0.25) @ gathered_k.swapaxes(2, 3) + q_v @ gathered_v.swapaxes(2, 3)
    by_hand = mx.softmax(mx.where(real_mask, by_hand, -mx.inf), axis=-1) @ gathered_k
    cache._forward.fetches = fetches
    for axes in ((-1, -2), (2, 3), (3, 2)):
        before = layer.num_attended
        out = attended(k, k, scores(v, axes))
        assert layer.num_attended == before + 1 and other.num_attended == 0
        assert layer.attention == Attention(4, mx.float32, None, 0.25, False, is_latent=True)
        assert mx.abs(out - by_hand).max() < 1e-5

    before = layer.num_attended
    unlike = [
        lambda: attended(k, k, scores(v) * 1),
        lambda: attended(k, k, scores(v) + 0),
        lambda: attended(k, k * 1, scores(v)),
        lambda: attended(k * 1, k * 1, scores(v)),
        lambda: attended(k, other_k, scores(v)),
        lambda: attended(other_k, other_k, scores(v)),
        lambda: attended(k, k, scores(other_v)),
        lambda: attended(k, k, scores(v * 1)),
        lambda: attended(k, k, mx.matmul(q_v, v.swapaxes(-1, -2))),
        lambda: attended(k, k, mx.where(real_mask, scores(v), -1e30)),
        lambda: attended(k, k, (q_v[:, :1] @ v.swapaxes(-1, -2))),
        lambda: attended(k, k, scores(v), stream=mx.cpu),
        lambda: attended(k, k, scores(v), sinks=mx.zeros(4)),
        lambda: attended(k, k, real_mask),
    ]
    for call in unlike:
        out = call()
        assert layer.num_attended == before and other.num_attended == 0
        assert mx.isnan(out).all() or fetches
    changed = scores(v)
    changed[0] = 0
    attended(k, k, changed)
    changed = scores(v)
    changed += 1
    attended(k, k, changed)
    assert layer.num_attended == before
    assert type(v.swapaxes(1, 2)) is mx.array and type(k.swapaxes(-1, -2)) is mx.array


def test_only_what_may_be_latent_has_no_mask():
    for spec in (FULL, WINDOWED, replace(LATENT, kv_heads=2), replace(LATENT, v_head_dim=32)):
        layer, *_ = one_layer(spec)
        layer._forward.fetches = False
        assert layer.make_mask(1, return_array=True) is not None
    layer, *_ = one_layer(LATENT)
    layer._forward.fetches = False
    assert layer.make_mask(1) is None
    assert layer.make_mask(1, window_size=20).tag.window == 20
    assert layer.make_mask(2) is not None


def test_k_and_v_fetched_again_are_the_same():
    """Models whose later layers read an earlier layer's K and V ask for them a second time."""
    layer, _, _, k, v, _ = one_layer(FULL)
    again = layer.keys_and_values()
    assert [a.tag for a in again] == [layer, layer]
    assert mx.array_equal(again[0], k) and mx.array_equal(again[1], v)


# -- memory --

# Two of each, so that blocks are copied too.
PARAMS = SamplingParams(temperature=0, max_tokens=200, n=2)
PROMPTS = [list(range(n)) for n in (3, 60, 100, 17)]


def run_and_watch(model, on_step=None) -> tuple[int, int]:
    """(the most that a step took on top of what was there before it, bytes of a layer's K)"""
    engine = serving.engine(model, num_blocks=8000, max_num_seqs=4, max_num_batched_tokens=48)
    mx.clear_cache()
    mx.reset_peak_memory()
    most, before = 0, mx.get_active_memory()

    def watch(engine):
        nonlocal most, before
        most = max(most, mx.get_peak_memory() - before)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        if on_step:
            on_step()

    serving.serve(engine, PROMPTS, PARAMS, on_step=watch)
    return most, max(layer.pool.k.nbytes for layer in model.cache.layers)


def test_large_layers_are_dispatched_in_stretches_of_which_few_are_ahead(monkeypatch):
    done = []
    monkeypatch.setattr(mx, "async_eval", lambda mark: done.append(("goes on", mark.item())))
    monkeypatch.setattr(mx, "eval", lambda mark: done.append(("is awaited", mark.item())))
    monkeypatch.setattr(layer_cache, "_STRETCH", 64)
    monkeypatch.setattr(layer_cache, "_LEAST_OF_A_LAYER", 32)

    def attended(layer, nbytes):
        return mx.full((nbytes // 4, 1, 1, 1), layer)

    forward = layer_cache.Forward(looks_ahead=True)
    forward.before_waiting = lambda: done.append("others first")
    for layer in range(100):
        forward.go_on(attended(layer, 28))
    assert not done, "small ones never are"
    for layer in range(8):
        forward.go_on(attended(layer, 32))
    assert done == [
        *(("goes on", 1), ("goes on", 3)),
        *(("goes on", 5), "others first", ("is awaited", 1)),
        *(("goes on", 7), "others first", ("is awaited", 3)),
    ]
    done.clear()
    forward.go_on(attended(8, 64))
    assert done == [("goes on", 8), "others first", ("is awaited", 5)], "those of a forward before"
    done.clear()
    forward.given = mx.zeros(1)
    forward.go_on(attended(0, 64))
    layer_cache.Forward(looks_ahead=False).go_on(attended(0, 64))
    assert not done, "nor is what is compiled, and what nobody dispatches ahead"


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_no_step_costs_a_pool(family):
    most, pool = run_and_watch(tiny_models.make(family, vocab_size=128))
    assert pool > 8e6
    assert most < pool / 4


@pytest.mark.parametrize("family", ["stablelm", "deepseek_v32", "gemma2", "afm7"])
def test_no_step_in_several_forwards_costs_a_pool(family):
    model = Model(*zoo.make(family))
    self_check.check(model, 16)
    assert model.shape is not layout.Shape.ROWS
    most, pool = run_and_watch(model)
    assert most < pool / 4


def test_a_k_that_outlives_its_step_costs_a_pool(monkeypatch):
    """The test above notices what it's there for."""
    fetch = layer_cache.LayerCache.keys_and_values
    kept = []

    def leak(self):
        k, v = fetch(self)
        if not kept:
            kept.append(k)
        return k, v

    monkeypatch.setattr(layer_cache.LayerCache, "keys_and_values", leak)
    model = tiny_models.make("llama", vocab_size=128)
    model.fetches = True
    most, pool = run_and_watch(model)
    assert most > 0.9 * pool  # what was there before may be freed meanwhile


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3"])
def test_no_tagged_array_outlives_its_step(monkeypatch, family):
    if family in tiny_models.CONFIGS:
        model = tiny_models.make(family, vocab_size=128)
    else:
        model = Model(*zoo.make(family))
    made = []
    of = Tagged.of.__func__

    def note(kind, array, tag):
        tagged = of(kind, array, tag)
        made.append(weakref.ref(tagged))
        return tagged

    monkeypatch.setattr(Tagged, "of", classmethod(note))

    def none_left():
        assert made and not any(ref() is not None for ref in made)
        made.clear()

    gc.disable()  # they go by themselves, not when the collector happens to run
    try:
        run_and_watch(model, none_left)
    finally:
        gc.enable()
