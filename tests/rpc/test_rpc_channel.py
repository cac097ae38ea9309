"""The client's end of gRPC calls, against our server and against plain h2."""

from __future__ import annotations

import h2.events
import pytest
import trio
import trio.testing
from rpc_ends import (
    PATH,
    RESPONSE,
    Headers,
    Inbox,
    connected,
    headers_with,
    raw_server,
)

from clusterproxy.errors import RPCError
from clusterproxy.grpc import MetadataError, Status, prefix
from clusterproxy.http2.flow import Flow


def message(payload: bytes) -> bytes:
    return prefix(len(payload)) + payload


async def test_request_headers() -> None:
    async with raw_server() as (peer, ends):
        ends.call(PATH, {"agentid": ["a"], "x-bin": [b"\x00"]}, timeout_s=1.5)
        request = await peer.wait_for(h2.events.RequestReceived)
    assert request.headers == [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", PATH.encode()),
        (b":authority", b"test"),
        (b"content-type", b"application/grpc"),
        (b"user-agent", b"test/1"),
        (b"te", b"trailers"),
        (b"grpc-timeout", b"1500000u"),
        (b"agentid", b"a"),
        (b"x-bin", b"AA"),
    ]


async def test_metadata_that_cannot_be_sent() -> None:
    async with connected() as ends:
        with pytest.raises(MetadataError):
            ends.call(PATH, {"x": ["\n"]})
        await ends.check_bystander()


async def test_half_close_waits_for_what_is_queued() -> None:
    async with raw_server() as (peer, ends):
        call = ends.call()
        flow = Flow()
        for _ in range(4):
            framed = message(b"x" * 50_000)
            call.forward(flow, len(framed), framed)
        call.half_close()
        assert flow.queued
        request = await peer.wait_for(h2.events.RequestReceived)
        answer = await peer.answer(request.stream_id)
        assert answer.ended
        assert answer.data == message(b"x" * 50_000) * 4
        peer.h2.send_headers(
            request.stream_id, [*RESPONSE, (b"grpc-status", b"0")], end_stream=True
        )
        peer.flush()
        await call.ended.wait()
        assert call.status is Status.OK
        call.half_close()
        await trio.testing.wait_all_tasks_blocked()
        assert not ends.connection.streams
        # Both sides had ended, so there was nothing to reset.
        ends.connection.ping()
        await peer.wait_for(h2.events.PingReceived)
        assert not [e for e in peer.events if isinstance(e, h2.events.StreamReset)]


async def test_send_behind_keeps_the_order() -> None:
    async with raw_server() as (peer, ends):
        call = ends.call()
        flow = Flow()
        call.send_behind(flow, b"first")
        large = message(b"x" * 100_000)
        call.forward(flow, len(large), large)
        call.forward(flow, len(large), large)
        assert flow.queued
        call.send_behind(flow, b"last")
        call.send(b"ahead")
        call.half_close()
        request = await peer.wait_for(h2.events.RequestReceived)
        answer = await peer.answer(request.stream_id)
        # What has been begun is not interrupted.
        assert answer.data == b"".join(
            (message(b"first"), large, message(b"ahead"), large, message(b"last"))
        )


async def test_cancel() -> None:
    async with raw_server() as (peer, ends):
        call = ends.call()
        closed: list[tuple[Status, str]] = []
        call.on_close = lambda status, text: closed.append((status, text))
        call.cancel()
        call.cancel()
        call.half_close()
        call.send(b"late")
        reset = await peer.wait_for(h2.events.StreamReset)
        assert reset.error_code == 8
        with pytest.raises(RPCError) as caught:
            await call.response()
        assert caught.value.status == Status.CANCELLED
        assert closed == [(Status.CANCELLED, "cancelled")]
        assert not ends.connection.streams


async def answered(
    *headers: list[tuple[bytes, bytes]], data: bytes = b"", end: bool = True
) -> RPCError:
    """Let a plain h2 server answer with headers, *data*, other headers; return how the call ended."""
    async with raw_server() as (peer, ends):
        call = ends.call()
        Inbox(call)
        request = await peer.wait_for(h2.events.RequestReceived)
        stream_id = request.stream_id
        last = len(headers) - 1
        for place, fields in enumerate(headers):
            peer.h2.send_headers(stream_id, fields, end_stream=end and place == last)
            if data and not place:
                peer.send_data(stream_id, data)
        peer.flush()
        with trio.fail_after(5):
            await call.ended.wait()
        # The other side is told that nothing more will come.
        assert (await peer.wait_for(h2.events.StreamReset)).stream_id == stream_id
        assert not ends.connection.streams
        return RPCError(call.status, call.message)


def ended(headers: Headers = (), **fields: bytes | None) -> list[tuple[bytes, bytes]]:
    return headers_with(headers, **fields)


