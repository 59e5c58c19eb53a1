"""What is read off a model, what is done to it, and what is refused."""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import odd_models
import pytest
import serving
import tiny_folder
import tiny_models
from mlx.utils import tree_flatten

from mlxpage.errors import InvalidModel, UnsupportedModel
from mlxpage.metal import anatomy, self_check
from mlxpage.metal import model as models
from mlxpage.metal.backend import mx
from mlxpage.metal.kv_cache import KVCache
from mlxpage.metal.layout import Rows, Shape
from mlxpage.metal.model import Model
from mlxpage.sampling_params import SamplingParams

ROOT = Path(__file__).parents[2]


def shapes(model: Model) -> list[tuple]:
    return [(s.window, s.kv_heads, s.k_head_dim, s.v_head_dim) for s in model.specs]


# -- layers --


@pytest.mark.parametrize(
    "family, expected",
    [
        ("llama", [(None, 2, 16, 16)] * 3),
        ("gemma3_text", [(48, 1, 16, 16)] * 2 + [(None, 1, 16, 16)]),
        ("cohere2", [(40, 2, 16, 16)] * 2 + [(None, 2, 16, 16)]),
        ("gpt_oss", [(32, 2, 16, 16), (None, 2, 16, 16), (32, 2, 16, 16)]),
        ("deepseek_v2", [(None, 4, 32, 8)] * 3),
        ("nanbeige", [(None, 2, 16, 16)] * 6),
        ("gemma4_text", [(24, 1, 16, 16), (None, 1, 32, 32)]),
    ],
)
def test_layers_are_read_off_a_forward(family, expected):
    model = Model(*odd_models.module(family))
    assert shapes(model) == expected
    assert {spec.dtype for spec in model.specs} == {mx.float32}
    assert (model.vocab_size, model.logits_dtype) == (256, mx.float32)
    self_check.check(model, 16)


def test_reading_a_model_computes_nothing():
    module, config = odd_models.module("llama", hidden_size=1024, vocab_size=8192)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    Model(module, config)
    assert mx.get_peak_memory() - before < 4096


@pytest.mark.parametrize("key", anatomy.CONTEXT_KEYS)
@pytest.mark.parametrize("section", [None, "text_config"])
def test_the_context_length_has_many_names(key, section):
    module, config = odd_models.module("llama")
    del config["max_position_embeddings"]
    assert Model(module, config).context_length is None
    assert Model(module, config | {"text_config": None}).context_length is None
    named = {section: {key: 77}} if section else {key: 77}
    assert Model(module, config | named).context_length == 77


# -- rows --


