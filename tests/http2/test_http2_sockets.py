"""Connections on real sockets: against plain h2, against raw frames, and against each other."""

from __future__ import annotations

import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest
import trio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    SettingsAcknowledged,
    StreamEnded,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import StreamClosedError
from h2.settings import SettingCodes
from h2_peers import (
    PING,
    PREFACE,
    REQUEST,
    RESPONSE,
    TRAILERS,
    Handler,
    data_of,
    goaways,
    parse_frames,
    raw,
    settings,
    types,
    until,
)
from hyperframe.frame import PingFrame

from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.flow import Flow
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.transport.stream import Transport

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from clusterproxy.http2.stream import Header, Stream, StreamHandler


class Echo(Handler):
    """Answers each piece with itself, and the end with trailers."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream
        self.flow = Flow(self._drained)
        self.connection = stream.connection
        self.connection.send_headers(stream, RESPONSE)

    def _drained(self, size: int) -> None:
        assert self.stream is not None
        self.stream.release(size)

    def on_data(self, view: memoryview) -> bool:
        stream = self.stream
        assert stream is not None
        before = self.flow.queued
        stream.send(self.flow, len(view), view)
        stream.hold(self.flow.queued - before)
        return False

    def on_end(self) -> None:
        stream = self.stream
        assert stream is not None
        stream.when_sent(lambda: self.connection.send_headers(stream, TRAILERS, end=True))


def echo(stream: Stream, _headers: list[Header]) -> StreamHandler:
    return Echo(stream)


def ignore(_stream: Stream, _headers: list[Header]) -> StreamHandler:
    return Handler()


def socket_pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    return ours, theirs


@asynccontextmanager
async def serving(
    on_request: Callable[[Stream, list[Header]], StreamHandler] = echo,
    *,
    limits: Http2Limits | None = None,
) -> AsyncIterator[tuple[Http2Connection, trio.SocketStream]]:
    """Serve one end of a pair of sockets; yield the connection and the other end."""
    sock, other = socket_pair()
    connection = Http2Connection(
        Transport(sock), client=False, limits=limits or Http2Limits(), on_request=on_request
    )
    peer = trio.SocketStream(trio.socket.from_stdlib_socket(other))
    with trio.fail_after(20):
        async with peer, trio.open_nursery() as nursery:
            nursery.start_soon(connection.run)
            yield connection, peer
            nursery.cancel_scope.cancel()
    assert connection.lost
    assert not connection.streams


class H2Client:
    """A client that is plain h2."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.h2 = H2Connection(H2Configuration(header_encoding=None))
        self.h2.initiate_connection()
        self.received: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.headers: dict[int, list[object]] = {}
        self.events: list[Event] = []
        self._unacknowledged = 1

    async def change_window(self, window: int) -> None:
        # h2 takes every ACK for its latest change, so one after the other.
        while self._unacknowledged:
            assert await self.pump()
        self.h2.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: window})
        self._unacknowledged = 1
        await self.flush()

    async def flush(self) -> None:
        await self.stream.send_all(self.h2.data_to_send())

    async def open(self) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, REQUEST)
        self.received[stream_id] = bytearray()
        self.headers[stream_id] = []
        await self.flush()
        return stream_id

    async def pump(self) -> bool:
        """Receive once; return False at the end."""
        data = await self.stream.receive_some(65_536)
        for event in self.h2.receive_data(data):
            self.events.append(event)
            match event:
                case ResponseReceived() | TrailersReceived():
                    self.headers[event.stream_id].append(event.headers)
                case DataReceived():
                    self.received[event.stream_id] += event.data or b""
                    # Not acknowledge_received_data(): that forgets a window that became negative.
                    if event.flow_controlled_length:
                        self.h2.increment_flow_control_window(event.flow_controlled_length)
                        with suppress(StreamClosedError):
                            self.h2.increment_flow_control_window(
                                event.flow_controlled_length, event.stream_id
                            )
                case StreamEnded():
                    self.ended.add(event.stream_id)
                case SettingsAcknowledged():
                    self._unacknowledged -= 1
                case _:
                    pass
        await self.flush()
        return bool(data)

    async def send(self, stream_id: int, body: bytes, *, end: bool = True) -> None:
        """Send *body* within the windows, receiving meanwhile."""
        while body:
            room = min(
                self.h2.local_flow_control_window(stream_id), self.h2.max_outbound_frame_size
            )
            if room <= 0:
                assert await self.pump()
                continue
            self.h2.send_data(stream_id, body[:room])
            body = body[room:]
            await self.flush()
        if end:
            self.h2.end_stream(stream_id)
            await self.flush()


