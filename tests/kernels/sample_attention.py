"""A kernel to try the simulator on: paged attention, small and plain, with a reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

BODY = (Path(__file__).parent / "sample_attention.metal").read_text()
HEADS, KV_HEADS, DIM, PAGE_SIZE, PAGES = 4, 2, 64, 16, 4
SIMDGROUPS = 8


def line_of(text: str, body: str = BODY) -> int:
    """The line of the kernel's text that begins so."""
    lines = [line.strip() for line in body.split("\n")]
    return next(i for i, line in enumerate(lines, 1) if line.startswith(text))


@dataclass
class Case:
    """Two sequences, one of them as long as its table allows."""

    dtype: mx.Dtype = mx.float32

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)

        def normal(*shape: int) -> mx.array:
            return mx.array(rng.standard_normal(shape, np.float32)).astype(self.dtype)

        self.queries = normal(2, HEADS, DIM)
        self.keys = normal(2 * PAGES, KV_HEADS, PAGE_SIZE, DIM)
        self.values = normal(2 * PAGES, KV_HEADS, PAGE_SIZE, DIM)
        self.tables = mx.array(rng.permutation(2 * PAGES).reshape(2, PAGES).astype(np.int32))
        self.lengths = mx.array([PAGES * PAGE_SIZE, 27], mx.int32)
        self.scale = mx.array([DIM**-0.5], mx.float32)

    def run(self, body: str = BODY) -> mx.array:
        kernel = mx.fast.metal_kernel(
            name="sample_attention",
            input_names=["queries", "kcache", "vcache", "tables", "lens", "scale"],
            output_names=["out"],
            source=body,
        )
        template = [
            ("T", self.dtype),
            *(("D", DIM), ("EPT", DIM // 32), ("NH", HEADS), ("HK", KV_HEADS)),
            *(("GQA", HEADS // KV_HEADS), ("PS", PAGE_SIZE), ("MAXP", PAGES), ("NSG", SIMDGROUPS)),
        ]
        (out,) = kernel(
            inputs=[
                *(self.queries, self.keys, self.values),
                *(self.tables, self.lengths, self.scale),
            ],
            template=template,
            grid=(HEADS * SIMDGROUPS * 32, 2, 1),
            threadgroup=(SIMDGROUPS * 32, 1, 1),
            output_shapes=[self.queries.shape],
            output_dtypes=[self.dtype],
        )
        return out

    def expected(self) -> mx.array:
        rows = []
        for query, table, length in zip(
            self.queries, self.tables, self.lengths.tolist(), strict=True
        ):
            keys, values = (
                pool[table].transpose(1, 0, 2, 3).reshape(KV_HEADS, -1, DIM)[None, :, :length]
                for pool in (self.keys.astype(mx.float32), self.values.astype(mx.float32))
            )
            attended = mx.fast.scaled_dot_product_attention(
                query[None, :, None].astype(mx.float32), keys, values, scale=self.scale.item()
            )
            rows.append(attended[0, :, 0])
        return mx.stack(rows)

    def error(self, out: mx.array) -> float:
        return mx.abs(out.astype(mx.float32) - self.expected()).max().item()
