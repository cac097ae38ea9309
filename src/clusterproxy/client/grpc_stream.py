"""A connection to a service over a gRPC stream."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.http2.flow import Flow
from clusterproxy.transport.outbox import current_outbox
from clusterproxy.transport.stall import watch_stall
from clusterproxy.tunnel.budget import Budget, Guard
from clusterproxy.tunnel.messages import data_head
from clusterproxy_proto import CloseRequest, HalfClose, Packet, PacketType, Payload, Reset, encode

from .inbox import Inbox
from .stream import HalfCloseableTunnelStream, OneAtATime, TunnelStream, limit_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clusterproxy.rpc.channel import ClientCall
    from clusterproxy.telemetry.client_metrics import ClientMetrics

_log = logging.getLogger("clusterproxy.client")

# A whole gRPC message of at most 32 KiB, which is a tier of grpc-go's buffer pool.
_CHUNK: Final = 32_740

# Others run between two writes of this size.
_BATCH: Final = 512 * 1024

# What one read returns at most unless it is asked for more.
_READ: Final = 512 * 1024

#: As long as the Go client waits for a CLOSE_RSP.
CLOSE_TIMEOUT_S: Final = 10.0

# What may wait for a reader when the server can hold nobody back but the whole agent, and for how
# long without progress. Where the server has agreed to the extension there is no such rule.
_BUDGET: Final = 4 * 1024 * 1024
_STALL_TIMEOUT_S: Final = 10.0


class GrpcStream(TunnelStream):
    """The only connection of one Proxy stream.

    Args:
      extended: whether the server has agreed to the protocol's extension.
      spawn: starts a task that lives as long as the tunnel.
    """

    def __init__(
        self,
        call: ClientCall,
        connect_id: int,
        remote_address: tuple[str, int],
        local_address: tuple[str, int],
        *,
        extended: bool,
        spawn: Callable[[Callable[..., Awaitable[None]]], None],
        metrics: ClientMetrics,
    ) -> None:
        super().__init__(remote_address, local_address, connect_id)
        self._call = call
        self.extended = extended
        self._spawn = spawn
        self._metrics = metrics
        self._outbox = current_outbox()
        self._flow = Flow(self._drained)
        self._inbox = Inbox()
        stream = call.stream
        self._guard: Guard | None = None
        if not extended:
            budget = Budget(each=_BUDGET, total=2 * _BUDGET)
            self._guard = Guard(self._inbox, budget, stream.hold, stream.release)
        self._held = 0
        self._sending = OneAtATime("another task sends on this stream")
        self._receiving = OneAtATime("another task receives from this stream")
        self._arrived = trio.Event()
        self._sent = trio.Event()
        self._watching: trio.CancelScope | None = None
        self._closed = False
        self._eof_sent = False
        self._eof_received = False
        #: Set when both directions have ended for good.
        self._over = trio.Event()
        self._reason = ""
        self._data_packets = metrics.stream_packets_total.labels("from_client", "DATA")

    # -- what the connection's reader tells --------------------------------------------------------

    def on_data(self, data: bytes) -> None:
        """Take bytes of the service."""
        if self._closed or self._eof_received or self._over.is_set():
            return
        self._inbox.put(data)
        self._note_inbox()
        self._arrived.set()

    def on_half_close(self) -> None:
        """The service sends no more."""
        self._eof_received = True
        self._arrived.set()

    def on_close_response(self, error: str) -> None:
        """The connection is closed at the other end."""
        if not self._over.is_set():
            self._finish(error)
            self._leave()

    def on_reset(self, reason: str) -> None:
        """The connection broke, or the other end gave it up."""
        if not self._over.is_set():
            self._finish(reason or "connection reset")
            self._leave()

    def on_lost(self, reason: str) -> None:
        """The gRPC stream ended."""
        self._finish(reason)

    def _finish(self, reason: str) -> None:
        if self._over.is_set():
            return
        self._reason = reason
        self._over.set()
        self._call.stream.drop_flow(self._flow)
        # It refers to us: without this only the garbage collector would free both, and what was not received.
        self._flow.on_drain = None
        if self._watching is not None:
            self._watching.cancel()
        self._wake()

    def _wake(self) -> None:
        self._arrived.set()
        self._sent.set()

    def _drained(self, _size: int) -> None:
        if not self._flow.queued:
            self._sent.set()

    # -- the inbox ---------------------------------------------------------------------------------

    def _note_inbox(self) -> None:
        """Let the server send as much as has been received, and no more."""
        if self._guard is not None:
            if self._guard.update():
                self._spawn(self._watch)
            return
        stream, change = self._call.stream, self._inbox.queued - self._held
        self._held += change
        if change > 0:
            stream.hold(change)
        else:
            stream.release(-change)

    async def _watch(self) -> None:
        guard = self._guard
        assert guard is not None  # noqa: S101  who watches has one
        with trio.CancelScope() as self._watching:
            if not self._over.is_set():
                await watch_stall(guard, _STALL_TIMEOUT_S, self._stalled)

    def _stalled(self) -> None:
        self._metrics.stalled_connections_total.labels("to_client").inc()
        _log.warning(
            "connection closed: nothing was read for %g s while %d bytes waited",
            _STALL_TIMEOUT_S,
            self._inbox.queued,
            extra={"connection_id": self.connect_id},
        )
        self._inbox.clear()
        self._finish(
            f"nothing was read for {_STALL_TIMEOUT_S:g} s while {_BUDGET >> 20} MiB waited; "
            "this proxy server would stop all other connections of the agent meanwhile"
        )
        self._call.cancel()

    # -- receiving ---------------------------------------------------------------------------------

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Receive what is there, or wait for it; empty at the end of the stream.

        What has come before an end, even a bad one, is still received.

        Raises:
          trio.BrokenResourceError: the connection did not end in order; the text says why.
          trio.ClosedResourceError, trio.BusyResourceError: as trio's streams.

        Cancellation: nothing is lost.
        """
        limit = limit_of(max_bytes, _READ)
        with self._receiving:
            self._check_open()
            await trio.lowlevel.checkpoint()
            while not self._inbox.queued:
                self._check_open()
                if self._over.is_set() and self._reason:
                    raise trio.BrokenResourceError(self._reason)
                if self._over.is_set() or self._eof_received:
                    return b""
                self._arrived = trio.Event()
                await self._arrived.wait()
            data = self._inbox.take(limit)
            self._note_inbox()
            return data

    @property
    def ended(self) -> bool:
        return self._closed or self._over.is_set()

    @property
    def readable(self) -> bool:
        return bool(self._inbox.queued) or self._eof_received or self.ended

    @property
    def leaving(self) -> bool:
        return self._call.connection.draining

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this stream was closed")

    # -- sending -----------------------------------------------------------------------------------

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send bytes; returns when all are with the kernel, and the peers have room for them.

        Raises:
          trio.BrokenResourceError: the connection has ended, for the reason in the text.
          trio.ClosedResourceError, trio.BusyResourceError: as trio's streams.

        Cancellation: part of the data may have been sent, and nobody knows how much.
        """
        # Those of an array count its items, and what follows counts bytes.
        with self._sending, memoryview(data) as items, items.cast("B") as view:
            self._check_sendable()
            await trio.lowlevel.checkpoint()
            self._check_sendable()
            start, size = 0, len(view)
            while start < size:
                with self._outbox:
                    start = self._put(view, start)
                await self._wait_until_sent()
                self._check_sendable()
                if start < size:
                    await trio.lowlevel.checkpoint()
                    self._check_sendable()

    def _put(self, view: memoryview, start: int) -> int:
        """Put packets down until one has to wait; return where the rest begins."""
        call, flow, connect_id = self._call, self._flow, self.connect_id
        stop = min(len(view), start + _BATCH)
        while start < stop and not flow.queued:
            chunk = view[start : start + _CHUNK]
            head = data_head(connect_id, len(chunk))
            call.forward(flow, len(head) + len(chunk), head, (chunk,))
            self._data_packets.value += 1
            start += len(chunk)
        return start

    async def _wait_until_sent(self) -> None:
        while self._flow.queued and not self._closed and not self._over.is_set():
            self._sent = trio.Event()
            await self._sent.wait()

    def _check_sendable(self) -> None:
        self._check_open()
        if self._eof_sent:
            raise trio.ClosedResourceError("the end of this stream was sent")
        if self._over.is_set():
            raise trio.BrokenResourceError(self._reason or "the other end has closed")

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until nothing of what was sent waits any more."""
        with self._sending:
            self._check_sendable()
            await trio.lowlevel.checkpoint()
            await self._wait_until_sent()
            self._check_sendable()

    # -- the end -----------------------------------------------------------------------------------

    async def aclose(self) -> None:
        """Close both directions, and wait until the agent has confirmed it.

        What was sent before still arrives.

        Raises:
          trio.BrokenResourceError: there was no confirmation within 10 s, or it names an error: what
            was sent may not have arrived.

        Cancellation: the stream is closed all the same, at once. Unless everything had been sent the
        service then sees a reset, if that can be said.
        """
        if self._closed:
            await trio.lowlevel.checkpoint()
            return
        self._closed = True
        self._wake()
        self._inbox.clear()
        self._note_inbox()
        if self._over.is_set():
            await trio.lowlevel.checkpoint()
            return
        self._send_behind(CloseRequest(self.connect_id))
        try:
            with trio.fail_after(CLOSE_TIMEOUT_S):
                await self._over.wait()
        except trio.TooSlowError:
            self._abort("close timeout")
            raise trio.BrokenResourceError("close timeout") from None
        except trio.Cancelled:
            if self._call.stream.waiting:
                self._abort("the client has gone")
            elif not self._over.is_set():
                self._finish("closed")
                self._leave()
            raise
        if self._reason:
            raise trio.BrokenResourceError(self._reason)

    def abort(self, reason: str = "") -> None:
        if not self._closed:
            self._closed = True
            self._inbox.clear()
            self._note_inbox()
            self._abort(reason or "the client has gone")
            self._wake()

    def _abort(self, reason: str) -> None:
        if self._over.is_set():
            return
        self._finish(reason)
        if self.extended:
            self._count(PacketType.RESET)
            self._call.send(encode(Packet.of(Reset(self.connect_id, reason))))
            self._leave()
        else:
            self._call.cancel()

    def _leave(self) -> None:
        """End the call, in order if nothing is in the way of it."""
        if self._call.stream.waiting:
            self._call.cancel()
        else:
            self._call.half_close()

    def _send_behind(self, payload: Payload) -> None:
        packet = Packet.of(payload)
        self._count(packet.type)
        self._call.send_behind(self._flow, encode(packet))

    def _count(self, kind: int) -> None:
        name = PacketType(kind).name
        self._metrics.stream_packets_total.labels("from_client", name).inc()


class HalfCloseableGrpcStream(GrpcStream, HalfCloseableTunnelStream):
    """A connection whose server has agreed to the extension."""

    async def send_eof(self) -> None:
        """Tell the service that nothing more will be sent, behind everything that was.

        Raises:
          trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError

        Cancellation: the end will be sent all the same.
        """
        with self._sending:
            self._check_open()
            if self._eof_sent:
                await trio.lowlevel.checkpoint()
                return
            self._check_sendable()
            self._eof_sent = True
            self._send_behind(HalfClose(self.connect_id))
            await trio.lowlevel.checkpoint()
            await self._wait_until_sent()
