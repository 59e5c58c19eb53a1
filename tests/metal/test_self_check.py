"""The check at load passes sound models and stops every bug that is planted here."""

from __future__ import annotations

import functools
import os

import numpy as np
import odd_models
import pytest
import tiny_folder
import tiny_models
from families import zoo
from mlx.utils import tree_flatten

from mlxpage.errors import InvalidModel, OutOfMemory, UnsupportedModel
from mlxpage.metal import model as models
from mlxpage.metal import reference, seam, self_check
from mlxpage.metal.backend import mx
from mlxpage.metal.kv_cache import KVCache
from mlxpage.metal.layer_cache import LayerCache
from mlxpage.metal.layout import Shape
from mlxpage.metal.model import Model

FLOATS = [mx.float32, mx.float16, mx.bfloat16]
# MLX multiplies experts' weights on a CPU in float32 only.
EXPERTS = {"mixtral", "qwen3_moe", "gpt_oss"}


@functools.cache
def tiny(family, dtype=mx.float32):
    return tiny_models.make(family, dtype=dtype)


@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("family", sorted(tiny_models.CONFIGS))
def test_sound_models_pass(family, block_size):
    for seed in range(3):
        self_check.check(tiny(family), block_size, seed)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("family", sorted(set(tiny_models.CONFIGS) - EXPERTS))
def test_sound_models_of_16_bits_pass(family, dtype):
    self_check.check(tiny(family, dtype), 16)


def test_a_model_that_mlx_lm_cannot_run_here_is_refused():
    with pytest.raises(UnsupportedModel, match="mlx-lm can't run gpt_oss on this device"):
        self_check.check(tiny("gpt_oss", mx.float16), 16)


def refused(model, dtype=mx.float32) -> bool:
    """Whether a bug is found in the way that most models take: in another they may be right."""
    model = tiny(model, dtype) if isinstance(model, str) else model
    try:
        self_check.check(model, 16, ways=self_check.WAYS[:1])
    except UnsupportedModel as error:
        assert "computes something else over a block pool" in str(error)
        return True
    return False


# -- bugs in the reading --

plan = reference.plan


def planned(**changes):
    """`plan` with some of its arguments changed by functions of them all."""

    def changed(starts, contexts, tables, block_size, window, heads):
        given = {
            "starts": starts,
            "contexts": contexts,
            "tables": tables,
            "heads": heads,
            "block_size": block_size,
            "window": window,
        }
        return plan(**given | {name: change(given) for name, change in changes.items()})

    return changed


def swapped(given):
    """Two sequences' tables, the one for the other."""
    tables = given["tables"].copy()
    tables[[1, 2]] = tables[[2, 1]]
    return tables


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "cohere2"])
@pytest.mark.parametrize("change", ["ignored", -1, 1])
def test_a_wrong_window_is_stopped(monkeypatch, family, change):
    def window(given):
        if given["window"] is None or change == "ignored":
            return None
        return given["window"] + change

    monkeypatch.setattr(reference, "plan", planned(window=window))
    assert refused(family)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("off", [-1, 1])
