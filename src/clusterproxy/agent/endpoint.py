"""One proxied connection at the agent: a service's socket."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.http2.flow import Buffer, Flow
from clusterproxy.transport.outbox import current_outbox
from clusterproxy.transport.sink import ByteSink
from clusterproxy.transport.stall import watch_stall
from clusterproxy.transport.stream import Transport
from clusterproxy.tunnel.budget import Guard
from clusterproxy.tunnel.messages import data_head
from clusterproxy_proto import CloseResponse, Packet, encode

from .packets import PacketReader

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Sequence

    from clusterproxy.rpc.call import Call

    from .state import AgentState

_log = logging.getLogger("clusterproxy.agent")

# How long a service may take what was sent before the close, if it makes no progress.
_LINGER_S: Final = 10.0

_MAX_DATAGRAM: Final = 65_535


class Endpoint(ABC):
    """A service's end of a proxied connection.

    Bytes from the server come on a stream that others share, so they are queued within a budget.
    Bytes from the service are not read while they would have to wait.
    """

    def __init__(self, state: AgentState, call: Call, connect_id: int) -> None:
        self._state = state
        self._call = call
        self.connect_id = connect_id
        self.to_server = Flow(self._drained_to_server)
        self.closing = False
        self._room = trio.Event()
        self._outbox = current_outbox()

    #: Why the connection ended, if it was not by an orderly close.
    error = ""

    @abstractmethod
    async def run(self, ended: Callable[[], None]) -> None:
        """Copy from the service until it or the server ends the connection; then call *ended*.

        Returns once what the server has sent is with the service, or given up. Closes the socket.
        Cancellation: closes it at once; *ended* is not called then.
        """

    @abstractmethod
    def from_server(self, parts: Sequence[Buffer]) -> None:
        """Send one packet's payload to the service; the buffers are lent for this batch."""

    @abstractmethod
    def run_from_server(self, payloads: Sequence[Buffer]) -> None:
        """Send the payloads of several packets to the service."""

    @abstractmethod
    def close(self) -> None:
        """The server has asked to close: what it sent before still goes out."""

    async def _wait_for_room(self) -> None:
        if self.to_server.queued:
            self._room = trio.Event()
            await self._room.wait()

    def _drained_to_server(self, _size: int) -> None:
        if not self.to_server.queued:
            self._room.set()

    def confirm_close(self, error: str = "") -> None:
        """Tell the server that the connection is closed, behind the service's data."""
        self._state.count_packet("from_agent", "CLOSE_RSP")
        message = encode(Packet.of(CloseResponse(error, self.connect_id)))
        self._call.send_behind(self.to_server, message)


