"""`mlxpage batch`: lines of JSON in, an answer for each out, whatever comes between."""

import io
import json
import os
import subprocess
import sys
import time

import pytest
import test_processes as processes

from mlxpage.cli import batch, batch_lines

start = processes.start  # a process of the command line, ended with the test
GREEDY = ("--temp", "0", "-n", "6", "-q")


def lines_of(*requests) -> str:
    return "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in requests)


@pytest.fixture
def ask(cli, tiny_folder):
    """ask(*requests, options) -> the answers by line, in their order"""

    def asked(*requests, options=(), code=0) -> dict[int, dict]:
        ran = cli("batch", tiny_folder, "-", *GREEDY, *options, stdin=lines_of(*requests))
        assert (ran.code, ran.err) == (code, "")
        return by_line(ran.out)

    return asked


def by_line(text: str) -> dict[int, dict]:
    answers = [json.loads(line) for line in text.splitlines()]
    found = {answer["line"]: answer for answer in answers}
    assert len(found) == len(answers)
    return found


def numbered(count: int) -> list[dict]:
    return [{"id": f"number {n}", "prompt": f"the {n}th"} for n in range(1, count + 1)]


# -- requests --


def test_every_line_gets_the_answer_that_it_gets_alone(cli, ask, tiny_folder):
    prompts = ["hello", "once upon a time", "the"]
    answers = ask(*({"prompt": prompt} for prompt in prompts))
    for number, prompt in enumerate(prompts, 1):
        ran = cli("generate", tiny_folder, prompt, *GREEDY, "--json")
        (alone,) = json.loads(ran.out)["outputs"]
        assert set(answers[number]) == {"line", "digest", *alone} - {"prompt"}
        for key in ("text", "finish_reason", "usage"):
            assert answers[number][key] == alone[key]


def test_a_line_may_have_an_id_and_data_that_come_back_and_options_of_its_own(ask):
    asked = {"id": 7, "metadata": {"from": "me"}, "prompt": "abc", "max_tokens": 9, "n": 2}
    answers = ask(
        asked, {"id": "b", "prompt": "abc", "params": {"max_tokens": 2}}, {"prompt": "abc"}
    )
    first, second, third = (answers[number] for number in (1, 2, 3))
    assert (first["id"], first["metadata"]) == (7, {"from": "me"})
    assert second["id"] == "b" and "metadata" not in second and "id" not in third
    assert [a["usage"]["completion_tokens"] for a in (first, second, third)] == [9, 2, 6]
    assert [choice["text"] for choice in first["choices"]] == [first["text"]]  # they are greedy


def test_blank_lines_are_counted_and_left_out_and_a_mark_at_the_beginning_is_none(ask):
    answers = ask("\ufeff" + json.dumps({"prompt": "a"}), "", "  ", {"prompt": "b"})
    assert set(answers) == {1, 4}


def test_lines_of_openais_batch_files_are_answered(ask):
    messages = [{"role": "user", "content": "abc"}]
    body = {"model": "gpt", "messages": messages, "max_completion_tokens": 3, "stop": None}
    chat = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
    raw = {"custom_id": "two", "body": {"model": "gpt", "prompt": "abc", "max_tokens": 3}}
    answers = ask(chat, raw, {"prompt": "abc", "max_tokens": 3})
    assert [answers[n].get("id") for n in (1, 2)] == ["one", "two"]
    assert answers[1]["text"] == answers[3]["text"]
    assert [answers[n]["usage"]["prompt_tokens"] for n in (1, 2)] == [22, 3]


def test_prompts_may_be_conversations_and_token_ids_and_continued_as_they_are(ask):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "abc"}]
    answers = ask({"messages": talk}, {"prompt": [70, 71]}, {"prompt": "abc"})
    assert [answers[n]["usage"]["prompt_tokens"] for n in (1, 2, 3)] == [22 + 19, 2, 22]
    assert ask({"prompt": "abc"}, options=["--raw"])[1]["usage"]["prompt_tokens"] == 3
    system = ask({"prompt": "abc"}, options=["-s", "Be brief."])[1]
    assert system["usage"] | {"cached_tokens": 0} == answers[1]["usage"] | {"cached_tokens": 0}


def test_log_probabilities_come_if_they_are_asked_for(ask):
    asked = {"prompt": "abc", "logprobs": 2, "prompt_logprobs": 0, "logit_bias": {"70": 100}}
    answers = ask(asked, {"prompt": "abc"})
    assert len(answers[1]["logprobs"]) == 6 and answers[1]["logprobs"][0]["token_id"] == 70
    assert len(answers[1]["logprobs"][0]["top"]) == 2
    assert answers[1]["prompt_logprobs"][0] is None
    assert "logprobs" not in answers[2]


