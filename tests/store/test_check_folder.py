"""What is refused before a model's files reach any library."""

import json
import random

import pytest

from mlxpage.errors import InvalidModel, MlxpageError, UnsupportedModel
from mlxpage.model_store import check
from mlxpage.model_store.check import check_folder, generation_defaults, is_complete, read_config


def refusal(folder, kind=InvalidModel) -> str:
    with pytest.raises(MlxpageError) as caught:
        check_folder(folder)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert str(folder) in message and message.count("\n") <= 1
    return message


def test_a_sound_folder_gives_its_config(model):
    assert check_folder(model) == json.loads((model / "config.json").read_text())


def test_a_folder_without_config_is_no_model(model):
    (model / "config.json").unlink()
    assert "no config.json" in refusal(model)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "no valid JSON"),
        ("", "no valid JSON"),
        ("\udcff", "no valid JSON"),
        ("[" * 1_000_000, "no valid JSON"),
        ('{"n": ' + "9" * 5000 + "}", "no valid JSON"),
        ("[]", "holds list"),
        ("null", "holds NoneType"),
        ("{}", "model_type None"),
        ('{"model_type": 5}', "model_type 5"),
        ('{"model_type": "../../evil"}', "model_type '../../evil'"),
        ('{"model_type": "llama\\n"}', "model_type"),
        ('{"model_type": "' + "x" * 65 + '"}', "model_type"),
        (" " * (4 << 20) + "{}", "larger than 4 MiB"),
    ],
    ids=lambda value: value[:20],
)
def test_a_broken_config_is_refused_with_the_reason(model, text, told):
    (model / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert told in refusal(model)


def test_a_model_that_asks_for_its_own_code_is_unsupported(model):
    (model / "evil.py").write_text("raise SystemExit('ran')")
    (model / "config.json").write_text('{"model_type": "llama", "model_file": "evil.py"}')
    assert "'evil.py'" in refusal(model, UnsupportedModel)


def test_python_files_and_auto_map_alone_are_harmless(model):
    (model / "modeling.py").write_text("raise SystemExit('ran')")
    config = {"model_type": "llama", "auto_map": {"AutoModel": "modeling.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    assert check_folder(model) == config


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("pytorch_model.bin", "pickle"),
        ("model.pt", "pickle"),
        ("weights.npz", "old MLX"),
        ("model-q4.gguf", "pinned by checksum"),
        ("consolidated.safetensors", "only 'consolidated.safetensors'"),
        ("README.md", "holds no weights"),
    ],
)
def test_other_formats_are_never_loaded_and_the_message_says_why(model, name, told):
    (model / "model.safetensors").rename(model / name)
    assert told in refusal(model)


def test_a_truncated_weight_file_is_named(model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "model.safetensors" in refusal(model) and "truncated" in refusal(model)


@pytest.mark.parametrize("name", ["model-2.safetensors", "model_2.safetensors"])
def test_every_weight_file_is_checked(model, name):
    (model / name).write_bytes(b"\0" * 8)
    assert name in refusal(model)


def write_index(model, *shards):
    weight_map = {f"w{i}": shard for i, shard in enumerate(shards)}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_missing_shard_is_named(model):
    write_index(model, "model.safetensors", "model-00002-of-00002.safetensors")
    assert "'model-00002-of-00002.safetensors'" in refusal(model)
    assert not is_complete(model)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "sub/x", "..", "", 7])
def test_an_index_can_not_point_out_of_its_folder(model, shard):
    write_index(model, shard)
    assert f"{shard!r}, which is no file of its folder" in refusal(model)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"weight_map": []}'])
def test_a_broken_index_is_refused(model, text):
    (model / "model.safetensors.index.json").write_text(text)
    assert "index.json" in refusal(model)


def test_a_folder_without_tokenizer_is_refused(model):
    (model / "tokenizer.json").unlink()
    assert "no tokenizer" in refusal(model)
    assert not is_complete(model)
    (model / "tokenizer.model").touch()
    check_folder(model)
    assert is_complete(model)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_json_that_mlx_lm_reads_unguarded_is_checked(model, name):
    (model / name).write_text("[" * 200_000)
    assert name in refusal(model)


def test_an_unreadable_file_is_a_clean_refusal(model, monkeypatch):
    def denied(file):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(check, "weight_files", denied)
    assert "Permission denied" in refusal(model)


def test_a_link_to_a_missing_blob_makes_a_folder_incomplete(model):
    assert is_complete(model)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(model / "gone")
    assert not is_complete(model)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1},)
        * 2,
        ({"do_sample": True, "top_k": 64, "eos_token_id": 1}, {"top_k": 64, "temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"eos_token_id": 2}, {}),
        ({"temperature": "hot", "top_p": None, "top_k": 2.5, "min_p": True}, {}),
        ({"temperature": -1, "top_p": 0, "top_k": -1, "min_p": 1.5, "repetition_penalty": 0}, {}),
        ({"temperature": float("nan"), "top_p": float("inf")}, {}),
        ({"temperature": 10**400}, {}),
        ({"temperature": 0, "top_k": 0, "top_p": 1}, {"temperature": 0, "top_k": 0, "top_p": 1}),
    ],
)
def test_generation_defaults_are_what_the_file_states_and_a_request_may_use(
    model, stated, expected
):
    (model / "generation_config.json").write_text(json.dumps(stated))
    assert generation_defaults(model) == expected


@pytest.mark.parametrize("text", [None, "{", "[1]", "[" * 200_000])
def test_missing_or_broken_generation_config_gives_no_defaults(model, text):
    if text is not None:
        (model / "generation_config.json").write_text(text)
    assert generation_defaults(model) == {}


def test_mutated_folders_give_a_valid_config_or_a_clean_error(model):
    random_ = random.Random(8)
    texts = {"config.json": '{"model_type": "llama", "layers": [1, {"a": null}], "x": 1e5}'}
    texts["model.safetensors.index.json"] = '{"weight_map": {"a": "model.safetensors"}}'
    texts["generation_config.json"] = '{"do_sample": true, "temperature": 0.6, "top_p": 0.9}'
    outcomes = {True: 0, False: 0}
    for _ in range(400):
        for name, text in texts.items():
            (model / name).write_bytes(mutated(text.encode(), random_))
        generation_defaults(model)
        try:
            config = check_folder(model)
        except MlxpageError as error:
            assert len(str(error)) < 500
        else:
            assert config == read_config(model) and isinstance(config["model_type"], str)
        outcomes[is_complete(model)] += 1
    assert min(outcomes.values()) > 40


def mutated(text: bytes, random_: random.Random) -> bytes:
    if random_.random() < 0.5:
        return text
    changed = bytearray(text)
    at = random_.randrange(len(changed))
    kind = random_.randrange(5)
    if kind == 0:
        changed[at] = random_.randrange(256)
    elif kind == 1:
        del changed[at:]
    elif kind == 2:
        changed[at:at] = random_.choice([b"[" * 2000, b"9" * 5000, b'"', b"\\ud800", b"null"])
    elif kind == 3:
        del changed[at : at + 3]
    else:
        changed[at:at] = b"/../"
    return bytes(changed)
