"""`mlxpage doctor`: what it says of a machine, and the report that it makes of one."""

import getpass
import json
import os
import signal
from pathlib import Path

import pytest
import test_processes as processes

from mlxpage import acceptance, doctor, probes
from mlxpage.cli import doctor as command
from mlxpage.cli import report
from mlxpage.doctor import Host
from mlxpage.errors import EngineError
from mlxpage.metal import choice, reference, self_check
from mlxpage.metal.backend import Device

start = processes.start  # a process of the command line, ended with the test

# -- what macOS says --

IOREG = """+-o AGXAcceleratorG13X  <class AGXAcceleratorG13X, id 0x100000a3c, registered, matched>
    {
      "IOClass" = "AGXAcceleratorG13X"
      "gpu-core-count" = 16
      "model" = "Apple M1 Pro"
    }
"""
ON_BATTERY = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=22282339)\t85%; discharging; 5:12 remaining present: true
"""
ON_MAINS = """Now drawing from 'AC Power'
 -InternalBattery-0 (id=22282339)\t100%; charged; 0:00 remaining present: true
"""
SETTINGS = """System-wide power settings:
Currently in use:
 standby              1
 hibernatefile        /var/vm/sleepimage
 sleep                1 (sleep prevented by caffeinate)
 displaysleep         10
 lowpowermode         {}
 womp                 0
"""


def test_the_answers_of_macos_are_read():
    assert probes.gpu_cores(IOREG) == 16
    assert probes.is_on_battery(ON_BATTERY) is True
    assert probes.is_on_battery(ON_MAINS) is False
    assert probes.saves_power(SETTINGS.format(1)) is True
    assert probes.saves_power(SETTINGS.format(0)) is False
    assert probes.saves_power(SETTINGS.format(0).replace("lowpowermode", "powermode   ")) is False
    assert probes.line("Apple M4 Max\n") == "Apple M4 Max"
    assert probes.number("12288\n") == 12288
    assert probes.cpu_model("processor\t: 0\nmodel name\t: AMD EPYC\n") == "AMD EPYC"


READERS = [probes.gpu_cores, probes.is_on_battery, probes.saves_power, probes.line, probes.number]


@pytest.mark.parametrize("read", [*READERS, probes.cpu_model], ids=lambda read: read.__name__)
def test_an_answer_that_is_not_there_or_of_another_kind_is_none(read):
    for text in (None, "", "\n", "  "):
        assert read(text) is None
    if read is not probes.line:
        assert read("sysctl: unknown oid 'iogpu.wired_limit_mb'\n") is None


def test_a_command_is_asked_and_none_stands_for_no_answer(monkeypatch):
    assert probes.ask(("echo", "hello")) == "hello\n"
    assert probes.ask(("mlxpage-no-such-command",)) is None
    assert probes.ask(("false",)) is None
    monkeypatch.setattr(probes, "_SECONDS", 0.05)
    assert probes.ask(("sleep", "5")) is None


def test_recent_panics_are_counted_and_not_read(tmp_path):
    for name, age in (("new.panic", 1), ("old.panic", 40), ("new.crash", 1)):
        file = tmp_path / name
        file.write_text("")
        file.chmod(0)
        os.utime(file, times=(os.stat(file).st_mtime - age * 86_400,) * 2)
    assert probes.recent_panics(tmp_path, 30) == 1


# -- the checks --


@pytest.fixture
def mac(tmp_path, monkeypatch):
    """mac(answers, **changes) -> the checks by name, of a Mac that answers so"""
    answers = {
        probes.CHIP: "Apple M1 Pro\n",
        probes.TRANSLATED: "0\n",
        probes.WIRED_LIMIT: "0\n",
        probes.GPU: IOREG,
        probes.POWER_SOURCE: ON_MAINS,
        probes.POWER_SETTINGS: SETTINGS.format(0),
    }
    metal = Device("metal", "Apple M1 Pro", 22 * 10**9, 14 * 10**9)
    monkeypatch.setattr("mlxpage.metal.backend.device", lambda: metal)
    monkeypatch.setattr(choice, "device", lambda: metal)
    monkeypatch.setattr(self_check, "CASES", {"one": lambda: None, "two": lambda: None})
    monkeypatch.delenv("MLXPAGE_BACKEND", raising=False)

    def examine(changes=None, **host):
        given = answers | (changes or {})
        defaults = {"system": "Darwin", "machine": "arm64", "macos": "26.1"}
        defaults |= {"environ": {}, "panics": tmp_path, "ask": given.get}
        return by_name(doctor.examine(Host(**defaults | host)))

    return examine


def by_name(checks) -> dict[str, doctor.Check]:
    checks = list(checks)
    found = {check.name: check for check in checks}
    assert len(found) == len(checks)
    return found


def states(checks) -> set[tuple[str, str]]:
    """Of those that aren't ok."""
    return {(check.name, check.state) for check in checks.values() if check.state != "ok"}


