"""The HTTP proxy between a scripted client and scripted services."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, cast

import pytest
import trio

from clusterproxy.client.http_proxy import serve_http_proxy
from clusterproxy.errors import DialCause, DialError, DialReason

if TYPE_CHECKING:
    from trio.testing import MockClock

    from clusterproxy.client import TunnelStream

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    ours, theirs = socket.socketpair()
    return (
        trio.SocketStream(trio.socket.from_stdlib_socket(ours)),
        trio.SocketStream(trio.socket.from_stdlib_socket(theirs)),
    )


class Service:
    """The other end of a connection to a service: answers what it is told to and keeps what it heard."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.heard = b""

    async def read(self, end: bytes) -> None:
        while not self.heard.endswith(end):
            data = await self.stream.receive_some()
            assert data, self.heard
            self.heard += data


async def proxied(request: bytes, answer: bytes = OK, end: bytes = b"\r\n\r\n", *, eof: bool = True) -> tuple[bytes, list[tuple[str, bytes]]]:  # fmt: skip
    """Return what the client hears, and where its requests went and how they looked there.

    Each service reads up to *end*, answers and closes.
    """
    client, ours = pair()
    dialled: list[tuple[str, Service]] = []
    heard = b""
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:

            async def serve(service: Service) -> None:
                async with service.stream:
                    await service.read(end)
                    await service.stream.send_all(answer)

            async def dial(address: str) -> TunnelStream:
                near, far = pair()
                dialled.append((address, Service(far)))
                nursery.start_soon(serve, dialled[-1][1])
                return cast("TunnelStream", near)

            nursery.start_soon(serve_http_proxy, ours, dial)
            await client.send_all(request)
            if eof:
                await client.send_eof()
            while data := await client.receive_some():
                heard += data
            await client.aclose()
    return heard, [(address, service.heard) for address, service in dialled]


async def test_a_url_becomes_a_path_and_hops_are_left_out() -> None:
    request = (
        b"GET http://User@Cluster1:8080/a?b=c HTTP/1.1\r\nHost: other\r\nConnection: x-secret, close\r\n"
        b"X-Secret: 1\r\nProxy-Authorization: Basic eA==\r\nTE: trailers\r\nUpgrade: h2c\r\nX-Kept: 2\r\n\r\n"
    )
    heard, [(address, seen)] = await proxied(request)
    assert address == "Cluster1:8080"
    assert seen == (
        b"GET /a?b=c HTTP/1.1\r\nHost: Cluster1:8080\r\nX-Kept: 2\r\nVia: 1.1 clusterproxy\r\n"
        b"Connection: close\r\n\r\n"
    )
    assert heard.startswith(b"HTTP/1.1 200 OK\r\n")
    assert heard.endswith(b"\r\n\r\nok")


