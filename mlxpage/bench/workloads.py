"""What is served: prompts as token ids, and how many tokens are wanted after each.

Everything comes from a seed, so that another run, or another engine, gets the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxpage.errors import InvalidRequest
from mlxpage.sampling_params import SamplingParams
from mlxpage.text import Tokenizer

NAMES = ("random", "text", "shared-prefix", "sharegpt", "replay")

# What vLLM leaves out of ShareGPT: shorter ones than this, and longer ones.
SHORTEST, LONGEST_PROMPT, LONGEST_IN_ALL = 4, 1024, 2048
# ShareGPT's lengths are about log-normal: the mean and the sigma of their logarithm.
CHAT_LOG_MEAN, CHAT_SIGMA = 4.6, 1.0


@dataclass(frozen=True, slots=True)
class Item:
    """A request."""

    prompt: list[int]
    output_len: int
    after: int | None = None
    """The item, by its place, that must have ended before: an earlier turn of the conversation."""

    @property
    def length(self) -> int:
        return len(self.prompt) + self.output_len


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """How long prompts and outputs are, in tokens."""

    input_len: int = 512
    output_len: int = 128
    range_ratio: float = 0.0
    """Uniform from (1 - ratio) times a length to (1 + ratio) times."""
    chat_lengths: int | None = None
    """Instead of those: log-normal like ShareGPT's, up to so many."""

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "chat_lengths"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequest(f"{_option(name)} is {value}; it must be at least 1")
        if not 0 <= self.range_ratio < 1:
            raise InvalidRequest(
                f"--range-ratio is {self.range_ratio}; it must be from 0 to less than 1"
            )

    @property
    def longest(self) -> int:
        """Of prompts."""
        return self.chat_lengths or int(self.input_len * (1 + self.range_ratio))

    def draw(self, rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
        """(prompt, output) of so many requests."""
        if self.chat_lengths is not None:
            drawn = rng.lognormal(CHAT_LOG_MEAN, CHAT_SIGMA, (count, 2))
            shortest = min(SHORTEST, self.chat_lengths)
            return _pairs(np.clip(drawn, shortest, self.chat_lengths).astype(int))
        means = np.array([self.input_len, self.output_len])
        low, high = (means * (1 + sign * self.range_ratio) for sign in (-1, 1))
        return _pairs(
            rng.integers(np.maximum(1, low).astype(int), high.astype(int) + 1, (count, 2))
        )


def _pairs(drawn: np.ndarray) -> list[tuple[int, int]]:
    return [tuple(pair) for pair in drawn.tolist()]


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def greedy(item: Item, **more: Any) -> SamplingParams:
    """The likeliest token each time, and exactly as many as are wanted."""
    return SamplingParams(
        **{
            "temperature": 0,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": item.output_len,
            "ignore_eos": True,
            **more,
        }
    )


def plain_ids(vocab_size: int, special: frozenset[int]) -> np.ndarray:
    """What random prompts are made of: all token ids but the special ones."""
    return np.setdiff1d(np.arange(vocab_size), np.array(sorted(special), int))


def draw(rng: np.random.Generator, ids: np.ndarray, count: int) -> list[int]:
    return rng.choice(ids, count).tolist()


def items(
    dataset: str,
    *,
    tokenizer: Tokenizer,
    vocab_size: int,
    num_prompts: int,
    lengths: Lengths,
    seed: int = 0,
    path: Path | None = None,
    prefix_len: int = 256,
    num_prefixes: int = 1,
) -> list[Item]:
    """The requests of a dataset. Raises InvalidRequest for what can't be made or read."""
    if num_prompts < 1:
        raise InvalidRequest(f"--num-prompts is {num_prompts}; it must be at least 1")
    if path is None and dataset in ("sharegpt", "replay"):
        raise InvalidRequest(f"--dataset {dataset} needs its file: --dataset-path FILE")
    rng = np.random.default_rng(seed)
    plain = plain_ids(vocab_size, tokenizer.special_ids)
    match dataset:
        case "random":
            return random_items(plain, lengths.draw(rng, num_prompts), rng)
        case "text":
            return text_items(_encode_all(tokenizer, _text(path)), lengths, num_prompts, rng)
        case "shared-prefix":
            pairs = lengths.draw(rng, num_prompts)
            return shared_prefix_items(plain, pairs, prefix_len, num_prefixes, rng)
        case "sharegpt":
            return sharegpt_items(_read(path), tokenizer, num_prompts, rng)
        case "replay":
            return replay_items(_read(path), tokenizer, num_prompts)
    raise InvalidRequest(f"--dataset is {dataset!r}; it must be one of {', '.join(NAMES)}")


def random_items(ids, pairs, rng) -> list[Item]:
    return [Item(draw(rng, ids, prompt), output) for prompt, output in pairs]


def text_items(ids: list[int], lengths: Lengths, count: int, rng) -> list[Item]:
    """Pieces of a text that may overlap."""
    pairs = lengths.draw(rng, count)
    if len(ids) <= lengths.longest:
        raise InvalidRequest(
            f"the text has {len(ids):,} tokens; prompts of up to {lengths.longest:,} need a longer "
            "one. Give another --dataset-path, or a smaller --input-len."
        )
    starts = rng.integers(0, len(ids) - lengths.longest, count).tolist()
    return [Item(ids[s : s + p], n) for s, (p, n) in zip(starts, pairs, strict=True)]


def shared_prefix_items(ids, pairs, prefix_len, num_prefixes, rng) -> list[Item]:
    """In turns, prompts begin with one of some prefixes; what follows is each one's own."""
    for name, value in {"prefix_len": prefix_len, "num_prefixes": num_prefixes}.items():
        if value < 1:
            raise InvalidRequest(f"{_option(name)} is {value}; it must be at least 1")
    prefixes = [draw(rng, ids, prefix_len) for _ in range(num_prefixes)]
    return [
        Item(prefixes[i % num_prefixes] + draw(rng, ids, prompt), output)
        for i, (prompt, output) in enumerate(pairs)
    ]


def sharegpt_items(text: str, tokenizer, count: int, rng) -> list[Item]:
    """First questions of conversations, shuffled, with outputs as long as the answers there; those
    that vLLM leaves out aren't among them."""
    conversations = [turns for value in json_values(text) if len(turns := _turns(value)) >= 2]
    found: list[Item] = []
    for index in rng.permutation(len(conversations)).tolist():
        (_, question), (_, answer), *_ = conversations[index]
        prompt, output = tokenizer.encode(question), len(tokenizer.encode(answer))
        is_short = min(len(prompt), output) < SHORTEST
        is_long = len(prompt) > LONGEST_PROMPT or len(prompt) + output > LONGEST_IN_ALL
        if not (is_short or is_long):
            found.append(Item(prompt, output))
        if len(found) == count:
            return found
    if not found:
        raise InvalidRequest(
            f"--dataset-path has {len(conversations):,} conversations, none with a question and "
            "an answer of usable lengths; it must be as ShareGPT is: "
            '[{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]}]'
        )
    return found


def replay_items(text: str, tokenizer, count: int) -> list[Item]:
    """Every answer of the assistant in every conversation, first turns first: the prompt is what
    was said before, with the answers of the file, and the output as long as the answer there."""
    turns: list[tuple[int, int, Item]] = []
    for conversation, value in enumerate(json_values(text)):
        messages = _turns(value)
        answers = [
            place for place, (role, _) in enumerate(messages) if place and role == "assistant"
        ]
        for turn, place in enumerate(answers):
            prompt = _prompt(tokenizer, messages[:place])
            output = max(1, len(tokenizer.encode(messages[place][1])))
            turns.append((turn, conversation, Item(prompt, output)))
    turns.sort(key=lambda each: each[:2])
    if not turns:
        raise InvalidRequest(
            "--dataset-path has no conversation with an answer; each line must be one: "
            '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}]}'
        )
    last: dict[int, int] = {}
    found = []
    for place, (_, conversation, item) in enumerate(turns[:count]):
        found.append(Item(item.prompt, item.output_len, last.get(conversation)))
        last[conversation] = place
    return found


def _prompt(tokenizer, messages: list[tuple[str, str]]) -> list[int]:
    if tokenizer.has_chat_template:
        told = [{"role": role, "content": content} for role, content in messages]
        return tokenizer.apply_chat_template(told)
    return tokenizer.encode("".join(f"{content}\n" for _, content in messages))


_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}