def pattern(size: int, seed: int = 1) -> bytes:
    return bytes((n * seed + n // 251) % 256 for n in range(4096)) * (size // 4096 + 1)


async def test_echo_to_a_plain_h2_client() -> None:
    async with serving() as (connection, peer):
        client = H2Client(peer)
        stream_id = await client.open()
        body = pattern(1_500_000)[:1_500_000]
        await client.send(stream_id, body)
        while stream_id not in client.ended:
            assert await client.pump()
        assert client.received[stream_id] == body
        assert client.headers[stream_id] == [RESPONSE, TRAILERS]
        assert connection.lost is None
        assert not connection.streams


@pytest.mark.parametrize("window", [1, 100, 20_000])
async def test_echo_to_a_client_with_a_small_window(window: int) -> None:
    """h2 raises FlowControlError at one byte too much."""
    async with serving() as (_, peer):
        client = H2Client(peer)
        await client.flush()
        await client.change_window(window)
        stream_id = await client.open()
        body = pattern(50 * window)[: min(50 * window, 200_000)]
        await client.send(stream_id, body)
        while stream_id not in client.ended:
            assert await client.pump()
        assert client.received[stream_id] == body


async def test_the_window_of_the_peer_shrinks_in_mid_stream() -> None:
    async with serving() as (_, peer):
        client = H2Client(peer)
        stream_id = await client.open()
        body = pattern(300_000)[:300_000]
        await client.send(stream_id, body[:30_000], end=False)
        for window in (10, 60_000, 0, 5000):
            await client.change_window(window)
        await client.send(stream_id, body[30_000:])
        while stream_id not in client.ended:
            assert await client.pump()
        assert client.received[stream_id] == body


async def test_our_own_ends_with_each_other() -> None:
    limits = Http2Limits()
    sock, other = socket_pair()
    server = Http2Connection(Transport(sock), client=False, limits=limits, on_request=echo)
    client = Http2Connection(Transport(other), client=True, limits=limits)
    bodies = {n: pattern(400_000 + n, n)[: 400_000 + n] for n in range(1, 9)}
    handlers: dict[int, Handler] = {}
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.run)
            nursery.start_soon(client.run)
            for n, body in bodies.items():
                handler = handlers[n] = Handler()
                stream = handler.stream = client.open_stream(REQUEST, handler)
                flow = Flow()
                for at in range(0, len(body), 32_768):
                    piece = body[at : at + 32_768]
                    stream.send(flow, len(piece), piece)
                stream.when_sent(lambda stream=stream: client.end_stream(stream))  # type: ignore[misc]
            await until(lambda: all(handler.ended for handler in handlers.values()))
            assert not client.streams
            assert not server.streams
            client.fail("done")
    assert {n: bytes(handler.data) for n, handler in handlers.items()} == bodies
    assert (client.lost, server.lost) == ("done", "connection closed by the peer")


async def test_what_is_sent_before_run_is_drained_by_it() -> None:
    """More than the socket takes."""
    sock, other = socket_pair()
    client = Http2Connection(Transport(sock), client=True, limits=Http2Limits())
    server = Http2Connection(Transport(other), client=False, limits=Http2Limits(), on_request=echo)
    handlers = [Handler() for _ in range(400)]
    for n, handler in enumerate(handlers):
        stream = client.open_stream(
            [*REQUEST, (b"x", b"%d" % n + bytes(range(33, 126)) * 10)], handler
        )
        stream.send(None, 5, b"hello")
        stream.when_sent(lambda stream=stream: client.end_stream(stream))  # type: ignore[misc]
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.run)
            nursery.start_soon(server.run)
            await until(lambda: all(handler.ended for handler in handlers))
            nursery.cancel_scope.cancel()
    assert all(handler.data == b"hello" for handler in handlers)


