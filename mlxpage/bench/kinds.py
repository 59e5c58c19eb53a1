"""How the results of each benchmark are shown, compared and drawn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Column:
    """Of a table: a key of a row's `case` or `metrics`."""

    title: str
    key: str
    form: str = ""
    """As in `format`."""


@dataclass(frozen=True, slots=True)
class Kind:
    columns: tuple[Column, ...]
    main: str
    """The metric that drift is told of."""
    better: dict[str, Better]
    """The metrics that two records are compared by."""
    x: str
    """Key of a `case`, along which figures are drawn."""
    y: str
    """The metric that is drawn."""
    line: str | None = None
    """Key of a `case`, of which each value is a line of its own."""
    extra: tuple[Column, ...] = field(default=())
    """Columns that are there if a row has them."""


TIMES = ("ttft", "tpot", "itl", "e2el")

KINDS = {
    "latency": Kind(
        columns=(
            Column("p", "prompt_tokens"),
            Column("g", "generation_tokens"),
            Column("b", "batch_size"),
            Column("prompt_tps", "prompt_tps", ".1f"),
            Column("generation_tps", "generation_tps", ".1f"),
            Column("TTFT ms", "ttft_ms", ".1f"),
            Column("total s", "total_time", ".3f"),
            Column("peak_memory GB", "peak_memory", ".3f"),
        ),
        extra=(Column("% of roofline", "roofline_percent", ".0f"),),
        main="generation_tps",
        better={"prompt_tps": "higher", "generation_tps": "higher"},
        x="prompt_tokens",
        y="generation_tps",
        line="batch_size",
    ),
    "batched": Kind(
        columns=(
            Column("PP", "pp"),
            Column("TG", "tg"),
            Column("B", "pl"),
            Column("N_KV", "n_kv"),
            Column("T_PP s", "t_pp", ".3f"),
            Column("S_PP t/s", "speed_pp", ".2f"),
            Column("T_TG s", "t_tg", ".3f"),
            Column("S_TG t/s", "speed_tg", ".2f"),
            Column("T s", "t", ".3f"),
            Column("S t/s", "speed", ".2f"),
        ),
        extra=(Column("% of roofline", "roofline_percent", ".0f"),),
        main="speed",
        better={"speed_pp": "higher", "speed_tg": "higher", "speed": "higher"},
        x="pl",
        y="speed_tg",
        line="pp",
    ),
    "throughput": Kind(
        columns=(
            Column("arm", "arm"),
            Column("requests/s", "requests_per_second", ".2f"),
            Column("tokens/s", "tokens_per_second", ".1f"),
            Column("output tokens/s", "output_tokens_per_second", ".1f"),
            Column("peak K/V MB", "peak_kv_bytes", "mega"),
            Column("peak_memory GB", "peak_memory", ".3f"),
        ),
        extra=(Column("requests with the same tokens", "same_tokens"),),
        main="output_tokens_per_second",
        better={"output_tokens_per_second": "higher", "tokens_per_second": "higher"},
        x="arm",
        y="output_tokens_per_second",
    ),
    "serve-sim": Kind(
        columns=(
            Column("request rate", "request_rate"),
            Column("completed", "completed", ".0f"),
            Column("failed", "failed", ".0f"),
            Column("req/s", "request_throughput", ".2f"),
            Column("output tok/s", "output_throughput", ".1f"),
            Column("total tok/s", "total_token_throughput", ".1f"),
            Column("peak concurrency", "max_concurrent_requests", ".0f"),
            *(
                Column(f"{name.upper()} {which} ms", f"{which}_{name}_ms", ".1f")
                for name in TIMES
                for which in ("median", "p99")
            ),
        ),
        extra=(Column("goodput req/s", "request_goodput", ".2f"),),
        main="output_throughput",
        better={
            "output_throughput": "higher",
            **{f"median_{name}_ms": "lower" for name in TIMES},
        },
        x="request_rate",
        y="normalized_latency_ms",
    ),
    "memory": Kind(
        columns=(
            Column("reserves", "reserves"),
            Column("used %", "used_percent", ".1f"),
            Column("sequences that fit", "fit", ".0f"),
        ),
        extra=(
            Column("saved by sharing %", "saved_percent", ".1f"),
            Column("running at most", "running_at_most", ".0f"),
            Column("blocks at most", "blocks_at_most", ".0f"),
            Column("preemptions", "preemptions", ".0f"),
        ),
        main="used_percent",
        better={"used_percent": "higher", "fit": "higher"},
        x="reserves",
        y="used_percent",
    ),
    "attention": Kind(
        columns=(
            Column("shape", "shape"),
            Column("arm", "arm"),
            Column("us", "us", ".1f"),
            Column("GB/s", "gb_s", ".1f"),
            Column("% of copy", "copy_percent", ".0f"),
        ),
        main="us",
        better={"us": "lower"},
        x="shape",
        y="gb_s",
        line="arm",
    ),
}
