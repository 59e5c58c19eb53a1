"""Settings beside the command line: which one holds, and what is said of one that is wrong."""

import json
import re
from pathlib import Path

import click
import pytest
from command_tree import commands

import mlxpage
from mlxpage.cli import settings
from mlxpage.cli.main import cli as group
from mlxpage.cli.settings import Setting

DOCS = Path(__file__).parents[2] / "docs" / "cli.md"


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """The current folder; the user's is beside it."""
    for setting in settings.settings_of(group).values():
        monkeypatch.delenv(setting.envvar, raising=False)
    monkeypatch.setenv("MLXPAGE_CONFIG", str(tmp_path / "user"))
    (tmp_path / "project").mkdir()
    (tmp_path / "user").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project" / "mlxpage.toml"


@pytest.fixture
def user(tmp_path):
    return tmp_path / "user" / "config.toml"


@pytest.fixture
def holding(cli):
    """holding(command) -> key -> (value, origin), as `config show` tells them."""

    def held(command):
        ran = cli("config", "show", "--json")
        assert (ran.code, ran.err) == (0, ""), ran.err
        found = json.loads(ran.out)["settings"]
        return {s["key"]: (s["value"], s["origin"]) for s in found if s["command"] == command}

    return held


# -- which one holds --


def test_the_command_line_comes_before_the_environment_the_project_and_the_user(
    cli, tiny_folder, project, user, monkeypatch, holding
):
    seen = []
    make = mlxpage.SamplingParams
    spy = lambda **given: seen.append(given["max_tokens"]) or make(**given)  # noqa: E731
    monkeypatch.setattr(mlxpage, "SamplingParams", spy, raising=False)

    def tokens(*options):
        assert cli("generate", tiny_folder, "a", *options).code == 0
        return seen[-1]

    user.write_text("max-tokens = 2\nquiet = true\n")
    assert tokens() == 2
    assert holding("generate")["max-tokens"] == (2, str(user))
    project.write_text("max-tokens = 3\n")
    assert tokens() == 3
    assert holding("generate")["max-tokens"] == (3, str(project))
    monkeypatch.setenv("MLXPAGE_MAX_TOKENS", "4")
    assert tokens() == 4
    assert holding("generate")["max-tokens"] == (4, "MLXPAGE_MAX_TOKENS")
    assert tokens("-n", "5") == 5
    monkeypatch.setenv("MLXPAGE_MAX_TOKENS", "")
    assert tokens() == 3


def test_a_table_comes_before_the_top_of_its_file_and_not_before_another_file(
    project, user, holding
):
    user.write_text("seed = 1\n[generate]\nseed = 2\n[chat]\ntop-k = 3\n")
    assert holding("generate")["seed"] == (2, str(user))
    assert holding("chat")["seed"] == (1, str(user))
    assert holding("chat")["top-k"] == (3, str(user))
    assert holding("generate")["top-k"] == (None, "default")
    project.write_text("seed = 5\n")
    assert holding("generate")["seed"] == (5, str(project))


def test_without_files_and_variables_the_defaults_hold(holding):
    assert holding("generate")["max-tokens"] == (256, "default")
    assert holding("chat")["max-tokens"] == (None, "default")
    assert {origin for _, origin in holding("generate").values()} == {"default"}


def test_values_are_read_as_on_the_command_line(project, holding):
    project.write_text(
        'memory = 4000000000\nkv-bits = "8,none"\ntemperature = 1\nsystem = "a\\nb"\n'
        '[generate]\nquiet = true\nstop = ["x y", "z"]\n[chat]\nstop = "one"\n'
    )
    held = {key: value for key, (value, _) in holding("generate").items()}
    assert (held["memory"], held["kv-bits"]) == ("4000000000", [8, None])
    assert (held["temperature"], held["system"], held["quiet"]) == (1.0, "a\nb", True)
    assert held["stop"] == ["x y", "z"]
    assert holding("chat")["stop"][0] == ["one"]


def test_a_variable_is_one_value(monkeypatch, holding):
    monkeypatch.setenv("MLXPAGE_STOP", "two words")
    monkeypatch.setenv("MLXPAGE_QUIET", "no")
    assert holding("generate")["stop"] == (["two words"], "MLXPAGE_STOP")
    assert holding("generate")["quiet"] == (False, "MLXPAGE_QUIET")


