"""Blocks that only the kernels write and read, and a step over them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mlxpage.metal import layout, reference
from mlxpage.metal.backend import mx
from mlxpage.metal.kernels.attention import paged_attention
from mlxpage.metal.kernels.chunks import Chunk, attend_chunk, plan_chunks
from mlxpage.metal.kernels.latent import latent_attention
from mlxpage.metal.kernels.launch import LEAST, padded
from mlxpage.metal.kernels.moving import copy_blocks, gather, write
from mlxpage.metal.kernels.upload import upload
from mlxpage.metal.kernels.work import RunCost, Work, latent_cost, plan_work, run_cost
from mlxpage.metal.layout import Attention, Blocks, LayerSpec, PoolKind

LOOK_AHEAD = 1
COMPILES = True
_TABLE_WIDTH = 32


class Step(layout.Step):
    """The metadata that the kernels take, made once for all layers of a cache group."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        # A compiled function is good for one width.
        more = -self.tables.shape[1] % _TABLE_WIDTH
        self.tables = np.pad(self.tables, [(0, 0), (0, more)])
        self._slots: dict[int, mx.array] = {}
        self._work: dict[tuple, Work] = {}
        self._chunks: dict[tuple, list[Chunk]] = {}
        self._fetched_lengths: mx.array | None = None
        self.run_length: int | None = None
        """As in `plan_work`; the self-check cuts where a plan wouldn't."""
        self.is_traced = False
        """While a function is compiled: metadata made now would stay what it is."""

    @property
    def positions(self) -> mx.array:
        if self._positions is None:
            self._take_positions(*upload(self.rows.positions))
        return self._positions

    def _take_positions(self, padded: mx.array) -> None:
        self._positions = padded[: len(self.rows.positions)]

    @property
    def fetched_lengths(self) -> mx.array:
        """(T or 1, or more,) positions that each row, or a run, may read without a window."""
        if self._fetched_lengths is None:
            ends = self.rows.contexts if self.is_run else self.rows.positions + 1
            self._fetched_lengths = padded(ends)
        return self._fetched_lengths

    def slots(self, first: int) -> mx.array:
        """(T - first or more,) where the rows from `first` on are written to."""
        if first not in self._slots:
            self._refuse_when_traced("rows are written otherwise than they were before")
            blocks, positions = self.write_blocks[first:], self.rows.positions[first:]
            slots = blocks * self.block_size + positions % self.block_size
            (self._slots[first],) = upload(slots.astype(np.int32))
        return self._slots[first]

    def prepare(self, kind: PoolKind, attention: Attention) -> None:
        """Makes the metadata that layers with such pools will take, which attend so."""
        cost = latent_cost if attention.is_latent else run_cost
        self.work(attention.window, cost(kind, attention.heads))
        if not _may_append(kind):
            self.slots(0)

    def signature(self) -> tuple:
        """What is fixed in a compiled forward."""
        tables = self.tables.shape
        return tables, *self._slots, *((key, work[:4]) for key, work in self._work.items())

    def inputs(self) -> list[mx.array]:
        works = self._work.values()
        return [*self._slots.values(), *(a for w in works for a in (*w.inputs, *w.merge_inputs))]

    def put(self, inputs: Iterator[mx.array]) -> None:
        """Puts others in the place of `inputs`."""
        for first in self._slots:
            self._slots[first] = next(inputs)
        for key, work in self._work.items():
            self._work[key] = work._replace(
                inputs=[next(inputs) for _ in work.inputs],
                merge_inputs=[next(inputs) for _ in work.merge_inputs],
            )

    def work(self, window: int | None, cost: RunCost) -> Work:
        """Of the sequences with a single row."""
        key = window, cost
        if key not in self._work:
            self._refuse_when_traced("a layer attends otherwise than it did before")
            count, rows = self.rows.num_decoding, self.rows
            self._work[key] = work = plan_work(
                rows.starts[: count + 1],
                rows.contexts[:count],
                self.tables[:count],
                self.block_size,
                *key,
                self.run_length,
                beside=(rows.positions,) if self._positions is None else (),
            )
            if work.beside:
                self._take_positions(*work.beside)
        return self._work[key]

    def _refuse_when_traced(self, why: str) -> None:
        if self.is_traced:
            raise RuntimeError(why)

    def chunks(self, window: int | None, most_scores: int) -> list[Chunk]:
        """Of the others."""
        key = window, most_scores
        if key not in self._chunks:
            count, rows = self.rows.num_decoding, self.rows
            self._chunks[key] = plan_chunks(
                rows.starts[count:],
                rows.contexts[count:],
                self.tables[count:],
                self.block_size,
                window,
                most_scores,
            )
        return self._chunks[key]