class StreamEndpoint(Endpoint):
    """A TCP service."""

    def __init__(self, state: AgentState, call: Call, connect_id: int, sock: socket.socket) -> None:
        super().__init__(state, call, connect_id)
        self._transport = Transport(sock)
        self._nursery: trio.Nursery | None = None
        self._reading = trio.CancelScope()
        self.sink = ByteSink(self._transport, self._spawn, self._broken)
        self.guard = Guard(self.sink, state.budget, call.stream.hold, call.stream.release)
        self.sink.on_drain = self._note_queue

    async def run(self, ended: Callable[[], None]) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                with self._reading:
                    await self._copy()
                self.guard.close()
                ended()
                if not self._transport.closed:
                    await self._linger()
                nursery.cancel_scope.cancel()
        finally:
            self._nursery = None
            self.guard.close()
            self._transport.close()
            self.sink.discard()
            self._note_queue()

    async def _copy(self) -> None:
        transport, outbox = self._transport, self._outbox
        reader = PacketReader(self.connect_id)
        try:
            while True:
                # What would have to be queued is better left to wait.
                room = self._call.stream.room // 2
                received = await transport.receive_into(reader.places(room))
                # A cancellation does not reach a task that has been woken by bytes in the same
                # round: they must not follow the answer to a CLOSE_REQ.
                if not received or self.closing:
                    return
                with outbox:
                    self._send(reader, received)
                await self._wait_for_room()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            _log.debug("service: %s", error, extra={"connection_id": self.connect_id})

    def _send(self, reader: PacketReader, received: int) -> None:
        stream, sent = self._call.stream, self._state.data_packets.to_server
        full = reader.full(received)
        if full:
            sent.value += len(full) // reader.size
            stream.send_run(self.to_server, reader.size, full)
        rest = reader.rest(received)
        if rest:
            sent.value += 1
            stream.send(self.to_server, len(rest), rest)

    async def _linger(self) -> None:
        """Let everything go out, then end in an order that loses nothing of it."""
        gone = trio.Event()
        self.sink.finish(gone.set)
        taken = -1
        while not gone.is_set() and self.sink.taken != taken:
            taken = self.sink.taken
            with trio.move_on_after(_LINGER_S):
                await gone.wait()
        if not gone.is_set() or self.sink.broken:
            self._transport.close(reset=True)
            return
        # A socket that is closed with unread bytes is reset, which can destroy what it sent.
        self._transport.send_eof()
        with trio.move_on_after(_LINGER_S):
            try:
                while await self._transport.receive():
                    await trio.lowlevel.checkpoint()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass

    def from_server(self, parts: Sequence[Buffer]) -> None:
        self.sink.send(parts)
        if self.sink.queued:
            self._note_queue()

    def run_from_server(self, payloads: Sequence[Buffer]) -> None:
        self.from_server(payloads)

    def _note_queue(self) -> None:
        over = self.guard.update()
        self._state.buffered_bytes.value = self._state.budget.used
        if over:
            self._spawn(self._watch)

    async def _watch(self) -> None:
        self._state.metrics.connections_over_budget.inc()
        try:
            await watch_stall(self.guard, self._state.config.stall_timeout_s, self._stalled)
        finally:
            self._state.metrics.connections_over_budget.dec()

    def _stalled(self) -> None:
        self._state.metrics.stalled_connections_total.labels("to_service").inc()
        _log.warning(
            "connection closed: its service took nothing for %g s while %d bytes waited",
            self._state.config.stall_timeout_s,
            self.sink.queued,
            extra={"agent_id": self._state.config.agent_id, "connection_id": self.connect_id},
        )
        self.error = "connection closed: the service did not read for too long"
        self._transport.close(reset=True)
        self._reading.cancel()

    def _broken(self, reason: str) -> None:
        _log.debug("service: %s", reason, extra={"connection_id": self.connect_id})
        self._reading.cancel()

    def close(self) -> None:
        self.closing = True
        self._reading.cancel()

    def _spawn(self, function: Callable[..., Awaitable[None]], /, *args: object) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(function, *args)


class DatagramEndpoint(Endpoint):
    """A UDP service: one packet for one datagram, either way (the Go agent does the same)."""

    def __init__(self, state: AgentState, call: Call, connect_id: int, sock: socket.socket) -> None:
        super().__init__(state, call, connect_id)
        self._sock = sock
        self._reading = trio.CancelScope()
        self._buffer = memoryview(bytearray(_MAX_DATAGRAM))

    async def run(self, ended: Callable[[], None]) -> None:
        with self._sock:
            with self._reading:
                await self._copy()
            ended()

    async def _copy(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._sock)
            try:
                size = self._sock.recv_into(self._buffer)
            except BlockingIOError:
                continue
            except OSError:
                return  # as Go: ECONNREFUSED of an earlier datagram ends the connection
            if self.closing:
                return
            if size:
                message = data_head(self.connect_id, size) + self._buffer[:size]
                self._state.data_packets.to_server.value += 1
                self._call.forward(self.to_server, len(message), message)
                await self._wait_for_room()

    def from_server(self, parts: Sequence[Buffer]) -> None:
        # What the socket does not take is lost, as datagrams are.
        try:
            self._sock.send(b"".join(parts))
        except BlockingIOError:
            pass
        except OSError:
            self._reading.cancel()

    def run_from_server(self, payloads: Sequence[Buffer]) -> None:
        for payload in payloads:
            self.from_server((payload,))

    def close(self) -> None:
        self.closing = True
        self._reading.cancel()
