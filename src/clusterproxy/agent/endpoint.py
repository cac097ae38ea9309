"""One proxied connection at the agent: a service's socket."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.http2.flow import Buffer, Flow
from clusterproxy.transport.outbox import current_outbox
from clusterproxy.transport.pace import Gait, current_pace
from clusterproxy.transport.sink import ByteSink
from clusterproxy.transport.stall import watch_stall
from clusterproxy.transport.stream import Transport
from clusterproxy.tunnel.budget import Guard
from clusterproxy.tunnel.extension import Allowance, Window
from clusterproxy_proto import (
    CloseResponse,
    Credit,
    HalfClose,
    Packet,
    PacketType,
    Payload,
    Reset,
    encode,
)

from .packets import PacketReader

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Sequence

    from clusterproxy.rpc.call import Call

    from .state import AgentState

_log = logging.getLogger("clusterproxy.agent")

# How long a service may take what was sent before the close, if it makes no progress.
_LINGER_S: Final = 10.0

# How often the kernel is asked whether a service is still there that is not read.
_GONE_S: Final = 5.0


class Endpoint(ABC):
    """A service's end of a proxied connection.

    Bytes from the server come on a stream that others share, so they are queued within a budget, or,
    if the server knows credit, no more come than was granted. Bytes from the service are not read
    while they would have to wait.

    Args:
      extended: whether the server knows credit, half-close and reset.
    """

    def __init__(self, state: AgentState, call: Call, connect_id: int, *, extended: bool) -> None:
        self._state = state
        self._call = call
        self.connect_id = connect_id
        self.to_server = Flow(self._drained_to_server)
        self.closing = False
        self._window = Window() if extended else None
        self._allowance = Allowance() if extended else None
        self._room = trio.Event()
        self._outbox = current_outbox()
        self._pace = current_pace()
        self._gait = Gait()

    #: Why the connection is closed, if it was not by an orderly end.
    error = ""
    #: What broke it, if something did.
    broken = ""

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

    @abstractmethod
    def half_close(self) -> None:
        """The server will send no more, but still takes what the service sends."""

    @abstractmethod
    def abort(self) -> None:
        """The connection is broken off: end it at once."""

    @property
    @abstractmethod
    def _queued(self) -> int:
        """Bytes that wait for the service."""

    def receive(self, size: int, count: int = 1) -> bool:
        """Count messages of the server; return whether it was allowed to send them."""
        self._gait.note(size * count)
        return self._window is None or self._window.receive(size, count)

    def grant(self) -> None:
        """Let the server send on what the service has taken, if it is worth a packet."""
        if self._window is not None and not self.closing:
            server = self._call.connection
            size = self._window.grant(
                self._queued, self._state.budget.limit, server.line.size, server.credit.take
            )
            if size:
                self._state.count_packet("from_agent", "CREDIT")
                self._call.send(encode(Packet.of(Credit(self.connect_id, size))))

    def give_back(self) -> None:
        """The server knows the connection no more: it will send nothing."""
        if self._window is not None:
            self._call.connection.credit.give_back(self._window.borrowed)
            self._window.borrowed = 0

    def credit(self, size: int) -> None:
        """The server takes so many bytes more."""
        if self._allowance is not None and size > 0:
            self._allowance.left += size
            self._room.set()

    def _spend(self, size: int) -> None:
        if self._allowance is not None:
            self._allowance.left -= size

    async def _wait_for_room(self) -> None:
        while self.to_server.queued or (self._allowance is not None and self._allowance.exhausted):
            self._room = trio.Event()
            with trio.move_on_after(_GONE_S) as look:
                await self._room.wait()
            if look.cancelled_caught:
                self._check_service()

    def _check_service(self) -> None:  # noqa: B027  a datagram has nobody
        """Raise trio.BrokenResourceError if the service has gone: nobody reads its socket now."""

    def _drained_to_server(self, _size: int) -> None:
        if not self.to_server.queued:
            self._room.set()

    def confirm_close(self) -> None:
        """Tell the server, behind the service's data, that the connection is over, and how."""
        self.closing = True
        if self.broken and self._window is not None:
            self._send_last(Reset(self.connect_id, self.broken))
        else:
            self._send_last(CloseResponse(self.error, self.connect_id))

    def _send_last(self, payload: Payload) -> None:
        packet = Packet.of(payload)
        self._state.count_packet("from_agent", PacketType(packet.type).name)
        self._call.send_behind(self.to_server, encode(packet))