class Pool(layout.Pool):
    """The blocks of one layer, which only the kernels write and read."""

    def __init__(self, spec: LayerSpec, num_blocks: int, block_size: int):
        super().__init__(spec, num_blocks, block_size)
        self.fence = mx.zeros(LEAST, mx.int32)
        self._new: tuple[mx.array, mx.array] | None = None

    def fill(self, k: mx.array, v: mx.array) -> None:
        super().fill(k, v)
        self._blocks = Blocks(as_input(k), as_input(v), self.kind)

    def arrays(self) -> list[mx.array]:
        return [self.k, self.v, self.fence]

    def inputs(self) -> list[mx.array]:
        """What the kernels take of it, in a compiled forward."""
        return [self._blocks.k, self._blocks.v]

    def put(self, inputs: Iterator[mx.array]) -> None:
        """Puts others in the place of `inputs`."""
        self._blocks = Blocks(next(inputs), next(inputs), self.kind)
        self._new = None

    def written(self) -> list[mx.array]:
        """What has to be evaluated in every step, so that its writes take place."""
        return [self.fence]

    def write(
        self, step: Step, k: mx.array, v: mx.array, after: mx.array | None, *, is_read: bool
    ) -> None:
        """k and v: (T, kv_heads, 1, head_dim). If they may be, those of single rows are written by
        their own attention, a launch less; not if the model reads them as arrays, `is_read`."""
        # Norms in float32 make such K of models whose V has 16 bits.
        k, v = k.astype(self.kind.k.dtype), v.astype(self.kind.v.dtype)
        appended = step.rows.num_decoding if _may_append(self.kind) and not is_read else 0
        self._new = (k[:appended], v[:appended]) if appended else None
        self.fence = self.fence if after is None else after
        if appended < len(k):
            k, v = k[appended:], v[appended:]
            self.fence = write(k, v, self._blocks, step.slots(appended), self.fence)

    def copy(self, pairs: np.ndarray, after: mx.array | None) -> mx.array:
        """Copies blocks (C, 2), in order, after `after`; returns what comes after it."""
        fence = self.fence if after is None else after
        for independent in _independent(pairs.tolist()):
            fence = copy_blocks(self._blocks, np.array(independent, np.int32), fence)
        self.fence = fence
        return fence

    def load(
        self, blocks: np.ndarray, contents: list[mx.array], after: mx.array | None
    ) -> mx.array:
        """Makes K and V `contents` what `blocks` (B,) hold, after `after`; returns what comes
        after it."""
        pairs = np.stack([np.arange(len(blocks)), blocks], axis=1).astype(np.int32)
        fence = self.fence if after is None else after
        self.fence = copy_blocks(self._blocks, pairs, fence, Blocks(*contents, self.kind))
        return self.fence

    def fetch(self, step: Step) -> tuple[mx.array, mx.array]:
        """K and V as each row, or all of a run, may read them: (T or 1, kv_heads, positions,
        head_dim)."""
        tables = step.fetched_tables
        shape = (*tables.shape, step.num_fetched)
        return gather(self._blocks, tables, step.fetched_lengths, shape, self.fence)

    def attend(self, step: Step, q: mx.array, window: int | None, scale: float, sinks) -> mx.array:
        """q (T, heads, 1, k_dim) -> (T, heads, 1, v_dim)"""
        # The type of the results too, as MLX has it.
        q = q.astype(mx.result_type(q.dtype, self.kind.k.dtype))
        heads, options = q.shape[1], {"scale": scale, "sinks": sinks}

        def decode(rows: slice, written: mx.array):
            work = step.work(window, run_cost(self.kind, heads))
            return paged_attention(q[rows], self._blocks, work, written, new=self._new, **options)

        def attend(chunk: Chunk, written: mx.array):
            return attend_chunk(q[chunk.rows], self._blocks, chunk, written, **options)

        return self._attended(step, len(q), window, heads, decode, attend)

    def attend_latent(self, step: Step, q: mx.array, q_v: mx.array, scale: float) -> mx.array:
        """q (T, heads, 1, k_dim) and q_v (T, heads, 1, v_dim) -> (T, heads, 1, k_dim)"""
        dtype = mx.result_type(q.dtype, self.kind.k.dtype)
        q, q_v, heads = q.astype(dtype), q_v.astype(dtype), q.shape[1]

        def decode(rows: slice, written: mx.array):
            work = step.work(None, latent_cost(self.kind, heads))
            return latent_attention(q[rows], q_v[rows], self._blocks, work, written, scale=scale)

        def attend(chunk: Chunk, written: mx.array):
            rows, options = chunk.rows, {"scale": scale, "q_v": q_v[chunk.rows]}
            return attend_chunk(q[rows], self._blocks, chunk, written, **options)

        return self._attended(step, len(q), None, heads, decode, attend)

    def _attended(self, step: Step, rows: int, window, heads: int, decode, attend) -> mx.array:
        """The single rows in one launch, and then each chunk: all read what is `written` now."""
        decoding, written = step.rows.num_decoding, self.fence
        outs = []
        if decoding:
            out, self.fence = decode(slice(decoding), written)
            self._new = None
            outs.append(out)
        if decoding < rows:
            chunks = step.chunks(window, self._most_scores(heads))
            outs += [attend(chunk, written) for chunk in chunks]
        return outs[0] if len(outs) == 1 else mx.concatenate(outs)

    def _most_scores(self, heads: int) -> int:
        k, v = self.kind.k, self.kind.v
        is_fused = k.dtype.size == 2 and k.head_dim == v.head_dim in (64, 80, 128)
        return 2**40 if is_fused else max(1, reference.MAX_SCORES // heads)


def _may_append(kind: PoolKind) -> bool:
    """Whether rows may be written by their own attention."""
    return not (kind.is_quantised or kind.may_be_latent)


def _independent(pairs: list[list[int]]) -> list[list[list[int]]]:
    """Cuts copies into runs in which no block is both a source and a target."""
    runs: list[list[list[int]]] = [[]]
    touched: set[int] = set()
    for source, target in pairs:
        if target in touched or source in {done for _, done in runs[-1]}:
            runs.append([])
            touched = set()
        runs[-1].append([source, target])
        touched |= {source, target}
    return runs


def as_input(pool: mx.array) -> mx.array:
    """A pool's first block, which kernels read and write beyond: they take an address.

    MLX ends a command buffer after so many million elements of inputs, and would count whole
    pools, of which a step reads little. The view has to be contiguous: MLX would copy another, and
    the kernels would write into the copy.
    """
    return pool[:1]
