"""mlxpage bench: the figures by hand, and every benchmark on a tiny model."""

import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_folder as tiny

from mlxpage.bench import (
    bandwidth,
    batches,
    figures,
    machine,
    offline,
    pool,
    record,
    runs,
    serving,
    tables,
    workloads,
)
from mlxpage.bench.kinds import KINDS
from mlxpage.bench.spread import interval, percentile
from mlxpage.bench.timeline import Timeline, max_concurrent_requests, serving_metrics
from mlxpage.bench.workloads import Item, Lengths
from mlxpage.cli.measuring import FELL_BELOW
from mlxpage.errors import InvalidRequest
from mlxpage.metal import model as models
from mlxpage.text import Tokenizer

DOCS = Path(__file__).parents[2] / "docs" / "bench.md"


# -- definitions --


def timeline(started: float, *chunks: tuple[float, int], prompt: int = 10) -> Timeline:
    line = Timeline(started, prompt)
    for now, tokens in chunks:
        line.hear(now, tokens)
    return line


# Sent at 0: tokens at 0.1, two at 0.3, one at 0.5. Sent at 0.2: one token, at 0.5.
LONG = timeline(0.0, (0.1, 1), (0.3, 2), (0.5, 1), prompt=20)
SHORT = timeline(0.2, (0.5, 1))


def test_times_of_a_request_are_those_of_vllm():
    assert (LONG.ttft, LONG.e2el) == (0.1, 0.5)
    assert LONG.tpot == pytest.approx(0.4 / 3)  # after the first, by tokens
    assert LONG.itl == pytest.approx([0.2, 0.2])  # between what came, however much that was
    assert SHORT.tpot is None and SHORT.itl == []


def test_figures_of_all_requests_are_those_of_vllm():
    failed = Timeline(0.0, 99, error="no")
    found = serving_metrics([LONG, SHORT, failed], duration=2.0)
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 5)
    assert found["request_throughput"] == 1.0
    assert found["output_throughput"] == 2.5
    assert found["total_token_throughput"] == 17.5
    assert found["mean_ttft_ms"] == pytest.approx(200)  # of 100 and 300
    assert found["std_ttft_ms"] == pytest.approx(100)  # of all there are, not of a sample
    assert found["p90_ttft_ms"] == pytest.approx(280)
    assert found["mean_tpot_ms"] == pytest.approx(400 / 3)  # SHORT has none
    assert found["median_itl_ms"] == pytest.approx(200)
    assert found["mean_e2el_ms"] == pytest.approx(400)  # of 500 and 300
    assert found["normalized_latency_ms"] == pytest.approx((500 / 4 + 300) / 2)
    assert "request_goodput" not in found


@pytest.mark.parametrize(
    "goals, good",
    [
        ({"ttft": 300}, 2),
        ({"ttft": 299}, 1),
        ({"tpot": 134}, 2),  # a single token has no time per token, and meets it
        ({"tpot": 133}, 1),
        ({"ttft": 299, "tpot": 133}, 0),  # each misses one of the two
        ({"e2el": 400}, 1),
    ],
)
def test_goodput_counts_requests_that_meet_all_goals(goals, good):
    found = serving_metrics([LONG, SHORT], duration=2.0, goals=goals)
    assert (found["good"], found["request_goodput"]) == (good, good / 2)


def test_a_request_that_ends_makes_room_for_one_that_begins_then():
    def spans(*pairs):
        return max_concurrent_requests([timeline(begin, (end, 1)) for begin, end in pairs])

    assert spans((0, 1), (1, 2), (2, 3)) == 1
    assert spans((0, 1.5), (1, 2), (1.4, 3), (1.6, 4)) == 3
    assert spans() == 0


def test_the_fullest_second_is_counted_from_the_first_request():
    lines = [timeline(5.5, (6.4, 1), (6.6, 2), (7.4, 4)), timeline(6.0, (6.7, 1), (7.6, 1))]
    assert serving_metrics(lines, 9.0)["max_output_tokens_per_s"] == 7  # from 6.5 to 7.5


def test_the_interval_is_students():
    assert interval([1, 2, 3]) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert interval([5.0] * 40) == (5.0, 5.0)
    assert interval([1, 2]) is None


def test_percentiles_lie_between_values():
    assert percentile([4, 1, 3, 2], 50) == 2.5
    assert percentile([10, 20], 90) == pytest.approx(19)
    assert percentile([7], 99) == 7