BAD_LINES = {
    "{": "no JSON",
    '{"prompt": "a", "seed": NaN}': "NaN is no number",
    '["prompt"]': "a line is an object",
    "{}": "either a prompt or messages",
    '{"prompt": "a", "messages": []}': "either a prompt or messages",
    '{"messages": []}': "list of messages",
    '{"messages": [{"content": "a"}]}': "no message",
    '{"prompt": ""}': "the prompt is empty",
    '{"prompt": 5}': "list of token ids",
    '{"prompt": [-1]}': "-1",
    '{"prompt": "a\\ud800"}': "half a character",
    '{"prompt": "a", "id": [1]}': "id is [1]",
    '{"prompt": "a", "params": 5}': "params is 5",
    '{"prompt": "a", "temprature": 1}': "no option of a request; temperature is",
    '{"prompt": "a", "params": {"prompt": "b"}}': "no option",
    '{"prompt": "a", "max_tokens": "many"}': "max_tokens must be an integer",
    '{"prompt": "a", "temperature": -1}': "temperature is -1",
    '{"prompt": "a", "logit_bias": {"x": 1}}': "token ids",
    '{"prompt": "' + "long " * 600 + '"}': "context of 512",
    '{"body": 5}': "body is 5",
    '{"body": {"prompt": "a"}, "url": "/v1/embeddings"}': "/v1/embeddings",
    '{"body": {"prompt": "a", "stream": true}}': "stream",
    '{"body": {"prompt": "a", "response_format": {}}}': "response_format",
    "[" * 200_000: "nested",
    '{"seed": ' + "9" * 5000 + "}": "no JSON",
}


def test_a_bad_line_gets_an_error_and_the_others_their_answers(ask):
    good = {"prompt": "hello"}
    answers = ask(good, *BAD_LINES, good, code=batch.FAILED)
    for number, told in enumerate(BAD_LINES.values(), 2):
        assert set(answers[number]) >= {"line", "digest", "error"}
        assert answers[number]["error"]["type"] == "InvalidRequest"
        assert told in answers[number]["error"]["message"], number
    assert answers[1]["text"] == answers[len(BAD_LINES) + 2]["text"]


def test_the_id_of_a_bad_line_is_told(ask):
    answers = ask({"id": "me", "prompt": "", "metadata": 1}, {"id": 5, "odd": 1}, code=1)
    assert [answers[n]["id"] for n in (1, 2)] == ["me", 5]


def test_a_line_that_is_no_utf_8_and_one_too_long_are_bad_lines(cli, tiny_folder, monkeypatch):
    monkeypatch.setattr(batch_lines, "MOST_BYTES", 2**20)
    stdin = b'{"prompt": "\xff"}\n{"prompt": "' + b"x" * 3 * 2**20 + b'"}\n{"prompt": "a"}'
    ran = cli("batch", tiny_folder, "-", *GREEDY, stdin=stdin)
    answers = by_line(ran.out)
    assert "byte 0xff at 12" in answers[1]["error"]["message"]
    assert "longer than 1 MiB" in answers[2]["error"]["message"]
    assert answers[3]["finish_reason"]


def test_a_step_that_fails_ends_its_own_requests_alone(ask, monkeypatch):
    from mlxpage.engine import Engine

    compute, steps = Engine._start, iter(range(10**6))

    def flaky(self, batch):
        if next(steps) == 2:
            raise RuntimeError("no memory")
        return compute(self, batch)

    monkeypatch.setattr(Engine, "_start", flaky)
    answers = ask(*numbered(3), options=["--max-num-seqs", "1"], code=1)
    failed = [answer for answer in answers.values() if "error" in answer]
    assert [answer["error"]["type"] for answer in failed] == ["EngineError"]
    assert len(answers) == 3


# -- order, and what answers depend on --


def test_answers_come_as_they_end_or_in_order(ask):
    requests = [{"prompt": f"{n}", "max_tokens": 40 if n % 4 == 0 else 2} for n in range(12)]
    options = ["--max-num-seqs", "4"]
    assert list(ask(*requests, options=options)) != list(range(1, 13))
    ordered = ask("{", *requests, options=[*options, "--ordered"], code=1)
    assert list(ordered) == list(range(1, 14))


def test_with_a_seed_an_answer_depends_on_its_line_alone(ask):
    requests = numbered(6)
    hot = ["--temp", "1", "--seed", "3"]
    answers = ask(*requests, options=hot)
    assert len({answer["text"] for answer in answers.values()}) == 6
    few = ask(*([""] * 4), *requests[4:], options=[*hot, "--max-num-seqs", "1"])
    assert [few[n]["text"] for n in (5, 6)] == [answers[n]["text"] for n in (5, 6)]
    same = ask(requests[0] | {"seed": 1}, requests[0] | {"seed": 1}, options=hot)
    assert same[1]["text"] == same[2]["text"]
    assert ask(*requests, options=["--temp", "1", "--seed", "4"])[1]["text"] != answers[1]["text"]


