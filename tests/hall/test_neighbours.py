"""A neighbour's content never changes a row's logits, not by a bit.

A script says how many tokens each sequence computes in each step. It is played once as it is, and
again with other content around one of its sequences, the watched one. Every batch keeps its shape:
the same lengths, chunks and block tables. In "tokens" all tokens that aren't the watched sequence's
own are others. In "numbers" all K and V that it can't read are others before every step: blocks
that nobody uses and those of its neighbours hold NaN and infinities; NULL_BLOCK and the rest of the
blocks that it reads hold other finite numbers, for these are read and masked, and a weight of zero
hides no NaN. All of its rows must give the same logits, bit for bit.

That is a promise for MLX's own BLAS on a CPU, and here the tests run with OpenBLAS. So this file is
a program too, which plays all of the scripts in a process of its own and prints what differed.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import serving
import tiny_models
from families import zoo

from mlxpage.block_pool import NULL_BLOCK
from mlxpage.cache_group import CacheGroup, StateGroup
from mlxpage.metal import backend, reference, self_check
from mlxpage.metal.backend import mx
from mlxpage.metal.kv_cache import KVCache
from mlxpage.metal.layout import Rows, group_kinds
from mlxpage.metal.model import Model
from mlxpage.sampling_params import SamplingParams

ROOT = Path(__file__).parents[2]
SECONDS = 300
NUM_BLOCKS = 200
NOT_NUMBERS = [np.nan, np.inf, -np.inf]


def decode(names: str) -> dict[str, int]:
    return dict.fromkeys(names, 1)


@dataclass(frozen=True)
class Script:
    """Steps of {sequence: tokens that it computes}. ("a", 3) begins as a branch of what `a` is
    before the step, and computes 3 tokens; with 0 tokens a sequence ends."""

    steps: list[dict[str, int | tuple[str, int]]]
    watched: str
    """The sequences that are watched, one after the other."""
    block_size: int = 16

    def owners(self) -> dict[str, list[str]]:
        """Of each sequence's positions: who computed them, itself or one that it branched from."""
        owners: dict[str, list[str]] = {}
        for step in self.steps:
            before = {name: list(own) for name, own in owners.items()}
            for name, parent, count in orders(step):
                own = before[parent] if parent else owners.get(name, [])
                owners[name] = own + [name] * count
        return owners


def orders(step: dict) -> list[tuple[str, str | None, int]]:
    """(sequence, what it branches from, tokens)"""
    return [
        (name, *what) if isinstance(what, tuple) else (name, None, what)
        for name, what in step.items()
    ]


SCRIPTS = {
    # Around the ends of blocks, windows that begin in the middle of one, and the first token.
    "decode": Script(
        [{"a": 1, "b": 15, "c": 16, "d": 31, "e": 50, "f": 97}, *[decode("abcdef")] * 4], "abef"
    ),
    # Prompts in chunks that cut blocks anywhere; some pass a window within one chunk.
    "chunks": Script(
        [{"a": 20, "b": 33, "c": 64}, {"a": 12, "b": 31, "c": 70}, {"a": 3, "b": 16, "c": 25}],
        "abc",
    ),
    # Some decode while others compute their prompts, and get the blocks of those that ended.
    "mixed": Script(
        [
            {"a": 30, "b": 47},
            {"a": 1, "b": 1, "c": 40},
            {"a": 1, "b": 1, "c": 23, "d": 5},
            {"b": 0, "a": 1, "c": 1, "d": 60},
            {"a": 1, "c": 1, "d": 1, "e": 18},
            {"c": 0, "a": 1, "d": 9, "e": 1, "f": 50},
            decode("adef"),
        ],
        "adef",
    ),
    # A prefix of full blocks; then last blocks in part, which are copied before one goes on.
    "shared": Script(
        [
            {"a": 48, "x": 20},
            {"a": 1, "b": ("a", 20), "c": ("a", 1), "x": 1},
            {"a": 1, "b": 1, "c": 9, "x": 7},
            {"b": 1, "d": ("b", 1), "e": ("c", 7), "c": 1, "a": 5},
            {"f": ("d", 1), "g": ("d", 30), "d": 1, "e": 1, "x": 1},
            decode("abcdefgx"),
        ],
        "abcdefg",
    ),
    # Many blocks: decoding rows in several calls, and a chunk whose scores are cut in pieces.
    "long": Script(
        [{"a": 420, "b": 9, "c": 3, "d": 30, "e": 200}, *[decode("abcde")] * 3, {"b": 30, "a": 12}],
        "abe",
        block_size=4,
    ),
}

