"""Requests that come over HTTP/2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h2.events
import h2.settings
import pytest
import trio
import trio.testing
from proxy_stage import OK, Http2Peer, Peer, staged

from clusterproxy.reverse_proxy.exchange import Answer, Request
from clusterproxy.reverse_proxy.http2_server import Http2Exchange
from clusterproxy.reverse_proxy.limits import ServerLimits

if TYPE_CHECKING:
    from proxy_stage import Stage


async def open_request(
    stage: Stage, client: Http2Peer, **kwargs: object
) -> tuple[int, Peer, bytes]:
    """Send a request; return its stream, the origin and the head that it sees."""
    number = await client.request(**kwargs)  # type: ignore[arg-type]
    origin = await stage.dialled()
    return number, origin, await origin.until()


async def test_a_request_and_its_answer(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        number = await client.request(
            (b"accept", b"a"), (b"cookie", b"a=1"), (b"te", b"trailers"), (b"cookie", b"b=2")
        )
        origin = await stage.dialled()
        assert await origin.until() == (
            b"GET /path?q HTTP/1.1\r\nHost: one.example\r\nAccept: a\r\nCookie: a=1; b=2\r\n"
            b"X-Forwarded-For: 192.0.2.1\r\nTe: trailers\r\n\r\n"
        )
        await origin.send(
            b"HTTP/1.1 200 OK\r\nConnection: X-Hop\r\nX-Hop: 1\r\nEtag: a\r\nContent-Length: 5\r\n\r\nhello"
        )
        assert await client.response(number) == (200, {b"etag": b"a", b"content-length": b"5"})
        assert await client.body(number) == b"hello"
        assert stage.notes.results == [("GET", 200)]
        assert stage.requests[0].peer == "192.0.2.1"


async def test_requests_at_once(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        numbers = [await client.request() for _ in range(20)]
        origins = [await stage.dialled() for _ in numbers]
        for origin in reversed(origins):
            await origin.send(OK)
        for number in numbers:
            assert await client.body(number) == b"hello"
        assert stage.pool.waiting == 20


async def test_more_requests_than_allowed(autojump_clock: object) -> None:
    async with staged(ServerLimits(max_streams=2)) as stage:
        client = await stage.http2_client()
        await client.event(h2.events.RemoteSettingsChanged)
        assert client.h2.remote_settings.max_concurrent_streams == 2


@pytest.mark.parametrize("length", [True, False])
async def test_a_body(autojump_clock: object, *, length: bool) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        fields = ((b"content-length", b"300000"),) if length else ()
        number = await client.request(*fields, method=b"POST", end=False)
        origin = await stage.dialled()
        asked = await origin.until()
        assert (b"Content-Length: 300000\r\n" in asked) is length
        assert (b"Transfer-Encoding: chunked\r\n" in asked) is not length
        got = bytearray()

        async def read() -> None:
            while len(got) < 300_000:
                if length:
                    got.extend(await origin.stream.receive_some())
                else:
                    size = int(await origin.until(b"\r\n"), 16)
                    got.extend((await origin.exactly(size + 2))[:-2])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            sent = 0
            while sent < 300_000:
                size = min(300_000 - sent, 10_000, client.h2.local_flow_control_window(number))
                if not size:
                    await client.receive()
                    continue
                await client.data(number, b"x" * size, end=sent + size == 300_000)
                sent += size
        assert bytes(got) == b"x" * 300_000
        if not length:
            assert await origin.until() == b"0\r\n\r\n"
        await origin.send(OK)
        assert await client.body(number) == b"hello"


async def test_a_body_in_tiny_pieces(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        number, origin, _ = await open_request(stage, client, method=b"POST", end=False)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(1000):
            client.h2.send_data(number, b"ab")
        client.h2.end_stream(number)
        await client.flush()
        assert await origin.until() == b"7d0\r\n" + b"ab" * 1000 + b"\r\n0\r\n\r\n"


async def test_an_origin_that_does_not_take_the_body(autojump_clock: object) -> None:
    async with staged() as stage:
        stage.sockets = True
        client = await stage.http2_client()
        number = await client.request(method=b"POST", end=False)
        sent = 0
        with trio.move_on_after(2):
            while True:
                size = min(10_000, client.h2.local_flow_control_window(number))
                if size:
                    await client.data(number, bytes(size))
                    sent += size
                else:
                    await client.receive()
        # The window of the stream, a read of ours, and what sockets hold.
        assert sent < 2_000_000


async def test_trailers_of_a_request(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        number = await client.request((b"trailer", b"x-sum, te"), method=b"POST", end=False)
        origin = await stage.dialled()
        assert b"\r\nTrailer: X-Sum\r\n" in await origin.until()
        await client.data(number, b"hi")
        client.h2.send_headers(
            number, [(b"x-sum", b"1"), (b"authorization", b"x")], end_stream=True
        )
        await client.flush()
        assert await origin.until() == b"2\r\nhi\r\n0\r\nX-Sum: 1\r\n\r\n"


@pytest.mark.parametrize("body", [b"", b"hi"])
@pytest.mark.parametrize("field", [(b"x(sum)", b"1"), (b"x,sum", b"1")])
async def test_trailers_that_are_none(
    autojump_clock: object, body: bytes, field: tuple[bytes, bytes]
) -> None:
    """The origin waits for what cannot be sent on; the client is told."""
    async with staged() as stage:
        client = await stage.http2_client()
        number, origin, _ = await open_request(stage, client, method=b"POST", end=False)
        if body:
            client.h2.send_data(number, body)
        client.h2.send_headers(number, [field], end_stream=True)
        with trio.fail_after(5):
            await client.flush()
            assert (await client.response(number))[0] == 400
            assert await client.body(number) == b"400 Bad Request: malformed trailer field\n"
            assert await origin.rest() in {b"", b"2\r\nhi\r\n"}


async def test_trailers_of_a_response(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        number, origin, _ = await open_request(stage, client)
        await origin.send(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n2\r\nhi\r\n0\r\nX-Sum: 1\r\n\r\n"
        )
        assert await client.response(number) == (200, {b"trailer": b"X-Sum"})
        trailers = await client.event(h2.events.TrailersReceived, number)
        assert list(trailers.headers) == [(b"x-sum", b"1")]


async def test_what_comes_is_passed_on_at_once(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        number, origin, _ = await open_request(stage, client)
        await origin.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert await client.response(number) == (200, {})
        for event in (b"one", b"two"):
            await origin.send(b"3\r\n%b\r\n" % event)
            assert (await client.event(h2.events.DataReceived, number)).data == event
            await trio.sleep(3600)
        await origin.send(b"0\r\n\r\n")
        assert await client.body(number) == b""


async def test_tiny_chunks_share_frames(autojump_clock: object) -> None:
    content = b"a" * 20_000
    async with staged() as stage, trio.open_nursery() as nursery:
        client = await stage.http2_client()
        number, origin, _ = await open_request(stage, client)
        nursery.start_soon(
            origin.send,
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 20_000 + b"0\r\n\r\n",
        )  # fmt: skip
        assert await client.response(number) == (200, {})
        received, frames = 0, 0
        while received < len(content):
            received += len((await client.event(h2.events.DataReceived, number)).data)
            frames += 1
        assert frames < 1000
        assert await client.body(number) == b""


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
async def test_an_answer_of_our_own(autojump_clock: object, method: bytes) -> None:
    async with staged() as stage:

        async def decide(request: Request) -> Answer:
            return Answer(403, "no")

        stage.decide = decide
        client = await stage.http2_client()
        number = await client.request(method=method)
        status, fields = await client.response(number)
        assert (status, fields[b"content-length"]) == (403, b"3")
        assert await client.body(number) == (b"no\n" if method == b"GET" else b"")


async def test_an_answer_before_the_body(autojump_clock: object) -> None:
    async with staged() as stage:

        async def decide(request: Request) -> Answer:
            return Answer(403, "no")

        stage.decide = decide
        client = await stage.http2_client()
        number = await client.request(method=b"POST", end=False)
        assert (await client.response(number))[0] == 403
        assert await client.body(number) == b"no\n"
        assert (await client.event(h2.events.StreamReset, number)).error_code == 0


async def test_the_origin_asks_for_the_body(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        number = await client.request((b"expect", b"100-continue"), method=b"PUT", end=False)
        origin = await stage.dialled()
        assert b"\r\nExpect: 100-continue\r\n" in await origin.until()
        await origin.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        informational = await client.event(h2.events.InformationalResponseReceived, number)
        assert dict(informational.headers) == {b":status": b"100"}
        await client.data(number, b"hello", end=True)
        assert await origin.until() == b"5\r\nhello\r\n0\r\n\r\n"
        await origin.send(OK)
        assert (await client.response(number))[0] == 200


async def test_a_client_that_resets_ends_its_request(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        number, origin, _ = await open_request(stage, client)
        began = trio.current_time()
        client.h2.reset_stream(number)
        await client.flush()
        assert await origin.rest() == b""
        assert trio.current_time() == began
        assert stage.notes.results == [("GET", 499)]
        # Others go on.
        number, origin, _ = await open_request(stage, client)
        await origin.send(OK)
        assert await client.body(number) == b"hello"


async def test_a_client_that_resets_while_it_sends_its_body(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        number, origin, _ = await open_request(stage, client, method=b"POST", end=False)
        client.h2.reset_stream(number)
        await client.flush()
        assert not (await origin.rest()).endswith(b"0\r\n\r\n")


async def test_a_client_that_leaves_ends_its_requests(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        _, first, _ = await open_request(stage, client)
        _, second, _ = await open_request(stage, client)
        await client.stream.aclose()
        assert await first.rest() == await second.rest() == b""


async def test_a_body_that_is_cut_is_reset(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        number, origin, _ = await open_request(stage, client)
        await origin.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await origin.eof()
        assert (await client.response(number))[0] == 200
        reset = await client.event(h2.events.StreamReset, number)
        assert reset.error_code == 2


async def test_a_slow_client_slows_its_origin(autojump_clock: object) -> None:
    async with staged() as stage:
        stage.sockets = True
        client = await stage.http2_client()
        client.grants = False
        number, origin, _ = await open_request(stage, client)
        await origin.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
        sent = 0

        async def send() -> None:
            nonlocal sent
            while True:
                await origin.send(bytes(10_000))
                sent += 10_000

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            with trio.move_on_after(2):
                while True:
                    await client.receive()
            before = sent
            assert before < 2_000_000
            # But what it grants is sent, beside another request that is not slow.
            _, second, _ = await open_request(stage, client)
            await second.send(OK)
            client.h2.increment_flow_control_window(1_000_000)
            client.h2.increment_flow_control_window(1_000_000, number)
            await client.flush()
            with trio.move_on_after(2):
                while True:
                    await client.receive()
            assert sent > before + 500_000
            nursery.cancel_scope.cancel()


GOOD = [(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/"), (b":authority", b"a")]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ([*GOOD, (b"host", b"b")], None),
        ([*GOOD, (b"host", b"a"), (b"host", b"b")], None),
        ([*GOOD[:3], (b":authority", b"a b")], 400),
        ([*GOOD[:3], (b":authority", b"")], 400),
        ([(b":method", b"G T"), *GOOD[1:]], 400),
        ([(b":method", b"GET / HTTP/1.1\r\nA:"), *GOOD[1:]], None),
        ([*GOOD[:2], (b":path", b"a"), GOOD[3]], 400),
        ([*GOOD[:2], (b":path", b"http://b/"), GOOD[3]], 400),
        ([*GOOD[:2], (b":path", b"*"), GOOD[3]], 400),
        ([*GOOD[:2], (b":path", b"/ HTTP/1.1"), GOOD[3]], 400),
        ([*GOOD[:2], (b":path", b""), GOOD[3]], None),
        ([*GOOD, (b"expect", b"wonders")], 417),
        ([*GOOD, (b"a", b"x" * 1_060_000)], 431),
        ([*GOOD, (b"a b", b"c")], None),
        ([*GOOD, (b"a\xe4", b"c")], None),
        ([*GOOD, (b"a(", b"c")], 400),
        ([*GOOD, (b"A", b"c")], None),
        ([*GOOD, (b"a", b"b\r\nc: d")], None),
        ([*GOOD, (b"a", b"b\nc")], None),
        ([*GOOD, (b"a", b"b\0")], None),
        ([*GOOD, (b"connection", b"close")], None),
        ([*GOOD, (b"transfer-encoding", b"chunked")], None),
        ([*GOOD, (b"upgrade", b"websocket")], None),
        ([*GOOD, (b"keep-alive", b"1")], None),
        ([*GOOD, (b"proxy-connection", b"a")], None),
        ([*GOOD, (b"te", b"gzip")], None),
        ([*GOOD, (b":path", b"/b")], None),
        ([*GOOD, (b":authority", b"b")], None),
        ([*GOOD, (b"a", b"b"), (b":status", b"200")], None),
        ([*GOOD, (b":custom", b"b")], None),
        ([*GOOD[:2], GOOD[3]], None),
        ([(b":method", b"CONNECT"), (b":authority", b"a:1")], None),
        ([*GOOD, (b"content-length", b"5")], 400),
        ([*GOOD, (b"content-length", b"+0")], None),
        ([*GOOD, (b"content-length", b"0" * 19)], 400),
        ([*GOOD, (b"content-length", b"0"), (b"content-length", b"0")], 400),
        ([*GOOD, (b"content-length", b"0"), (b"content-length", b"1")], None),
    ],
)
async def test_what_is_no_request(
    autojump_clock: object, head: list[tuple[bytes, bytes]], status: int | None
) -> None:
    """None: the stream or its connection is ended."""
    async with staged() as stage:
        client = await stage.http2_client()
        while client.h2.max_outbound_frame_size == 16_384:
            await client.receive()
        number = client.h2.get_next_available_stream_id()
        client.h2.send_headers(number, head, end_stream=True)
        await client.flush()
        if status is None:
            while not any(
                isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated)
                or getattr(event, "headers", None) is not None
                for event in client.events
            ):
                if not await client.receive():
                    break
            for event in client.events:
                if isinstance(event, h2.events.ResponseReceived):
                    assert dict(event.headers)[b":status"] == b"400"
        else:
            assert (await client.response(number))[0] == status
            await client.body(number)
        assert not stage.requests
        assert stage.dials == 0


async def test_more_fields_than_an_honest_request_has(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        number = await client.request(*((b"a", b"") for _ in range(10_001)))
        assert (await client.response(number))[0] == 431
        assert not stage.requests


async def test_large_heads_take_turns_with_everybody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte can be a whole field: what is read at once is little."""
    opened = 0
    unpatched = Http2Exchange.open

    def count(*args: Any, **options: Any) -> int:
        nonlocal opened
        opened += 1
        return unpatched(*args, **options)

    monkeypatch.setattr(Http2Exchange, "open", count)
    async with staged() as stage:

        async def decide(request: Request) -> Answer:
            return Answer(403, "no")

        stage.decide = decide
        client = await stage.http2_client()
        for _ in range(120):
            number = client.h2.get_next_available_stream_id()
            head = [(b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/")]
            fields = [(b":authority", b"a"), *((b"a", b"") for _ in range(1000))]
            client.h2.send_headers(number, [*head, *fields], end_stream=True)
        data = client.h2.data_to_send()
        assert len(data) > 100_000
        most = before = 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.stream.send_all, data)
            while opened < 120:
                await trio.lowlevel.checkpoint()
                most, before = max(most, opened - before), opened
        # Two reads can be neighbours.
        assert most <= 70


async def test_a_body_of_another_length_than_was_said(autojump_clock: object) -> None:
    for sent in (b"hell", b"hello!"):
        async with staged() as stage:
            client = await stage.http2_client()
            number = await client.request((b"content-length", b"5"), method=b"POST", end=False)
            origin = await stage.dialled()
            await origin.until()
            client.h2.streams[number]._expected_content_length = None
            await client.data(number, sent, end=True)
            assert await origin.rest() in (b"", sent[:5], sent)
            assert stage.notes.results == [("POST", 499)]


async def test_the_host_may_come_as_a_field(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        await client.request((b"host", b"b.example"), authority=None)
        await (await stage.dialled()).until()
        await client.request((b"host", b"c.example"), authority=b"c.example")
        await (await stage.dialled()).until()
        assert [request.headers for request in stage.requests] == [
            [(b"host", b"b.example")],
            [(b"host", b"c.example")],
        ]


async def test_nobody_switches_protocols(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        number, origin, _ = await open_request(stage, client)
        await origin.send(
            b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: a\r\n\r\n"
        )
        assert (await client.response(number))[0] == 502


async def test_a_field_of_an_answer_that_cannot_be_sent(autojump_clock: object) -> None:
    async with staged() as stage:

        async def decide(request: Request) -> Answer:
            return Answer(403, "no", [(b"a", b"b\nc")])

        stage.decide = decide
        client = await stage.http2_client()
        number = await client.request()
        assert (await client.response(number))[0] == 500


async def test_two_hosts_without_an_authority(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        await client.request((b"host", b"a"), (b"host", b"b"), authority=None)
        while client.h2.state_machine.state.name != "CLOSED" and not any(
            isinstance(event, h2.events.ResponseReceived) for event in client.events
        ):
            if not await client.receive():
                break
        assert not stage.requests


async def test_a_body_whose_end_comes_late(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        number, origin, _ = await open_request(stage, client, method=b"POST", end=False)
        await client.data(number, b"hi")
        assert await origin.until(b"hi\r\n") == b"2\r\nhi\r\n"
        client.h2.end_stream(number)
        await client.flush()
        assert await origin.until() == b"0\r\n\r\n"


async def test_early_hints(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        number, origin, _ = await open_request(stage, client)
        await origin.send(b"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + OK)
        hints = await client.event(h2.events.InformationalResponseReceived, number)
        assert list(hints.headers) == [(b":status", b"103"), (b"link", b"a")]
        assert (await client.response(number))[0] == 200


async def test_a_client_that_sends_on_and_does_not_fetch_the_answer(
    autojump_clock: object,
) -> None:
    async with staged() as stage:

        async def decide(request: Request) -> Answer:
            return Answer(413, "x" * 200_000)

        stage.decide = decide
        client = await stage.http2_client()
        client.grants = False
        number = await client.request(method=b"POST", end=False)
        await client.response(number)
        await client.data(number, b"more")
        await trio.sleep(1)
        client.h2.increment_flow_control_window(200_000)
        client.h2.increment_flow_control_window(200_000, number)
        await client.flush()
        assert await client.body(number) == b"x" * 200_000 + b"\n"


async def test_pieces_that_wait_for_the_client(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        client.grants = False
        number, origin, _ = await open_request(stage, client)
        await origin.send(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\n" + bytes(65_535)
        )
        got = 0
        while got < 65_535:
            got += len((await client.event(h2.events.DataReceived, number)).data)
        await origin.send(b"\r\n2\r\nab\r\n2\r\ncd\r\n0\r\n\r\n")
        await trio.sleep(1)
        client.h2.increment_flow_control_window(100)
        client.h2.increment_flow_control_window(100, number)
        await client.flush()
        assert await client.body(number) == b"abcd"


async def test_a_connection_that_is_idle(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        number, origin, _ = await open_request(stage, client)
        await trio.sleep(1000)
        await origin.send(OK)
        await client.body(number)
        began = trio.current_time()
        await client.event(h2.events.ConnectionTerminated)
        assert 299 < trio.current_time() - began < 303
        while await client.receive():
            pass


async def test_a_connection_without_a_request(autojump_clock: object) -> None:
    async with staged() as stage:
        client = await stage.http2_client()
        began = trio.current_time()
        await client.event(h2.events.ConnectionTerminated)
        assert 31 < trio.current_time() - began < 34
