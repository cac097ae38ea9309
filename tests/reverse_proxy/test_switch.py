"""Connections that go on in another protocol."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from proxy_stage import GET, OK, Peer, staged

from clusterproxy.reverse_proxy.exchange import Forward, Request
from clusterproxy.reverse_proxy.origin import Origin

if TYPE_CHECKING:
    from proxy_stage import Stage

ASK = (
    b"GET /exec HTTP/1.1\r\nHost: one.example\r\nConnection: keep-alive, Upgrade\r\nUpgrade: SPDY/3.1\r\n"
    b"X-Stream-Protocol-Version: v4.channel.k8s.io\r\n\r\n"
)
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: spdy/3.1\r\nX-Version: v4\r\n\r\n"


async def switched(stage: Stage, ahead: bytes = b"", early: bytes = b"") -> tuple[Peer, Peer]:
    client = stage.client()
    await client.send(ASK + ahead)
    origin = await stage.dialled()
    assert await origin.until() == (
        b"GET /exec HTTP/1.1\r\nHost: one.example\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n"
        b"Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n"
    )
    await origin.send(SWITCH + early)
    assert await client.until() == (
        b"HTTP/1.1 101 Switching Protocols\r\nX-Version: v4\r\nConnection: Upgrade\r\nUpgrade: spdy/3.1\r\n\r\n"
    )
    return client, origin


@pytest.mark.parametrize("sockets", [False, True])
async def test_bytes_go_both_ways(autojump_clock: object, *, sockets: bool) -> None:
    async with staged() as stage:
        stage.sockets = sockets
        client, origin = await switched(stage, b"ahead", b"early")
        assert await origin.exactly(5) == b"ahead"
        assert await client.exactly(5) == b"early"
        for _ in range(3):
            await client.send(b"\0\r\n\xff")
            assert await origin.exactly(4) == b"\0\r\n\xff"
            await trio.sleep(3600)
            await origin.send(b"HTTP/1.1 ")
            assert await client.exactly(9) == b"HTTP/1.1 "


@pytest.mark.parametrize("sockets", [False, True])
async def test_one_direction_may_end_before_the_other(
    autojump_clock: object, *, sockets: bool
) -> None:
    async with staged() as stage:
        stage.sockets = sockets
        client, origin = await switched(stage)
        await client.send(b"all")
        await client.eof()
        assert await origin.rest() == b"all"
        await trio.sleep(100)
        await origin.send(b"answer")
        await origin.eof()
        assert await client.rest() == b"answer"
        await trio.testing.wait_all_tasks_blocked()
        assert stage.notes.results == [("GET", 101)]
        client, origin = await switched(stage)
        await origin.send(b"all")
        await origin.eof()
        assert await client.rest() == b"all"
        await client.send(b"more")
        assert await origin.exactly(4) == b"more"


class OneWay(trio.abc.Stream):
    """A stream that can only be closed as a whole."""

    def __init__(self, inner: trio.abc.HalfCloseableStream) -> None:
        self.inner = inner
        self.aborted = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return bytes(await self.inner.receive_some(max_bytes))

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self.inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        await self.inner.aclose()


async def test_a_stream_that_has_no_half_close_ends_as_a_whole(autojump_clock: object) -> None:
    async with staged() as stage:
        ours, theirs = trio.testing.memory_stream_pair()

        async def connect() -> OneWay:
            return OneWay(ours)

        async def decide(request: Request) -> Forward:
            origin = Origin(scheme="http", host="a", port=1, pool=stage.pool, connect=connect)
            return Forward(origin, request.target, request.headers)

        stage.decide = decide
        client = stage.client()
        await client.send(ASK)
        origin = Peer(theirs)
        await origin.until()
        await origin.send(SWITCH)
        await client.until()
        await client.send(b"all")
        await client.eof()
        assert await origin.rest() == b"all"
        assert await client.rest() == b""


@pytest.mark.parametrize("sockets", [False, True])
async def test_an_origin_that_breaks_off(autojump_clock: object, *, sockets: bool) -> None:
    async with staged() as stage:
        stage.sockets = sockets
        client, origin = await switched(stage)
        await origin.reset()
        with suppress(trio.BrokenResourceError):
            assert await client.rest() == b""
        await client.aclose()


class Broken(OneWay):
    """A stream whose end is not an orderly one."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not (data := await super().receive_some(max_bytes)):
            raise trio.BrokenResourceError("cut off")
        return data