async def test_a_stalled_socket_holds_nobody_else_up() -> None:
    """Its messages wait in order; a connection beside it goes on; afterwards all of it arrives."""
    async with serving(ignore) as (stalled, silent), serving() as (_, lively):
        await silent.send_all(PREFACE + settings({4: 2**31 - 1}) + raw(8, 0, 0, b"\x7f\xff\0\0"))
        client = H2Client(silent)
        client.h2.data_to_send()
        client.h2.send_headers(1, REQUEST)
        await client.flush()
        await until(lambda: stalled.streams)
        stream = stalled.streams[1]
        stalled.send_headers(stream, RESPONSE)
        flow = Flow()
        for n in range(200):
            stream.send(flow, 20_000, bytes([n]) * 20_000)
        assert stalled.output.blocked
        assert flow.queued > 10**6
        other = H2Client(lively)
        stream_id = await other.open()
        await other.send(stream_id, b"hello")
        while stream_id not in other.ended:
            assert await other.pump()
        # A stalled connection still reads.
        await silent.send_all(b"\0\0\2\0\0\0\0\0\1hi")
        handler = stream.handler
        assert isinstance(handler, Handler)
        await until(lambda: handler.data == b"hi")
        received = bytearray()
        size = 200 * 20_000
        while len(received) < size or len(data_of(_whole_frames(received), 1)) < size:
            received += await silent.receive_some(65_536)
        body = data_of(_whole_frames(received), 1)
        assert body == b"".join(bytes([n]) * 20_000 for n in range(200))
        assert flow.queued == 0


def _whole_frames(wire: bytearray) -> bytes:
    position = 0
    while position + 9 <= len(wire):
        size = 9 + int.from_bytes(wire[position : position + 3], "big")
        if position + size > len(wire):
            break
        position += size
    return bytes(wire[:position])


async def test_the_peer_closes() -> None:
    told: list[Handler] = []

    def keep(_stream: Stream, _headers: list[Header]) -> Handler:
        told.append(Handler())
        return told[-1]

    async with serving(keep) as (connection, peer):
        client = H2Client(peer)
        await client.open()
        await client.open()
        await until(lambda: len(connection.streams) == 2)
        await peer.send_eof()
        await until(lambda: not connection.streams)
        assert connection.lost == "connection closed by the peer"
        assert [handler.reset for handler in told] == [(8, "connection closed by the peer")] * 2


async def test_the_socket_breaks() -> None:
    async with serving() as (connection, peer):
        await H2Client(peer).open()
        await until(lambda: connection.streams)
        connection._transport.close()
        await until(lambda: not connection.streams)
        assert "connection broken" in (connection.lost or "")


async def test_cancellation_tells_every_stream() -> None:
    told: list[Handler] = []

    def keep(_stream: Stream, _headers: list[Header]) -> Handler:
        told.append(Handler())
        return told[-1]

    async with serving(keep) as (connection, peer):
        client = H2Client(peer)
        for _ in range(5):
            await client.open()
        await until(lambda: len(connection.streams) == 5)
    assert connection.lost == "cancelled"
    assert [handler.reset for handler in told] == [(8, "cancelled")] * 5
    assert connection._transport.closed


