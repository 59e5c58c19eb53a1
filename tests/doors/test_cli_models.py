"""Commands about models: fetch, list, remove, describe and name them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import tiny_folder as tiny
from command_tree import commands
from families.configs import config
from huggingface_hub import constants

import mlxpage
from mlxpage import SamplingParams, engine_thread, fitting, model_store
from mlxpage.cli import aliases, output, rm
from mlxpage.cli.main import cli as group
from mlxpage.cli.options import ModelName
from mlxpage.metal import memory as sizing
from mlxpage.metal import model as models
from mlxpage.metal.backend import device
from mlxpage.model_store import hub
from mlxpage.scheduler import Scheduler

ROOT = Path(__file__).parents[2]
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """No model and no alias at first, in a folder of its own."""
    monkeypatch.setenv("MLXPAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLXPAGE_CONFIG", str(tmp_path / "config"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.fixture
def demo(folders, tiny_folder):
    """The tiny model in the place of a demo model."""
    return shutil.copytree(tiny_folder, folders / "cache" / "models" / "smollm2-135m")


@pytest.fixture
def of_the_hub(folders, tiny_folder):
    """org/name in the hub's cache."""
    repository = folders / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(SHA)
    return shutil.copytree(tiny_folder, repository / "snapshots" / SHA)


def lines(text: str) -> list[list[str]]:
    return [re.split(r"  +", line) for line in text.splitlines()]


# -- pull --


@pytest.fixture
def hub_sends(monkeypatch, tiny_folder):
    """The hub has org/name, of 1,000 MB, and sends it in twenty pieces."""

    def fetch(name, on_status, on_bytes=None):
        if on_bytes is None:  # what loads it finds it here
            return tiny_folder
        on_status(f"Downloading {name} from the hub (1,000 MB)")
        for done in range(0, 10**9 + 1, 5 * 10**7):
            on_bytes(done, 10**9)
        return tiny_folder

    monkeypatch.setattr(hub, "fetch", fetch)


def test_pull_prints_the_folder_and_tells_in_lines_how_far_it_is(cli, tiny_folder, hub_sends):
    ran = cli("pull", "org/name")
    assert (ran.code, ran.out) == (0, f"{tiny_folder}\n")
    said = ran.err.splitlines()
    assert said[0] == "Downloading org/name from the hub (1,000 MB)"
    assert said[1:] == [f"{n}00 MB of 1.0 GB" for n in range(1, 10)] + ["1.0 GB of 1.0 GB"]
    assert cli("pull", "org/name", "-q").err == ""


def test_generate_tells_in_the_same_way_how_far_a_download_is(cli, hub_sends):
    ran = cli("generate", "org/name", "hello", "-n", "2")
    assert ran.code == 0 and "900 MB of 1.0 GB" in ran.err
    assert cli("generate", "org/name", "hello", "-n", "2", "-q").err == ""


def test_an_engine_is_watched_by_the_name_that_people_gave_its_model(cli, of_the_hub, monkeypatch):
    seen = []
    monkeypatch.setattr(engine_thread, "start_monitor", lambda model, call: seen.append(model))
    assert cli("generate", "org/name", "hello", "-n", "2").code == 0
    assert cli("bench", "latency", "org/name", "-p8", "-g2", "-r1").code == 0
    assert seen == ["org/name"] * 2


@pytest.mark.parametrize("name", ["smollm2-135m", "org/name"])
def test_pull_says_that_a_model_is_here_already(cli, demo, of_the_hub, name):
    ran = cli("pull", name)
    folder = {"smollm2-135m": demo, "org/name": of_the_hub}[name]
    assert (ran.code, ran.out, ran.err) == (0, f"{folder}\n", f"{name} is here already\n")


def test_pull_checks_the_files(cli, demo):
    weights = demo / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    ran = cli("pull", "smollm2-135m")
    assert (ran.code, ran.out) == (4, "") and "truncated" in ran.error[0]
    assert ran.error[1] == "`mlxpage rm smollm2-135m` removes it, to be fetched again."
    assert len(cli("pull", demo).error) == 1, "a folder of the user's own"


