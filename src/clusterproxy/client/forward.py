"""Copies between a local socket and a tunnel, both ways."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    from .stream import TunnelStream

_READ: Final = 256 * 1024

#: How long a service may go on after the end of a client that cannot be told to it.
LINGER_S: Final = 10.0


async def forward_stream(
    local: trio.SocketStream,
    remote: TunnelStream,
    *,
    on_broken: Callable[[TunnelStream, str], None] | None = None,
) -> tuple[int, int]:
    """Copy between *local* and *remote* until both directions have ended; both are closed then.

    The end of one direction goes on to the other side, where that can be said; elsewhere the service
    has ten seconds to end by itself. If one side breaks, the other is reset.

    Args:
      on_broken: told *remote* and the reason if one side broke.

    Returns:
      How many bytes went into the tunnel, and how many came out of it.

    Cancellation: resets both.
    """
    copy = _Copy(local, remote)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(copy.outward, nursery.cancel_scope)
            nursery.start_soon(copy.inward, nursery.cancel_scope)
        if not copy.broken:
            await copy.close()
        elif on_broken is not None:
            on_broken(remote, copy.broken)
    finally:
        # What was closed in order is not touched by this.
        remote.abort(copy.broken)
        reset_socket(local)
    return copy.sent, copy.received


def reset_socket(stream: trio.SocketStream) -> None:
    """Close a socket so that its peer sees a reset; if it is closed already this does nothing."""
    with suppress(OSError, trio.ClosedResourceError):
        if stream.socket.family in (socket.AF_INET, socket.AF_INET6):
            stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        stream.socket.close()


class _Copy:
    def __init__(self, local: trio.SocketStream, remote: TunnelStream) -> None:
        self._local = local
        self._remote = remote
        self._inward_ended = trio.Event()
        self.sent = 0
        self.received = 0
        self.broken = ""

    async def outward(self, both: trio.CancelScope) -> None:
        local, remote = self._local, self._remote
        try:
            while data := await local.receive_some(_READ):
                # Why nothing can be sent any more is known to those who receive, behind what came.
                with suppress(trio.BrokenResourceError):
                    await remote.send_all(data)
                    self.sent += len(data)
                    continue
                return
        except trio.BrokenResourceError as error:
            self._break(error, both)
            return
        if isinstance(remote, trio.abc.HalfCloseableStream):
            with suppress(trio.BrokenResourceError):
                await remote.send_eof()
            return
        with trio.move_on_after(LINGER_S):
            await self._inward_ended.wait()
        both.cancel()

    async def inward(self, both: trio.CancelScope) -> None:
        local, remote = self._local, self._remote
        try:
            while data := await remote.receive_some():
                await local.send_all(data)
                self.received += len(data)
            self._inward_ended.set()
            # Who has all of it may have gone already.
            with suppress(trio.BrokenResourceError):
                await local.send_eof()
        except trio.BrokenResourceError as error:
            self._break(error, both)
            return
        if remote.ended:
            both.cancel()

    def _break(self, error: trio.BrokenResourceError, both: trio.CancelScope) -> None:
        self.broken = self.broken or str(error.__cause__ or error)
        both.cancel()

    async def close(self) -> None:
        with suppress(trio.BrokenResourceError):
            await self._remote.aclose()
        await self._local.aclose()
