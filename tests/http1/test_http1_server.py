from __future__ import annotations

import logging
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterproxy.http1 import Handler, Request, Response, serve_http
from clusterproxy.http1.server import LINGER_S, MAX_DISCARDED_BODY_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from trio.testing import MemoryReceiveStream, MemorySendStream

    Client = trio.StapledStream[MemorySendStream, MemoryReceiveStream]

GET = b"GET / HTTP/1.1\r\nHost: h\r\n\r\n"


def hello(request: Request) -> Response:
    return Response.text(f"{request.method} {request.target}")


@asynccontextmanager
async def serving(handler: Handler = hello, **limits: float) -> AsyncGenerator[Client]:
    """Serve a memory stream; leaving the block checks that the server is done."""
    client, server = trio.testing.memory_stream_pair()
    done = trio.Event()

    async def serve() -> None:
        await serve_http(server, handler, **limits)  # type: ignore[arg-type]  # all limits are numbers
        done.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        yield client
        with trio.fail_after(120):
            await done.wait()


async def read_all(client: Client) -> bytes:
    received = b""
    while data := await client.receive_some():
        received += bytes(data)
    return received


async def exchange(data: bytes, handler: Handler = hello, **limits: float) -> bytes:
    """Send *data* and return what comes back until the server closes; the Date is checked and taken out."""
    async with serving(handler, **limits) as client:
        await client.send_all(data)
        return without_date(await read_all(client))


def without_date(data: bytes) -> bytes:
    date = rb"Date: [A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d GMT\r\n"
    return re.sub(date, b"", data)


def answer(body: bytes, status: bytes = b"200 OK", *headers: bytes) -> bytes:
    head = [
        b"HTTP/1.1 " + status,
        b"Content-Type: text/plain; charset=utf-8",
        b"Content-Length: %d" % len(body),
        *headers,
    ]
    return b"".join(line + b"\r\n" for line in head) + b"\r\n" + body


def refusal(status: bytes, *headers: bytes) -> bytes:
    return answer(status, status, *headers, b"Connection: close")


async def test_keep_alive_until_the_client_ends(autojump_clock: trio.testing.MockClock) -> None:
    async with serving() as client:
        for path in (b"/1", b"/2"):
            await client.send_all(b"GET %s HTTP/1.1\r\nHost: h\r\n\r\n" % path)
            await trio.testing.wait_all_tasks_blocked()
            assert without_date(bytes(await client.receive_some())) == answer(b"GET " + path)
        await client.send_stream.aclose()
        assert await read_all(client) == b""


async def test_pipelined_requests_and_an_async_handler(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async def slow(request: Request) -> Response:
        await trio.sleep(1)
        return hello(request)

    last = b"GET /2 HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    assert await exchange(GET + last, slow) == answer(b"GET /") + answer(
        b"GET /2", b"200 OK", b"Connection: close"
    )


async def test_http_1_0_is_answered_and_closed(autojump_clock: trio.testing.MockClock) -> None:
    assert await exchange(b"GET / HTTP/1.0\r\n\r\n") == answer(
        b"GET /", b"200 OK", b"Connection: close"
    )


async def test_head_has_the_length_and_no_body(autojump_clock: trio.testing.MockClock) -> None:
    data = b"HEAD /x HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    expected = answer(b"HEAD /x", b"200 OK", b"Connection: close")
    assert await exchange(data) == expected.removesuffix(b"HEAD /x")


