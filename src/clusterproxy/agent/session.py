"""The agent's end of one server's Connect stream."""

from __future__ import annotations

import logging
import re
import socket
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.errors import ClusterProxyError
from clusterproxy.grpc import PREFIX_SIZE, Metadata, Status
from clusterproxy.tunnel.extension import accepted
from clusterproxy_proto import (
    CloseDial,
    CloseRequest,
    CloseResponse,
    Credit,
    Data,
    DecodeError,
    DialRequest,
    DialResponse,
    Drain,
    HalfClose,
    Packet,
    PacketType,
    Payload,
    Reset,
    canonical_data,
    decode,
    encode,
    run_end,
)

from .datagrams import DatagramEndpoint
from .dial import EndpointDialError, dial
from .endpoint import Endpoint, StreamEndpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from clusterproxy.http2.flow import Buffer
    from clusterproxy.rpc.channel import ClientCall

    from .state import AgentState

_log = logging.getLogger("clusterproxy.agent")

# Answers to what the server sent without need are left out while so much waits for it.
_ADVISORY_LIMIT: Final = 64 * 1024

# A host name has at most 255 bytes; what is much longer only costs the shared stream.
_MAX_ADDRESS: Final = 1024

# strconv.Atoi, and what is left of it for a number of servers.
_COUNT: Final = re.compile(r"[+-]?[0-9]{1,9}")

_TYPES: Final = frozenset(int(kind) for kind in PacketType)
_UPSTREAM: Final = frozenset(kind for kind in _TYPES if kind < PacketType.CREDIT)


class HandshakeError(ClusterProxyError):
    """The server's response headers are not those of a proxy server."""