def test_a_group_has_tables_in_its_table():
    """As a benchmark with several commands would."""
    seen = []

    @click.group()
    def root():
        pass

    @root.group()
    def bench():
        pass

    @bench.command()
    @settings.setting("--seed", type=int)
    def one(seed):
        seen.append(seed)

    text = ""
    for line in ("seed = 1", "[bench]\nseed = 2", "[bench.one]\nseed = 3"):
        text += f"{line}\n"
        Path("mlxpage.toml").write_text(text)
        root.main(["bench", "one"], standalone_mode=False)
    assert seen == [1, 2, 3]


# -- what is wrong --

WRONG = [
    ("max-tokens = 'many'", "max-tokens is 'many' in {file}. 'many' is not a valid integer. Corr"),
    ("max-tokens = 1.5", "max-tokens is 1.5 in {file}. '1.5' is not a valid integer"),
    ("max-tokens = true", "max-tokens is True in {file}. 'true' is not a valid integer"),
    (
        "max-tokens = [1]",
        "It takes one value, and this is a list. Correct it there, or give --",
    ),
    ("max-tokens = 0", "max_tokens is 0"),
    ("memory = 'lots'", "memory is 'lots'; write it like '4GB'"),
    ("dtype = 1979-05-27", "dtype is '1979-05-27'"),
    ("kv-bits = [8, 4]", "It takes one value"),
    ("[generate]\nquiet = 'yes'", "quiet is 'yes' in {file}. It must be true or false."),
    ("max_tokens = 1", "{file}: there is no setting 'max_tokens'. Did you mean max-tokens?"),
    ("temp = 0", "there is no setting 'temp'. Did you mean temperature?"),
    ("yes = true", "there is no setting 'yes'; there are adapter-path, backend, "),
    ("[chat]\nmax-num-seqs = 1", "{file}, in [chat]: there is no setting 'max-num-seqs'"),
    ("[generat]\nseed = 1", "{file}: there is no table 'generat'. Did you mean generate?"),
    ("[rm]\nyes = true", "{file}: there is no table 'rm'; there are batch, "),
    ("[generate.x]\nseed = 1", "{file}, in [generate]: there is no table 'x'"),
    ("seed = ", "{file} is no valid TOML: "),
    ("a = " + "[" * 5000, "{file} is no valid TOML: "),
]


@pytest.mark.parametrize("text, told", WRONG, ids=[text[:30] for text, _ in WRONG])
@pytest.mark.parametrize("place", ["project", "user"])
def test_what_is_wrong_in_a_file_is_told_with_the_way_out(
    cli, tiny_folder, project, user, place, text, told
):
    file = project if place == "project" else user
    file.write_text(text)
    ran = cli("generate", tiny_folder, "hello")
    assert (ran.code, ran.out) == (2, "")
    assert told.format(file=file) in ran.err and str(file) in ran.err
    assert "Traceback" not in ran.err and len(ran.error) <= 2


@pytest.mark.parametrize("key", ["cache-dir", "adapter-path"])
@pytest.mark.parametrize("table", ["", "[generate]\n"])
def test_a_project_does_not_say_what_is_loaded_or_where_to_write(
    cli, tiny_folder, project, user, tmp_path, key, table
):
    project.write_text(f"{table}{key} = '{tmp_path / 'theirs'}'\n")
    ran = cli("generate", tiny_folder, "hello")
    assert (ran.code, ran.out) == (2, "")
    assert f"{key} isn't taken from a project's file" in ran.err and str(user) in ran.err
    assert not (tmp_path / "theirs").exists()
    project.unlink()
    user.write_text("cache-dir = '{}'\n".format(tmp_path / "mine"))
    assert cli("generate", tiny_folder, "hello", "-n", "1").code == 0
    assert (tmp_path / "mine").exists()


