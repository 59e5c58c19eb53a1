"""The budget holds: as planned, and as measured."""

from __future__ import annotations

import functools
import gc

import numpy as np
import odd_models
import prose
import pytest
import serving
import tiny_models
from families import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxpage.errors import InvalidRequest, OutOfMemory
from mlxpage.metal import memory, self_check
from mlxpage.metal import model as models
from mlxpage.metal.backend import Device, mx
from mlxpage.metal.layout import StateSpec, group_kinds
from mlxpage.metal.model import Model
from mlxpage.metal.plan import Plan
from mlxpage.sampling_params import SamplingParams
from mlxpage.text import Tokenizer

GB = 10**9


@functools.cache
def tiny(family):
    return made(family)


def made(family, **changes) -> Model:
    if family not in STATES:
        return Model(*odd_models.module(family, **changes))
    model = Model(*zoo.make(family, **changes))
    self_check.check(model, 16)
    return model


@pytest.fixture
def machine(monkeypatch):
    """Makes the machine one with so much memory."""

    def of(size: int, max_buffer: int = 2**63):
        monkeypatch.setattr(memory, "device", lambda: Device("cpu", "a test", size, max_buffer))

    of(16 * GB)
    return of


# -- what people write --


@pytest.mark.parametrize(
    "written, size",
    [
        ("4GB", 4 * GB),
        ("4gb", 4 * GB),
        (" 4 GB ", 4 * GB),
        ("1.5G", 1.5 * GB),
        ("512MiB", 512 * 2**20),
        ("512M", 512e6),
        ("2GiB", 2 * 2**30),
        ("70000KB", 70e6),
        ("0.01TB", 10 * GB),
        ("50%", 8 * GB),
        ("12.5 %", 2 * GB),
        ("100%", 16 * GB),
        ("123456", 123456),
        (123456, 123456),
        (16 * GB, 16 * GB),
        (None, 8 * GB),
    ],
)
def test_a_size_is_read_as_it_is_written(written, size):
    assert memory.parse(written, 16 * GB) == size


@pytest.mark.parametrize(
    "written",
    [
        *("", "GB", "4XB", "four", "-4GB", "4,5GB", "1e9", "0x10", "4GB4", "50%%", "%", "nan"),
        *("inf", "17GB", "101%", "0", "0%", "0.0GB", "9" * 400),
        *(0, -1, True, 1e30, float("nan"), [], {}),
    ],
)
def test_what_is_no_size_or_too_large_is_refused(written):
    with pytest.raises(InvalidRequest, match="memory is "):
        memory.parse(written, 16 * GB)


def test_sizes_are_told_in_units_that_fit():
    told = [memory.gigabytes(size) for size in (0, 1500, 2_400_000, 999_000_000, 1_234_000_000)]
    assert told == ["0 kB", "2 kB", "2 MB", "999 MB", "1.2 GB"]


# -- plans --

STATES = ["falcon_h1", "mamba2"]
FAMILIES = ["llama", "gemma3_text", "gpt_oss", "deepseek_v2", "gemma4_text", *STATES]
LIMITS = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([16, 32]),
        "max_num_seqs": st.integers(1, 64),
        "max_num_batched_tokens": st.integers(64, 2048),
    }
)


def bytes_of_pool(model: Model, plan: Plan) -> int:
    """As KVCache lays it out."""
    return sum(array_bytes(model, plan))


def array_bytes(model: Model, plan: Plan) -> list[int]:
    of_group = dict(zip(group_kinds(model.specs), plan.num_blocks, strict=True))
    sizes = []
    for spec in model.specs:
        if isinstance(spec, StateSpec):
            of_block = [int(np.prod(array.shape)) for array in spec.kept]
        else:
            dims = spec.k_head_dim, spec.v_head_dim
            of_block = [plan.block_size * spec.kv_heads * dim for dim in dims]
        sizes += [(of_group[spec.group] + 1) * size * 4 for size in of_block]
    return sizes


