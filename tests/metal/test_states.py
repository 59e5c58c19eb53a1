"""States in a pool: read and written where they belong, and nowhere else."""

import numpy as np
import pytest
from families import zoo

from mlxpage.errors import UnsupportedModel
from mlxpage.metal import anatomy, choice, self_check
from mlxpage.metal.backend import mx
from mlxpage.metal.kv_cache import KVCache
from mlxpage.metal.layout import Rows, StateArray, StateSpec
from mlxpage.metal.model import Model
from mlxpage.metal.states import Pool, StateLayer, Step

SIZE = 4
SPEC = StateSpec((StateArray((3, 2), mx.float32), None, StateArray((5,), mx.float16)))
# The last token ids, as many as there are, up to three.
GROWING = StateSpec((StateArray((3,), mx.int64, growing=0),))


def rows(*spans: tuple[int, int]) -> Rows:
    """Of sequences that compute (start, end) each."""
    counts = [end - start for start, end in spans]
    return Rows(
        tokens=np.zeros(sum(counts), np.int32),
        positions=np.concatenate([np.arange(*span) for span in spans]).astype(np.int32),
        starts=np.cumsum([0, *counts]).astype(np.int32),
        contexts=np.array([end for _, end in spans], np.int32),
        block_tables=[],
        sample_rows=np.zeros(0, np.int32),
    )


def step(tables: list[list[int]], *spans: tuple[int, int]) -> Step:
    return Step(rows(*spans), np.array(tables), SIZE)


def filled(spec: StateSpec = SPEC, num_blocks: int = 6) -> Pool:
    pool = Pool(spec, num_blocks)
    rng = np.random.default_rng(0)
    pool.fill(*(mx.array(rng.standard_normal(a.shape)).astype(a.dtype) for a in pool.held()))
    return pool


def as_numpy(arrays) -> list[np.ndarray]:
    return [np.array(array) for array in arrays]


def test_a_forward_goes_on_from_the_block_of_the_token_before_it():
    pool = filled()
    held = as_numpy(pool.held())
    taken = pool.states(step([[5, 2], [3, 1]], (4, 5), (3, 4)))
    assert taken[1] is None
    assert np.array_equal(taken[0], held[0][[5, 3]])
    assert np.array_equal(taken[2], held[1][[5, 3]])


def test_it_leaves_what_it_comes_to_in_the_block_of_its_last_token():
    """Everything else stays as it was, also what it went on from."""
    pool = filled()
    before = as_numpy(pool.held())
    where = step([[5, 0, 0, 2], [3, 1, 0, 0]], (4, 14), (4, 5))
    new = [mx.full((2, 3, 2), 7.0), None, mx.full((2, 5), 8, mx.float16)]
    pool.write(where, new)
    for held, old, value in zip(as_numpy(pool.held()), before, (7, 8), strict=True):
        assert (held[[2, 1]] == value).all()
        others = [0, 3, 4, 5, 6]
        assert np.array_equal(held[others], old[others])


def test_who_begins_has_no_state_and_is_alone():
    assert filled().states(step([[5]], (0, 3))) == [None, None, None]
    with pytest.raises(AssertionError, match="a state of nothing beside others"):
        step([[5], [3]], (0, 1), (3, 4))
    with pytest.raises(IndexError, match="no block for its state"):
        step([[0, 3]], (4, 5))


@pytest.mark.parametrize(("tokens", "length"), [(1, 1), (2, 2), (3, 3), (4, 3)])
def test_a_state_that_grows_is_as_long_as_there_are_tokens(tokens, length):
    pool = Pool(GROWING, 3)
    ids = mx.arange(1, length + 1, dtype=mx.int64)[None]
    pool.write(step([[1, 2]], (0, tokens)), [ids])
    (taken,) = pool.states(step([[1, 2]], (tokens, tokens + 1)))
    assert taken.tolist() == ids.tolist()


def test_a_layer_that_loses_its_state_is_refused():
    layer = StateLayer(SPEC, 0, 3)
    where = step([[1]], (0, 2))
    layer.begin(where)
    layer.seen[0] = mx.zeros((1, 3, 2))
    with pytest.raises(UnsupportedModel, match="leaves its state empty"):
        layer.end(where)


def test_a_layer_that_sets_nothing_takes_its_state_along():
    layer = StateLayer(SPEC, 0, 6)
    layer.pool = filled()
    before = as_numpy(layer.pool.held())
    where = step([[5, 2]], (4, 5))
    layer.begin(where)
    layer.end(where)
    for held, old in zip(as_numpy(layer.pool.held()), before, strict=True):
        assert np.array_equal(held[2], old[5])