@pytest.mark.parametrize("ordered", [[], ["--ordered"]], ids=["as they end", "in order"])
def test_no_more_is_read_than_there_is_room_for(cli, tiny_folder, monkeypatch, ordered):
    room, read, written, ahead = 3, [], [], []

    class Source(io.BytesIO):
        def readline(self, *size):
            read.append(1)
            ahead.append(len(read) - len(written))
            return super().readline(*size)

    write = batch._Stdout.write
    monkeypatch.setattr(batch, "_stdin", lambda: Source(lines_of(*numbered(20)).encode()))
    monkeypatch.setattr(
        batch._Stdout, "write", lambda self, line: written.append(write(self, line))
    )
    ran = cli("batch", tiny_folder, "-", *GREEDY, "--max-queued", room, *ordered)
    assert ran.code == 0 and len(by_line(ran.out)) == 20
    # Beside what there is room for: the line that waits for room. Room is given when it's written.
    assert max(ahead) <= room + 1


def test_who_waits_for_an_answer_before_asking_again_gets_it(start, tiny_folder):
    process = start("batch", tiny_folder, "-", *GREEDY, stdin=subprocess.PIPE).process
    for number in (1, 2):
        process.stdin.write(b'{"prompt": "hello"}\n')
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["line"] == number
    process.stdin.close()
    assert process.wait(processes.SECONDS) == 0


# -- a file of answers --


@pytest.fixture
def files(cli, tiny_folder, tmp_path):
    """files(*options, requests=None) runs IN to OUT; `requests` are written to IN before."""
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"

    def run(*options, requests=None):
        if requests is not None:
            source.write_text(lines_of(*requests))
        return cli("batch", tiny_folder, source, "-o", target, "--temp", "0", "-n", "4", *options)

    run.source, run.target = source, target
    return run


def test_a_run_is_taken_up_where_it_was_interrupted(files):
    requests = numbered(8)
    assert files("-q", requests=requests).code == 0
    whole = files.target.read_text().splitlines(keepends=True)
    expected = by_line("".join(whole))
    files.target.write_text("".join(whole[:3]) + whole[3][:20])  # the fourth is half-written
    ran = files("--resume")
    assert ran.code == 0 and "5 answers, 3 there already; " in ran.err
    text = files.target.read_text()
    assert text.startswith("".join(whole[:3]))
    resumed = by_line(text)
    assert {n: a["text"] for n, a in resumed.items()} == {n: a["text"] for n, a in expected.items()}
    ran = files("--resume")
    assert (ran.code, files.target.read_text()) == (0, text)
    assert ran.err == f"all 8 lines are answered in {files.target} already\n"


def test_a_line_that_failed_is_asked_again_and_may_have_been_mended(files):
    broken = [*numbered(2), {"prompt": ""}, "{"]
    ran = files(requests=broken)
    assert ran.code == 1 and "2 answers and 2 errors (lines 3, 4); " in ran.err
    os.chmod(files.target, 0o640)
    mended = [*broken[:2], {"prompt": "mended"}, "{"]
    ran = files("--resume", requests=mended)
    assert ran.code == 1 and "1 answer and 1 error (line 4), 2 there already; " in ran.err
    answers = by_line(files.target.read_text())
    assert set(answers) == {1, 2, 3, 4} and answers[3]["finish_reason"]
    assert files.target.stat().st_mode & 0o777 == 0o640
    assert [file.name for file in files.target.parent.iterdir()] == ["in.jsonl", "out.jsonl"]


def test_answers_are_never_written_over(files):
    files("-q", requests=numbered(2))
    before = files.target.read_bytes()
    ran = files()
    assert ran.code == 2 and "has 2 lines already" in ran.err
    assert "--resume" in ran.err and "another file" in ran.err
    assert files.target.read_bytes() == before


@pytest.mark.parametrize(
    "change", [{"requests": [{"prompt": "other"}, *numbered(3)[1:]]}, {"options": ["-n", "5"]}]
)
def test_a_run_of_other_lines_or_options_is_not_taken_up(files, change):
    files("-q", requests=numbered(2))
    before = files.target.read_bytes()
    ran = files("--resume", *change.get("options", []), requests=change.get("requests"))
    assert ran.code == 2 and "line 1 is not what was answered before" in ran.err
    assert files.target.read_bytes() == before


