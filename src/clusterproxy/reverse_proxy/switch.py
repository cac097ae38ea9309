"""Connections that speak something else from now on: SPDY, WebSocket."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from .wire import Wire

_READ: Final = 256 * 1024


async def copy_both_ways(client: Wire, origin: Wire, ahead: bytes, early: bytes) -> None:
    """Copy byte for byte until both directions have ended, or one has failed.

    As Go's ReverseProxy: the end of one direction is passed on if the other side can be told of it; otherwise
    it is the end of both. Both wires are closed then.

    Args:
      ahead: what the client has sent and was read already.
      early: the same of the origin.

    Cancellation: closes both at once.
    """
    failed = True
    try:
        async with trio.open_nursery() as nursery:
            scope = nursery.cancel_scope
            copies = [_Copy(client, origin, ahead, scope), _Copy(origin, client, early, scope)]
            for copy in copies:
                nursery.start_soon(copy.run)
        failed = any(copy.failed for copy in copies)
    finally:
        if failed:
            client.abort()
            origin.abort()
    await client.aclose()
    await origin.aclose()


class _Copy:
    """One direction."""

    def __init__(self, source: Wire, target: Wire, first: bytes, scope: trio.CancelScope) -> None:
        self._source = source
        self._target = target
        self._first = first
        self._scope = scope
        self.failed = False

    async def run(self) -> None:
        target = self._target
        try:
            if self._first:
                await target.send((self._first,))
                self._first = b""
            while view := await self._source.receive(_READ):
                await target.send((view,))
            if target.half_closeable:
                await target.send_eof()
                return
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            self.failed = True
        self._scope.cancel()