def test_a_context_off_by_one_is_stopped(monkeypatch, off, dtype):
    def contexts(given):
        last = given["tables"].shape[1] * given["block_size"]
        return np.clip(given["contexts"] + off, np.diff(given["starts"]), last)

    monkeypatch.setattr(reference, "plan", planned(contexts=contexts))
    assert refused("llama", dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_somebody_elses_table_is_stopped(monkeypatch, family, dtype):
    monkeypatch.setattr(reference, "plan", planned(tables=swapped))
    assert refused(family, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("which", [0, -2, -1, 1 / 2])
def test_one_forgotten_position_is_stopped(monkeypatch, which, family, dtype):
    """The first, the last but one, a row's own and the middle one, of 3 to 64 that a row reads."""

    def forgetful(starts, contexts, tables, block_size, window, heads):
        made = plan(starts, contexts, tables, block_size, window, heads)
        for span in made.spans:
            rows, keys = span.rows.stop - span.rows.start, span.keys.stop - span.keys.start
            mask = np.array(span.mask) if isinstance(span.mask, mx.array) else None
            if mask is None and span.mask == "causal":
                mask = (np.arange(keys) <= np.arange(keys - rows, keys)[:, None])[None, None]
            elif mask is None:
                mask = np.ones((rows, 1, 1, keys), bool)
            for row in mask.reshape(-1, keys):
                readable = np.flatnonzero(row)
                if len(readable) > 2:
                    row[readable[len(readable) // 2 if which == 1 / 2 else which]] = False
            span.mask = mx.array(mask)
        return made

    monkeypatch.setattr(reference, "plan", forgetful)
    assert refused(family, dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_k_in_the_place_of_v_is_stopped(monkeypatch, dtype):
    paged_attention = reference.paged_attention
    monkeypatch.setattr(
        reference,
        "paged_attention",
        lambda q, blocks, *args, **options: paged_attention(
            q, blocks._replace(k=blocks.v, v=blocks.k), *args, **options
        ),
    )
    assert refused("llama", dtype)


def test_a_scale_that_is_not_the_models_is_stopped(monkeypatch):
    attend = LayerCache.attend
    monkeypatch.setattr(
        LayerCache,
        "attend",
        lambda self, q, window, scale, sinks: attend(self, q, window, 0.3, sinks),
    )
    assert refused("llama")


def test_forgotten_sinks_are_stopped(monkeypatch):
    attend = LayerCache.attend
    monkeypatch.setattr(
        LayerCache,
        "attend",
        lambda self, q, window, scale, sinks: attend(self, q, window, scale, None),
    )
    assert refused("gpt_oss")


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_bug_in_a_single_layer_is_stopped(monkeypatch, layer):
    paged_attention, calls = reference.paged_attention, []

    def sometimes(q, blocks, *args, **options):
        calls.append(1)
        if (len(calls) - 1) % 3 == layer:
            blocks = blocks._replace(v=mx.roll(blocks.v, 1, axis=1))
        return paged_attention(q, blocks, *args, **options)

    monkeypatch.setattr(reference, "paged_attention", sometimes)
    assert refused("llama")


# -- bugs in the writing and in the positions --


@pytest.mark.parametrize("off", [-1, 1])
def test_rows_in_the_wrong_slot_are_stopped(monkeypatch, off):
    write = reference.write
    monkeypatch.setattr(
        reference,
        "write",
        lambda pool, rows, part, blocks, offsets, begun: write(
            pool, rows, part, blocks, (offsets + off) % 16, begun
        ),
    )
    assert refused("llama")


def test_a_forward_that_writes_nothing_is_stopped(monkeypatch):
    write, calls = reference.write, []

    def forgetful(pool, *where):
        calls.append(1)
        return write(pool, *where) if len(calls) > 6 else pool  # a K and a V for each layer

    monkeypatch.setattr(reference, "write", forgetful)
    assert refused("llama")


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", ["decoding rows one too far", "from the forward's start", "zero"])
def test_wrong_positions_are_stopped(monkeypatch, kind, dtype):
    """All positions of a sequence one too far would be no difference to RoPE."""
    begin = KVCache.begin

    def changed(self, rows, **options):
        begin(self, rows, **options)
        positions, lengths = rows.positions.copy(), np.diff(rows.starts)
        if kind == "decoding rows one too far":
            positions[: (lengths == 1).sum()] += 1
        elif kind == "from the forward's start":
            positions = np.concatenate([np.arange(n) for n in lengths]).astype(np.int32)
        else:
            positions[:] = 0
        self._forward.given = mx.array(positions)

    monkeypatch.setattr(KVCache, "begin", changed)
    assert refused("llama", dtype)


def test_rows_of_others_before_the_head_are_stopped(monkeypatch):
    begin = KVCache.begin

    def changed(self, rows, **options):
        begin(self, rows, **options)
        rows.sample_rows[:] = np.maximum(rows.sample_rows - 1, 0)

    monkeypatch.setattr(KVCache, "begin", changed)
    assert refused("llama")


# -- models --


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_damaged_weights_are_invalid(name, bad):
    model = tiny_models.make("llama")
    weights = dict(tree_flatten(model.module.parameters()))
    weights[name] = mx.full(weights[name].shape, bad)
    model.module.load_weights(list(weights.items()))
    with pytest.raises(InvalidModel, match="not finite") as caught:
        self_check.check(model, 16)
    assert not isinstance(caught.value, UnsupportedModel)


def test_logits_that_are_finite_without_a_pool_only_are_stopped(monkeypatch):
    paged_attention = reference.paged_attention
    monkeypatch.setattr(
        reference,
        "paged_attention",
        lambda *args, **options: paged_attention(*args, **options) * float("nan"),
    )
    assert refused("llama")


def test_a_model_that_reads_what_is_to_come_is_refused():
    """It attends in both directions, so each cut of a prompt gives it other logits: by that
    measure any difference would be noise."""
    module, config = odd_models.module("olmo2")

    class BothWays(type(module)):
        def __call__(self, tokens, cache=None):
            hidden = self.model.embed_tokens(tokens)
            for layer, c in zip(self.layers, cache or [None] * len(self.layers), strict=True):
                hidden = layer(hidden, None, c)
            return self.lm_head(self.model.norm(hidden))

    module.__class__ = BothWays
    with pytest.raises(UnsupportedModel, match="computed in two forwards"):
        self_check.check(Model(module, config), 16)


def test_a_check_leaves_nothing_behind():
    model = tiny_models.make("gemma3_text")
    self_check.check(model, 16)
    cache = KVCache(model.specs, [4, 4], 16)
    model.bind(cache)
    mx.clear_cache()
    memory, random = mx.get_active_memory(), [array.tolist() for array in mx.random.state]
    self_check.check(model, 16)
    assert model.cache is cache
    assert not any(array.any().item() for array in cache.arrays())
    assert mx.get_active_memory() - memory < 4096
    assert [array.tolist() for array in mx.random.state] == random


def test_a_check_that_fails_gives_the_cache_back(monkeypatch):
    monkeypatch.setattr(reference, "plan", planned(tables=swapped))
    model = tiny_models.make("llama")
    cache = KVCache(model.specs, [4], 16)
    model.bind(cache)
    assert refused(model)
    assert model.cache is cache


def test_no_memory_for_a_check_is_no_reason_to_go_another_way(monkeypatch):
    def full(*_, **__):
        raise RuntimeError("[malloc] Unable to allocate 7 bytes.")

    monkeypatch.setattr(reference, "paged_attention", full)
    with pytest.raises(OutOfMemory, match="no memory to check"):
        self_check.check(tiny_models.make("llama"), 16)


def test_a_model_that_goes_another_way_says_why(monkeypatch):
    model = tiny_models.make("llama")
    self_check.check(model, 16)
    assert (model.shape, model.why_not_rows) == (Shape.ROWS, None)
    attend = LayerCache.attend

    def not_of_rows(layer, q, *arguments):
        if not layer.step.is_run:
            raise ValueError("it takes one row")
        return attend(layer, q, *arguments)

    monkeypatch.setattr(LayerCache, "attend", not_of_rows)
    self_check.check(model, 16)
    assert model.shape is Shape.SEQUENCES and "it takes one row" in model.why_not_rows


def test_a_model_that_is_right_in_no_way_says_why_not_in_the_usual_one(monkeypatch):
    reasons = iter(["the first", "the second", "the third", "the fourth"])

    def never(*_):
        raise ValueError(next(reasons))

    monkeypatch.setattr(LayerCache, "attend", never)
    with pytest.raises(UnsupportedModel, match="the first"):
        self_check.check(tiny_models.make("llama"), 16)


def test_most_models_only_hand_on_the_k_and_v_they_get():
    model = tiny_models.make("llama")
    self_check.check(model, 16)
    assert not model.fetches


def test_a_model_that_reads_its_k_besides_gets_the_real_one(monkeypatch):
    from mlx_lm.models import llama

    attention = llama.scaled_dot_product_attention

    def with_first_key(q, k, v, **options):
        out = attention(q, k, v, **options)
        return out + 0.5 * mx.repeat(k[:, :, :1], q.shape[1] // k.shape[1], axis=1)

    model = tiny_models.make("llama")
    monkeypatch.setattr(llama, "scaled_dot_product_attention", with_first_key)
    self_check.check(model, 16)
    assert model.fetches


def test_how_a_model_takes_tokens_shows_while_its_weights_can_not_be_read(tmp_path):
    folder = tiny_folder.make(tmp_path / "model")
    model = models.load(folder, weights=False)
    os.truncate(folder / "model.safetensors", 0)
    assert self_check.why_not_rows(model, 16) is None
    with pytest.raises(RuntimeError):
        mx.eval(model.module.parameters())


# -- latent attention --


@functools.cache
def latent() -> Model:
    return Model(*zoo.make("deepseek_v3"))


def test_latent_attention_passes_as_most_do():
    self_check.check(latent(), 16, ways=self_check.WAYS[:1])
    assert (latent().shape, latent().fetches) == (Shape.ROWS, False)


WRONG = {
    "a scale that is too small": lambda q, q_v, scale: (q, q_v, 0.9 * scale),
    "a V that is scaled again": lambda q, q_v, scale: (q, q_v * scale, scale),
    "a V that is left out": lambda q, q_v, scale: (q, q_v * 0, scale),
    "a K that is left out": lambda q, q_v, scale: (q * 0, q_v, scale),
    "a head's V for another": lambda q, q_v, scale: (q, mx.roll(q_v, 1, axis=1), scale),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_latent_attention_is_stopped(monkeypatch, wrong):
    attend = reference.Pool.attend_latent

    def changed(self, step, *arguments):
        return attend(self, step, *WRONG[wrong](*arguments))

    monkeypatch.setattr(reference.Pool, "attend_latent", changed)
    assert refused(latent())


def test_somebody_elses_latents_are_stopped(monkeypatch):
    monkeypatch.setattr(reference, "plan", planned(tables=swapped))
    assert refused(latent())


def test_whoever_reads_a_latent_himself_gets_no_numbers(monkeypatch):
    """And then gets it gathered, in a forward that has a mask."""
    monkeypatch.setattr(seam, "_is_latent", lambda *_: False)
    model = Model(*zoo.make("deepseek_v3"))
    self_check.check(model, 16)
    assert (model.shape, model.fetches) == (Shape.CHUNKS, True)
    assert "changes K and V after its cache" in model.why_not_rows


def test_a_model_that_chooses_what_it_reads_has_it_gathered():
    """Also while it would choose all that there is."""
    for topk in (8, 2048):
        model = Model(*zoo.make("deepseek_v32", index_topk=topk))
        self_check.check(model, 16)
        assert (model.shape, model.fetches) == (Shape.CHUNKS, True)
