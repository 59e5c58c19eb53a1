"""A talk on the command line, as lines of a pipe: `test_processes` has it on a terminal."""

import json
import os
import re
import stat
import sys

import click
import pytest
import trouble

from mlxpage.cli import chat
from mlxpage.cli import talk as talks

GREEDY = ("--temp", "0", "-n", "6")
LINE = re.compile(
    r"(\d+) tok(?:, cut short)?(?: · [\d.]+ tok/s)? · TTFT [\d,]+ ms"
    r" · prompt (\d+) \((\d+) cached\)"
)


@pytest.fixture
def talk(cli, tiny_folder, letters):
    """talk(*lines) -> the answers, and the rest of what was said"""

    def talked(*lines, options=GREEDY):
        ran = cli("chat", tiny_folder, *options, stdin="".join(f"{line}\n" for line in lines))
        assert ran.code == 0, ran.err
        return ran.out.splitlines(), ran.err.splitlines()[1:]

    return talked


@pytest.fixture
def saved(talk, tmp_path):
    """saved(*lines) -> the messages of the conversation that they make"""

    def messages(*lines, options=GREEDY):
        talk(*lines, f"/save {tmp_path / 'file'}", options=options)
        return json.loads((tmp_path / "file").read_text())["messages"]

    return messages


# -- turns --


def test_a_talk_remembers_its_turns_until_it_is_cleared(talk):
    (first,), said = talk("hello")
    assert len(first) == 6 and said == []
    replies, _ = talk("hello", "hello", "/clear", "hello")
    assert replies[0] == replies[2] == first
    assert replies[1] != first


@pytest.mark.parametrize("command", ["/exit", "/bye", "/quit"])
def test_a_talk_ends_with_a_command_or_with_its_input(talk, command):
    assert talk("hello", command, "hello") == talk("hello")
    assert talk() == talk(command) == ([], [])


def test_empty_lines_are_no_turns(talk):
    assert talk("", "hello", "   ", '""""""') == talk("hello")


def test_a_message_in_quotes_may_have_several_lines_or_look_like_a_command(saved):
    given = ['"""one', "", '  two"""', '"""', "/exit", '"""', '"""three"""']
    asked = [message["content"] for message in saved(*given) if message["role"] == "user"]
    assert asked == ["one\n\n  two", "/exit", "three"]


def test_a_turn_too_long_is_told_and_the_talk_goes_on(talk):
    replies, said = talk("hello", "x" * 600, "hello")
    assert replies == talk("hello", "hello")[0]
    assert len(said) == 1
    assert "has 649 tokens; the context of 512" in said[0] and "/clear" in said[0]


def test_a_talk_that_has_filled_the_context_can_be_cleared(talk):
    options = ("--temp", "0", "-n", "80")
    replies, said = talk("x" * 420, "and", "/clear", "hello", options=options)
    assert [len(reply) for reply in replies] == [512 - 439, 80]
    full, refused = said
    assert full.startswith("The context is full: ") and "/undo" in full
    assert "the context of 512" in refused and "/undo" in refused


def test_the_context_is_what_the_pool_can_hold(talk):
    replies, said = talk("x" * 80, "hello", options=("--temp", "0", "--num-blocks", "8"))
    assert len(replies[0]) == 128 - 99
    assert said[0].startswith("The context is full")
    assert "the context of 128" in said[1]


def test_a_failed_step_fails_one_turn(talk, monkeypatch):
    trouble.fail(monkeypatch, "mlxpage.engine.Engine._start", RuntimeError("no memory"), at=2)
    replies, said = talk("hello", "hello")
    assert said == ["Error: a step failed: RuntimeError: no memory"]
    assert len(replies) == 2 and len(replies[0]) < len(replies[1]) == 6


def test_ctrl_c_stops_an_answer_and_the_talk_goes_on(talk, tmp_path, monkeypatch):
    echo = click.echo
    written = []

    def interrupted(message=None, **options):
        echo(message, **options)
        written.append(message)
        if len(written) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(talks.click, "echo", interrupted)
    file = tmp_path / "file"
    replies, said = talk("hello", f"/save {file}", "hello", options=("--temp", "0", "-n", "300"))
    assert len(replies[0]) < len(replies[1]) == 300
    assert said == ["(stopped)", f"saved 1 turn to {file}"]
    assert json.loads(file.read_text())["messages"][1]["content"] == replies[0] != ""


def test_ctrl_c_at_the_prompt_asks_again(talk, monkeypatch):
    asked = iter([KeyboardInterrupt, "hello\n", ""])

    class Stdin:
        def isatty(self):
            return True

        def readline(self):
            line = next(asked)
            if line is KeyboardInterrupt:
                raise line
            return line

    ask = chat._ask

    def patched():
        monkeypatch.setattr(sys, "stdin", stdin)
        return ask()

    stdin = Stdin()
    monkeypatch.setattr(chat, "_ask", patched)
    replies, said = talk()
    assert len(replies) == 1
    assert said == ["> ", "> > "]


