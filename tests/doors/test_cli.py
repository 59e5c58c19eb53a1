"""The command line: what it prints where, and what it gives back."""

import json
import threading

import click
import pytest
import tiny_folder as tiny
import trouble
from command_tree import commands
from families import zoo
from families.configs import config

import mlxpage
from mlxpage import describe
from mlxpage.block_store import BlockStore
from mlxpage.cli import generate, output
from mlxpage.cli.main import cli as group
from mlxpage.engine import Engine
from mlxpage.metal import choice
from mlxpage.metal.model import Model

GREEDY = ("--temp", "0", "-n", "6")


def answers(out: str) -> list[tuple[str, str]]:
    """(headline, answer) pairs of several prompts."""
    parts = out.removeprefix("==> ").split("\n\n==> ")
    return [tuple(part.rstrip("\n").split("\n", 1)) for part in parts]


# -- generate --


def test_the_answer_alone_is_on_stdout(cli, tiny_folder, letters):
    ran = cli("generate", tiny_folder, "hello", *GREEDY)
    assert ran.code == 0
    assert ran.out.endswith("\n") and ran.out.strip().isalpha() and len(ran.out) == 7
    plan, summary = ran.err.splitlines()
    assert plan.startswith("pool ")
    assert summary.startswith("1 answer (1 cut short by --max-tokens or the context), 6 tokens in")


def test_quiet_says_nothing_but_the_answer(cli, tiny_folder, letters):
    loud, quiet = (cli("generate", tiny_folder, "hello", *GREEDY, *q) for q in ([], ["-q"]))
    assert (quiet.out, quiet.err) == (loud.out, "")


def test_several_prompts_keep_their_order_and_have_headlines(cli, tiny_folder, letters):
    prompts = ["one", "two  and\nmore", "three"]
    ran = cli("generate", tiny_folder, *prompts, *GREEDY)
    alone = [cli("generate", tiny_folder, prompt, *GREEDY).out.strip() for prompt in prompts]
    assert answers(ran.out) == list(zip(["one", "two and more", "three"], alone, strict=True))


def test_answers_that_end_early_wait_for_their_turn(cli, tiny_folder, letters):
    prompts = [str(n) for n in range(12)]
    whole = cli("generate", tiny_folder, *prompts, *GREEDY, "-n", "16")
    texts = [text for _, text in answers(whole.out)]
    # A stop string that some answers meet early and some never.
    stop = texts[3][2:4]
    ran = cli("generate", tiny_folder, *prompts, *GREEDY, "-n", "16", "--stop", stop)
    expected = [(p, t.partition(stop)[0]) for p, t in zip(prompts, texts, strict=True)]
    assert len({len(text) for _, text in expected}) > 1
    assert answers(ran.out) == expected


def test_json_is_one_document_with_these_keys_and_nothing_else(cli, tiny_folder, letters):
    ran = cli("generate", tiny_folder, "one", "two", *GREEDY, "--json")
    record = json.loads(ran.out)
    assert ran.out.count("\n") == 1
    assert set(record) == {
        "schema",
        "model",
        "chat_template",
        "load_s",
        "outputs",
        "seconds",
        "output_tokens_per_second",
        "pool",
        "bytes",
        "versions",
    }
    assert (record["schema"], record["chat_template"]) == ("mlxpage.generate/1", True)
    assert record["model"] == str(tiny_folder)
    first, second = record["outputs"]
    assert set(first) == {"prompt", "text", "finish_reason", "usage", "timings"}
    assert (first["prompt"], second["prompt"]) == ("one", "two")
    text = cli("generate", tiny_folder, "one", *GREEDY).out.strip()
    assert (first["text"], first["finish_reason"]) == (text, "length")
    assert first["usage"] == {"prompt_tokens": 22, "completion_tokens": 6, "cached_tokens": 0}
    times = first["timings"]
    assert set(times) == {"queue_s", "ttft_s", "total_s", "prefill_tps", "decode_tps"}
    assert 0 < times["ttft_s"] < times["total_s"] < record["load_s"] + record["seconds"]
    assert times["decode_tps"] == pytest.approx(5 / (times["total_s"] - times["ttft_s"]), rel=0.1)
    assert set(record["pool"]) >= {"total", "used", "free", "peak_used", "block_size"}
    assert set(record["bytes"]) >= {"budget", "weights", "scratch", "pool", "active", "peak"}
    assert record["versions"]["mlxpage"] == mlxpage.__version__


