"""How much of a prompt a step may compute while others wait for their next tokens."""

from __future__ import annotations

from mlxpage.scheduler import Schedule

LEAST = 16  # tokens: prompts go on, however slow the machine is
START = 64


class Pace:
    """Finds the chunk with which a step takes as long as it may, by how long the last ones took.

    A step over its time shrinks the chunk in proportion. One that might have taken a quarter longer
    lets it grow by a quarter. So it follows what changes with the machine's other work and with the
    lengths of sequences.
    """

    def __init__(self, seconds: float, most: int):
        """`seconds` that a step may take, and tokens that it computes at `most`."""
        self._seconds = seconds
        self._most = most
        self.chunk = min(START, most)

    def note(self, schedule: Schedule, seconds: float) -> None:
        """That a step took so long. What counts is one that had a chunk and somebody waiting."""
        waiting = sum(part.samples and part.num_tokens == 1 for part in schedule.scheduled)
        chunk = schedule.num_scheduled_tokens - waiting
        if not (waiting and chunk):
            return
        if seconds > self._seconds:
            self.chunk = max(LEAST, min(self.chunk, int(chunk * self._seconds / seconds)))
        elif chunk >= self.chunk and seconds * 1.25 <= self._seconds:
            self.chunk = min(self._most, self.chunk + self.chunk // 4)
