"""The headers that every kernel is compiled with: the stand-in for metal_stdlib and MLX's own.

MLX puts its ``utils.h`` in front of a custom kernel. It is read from the installed MLX and goes
through the same rewriting as kernels do, once per version of MLX; then both compilers keep it
parsed.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
from pathlib import Path

from .errors import SimulatorError
from .rewrite import rewrite
from .toolchain import cache, cached, digest, find, libclang, mlx_headers, run

HERE = Path(__file__).parent
UTILS = "mlx/backend/metal/kernels/utils.h"
PREAMBLE = f'#include "{UTILS}"\n'
# Lines of MLX's headers are numbered from here on, so that a line number tells whose it is.
FIRST_MLX_LINE = 500_000

LANGUAGE = [
    *("-x", "cl", "-cl-std=clc++2021"),
    *("-Xclang", "-cl-ext=-all,+cl_khr_fp16,+__opencl_c_generic_address_space"),
    *("-cl-single-precision-constant", "-cl-no-stdinc", "-nostdinc"),
    *("-fno-color-diagnostics", "-fno-caret-diagnostics"),
    *("-Wno-unknown-attributes", "-Wno-ignored-attributes", "-Wno-unknown-pragmas"),
    *("-Wno-pass-failed", "-Wno-unused-value"),
]


@functools.cache
def own_files() -> bytes:
    """All that decides what becomes of a kernel, besides its text and the compiler."""
    paths = [path for path in sorted(HERE.rglob("*")) if path.suffix in ("", ".c", ".h", ".py")]
    return b"\0".join(
        path.name.encode() + b"\0" + path.read_bytes() for path in paths if path.is_file()
    )


@functools.cache
def folder() -> Path:
    """The include folder. In the cache: parsed headers are good as long as no date changes."""
    texts = _mlx_texts()
    key = digest(own_files(), *(f"{path}\0{text}" for path, text in texts.items()))
    target = cache() / f"include-{key}"
    if target.exists():
        return target
    partial = Path(tempfile.mkdtemp(dir=cache(), prefix="partial-"))
    shutil.copytree(HERE / "include", partial, dirs_exist_ok=True)
    for path, text in texts.items():
        copy = partial / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(f'#line {FIRST_MLX_LINE} "{path}"\n{rewrite(text).text}')
    (partial / "preamble.h").write_text(PREAMBLE)
    try:
        os.rename(partial, target)
    except OSError:  # another process was quicker
        shutil.rmtree(partial)
    return target


def _mlx_texts() -> dict[str, str]:
    """MLX's utils.h and what it includes of MLX, by path."""
    texts: dict[str, str] = {}
    todo = [UTILS]
    while todo:
        path = todo.pop()
        if path not in texts:
            texts[path] = (mlx_headers() / path).read_text()
            todo += re.findall(r'^#include "(mlx/[^"]+)"', texts[path], re.MULTILINE)
    return texts


def includes() -> list[str]:
    return ["-I", str(folder())]


def compiled_with(flags: list[str]) -> list[str]:
    """Arguments for clang that put the preamble, parsed with these flags, before a kernel."""
    key = digest(_identity(), find().version, *flags)

    def make(path: Path) -> None:
        command = [*find().clang, *LANGUAGE, *includes(), *flags]
        run([*command, "-c", "-Xclang", "-emit-pch", "-o", str(path), str(_preamble())])

    pch = cached(f"{key}.pch", make)
    return ["-Xclang", "-include-pch", "-Xclang", str(pch)]


def checked_with(flags: list[str]) -> list[str]:
    """The same for libclang, which reads only what itself has written."""
    cindex = libclang()
    key = digest(_identity(), str(cindex.conf.get_filename()), *flags)

    def make(path: Path) -> None:
        arguments = [*LANGUAGE, *includes(), *flags]
        options = cindex.TranslationUnit.PARSE_INCOMPLETE
        unit = cindex.Index.create().parse(str(_preamble()), args=arguments, options=options)
        if errors := [d.format() for d in unit.diagnostics if d.severity >= d.Error]:
            raise SimulatorError("MLX's headers didn't parse:\n" + "\n".join(errors))
        unit.save(str(path))

    return ["-include-pch", str(cached(f"{key}.ast", make))]


def _preamble() -> Path:
    return folder() / "preamble.h"


def _identity() -> str:
    """Of the include folder, as a compiler sees it: with the dates."""
    return f"{folder()} {_preamble().stat().st_mtime_ns}"