def test_chat_needs_a_template(cli, untemplated_folder):
    ran = cli("chat", untemplated_folder, stdin="hello\n")
    assert (ran.code, ran.out) == (2, "")
    assert "no chat template" in ran.error[-1]


def test_figures_come_after_an_answer_if_asked_for(talk):
    _, said = talk("hello", options=(*GREEDY, "--stats"))
    assert [LINE.fullmatch(line).groups() for line in said] == [("6", "22", "0")]


# -- commands --


def test_help_tells_of_every_command(talk):
    replies, said = talk("/help")
    assert replies == [] and talk("/?") == ([], said)
    for name in talks.COMMANDS:
        assert any(line.startswith(f"{name} ") for line in said), name
    assert any(talks.QUOTES in line for line in said)


@pytest.mark.parametrize(
    "line, hint",
    [
        ("/sytem hi", "Did you mean /system?"),
        ("/", "/help lists them."),
        ("/usr/bin is a folder", "/help lists them."),
    ],
)
def test_an_unknown_command_is_named_and_the_talk_goes_on(talk, line, hint):
    replies, said = talk(line, "hello")
    assert len(replies) == 1
    assert len(said) == 1 and said[0].startswith(f"Error: {line.split()[0]} is no command. {hint}")


def test_settings_are_changed_and_shown(talk):
    lines = ["/set max_tokens 3", "hello", "/set max_tokens none", "/set stop abc", "/set"]
    replies, said = talk(*lines)
    assert [len(reply) for reply in replies] == [3]
    assert said[:3] == ["max_tokens  3", "max_tokens  none", "stop  'abc'"]
    shown = dict(line.split(maxsplit=1) for line in said[3:])
    assert list(shown) == list(talks.SETTINGS)
    assert (shown["temperature"], shown["top_p"]) == ("0.0", "as the model has it")
    assert (shown["max_tokens"], shown["stop"]) == ("none", "'abc'")


def test_a_seed_that_is_set_makes_an_answer_reproducible(talk):
    lines = [
        "/set temperature 1",
        "/set seed 7",
        "hello",
        "/clear",
        "hello",
        "/set seed 8",
        "/retry",
    ]
    one, same, other = talk(*lines)[0]
    assert one == same != other


@pytest.mark.parametrize(
    "setting, told",
    [
        ("colour red", "colour can't be set; these can: temperature, top_p"),
        ("temperature", "write /set temperature VALUE, or none"),
        ("temperature hot", "temperature must be a number, not 'hot'"),
        ("temperature nan", "temperature must be a number, not nan"),
        ("top_p 2", "top_p is 2; it must be above 0 and at most 1"),
        ("top_k 1.5", "top_k must be an integer, not 1.5"),
        ("min_p -1", "min_p is -1"),
        ("repetition_penalty 0", "repetition_penalty is 0"),
        ("seed x", "seed must be an integer, not 'x'"),
        ("max_tokens 0", "max_tokens is 0"),
        (f"stop {'x' * 257}", "1 to 256 characters"),
    ],
)
def test_a_setting_that_makes_no_sense_is_told_and_nothing_changes(talk, setting, told):
    replies, said = talk(f"/set {setting}", "hello")
    assert replies == talk("hello")[0]
    assert len(said) == 1 and said[0].startswith("Error: ") and told in said[0]


def test_the_system_message_is_kept_when_the_talk_is_cleared(talk):
    replies, _ = talk("hello", "/clear", "hello", options=(*GREEDY, "-s", "Be brief."))
    assert replies[0] == replies[1] != talk("hello")[0][0]


def test_the_system_message_can_be_changed_and_taken_away(talk, saved):
    replies, said = talk("/system", "/system Be brief.", "hello", "/system none", "/retry")
    assert said == ["none", "Be brief.", "none"]
    assert replies[0] == talk("hello", options=(*GREEDY, "-s", "Be brief."))[0][0]
    assert replies[1] == talk("hello")[0][0]
    messages = saved("hello", "/system Be brief.")
    assert [message["role"] for message in messages] == ["system", "user", "assistant"]


def test_undo_is_as_if_the_turn_had_not_been(talk):
    replies, said = talk("hello", "something  else", "/undo", "hello")
    assert said == ["took back: something else"]
    assert [replies[0], replies[2]] == talk("hello", "hello")[0]


def test_retry_puts_another_answer_in_place_of_the_last(saved, talk):
    options = ("--temp", "1", "-n", "12")
    messages = saved("one", "two", "/retry", options=options)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    replies, _ = talk("hello", "/retry", options=options)
    assert replies[0] != replies[1]


@pytest.mark.parametrize("command", ["/undo", "/retry"])
def test_there_must_be_a_turn_to_take_back(talk, command):
    _, said = talk("hello", "/undo", command)
    assert said[1:] == ["Error: nothing was said yet; write a message first"]


