"""Streams to services: what all kinds of tunnel have in common."""

from __future__ import annotations

from abc import abstractmethod
from operator import index
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from types import TracebackType


class TunnelStream(trio.abc.Stream):
    """A connection to a service.

    It follows trio's rules: one task at a time sends and one receives, closing wakes both with
    :exc:`trio.ClosedResourceError`. The end of the stream is an empty read only if the service ended
    it in order; otherwise :exc:`trio.BrokenResourceError` says why, behind the bytes that came before.

    ``receive_some`` returns what is there, up to 512 KiB unless it is asked for more or less; a
    cancelled one loses nothing. ``send_all`` returns when everything is with the kernel and the other
    ends have room for it; how much a cancelled one has sent nobody knows. ``aclose`` waits until the
    agent has confirmed the close, and raises :exc:`trio.BrokenResourceError` if it does not within
    10 s or names an error; a cancelled one closes all the same.

    Attributes:
      remote_address: host and port as they were dialled.
      local_address: our end of the connection to the proxy server: host and port, or a path and 0.
      connect_id: the agent's number of the connection; 0 in HTTP CONNECT mode.
    """

    def __init__(
        self, remote_address: tuple[str, int], local_address: tuple[str, int], connect_id: int
    ) -> None:
        self.remote_address = remote_address
        self.local_address = local_address
        self.connect_id = connect_id

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether it is known that nothing can be sent any more; there may be something to receive."""

    @property
    def readable(self) -> bool:
        """Whether there is something to receive now, be it the end."""
        return self.ended

    @property
    def leaving(self) -> bool:
        """Whether the proxy server has announced its end: what is under way goes on, for as long as it waits.

        A connection that is kept for later had better be closed: the server waits for it.
        """
        return False

    @abstractmethod
    def abort(self, reason: str = "") -> None:
        """Close at once, without waiting, so that the service sees a reset if that can be said.

        *reason* is for people. Idempotent; after :meth:`aclose` this does nothing.
        """


class HalfCloseableTunnelStream(TunnelStream, trio.abc.HalfCloseableStream):
    """A connection of which either direction can end while the other goes on.

    ``send_eof`` ends ours, behind everything that was sent; the service's answer still arrives.
    """


class OneAtATime:
    """Raises :exc:`trio.BusyResourceError` when a second task comes in."""

    __slots__ = ("_busy", "_message")

    def __init__(self, message: str) -> None:
        self._message = message
        self._busy = False

    def __enter__(self) -> None:
        if self._busy:
            raise trio.BusyResourceError(self._message)
        self._busy = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._busy = False


def limit_of(max_bytes: int | None, default: int) -> int:
    """Return how much ``receive_some(max_bytes)`` may return.

    Raises:
      TypeError, ValueError: *max_bytes* is no number, or below 1.
    """
    if max_bytes is None:
        return default
    limit = index(max_bytes)
    if limit < 1:
        raise ValueError("max_bytes must be at least 1")
    return limit


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of a dialled address; 0 for a port that is missing, or that has a name."""
    host, _, port = address.rpartition(":")
    if not host:
        return address, 0
    return host.removeprefix("[").removesuffix("]"), int(port) if port.isdecimal() else 0
