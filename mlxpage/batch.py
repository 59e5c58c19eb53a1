"""A schedule as arrays."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np

from mlxpage.metal.backend import mx
from mlxpage.metal.layout import Rows
from mlxpage.metal.sampler import Choices, Penalties, Unread
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
            copies=copies_of(schedule, len(parts[0].seq.block_tables)),
        )
        sampling = [part.seq for part in sampled]
        choices = _choices(sampled, rows)
        return Batch(rows, sampling, choices, [(s, p) for s, p, _ in scoring])

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


def copies_of(schedule: Schedule, num_groups: int) -> list[np.ndarray]:
    """Per cache group, if there are any."""
    if not schedule.copies:
        return []
    pairs = [
        [copy[1:] for copy in schedule.copies if copy[0] == group] for group in range(num_groups)
    ]
    return [np.array(each, np.int32).reshape(-1, 2) for each in pairs]


def _padded(tables: list[list[int]]) -> np.ndarray:
    lengths = np.fromiter(map(len, tables), np.int32, len(tables))
    padded = np.zeros((len(tables), lengths.max()), np.int32)
    owned = np.arange(padded.shape[1]) < lengths[:, None]
    padded[owned] = np.fromiter(chain.from_iterable(tables), np.int32, lengths.sum())
    return padded


def _choices(parts: list[Scheduled], rows: Rows) -> Choices:
    """Of the parts that sample, to which the first of the sampled rows belong."""
    params = [part.seq.params for part in parts]
    mask = 2**64 - 1
    return Choices(
        temperature=np.array([p.temperature for p in params], np.float32),
        top_k=np.array([p.top_k for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        seeds=np.array([p.seed & mask for p in params], np.uint64),
        positions=np.array([part.num_output_tokens for part in parts], np.uint64),
        penalties=_penalties(parts, rows),
    )


def _penalties(parts: list[Scheduled], rows: Rows) -> Penalties | None:
    edits = [_edits(part) for part in parts]
    flat = [edit for each in edits for edit in each.items()]
    unread = [place for place, part in enumerate(parts) if _is_unread(part)]
    if not flat and not unread:
        return None
    return Penalties(
        np.repeat(np.arange(len(parts), dtype=np.int32), [len(each) for each in edits]),
        np.array([token for token, _ in flat], np.int32),
        np.array([edit.repetition for _, edit in flat], np.float32),
        np.array([edit.added for _, edit in flat], np.float32),
        _unread(unread, parts, edits, rows) if unread else None,
    )


class _Edit(NamedTuple):
    """What the logit of a token becomes."""

    repetition: float = 1.0  # divides it if it is positive, else multiplies it
    added: float = 0.0
    counted: bool = False  # whether the output holds the token


def _edits(part: Scheduled) -> dict[int, _Edit]:
    """Of each token whose logit the sequence's params change."""
    seq, params = part.seq, part.seq.params
    edits = {token: _Edit(added=bias) for token, bias in (params.logit_bias or {}).items()}
    if params.repetition_penalty != 1:
        for token in set(seq.token_ids):
            edit = edits.get(token, _Edit())
            edits[token] = edit._replace(repetition=params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        for token, count in Counter(seq.output_token_ids).items():
            edit = edits.get(token, _Edit())
            added = edit.added - params.presence_penalty - params.frequency_penalty * count
            edits[token] = edit._replace(added=added, counted=True)
    if part.num_output_tokens < params.min_tokens:
        for token in seq.stop_token_ids:
            edits[token] = edits.get(token, _Edit())._replace(added=float("-inf"))
    return edits


def _is_unread(part: Scheduled) -> bool:
    """Whether penalties count a token that nobody has read yet."""
    seq = part.seq
    return seq.params.counts_tokens and part.start + part.num_tokens > len(seq.token_ids)


def _unread(
    places: list[int], parts: list[Scheduled], edits: list[dict[int, _Edit]], rows: Rows
) -> Unread:
    params = [parts[place].seq.params for place in places]
    widest = max(len(edits[place]) for place in places)
    known = np.full((len(places), max(1, widest)), -1, np.int32)
    added, counted = np.zeros(known.shape, np.float32), np.zeros(known.shape, bool)
    for i, place in enumerate(places):
        count = len(edits[place])
        known[i, :count] = list(edits[place])
        added[i, :count] = [edit.added for edit in edits[place].values()]
        counted[i, :count] = [edit.counted for edit in edits[place].values()]
    return Unread(
        np.array(places, np.int32),
        rows.tokens[mx.array(rows.sample_rows[places])],
        known,
        added,
        counted,
        repetition=np.array([p.repetition_penalty for p in params], np.float32),
        presence=np.array([p.presence_penalty for p in params], np.float32),
        frequency=np.array([p.frequency_penalty for p in params], np.float32),
    )
