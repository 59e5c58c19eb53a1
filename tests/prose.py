"""Real English text that every Python carries: the documentation behind `help()`."""

from pydoc_data.topics import topics


def text() -> str:
    return "\n".join(topics[name] for name in sorted(topics))


def prompts(count: int, shortest: int, longest: int, token_ids: list[int], rng) -> list[list[int]]:
    """`count` pieces of a tokenised text, of `shortest` to `longest` tokens, both included."""
    lengths = [shortest, longest, *rng.integers(shortest, longest + 1, count - 2)]
    starts = rng.integers(0, len(token_ids) - longest, count)
    return [token_ids[s : s + n] for s, n in zip(starts.tolist(), lengths, strict=True)]