async def test_what_came_before_an_origin_broke_off_arrives() -> None:
    """As with Go: a reset would have the kernel throw away what a client has not taken yet."""
    content = bytes(300_000)
    async with staged() as stage:
        ours, theirs = trio.testing.memory_stream_pair()

        async def connect() -> Broken:
            return Broken(ours)

        async def decide(request: Request) -> Forward:
            origin = Origin(scheme="http", host="a", port=1, pool=stage.pool, connect=connect)
            return Forward(origin, request.target, request.headers)

        stage.decide = decide
        with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as ends:
            ends.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            ends.connect(listener.getsockname())
            accepted, _ = listener.accept()
            accepted.setblocking(False)
            ends.setblocking(False)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stage.server.serve, accepted)
                client = Peer(trio.SocketStream(trio.socket.from_stdlib_socket(ends)))
                await client.send(ASK)
                origin = Peer(theirs)
                await origin.until()
                await origin.send(SWITCH + content)
                await origin.eof()
                # It reads when all is over, or its socket takes no more.
                await trio.testing.wait_all_tasks_blocked()
                await client.until()
                assert len(await client.rest()) == len(content)


async def test_a_client_that_breaks_off(autojump_clock: object) -> None:
    async with staged() as stage:
        client, origin = await switched(stage)
        await client.aclose()
        assert await origin.rest() == b""
        await origin.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert stage.notes.open == 0


async def test_an_origin_that_does_not_want_to(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(ASK)
        origin = await stage.dialled()
        await origin.until()
        await origin.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
        assert await client.until(b"no") == b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno"
        await client.send(GET)
        await origin.until()
        await origin.send(OK)
        await client.until(b"hello")


@pytest.mark.parametrize(
    ("asked", "given", "text"),
    [
        (b"a", b"b", 'backend tried to switch protocol "b" when "a" was requested'),
        (b"a", b"", 'backend tried to switch protocol "" when "a" was requested'),
        (b"", b"b", 'backend tried to switch protocol "b" when "" was requested'),
        (b"", b"", 'backend tried to switch protocol "" when "" was requested'),
        (b"a", b"\xff", 'backend tried to switch to invalid protocol "\\xff"'),
        (b"\xff", None, 'client tried to switch to invalid protocol "\\xff"'),
    ],
)
async def test_another_protocol_than_was_asked_for(
    autojump_clock: object, asked: bytes, given: bytes | None, text: str
) -> None:
    async with staged() as stage:
        client = stage.client()
        upgrade = b"Connection: Upgrade\r\nUpgrade: %b\r\n" % asked if asked else b""
        await client.send(b"GET / HTTP/1.1\r\nHost: a\r\n" + upgrade + b"\r\n")
        if given is not None:
            origin = await stage.dialled()
            await origin.until()
            lines = b"Connection: Upgrade\r\nUpgrade: %b\r\n" % given if given else b""
            await origin.send(b"HTTP/1.1 101 Switching Protocols\r\n" + lines + b"\r\n")
        assert (await client.until()).startswith(b"HTTP/1.1 502 ")
        assert await client.until(b"\n") == f"failed because {text}\n".encode()


async def test_nobody_gets_past_us_by_another_version_of_http(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(
            b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n"
        )
        asked = await (await stage.dialled()).until()
        assert asked == b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


async def test_a_switch_after_a_body(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(
            b"POST / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: a\r\nContent-Length: 2\r\n\r\nhiahead"
        )
        origin = await stage.dialled()
        await origin.until()
        assert await origin.exactly(2) == b"hi"
        await origin.send(b"HTTP/1.1 101 Go On\r\nConnection: Upgrade\r\nUpgrade: a\r\n\r\n")
        await client.until()
        assert await origin.exactly(5) == b"ahead"
        await origin.send(b"x")
        assert await client.exactly(1) == b"x"
