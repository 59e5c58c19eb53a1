"""What a caller may ask for, and what the message says when it's too much."""

import dataclasses
import math

import pytest

from mlxpage.errors import InvalidRequest, MlxpageError
from mlxpage.sampling_params import NEUTRAL, SamplingParams

NAN, INFINITY = math.nan, math.inf

# field, value, and what the message must say besides the field's name
TOO_MUCH = [
    ("temperature", -0.1, "-0.1", "from 0 to 100"),
    ("temperature", 100.5, "100.5", "from 0 to 100"),
    ("top_p", 0, "is 0;", "above 0 and at most 1"),
    ("top_p", 1.01, "1.01", "above 0 and at most 1"),
    ("top_k", -1, "-1", "from 0 to 2147483647"),
    ("top_k", 2**31, "2147483648", "from 0 to 2147483647"),
    ("min_p", -0.5, "-0.5", "from 0 to 1"),
    ("min_p", 1.5, "1.5", "from 0 to 1"),
    ("repetition_penalty", 0, "is 0;", "above 0 and at most 100"),
    ("repetition_penalty", 101, "101", "above 0 and at most 100"),
    ("presence_penalty", -2.1, "-2.1", "from -2 to 2"),
    ("frequency_penalty", 2.1, "2.1", "from -2 to 2"),
    ("max_tokens", 0, "is 0;", "from 1 to 2147483647"),
    ("max_tokens", -5, "-5", "from 1 to 2147483647"),
    ("min_tokens", -1, "-1", "from 0 to"),
    ("seed", 2**64, str(2**64), f"to {2**64 - 1}"),
    ("seed", -(2**63) - 1, str(-(2**63) - 1), f"from {-(2**63)}"),
    ("logprobs", 21, "21", "from 0 to 20"),
    ("logprobs", -1, "-1", "from 0 to 20"),
    ("prompt_logprobs", 21, "21", "from 0 to 20"),
    ("stop", ["x"] * 33, "33", "at most 32"),
    ("stop", "", "''", "1 to 256 characters"),
    ("stop", ["fine", ""], "''", "1 to 256 characters"),
    ("stop", "x" * 257, "xxx", "1 to 256 characters"),
    ("stop_token_ids", [1] * 1025, "1025", "at most 1024"),
    ("logit_bias", dict.fromkeys(range(1025), 0.0), "1025", "at most 1024"),
    ("logit_bias", {3: 100.5}, "token 3 is 100.5", "from -100 to 100"),
    ("logit_bias", {3: NAN}, "token 3 is nan", "from -100 to 100"),
    ("logit_bias", {3: -INFINITY}, "token 3 is -inf", "from -100 to 100"),
]

WRONG_KIND = [
    ("temperature", "hot", "'hot'", "number"),
    ("temperature", NAN, "nan", "number"),
    ("temperature", INFINITY, "inf", "number"),
    ("temperature", True, "True", "number"),
    ("top_p", [0.5], "[0.5]", "number"),
    ("presence_penalty", None, "None", "number"),
    ("top_k", 2.0, "2.0", "integer"),
    ("top_k", False, "False", "integer"),
    ("max_tokens", "10", "'10'", "integer"),
    ("max_tokens", 1e9, "1000000000.0", "integer"),
    ("min_tokens", None, "None", "integer"),
    ("seed", 0.5, "0.5", "integer"),
    ("logprobs", True, "True", "integer"),
    ("stop", ["fine", 3], "3", "1 to 256 characters"),
    ("stop_token_ids", [-1], "-1", "no token id"),
    ("stop_token_ids", [1.0], "1.0", "no token id"),
    ("stop", 5, "5", "a list"),
    ("stop", b"END", "b'END'", "a list"),
    ("stop_token_ids", "ab", "'ab'", "a list"),
    ("stop_token_ids", 5, "5", "a list"),
    ("stop_token_ids", [True], "True", "no token id"),
    ("logit_bias", {-1: 0.5}, "-1", "no token id"),
    ("logit_bias", {"7": 0.5}, "'7'", "no token id"),
    ("logit_bias", [7], "[7]", "map token ids to numbers"),
    ("ignore_eos", "false", "'false'", "True or False"),
    ("skip_special_tokens", None, "None", "True or False"),
    ("logit_bias", {7: "much"}, "token 7 is 'much'", "from -100 to 100"),
]