def events(ran) -> list[dict]:
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert all(line.pop("schema") == "mlxpage.event/1" for line in lines)
    return lines


def test_events_tell_of_each_prompt_as_it_goes_on(cli, tiny_folder, letters):
    ran = cli("generate", tiny_folder, "one", "two", *GREEDY, "--jsonl")
    first, *between, last = events(ran)
    assert (first["type"], last["type"]) == ("begin", "end")
    assert first["model"] == str(tiny_folder) and first["versions"]["mlxpage"]
    record = json.loads(cli("generate", tiny_folder, "one", "two", *GREEDY, "--json").out)
    for index, answer in enumerate(record["outputs"]):
        prefill, *tokens, done = [event for event in between if event["index"] == index]
        assert prefill == {
            "type": "prefill",
            "index": index,
            "computed_tokens": 22,
            "prompt_tokens": 22,
            "cached_tokens": 0,
        }
        assert {event["type"] for event in tokens} == {"tokens"}
        assert "".join(event["text"] for event in tokens) == done["text"] == answer["text"]
        assert sum(len(event["token_ids"]) for event in tokens) == 6
        assert done["type"] == "done" and done["usage"] == answer["usage"]
        assert set(done) - {"type", "index"} == set(answer) - {"prompt"}
    assert set(first | last) - {"type"} == set(record) - {"schema", "outputs"}


def test_a_failed_step_is_the_last_event(cli, tiny_folder, monkeypatch):
    trouble.fail(monkeypatch, "mlxpage.engine.Engine._record", RuntimeError("no memory"), at=2)
    ran = cli("generate", tiny_folder, "one", *GREEDY, "--jsonl")
    told = "a step failed: RuntimeError: no memory"
    error = {"type": "error", "index": 0, "error": told, "exit_code": 1}
    assert events(ran)[-1] == error
    assert (ran.code, ran.error[-1]) == (1, f"Error: {told}")


def test_a_prompt_that_cannot_be_served_leaves_stdout_empty(cli, tiny_folder):
    for form in ([], ["--json"], ["--jsonl"]):
        ran = cli("generate", tiny_folder, "one", "x" * 600, *GREEDY, *form)
        assert (ran.code, ran.out) == (2, "")


def test_more_prompts_than_an_engine_lets_wait_are_answered(cli, tiny_folder, monkeypatch):
    submit, start = generate._submit, Engine._start
    submitted = threading.Event()

    def submitting(*arguments):
        events = submit(*arguments)
        submitted.set()
        return events

    def starting(engine, batch):
        submitted.wait(5)  # none of them has begun before
        return start(engine, batch)

    monkeypatch.setattr(generate, "_submit", submitting)
    monkeypatch.setattr(Engine, "_start", starting)
    ran = cli("generate", tiny_folder, *map(str, range(1100)), "--raw", "-n", "1", "--json")
    assert ran.code == 0 and len(json.loads(ran.out)["outputs"]) == 1100


def test_figures_may_be_had_alone_or_left_out(cli, tiny_folder):
    def said(*options):
        return cli("generate", tiny_folder, "a", *GREEDY, *options).err.splitlines()

    assert [line[:6] for line in said("--no-stats")] == ["pool u"]
    assert [line[:8] for line in said("-q", "--stats")] == ["1 answer"]


def test_a_prompt_comes_from_stdin_if_none_is_given_or_by_a_dash(cli, tiny_folder, letters):
    given = cli("generate", tiny_folder, "hello", *GREEDY)
    assert cli("generate", tiny_folder, *GREEDY, stdin="hello").out == given.out
    both = cli("generate", tiny_folder, "other", "-", *GREEDY, stdin="hello")
    assert answers(both.out)[1] == ("hello", given.out.strip())


def test_raw_continues_the_prompt_without_template(cli, tiny_folder):
    def usage(*options):
        record = json.loads(cli("generate", tiny_folder, "abc", *GREEDY, "--json", *options).out)
        return record["chat_template"], record["outputs"][0]["usage"]["prompt_tokens"]

    assert usage("--raw") == (False, 3)
    assert usage() == (True, 22)
    assert usage("-s", "Be brief.") == (True, 22 + 19)


