"""What the README and the docs show is what happens."""

import json
import re
from pathlib import Path

import pytest
from command_tree import commands

import mlxpage
from mlxpage.cli import main as command_line
from mlxpage.cli.measuring import FELL_BELOW

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = [f"mlxpage {name}".strip() for name in commands()]


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language in all pages."""
    fence = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [block for page in PAGES for block in fence.findall(page.read_text(encoding="utf-8"))]


def shown_help() -> dict[str, str]:
    """Command -> what the pages show after `$ mlxpage ... --help`."""
    shown = {}
    for block in blocks("console"):
        for command, output in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n?)*)", block, re.MULTILINE):
            if command.startswith("mlxpage") and command.endswith(" --help"):
                shown[command.removesuffix(" --help")] = output.rstrip() + "\n"
    return shown


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_is_shown_as_it_is(cli, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "100")
    real = cli(*command.split()[1:], "--help").out
    assert shown_help().get(command) == real, (
        f"show this:\n```console\n$ {command} --help\n{real}```"
    )


def test_no_page_shows_a_command_that_is_not_there():
    assert set(shown_help()) <= set(COMMANDS)
    for page in PAGES:
        for name in re.findall(r"^(?:\$ |    )mlxpage ([a-z]\w*)", page.read_text(), re.MULTILINE):
            assert name in command_line.COMMANDS, f"{page.name}: mlxpage {name}"


def test_the_python_of_the_readme_runs(smollm2_folder, capsys):
    code = blocks("python")
    assert code
    for block in code:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.strip()


def test_every_key_of_the_json_is_explained(cli, make_llm, tiny_folder):
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)

    def explained(value) -> None:
        for key, inner in value.items():
            assert f"`{key}`" in text or key in record.get("versions", {}), key
            inner = inner[0] if isinstance(inner, list) else inner
            if isinstance(inner, dict):
                explained(inner)

    for command in (
        ["generate", tiny_folder, "hello", "-n", "2"],
        ["info"],
        ["show", tiny_folder, "--fit"],
        ["ls"],
        ["alias", "ls"],
        ["config", "show"],
        ["doctor"],
    ):
        record = json.loads(cli(*command, "--json").out)
        explained(record)
    asked = '{"id": 1, "prompt": "a", "max_tokens": 1, "n": 2, "logprobs": 1, "metadata": 1}\n{'
    for line in cli("batch", tiny_folder, "-", stdin=asked).out.splitlines():
        record = json.loads(line)
        explained(record)
    llm = make_llm(monitor=True, max_num_seqs=1)
    stream = llm.stream_many(["hello"] * 50, mlxpage.SamplingParams(ignore_eos=True))
    next(stream)
    record = json.loads(cli("top", "--once", "--json").out)
    stream.close()
    assert record["sequences"]
    explained(record)
    for line in cli("generate", tiny_folder, "hello", "-n", "2", "--jsonl").out.splitlines():
        record = json.loads(line)
        explained(record)
        assert f"| `{record['type']}` |" in text


def test_every_exit_code_is_explained():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    codes = {command_line.INTERRUPTED, command_line.BROKEN_PIPE, FELL_BELOW}
    for name in mlxpage.__all__:
        codes.add(getattr(getattr(mlxpage, name), "exit_code", 0))
    for code in codes:
        assert re.search(rf"^\| {code} \| \w", text, re.MULTILINE), code
