"""One generation, as the scheduler sees it: tokens known, tokens computed, blocks held."""

from __future__ import annotations

from enum import Enum, auto

from mlxpage.outputs import FinishReason
from mlxpage.sampling_params import SamplingParams


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """A prompt and what was generated after it.

    `num_tokens` counts the known tokens and the placeholders: a token that was computed but not
    yet read (`num_pending` of them) already has its position, so that the next step can be
    planned before it is known.
    """

    __slots__ = (
        "arrival",
        "block_keys",
        "block_tables",
        "finish_reason",
        "forks",
        "id",
        "max_length",
        "num_cached_tokens",
        "num_committed_blocks",
        "num_computed_tokens",
        "num_pending",
        "num_preemptions",
        "num_prompt_tokens",
        "num_stored_tokens",
        "num_tokens",
        "params",
        "priority",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        id: int,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        max_length: int,
        stop_token_ids: frozenset[int] = frozenset(),
        priority: int = 0,
    ):
        assert 0 < len(prompt_token_ids) < max_length, "a prompt and room for a token after it"
        self.id = id
        self.arrival = id
        self.priority = priority
        self.params = params
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.num_tokens = len(prompt_token_ids)
        self.max_length = max_length
        """Prompt and output together; reaching it ends the sequence."""
        self.stop_token_ids = stop_token_ids
        self.num_computed_tokens = 0
        """Positions whose K and V are in the pool, or will be once the planned step has run."""
        self.num_cached_tokens = 0
        """Of the prompt, those whose K and V were found when it was first admitted."""
        self.num_stored_tokens = 0
        """Its first tokens whose K and V are in the pool or in the second tier, as it was admitted:
        up to there they are read instead of computed."""
        self.num_pending = 0
        self.num_preemptions = 0
        self.block_tables: list[list[int]] = []
        """One per cache group, filled in by the scheduler."""
        self.block_keys: list[bytes] = []
        """Of its first full blocks, as far as the prefix cache has made them."""
        self.num_committed_blocks = 0
        """Blocks of its tables that the prefix cache knows."""
        self.forks: list[Sequence] = []
        """Sequences with the same prompt that go their own ways once it is computed."""
        self.status = Status.WAITING
        self.finish_reason: FinishReason | None = None

    def fork(self, id: int, params: SamplingParams, *, max_length: int, **options) -> Sequence:
        """Another sequence with the tokens that are known of this one, to go its own way."""
        prompt = self.token_ids[: self.num_prompt_tokens]
        child = Sequence(id, prompt, params, max_length=max_length, **options)
        child.token_ids = list(self.token_ids)
        child.num_tokens = len(child.token_ids)
        return child

    def __len__(self) -> int:
        return self.num_tokens

    def __lt__(self, other: Sequence) -> bool:
        """Served before `other`: by priority (lower first), then first come, first served."""
        if self.priority != other.priority:
            return self.priority < other.priority
        return self.arrival < other.arrival

    def __repr__(self) -> str:
        return (
            f"Sequence({self.id}, {self.status.name.lower()}, {self.num_computed_tokens} of "
            f"{self.num_tokens} tokens computed, {self.num_preemptions} preemptions)"
        )

    @property
    def num_uncomputed_tokens(self) -> int:
        """Of those that have their position, the ones that a step has still to be planned for."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_scored(self) -> bool:
        """Whether log-probabilities are wanted of the prompt tokens that are computed next."""
        return (
            self.params.prompt_logprobs is not None
            and self.num_computed_tokens < self.num_prompt_tokens
        )

    def append(self, token: int) -> FinishReason | None:
        """Takes a sampled token in place of its placeholder; says whether it ends the sequence."""
        assert self.num_pending > 0, f"{self} expects no token"
        self.num_pending -= 1
        self.token_ids.append(token)
        if token in self.stop_token_ids and self.num_output_tokens > self.params.min_tokens:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_length else None