def test_a_model_without_template_gets_the_prompt_as_it_is(cli, untemplated_folder):
    ran = cli("generate", untemplated_folder, "abc", *GREEDY, "--json")
    assert json.loads(ran.out)["outputs"][0]["usage"]["prompt_tokens"] == 3
    assert cli("generate", untemplated_folder, "abc", "-s", "Be brief.").code == 2


def test_seed_makes_an_answer_reproducible(cli, tiny_folder):
    def answer(*options):
        return cli("generate", tiny_folder, "abc", "--temp", "1", "-n", "12", "-q", *options).out

    assert answer("--seed", "5") == answer("--seed", "5") != answer("--seed", "6")
    assert answer() != answer()


def test_stop_ends_the_answer_and_may_be_repeated(cli, tiny_folder, letters):
    whole = cli("generate", tiny_folder, "hello", *GREEDY, "-q").out
    ran = cli(
        "generate", tiny_folder, "hello", *GREEDY, "-q", "--stop", "xyz", "--stop", whole[3:5]
    )
    assert ran.out == whole[: whole.index(whole[3:5])] + "\n"


def test_sampling_options_reach_the_engine(cli, tiny_folder, monkeypatch):
    seen = []
    make = mlxpage.SamplingParams
    monkeypatch.setattr(
        mlxpage,
        "SamplingParams",
        lambda **given: seen.append(given) or make(**given),
        raising=False,
    )
    options = "--temperature 0.5 --top-p 0.9 --top-k 5 --min-p 0.1 --repetition-penalty 1.1"
    ran = cli("generate", tiny_folder, "abc", "-n", "2", *options.split(), "--seed", "3")
    assert ran.code == 0
    assert seen == [
        {
            "max_tokens": 2,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "seed": 3,
            "stop": (),
        }
    ]


def test_engine_options_reach_the_engine(cli, tiny_folder):
    options = "--num-blocks 9 --block-size 32 --max-num-seqs 1 --backend reference --dtype float16"
    ran = cli("generate", tiny_folder, "a", "b", "-n", "2", "--json", *options.split())
    record = json.loads(ran.out)
    assert record["pool"]["total"] == 9 and record["pool"]["block_size"] == 32
    assert record["outputs"][1]["timings"]["queue_s"] > 0
    assert record["bytes"]["weights"] < (tiny_folder / "model.safetensors").stat().st_size * 0.6


@pytest.mark.parametrize(
    "bits, share", [("8", 9 / 16), ("4", 5 / 16), ("8,4", 7 / 16), ("none,4", 21 / 32)]
)
def test_kv_bits_make_a_pool_smaller(cli, tmp_path, bits, share):
    """Of heads of 32, in one group: 16 bits of scale and 16 of bias, beside 32 elements."""
    folder = tiny.make(tmp_path / "wide", num_attention_heads=2, num_key_value_heads=1)
    options = ["-n", "2", "--json", "--num-blocks", "9", "--dtype", "float16"]
    pools = [
        json.loads(cli("generate", folder, "a", *options, *more).out)["bytes"]["pool"]
        for more in ([], ["--kv-bits", bits])
    ]
    assert pools[1] == share * pools[0]


@pytest.mark.parametrize("no_color, color", [("1", False), ("", None)])
def test_no_color_is_no_color(monkeypatch, no_color, color):
    monkeypatch.setenv("NO_COLOR", no_color)
    asked = []
    monkeypatch.setattr(output.click, "secho", lambda line, **style: asked.append(style["color"]))
    output.say("line", dim=True)
    assert asked == [color]


# -- info --


def test_info_tells_of_the_machine(cli):
    ran = cli("info")
    assert (ran.code, ran.err) == (0, "")
    facts = dict(line.split("  ", 1) for line in ran.out.splitlines())
    assert {"mlxpage", "mlx", "mlx-lm", "device", "memory"} <= {name.strip() for name in facts}


def test_show_tells_of_a_model_and_how_it_fits(cli, tiny_folder):
    facts = json.loads(cli("show", tiny_folder, "--json").out)
    assert facts["schema"] == "mlxpage.show/1"
    assert (facts["family"], facts["layers"]) == ("llama", 2)
    assert facts["context"] == "512 tokens"
    assert facts["fits"].startswith("pool ")
    assert facts["model"] == str(tiny_folder)


