"""This engine: its scheduler over its block pool, as they are, with tokens made up.

Nothing is simulated here but the model. A request has its real length; the scheduler doesn't know
where it will end, and learns it from a stop token, as it does from a model.
"""

from __future__ import annotations

from benchmarks.paper.serving import CONTEXT, Memory, Request, Step
from mlxpage.cache_group import CacheGroup
from mlxpage.prefix_cache import PrefixCache
from mlxpage.sampling_params import SamplingParams
from mlxpage.scheduler import Scheduled, Scheduler
from mlxpage.sequence import Sequence

BLOCK = 16
# As vLLM had it when the paper was written: so many that memory is what limits.
MAX_SEQS, MAX_ROWS = 256, 2560
PARAMS = SamplingParams()
STOP, COMMON, FIRST = 0, 1, 2


class NoRoomKept(Scheduler):
    """Admits whatever has room for its known tokens, as the paper's system does but for 1 %."""

    def _reserve(self, seq: Sequence) -> float:
        return 0


class Paged:
    def __init__(
        self,
        slots: int,
        block_size: int = BLOCK,
        *,
        samples: int = 1,
        scheduler: type[Scheduler] = Scheduler,
    ):
        """`samples`: generations of each request, all as long."""
        # The arrays of a pool have one block more, the null block.
        group = CacheGroup(slots // block_size - 1, block_size)
        self._slots, self._pool, self._block_size = slots, group.pool, block_size
        self._samples = samples
        self.scheduler = scheduler(
            [group],
            max_num_seqs=MAX_SEQS,
            max_num_batched_tokens=MAX_ROWS,
            prefix_cache=PrefixCache([group]),
        )
        self._requests: dict[Sequence, Request] = {}
        self._unfinished: dict[Request, int] = {}
        self.entries = self.blocks = 0
        """Of the tables while the last step ran: all, and the different ones among them."""

    @property
    def num_waiting(self) -> int:
        return len(self.scheduler.waiting)

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    def add(self, request: Request) -> None:
        # Prompts have no more in common than they should. Nor have samples: see `_token`.
        own = request.prompt - request.common
        prompt = [COMMON] * request.common + [FIRST + request.id] * own
        first, *others = (
            Sequence(
                request.id * self._samples + sample,
                prompt,
                PARAMS,
                max_length=CONTEXT,
                stop_token_ids=frozenset([STOP]),
            )
            for sample in range(self._samples)
        )
        first.forks = others
        self._unfinished[request] = self._samples
        self._requests |= dict.fromkeys([first, *others], request)
        self.scheduler.add(first)

    def step(self) -> Step:
        plan = self.scheduler.schedule()
        running = self.scheduler.running
        self.entries = sum(len(seq.block_tables[0]) for seq in running)
        self.blocks = self._pool.num_used
        context = sum(part.start + part.num_tokens for part in plan.scheduled)
        preempted = len(plan.preempted)
        step = Step(plan.num_scheduled_tokens, context, len(running), self._memory(), preempted)
        tokens = [self._token(part) for part in plan.scheduled if part.samples]
        for seq, _ in self.scheduler.update(plan, tokens):
            if seq.finish_reason:
                self._finish(self._requests.pop(seq), step)
        return step

    def _token(self, part: Scheduled) -> int:
        is_last = part.num_output_tokens + 1 == self._requests[part.seq].output
        return STOP if is_last else FIRST + part.seq.id

    def _finish(self, request: Request, step: Step) -> None:
        self._unfinished[request] -= 1
        if not self._unfinished[request]:
            del self._unfinished[request]
            step.finished.append(request)

    def _memory(self) -> Memory:
        """For requests that share nothing: the tokens of a block are one sequence's."""
        used = sum(seq.num_computed_tokens for seq in self.scheduler.running)
        taken = self.blocks * self._block_size
        return Memory(used, 0, taken - used, self._slots - taken)
