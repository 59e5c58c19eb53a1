"""A pretend engine: it computes plans against a memory that remembers what was written.

It knows the rules of a paged cache, and nothing of how the scheduler keeps them: a row writes the
slot of its position, then reads the slots of all positions in its window. What it writes depends
on its token and all before it. A state is one slot for a block: a chunk reads the one of the token
before it and leaves that of its last token. Every claim about a plan is asserted while it runs.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mlxpage.cache_group import CacheGroup
from mlxpage.errors import InvalidRequest
from mlxpage.sampling_params import SamplingParams
from mlxpage.scheduler import MAX_SCORED_TOKENS, Schedule, Scheduler
from mlxpage.sequence import Sequence, Status

STOP = 1
COMMON, OWN = 1000, 2000
"""Prompt tokens from here on are those of a family of requests, or of one request alone."""
PARAMS = SamplingParams(max_tokens=2**31 - 1)  # `max_length` is what counts
WITH_PROMPT_LOGPROBS = replace(PARAMS, prompt_logprobs=0)


@dataclass(frozen=True)
class Request:
    prompt: int
    new: int
    stop_after: int | None = None  # outputs before the stop token
    priority: int = 0
    prompt_logprobs: bool = False
    family: int = 0
    common: int = 0
    """Prompt tokens that all of the family begin with."""
    salt: str | None = None
    forks: int = 0
    first_output: int = 10
    earlier: tuple[int, ...] = ()
    """Tokens that the prompt begins with, instead of the common ones."""

    def prompt_tokens(self, id: int) -> list[int]:
        return [
            self.earlier[index]
            if index < len(self.earlier)
            else COMMON + self.family
            if index < self.common
            else OWN + id
            for index in range(self.prompt)
        ]

    def token(self, index: int) -> int:
        """The output at `index`, whatever batch it is computed in."""
        return STOP if index == self.stop_after else self.first_output + index

    def alone(self) -> list[int]:
        """What it generates when it's served on its own."""
        tokens = []
        while len(tokens) < self.new and STOP not in tokens:
            tokens.append(self.token(len(tokens)))
        return tokens

    def sequence(self, id: int) -> Sequence:
        return Sequence(
            id,
            self.prompt_tokens(id),
            replace(WITH_PROMPT_LOGPROBS if self.prompt_logprobs else PARAMS, cache_salt=self.salt),
            max_length=self.prompt + self.new,
            stop_token_ids=frozenset([STOP]),
            priority=self.priority,
        )


class Shelf:
    """A second tier: what the blocks held that were handed out again. `breaks` says each time
    whether something can't be read after all, and is gone."""

    def __init__(self, breaks: Callable[[], bool] = lambda: False):
        self.blocks: dict[tuple[int, bytes], list[int]] = {}
        self.breaks = breaks
        self.num_read = self.num_broken = 0

    def holds(self, group: int, key: bytes) -> bool:
        return (group, key) in self.blocks

    def keeps(self, group: int, key: bytes) -> bool:
        return self.holds(group, key)

    def read(self, group: int, key: bytes) -> list[int] | None:
        if (group, key) in self.blocks and self.breaks():
            self.num_broken += 1
            del self.blocks[group, key]
        content = self.blocks.get((group, key))
        self.num_read += content is not None
        return content

    def discard(self, group: int, key: bytes) -> None:
        self.blocks.pop((group, key), None)


