"""A connection to a service over an HTTP CONNECT socket."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

import trio

from .stream import HalfCloseableTunnelStream, OneAtATime, limit_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from clusterproxy.transport.stream import Transport

# Others run between two writes of this size.
_BATCH: Final = 256 * 1024

# The transport's read buffer is larger, but nobody gains from that.
_READ: Final = 512 * 1024


class ConnectStream(HalfCloseableTunnelStream):
    """A tunnelled socket: backpressure, half-close and reset are those of TCP.

    Args:
      early: what came behind the answer to CONNECT.
      on_closed: called once when this end is closed.
    """

    def __init__(
        self,
        transport: Transport,
        remote_address: tuple[str, int],
        local_address: tuple[str, int],
        early: bytes,
        on_closed: Callable[[ConnectStream], None],
    ) -> None:
        super().__init__(remote_address, local_address, 0)
        self._transport = transport
        self._received = memoryview(early)
        self._on_closed = on_closed
        self._sending = OneAtATime("another task sends on this stream")
        self._receiving = OneAtATime("another task receives from this stream")
        self._eof_sent = False
        self._eof_received = False
        self._lost = ""

    # -- receiving ---------------------------------------------------------------------------------

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive what is there, or wait for it; empty at the end of the stream.

        Raises:
          trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError

        Cancellation: nothing is lost.
        """
        limit = limit_of(max_bytes, _READ)
        with self._receiving:
            self._check_open()
            await trio.lowlevel.checkpoint()
            self._check_open()
            if not self._received and not self._eof_received:
                try:
                    view = await self._transport.receive()
                except trio.ClosedResourceError:
                    self._check_open()
                    raise
                self._eof_received = not view
                if not view and self._transport.secure:
                    self._check_end()
                if len(view) <= limit:
                    return bytes(view)
                self._received = memoryview(bytes(view))
            data = bytes(self._received[:limit])
            self._received = self._received[limit:]
            return data

    def _check_end(self) -> None:
        # A server that is killed ends its socket as one that has closed in order, but not its TLS.
        if not self._transport.close_notified:
            self.lose("the connection to the server was cut off")
            self._check_open()

    @property
    def ended(self) -> bool:
        return self._transport.closed

    @property
    def readable(self) -> bool:
        if self._received or self._eof_received or self._transport.closed:
            return True
        try:
            self._transport.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass  # broken: whoever receives is told
        return True

    def _check_open(self) -> None:
        if self._lost:
            raise trio.BrokenResourceError(self._lost)
        if self._transport.closed:
            raise trio.ClosedResourceError("this stream was closed")

    # -- sending -----------------------------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes; returns when all are with the kernel.

        Raises:
          trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError

        Cancellation: part of the data may have been sent, and nobody knows how much.
        """
        # Those of an array count its items, and what follows counts bytes.
        with self._sending, memoryview(data) as items, items.cast("B") as view:
            self._check_sendable()
            await trio.lowlevel.checkpoint()
            for start in range(0, len(view), _BATCH):
                self._check_sendable()
                if not self._transport.send((view[start : start + _BATCH],)):
                    await self._drain()
                elif start + _BATCH < len(view):
                    await trio.lowlevel.checkpoint()

    def _check_sendable(self) -> None:
        self._check_open()
        if self._eof_sent:
            raise trio.ClosedResourceError("the end of this stream was sent")

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the socket has room."""
        with self._sending:
            self._check_sendable()
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            await self._drain()
            await trio.lowlevel.wait_writable(self._transport.sock)

    async def _drain(self) -> None:
        try:
            await self._transport.drain()
        except trio.ClosedResourceError:
            self._check_open()
            raise

    # -- the end -----------------------------------------------------------------------------------

    async def send_eof(self) -> None:
        """Tell the service that nothing more will be sent.

        Raises:
          trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError

        Cancellation: the end may not have been sent; send it again, or close.
        """
        with self._sending:
            self._check_open()
            await trio.lowlevel.checkpoint()
            if not self._eof_sent:
                # What a cancelled send has left over belongs before the end.
                await self._drain()
                self._eof_sent = True
                self._transport.send_eof()

    async def aclose(self) -> None:
        """Close both directions; what was sent before still arrives.

        Cancellation: the stream is closed all the same.
        """
        # Without what a cancelled send has left over this must not look like an orderly end.
        self._close(reset=self._transport.blocked)
        await trio.lowlevel.checkpoint()

    def abort(self, reason: str = "") -> None:
        self._close(reset=True)

    def lose(self, reason: str) -> None:
        """The tunnel has ended: as :meth:`abort`, but not of the stream's own users' doing."""
        if not self._transport.closed:
            self._lost = reason
            self._close(reset=True)

    def _close(self, *, reset: bool) -> None:
        if not self._transport.closed:
            self._transport.close(reset=reset)
            self._on_closed(self)
