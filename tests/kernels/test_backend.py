"""The whole engine on the kernels: the same tokens as on the reference, or the reference itself."""

from __future__ import annotations

from collections import Counter

import numpy as np
import paging
import pytest
import serving
import stress
import tiny_folder
import tiny_models

from mlxpage import describe
from mlxpage.engine import Engine
from mlxpage.errors import InvalidRequest, UnsupportedModel
from mlxpage.metal import choice, kernels, memory, reference, self_check
from mlxpage.metal.backend import mx
from mlxpage.metal.kernels import chunks, launch, pool
from mlxpage.metal.kernels.work import RunCost
from mlxpage.metal.kv_cache import KVCache
from mlxpage.metal.layout import Rows, Shape
from mlxpage.metal.model import Model
from mlxpage.sampling_params import SamplingParams

ON_KERNELS = choice.Backend("metal", kernels, "the tests")
LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": stress.CHUNK}


@pytest.fixture(autouse=True)
def fresh_kernels(metal):
    with paging.fresh_kernels():
        yield


def engine(model, backend, num_blocks=40) -> Engine:
    model.fetches = False  # as the self-check finds of these
    plan = memory.plan(model, num_blocks=num_blocks, **LIMITS)
    return Engine(model, serving.ByteTokenizer(), plan, seed=0, backend=backend, **LIMITS)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, n).tolist() for n in (1, 17, 100, 5, 64, 33)]


PARAMS = [
    SamplingParams(temperature=0, max_tokens=30, logprobs=0),
    SamplingParams(temperature=1, max_tokens=30, seed=1, logprobs=0),
    SamplingParams(temperature=0, max_tokens=1, logprobs=0),
    SamplingParams(temperature=0, max_tokens=20, repetition_penalty=1.3, logprobs=0),
    SamplingParams(temperature=1, max_tokens=30, seed=3, top_p=0.9, logprobs=0),
    SamplingParams(temperature=0, max_tokens=12, prompt_logprobs=1, logprobs=0),
]


@pytest.mark.parametrize("num_blocks", [40, 11], ids=["roomy", "crowded"])
@pytest.mark.parametrize("family", stress.OPTIONS)
def test_the_kernels_serve_the_tokens_of_the_reference(family, num_blocks):
    model = stress.make_model(family)
    results = []
    for backend in (choice.REFERENCE, ON_KERNELS):
        served = engine(model, backend, num_blocks)
        results.append(serving.serve(served, prompts(), PARAMS))
        assert served.stats()["failed_steps"] == 0
        assert served.stats()["backend"]["name"] == backend.name
    for expected, output in zip(*results, strict=True):
        assert output.token_ids == expected.token_ids
        for ours, theirs in zip(output.logprobs, expected.logprobs, strict=True):
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_kernels_and_compiled_steps_take_a_pool_of_another_size(family):
    """With a step in flight whenever the pool grows or is trimmed."""
    model = stress.make_model(family)
    params = SamplingParams(temperature=0, max_tokens=30)
    expected = serving.serve(engine(model, choice.REFERENCE), prompts(), params)
    served = serving.elastic_engine(model, start=3, num_blocks=60, backend=ON_KERNELS, **LIMITS)
    steps, flights = Counter(), Counter()

    def trim(served):
        steps["all"] += 1
        if steps["all"] % 5 == 0:
            flights[len(served._in_flight)] += 1
            served.trim(cached=steps["all"] % 10 == 0)

    outputs = serving.serve(served, prompts(), params, on_step=trim)
    stats = served.stats()
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert min(stats["resizes"].values()) >= 4 and flights[1] >= 4
    assert stats["failed_steps"] == 0
    if mx.metal.is_available() or mx.cuda.is_available():  # the simulator can't be traced
        assert model._compiled._functions and model._compiled.error is None


