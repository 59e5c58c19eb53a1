"""Tokens are drawn from the distribution that the parameters describe, each row for itself."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import serving
import tiny_models

from mlxpage.metal.backend import mx
from mlxpage.metal.sampler import Choices, Penalties, logprobs, sample
from mlxpage.sampling_params import SamplingParams

NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def choices(rows: list[dict], penalties: Penalties | None = None) -> Choices:
    """A row may name any of the parameters, a seed and a position."""
    rows = [NEUTRAL | {"seed": i, "position": 0} | row for i, row in enumerate(rows)]

    def column(name, dtype):
        return np.array([row[name] for row in rows], dtype)

    return Choices(
        column("temperature", np.float32),
        column("top_k", np.int32),
        column("top_p", np.float32),
        column("min_p", np.float32),
        column("seed", np.uint64),
        column("position", np.uint64),
        penalties,
    )


def draw(logits: np.ndarray, rows: list[dict], penalties=None) -> list[int]:
    return sample(mx.array(logits.astype(np.float32)), choices(rows, penalties)).tolist()


def distribution(logits: np.ndarray, *, temperature, top_k, top_p, min_p) -> np.ndarray:
    """The order that SamplingParams documents, in float64, one row, token by token."""
    logits = logits.astype(np.float64) / temperature
    order = np.argsort(-logits, kind="stable")
    kept = order[: top_k or len(order)]
    probabilities = np.exp(logits[kept] - logits.max())
    probabilities /= probabilities.sum()
    mass, stays = 0.0, []
    for token, probability in zip(kept, probabilities, strict=True):
        if mass < top_p:
            stays.append(token)
        mass += probability
    likeliest = logits[order[0]]
    stays = [t for t in stays if np.exp(logits[t] - likeliest) >= min_p]
    result = np.zeros(len(logits))
    result[stays] = np.exp(logits[stays] - likeliest)
    return result / result.sum()


def assert_drawn_from(tokens: list[int], expected: np.ndarray) -> None:
    """Pearson's chi-square; what is expected less than five times counts as one."""
    counts = np.bincount(tokens, minlength=len(expected))
    assert not counts[expected == 0].any(), "a token that was dropped has been drawn"
    expected = expected * len(tokens)
    rare = expected < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    statistic = ((counts - expected) ** 2 / expected)[expected > 1e-6].sum()
    freedom = max(1, (expected > 1e-6).sum() - 1)
    # Five standard deviations: the draws are the same in every run, so this is passed or isn't.
    assert statistic < freedom + 5 * np.sqrt(2 * freedom), (statistic, freedom)


# -- greedy --


def test_temperature_0_takes_the_largest_logit():
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((20, 1000))
    greedy = {"temperature": 0.0}
    assert draw(logits, [greedy] * 20) == logits.argmax(axis=1).tolist()
    # Also beside rows that are drawn, and whatever else it asks for.
    rows = [greedy | {"top_k": 5, "top_p": 0.5, "min_p": 0.9} if i % 2 else {} for i in range(20)]
    assert draw(logits, rows)[1::2] == logits.argmax(axis=1).tolist()[1::2]


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_logits_of_16_bits_are_sampled_in_32(dtype):
    logits = mx.array(np.random.default_rng(1).standard_normal((30, 500)) * 5).astype(dtype)
    rows = [{"temperature": 0.0}, {}, {"top_k": 9, "top_p": 0.8}] * 10
    expected = sample(logits.astype(mx.float32), choices(rows)).tolist()
    assert sample(logits, choices(rows)).tolist() == expected


# -- distributions --

FILTERS = {
    "plain": {},
    "cold": {"temperature": 0.4},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.83},
    "min_p": {"min_p": 0.12},
    "top_k and top_p": {"top_k": 12, "top_p": 0.7},
    "top_k and min_p": {"top_k": 12, "min_p": 0.2},
    "top_p and min_p": {"top_p": 0.9, "min_p": 0.1},
    "all": {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.08},
    "all, cold": {"temperature": 0.6, "top_k": 6, "top_p": 0.95, "min_p": 0.02},
    "more than there are": {"top_k": 1000},
}


@pytest.mark.parametrize("name", FILTERS)
def test_draws_follow_the_documented_distribution(name):
    wanted = NEUTRAL | FILTERS[name]
    logits = np.random.default_rng(2).standard_normal(60).astype(np.float32) * 1.5
    tokens = draw(np.tile(logits, (6000, 1)), [wanted] * 6000)
    assert_drawn_from(tokens, distribution(logits, **wanted))