def test_what_is_wrong_in_a_variable_names_it(cli, tiny_folder, monkeypatch):
    def error(name, value):
        monkeypatch.setenv(name, value)
        ran = cli("generate", tiny_folder, "hello")
        monkeypatch.delenv(name)
        assert ran.out == ""
        return ran.code, "\n".join(ran.error)

    code, told = error("MLXPAGE_TOP_P", "most")
    assert code == 2
    assert "top-p is 'most' in MLXPAGE_TOP_P" in told and "or give --top-p" in told
    code, told = error("MLXPAGE_QUIET", "perhaps")
    assert code == 2 and "quiet is 'perhaps' in MLXPAGE_QUIET" in told
    code, told = error("MLXPAGE_MEMORY", "lots")
    assert code == 2 and told.endswith("\nmemory is 'lots' in MLXPAGE_MEMORY.")
    code, told = error("MLXPAGE_MEMORY", "1KB")
    assert code == 5 and told.endswith("\nmemory is '1KB' in MLXPAGE_MEMORY.")
    code, told = error("MLXPAGE_BACKEND", "gpu")
    assert code == 2 and told.endswith("\nbackend is 'gpu' in MLXPAGE_BACKEND.")


def test_an_error_of_the_command_line_names_no_other_place(cli, tiny_folder, monkeypatch):
    monkeypatch.setenv("MLXPAGE_MEMORY", "1KB")
    told = cli("generate", tiny_folder, "hello", "-q", "--memory", "lots").error
    assert len(told) == 1 and "MLXPAGE" not in told[0]


@pytest.mark.parametrize("fault", ["a folder", "no text", "too large"])
def test_a_file_that_cannot_be_read_is_told(cli, tiny_folder, project, fault):
    if fault == "a folder":
        project.mkdir()
    else:
        project.write_bytes(b"\xff" if fault == "no text" else b"#" * (1 << 21))
    ran = cli("generate", tiny_folder, "hello", "-q")
    assert ran.code == 2 and str(project) in ran.error[0] and len(ran.error) == 1


def test_a_broken_file_breaks_no_command_without_settings(cli, tiny_folder, project):
    project.write_text("[")
    assert cli("generate", "--help").code == cli("ls").code == cli("config", "path").code == 0
    assert cli("config", "show").code == 2


def test_config_show_names_a_value_that_no_command_could_take(cli, project):
    project.write_text("[chat]\nseed = 'x'\n")
    ran = cli("config", "show")
    assert ran.code == 2 and f"seed is 'x' in {project}" in ran.error[0]


# -- what is told of them --


def test_config_show_tells_people_what_holds_for_which_commands(cli, project, user, monkeypatch):
    user.write_text("memory = '4GB'\n[generate]\nstop = ['a', 'b']\n")
    monkeypatch.setenv("MLXPAGE_SEED", "7")
    ran = cli("config", "show", "--origin")
    assert (ran.code, ran.err) == (0, "")
    rows = [re.split(r"  +", line) for line in ran.out.splitlines()]
    assert rows[0] == ["SETTING", "VALUE", "ORIGIN", "COMMANDS"]
    commands = {tuple(row[:3]): set(row[3].split(", ")) for row in rows}
    assert {"chat", "generate", "show"} < commands["memory", "4GB", str(user)]
    assert commands["stop", "a,b", str(user)] == {"generate"}
    assert commands["stop", "none", "default"] == {"batch", "chat"}
    assert commands["seed", "7", "MLXPAGE_SEED"] == {"batch", "chat", "generate"}
    assert {"generate", "pull"} < commands["quiet", "false", "default"]
    plain = cli("config", "show").out
    assert str(user) not in plain and "memory " in plain


def test_config_path_is_where_the_file_of_the_user_is(cli, user, monkeypatch):
    assert cli("config", "path").out == f"{user}\n"
    monkeypatch.delenv("MLXPAGE_CONFIG")
    import platformdirs

    assert cli("config", "path").out.startswith(platformdirs.user_config_dir("mlxpage"))


def test_the_page_has_all_settings_in_one_table():
    known = settings.settings_of(group).values()
    rows = sorted(f"| `{each.envvar}` | `{each.key}` |" for each in known)
    table = "\n".join(["| variable | key |", "|---|---|", *rows])
    assert table in DOCS.read_text(), f"show this:\n{table}"


def test_only_what_concerns_a_model_and_its_answers_is_a_setting():
    """What a command removes, overwrites or prints is never set from a file of somebody else."""
    plain = {"--json", "--yes", "--dir", "--origin", "--fit", "--help", "--version"}
    for command in commands().values():
        for parameter in command.params:
            if isinstance(parameter, click.Option) and plain & {*parameter.opts}:
                assert not isinstance(parameter, Setting), parameter.opts
