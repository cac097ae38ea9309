"""HTTP CONNECT: the other way for clients to reach an agent's services."""

from __future__ import annotations

import logging
import re
import secrets
from typing import TYPE_CHECKING, Final, Never

import h11
import trio

from clusterproxy.transport.outbox import current_outbox
from clusterproxy.transport.sink import ByteSink
from clusterproxy_proto import DialRequest

from .connect_request import body_to_skip, target_of
from .connection import (
    DIAL_TIMED_OUT,
    MAX_ADDRESS,
    NO_AGENT,
    SATURATED,
    Client,
    Connection,
    PendingDial,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clusterproxy.http2.flow import Buffer
    from clusterproxy.transport.stream import Transport

    from .backend import Backend
    from .state import ServerState

_log = logging.getLogger("clusterproxy.server")

# How long a client may take to read the end and to close.
_PART_S: Final = 1.0

# How often the kernel is asked whether a client has received what it was sent.
_LOOK_S: Final = 0.01

# How often the kernel is asked whether a client is still there that is not read.
_GONE_S: Final = 5.0

# How long a service may take nothing of what a client has left that has closed its Unix socket. Of one that has closed a
# TCP socket the kernel tells after a minute or two that it is gone.
_PARTED_S: Final = 120.0

# The same, for one that waits for its dial: ours resets the connection when it gives up.
_DIAL_LOOK_S: Final = 0.5

# Upstream's ReadHeaderTimeout.
_HEADER_TIMEOUT_S: Final = 60.0

# A whole gRPC message of at most 32 KiB, which is a tier of grpc-go's buffer pool.
_CHUNK: Final = 32_740

# As long as the Go client waits for a CLOSE_RSP.
_CLOSE_TIMEOUT_S: Final = 10.0

_ESTABLISHED: Final = b"HTTP/1.1 200 Connection Established\r\n\r\n"
_PLAIN: Final = "text/plain; charset=utf-8"
_HOST: Final = re.compile(rb"\r?\nhost[ \t]*:", re.IGNORECASE)
_HEAD_END: Final = re.compile(rb"\r?\n\r?\n")


class _Refused(Exception):
    """The request is answered, and the connection is not kept."""


class ConnectTunnel(Client):
    """One client's socket in HTTP CONNECT mode (upstream: pkg/server/tunnel.go, ServeHTTP)."""

    def __init__(self, state: ServerState, transport: Transport) -> None:
        self._state = state
        self._transport = transport
        self._outbox = current_outbox()
        self._nursery: trio.Nursery | None = None
        self._dialed = trio.Event()
        self._error = b""
        self._connection: ConnectConnection | None = None
        self._over = trio.Event()
        self._broken_by_agent = False
        self._reading: trio.CancelScope | None = None
        # Since when no request has begun, if none has.
        self._idle_since: float | None = None
        self.sink = ByteSink(transport, self.spawn, self._broken)

    async def run(self) -> None:
        """Serve the client until its connection ends. Cancellation: closes it at once."""
        metrics = self._state.metrics
        metrics.http_connections.inc()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await self._serve()
                nursery.cancel_scope.cancel()
        except* (_Refused, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            self._nursery = None
            self.sink.discard()
            if self._connection is not None:
                self._connection.break_off("the client has gone")
                self._connection.note_queue()
            self._transport.close()
            # Cycles of references would keep all of it until the garbage collector comes by.
            self.sink.dispose()
            self._connection = None
            metrics.http_connections.dec()

    async def _serve(self) -> None:
        address, early = await self._read_request()
        if len(address) > MAX_ADDRESS:
            await self._answer(_bare(400, "Bad Request"))
        backend = await self._choose(address)
        if backend is None:
            self._state.count_dial_failure("no_agent")
            _log.warning("dial of %.256s failed: no agent", address)
            text = f"currently no tunnels available: {NO_AGENT}"
            await self._answer(_response(500, "text/plain", text))
        if backend.saturated:
            self._state.count_dial_failure("backend_close")
            text = f"Failed to tunnel dial request: {SATURATED}\r\n"
            await self._answer(_response(502, _PLAIN, text))
        request = DialRequest("tcp", address, secrets.randbits(63))
        dial = PendingDial(self._state, self, backend, request)
        try:
            await self._await_dial()
        finally:
            dial.withdraw()
        if self._connection is None:
            await self._answer(self._error)
        await self._copy(self._connection, early)

    # -- the request -------------------------------------------------------------------------------

    async def _read_request(self) -> tuple[str, bytes]:
        """Return the target of the first CONNECT, and what came behind it."""
        head = received = b""
        body: int | None = 0
        while True:
            with trio.move_on_after(_HEADER_TIMEOUT_S) as timeout:
                received = await self._skip(received, body or 0)
                head, received = await self._read_head(received)
            if timeout.cancelled_caught:
                raise _Refused
            request = await self._parse(head)
            if request.method == b"CONNECT":
                address = target_of(request)
                if not address:
                    await self._answer(_bare(400, "Bad Request"))
                return address, received
            body = body_to_skip(request)
            await self._answer_method(head=request.method == b"HEAD", keep=body is not None)

    def part_from_idle(self, patience_s: float) -> None:
        """End the connection if for so long its client has begun no request."""
        if self._idle_since is not None and trio.current_time() - self._idle_since >= patience_s:
            self._transport.close()

    async def _skip(self, received: bytes, size: int) -> bytes:
        """Skip a request's body; return what came behind it."""
        while len(received) < size:
            view = await self._transport.receive()
            if not view:
                raise _Refused
            received += view
        return received[size:]

    async def _read_head(self, received: bytes) -> tuple[bytes, bytes]:
        searched = 0
        while True:
            end = _HEAD_END.search(received, searched)
            if end is not None:
                return received[: end.end()], received[end.end() :]
            if len(received) > self._state.config.max_header_list_bytes:
                await self._answer(_bare(431, "Request Header Fields Too Large"))
            # An end may have begun in the last three bytes.
            searched = max(0, len(received) - 3)
            if not received:
                self._idle_since = trio.current_time()
            view = await self._transport.receive()
            self._idle_since = None
            if not view:
                if received:
                    await self._answer(_bare(400, "Bad Request"))
                raise _Refused
            received += view

    async def _parse(self, head: bytes) -> h11.Request:
        if head.startswith(b"CONNECT ") and not _HOST.search(head):
            # Go asks every HTTP/1.1 request for a Host header except CONNECT; h11 asks this one too.
            line_end = head.index(b"\n") + 1
            head = head[:line_end] + b"Host: -\r\n" + head[line_end:]
        parser = h11.Connection(h11.SERVER, max_incomplete_event_size=len(head))
        try:
            parser.receive_data(head)
            event = parser.next_event()
        except h11.RemoteProtocolError:
            event = None
        if not isinstance(event, h11.Request):
            await self._answer(_bare(400, "Bad Request"))
        return event

    async def _answer_method(self, *, head: bool, keep: bool) -> None:
        body = b"this proxy only supports CONNECT passthrough\n"
        lines = [
            b"HTTP/1.1 405 Method Not Allowed",
            b"Content-Type: text/plain; charset=utf-8",
            b"X-Content-Type-Options: nosniff",
            b"Content-Length: %d" % len(body),
        ]
        if not keep:
            lines.append(b"Connection: close")
        # An answer to HEAD tells the size of a content that it does not have (RFC 9110 §9.3.2).
        data = b"\r\n".join((*lines, b"", b"" if head else body))
        if not keep:
            await self._answer(data)
        await self._write(data)

    async def _write(self, data: bytes) -> None:
        if not self._transport.send((data,)):
            await self._transport.drain()

    async def _answer(self, data: bytes) -> Never:
        """Send an answer, and end the connection."""
        with trio.move_on_after(_PART_S):
            await self._write(data)
            await self._part()
        raise _Refused

    async def _part(self) -> None:
        """End our side and wait for the client's end.

        Closing a socket that has unread bytes resets it, and what was sent may be lost with it.
        """
        self._transport.send_eof()
        while await self._transport.receive():
            await trio.lowlevel.checkpoint()

    # -- the dial ----------------------------------------------------------------------------------

    async def _choose(self, address: str) -> Backend | None:
        backend = self._state.pool.choose(address)
        if backend is None and self._state.arrivals.open:
            waiting = trio.CancelScope()
            self.spawn(self._watch_client, waiting)
            backend = await self._state.arrivals.choose(address)
            waiting.cancel()
        return backend

    async def _watch_client(self, waiting: trio.CancelScope) -> None:
        with waiting:
            while True:
                await trio.sleep(_DIAL_LOOK_S)
                self.check_client()

    async def _await_dial(self) -> None:
        while not self._dialed.is_set():
            with trio.move_on_after(_DIAL_LOOK_S):
                await self._dialed.wait()
                return
            self.check_client()

    def dialed(self, dial: PendingDial, connect_id: int) -> Connection:
        self._connection = ConnectConnection(self._state, dial, connect_id, self)
        # Here and not in our task: nothing can get in front of it.
        self.sink.send((_ESTABLISHED,))
        self._dialed.set()
        return self._connection

    def _fail(self, status: int, body: str) -> None:
        self._error = _response(status, _PLAIN, body)
        self._dialed.set()

    def refused(self, dial: PendingDial, error: str) -> None:
        self._error = _response(_status_of(error), _PLAIN, error, close=True)
        self._dialed.set()

    def withdrawn(self, dial: PendingDial) -> None:
        self._fail(502, "Backend context error: context canceled\r\n")

    def timed_out(self, dial: PendingDial, *, unsent: bool) -> None:
        what = "Failed to tunnel dial request" if unsent else "Backend dial timeout"
        self._fail(504, f"{what}: {DIAL_TIMED_OUT}\r\n")

    def backend_gone(self, dial: PendingDial) -> None:
        self._fail(502, "Backend context error: context canceled\r\n")

    def spawn(self, function: Callable[..., Awaitable[None]], /, *args: object) -> None:
        if self._nursery is not None:
            self._nursery.start_soon(function, *args)

    # -- bytes -------------------------------------------------------------------------------------

    async def _copy(self, connection: ConnectConnection, early: bytes) -> None:
        """Copy from the client until it or the agent ends, then let the rest go out."""
        with trio.CancelScope() as self._reading:
            if self._over.is_set():
                self._reading.cancel()
            await self._copy_to_agent(connection, early)
        await self._await_agent(connection)
        sent = trio.Event()
        self.sink.finish(sent.set)
        await sent.wait()
        if self._broken_by_agent:
            await self._break()
            return
        with trio.move_on_after(_PART_S):
            await self._part()

    async def _await_agent(self, connection: ConnectConnection) -> None:
        """The client has ended its side: it still gets what the service sends."""
        if self._over.is_set():
            return
        connection.end_client()
        limit = float("inf")
        if not connection.backend.extended:
            limit = self._state.config.half_close_linger_s + _CLOSE_TIMEOUT_S
        with trio.move_on_after(limit):
            while not self._over.is_set() and not self._transport.hung_up:
                with trio.move_on_after(_GONE_S):
                    await self._over.wait()
                self.check_client()
        connection.request_close()

    async def _break(self) -> None:
        """Reset the client, but not what it has not received yet."""
        with trio.move_on_after(_PART_S):
            while self._transport.outstanding():  # noqa: ASYNC110  the kernel does not tell
                await trio.sleep(_LOOK_S)
        self._transport.close(reset=True)

    async def _copy_to_agent(self, connection: ConnectConnection, early: bytes) -> None:
        view = memoryview(early)
        while True:
            if view:
                with self._outbox:
                    for start in range(0, len(view), _CHUNK):
                        connection.send_to_agent(view[start : start + _CHUNK])
                await connection.room()
            view = await self._transport.receive()
            if not view:
                return

    def check_client(self) -> None:
        """Look whether the client is still there; nobody reads its socket now.

        Raises:
          trio.BrokenResourceError: it is not.
        """
        if self._transport.gone:
            raise trio.BrokenResourceError("the client has gone")

    @property
    def parted(self) -> bool:
        """Whether it is known that the client has said all, and can be told nothing more."""
        return self._transport.both_ended

    def agent_ended(self) -> None:
        """The service sends no more: neither do we, once all is with the client."""
        self.sink.finish(self._transport.send_eof)

    def agent_broke(self) -> None:
        """The connection broke behind us."""
        self._broken_by_agent = True
        self.over()

    def over(self) -> None:
        """The agent has closed the connection."""
        self._over.set()
        if self._reading is not None:
            self._reading.cancel()

    def abort(self) -> None:
        """Give the client up."""
        self._transport.close(reset=True)
        self.over()

    def _broken(self, _reason: str) -> None:
        self.over()


class ConnectConnection(Connection):
    """A proxied connection of an HTTP CONNECT client."""

    __slots__ = ("_room", "_tunnel")

    def __init__(
        self, state: ServerState, dial: PendingDial, connect_id: int, tunnel: ConnectTunnel
    ) -> None:
        super().__init__(state, dial, connect_id, tunnel.sink)
        self._tunnel = tunnel
        self._room = trio.Event()
        tunnel.sink.on_drain = self.note_queue

    async def room(self) -> None:
        """Wait while anything of the client waits for the agent: its socket can hold the rest.

        Raises:
          trio.BrokenResourceError: the client has gone meanwhile. If it has closed in order, what it sent is delivered
            for as long as the service takes some of it.
        """
        taken, since = self.to_agent.taken, trio.current_time()
        while self.to_agent.queued:
            self._room = trio.Event()
            with trio.move_on_after(_GONE_S) as look:
                await self._room.wait()
            if look.cancelled_caught:
                self._tunnel.check_client()
                if taken != self.to_agent.taken or not self._tunnel.parted:
                    taken, since = self.to_agent.taken, trio.current_time()
                elif trio.current_time() - since >= _PARTED_S:
                    raise trio.BrokenResourceError("the client has gone")

    def _release(self, size: int) -> None:
        if not self.to_agent.queued:
            self._room.set()

    def from_agent(self, size: int, head: Buffer, rest: tuple[Buffer, ...], payload: int) -> None:
        self._state.data_packets.to_client.value += 1
        sink = self._tunnel.sink
        sink.send((memoryview(head)[payload:], *rest))
        if sink.queued:
            self.note_queue()

    def run_from_agent(self, size: int, view: memoryview, payload: int) -> None:
        self._state.data_packets.to_client.value += len(view) // size
        sink = self._tunnel.sink
        sink.send([view[at + payload : at + size] for at in range(0, len(view), size)])
        if sink.queued:
            self.note_queue()

    def ended_by_agent(self) -> None:
        self._tunnel.agent_ended()

    def broken_by_agent(self, reason: str) -> None:
        self._tunnel.agent_broke()

    def closed_by_agent(self, error: str) -> None:
        self.closing = True  # the agent need not be asked to close what it has closed
        self._tunnel.over()

    def give_up(self) -> None:
        self._tunnel.abort()

    def _spawn(self, function: Callable[..., Awaitable[None]], /, *args: object) -> None:
        self._tunnel.spawn(function, *args)


def _status_of(error: str) -> int:
    """Map an agent's error to a status (upstream: mapDialErrorToHTTPStatus)."""
    text = error.lower()
    if "timeout" in text or "deadline exceeded" in text:
        return 504
    return 503 if "too many open files" in text else 502


_REASONS: Final = {
    500: "Internal Server Error",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
}


def _response(status: int, content_type: str, body: str, *, close: bool = False) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}"]
    if close:
        lines.append("Connection: close")
    lines += [f"Content-Type: {content_type}", "", body]
    return "\r\n".join(lines).encode()


def _bare(status: int, reason: str) -> bytes:
    """An answer as Go's net/http gives it to what is no request."""
    line = f"{status} {reason}"
    return f"HTTP/1.1 {line}\r\nContent-Type: {_PLAIN}\r\nConnection: close\r\n\r\n{line}".encode()
