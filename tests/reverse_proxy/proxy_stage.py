"""A proxy between a client and an origin that the test plays, byte for byte."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import h2.events
import pytest
import trio
import trio.testing

from clusterproxy.http2.adapter import Adapter
from clusterproxy.reverse_proxy.exchange import Answer, Forward, Request
from clusterproxy.reverse_proxy.limits import ServerLimits
from clusterproxy.reverse_proxy.observer import Observer
from clusterproxy.reverse_proxy.origin import Origin, Pool
from clusterproxy.reverse_proxy.relay import Relay
from clusterproxy.reverse_proxy.server import ProxyServer
from clusterproxy.transport.stream import Transport

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from clusterproxy.reverse_proxy.exchange import Decide

EventT = TypeVar("EventT", bound=h2.events.Event)

GET = b"GET /path?q HTTP/1.1\r\nHost: one.example\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


class Peer:
    """One end of a connection."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._read = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def until(self, marker: bytes = b"\r\n\r\n") -> bytes:
        """Return what comes up to *marker*, with it."""
        while marker not in self._read:
            data = await self.stream.receive_some(65_536)
            assert data, f"ended before {marker!r}: {self._read!r}"
            self._read += data
        end = self._read.index(marker) + len(marker)
        found, self._read = self._read[:end], self._read[end:]
        return found

    async def exactly(self, size: int) -> bytes:
        while len(self._read) < size:
            data = await self.stream.receive_some(65_536)
            assert data, f"ended after {len(self._read)} bytes"
            self._read += data
        found, self._read = self._read[:size], self._read[size:]
        return found

    async def rest(self) -> bytes:
        """Return what comes up to the end."""
        while data := await self.stream.receive_some(65_536):
            self._read += data
        found, self._read = self._read, b""
        return found

    async def eof(self) -> None:
        assert isinstance(self.stream, trio.abc.HalfCloseableStream)
        await self.stream.send_eof()

    async def aclose(self) -> None:
        await self.stream.aclose()

    async def reset(self) -> None:
        """End with an RST, or whatever the stream has of the kind."""
        await trio.aclose_forcefully(self.stream)


class Notes(Observer):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.open = 0
        self.results: list[tuple[str, int]] = []
        self.failures: list[str] = []

    def began(self) -> None:
        self.open += 1

    def ended(self, method: str, status: int) -> None:
        self.open -= 1
        self.results.append((method, status))

    def failed(self, origin: str) -> None:
        self.failures.append(origin)


class Stage:
    """The proxy, with what surrounds it.

    Attributes:
      requests: what the deciding program was asked.
      decide: what it says; by default all goes to the origin as it came.
      sockets: origins are sockets and not streams in memory.
      refusal: raised instead of the next connections to origins.
    """

    def __init__(self, nursery: trio.Nursery, limits: ServerLimits, pool: Pool) -> None:
        self._nursery = nursery
        self.pool = pool
        self.requests: list[Request] = []
        self.sockets = False
        self.refusal: Exception | None = None
        self.dials = 0
        self._ends: list[trio.abc.Stream] = []
        self._dialled_in, self._dialled = trio.open_memory_channel[trio.abc.Stream](100)
        self.origin = Origin(
            scheme="http",
            host="origin.example",
            port=80,
            pool=pool,
            label="the origin",
            connect=self._connect,
        )
        self.decide: Decide = self._forward
        self.notes = Notes()
        self.server = ProxyServer(
            Relay(decide=self._decide, observer=self.notes, fail=self._fail),
            None,
            limits,
            lambda _reason: None,
        )
        self.fail: Callable[[Request, Forward, Exception], Answer] = lambda _r, _f, error: Answer(
            502, f"failed because {error}"
        )

    async def _decide(self, request: Request) -> Answer | Forward:
        self.requests.append(request)
        return await self.decide(request)

    async def _forward(self, request: Request) -> Forward:
        return Forward(self.origin, request.target, request.headers)

    def _fail(self, request: Request, forward: Forward, error: Exception) -> Answer:
        return self.fail(request, forward, error)

    async def _connect(self) -> trio.abc.Stream:
        self.dials += 1
        if self.refusal is not None:
            raise self.refusal
        ours: trio.abc.Stream
        theirs: trio.abc.Stream
        if self.sockets:
            ours, theirs = socket_streams()
        else:
            ours, theirs = trio.testing.memory_stream_pair()
        self._ends.append(theirs)
        await self._dialled_in.send(theirs)
        return ours

    async def dialled(self) -> Peer:
        """Return the origin's end of the next connection to it."""
        return Peer(await self._dialled.receive())

    def client(self) -> Peer:
        """Return a client that speaks HTTP/1.1."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._nursery.start_soon(self.server.serve, theirs)
        return Peer(self._stream(ours))

    def _stream(self, sock: socket.socket) -> trio.SocketStream:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._ends.append(stream)
        return stream

    def close(self) -> None:
        """Close what the test has left open."""
        for end in self._ends:
            if isinstance(end, trio.SocketStream):
                end.socket.close()

    async def http2_client(self) -> Http2Peer:
        """Return a client that speaks HTTP/2."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._nursery.start_soon(self._serve_http2, Transport(theirs))
        peer = Http2Peer(self._stream(ours))
        await peer.start()
        return peer

    async def _serve_http2(self, transport: Transport) -> None:
        await self.server.serve_http2(transport, "192.0.2.1")

    async def asked(self, origin: Peer) -> bytes:
        """Return the head of the next request to the origin."""
        return await origin.until(b"\r\n\r\n")