def test_the_last_request_arrives_at_n_by_rate():
    for rate, burstiness in ((2.0, 1.0), (50.0, 0.3), (5.0, 40.0)):
        times = serving.arrivals(30, rate, burstiness, seed=1)
        assert times == sorted(times) and times[-1] == pytest.approx(30 / rate)
        assert times == serving.arrivals(30, rate, burstiness, seed=1)
    assert serving.arrivals(3, float("inf"), 1.0, seed=0) == [0, 0, 0]


def test_burstiness_makes_gaps_even_or_uneven():
    def spread(burstiness):
        gaps = np.diff(serving.arrivals(2000, 1.0, burstiness, seed=0))
        return gaps.std() / gaps.mean()

    assert spread(100.0) == pytest.approx(0.1, rel=0.1)
    assert spread(1.0) == pytest.approx(1.0, rel=0.1)
    assert spread(0.25) == pytest.approx(2.0, rel=0.15)


def test_arms_take_turns_after_all_have_warmed_up(monkeypatch):
    monkeypatch.setattr(runs, "WARM_UP_SECONDS", 0.0)
    done = []

    def arm(name):
        def run():
            done.append(name)
            return {"speed": len(done)}

        return runs.Arm({"arm": name}, run, lambda: done.append(f"warm {name}"))

    arms = [arm("a"), arm("b")]
    runs.in_turns(arms, 2)
    assert done == ["warm a", "warm b", "a", "b", "a", "b"]
    assert arms[0].row()["metrics"] == {"speed": 4.0} and arms[0].row()["runs"][0] == {"speed": 3}
    assert runs.drift(arms, "speed") == pytest.approx((5 / 3 + 6 / 4) / 2)
    assert runs.drift([runs.Arm({}, None, runs=[{"speed": 1}])], "speed") is None


def test_generation_is_timed_from_when_all_have_their_first_token():
    early, late = batches.Heard([1, 2, 3], [0.0, 2.0, 3.0]), batches.Heard([1, 2], [1.0, 4.0])
    assert batches.generation_time([early, late]) == (3.0, 3)


def test_a_shared_prompt_counts_once():
    assert batches.Batch(100, 10, 4).num_tokens == 440
    assert batches.Batch(100, 10, 4, is_shared=True).num_tokens == 140


def test_a_reservation_is_exact_a_power_of_two_or_the_longest():
    reserve = pool.reservations(512)
    for prompt, output, slots in ((10, 1, 11), (10, 5, 18), (10, 8, 18), (10, 9, 26)):
        assert reserve[pool.POWER_OF_2](prompt, output) == slots
        assert reserve[pool.EXACT](prompt, output) == prompt + output
        assert reserve[pool.LONGEST](prompt, output) == 512


def test_capacity_takes_the_items_in_turns():
    items = [Item([0] * 10, 10), Item([0] * 30, 10)]
    exact = pool.reservations(50)[pool.EXACT]
    assert pool.capacity(items, 60, exact) == 2
    assert pool.capacity(items, 79, exact) == 2
    assert pool.capacity(items, 80, exact) == 3
    assert pool.capacity(items, 19, exact) == 0