class StreamEndpoint(Endpoint):
    """A TCP service."""

    def __init__(
        self,
        state: AgentState,
        call: Call,
        connect_id: int,
        sock: socket.socket,
        *,
        extended: bool,
    ) -> None:
        super().__init__(state, call, connect_id, extended=extended)
        self._transport = Transport(sock)
        self._nursery: trio.Nursery | None = None
        self._reading = trio.CancelScope()
        self._server_ended = self._service_ended = False
        self.sink = ByteSink(self._transport, self._spawn, self._break)
        if extended:
            # What the server sends is bounded by its credit: the stream is never held.
            self.guard = Guard(self.sink, state.budget)
        else:
            self.guard = Guard(self.sink, state.budget, call.stream.hold, call.stream.release)
        self.sink.on_drain = self._note_queue

    @property
    def _queued(self) -> int:
        return self.sink.queued

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
            # Cycles of references would keep all of it until the garbage collector comes by.
            self.sink.dispose()
            self.to_server.on_drain = None

    async def _copy(self) -> None:
        transport, outbox = self._transport, self._outbox
        reader = PacketReader(self.connect_id)
        try:
            while True:
                await self._wait_for_room()
                # What would have to be queued is better left to wait.
                room = min(self._call.stream.room // 2, self._pace.read_size)
                limit = None if self._allowance is None else self._allowance.left
                received = await transport.receive_into(reader.places(room, limit))
                # A cancellation does not reach a task that has been woken by bytes in the same
                # round: they must not follow the answer to a CLOSE_REQ.
                if self.closing:
                    return
                if not received:
                    await self._end_service()
                    return
                with outbox:
                    self._send(reader, received)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._break(str(error))

    async def _end_service(self) -> None:
        """The service sends no more; return once the connection is over for the server, too."""
        self._service_ended = True
        if self._window is not None and not self._server_ended:
            self._send_last(HalfClose(self.connect_id))
            while True:
                await trio.sleep(_GONE_S)
                self._check_service()

    def _check_service(self) -> None:
        # What it has said before is still delivered.
        if self._transport.gone and not self._transport.unread:
            raise trio.BrokenResourceError("the service has gone")

    def _send(self, reader: PacketReader, received: int) -> None:
        stream, sent = self._call.stream, self._state.data_packets.to_server
        self._gait.note(received)
        full = reader.full(received)
        rest = reader.rest(received)
        self._spend(len(full) + len(rest))
        if full:
            sent.value += len(full) // reader.size
            stream.send_run(self.to_server, reader.size, full)
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
        if self._server_ended:
            return
        self.sink.send(parts)
        if self.sink.queued:
            self._note_queue()

    def run_from_server(self, payloads: Sequence[Buffer]) -> None:
        self.from_server(payloads)

    def _note_queue(self) -> None:
        over = self.guard.update()
        self._state.buffered_bytes.value = self._state.budget.used
        if self._window is not None:
            self.grant()
        elif over:
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

    def _break(self, reason: str) -> None:
        _log.debug("service: %s", reason, extra={"connection_id": self.connect_id})
        self.broken = reason
        self._reading.cancel()

    def close(self) -> None:
        self.closing = True
        self._reading.cancel()

    def half_close(self) -> None:
        if self._server_ended:
            return
        self._server_ended = True
        if self._service_ended:
            self._reading.cancel()
        else:
            self.sink.finish(self._transport.send_eof)

    def abort(self) -> None:
        self._transport.close(reset=True)
        self.close()

    def _spawn(self, function: Callable[..., Awaitable[None]], /, *args: object) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(function, *args)
