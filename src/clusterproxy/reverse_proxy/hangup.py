"""Notices clients that go away while nobody reads their sockets."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING, Never

import trio

if TYPE_CHECKING:
    from collections.abc import Callable


def _nothing() -> None:
    """Nobody listens any more."""


class HangupWatch:
    """Tells when a socket's peer has ended its side, read or not.

    A task for each request that only waits for its client to leave would cost more than the request. Here the kernel
    keeps the list, once for a connection's life, and one task serves all.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._told: dict[int, Callable[[], None]] = {}

    def watch(self, fd: int, on_hangup: Callable[[], None]) -> None:
        """Call *on_hangup* once when the peer of this socket has gone."""
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
                for fd, _ in self._epoll.poll(0):
                    # One of the same batch may have made an end of it.
                    self._told.get(fd, _nothing)()
        finally:
            self._told.clear()
            self._epoll.close()