@pytest.mark.parametrize(
    ("headers", "status", "text"),
    [
        (ended(RESPONSE, grpc_status=b"5", grpc_message=b"gone%21 %"), Status.NOT_FOUND, "gone! %"),
        (ended(RESPONSE, grpc_status=b"99", grpc_message=b"new"), Status.UNKNOWN, "new"),
        (ended(RESPONSE, grpc_status=b"x"), Status.UNKNOWN, ""),
        (
            ended(RESPONSE),
            Status.INTERNAL,
            "server closed the stream without sending trailers",
        ),
        (
            ended(RESPONSE, status=b"503", content_type=b"text/html"),
            Status.UNAVAILABLE,
            'unexpected HTTP status code received from server: 503; content-type "text/html"',
        ),
        (
            ended(RESPONSE, status=b"9" * 5000),
            Status.UNKNOWN,
            'unexpected HTTP status code received from server: 0; content-type "application/grpc"',
        ),
        (
            ended(RESPONSE, content_type=None),
            Status.UNKNOWN,
            'unexpected HTTP status code received from server: 200; content-type ""',
        ),
        (
            ended(RESPONSE, status=b"415", grpc_status=b"3", grpc_message=b"no"),
            Status.INVALID_ARGUMENT,
            "no",
        ),
        (ended(RESPONSE, x_bin=b"!"), Status.INTERNAL, None),
        (ended(RESPONSE, grpc_status=b"0", x_bin=b"!"), Status.INTERNAL, None),
    ],
)
async def test_answers_without_messages(
    headers: list[tuple[bytes, bytes]], status: Status, text: str | None
) -> None:
    error = await answered(headers)
    assert error.status == status
    if text is not None:
        assert error.message == text


@pytest.mark.parametrize(
    ("trailers", "status", "text"),
    [
        (ended(grpc_status=b"0", grpc_message=b""), Status.OK, ""),
        (ended(grpc_status=b"14", grpc_message=b"later"), Status.UNAVAILABLE, "later"),
        (
            ended(x=b"1"),
            Status.INTERNAL,
            "server closed the stream without sending trailers",
        ),
    ],
)
async def test_answers_with_messages(
    trailers: list[tuple[bytes, bytes]], status: Status, text: str
) -> None:
    error = await answered(ended(RESPONSE), trailers, data=message(b"hello"))
    assert (error.status, error.message) == (status, text)


async def test_a_status_without_an_end_is_one() -> None:
    error = await answered(ended(RESPONSE, grpc_status=b"3", grpc_message=b"no"), end=False)
    assert (error.status, error.message) == (Status.INVALID_ARGUMENT, "no")


async def test_a_message_that_is_refused() -> None:
    error = await answered(ended(RESPONSE), data=b"\x01\x00\x00\x00\x00", end=False)
    assert error.status == Status.INTERNAL
    assert error.message == "grpc: compressed flag set with identity or empty encoding"


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (0, Status.INTERNAL),
        (7, Status.UNAVAILABLE),
        (8, Status.CANCELLED),
        (0xB, Status.RESOURCE_EXHAUSTED),
    ],
)
async def test_a_reset(code: int, status: Status) -> None:
    async with raw_server() as (peer, ends):
        call = ends.call()
        request = await peer.wait_for(h2.events.RequestReceived)
        peer.h2.reset_stream(request.stream_id, code)
        peer.flush()
        with pytest.raises(RPCError) as caught:
            await call.response()
        assert (caught.value.status, caught.value.message) == (status, "stream reset by the peer")


async def test_a_lost_connection() -> None:
    async with raw_server() as (peer, ends):
        answered_call, call = ends.call(), ends.call()
        await peer.wait_for(h2.events.RequestReceived)
        request = await peer.wait_for(h2.events.RequestReceived)
        peer.h2.send_headers(1, ended(RESPONSE, serverid=b"s"))
        peer.flush()
        assert await answered_call.response() == {"serverid": ["s"]}
        assert request.stream_id == 3
        peer.close()
        with pytest.raises(RPCError) as caught:
            await call.response()
        assert caught.value.status == Status.UNAVAILABLE
        await answered_call.ended.wait()
        assert answered_call.status is Status.UNAVAILABLE
        with pytest.raises(trio.ClosedResourceError):
            ends.call()


async def test_a_call_that_the_server_did_not_accept() -> None:
    async with raw_server() as (peer, ends):
        call = ends.call()
        await peer.wait_for(h2.events.RequestReceived)
        peer.h2.close_connection(last_stream_id=0)
        peer.flush()
        with pytest.raises(RPCError) as caught:
            await call.response()
        assert caught.value.status == Status.UNAVAILABLE
        assert caught.value.message == "not accepted before GOAWAY"


async def test_tasks_end_with_the_call() -> None:
    cancelled: list[str] = []

    async def work(name: str) -> None:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.append(name)

    async with connected() as ends:
        call = ends.call()
        async with trio.open_nursery() as nursery:
            call.start_soon(work, "deferred")
            call.attach(nursery)
            call.start_soon(work, "at once")
            await trio.testing.wait_all_tasks_blocked()
            call.half_close()
        assert sorted(cancelled) == ["at once", "deferred"]
        async with trio.open_nursery() as nursery:
            call.start_soon(work, "too late")
            call.attach(nursery)
            nursery.start_soon(trio.sleep_forever)
        assert len(cancelled) == 2


async def test_a_call_ends_once() -> None:
    """Its owner ends the connection when told of the call's end."""
    async with raw_server() as (peer, ends):
        call = ends.call()
        call.half_close()
        call.on_close = lambda _status, _text: ends.connection.fail("enough")
        request = await peer.wait_for(h2.events.RequestReceived)
        peer.h2.send_headers(request.stream_id, ended(RESPONSE, grpc_status=b"0"), end_stream=True)
        peer.flush()
        await call.ended.wait()
        while ends.connection.streams:
            await trio.lowlevel.checkpoint()
        assert (call.status, call.message) == (Status.OK, "")
