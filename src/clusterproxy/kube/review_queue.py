"""Whose token is looked at next."""

from __future__ import annotations

import ipaddress
from typing import Final

import attrs
import trio

# Reviews at one time: the lease is to be renewed all the same.
_IN_FLIGHT: Final = 8

# Streams that wait for theirs.
_WAITING: Final = 2_000

# With the review behind it this is less than the 20 s after which an agent gives up: a review that comes
# later is lost, and all of them would be if those who wait longest came first.
_WAIT_S: Final = 10.0


@attrs.define(eq=False)
class _Waiter:
    called: trio.Event = attrs.field(factory=trio.Event)
    admitted: bool = False


class ReviewQueue:
    """Admits a limited number of reviews at a time, and shares them out by where they come from.

    Whoever reaches the port can ask for one. So sources take turns, the newest of each comes first, and when
    too many wait, the oldest one of the source that has most of them is turned away.
    """

    def __init__(self) -> None:
        self._admitted = 0
        # By source, in the order of their turns; of each the oldest first.
        self._waiting: dict[str, dict[_Waiter, None]] = {}
        self._count = 0

    async def enter(self, source: str) -> bool:
        """Wait for a place, which :meth:`leave` gives back; return False if there was none in time.

        Cancellation: gives up waiting.
        """
        if self._admitted < _IN_FLIGHT:
            self._admitted += 1
            return True
        waiter = _Waiter()
        self._add(source, waiter)
        try:
            with trio.move_on_after(_WAIT_S):
                await waiter.called.wait()
        except trio.Cancelled:
            if waiter.admitted:
                self.leave()
            raise
        finally:
            self._forget(source, waiter)
        return waiter.admitted

    def leave(self) -> None:
        """Give a place back; the next in turn has it at once."""
        source = next(iter(self._waiting), None)
        if source is None:
            self._admitted -= 1
            return
        waiters = self._waiting[source]
        newest = next(reversed(waiters))
        self._forget(source, newest)
        if waiters:
            # Its next turn is behind those of all others.
            self._waiting[source] = self._waiting.pop(source)
        newest.admitted = True
        newest.called.set()

    def _add(self, source: str, waiter: _Waiter) -> None:
        self._waiting.setdefault(source, {})[waiter] = None
        self._count += 1
        if self._count > _WAITING:
            # Where many have as many, the one who has just come.
            crowd = max(reversed(self._waiting), key=lambda source: len(self._waiting[source]))
            oldest = next(iter(self._waiting[crowd]))
            self._forget(crowd, oldest)
            oldest.called.set()

    def _forget(self, source: str, waiter: _Waiter) -> None:
        waiters = self._waiting.get(source, {})
        if waiter in waiters:
            del waiters[waiter]
            self._count -= 1
            if not waiters:
                del self._waiting[source]


def source_of(host: str) -> str:
    """Return what counts as one source: an IPv4 address, or an IPv6 network that one site has."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return ""
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
