"""`cache_dir`: a prompt is found again after a restart, however the process ended."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import tiny_folder as tiny

from mlxpage import LLM, InvalidRequest, SamplingParams
from mlxpage.block_store import default_folder

GREEDY = SamplingParams(temperature=0, max_tokens=4)
PROMPT = list(range(4, 204))
FULL_BLOCKS = 192


def test_a_prompt_is_read_from_the_disk_after_a_restart(tiny_folder, tmp_path):
    outputs = []
    for _ in range(2):
        with LLM(tiny_folder, cache_dir=tmp_path, cache_disk="10MB") as llm:
            outputs.append(llm.generate(PROMPT, GREEDY))
            stats = llm.stats()["prefix_cache"]
    assert [output.num_cached_tokens for output in outputs] == [0, FULL_BLOCKS]
    assert outputs[0].token_ids == outputs[1].token_ids
    assert stats["restored_tokens"] == FULL_BLOCKS
    assert stats["disk"]["limit_bytes"] == 10_000_000 and stats["disk"]["hits"] == FULL_BLOCKS // 16


def test_what_an_idle_engine_has_stored_outlives_a_process_that_is_killed(tiny_folder, tmp_path):
    program = f"""
import os, time
from mlxpage import LLM, SamplingParams
llm = LLM({str(tiny_folder)!r}, cache_dir={str(tmp_path)!r})
llm.generate(list(range(4, 204)), SamplingParams(temperature=0, max_tokens=4))
while llm.stats()["prefix_cache"]["disk"]["written"] < {FULL_BLOCKS // 16}:
    time.sleep(0.05)
os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", program], timeout=60)
    assert ended.returncode == -9
    with LLM(tiny_folder, cache_dir=tmp_path) as llm:
        assert llm.generate(PROMPT, GREEDY).num_cached_tokens == FULL_BLOCKS


def test_other_bits_or_weights_find_nothing(tmp_path):
    wide = {"num_attention_heads": 2, "num_key_value_heads": 1}
    first, second = (tiny.make(tmp_path / str(n), seed=n, **wide) for n in (0, 1))
    found = []
    for folder, options in ((first, {}), (second, {}), (first, {"kv_bits": 8}), (first, {})):
        with LLM(folder, cache_dir=tmp_path / "blocks", **options) as llm:
            found.append(llm.generate(PROMPT, GREEDY).num_cached_tokens)
    assert found == [0, 0, 0, FULL_BLOCKS]


def test_without_a_folder_it_is_one_in_the_users_cache(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXPAGE_CACHE", str(tmp_path))
    with LLM(tiny_folder, cache_disk=10**7) as llm:
        assert llm.stats()["prefix_cache"]["disk"]["folder"] == str(default_folder())
    with LLM(tiny_folder) as llm:
        assert llm.stats()["prefix_cache"]["disk"] is None


def test_requests_are_served_while_blocks_are_stored(tiny_folder, tmp_path):
    with LLM(tiny_folder, cache_dir=tmp_path) as llm:
        for _ in range(6):
            llm.generate([PROMPT, PROMPT[50:]], GREEDY)
            time.sleep(0.3)
        assert llm.stats()["failed_steps"] == 0


@pytest.mark.parametrize(
    "options, told",
    [
        ({"cache_disk": "much"}, "cache_disk is 'much'; write it like '20GB'"),
        ({"cache_disk": 0}, "cache_disk is 0"),
        ({"cache_disk": -5}, "cache_disk is -5"),
        ({"cache_disk": True}, "cache_disk is True"),
        ({"cache_dir": 5}, "cache_dir is 5; it must be a folder"),
        ({"cache_dir": "x", "prefix_cache": False}, "prefix_cache is False"),
    ],
)
def test_what_is_no_size_and_no_folder_is_refused(tiny_folder, options, told):
    with pytest.raises(InvalidRequest, match=told):
        LLM(tiny_folder, **options)


def test_a_folder_that_cannot_be_written_is_told_and_nothing_else_happens(tiny_folder, tmp_path):
    file = tmp_path / "a file"
    file.write_text("in the way")
    with (
        pytest.warns(RuntimeWarning, match="No more blocks of the prefix cache are written to"),
        LLM(tiny_folder, cache_dir=file) as llm,
    ):
        assert len(llm.generate(PROMPT, GREEDY).token_ids) == 4
