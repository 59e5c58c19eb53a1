"""llama.cpp as a rival: what its C interface is given, and what is said where it can't be."""

import builtins
import json
import random
import sys

import pytest
from fake_llama_cpp import VOCAB_SIZE, FakeLlamaCpp, generated

from mlxpage.bench.llamacpp import LlamaCpp, cell_nbytes
from mlxpage.bench.workloads import Item
from mlxpage.cli.bench import _llama_cpp
from mlxpage.errors import EngineError, InvalidRequest
from mlxpage.metal import model as models


@pytest.fixture
def lib(monkeypatch):
    fake = FakeLlamaCpp()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    yield fake
    assert not +fake.open, "not given back"


@pytest.fixture
def sketch(tiny_folder):
    model = models.load(tiny_folder, weights=False)
    model.vocab_size = VOCAB_SIZE
    return model


@pytest.fixture
def rival(lib, sketch):
    """rival(cells=..., at_once=..., chunk=...)"""
    made = []

    def make(file="a.gguf", shares_cells=True, **room):
        made.append(LlamaCpp(file, sketch, shares_cells=shares_cells, **room))
        return made[-1]

    yield make
    for each in made:
        each.close()


def work(seed: int, count: int) -> list[Item]:
    rng = random.Random(seed)
    return [
        Item([rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 60))], rng.randint(1, 30))
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    "cells, at_once, chunk", [(90, 4, 16), (90, 1, 1), (200, 8, 8), (10**4, 16, 512)]
)
def test_every_request_gets_its_tokens_however_many_run_at_once(rival, lib, cells, at_once, chunk):
    items = work(cells, 25)
    theirs = rival(cells=cells, at_once=at_once, chunk=chunk)
    for _ in range(2):
        ran = theirs.serve(items)
        assert ran.tokens == [generated(item.prompt, item.output_len) for item in items]
    assert ran.peak_kv == lib.most_cells * theirs._cell_nbytes
    assert max(sum(step) for step in lib.steps) <= max(chunk, at_once)
    assert (at_once == 1) == (max(single for single, _ in lib.steps) == 1)


def test_a_step_has_a_token_of_all_who_decode_beside_the_next_prompts(rival, lib):
    theirs = rival(cells=1000, at_once=3, chunk=20)
    theirs.serve([Item([1, 2, 3], 5), Item([4] * 40, 2), Item([5] * 6, 2)])
    assert lib.steps[:3] == [(0, 20), (1, 19), (1, 10)]


def test_who_may_not_fit_waits(rival, lib):
    theirs = rival(cells=50, at_once=3, chunk=50)
    theirs.serve([Item([1] * 20, 20), Item([2] * 20, 20), Item([3], 1)])
    assert lib.steps[0] == (0, 20) and lib.most_cells <= 50
    with pytest.raises(
        InvalidRequest, match=r"51 tokens; in --kv-memory llama.cpp has room for 50"
    ):
        theirs.serve([Item([1] * 31, 20)])


def test_a_cell_has_k_and_v_of_all_layers_in_float16(tiny_folder):
    model = models.load(tiny_folder, weights=False)
    assert 2 * cell_nbytes(model) == sum(spec.bytes_per_token for spec in model.kv_specs)


def test_what_it_cannot_do_is_told(rival, lib, sketch):
    room = {"cells": 100, "at_once": 2, "chunk": 16}
    with pytest.raises(InvalidRequest, match="can't load broken: no magic in it"):
        rival("broken", **room)
    with pytest.raises(InvalidRequest, match="no cache of 2,000,000 cells"):
        rival(**{**room, "cells": 2_000_000})
    with pytest.raises(InvalidRequest, match=r"--max-num-seqs is 65; llama\.cpp runs 64"):
        rival(**{**room, "at_once": 65})
    sketch.vocab_size = 7
    with pytest.raises(InvalidRequest, match="5,000 tokens and the model 7"):
        rival(**room)
    sketch.vocab_size = VOCAB_SIZE
    lib.fails_at = 1
    with pytest.raises(EngineError, match="returned -3"):
        rival(**room).serve([Item([1, 2], 3)])


def test_a_model_with_states_is_refused(lib, sketch, monkeypatch):
    monkeypatch.setattr(type(sketch), "kv_specs", [])
    with pytest.raises(InvalidRequest, match="no states"):
        cell_nbytes(sketch)


@pytest.mark.parametrize("length", [100, 256, 257])
def test_without_a_size_each_sequence_has_cells_for_the_longest_request(lib, sketch, length):
    items = [Item([1] * (length - 2), 2), Item([1], 4)] * 3
    theirs = _llama_cpp("a.gguf", sketch, items, 3, 64, None)
    assert theirs.cells == 3 * (256 if length <= 256 else 512) and not theirs.shares_cells
    assert theirs.serve(items).tokens == [generated(i.prompt, i.output_len) for i in items]
    theirs.close()


def test_a_library_that_cannot_be_loaded_or_is_old_is_told(rival, lib, monkeypatch):
    room = {"cells": 100, "at_once": 2, "chunk": 16}
    monkeypatch.delattr(FakeLlamaCpp, "llama_memory_seq_rm")
    with pytest.raises(InvalidRequest, match=r"0\.3\.99 is too old"):
        rival(**room)

    def refuse(name, *args):
        if name == "llama_cpp":
            raise RuntimeError("no libllama.so")
        return real(name, *args)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(InvalidRequest, match=r"can't be loaded: no libllama.so"):
        rival(**room)


def test_without_llama_cpp_python_it_is_named(cli, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    file = tmp_path / "a.gguf"
    file.write_bytes(b"")
    ran = cli("bench", "throughput", tiny_folder, "--rival", "llama.cpp", "--gguf", file)
    assert ran.code == 2 and "pip install llama-cpp-python" in ran.err


def test_it_is_an_arm_beside_ours(cli, tiny_folder, tmp_path, monkeypatch):
    model = models.load(tiny_folder, weights=False)
    fake = FakeLlamaCpp(model.vocab_size)
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    file = tmp_path / "a.gguf"
    file.write_bytes(b"")
    ran = cli(
        *("bench", "throughput", tiny_folder, "--rival", "llama.cpp", "--gguf", file, "-r", "1"),
        *("--num-prompts", "3", "--input-len", "20", "--output-len", "6", "-o", "json"),
        *("--kv-memory", f"{200 * cell_nbytes(model)}B", "--max-num-seqs", "2"),
    )
    assert ran.code == 0, ran.err
    record = json.loads(ran.out)
    ours, theirs = record["rows"]
    assert theirs["case"] == {"arm": "llama.cpp"} and record["settings"]["gguf"] == str(file)
    facts, metrics = theirs["facts"], theirs["metrics"]
    assert facts["weights"] == "llama 0B of sums" and facts["threads"] >= 1
    assert facts["version"] == "0.3.99"
    assert (facts["at_once"], facts["cells"], facts["shares_cells"]) == (2, 192, True)
    assert metrics["total_num_tokens"] == ours["metrics"]["total_num_tokens"] == 3 * 26
    assert "peak_memory" not in metrics and "peak_memory" in ours["metrics"]
    assert facts["same_tokens"] == 0 and facts["first_difference"] == 0
    assert not +fake.open
