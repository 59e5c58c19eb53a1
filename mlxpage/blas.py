"""A fast BLAS under MLX's CPU build.

MLX's Linux wheel for the CPU bundles the reference BLAS: 2-4 GFLOP/s for a float32 product, however
many rows it has, so batching gains nothing. OpenBLAS or MKL in the process's global scope takes its
place, symbol by symbol, and gives 60-180 GFLOP/s on two cores. bfloat16, float16 and quantised
products don't go through BLAS and stay slow.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path


@cache
def load() -> str | None:
    """Load OpenBLAS or MKL for MLX's CPU build; return the path of the library that serves, if any.

    Call it before the first import of ``mlx.core``. Python binds all symbols of an extension when
    it loads it, so once ``mlx.core`` is there a library loaded later changes nothing: then this
    loads nothing and only reports what the host app or LD_PRELOAD has put into the global scope.

    Loads nothing either on macOS, where MLX uses Accelerate, beside MLX's CUDA build, and with
    MLXPAGE_BLAS=off. OPENBLAS_NUM_THREADS and MKL_NUM_THREADS count as usual. NumPy keeps its own
    OpenBLAS, whose symbols have other names.
    """
    if sys.platform != "linux" or not _mlx_runs_on_the_cpu():
        return None
    present = _provider()
    if present or "mlx.core" in sys.modules or os.environ.get("MLXPAGE_BLAS") == "off":
        return present
    for library in _candidates():
        try:
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if path := _provider():
            return path
    return None


def _mlx_runs_on_the_cpu() -> bool:
    """Whether an MLX is installed that isn't the one for CUDA, which needs a GPU to be imported."""
    spec = importlib.util.find_spec("mlx")
    if spec is None or spec.submodule_search_locations is None:
        return False
    # Not importlib.metadata: importing that takes longer than all the rest.
    folders = (Path(location).parent for location in spec.submodule_search_locations)
    return not any(list(folder.glob("mlx_cuda*.dist-info")) for folder in folders)


def _candidates() -> Iterator[str]:
    yield "libopenblasp.so.0"  # Fedora's threaded build; libopenblas.so.0 has one thread there
    yield "libopenblas.so.0"
    lib = Path(sys.prefix, "lib")  # where conda's OpenBLAS and PyPI's MKL are installed
    yield str(lib / "libopenblas.so.0")
    yield from sorted(map(str, lib.glob("libmkl_rt.so.*")), reverse=True)


class _SymbolInfo(ctypes.Structure):
    """Dl_info of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _provider() -> str | None:
    """The library whose cblas_sgemm the next extension to be loaded gets, None for its own one."""
    process = ctypes.CDLL(None)
    info = _SymbolInfo()
    try:
        found = process.dladdr(process.cblas_sgemm, ctypes.byref(info))
    except AttributeError:
        return None
    return os.fsdecode(info.file) if found else None