def one_step(model: Model, lengths: list[int], sample_rows: list[int]) -> Rows:
    """All of some prompts at once, over a pool of their own."""
    blocks = [-(-n // 16) for n in lengths]
    model.bind(KVCache(model.specs, [sum(blocks)] * len({s.window for s in model.specs}), 16))
    ids = iter(range(1, sum(blocks) + 1))
    tables = np.zeros((len(lengths), max(blocks)), np.int32)
    for table, count in zip(tables, blocks, strict=True):
        table[:count] = [next(ids) for _ in range(count)]
    total = sum(lengths)
    return Rows(
        tokens=np.arange(total, dtype=np.int32) % 200,
        positions=np.concatenate([np.arange(n) for n in lengths]).astype(np.int32),
        starts=np.cumsum([0, *lengths]).astype(np.int32),
        contexts=np.array(lengths, np.int32),
        block_tables=[tables] * len(model.cache.kinds),
        sample_rows=np.array(sample_rows, np.int32),
    )


def watch_head(module) -> list[int]:
    """The numbers of rows that the head gets, forward by forward."""
    seen = []
    head = getattr(module, "lm_head", None)
    name = "__call__" if head is not None else "as_linear"
    head = head if head is not None else module.model.embed_tokens
    original = type(head)

    def watched(self, x):
        seen.append(int(np.prod(x.shape[:-1])))
        return getattr(original, name)(self, x)

    head.__class__ = type(original.__name__, (original,), {name: watched})
    return seen


@pytest.mark.parametrize("family", ["olmo2", "qwen3"], ids=["head of its own", "tied head"])
def test_the_head_gets_the_sampled_rows_only(family):
    model = tiny_models.make(family)
    assert model.gathers_rows
    seen = watch_head(model.module)
    rows = one_step(model, [1, 30, 50], [0, 30, 80])
    logits = model(rows)
    assert seen == [3] and logits.shape == (3, 256)
    # The same rows, taken from logits of all.
    plain = model.module(mx.array(np.arange(31, 81) % 200)[None])[0, -1]
    assert mx.abs(logits[2] - plain).max() < 1e-3 * mx.abs(plain).max()
    assert seen == [3, 50], "outside of a forward of ours the model is as it was"


def test_a_head_that_no_row_needs_does_not_run():
    vocab = 300_000
    model = tiny_models.make("llama", vocab_size=vocab, tie_word_embeddings=False)
    engine = serving.engine(model, num_blocks=20, max_num_seqs=1, max_num_batched_tokens=16)
    costs = []

    def watch(_=None):
        costs.append(mx.get_peak_memory() - mx.get_active_memory())
        mx.clear_cache()
        mx.reset_peak_memory()

    watch()
    serving.serve(engine, [list(range(40))], SamplingParams(max_tokens=2), on_step=watch)
    _, *chunks, last, decode = costs
    assert len(chunks) == 2 and max(chunks) < 2 * vocab
    assert min(last, decode) >= 4 * vocab, "float32 logits of one row"


def test_a_model_that_does_without_its_backbone_gets_its_rows_after_the_head():
    from mlx_lm.models.base import create_attention_mask

    module, config = odd_models.module("olmo2")
    usual = Model(module, config)
    assert usual.gathers_rows
    expected = usual(one_step(usual, [3, 20], [2, 22]))

    class Unusual(type(module)):
        def __call__(self, tokens, cache=None):
            cache = cache or [None] * len(self.layers)
            hidden = self.model.embed_tokens(tokens)
            mask = create_attention_mask(hidden, cache[0])
            for layer, c in zip(self.model.layers, cache, strict=True):
                hidden = layer(hidden, mask, c)
            return self.lm_head(self.model.norm(hidden))

    module.__class__ = Unusual
    backbone = type(module.model)
    model = Model(module, config)
    assert not model.gathers_rows
    assert type(module.model) is backbone
    seen = watch_head(module)
    assert mx.abs(model(one_step(model, [3, 20], [2, 22])) - expected).max() < 1e-4
    assert seen == [23]
    self_check.check(model, 16)


def test_the_module_keeps_its_looks():
    module, config = odd_models.module("llama")
    architecture = importlib.import_module("mlx_lm.models.llama")
    names = [name for name, _ in tree_flatten(module.parameters())]
    described, layers = repr(module), module.layers
    tokens = mx.array([[1, 2, 3]])
    before = module(tokens)
    model = Model(module, config)
    for _ in range(2):
        assert [name for name, _ in tree_flatten(module.parameters())] == names
        assert repr(module) == described and module.layers is layers
        assert isinstance(module.model, architecture.LlamaModel)
        assert type(module.model).__name__ == "LlamaModel"
        assert mx.array_equal(module(tokens), before)
        mx.eval(model(one_step(model, [5, 6], [4])))


def test_two_models_of_one_module_do_not_meddle():
    module, config = odd_models.module("llama")
    one, other = Model(module, config), Model(module, config)
    expected = one(one_step(one, [3, 20], [2, 22]))
    mx.eval(expected)
    assert mx.array_equal(other(one_step(other, [3, 20], [2, 22])), expected)
    assert mx.array_equal(one(one_step(one, [3, 20], [2, 22])), expected)


def test_a_dropped_model_and_its_pool_give_their_memory_back_at_once():
    gc.collect()
    gc.disable()  # not whenever the collector happens to run
    try:
        start = mx.get_active_memory()
        model = tiny_models.make("gemma3_text", hidden_size=256)
        weights = mx.get_active_memory() - start
        self_check.check(model, 16)
        assert mx.get_active_memory() - start <= weights + 4096
        engine = serving.engine(model, num_blocks=2000)
        serving.serve(engine, [[1, 2, 3]], SamplingParams(temperature=0, max_tokens=3))
        assert mx.get_active_memory() - start > weights + 1e6
        model.cache = None
        assert mx.get_active_memory() - start <= weights + 4096
        engine.close()
        model = None
        assert mx.get_active_memory() - start <= 4096
    finally:
        gc.enable()


# -- refused --


def caches(kinds):
    from mlx_lm.models import cache

    makers = {
        "K": cache.KVCache,
        "R": lambda: cache.RotatingKVCache(32),
        "keep": lambda: cache.RotatingKVCache(32, keep=4),
        "C": lambda: cache.ChunkedKVCache(32),
        "Q": cache.QuantizedKVCache,
        "list with Q": lambda: cache.CacheList(cache.KVCache(), cache.QuantizedKVCache()),
    }
    return [makers[kind]() for kind in kinds]


@pytest.mark.parametrize(
    "kinds, reason",
    [
        ("QQQ", "what it has read in QuantizedKVCache"),
        (["K", "list with Q", "K"], "what it has read in QuantizedKVCache"),
        (["R", "keep", "K"], "keeps its first 4 positions"),
    ],
)
def test_a_cache_that_cannot_be_paged_is_refused(kinds, reason):
    module, config = odd_models.module("llama")
    module.make_cache = lambda: caches(kinds)
    with pytest.raises(UnsupportedModel, match=f"llama .*{reason}"):
        Model(module, config)


def test_a_cache_that_no_layer_fills_has_no_pool():
    module, config = odd_models.module("llama")
    module.make_cache = lambda: caches("KKKK")
    model = Model(module, config)
    assert len(model.specs) == 3
    self_check.check(model, 16)


def test_a_module_that_ends_the_process_is_refused(tmp_path):
    """As mlx-lm's OLMo does where the package that it wants to know of isn't there."""
    folder = tiny_folder.make(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    tiny_folder.write(folder / "config.json", config | {"model_type": "olmo"})
    with pytest.raises(UnsupportedModel, match="module of olmo ends the process"):
        models.load(folder)


def test_a_model_that_this_device_cannot_run_is_unsupported(tmp_path, monkeypatch):
    def no_forward(*_, **__):
        raise RuntimeError("no Metal here")

    folder = tiny_folder.make(tmp_path / "m")
    monkeypatch.setattr(anatomy, "logits_of", no_forward)
    with pytest.raises(UnsupportedModel, match="mlx-lm can't run llama here: no Metal here"):
        models.load(folder)


def test_a_window_that_is_wider_than_its_cache_is_refused():
    with pytest.raises(UnsupportedModel, match="reads 25 positions in a layer whose cache keeps"):
        self_check.check(Model(*odd_models.module("plamo3")), 16)


@pytest.mark.parametrize(
    "family, shape, reads",
    [
        ("llama", Shape.ROWS, False),
        ("stablelm", Shape.CHUNKS, True),
        ("deepseek_v3", Shape.ROWS, False),
        ("gpt_bigcode", Shape.SEQUENCES, True),
        ("afm7", Shape.SEQUENCES, True),
    ],
)
def test_a_check_finds_how_a_model_takes_a_step(family, shape, reads):
    model = Model(*odd_models.module(family))
    self_check.check(model, 16)
    assert (model.shape, model.fetches) == (shape, reads)


@pytest.mark.parametrize("family", ["stablelm", "gpt_bigcode"])
def test_a_step_in_several_forwards_gives_what_is_sampled_in_its_order(family):
    """And that a sequence computes alone, whoever is computed beside it."""
    model = Model(*odd_models.module(family))
    self_check.check(model, 16)
    lengths = [1, 1, 20, 33]
    # Prompt log-probabilities come after the tokens that are sampled.
    wanted = [0, 21, 54, 1, 5, 30]
    logits = model(one_step(model, lengths, wanted))
    assert logits.shape == (6, 256)
    starts = np.cumsum([0, *lengths])
    tokens = np.arange(sum(lengths)) % 200
    for row, place in zip(logits, wanted, strict=True):
        own = np.searchsorted(starts, place, side="right") - 1
        plain = model.module(mx.array(tokens[starts[own] : place + 1])[None])[0, -1]
        assert mx.abs(row - plain).max() < 1e-3 * mx.abs(plain).max()


@pytest.mark.parametrize("scaling", [{"type": "dynamic"}, {"rope_type": "dynamic"}])
def test_dynamic_ntk_rope_is_refused_at_load(tmp_path, scaling):
    folder = tiny_folder.make(tmp_path / "m", rope_scaling=scaling | {"factor": 4.0})
    with pytest.raises(UnsupportedModel, match="llama has dynamic NTK RoPE"):
        models.load(folder)


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 4.0},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {
            "type": "longrope",
            "original_max_position_embeddings": 64,
            "short_factor": [1.0] * 8,
            "long_factor": [1.0 + i / 2 for i in range(8)],
        },
    ],
    ids=lambda scaling: scaling.get("type") or scaling.get("rope_type"),
)
def test_other_scaled_ropes_are_served(scaling):
    self_check.check(tiny_models.make("llama", rope_scaling=scaling), 16)


