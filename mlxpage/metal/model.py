"""mlx-lm's models, unmodified, over a block pool."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import numpy as np

from mlxpage.errors import EngineError, InvalidModel, MlxpageError, UnsupportedModel
from mlxpage.metal import anatomy, reference, seam
from mlxpage.metal.backend import Device, device, mlx_lm_utils, mx
from mlxpage.metal.compiled import Compiled
from mlxpage.metal.kv_cache import KVCache
from mlxpage.metal.layout import LayerSpec, Rows, Shape, Spec, StateSpec


class Model:
    """One of mlx-lm's models, with its layers' K and V in a `KVCache`.

    Most take tokens as rows of length 1, so one forward serves prompt chunks and single tokens of
    any number of sequences. Others get a prompt's chunk along the length axis, in a forward of its
    own: their `shape` says so. Logits are made only for the rows that are sampled.
    """

    def __init__(self, module, config: dict[str, Any]):
        """`module` and `config` are what `mlx_lm.utils.load_model` returns."""
        self.module = module
        self.config = config
        self.family = config.get("model_type", type(module).__module__.rsplit(".", 1)[-1])
        anatomy.refuse_dynamic_rope(module, self.family)
        self.specs, self._nesting = anatomy.layer_specs(module, self.family)
        self.vocab_size, self.logits_dtype = anatomy.logits_of(module)
        self.context_length = anatomy.context_length(config)
        self.bind(None)
        self.fetches = False
        """Whether the model needs K and V as arrays: the self-check finds out."""
        self.shape = Shape.ROWS
        """How it takes a step's tokens: the self-check finds out."""
        self.why_not_rows: str | None = None
        """Why not each as a row of its own, if it's so."""
        self._wanted = _WantedRows()
        self._gathers_rows = _gather_rows_of_backbone(module, self._wanted)
        self._hooked: int | None = None
        seam.install()

    def quantise_cache(self, k_bits: int | None, v_bits: int | None) -> None:
        """Makes the next pools keep K and V in so many bits, 8 or 4; None: as they are.

        Raises UnsupportedModel for head sizes that can't be quantised, and if there are none.
        """
        self.specs = self.quantised_specs(k_bits, v_bits)

    def quantised_specs(self, k_bits: int | None, v_bits: int | None) -> list[Spec]:
        """The `specs` that `quantise_cache` makes, or its error."""
        if (k_bits or v_bits) and not self.kv_specs:
            raise UnsupportedModel(
                f"{self.family} keeps no K and V that could be quantised: leave kv_bits out"
            )
        return [spec.quantised(k_bits, v_bits) for spec in self.specs]

    @property
    def kv_specs(self) -> list[LayerSpec]:
        """Those of `specs` that are of K and V."""
        return [spec for spec in self.specs if isinstance(spec, LayerSpec)]

    @property
    def state_specs(self) -> list[StateSpec]:
        """Those of `specs` that are of states."""
        return [spec for spec in self.specs if isinstance(spec, StateSpec)]

    @property
    def num_layers(self) -> int:
        return len(getattr(self.module, "layers", self._nesting))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights."""
        return sum(p.nbytes for p in _arrays(self.module))

    @property
    def gathers_rows(self) -> bool:
        """Whether the head runs only for the sampled rows; else logits of all rows exist once."""
        return self._gathers_rows

    @property
    def not_compiled(self) -> str | None:
        """Why decode steps are built anew each time, if the model could not be compiled."""
        return self._compiled.error

    def take_steps(self, shape: Shape, fetches: bool) -> None:
        """Sets how, from now on. How many calls of attention reach the pool is open then."""
        self.shape, self.fetches = shape, fetches
        self._hooked = None

    def bind(self, cache: KVCache | None) -> None:
        self.cache = cache
        self._compiled = Compiled()

    def __call__(self, rows: Rows, before_waiting: Callable[[], None] | None = None) -> mx.array:
        """A step: writes the rows' K and V, returns the logits (R, vocab) of `sample_rows`.

        Lazy: the caller evaluates the logits together with `cache.written()`. But a GPU may have
        computed most of a large step by then: before it is waited for, `before_waiting` is called.
        """
        if self.shape is Shape.ROWS:
            return self._step(rows, before_waiting=before_waiting)
        self.cache.copy(rows.copies)
        together = rows.num_decoding if self.shape is Shape.CHUNKS else 0
        cuts = self._cuts(rows, together)
        logits = []
        for first, last in cuts:
            logits.append(self._step(rows.part(first, last), is_run=first >= together))
            # What still had to read a pool would make the next write copy it. In this order, new
            # states aren't kept for long.
            mx.eval(self.cache.written(), logits[-1])
        order = np.concatenate([rows.sampled_of(*cut) for cut in cuts])
        logits = mx.concatenate(logits)
        return logits if (np.diff(order) == 1).all() else logits[mx.array(np.argsort(order))]

    def _cuts(self, rows: Rows, together: int) -> list[tuple[int, int]]:
        """The sequences of each forward: of the first ones, with single rows, those whose contexts
        are about as long, for all get K and V as long as the longest's; the others, and those whose
        state isn't there yet or not complete, each by itself."""
        complete = max((spec.full_after for spec in self.state_specs), default=0)
        alone = int(np.searchsorted(rows.contexts[:together], complete, "right"))
        blocks = -(-rows.contexts[alone:together] // self.cache.block_size)
        if not self.kv_specs:
            blocks[:] = 0
        alike = [(alone + a, alone + b) for a, b, _ in reference.buckets(blocks, 1)]
        own = [*range(alone), *range(together, len(rows.contexts))]
        return sorted(alike + [(i, i + 1) for i in own])

    def _step(self, rows: Rows, **options) -> mx.array:
        """One forward; `options` are those of `KVCache.begin`."""
        self._check_tokens(rows.tokens)
        cache = self.cache
        cache.begin(rows, **options)
        try:
            return self._logits(rows)
        finally:
            cache.note_built()

    def _logits(self, rows: Rows) -> mx.array:
        # With nothing to sample the head gets the first row, and nobody evaluates its logits.
        wanted = rows.sample_rows if len(rows.sample_rows) else np.zeros(1, np.int32)
        every = len(wanted) == len(rows.positions) and (np.diff(wanted) == 1).all()
        tokens = rows.tokens if isinstance(rows.tokens, mx.array) else mx.array(rows.tokens)
        if every and len(rows.sample_rows) and self.cache.may_compile:
            return self._compiled(self._forward, self.cache, tokens)
        wanted = ... if every else mx.array(wanted)
        return self._forward(tokens, wanted)[: len(rows.sample_rows)]

    def _check_tokens(self, tokens: np.ndarray | mx.array) -> None:
        """Of those that Python has; others come from the model's own logits."""
        if not isinstance(tokens, np.ndarray):
            return
        if not 0 <= tokens.min() <= tokens.max() < self.vocab_size:
            raise IndexError(
                f"token ids {tokens.min()} to {tokens.max()} of a vocabulary of {self.vocab_size}"
            )

    def _forward(self, tokens: mx.array, wanted: mx.array | EllipsisType = ...) -> mx.array:
        """Logits (R, vocab) of the wanted rows, all of them by default."""
        before = self._num_attended()
        self._wanted.rows = wanted
        self._wanted.of_run = self.cache.is_run
        try:
            is_run = self.cache.is_run
            logits = self.module(
                tokens[None] if is_run else tokens[:, None],
                cache=anatomy.nested([layer.seen for layer in self.cache.layers], self._nesting),
            )
            self.cache.end(logits if self._wanted.hidden is None else self._wanted.hidden)
            if not self._gathers_rows:
                logits = (logits.swapaxes(0, 1) if is_run else logits)[self._wanted.rows]
        finally:
            self._wanted.rows = self._wanted.hidden = None
        if self.shape is Shape.ROWS:
            self._check_hooked(self._num_attended() - before)
        return logits[:, -1]

    def _num_attended(self) -> int:
        return sum(layer.num_attended for layer in self.cache.layers)

    def _check_hooked(self, calls: int) -> None:
        if self._hooked is None:
            self._hooked = calls
        elif calls != self._hooked:
            raise EngineError(
                f"{calls} of {self._hooked} attention calls reached the block pool. Something in "
                "this process has replaced mx.fast.scaled_dot_product_attention; load the model "
                "again after it, or don't use both in one process."
            )


def load(
    folder: Path,
    *,
    adapter: Path | None = None,
    dtype: str | None = None,
    weights: bool = True,
    on_bytes: Callable[[int, int], None] | None = None,
    machine: Device | None = None,
) -> Model:
    """Loads an mlx-lm model folder.

    Args:
        folder: with config.json and *.safetensors, already checked.
        adapter: a folder of mlx-lm's training, checked too: LoRA, DoRA or all weights.
        dtype: "float32", "float16" or "bfloat16" for all floating-point weights. None takes them
            as stored; on a CPU, where MLX multiplies only float32 fast, it means float32.
        weights: False leaves the arrays unread, for a look at the shapes.
        on_bytes: called with the bytes loaded so far and in all.
        machine: the one whose dtype it takes; None: this one.

    Raises:
        InvalidModel: the weights don't fit the architecture, or the adapter the model, or they
            can't be read.
        UnsupportedModel: mlx-lm doesn't know the architecture, or it can't be paged.
    """
    try:
        module, config = mlx_lm_utils().load_model(folder, lazy=True)
        if adapter is not None:
            _adapt(module, adapter)
        if dtype is None and (machine or device()).kind == "cpu":
            dtype = "float32"
        if dtype is not None:
            module.set_dtype(getattr(mx, dtype))
        if weights:
            _evaluate(module, on_bytes)
    except (MlxpageError, MemoryError):
        raise
    except (Exception, SystemExit) as error:  # mlx-lm raises whatever its model code raises
        raise _explained(error, folder) from error
    try:
        return Model(module, config)
    except (MlxpageError, MemoryError):
        raise
    except Exception as error:
        family = config.get("model_type")
        raise UnsupportedModel(f"mlx-lm can't run {family} here: {_reason(error)}") from error


def _adapt(module, adapter: Path) -> None:
    try:
        mlx_lm_utils().load_adapters(module, str(adapter))
    except MemoryError:
        raise
    except Exception as error:
        what = f"the adapter in {adapter} doesn't fit the model"
        raise InvalidModel(f"{what}: {_reason(error)}") from error
    module.eval()  # its dropout is for training


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _explained(error: BaseException, folder: Path) -> InvalidModel:
    reason = _reason(error)
    family = json.loads((folder / "config.json").read_text()).get("model_type")
    if isinstance(error, SystemExit):  # a package is missing, and what it is was printed
        return UnsupportedModel(f"mlx-lm's module of {family} ends the process here ({folder})")
    if isinstance(error, ValueError) and "not supported" in reason:
        return UnsupportedModel(f"mlx-lm has no model of type {family!r} ({folder})")
    return InvalidModel(f"{folder} can't be loaded: {reason}")


def _evaluate(module, on_bytes: Callable[[int, int], None] | None) -> None:
    """Reads the weights array by array: no command buffer grows with the size of the model."""
    arrays = list(_arrays(module))
    total = sum(array.nbytes for array in arrays)
    done = 0
    for array in arrays:
        mx.eval(array)
        done += array.nbytes
        if on_bytes:
            on_bytes(done, total)


def _arrays(module) -> Iterator[mx.array]:
    from mlx.utils import tree_flatten

    return (array for _, array in tree_flatten(module.parameters()))


# -- rows --


@dataclass(slots=True)
class _WantedRows:
    """What a backbone knows of its Model: with the Model itself, weights and pool would hold each
    other until Python's collector ran."""

    rows: mx.array | EllipsisType | None = None
    of_run: bool = False
    """Whether rows lie along the length axis."""
    hidden: mx.array | None = None
    """What the backbone gave, of all rows: it comes after all of the layers' reads."""


def _gather_rows_of_backbone(module, wanted: _WantedRows) -> bool:
    """Makes the backbone return only the rows that `wanted` names, if it names any.

    The backbone is the outermost submodule that owns the layers; what follows it is the head. Its
    class is swapped for a subclass, because Python looks `__call__` up there; attributes,
    parameter names and `isinstance` stay as they were. False if the model isn't built that way,
    which a lazy forward of two rows tells.
    """
    owners = [
        (name.count("."), submodule)
        for name, submodule in module.named_modules()
        if name and any(key in submodule for key in ("layers", "h", "blocks"))
    ]
    if not owners:
        return False
    backbone = min(owners, key=lambda owner: owner[0])[1]
    original = type(backbone)

    def __call__(self, *args, **kwargs):  # noqa: N807
        hidden = original.__call__(self, *args, **kwargs)
        if wanted.rows is None or not isinstance(hidden, mx.array):
            return hidden
        wanted.hidden = hidden
        return (hidden.swapaxes(0, 1) if wanted.of_run else hidden)[wanted.rows]

    backbone.__class__ = type(original.__name__, (original,), {"__call__": __call__})
    wanted.rows = mx.zeros(1, mx.int32)
    logits = module(mx.zeros((2, 1), mx.int32))
    wanted.rows = wanted.hidden = None
    if len(logits) == 1:
        return True
    backbone.__class__ = original
    return False