@settings(max_examples=300, deadline=None)
@given(family=st.sampled_from(FAMILIES), budget=st.integers(1, 3 * GB), limits=LIMITS)
def test_weights_scratch_and_pool_stay_in_the_budget(family, budget, limits):
    model = tiny(family)
    try:
        plan = memory.plan(model, memory=budget, **limits)
    except OutOfMemory as error:
        assert f"the budget is {memory.gigabytes(budget)}" in str(error)
        return
    assert plan.budget == budget
    assert plan.weights == model.nbytes
    assert plan.pool == bytes_of_pool(model, plan)
    assert plan.weights + plan.scratch + plan.pool <= budget
    largest = max(array_bytes(model, plan))
    assert plan.scratch >= largest, "an array is there twice for a while"
    assert all(0 < start <= most for start, most in zip(plan.start, plan.num_blocks, strict=True))
    full = plan.tokens // plan.block_size
    chunk = -(-limits["max_num_batched_tokens"] // plan.block_size) + 1
    whole_context = -(-longest(model) // plan.block_size)
    assert full >= min(chunk, whole_context), "room for a chunk, or for all that can be"
    assert full <= whole_context * limits["max_num_seqs"], "more than anyone can use"
    assert plan.tokens == full * plan.block_size
    for kind, blocks in zip(group_kinds(model.specs), plan.num_blocks, strict=True):
        if kind.has_states:
            most = 4 * limits["max_num_seqs"]
            assert blocks == min(most, max(4, plan.tokens // max(128, tokens_as_large(model))))
        else:
            assert blocks == full or blocks == cap(kind.window, **limits)


def tokens_as_large(model: Model) -> int:
    """As a state."""
    kv = sum(spec.bytes_per_token for spec in model.kv_specs)
    return bytes_of_state(model) // kv if kv else 0


def bytes_of_state(model: Model) -> int:
    return sum(array.nbytes for spec in model.state_specs for array in spec.kept)


def longest(model: Model) -> int:
    return model.context_length or 2**20


def cap(window, block_size, max_num_seqs, max_num_batched_tokens) -> int:
    """Each sequence's window, cut by a block at both ends, and the rows of a step."""
    each = -(-window // block_size) + 2
    return max_num_seqs * each + -(-max_num_batched_tokens // block_size)


@settings(max_examples=60, deadline=None)
@given(family=st.sampled_from(FAMILIES), budget=st.integers(GB // 2, 3 * GB), limits=LIMITS)
def test_one_block_more_would_not_fit_or_not_be_used(family, budget, limits):
    model = tiny(family)
    try:
        plan = memory.plan(model, memory=budget, **limits)
    except OutOfMemory:
        return
    wanted = plan.tokens // plan.block_size + 1
    if wanted > -(-longest(model) // plan.block_size) * limits["max_num_seqs"]:
        return
    with pytest.raises(OutOfMemory):
        memory.plan(model, memory=budget, num_blocks=wanted, **limits)


def test_a_larger_budget_never_plans_less(machine):
    sizes = range(2 * 10**7, 3 * 10**8, 10**7)
    plans = [memory.plan(tiny("gemma3_text"), memory=size) for size in sizes]
    blocks = [max(plan.num_blocks) for plan in plans]
    assert blocks == sorted(blocks) and blocks[0] < blocks[-1]


def test_without_a_budget_a_pool_is_no_larger_than_most_need(machine):
    plan = memory.plan(tiny("llama"), max_num_seqs=8)
    assert plan.budget == 8 * GB
    assert plan.tokens == 8 * memory.DEFAULT_TOKENS_PER_SEQUENCE
    assert plan.start == [(512 + 1024) // 16] and not plan.is_fixed
    # Or one whole context, if that's more.
    assert memory.plan(tiny("llama"), max_num_seqs=1).tokens == 4096


def test_large_states_leave_half_of_a_pool_to_k_and_v():
    model = made("falcon_h1", mamba_d_state=256)
    state = bytes_of_state(model)
    assert tokens_as_large(model) > 500
    plan = memory.plan(model, memory=model.nbytes + 200 * 10**6)
    num_states, num_blocks = plan.num_blocks
    assert num_states > 8 and num_states * state <= plan.pool / 2
    assert num_blocks * 16 > 25_000


def test_a_step_has_no_more_states_than_the_pool():
    """So a model with large ones needn't be loaded for fewer sequences."""
    model = made("mamba2", ssm_state_size=2048)
    others = 150 * 10**6  # activations, logits and scores
    budget = model.nbytes + others + 50 * bytes_of_state(model)
    plan = memory.plan(model, memory=budget, max_num_seqs=128)
    assert 4 < plan.num_blocks[0] < 50


def test_a_number_of_blocks_is_taken_as_given():
    for family in FAMILIES:
        model = tiny(family)
        for wanted in (1, 5, 100, 3000):
            plan = memory.plan(model, memory=2 * GB, num_blocks=wanted, max_num_seqs=4)
            assert plan.num_blocks == [
                4 * 4
                if kind.has_states
                else wanted
                if kind.window is None
                else min(wanted, cap(kind.window, 16, 4, 512))
                for kind in group_kinds(model.specs)
            ]
            assert plan.start == plan.num_blocks and plan.is_fixed
            assert plan.pool == bytes_of_pool(model, plan)
            assert plan.weights + plan.scratch + plan.pool <= plan.budget
    for wrong in (0, -1):
        with pytest.raises(InvalidRequest, match=f"num_blocks is {wrong}"):
            memory.plan(tiny("llama"), num_blocks=wrong)


def test_what_does_not_fit_is_told_in_numbers(machine):
    machine(2 * GB)
    model = tiny("llama")
    with pytest.raises(OutOfMemory) as caught:
        memory.plan(model, memory="1MB")
    weights, scratch = memory.gigabytes(model.nbytes), memory.plan(model, num_blocks=33).scratch
    for number in (weights, memory.gigabytes(scratch), "33 blocks", "1 MB", "2.0 GB"):
        assert number in str(caught.value)
    with pytest.raises(OutOfMemory, match=r"10,000,000 blocks need 1[0-9]{2}\.[0-9] GB"):
        memory.plan(model, num_blocks=10**7)
    with pytest.raises(OutOfMemory):
        memory.plan(model, num_blocks=10**30)


def test_no_array_is_larger_than_the_machine_allows(machine):
    block = 2 * 16 * 16 * 4  # kv_heads, block_size, head_dim, float32
    machine(16 * GB, max_buffer=101 * block)
    model = tiny("llama")
    assert memory.plan(model, memory="8GB").num_blocks == [100]
    memory.plan(model, num_blocks=100)
    with pytest.raises(OutOfMemory, match=r"101 blocks has arrays of 209 kB.* allows 207 kB"):
        memory.plan(model, num_blocks=101)


def test_weights_that_are_too_large_are_told_before_they_are_read(tmp_path, machine):
    (tmp_path / "model-1.safetensors").write_bytes(bytes(3_000_000))
    (tmp_path / "model-2.safetensors").write_bytes(bytes(2_000_000))
    memory.check_weights(tmp_path, "5MB")
    with pytest.raises(OutOfMemory, match=r"weights .* are 5 MB; the budget is 4 MB"):
        memory.check_weights(tmp_path, "4MB")


# -- windows --


@pytest.mark.parametrize("family", ["gemma3_text", "gpt_oss", "cohere2"])
@pytest.mark.parametrize("chunk", [16, 200])
def test_a_window_gets_enough_blocks_for_every_sequence(family, chunk):
    """Long generations in a pool as planned: nobody is preempted, nobody waits for a window."""
    limits = {"max_num_seqs": 5, "max_num_batched_tokens": chunk}
    model = tiny(family)
    engine = serving.engine(model, num_blocks=100, **limits)
    windowed = next(g for g in engine.scheduler.groups if g.window is not None)
    assert windowed.pool.num_blocks == cap(windowed.window, 16, **limits) < 100
    most = running = 0

    def watch(engine):
        nonlocal most, running
        most = max(most, windowed.pool.num_used)
        running = max(running, len(engine.scheduler.running))

    prompts = [list(range(n)) for n in (1, 70, 150, 200, 90, 33, 180)]
    params = SamplingParams(temperature=0, max_tokens=100)
    serving.serve(engine, prompts, params, on_step=watch)
    assert engine.scheduler.num_preemptions == 0
    assert running == 5
    assert most > windowed.pool.num_blocks / 3, "and not many more than enough"


# -- as measured --


def measured(model, tokenizer, prompts, params, **limits) -> tuple[int, Plan]:
    """The most that a run allocated beside what was there before it, its plan."""
    gc.collect()  # models of other tests
    mx.clear_cache()
    start = mx.get_active_memory() - model.nbytes
    mx.reset_peak_memory()
    engine = serving.engine(model, tokenizer, **limits)
    serving.serve(engine, prompts, params)
    peak, plan = mx.get_peak_memory() - start, engine.plan
    model.bind(None)
    beside = peak - plan.weights - plan.pool
    print(f"\n{model.family}: scratch planned {plan.scratch / 1e6:.1f} MB, used {beside / 1e6:.1f}")
    return beside, plan


def test_a_gpu_has_room_for_the_layers_that_are_dispatched_ahead():
    model = made("llama", hidden_size=64, intermediate_size=512)
    of_kind = {
        kind: memory.plan(
            model,
            num_blocks=500,
            max_num_batched_tokens=4096,
            machine=Device(kind, "a test", 8 * GB, 8 * GB),
        ).scratch
        for kind in ("cpu", "metal", "cuda")
    }
    layer = 4096 * (4 * 64 + 3 * 512) * 4
    assert of_kind["metal"] == of_kind["cuda"] == of_kind["cpu"] + 2 * layer


SAMPLINGS = [
    SamplingParams(temperature=0, max_tokens=8),
    SamplingParams(temperature=1, top_p=0.9, max_tokens=8, logprobs=5),
    SamplingParams(temperature=1, top_k=50, repetition_penalty=1.1, max_tokens=8),
    SamplingParams(temperature=1, top_p=0.9, min_p=0.1, max_tokens=8, prompt_logprobs=2),
]


@pytest.mark.parametrize(
    "family, vocab", [*((family, 256) for family in FAMILIES), ("llama", 30_000)]
)
def test_a_run_stays_in_its_plan(family, vocab):
    model = made(family, vocab_size=vocab)
    prompts = [list(range(n)) for n in (1, 200, 33, 100, 150, 7, 64, 250)]
    for params in SAMPLINGS:
        beside, plan = measured(
            model, None, prompts, params, num_blocks=100, max_num_seqs=8, max_num_batched_tokens=64
        )
        assert 0 < beside <= plan.scratch


WIDE = {"head_dim": 16, "intermediate_size": 2048, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("family", "changes", "chunk"),
    [
        ("jamba", {"mamba_expand": 8}, 256),
        ("mamba2", {"num_heads": 128, **WIDE}, 256),
        ("mamba2", {"num_heads": 128, **WIDE}, 600),
    ],
)
def test_a_chunk_that_updates_states_stays_in_the_plan(family, changes, chunk):
    """The state of each token is there, or a matrix of each head for many."""
    model = Model(*zoo.make(family, **changes))
    self_check.check(model, 16)
    prompts = [[i % 250 for i in range(chunk + 1)]]
    limits = {"num_blocks": 50, "max_num_seqs": 1, "max_num_batched_tokens": chunk}
    params = SamplingParams(temperature=0, max_tokens=2)
    beside, plan = measured(model, None, prompts, params, **limits)
    assert 0 < beside <= plan.scratch


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
@pytest.mark.parametrize("bits", [None, 8, 4])
def test_what_is_gathered_of_quantised_blocks_stays_in_the_plan(bits, dtype):
    """Small rows, much K and V of them."""
    size = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128}
    model = tiny_models.make("llama", dtype=dtype, max_position_embeddings=1024, **size, **heads)
    model.quantise_cache(bits, bits)
    params = SamplingParams(temperature=0, max_tokens=3, n=8)
    limits = {"num_blocks": 260, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    beside, plan = measured(model, None, [[1] * 450], params, **limits)
    assert 0 < beside <= plan.scratch


def test_many_rows_to_sample_stay_in_their_plan():
    beside, plan = measured(
        Model(*odd_models.module("llama", vocab_size=30_000)),
        None,
        [[i] for i in range(48)],
        SamplingParams(temperature=1, top_p=0.9, max_tokens=2, logprobs=5),
        num_blocks=48,
        max_num_seqs=48,
        max_num_batched_tokens=48,
    )
    assert plan.scratch / 3 < beside <= plan.scratch


@pytest.mark.parametrize("rows, context", [(64, 4000), (512, 2000), (2000, 2000)])
def test_long_prompts_stay_in_their_plan(rows, context):
    model = tiny("llama")
    prompts = [[i % 256 for i in range(context)]] * (8000 // context)
    beside, plan = measured(
        model,
        None,
        prompts,
        SamplingParams(max_tokens=2),
        num_blocks=600,
        max_num_seqs=8,
        max_num_batched_tokens=rows,
    )
    assert 0 < beside <= plan.scratch


@pytest.mark.parametrize("rows, context", [(64, 4000), (500, 1000)])
@pytest.mark.parametrize("family", ["stablelm", "llama4", "longcat_flash", "deepseek_v32"])
def test_models_that_are_served_otherwise_stay_in_their_plan(family, rows, context):
    """They read K and V, or have latent attention."""
    model = Model(*zoo.make(family))
    self_check.check(model, 16)
    prompts = [[i % 256 for i in range(context)]] * 2
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": rows}
    beside, plan = measured(model, None, prompts, SamplingParams(max_tokens=2), **limits)
    assert model.fetches is (family != "longcat_flash") and 0 < beside <= plan.scratch


def test_one_long_sequence_does_not_widen_what_short_ones_read():
    """Of a model that takes single tokens together, and reads K and V."""
    model = Model(*zoo.make("stablelm"))
    self_check.check(model, 16)
    prompts = [[i % 256 for i in range(n)] for n in (3000, *range(1, 41))]
    limits = {"max_num_seqs": 41, "max_num_batched_tokens": 64, "num_blocks": 400}
    beside, plan = measured(model, None, prompts, SamplingParams(max_tokens=30), **limits)
    assert 0 < beside <= plan.scratch


def prompts_of(tokenizer, count, shortest, longest):
    ids = tokenizer.encode(prose.text())
    return prose.prompts(count, shortest, longest, ids, np.random.default_rng(0))


@pytest.mark.parametrize(
    "longest", [60, pytest.param(1500, marks=[pytest.mark.full, pytest.mark.timeout(3600)])]
)
def test_smollm2_stays_in_its_plan(smollm2_folder, longest):
    model = models.load(smollm2_folder, dtype="float32")
    tokenizer = Tokenizer(smollm2_folder, model.config["eos_token_id"])
    beside, plan = measured(
        model,
        tokenizer,
        prompts_of(tokenizer, 16, longest // 2, longest),
        SamplingParams(temperature=1, top_p=0.9, max_tokens=3, logprobs=1, ignore_eos=True),
        num_blocks=16 * -(-(longest + 3) // 16),
        max_num_seqs=16,
    )
    assert 0 < beside <= plan.scratch


@pytest.mark.full
@pytest.mark.gemma
@pytest.mark.timeout(3600)
def test_gemma3_stays_in_its_plan(gemma3_folder):
    model = models.load(gemma3_folder, dtype="float32")
    tokenizer = Tokenizer(gemma3_folder, model.config["eos_token_id"])
    beside, plan = measured(
        model,
        tokenizer,
        prompts_of(tokenizer, 8, 500, 2000),
        SamplingParams(temperature=1, top_p=0.9, max_tokens=3, logprobs=1, ignore_eos=True),
        num_blocks=8 * 126,
        max_num_seqs=8,
    )
    assert 0 < beside <= plan.scratch