def test_the_order_of_the_filters_shows():
    """What is measured above would come out otherwise in another order."""
    logits = np.random.default_rng(2).standard_normal(60).astype(np.float32) * 1.5
    for name in ("top_k and top_p", "all"):
        wanted = NEUTRAL | FILTERS[name]
        right = distribution(logits, **wanted)
        of_all = distribution(logits, **wanted | {"top_k": 0})
        both = (right > 0) & (of_all > 0)
        assert both.sum() == (right > 0).sum() < (of_all > 0).sum()
    tokens = draw(np.tile(logits, (6000, 1)), [NEUTRAL] * 6000)
    with pytest.raises(AssertionError):
        assert_drawn_from(tokens, distribution(logits, **NEUTRAL | {"temperature": 1.3}))


@pytest.mark.parametrize("vocab", [900, 3000])
def test_draws_from_a_large_vocabulary_follow_it_too(vocab):
    """More tokens than are ranked where a row keeps few."""
    logits = np.random.default_rng(3).standard_normal(vocab).astype(np.float32) * 3
    for filters in ({"top_k": 1500, "top_p": 0.9}, {"top_p": 0.6}, {"top_k": 40}, {"min_p": 0.05}):
        wanted = NEUTRAL | filters
        if wanted["top_k"] > vocab:
            wanted["top_k"] = 0
        tokens = draw(np.tile(logits, (2000, 1)), [wanted] * 2000)
        assert_drawn_from(tokens, distribution(logits, **wanted))


# -- rows --