# -- load --


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder.make(tmp_path_factory.mktemp("models") / "tiny")


def dtypes(model) -> set:
    return {array.dtype for _, array in tree_flatten(model.module.parameters())}


@pytest.mark.parametrize("asked", [None, "float32", "float16", "bfloat16"])
def test_weights_and_pool_get_the_dtype_that_was_asked_for(folder, asked):
    model = models.load(folder, dtype=asked)
    # On a CPU float32 is what nobody asking gets.
    expected = getattr(mx, asked or "float32")
    assert dtypes(model) == {expected}
    assert {spec.dtype for spec in model.specs} == {expected}
    assert model.logits_dtype == expected
    self_check.check(model, 16)


def test_stored_16_bit_weights_become_float32_on_a_cpu(folder, tmp_path):
    stored = mx.load(str(folder / "model.safetensors"))
    half = tmp_path / "half"
    half.mkdir()
    for file in folder.iterdir():
        (half / file.name).write_bytes(file.read_bytes())
    weights = {name: array.astype(mx.bfloat16) for name, array in stored.items()}
    mx.save_safetensors(str(half / "model.safetensors"), weights, {"format": "mlx"})
    model = models.load(half)
    assert dtypes(model) == {mx.float32}
    assert model.nbytes == models.load(folder).nbytes