def test_a_state_is_written_in_place():
    """Reading it before doesn't make MLX copy the pool."""
    cache = KVCache([StateSpec((StateArray((1000, 1000), mx.float32),))] * 2, [20], SIZE)
    part = rows((4, 5), (4, 5))
    part.block_tables = [np.array([[1, 2], [3, 4]], np.int32)]
    for _ in range(3):
        mx.clear_cache()
        start = mx.get_active_memory()
        mx.reset_peak_memory()
        cache.begin(part)
        for layer in cache.layers:
            layer.seen[0] = layer.seen[0] + 1
        cache.end(mx.zeros(1))
        mx.eval(cache.written())
        # Of two sequences and two layers, before and after.
        assert mx.get_peak_memory() - start <= 2 * 2 * 2 * 4e6 + 4096
    assert all(layer.pool.held()[0][2, 0, 0] == 1 for layer in cache.layers)


def test_blocks_are_copied_moved_read_and_loaded_as_those_of_k_and_v_are():
    specs = [SPEC, GROWING]
    cache = KVCache(specs, [6], SIZE)
    rng = np.random.default_rng(1)
    for layer in cache.layers:
        arrays = layer.pool.held()
        layer.pool.fill(*(mx.array(rng.integers(0, 99, a.shape)).astype(a.dtype) for a in arrays))
    before = as_numpy(cache.arrays())
    contents = [bytes(content) for content in cache.read(0, [2, 5])]
    assert [len(content) for content in contents] == [cache.block_nbytes(0)] * 2
    assert cache.block_nbytes(0) == 6 * 4 + 5 * 2 + 3 * 8

    cache.copy([np.array([[2, 3], [5, 2]], np.int32)])
    for array, old in zip(as_numpy(cache.arrays()), before, strict=True):
        assert np.array_equal(array[[3, 2]], old[[2, 5]])
    cache.load(0, [1, 6], [memoryview(content) for content in contents])
    for array, old in zip(as_numpy(cache.arrays()), before, strict=True):
        assert np.array_equal(array[[1, 6]], old[[2, 5]])
    cache.resize([3], [[(6, 2)]])
    for array, old in zip(as_numpy(cache.arrays()), before, strict=True):
        assert len(array) == 4 and np.array_equal(array[2], old[5])
    cache.resize([9])
    assert all(len(array) == 10 and not array[4:].any().item() for array in cache.arrays())


# -- what models keep --


def test_the_arrays_of_a_state_are_found():
    module, _ = zoo.make("falcon_h1")
    specs, nesting = anatomy.layer_specs(module, "falcon_h1")
    assert nesting == [[0, 1], [2, 3], [4, 5]], "a state and K and V in each layer"
    assert [isinstance(spec, StateSpec) for spec in specs] == [True, False] * 3
    assert all(array.growing is None for spec in specs[::2] for array in spec.kept)


def test_a_state_that_grows_at_first_is_found():
    model = Model(*zoo.make("longcat_flash_ngram"))
    (spec,) = model.state_specs
    (array,) = spec.kept
    assert array.growing == 0 and spec.full_after == array.shape[0] > 1


def test_a_state_that_never_stops_growing_is_refused(monkeypatch):
    monkeypatch.setattr(anatomy, "_LONGEST_START", 2)
    module, _ = zoo.make("longcat_flash_ngram")
    with pytest.raises(UnsupportedModel, match="shape still changes after 2 tokens"):
        anatomy.layer_specs(module, "longcat_flash_ngram")


def test_a_model_of_states_alone_has_nothing_to_quantise():
    model = Model(*zoo.make("mamba2"))
    with pytest.raises(UnsupportedModel, match=r"mamba2 keeps no K and V .*leave kv_bits out"):
        model.quantise_cache(8, 8)
    model.quantise_cache(None, None)
    both = Model(*zoo.make("falcon_h1", head_dim=32))
    both.quantise_cache(8, 8)
    assert {spec.k_bits for spec in both.kv_specs} == {8}


@pytest.mark.parametrize("place", [0, 1])
def test_a_state_in_the_wrong_place_is_noticed_before_a_model_serves(place, monkeypatch):
    """Either of the blocks of a step, of another sequence."""

    class Swapped(Step):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            name = ("read_blocks", "write_blocks")[place]
            if self.read_blocks is not None and len(self.write_blocks) > 1:
                setattr(self, name, getattr(self, name)[::-1])

    model = Model(*zoo.make("qwen3_next"))
    together = [way for way in self_check.WAYS if way[0] is not self_check.Shape.SEQUENCES]
    self_check.check(model, 16, ways=together)
    monkeypatch.setattr("mlxpage.metal.states.Step", Swapped)
    with pytest.raises(UnsupportedModel, match="computes something else"):
        self_check.check(model, 16, ways=together)


def test_on_a_gpu_the_reference_serves_them(monkeypatch):
    told = []
    monkeypatch.setattr(choice, "wanted", lambda name: choice.Backend("metal", choice.kernels, ""))
    model = Model(*zoo.make("mamba2"))
    assert choice.checked(model, 16, None, told.append).name == "reference"
    assert "mamba2 keeps states, which no kernel updates yet" in told[0]
