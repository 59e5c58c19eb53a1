"""The hook in MLX's attention: there once, silent for everyone else, missed when it's gone."""

from __future__ import annotations

import inspect

import pytest
import serving
import tiny_models

from mlxpage.errors import EngineError, UnsupportedModel
from mlxpage.metal import seam, self_check
from mlxpage.metal.backend import mx
from mlxpage.metal.tagged import Tagged
from mlxpage.sampling_params import SamplingParams

PARAMS = SamplingParams(temperature=0, max_tokens=8)
PROMPTS = [[1, 2, 3], list(range(40))]


@pytest.fixture(autouse=True)
def hook():
    """The hook is in its place when a test begins, and again when it has ended."""
    seam.install()
    yield
    mx.fast.scaled_dot_product_attention = seam._attention


@pytest.fixture
def calls(monkeypatch):
    """What reaches MLX's own function, as (args, kwargs)."""
    seen = []
    original = seam._dense_attention

    def record(*args, **kwargs):
        seen.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(seam, "_dense_attention", record)
    return seen


@pytest.fixture(scope="module")
def model():
    return tiny_models.make("llama")


def qkv():
    return [mx.random.normal((1, heads, 5, 16)) for heads in (4, 2, 2)]


def test_installing_again_changes_nothing():
    hook = mx.fast.scaled_dot_product_attention
    assert seam.is_installed()
    seam.install()
    assert mx.fast.scaled_dot_product_attention is hook
    assert seam._dense_attention is not hook
    assert type(seam._dense_attention).__name__ == "nb_func", "MLX's own, not one of ours"


@pytest.mark.parametrize("mask", [None, "causal", "array"])
@pytest.mark.parametrize("sinks", [None, "array"])
def test_a_call_without_tags_reaches_mlx_untouched(calls, mask, sinks):
    q, k, v = qkv()
    mask = mx.ones((5, 5), mx.bool_) if mask == "array" else mask
    sinks = mx.zeros(4) if sinks == "array" else sinks
    options = {"scale": 0.3, "mask": mask, "sinks": sinks, "stream": mx.cpu}
    out = mx.fast.scaled_dot_product_attention(q, k, v, **options)
    ((args, kwargs),) = calls
    assert [id(a) for a in args] == [id(q), id(k), id(v)]
    assert {name: id(value) for name, value in kwargs.items()} == {
        name: id(value) for name, value in options.items()
    }
    expected = seam._dense_attention(q, k, v, **options)
    assert type(out) is mx.array and mx.array_equal(out, expected)


def test_named_and_missing_arguments_mean_what_they_mean_to_mlx():
    q, k, v = qkv()
    by_name = mx.fast.scaled_dot_product_attention(q=q, k=k, v=v, scale=0.3)
    assert mx.array_equal(by_name, mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3))
    for wrong in ({}, {"scale": 0.3, "colour": 1}, {"scale": "a"}):
        with pytest.raises(TypeError):
            mx.fast.scaled_dot_product_attention(q, k, v, **wrong)
    with pytest.raises(TypeError):
        mx.fast.scaled_dot_product_attention(q, k, v, 0.3, None, None, None, None)


def test_the_hook_names_the_arguments_that_mlx_names():
    known = list(inspect.signature(seam._attention).parameters)
    documented = seam._dense_attention.__doc__.split("(", 1)[1].split(")", 1)[0]
    names = [part.split(":")[0].strip() for part in documented.split(", ")]
    assert [name for name in names if name in known] == ["q", "k", "v", "scale", "mask", "sinks"]


def test_a_tag_of_something_else_is_no_tag(calls):
    q, k, v = qkv()
    for k_tag, v_tag in [("a", "a"), (None, None), ("a", "b")]:
        tagged = Tagged.of(k * 1, k_tag), Tagged.of(v * 1, v_tag)
        out = mx.fast.scaled_dot_product_attention(q, *tagged, scale=1.0)
        assert mx.array_equal(out, seam._dense_attention(q, k, v, scale=1.0))
    assert len(calls) == 6


def test_a_pool_and_mlx_lm_beside_it_share_one_module(model):
    from mlx_lm.generate import generate_step

    def alone():
        tokens = generate_step(mx.array(PROMPTS[1]), model.module, max_tokens=8)
        return [token for token, _ in tokens]

    before = alone()
    engine = serving.engine(model)
    beside = []
    outputs = serving.serve(engine, PROMPTS, PARAMS, on_step=lambda _: beside.append(alone()))
    assert len(beside) >= 8 and all(tokens == before for tokens in beside)
    assert outputs[1].token_ids == before == alone()


def test_what_a_foreign_patch_takes_away_is_missed(model):
    """Another library that puts MLX's function back: nothing is served past the pool."""
    expected = [o.token_ids for o in serving.serve(serving.engine(model), PROMPTS, PARAMS)]
    engine = serving.engine(model)
    steps = []

    def patch(_):
        steps.append(1)
        if len(steps) == 3:
            mx.fast.scaled_dot_product_attention = seam._dense_attention

    with pytest.raises(EngineError, match="0 of 3 attention calls reached the block pool"):
        serving.serve(engine, PROMPTS, PARAMS, on_step=patch)
    assert len(steps) == 3, "the step after the patch failed"
    with pytest.raises(EngineError, match="attention calls"):
        serving.serve(serving.engine(model), PROMPTS, PARAMS)
    # The way out that the message names.
    seam.install()
    outputs = serving.serve(serving.engine(model), PROMPTS, PARAMS)
    assert [output.token_ids for output in outputs] == expected


def test_a_foreign_patch_that_calls_ours_is_no_harm(model):
    expected = [o.token_ids for o in serving.serve(serving.engine(model), PROMPTS, PARAMS)]
    ours, seen = mx.fast.scaled_dot_product_attention, []

    def wrapper(*args, **kwargs):
        seen.append(1)
        return ours(*args, **kwargs)

    mx.fast.scaled_dot_product_attention = wrapper
    outputs = serving.serve(serving.engine(model), PROMPTS, PARAMS)
    assert [output.token_ids for output in outputs] == expected
    assert seen


def test_a_foreign_patch_is_noticed_at_load():
    model = tiny_models.make("llama", num_hidden_layers=1)
    mx.fast.scaled_dot_product_attention = seam._dense_attention
    with pytest.raises(UnsupportedModel, match="has replaced"):
        self_check.check(model, 16)
