"""One client's Proxy stream."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.errors import RPCError
from clusterproxy.grpc import PREFIX_SIZE, Status
from clusterproxy.http2.flow import Flow
from clusterproxy_proto import (
    CloseDial,
    CloseRequest,
    CloseResponse,
    Data,
    DecodeError,
    DialRequest,
    DialResponse,
    Packet,
    PacketType,
    Payload,
    canonical_data,
    decode,
    encode,
)

from .connection import DIAL_TIMED_OUT, NO_AGENT, Client, Connection, PendingDial, data_head
from .shield import Shield, needs_shield

if TYPE_CHECKING:
    from clusterproxy.http2.flow import Buffer
    from clusterproxy.rpc.server import ServerCall

    from .state import ServerState

_log = logging.getLogger("clusterproxy.server")

UNDECODABLE: Final = (
    "grpc: failed to unmarshal the received message: proto: cannot parse invalid wire-format data"
)
BACKEND_GONE: Final = "agent disconnected before it answered the dial"

# Connections of one stream that are closed, remembered so that late packets are told from foreign ones.
_CLOSED_LIMIT: Final = 1024

# Dials of one stream that wait for their agents. Go clients have one.
_PENDING_LIMIT: Final = 256


class Frontend(Client):
    """The server's end of one client's stream.

    A stream is meant for one connection, but several dials are served (``serveRecvFrontend`` in
    pkg/server/server.go). A packet may only name a connection that this stream has dialled.
    """

    def __init__(self, state: ServerState, call: ServerCall) -> None:
        self._state = state
        self.call = call
        self.shielded = needs_shield(call.user_agent)
        # By the number that the client knows, which differs from the agent's only if two agents
        # happened to choose the same one.
        self.connections: dict[int, FrontendConnection] = {}
        self._dials: dict[int, PendingDial] = {}
        self._closed: dict[int, None] = {}
        self._deaf = False
        self._ended = trio.Event()
        call.receive = self._receive
        call.on_half_close = self._ended.set
        call.on_close = self._on_close
        state.metrics.grpc_connections.labels("Proxy").inc()

    async def run(self) -> None:
        """Serve until the client ends its side."""
        await self._ended.wait()

    def _on_close(self, status: Status, _message: str) -> None:
        self._state.metrics.grpc_connections.labels("Proxy").dec()
        if status not in (Status.OK, Status.CANCELLED):
            self._state.metrics.stream_errors_total.labels(
                "from_client", status.go_name, "Unknown"
            ).inc()
        for dial in list(self._dials.values()):
            dial.abandon()
        self._dials.clear()
        for connection in list(self.connections.values()):
            connection.leave()
            if not self.call.stream.open:
                connection.drop_to_client()
        self.connections.clear()

    # -- packets -----------------------------------------------------------------------------------

    def _receive(self, size: int, head: memoryview, rest: tuple[memoryview, ...]) -> None:
        found = canonical_data(head, PREFIX_SIZE, size - PREFIX_SIZE)
        if found is not None:
            self._state.data_packets.from_client.value += 1
            connection = self.connections.get(found[0])
            if connection is not None and not self._deaf:
                connection.from_client(size, head, rest, PREFIX_SIZE + found[1])
            else:
                self._on_stray_data(found[0])
            return
        try:
            packet = decode(b"".join((head[PREFIX_SIZE:], *rest)))
        except DecodeError as error:
            self._state.reject("from_client", "undecodable")
            raise RPCError(Status.INTERNAL, UNDECODABLE) from error
        self._receive_packet(packet)

    def _receive_packet(self, packet: Packet) -> None:
        name = PacketType(packet.type).name if packet.type in _TYPES else "Unknown"
        self._state.count_packet("from_client", name)
        if not packet.consistent:
            if packet.type in _FROM_CLIENT:
                self._state.reject("from_client", "no_payload")
                text = f"packet of type {name} without its payload"
                raise RPCError(Status.INVALID_ARGUMENT, text)
            return
        if self._deaf:
            return
        match packet.payload:
            case DialRequest():
                self._on_dial_request(packet.payload)
            case Data():
                self._on_data(packet.payload)
            case CloseRequest():
                self._on_close_request(packet.payload.connect_id)
            case CloseDial():
                self._on_close_dial(packet.payload.random)
            case _:
                pass  # what only agents send

    def _send(self, payload: Payload, flow: Flow | None = None) -> None:
        packet = Packet.of(payload)
        self._state.count_packet("to_client", PacketType(packet.type).name)
        if flow is None:
            self.call.send(encode(packet))
        else:
            self.call.send_behind(flow, encode(packet))

    def _on_dial_request(self, request: DialRequest) -> None:
        backend = self._state.pool.choose(request.address)
        if backend is None:
            self._state.count_dial_failure("no_agent")
            _log.warning(
                "dial of %s failed: no agent", request.address, extra={"dial_id": request.random}
            )
            self._send(DialResponse(error=NO_AGENT, random=request.random))
            self._deaf = True
            return
        if request.random in self._dials or len(self._dials) >= _PENDING_LIMIT:
            known = request.random in self._dials
            self._state.reject("from_client", "duplicate_dial" if known else "too_many_dials")
            error = "dial with this number is pending" if known else "too many pending dials"
            self._send(DialResponse(error=error, random=request.random))
            return
        self._dials[request.random] = PendingDial(self._state, self, backend, request)

    def _on_data(self, data: Data) -> None:
        if not data.connect_id:
            return
        connection = self.connections.get(data.connect_id)
        if connection is None:
            self._on_stray_data(data.connect_id)
        elif data.data:
            head = data_head(data.connect_id, len(data.data))
            connection.from_client(len(head) + len(data.data), head + data.data, (), len(head))

    def _on_stray_data(self, connect_id: int) -> None:
        """DATA that names no open connection of this stream."""
        if self._deaf or connect_id in self._closed:
            return
        self._state.reject("from_client", "foreign_connection")
        if self.connections:
            # Upstream closes both; the one that is not ours must not be touched (S24).
            for connection in list(self.connections.values()):
                connection.leave()
                self._send(CloseResponse(MISMATCHED, connection.client_id), connection.to_client)
            self.connections.clear()
            self._send(CloseResponse(MISMATCHED, connect_id))
            self._deaf = True
        elif not self._dials and not self._closed:
            self._send(CloseResponse("backend not initialized", connect_id))
            self._deaf = True

    def _on_close_request(self, connect_id: int) -> None:
        connection = self.connections.get(connect_id)
        if connection is not None:
            connection.shield_off()
            connection.request_close()
        elif not self._dials and not self._closed and not self.connections:
            self._send(CloseResponse("backend uninitialized", connect_id))
        elif connect_id not in self._closed:
            self._state.reject("from_client", "foreign_connection")

    def _on_close_dial(self, number: int) -> None:
        dial = self._dials.pop(number, None)
        if dial is not None and dial.remove():
            self._state.count_dial_failure("frontend_close")

    # -- Client ------------------------------------------------------------------------------------

    def dialed(self, dial: PendingDial, connect_id: int) -> Connection:
        self._dials.pop(dial.random, None)
        connection = FrontendConnection(self._state, dial, connect_id, self)
        self.connections[connection.client_id] = connection
        self._send(DialResponse(connect_id=connection.client_id, random=dial.random))
        connection.shield_on()
        return connection

    def forget(self, connection: FrontendConnection) -> None:
        """A connection is over; packets that name it are late from now on."""
        self.connections.pop(connection.client_id, None)
        self._closed[connection.client_id] = None
        if len(self._closed) > _CLOSED_LIMIT:
            del self._closed[next(iter(self._closed))]

    def free_id(self, wanted: int) -> int:
        """Return the number for a new connection: the agent's, unless this stream has it already."""
        self._closed.pop(wanted, None)
        while wanted in self.connections:
            wanted += 1 << 32
        return wanted

    def _fail(self, dial: PendingDial, error: str) -> None:
        self._dials.pop(dial.random, None)
        self._send(DialResponse(error=error, random=dial.random))

    def refused(self, dial: PendingDial, error: str) -> None:
        self._fail(dial, error)

    def withdrawn(self, dial: PendingDial) -> None:
        self._dials.pop(dial.random, None)
        self._send(CloseDial(dial.random))

    def timed_out(self, dial: PendingDial, *, unsent: bool) -> None:  # noqa: ARG002
        self._fail(dial, DIAL_TIMED_OUT)

    def backend_gone(self, dial: PendingDial) -> None:
        self._fail(dial, BACKEND_GONE)

    def close_connection(self, connection: FrontendConnection, error: str) -> None:
        """Tell the client that a connection is closed, behind its data."""
        self.forget(connection)
        connection.shield_off()
        self._send(CloseResponse(error, connection.client_id), connection.to_client)

    def spawn(self, function: Callable[..., Awaitable[None]], /, *args: object) -> None:
        self.call.start_soon(function, *args)


