"""From logits to tokens, for rows that each want it differently, in one call."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxpage.metal.backend import mx

# A row that keeps more than this many tokens costs a sort of the whole vocabulary.
_MAX_RANKED = 1024
# Colder than this is greedy: a quotient of logits could overflow.
_COLDEST = 1e-6


@dataclass(slots=True)
class Penalties:
    """Changes of single logits, as flat lists over all rows; each (row, token) occurs once."""

    rows: np.ndarray  # (N,) int32
    tokens: np.ndarray  # (N,) int32
    repetition: np.ndarray  # (N,) float32 divides positive logits, multiplies negative ones
    added: np.ndarray  # (N,) float32 biases less penalties; -inf forbids the token
    unread: Unread | None = None


@dataclass(slots=True)
class Unread:
    """Rows whose newest token only the device knows yet, so it is no entry of the lists above.

    M is the most entries that such a row has there.
    """

    rows: np.ndarray  # (U,) int32
    tokens: mx.array  # (U,) int32, the newest of each
    known: np.ndarray  # (U, M) int32 the row's entries; -1 where it has fewer
    added: np.ndarray  # (U, M) float32 theirs
    counted: np.ndarray  # (U, M) bool whether the output holds the token already
    repetition: np.ndarray  # (U,) float32
    presence: np.ndarray  # (U,) float32
    frequency: np.ndarray  # (U,) float32


@dataclass(slots=True)
class Choices:
    """How the token of each row is chosen. NumPy, one entry per row."""

    temperature: np.ndarray  # (R,) float32, 0 is greedy
    top_k: np.ndarray  # (R,) int32, 0 is off
    top_p: np.ndarray  # (R,) float32, 1 is off
    min_p: np.ndarray  # (R,) float32, 0 is off
    seeds: np.ndarray  # (R,) uint64, of the request
    positions: np.ndarray  # (R,) uint64, tokens that the request has generated so far
    penalties: Penalties | None = None


def sample(logits: mx.array, choices: Choices) -> mx.array:
    """(R,) int32 token ids from `logits` (R, vocab), -1 where a row's logits are not finite.

    A row's token depends on its own logits, parameters, seed and position only: the noise of a
    row comes from a key of its own, whatever else is in the batch.
    """
    if choices.penalties is not None:
        logits = _penalised(logits.astype(mx.float32), choices.penalties)
    greedy = mx.argmax(logits, axis=-1).astype(mx.int32)
    best = mx.take_along_axis(logits, greedy[:, None], axis=-1)[:, 0]
    sound = mx.abs(best) < mx.inf  # neither infinite nor NaN
    greedy = mx.where(sound, greedy, -1)
    is_greedy = choices.temperature < _COLDEST
    if is_greedy.all():
        return greedy
    logits = logits.astype(mx.float32)
    temperature = np.where(is_greedy, np.float32(1), choices.temperature)
    scaled = _filtered(logits / mx.array(temperature)[:, None], choices)
    keys = mx.array(_keys(choices.seeds, choices.positions))
    noise = mx.vmap(lambda key: mx.random.gumbel(logits.shape[1:], key=key))(keys)
    # Gumbel-max: the largest of logit plus noise is a draw from the softmax.
    drawn = mx.argmax(scaled + noise, axis=-1).astype(mx.int32)
    return mx.where(mx.array(~is_greedy) & sound, drawn, greedy)


def logprobs(logits: mx.array, tokens: mx.array, top: int) -> tuple[mx.array, mx.array, mx.array]:
    """Log-probabilities of the model's own distribution.

    Args:
        logits: (R, vocab)
        tokens: (R,) whose log-probability is wanted
        top: how many of the likeliest as well

    Returns:
        (R,) of the tokens, (R, top) token ids and (R, top) log-probabilities, likeliest first.
    """
    logits = logits.astype(mx.float32)
    logits = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    if top == 0:  # arrays that are there already: CUDA can't compute empty ones
        nothing = np.zeros((len(tokens), 0))
        return chosen, mx.array(nothing.astype(np.int32)), mx.array(nothing.astype(np.float32))
    ids = mx.argpartition(logits, -top, axis=-1)[:, -top:]
    values = mx.take_along_axis(logits, ids, axis=-1)
    order = mx.argsort(-values, axis=-1)
    ids = mx.take_along_axis(ids, order, axis=-1)
    return chosen, ids.astype(mx.int32), mx.take_along_axis(values, order, axis=-1)


def _penalised(logits: mx.array, penalties: Penalties) -> mx.array:
    changes = []
    if len(penalties.rows):
        if not 0 <= penalties.tokens.min() <= penalties.tokens.max() < logits.shape[-1]:
            raise IndexError(f"a bias of a token that isn't one of {logits.shape[-1]}")
        which = mx.array(penalties.rows), mx.array(penalties.tokens)
        changes.append((which, penalties.repetition, mx.array(penalties.added)))
    if (unread := penalties.unread) is not None:
        # After the others, of which it may replace one.
        which = mx.array(unread.rows), unread.tokens
        changes.append((which, unread.repetition, _added_by(unread)))
    changed = mx.array(logits)  # item assignment must not reach the caller's array
    for which, repetition, added in changes:
        old, repetition = logits[which], mx.array(repetition)
        changed[which] = mx.where(old > 0, old / repetition, old * repetition) + added
    return changed


def _added_by(unread: Unread) -> mx.array:
    """(U,) to the logits of the newest tokens, which the output has once more than was known."""
    is_same = mx.array(unread.known) == unread.tokens[:, None]
    added = mx.where(is_same, mx.array(unread.added), 0).sum(axis=1)
    is_counted = (is_same & mx.array(unread.counted)).any(axis=1)
    presence = mx.where(is_counted, 0, mx.array(unread.presence))
    return added - presence - mx.array(unread.frequency)


def _filtered(logits: mx.array, choices: Choices) -> mx.array:
    """Minus infinity for what top_k, top_p (of what top_k leaves) and min_p drop."""
    vocab = logits.shape[-1]
    # A greedy row's filters don't matter, and must not make it sort.
    drawn = choices.temperature >= _COLDEST
    top_k = np.where((choices.top_k == 0) | (choices.top_k > vocab), vocab, choices.top_k)
    sorts = drawn & ((top_k < vocab) | (choices.top_p < 1))
    if sorts.any():
        threshold = mx.full((len(logits), 1), -mx.inf)
        few = min(_MAX_RANKED, vocab)
        # Two widths whatever the rows ask for: sums of another length round otherwise, and a row
        # would depend on its neighbours.
        for rows, width in ((sorts & (top_k <= few), few), (sorts & (top_k > few), vocab)):
            if rows.any():
                picked = mx.array(np.flatnonzero(rows))
                threshold[picked] = _threshold(
                    logits[picked], top_k[rows], choices.top_p[rows], width
                )
        logits = mx.where(logits < threshold, -mx.inf, logits)
    if (choices.min_p > 0).any():
        with np.errstate(divide="ignore"):
            floor = mx.array(np.log(choices.min_p, dtype=np.float32))[:, None]
        logits = mx.where(logits < logits.max(axis=-1, keepdims=True) + floor, -mx.inf, logits)
    return logits


def _threshold(logits: mx.array, top_k: np.ndarray, top_p: np.ndarray, width: int) -> mx.array:
    """(R, 1): the least logit that stays, among the `width` largest."""
    largest = logits if width == logits.shape[-1] else mx.topk(logits, width, axis=-1)
    ranked = mx.sort(largest, axis=-1)[:, ::-1]
    keep = mx.arange(width) < mx.array(top_k)[:, None]
    probabilities = mx.softmax(mx.where(keep, ranked, -mx.inf), axis=-1)
    mass_before = mx.cumsum(probabilities, axis=-1) - probabilities
    # The likeliest token always stays: no mass comes before it. Without top_p all do, though
    # rounding may take their sum past 1.
    enough = np.where(top_p < 1, top_p, np.float32(np.inf))
    keep &= mass_before < mx.array(enough)[:, None]
    return mx.where(keep, ranked, mx.inf).min(axis=-1, keepdims=True)


def _keys(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(R, 2) uint32: a key for each (seed, position), by splitmix64's finaliser."""
    with np.errstate(over="ignore"):
        z = seeds + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.stack([z >> np.uint64(32), z & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32)
