"""Connections that speak something else from now on: SPDY, WebSocket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from clusterproxy.transport.records import Buffer

    from .wire import Wire

_READ: Final = 256 * 1024


async def copy_both_ways(client: Wire, origin: Wire, ahead: bytes, early: bytes) -> None:
    """Copy byte for byte until both directions have ended, or one has failed.

    As Go's ReverseProxy: the end of one direction is passed on if the other side can be told of it; otherwise
    it is the end of both. Both wires are closed then; the client gets all that had come before the origin broke off.

    Args:
      ahead: what the client has sent and was read already.
      early: the same of the origin.

    Cancellation: closes both at once.
    """
    up = _Copy(client, origin, ahead)
    down = _Copy(origin, client, early)
    over = False
    try:
        async with trio.open_nursery() as nursery:
            for copy in (up, down):
                nursery.start_soon(copy.run, nursery.cancel_scope)
        over = not (up.failed or down.failed)
    finally:
        if not over:
            # A reset would take from the client what is still on its way there.
            if not down.cut:
                client.abort()
            origin.abort()
    await client.aclose()
    await origin.aclose()


class _Copy:
    """One direction.

    Attributes:
      failed: it has not ended in order.
      cut: only its source has not; all that came of it was sent.
    """

    def __init__(self, source: Wire, target: Wire, first: bytes) -> None:
        self._source = source
        self._target = target
        self._first = first
        self.failed = False
        self.cut = False

    async def run(self, scope: trio.CancelScope) -> None:
        target = self._target
        try:
            if self._first:
                await target.send((self._first,))
                self._first = b""
            while view := await self._receive():
                await target.send((view,))
            if target.half_closeable and not self.failed:
                await target.send_eof()
                return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.failed = True
        scope.cancel()

    async def _receive(self) -> Buffer:
        try:
            return await self._source.receive(_READ)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.failed = self.cut = True
            return b""
