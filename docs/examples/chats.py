"""Many conversations at once, of several turns, on one event loop.

    python docs/examples/chats.py [MODEL] [--chats 32] [--turns 3] [--max-tokens 32] [--memory 2GB]

Each conversation is a coroutine that asks, waits for its own answer and asks on. The engine
computes what all of them need in the same steps. All begin with one system prompt, which is
computed once, and each turn repeats the turns before it, which are found in the pool: a row is
printed when an answer has ended, and says how many tokens of its prompt were cached.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from dataclasses import dataclass

from mlxpage import AsyncEngine, MlxpageError, RequestOutput, SamplingParams

SYSTEM = "You answer in one short sentence, for somebody who is new to the subject."
SUBJECTS = [
    "bread", "rain", "a bicycle", "the moon", "glass", "a river", "chess", "honey",
    "paper", "a volcano", "silk", "a bridge", "salt", "the wind", "a clock", "cheese",
]  # fmt: skip
QUESTIONS = ["What is {}?", "Why does that matter?", "What do people often get wrong about it?"]

COLUMNS = "{:>7}  {:>4}  {:>4}  {:>6}  {:>6}  {:>8}  {:>8}  {:>6}  {}"
HEAD = ("s", "chat", "turn", "prompt", "cached", "computed", "first ms", "tokens", "answer")


@dataclass
class Turn:
    """What one turn of all conversations took, in tokens."""

    prompt: int = 0
    cached: int = 0
    answers: int = 0

    def add(self, output: RequestOutput) -> None:
        self.prompt += len(output.prompt_token_ids)
        self.cached += output.num_cached_tokens
        self.answers += len(output.token_ids)


async def converse(
    engine: AsyncEngine, chat: int, turns: list[Turn], params: SamplingParams, began: float
) -> None:
    messages = [{"role": "system", "content": SYSTEM}]
    subject = SUBJECTS[chat % len(SUBJECTS)]
    for number, turn in enumerate(turns):
        question = QUESTIONS[number % len(QUESTIONS)].format(subject)
        messages.append({"role": "user", "content": question})
        output = await engine.submit(list(messages), params)
        messages.append({"role": "assistant", "content": output.text})
        turn.add(output)
        print_row(time.perf_counter() - began, chat, number, output)


def print_row(seconds: float, chat: int, turn: int, output: RequestOutput) -> None:
    prompt, cached = len(output.prompt_token_ids), output.num_cached_tokens
    first = f"{output.timings.ttft_s * 1e3:,.0f}"
    start = " ".join(output.text.split())[:40]
    row = (chat, turn, prompt, cached, prompt - cached, first, len(output.token_ids), start)
    print(COLUMNS.format(f"{seconds:.1f}", *row), flush=True)


async def run(model: str, chats: int, num_turns: int, params: SamplingParams, **options) -> None:
    turns = [Turn() for _ in range(num_turns)]
    async with AsyncEngine.load(model, max_num_seqs=chats, **options) as engine:
        print(COLUMNS.format(*HEAD))
        began = time.perf_counter()
        talks = (converse(engine, chat, turns, params, began) for chat in range(chats))
        await asyncio.gather(*talks)
        seconds = time.perf_counter() - began
        peak = engine.stats()["blocks"]["peak_used"]
    print()
    for number, turn in enumerate(turns):
        share = turn.cached / turn.prompt
        print(
            f"turn {number}: {turn.cached:,} of {turn.prompt:,} prompt tokens cached ({share:.0%})"
        )
    tokens = sum(turn.answers for turn in turns)
    print(
        f"{chats * num_turns} answers, {tokens:,} tokens in {seconds:.1f} s: "
        f"{tokens / seconds:,.1f} tok/s; at most {peak:,} blocks in use"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--chats", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--memory", help='budget, as in "4GB"')
    given = parser.parse_args(arguments)
    params = SamplingParams(max_tokens=given.max_tokens)
    try:
        asyncio.run(run(given.model, given.chats, given.turns, params, memory=given.memory))
    except MlxpageError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
