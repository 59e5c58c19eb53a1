"""How much of a prompt a step may compute while others wait for their next tokens."""

from __future__ import annotations

from collections import deque
from statistics import median

from mlxpage.scheduler import Schedule

LEAST = 4  # tokens: prompts go on, however slow the machine is
START = 64
TIMES = 3
"""As long as a step without a chunk, if nobody says how long."""
_MARGIN = 0.85
"""Of its time that a step should take: some take longer than those before them."""
_KEPT = 3  # steps without a chunk: as many as hide one that something else has slowed down
_SIMILAR = 1.25  # numbers of sequences that take about as long
_CHUNKS = 32  # steps with one after which it's looked again how long those without take
_LOOKS = 8  # steps in a row that hold prompts up, even if others keep coming and going


class Pace:
    """Finds the chunk with which a step takes as long as it may, by how long the last ones took.

    A step over its time shrinks the chunk in proportion. One that might have taken a quarter longer
    lets it grow by a quarter. So it follows what changes with the machine's other work and with the
    lengths of sequences.
    """

    def __init__(self, seconds: float | None, most: int):
        """`seconds` that a step may take, None: `TIMES` as many as one without a chunk takes; and
        tokens that it computes at `most`."""
        self._seconds = seconds
        self._most = most
        self._chunk = min(START, most)
        self._alone: deque[float] = deque(maxlen=_KEPT)
        """Seconds of the last steps without a chunk, beside about `_num_alone` sequences."""
        self._num_alone = 0
        self._num_chunks = 0
        """Steps with a chunk since the last one without."""
        self._num_looks = 0
        """Steps in a row that were to be without one."""

    def chunk(self, waiting: int) -> int:
        """Tokens beside the next ones of so many sequences: none where it must first be seen how
        long those take alone. After so many steps prompts go on all the same."""
        looks = self._seconds is None and (not self._knows(waiting) or self._num_chunks >= _CHUNKS)
        self._num_looks = self._num_looks + 1 if looks and self._num_looks < _LOOKS else 0
        return 0 if self._num_looks else self._chunk

    def note(self, schedule: Schedule, seconds: float) -> None:
        """That a step took so long. What counts is one that somebody waited for."""
        waiting = sum(part.samples and part.num_tokens == 1 for part in schedule.scheduled)
        chunk = schedule.num_scheduled_tokens - waiting
        if not waiting:
            return
        if not chunk:
            self._note_alone(waiting, seconds)
            return
        self._num_chunks += 1
        if self._seconds is None and not self._alone:
            return  # a prompt of one token beside another's first chunk, say: nobody has waited yet
        given = TIMES * median(self._alone) if self._seconds is None else self._seconds
        allowed = given * _MARGIN
        if seconds > allowed:
            self._chunk = max(LEAST, min(self._chunk, int(chunk * allowed / seconds)))
        elif chunk * 1.25 >= self._chunk and seconds * 1.25 <= allowed:  # some end at a block's end
            self._chunk = min(self._most, self._chunk + self._chunk // 4)

    def _note_alone(self, waiting: int, seconds: float) -> None:
        if not self._is_similar(waiting):
            self._alone.clear()
            self._num_alone = waiting
        self._alone.append(seconds)
        self._num_chunks = 0

    def _knows(self, waiting: int) -> bool:
        return len(self._alone) == _KEPT and self._is_similar(waiting)

    def _is_similar(self, waiting: int) -> bool:
        return self._num_alone / _SIMILAR <= waiting <= self._num_alone * _SIMILAR
