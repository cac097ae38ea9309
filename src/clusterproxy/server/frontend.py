"""One client's Proxy stream."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.errors import RPCError
from clusterproxy.grpc import PREFIX_SIZE, Status
from clusterproxy.rpc.keepalive import BETWEEN_OURS
from clusterproxy.tunnel.extension import accepted, offer
from clusterproxy.tunnel.messages import data_message
from clusterproxy_proto import (
    CloseDial,
    CloseRequest,
    CloseResponse,
    Data,
    DecodeError,
    DialRequest,
    DialResponse,
    HalfClose,
    Packet,
    PacketType,
    Payload,
    Reset,
    canonical_data,
    decode,
    encode,
)

from .connection import (
    DIAL_TIMED_OUT,
    MAX_ADDRESS,
    MAX_PROTOCOL,
    NO_AGENT,
    SATURATED,
    Client,
    PendingDial,
)
from .frontend_connection import FrontendConnection
from .shield import Shield, needs_shield

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clusterproxy.rpc.server import ServerCall

    from .backend import Backend
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


class _HeldDial:
    """A dial that waits for an agent to come: the client may take it back as one that waits for an answer."""

    def __init__(self) -> None:
        self.scope = trio.CancelScope()

    def withdraw(self) -> None:
        self.scope.cancel()

    abandon = withdraw


class Frontend(Client):
    """The server's end of one client's stream.

    A stream is meant for one connection, but several dials are served (``serveRecvFrontend`` in
    pkg/server/server.go). A packet may only name a connection that this stream has dialled.
    """

    def __init__(self, state: ServerState, call: ServerCall) -> None:
        self._state = state
        self.call = call
        self.shield = Shield(call) if needs_shield(call.user_agent) else None
        #: Whether the client knows half-close and reset (docs/protocol-extensions.md).
        self.extended = accepted(call.metadata)
        if self.extended:
            call.send_initial_metadata(offer())
            if "frontend-keepalive-time" not in state.config.given:
                call.connection.keepalive = BETWEEN_OURS
        # By the number that the client knows, which differs from the agent's only if two agents
        # happened to choose the same one.
        self.connections: dict[int, FrontendConnection] = {}
        self._dials: dict[int, PendingDial | _HeldDial] = {}
        # Closed, but with something for the client that is not on its way yet.
        self._leaving: set[FrontendConnection] = set()
        self._closed: dict[int, None] = {}
        self._deaf = False
        # Bytes of the client that wait for agents, and whether they leave its stream no credit.
        self._held = 0
        self._full = False
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
        # A client that ends its side wants no more of what is queued, so that nothing outlives the call. But what it
        # has sent before is as good as before a CLOSE_REQ: whether the stream is still there says nothing about that.
        for connection in (*self.connections.values(), *self._leaving):
            if status is Status.OK:
                connection.leave()
            else:
                connection.break_off("the client has gone")
            connection.drop_to_client()
            _part(connection)
        self.connections.clear()
        self._leaving.clear()
        self._note_full(full=False)

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
            case HalfClose() if self.extended:
                connection = self.connections.get(packet.payload.connect_id)
                if connection is not None:
                    connection.end_client()
            case Reset() if self.extended:
                self._on_reset(packet.payload)
            case _:
                pass  # what only agents send

    def _send(self, payload: Payload) -> None:
        packet = Packet.of(payload)
        self._state.count_packet("to_client", PacketType(packet.type).name)
        self.call.send(encode(packet))

    def _on_dial_request(self, request: DialRequest) -> None:
        reason, error = self._objection(request)
        if error:
            self._state.reject("from_client", reason)
            self._send(DialResponse(error=error, random=request.random))
            return
        backend = self._state.pool.choose(request.address)
        if backend is None and self._state.arrivals.open:
            held = self._dials[request.random] = _HeldDial()
            self.call.start_soon(self._await_agent, request, held)
        else:
            self._dial(request, backend)

    async def _await_agent(self, request: DialRequest, held: _HeldDial) -> None:
        with held.scope:
            backend = await self._state.arrivals.choose(request.address)
            # The client may have left in the moment in which the agent came.
            if self._dials.get(request.random) is held:
                del self._dials[request.random]
                self._dial(request, backend)

    def _dial(self, request: DialRequest, backend: Backend | None) -> None:
        if backend is None:
            self._state.count_dial_failure("no_agent")
            _log.warning(
                "dial of %.256s failed: no agent",
                request.address,
                extra={"dial_id": request.random},
            )
            self._send(DialResponse(error=NO_AGENT, random=request.random))
            # As upstream, but not if that would swallow the data of another connection.
            self._deaf = not self.connections and not self._dials
            return
        if backend.saturated:
            self._state.count_dial_failure("backend_close")
            self._send(DialResponse(error=SATURATED, random=request.random))
            return
        dial = PendingDial(self._state, self, backend, request)
        # It may have failed already, with the backend that could not take it.
        if dial.pending:
            self._dials[request.random] = dial

    def _objection(self, request: DialRequest) -> tuple[str, str]:
        """Return why a request is refused, as a label and as a text, or two empty strings."""
        if len(request.address) > MAX_ADDRESS or len(request.protocol) > MAX_PROTOCOL:
            return "long_address", "address or protocol too long"
        if request.random in self._dials:
            return "duplicate_dial", "dial with this number is pending"
        if len(self._dials) >= _PENDING_LIMIT:
            return "too_many_dials", "too many pending dials"
        return "", ""

    def _on_data(self, data: Data) -> None:
        if not data.connect_id:
            return
        connection = self.connections.get(data.connect_id)
        if connection is None:
            self._on_stray_data(data.connect_id)
        else:
            message, payload = data_message(data.connect_id, data.data)
            connection.from_client(len(message), message, (), payload)

    def _on_stray_data(self, connect_id: int) -> None:
        """DATA that names no open connection of this stream."""
        if self._deaf or connect_id in self._closed:
            return
        self._state.reject("from_client", "foreign_connection")
        if self.connections:
            # Upstream closes both; the one that is not ours must not be touched (S24).
            for connection in list(self.connections.values()):
                connection.leave()
                self.close_connection(connection, MISMATCHED)
            self._send(CloseResponse(MISMATCHED, connect_id))
            self._deaf = True
        elif not self._dials and not self._closed:
            self._send(CloseResponse("backend not initialized", connect_id))
            self._deaf = True

    def _on_close_request(self, connect_id: int) -> None:
        connection = self.connections.get(connect_id)
        if connection is not None:
            connection.uncover()
            connection.request_close()
        elif not self._dials and not self._closed and not self.connections:
            self._send(CloseResponse("backend uninitialized", connect_id))
        elif connect_id not in self._closed:
            self._state.reject("from_client", "foreign_connection")

    def _on_reset(self, reset: Reset) -> None:
        connection = self.connections.get(reset.connect_id)
        if connection is not None:
            self.forget(connection)
            connection.break_off(reset.reason)
            connection.drop_to_client()
            _part(connection)

    def _on_close_dial(self, number: int) -> None:
        dial = self._dials.pop(number, None)
        if dial is not None:
            dial.withdraw()

    # -- Client ------------------------------------------------------------------------------------

    def dialed(self, dial: PendingDial, connect_id: int) -> FrontendConnection:
        self._dials.pop(dial.random, None)
        self.call.stream.useful = True
        connection = FrontendConnection(self._state, dial, connect_id, self)
        self.connections[connection.client_id] = connection
        self._send(DialResponse(connect_id=connection.client_id, random=dial.random))
        if self.shield is not None:
            self.shield.cover(connection.to_client)
        return connection

    def forget(self, connection: FrontendConnection) -> None:
        """A connection is over; packets that name it are late from now on."""
        self.connections.pop(connection.client_id, None)
        self._closed[connection.client_id] = None
        if len(self._closed) > _CLOSED_LIMIT:
            del self._closed[next(iter(self._closed))]

    def free_id(self, wanted: int) -> int:
        """Return the number for a new connection: the agent's, unless this stream has or had it.

        What is still on its way for a closed connection must not be taken for the new one's.
        """
        while wanted in self.connections or wanted in self._closed:
            wanted = wanted % (1 << 62) + (1 << 32)
        return wanted

    def _fail(self, dial: PendingDial, error: str) -> None:
        self._dials.pop(dial.random, None)
        self._send(DialResponse(error=error, random=dial.random))

    def refused(self, dial: PendingDial, error: str) -> None:
        self._fail(dial, error)

    def withdrawn(self, dial: PendingDial) -> None:
        self._dials.pop(dial.random, None)
        self._send(CloseDial(dial.random))

    def timed_out(self, dial: PendingDial, *, unsent: bool) -> None:
        self._fail(dial, DIAL_TIMED_OUT)

    def backend_gone(self, dial: PendingDial) -> None:
        self._fail(dial, BACKEND_GONE)

    def close_connection(self, connection: FrontendConnection, error: str) -> None:
        """Tell the client that a connection is closed, behind its data."""
        self._end(connection, CloseResponse(error, connection.client_id))

    def break_connection(self, connection: FrontendConnection, reason: str) -> None:
        """Tell the client that a connection broke, behind its data."""
        if not self.extended:
            self.close_connection(connection, reason)
            return
        self._end(connection, Reset(connection.client_id, reason))

    def _end(self, connection: FrontendConnection, last: CloseResponse | Reset) -> None:
        self.forget(connection)
        connection.send_last(last)
        if connection.to_client.queued:
            self._leaving.add(connection)
        else:
            self._leaving.discard(connection)
            _part(connection)

    def hold(self, size: int) -> None:
        """Count bytes of the client that wait for an agent; the stream gets no credit for them."""
        self._held += size
        self.call.stream.hold(size)
        window = self.call.stream.window
        if self._held > window - window // 4:
            self._note_full(full=True)

    def release(self, size: int) -> None:
        """Give back what has gone to the agent, or is lost with it."""
        self._held -= size
        self.call.stream.release(size)
        if self._held <= self.call.stream.window // 2:
            self._note_full(full=False)

    def _note_full(self, *, full: bool) -> None:
        if full != self._full and not (full and self.call.closed):
            self._full = full
            gauge = self._state.metrics.full_receive_channels.labels("Proxy")
            gauge.inc(1 if full else -1)

    def sent(self, connection: FrontendConnection) -> None:
        """Nothing of a connection waits for the client any more."""
        if connection in self._leaving:
            self._leaving.discard(connection)
            _part(connection)

    def spawn(self, function: Callable[..., Awaitable[None]], /, *args: object) -> None:
        self.call.start_soon(function, *args)


def _part(connection: FrontendConnection) -> None:
    """Let go of the flow to the client, which has had its last bytes: it refers back, a cycle."""
    connection.to_client.on_drain = None


MISMATCHED: Final = "mismatched connection IDs"

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
