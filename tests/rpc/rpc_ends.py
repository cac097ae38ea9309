"""Two ends of a connection in one process: ours against ours, and ours against plain h2."""

from __future__ import annotations

import contextlib
import socket
from typing import TYPE_CHECKING, Any, Final

import attrs
import h2.events
import trio
import trio.testing
from h2.config import H2Configuration
from h2.connection import H2Connection

from clusterproxy.grpc import PREFIX_SIZE, Metadata
from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.flow import Flow
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.rpc.channel import ClientCall, start_call
from clusterproxy.rpc.server import Opener, RpcServer, ServerCall
from clusterproxy.transport.stream import Transport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

PATH: Final = "/test.Service/Echo"
LIMITS: Final = Http2Limits(max_streams=100)

REQUEST: Final = (
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", PATH.encode()),
    (b":authority", b"test"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
)
RESPONSE: Final = ((b":status", b"200"), (b"content-type", b"application/grpc"))

Headers = tuple[tuple[bytes, bytes], ...]


def headers_with(headers: Headers, **changed: bytes | None) -> list[tuple[bytes, bytes]]:
    """Return *headers* with some changed, added, or (None) left out; ``_`` stands for a dash."""
    changes = {name.replace("_", "-").encode(): value for name, value in changed.items()}
    for pseudo in (b"method", b"path", b"status"):
        if pseudo in changes:
            changes[b":" + pseudo] = changes.pop(pseudo)
    merged = dict(headers) | changes
    return [(name, value) for name, value in merged.items() if value is not None]


def open_echo(call: ServerCall) -> Callable[[], Awaitable[None]]:
    """Send every message back; end with OK when the client half-closes."""
    ended, flow = trio.Event(), Flow()
    call.on_half_close = ended.set
    call.receive = lambda size, head, rest: call.forward(flow, size, head, rest)
    return ended.wait


class Inbox:
    """Collects what a client call receives."""

    def __init__(self, call: ClientCall) -> None:
        self.messages: list[bytes] = []
        self._arrived = trio.Event()
        call.receive = self._receive

    def _receive(self, size: int, head: memoryview, rest: tuple[memoryview, ...]) -> None:
        message = b"".join((head, *rest))
        assert len(message) == size
        self.messages.append(message[PREFIX_SIZE:])
        self._arrived.set()
        self._arrived = trio.Event()

    async def wait(self, count: int) -> list[bytes]:
        while len(self.messages) < count:
            await self._arrived.wait()
        return self.messages


@attrs.define
class Ends:
    """Our client connected to our server."""

    server: RpcServer
    connection: Http2Connection
    nursery: trio.Nursery

    def call(
        self, path: str = PATH, metadata: Metadata | None = None, timeout_s: float | None = None
    ) -> ClientCall:
        return start_call(
            self.connection,
            path,
            authority="test",
            secure=False,
            metadata=metadata or {},
            user_agent="test/1",
            timeout_s=timeout_s,
        )

    async def check_bystander(self) -> None:
        """Make sure that other calls go on."""
        call = self.call()
        inbox = Inbox(call)
        call.send(b"still there")
        assert await inbox.wait(1) == [b"still there"]
        call.half_close()
        await call.ended.wait()
        assert (call.status, call.message) == (0, "")


def transports() -> tuple[Transport, Transport]:
    left, right = socket.socketpair()
    left.setblocking(False)
    right.setblocking(False)
    return Transport(left), Transport(right)


@contextlib.asynccontextmanager
async def connected(
    methods: Mapping[str, Opener] | None = None, *, limits: Http2Limits = LIMITS
) -> AsyncIterator[Ends]:
    """Connect our client to our server, which has an echo at PATH beside other *methods*."""
    ours, theirs = transports()
    server = RpcServer({PATH: open_echo, **(methods or {})}, limits=limits)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, theirs)
        client = Http2Connection(ours, client=True, limits=LIMITS)
        nursery.start_soon(client.run)
        await trio.testing.wait_all_tasks_blocked()
        yield Ends(server, client, nursery)
        nursery.cancel_scope.cancel()