def random_rows(rng, count: int, vocab: int) -> list[dict]:
    return [
        {
            "temperature": rng.choice([0.0, 0.3, 1.0, 5.0]),
            "top_k": int(rng.choice([0, 1, 5, 50, 1024, 1025, vocab])),
            "top_p": rng.choice([1.0, 0.999, 0.7, 0.1]),
            "min_p": rng.choice([0.0, 0.0, 0.1, 1.0]),
            "seed": int(rng.integers(0, 2**63)),
            "position": int(rng.integers(0, 1000)),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize("vocab", [97, 1024, 5000])
def test_a_row_gets_the_same_token_among_any_others(vocab):
    rng = np.random.default_rng(vocab)
    logits = rng.standard_normal((60, vocab)) * 3
    rows = random_rows(rng, 60, vocab)
    alone = [draw(logits[i : i + 1], rows[i : i + 1])[0] for i in range(60)]
    assert draw(logits, rows) == alone
    for _ in range(20):
        some = rng.permutation(60)[: rng.integers(2, 60)]
        assert draw(logits[some], [rows[i] for i in some]) == [alone[i] for i in some]


NEIGHBOURS = {
    "of few": {"top_k": 60},
    "of many": {"top_k": 1000},
    "that sorts all": {"top_k": 2000},
    "with top_p alone": {"top_p": 0.9},
    "without filters": {},
    "that is greedy": {"temperature": 0.0},
}


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
def test_a_neighbour_does_not_move_the_edge_of_top_p(neighbour):
    """The probabilities add up to top_p, give or take a rounding: in a sum of another length the
    rounding is another, and the token at the edge would come and go."""
    rng = np.random.default_rng(5)
    for _ in range(40):
        logits = rng.standard_normal(3000).astype(np.float32) * 2
        ranked = np.sort(logits)[::-1][:50].astype(np.float64)
        mass = np.cumsum(np.exp(ranked) / np.exp(ranked).sum())
        row = {"top_k": 50, "top_p": float(np.float32(mass[rng.integers(1, 6)]))}
        many = [row | {"seed": seed} for seed in range(40)]
        alone = draw(np.tile(logits, (40, 1)), many)
        beside = draw(np.tile(logits, (41, 1)), [*many, NEIGHBOURS[neighbour]])
        assert beside[:40] == alone


def test_seeds_and_positions_change_the_draw():
    logits = np.zeros((1, 1000))

    def tokens(seeds, positions):
        rows = [{"seed": s, "position": p} for s, p in zip(seeds, positions, strict=True)]
        return draw(np.tile(logits, (len(rows), 1)), rows)

    same = tokens([7] * 20, [3] * 20)
    assert len(set(same)) == 1
    assert len(set(tokens(range(100), [0] * 100))) > 85
    assert len(set(tokens([7] * 100, range(100)))) > 85
    # Seeds of all of 64 bits; one seed's positions aren't the next one's.
    assert len(set(tokens([2**32 * i for i in range(100)], [0] * 100))) > 85
    assert len(set(tokens([2**64 - 1 - i for i in range(100)], [0] * 100))) > 85
    overlap = np.array(tokens([7] * 100, range(1, 101))) == tokens([8] * 100, range(100))
    assert overlap.sum() < 5


def test_one_seed_draws_independently_at_each_position():
    logits = np.log([0.5, 0.3, 0.2])
    tokens = draw(np.tile(logits, (6000, 1)), [{"seed": 1, "position": p} for p in range(6000)])
    pairs = [3 * a + b for a, b in pairwise(tokens)]
    assert_drawn_from(tokens, np.exp(logits))
    assert_drawn_from(pairs, np.outer(np.exp(logits), np.exp(logits)).ravel())


# -- edges --


def test_a_tiny_top_p_keeps_the_likeliest_token():
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((200, 300))
    for tiny in (1e-30, 1e-6, 1e-3):
        rows = [{"temperature": 5.0, "top_p": tiny, "seed": s} for s in range(200)]
        assert draw(logits, rows) == logits.argmax(axis=1).tolist()


def test_top_k_1_and_min_p_1_keep_the_likeliest_token():
    logits = np.random.default_rng(7).standard_normal((200, 300))
    for filters in ({"top_k": 1}, {"min_p": 1.0}, {"top_k": 1, "top_p": 0.5, "min_p": 0.5}):
        assert draw(logits, [filters | {"temperature": 9.0}] * 200) == logits.argmax(1).tolist()


def test_equals_at_the_edge_stay_together():
    logits = np.array([3.0, 1.0, 3.0, 3.0, 0.0])
    for filters in ({"top_k": 2}, {"top_p": 0.4}, {"min_p": 1.0}):
        tokens = draw(np.tile(logits, (900, 1)), [filters] * 900)
        assert_drawn_from(tokens, np.array([1, 0, 1, 1, 0]) / 3)


def test_forbidden_tokens_are_never_drawn():
    logits = np.full((500, 50), -np.inf)
    logits[:, [3, 20]] = 0.0
    for filters in ({}, {"top_k": 10}, {"top_p": 0.99}, {"min_p": 0.01}, {"temperature": 100.0}):
        assert set(draw(logits, [filters] * 500)) == {3, 20}
    assert set(draw(logits, [{"temperature": 0.0}] * 500)) == {3}


def test_a_large_temperature_is_nearly_uniform_and_a_small_one_greedy():
    logits = np.random.default_rng(8).standard_normal(40)
    hot = draw(np.tile(logits, (4000, 1)), [{"temperature": 100.0}] * 4000)
    assert_drawn_from(hot, distribution(logits, **NEUTRAL | {"temperature": 100.0}))
    for tiny in (1e-3, 1e-10, 1e-30):
        cold = draw(np.tile(logits * 20, (50, 1)), [{"temperature": tiny}] * 50)
        assert set(cold) == {int(logits.argmax())}


def test_every_temperature_that_is_allowed_gives_a_token_that_was_likely():
    """Division by a number that small overflows; the largest logit is still the one."""
    logits = np.tile([[-5.0, 3.0, 3.5, 3.4, -90.0]], (40, 1))
    for tiny in (1e-36, 1e-38, 1e-40, 1e-44, 1e-300, 5e-324):
        for filters in ({}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}):
            assert set(draw(logits, [filters | {"temperature": tiny}] * 40)) == {2}


# -- penalties --


def penalties(entries: list[tuple]) -> Penalties:
    rows, tokens, repetition, added = zip(*entries, strict=True)
    return Penalties(
        np.array(rows, np.int32),
        np.array(tokens, np.int32),
        np.array(repetition, np.float32),
        np.array(added, np.float32),
    )


def penalised(logits: np.ndarray, entries: list[tuple]) -> np.ndarray:
    logits = logits.copy()
    for row, token, repetition, added in entries:
        old = logits[row, token]
        logits[row, token] = (old / repetition if old > 0 else old * repetition) + added
    return logits


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_row_without_finite_logits_gets_no_token(temperature):
    logits = np.zeros((4, 8), np.float32)
    logits[1] = np.nan
    logits[2, 3] = np.inf
    tokens = np.array(sample(mx.array(logits), choices([{"temperature": temperature}] * 4)))
    assert (tokens >= 0).tolist() == [True, False, False, True]


def test_penalties_change_the_logits_they_name():
    rng = np.random.default_rng(9)
    logits = (rng.standard_normal((30, 100)) * 2).astype(np.float32)
    entries = [
        (row, int(token), rng.uniform(0.5, 2), rng.uniform(-2, 2))
        for row in range(0, 30, 2)
        for token in rng.permutation(100)[:20]
    ]
    rows = [{"temperature": 0.0} if i % 3 else {"top_k": 30, "top_p": 0.9} for i in range(30)]
    changed = penalised(logits, entries)
    assert draw(logits, rows, penalties(entries)) == draw(changed, rows)
    assert draw(logits, rows) != draw(changed, rows)


def test_penalties_leave_the_callers_logits_alone():
    logits = mx.array([[1.0, 2.0, 3.0]])
    rows = choices([{"temperature": 0.0}], penalties([(0, 2, 1.0, -np.inf)]))
    assert sample(logits, rows).tolist() == [1]
    assert logits.tolist() == [[1.0, 2.0, 3.0]]


def test_a_banned_token_is_not_even_the_greedy_one():
    logits = np.random.default_rng(10).standard_normal((100, 30))
    best = logits.argmax(axis=1)
    banned = penalties([(row, int(token), 1.0, -np.inf) for row, token in enumerate(best)])
    without = logits.copy()
    without[np.arange(100), best] = -np.inf
    assert draw(logits, [{"temperature": 0.0}] * 100, banned) == without.argmax(1).tolist()
    drawn = draw(logits, [{"temperature": 2.0}] * 100, banned)
    assert not (np.array(drawn) == best).any()


def test_what_is_negative_infinite_stays_so_under_every_penalty():
    logits = np.array([[-np.inf, 0.0, 1.0]] * 100)
    entries = [(row, 0, factor, 100.0) for row, factor in enumerate(np.linspace(0.1, 3, 100))]
    assert 0 not in draw(logits, [{}] * 100, penalties(entries))


PROMPT = [5, 5, 9, 60, 7]
REQUESTS = [
    {},
    {"repetition_penalty": 1.1},
    {"repetition_penalty": 0.8},
    {"presence_penalty": 0.3},
    {"frequency_penalty": 0.8},
    {"presence_penalty": -0.2, "frequency_penalty": -0.1},
    {"logit_bias": {7: 2.5, 103: -100.0, 3: 0.25}},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "logit_bias": {9: 2.0}},
    *({"min_tokens": n, "stop_token_ids": tuple(range(0, 256, 2))} for n in range(10)),
]


