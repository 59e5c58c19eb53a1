"""What mlx-lm generates by itself: one prompt at a time, its own caches, greedily."""

from dataclasses import dataclass

import numpy as np

from mlxpage.metal.backend import mx

# Two logits closer than this may change places by rounding.
NEAR_TIE = 1e-4


@dataclass
class Greedy:
    tokens: list[int]
    gaps: list[float]  # between the two best logits, for each token
    logprobs: list[float]


def generate(module, prompt: list[int], count: int, chunk: int = 512) -> Greedy:
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(module)
    for start in range(0, len(prompt), chunk):
        logits = module(mx.array(prompt[start : start + chunk])[None], cache=cache)
        mx.eval([c.state for c in cache])
    result = Greedy([], [], [])
    for _ in range(count):
        last = logits[0, -1].astype(mx.float32)
        second, best = mx.topk(last, 2).tolist()
        result.gaps.append(abs(best - second))
        result.tokens.append(int(mx.argmax(last)))
        result.logprobs.append((mx.max(last) - mx.logsumexp(last)).item())
        logits = module(mx.array([[result.tokens[-1]]]), cache=cache)
    return result


@dataclass
class Comparison:
    """Our outputs against the oracle's, up to where the first token differs in each."""

    ties: list[tuple[int, int, float]]  # (prompt, position, gap): the two best may change places
    wrong: list[tuple[int, int, float]]  # likewise, but the gap is more than rounding
    logprob_error: float  # the largest, of the tokens that both chose


def compare(outputs, oracle: list[Greedy], near_tie: float = NEAR_TIE) -> Comparison:
    """`outputs` are of greedy requests with logprobs=0."""
    result = Comparison([], [], 0.0)
    for index, (ours, theirs) in enumerate(zip(outputs, oracle, strict=True)):
        assert len(ours.token_ids) == len(theirs.tokens), f"prompt {index} ended early"
        differ = np.flatnonzero(np.array(ours.token_ids) != np.array(theirs.tokens))
        same = int(differ[0]) if len(differ) else len(theirs.tokens)
        if len(differ):
            kind = result.ties if theirs.gaps[same] < near_tie else result.wrong
            kind.append((index, same, theirs.gaps[same]))
        errors = [
            abs(entry.logprob - logprob)
            for entry, logprob in zip(ours.logprobs[:same], theirs.logprobs[:same], strict=True)
        ]
        result.logprob_error = max([result.logprob_error, *errors])
    return result