def _turns(value: Any) -> list[tuple[str, str]]:
    """(role, content) of a conversation, in ShareGPT's words or OpenAI's; none of anything else."""
    if isinstance(value, dict):
        value = value.get("conversations") or value.get("messages") or value.get("turns")
    if not isinstance(value, list):
        return []
    turns = []
    for message in value:
        if not isinstance(message, dict):
            return []
        role = message.get("role") or message.get("from")
        content = message.get("content") or message.get("value")
        if isinstance(role, str) and isinstance(content, str):
            turns.append((_ROLES.get(role, role), content))
    return turns


def json_values(text: str) -> Iterator[Any]:
    """The elements of a JSON array, or the values of JSON lines. A file that was cut short gives
    those that are whole."""
    decoder = json.JSONDecoder()
    place = _skip(text, 0, " \t\r\n\ufeff")
    place += text[place : place + 1] == "["
    while (place := _skip(text, place, " \t\r\n,")) < len(text):
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):  # the end of the array, or of what is whole
            return
        yield value


def _skip(text: str, place: int, characters: str) -> int:
    while place < len(text) and text[place] in characters:
        place += 1
    return place


def _encode_all(tokenizer: Tokenizer, text: str) -> list[int]:
    """Of a text that is longer than any prompt, without transformers' warning of that."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return tokenizer.encode(text)
    finally:
        logger.setLevel(level)


def _text(path: Path | None) -> str:
    """Of a file; without one, the English that every Python carries: what `help()` shows."""
    if path is not None:
        return _read(path)
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InvalidRequest(f"can't read {path}: {reason}") from None


def longest(work: Sequence[Item]) -> int:
    """Tokens of the longest request, prompt and output."""
    return max(item.length for item in work)


def described(work: Sequence[Item]) -> dict[str, int]:
    """What a record tells of it."""
    prompts, outputs = [len(item.prompt) for item in work], [item.output_len for item in work]
    return {
        "num_prompts": len(work),
        "prompt_tokens": sum(prompts),
        "output_tokens": sum(outputs),
        "longest_prompt": max(prompts),
        "longest_output": max(outputs),
    }
