"""What a caller may ask of a generation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlxpage.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_CHOICES = 128
MAX_STOPS = 32
MAX_STOP_LENGTH = 256
MAX_LOGIT_BIASES = 1024

# What a field means when neither the caller nor the model says anything.
NEUTRAL = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen and when a generation ends.

    A field of the first group left at None takes the model's own default
    (`generation_config.json`), or else the neutral value, which is greedy decoding.
    Raises `InvalidRequest` for a value out of range.

    Order of work: penalties and biases on the raw logits, then temperature, top_k, top_p and
    min_p, as Hugging Face's generation and vLLM have it. `repetition_penalty` counts prompt and
    output, presence and frequency count the output.
    """

    temperature: float | None = None
    """0 is greedy; at most 100."""
    top_p: float | None = None
    """Keep the likeliest tokens that together reach this probability; 1 is off."""
    top_k: int | None = None
    """Keep this many of the likeliest tokens; 0 is off."""
    min_p: float | None = None
    """Drop tokens less likely than this share of the likeliest; 0 is off."""
    repetition_penalty: float | None = None
    """Divides positive logits of seen tokens, multiplies negative ones; 1 is off."""

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these token ids, -100 to 100."""

    max_tokens: int | None = None
    """None: until the model stops, or the context or the pool ends."""
    min_tokens: int = 0
    """No end token and no stop token before this many."""
    stop: tuple[str, ...] = ()
    """Strings that end the generation; they are not part of the text."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True

    seed: int | None = None
    """Same seed, same tokens, in any batch."""
    logprobs: int | None = None
    """Log-probabilities of each token and of this many of the likeliest."""
    prompt_logprobs: int | None = None

    n: int = 1
    """Generations of the prompt, which is computed once; each has its own seed, the next one's is
    larger by one."""
    best_of: int | None = None
    """Generate this many and give the `n` of them whose tokens are likeliest on average."""

    cache_salt: str | None = None
    """Prefixes are shared with requests of the same salt only."""

    def __post_init__(self) -> None:
        _number(self, "temperature", 0, 100, none=True)
        _number(self, "top_p", 0, 1, none=True, above=True)
        _integer(self, "top_k", 0, 2**31 - 1, none=True)
        _number(self, "min_p", 0, 1, none=True)
        _number(self, "repetition_penalty", 0, 100, none=True, above=True)
        _number(self, "presence_penalty", -2, 2)
        _number(self, "frequency_penalty", -2, 2)
        _integer(self, "max_tokens", 1, 2**31 - 1, none=True)
        _integer(self, "min_tokens", 0, self.max_tokens or 2**31 - 1)
        _integer(self, "seed", -(2**63), 2**64 - 1, none=True)
        _integer(self, "logprobs", 0, MAX_LOGPROBS, none=True)
        _integer(self, "prompt_logprobs", 0, MAX_LOGPROBS, none=True)
        _integer(self, "n", 1, MAX_CHOICES)
        _integer(self, "best_of", self.n, MAX_CHOICES, none=True)
        _text(self, "cache_salt")
        _boolean(self, "ignore_eos")
        _boolean(self, "skip_special_tokens")
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    @property
    def counts_tokens(self) -> bool:
        """Whether the choice of a token depends on those before it otherwise than by the model."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    def with_defaults(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """These params with every None of the first group filled in."""
        unset = {name for name in NEUTRAL if getattr(self, name) is None}
        return replace(self, **{name: defaults.get(name, NEUTRAL[name]) for name in unset})


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """How wide and how long `LLM.beam_search` looks. Raises `InvalidRequest` for a value out of
    range."""

    beam_width: int = 4
    """Beams that are carried on, and results."""
    max_tokens: int = 64
    length_penalty: float = 1.0
    """Results are ranked by cumulative log-probability / length ** length_penalty: above 0 favours
    long ones."""
    early_stopping: bool = False
    """End with the first `beam_width` results; otherwise when no beam can become a better one."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    cache_salt: str | None = None
    """As in `SamplingParams`."""

    def __post_init__(self) -> None:
        _integer(self, "beam_width", 1, MAX_LOGPROBS)
        _integer(self, "max_tokens", 1, 2**31 - 1)
        _number(self, "length_penalty", -10, 10)
        _boolean(self, "early_stopping")
        _boolean(self, "ignore_eos")
        _boolean(self, "skip_special_tokens")
        _text(self, "cache_salt")
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))


def _number(params, name: str, low: float, high: float, *, none=False, above=False) -> None:
    value = getattr(params, name)
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise InvalidRequest(f"{name} must be a number, not {value!r}")
    if not low <= value <= high or (above and value == low):
        bounds = f"{'above' if above else 'from'} {low} {'and at most' if above else 'to'} {high}"
        raise InvalidRequest(f"{name} is {value}; it must be {bounds}")


def _integer(params, name: str, low: int, high: int, *, none=False) -> None:
    value = getattr(params, name)
    if none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be an integer, not {value!r}")
    if not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}; it must be from {low} to {high}")


def _boolean(params, name: str) -> None:
    value = getattr(params, name)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} must be True or False, not {value!r:.80}")


def _text(params, name: str) -> None:
    value = getattr(params, name)
    if value is not None and not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string, not {value!r:.80}")


def _items(name: str, values: Any) -> tuple:
    if values is not None and not isinstance(values, (list, tuple, set, frozenset)):
        raise InvalidRequest(f"{name} must be a list, not {values!r:.80}")
    return tuple(values or ())


def _stops(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else _items("stop", stop)
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"{len(stops)} stop strings; at most {MAX_STOPS} are allowed")
    for text in stops:
        if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
            raise InvalidRequest(
                f"a stop string has 1 to {MAX_STOP_LENGTH} characters, unlike {text!r:.80}"
            )
    return stops


def _token_ids(ids: Iterable[int] | None) -> tuple[int, ...]:
    ids = _items("stop_token_ids", ids)
    if len(ids) > MAX_LOGIT_BIASES:
        raise InvalidRequest(f"{len(ids)} stop_token_ids; at most {MAX_LOGIT_BIASES} are allowed")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise InvalidRequest(f"stop_token_ids holds {token!r}, which is no token id")
    return ids


def _biases(biases: Mapping[int, float] | None) -> dict[int, float] | None:
    if biases is None:
        return None
    if not isinstance(biases, Mapping):
        raise InvalidRequest(f"logit_bias must map token ids to numbers, not be {biases!r:.80}")
    if len(biases) > MAX_LOGIT_BIASES:
        raise InvalidRequest(
            f"logit_bias has {len(biases)} entries; at most {MAX_LOGIT_BIASES} are allowed"
        )
    for token, bias in biases.items():
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise InvalidRequest(f"logit_bias holds {token!r}, which is no token id")
        if not isinstance(bias, (int, float)) or not -100 <= bias <= 100:
            raise InvalidRequest(
                f"logit_bias of token {token} is {bias!r}; it goes from -100 to 100"
            )
    return dict(biases)