def test_a_sound_mac_is_ok(mac):
    checks = mac()
    assert states(checks) == set()
    assert checks["chip"].found == f"Apple M1 Pro, {os.cpu_count()} CPU cores, 16 GPU cores"
    assert "macOS 26.1 arm64" in checks["mlxpage"].found
    assert checks["kernels"].found == "compiled, and right in 2 cases"
    assert checks["backend"].found == "metal (this machine's GPU)"
    assert "the GPU should have 22.0 GB of it at most" in checks["memory"].found
    assert checks["power"].found == "mains, low-power mode off"
    assert "BLAS" not in checks
    assert "never sets it" in checks["watchdog"].found


def test_a_mac_that_answers_nothing_has_unknowns_and_no_error(mac):
    nothing = dict.fromkeys((probes.CHIP, probes.TRANSLATED, probes.WIRED_LIMIT, probes.GPU))
    nothing |= dict.fromkeys((probes.POWER_SOURCE, probes.POWER_SETTINGS))
    checks = mac(nothing, macos="", panics=Path("/no/such/folder"))
    unknown = ("chip", "wired limit", "power", "panics")
    assert states(checks) == {(name, "unknown") for name in unknown}


def test_a_probe_that_breaks_is_unknown_and_the_others_go_on(mac):
    def broken(command):
        raise ValueError("never seen")

    checks = mac(ask=broken)
    assert checks["power"].state == "unknown"
    assert checks["power"].found == "can't be looked at: ValueError: never seen"
    assert checks["memory"].state == "ok"


CASES = [
    # (answers, the host's own, check, state, a part of what it says)
    ({probes.TRANSLATED: "1\n"}, {}, "mlxpage", "problem", "Rosetta"),
    ({}, {"macos": "13.6.1"}, "mlxpage", "problem", "macOS 14"),
    ({probes.WIRED_LIMIT: "20480\n"}, {}, "wired limit", "ok", "20,480 MB"),
    ({probes.POWER_SOURCE: ON_BATTERY}, {}, "power", "advice", "battery"),
    ({probes.POWER_SETTINGS: SETTINGS.format(1)}, {}, "power", "advice", "low-power mode on"),
    ({}, {"environ": {doctor._RELAX: "1"}}, "watchdog", "ok", "is set"),
    ({}, {}, "panics", "ok", "0 kernel panics"),
]


@pytest.mark.parametrize(
    "answers, host, name, state, told", CASES, ids=lambda value: str(value)[:30]
)
def test_what_is_in_the_way_of_a_mac_is_told(mac, answers, host, name, state, told):
    check = mac(answers, **host)[name]
    assert check.state == state
    assert told in f"{check.found} {check.way_out}"
    assert state == "ok" or check.way_out


def test_panics_are_an_advice(mac, tmp_path):
    (tmp_path / "Kernel.panic").write_text("secret")
    check = mac()["panics"]
    assert (check.state, check.found) == ("advice", "1 kernel panic in 30 days")


def test_kernels_that_fail_are_a_problem_and_named(mac, monkeypatch):
    def wrong():
        raise RuntimeError("no such\n function")

    monkeypatch.setitem(self_check.CASES, "two", wrong)
    check = mac()["kernels"]
    assert check.state == "problem" and "--report" in check.way_out
    assert check.found == "1 of 2 cases fail: two: no such function"


def test_a_backend_that_is_not_the_best_or_none_is_told(mac, monkeypatch):
    monkeypatch.setenv("MLXPAGE_BACKEND", "reference")
    assert mac()["backend"].state == "advice"
    monkeypatch.setenv("MLXPAGE_BACKEND", "gpu")
    check = mac()["backend"]
    assert check.state == "problem" and "MLXPAGE_BACKEND is 'gpu'" in check.found


def test_arrays_that_are_smaller_than_a_pool_wants_are_told(mac, monkeypatch):
    small = Device("metal", "Apple", 64 * 10**9, 10**8)
    monkeypatch.setattr("mlxpage.metal.backend.device", lambda: small)
    assert mac()["largest array"].state == "advice"


