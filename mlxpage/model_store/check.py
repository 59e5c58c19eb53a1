"""Refuses damaged and unsafe model folders before a library opens any of their files."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlxpage.errors import InvalidModel, UnsupportedModel
from mlxpage.model_store.safetensors_header import read_header

MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 64 << 20  # the index of the largest public models has 10 MB
MAX_TOKENIZER_CONFIG_BYTES = 64 << 20

_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
_PICKLE = "a pickle runs code when it is opened, so mlxpage loads safetensors alone"
_NEVER_LOADED = {
    ".bin": _PICKLE,
    ".ckpt": _PICKLE,
    ".pkl": _PICKLE,
    ".pt": _PICKLE,
    ".pth": _PICKLE,
    ".gguf": "GGUF is not loaded; only the demo models, pinned by checksum, are converted from it",
    ".npz": "npz is the format of old MLX models, and mlxpage loads safetensors alone",
}

# generation_config.json's keys that are sampling parameters: (least, most, least allowed?, whole?)
_SAMPLING = {
    "temperature": (0, 100, True, False),
    "top_p": (0, 1, False, False),
    "top_k": (0, 2**31 - 1, True, True),
    "min_p": (0, 1, True, False),
    "repetition_penalty": (0, 100, False, False),
}


def check_folder(path: Path) -> dict[str, Any]:
    """The config of a model folder whose files are sound, as far as can be seen without loading.

    Reads the JSON files that mlx-lm reads itself and the headers of the weights, no tensor.
    Raises `InvalidModel` for damage and for formats that are never loaded, `UnsupportedModel`
    when the model needs Python code of its own.
    """
    folder = Path(path)
    try:
        config = read_config(folder)
        _check_side_files(folder)
        for file in weight_files(folder):
            read_header(file)
    except OSError as error:
        raise InvalidModel(f"{folder} can't be read: {error.strerror}.") from None
    return config


ADAPTER_FILES = ("adapter_config.json", "adapters.safetensors")


def check_adapter(path: str | os.PathLike[str]) -> Path:
    """The folder of an adapter, as mlx-lm's training writes it, whose files are sound as far as can
    be seen without the model. Raises `InvalidModel`."""
    folder = Path(os.path.expanduser(path))
    missing = [name for name in ADAPTER_FILES if not os.path.isfile(folder / name)]
    if missing:
        raise InvalidModel(
            f"{folder} is no adapter: it lacks {' and '.join(missing)}. Give the folder that "
            "mlx-lm has trained it into (adapter_path)."
        )
    try:
        _read_json(folder / ADAPTER_FILES[0], MAX_CONFIG_BYTES)
        names = set(read_header(folder / ADAPTER_FILES[1]))
    except OSError as error:
        raise InvalidModel(f"{folder} can't be read: {error.strerror}.") from None
    # mlx-lm would take random numbers for the one, or nothing of both.
    for one, other in (("lora_a", "lora_b"), ("lora_b", "lora_a")):
        alone = [n for n in names if n.endswith(one) and n.removesuffix(one) + other not in names]
        if alone:
            raise InvalidModel(f"{folder} is incomplete: it has {min(alone)} without its {other}.")
    return folder


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises `InvalidModel` or `UnsupportedModel`."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise InvalidModel(f"{path} is no model: it holds no config.json. Give the one that does.")
    config = _read_json(file, MAX_CONFIG_BYTES)
    if config.get("model_file") is not None:
        raise UnsupportedModel(
            f"{file} asks to run the model's own code, {config['model_file']!r:.80}, and mlxpage "
            "never does. Use a model that mlx-lm knows by its model_type."
        )
    kind = config.get("model_type")
    if not isinstance(kind, str) or not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", kind):
        raise InvalidModel(
            f"{file} has the model_type {kind!r:.80}; it must be a name of letters, digits and _.-"
        )
    return config


def generation_defaults(path: Path) -> dict[str, float | int]:
    """The sampling defaults that generation_config.json states; {} when it is missing or broken.

    Keys: temperature, top_p, top_k, min_p, repetition_penalty, each only where the file has a
    usable number. `do_sample` false is temperature 0; true, without one, is 1.
    """
    file = Path(path) / "generation_config.json"
    try:
        stated = _read_json(file, MAX_CONFIG_BYTES)
    except InvalidModel:
        return {}
    defaults = {key: stated[key] for key in _SAMPLING if _is_usable(key, stated.get(key))}
    if stated.get("do_sample") is False:
        defaults["temperature"] = 0.0
    elif stated.get("do_sample") is True:
        defaults.setdefault("temperature", 1.0)
    return defaults


def is_complete(path: Path) -> bool:
    """Whether a folder has a config, a tokenizer and every weight file that its index names."""
    folder = Path(path)
    try:
        weight_files(folder)
        return (folder / "config.json").is_file() and _has_tokenizer(folder)
    except (InvalidModel, OSError):
        return False


def weight_files(folder: Path) -> list[Path]:
    """The files that mlx-lm takes the weights from. Raises `InvalidModel` when one is missing."""
    files = sorted(file for file in folder.glob("model*.safetensors") if file.is_file())
    if not files:
        names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        raise InvalidModel(explain_no_weights(str(folder), names))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = _shards(index) - {file.name for file in files}
        if missing:
            raise InvalidModel(
                f"{folder} lacks {len(missing)} of its weight files, such as {min(missing)!r:.80}. "
                "Fetch the model again."
            )
    return files


def explain_no_weights(where: str, names: Iterable[str]) -> str:
    """Why none of the files `names` is loaded as weights."""
    names = sorted(names)
    for name in names:
        if reason := why_not_loaded(name):
            return f"{where} holds no model*.safetensors but {name!r:.80}: {reason}."
    others = [name for name in names if name.endswith(".safetensors")]
    found = f", only {others[0]!r:.80}" if others else ""
    return f"{where} holds no weights: mlx-lm reads model*.safetensors{found}."


def why_not_loaded(name: str) -> str | None:
    """The reason why a file of this name is never opened, or None."""
    return _NEVER_LOADED.get(Path(name).suffix.lower())


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZERS)


def _check_side_files(folder: Path) -> None:
    for name in ("generation_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            _read_json(folder / name, MAX_TOKENIZER_CONFIG_BYTES)
    if not _has_tokenizer(folder):
        raise InvalidModel(f"{folder} holds no tokenizer: none of {', '.join(_TOKENIZERS)}.")


def _shards(index: Path) -> set[str]:
    weight_map = _read_json(index, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InvalidModel(f"{index} is damaged: it has no weight_map.")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".."):
            raise InvalidModel(f"{index} names {name!r:.80}, which is no file of its folder.")
    return set(weight_map.values())


def _read_json(file: Path, limit: int) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes. Raises `InvalidModel`."""
    try:
        with file.open("rb") as stream:
            text = stream.read(limit + 1)
        if len(text) > limit:
            raise InvalidModel(f"{file} is larger than {limit >> 20} MiB, the most that is read.")
        value = json.loads(text.decode("utf-8"))
    except OSError as error:
        raise InvalidModel(f"{file} can't be read: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise InvalidModel(f"{file} is no valid JSON: {str(error)[:120]}.") from None
    if not isinstance(value, dict):
        raise InvalidModel(f"{file} holds {type(value).__name__} where a JSON object is expected.")
    return value


def _is_usable(key: str, value: Any) -> bool:
    low, high, low_allowed, whole = _SAMPLING[key]
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return False
    return low <= value <= high and (low_allowed or value != low)
