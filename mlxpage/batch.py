"""A schedule as arrays."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import chain

import numpy as np

from mlxpage.kv_cache import Rows
from mlxpage.sampler import Choices, Penalties
from mlxpage.scheduler import Schedule, Scheduled
from mlxpage.sequence import Sequence


@dataclass(slots=True)
class Batch:
    """What one step computes: R rows of T give logits, the first of them a token each.

    The rows that only give prompt log-probabilities come after those that are sampled.
    """

    rows: Rows
    sampling: list[Sequence]  # the sequences that get a token, in the order of the logits
    choices: Choices
    scoring: list[tuple[Sequence, int]]  # (sequence, position of the prompt token that is scored)

    @staticmethod
    def of(schedule: Schedule, block_size: int) -> Batch:
        """Sorts the schedule's parts, so that its order is the order of the rows."""
        parts = schedule.scheduled
        parts.sort(key=lambda part: (part.num_tokens > 1, part.start + part.num_tokens))
        counts = np.array([part.num_tokens for part in parts])
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        first = np.array([part.start for part in parts])

        sampling = [part.seq for part in parts if part.samples]
        sample_rows = [starts[i + 1] - 1 for i, part in enumerate(parts) if part.samples]
        scoring = [
            (part.seq, position, starts[i] + position - 1 - part.start)
            for i, part in enumerate(parts)
            for position in _scored_positions(part)
        ]
        rows = Rows(
            tokens=np.fromiter(_tokens(parts), np.int32, starts[-1]),
            positions=(np.arange(starts[-1]) + np.repeat(first - starts[:-1], counts)).astype(
                np.int32
            ),
            starts=starts,
            contexts=(first + counts).astype(np.int32),
            block_tables=[
                _padded([part.seq.block_tables[group] for part in parts])
                for group in range(len(parts[0].seq.block_tables))
            ],
            sample_rows=np.array([*sample_rows, *(row for _, _, row in scoring)], np.int32),
        )
        return Batch(rows, sampling, _choices(sampling), [(s, p) for s, p, _ in scoring])


def _tokens(parts: list[Scheduled]):
    for part in parts:
        if part.num_tokens == 1:
            yield part.seq.token_ids[part.start]
        else:
            yield from part.seq.token_ids[part.start : part.start + part.num_tokens]


def _scored_positions(part: Scheduled) -> range:
    if part.seq.params.prompt_logprobs is None:
        return range(0)
    end = part.start + part.num_tokens + 1
    return range(part.start + 1, min(end, part.seq.num_prompt_tokens))


def _padded(tables: list[list[int]]) -> np.ndarray:
    lengths = np.fromiter(map(len, tables), np.int32, len(tables))
    padded = np.zeros((len(tables), lengths.max()), np.int32)
    owned = np.arange(padded.shape[1]) < lengths[:, None]
    padded[owned] = np.fromiter(chain.from_iterable(tables), np.int32, lengths.sum())
    return padded


def _choices(sequences: list[Sequence]) -> Choices:
    params = [seq.params for seq in sequences]
    mask = 2**64 - 1
    return Choices(
        temperature=np.array([p.temperature for p in params], np.float32),
        top_k=np.array([p.top_k for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        seeds=np.array([p.seed & mask for p in params], np.uint64),
        positions=np.array([seq.num_output_tokens for seq in sequences], np.uint64),
        penalties=_penalties(sequences),
    )


def _penalties(sequences: list[Sequence]) -> Penalties | None:
    edits = [(row, *edit) for row, seq in enumerate(sequences) for edit in _edits(seq)]
    if not edits:
        return None
    rows, tokens, repetition, added = zip(*edits, strict=True)
    return Penalties(
        np.array(rows, np.int32),
        np.array(tokens, np.int32),
        np.array(repetition, np.float32),
        np.array(added, np.float32),
    )


def _edits(seq: Sequence):
    """(token, repetition factor, addend) of each logit that the sequence's params change."""
    params = seq.params
    repetition: dict[int, float] = {}
    added: Counter[int] = Counter(params.logit_bias or {})
    if params.repetition_penalty != 1:
        repetition = dict.fromkeys(seq.token_ids, params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        for token, count in Counter(seq.output_token_ids).items():
            added[token] -= params.presence_penalty + params.frequency_penalty * count
    if seq.num_output_tokens < params.min_tokens:
        for token in seq.stop_token_ids:
            added[token] = float("-inf")
    for token in repetition.keys() | added.keys():
        yield token, repetition.get(token, 1.0), added[token]