def test_a_bar_is_drawn_on_a_terminal_that_can(monkeypatch):
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    drawn = []
    for term in ("xterm-256color", "dumb", "unknown"):
        monkeypatch.setenv("TERM", term)
        drawn.append(output.is_terminal(sys.stderr))
    assert drawn == [True, False, False]
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: False))
    assert not output.is_terminal(sys.stderr)


def test_ctrl_c_ends_a_pull(tmp_path):
    code = """
import sys, time
from mlxpage.model_store import hub
def fetch(name, on_status, on_bytes):
    on_status("SENDING")
    time.sleep(60)
hub.fetch = fetch
from mlxpage.cli.main import main
sys.argv = ["mlxpage", "pull", "org/name"]
main()
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as pull:
        assert pull.stderr.readline() == "SENDING\n"
        pull.send_signal(signal.SIGINT)
        assert (pull.stderr.read().split(), pull.wait(30)) == (["interrupted"], 130)


# -- ls --


def test_ls_lists_what_other_commands_take(cli, demo, of_the_hub, tiny_folder):
    aliases.write({"q": "org/name", "mine": str(tiny_folder), "gone": "org/gone"})
    ran = cli("ls")
    assert (ran.code, ran.err) == (0, "")
    size = f"{sum(file.stat().st_size for file in demo.iterdir()) // 1000} kB"
    facts = [size, "llama", "?", "today"]
    assert lines(ran.out) == [
        ["NAME", "SIZE", "FAMILY", "QUANTISATION", "LAST USED"],
        ["org/name", *facts],
        ["smollm2-135m", *facts],
        ["gone", "-", "-", "-", "-", "alias of org/gone, which isn't here"],
        ["mine", *facts, f"alias of {tiny_folder}"],
        ["q", *facts, "alias of org/name"],
    ]
    for name in ("org/name", "smollm2-135m", "mine", "q"):
        assert cli("generate", name, "hello", "-n", "1", "-q").code == 0


def test_ls_as_json(cli, of_the_hub):
    aliases.write({"q": "org/name"})
    record = json.loads(cli("ls", "--json").out)
    assert (record["schema"], record["aliases"]) == ("mlxpage.ls/1", {"q": "org/name"})
    (model,) = record["models"]
    assert set(model) == {"name", "folder", "family", "quantisation", "size", "last_used"}
    assert (model["name"], model["folder"]) == ("org/name", str(of_the_hub))


def test_ls_of_nothing_says_how_to_begin(cli, folders):
    ran = cli("ls")
    assert (ran.code, ran.out) == (0, "") and "mlxpage pull smollm2-135m" in ran.err
    assert json.loads(cli("ls", "--json").out)["models"] == []
    assert not (folders / "hub").exists() and not (folders / "cache").exists()


# -- rm --


@pytest.mark.parametrize("name", ["smollm2-135m", "org/name", "alias"])
def test_rm_removes_a_model_and_tells_what_that_frees(cli, demo, of_the_hub, name):
    aliases.write({"alias": "org/name"})
    ran = cli("rm", name, "--yes")
    assert (ran.code, ran.out) == (0, "")
    kept = {"smollm2-135m": "org/name"}.get(name, "smollm2-135m")
    assert re.fullmatch(r"removed [\w/-]+: 39\d kB freed\n", ran.err)
    assert [model.name for model in model_store.models()] == [kept]


@pytest.mark.parametrize(
    "answer, code, last", [("y", 0, "removed"), ("n", 1, "nothing is removed")]
)
def test_rm_asks_on_a_terminal(cli, demo, monkeypatch, answer, code, last):
    monkeypatch.setattr(rm, "sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))
    ran = cli("rm", "smollm2-135m", stdin=f"{answer}\n")
    assert (ran.code, ran.out) == (code, "")
    assert ran.err.startswith("Remove smollm2-135m, 39") and last in ran.err
    assert demo.exists() == (answer == "n")


def test_rm_removes_nothing_unasked_without_a_terminal(cli, demo):
    ran = cli("rm", "smollm2-135m", stdin="y\n")
    assert ran.code == 2 and "give --yes" in ran.error[0]
    assert demo.exists()


def test_rm_never_removes_a_folder_of_the_user(cli, folders, tiny_folder):
    mine = shutil.copytree(tiny_folder, folders / "here" / "smollm2-135m")
    aliases.write({"mine": str(mine)})
    for name in (mine, "smollm2-135m", "./smollm2-135m", "mine", "..", "~"):
        ran = cli("rm", name, "-y")
        assert ran.code == 2 and "is a folder of yours" in ran.error[0]
    assert (mine / "config.json").exists()


def test_rm_of_what_is_not_here_names_what_is_alike(cli, of_the_hub, demo):
    ran = cli("rm", "org/nam", "-y")
    assert ran.code == 3 and "Did you mean org/name?" in ran.error[0]


def test_what_cannot_be_removed_is_told(cli, demo, monkeypatch):
    def refuse(path, *_, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    ran = cli("rm", "smollm2-135m", "-y")
    assert ran.code == 2 and f"{demo}: Permission denied" in ran.error[0]


def test_why_a_link_to_a_model_elsewhere_stays_is_told(cli, folders, of_the_hub):
    repository, elsewhere = folders / "hub" / "models--org--name", folders / "disk"
    repository.rename(elsewhere)
    repository.symlink_to(elsewhere)
    ran = cli("rm", "org/name", "-y")
    assert ran.code == 2 and "symbolic link" in ran.error[0]
    assert elsewhere.is_dir()


# -- alias --


def test_an_alias_may_be_given_wherever_a_model_may(cli, tiny_folder):
    ran = cli("alias", "set", "mine", os.path.relpath(tiny_folder))
    assert (ran.code, ran.out) == (0, "")
    record = json.loads(cli("generate", "mine", "hello", "-n", "1", "--json").out)
    assert record["model"] == str(tiny_folder)
    assert cli("chat", "mine", stdin="/exit\n").code == 0
    assert cli("show", "mine").out == cli("show", tiny_folder).out
    assert cli("pull", "mine", "-q").out == f"{tiny_folder}\n"


def test_every_command_takes_aliases():
    for name, command in commands().items():
        for parameter in command.params:
            if isinstance(parameter, click.Argument) and parameter.name == "model":
                assert isinstance(parameter.type, ModelName), f"{name}: use options.model_argument"


def test_a_folder_comes_before_an_alias_and_an_alias_before_the_hub(folders, of_the_hub):
    aliases.write({"name": "org/name"})
    assert aliases.expand("name") == "org/name"
    (folders / "here" / "name").mkdir()
    assert aliases.expand("name") == "name"
    assert aliases.expand("other") == "other"


def test_aliases_are_listed_replaced_and_removed(cli):
    assert cli("alias", "ls").out == "" != cli("alias", "ls").err
    cli("alias", "set", "a", "org/one")
    cli("alias", "set", "b", "a")
    assert lines(cli("alias", "ls").out) == [["a", "org/one"], ["b", "org/one"]]
    cli("alias", "set", "a", "org/two")
    record = json.loads(cli("alias", "ls", "--json").out)
    assert record == {
        "schema": "mlxpage.alias/1",
        "aliases": {"a": "org/two", "b": "org/one"},
    }
    assert cli("alias", "rm", "a").code == 0
    ran = cli("alias", "rm", "a")
    assert ran.code == 2 and "did you mean" not in ran.err
    assert aliases.read() == {"b": "org/one"}


@pytest.mark.parametrize("text", [b"[]", b"{", b'{"a": 1}', b"\xff", b"[" * 10**5])
def test_a_damaged_file_of_aliases_is_told_where_it_is_needed(cli, tiny_folder, folders, text):
    (folders / "config").mkdir()
    aliases.file().write_bytes(text)
    for command in (["generate", "a", "x"], ["alias", "ls"], ["ls"]):
        ran = cli(*command)
        assert ran.code == 2 and str(aliases.file()) in ran.error[0]
    assert cli("pull", tiny_folder).code == 0


def test_a_folder_that_cannot_be_written_is_told(cli, folders):
    (folders / "config").write_text("a file")
    ran = cli("alias", "set", "a", "org/one")
    assert ran.code == 2 and "MLXPAGE_CONFIG" in ran.error[0]


# -- show --fit --


def fit_of(folder, machine: str, **options) -> dict[tuple, fitting.Fit]:
    """(kv_bits, context) -> of a machine."""
    fits = fitting.fits(folder, **options)
    return {(fit.kv_bits, fit.context): fit for fit in fits if fit.machine.startswith(machine)}


FAMILIES = {"llama": {}, "gemma3_text": {"sliding_window": 64}, "falcon_h1": {}}


@pytest.fixture(scope="module")
def of_family(tmp_path_factory):
    """of_family(name) -> a tiny model of it, with a context of 512."""
    made = {}

    def make(family):
        if family not in made:
            changes = config(family) if family != "llama" else {}
            changes |= {"max_position_embeddings": 512, **FAMILIES[family]}
            changes["vocab_size"] = tiny.VOCAB
            made[family] = tiny.make(tmp_path_factory.mktemp("models") / family, **changes)
        return made[family]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_told_is_the_plan_of_a_loaded_engine(of_family, family):
    folder = of_family(family)
    budget = "200MB"
    fit = fit_of(folder, "this machine", memory=budget)[None, 512]
    for max_num_seqs, sequences in fit.at_once:
        with mlxpage.LLM(folder, memory=budget, max_num_seqs=max_num_seqs) as llm:
            assert llm.plan.budget == fit.budget
            assert sequences == min(max_num_seqs, fitting.sequences(llm.plan, 512))
            assert sequences == max_num_seqs, "windows have room for the chunk of one, not of all"
    plan = sizing.plan(models.load(folder, weights=False), memory=fit.needs, max_num_seqs=1)
    assert fitting.sequences(plan, 512) == 1
    assert plan.weights + plan.scratch + plan.pool == fit.needs


@pytest.mark.parametrize("family", FAMILIES)
def test_so_many_sequences_are_served_together_and_no_more(of_family, monkeypatch, family):
    """By an engine that could run one more at once: the pool is the limit."""
    running = []
    schedule = Scheduler.schedule

    def watched(self):
        plan = schedule(self)
        running.append(len(self.running))
        return plan

    monkeypatch.setattr(Scheduler, "schedule", watched)
    length, blocks = 200, 40
    options = {"num_blocks": blocks, "max_num_seqs": 8, "prefix_cache": False}
    params = SamplingParams(max_tokens=length - 150, min_tokens=length - 150, temperature=0)
    with mlxpage.LLM(of_family(family), **options) as llm:
        most = fitting.sequences(llm.plan, length)
        assert 1 < most < 8
        for count, together in ((most, True), (most + 1, False)):
            before = llm.stats()["preemptions"]
            outputs = llm.generate([tiny.ids(f"{n}" * 150) for n in range(count)], params)
            assert {len(output.token_ids) for output in outputs} == {50}
            were_interrupted = llm.stats()["preemptions"] > before
            assert (max(running) == count and not were_interrupted) == together
            running.clear()


def test_a_larger_machine_never_holds_less_and_fewer_bits_never_do(tmp_path):
    folder = tiny.make(tmp_path / "m", hidden_size=128, max_position_embeddings=100_000)
    fits = list(fitting.fits(folder, memory="20%"))
    assert {fit.kv_bits for fit in fits} == {None, 8, 4}
    assert {fit.context for fit in fits} == {2048, 8192, 32_768, 100_000}
    names = [f"{size} GB Mac" for size in fitting.MACS]
    of = {(fit.machine, fit.kv_bits, fit.context): fit for fit in fits}
    for context in (2048, 8192, 32_768, 100_000):
        for bits in (None, 8, 4):
            held = [of[name, bits, context].most for name in names]
            assert held == sorted(held)
        for name in names:
            plain, eight, four = (of[name, bits, context] for bits in (None, 8, 4))
            assert plain.most <= eight.most <= four.most
            assert plain.needs > eight.needs > four.needs
    for fit in fits:
        assert (fit.most > 0) == (fit.needs <= fit.budget), fit


def test_a_mac_keeps_the_dtype_that_weights_are_stored_in(tmp_path):
    """A CPU takes float32."""
    folder = tiny.make(tmp_path / "half")
    from mlxpage.metal.backend import mx

    weights = mx.load(str(folder / "model.safetensors"))
    halves = {name: array.astype(mx.bfloat16) for name, array in weights.items()}
    mx.eval(halves)
    mx.save_safetensors(str(folder / "model.safetensors"), halves, {"format": "mlx"})
    stored = models.load(folder, weights=False, machine=fitting.mac(8))
    taken = models.load(folder, weights=False, machine=device())
    assert stored.nbytes * (2 if device().kind == "cpu" else 1) == taken.nbytes
    assert stored.specs[0].dtype == mx.bfloat16


def test_macs_that_cannot_give_the_budget_are_left_out(cli, tiny_folder):
    machines = {fit.machine for fit in fitting.fits(tiny_folder, memory="8GB")}
    assert "8 GB Mac" not in machines and "16 GB Mac" in machines


def test_show_fit_tells_people_that_it_is_arithmetic(cli, tmp_path):
    folder = tiny.make(tmp_path / "m", max_position_embeddings=100_000, hidden_size=128)
    ran = cli("show", folder, "--fit", "--memory", "80MB")
    assert (ran.code, ran.err) == (0, "")
    _, plain, eight, four, note = ran.out.split("\n\n")
    assert "not measured on a Mac" in note and "Arithmetic of the plan" in note
    for text, kept in ((plain, "as they are"), (eight, "in 8 bits"), (four, "in 4 bits")):
        title, header, *rows = lines(text)
        assert title == [f"sequences at once, with K and V {kept}"]
        lengths = [f"{n:,} tokens" for n in (2048, 8192, 32_768, 100_000)]
        assert header == ["MACHINE", "BUDGET", *lengths]
        assert [row[0] for row in rows[:-1]] == [f"{size} GB Mac" for size in fitting.MACS]
        assert all(row[1] == "80 MB" for row in rows)
        assert rows[0][2].isdecimal() and rows[0][-1].startswith("needs ")


def test_show_takes_the_bits_that_are_asked_for(cli, tmp_path):
    folder = tiny.make(tmp_path / "m", hidden_size=128)
    record = json.loads(cli("show", folder, "--fit", "--kv-bits", "8,4", "--json").out)
    assert record["schema"] == "mlxpage.show/1"
    assert {str(fit["kv_bits"]) for fit in record["fit"]} == {"[8, 4]"}


# -- completion --


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_gets_its_script(cli, shell):
    ran = cli("completion", shell)
    assert (ran.code, ran.err) == (0, "")
    assert "_MLXPAGE_COMPLETE" in ran.out and f"{shell}_complete" in ran.out
    if found := shutil.which(shell):
        assert subprocess.run([found, "-n"], input=ran.out, text=True).returncode == 0


@pytest.mark.parametrize(
    "words, found",
    [
        ("mlxpage comp", ["plain,completion"]),
        ("mlxpage generate o", ["dir,o", "plain,org/name"]),
        ("mlxpage show m", ["dir,m", "plain,mine"]),
        ("mlxpage rm smollm2-135m-", ["dir,smollm2-135m-", "plain,smollm2-135m-4bit"]),
        ("mlxpage config show --or", ["plain,--origin"]),
    ],
)
def test_commands_options_and_models_are_completed(cli, of_the_hub, monkeypatch, words, found):
    aliases.write({"mine": "org/x"})
    (aliases.file().parent / "config.toml").write_text("[")  # no reason to say anything here
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    monkeypatch.setenv("_MLXPAGE_COMPLETE", "bash_complete")
    written = []
    monkeypatch.setattr("click.shell_completion.echo", lambda text, **_: written.append(text))
    with pytest.raises(SystemExit) as end:
        group.main([], prog_name="mlxpage", standalone_mode=False)
    assert end.value.code == 0
    assert b"\n".join(written).decode().splitlines() == found
