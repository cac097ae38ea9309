"""Notices clients that go away while nobody reads their sockets."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Final, Never

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

_GONE: Final = select.EPOLLHUP | select.EPOLLERR


def _nothing(_gone: bool) -> None:
    """Nobody listens any more."""


class HangupWatch:
    """Tells when a socket's peer has ended its side, read or not.

    A task for each request that only waits for its client to leave would cost more than the request. Here the kernel
    keeps the list, once for a connection's life, and one task serves all.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._told: dict[int, Callable[[bool], None]] = {}

    def watch(self, fd: int, on_hangup: Callable[[bool], None]) -> None:
        """Call *on_hangup* when the peer of this socket has ended its side, and with True when it takes no more either."""
        self._told[fd] = on_hangup
        self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLET)

    def forget(self, fd: int) -> None:
        """The socket is about to be closed. Idempotent."""
        if self._told.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    async def run(self) -> Never:
        """Watch. Cancellation: at any time; nothing is watched from then on."""
        try:
            while True:
                await trio.lowlevel.wait_readable(self._epoll.fileno())
                for fd, events in self._epoll.poll(0):
                    # One of the same batch may have made an end of it.
                    self._told.get(fd, _nothing)(bool(events & _GONE))
        finally:
            self._told.clear()
            self._epoll.close()