@pytest.mark.parametrize(
    "ours, theirs, place",
    [([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([1], [1, 2], 1)],
)
def test_where_tokens_part_is_found(ours, theirs, place):
    assert offline._first_difference(ours, theirs) == place


def test_a_macs_power_is_told_as_doctor_does():
    battery = "Now drawing from 'Battery Power'\n -InternalBattery-0 (id=1)\t80%; discharging"
    assert machine.power_of(battery, " lowpowermode        1\n") == "battery, low-power mode"
    assert machine.power_of("Now drawing from 'AC Power'\n", " lowpowermode 0\n") == "mains"
    assert machine.power_of(None, None) is None


# -- what a step reads --


def sketch(tmp_path, **changes):
    return models.load(tiny.make(tmp_path / str(changes), **changes))


def test_the_roofline_counts_what_a_step_reads(tmp_path):
    embedding = tiny.VOCAB * tiny.CONFIG["hidden_size"] * 4
    model = sketch(tmp_path)
    assert bandwidth.weight_bytes(model) == model.nbytes - embedding
    tied = sketch(tmp_path, tie_word_embeddings=True)
    assert bandwidth.weight_bytes(tied) == tied.nbytes  # its embedding is the head, too
    of_token = 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, their size, bytes
    assert bandwidth.cache_bytes(model, 10) == 10 * of_token
    weights = bandwidth.weight_bytes(model)
    assert bandwidth.step_bytes(model, 3, own=10) == weights + 30 * of_token
    assert bandwidth.step_bytes(model, 3, own=10, shared=100) == weights + 130 * of_token
    half = batches.roofline(model, batches.Batch(8, 4, 3), 1e9)
    assert half == pytest.approx(3e9 / (weights + 30 * of_token))


def test_experts_have_no_roofline(tmp_path):
    from families.configs import config

    from mlxpage.metal.backend import mlx_lm_utils

    module, _ = mlx_lm_utils()._get_classes(made := config("mixtral"))
    model = models.Model(module(_.from_dict(made)), made)
    assert bandwidth.weight_bytes(model) is None
    assert batches.roofline(model, batches.Batch(8, 4, 3), 1e9) is None


# -- workloads --


@pytest.fixture(scope="module")
def tokenizer(tiny_folder) -> Tokenizer:
    return Tokenizer(tiny_folder, tiny.IM_END)


def work(dataset, tokenizer, count=8, **options) -> list[Item]:
    lengths = Lengths(
        **{
            "input_len": 20,
            "output_len": 5,
            **{n: options.pop(n) for n in list(options) if n in Lengths.__slots__},
        }
    )
    given = {"vocab_size": tiny.VOCAB, "num_prompts": count, "lengths": lengths, **options}
    return workloads.items(dataset, tokenizer=tokenizer, **given)


@pytest.mark.parametrize("dataset", ["random", "text", "shared-prefix"])
def test_a_seed_makes_the_same_work_and_another_one_other_work(tokenizer, tmp_path, dataset):
    file = tmp_path / "text"
    file.write_text(json.dumps(list(range(1000))))
    first = work(dataset, tokenizer, seed=3, path=file)
    assert first == work(dataset, tokenizer, seed=3, path=file)
    assert first != work(dataset, tokenizer, seed=4, path=file)
    assert {item.output_len for item in first} == {5}


def test_random_prompts_have_no_special_tokens(tokenizer):
    used = {token for item in work("random", tokenizer, 50) for token in item.prompt}
    assert used <= set(range(tiny.BYTE, tiny.VOCAB)) and len(used) > 150


def test_lengths_spread_by_the_ratio_or_like_chats(tokenizer):
    spread = [len(i.prompt) for i in work("random", tokenizer, 300, range_ratio=0.5)]
    assert (min(spread), max(spread)) == (10, 30)
    chats = [len(i.prompt) for i in work("random", tokenizer, 300, chat_lengths=60)]
    assert max(chats) == 60 and min(chats) >= 4 and sorted(chats)[60] < 50


def test_text_is_of_the_file_that_is_given(tokenizer, tmp_path):
    file = tmp_path / "text"
    file.write_text("abc" * 100)
    (item,) = work("text", tokenizer, 1, path=file)
    assert "abcabc" in tiny.text(item.prompt)
    with pytest.raises(InvalidRequest, match="the text has 300 tokens; prompts of up to 400"):
        work("text", tokenizer, 1, path=file, input_len=400)


def test_prompts_begin_with_one_of_the_prefixes_in_turns(tokenizer):
    found = work("shared-prefix", tokenizer, 6, prefix_len=32, num_prefixes=2)
    heads = [tuple(item.prompt[:32]) for item in found]
    assert heads[0::2] == [heads[0]] * 3 and heads[1::2] == [heads[1]] * 3
    assert heads[0] != heads[1]
    assert len({tuple(item.prompt[32:]) for item in found}) == 6
    assert {len(item.prompt) for item in found} == {52}


def chat(*texts: str) -> dict:
    names = ("human", "gpt")
    turns = [{"from": names[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"id": "x", "conversations": turns}


def test_sharegpt_gives_first_questions_and_the_lengths_of_their_answers(tokenizer, tmp_path):
    file = tmp_path / "chats.json"
    chats = [chat("question", "answer", "more", "less"), chat("hi", "too short a question")]
    chats += [chat("no answer"), chat("a" * 1025, "too long"), chat("second", "ab" * 10)]
    file.write_text(json.dumps(chats))
    found = work("sharegpt", tokenizer, 9, path=file)
    assert sorted((tiny.text(i.prompt), i.output_len) for i in found) == [
        ("question", 6),
        ("second", 20),
    ]


@pytest.mark.parametrize("cut", [1, 30, 100])
def test_of_a_file_that_was_cut_short_what_is_whole_is_read(tokenizer, tmp_path, cut):
    file = tmp_path / "chats.json"
    file.write_text(json.dumps([chat(f"question {i}", "answer") for i in range(4)])[:-cut])
    assert len(work("sharegpt", tokenizer, 9, path=file)) == (4 if cut == 1 else 3)


def test_json_lines_are_read_like_an_array():
    values = [{"a": [1]}, {"b": "]"}, {}]
    for text in (json.dumps(values), "\n".join(map(json.dumps, values)), f" {values[0]['a']}"):
        expected = values if "b" in text else [1]
        assert list(workloads.json_values(text)) == expected
    assert list(workloads.json_values("no JSON")) == []


def test_replay_asks_turn_by_turn_with_the_answers_of_the_file(tokenizer, tmp_path):
    file = tmp_path / "chats.jsonl"
    chats = [chat("one", "answer", "two", "yes"), chat("other", "no")]
    file.write_text("\n".join(map(json.dumps, chats)))
    first, other, second = work("replay", tokenizer, 9, path=file)
    assert (first.after, other.after, second.after) == (None, None, 0)
    assert [item.output_len for item in (first, other, second)] == [6, 2, 3]
    words = tiny.text(second.prompt).split()
    assert words == ["user", "one", "assistant", "answer", "user", "two", "assistant"]
    assert second.prompt[: len(first.prompt)] == first.prompt


@pytest.mark.parametrize(
    "options, words",
    [
        ({"dataset": "sharegpt"}, "--dataset sharegpt needs its file"),
        ({"dataset": "replay", "path": Path("nowhere.jsonl")}, "can't read nowhere.jsonl: No such"),
        ({"dataset": "random", "count": 0}, "--num-prompts is 0"),
        ({"dataset": "random", "input_len": 0}, "--input-len is 0"),
        ({"dataset": "random", "range_ratio": 1.0}, "--range-ratio is 1.0"),
        ({"dataset": "shared-prefix", "num_prefixes": 0}, "--num-prefixes is 0"),
    ],
)
def test_work_that_can_not_be_made_is_refused(tokenizer, options, words):
    with pytest.raises(InvalidRequest, match=re.escape(words)):
        work(tokenizer=tokenizer, **options)


@pytest.mark.parametrize("dataset", ["sharegpt", "replay"])
def test_a_file_with_nothing_to_ask_is_refused(tokenizer, tmp_path, dataset):
    file = tmp_path / "file"
    file.write_text('{"some": "thing"}')
    with pytest.raises(InvalidRequest, match="conversation"):
        work(dataset, tokenizer, path=file)


# -- every benchmark, on a tiny model --

SMALL = ("--num-prompts", "3", "--input-len", "20", "--output-len", "6")
RUNS = {
    "latency": ("-p", "33", "-g", "5", "-b", "2", "-n", "3"),
    "batched": ("-npp", "16,33", "-ntg", "4", "-npl", "1,2", "-r", "1"),
    "throughput": (*SMALL, "--rival", "mlx-lm", "-r", "1"),
    "serve-sim": (*SMALL, "--request-rate", "200,inf", "--goodput", "ttft:9e4 tpot:9e4"),
    "memory": (*SMALL, "--dataset", "shared-prefix", "--prefix-len", "32", "--num-blocks", "20"),
    "attention": ("--shape", "2,40,4,2,32,16", "-r", "1", "--launches", "1", "--rotation", "1MB"),
}


@pytest.fixture(autouse=True)
def no_time_is_lost(monkeypatch):
    monkeypatch.setattr(runs, "WARM_UP_SECONDS", 0.0)
    monkeypatch.setattr(bandwidth.copy_speed, "__defaults__", (1 << 20, 1))


@pytest.fixture
def bench(cli, tiny_folder):
    """bench(name, *more): the command as a test of it runs."""

    def run(name, *more):
        model = () if name == "attention" else (tiny_folder,)
        return cli("bench", name, *model, *RUNS[name], *more)

    return run


@pytest.fixture(scope="module")
def records() -> dict[str, dict]:
    return {}


@pytest.fixture
def made(bench, records):
    """made(name): the record of a benchmark, which runs once for all tests."""

    def get(name) -> dict:
        if name not in records:
            ran = bench(name, "-o", "json")
            assert ran.code == 0, ran.err
            assert ran.out.count("\n") == 1  # JSON alone
            records[name] = json.loads(ran.out)
        return records[name]

    return get


@pytest.mark.parametrize("name", RUNS)
def test_a_record_tells_what_was_measured_and_where(made, tiny_folder, name):
    found = made(name)
    assert (found["schema"], found["benchmark"]) == ("mlxpage.bench/1", name)
    assert found["model"] == (None if name == "attention" else str(tiny_folder))
    assert found["machine"]["cores"] >= 1 and found["machine"]["chip"]
    assert set(found["versions"]) == {"mlxpage", "mlx", "mlx_lm", "python"}
    assert found["settings"]["seed"] == 0
    assert set(found["better"]) <= {name for row in found["rows"] for name in row["metrics"]}
    for row in found["rows"]:
        assert len(row["runs"]) == found["settings"].get("repeats", 1)


@pytest.mark.parametrize("name", RUNS)
def test_every_key_of_a_record_is_explained(made, name):
    text = DOCS.read_text(encoding="utf-8")
    found = made(name)
    keys = {*found, *found["machine"], *found.get("engine", ()), *found.get("workload", ())}
    for row in found["rows"]:
        keys |= {*row, *row["case"], *row["metrics"], *row.get("facts", ())}
    for key in keys:
        assert f"`{key}`" in text, key


@pytest.mark.parametrize("name", RUNS)
def test_a_table_has_a_row_for_each_and_a_cell_for_each_column(made, name):
    head, rule, *rows = tables.markdown(made(name)).splitlines()
    assert len(rows) == len(made(name)["rows"])
    titles = [part.strip() for part in head.strip("|").split("|")]
    kind = KINDS[name]
    assert titles[: len(kind.columns)] == [column.title for column in kind.columns]
    assert set(rule) <= set("|-: ")
    assert {line.count("|") for line in (head, rule, *rows)} == {len(titles) + 1}
    assert all(row.strip("|").split("|")[0].strip() for row in rows)


def test_csv_and_json_lines_have_all_figures(made):
    found = made("latency")
    (line,) = map(json.loads, tables.text_of(found, "jsonl").splitlines())
    (row,) = csv.DictReader(io.StringIO(tables.text_of(found, "csv")))
    assert set(row) == set(line)
    (of_record,) = found["rows"]
    assert line["generation_tps"] == of_record["metrics"]["generation_tps"]
    assert line["ttft_ms_low"] < line["ttft_ms"] < line["ttft_ms_high"]
    assert float(row["prompt_tps"]) == line["prompt_tps"] and row["batch_size"] == "2"


def test_without_a_format_a_table_is_on_stdout_and_the_machine_on_stderr(bench):
    ran = bench("attention")
    assert ran.out.startswith("| shape ") and ran.out.count("\n") == 5
    assert "mlxpage " in ran.err and "GB/s" in ran.err
    assert bench("attention", "-q").err == ""


def test_latency_has_the_words_of_mlx_lm(made):
    (row,) = made("latency")["rows"]
    assert row["case"] == {"prompt_tokens": 33, "generation_tokens": 5, "batch_size": 2}
    metrics = row["metrics"]
    assert set(metrics) >= {"prompt_tps", "generation_tps", "peak_memory", "total_time", "ttft_ms"}
    for run in row["runs"]:
        seconds = 66 / run["prompt_tps"] + 10 / run["generation_tps"]
        assert run["total_time"] == pytest.approx(seconds)
    assert made("latency")["engine"]["preemptions"] == 0


def test_batched_has_the_columns_of_llama_cpp(made):
    rows = made("batched")["rows"]
    assert [row["case"]["n_kv"] for row in rows] == [20, 40, 37, 74]
    for row in rows:
        case, run = row["case"], row["runs"][0]
        assert run["speed_pp"] == pytest.approx(case["pl"] * case["pp"] / run["t_pp"])
        assert run["speed_tg"] == pytest.approx(case["pl"] * case["tg"] / run["t_tg"])
        assert run["t"] == pytest.approx(run["t_pp"] + run["t_tg"])
        assert run["speed"] == pytest.approx(case["n_kv"] / run["t"])


@pytest.mark.parametrize("is_shared", [False, True])
def test_prompts_are_computed_once_and_a_step_of_generation_has_a_row_of_each(make_llm, is_shared):
    llm = make_llm(num_blocks=64)
    batch = batches.Batch(33, 5, 3, is_shared)
    prompts = [tiny.ids(bytes([65 + i]) * 33) for i in range(batch.num_prompts)]
    prompts *= 3 if is_shared else 1
    rows = []

    def watch(engine):
        plan = engine.scheduler.schedule

        def schedule():
            planned = plan()
            rows.append(planned.num_scheduled_tokens)
            return planned

        engine.scheduler.schedule = schedule
        batches.time_batch(engine, batch, prompts)
        timing = batches.time_batch(engine, batch, prompts)  # finds nothing of the first
        engine.scheduler.schedule = plan
        return timing

    timing = llm._call(watch)
    assert [count for count in rows if count] == 2 * ([33 * batch.num_prompts] + [3] * 6)
    assert timing.num_generated == 15 and len(timing.first_tokens) == batch.num_prompts


def test_throughput_compares_with_mlx_lm_token_by_token(made):
    ours, batched, single = made("throughput")["rows"]
    assert [row["case"]["arm"] for row in (ours, batched, single)] == [
        "mlxpage",
        "mlx-lm BatchGenerator",
        "mlx-lm one at a time",
    ]
    for row in (ours, batched, single):
        metrics = row["metrics"]
        assert (metrics["num_requests"], metrics["total_num_tokens"]) == (3, 3 * 26)
        seconds = metrics["elapsed_time"]
        assert metrics["output_tokens_per_second"] == pytest.approx(18 / seconds)
        assert metrics["peak_kv_bytes"] > 0
    assert batched["facts"]["same_tokens"] == single["facts"]["same_tokens"] == 3
    assert made("throughput")["workload"]["prompt_tokens"] == 60


def test_with_equal_memory_mlx_lm_batches_as_many_as_fit(cli, made, tiny_folder):
    of_token = 2 * 2 * 2 * 16 * 4
    model = models.load(tiny_folder, weights=False)
    items = [Item([0] * 20, 6)]
    assert offline.at_once_within(model, items, 3 * 512 * of_token, 32) == 3
    assert offline.at_once_within(model, items, 100 * 512 * of_token, 32) == 32
    assert offline.at_once_within(model, items, 1, 32) == 1
    memory = f"{2 * 512 * of_token}B"
    ran = cli(
        *("bench", "throughput", tiny_folder, *SMALL, "-r", "1", "--rival", "mlx-lm"),
        *("--kv-memory", memory, "-o", "json"),
    )
    found = json.loads(ran.out)
    assert found["engine"]["pool_blocks"] == 64
    limited, unlimited = found["rows"][1], made("throughput")["rows"][1]
    assert (limited["facts"]["at_once"], unlimited["facts"]["at_once"]) == (2, 32)
    held = [row["metrics"]["peak_kv_bytes"] for row in (limited, unlimited)]
    assert held[0] <= 2 * 512 * of_token and held[0] < held[1]


def test_serve_sim_has_the_names_of_vllm(made):
    by_rate = {row["case"]["request_rate"]: row["metrics"] for row in made("serve-sim")["rows"]}
    assert set(by_rate) == {200.0, "inf"}
    for metrics in by_rate.values():
        assert (metrics["completed"], metrics["failed"]) == (3, 0)
        assert (metrics["total_input_tokens"], metrics["total_output_tokens"]) == (60, 18)
        assert metrics["good"] == 3
        for name in ("ttft", "tpot", "itl", "e2el"):
            for which in ("mean", "median", "std", "p90", "p99"):
                assert metrics[f"{which}_{name}_ms"] >= 0
    assert by_rate["inf"]["max_concurrent_requests"] == 3


def test_no_more_requests_are_under_way_than_may_be(bench):
    ran = bench("serve-sim", "--request-rate", "inf", "--max-concurrency", "1", "-o", "json")
    (row,) = json.loads(ran.out)["rows"]
    assert row["metrics"]["max_concurrent_requests"] == 1


def test_a_turn_waits_for_the_one_before_it(cli, tiny_folder, tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(chat("one", "answer", "two", "second answer")))
    ran = cli(
        *("bench", "serve-sim", tiny_folder, "--dataset", "replay", "--dataset-path", file),
        *("-o", "json", "--no-warm-up"),
    )
    (row,) = json.loads(ran.out)["rows"]
    assert (row["metrics"]["completed"], row["metrics"]["max_concurrent_requests"]) == (2, 1)


def test_requests_that_can_not_be_served_are_an_error_with_the_reason(bench):
    ran = bench("serve-sim", "--num-blocks", "1", "-q")
    assert ran.code == 1
    assert "no request has completed: InvalidRequest: the prompt's 20 tokens" in ran.error[0]


def test_memory_counts_blocks_and_what_contiguous_caches_would_take(made):
    rows = {row["case"]["reserves"]: row["metrics"] for row in made("memory")["rows"]}
    # 52 + 6 tokens each; 20 blocks of 16.
    fit = {name: metrics["fit"] for name, metrics in rows.items()}
    assert fit == {pool.PAGED: 5, pool.EXACT: 5, pool.POWER_OF_2: 5, pool.LONGEST: 0}
    paged = rows[pool.PAGED]
    # All run from the first step on, and share the two blocks of the prefix: of 4 each, 12.
    assert (paged["running_at_most"], paged["blocks_at_most"]) == (3, 8)
    assert paged["saved_percent"] == pytest.approx(100 * (1 - 8 / 12))
    # In the steps after which they run on, 52 to 56 tokens of 58 are there, 32 of them shared.
    used = np.mean([32 + 3 * (tokens - 32) for tokens in range(52, 57)]) / (8 * 16)
    assert paged["used_percent"] == pytest.approx(100 * used)
    exact = np.mean(range(52, 57)) / 58
    assert rows[pool.EXACT]["used_percent"] == pytest.approx(100 * exact)
    assert rows[pool.LONGEST]["used_percent"] == pytest.approx(100 * exact * 58 / tiny.CONTEXT)


def test_choices_share_their_prompt(bench):
    ran = bench("memory", "--choices", "4", "--num-prompts", "1", "-o", "json")
    metrics = json.loads(ran.out)["rows"][0]["metrics"]
    assert metrics["running_at_most"] == 4 and metrics["saved_percent"] > 50


def test_attention_has_the_same_bytes_in_every_arm(made):
    rows = made("attention")["rows"]
    assert rows[0]["case"]["arm"] == "blocks"
    for row in rows:
        us, rate = row["metrics"]["us"], row["metrics"]["gb_s"]
        assert us * rate == pytest.approx(2 * 2 * 40 * 2 * 32 * 4 / 1e3)


def test_all_arms_attend_alike():
    from mlxpage.bench import attention
    from mlxpage.metal.backend import mx

    case = attention.Case(attention.Shape(3, 40, 4, 2, 32, 16), rotation=1)
    for each in (case._by_reference(case.scattered), case._by_reference(case.consecutive)):
        assert each(case.q, 0).shape == case.q.shape
    by_blocks, gathered = case._by_reference(case.scattered), case._gathered_by_reference()
    assert mx.allclose(by_blocks(case.q, 0), gathered(case.q, 0), atol=1e-5)


# -- comparing --


def told(generation_tps: float, ends=None, *, pp: int = 1, **more) -> dict:
    metrics = {"generation_tps": generation_tps, "prompt_tps": 100.0, "ttft_ms": 5.0}
    row = {"case": {"pp": pp}, "metrics": metrics, "interval": {"generation_tps": ends}}
    return {
        "benchmark": "latency",
        "rows": [row],
        "better": {"generation_tps": "higher", "ttft_ms": "lower"},
        "machine": {"chip": "M1"},
        **more,
    }


def test_a_ratio_above_one_is_better_whichever_way_that_is():
    old, new = told(10.0, (9, 11)), told(12.0, (10.5, 13))
    new["rows"][0]["metrics"]["ttft_ms"] = 10.0
    speed, wait = record.compare(old, new)
    assert (speed.metric, speed.ratio, speed.overlap) == ("generation_tps", 1.2, True)
    assert (wait.metric, wait.ratio, wait.overlap) == ("ttft_ms", 0.5, None)
    assert record.compare(old, told(12.0, (11.5, 13)))[0].overlap is False


def test_only_rows_of_the_same_settings_are_compared():
    with pytest.raises(InvalidRequest, match="no row of the same settings"):
        record.compare(told(1.0, pp=1), told(1.0, pp=2))
    with pytest.raises(InvalidRequest, match="bench memory can't be compared with bench latency"):
        record.compare(told(1.0, benchmark="memory"), told(1.0))


def test_what_else_differs_is_told():
    old, new = told(1.0, model="a"), told(1.0, model="a", machine={"chip": "M2"})
    assert record.differences(old, new) == ["chip was M1, is M2"]


def test_a_slower_run_fails_with_its_own_exit_code(bench, made, tmp_path):
    file = tmp_path / "old.json"
    old = json.loads(json.dumps(made("attention")))

    def against(factor, *more):
        for row in old["rows"]:
            row["metrics"]["us"] = factor
        file.write_text(json.dumps(old))
        return bench("attention", "--compare", file, *more)

    slower = against(1e-6, "--fail-below", "0.95")
    assert slower.code == FELL_BELOW == 7
    assert "below 0.95" in slower.error[-1]
    assert against(1e9, "--fail-below", "0.95").code == 0
    assert against(1e-6).code == 0  # it's told, and no more


@pytest.mark.parametrize(
    "more, words",
    [
        (("--fail-below", "0.9"), "--fail-below needs a record to compare with"),
        (("--compare", "nowhere.json"), "can't read nowhere.json"),
        (("--compare", __file__), "can't read"),
        (("--shape", "1,2,3"), "--shape is '1,2,3'; it must be one of"),
        (("--shape", "1,64,3,2,32,16"), "with heads a multiple of KV heads"),
        (("--rotation", "much"), "--rotation is 'much'"),
        (("--json", "no/such/folder.json"), "can't write no/such/folder.json"),
    ],
)
def test_what_can_not_be_done_is_said_in_a_line(bench, more, words):
    ran = bench("attention", "-q", *more)
    assert ran.code == 2
    assert words in ran.error[0] and len(ran.error) == 1


@pytest.mark.parametrize(
    "name, more, words",
    [
        ("latency", ("-p", "600"), "the longest request has 606 tokens, prompt and output; the"),
        ("latency", ("-p", "1,x"), "'1,x' must be whole numbers from 1 on"),
        ("throughput", ("--kv-memory", "1B"), "--kv-memory is '1B'; write it like 512MB"),
        ("serve-sim", ("--goodput", "speed:3"), "--goodput is 'speed:3'"),
        ("serve-sim", ("--request-rate", "0"), "'0' must be requests a second"),
        ("serve-sim", ("--burstiness", "0"), "--burstiness is 0.0"),
        ("memory", ("--longest", "3"), "--longest is 3; the longest request has 58 tokens"),
    ],
)
def test_what_a_model_can_not_be_asked_is_said_in_a_line(bench, name, more, words):
    ran = bench(name, "-q", *more)
    assert ran.code == 2
    assert words in ran.error[0] and len(ran.error) == 1


# -- figures --


def test_a_figure_has_a_line_for_each_and_bars_for_words(made):
    batched = figures.figure_of(made("batched"))
    lines = {"pp 16", "pp 33", "roofline, pp 16", "roofline, pp 33"}
    assert set(batched.lines) == lines and not batched.has_bars
    assert [x for x, _ in batched.lines["pp 16"]] == [1, 2]
    row = made("batched")["rows"][0]
    (x, y), *_ = batched.lines["roofline, pp 16"]
    assert (row["case"]["pp"], row["case"]["pl"]) == (16, x)
    assert row["metrics"]["speed_tg"] / y == pytest.approx(row["metrics"]["roofline_percent"] / 100)
    arms = figures.figure_of(made("throughput"))
    assert arms.has_bars and arms.labels[0] == "mlxpage"
    assert arms.heights("output_tokens_per_second")[0] > 0


def test_results_are_drawn_on_stderr_and_into_a_file(bench, tmp_path):
    file = tmp_path / "figure.png"
    ran = bench("attention", "--plot", "--png", file, "-o", "json")
    assert json.loads(ran.out)["benchmark"] == "attention"
    assert "gb_s" in ran.err and "┤" in ran.err
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", RUNS)
def test_every_benchmark_can_be_drawn(made, tmp_path, name):
    assert "┤" in figures.in_terminal(made(name))
    figures.to_png(made(name), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000


@pytest.mark.parametrize("option, package", [("--plot", "plotext"), ("--png", "matplotlib")])
def test_drawing_without_the_package_says_how_to_get_it(bench, monkeypatch, option, package):
    monkeypatch.setattr(figures, "find_spec", lambda name: None)
    ran = bench("attention", option, *(["x.png"] if option == "--png" else []))
    assert ran.code == 2
    assert f"{package} must be installed" in ran.error[0] and "mlxpage[plots]" in ran.error[0]


def test_help_loads_no_mlx(python):
    code = """
import sys
from mlxpage.cli.main import run
run(["bench", "serve-sim", "--help"])
print(sorted({"mlx", "numpy", "transformers"} & set(sys.modules)), file=sys.stderr)
"""
    assert python(code).stderr.strip() == "[]"


def test_the_demo_model_gets_the_readmes_workload(smollm2_folder):
    found = workloads.items(
        "text",
        tokenizer=Tokenizer(smollm2_folder, None),
        vocab_size=1000,
        num_prompts=24,
        lengths=Lengths(chat_lengths=400),
    )
    assert (sum(len(i.prompt) for i in found), sum(i.output_len for i in found)) == (3012, 3975)