@pytest.mark.parametrize(("name", "value", "shown", "limit"), TOO_MUCH + WRONG_KIND)
def test_a_bad_value_is_refused_by_name_value_and_limit(name, value, shown, limit):
    with pytest.raises(InvalidRequest) as refusal:
        SamplingParams(**{name: value})
    message = str(refusal.value)
    assert name in message and shown in message and limit in message
    assert len(message) < 200, "a long value is cut"


def test_a_refusal_is_a_value_error_and_one_of_ours():
    for kind in (ValueError, MlxpageError):
        with pytest.raises(kind):
            SamplingParams(top_p=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 100),
        ("top_p", 1),
        ("top_p", 1e-9),
        ("top_k", 2**31 - 1),
        ("min_p", 0),
        ("min_p", 1),
        ("repetition_penalty", 100),
        ("presence_penalty", -2),
        ("frequency_penalty", 2),
        ("max_tokens", 1),
        ("seed", 2**64 - 1),
        ("seed", -(2**63)),
        ("logprobs", 0),
        ("prompt_logprobs", 20),
        ("stop", ("x" * 256,) * 32),
        ("stop_token_ids", (0,) * 1024),
        ("logit_bias", dict.fromkeys(range(1024), -100)),
    ],
)
def test_a_limit_itself_is_allowed(name, value):
    assert getattr(SamplingParams(**{name: value}), name) == value


def test_min_tokens_is_at_most_max_tokens():
    assert SamplingParams(min_tokens=8, max_tokens=8).min_tokens == 8
    with pytest.raises(InvalidRequest, match="min_tokens is 9; it must be from 0 to 8"):
        SamplingParams(min_tokens=9, max_tokens=8)


@pytest.mark.parametrize("empty", [None, [], (), set()])
def test_no_stops_are_an_empty_tuple(empty):
    params = SamplingParams(stop=empty, stop_token_ids=empty)
    assert params.stop == () and params.stop_token_ids == ()


def test_one_stop_string_is_a_tuple_of_one():
    assert SamplingParams(stop="END").stop == ("END",)


def test_lists_are_taken_as_they_are_now():
    stop, ids, bias = ["a"], [1], {1: 0.5}
    params = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias)
    stop.append(""), ids.append(-1), bias.update({-1: 1e9})
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a",), (1,), {1: 0.5})


def test_params_are_frozen_and_have_names():
    params = SamplingParams()
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 1.0
    with pytest.raises(TypeError):
        SamplingParams(0.5)


def test_what_nobody_says_is_neutral():
    params = SamplingParams(max_tokens=3).with_defaults({})
    assert {name: getattr(params, name) for name in NEUTRAL} == NEUTRAL
    assert params.max_tokens == 3


def test_the_caller_wins_over_the_model_and_the_model_over_the_neutral_value():
    model = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "unknown": 1}
    params = SamplingParams(temperature=0, top_k=5).with_defaults(model)
    assert (params.temperature, params.top_p, params.top_k) == (0, 0.95, 5)
    assert (params.min_p, params.repetition_penalty) == (0.0, 1.0)


def test_defaults_do_not_touch_the_other_fields():
    asked = SamplingParams(seed=3, stop="x", stop_token_ids=[5], logit_bias={1: 2.0}, logprobs=2)
    params = asked.with_defaults({"temperature": 1.0, "max_tokens": 5, "seed": 9})
    assert params == dataclasses.replace(
        asked, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0
    )


def test_a_default_out_of_range_is_refused_too():
    with pytest.raises(InvalidRequest, match="top_p is 2"):
        SamplingParams().with_defaults({"top_p": 2})
