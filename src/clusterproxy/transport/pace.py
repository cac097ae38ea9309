"""How large a bite may be: small while somebody waits for short answers beside bulk data.

What is read at once is dispatched without a pause, and what may be under way stands in front of
what comes next. For bulk alone large is cheap; beside it an answer of a few bytes waits for all of it.
"""

from __future__ import annotations

from typing import Final

import trio

#: Bytes of one read.
READ_SIZE: Final = 512 * 1024
_SHORT_READ: Final = 48 * 1024

#: What may be under way to us in a hurry, on a line that does not need more.
SHORT_WINDOW: Final = 256 * 1024

# What a connection sends at once if it has much to send, and if it has little.
_BULK: Final = 16 * 1024
_LITTLE: Final = 4 * 1024

# How long somebody who sent little, or much, is expected to do so again.
_AGAIN_S: Final = 0.5


class Pace:
    """Who sends what in one event loop, and what follows from it."""

    __slots__ = ("_bulk_until", "_hurried_until")

    def __init__(self) -> None:
        self._bulk_until = self._hurried_until = 0.0

    @property
    def hurried(self) -> bool:
        """Whether short answers are waited for beside bulk data."""
        return bool(self._hurried_until) and trio.current_time() < self._hurried_until

    @property
    def read_size(self) -> int:
        """Bytes that may be read at once."""
        return _SHORT_READ if self.hurried else READ_SIZE

    def note_bulk(self, now: float) -> None:
        """Note that some connection has much to send."""
        self._bulk_until = now + _AGAIN_S

    def note_little(self, now: float) -> None:
        """Note that a connection has little to send, and surely waits for an answer."""
        if now < self._bulk_until:
            self._hurried_until = now + _AGAIN_S


class Gait:
    """How one proxied connection sends, in both directions."""

    __slots__ = ("_bulk_until", "_pace")

    def __init__(self) -> None:
        self._pace = current_pace()
        self._bulk_until = 0.0

    def note(self, size: int) -> None:
        """Note that *size* bytes came at once."""
        if size >= _BULK:
            now = trio.current_time()
            self._bulk_until = now + _AGAIN_S
            self._pace.note_bulk(now)
        elif size < _LITTLE:
            now = trio.current_time()
            # What little comes of bulk data, or the other way, is a part of it.
            if now >= self._bulk_until:
                self._pace.note_little(now)


_pace: trio.lowlevel.RunVar[Pace] = trio.lowlevel.RunVar("clusterproxy.pace")


def current_pace() -> Pace:
    """Return the pace of the running event loop."""
    try:
        return _pace.get()
    except LookupError:
        pace = Pace()
        _pace.set(pace)
        return pace