def test_quantised_weights_stay_so_with_float32_scales_on_a_cpu(folder, tmp_path):
    import mlx.nn as nn

    module = models.load(folder).module
    nn.quantize(module, group_size=32, bits=4)
    (tmp_path / "q").mkdir()
    for file in folder.iterdir():
        (tmp_path / "q" / file.name).write_bytes(file.read_bytes())
    module.set_dtype(mx.float16)  # with such scales a CPU is very slow
    weights = dict(tree_flatten(module.parameters()))
    mx.save_safetensors(str(tmp_path / "q" / "model.safetensors"), weights, {"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4}
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    model = models.load(tmp_path / "q")
    assert dtypes(model) == {mx.uint32, mx.float32}
    assert model.nbytes < models.load(folder).nbytes / 2
    self_check.check(model, 16)


def test_loading_says_how_far_it_is(folder):
    seen = []
    model = models.load(folder, on_bytes=lambda done, total: seen.append((done, total)))
    done = [d for d, _ in seen]
    assert done == sorted(done) and len(seen) > 10
    assert seen[-1] == (model.nbytes, model.nbytes)


def test_a_look_at_the_shapes_reads_no_weights(folder):
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    model = models.load(folder, weights=False)
    assert len(model.specs) == 2 and model.nbytes > 100_000
    assert mx.get_peak_memory() - before < 4096


def test_a_model_that_is_not_there_or_not_whole_is_invalid(folder, tmp_path):
    def copy(name: str, **changes) -> Path:
        made = tmp_path / name
        made.mkdir()
        for file in folder.iterdir():
            (made / file.name).write_bytes(file.read_bytes())
        config = json.loads((folder / "config.json").read_text())
        (made / "config.json").write_text(json.dumps(config | changes))
        return made

    with pytest.raises(UnsupportedModel, match="mlx-lm has no model of type 'nobody'"):
        models.load(copy("unknown", model_type="nobody"))
    with pytest.raises(InvalidModel, match="can't be loaded"):
        models.load(copy("layers", num_hidden_layers=3))
    with pytest.raises(InvalidModel, match="can't be loaded"):
        models.load(copy("shape", intermediate_size=100))
    cut = copy("cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InvalidModel, match="can't be loaded"):
        models.load(cut)


def test_loading_leaves_the_process_limits_alone(folder):
    code = f"""
import resource
from pathlib import Path
setrlimit = resource.setrlimit
before = (1000, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
setrlimit(resource.RLIMIT_NOFILE, before)  # no limit that anyone would set
from mlxpage.metal import model, self_check
self_check.check(model.load(Path({str(folder)!r})), 16)
assert resource.getrlimit(resource.RLIMIT_NOFILE) == before
assert resource.setrlimit is setrlimit
print("done")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.stdout.endswith("done\n"), result.stderr