# It reads K and V as arrays, where the others only hand them on.
READER = "stablelm"
READER_CONFIG = {"partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5, "use_qkv_bias": True}

ALL = tuple(SCRIPTS)
# Each sequence goes on from a state of its own.
WITH_STATES = ["falcon_h1", "qwen3_next"]
# (family, dtype, scripts)
CASES = [
    (family, dtype, script)
    for family, dtype, scripts in [
        ("llama", "float32", ALL),
        ("gemma3_text", "float32", ALL),  # sliding windows
        ("gpt_oss", "float32", ALL),  # sinks, experts and sliding windows
        ("cohere2", "float32", ("mixed", "shared")),
        ("qwen3_moe", "float32", ("decode", "mixed")),
        (READER, "float32", ("mixed", "shared")),
        *((family, "float32", ("mixed", "shared")) for family in WITH_STATES),
        ("llama", "bfloat16", ("decode", "mixed")),
        ("gemma3_text", "float16", ("chunks", "shared")),
    ]
    for script in scripts
]
CHANGES = ["tokens", "numbers"]
SERVED = ["llama", "gemma3_text", "gpt_oss"]


def make(family: str, dtype: str) -> Model:
    if family in WITH_STATES:
        model = Model(*zoo.make(family, dtype=getattr(mx, dtype)))
        self_check.check(model, 16)
        return model
    if family == READER:
        config = {"model_type": family, **tiny_models._COMMON, **READER_CONFIG}
        architecture = importlib.import_module(f"mlx_lm.models.{family}")
        module = architecture.Model(architecture.ModelArgs.from_dict(config))
        tiny_models.randomise(module, 0, getattr(mx, dtype))
        model = Model(module, config)
    else:
        model = tiny_models.make(family, dtype=getattr(mx, dtype))
    model.fetches = family == READER
    return model


# -- playing a script --


class Play:
    """A script on a model, with a change around the watched sequence or with none."""

    def __init__(self, model: Model, script: Script, watched: str = "", change: str = ""):
        self.model = model
        self.script = script
        self.watched = watched
        self.change = change
        self.owners = script.owners()
        kinds = group_kinds(model.specs)
        self.cache = KVCache(
            model.specs, [NUM_BLOCKS] * len(kinds), script.block_size, fetches=model.fetches
        )
        self.groups = [
            StateGroup(NUM_BLOCKS, script.block_size)
            if kind.has_states
            else CacheGroup(NUM_BLOCKS, script.block_size, kind.window)
            for kind in kinds
        ]
        for seed, group in enumerate(self.groups):  # blocks come in no order
            blocks = np.array(group.pool.allocate(NUM_BLOCKS))
            group.pool.free(np.random.default_rng(seed).permutation(blocks).tolist())
        self.tables: dict[str, list[list[int]]] = {}
        self.computed: Counter[str] = Counter()
        self.logits: dict[tuple[str, int], np.ndarray] = {}
        """Of each sequence's positions."""
        self.steps: dict[tuple[str, int], str] = {}
        """The step that computed them, for messages."""
        self.shapes: list[list] = []
        """What each step was given, but for tokens and numbers."""
        self._rng = np.random.default_rng(7)

    def run(self) -> Play:
        previous = self.model.cache
        self.model.bind(self.cache)
        try:
            for step in self.script.steps:
                self._step(step)
        finally:
            self.model.bind(previous)
        return self

    def is_watched(self, name: str, position: int) -> bool:
        """Whether it's one of the watched sequence's, or one that this has in common with it."""
        own = self.owners[self.watched]
        return position < len(own) and own[position] == self.owners[name][position]

    def token(self, name: str, position: int) -> int:
        owner, size = self.owners[name][position], self.model.vocab_size
        token = int(np.random.default_rng([ord(owner), position]).integers(size))
        if self.change != "tokens" or self.is_watched(name, position):
            return token
        other = np.random.default_rng([ord(owner), position, 1]).integers(1, size)
        return (token + int(other)) % size

    def _step(self, step: dict) -> None:
        if self.change == "numbers":
            self._replace_numbers()
        for name, parent, count in orders(step):
            if parent:
                self.computed[name] = self.computed[parent]
                self.tables[name] = [
                    group.branch(table, self.computed[parent])
                    for group, table in zip(self.groups, self.tables[parent], strict=True)
                ]
            elif not count:
                for group, table in zip(self.groups, self.tables.pop(name), strict=True):
                    group.release(table)
        parts = [(name, count) for name, _, count in orders(step) if count]
        copies = [pairs for name, count in parts for pairs in self._take_blocks(name, count)]
        parts.sort(key=lambda part: (part[1] > 1, self.computed[part[0]] + part[1]))
        rows, positions = self._rows(parts, copies)
        logits = self.model(rows)
        mx.eval(logits, self.cache.written())
        logits = np.array(logits.astype(mx.float32))
        for at, row in zip(rows.sample_rows.tolist(), logits, strict=True):
            self.logits[positions[at]] = row
            self.steps[positions[at]] = " ".join(f"{name}+{count}" for name, count in parts)
        shape = [rows.positions, rows.starts, rows.contexts, *rows.block_tables, *rows.copies]
        self.shapes.append([array.tolist() for array in shape])
        for name, count in parts:
            self.computed[name] += count
            for group, table in zip(self.groups, self.tables[name], strict=True):
                if group.window is not None:
                    group.give_back(table, self.computed[name])

    def _take_blocks(self, name: str, count: int) -> list[tuple[int, int, int]]:
        """(group, source, target) of the blocks that must be copied"""
        copies = []
        tables = self.tables.setdefault(name, [[] for _ in self.groups])
        computed = self.computed[name]
        for index, (group, table) in enumerate(zip(self.groups, tables, strict=True)):
            if group.is_shared(table, computed):
                copies.append((index, *group.copy_shared(table, computed)))
            group.grow(table, computed + count)
        return copies

    def _rows(self, parts, copies) -> tuple[Rows, list[tuple[str, int]]]:
        positions = [(name, self.computed[name] + i) for name, count in parts for i in range(count)]
        counts = [count for _, count in parts]
        indices = range(len(self.groups))
        pairs = [[copy[1:] for copy in copies if copy[0] == index] for index in indices]
        rows = Rows(
            tokens=np.array([self.token(*position) for position in positions], np.int32),
            positions=np.array([position for _, position in positions], np.int32),
            starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            contexts=np.array([self.computed[name] + count for name, count in parts], np.int32),
            block_tables=[
                self._padded([self.tables[name][index] for name, _ in parts]) for index in indices
            ],
            # All of them, but not as they stand: they have to be found.
            sample_rows=np.arange(len(positions), dtype=np.int32)[::-1].copy(),
            copies=[np.array(each, np.int32).reshape(-1, 2) for each in pairs] if copies else [],
        )
        return rows, positions

    def _padded(self, tables: list[list[int]]) -> np.ndarray:
        longest = max(map(len, tables))
        return np.array(
            [table + [NULL_BLOCK] * (longest - len(table)) for table in tables], np.int32
        )

    def _replace_numbers(self) -> None:
        """Replaces all K, V and states but those that the watched sequence's next row reads, or the
        next row of the one that it will branch from."""
        name: str | None = self.watched
        parents = {
            child: parent
            for step in self.script.steps
            for child, parent, _ in orders(step)
            if parent is not None
        }
        while name is not None and name not in self.tables:
            has_ended = self.computed[name] > 0
            name = None if has_ended else parents.get(name)
        size = self.script.block_size
        for layer in self.cache.layers:
            group = self.groups[layer.group]
            keep = np.zeros((NUM_BLOCKS + 1, size), bool)
            if name is not None:
                end = self.computed[name]
                first = 0 if group.window is None else max(0, end - group.window + 1)
                read = np.arange(first, end)
                table = np.array(self.tables[name][layer.group], int)
                keep[table[read // size], read % size] = True
                assert not keep[NULL_BLOCK].any(), "the watched sequence has lost a block"
            keep = keep.any(axis=1) if group.is_state else keep[:, None, :]
            layer.pool.fill(*(self._replaced(pool, keep) for pool in layer.pool.arrays()))
        mx.eval(self.cache.arrays())

    def _replaced(self, pool: mx.array, keep: np.ndarray) -> mx.array:
        numbers = np.array(pool.astype(mx.float32))
        others = 100 * self._rng.standard_normal(numbers.shape, np.float32)
        foreign = ~keep.reshape(len(keep), -1).any(axis=1)
        foreign[NULL_BLOCK] = False
        others[foreign] = self._rng.choice(NOT_NUMBERS, others[foreign].shape)
        keep = keep.reshape(keep.shape + (1,) * (pool.ndim - keep.ndim))
        return mx.array(np.where(keep, numbers, others)).astype(pool.dtype)


def compare(plain: Play, changed: Play) -> list[str]:
    """What differed, a line for each row of the watched sequence; nothing should."""
    assert plain.shapes == changed.shapes, "the batches have other shapes"
    assert plain.logits.keys() == changed.logits.keys()
    lines = []
    others = same = 0
    for (name, position), expected in plain.logits.items():
        logits = changed.logits[name, position]
        row = f"{name} at {position} in ({plain.steps[name, position]})"
        equal = np.array_equal(logits.view(np.int32), expected.view(np.int32))
        if not changed.is_watched(name, position):
            others, same = others + 1, same + equal
        elif not np.isfinite(expected).all():
            lines.append(f"{row}: not finite in the plain run")
        elif not equal:
            difference = np.abs(logits - expected).max()
            lines.append(f"{row}, {changed.watched} watched: {difference:.2g}")
    if changed.change == "tokens" and same:
        lines.append(f"{same} of {others} other rows have not changed, so this tests nothing")
    return lines


def play(model: Model, script: Script, changes=CHANGES) -> dict[str, list[str]]:
    """For each change, what differed with any of the script's sequences watched."""
    plain = Play(model, script).run()
    differences = {change: [] for change in changes}
    for name in script.watched:
        for change in changes:
            differences[change] += compare(plain, Play(model, script, name, change).run())
    return differences


# -- through the engine --

LENGTHS = [70, 15, 45, 100, 41, 64]
COMMON, SHARING = 40, (0, 2, 4)  # prompts that begin with the same tokens
NEW = 30
# Too few blocks for all at once.
LIMITS = {"num_blocks": 22, "max_num_seqs": 5, "max_num_batched_tokens": 48}


def prompts(watched: int | None = None) -> list[list[int]]:
    """With a `watched` prompt, all others have other tokens, but where they begin as it does."""

    def tokens(count: int, *seed: int) -> list[int]:
        return np.random.default_rng(seed).integers(256, size=count).tolist()

    made = []
    for index, length in enumerate(LENGTHS):
        other = int(watched is not None and index != watched)
        begin = 0
        if index in SHARING:
            begin = int(watched is not None and watched not in SHARING)
        common = tokens(COMMON, 99, begin) if index in SHARING else []
        made.append(common + tokens(length - len(common), index, other))
    return made


def serve(model: Model, watched: int | None = None):
    """(outputs, what happened that may not depend on content)"""
    engine = serving.engine(model, **LIMITS)
    if watched is not None:
        for layer in model.cache.layers:
            layer.pool.k[1:] = np.nan
            layer.pool.v[1:] = np.nan
    greedy = SamplingParams(
        temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=20, prompt_logprobs=5
    )
    sampled = replace(greedy, temperature=1.0, seed=3, top_p=0.9, prompt_logprobs=None)
    params = [greedy, sampled, sampled, greedy, sampled, greedy]
    outputs = serving.serve(engine, prompts(watched), params)
    happened = [engine.stats()["steps"], engine.scheduler.num_preemptions]
    happened += [output.num_cached_tokens for output in outputs]
    model.bind(None)
    return outputs, happened


def served(model: Model) -> dict:
    outputs, happened = serve(model)
    lines = []
    for watched in range(len(LENGTHS)):
        others, also_happened = serve(model, watched)
        if also_happened != happened:
            lines.append(f"{watched}: {also_happened} and not {happened} happened")
        for field in ("token_ids", "logprobs", "prompt_logprobs"):
            if getattr(others[watched], field) != getattr(outputs[watched], field):
                lines.append(f"{watched}: other {field}")
        for index, (one, other) in enumerate(zip(outputs, others, strict=True)):
            if index != watched and one.logprobs == other.logprobs:
                lines.append(f"{watched}: {index} has not changed, so this tests nothing")
    return {"differences": lines, "preemptions": happened[1], "cached": sum(happened[2:])}


# -- the program, and the tests of what it prints --


def main() -> None:
    assert backend.BLAS is None, f"{backend.BLAS} is in the place of MLX's own BLAS"
    mx.set_default_device(mx.cpu)
    models = {case[:2]: None for case in CASES}
    models = {(family, dtype): make(family, dtype) for family, dtype in models}
    results = {
        "played": [play(models[family, dtype], SCRIPTS[script]) for family, dtype, script in CASES],
        "served": [served(make(family, "float32")) for family in SERVED],
    }
    print(json.dumps(results))


@pytest.fixture(scope="module")
def printed():
    if sys.platform != "linux":
        pytest.skip("MLX has a BLAS of its own on Linux only")
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    folders = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    result = subprocess.run(
        [sys.executable, __file__],
        cwd=ROOT,
        env=environment | {"MLXPAGE_BLAS": "off", "PYTHONPATH": folders},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_other_content_around_a_sequence_changes_no_bit_of_its_logits(printed, case, change):
    assert printed["played"][CASES.index(case)][change] == []


@pytest.mark.parametrize("family", SERVED)
def test_other_prompts_beside_a_request_change_no_bit_of_its_logprobs(printed, family):
    found = printed["served"][SERVED.index(family)]
    assert found["differences"] == []
    assert found["preemptions"] and found["cached"], "the prompts test nothing"


# -- mistakes are noticed --


def a_row_reads_one_position_more(monkeypatch):
    decoding = reference._decoding
    monkeypatch.setattr(
        reference,
        "_decoding",
        lambda starts, contexts, *rest: decoding(starts, contexts + 1, *rest),
    )


def a_window_is_one_position_wider(monkeypatch):
    plan = reference.plan

    def wider(starts, contexts, tables, block_size, window, heads):
        return plan(starts, contexts, tables, block_size, window and window + 1, heads)

    monkeypatch.setattr(reference, "plan", wider)


def a_row_reads_a_block_of_its_neighbour(monkeypatch):
    plan = reference.plan

    def mistaken(starts, contexts, tables, *rest):
        tables = tables.copy()
        tables[-1, 0] = tables[0, 0]
        return plan(starts, contexts, tables, *rest)

    monkeypatch.setattr(reference, "plan", mistaken)


def a_begun_block_is_not_cleared(monkeypatch):
    write = reference.write
    monkeypatch.setattr(reference, "write", lambda *arguments: write(*arguments[:-1], None))


def a_block_is_not_copied(monkeypatch):
    monkeypatch.setattr(KVCache, "copy", lambda self, copies: None)


def experts_give_rows_in_their_own_order(monkeypatch):
    switch_layers = importlib.import_module("mlx_lm.models.switch_layers")
    unsort = switch_layers._scatter_unsort
    monkeypatch.setattr(
        switch_layers,
        "_scatter_unsort",
        lambda x, order, shape=None: unsort(x, mx.arange(order.size), shape),
    )


@pytest.mark.parametrize(
    "mistake, family, script, changes",
    [
        (a_row_reads_one_position_more, "llama", "decode", ["numbers"]),
        (a_row_reads_one_position_more, "gpt_oss", "mixed", ["numbers"]),
        (a_window_is_one_position_wider, "gemma3_text", "chunks", ["numbers"]),
        (a_window_is_one_position_wider, "gpt_oss", "decode", ["numbers"]),
        (a_row_reads_a_block_of_its_neighbour, "llama", "decode", CHANGES),
        (a_row_reads_a_block_of_its_neighbour, "llama", "chunks", CHANGES),
        (a_begun_block_is_not_cleared, "llama", "mixed", ["numbers"]),
        (a_block_is_not_copied, "llama", "shared", ["numbers"]),
        (experts_give_rows_in_their_own_order, "gpt_oss", "mixed", CHANGES),
    ],
)
def test_a_mistake_is_noticed(monkeypatch, mistake, family, script, changes):
    model = make(family, "float32")
    mistake(monkeypatch)
    for change, differences in play(model, SCRIPTS[script], changes).items():
        assert differences, f"{change} don't show it"
        assert not any("nothing" in line for line in differences), differences


if __name__ == "__main__":
    main()