async def test_tasks_of_a_connection_are_cancelled_with_it() -> None:
    ended = trio.Event()

    async def task(text: str) -> None:
        assert text == "argument"
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with serving() as (connection, peer):
        await H2Client(peer).open()
        await until(lambda: connection.streams)
        connection.start_soon(task, "argument")
        await trio.lowlevel.checkpoint()
        connection.fail("test")
        await ended.wait()


async def test_a_bug_in_a_handler_ends_its_connection_and_is_raised() -> None:
    """Handlers see to their own bugs (rpc.call does); one that gets through is not hidden."""
    told: list[Handler] = []

    class Buggy(Handler):
        def on_data(self, view: memoryview) -> bool:
            if bytes(view) == b"bug":
                raise ZeroDivisionError
            return super().on_data(view)

    def keep(_stream: Stream, _headers: list[Header]) -> Handler:
        told.append(Buggy())
        return told[-1]

    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        async with serving(keep) as (connection, peer):
            client = H2Client(peer)
            for _ in range(2):
                await client.open()
            await client.send(1, b"bug", end=False)
            await trio.sleep_forever()
    assert not connection.streams
    assert connection._transport.closed
    assert [handler.reset for handler in told] == [(8, "cancelled")] * 2


async def test_an_error_is_told_with_a_goaway() -> None:
    async with serving() as (connection, peer):
        await peer.send_all(PREFACE + settings({}) + raw(PING, 0, 5, bytes(8)))
        received = bytearray()
        while part := await peer.receive_some(65_536):
            received += part
        [frame] = goaways(received)
        assert frame.error_code == 1
        assert (connection.lost or "").startswith("protocol error")


async def test_a_flood_is_cut_off_with_a_goaway_and_the_rest_goes_on() -> None:
    async with serving() as (_, lively), serving() as (connection, flooding):
        await flooding.send_all(PREFACE + settings({}))
        await flooding.send_all(raw(PING, 0, 0, bytes(8)) * 11_000)
        received = bytearray()
        while True:
            try:
                part = await flooding.receive_some(65_536)
            except trio.BrokenResourceError:
                break
            if not part:
                break
            received += part
        assert connection.lost == "too many control frames"
        assert types(parse_frames(_whole_frames(received)))[:3] == [
            "Settings",
            "WindowUpdate",
            "Settings",
        ]
        client = H2Client(lively)
        stream_id = await client.open()
        await client.send(stream_id, b"hello")
        while stream_id not in client.ended:
            assert await client.pump()


async def test_graceful_end_seen_by_plain_h2() -> None:
    async with serving() as (connection, peer):
        client = H2Client(peer)
        first = await client.open()
        await client.send(first, b"before", end=False)
        while client.received[first] != b"before":
            assert await client.pump()
        connection.on_idle = lambda: connection.fail("drained")
        connection.announce_end()
        # h2 as it is stops at the first GOAWAY, so this peer answers by hand.
        received = bytearray()
        while len(goaways(_whole_frames(received))) < 2:
            part = await peer.receive_some(65_536)
            assert part
            for frame in parse_frames(_whole_frames(bytearray(part))):
                if isinstance(frame, PingFrame):
                    await peer.send_all(raw(PING, 1, 0, frame.opaque_data))
            received += part
        assert [f.last_stream_id for f in goaways(received)] == [2**31 - 1, first]
        await peer.send_all(b"\0\0\5\0\1\0\0\0\1after")
        received.clear()
        while part := await peer.receive_some(65_536):
            received += part
        assert data_of(received, first) == b"after"
        assert connection.lost == "drained"


async def test_a_busy_connection_lets_the_others_run() -> None:
    async with serving(ignore) as (connection, peer):
        client = H2Client(peer)
        await client.open()
        await until(lambda: connection.streams)
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count)
            await client.send(1, bytes(5_000_000), end=False)
            nursery.cancel_scope.cancel()
        assert turns > 5
        assert any(isinstance(event, WindowUpdated) for event in client.events)
        assert not any(isinstance(event, ConnectionTerminated) for event in client.events)