def greedy_by_hand(module, params: SamplingParams) -> list[int]:
    """Token by token, as SamplingParams documents its penalties, from mlx-lm's own logits."""
    output: list[int] = []
    while len(output) < params.max_tokens:
        logits = np.array(module(mx.array([PROMPT + output]))[0, -1], np.float64)
        for token in {*PROMPT, *output}:
            factor = params.repetition_penalty or 1
            logits[token] *= 1 / factor if logits[token] > 0 else factor
        for token in set(output):
            logits[token] -= params.presence_penalty
            logits[token] -= params.frequency_penalty * output.count(token)
        for token, bias in (params.logit_bias or {}).items():
            logits[token] += bias
        if len(output) < params.min_tokens:
            logits[list(params.stop_token_ids)] = -np.inf
        output.append(int(logits.argmax()))
        if output[-1] in params.stop_token_ids:
            break
    return output


def test_penalties_of_a_request_are_those_that_are_documented():
    model = tiny_models.make("llama", tie_word_embeddings=False)
    params = [SamplingParams(temperature=0, max_tokens=40, **request) for request in REQUESTS]
    expected = [greedy_by_hand(model.module, given) for given in params]
    assert expected[0] not in expected[1:], "each has its effect"
    ends = {len(tokens) - given.min_tokens for tokens, given in zip(expected, params, strict=True)}
    assert 1 in ends, "an end token at the first place where it may be"
    outputs = serving.serve(serving.engine(model), [PROMPT] * len(REQUESTS), params)
    assert [output.token_ids for output in outputs] == expected


# -- log-probabilities --


@pytest.mark.parametrize("top", [0, 1, 5, 40])
def test_logprobs_are_those_of_the_softmax(top):
    rng = np.random.default_rng(11)
    logits = rng.standard_normal((7, 40)) * 4
    tokens = rng.integers(0, 40, 7)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    chosen, ids, values = logprobs(mx.array(logits.astype(np.float32)), mx.array(tokens), top)
    assert np.abs(np.array(chosen) - expected[np.arange(7), tokens]).max() < 1e-5
    assert np.array(ids).shape == np.array(values).shape == (7, top)
    order = np.argsort(-expected, axis=1)[:, :top]
    assert np.array_equal(np.array(ids), order)
    if top:
        assert np.abs(np.array(values) - np.take_along_axis(expected, order, 1)).max() < 1e-5


def test_logprobs_of_large_and_of_forbidden_logits_are_sound():
    logits = mx.array([[1e4, 0.0, -np.inf], [-1e4, -1e4, -1e4]])
    chosen, ids, values = logprobs(logits, mx.array([2, 0]), 2)
    assert chosen.tolist() == [-np.inf, pytest.approx(-np.log(3), abs=1e-3)]
    assert ids.tolist()[0] == [0, 1] and values.tolist()[0] == [0.0, -1e4]


def test_choices_name_every_parameter_of_a_row():
    """A parameter that this page forgets would be tested nowhere."""
    names = {field.name for field in dataclasses.fields(Choices)}
    assert names == {*NEUTRAL, "seeds", "positions", "penalties"}


@pytest.mark.parametrize("token", [-1, 5])
def test_a_bias_of_a_token_that_is_not_there_is_an_error(token):
    with pytest.raises(IndexError, match="isn't one of 5"):
        draw(np.zeros((1, 5)), [{"temperature": 0.0}], penalties([(0, token, 1.0, 2.0)]))
