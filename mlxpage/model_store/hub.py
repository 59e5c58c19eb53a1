"""Models of the Hugging Face hub: out of its cache, or over the network."""

import fnmatch
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
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
STOP_SECONDS = 3.0  # for downloads to end, and remove what they have begun, after Ctrl-C

OnBytes = Callable[[int, int], None]
"""Called with the bytes fetched so far and in all."""

_REPOSITORY = "models--"  # how the folder of one is called, before its name


def fetch(repo_id: str, on_status: Callable[[str], None], on_bytes: OnBytes | None = None) -> Path:
    """The snapshot folder of a hub model, downloaded unless the cache holds all of it.

    Raises `ModelNotFound` when it can't be had (its first sentence says why, the rest what to
    do), `InvalidModel` when the hub has no weights that can be loaded. Files that are whole are not
    fetched again, after an interruption either.
    """
    with _explained(repo_id):
        return _cached(repo_id) or _download(repo_id, on_status, on_bytes)


def cached(repo_id: str) -> Path | None:
    """The snapshot folder of a hub model if all of it is in the cache. Raises `ModelNotFound` for
    what can be no name of a model."""
    with _explained(repo_id):
        return _cached(repo_id)


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    try:
        yield
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


def _download(repo_id: str, on_status: Callable[[str], None], on_bytes: OnBytes | None) -> Path:
    from huggingface_hub import snapshot_download

    sizes = _file_sizes(repo_id)
    wanted = {n for n in sizes if any(fnmatch.fnmatch(n, pattern) for pattern in PATTERNS)}
    if not any(name.endswith(".safetensors") for name in wanted):
        raise InvalidModel(explain_no_weights(f"{repo_id} on the hub", sizes))
    size = sum(sizes[name] for name in wanted)
    on_status(f"Downloading {repo_id} from the hub ({size / 1e6:,.0f} MB)")
    stop = threading.Event()
    bar = _bar(stop, size, on_bytes)
    try:
        return Path(
            _interruptible(
                lambda: snapshot_download(repo_id, allow_patterns=PATTERNS, tqdm_class=bar), stop
            )
        )
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise ModelNotFound(_explain_disk_full(repo_id, size)) from None


def _bar(stop: threading.Event, size: int, on_bytes: OnBytes | None) -> type:
    """A class that the hub's client makes its progress bars of: they end their downloads when
    `stop` is set, and tell `on_bytes` instead of people, if there is one."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args, **options):
            self._counts = options.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **options | ({"disable": True} if on_bytes else {}))

        def update(self, n=1):
            if stop.is_set():
                raise InterruptedError("the download was interrupted")
            if on_bytes and self._counts:
                with self.get_lock():
                    self.n += n or 0
                    on_bytes(min(int(self.n), size), size)
            return super().update(n)

    return Bar


def _interruptible(call: Callable[[], Any], stop: threading.Event) -> Any:
    """call(), in a thread: in this one, Ctrl-C would be heard when all its downloads have ended."""
    outcome: Future = Future()
    thread = _in_thread(call, outcome)
    try:
        return outcome.result()
    except KeyboardInterrupt:
        stop.set()
        thread.join(STOP_SECONDS)
        raise


def _file_sizes(repo_id: str) -> dict[str, int]:
    """Names and bytes of the repository's files; also the test of whether the hub answers."""
    from huggingface_hub import HfApi

    limit = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or ANSWER_SECONDS)
    info = _within(limit, lambda: HfApi().model_info(repo_id, files_metadata=True, timeout=limit))
    return {file.rfilename: file.size or 0 for file in info.siblings or []}


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """call(), or TimeoutError. In a thread, as looking up a host name has no time limit."""
    outcome: Future = Future()
    _in_thread(call, outcome)
    if not wait([outcome], timeout=seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return outcome.result()


def _in_thread(call: Callable[[], Any], outcome: Future) -> threading.Thread:
    def work():
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def repositories() -> dict[str, Path]:
    """The models that the hub's cache has anything of, whole or not: name -> folder."""
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).expanduser().glob(f"{_REPOSITORY}?*")
    return {f.name.removeprefix(_REPOSITORY).replace("--", "/"): f for f in folders if f.is_dir()}


def remove(repo_id: str) -> None:
    """Removes all that the hub's cache has of a model. Raises OSError if something stays."""
    # Its client removes by commits, and those of a duplicated repository are the same.
    shutil.rmtree(repositories()[repo_id])


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
