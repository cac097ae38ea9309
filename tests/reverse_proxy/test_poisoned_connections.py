"""Connections to origins that must serve nobody else: one party to an exchange has not kept to its end of it."""

from __future__ import annotations

import socket

import attrs
import pytest
import trio
import trio.testing
from proxy_stage import GET, OK, Peer, staged

from clusterproxy.reverse_proxy.exchange import Forward, Request


def post(*lines: bytes) -> bytes:
    return b"\r\n".join((b"POST /path HTTP/1.1", b"Host: one.example", *lines, b"", b""))


@pytest.mark.parametrize("length", [True, False])
async def test_a_body_that_comes_behind_the_whole_answer(
    autojump_clock: object, *, length: bool
) -> None:
    """The origin was not told the end of the body, so what comes next would be taken for it."""
    async with staged() as stage:
        client = await stage.http2_client()
        client.grants = False
        fields = ((b"content-length", b"8"),) if length else ()
        number = await client.request(*fields, method=b"POST", end=False)
        origin = await stage.dialled()
        await origin.until()
        size = 70_000
        await origin.send(b"HTTP/1.1 404 No\r\nContent-Length: %d\r\n\r\n" % size + bytes(66_000))
        await client.response(number)
        await origin.send(bytes(4_000))
        await trio.testing.wait_all_tasks_blocked()
        # It takes no more of the answer, and only now sends what it has announced.
        await client.data(number, b"smuggled", end=True)
        await trio.testing.wait_all_tasks_blocked()
        client.h2.increment_flow_control_window(size)
        client.h2.increment_flow_control_window(size, number)
        await client.flush()
        assert await client.body(number) == bytes(size)
        await trio.testing.wait_all_tasks_blocked()
        assert stage.pool.waiting == 0


async def test_a_body_that_trailers_end_before_its_length(autojump_clock: object) -> None:
    """The origin waits for the rest, and would take the beginning of the next request for it."""
    async with staged() as stage:
        client = await stage.http2_client()
        number = await client.request((b"content-length", b"100"), method=b"POST", end=False)
        origin = await stage.dialled()
        assert b"\r\nContent-Length: 100\r\n" in await origin.until()
        client.h2.send_data(number, b"0123456789")
        client.h2.send_headers(number, [(b"x-sum", b"1")], end_stream=True)
        with trio.fail_after(5):
            await client.flush()
            assert (await client.response(number))[0] == 400
            assert b"shorter than Content-Length" in await client.body(number)
            assert await origin.rest() in {b"", b"0123456789"}
        assert stage.pool.waiting == 0


