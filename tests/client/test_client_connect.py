"""Tunnels over HTTP CONNECT, before a scripted server."""

from __future__ import annotations

import contextlib
from array import array
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from harness import read_to_end, settle, socket_pair, tcp_pair, values
from scripted_proxy import Dial, patch_connector

from clusterproxy import (
    ClientMetrics,
    ConnectError,
    DialCause,
    DialError,
    DialReason,
    HalfCloseableTunnelStream,
    Hop,
    open_tunnel,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from clusterproxy import Tunnel

OK = b"HTTP/1.1 200 Connection Established\r\n\r\n"


class Sockets:
    """The server's ends of the connections that were made."""

    def __init__(self, pair: Callable[[], tuple[socket.socket, socket.socket]]) -> None:
        self._pair = pair
        self.streams: list[trio.SocketStream] = []

    async def __call__(self, _server: object) -> socket.socket:
        await trio.lowlevel.checkpoint()
        ours, theirs = self._pair()
        self.streams.append(trio.SocketStream(trio.socket.from_stdlib_socket(theirs)))
        return ours

    @property
    def newest(self) -> trio.SocketStream:
        return self.streams[-1]

    async def request(self) -> bytes:
        """The head of the newest connection's request."""
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await self.newest.receive_some()
        return head


class ConnectWorld:
    def __init__(self, tunnel: Tunnel, sockets: Sockets, nursery: trio.Nursery) -> None:
        self.tunnel = tunnel
        self.sockets = sockets
        self._nursery = nursery

    async def start_dial(self, address: str = "target:80") -> Dial:
        dial = Dial(self.tunnel, address)
        self._nursery.start_soon(dial.run)
        await settle()
        return dial

    async def connect(self) -> tuple[HalfCloseableTunnelStream, trio.SocketStream]:
        dial = await self.start_dial()
        await self.sockets.request()
        await self.sockets.newest.send_all(OK)
        await settle()
        assert isinstance(dial.stream, HalfCloseableTunnelStream)
        return dial.stream, self.sockets.newest


@contextlib.asynccontextmanager
async def connecting(
    pair: Callable[[], tuple[socket.socket, socket.socket]] = socket_pair,
    *,
    reusable: bool = True,
    metrics: ClientMetrics | None = None,
) -> AsyncGenerator[ConnectWorld]:
    sockets = Sockets(pair)
    async with trio.open_nursery() as nursery:
        with patch_connector(sockets):
            async with open_tunnel(
                "/connect", mode="http-connect", reusable=reusable, metrics=metrics
            ) as tunnel:
                yield ConnectWorld(tunnel, sockets, nursery)
        assert tunnel.closed
        nursery.cancel_scope.cancel()
    for stream in sockets.streams:
        await trio.aclose_forcefully(stream)


async def test_request_and_addresses() -> None:
    async with connecting() as world:
        dial = await world.start_dial("cluster1:443")
        head = await world.sockets.request()
        assert head.startswith(b"CONNECT cluster1:443 HTTP/1.1\r\nHost: cluster1:443\r\n")
        assert b"\r\nUser-Agent: clusterproxy/" in head
        await world.sockets.newest.send_all(OK + b"greeting")
        await dial.done.wait()
        assert dial.stream is not None
        assert dial.stream.remote_address == ("cluster1", 443)
        assert dial.stream.connect_id == 0
        assert dial.stream.readable
        # C18: what came with the answer is not lost, and comes in order.
        await world.sockets.newest.send_all(b" and more")
        assert await dial.stream.receive_some(5) == b"greet"
        assert await dial.stream.receive_some() == b"ing"
        assert await dial.stream.receive_some() == b" and more"
        assert not dial.stream.readable


async def test_answer_in_pieces() -> None:
    async with connecting() as world:
        dial = await world.start_dial()
        await world.sockets.request()
        for byte in b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"x":
            await world.sockets.newest.send_all(bytes((byte,)))
            await settle()
        assert dial.stream is not None
        assert await dial.stream.receive_some() == b"x"


async def test_the_first_dial_uses_the_connection_of_the_beginning() -> None:
    async with connecting() as world:
        assert len(world.sockets.streams) == 1
        await world.connect()
        assert len(world.sockets.streams) == 1
        await world.connect()
        assert len(world.sockets.streams) == 2


async def test_connecting_again_leaves_no_connection_behind() -> None:
    async with connecting() as world:
        await world.tunnel.connect()
        first, second = world.sockets.streams
        assert await first.receive_some() == b""

        async def connect_too_late() -> None:
            with pytest.raises(ConnectError, match="the tunnel was closed"):
                await world.tunnel.connect()

        ended = trio.Event()

        async def connect_slowly(server: object) -> socket.socket:
            await ended.wait()
            return await world.sockets(server)

        with patch_connector(connect_slowly):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connect_too_late)
                await settle()
                world.tunnel.end()
                ended.set()
        assert await second.receive_some() == b""
        (third,) = world.sockets.streams[2:]
        assert await third.receive_some() == b""
        await connect_too_late()
        assert len(world.sockets.streams) == 3


