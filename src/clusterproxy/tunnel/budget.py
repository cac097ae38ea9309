"""How much may wait for one consumer, and who is made to wait when it is too much.

A reader never waits for a consumer. Where the source of a queue is shared by others, only two things
can be done about a consumer that does not keep up: withhold the source's credit, which slows all who
share it, or close that one connection. :class:`Guard` does the first, as little as possible;
:class:`StallClock` says when there is none any more. See "Isolation" in docs/architecture.md.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

#: However little is left in all, a connection may always have so much.
FLOOR: Final = 64 * 1024

#: A consumer that takes less than this in the stall timeout makes no progress.
MIN_PROGRESS: Final = 64 * 1024

# Samples that a StallClock keeps over its timeout.
_SAMPLES: Final = 20


class Queue(Protocol):
    """What a guard watches.

    Attributes:
      queued: bytes that wait.
      taken: bytes that have left the queue since the beginning.
    """

    @property
    def queued(self) -> int: ...

    @property
    def taken(self) -> int: ...


class Budget:
    """The bytes that may be queued in one process.

    Each queue may grow to the smaller of its own limit and what is left of the total (dynamic
    thresholds: Choudhury and Hahne, 1998): a few large queues may use much, many get less each.
    """

    __slots__ = ("each", "total", "used")

    def __init__(self, *, each: int, total: int) -> None:
        self.each = each
        self.total = total
        self.used = 0

    @property
    def limit(self) -> int:
        """What one queue may hold now."""
        return max(FLOOR, min(self.each, self.total - self.used))


def _nothing(_size: int) -> None:
    """There is no source to hold."""


class Guard:
    """Keeps one queue with a shared source within its budget.

    The source is held for what the queue has too much, no more: so it brings as much as this consumer
    takes, and its other connections live on that. Holding it until the queue is small again would
    stop them for as long as that takes.

    Args:
      hold, release: withhold so many bytes of the source's credit, and grant them again. Without them
        the queue is only counted.
    """

    __slots__ = (
        "_budget",
        "_closed",
        "_counted",
        "_held",
        "_hold",
        "_queue",
        "_release",
        "_watched",
    )

    def __init__(
        self,
        queue: Queue,
        budget: Budget,
        hold: Callable[[int], None] = _nothing,
        release: Callable[[int], None] = _nothing,
    ) -> None:
        self._queue = queue
        self._budget = budget
        self._hold = hold
        self._release = release
        self._counted = 0
        self._held = 0
        self._closed = False
        self._watched = False

    @property
    def taken(self) -> int:
        """Bytes that the consumer has taken since the beginning."""
        return self._queue.taken

    @property
    def queued(self) -> int:
        """Bytes that wait for the consumer."""
        return self._queue.queued

    @property
    def over(self) -> bool:
        """Whether the queue is over its budget, which depends on all the others."""
        return self._counted > self._budget.limit

    def update(self) -> bool:
        """Look at the queue after it changed; return True when it has gone over its budget unwatched.

        Whoever gets True starts to watch for a stall, while :meth:`watch` returns true.
        """
        queued = self._queue.queued
        self._budget.used += queued - self._counted
        self._counted = queued
        excess = max(0, queued - self._budget.limit)
        held = 0 if self._closed else excess
        if held > self._held:
            self._hold(held - self._held)
        elif held < self._held:
            self._release(self._held - held)
        self._held = held
        if excess and not self._watched:
            self._watched = True
            return True
        return False

    def watch(self) -> bool:
        """Return whether there still is something to watch.

        A queue may go over its budget and back many times between two looks of its one watcher.
        """
        self._watched = self.over
        return self._watched

    def close(self) -> None:
        """Let the source go: nothing more comes from it. What is queued counts until it is gone."""
        self._closed = True
        if self._held:
            self._release(self._held)
            self._held = 0


class StallClock:
    """Tells whether a consumer made progress within the last *timeout* seconds."""

    __slots__ = ("_samples", "_timeout", "interval")

    def __init__(self, timeout: float, now: float, taken: int) -> None:
        self._timeout = timeout
        self._samples = deque([(now, taken)])
        #: Call :meth:`stalled` this often, in seconds.
        self.interval = timeout / _SAMPLES

    def stalled(self, now: float, taken: int) -> bool:
        """Note how much was *taken* up to *now*; return whether that is no progress."""
        samples = self._samples
        samples.append((now, taken))
        # Half an interval of slack, for a sample is never taken exactly on time.
        start = now - self._timeout + self.interval / 2
        while len(samples) > 1 and samples[1][0] <= start:
            samples.popleft()
        since, before = samples[0]
        return since <= start and taken - before < MIN_PROGRESS