@pytest.mark.parametrize("family", stress.OPTIONS)
def test_the_kernels_pass_their_check_on_a_models_shapes(family):
    model = stress.make_model(family)
    self_check.check_kernels(model, 16)
    self_check.check(model, 16, backend=kernels)


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (None, 4)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_the_kernels_serve_the_tokens_of_the_reference_over_quantised_blocks(family, bits):
    model = tiny_models.make(family, head_dim=32)
    model.quantise_cache(*bits)
    results = []
    for backend in (choice.REFERENCE, ON_KERNELS):
        served = engine(model, backend, num_blocks=9)
        results.append(serving.serve(served, prompts(), PARAMS))
        assert served.stats()["failed_steps"] == 0
        assert served.scheduler.prefix_cache.num_evictions, "blocks come and go"
    for expected, output in zip(*results, strict=True):
        # What lies between two codes may become either, and then a step of a code is no rounding.
        for ours, theirs in zip(output.logprobs, expected.logprobs, strict=True):
            if ours.token_id != theirs.token_id:
                break
            assert ours.logprob == pytest.approx(theirs.logprob, abs=0.05)
    same = [a.token_ids == b.token_ids for a, b in zip(*results, strict=True)]
    assert sum(same) >= len(same) - 1


@pytest.mark.parametrize("bits", [(None, None), (8, 4)], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_blocks_come_back_from_a_disk_into_the_kernels_pools(tmp_path, family, bits):
    outputs = []
    for _ in range(2):
        model = tiny_models.make(family, head_dim=32)
        model.quantise_cache(*bits)
        model.fetches = False
        tier = serving.disk_tier(tmp_path, model)
        served = serving.engine(model, backend=ON_KERNELS, tier=tier, num_blocks=9, **LIMITS)
        outputs.append(
            serving.serve(served, prompts(), SamplingParams(temperature=0, max_tokens=6))
        )
        served._store_all()
        served._tier.store.close()
    assert served.scheduler.prefix_cache.num_restored_tokens >= 96
    assert served.stats()["failed_steps"] == 0
    assert [o.token_ids for o in outputs[0]] == [o.token_ids for o in outputs[1]]


@pytest.mark.parametrize("bits", [(8, 8), (4, 4)], ids=str)
def test_the_kernels_pass_their_check_over_quantised_blocks(bits):
    model = tiny_models.make("gemma3_text", head_dim=32)
    model.quantise_cache(*bits)
    self_check.check_kernels(model, 16)
    self_check.check(model, 16, backend=kernels)


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("common.h", "word >> i * BITS / 8 * 8", "word"),
        ("common.h", "low = min(low, element);", ""),
        ("paged_attention.metal", "added[j][piece] += V_CODES ? weight * by[piece].y : 0.0f;", ""),
    ],
)
def test_kernels_that_read_codes_otherwise_fail_their_check(file, old, new):
    model = tiny_models.make("llama", head_dim=32)
    model.quantise_cache(8, 8)
    assert launch._text(file).count(old) == 1
    with paging.text_changed(file, old, new):
        paging.forget()
        with pytest.raises(UnsupportedModel, match="differs from the reference by"):
            self_check.check_kernels(model, 16)


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("paged_attention.metal", "at > first_key", "at >= first_key"),
        ("merge_partials.metal", "run < runs; run++", "run + 1 < runs; run++"),
        ("write_kv.metal", "= slot % BLOCK_SIZE;", "= (slot + 1) % BLOCK_SIZE;"),
        ("gather_blocks.metal", "position / BLOCK_SIZE : 0", "0 : 0"),
    ],
)
def test_kernels_that_give_something_else_fail_their_check(file, old, new):
    model = tiny_models.make("gemma3_text", head_dim=32)
    assert launch._text(file).count(old) == 1
    with paging.text_changed(file, old, new):
        paging.forget()
        with pytest.raises(UnsupportedModel, match="differs from the reference by"):
            self_check.check_kernels(model, 16)


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("latent_attention.metal", "+ i < end ?", "+ i + 1 < end ?"),
        ("latent_attention.metal", "sum += queries_v[j][e] * elements_v[e];", ""),
        ("merge_partials.metal", "run < runs; run++", "run + 1 < runs; run++"),
        ("gather_blocks.metal", "position / BLOCK_SIZE : 0", "0 : 0"),
    ],
)
def test_wrong_latent_attention_fails_its_check(file, old, new):
    model = stress.make_model("deepseek_v3")
    assert launch._text(file).count(old) == 1
    with paging.text_changed(file, old, new):
        paging.forget()
        with pytest.raises(UnsupportedModel, match=r"attention of .* differs from the reference"):
            self_check.check_kernels(model, 16)


def test_quantised_latents_are_left_to_the_reference(monkeypatch):
    model = stress.make_model("deepseek_v3")
    model.quantise_cache(8, 8)
    monkeypatch.setattr(choice, "wanted", lambda name: ON_KERNELS)
    told = []
    chosen = choice.checked(model, 16, None, told.append)
    assert chosen.ops is reference and (model.shape, model.fetches) == (Shape.ROWS, False)
    assert "no kernel reads quantised blocks of latent attention" in told[0]


