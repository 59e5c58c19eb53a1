"""Blocks that the pool has no room for are found again on a disk, by this engine or the next."""

from __future__ import annotations

import os
import random
import shutil
import threading
from pathlib import Path

import numpy as np
import prose
import pytest
import serving
import tiny_folder
import tiny_models
from families import zoo

from mlxpage.block_store import BlockStore, store
from mlxpage.disk_tier import DiskTier
from mlxpage.engine import Engine
from mlxpage.metal import model as models
from mlxpage.metal import reference, self_check
from mlxpage.metal.backend import mx
from mlxpage.metal.kv_cache import KVCache
from mlxpage.metal.model import Model
from mlxpage.model_store import fingerprint
from mlxpage.sampling_params import SamplingParams
from mlxpage.text import Tokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=6)
FAMILIES = ["llama", "gemma3_text", "gpt_oss"]


def text() -> list[int]:
    return list(prose.text().encode("ascii", "replace"))


def engine(model, folder, **options):
    tier = serving.disk_tier(folder, model, **options.pop("store", {}))
    return serving.engine(model, tier=tier, **{"max_num_batched_tokens": 64, **options})


def serve_and_end(served, prompts, params=GREEDY):
    outputs = serving.serve(served, prompts, params)
    served._store_all()
    served._tier.store.close()
    return outputs


def restored(served) -> int:
    return served.stats()["prefix_cache"]["restored_tokens"]


