"""An agent that thinks of several ways on, and takes the one it is surest of.

    python docs/examples/forked_agent.py [MODEL] [--plans 4] [--rounds 3] [--memory 2GB]

In each round it begins a step, and when there are tokens of that it forks: each candidate goes on
from there by itself, all at once. The one whose tokens were likeliest on average becomes part of
the conversation, and the next round begins behind it. What candidates have in common is computed
once and held once: they share its blocks, and the next round finds what was chosen in the pool.

Where the branches are known from the start, `SamplingParams(n=4)` is simpler.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace

from mlxpage import LLM, InvalidRequest, MlxpageError, RequestOutput, SamplingParams, StreamEvent

TASK = (
    "We turn a small neglected garden into one that grows vegetables, step by step. "
    "Name one step at a time, in one short sentence."
)
FIRST, NEXT = "What do we do first?", "What do we do next?"
PARAMS = SamplingParams(temperature=0.7, min_tokens=24, max_tokens=48, logprobs=0)


@dataclass
class Candidate:
    output: RequestOutput
    num_shared: int
    """Output tokens that it had when it was forked."""

    @property
    def score(self) -> float:
        """The mean log-probability of its tokens."""
        return sum(token.logprob for token in self.output.logprobs) / len(self.output.logprobs)

    @property
    def text(self) -> str:
        return " ".join(self.output.text.split())

    @property
    def num_tokens(self) -> int:
        return len(self.output.prompt_token_ids) + len(self.output.token_ids)


def think(llm: LLM, prompt: list[int], count: int, params: SamplingParams) -> list[Candidate]:
    """Ways to go on: one generation and its forks, which all run at once."""
    stream = llm.stream(prompt, params)
    begun = [next(stream)]  # there has to be a token before it can be forked
    streams = [stream]
    try:
        while len(streams) < count:
            streams.append(stream.fork())
    except InvalidRequest:  # it has ended meanwhile, so these will have to do
        pass
    events = [[*begun, *stream], *map(list, streams[1:])]
    return [candidate(read) for read in events]


def candidate(events: list[StreamEvent]) -> Candidate:
    output = events[-1].output
    own = sum(len(event.token_ids) for event in events)  # of a fork: what came after forking
    return Candidate(output, len(output.token_ids) - own)


def report(
    number: int, found: list[Candidate], best: Candidate, block_size: int, peak: int
) -> None:
    first, *forks = found
    prompt, cached = len(first.output.prompt_token_ids), first.output.num_cached_tokens
    print(f"\nround {number}: a prompt of {prompt} tokens, {cached} of them cached")
    for one in found:
        mark = "*" if one is best else " "
        print(f" {mark} {one.score:6.2f}  {one.text}")
    # A fork computes one token again, the last it shares.
    spared = sum(prompt + fork.num_shared - 1 for fork in forks)
    alone = sum(-(-one.num_tokens // block_size) for one in found)
    print(f"   {spared:,} tokens that the forks have in common with the first: not computed again")
    print(
        f"   at most {peak} blocks of {block_size} tokens in use so far; without sharing: {alone}"
    )


def run(model: str, count: int, rounds: int, params: SamplingParams, **options) -> list[str]:
    """The steps that were chosen."""
    messages = [{"role": "user", "content": f"{TASK} {FIRST}"}]
    steps = []
    with LLM(model, **options) as llm:
        for number in range(1, rounds + 1):
            found = think(llm, llm.chat_prompt(messages), count, params)
            best = max(found, key=lambda one: one.score)
            stats = llm.stats()
            report(number, found, best, stats["block_size"], stats["blocks"]["peak_used"])
            steps.append(best.text)
            messages.append({"role": "assistant", "content": best.output.text})
            messages.append({"role": "user", "content": NEXT})
    return steps


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--plans", type=int, default=4, help="candidates in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", help='budget, as in "4GB"')
    given = parser.parse_args(arguments)
    params = replace(PARAMS, seed=given.seed)
    try:
        steps = run(given.model, given.plans, given.rounds, params, memory=given.memory)
    except MlxpageError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("\nThe plan:")
    for number, step in enumerate(steps, 1):
        print(f"{number}. {step}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
