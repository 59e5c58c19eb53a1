"""A schedule as arrays."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import chain

import numpy as np

from mlxpage.backend import mx
from mlxpage.layout import Rows
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
    def of(
        schedule: Schedule,
        block_size: int,
        last: Batch | None = None,
        last_tokens: mx.array | None = None,
    ) -> Batch:
        """Sorts the schedule's parts, so that its order is the order of the rows.

        `last` is the batch in flight, if there is one: tokens that nobody has read yet come from
        its `last_tokens`, on the device.
        """
        parts = schedule.scheduled
        parts.sort(key=lambda part: (part.num_tokens > 1, part.start + part.num_tokens))
        counts = np.array([part.num_tokens for part in parts])
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        first = np.array([part.start for part in parts])

        sampled = [part for part in parts if part.samples]
        sample_rows = [starts[i + 1] - 1 for i, part in enumerate(parts) if part.samples]
        scoring = [
            (part.seq, position, starts[i] + position - 1 - part.start)
            for i, part in enumerate(parts)
            for position in _scored_positions(part)
        ]
        rows = Rows(
            tokens=_tokens(parts, last, last_tokens),
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
        sampling = [part.seq for part in sampled]
        return Batch(rows, sampling, _choices(sampled), [(s, p) for s, p, _ in scoring])

    @property
    def has_penalties(self) -> bool:
        """Whether any of its sequences needs to know its tokens before it chooses the next."""
        return any(seq.params.counts_tokens for seq in self.sampling)

    @property
    def scored_tokens(self) -> list[int]:
        """The prompt tokens whose log-probabilities are wanted."""
        return [seq.token_ids[position] for seq, position in self.scoring]


def _tokens(
    parts: list[Scheduled], last: Batch | None, last_tokens: mx.array | None
) -> np.ndarray | mx.array:
    known: list[int] = []
    unread = []  # rows whose token was sampled by the last step and nobody has read yet
    for part in parts:
        tokens = part.seq.token_ids
        if part.start < len(tokens):
            known += tokens[part.start : part.start + part.num_tokens]
        else:
            unread.append((len(known), part.seq))
            known.append(0)
    tokens = np.array(known, np.int32)
    if not unread:
        return tokens
    places = {seq.id: place for place, seq in enumerate(last.sampling)}
    sources = np.arange(len(places), len(places) + len(tokens), dtype=np.int32)
    for row, seq in unread:
        sources[row] = places[seq.id]
    if np.array_equal(sources, np.arange(len(places))):
        return last_tokens
    return mx.concatenate([last_tokens, mx.array(tokens)])[mx.array(sources)]


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


def _choices(parts: list[Scheduled]) -> Choices:
    params = [part.seq.params for part in parts]
    mask = 2**64 - 1
    return Choices(
        temperature=np.array([p.temperature for p in params], np.float32),
        top_k=np.array([p.top_k for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        seeds=np.array([p.seed & mask for p in params], np.uint64),
        positions=np.array([part.num_output_tokens for part in parts], np.uint64),
        penalties=_penalties(parts),
    )


def _penalties(parts: list[Scheduled]) -> Penalties | None:
    edits = [(row, *edit) for row, part in enumerate(parts) for edit in _edits(part)]
    if not edits:
        return None
    rows, tokens, repetition, added = zip(*edits, strict=True)
    return Penalties(
        np.array(rows, np.int32),
        np.array(tokens, np.int32),
        np.array(repetition, np.float32),
        np.array(added, np.float32),
    )


def _edits(part: Scheduled):
    """(token, repetition factor, addend) of each logit that the sequence's params change."""
    seq, params = part.seq, part.seq.params
    repetition: dict[int, float] = {}
    added: Counter[int] = Counter(params.logit_bias or {})
    if params.repetition_penalty != 1:
        repetition = dict.fromkeys(seq.token_ids, params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        for token, count in Counter(seq.output_token_ids).items():
            added[token] -= params.presence_penalty + params.frequency_penalty * count
    if part.num_output_tokens < params.min_tokens:
        for token in seq.stop_token_ids:
            added[token] = float("-inf")
    for token in repetition.keys() | added.keys():
        yield token, repetition.get(token, 1.0), added[token]