@pytest.mark.parametrize(
    "name, found, state",
    [
        ("mlx", "0.32.3", "problem"),
        ("mlx", "0.32.4.dev2", "ok"),
        ("mlx", "1.0", "ok"),
        ("mlx-lm", "0.32.1", "advice"),
        ("mlx-lm", "0.32.9", "ok"),
        ("mlx-lm", "0.33.0", "advice"),
    ],
)
def test_versions_that_are_known_not_to_serve_are_told(monkeypatch, name, found, state):
    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda package: found if package == name else real(name))
    check = by_name(doctor.examine())[name]
    assert check.state == state and found in check.found
    assert state == "ok" or f"install {name} {doctor.VERSIONS[name].least}" in check.way_out


def test_the_known_versions_are_those_that_are_installed_with_it():
    asked = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for name, known in doctor.VERSIONS.items():
        below = f",<{known.below}" if known.below else ""
        assert f'"{name}>={known.least}{below}' in asked


def test_without_mlx_there_is_a_problem_and_what_to_install(python):
    told = python(
        "import sys\n"
        "sys.modules['mlx.core'] = None  # as where libmlx can't be loaded\n"
        "from mlxpage.cli.main import run\n"
        "sys.exit(run(['doctor']))"
    )
    assert told.returncode == command.FAILED, told.stderr
    assert "problem  device         MLX can't be imported: " in told.stdout
    assert "-> install mlx" in told.stdout and told.stderr == ""


def test_a_slow_blas_and_little_memory_are_advices(monkeypatch):
    monkeypatch.setattr("mlxpage.metal.backend.BLAS", None)
    monkeypatch.setattr(doctor, "_SPARE_MEMORY", 10**15)
    checks = by_name(doctor.examine(Host(system="Linux")))
    assert (checks["BLAS"].state, checks["memory"].state) == ("advice", "advice")
    assert "libopenblas0-pthread" in checks["BLAS"].way_out
    checks = by_name(doctor.examine(Host(system="Linux", environ={"MLXPAGE_BLAS": "off"})))
    assert checks["BLAS"].way_out == "unset MLXPAGE_BLAS"


def test_a_cache_that_cannot_be_written_or_has_no_room_is_told(tmp_path, monkeypatch):
    folder = tmp_path / "not" / "there" / "yet"
    monkeypatch.setenv("MLXPAGE_CACHE", str(folder))
    cache = by_name(doctor.examine())["cache"]
    assert cache.state == "ok" and cache.found.startswith(f"{folder}, ")
    assert not (tmp_path / "not").exists()
    monkeypatch.setattr(doctor, "_SPARE_DISK", 10**18)
    assert by_name(doctor.examine())["cache"].state == "advice"
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("MLXPAGE_CACHE", str(file / "folder"))
    cache = by_name(doctor.examine())["cache"]
    assert cache.state == "problem" and "MLXPAGE_CACHE" in cache.way_out


# -- the command --


def test_each_check_is_a_line_and_a_problem_is_an_exit_code(cli, monkeypatch):
    found = [doctor.Check("one", "ok", "good"), doctor.Check("two", "problem", "bad", "mend it")]
    monkeypatch.setattr(doctor, "examine", lambda: iter(found))
    ran = cli("doctor")
    assert (ran.code, ran.err) == (command.FAILED, "")
    assert [line.split() for line in ran.out.splitlines()] == [
        ["ok", "one", "good"],
        ["problem", "two", "bad"],
        ["->", "mend", "it"],
    ]
    ran = cli("doctor", "--json")
    assert (ran.code, ran.err, ran.out.count("\n")) == (command.FAILED, "", 1)
    record = json.loads(ran.out)
    assert record["schema"] == "mlxpage.doctor/1"
    assert [check["way_out"] for check in record["checks"]] == [None, "mend it"]
    found[1] = doctor.Check("two", "unknown", "who knows")
    assert cli("doctor").code == 0


# -- the report --