@attrs.define
class Answer:
    """What a raw client got on one stream."""

    headers: list[dict[bytes, bytes]] = attrs.field(factory=list)
    data: bytes = b""
    ended: bool = False
    reset: int | None = None

    @property
    def last(self) -> dict[bytes, bytes]:
        return self.headers[-1]


class RawPeer:
    """Plain h2 on a socket, as client or server, without any rule of gRPC."""

    def __init__(self, transport: Transport, *, client: bool) -> None:
        self._transport = transport
        self.h2 = H2Connection(
            H2Configuration(
                client_side=client,
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.events: list[Any] = []
        self.h2.initiate_connection()
        self.flush()

    def flush(self) -> None:
        data = self.h2.data_to_send()
        # Whether the other end still listens is its business.
        with contextlib.suppress(trio.BrokenResourceError):
            assert not data or self._transport.send([data])

    def close(self) -> None:
        self._transport.close()

    async def pump(self) -> bool:
        """Take one batch; return False at the end of the connection."""
        view = await self._transport.receive()
        if not view:
            return False
        for event in self.h2.receive_data(bytes(view)):
            self.events.append(event)
            if isinstance(event, h2.events.DataReceived) and event.flow_controlled_length:
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
        self.flush()
        return True

    async def wait_for(self, kind: type[Any]) -> Any:
        while True:
            for event in self.events:
                if isinstance(event, kind):
                    self.events.remove(event)
                    return event
            assert await self.pump(), f"connection ended before {kind.__name__}"

    def request(self, headers: list[tuple[bytes, bytes]], data: bytes = b"", *, end: bool) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, headers, end_stream=end and not data)
        if data:
            self.send_data(stream_id, data, end=end)
        self.flush()
        return stream_id

    def send_data(self, stream_id: int, data: bytes, *, end: bool = False) -> None:
        """Send DATA; the windows must allow it."""
        step = self.h2.max_outbound_frame_size
        for start in range(0, len(data), step):
            self.h2.send_data(stream_id, data[start : start + step])
        if end:
            self.h2.end_stream(stream_id)
        self.flush()

    async def answer(self, stream_id: int) -> Answer:
        """Collect everything on one stream until it ends."""
        answer = Answer()
        while True:
            for event in [e for e in self.events if getattr(e, "stream_id", None) == stream_id]:
                self.events.remove(event)
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    answer.headers.append(dict(event.headers))
                elif isinstance(event, h2.events.DataReceived):
                    answer.data += event.data
                elif isinstance(event, h2.events.StreamEnded):
                    answer.ended = True
                elif isinstance(event, h2.events.StreamReset):
                    answer.reset = event.error_code
            if answer.ended or answer.reset is not None:
                return answer
            assert await self.pump(), f"connection ended: {answer}"


@contextlib.asynccontextmanager
async def raw_client(
    methods: Mapping[str, Opener] | None = None, *, limits: Http2Limits = LIMITS
) -> AsyncIterator[tuple[RawPeer, RpcServer]]:
    """Connect plain h2 to our server."""
    ours, theirs = transports()
    server = RpcServer({PATH: open_echo, **(methods or {})}, limits=limits)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve, theirs)
        with contextlib.closing(ours):
            yield RawPeer(ours, client=True), server
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def raw_server() -> AsyncIterator[tuple[RawPeer, Ends]]:
    """Connect our client to plain h2."""
    ours, theirs = transports()
    async with trio.open_nursery() as nursery:
        client = Http2Connection(ours, client=True, limits=LIMITS)
        nursery.start_soon(client.run)
        await trio.testing.wait_all_tasks_blocked()
        with contextlib.closing(theirs):
            yield RawPeer(theirs, client=False), Ends(RpcServer({}, limits=LIMITS), client, nursery)
        nursery.cancel_scope.cancel()