@pytest.mark.parametrize("new", ["at >= first_key", "this is no Metal"])
def test_broken_kernels_are_told_once_and_the_reference_serves(monkeypatch, new):
    monkeypatch.setattr(choice, "wanted", lambda name: ON_KERNELS)
    model = tiny_models.make("gemma3_text", head_dim=32)
    expected = serving.serve(engine(model, choice.REFERENCE), prompts(), PARAMS[0])
    told = []
    with paging.text_changed("paged_attention.metal", "at > first_key", new):
        paging.forget()
        backend = choice.checked(model, 16, None, told.append)
        outputs = serving.serve(engine(model, backend), prompts(), PARAMS[0])
    assert (backend.name, backend.ops) == ("reference", reference)
    assert len(told) == 1 and "the metal kernels failed" in told[0]
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]


def test_nothing_is_promised_of_a_model_that_cannot_be_served_at_all(monkeypatch):
    monkeypatch.setattr(choice, "wanted", lambda name: ON_KERNELS)

    def refused(*_, **__):
        raise UnsupportedModel("it can't be paged")

    monkeypatch.setattr(self_check, "check", refused)
    told = []
    with pytest.raises(UnsupportedModel, match="it can't be paged"):
        choice.checked(tiny_models.make("llama"), 16, None, told.append)
    assert not told


def test_without_anyone_to_tell_it_is_a_warning(monkeypatch):
    monkeypatch.setattr(choice, "wanted", lambda name: ON_KERNELS)
    model = tiny_models.make("gemma3_text", head_dim=32)
    with paging.text_changed("paged_attention.metal", "at > first_key", "at >= first_key"):
        paging.forget()
        with pytest.warns(RuntimeWarning, match="reference backend serves instead") as warned:
            choice.checked(model, 16, None, None)
    assert len(warned) == 1


def test_sound_kernels_serve_and_say_that_they_were_checked(monkeypatch):
    monkeypatch.setattr(choice, "wanted", lambda name: ON_KERNELS)
    backend = choice.checked(tiny_models.make("llama"), 16, None, None)
    assert backend.ops is kernels
    assert backend.why == "the tests; the kernels passed their check"


@pytest.mark.parametrize("gathers", [True, False])
def test_a_model_that_cannot_be_compiled_is_served_as_it_is(monkeypatch, gathers):
    """One that looks at its numbers: a trace has none. All else must stand."""
    model = stress.make_model("gpt_oss")
    if not gathers:
        model._gathers_rows = False
        model.module.model.__class__ = type(model.module.model).__mro__[1]
    call = type(model.module).__call__

    def looking(module, tokens, *args, **options):
        assert tokens.min().item() >= 0
        return call(module, tokens, *args, **options)

    monkeypatch.setattr(type(model.module), "__call__", looking)
    expected = serving.serve(engine(model, choice.REFERENCE), prompts(), PARAMS[0])
    served = engine(model, ON_KERNELS)
    outputs = serving.serve(served, prompts(), PARAMS[0])
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert served.stats()["backend"]["not_compiled"]
    assert not served.stats()["failed_steps"]


def test_metadata_that_is_made_while_a_function_is_compiled_is_an_error():
    model = tiny_models.make("llama", hidden_size=128)
    served = engine(model, ON_KERNELS)
    serving.serve(served, prompts(), SamplingParams(temperature=0, max_tokens=3))
    (step,) = model.cache._forward.steps
    known = model.cache.inputs()
    model.cache.put(known, tracing=True)
    with pytest.raises(RuntimeError, match="attends otherwise than it did before"):
        step.work(3, RunCost(1, 1, 1))
    with pytest.raises(RuntimeError, match="written otherwise than they were before"):
        step.slots(0)
    model.cache.put(known)
    step.work(3, RunCost(1, 1, 1))


