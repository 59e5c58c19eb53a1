"""Compiles a kernel for the CPU, once per content."""

from __future__ import annotations

import functools
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import headers, static_check
from .errors import SimulatorError
from .rewrite import VECTORS, rewrite
from .text import KernelText, Parameter, parameters
from .toolchain import cached, digest, find, run

# The values of attribute parameters: three numbers of `struct positions` in runtime.c each, or one.
_THREE = (
    "threads_per_grid",
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threadgroups_per_grid",
    "threads_per_threadgroup",
    "dispatch_threads_per_threadgroup",
)
_ONE = (
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
)
_DERIVED = {
    "grid_size": ("threads_per_grid", None),
    "threads_per_simdgroup": (None, "32u"),
    "thread_execution_width": (None, "32u"),
    "thread_index_in_quadgroup": (None, "p->thread_index_in_simdgroup % 4"),
    "quadgroup_index_in_threadgroup": (None, "p->thread_index_in_threadgroup / 4"),
    "dispatch_simdgroups_per_threadgroup": (
        None,
        "(p->dispatch_threads_per_threadgroup[0] * p->dispatch_threads_per_threadgroup[1]"
        " * p->dispatch_threads_per_threadgroup[2] + 31) / 32",
    ),
}

_LAUNCHER = f"""
#line 1 "launcher"
struct __sim_positions {{ uint {", ".join(f"{name}[3]" for name in _THREE)}, {", ".join(_ONE)}; }};
struct __sim_argument {{
  ulong address;
  template <class T> operator device T*() const {{ return (device T*)address; }}
  template <class T> operator constant T*() const {{ return (constant T*)address; }}
  template <class T> operator device T&() const {{ return *(device T*)address; }}
  template <class T> operator constant T&() const {{ return *(constant T*)address; }}
}};
extern "C" SIM_UNCHECKED void __sim_entry(
    const thread ulong* arguments, const thread __sim_positions* p) {{
  %s(%s);
}}
"""

_FLAGS = ["-gdwarf-4", "-gline-tables-only", "-fPIC", "-ffp-contract=off"]
_CHECKED = [
    *("-O1", "-fno-vectorize", "-fno-slp-vectorize", "-fno-unroll-loops"),
    *("-fsanitize=thread", "-mllvm", "-tsan-instrument-read-before-write=1"),
    # The same call in two branches stays two: where it returns to is what tells them apart.
    *("-mllvm", "-enable-tail-merge=false"),
    "-fsanitize=signed-integer-overflow,integer-divide-by-zero,bounds,alignment",
    # What nobody has set is NaN, or an absurd number.
    "-ftrivial-auto-var-init=pattern",
]
_UNCHECKED = ["-O2"]


@dataclass(frozen=True)
class Program:
    """A kernel, ready to be loaded."""

    text: KernelText
    parameters: tuple[Parameter, ...]
    library: Path
    statement_lines: tuple[int, ...]
    checked: bool


def build(
    text: KernelText,
    kernel: str,
    *,
    template: str = "",
    constants: Mapping[str, object] | None = None,
    checked: bool = True,
) -> Program:
    """Checks and compiles ``kernel`` of the text.

    ``template`` are its template arguments as text, ``<float, 64>``; ``constants`` the values of
    the function constants, by name.
    """
    rewritten = rewrite(text.text, dict(constants or {}))
    found = parameters(text.text, kernel)
    arguments = ", ".join(_argument(parameter) for parameter in found)
    launcher = _LAUNCHER % (kernel + template, arguments)
    marked = static_check.check(text, rewritten, launcher)
    source = f'#line 1 "kernel"\n{marked.text}{launcher}'
    return Program(
        text=text,
        parameters=tuple(found),
        library=_compile(source, _flags(checked)),
        statement_lines=marked.statement_lines,
        checked=checked,
    )


def _argument(parameter: Parameter) -> str:
    """The expression that the launcher passes for a parameter."""
    if parameter.attribute == "buffer":
        return f"__sim_argument{{arguments[{parameter.index}]}}"
    name, expression = _DERIVED.get(parameter.attribute, (parameter.attribute, None))
    kind = parameter.type[-1]
    if name in _THREE:
        if kind not in VECTORS:
            return f"({kind})p->{name}[0]"
        scalar, size = kind[:-1], int(kind[-1])
        values = ", ".join(f"({scalar})p->{name}[{i}]" for i in range(size))
        return f"metal::__sim_make<{kind}>({values})"
    if name in _ONE:
        expression = f"p->{name}"
    if expression is None:
        raise SimulatorError(f"The attribute [[{parameter.attribute}]] isn't simulated.")
    return f"({kind})({expression})"


@functools.cache
def _flags(checked: bool) -> list[str]:
    return [*_FLAGS, *_machine_flags(), *(_CHECKED if checked else _UNCHECKED)]


def _machine_flags() -> list[str]:
    """half is a type of the CPU's, not of a support library's."""
    return ["-mf16c", "-mfma"] if platform.machine() == "x86_64" else []


def _compile(source: str, flags: list[str]) -> Path:
    key = digest(str(headers.folder()), find().version, source, *flags)
    return cached(f"{key}.so", lambda path: _make_library(path, source, flags))


def _make_library(path: Path, source: str, flags: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        text, compiled = Path(folder) / "kernel.cl", Path(folder) / "kernel.o"
        text.write_text(source)
        command = [*find().clang, *headers.LANGUAGE, *headers.includes(), *flags, "-w"]
        command += headers.compiled_with([*flags, "-w"])
        run([*command, "-c", str(text), "-o", str(compiled)])
        run([*find().link, str(compiled), "-o", str(path)])


@functools.cache
def runtime() -> Path:
    """runtime.c as a shared object."""
    key = digest(headers.own_files(), find().version, "runtime")
    return cached(f"{key}.so", _make_runtime)


def _make_runtime(path: Path) -> None:
    source = headers.HERE / "runtime.c"
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "runtime.o"
        flags = ["-O2", "-fPIC", "-std=gnu11"]
        run([*find().compile_c, *flags, "-c", str(source), "-o", str(compiled)])
        run([*find().link, str(compiled), "-o", str(path)])