@pytest.mark.parametrize("framing", [b"Content-Length: 5", b"Transfer-Encoding: chunked"])
async def test_a_body_that_nobody_asked_for_and_a_request_behind_it(
    autojump_clock: object, framing: bytes
) -> None:
    body = b"hello" if b"Length" in framing else b"5\r\nhello\r\n0\r\n\r\n"
    async with staged() as stage:
        client = stage.client()
        await client.send(post(b"Expect: 100-continue", framing) + body + GET[:10])
        origin = await stage.dialled()
        await origin.until()
        await origin.send(b"HTTP/1.1 404 No\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n")
        await client.until(b"ab\r\n")
        # The pause in which it could be asked for the body is over.
        await trio.sleep(2)
        await client.send(GET[10:])
        await trio.testing.wait_all_tasks_blocked()
        await origin.send(b"0\r\n\r\n")
        await client.until(b"0\r\n\r\n")
        # The next request is whole, and goes by another connection.
        second = await stage.dialled()
        assert (await second.until()).startswith(b"GET /path?q HTTP/1.1\r\n")
        await second.send(OK)
        await client.until(b"hello")


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (GET, b"HTTP/1.1 204 No Content\r\n\r\n"),
        (GET, b"HTTP/1.1 204 No Content\r\nContent-Length: 3\r\n\r\n"),
        (GET, b"HTTP/1.1 304 Not Modified\r\nContent-Length: 3\r\n\r\n"),
        (GET, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        (GET.replace(b"GET", b"HEAD"), b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n"),
        (GET.replace(b"GET", b"HEAD"), b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"),
    ],
)
async def test_a_body_where_there_is_none(
    autojump_clock: object, request_: bytes, answer: bytes
) -> None:
    """Its rest could come later, and would be somebody else's answer."""
    async with staged() as stage:
        client = stage.client()
        await client.send(request_)
        origin = await stage.dialled()
        await origin.until()
        await origin.send(answer + b"HTT")
        await client.until()
        await trio.testing.wait_all_tasks_blocked()
        assert stage.pool.waiting == 0


async def test_a_tunnel_is_nobody_else_s(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(b"CONNECT /path HTTP/1.1\r\nHost: a\r\n\r\n")
        origin = await stage.dialled()
        assert (await origin.until()).startswith(b"CONNECT /path HTTP/1.1\r\n")
        await origin.send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await client.until()
        await trio.testing.wait_all_tasks_blocked()
        assert stage.pool.waiting == 0


async def test_what_a_connection_has_executed_is_not_executed_again(
    autojump_clock: object,
) -> None:
    """A GET that asks for another protocol may be a command in a container."""
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        first = await stage.dialled()
        await first.until()
        await first.send(OK)
        await client.until(b"hello")
        await client.send(
            b"GET /exec?command=reboot HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        )
        await first.until()
        await first.aclose()
        assert (await client.until()).startswith(b"HTTP/1.1 502 ")
        assert stage.dials == 1


@pytest.mark.parametrize("framing", [b"Content-Length: 5", b"Transfer-Encoding: chunked"])
async def test_a_switch_in_the_middle_of_a_body(
    autojump_clock: object, caplog: pytest.LogCaptureFixture, framing: bytes
) -> None:
    async with staged() as stage:
        stage.sockets = True
        client = stage.client()
        await client.send(post(b"Connection: Upgrade", b"Upgrade: a", framing))
        origin = await stage.dialled()
        await origin.until()
        await origin.send(
            b"HTTP/1.1 101 Go On\r\nConnection: Upgrade\r\nUpgrade: a\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"
        )
        assert (await client.until()).startswith(b"HTTP/1.1 502 ")
        assert b"before the end of the request" in await client.until(b"\n")
        assert stage.pool.waiting == 0
        assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_connection_that_is_closed_under_us_in_the_middle_of_both_bodies(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged() as stage:
        ours, theirs = trio.testing.memory_stream_pair()

        async def connect() -> trio.abc.Stream:
            return ours

        async def decide(request: Request) -> Forward:
            origin = attrs.evolve(stage.origin, connect=connect)
            return Forward(origin, request.target, request.headers)

        stage.decide = decide
        client = stage.client()
        await client.send(post(b"Transfer-Encoding: chunked"))
        origin = Peer(theirs)
        await origin.until()
        await origin.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe")
        assert (await client.until(b"he")).startswith(b"HTTP/1.1 200 OK\r\n")
        await ours.aclose()
        assert await client.rest() == b""
        assert stage.notes.failures == ["the origin"]
        assert "bug" not in caplog.text


async def test_an_empty_host_is_not_one_of_two(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(b"GET / HTTP/1.1\r\nHost:\r\n\r\n")
        asked = await (await stage.dialled()).until()
        assert asked == b"GET / HTTP/1.1\r\nHost: origin.example:80\r\n\r\n"


async def test_a_socket_with_the_number_of_another(autojump_clock: object) -> None:
    """The kernel gives the lowest number that is free, and who had it before may not be done with it."""
    async with staged() as stage:
        client = stage.client()
        await trio.testing.wait_all_tasks_blocked()
        (connection,) = stage.server.http1
        number = connection.transport.sock.fileno()
        connection.close()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            one, other = (ours, theirs) if ours.fileno() == number else (theirs, ours)
            assert one.fileno() == number
            left = trio.Event()
            stage.server.hangups.watch(number, lambda _: left.set())
            # Its task ends, and closes it once more.
            assert await client.rest() == b""
            await trio.testing.wait_all_tasks_blocked()
            other.close()
            with trio.fail_after(60):
                await left.wait()
            stage.server.hangups.forget(number)