def test_a_file_of_something_else_is_left_alone(files):
    files.target.write_text('{"line": 1}\nmine')
    ran = files("--resume", requests=numbered(2))
    assert ran.code == 2 and "line 1 of" in ran.err and "no answer" in ran.err
    assert files.target.read_text() == '{"line": 1}\nmine'


def test_two_processes_never_write_to_one_file(files):
    files("-q", requests=numbered(2))
    held = batch_lines.AnswerFile(files.target, resume=True)
    ran = files("--resume")
    held.close()
    assert ran.code == 2 and "another process is writing" in ran.err
    assert files("--resume").code == 0


def test_files_that_cannot_be_read_or_written_are_told(cli, tiny_folder, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(lines_of(*numbered(2)))
    empty = tmp_path / "empty"
    empty.write_text("\n \n")
    cases = [
        ([tmp_path / "none"], 2, "No such file"),
        ([tmp_path], 2, "Is a directory"),
        ([empty], 2, "no line with a request"),
        ([source, "-o", source], 2, "is IN and OUT"),
        ([source, "-o", tmp_path], 2, "Is a directory"),
        ([source, "-o", tmp_path / "none" / "out"], 2, "No such file"),
        ([source, "--resume"], 2, "-o OUT"),
        ([source, "--max-queued", "0"], 2, "at least 1"),
        ([source, "--raw", "-s", "Be brief."], 2, "--system"),
    ]
    if os.path.exists("/dev/full"):
        cases += [([source, "-o", "/dev/full"], 1, "No space left on device")]
    for arguments, code, told in cases:
        ran = cli("batch", tiny_folder, *arguments, "-q", *GREEDY)
        assert (ran.code, ran.out) == (code, ""), arguments
        assert told in ran.err and len(ran.error) == 1, arguments


def test_nothing_is_loaded_for_what_is_answered_already(files, monkeypatch):
    files("-q", requests=numbered(2))
    monkeypatch.setattr(batch, "loaded", None)
    assert files("--resume").code == 0


def test_ctrl_c_tells_how_to_go_on_and_a_kill_loses_nothing(start, files, tiny_folder):
    files.source.write_text(lines_of(*numbered(40)))
    command = ["batch", tiny_folder, files.source, "-o", files.target, "--temp", "0", "-n", "4"]
    patch = processes.SLOW_STEPS.replace("SECONDS", "0.1")
    few = ["--max-num-seqs", "4"]

    def once_answers_come(more: int, *options):
        before = files.target.stat().st_size if files.target.exists() else 0
        process = start(*command, *few, *options, patch=patch)
        while not (files.target.exists() and files.target.stat().st_size > before + more):
            assert process.process.poll() is None
            time.sleep(0.05)
        return process

    code, out, err = once_answers_come(500).interrupt().end()
    assert (code, out) == (130, "") and "Traceback" not in err
    assert f"to {files.target}; the same command with --resume" in err.replace("\n", " ")
    killed = once_answers_come(500, "--resume").process
    killed.kill()
    killed.wait()
    assert files("--resume", "-q").code == 0
    assert set(by_line(files.target.read_text())) == set(range(1, 41))


def test_a_reader_that_has_enough_ends_it_quietly(start, tiny_folder):
    patch = processes.SLOW_STEPS.replace("SECONDS", "0.01")
    process = start("batch", tiny_folder, "-", *GREEDY, patch=patch, stdin=subprocess.PIPE)
    process.process.stdin.write(lines_of(*numbered(300)).encode())
    process.process.stdin.flush()  # and is left open: who reads it still waits
    assert process.process.stdout.readline()
    process.process.stdout.close()
    process.process.stdout = None
    assert process.process.wait(processes.SECONDS) == 141
    assert process.process.stderr.read() == b""


# -- what people see --


def test_a_terminal_shows_how_far_it_is(start, files, tiny_folder):
    files.source.write_text(lines_of(*numbered(12)))
    main, side = os.openpty()
    command = ["batch", tiny_folder, files.source, "-o", files.target, *GREEDY[:4]]
    patch = processes.SLOW_STEPS.replace("SECONDS", "0.1")
    process = start(*command, "--max-num-seqs", "4", patch=patch, stderr=side)
    os.close(side)
    screen = processes.Screen(main)
    screen.wait_for("/12")
    screen.wait_for(" in flight")
    screen.wait_for("12 answers; ")
    assert process.end()[0] == 0
    os.close(main)


def test_a_run_that_is_watched_by_nobody_has_its_plan_and_summary_alone(files):
    ran = files(requests=numbered(3))
    plan, summary = ran.err.splitlines()
    assert plan.startswith("pool ")
    assert summary.startswith("3 answers; 12 tokens in ") and " prompt tokens, " in summary
    assert "rich" not in sys.modules or "in flight" not in ran.err
