"""Which backend serves a model: the kernels, where there is a GPU and they prove right, or else the
reference."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from mlxpage.errors import InvalidRequest, UnsupportedModel
from mlxpage.metal import kernels, reference, self_check
from mlxpage.metal.backend import device
from mlxpage.metal.layout import Shape
from mlxpage.metal.model import Model

NAMES = ("metal", "cuda", "reference")


@dataclass(frozen=True, slots=True)
class Backend:
    """What computes attention, and why."""

    name: str  # one of NAMES
    ops: ModuleType  # `kernels` or `reference`
    why: str


REFERENCE = Backend("reference", reference, "asked for")


def wanted(name: str | None = None) -> Backend:
    """The backend that `name`, else MLXPAGE_BACKEND, else the machine asks for.

    Raises InvalidRequest for a name that doesn't exist, or that this machine has no GPU for.
    """
    source = "backend"
    if name is None and (name := os.environ.get("MLXPAGE_BACKEND") or None):
        source = "MLXPAGE_BACKEND"
    here = device().kind
    if name is None:
        if here == "cpu":
            return Backend("reference", reference, "there is no GPU")
        return Backend(here, kernels, "this machine's GPU")
    if name not in NAMES:
        raise InvalidRequest(f"{source} is {name!r:.80}; it must be one of {', '.join(NAMES)}")
    if name == "reference":
        return Backend(name, reference, f"{source} says so")
    if name != here:
        raise InvalidRequest(
            f"{source} is {name!r}; this machine computes on {here}: "
            "leave it out, or take reference"
        )
    return Backend(name, kernels, f"{source} says so")


def proven(backend: Backend, prove: Callable[[], None]) -> Backend:
    """`backend`, after `prove` has run its kernels; the reference instead if that raises."""
    if backend.ops is reference:
        return backend
    try:
        prove()
    except Exception as error:  # whatever a compiler or a GPU has to say
        reason = " ".join(str(error).split())[:300]
        return Backend("reference", reference, f"the {backend.name} kernels failed: {reason}")
    return Backend(backend.name, kernels, f"{backend.why}; the kernels passed their check")


def why_no_kernels(model: Model) -> str | None:
    """Why the reference serves a model on a GPU too, by what its layers keep. That it doesn't take
    tokens as rows is another reason."""
    if model.state_specs:
        return f"{model.family} keeps states, which no kernel updates yet"
    if not all(spec.v_head_dim for spec in model.kv_specs):
        return f"{model.family} keeps K without V, which no kernel writes yet"
    return None


def checked(
    model: Model, block_size: int, name: str | None, on_status: Callable[[str], None] | None
) -> Backend:
    """The backend that serves `model`, after it has proved itself on the model's own shapes.

    Kernels that fail to compile, or don't compute what the reference does, are told once, and the
    reference serves. Raises what `self_check.check` does if that fails too.
    """

    def prove() -> None:
        if reason := why_no_kernels(model):
            raise UnsupportedModel(reason)
        self_check.check(model, block_size, backend=kernels)
        if model.shape is not Shape.ROWS:
            raise UnsupportedModel(model.why_not_rows)
        self_check.check_kernels(model, block_size)
        if model.fetches:
            self_check.check_kernels(model, block_size, is_read=True)

    asked = wanted(name)
    backend = proven(asked, prove)
    if backend.ops is reference:
        self_check.check(model, block_size)
        if asked.ops is not reference:
            tell = on_status or (lambda line: warnings.warn(line, RuntimeWarning, stacklevel=2))
            tell(f"{backend.why}. The reference backend serves instead, slower.")
    return backend