@pytest.mark.parametrize(
    ("target", "address", "line"),
    [
        (b"http://a", "a:80", b"GET / HTTP/1.1"),
        (b"HTTP://a?x", "a:80", b"GET /?x HTTP/1.1"),
        (b"http://[fd00::1]/", "[fd00::1]:80", b"GET / HTTP/1.1"),
        (b"http://[fd00::1]:81/", "[fd00::1]:81", b"GET / HTTP/1.1"),
    ],
)
async def test_targets(target: bytes, address: str, line: bytes) -> None:
    _, [(dialled, seen)] = await proxied(b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    assert dialled == address
    assert seen.startswith(line + b"\r\n")


async def test_several_requests_on_one_connection() -> None:
    one = b"GET http://a/%d HTTP/1.1\r\nHost: a\r\n\r\n"
    heard, dialled = await proxied(one % 1 + one % 2)
    assert heard.count(b"HTTP/1.1 200 OK") == 2
    assert [seen.split()[1] for _, seen in dialled] == [b"/1", b"/2"]


async def test_bodies_keep_their_framing() -> None:
    head = b"POST http://a/ HTTP/1.1\r\nHost: a\r\n"
    _, [(_, seen)] = await proxied(head + b"Content-Length: 5\r\n\r\nhello", end=b"hello")
    assert b"Content-Length: 5\r\n" in seen or b"content-length: 5\r\n" in seen
    body = b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Trailer: 1\r\n\r\n"
    _, [(_, seen)] = await proxied(head + body, end=b"0\r\n\r\n")
    assert seen.endswith(b"\r\n\r\n5\r\nhello\r\n0\r\n\r\n")


async def test_a_client_cannot_have_its_framing_left_out() -> None:
    head = b"POST http://a/ HTTP/1.1\r\nHost: a\r\nConnection: content-length\r\nContent-Length: 3\r\n\r\n"
    heard, ((_, there),) = await proxied(head + b"abc", end=b"abc")
    assert b"\r\nContent-Length: 3\r\n" in there
    assert heard == OK


async def test_both_framings_at_once_do_not_get_to_the_service() -> None:
    request = (
        b"POST http://a/ HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"5\r\nhello\r\n0\r\n\r\n"
    )
    _, [(_, seen)] = await proxied(request, end=b"0\r\n\r\n")
    assert b"content-length" not in seen.lower()


async def test_an_answer_that_ends_with_its_connection() -> None:
    heard, _ = await proxied(
        b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\nto the end"
    )
    assert b"chunked" in heard
    assert b"\r\na\r\nto the end\r\n0\r\n\r\n" in heard
    heard, _ = await proxied(
        b"GET http://a/ HTTP/1.0\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\nto the end"
    )
    assert heard.endswith(b"\r\n\r\nto the end")


async def test_answers_on_the_way_and_without_content() -> None:
    answer = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n"
    heard, _ = await proxied(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", answer)
    assert heard.startswith(b"HTTP/1.1 103 Early Hints\r\n")
    assert b"HTTP/1.1 304 Not Modified\r\n" in heard


async def test_a_client_of_http_1_0_gets_one_answer_alone() -> None:
    answer = b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK
    heard, _ = await proxied(b"GET http://a/ HTTP/1.0\r\n\r\n", answer)
    assert heard.startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", b"not HTTP/1.1"),
        (b"", b"not HTTP/1.1"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", b"not HTTP/1.1"),
    ],
)
async def test_an_answer_that_is_none(answer: bytes, text: bytes) -> None:
    heard, _ = await proxied(b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", answer)
    assert heard.startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
    assert text in heard


async def test_an_answer_that_breaks_off_does_not_look_whole() -> None:
    request = b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n"
    heard, _ = await proxied(request * 2, b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf")
    assert heard.endswith(b"\r\n\r\nhalf")


@pytest.mark.parametrize(
    ("request_bytes", "status", "text"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", 400, b"curl -x"),
        (b"GET https://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, b"or CONNECT"),
        (b"GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n", 400, b""),
        (b"GET http://a:x/ HTTP/1.1\r\nHost: a\r\n\r\n", 400, b"HOST:PORT"),
        (b"CONNECT a HTTP/1.1\r\nHost: a\r\n\r\n", 400, b"HOST:PORT"),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx", 400, b"no content"),
        (b"\x16\x03\x01\r\n\r\n", 400, b""),
        (b"GET http://a/ HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", 431, b""),
    ],
)
async def test_requests_that_are_refused(request_bytes: bytes, status: int, text: bytes) -> None:
    heard, dialled = await proxied(request_bytes, eof=False)
    assert heard.startswith(b"HTTP/1.1 %d " % status)
    assert text in heard
    assert not dialled


@pytest.mark.parametrize(
    ("cause", "status"),
    [
        (DialCause.NO_AGENT, 503),
        (DialCause.POLICY, 403),
        (DialCause.TIMEOUT, 504),
        (DialCause.REFUSED, 502),
        (DialCause.OTHER, 502),
    ],
)
@pytest.mark.parametrize("line", [b"CONNECT a:1", b"GET http://a:1/"])
async def test_failed_dials(cause: DialCause, status: int, line: bytes) -> None:
    async def dial(address: str) -> TunnelStream:
        raise DialError(DialReason.ENDPOINT, "no way", cause=cause, address=address)

    client, ours = pair()
    async with client, trio.open_nursery() as nursery:
        nursery.start_soon(serve_http_proxy, ours, dial)
        await client.send_all(line + b" HTTP/1.1\r\nHost: a:1\r\n\r\n")
        heard = b""
        while data := await client.receive_some():
            heard += data
        await client.aclose()
    assert heard.startswith(b"HTTP/1.1 %d " % status)
    assert heard.endswith(b"a:1: failed at the client: no way\n")


async def test_a_refusal_of_a_head_has_no_content() -> None:
    heard, _ = await proxied(b"HEAD / HTTP/1.1\r\nHost: a\r\n\r\n", eof=False)
    assert heard.startswith(b"HTTP/1.1 400 ")
    assert heard.endswith(b"\r\n\r\n")
    heard, _ = await proxied(b"HEAD http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", answer=b"?\r\n\r\n")
    assert heard.startswith(b"HTTP/1.1 502 ")
    assert heard.endswith(b"\r\n\r\n")


async def test_a_client_that_says_nothing_is_let_go(autojump_clock: MockClock) -> None:
    async def dial(_address: str) -> TunnelStream:
        raise AssertionError

    client, ours = pair()
    async with client:
        await serve_http_proxy(ours, dial)
        assert await client.receive_some() == b""
    assert trio.current_time() < 100