def test_a_compiled_step_over_quantised_blocks_writes_its_own_rows(monkeypatch):
    """Whatever is made while a function is compiled stays what it is. In the kernels' place stands
    plain MLX, which `mx.compile` takes on a CPU too: slots become fences, and fences results."""

    def write(k, v, blocks, slots, after):
        return slots[:8] + 0 * after[:8]

    def paged_attention(q, blocks, work, after, **_):
        return q * 0 + after[:1].astype(q.dtype).reshape(1, 1, 1, 1), after

    monkeypatch.setattr(pool, "write", write)
    monkeypatch.setattr(pool, "paged_attention", paged_attention)
    found = []
    for compiles in (True, False):
        monkeypatch.setattr(kernels, "COMPILES", compiles)
        model = tiny_models.make("llama", head_dim=32)
        model.quantise_cache(8, 8)
        model.fetches = False
        model.bind(KVCache(model.specs, [8], 16, kernels, fetches=False))
        steps = []
        for position in range(1, 7):
            logits = model(one_row(position))
            mx.eval(logits, model.cache.written())
            steps.append(logits.tolist())
        assert bool(model._compiled._functions) == compiles and model._compiled.error is None
        found.append(steps)
    assert found[0] == found[1]
    assert len({str(logits) for logits in found[1]}) == 6


def test_a_compiled_step_of_latent_attention_writes_its_own_rows(monkeypatch):
    """As above."""

    def write(k, v, blocks, slots, after):
        return slots[:8] + 0 * after[:8]

    def latent_attention(q, q_v, blocks, work, after, **_):
        out = q * 0 + after[:1].astype(q.dtype).reshape(1, 1, 1, 1)
        return out + work.inputs[1][2].astype(q.dtype), after

    monkeypatch.setattr(pool, "write", write)
    monkeypatch.setattr(pool, "latent_attention", latent_attention)
    found = []
    for compiles in (True, False):
        monkeypatch.setattr(kernels, "COMPILES", compiles)
        model = stress.make_model("deepseek_v3")
        model.bind(KVCache(model.specs, [8], 16, kernels, fetches=False))
        steps = []
        for position in range(1, 7):
            logits = model(one_row(position))
            mx.eval(logits, model.cache.written())
            steps.append(logits)
        assert bool(model._compiled._functions) == compiles and model._compiled.error is None
        assert model.cache.layers[0].attention.is_latent
        found.append(np.array(mx.concatenate(steps)))
    assert np.abs(found[0] - found[1]).max() < 1e-4
    assert len({str(logits) for logits in found[1].tolist()}) == 6


def one_row(position: int) -> Rows:
    """The only sequence's next token, in block 3."""
    arrays = [1], [position], [0, 1], [position + 1]
    tables = [np.array([[3]], np.int32)]
    return Rows(*(np.array(array, np.int32) for array in arrays), tables, np.array([0], np.int32))


def test_v_of_another_type_than_k_is_written_in_the_pools():
    """Norms in float32 make the K of a model in bfloat16 float32, but not its V."""
    model = tiny_models.make("qwen3", dtype=mx.bfloat16, head_dim=32)
    for layer in model.module.model.layers:
        norm = layer.self_attn.k_norm
        norm.weight = norm.weight.astype(mx.float32)
    model = Model(model.module, model.config)
    assert model.specs[0].dtype == mx.float32
    self_check.check_kernels(model, 16)
    self_check.check(model, 16, backend=kernels)


# -- the fence --


class Recorder:
    """Stands between a pool and the kernels, and notes what each call waits for and gives."""

    def __init__(self, monkeypatch):
        self.calls: list[tuple] = []
        """(what, pool, fence taken, fence given) in order, and ("end", after) of each forward."""
        for module, name in (
            (pool, "write"),
            (pool, "paged_attention"),
            (pool, "latent_attention"),
            (pool, "gather"),
            (chunks, "gather"),
        ):
            monkeypatch.setattr(module, name, self.noting(name, getattr(module, name)))
        end = KVCache.end

        def noted(cache, after):
            end(cache, after)
            self.calls.append(("end", cache.after))

        monkeypatch.setattr(KVCache, "end", noted)

    def noting(self, name, call):
        def noted(*args, **options):
            result = call(*args, **options)
            at, taken, given = {
                "write": (2, args[4:5], result),
                "paged_attention": (1, args[3:4], result[1]),
                "latent_attention": (2, args[4:5], result[1]),
                "gather": (0, args[4:5], None),
            }[name]
            blocks, (taken,) = args[at], taken
            kind = "append" if options.get("new") is not None else name
            self.calls.append((kind, id(blocks.k), taken, given))
            return result

        return noted