def socket_streams() -> tuple[trio.SocketStream, trio.SocketStream]:
    a, b = socket.socketpair()
    first, second = (trio.SocketStream(trio.socket.from_stdlib_socket(s)) for s in (a, b))
    return first, second


@asynccontextmanager
async def staged(
    limits: ServerLimits | None = None, pool: Pool | None = None
) -> AsyncGenerator[Stage]:
    """Run a proxy for the block; what is under way ends with it."""
    async with trio.open_nursery() as nursery:
        stage = Stage(nursery, limits or ServerLimits(), pool or Pool())
        nursery.start_soon(stage.pool.run)
        nursery.start_soon(stage.server.hangups.run)
        nursery.start_soon(stage.server.expire)
        try:
            yield stage
        finally:
            stage.close()
        nursery.cancel_scope.cancel()


class Http2Peer:
    """A client of HTTP/2, on h2."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        # That of h2 ends with the first GOAWAY.
        self.h2 = Adapter(
            client=True,
            window=65_535,
            max_frame_size=16_384,
            max_streams=100,
            max_header_list=65_536,
        )
        self.events: list[h2.events.Event] = []
        self.grants = True

    async def start(self) -> None:
        self.h2.initiate_connection()
        await self.flush()

    async def flush(self) -> None:
        data = self.h2.data_to_send()
        if data:
            await self.stream.send_all(data)

    async def request(
        self,
        *fields: tuple[bytes, bytes],
        method: bytes = b"GET",
        path: bytes = b"/path?q",
        authority: bytes | None = b"one.example",
        end: bool = True,
    ) -> int:
        """Send a request's head; return the stream's number."""
        head = [(b":method", method), (b":scheme", b"https"), (b":path", path)]
        if authority is not None:
            head.append((b":authority", authority))
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, [*head, *fields], end_stream=end)
        await self.flush()
        return stream_id

    async def data(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        self.h2.send_data(stream_id, data, end_stream=end)
        await self.flush()

    async def receive(self) -> bool:
        """Take what comes next; return False at the end."""
        data = b""
        with suppress(trio.BrokenResourceError):
            data = bytes(await self.stream.receive_some(65_536))
        if not data:
            return False
        for event in self.h2.receive_data(data):
            self.events.append(event)
            if isinstance(event, h2.events.DataReceived) and self.grants:
                self.h2.acknowledge_received_data(
                    event.flow_controlled_length or 0, event.stream_id
                )
        # The proxy may have ended the connection meanwhile.
        with suppress(trio.BrokenResourceError):
            await self.flush()
        return True

    async def event(self, kind: type[EventT], stream_id: int | None = None) -> EventT:
        """Wait for an event; it is taken."""
        while True:
            for event in self.events:
                if isinstance(event, kind) and stream_id in (
                    None,
                    getattr(event, "stream_id", None),
                ):
                    self.events.remove(event)
                    return event
            assert await self.receive(), f"ended before {kind.__name__}: {self.events}"

    async def response(self, stream_id: int) -> tuple[int, dict[bytes, bytes]]:
        """Return status and fields of the final response."""
        event = await self.event(h2.events.ResponseReceived, stream_id)
        fields = dict(event.headers)
        return int(fields.pop(b":status")), fields

    async def body(self, stream_id: int) -> bytes:
        """Return the body up to its end."""
        content = b""
        while True:
            for event in list(self.events):
                found: Any = event
                if getattr(found, "stream_id", None) != stream_id:
                    continue
                if isinstance(event, h2.events.DataReceived):
                    self.events.remove(event)
                    content += event.data
                elif isinstance(event, h2.events.StreamEnded):
                    self.events.remove(event)
                    return content
                elif isinstance(event, h2.events.StreamReset):
                    pytest.fail(f"reset after {content!r}")
            assert await self.receive(), f"ended after {content!r}"


async def concurrently(*functions: Callable[[], Awaitable[object]]) -> None:
    async with trio.open_nursery() as nursery:
        for function in functions:
            nursery.start_soon(function)
