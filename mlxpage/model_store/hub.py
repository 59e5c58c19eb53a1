"""Models of the Hugging Face hub: out of its cache, or over the network."""

import fnmatch
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxpage.errors import InvalidModel, ModelNotFound
from mlxpage.model_store.check import explain_no_weights, is_complete

# What mlx-lm reads of a model. Never code, pickles or GGUF.
PATTERNS = [
    "*.json",
    "model*.safetensors",
    "tokenizer.model",
    "*.tiktoken",
    "tiktoken.model",
    "*.txt",
    "*.jinja",
]

ANSWER_SECONDS = 5.0  # for the hub's first answer; HF_HUB_ETAG_TIMEOUT overrides it


def fetch(repo_id: str, on_status: Callable[[str], None]) -> Path:
    """The snapshot folder of a hub model, downloaded unless the cache holds all of it.

    Raises `ModelNotFound` when it can't be had (its first sentence says why, the rest what to
    do), `InvalidModel` when the hub has no weights that can be loaded.
    """
    try:
        return _cached(repo_id) or _download(repo_id, on_status)
    except (ModelNotFound, InvalidModel):
        raise
    except Exception as error:
        # Transport errors come from an HTTP library that changes with huggingface_hub's version.
        raise ModelNotFound(_explain(repo_id, error)) from None


def _cached(repo_id: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(repo_id, local_files_only=True, allow_patterns=PATTERNS)
    except LocalEntryNotFoundError:
        return None
    return Path(folder) if is_complete(Path(folder)) else None


def _download(repo_id: str, on_status: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download

    sizes = _file_sizes(repo_id)
    wanted = {n for n in sizes if any(fnmatch.fnmatch(n, pattern) for pattern in PATTERNS)}
    if not any(name.endswith(".safetensors") for name in wanted):
        raise InvalidModel(explain_no_weights(f"{repo_id} on the hub", sizes))
    size = sum(sizes[name] for name in wanted)
    on_status(f"Downloading {repo_id} from the hub ({size / 1e6:,.0f} MB)")
    try:
        return Path(snapshot_download(repo_id, allow_patterns=PATTERNS))
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise ModelNotFound(_explain_disk_full(repo_id, size)) from None


def _file_sizes(repo_id: str) -> dict[str, int]:
    """Names and bytes of the repository's files; also the test of whether the hub answers."""
    from huggingface_hub import HfApi

    limit = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or ANSWER_SECONDS)
    info = _within(limit, lambda: HfApi().model_info(repo_id, files_metadata=True, timeout=limit))
    return {file.rfilename: file.size or 0 for file in info.siblings or []}


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """call(), or TimeoutError. In a thread, as looking up a host name has no time limit."""
    outcome: queue.SimpleQueue = queue.SimpleQueue()

    def work():
        try:
            outcome.put((call(), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error:
        raise error
    return value


def _explain(repo_id: str, error: Exception) -> str:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.HFValidationError):
        return (
            f"No model {repo_id!r:.200}: neither a folder nor a name of the form org/name. "
            "Give a folder, a model of huggingface.co or a demo model."
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return (
            f"{repo_id} is not on this machine and HF_HUB_OFFLINE forbids to download it. "
            "Unset it, or give the folder of a model."
        )
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo_id} is gated. Accept its terms at {constants.ENDPOINT}/{repo_id}, then set "
            "HF_TOKEN or run `hf auth login`."
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"No model {repo_id}: neither a folder here nor a public model of "
            f"{constants.ENDPOINT}. If it is private, set HF_TOKEN or run `hf auth login`."
        )
    return (
        f"{repo_id} is not on this machine and the hub can't be reached ({_one_line(error)}). "
        "Connect and try again, or give the folder of a model."
    )


def _one_line(error: Exception) -> str:
    cause = error.__cause__ or error
    text = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return text[:200].rstrip(".")


def _is_disk_full(error: Exception) -> bool:
    # Rust's downloader wraps the system's error in its own.
    return "no space left" in str(error).lower() or "disk quota" in str(error).lower()


def _explain_disk_full(repo_id: str, size: int) -> str:
    from huggingface_hub import constants

    return (
        f"The disk is full: {repo_id} needs {size / 1e6:,.0f} MB in {constants.HF_HUB_CACHE}. "
        "Free some space, or set HF_HOME to a folder on another disk."
    )