class Session:
    """One stream to one server (upstream: pkg/agent/client.go, Client).

    Attributes:
      server_id, server_count: as the server says, once :meth:`greet` returned.
      extended: whether the server knows credit, half-close and reset (docs/protocol-extensions.md).
      on_leave: called once when the server announces its end; what is open goes on.
    """

    def __init__(self, state: AgentState, call: ClientCall) -> None:
        self._state = state
        self.call = call
        self.on_leave: Callable[[], None] = lambda: None
        call.connection.on_goaway = lambda: self.on_leave()
        self.server_id = ""
        self.server_count = 0
        self.extended = False
        self.endpoints: dict[int, Endpoint] = {}
        self._dials: dict[int, trio.CancelScope] = {}
        self._last_id = 0
        self._rejected = False
        # Connections of which something is left to do, lingering ones included.
        self._busy = 0
        # What is sent here is asked for by the server's clients: it is not its fault if it is much.
        call.stream.shared = True
        call.stream.schedule.account = state.note_buffered
        call.receive = self._receive
        call.receive_run = self._receive_run

    async def greet(self) -> None:
        """Wait for the server's headers, which say who it is.

        Raises:
          RPCError: the server ended the stream.
          HandshakeError: the headers are missing or no use (upstream: serverID, serverCount).
        """
        metadata = await self.call.response()
        self.server_id = _one(metadata, "serverid", "server ID")
        count = _one(metadata, "servercount", "server count")
        if not _COUNT.fullmatch(count):
            raise HandshakeError(f"server count {count[:64]!r} is not a number")
        self.server_count = int(count)
        self.extended = accepted(metadata)
        # Before there is anything to send: how long a round trip takes is best measured now.
        self.call.connection.ping()

    async def run(self) -> None:
        """Serve until the stream ends. All its connections end with it.

        Cancellation: ends the stream and all its connections at once.
        """
        try:
            async with trio.open_nursery() as nursery:
                self.call.attach(nursery)
                await self.call.ended.wait()
                nursery.cancel_scope.cancel()
        finally:
            self.call.cancel()
        if self.call.status is not Status.OK:
            metrics = self._state.metrics
            metrics.server_connection_failure_count.labels("from_server").inc()
            code = self.call.status.go_name
            metrics.stream_errors_total.labels("to_agent", code, "Unknown").inc()

    def drain(self) -> None:
        """Tell the server to choose other agents for new dials."""
        self._send(Drain())

    @property
    def leaving(self) -> bool:
        """Whether the server has announced its end."""
        return self.call.connection.draining

    @property
    def busy(self) -> bool:
        """Whether there is a dial or a connection, or something of one is still on its way."""
        return self._busy > 0 or self.call.stream.waiting

    # -- packets -----------------------------------------------------------------------------------

    def _receive(self, size: int, head: memoryview, rest: tuple[memoryview, ...]) -> None:
        found = canonical_data(head, PREFIX_SIZE, size - PREFIX_SIZE)
        if found is not None:
            self._state.data_packets.from_server.value += 1
            self._on_data(found[0], size, (head[PREFIX_SIZE + found[1] :], *rest))
            return
        try:
            packet = decode(b"".join((head[PREFIX_SIZE:], *rest)))
        except DecodeError as error:
            # The stream is shared by all clients of the server, so it goes on.
            self._reject("undecodable", str(error))
            return
        self._receive_packet(size, packet)

    def _receive_run(self, size: int, view: memoryview) -> None:
        """Take messages of one size; those of one connection go to its service together."""
        start, end = 0, len(view)
        while start < end and not self.call.closed:
            found = canonical_data(view, start + PREFIX_SIZE, size - PREFIX_SIZE)
            if found is None:
                self._receive(size, view[start : start + size], ())
                start += size
                continue
            offset = PREFIX_SIZE + found[1]
            stop = run_end(view, start, size, offset)
            count = (stop - start) // size
            self._state.data_packets.from_server.value += count
            payloads = [view[at + offset : at + size] for at in range(start, stop, size)]
            endpoint = self.endpoints.get(found[0])
            if endpoint is None:
                for payload in payloads:
                    self._on_data(found[0], size, (payload,))
            elif endpoint.receive(size, count):
                endpoint.run_from_server(payloads)
                endpoint.grant()
            else:
                self._on_overdraft(found[0], endpoint)
            start = stop

    def _receive_packet(self, size: int, packet: Packet) -> None:
        known = packet.type in _TYPES
        self._state.count_packet("to_agent", PacketType(packet.type).name if known else "Unknown")
        if not packet.consistent:
            if packet.type in _UPSTREAM:
                self._reject("no_payload", f"packet of type {packet.type} without its payload")
            return
        match packet.payload:
            case DialRequest():
                self._on_dial_request(packet.payload)
            case Data():
                if packet.payload.connect_id:
                    self._on_data(packet.payload.connect_id, size, (packet.payload.data,))
            case CloseRequest():
                self._on_close_request(packet.payload.connect_id)
            case Credit() if self.extended:
                endpoint = self.endpoints.get(packet.payload.connect_id)
                if endpoint is not None:
                    endpoint.credit(packet.payload.size)
            case HalfClose() if self.extended:
                endpoint = self.endpoints.get(packet.payload.connect_id)
                if endpoint is not None:
                    endpoint.half_close()
            case Reset() if self.extended:
                endpoint = self.endpoints.get(packet.payload.connect_id)
                if endpoint is not None:
                    self._break(packet.payload.connect_id, endpoint)
            case CloseDial():
                scope = self._dials.get(packet.payload.random)
                if scope is not None:
                    scope.cancel()
            case _:
                pass  # what only agents send

    def _reject(self, reason: str, text: str) -> None:
        self._state.metrics.rejected_packets_total.labels("to_agent", reason).inc()
        # One line for each stream: the metric counts the rest.
        level = logging.DEBUG if self._rejected else logging.WARNING
        self._rejected = True
        _log.log(level, "packet of a server ignored: %s", text, extra={"server_id": self.server_id})

    def _send(self, payload: Payload) -> None:
        packet = Packet.of(payload)
        self._state.count_packet("from_agent", PacketType(packet.type).name)
        self.call.send(encode(packet))

    def _advise(self, payload: Payload) -> None:
        if self.call.stream.schedule.urgent_size < _ADVISORY_LIMIT:
            self._send(payload)

    def _on_data(self, connect_id: int, size: int, parts: tuple[Buffer, ...]) -> None:
        endpoint = self.endpoints.get(connect_id)
        if endpoint is None:
            self._advise(CloseResponse("unrecognized connectID", connect_id))
        elif endpoint.receive(size):
            endpoint.from_server(parts)
            endpoint.grant()
        else:
            self._on_overdraft(connect_id, endpoint)

    def _on_overdraft(self, connect_id: int, endpoint: Endpoint) -> None:
        self._reject("overdraft", "more DATA than was granted")
        self._send(Reset(connect_id, "more DATA than was granted"))
        self._break(connect_id, endpoint)

    def _break(self, connect_id: int, endpoint: Endpoint) -> None:
        """End a connection without a word to the server."""
        self._forget(connect_id)
        endpoint.abort()

    def _on_close_request(self, connect_id: int) -> None:
        endpoint = self.endpoints.get(connect_id)
        if endpoint is None:
            self._advise(CloseResponse("Unknown connectID", connect_id))
            return
        # At once: the server forgets the number, what is queued for the service still goes out.
        self._ended(connect_id, endpoint)
        endpoint.close()

    def _on_dial_request(self, request: DialRequest) -> None:
        # A number is used up by a dial that fails, too.
        self._last_id += 1
        self._state.last_use = trio.current_time()
        if len(request.address) > _MAX_ADDRESS or len(request.protocol) > _MAX_ADDRESS:
            self._reject("long_address", "dial of an address that is too long")
            error = f"dial {request.protocol[:32]}: address too long"
            self._send(DialResponse(error=error, random=request.random))
            return
        # Known from now on: the dial may be withdrawn before its task runs for the first time.
        scope = self._dials[request.random] = trio.CancelScope()
        self.call.start_soon(self._connect, request, self._last_id, scope)

    # -- connections -------------------------------------------------------------------------------

    async def _connect(
        self, request: DialRequest, connect_id: int, scope: trio.CancelScope
    ) -> None:
        self._busy += 1
        try:
            await self._serve(request, connect_id, scope)
        except* Exception:
            # A bug ends this connection and nothing else.
            _log.exception("bug in a connection", extra={"connection_id": connect_id})
        finally:
            self._busy -= 1
            self._state.last_use = trio.current_time()

    async def _serve(self, request: DialRequest, connect_id: int, scope: trio.CancelScope) -> None:
        sock = await self._dial(request, scope)
        if sock is None:
            return
        datagrams = sock.type == socket.SOCK_DGRAM
        kind = DatagramEndpoint if datagrams else StreamEndpoint
        endpoint = kind(self._state, self.call, connect_id, sock, extended=self.extended)
        self.endpoints[connect_id] = endpoint
        metrics = self._state.metrics
        metrics.open_endpoint_connections.inc()
        _log.debug(
            "connection to %.256s opened",
            request.address,
            extra={
                "agent_id": self._state.config.agent_id,
                "connection_id": connect_id,
                "dial_id": request.random,
            },
        )
        try:
            self._send(DialResponse(connect_id=connect_id, random=request.random))
            await endpoint.run(partial(self._ended, connect_id, endpoint))
        finally:
            self._ended(connect_id, endpoint)

    def _ended(self, connect_id: int, endpoint: Endpoint) -> None:
        """A connection is over: tell the server, behind its data. Idempotent."""
        if self.endpoints.get(connect_id) is endpoint:
            self._forget(connect_id)
            endpoint.confirm_close()

    def _forget(self, connect_id: int) -> None:
        self.endpoints.pop(connect_id).give_back()
        _log.debug(
            "connection closed",
            extra={"agent_id": self._state.config.agent_id, "connection_id": connect_id},
        )
        self._state.metrics.open_endpoint_connections.dec()
        self._state.last_use = trio.current_time()

    async def _dial(self, request: DialRequest, scope: trio.CancelScope) -> socket.socket | None:
        started = trio.current_time()
        metrics = self._state.metrics
        with scope:
            try:
                sock = await dial(
                    request.protocol,
                    request.address,
                    timeout_s=self._state.config.dial_timeout_s,
                    resolver=self._state.resolver,
                )
            except EndpointDialError as error:
                metrics.endpoint_dial_failure_total.labels(error.reason).inc()
                _log.warning(
                    "dial failed: %s",
                    error.text,
                    extra={
                        "agent_id": self._state.config.agent_id,
                        "dial_id": request.random,
                    },
                )
                self._send(DialResponse(error=error.text, random=request.random))
                return None
            finally:
                if self._dials.get(request.random) is scope:
                    del self._dials[request.random]
            metrics.dial_duration_seconds.observe(trio.current_time() - started)
            return sock
        return None


def _one(metadata: Metadata, name: str, title: str) -> str:
    values = metadata.get(name, [])
    if len(values) != 1:
        if title == "server count":
            raise HandshakeError(f"expected one server count, got {len(values)}")
        listed = " ".join(map(str, values))
        raise HandshakeError(f"expected one {title} in the context, got [{listed}]")
    return str(values[0])