def test_show_tells_how_a_model_will_be_served(cli, tiny_folder):
    facts = json.loads(cli("show", tiny_folder, "--json").out)
    assert facts["attention"] == "full"
    assert facts["step"] == "rows; the check at load decides"
    assert "on a GPU too" not in facts["backend for it"]
    assert facts["prefix cache"] == "of blocks of 16 tokens"
    assert facts["kv_bits"].startswith("no: K has heads of 16 elements")


CHUNKS = "chunks or sequences, as the check at load decides: "
STRUCTURES = [
    ("gemma3n", "full and window", "rows; ", ""),
    ("gemma2", "full", CHUNKS + "gemma2 can't take tokens as rows: ", "kernels serve rows alone"),
    ("deepseek_v3", "latent", "rows; ", ""),
    ("deepseek_v32", "latent", CHUNKS, "kernels serve rows alone"),
    ("minimax_m3_vl", "full", CHUNKS, "keeps K without V, which no kernel writes yet"),
    ("baichuan_m1", "full, window and states", CHUNKS, "which no kernel updates yet"),
    ("mamba", "states", CHUNKS + "mamba keeps states", "which no kernel updates yet"),
]


@pytest.mark.parametrize("family, attention, step, no_kernels", STRUCTURES)
def test_show_foresees_how_families_are_served(family, attention, step, no_kernels):
    # Its keys that choose have no size of a latent, as in real ones.
    changes = {"index_head_dim": 64} if family == "deepseek_v32" else {}
    facts = describe.structure(Model(*zoo.make(family, **changes)))
    assert facts["attention"] == attention
    assert facts["step"].startswith(step)
    assert facts["backend for it"].startswith("reference, on a GPU too (") == bool(no_kernels)
    assert no_kernels in facts["backend for it"]
    assert ("states" in facts["prefix cache"]) == ("states" in attention)


@pytest.mark.parametrize(
    "family, changes, found",
    [
        ("llama", {"head_dim": 32}, "8 or 4, of K and V"),
        ("minicpm3", {}, "8 or 4, of K alone: V has heads of 16 elements"),
        ("llama", {}, "no: K has heads of 16 elements"),
        ("mamba", {}, "no: mamba keeps no K and V"),
    ],
)
def test_show_says_what_can_be_kept_in_few_bits(family, changes, found):
    assert describe.structure(Model(*zoo.make(family, **changes)))["kv_bits"].startswith(found)


def test_show_tells_of_a_model_with_states(tmp_path, monkeypatch):
    """Beside K and V, in each of its layers; and what serves it on a GPU."""
    folder = tiny.make(tmp_path / "model", **config("falcon_h1"))
    on_a_gpu = choice.Backend("metal", choice.kernels, "")
    monkeypatch.setattr(choice, "wanted", lambda name=None: on_a_gpu)
    facts = describe.model(folder)
    assert facts["layers"] == 3
    assert facts["windows"] == "3 layers with states, 3 layers full"
    assert facts["states of a sequence"] == "31,488 bytes"
    assert "128 states" in facts["fits"]
    assert "falcon_h1 keeps states, which no kernel updates yet" in facts["backend for it"]