async def test_a_stale_connection_is_replaced() -> None:
    async with connecting() as world:
        await world.sockets.newest.aclose()
        stream, server = await world.connect()
        assert len(world.sockets.streams) == 2
        await server.send_all(b"x")
        assert await stream.receive_some() == b"x"


@pytest.mark.parametrize(
    ("answer", "hop", "cause", "message"),
    [
        (
            (
                b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain\r\n\r\n"
                b"currently no tunnels available: No agent available"
            ),
            Hop.SERVER,
            DialCause.NO_AGENT,
            "currently no tunnels available: No agent available",
        ),
        (
            (
                b"HTTP/1.1 502 Bad Gateway\r\nConnection: close\r\n\r\n"
                b"dial tcp 127.0.0.1:1: connect: connection refused"
            ),
            Hop.SERVICE,
            DialCause.REFUSED,
            "dial tcp 127.0.0.1:1: connect: connection refused",
        ),
        (
            (
                b"HTTP/1.1 504 Gateway Timeout\r\n\r\n"
                b"Backend dial timeout: timed out waiting for backend dial\r\n"
            ),
            Hop.AGENT,
            DialCause.TIMEOUT,
            "Backend dial timeout: timed out waiting for backend dial",
        ),
        (
            b"HTTP/1.1 502 Bad Gateway\r\n\r\nBackend context error: context canceled\r\n",
            Hop.AGENT,
            DialCause.CLOSED,
            "Backend context error: context canceled",
        ),
        (
            b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno",
            Hop.SERVER,
            DialCause.POLICY,
            "no",
        ),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", Hop.AGENT, DialCause.OTHER, "400 Bad Request"),
    ],
)
async def test_refused(answer: bytes, hop: Hop, cause: DialCause, message: str) -> None:
    """C10: the body says why."""
    metrics = ClientMetrics()
    async with connecting(metrics=metrics) as world:
        dial = await world.start_dial()
        await world.sockets.request()
        await world.sockets.newest.send_all(answer)
        await world.sockets.newest.send_eof()
        await dial.done.wait()
        error = dial.error
        assert isinstance(error, DialError)
        assert (error.reason, error.hop, error.cause) == (DialReason.ENDPOINT, hop, cause)
        assert error.message == message
        assert values(metrics.dial_failure_total) == {"endpoint": 1}
        assert values(metrics.client_connections) == {}


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"\0\0\x06\x04\0\0\0\0\0\0\x05\0\0\x40\0", "gRPC mode"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no HTTP/1.1 answer"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, "no HTTP/1.1 answer"),
        (b"", "closed by the server"),
    ],
)
async def test_not_a_connect_server(answer: bytes, text: str) -> None:
    """C17: reason streamsetup, caused by the ConnectError."""
    async with connecting() as world:
        # The second dial has a fresh connection, which must not end without an answer.
        await world.connect()
        dial = await world.start_dial()
        await world.sockets.request()
        with contextlib.suppress(trio.BrokenResourceError):
            await world.sockets.newest.send_all(answer)
            await world.sockets.newest.send_eof()
        await dial.done.wait()
        assert isinstance(dial.error, DialError)
        assert dial.error.reason is DialReason.STREAM_SETUP
        assert isinstance(dial.error.__cause__, ConnectError)
        assert text in str(dial.error)


