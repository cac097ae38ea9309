"""Requests and answers as they pass, over HTTP/1.1."""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing
from harness import tcp_pair
from proxy_stage import GET, OK, Peer, staged

from clusterproxy.errors import DialError, DialReason
from clusterproxy.http1.bodies import ChunkedBody
from clusterproxy.reverse_proxy.exchange import Answer, Forward, Request
from clusterproxy.reverse_proxy.origin import Connection, Origin, Pool

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def request(*lines: bytes, method: bytes = b"GET", minor: int = 1) -> bytes:
    start = b"%b /path?q HTTP/1.%d" % (method, minor)
    return b"\r\n".join((start, b"Host: one.example", *lines, b"", b""))


def fields_of(head: bytes) -> list[tuple[bytes, bytes]]:
    lines = head.split(b"\r\n")[1:-2]
    return [(name, value) for name, _, value in (line.partition(b": ") for line in lines)]


async def until_broken(origin: Peer) -> bytes:
    """Return what comes until the connection ends, be it in order (in memory they all do)."""
    with suppress(trio.BrokenResourceError):
        return await origin.rest()
    return b""


async def test_a_request_and_its_answer(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(request(b"Accept: */*", b"accept: b", b"Authorization: Bearer t"))
        origin = await stage.dialled()
        assert await stage.asked(origin) == (
            b"GET /path?q HTTP/1.1\r\nHost: one.example\r\nAccept: */*\r\nAccept: b\r\n"
            b"Authorization: Bearer t\r\n\r\n"
        )
        await origin.send(b"HTTP/1.1 200 Fine\r\nContent-Length: 5\r\nEtag: a\r\n\r\nhello")
        assert await client.until(b"hello") == (
            b"HTTP/1.1 200 Fine\r\nEtag: a\r\nContent-Length: 5\r\n\r\nhello"
        )
        (seen,) = stage.requests
        assert (seen.method, seen.target, seen.secure) == ("GET", b"/path?q", False)
        await client.send(GET)
        await stage.asked(origin)
        await origin.send(OK)
        await client.until(b"hello")
        assert stage.dials == 1
        assert stage.notes.results == [("GET", 200)] * 2
        assert stage.notes.open == 0


async def test_what_concerns_one_hop_stays(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        hop = (
            b"Connection: X-Mine, close, Host, keep-alive", b"X-Mine: 1", b"Keep-Alive: 5", b"Proxy-Connection: a",
            b"Proxy-Authenticate: a", b"Proxy-Authorization: a", b"TE: gzip", b"Trailer: A", b"Upgrade: websocket",
        )  # fmt: skip
        await client.send(request(*hop, b"X-Other: 2"))
        origin = await stage.dialled()
        asked = await stage.asked(origin)
        assert fields_of(asked) == [(b"Host", b"one.example"), (b"X-Other", b"2")]
        assert [name for name, _ in stage.requests[0].headers] == [b"host", b"x-other"]
        answer = (
            b"HTTP/1.1 200 OK\r\nConnection: X-Theirs\r\nX-Theirs: 1\r\nKeep-Alive: 5\r\n"
            b"Upgrade: h2c\r\nProxy-Authenticate: a\r\nContent-Length: 0\r\nX-Other: 2\r\n\r\n"
        )
        await origin.send(answer)
        assert fields_of(await client.until()) == [
            (b"X-Other", b"2"),
            (b"Content-Length", b"0"),
            (b"Connection", b"close"),
        ]


async def test_nobody_takes_away_what_the_program_sets(autojump_clock: object) -> None:
    async with staged() as stage:

        async def decide(request: Request) -> Forward:
            headers = [*request.headers, (b"impersonate-user", b"alice")]
            return Forward(stage.origin, request.target, headers)

        stage.decide = decide
        client = stage.client()
        await client.send(request(b"Connection: Impersonate-User, Authorization, close"))
        asked = await stage.asked(await stage.dialled())
        assert (b"Impersonate-User", b"alice") in fields_of(asked)


async def test_what_the_program_leaves_in_of_one_hop_stays_too(autojump_clock: object) -> None:
    async with staged() as stage:

        async def decide(request: Request) -> Forward:
            headers = [
                *request.headers,
                (b"transfer-encoding", b"chunked"),
                (b"content-length", b"7"),
            ]
            return Forward(stage.origin, request.target, headers)

        stage.decide = decide
        client = stage.client()
        await client.send(GET)
        asked = await stage.asked(await stage.dialled())
        assert fields_of(asked) == [(b"Host", b"one.example")]


@pytest.mark.parametrize("value", [b"a\r\nImpersonate-Group: system:masters", b"a\nb", b"\0"])
async def test_a_value_that_is_two_fields_is_not_sent(autojump_clock: object, value: bytes) -> None:
    async with staged() as stage:

        async def decide(request: Request) -> Forward:
            return Forward(stage.origin, request.target, [(b"impersonate-user", value)])

        stage.decide = decide
        client = stage.client()
        await client.send(GET)
        head = await client.until()
        assert head.startswith(b"HTTP/1.1 502 ")
        assert stage.dials == 0


@pytest.mark.parametrize("target", [b"", b"a", b"/a b", b"/a\r\nb", b"http://x/"])
async def test_a_target_that_is_none_is_not_sent(autojump_clock: object, target: bytes) -> None:
    async with staged() as stage:

        async def decide(request: Request) -> Forward:
            return Forward(stage.origin, target, request.headers)

        stage.decide = decide
        client = stage.client()
        await client.send(GET)
        assert (await client.until()).startswith(b"HTTP/1.1 502 ")
        assert await client.until(b"\n") == b"failed because invalid request target\n"


async def test_an_answer_of_our_own(autojump_clock: object) -> None:
    async with staged() as stage:

        async def decide(request: Request) -> Answer:
            return Answer(403, "not you", [(b"x-why", b"because")])

        stage.decide = decide
        client = stage.client()
        await client.send(GET)
        fields = dict(fields_of(await client.until()))
        assert fields.pop(b"Date").endswith(b" GMT")
        assert fields == {
            b"X-Why": b"because",
            b"Content-Type": b"text/plain; charset=utf-8",
            b"X-Content-Type-Options": b"nosniff",
            b"Content-Length": b"8",
        }
        assert await client.until(b"\n") == b"not you\n"
        # Without a body to one who does not want it, and the connection goes on.
        await client.send(request(method=b"HEAD"))
        assert b"Content-Length: 8\r\n" in await client.until()
        await client.send(GET)
        assert (await client.until()).startswith(b"HTTP/1.1 403 Forbidden\r\n")


async def test_an_answer_without_words(autojump_clock: object) -> None:
    async with staged() as stage:

        async def decide(request: Request) -> Answer:
            return Answer(599, "")

        stage.decide = decide
        client = stage.client()
        await client.send(GET)
        head = await client.until()
        assert head.startswith(b"HTTP/1.1 599 status code 599\r\nDate: ")
        assert b"Content-Type" not in head


async def test_a_bug_of_the_program_is_not_told(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged() as stage:

        async def decide(request: Request) -> Answer:
            raise ZeroDivisionError("secret")

        stage.decide = decide
        client = stage.client()
        await client.send(GET)
        assert (await client.until()).startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
        assert await client.until(b"\n") == b"Internal Server Error\n"
        assert "bug while serving a request" in caplog.text


# -- bodies of requests --------------------------------------------------------------------------------


async def test_a_body_with_a_length(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(request(b"Content-Length: 10", method=b"POST") + b"01234")
        origin = await stage.dialled()
        asked = await stage.asked(origin)
        assert (b"Content-Length", b"10") in fields_of(asked)
        assert await origin.exactly(5) == b"01234"
        # What comes behind is the next request.
        await client.send(b"56789" + GET)
        assert await origin.exactly(5) == b"56789"
        await origin.send(OK)
        await client.until(b"hello")
        assert (await stage.asked(origin)).startswith(b"GET /path?q ")
        await origin.send(OK)
        await client.until(b"hello")


async def test_a_chunked_body_with_trailers(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(
            request(
                b"Transfer-Encoding: chunked",
                b"Trailer: X-Sum, Authorization",
                b"Connection: TE",
                b"TE: trailers",
                method=b"PUT",
            )
            + b"5;ext"
        )
        origin = await stage.dialled()
        assert fields_of(await stage.asked(origin))[1:] == [
            (b"Te", b"trailers"),
            (b"Transfer-Encoding", b"chunked"),
            (b"Trailer", b"X-Sum"),
        ]
        await client.send(b"=1\r")
        await trio.sleep(1)
        await client.send(b"\nhello\r\n")
        assert await origin.until(b"hello\r\n") == b"5\r\nhello\r\n"
        await client.send(b"0\r\nX-Sum: 7\r\nAuthorization: me\r\nImpersonate-User: root\r\n\r\n")
        assert await origin.until() == b"0\r\nX-Sum: 7\r\n\r\n"
        await origin.send(OK)
        await client.until(b"hello")
        await client.send(GET)
        assert (await stage.asked(origin)).startswith(b"GET ")


@pytest.mark.parametrize("method", [b"POST", b"PUT", b"PATCH"])
async def test_no_body_is_said_where_one_is_usual(autojump_clock: object, method: bytes) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(request(method=method))
        asked = await stage.asked(await stage.dialled())
        assert fields_of(asked)[1:] == [(b"Content-Length", b"0")]


async def test_a_body_that_breaks_off(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(request(b"Transfer-Encoding: chunked", method=b"POST") + b"5\r\nhel")
        origin = await stage.dialled()
        await stage.asked(origin)
        assert await origin.until(b"\r\n") == b"3\r\n"
        await client.aclose()
        # Without the last chunk.
        assert await until_broken(origin) == b"hel\r\n"
        assert stage.notes.results == [("POST", 499)]


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"zz\r\n", b"400 Bad Request", b"malformed chunked encoding"),
        (
            b"0\r\n" + b"a:\r\n" * 10_001 + b"\r\n",
            b"431 Request Header Fields Too Large",
            b"too many header fields",
        ),
    ],
)
async def test_a_body_that_is_none(
    autojump_clock: object, body: bytes, status: bytes, text: bytes
) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(request(b"Transfer-Encoding: chunked", method=b"POST") + body)
        origin = await stage.dialled()
        await stage.asked(origin)
        answer = await client.rest()
        assert answer.startswith(b"HTTP/1.1 %b\r\n" % status)
        assert answer.endswith(b"\r\n\r\n%b: %b\n" % (status, text))
        await until_broken(origin)


async def test_an_answer_before_the_end_of_the_body(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(request(b"Content-Length: 10", method=b"POST") + b"01234")
        origin = await stage.dialled()
        await stage.asked(origin)
        await origin.send(b"HTTP/1.1 413 Too Much\r\nContent-Length: 2\r\n\r\nno")
        head = await client.until()
        assert head.startswith(b"HTTP/1.1 413 Too Much\r\n")
        assert b"Connection: close\r\n" in head
        assert await client.rest() == b"no"
        # Neither connection can be used again.
        assert stage.pool.waiting == 0


async def test_both_directions_at_once(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(request(b"Transfer-Encoding: chunked", method=b"POST"))
        origin = await stage.dialled()
        await stage.asked(origin)
        await origin.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        await client.until()
        for word in (b"one", b"two"):
            await client.send(b"3\r\n%b\r\n" % word)
            assert await origin.exactly(8) == b"3\r\n%b\r\n" % word
            await origin.send(b"3\r\n%b\r\n" % word)
            assert await client.exactly(8) == b"3\r\n%b\r\n" % word
        await client.send(b"0\r\n\r\n")
        assert await origin.until() == b"0\r\n\r\n"
        await origin.send(b"0\r\n\r\n")
        assert await client.rest() == b"0\r\n\r\n"


async def test_an_early_answer_of_our_own_takes_the_body_that_is_here(
    autojump_clock: object,
) -> None:
    async with staged() as stage:

        async def decide(request: Request) -> Answer:
            return Answer(403, "no")

        stage.decide = decide
        client = stage.client()
        post = request(b"Content-Length: 5", method=b"POST")
        await client.send(post + b"hello" + GET)
        assert b"Connection" not in await client.until()
        assert await client.until(b"\n") == b"no\n"
        await client.until()
        # But nobody waits for the rest of one, or reads one that makes no sense.
        await client.send(post + b"he")
        assert b"Connection: close" in await client.until()
        client = stage.client()
        await client.send(request(b"Transfer-Encoding: chunked", method=b"POST") + b"zz\r\n")
        assert b"Connection: close" in await client.until()


# -- 1xx -----------------------------------------------------------------------------------------------


async def test_the_origin_asks_for_the_body(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(request(b"Expect: 100-continue", b"Content-Length: 5", method=b"PUT"))
        origin = await stage.dialled()
        began = trio.current_time()
        assert (b"Expect", b"100-continue") in fields_of(await stage.asked(origin))
        await origin.send(
            b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
        )
        assert await client.until() == b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n"
        assert await client.until() == b"HTTP/1.1 100 Continue\r\n\r\n"
        await client.send(b"hello")
        assert await origin.exactly(5) == b"hello"
        await origin.send(b"HTTP/1.1 100 Continue\r\n\r\n" + OK)
        assert await client.until(b"hello") == OK
        assert trio.current_time() == began


async def test_an_origin_that_does_not_ask_gets_the_body_after_a_second(
    autojump_clock: object,
) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(request(b"Expect: 100-continue", b"Content-Length: 5", method=b"PUT"))
        origin = await stage.dialled()
        await stage.asked(origin)
        began = trio.current_time()
        assert await client.until() == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert trio.current_time() - began == pytest.approx(1, abs=0.1)
        await client.send(b"hello")
        assert await origin.exactly(5) == b"hello"
        await origin.send(b"HTTP/1.1 100 Continue\r\n\r\n" + OK)
        assert await client.until(b"hello") == OK
        await client.send(GET)
        await stage.asked(origin)


async def test_an_origin_that_does_not_want_the_body(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(request(b"Expect: 100-continue", b"Content-Length: 5", method=b"PUT"))
        origin = await stage.dialled()
        await stage.asked(origin)
        await origin.send(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n")
        head = await client.rest()
        assert head.startswith(b"HTTP/1.1 401 Unauthorized\r\n")
        assert b"Connection: close" in head
        assert await origin.rest() == b""


async def test_nobody_expects_anything_without_a_body(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(request(b"Expect: 100-continue"))
        origin = await stage.dialled()
        assert fields_of(await stage.asked(origin)) == [(b"Host", b"one.example")]
        await origin.send(b"HTTP/1.1 100 Continue\r\n\r\n" + OK)
        assert await client.until(b"hello") == OK


async def test_other_expectations_are_not_met(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(request(b"Expect: wonders"))
        assert (await client.rest()).startswith(b"HTTP/1.1 417 Expectation Failed\r\n")
        assert not stage.requests


async def test_too_many_informational_responses(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        origin = await stage.dialled()
        await origin.send(b"HTTP/1.1 102 Processing\r\n\r\n" * 101)
        answer = await client.until(
            b"failed because net/http: too many 1xx informational responses\n"
        )
        assert answer.count(b"HTTP/1.1 102 Processing\r\n\r\n") == 100


async def test_informational_responses_that_are_too_large(autojump_clock: object) -> None:
    """A client that takes nothing has all of them kept."""
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        origin = await stage.dialled()
        hints = b"HTTP/1.1 103 Early Hints\r\nLink: %b\r\n\r\n" % (b"a" * 300_000)
        with suppress(trio.BrokenResourceError):
            for _ in range(10):
                await origin.send(hints)
        answer = await client.until(
            b"failed because net/http: too many 1xx informational responses\n"
        )
        assert answer.count(b"HTTP/1.1 103 Early Hints\r\n") == 3


async def test_http_1_0_hears_nothing_of_1xx(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(
            request(b"Expect: 100-continue", b"Content-Length: 1", method=b"PUT", minor=0) + b"a"
        )
        origin = await stage.dialled()
        assert b"Expect" not in dict(fields_of(await stage.asked(origin)))
        await origin.send(b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK)
        assert await client.rest() == OK


# -- bodies of responses -------------------------------------------------------------------------------


async def test_what_comes_is_passed_on_at_once(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        origin = await stage.dialled()
        await origin.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert await client.until() == b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        for event in (b"one", b"two"):
            await origin.send(b"3;a\r\n%b\r\n" % event)
            assert await client.exactly(8) == b"3\r\n%b\r\n" % event
            await trio.sleep(3600)
        await origin.send(b"0\r\n")
        await origin.send(b"\r\n")
        assert await client.until() == b"0\r\n\r\n"
        assert stage.pool.waiting == 1


async def whole(peer: Peer) -> bytes:
    """Return a chunked body."""
    body, content = ChunkedBody(), b""
    while not body.done:
        view = b"" if body.more else await peer.exactly(1)
        content += b"".join(body.feed(view))
    return content


async def test_tiny_chunks_arrive_whole(autojump_clock: object) -> None:
    """They are taken in turns with what others want; nothing is waited for that is there already."""
    content = bytes(range(256)) * 100
    tiny = b"".join(b"1\r\n%c\r\n" % byte for byte in content) + b"0\r\n\r\n"
    chunked = b"Transfer-Encoding: chunked"
    async with staged() as stage, trio.open_nursery() as nursery:
        client = stage.client()
        await client.send(request(chunked, method=b"POST"))
        origin = await stage.dialled()
        await stage.asked(origin)
        nursery.start_soon(client.send, tiny)
        assert await whole(origin) == content
        nursery.start_soon(origin.send, b"HTTP/1.1 200 OK\r\n%b\r\n\r\n%b" % (chunked, tiny))
        await client.until()
        assert await whole(client) == content
        await client.send(GET)
        assert (await stage.asked(origin)).startswith(b"GET ")


async def test_trailers_of_a_response(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        origin = await stage.dialled()
        await origin.send(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: x-sum\r\nTrailer: Set-Cookie\r\n\r\n"
            b"2\r\nhi\r\n0\r\nX-Sum: 1\r\nX-Unannounced: 2\r\nContent-Length: 9\r\n\r\n"
        )
        assert b"\r\nTrailer: X-Sum\r\n" in await client.until()
        assert await client.until() == b"2\r\nhi\r\n0\r\nX-Sum: 1\r\nX-Unannounced: 2\r\n\r\n"


async def test_a_body_that_ends_with_its_connection(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        origin = await stage.dialled()
        await origin.send(b"HTTP/1.0 200 OK\r\n\r\nhello")
        await client.until()
        assert await client.exactly(10) == b"5\r\nhello\r\n"
        await origin.eof()
        assert await client.until() == b"0\r\n\r\n"
        assert stage.pool.waiting == 0
        await client.send(GET)
        await stage.dialled()


@pytest.mark.parametrize(
    ("method", "answer", "declared"),
    [
        (b"HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"Content-Length: 5\r\n"),
        (b"HEAD", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b""),
        (b"HEAD", b"HTTP/1.1 200 OK\r\n\r\n", b""),
        (
            b"GET",
            b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
            b"Content-Length: 5\r\n",
        ),
        (b"GET", b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", b""),
    ],
)
async def test_no_body(
    autojump_clock: object, method: bytes, answer: bytes, declared: bytes
) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(request(method=method))
        origin = await stage.dialled()
        await stage.asked(origin)
        await origin.send(answer)
        line = answer[: answer.index(b"\n") + 1]
        assert await client.until() == line + declared + b"\r\n"
        await client.send(GET)
        await stage.asked(origin)
        await origin.send(OK)
        assert await client.until(b"hello") == OK


@pytest.mark.parametrize("keep", [b"", b"Connection: keep-alive"])
async def test_http_1_0_gets_what_it_understands(autojump_clock: object, keep: bytes) -> None:
    async with staged() as stage:
        client = stage.client()
        lines = (keep,) if keep else ()
        await client.send(request(*lines, minor=0))
        origin = await stage.dialled()
        assert (await stage.asked(origin)).startswith(b"GET /path?q HTTP/1.1\r\n")
        await origin.send(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n"
        )
        assert await client.rest() == b"HTTP/1.1 200 OK\r\n\r\nhi"


async def test_a_request_without_host_gets_that_of_the_origin(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(b"GET / HTTP/1.0\r\n\r\n")
        asked = await stage.asked(await stage.dialled())
        assert fields_of(asked) == [(b"Host", b"origin.example:80")]


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n",
    ],
)
async def test_a_body_that_is_cut_looks_cut(
    autojump_clock: object, answer: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        origin = await stage.dialled()
        await origin.send(answer)
        await origin.eof()
        got = await client.rest()
        assert got.startswith(b"HTTP/1.1 200 OK\r\n")
        assert not got.endswith(b"0\r\n\r\n")
        assert stage.notes.failures == ["the origin"]
        assert "request GET for the origin failed: " in caplog.text
        assert "path" not in caplog.text


async def test_a_body_that_is_cut_resets_http_1_0(autojump_clock: object) -> None:
    async with staged() as stage:
        stage.sockets = True
        client = stage.client()
        await client.send(request(minor=0))
        origin = await stage.dialled()
        await origin.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        assert await client.until(b"hello") == b"HTTP/1.1 200 OK\r\n\r\nhello"
        await origin.eof()
        # On a socket pair a reset looks like any other end; what tells them apart is seen with TCP below.
        await client.rest()
        assert stage.notes.failures == ["the origin"]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (b"nonsense\r\n\r\n", "malformed HTTP response"),
        (b"HTTP/1.1 200 OK\r\nA b\r\n\r\n", "malformed header field"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "conflicting Content-Length values"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", "bad Content-Length"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", "unsupported transfer encoding"),
        (b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "transfer encoding in an HTTP/1.0 response"),
        (b"HTTP/1.1 200", "unexpected EOF"),
        (b"", "EOF"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "EOF"),
        # To mend it took hours, in which nobody else was served.
        (b"HTTP/1.1 200 OK\r\nA: b" + b" " * 1_000_000 + b"c\r\nbad\r\n\r\n", "malformed header field"),
        (b"HTTP/1.1 200 OK\r\nA: " + b"x" * 1_100_000, "server response headers exceeded 1048576 bytes; aborted"),
    ],
)  # fmt: skip
async def test_no_answer(autojump_clock: object, answer: bytes, text: str) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        origin = await stage.dialled()
        await stage.asked(origin)
        await origin.send(answer)
        await origin.eof()
        assert (await client.until()).startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
        assert await client.until(b"\n") == f"failed because {text}\n".encode()
        # The client's own connection goes on.
        await client.send(GET)
        await (await stage.dialled()).send(OK)
        await client.until(b"hello")


async def test_old_servers_are_understood(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        origin = await stage.dialled()
        for answer in (
            b"HTTP/1.1 200 OK\nA: b\n c\nContent-Length: 2\n\nhi",
            b"HTTP/1.1 200 OK\nA: b\n c\r\nContent-Length: 2\n\r\nhi",
            b"HTTP/1.1 200 OK\r\nA: b\r\n\tc\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\nhi",
        ):
            await stage.asked(origin)
            for byte in answer:
                await origin.send(bytes((byte,)))
            assert await client.until(b"hi") == (
                b"HTTP/1.1 200 OK\r\nA: b c\r\nContent-Length: 2\r\n\r\nhi"
            )
            await client.send(GET)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\n", b"\n\r\n", b"\r\n\r\n"])
async def test_an_empty_line_in_a_body_ends_no_head(autojump_clock: object, end: bytes) -> None:
    """That of an old server ends at its own first one, whatever lines the body has."""
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        origin = await stage.dialled()
        await origin.until()
        await origin.send(b"HTTP/1.1 200 OK\nContent-Length: 9" + end + b"a\n\nb\r\n\r\nc")
        assert await client.until(b"c") == (
            b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\na\n\nb\r\n\r\nc"
        )


# -- connections to origins ----------------------------------------------------------------------------


async def test_an_origin_that_is_not_reached(autojump_clock: object) -> None:
    async with staged() as stage:
        stage.refusal = DialError(DialReason.ENDPOINT, "No agent available", address="c1:7443")
        client = stage.client()
        await client.send(GET)
        assert (await client.until()).startswith(b"HTTP/1.1 502 Bad Gateway\r\n")
        assert b"No agent available" in await client.until(b"\n")
        assert stage.notes.results == [("GET", 502)]
        assert stage.notes.failures == ["the origin"]


async def test_not_all_that_fails_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """Anybody may ask for a cluster that there is not, with a method of his own."""
    async with staged() as stage:
        stage.refusal = DialError(DialReason.ENDPOINT, "No agent available", address="c1:7443")
        client = stage.client()
        for _ in range(200):
            await client.send(request(method=b"A" * 1000))
            await client.until(b"No agent available")
            await client.until(b"\n")
        told = [record for record in caplog.records if record.levelname == "WARNING"]
        assert 10 <= len(told) < 100
        assert max(len(record.getMessage()) for record in told) < 300
        assert stage.notes.failures == ["the origin"] * 200
        await trio.sleep(1)
        caplog.clear()
        await client.send(GET)
        await client.until(b"No agent available")
        assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"OPTIONS", b"TRACE"])
async def test_a_stale_connection_is_replaced(autojump_clock: object, method: bytes) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        first = await stage.dialled()
        await stage.asked(first)
        await first.send(OK)
        await client.until(b"hello")
        await client.send(request(method=method))
        # It ends the connection as the next request is on its way.
        await stage.asked(first)
        await first.aclose()
        second = await stage.dialled()
        assert (await stage.asked(second)).startswith(method)
        await second.send(b"HTTP/1.1 204 No Content\r\n\r\n")
        assert await client.until() == b"HTTP/1.1 204 No Content\r\n\r\n"


@pytest.mark.parametrize(
    "again",
    [
        request(method=b"POST"),
        request(method=b"DELETE"),
        request(b"Content-Length: 1") + b"a",
        request(b"Expect: 100-continue", b"Content-Length: 5", method=b"POST"),
        request(b"Expect: 100-continue", b"Transfer-Encoding: chunked", method=b"PATCH"),
        request(
            b"Expect: 100-continue",
            b"Content-Length: 5",
            b"Connection: Upgrade",
            b"Upgrade: a",
        ),
    ],
)
async def test_what_may_have_happened_is_not_asked_for_again(
    autojump_clock: object, again: bytes
) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        first = await stage.dialled()
        await stage.asked(first)
        await first.send(OK)
        await client.until(b"hello")
        await client.send(again)
        await stage.asked(first)
        await first.aclose()
        with trio.fail_after(30):
            assert (await client.until()).startswith(b"HTTP/1.1 502 ")
        assert stage.dials == 1


async def test_a_body_that_was_not_asked_for_can_go_elsewhere(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        first = await stage.dialled()
        await stage.asked(first)
        await first.send(OK)
        await client.until(b"hello")
        await client.send(request(b"Expect: 100-continue", b"Content-Length: 5", method=b"PUT"))
        await stage.asked(first)
        await first.aclose()
        second = await stage.dialled()
        await stage.asked(second)
        await second.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        await client.until()
        await client.send(b"hello")
        assert await second.exactly(5) == b"hello"


async def test_a_new_connection_is_not_tried_twice(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        await (await stage.dialled()).aclose()
        assert (await client.until()).startswith(b"HTTP/1.1 502 ")
        assert stage.dials == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        OK + b"more than it said",
    ],
)
async def test_connections_that_serve_once(autojump_clock: object, answer: bytes) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        origin = await stage.dialled()
        await origin.send(answer)
        await client.until(b"hello")
        await stage.asked(origin)
        assert await origin.rest() == b""
        await client.send(GET)
        await stage.dialled()


async def test_connections_are_not_waited_for(autojump_clock: object) -> None:
    async with staged() as stage:
        clients = [stage.client() for _ in range(5)]
        for client in clients:
            await client.send(GET)
        origins = [await stage.dialled() for _ in clients]
        for origin in origins:
            await origin.send(OK)
        for client in clients:
            await client.until(b"hello")
        assert stage.pool.waiting == 5


# -- clients that leave --------------------------------------------------------------------------------


async def leave(client: object) -> None:
    await client.aclose()  # type: ignore[attr-defined]


async def half_close(client: object) -> None:
    await client.eof()  # type: ignore[attr-defined]


@pytest.mark.parametrize("go", [leave, half_close])
@pytest.mark.parametrize("head", [GET, request(b"Content-Length: 1", method=b"POST") + b"a"])
async def test_a_client_that_leaves_ends_its_request(
    autojump_clock: object, head: bytes, go: Callable[[object], Awaitable[None]]
) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(head)
        origin = await stage.dialled()
        await stage.asked(origin)
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        await go(client)
        await until_broken(origin)
        assert trio.current_time() == began
        assert stage.notes.results[0][1] == 499


async def test_a_client_that_leaves_while_its_request_is_decided(autojump_clock: object) -> None:
    async with staged() as stage:
        cancelled = trio.Event()

        async def decide(request: Request) -> Answer:
            try:
                await trio.sleep_forever()
            finally:
                cancelled.set()
            raise AssertionError

        stage.decide = decide
        client = stage.client()
        await client.send(GET)
        await trio.testing.wait_all_tasks_blocked()
        await client.aclose()
        await cancelled.wait()


async def test_a_client_that_leaves_a_watch(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        origin = await stage.dialled()
        await stage.asked(origin)
        await origin.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await client.until(b"hello\r\n")
        await client.aclose()
        await until_broken(origin)
        assert stage.notes.results == [("GET", 200)]
        assert not stage.notes.failures


async def test_a_slow_client_slows_its_origin(autojump_clock: object) -> None:
    async with staged() as stage:
        stage.sockets = True
        client = stage.client()
        await client.send(GET)
        origin = await stage.dialled()
        await origin.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        sent = 0
        with trio.move_on_after(1):
            while True:
                await origin.send(bytes(10_000))
                sent += 10_000
        # Socket buffers, and a read or two of ours.
        assert sent < 3_000_000
        before = sent
        await client.until()
        await client.exactly(before - 50_000)
        with trio.move_on_after(1):
            while True:
                await origin.send(bytes(10_000))
                sent += 10_000
        assert sent >= before + 50_000


async def test_a_slow_origin_slows_its_client(autojump_clock: object) -> None:
    async with staged() as stage:
        stage.sockets = True
        client = stage.client()
        await client.send(request(b"Content-Length: 100000000", method=b"PUT"))
        origin = await stage.dialled()
        sent = 0
        with trio.move_on_after(1):
            while True:
                await client.send(bytes(10_000))
                sent += 10_000
        assert sent < 3_000_000
        before = sent
        await stage.asked(origin)
        await origin.exactly(before - 50_000)
        with trio.move_on_after(1):
            while True:
                await client.send(bytes(10_000))
                sent += 10_000
        assert sent >= before + 50_000


# -- what seldom happens -------------------------------------------------------------------------------


class Buggy(Pool):
    def put(self, connection: Connection) -> None:
        raise ZeroDivisionError


async def test_a_bug_of_ours_behind_the_answer_ends_the_connection(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    async with staged(pool=Buggy()) as stage:
        client = stage.client()
        await client.send(GET)
        await (await stage.dialled()).send(OK)
        assert await client.rest() == OK
        assert "bug while serving a request" in caplog.text


async def test_an_origin_that_takes_no_more_of_the_body_may_say_why(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(request(b"Content-Length: 10", method=b"POST"))
        origin = await stage.dialled()
        await stage.asked(origin)
        assert isinstance(origin.stream, trio.StapledStream)
        await origin.stream.receive_stream.aclose()
        await client.send(b"01234")
        await trio.sleep(1)
        await origin.send(b"HTTP/1.1 413 Too Much\r\nContent-Length: 2\r\n\r\nno")
        assert (await client.rest()).endswith(b"no")


async def test_a_client_that_leaves_while_it_is_read(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(request(b"Content-Length: 10", method=b"POST"))
        origin = await stage.dialled()
        await stage.asked(origin)
        await origin.send(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await trio.sleep(1)
        # With something unread that is a reset.
        await client.aclose()
        assert await until_broken(origin) == b""
        assert stage.notes.results == [("POST", 499)]


async def test_a_client_that_resets_while_nobody_takes_its_body() -> None:
    """Otherwise it would leave behind a connection to the origin for each that it had, for as long as the origin likes."""
    async with staged() as stage:
        stage.sockets = True
        ours, theirs = tcp_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage.server.serve, theirs)
            client = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
            await client.send_all(request(b"Content-Length: 100000000", method=b"POST"))
            origin = await stage.dialled()
            await stage.asked(origin)
            with trio.move_on_after(1):
                await client.send_all(bytes(50_000_000))
            assert stage.notes.open == 1
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes((1, 0, 0, 0, 0, 0, 0, 0)))
            await client.aclose()
            with trio.fail_after(10):
                while stage.notes.open:  # noqa: ASYNC110
                    await trio.sleep(0.01)


async def test_a_client_that_has_left_before_its_body_was_read(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(request(b"Content-Length: 5", method=b"POST"))
        origin = await stage.dialled()
        await stage.asked(origin)
        (connection,) = stage.server.http1
        connection.hung_up(False)
        await trio.sleep(1)
        assert stage.notes.open == 1
        await client.send(b"hello")
        await until_broken(origin)
        assert stage.notes.results == [("POST", 499)]


class Broken(trio.abc.Stream):
    """A stream that breaks once it has said its say."""

    def __init__(self, *said: bytes) -> None:
        self._said = list(said)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        if self._said:
            return self._said.pop(0)
        raise trio.BrokenResourceError("cut off")

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await trio.lowlevel.checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    ("said", "line", "rest"),
    [
        ((), b"HTTP/1.1 502 Bad Gateway\r\n", b"failed because cut off\n"),
        ((b"HTTP/1.1 2",), b"HTTP/1.1 502 Bad Gateway\r\n", b"failed because unexpected EOF: cut off\n"),
        ((b"HTTP/1.1 200 OK\r\n\r\n", b"a"), b"HTTP/1.1 200 OK\r\n", b"\r\n\r\n1\r\na\r\n"),
        ((b"HTTP/1.1 101 Go\r\nConnection: Upgrade\r\nUpgrade: a\r\n\r\n", b"a"), b"HTTP/1.1 101 Go\r\n", b"\r\n\r\na"),
    ],
)  # fmt: skip
async def test_an_origin_that_breaks(
    autojump_clock: object, said: tuple[bytes, ...], line: bytes, rest: bytes
) -> None:
    async with staged() as stage:

        async def connect() -> Broken:
            return Broken(*said)

        origin = Origin(scheme="http", host="a", port=1, pool=stage.pool, connect=connect)

        async def decide(request: Request) -> Forward:
            return Forward(origin, request.target, request.headers)

        stage.decide = decide
        client = stage.client()
        await client.send(request(b"Connection: Upgrade, close", b"Upgrade: a"))
        got = await client.rest()
        assert got.startswith(line)
        assert got.endswith(rest)


async def test_an_origin_that_does_not_even_take_the_request(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        origin = await stage.dialled()
        await stage.asked(origin)
        await origin.send(OK)
        await client.until(b"hello")
        assert isinstance(origin.stream, trio.StapledStream)
        await origin.stream.receive_stream.aclose()
        await client.send(GET)
        other = await stage.dialled()
        await other.send(OK)
        await client.until(b"hello")


async def test_an_end_of_the_server_in_the_middle_of_an_answer(autojump_clock: object) -> None:
    async with staged() as stage:
        client = stage.client()
        await client.send(GET)
        origin = await stage.dialled()
        await origin.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhe")
        assert b"Connection: close" not in await client.until()
        stage.server.drain()
        await origin.send(b"llo")
        assert await client.rest() == b"hello"