@pytest.fixture(scope="module")
def few():
    """So few measurements that they are quick: how they are made is all that is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(acceptance, "_TOKENS_ON_A_CPU", 4)
        patch.setattr(acceptance, "_TOKENS", 4)
        yield


def record_of(page: str) -> dict:
    return json.loads(page.partition("```json\n")[2].partition("\n```")[0])


def test_a_report_has_all_parts_on_one_page_and_nothing_of_its_user(
    cli, few, tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("MLXPAGE_CACHE", str(tmp_path / "cache"))
    target = tmp_path / "report.md"
    ran = cli("doctor", "--report", target, "--model", tiny_folder)
    assert ran.code == 0, ran.err
    assert ran.err.splitlines()[-1].startswith(f"{target} is there to be sent")
    assert ran.out.startswith("ok ")
    page = target.read_text()
    record = record_of(page)
    assert (record["schema"], record["is_complete"]) == ("mlxpage.report/1", True)
    assert record["failures"] == []
    assert {check["name"] for check in record["checks"]} >= {"mlx", "device", "memory"}
    parts = record["parts"]
    assert list(parts) == ["kernels", "attention", "model", "same_tokens", "decode", "prefill"]
    assert parts["model"]["family"] == "llama"
    for concurrency, run in parts["same_tokens"]["concurrency"].items():
        assert run["same"] + len(run["near_ties"]) == run["prompts"] >= int(concurrency)
    for arms in (*parts["decode"]["concurrency"].values(), parts["prefill"]):
        for arm in ("mlxpage", "mlx_lm"):
            assert arms[arm]["tok_s"] > 0 and len(arms[arm]["runs"]) == 3
            assert arms[arm]["peak_bytes"] >= parts["model"]["weight_bytes"]
    assert "| 16 | mlxpage | " in page
    for secret in (str(Path.home()), str(tmp_path), str(tiny_folder), os.getcwd()):
        assert secret not in page


def test_a_page_shows_the_parts_that_are_there_and_why_others_are_not():
    record = {"created": "today", "seconds": 1, "is_complete": False, "failures": ["prefill: no"]}
    record |= {"checks": [], "parts": {"prefill": {"error": "no"}, "decode": {"skipped": "too"}}}
    page = report.page(record)
    assert "interrupted" in page and "- **prefill: no**" in page
    assert "## Prefill\n\nno\n" in page and "## Decode\n\ntoo\n" in page
    assert "## Same tokens\n\nnot measured\n" in page
    run = {"us": 1.5, "gb_s": 99.0, "copy_percent": 90.0}
    shapes = {"8 x 1": {"mlxpage": run}}
    record["parts"] |= {"attention": {"copy_gb_s": 100, "shapes": shapes}}
    record["parts"] |= {"kernels": {"cases": {"one": None, "two": "wrong | so"}}}
    page = report.page(record)
    assert "| 8 x 1 | mlxpage | 1.5 | 99.0 | 90.0 |" in page
    assert "| one | right |" in page and "| two | wrong / so |" in page


def test_every_key_of_a_report_is_explained(cli, few, tiny_folder):
    ran = cli("doctor", "--report", "-", "--model", tiny_folder)
    explained = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
    records = [record_of(ran.out)]
    while records:
        for key, value in records.pop().items():
            assert f"`{key}`" in explained or key.isdecimal() or key in ("mlxpage", "mlx_lm"), key
            records += [value] if isinstance(value, dict) else []


def test_a_part_that_fails_leaves_the_others_and_is_an_exit_code(
    cli, few, tiny_folder, tmp_path, monkeypatch
):
    def fails(*_):
        raise RuntimeError(f"kernel\n panic in {Path.home()}/x")

    monkeypatch.setattr(acceptance, "decode", fails)
    monkeypatch.setattr(acceptance, "same_tokens", fails)
    ran = cli("doctor", "--report", tmp_path / "report.md", "--model", tiny_folder)
    assert ran.code == command.FAILED
    parts = record_of((tmp_path / "report.md").read_text())["parts"]
    assert parts["decode"]["error"] == "RuntimeError: kernel panic in ~/x"
    assert parts["prefill"]["mlxpage"]["tok_s"] > 0


def test_without_its_model_a_report_has_the_rest(cli, tmp_path):
    ran = cli("doctor", "--report", tmp_path / "report.md", "--model", tmp_path / "none")
    assert ran.code == command.FAILED
    record = record_of((tmp_path / "report.md").read_text())
    assert "ModelNotFound" in record["parts"]["model"]["error"]
    assert record["parts"]["decode"]["skipped"] == "there is no model"
    assert str(tmp_path) not in json.dumps(record)


def test_tokens_that_differ_are_ties_or_a_fault():
    theirs = [acceptance.Greedy([1, 2, 3], [1.0, 0.01, 1.0], 0.001)] * 3
    found = acceptance.compared([[1, 2, 3], [1, 5, 5], [1, 2, 5]], theirs, 0.02)
    assert found == {
        "prompts": 3,
        "same": 1,
        "near_ties": [{"prompt": 1, "position": 1, "gap": 0.01}],
        "different": [{"prompt": 2, "position": 2, "gap": 1.0}],
    }
    told = report.failures({"same_tokens": {"concurrency": {"4": found}}})
    assert told == ["same tokens: 1 of 3 prompts got others, 4 at once"]


def test_attention_that_goes_wrong_is_seen_in_the_tokens(tiny_folder, monkeypatch):
    subject = acceptance.load(str(tiny_folder))
    assert all(not run["different"] for run in runs_of(subject))
    attend = reference.Pool.attend

    def wrong(self, step, q, window, scale, sinks):  # after the check at load
        return attend(self, step, q, window, 2 * scale, sinks)

    monkeypatch.setattr(reference.Pool, "attend", wrong)
    assert all(run["different"] for run in runs_of(subject))


def test_a_step_that_fails_is_no_result(tiny_folder, monkeypatch):
    subject = acceptance.load(str(tiny_folder))

    def fails(*_):
        raise RuntimeError("the GPU is gone")

    monkeypatch.setattr(reference.Pool, "attend", fails)
    prompts = subject.prompts(2, 4, 8)
    for measure in (acceptance.decode_of_mlxpage, acceptance.greedy_of_mlxpage):
        with pytest.raises(EngineError, match="the GPU is gone"):
            measure(subject, prompts, 4, *([1] if measure is acceptance.greedy_of_mlxpage else []))


def runs_of(subject) -> list[dict]:
    return list(acceptance.same_tokens(subject, 6)["concurrency"].values())


def test_the_decode_speed_is_of_the_tokens_after_every_first_one(monkeypatch):
    clock = iter([10.0, 14.0])
    monkeypatch.setattr(acceptance.time, "perf_counter", lambda: next(clock))
    steps = iter([0, 1, 2, 3, 3, 2, None])
    assert acceptance.decode_speed(lambda: next(steps), 3) == (3 + 3 + 2) / 4.0


def test_names_and_folders_are_taken_out(monkeypatch):
    user = getpass.getuser()
    folders = {"/Volumes/My Disk/hub": "<HF_HOME>", str(Path.home()): "~"}
    texts = {
        f"{Path.home()}/models/x": "~/models/x",
        "/Users/someone/a and '/home/other/b'": "~/a and '~/b'",
        "/Volumes/My Disk/hub/models": "<HF_HOME>/models",
        "see /opt/secret/libopenblas.so.0, 5 tok/s": "see .../libopenblas.so.0, 5 tok/s",
        "K/V of 8 heads / 2": "K/V of 8 heads / 2",
    }
    for text, expected in texts.items():
        assert report.clean({"key": [text, 5, None]}, folders) == {"key": [expected, 5, None]}
    monkeypatch.setattr(report, "_names", lambda: {"someone"})
    assert report.clean(f"of someone, not {user}", {}) == f"of <name>, not {user}"


def test_a_report_is_never_written_over_and_a_place_for_it_is_needed(cli, tmp_path, monkeypatch):
    there = tmp_path / "report.md"
    there.write_text("mine")
    for arguments, told in [
        (["--report", there], "File exists"),
        (["--report", tmp_path / "none" / "x"], "No such file"),
        (["--model", "x"], "--report"),
        (["--report", "-", "--json"], "FILE"),
    ]:
        ran = cli("doctor", *arguments)
        assert (ran.code, ran.out) == (2, "") and told in ran.err
    assert there.read_text() == "mine"


def test_a_report_goes_to_a_new_file_or_to_standard_output(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "examine", lambda: iter(()))
    monkeypatch.setattr(acceptance, "measure", lambda name, parts, on_status: None)
    assert cli("doctor", "--report").code == 0
    (made,) = tmp_path.iterdir()
    assert made.name.startswith("mlxpage-report-") and made.suffix == ".md"
    ran = cli("doctor", "--report", "-")
    assert (ran.code, ran.err) == (0, "") and ran.out.startswith("# mlxpage report\n")


SLOW = """
import time, mlxpage.acceptance as acceptance
def slowly(*_):
    print("SLOW", file=sys.stderr, flush=True)
    time.sleep(60)
acceptance.same_tokens = slowly
"""


def test_ctrl_c_writes_what_there_is(start, tiny_folder, tmp_path):
    target = tmp_path / "report.md"
    process = start("doctor", "--report", target, "--model", tiny_folder, patch=SLOW)
    process.wait_for(process.process.stderr, b"SLOW")
    process.process.send_signal(signal.SIGINT)
    code, _, err = process.end()
    assert (code, err.split()[-1]) == (130, "interrupted") and "Traceback" not in err
    record = record_of(target.read_text())
    assert record["is_complete"] is False
    assert list(record["parts"]) == ["kernels", "attention", "model"]


@pytest.mark.full
def test_a_report_of_the_demo_model(cli, smollm2_folder, tmp_path):
    ran = cli("doctor", "--report", tmp_path / "report.md")
    assert ran.code == 0, ran.err
    runs = record_of((tmp_path / "report.md").read_text())["parts"]["same_tokens"]["concurrency"]
    assert all(run["same"] == run["prompts"] for run in runs.values())
