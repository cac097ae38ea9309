"""How large a bite may be: small while somebody waits for short answers beside bulk data.

What is read at once is dispatched without a pause, and what may be under way stands in front of
what comes next. For bulk alone large is cheap; beside it an answer of a few bytes waits for all of it.
"""

from __future__ import annotations

from typing import Final

import trio

#: Bytes of one read.
READ_SIZE: Final = 512 * 1024
_SHORT_READ: Final = 96 * 1024

#: What may be under way to us in a hurry, on a line that does not need more.
SHORT_WINDOW: Final = 384 * 1024

# What a connection sends at once if it has much to send, and if it has little.
_BULK: Final = 16 * 1024
_LITTLE: Final = 4 * 1024

# How long somebody who sent little is expected to do so again.
_HURRY_S: Final = 0.5


class Pace:
    """Who sends what in one event loop, and what follows from it."""

    __slots__ = ("_bulk", "_until")

    def __init__(self) -> None:
        self._bulk = 0
        self._until = 0.0

    def note(self, who: object, size: int) -> None:
        """Note that a connection has sent *size* bytes at once."""
        if size >= _BULK:
            self._bulk = id(who)
        elif size < _LITTLE and self._bulk and self._bulk != id(who):
            self._until = trio.current_time() + _HURRY_S

    @property
    def hurried(self) -> bool:
        """Whether short answers are waited for beside bulk data."""
        return bool(self._until) and trio.current_time() < self._until

    @property
    def read_size(self) -> int:
        """Bytes that may be read at once."""
        return _SHORT_READ if self.hurried else READ_SIZE


_pace: trio.lowlevel.RunVar[Pace] = trio.lowlevel.RunVar("clusterproxy.pace")


def current_pace() -> Pace:
    """Return the pace of the running event loop."""
    try:
        return _pace.get()
    except LookupError:
        pace = Pace()
        _pace.set(pace)
        return pace