def test_show_tells_of_a_model_that_does_not_fit(cli, tiny_folder):
    ran = cli("show", tiny_folder, "--memory", "1MB", "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["fits"].startswith("no: ")


# -- cache --


@pytest.fixture
def blocks(tmp_path):
    """A folder with three blocks of one model and one of another."""
    for name, count in (("one\x1b[2J", 3), ("other", 1)):
        with BlockStore(tmp_path / "blocks", {"model": name}, 10**9) as store:
            for number in range(count):
                assert store.put(b"%d" % number, bytes(500_000))
    return tmp_path / "blocks"


SIZE = 500_000 + 88 + 1


def test_stats_tell_what_the_prefix_cache_has_on_disk(cli, blocks):
    ran = cli("cache", "stats", "--dir", blocks)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines() == [
        f"{blocks}: 4 blocks, 2 MB",
        '  3 blocks, 2 MB, last used 0.0 days ago  {"format": 1, "model": "one\\u001b[2J"}',
        '  1 block, 500 kB, last used 0.0 days ago  {"format": 1, "model": "other"}',
    ]


def test_cache_commands_as_json(cli, blocks):
    def record(action):
        ran = cli("cache", action, "--dir", blocks, "--json")
        assert (ran.code, ran.err, ran.out.count("\n")) == (0, "", 1)
        record = json.loads(ran.out)
        assert record.pop("schema") == "mlxpage.cache/1"
        assert (record.pop("action"), record.pop("folder")) == (action, str(blocks))
        return record

    stats = record("stats")
    one, other = stats.pop("identities")
    assert stats == {"blocks": 4, "bytes": 4 * SIZE}
    assert set(one) == {"identity", "facts", "blocks", "bytes", "last_used"}
    assert (one["blocks"], other["facts"]["model"]) == (3, "other")
    whole = {"blocks": 4, "bytes": 4 * SIZE}
    assert record("verify") == whole | {"damaged": 0, "unreadable": 0}
    assert record("clear") == whole
    assert record("stats") == {"blocks": 0, "bytes": 0, "identities": []}


def test_verify_tells_how_many_blocks_were_damaged(cli, blocks):
    next(file for file in blocks.glob("*/*/*") if len(file.name) == 64).write_text("damaged")
    for damaged, told in ((1, "1 damaged and removed"), (0, "0 damaged and removed")):
        ran = cli("cache", "verify", "--dir", blocks)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out == f"{blocks}: 3 blocks, 2 MB whole; {told}\n", damaged


def test_clear_tells_what_it_removed_beside_a_store_in_use(cli, blocks):
    with BlockStore(blocks, {"model": "other"}, 10**9) as store:
        assert store.get(b"0") is not None
        ran = cli("cache", "clear", "--dir", blocks)
        assert (ran.code, ran.out, ran.err) == (0, f"removed 4 blocks, 2 MB, from {blocks}\n", "")
        assert store.get(b"0") is None
        assert store.put(b"0", b"again")
    assert cli("cache", "clear", "--dir", blocks).out.startswith("removed 1 block, ")


def test_the_cache_lies_with_the_other_caches(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("MLXPAGE_CACHE", str(tmp_path))
    assert cli("cache", "stats").out == f"{tmp_path / 'blocks'}: 0 blocks, 0 kB\n"
    assert not (tmp_path / "blocks").exists()


# -- help --


@pytest.mark.parametrize("name", commands())
def test_every_command_and_option_has_its_help(cli, name):
    command = commands()[name]
    assert command.help
    shown = cli(*name.split(), "--help")
    assert (shown.code, shown.err) == (0, "")
    assert cli(*name.split(), "-h").out == shown.out
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            assert max(parameter.opts, key=len) in shown.out
        else:
            name = parameter.make_metavar(click.Context(command)).strip("[].")
            assert name in command.help + group.help, name


JSON = {
    "alias ls": [],
    "cache": ["stats"],
    "config show": [],
    "doctor": [],
    "generate": ["MODEL", "a", "-n", "1"],
    "info": [],
    "ls": [],
    "show": ["MODEL", "--fit"],
    "top": ["--once"],
}


@pytest.mark.parametrize("name", JSON)
def test_with_json_there_is_one_document_and_nothing_else(cli, make_llm, tiny_folder, name):
    watched = make_llm(monitor=True) if name == "top" else None
    arguments = [str(tiny_folder) if word == "MODEL" else word for word in JSON[name]]
    ran = cli(*name.split(), *arguments, "--json")
    assert ran.code == (0 if name != "doctor" else ran.code) and ran.out.count("\n") == 1
    assert json.loads(ran.out)["schema"] == f"mlxpage.{name.split()[0]}/1"
    del watched


def test_so_do_all_commands_that_have_it():
    having = {
        name
        for name, command in commands().items()
        if any("--json" in parameter.opts and parameter.is_flag for parameter in command.params)
    }
    assert having == set(JSON)


def test_the_version_is_shown(cli):
    assert cli("--version").out.split()[-1] == mlxpage.__version__


def test_help_loads_nothing_heavy(python):
    shown = python(
        "import sys; from mlxpage.cli.main import run; code = run(['--help'])\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules}), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    assert shown.returncode == 0
    loaded = set(shown.stderr.replace("'", "").strip("[]\n").split(", "))
    heavy = {"mlx", "mlx_lm", "numpy", "transformers", "huggingface_hub", "tokenizers"}
    heavy |= {"rich", "prompt_toolkit"}
    assert "click" in loaded
    assert not loaded & (heavy | {"gguf", "asyncio"})