def test_undo_and_retry_compute_no_full_block_of_the_prompt_again(talk):
    lines = ["x" * 60, "y" * 60, "/retry", "/undo", "z" * 60, "/undo", "y" * 60]
    _, said = talk(*lines, options=(*GREEDY, "--stats"))
    first, second, retried, _, other, _, again = (LINE.fullmatch(line) for line in said)
    prompts = [(int(found[2]), int(found[3])) for found in (first, second, retried, other, again)]
    assert [prompt for prompt, _ in prompts] == [79, 166, 166, 166, 166]
    # What is there already, in full blocks; the last token is always computed. All but the "z"s and
    # the assistant's header, of 13 tokens, is as it was.
    common = [0, 79 + 6, 165, 166 - 60 - 13, 165]
    for (_, cached), shared in zip(prompts, common, strict=True):
        assert cached >= shared // 16 * 16


def test_stats_tell_of_the_chat_the_context_and_the_memory(talk):
    _, said = talk("hello", "hello", "/stats")
    answers, context, pool, memory = said
    assert answers.startswith("answers   2, of 12 tokens; prompts of ")
    assert re.fullmatch(r"context   \d+/512 tok, \d+ % cached", context)
    assert " blocks of 16 tokens; " in pool and memory.startswith("memory    ")


# -- files --


def test_a_talk_goes_on_where_it_was_saved(talk, tmp_path):
    file = tmp_path / "a talk.json"
    options = (*GREEDY, "-s", "Be brief.")
    _, said = talk("hello", f"/save {file}", options=options)
    assert said == [f"saved 1 turn to {file}"]
    replies, said = talk(f"/load {file}", "more")
    assert said == ["loaded 1 turn, 60 tokens"]
    assert replies == talk("hello", "more", options=options)[0][1:]


def test_a_file_is_its_owners_alone_and_has_a_schema(talk, tiny_folder, tmp_path):
    file = tmp_path / "file"
    file.write_text("something older")
    talk("hé", f"/save {file}")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    record = json.loads(file.read_text())
    assert (record["schema"], record["model"]) == ("mlxpage.chat/1", str(tiny_folder))
    assert record["messages"][0] == {"role": "user", "content": "hé"}


def test_a_file_that_cannot_be_written_is_left_as_it_was(talk, tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("something older")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    _, said = talk("hello", f"/save {file}")
    assert said == [f"Error: can't write {file}: No space left on device"]
    assert file.read_text() == "something older"
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_is_found_in_the_home_folder(talk, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    talk("hello", "/save ~/file")
    assert (tmp_path / "file").exists()


USER = {"role": "user", "content": "a"}
ASSISTANT = {"role": "assistant", "content": "b"}
NO_FILES = {
    "no JSON": ("{", "is no JSON"),
    "very deep JSON": ("[" * 100_000, "is no JSON"),
    "no UTF-8": (b"\xff\xfe", "can't read"),
    "another schema": ({"schema": "other/1"}, "has the schema 'other/1'; /save writes"),
    "a list": ([], "has the schema None"),
    "no messages": ({"messages": None}, "has no list of messages"),
    "no answer": ({"messages": [USER]}, "come a user's and the assistant's in turn"),
    "two questions": ({"messages": [USER, USER]}, "come a user's"),
    "a late system message": (
        {"messages": [USER, ASSISTANT, {"role": "system", "content": "c"}, ASSISTANT]},
        "come a user's",
    ),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, "come a user's"),
    "half a character": ({"messages": [USER, ASSISTANT | {"content": "\ud800"}]}, "half a"),
}


@pytest.mark.parametrize("name", NO_FILES)
def test_what_is_no_talk_is_refused_and_nothing_changes(talk, tmp_path, name):
    content, told = NO_FILES[name]
    if isinstance(content, dict):
        content = {"schema": "mlxpage.chat/1", **content}
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    (tmp_path / "file").write_bytes(content if isinstance(content, bytes) else content.encode())
    replies, said = talk("hello", f"/load {tmp_path / 'file'}", "hello")
    assert replies == talk("hello", "hello")[0]
    assert len(said) == 1 and said[0].startswith("Error: ") and told in said[0]


@pytest.mark.parametrize("action, verb", [("load", "read"), ("save", "write")])
def test_a_file_that_is_not_there_is_told(talk, tmp_path, action, verb):
    _, said = talk(f"/{action}", f"/{action} /no/such/file", f"/{action} {tmp_path}")
    assert said[0] == f"Error: no file is named to {verb}; write its name behind the command"
    assert said[1] == f"Error: can't {verb} /no/such/file: No such file or directory"
    assert said[2] == f"Error: can't {verb} {tmp_path}: Is a directory"


def test_a_file_without_end_is_not_read_to_it(talk):
    _, said = talk("/load /dev/zero")
    assert said == ["Error: /dev/zero is longer than 67,108,864 characters"]