class FrontendConnection(Connection):
    """A proxied connection of a gRPC client."""

    __slots__ = ("_frontend", "_shield", "client_id", "to_client")

    def __init__(
        self, state: ServerState, dial: PendingDial, connect_id: int, frontend: Frontend
    ) -> None:
        self.to_client = Flow(self._drained_to_client)
        super().__init__(state, dial, connect_id, self.to_client)
        self._frontend = frontend
        self._shield: Shield | None = None
        self.client_id = frontend.free_id(connect_id)
        self.to_agent.on_drain = frontend.call.stream.release

    def shield_on(self) -> None:
        if self._frontend.shielded:
            self._shield = Shield(self._frontend.call, self.to_client)

    def shield_off(self) -> None:
        if self._shield is not None:
            self._shield.release()
            self._shield = None

    def from_client(
        self, size: int, head: Buffer, rest: tuple[Buffer, ...], payload: int
    ) -> None:
        """Pass on DATA of the client; what waits is held against its stream."""
        if self._shield is not None:
            self.shield_off()
        if self.closing:
            return
        if self.client_id != self.connect_id:
            head, size = _renumber(self.connect_id, size, head, payload)
        self.forward_to_agent(size, head, rest)

    def _hold(self, size: int) -> None:
        self._frontend.call.stream.hold(size)

    def from_agent(self, size: int, head: Buffer, rest: tuple[Buffer, ...], payload: int) -> None:
        flow = self.to_client
        if flow.held and self._shield is not None:
            self._shield.before_data()
        if self.client_id != self.connect_id:
            head, size = _renumber(self.client_id, size, head, payload)
        self._state.data_packets.to_client.value += 1
        self._frontend.call.forward(flow, size, head, rest)
        if flow.queued:
            self.note_queue()

    def _drained_to_client(self, _size: int) -> None:
        self.guard.update()

    def closed_by_agent(self, error: str) -> None:
        self._frontend.close_connection(self, error)

    def give_up(self) -> None:
        self.drop_to_client()
        self._frontend.close_connection(self, STALLED)

    def drop_to_client(self) -> None:
        """Forget what waits for the client."""
        self._frontend.call.stream.drop_flow(self.to_client)
        self.guard.update()

    def _spawn(self, function: Callable[..., Awaitable[None]], /, *args: object) -> None:
        self._frontend.spawn(function, *args)


def _renumber(number: int, size: int, head: Buffer, payload: int) -> tuple[bytes, int]:
    """Return the head and size of a DATA message under another connectID."""
    new_head = data_head(number, size - payload)
    return new_head + memoryview(head)[payload:], len(new_head) + size - payload


MISMATCHED: Final = "mismatched connection IDs"
STALLED: Final = "connection closed: the client did not read for too long"

_TYPES: Final = frozenset(int(kind) for kind in PacketType)
_FROM_CLIENT: Final = frozenset(
    (PacketType.DIAL_REQ, PacketType.DATA, PacketType.CLOSE_REQ, PacketType.DIAL_CLS)
)


def frontend_opener(
    state: ServerState,
) -> Callable[[ServerCall], Callable[[], Awaitable[None]]]:
    """Return what opens a frontend for each call of ``/ProxyService/Proxy``."""

    def open_frontend(call: ServerCall) -> Callable[[], Awaitable[None]]:
        return Frontend(state, call).run

    return open_frontend