async def test_headers_and_an_empty_body(autojump_clock: trio.testing.MockClock) -> None:
    def moved(request: Request) -> Response:
        return Response(301, headers={"Location": request.headers["x-to"]})

    data = b"GET / HTTP/1.1\r\nHost: h\r\nX-To: /y\r\nConnection: close\r\n\r\n"
    assert await exchange(data, moved) == answer(
        b"", b"301 Moved Permanently", b"Location: /y", b"Connection: close"
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"nonsense\r\n\r\n", refusal(b"400 Bad Request")),
        (b"\x16\x03\x01\x02\x00\x01", refusal(b"400 Bad Request")),
        (b"GET / HTTP/1.1\r\n\r\n", refusal(b"400 Bad Request")),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", refusal(b"400 Bad Request")),
        (
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            refusal(b"405 Method Not Allowed", b"Allow: GET, HEAD"),
        ),
        (
            b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 20_000,
            refusal(b"431 Request Header Fields Too Large"),
        ),
        (
            b"POST / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: gzip\r\n\r\n",
            refusal(b"501 Not Implemented"),
        ),
        (
            b"CONNECT a:1 HTTP/1.1\r\nHost: h\r\n\r\n",
            refusal(b"405 Method Not Allowed", b"Allow: GET, HEAD"),
        ),
        (
            b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc",
            refusal(b"405 Method Not Allowed", b"Allow: GET, HEAD"),
        ),
        (
            b"HEAD / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            refusal(b"400 Bad Request").removesuffix(b"400 Bad Request"),
        ),
        (
            b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 99999\r\n\r\n"
            + b"x" * (MAX_DISCARDED_BODY_BYTES + 1),
            refusal(b"413 Request Entity Too Large"),
        ),
    ],
)
async def test_refusals(
    data: bytes, expected: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    assert await exchange(data) == expected
    # A first request does not change how the second one is judged.
    assert await exchange(GET + data) == answer(b"GET /") + expected


async def test_the_header_limit_can_be_set(autojump_clock: trio.testing.MockClock) -> None:
    data = b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 5000
    assert await exchange(data, max_header_bytes=4096) == refusal(
        b"431 Request Header Fields Too Large"
    )


@pytest.mark.parametrize(
    "body",
    [
        b"Content-Length: 5\r\n\r\nhello",
        b"Content-Length: %d\r\n\r\n" % MAX_DISCARDED_BODY_BYTES + b"x" * MAX_DISCARDED_BODY_BYTES,
        b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ],
    ids=["length", "largest", "chunked"],
)
async def test_a_small_body_is_thrown_away(
    body: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    data = b"GET /1 HTTP/1.1\r\nHost: h\r\n" + body + b"GET /2 HTTP/1.0\r\n\r\n"
    assert await exchange(data) == answer(b"GET /1") + answer(
        b"GET /2", b"200 OK", b"Connection: close"
    )


async def test_who_waits_for_100_continue_gets_the_answer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    data = b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 9999999\r\nExpect: 100-continue\r\n\r\n"
    assert await exchange(data) == answer(b"GET /", b"200 OK", b"Connection: close")


async def test_a_body_cut_short_is_a_bad_request(autojump_clock: trio.testing.MockClock) -> None:
    async with serving() as client:
        await client.send_all(b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nhel")
        await client.send_eof()
        assert without_date(await read_all(client)) == refusal(b"400 Bad Request")


async def test_a_head_cut_short_is_not_answered(autojump_clock: trio.testing.MockClock) -> None:
    async with serving() as client:
        await client.send_all(b"GET / HT")
        await client.send_eof()
        assert await read_all(client) == b""


def broken(_request: Request) -> Response:
    raise ZeroDivisionError


async def broken_later(_request: Request) -> Response:
    await trio.lowlevel.checkpoint()
    raise trio.TooSlowError


def bad_header(_request: Request) -> Response:
    return Response(headers={"Location": "a\r\nSet-Cookie: b"})


def bad_status(_request: Request) -> Response:
    return Response(299)


@pytest.mark.parametrize("handler", [broken, broken_later, bad_header, bad_status])
async def test_a_bug_in_a_handler_is_500_and_a_log_line(
    handler: Handler, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    error = b"500 Internal Server Error"
    data = GET + b"HEAD /2 HTTP/1.0\r\n\r\n"
    expected = answer(error, error) + answer(error, error, b"Connection: close").removesuffix(error)
    assert await exchange(data, handler) == expected
    records = [(r.name, r.levelno, r.getMessage(), bool(r.exc_info)) for r in caplog.records]
    assert records == [
        ("clusterproxy.http1", logging.ERROR, "handler failed: GET /", True),
        ("clusterproxy.http1", logging.ERROR, "handler failed: HEAD /2", True),
    ]


async def test_silence_is_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    start = trio.current_time()
    assert await exchange(b"", idle_timeout_s=30, header_timeout_s=500) == b""
    assert trio.current_time() - start == pytest.approx(30, abs=2)


async def test_silence_after_an_answer_is_cut_off(autojump_clock: trio.testing.MockClock) -> None:
    start = trio.current_time()
    assert await exchange(GET, idle_timeout_s=30, header_timeout_s=500) == answer(b"GET /")
    assert trio.current_time() - start == pytest.approx(30, abs=2)


async def drip(client: Client) -> None:
    while True:
        await client.send_all(b"x")
        await trio.sleep(1)


@pytest.mark.parametrize(
    "beginning",
    [
        b"GET / HTTP/1.1\r\nX: ",
        b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: 60000\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nfff\r\n",
    ],
    ids=["head", "body", "chunk"],
)
async def test_slowloris_is_cut_off(
    beginning: bytes, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(header_timeout_s=20, idle_timeout_s=500) as client:
        start = trio.current_time()
        await client.send_all(beginning)
        with pytest.raises(trio.BrokenResourceError):
            await drip(client)
        assert trio.current_time() - start == pytest.approx(20 + LINGER_S, abs=2)
        assert without_date(await read_all(client)) == refusal(b"408 Request Timeout")


class OneWay(trio.abc.Stream):
    """A stream that cannot half-close; reading and writing are replaced by each test."""

    def __init__(
        self,
        *,
        incoming: list[bytes],
        send: Callable[[bytes], object] = bytes,
        blocked: bool = False,
    ) -> None:
        self.incoming = incoming
        self.send = send
        self.blocked = blocked
        self.closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()
        self.send(bytes(data))
        if self.blocked:
            await trio.sleep_forever()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if not self.incoming:
            await trio.sleep_forever()
        return self.incoming.pop(0)

    async def aclose(self) -> None:
        self.closed = True
        await trio.lowlevel.checkpoint()


async def test_who_does_not_take_the_answer_is_cut_off(
    autojump_clock: trio.testing.MockClock,
) -> None:
    stream = OneWay(incoming=[GET], blocked=True)
    start = trio.current_time()
    await serve_http(stream, hello, idle_timeout_s=7)
    assert trio.current_time() - start == 7
    assert stream.closed


async def test_a_broken_stream_is_no_error() -> None:
    def fail(_data: bytes) -> None:
        raise trio.BrokenResourceError

    stream = OneWay(incoming=[GET], send=fail)
    await serve_http(stream, hello)
    assert stream.closed


async def test_a_refusal_waits_a_moment_for_the_peer_to_read_it(
    autojump_clock: trio.testing.MockClock,
) -> None:
    sent: list[bytes] = []
    stream = OneWay(incoming=[b"garbage\r\n\r\n", b"more"], send=sent.append)
    start = trio.current_time()
    await serve_http(stream, hello)
    assert without_date(b"".join(sent)) == refusal(b"400 Bad Request")
    assert trio.current_time() - start == LINGER_S
    assert (stream.closed, stream.incoming) == (True, [])


@pytest.mark.parametrize("blocked", [False, True], ids=["idle", "in an answer"])
async def test_cancellation_closes_the_stream(blocked: bool) -> None:
    stream = OneWay(incoming=[GET], blocked=blocked)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_http, stream, hello)
        await trio.testing.wait_all_tasks_blocked()
        assert not stream.closed
        nursery.cancel_scope.cancel()
    assert stream.closed


async def test_cancellation_reaches_the_handler() -> None:
    async def forever(_request: Request) -> Response:
        await trio.sleep_forever()
        raise AssertionError

    stream = OneWay(incoming=[GET])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_http, stream, forever)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert stream.closed


fragments = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            GET,
            b"GET /",
            b"HEAD / HTTP/1.1\r\nHost: h\r\n",
            b"POST / HTTP/1.0\r\n",
            b" HTTP/1.1\r\n",
            b"Host: h\r\n",
            b"Content-Length: 5\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"Expect: 100-continue\r\n",
            b"Connection: keep-alive\r\n",
            b"Upgrade: h2c\r\nConnection: upgrade\r\n",
            b"\r\n",
            b"\r\n\r\n",
            b"5\r\nhello\r\n",
            b"0\r\n\r\n",
            b"x" * 5000,
        ]
    ),
)


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(fragments, max_size=12))
def test_garbage_never_crashes_the_server(pieces: list[bytes]) -> None:
    sent: list[bytes] = []

    async def run() -> None:
        stream = OneWay(incoming=[*filter(None, pieces), b""], send=sent.append)
        with trio.fail_after(3600):
            await serve_http(stream, hello)
        assert stream.closed

    trio.run(run, clock=trio.testing.MockClock(autojump_threshold=0))
    # Whatever comes back is a sequence of whole answers.
    for message in sent:
        assert re.match(rb"HTTP/1\.1 (200|400|405|408|413|431|501) ", message)