@pytest.mark.parametrize(
    "family, fetches, bits",
    [
        ("llama", False, None),
        ("llama", True, None),
        ("llama", False, 8),
        ("deepseek_v3", False, None),
    ],
)
def test_every_read_comes_after_its_layers_write_and_every_write_after_the_last_step(
    monkeypatch, family, fetches, bits
):
    model = stress.make_model(family)
    model.quantise_cache(bits, bits)
    monkeypatch.setattr(kernels, "COMPILES", False)  # a trace has other arrays
    served = engine(model, ON_KERNELS)
    model.fetches = fetches
    served.pool.make_arrays()
    recorder = Recorder(monkeypatch)
    serving.serve(served, prompts(), SamplingParams(temperature=0, max_tokens=3))
    after, fences, kinds = None, {}, Counter()
    for kind, *call in recorder.calls:
        kinds[kind] += 1
        if kind == "end":
            (after,) = call
            fences.clear()
            continue
        k_pool, taken, given = call
        if k_pool in fences:
            assert any(taken is fence for fence in fences[k_pool]), "of the layer in this forward"
        else:
            assert kind in ("write", "append"), "nothing is read before the forward has written"
            assert after is None or taken is after
        if given is not None:
            fences.setdefault(k_pool, []).append(given)
    assert kinds["end"] > 3 and kinds["write"] and kinds["gather"]
    read = "paged_attention" if fetches or bits else "append"
    read = "latent_attention" if family == "deepseek_v3" else read
    assert {read, "write", "gather", "end"} == {*kinds}


def test_what_a_step_evaluates_holds_every_fence_and_what_comes_after_its_reads():
    model = tiny_models.make("llama", hidden_size=128)
    served = engine(model, ON_KERNELS)
    serving.serve(served, prompts(), SamplingParams(temperature=0, max_tokens=2))
    written = model.cache.written()
    assert written[-1] is model.cache._forward.after
    fences = {id(layer.pool.fence) for layer in model.cache.layers}
    assert {id(array) for array in written[:-1]} == fences


# -- which backend --


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.delenv("MLXPAGE_BACKEND", raising=False)
    monkeypatch.setattr(choice, "device", lambda: type("Device", (), {"kind": "cpu"}))


def test_without_a_gpu_the_reference_serves(on_cpu):
    backend = choice.wanted()
    assert (backend.name, backend.why) == ("reference", "there is no GPU")


def test_the_environment_chooses(on_cpu, monkeypatch):
    monkeypatch.setenv("MLXPAGE_BACKEND", "reference")
    assert choice.wanted().why == "MLXPAGE_BACKEND says so"


@pytest.mark.parametrize("name", ["metal", "cuda", "gpu"])
@pytest.mark.parametrize("by_environment", [False, True])
def test_a_backend_that_is_not_there_is_refused(on_cpu, monkeypatch, name, by_environment):
    if by_environment:
        monkeypatch.setenv("MLXPAGE_BACKEND", name)
    source = "MLXPAGE_BACKEND" if by_environment else "backend"
    with pytest.raises(InvalidRequest, match=f"{source} is '{name}'"):
        choice.wanted(None if by_environment else name)


@pytest.mark.parametrize("kind", ["metal", "cuda"])
def test_a_gpu_is_used_if_nothing_else_is_asked_for(on_cpu, monkeypatch, kind):
    monkeypatch.setattr(choice, "device", lambda: type("Device", (), {"kind": kind}))
    assert (choice.wanted().name, choice.wanted().ops) == (kind, kernels)
    assert choice.wanted("reference").ops is reference


# -- what `mlxpage info` tells of it --


def test_info_tells_that_the_kernels_passed_their_check(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "wanted", lambda name=None: ON_KERNELS)
    told = "metal (the tests; the kernels passed their check)"
    assert describe.machine()["backend"] == told
    assert (
        describe.model(tiny_folder.make(tmp_path / "model", hidden_size=128))["backend for it"]
        == told
    )


def test_info_tells_why_the_kernels_failed(monkeypatch, tmp_path):
    monkeypatch.setattr(choice, "wanted", lambda name=None: ON_KERNELS)
    with paging.text_changed("paged_attention.metal", "at > first_key", "this is no Metal"):
        paging.forget()
        backend = describe.machine()["backend"]
        of_model = describe.model(tiny_folder.make(tmp_path / "model", hidden_size=128))[
            "backend for it"
        ]
    assert backend.startswith("reference (the metal kernels failed: ")
    assert of_model.startswith("reference (the metal kernels failed: ")
