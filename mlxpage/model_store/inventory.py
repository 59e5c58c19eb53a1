"""What models are on this machine, and how to remove those that were fetched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxpage.errors import InvalidModel, ModelNotFound
from mlxpage.model_store import demo_models, hub
from mlxpage.model_store.check import read_config, weight_files
from mlxpage.model_store.demo_models import DEMO_MODELS


@dataclass(frozen=True, slots=True)
class Found:
    """A model folder."""

    name: str
    """As `resolve` takes it."""
    folder: Path
    family: str
    quantisation: str
    """Such as "4 bits" or "bfloat16"."""
    size: int
    """Bytes of its files."""
    last_used: float
    """When its weights were read, or else written, in seconds since 1970. Many file systems note
    that they are read once a day, and some never do."""

    @staticmethod
    def of(name: str, folder: Path) -> Found:
        """Raises `InvalidModel` or OSError for a folder that holds no model."""
        config = read_config(folder)
        weights = [file.stat() for file in weight_files(folder)]
        return Found(
            name,
            folder,
            config["model_type"],
            quantisation(config),
            sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            max(max(status.st_atime, status.st_mtime) for status in weights),
        )


@dataclass(frozen=True, slots=True)
class Removal:
    """Something that can be removed."""

    folder: Path
    size: int
    """Bytes that this frees."""
    do: Callable[[], None]
    """Raises OSError if something stays."""


def models() -> list[Found]:
    """Demo models and those of the hub's cache that are whole, by name. No weights are opened."""
    found = []
    for name, folder in _named():
        try:
            found.append(Found.of(name, folder))
        except (InvalidModel, OSError):
            continue  # loading it would say why
    return sorted(found, key=lambda model: model.name.lower())


def names() -> list[str]:
    """Those of `models`, and of models that are there in part."""
    demos = [name for name, demo in DEMO_MODELS.items() if demo_models.folder_of(demo).exists()]
    return sorted([*demos, *hub.repositories()], key=str.lower)


def removals(name: str) -> list[Removal]:
    """What is on this machine of a demo model or a model of the hub, whole or not."""
    demo = demo_models.find_demo(name)
    found = []
    if demo and (folder := demo_models.folder_of(demo)).exists():
        found.append(Removal(folder, _bytes_in(folder), lambda: demo_models.remove(demo)))
    repo_id = demo.hub_id if demo else name
    if folder := hub.repositories().get(repo_id):
        found.append(Removal(folder, _bytes_in(folder), lambda: hub.remove(repo_id)))
    return found


def quantisation(config: dict[str, Any]) -> str:
    """How a model's weights are stored, by its config: "4 bits", "bfloat16"; "?" if it's open."""
    for key in ("quantization", "quantization_config"):
        if isinstance(stated := config.get(key), dict):
            method = stated.get("mode") or stated.get("quant_method")
            return f"{stated['bits']} bits" if "bits" in stated else str(method or "?")
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        if dtype := section.get("dtype") or section.get("torch_dtype"):
            return str(dtype)
    return "?"


def _named() -> Iterator[tuple[str, Path]]:
    for name, demo in DEMO_MODELS.items():
        if folder := demo_models.installed(demo):
            yield name, folder
    for repo_id in hub.repositories():
        try:
            if folder := hub.cached(repo_id):
                yield repo_id, folder
        except ModelNotFound:
            continue  # a folder whose name is no model's


def _bytes_in(folder: Path) -> int:
    """Of files, links not followed: the hub's cache has each file once, and links to it."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())