@pytest.mark.parametrize("bits", [None, 8, (None, 4)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_another_engine_finds_what_one_has_stored(tmp_path, family, bits):
    pair = bits if isinstance(bits, tuple) else (bits, bits)
    prompts = [text()[start : start + 400] for start in (0, 1000)]
    outputs = []
    for _ in range(2):
        model = tiny_models.make(family, head_dim=32)
        model.quantise_cache(*pair)
        served = engine(model, tmp_path)
        outputs.append(serve_and_end(served, prompts))
    assert restored(served) == 2 * (399 // 16 * 16)
    assert [output.num_cached_tokens for output in outputs[1]] == [399 // 16 * 16] * 2
    assert [o.token_ids for o in outputs[0]] == [o.token_ids for o in outputs[1]]


def test_smollm2_reads_a_long_prompt_after_a_restart(tmp_path, smollm2_folder):
    model = models.load(smollm2_folder, dtype="float32")
    prompt = Tokenizer(smollm2_folder, None).encode(prose.text())[:1500]
    outputs = []
    for _ in range(2):
        served = engine(model, tmp_path, max_num_batched_tokens=512)
        outputs += serve_and_end(served, [prompt])
    assert outputs[1].num_cached_tokens >= 0.9 * 1500
    assert restored(served) == outputs[1].num_cached_tokens
    assert outputs[0].token_ids == outputs[1].token_ids


def test_what_a_small_pool_forgets_is_read_again(tmp_path):
    """Ten conversations take turns in a pool that holds two."""
    model = tiny_models.make("llama")
    histories = [text()[start : start + 200] for start in range(0, 4000, 400)]
    served = engine(model, tmp_path, num_blocks=40, max_num_seqs=1)
    roomy = serving.engine(tiny_models.make("llama"), prefix_cache=False)
    for turn in range(3):
        for history in histories:
            history += text()[5000 + 50 * turn : 5040 + 50 * turn]
            (output,) = serving.serve(served, [history], GREEDY)
            (expected,) = serving.serve(roomy, [history], GREEDY)
            assert output.token_ids == expected.token_ids
            if turn:
                assert output.num_cached_tokens >= len(history) - 64
            history += output.token_ids
    assert restored(served) > 2 * 10 * 150
    served._tier.store.close()


def test_nobody_finds_the_blocks_of_another_model_or_salt(tmp_path):
    model = tiny_models.make("llama")
    prompt = text()[:200]
    salted = SamplingParams(temperature=0, max_tokens=2, cache_salt="mine")
    serve_and_end(engine(model, tmp_path), [prompt], salted)
    for options, params in (
        ({}, GREEDY),
        ({"store": {"name": "another model"}}, salted),
        ({"store": {"block_size": 32}, "block_size": 32}, salted),
    ):
        other = engine(model, tmp_path, **options)
        serve_and_end(other, [prompt], params)
        assert restored(other) == 0
    model.quantise_cache(None, None)
    same = engine(model, tmp_path)
    serve_and_end(same, [prompt], salted)
    assert restored(same) == 192


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "count", [12, pytest.param(200, marks=[pytest.mark.full, pytest.mark.timeout(3600)])]
)
def test_damaged_files_cost_time_and_no_tokens(tmp_path, family, count):
    """Files are changed anywhere, cut, emptied or swapped, while an engine goes on."""
    model = tiny_models.make(family)
    rng = random.Random(0)
    prompt = text()[:150]
    (expected,) = serving.serve(serving.engine(model, prefix_cache=False), [prompt], GREEDY)
    damaged = found = 0
    for number in range(count):
        folder = tmp_path / str(number)
        serve_and_end(engine(model, folder), [prompt])
        files = sorted(
            file for file in folder.rglob("*") if len(file.name) == 64 and file.is_file()
        )
        for file in rng.sample(files, rng.randint(1, 4)):
            damage(file, files, rng)
        served = engine(model, folder)
        (output,) = serve_and_end(served, [prompt])
        assert output.token_ids == expected.token_ids
        damaged += served._tier.store.stats()["damaged"]
        found += restored(served)
        shutil.rmtree(folder)
    assert damaged >= count / 2 and found >= count


def damage(file, files, rng) -> None:
    content = bytearray(file.read_bytes())
    how = rng.randrange(4)
    if how == 0:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == 1:
        del content[rng.randrange(len(content)) :]
    elif how == 2:
        content += b"more"
    else:
        content = bytearray(rng.choice([other for other in files if other != file]).read_bytes())
    file.write_bytes(content)


def test_k_and_v_that_proved_wrong_are_taken_off_the_disk(tmp_path):
    """A block of a sequence whose logits weren't finite may have been stored before that shows."""
    model = tiny_models.make("llama")
    served = engine(model, tmp_path)
    prompt = text()[:100]
    serving.serve(served, [prompt], GREEDY)
    served._store_all()
    served._tier.store.flush()
    norm = model.module.model.norm
    sound = norm.weight
    norm.weight = sound * float("nan")
    failed = []
    served.add(served.request(prompt, GREEDY, failed.append))
    while served.has_work:
        served.step()
    assert "not finite" in str(failed[-1].error)
    norm.weight = sound
    (output,) = serve_and_end(served, [prompt])
    assert output.num_cached_tokens == 0 and restored(served) == 0


def test_blocks_that_cannot_be_put_into_the_pool_are_told_once_and_computed(tmp_path, monkeypatch):
    model = tiny_models.make("llama")
    prompts = [text()[:100], text()[:60]]
    expected = serve_and_end(engine(model, tmp_path), prompts)

    def broken(*_):
        raise RuntimeError("no way in")

    monkeypatch.setattr(KVCache, "load", broken)
    served = engine(model, tmp_path)
    with pytest.warns(RuntimeWarning, match="can't be put into the pool: RuntimeError: no way in"):
        outputs = serve_and_end(served, prompts)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert served.stats()["failed_steps"] == 0 and served.scheduler.num_preemptions


def test_a_step_under_way_that_has_failed_stores_nothing(tmp_path, monkeypatch):
    model = tiny_models.make("llama")
    served = engine(model, tmp_path)

    def failed():
        raise RuntimeError("the GPU is gone")

    serving.serve(served, [text()[:100]], GREEDY)
    monkeypatch.setattr(mx, "synchronize", failed)
    served._store_all()
    monkeypatch.undo()
    served._tier.store.close()
    assert served._tier.store.stats()["written"] == 0


def test_nothing_is_stored_before_it_is_computed(tmp_path, monkeypatch):
    """What goes with evicted blocks is what is next in line, not what the same step computes."""
    model = tiny_models.make("llama")
    served = engine(model, tmp_path, num_blocks=30, max_num_seqs=2)
    prompts = [text()[start : start + 300] for start in range(0, 6000, 500)]
    serving.serve(served, prompts, GREEDY)
    served._tier.store.flush()
    roomy = serving.engine(model)
    serving.serve(roomy, prompts, GREEDY)
    (group,) = roomy.pool.groups
    compared = 0
    for block, key in group.pool.free_cached():
        if (content := served._tier.store.get(bytes([0]) + key)) is not None:
            (truth,) = model.cache.read(0, [block])
            ours, theirs = (np.frombuffer(each, np.float32) for each in (content, truth))
            assert np.abs(ours - theirs).max() < 1e-3
            compared += 1
    assert compared > 100
    served._tier.store.close()


def test_a_full_queue_is_waited_for(tmp_path):
    model = tiny_models.make("llama")
    served = serving.engine(
        model, tier=DiskTier(BlockStore(tmp_path, {}, 10**9, queue_bytes=40_000))
    )
    serve_and_end(served, [text()[:2000]])
    assert served._tier.store.stats()["written"] == 2000 // 16


def test_large_states_leave_the_queue_to_what_is_small(tmp_path):
    """It has room for three states, or for a hundred blocks of K and V."""
    model = Model(*zoo.make("falcon_h1", mamba_d_state=256))
    self_check.check(model, 16)
    large, small = (KVCache(model.specs, [1, 1], 16).block_nbytes(group) for group in range(2))
    assert large > 30 * small
    disk = BlockStore(tmp_path, {}, 10**9, queue_bytes=3 * large + large // 2)
    limits = {"max_num_seqs": 1, "max_num_batched_tokens": 256}
    served = serving.engine(model, num_blocks=40, tier=DiskTier(disk), **limits)
    prompts = [text()[start : start + 500] for start in (0, 1000, 2000)]
    for prompt in prompts:
        serving.serve(served, [prompt], GREEDY)
        disk.flush()
    outputs = [serving.serve(served, [prompt], GREEDY)[0] for prompt in prompts]
    assert min(output.num_cached_tokens for output in outputs) >= 256
    disk.close()


def test_nothing_is_read_that_a_full_queue_would_drop(tmp_path, monkeypatch):
    model, go_on = tiny_models.make("llama"), threading.Event()
    block = KVCache(model.specs, [1], 16).block_nbytes(0)
    write, read, num_read = store.write_block, KVCache.read, 0

    def count(cache, group, blocks):
        nonlocal num_read
        num_read += len(blocks)
        return read(cache, group, blocks)

    monkeypatch.setattr(store, "write_block", lambda *args: go_on.wait(60) and write(*args))
    monkeypatch.setattr(KVCache, "read", count)
    disk = BlockStore(tmp_path, {}, 10**9, queue_bytes=5 * block)
    served = serving.engine(model, num_blocks=30, tier=DiskTier(disk))
    serving.serve(served, [text()[start : start + 300] for start in range(0, 4000, 400)], GREEDY)
    assert num_read == disk.stats()["queued"] == 5 and disk.stats()["dropped"] == 0
    go_on.set()
    disk.close()


def test_what_was_planned_and_never_ran_is_found_by_nobody(tmp_path, monkeypatch):
    model = tiny_models.make("llama")
    served = engine(model, tmp_path, num_blocks=30)
    events = []
    served.add(served.request(text()[:200], GREEDY, events.append))

    def broken(*_):
        raise MemoryError("no memory to look at what was evicted")

    monkeypatch.setattr(DiskTier, "store_evicted", broken)
    with pytest.raises(MemoryError):
        served.step()
    monkeypatch.undo()
    served.abort_all()
    assert not served.scheduler.prefix_cache.cached()
    (output,) = serve_and_end(served, [text()[:200]])
    assert output.num_cached_tokens == 0


def test_an_idle_engine_with_more_than_the_disk_takes_comes_to_an_end(tmp_path):
    model = tiny_models.make("llama")
    block = KVCache(model.specs, [1], 16).block_nbytes(0)
    served = engine(model, tmp_path, store={"limit": 8 * (block + 400)})
    serving.serve(served, [text()[start : start + 400] for start in (0, 1000, 2000)], GREEDY)
    turns = 0
    while served.store_cached():
        turns += 1
        assert turns < 10
    served._tier.store.flush()
    assert 0 < served._tier.store.stats()["written"] <= 8
    assert not served.store_cached()
    with pytest.warns(RuntimeWarning):
        served._tier.stop_reading(RuntimeError("no way in"))
    assert not served.store_cached()
    served._tier.store.close()


def test_of_more_than_the_disk_takes_the_last_prompt_is_kept_from_its_head(tmp_path):
    model = tiny_models.make("llama")
    block = KVCache(model.specs, [1], 16).block_nbytes(0)
    prompts = [text()[start : start + 400] for start in (0, 1000, 2000)]
    for _ in range(2):
        served = engine(model, tmp_path, store={"limit": 16 * (block + 400)})
        outputs = serve_and_end(served, prompts[::-1] if _ else prompts)
    assert outputs[0].num_cached_tokens >= 12 * 16


def blocks_of(model, count: int) -> int:
    """Bytes of a store that holds so many."""
    return count * (KVCache(model.specs, [1], 16).block_nbytes(0) + 400)


@pytest.mark.parametrize("read_first", [False, True], ids=["as stored", "once read"])
def test_the_last_prompt_stays_on_the_disk_longest_and_its_head_longer_than_its_tail(
    tmp_path, read_first
):
    model = tiny_models.make("llama")
    old, recent = text()[:400], text()[1000:1400]
    size = {"store": {"limit": blocks_of(model, 52)}}
    served = engine(model, tmp_path, **size)
    for prompt in (recent, old) if read_first else (old, recent):
        serving.serve(served, [prompt], GREEDY)
    serve_and_end(served, [])
    if read_first:
        served = engine(model, tmp_path, **size)
        serve_and_end(served, [recent])
        assert restored(served) == 384
    for other, found in ((text()[2000:2400], [384]), (text()[3000:3320], range(96, 128))):
        serve_and_end(engine(model, tmp_path, **size), [other])
        served = engine(model, tmp_path, **size)
        (output,) = serving.serve(served, [recent], GREEDY)
        assert output.num_cached_tokens in found
        served._tier.store.close()


def test_what_the_pool_lets_go_is_the_last_to_go_from_the_disk(tmp_path):
    """It was there already: in the pool it was used again, which the disk didn't see."""
    model = tiny_models.make("llama")
    served = engine(model, tmp_path, num_blocks=60, store={"limit": blocks_of(model, 100)})
    first, *others = [text()[start : start + 400] for start in range(0, 4000, 500)]
    serving.serve(served, [first, others[0]], GREEDY)
    while served.store_cached():
        pass
    served._tier.store.flush()
    assert served._tier.store.stats()["blocks"] >= 48
    for other in others[1:3]:
        serving.serve(served, [first], GREEDY)
        serving.serve(served, [other], GREEDY)
    for other in others[3:5]:
        serving.serve(served, [other], GREEDY)
    served._tier.store.flush()
    assert served._tier.store.stats()["evicted"] > 0
    (output,) = serving.serve(served, [first], GREEDY)
    assert output.num_cached_tokens == 384 and restored(served) == 384
    served._tier.store.close()


def test_a_request_while_an_idle_engine_stores_is_stored_too(tmp_path):
    model = tiny_models.make("llama")
    served = engine(model, tmp_path)
    serving.serve(served, [text()[:1600]], GREEDY)
    assert served.store_cached()
    serving.serve(served, [text()[2000:2400]], GREEDY)
    while served.store_cached():
        pass
    served._tier.store.flush()
    assert served._tier.store.stats()["written"] == 125
    served._tier.store.close()


def test_a_step_under_way_that_fails_does_not_end_the_reading(tmp_path, monkeypatch):
    """Its error shows first where something is loaded."""
    model = tiny_models.make("llama")
    prompts = [text()[:400], text()[1000:1100]]
    expected = serve_and_end(engine(model, tmp_path), prompts)
    monkeypatch.setattr(reference, "LOOK_AHEAD", 1)
    served, events = engine(model, tmp_path), []
    served.add(served.request(text()[2000:2100], SamplingParams(max_tokens=30), events.append))
    for _ in range(4):
        served.step()
    with monkeypatch.context() as broken:
        load, record = KVCache.load, Engine._record
        errors = [RuntimeError("the GPU is gone")] * 2

        def fails_once(then):
            def call(*arguments):
                if errors:
                    raise errors.pop()
                return then(*arguments)

            return call

        broken.setattr(KVCache, "load", fails_once(load))
        broken.setattr(Engine, "_record", fails_once(record))
        outputs = serving.serve(served, prompts, GREEDY)
    assert served.stats()["failed_steps"] == 1 and "the GPU is gone" in str(events[-1].error)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in expected]
    assert restored(served) >= 384
    served._tier.store.close()


def test_a_fingerprint_tells_trainings_of_one_architecture_apart(tmp_path):
    def trained(seed: int, at: float) -> Path:
        folder = tiny_folder.make(tmp_path / f"{seed} {at}", seed=seed)
        os.utime(folder / "model.safetensors", (at, at))
        return folder

    folders = [trained(0, 1.0), trained(0, 1.5), trained(1, 1.0)]
    assert len(set(map(fingerprint, folders))) == 3
    assert fingerprint(folders[0]) == fingerprint(shutil.copytree(folders[0], tmp_path / "copy"))
    folder = trained(0, 2.0)
    before = fingerprint(folder)
    (folder / "consolidated.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (folder / "more.json").symlink_to(tmp_path / "nowhere")
    assert fingerprint(folder) == before, "neither of them is read by anybody"


def test_a_few_rows_of_an_embedding_make_another_model(tmp_path):
    folder = tiny_folder.make(tmp_path / "model")
    before = fingerprint(folder)
    file = folder / "model.safetensors"
    weights = mx.load(str(file))
    rows = weights["model.embed_tokens.weight"]
    rows[100:104] = rows[104:108]
    mx.save_safetensors(str(tmp_path / "w.safetensors"), weights, {"format": "mlx"})
    shutil.move(tmp_path / "w.safetensors", file)
    assert fingerprint(folder) != before