async def test_cancelled_while_pending() -> None:
    """C09: the socket is closed, which tells the server."""
    metrics = ClientMetrics()
    async with connecting(metrics=metrics) as world:
        dial = await world.start_dial()
        await world.sockets.request()
        dial.scope.cancel()
        await settle()
        assert await world.sockets.newest.receive_some() == b""
        assert values(metrics.dial_failure_total) == {"context": 1}


async def test_single_use() -> None:
    """C03"""
    async with connecting(reusable=False) as world:
        stream, _ = await world.connect()
        with pytest.raises(DialError, match="already dialed"):
            await world.tunnel.dial("target:80")
        await stream.aclose()
        with trio.fail_after(1):
            await world.tunnel.wait_closed()


async def test_closing_the_tunnel_ends_streams_and_dials() -> None:
    """C15, C16"""
    metrics = ClientMetrics()
    async with connecting(tcp_pair, metrics=metrics) as world:
        stream, server = await world.connect()
        dial = await world.start_dial()
        async with trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(trio.BrokenResourceError, match="tunnel closed"):
                    await stream.receive_some()

            nursery.start_soon(read)
            await settle()
            await world.tunnel.aclose()
        await dial.done.wait()
        assert isinstance(dial.error, DialError)
        assert dial.error.reason is DialReason.TUNNEL_CLOSED
        with pytest.raises(trio.BrokenResourceError):
            await server.receive_some()
        with pytest.raises(DialError, match="tunnel closed"):
            await world.tunnel.dial("target:80")
        assert values(metrics.client_connections) == {}


async def test_half_close_and_reset() -> None:
    async with connecting(tcp_pair) as world:
        stream, server = await world.connect()
        await stream.send_all(b"request")
        await stream.send_eof()
        await stream.send_eof()
        with pytest.raises(trio.ClosedResourceError):
            await stream.send_all(b"x")
        assert await read_to_end(server) == b"request"
        await server.send_all(b"answer")
        await server.send_eof()
        assert await read_to_end(stream) == b"answer"
        await stream.aclose()
        stream, server = await world.connect()
        stream.abort()
        with pytest.raises(trio.BrokenResourceError):
            await server.receive_some()


async def test_arrays_are_sent_as_their_bytes() -> None:
    numbers = array("I", range(1_000_000))
    async with connecting(tcp_pair) as world:
        stream, server = await world.connect()

        async def send() -> None:
            await stream.send_all(memoryview(numbers))
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            received = await read_to_end(server)
        assert received == numbers.tobytes()


async def test_follows_the_rules_of_half_closeable_streams() -> None:
    async with connecting(tcp_pair) as world:

        async def make() -> tuple[HalfCloseableTunnelStream, trio.SocketStream]:
            return await world.connect()

        def clogged(
            make: Callable[[], Awaitable[tuple[HalfCloseableTunnelStream, trio.SocketStream]]],
        ) -> Callable[[], Awaitable[tuple[HalfCloseableTunnelStream, trio.SocketStream]]]:
            async def clog(stream: trio.abc.SendStream) -> None:
                while True:
                    await stream.send_all(bytes(1024 * 1024))

            async def make_clogged() -> tuple[HalfCloseableTunnelStream, trio.SocketStream]:
                left, right = await make()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(clog, left)
                    nursery.start_soon(clog, right)
                    await trio.testing.wait_all_tasks_blocked(0.05)
                    nursery.cancel_scope.cancel()
                return left, right

            return make_clogged

        await trio.testing.check_half_closeable_stream(make, clogged(make))
