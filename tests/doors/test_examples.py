"""The scripts in docs/examples do what they say, and say it truly."""

import importlib.util
import re
import sys
import time
from pathlib import Path

import pytest

import mlxpage.engine
from mlxpage import SamplingParams

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def steps(monkeypatch):
    """The tokens that each step has computed; none takes less than 5 ms, so that one who reads a
    stream has time to fork it."""
    counts = []
    start = mlxpage.engine.Engine._start

    def counting(self, schedule):
        time.sleep(0.005)
        counts.append(sum(part.num_tokens for part in schedule.scheduled))
        return start(self, schedule)

    monkeypatch.setattr(mlxpage.engine.Engine, "_start", counting)
    return counts


def check_computed(steps: list[int], tokens: int, sequences: int) -> None:
    """`tokens` are those that prompts and answers had to be computed for. The last of an answer
    isn't computed any more, unless a GPU is a step ahead of who sees that it was the last."""
    assert tokens - sequences <= sum(steps) <= tokens


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_example_says_how_it_is_run_and_takes_a_model(script):
    example = load(script.stem)
    assert f"    python docs/examples/{script.name} [MODEL]" in example.__doc__
    with pytest.raises(SystemExit) as end:
        example.main(["--help"])
    assert end.value.code == 0


@pytest.mark.parametrize("name", ["chats", "forked_agent"])
def test_a_script_without_a_model_ends_with_its_error(name, capsys):
    assert load(name).main(["/nowhere/at/all"]) == 3
    assert "/nowhere/at/all" in capsys.readouterr().err


def test_32_chats_of_3_turns_find_their_turns_before_in_the_pool(tiny_folder, capsys, steps):
    assert load("chats").main([str(tiny_folder), "--max-tokens", "8"]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"^ +([\d.]+) +(\d+) +(\d+) +(\d+) +(\d+) +(\d+) .*", out, re.MULTILINE)
    assert sorted((int(chat), int(turn)) for _, chat, turn, *_ in rows) == [
        (chat, turn) for chat in range(32) for turn in range(3)
    ]
    assert [float(seconds) for seconds, *_ in rows] == sorted(float(row[0]) for row in rows)
    before = {}
    for _, chat, _, prompt, cached, computed in rows:
        assert int(prompt) == int(cached) + int(computed)
        assert int(cached) >= before.get(chat, 0) // 16 * 16
        before[chat] = int(prompt)
    answered = int(re.search(r"96 answers, ([\d,]+) tokens", out)[1].replace(",", ""))
    check_computed(steps, sum(int(row[5]) for row in rows) + answered, sequences=96)


def test_the_agent_chooses_by_likelihood_and_counts_what_it_spares(
    tiny_folder, capsys, steps, monkeypatch
):
    agent = load("forked_agent")
    think, found = agent.think, []
    monkeypatch.setattr(agent, "think", lambda *given: found.append(think(*given)) or found[-1])
    assert agent.main([str(tiny_folder), "--rounds", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("round ") == 2
    for part in out.split("\nround ")[1:]:
        scores = [
            (float(score), mark) for mark, score in re.findall(r"^ ([* ]) +(-[\d.]+)", part, re.M)
        ]
        assert len(scores) == 4
        assert [mark for _, mark in scores].count("*") == 1
        assert (max(score for score, _ in scores), "*") in scores
        used, alone = map(int, re.search(r"at most (\d+) .* without sharing: (\d+)", part).groups())
        assert used < alone / 2
    alone = sum(one.num_tokens for candidates in found for one in candidates)
    spared = sum(int(number) for number in re.findall(r"(\d+) tokens that the forks", out))
    cached = sum(int(number) for number in re.findall(r"tokens, (\d+) of them cached", out))
    check_computed(steps, alone - spared - cached, sequences=8)
    assert re.search(r"round 2: a prompt of \d+ tokens, [1-9]\d+ of them cached", out)


def test_the_agent_takes_fewer_plans_if_a_stream_ends_before_it_is_forked(
    llm,
):
    found = load("forked_agent").think(llm, [5, 6, 7], 4, SamplingParams(max_tokens=1, logprobs=0))
    assert len(found) == 1