class World:
    """`depth` steps are planned before the tokens of the first of them are known."""

    def __init__(self, scheduler: Scheduler, depth: int = 0):
        self.scheduler = scheduler
        self.depth = depth
        self.requests: list[Request] = []
        self.sequences: list[Sequence] = []
        self.in_flight: deque[Schedule] = deque()
        self.memory: list[dict[int, list[int]]] = [{} for _ in scheduler.groups]
        self.marks: dict[int, list[int]] = {}
        self.num_fed: dict[tuple[int, int], int] = {}  # per life: tokens computed or found
        self.parents: dict[int, Sequence] = {}
        self.branched_at: dict[int, int] = {}  # what its parent had computed, in its own life
        self.num_copies = 0
        self.num_found = self.num_steps_with_sharing = 0
        self.num_sampled: list[int] = []  # prompt and sampled tokens, read or not
        self.aborted: set[int] = set()
        self.newcomers: list[int] = []  # per sequence: later ones of better priority
        self.num_cuts: list[int] = []  # per sequence: times that its room was taken away
        self.refuses_to_grow = False
        self.chunk: int | None = None
        """What `keep_pace` gave the step that is planned."""
        self.num_held_up = 0
        self.num_moved = self.num_grown = self.num_limits = self.num_refused_limits = 0
        self.num_steps = 0
        self.num_computed = self.num_recomputed = 0
        self.furthest: dict[int, int] = {}
        cache = scheduler.prefix_cache
        self.shelf: Shelf | None = cache and cache.tier

    # -- the engine's part --

    def keep_pace(self, chunks: Iterator[int]) -> None:
        """Steps that others wait for compute so many tokens beside theirs."""

        def chunk_beside(waiting: int) -> int:
            self.chunk = next(chunks)
            return self.chunk

        self.scheduler.chunk_beside = chunk_beside

    def add(self, request: Request) -> Sequence:
        seq = self._sequence(request)
        seq.forks = [self._sequence(request, parent=seq) for _ in range(request.forks)]
        self.scheduler.add(seq)
        return seq

    def fork(self, parent: Sequence) -> None:
        """Branches a sequence where it is, if it hasn't ended, nor been planned to its end."""
        request, tokens = self.requests[parent.id], tuple(parent.token_ids)
        left = request.prompt + request.new - len(tokens)
        if parent.finish_reason or not any(parent.block_tables) or left < 1:
            return
        id = len(self.sequences)
        self._know(
            replace(
                request,
                earlier=tokens,
                prompt=len(tokens),
                new=left,
                stop_after=None,
                first_output=10_000 * (1 + id),
                prompt_logprobs=False,
                forks=0,
            ),
            parent,
        )
        self.branched_at[id] = self.num_fed.get(self.life(parent), self.beginning(parent))
        self.scheduler.fork(parent, self.sequences[id])

    def _sequence(self, request: Request, parent: Sequence | None = None) -> Sequence:
        id = len(self.sequences)
        if parent is not None:
            first_output = 10_000 * (1 + id)
            request = replace(request, first_output=first_output, prompt_logprobs=False)
        seq = self._know(request, parent)
        if parent is not None:
            seq.token_ids = list(parent.token_ids)
        return seq

    def _know(self, request: Request, parent: Sequence | None) -> Sequence:
        seq = request.sequence(len(self.sequences))
        if parent is not None:
            self.parents[seq.id] = parent
        for other in self.sequences:
            self.newcomers[other.id] += request.priority < other.priority
        self.requests.append(request)
        self.sequences.append(seq)
        self.num_sampled.append(request.prompt)
        self.newcomers.append(0)
        self.num_cuts.append(0)
        return seq

    def abort(self, seq: Sequence) -> None:
        for child in list(seq.forks):
            self.abort(child)
        if seq.status is not Status.FINISHED:
            self.aborted.add(seq.id)
        reason = seq.finish_reason
        self.scheduler.finish(seq, "abort")
        assert seq.finish_reason == (reason or "abort")
        self.scheduler.check()

    def shrink(self, sizes: list[int]) -> None:
        """Between two steps. The memory behind the blocks moves with them, and ends where they
        do."""
        moves = self.scheduler.shrink(sizes)
        for memory, group, size, pairs in zip(
            self.memory, self.scheduler.groups, sizes, moves, strict=True
        ):
            assert group.pool.num_blocks == size
            assert all(target <= size < source for source, target in pairs)
            moved = {target: memory[source] for source, target in pairs}
            memory.update(moved)
            for block in [block for block in memory if block > size]:
                del memory[block]
            self.num_moved += len(moved)
        self.scheduler.check()

    def trim(self, *, cached: bool) -> None:
        pools = [group.pool for group in self.scheduler.groups]
        sizes = [p.num_used if cached else p.num_blocks - p.num_empty for p in pools]
        preemptions = self.scheduler.num_preemptions
        found = [dict(pool._cached) for pool in pools]
        self.shrink([max(1, size) for size in sizes])
        assert self.scheduler.num_preemptions == preemptions
        for pool, before in zip(pools, found, strict=True):
            assert cached or pool._cached.keys() == before.keys(), "what is cached is lost"

    def set_limits(self, limits: list[int]) -> None:
        """To where `shrink` has to follow, if nobody's length forbids it."""
        before = self.scheduler.blocks.limits
        try:
            self.scheduler.set_limits(limits)
        except InvalidRequest:
            assert self.scheduler.blocks.limits == before
            self.num_refused_limits += 1
            return
        self.num_limits += 1
        self.cut_room()
        pools = [group.pool for group in self.scheduler.groups]
        self.shrink([min(pool.num_blocks, pool.limit) for pool in pools])

    def make_larger(self, group: int, num_blocks: int) -> bool:
        if self.refuses_to_grow:
            self.cut_room()
            return False
        self.num_grown += 1
        return True

    def cut_room(self) -> None:
        """The room that was kept for those who are there is no longer what it was."""
        for seq in self.sequences:
            self.num_cuts[seq.id] += not seq.finish_reason

    def step(self) -> Schedule:
        plan = self.plan()
        self.deliver(plan)
        return plan

    def plan(self) -> Schedule:
        before = list(self.scheduler.running)
        self.chunk = None
        prompts = {seq.id for seq in before if seq.num_tokens - seq.num_computed_tokens > 1}
        plan = self.scheduler.schedule()
        held_up = prompts if self.chunk == 0 else set()
        self.num_steps += 1
        if self.shelf:
            cache = self.scheduler.prefix_cache
            loads = {load[:2] for load in plan.loads}
            ahead = [each for each in cache.next_in_line(3) if each[:2] not in loads]
            for index, block, key in [*cache.take_evicted(), *ahead]:
                self.shelf.blocks[index, key] = list(self.memory[index][block])
        self.scheduler.check()
        self.check_plan(plan, before, held_up)
        self.compute(plan)
        self.check_tables(plan)
        if plan:
            self.in_flight.append(plan)
        else:
            stuck = self.scheduler.has_work and not self.in_flight and not self.refuses_to_grow
            stuck = stuck and not (held_up and plan.preempted)  # now nobody waits for a step
            # What couldn't be read after all is looked for again.
            stuck = stuck and not any(map(self.is_reading, self.scheduler.running))
            assert not stuck, "nothing will ever happen again"
        return plan

    def deliver(self, plan: Schedule) -> None:
        """Reads the tokens of the oldest step, if there are more than the look-ahead leaves, or
        nothing can be planned without them."""
        if len(self.in_flight) > (self.depth if plan else 0):
            self.update()

    def update(self) -> None:
        plan = self.in_flight.popleft()
        sampling = [part for part in plan.scheduled if part.samples]
        pairs = [
            (part.seq, self.next_token(part.seq, part.start + part.num_tokens)) for part in sampling
        ]
        counted = [pair for pair in pairs if pair[0].status is not Status.FINISHED]
        assert self.scheduler.update(plan, [token for _, token in pairs]) == counted
        self.scheduler.check()

    def next_token(self, seq: Sequence, position: int) -> int:
        request = self.requests[seq.id]
        return request.token(position - request.prompt)

    def run(self) -> None:
        """Until everything has ended; then nothing may be left over."""
        while self.scheduler.has_work or self.in_flight:
            self.step()
        for group in self.scheduler.groups:
            assert group.pool.num_used == 0
        for seq, request in zip(self.sequences, self.requests, strict=True):
            expected = request.alone()
            if seq.id in self.aborted:
                assert seq.finish_reason == "abort"
                expected = expected[: seq.num_output_tokens]
            else:
                assert seq.finish_reason == ("stop" if expected[-1] == STOP else "length")
            assert seq.output_token_ids == expected

    # -- the rules --

    def check_plan(self, plan: Schedule, before: list[Sequence], held_up: set[int]) -> None:
        scheduler = self.scheduler
        parts = [part.seq.id for part in plan.scheduled]
        running = {seq.id for seq in scheduler.running}
        num_tokens = sum(part.num_tokens for part in plan.scheduled)
        assert plan.num_scheduled_tokens == num_tokens <= scheduler.max_num_batched_tokens
        assert len(running) <= scheduler.max_num_seqs
        assert len(set(parts)) == len(parts), "a sequence has two parts"

        done = {id for id in running if self.is_planned_to_its_end(self.sequences[id])}
        reading = {seq.id for seq in scheduler.running if self.is_reading(seq)}
        branched = running - set(parts) - done - reading - {seq.id for seq in before}
        assert all(self.parents[id].id in parts for id in branched), "nobody branched off here"
        preempted = {seq.id for seq in plan.preempted}
        stayed = {seq.id for seq in before} - preempted
        admitted = running - stayed
        advancing = running - done - branched - reading - held_up
        assert set(parts) == advancing, "each running sequence advances"
        if self.chunk == 0:
            self.num_held_up += len(held_up)
            assert num_tokens == len(parts), "a chunk where there should be none"
            assert admitted <= branched, "admitted where nobody should be"
        assert stayed <= running and preempted <= {seq.id for seq in before}
        assert not (preempted and admitted), "admitted into room that was just taken"
        for id in preempted:
            assert all(self.place(other) < self.place(id) for other in stayed), "not the newest"
            most = 4 + self.newcomers[id] + self.num_cuts[id]
            assert self.sequences[id].num_preemptions <= most, "preempted again and again"
        for seq in scheduler.waiting:
            assert seq.status is Status.WAITING and not any(seq.block_tables)
            if seq.id in self.parents and self.parents[seq.id].id in parts:
                continue  # it came when the others had been admitted
            assert all(self.place(other) < self.place(seq.id) for other in admitted), "overtaken"

    @staticmethod
    def is_reading(seq: Sequence) -> bool:
        return seq.num_stored_tokens > seq.num_computed_tokens

    def place(self, id: int) -> tuple[int, int]:
        return (self.requests[id].priority, id)

    def is_planned_to_its_end(self, seq: Sequence) -> bool:
        request = self.requests[seq.id]
        return self.num_sampled[seq.id] == request.prompt + request.new

    def compute(self, plan: Schedule) -> None:
        for index, source, target in plan.copies:
            assert self.scheduler.groups[index].pool.num_owners(target), "a copy that nobody has"
            self.memory[index][target] = list(self.memory[index][source])
            self.num_copies += 1
        for index, block, content in plan.loads:
            pool = self.scheduler.groups[index].pool
            # Who was preempted when it had been read may find it again.
            assert pool.num_owners(block) or block in pool._keys, "read for nobody"
            self.memory[index][block] = list(content)
        for index, group in enumerate(self.scheduler.groups):
            if group.is_state:
                self.update_states(index, group, plan)
                continue
            writers: dict[int, int] = {}
            for part in plan.scheduled:
                self.write(index, group, part, writers)
            # A single row is written by its own attention, which others don't wait for.
            late = {
                part.seq.block_tables[index][part.start // group.block_size]: part.seq.id
                for part in plan.scheduled
                if part.num_tokens == 1
            }
            for part in plan.scheduled:
                self.read(index, group, part, late)
        self.num_steps_with_sharing += any(
            group.pool.num_owners(block) > 1
            for group in self.scheduler.groups
            for part in plan.scheduled
            for block in part.seq.block_tables[self.scheduler.groups.index(group)]
        )
        scored = []
        for part in plan.scheduled:
            seq, end = part.seq, part.start + part.num_tokens
            self.check_start(part)
            assert end <= self.num_sampled[seq.id], "a token is fed before it is sampled"
            if end > len(seq.token_ids):
                assert part.num_tokens == 1, "a token that nobody knows yet, in a longer chunk"
            if seq.params.prompt_logprobs is not None and part.start < seq.num_prompt_tokens:
                scored.append(part.num_tokens)
            assert part.samples == (end == self.num_sampled[seq.id])
            self.num_fed[self.life(seq)] = end
            self.num_sampled[seq.id] += part.samples
            request = self.requests[seq.id]
            assert self.num_sampled[seq.id] <= request.prompt + request.new, "max_tokens overrun"
            known = self.furthest.get(seq.id, 0)
            self.num_computed += part.num_tokens
            self.num_recomputed += max(0, min(end, known) - part.start)
            self.furthest[seq.id] = max(end, known)
        assert sum(scored) <= MAX_SCORED_TOKENS + len(scored), "too many logits at once"

    def check_start(self, part) -> None:
        """A life begins with what it found, and goes on without a gap."""
        seq, life = part.seq, self.life(part.seq)
        is_fork = seq.id in self.parents and part.start == self.beginning(seq)
        if life not in self.num_fed and (is_fork or self.scheduler.prefix_cache is not None):
            assert part.start == 0 or seq.params.prompt_logprobs is None
            assert part.start <= len(seq.token_ids) - 1, "nothing left to compute"
            if seq.num_preemptions == 0:
                assert seq.num_cached_tokens == part.start
            self.num_found += part.start
        else:
            assert part.start == self.num_fed.get(life, 0), "skipped or repeated"

    def beginning(self, seq: Sequence) -> int:
        """A fork goes on where its parent was, which may have begun again; if that was at the end,
        only the last token is computed again, or with states what comes after the last block."""
        last = len(seq.token_ids) - 1 if seq.id in self.parents else 0
        at = self.branched_at.get(seq.id, last + 1)
        for group in self.scheduler.groups:
            if group.is_state and at > last:
                last = last // group.block_size * group.block_size
        return min(at, last)

    def life(self, seq: Sequence) -> tuple[int, int]:
        return (seq.id, seq.num_preemptions)

    def marks_of(self, seq: Sequence, end: int) -> list[int]:
        """What K and V of its first `end` positions are: a number for each, of the token and all
        before it."""
        request, marks = self.requests[seq.id], self.marks.setdefault(seq.id, [])
        if len(marks) < end:
            own = self.parents.get(seq.id, seq).id
            tokens = request.prompt_tokens(own)
            tokens += [request.token(index) for index in range(request.new)]
            before = request.salt
            marks.clear()
            for token in tokens:
                marks.append(before := hash((before, token)))
        return marks

    def write(self, index: int, group: CacheGroup, part, writers: dict[int, int]) -> None:
        memory, size = self.memory[index], group.block_size
        end = part.start + part.num_tokens
        marks = self.marks_of(part.seq, end)
        for column in range(part.start // size, (end - 1) // size + 1):
            block = part.seq.block_tables[index][column]
            assert 1 <= block <= group.pool.num_blocks
            assert writers.setdefault(block, part.seq.id) == part.seq.id, "two write to a block"
            first, last = max(part.start, column * size), min((column + 1) * size, end)
            slots = memory.setdefault(block, [0] * size)
            slots[first - column * size : last - column * size] = marks[first:last]

    def update_states(self, index: int, group: CacheGroup, plan: Schedule) -> None:
        memory, size = self.memory[index], group.block_size
        written = {}
        for part in plan.scheduled:
            end, table = part.start + part.num_tokens, part.seq.block_tables[index]
            marks = self.marks_of(part.seq, end)
            if part.start:
                found = memory[table[(part.start - 1) // size]]
                assert found == marks[part.start - 1 : part.start], "goes on from another state"
            block = table[(end - 1) // size]
            assert 1 <= block <= group.pool.num_blocks
            assert written.setdefault(block, part) is part, "two write to a block"
            memory[block] = [marks[end - 1]]
        for part in plan.scheduled:
            if part.start:
                block = part.seq.block_tables[index][(part.start - 1) // size]
                assert written.get(block, part) is part, "reads what is being written"

    def read(self, index: int, group: CacheGroup, part, late: dict[int, int]) -> None:
        memory, size = self.memory[index], group.block_size
        end = part.start + part.num_tokens
        marks = self.marks_of(part.seq, end)
        first = 0 if group.window is None else max(0, part.start - group.window + 1)
        for column in range(first // size, (end - 1) // size + 1):
            block = part.seq.block_tables[index][column]
            expected = marks[column * size : min((column + 1) * size, end)]
            assert memory[block][: len(expected)] == expected, "reads what others wrote, or nobody"
            assert late.get(block, part.seq.id) == part.seq.id, "reads what is being written"

    def check_tables(self, plan: Schedule) -> None:
        """No more blocks are held than the tokens, the window and the chunk ask for."""
        chunks = {part.seq.id: part.num_tokens for part in plan.scheduled}
        for seq in self.scheduler.running:
            for group, table in zip(self.scheduler.groups, seq.block_tables, strict=True):
                held = sum(block != 0 for block in table)
                # Who hasn't computed anything yet has branched off, or is reading what is stored.
                tokens = self.num_fed.get(self.life(seq), seq.num_computed_tokens)
                assert len(table) == -(-tokens // group.block_size)
                if group.is_state:
                    assert held <= 2
                elif group.window is not None and seq.id in chunks:
                    read = group.window - 1 + chunks[seq.id]
                    assert held <= -(-(read - 1) // group.block_size) + 1
                elif group.window is None:
                    assert held == len(table)
