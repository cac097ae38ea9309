"""The server's end of gRPC calls, against our client and against plain h2."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NoReturn

import attrs
import h2.events
import h2.settings
import pytest
import trio
import trio.testing
from rpc_ends import (
    LIMITS,
    PATH,
    REQUEST,
    Inbox,
    connected,
    headers_with,
    open_echo,
    raw_client,
    transports,
)

from clusterproxy.errors import RPCError
from clusterproxy.grpc import Metadata, Status, prefix
from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.flow import Flow
from clusterproxy.rpc.server import RpcServer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clusterproxy.rpc.server import ServerCall

BAD = "/test.Service/Bad"


def message(payload: bytes) -> bytes:
    return prefix(len(payload)) + payload


async def idle() -> None:
    await trio.sleep_forever()


# -- answers ---------------------------------------------------------------------------------------


async def test_trailers_only() -> None:
    def refuse(_call: ServerCall) -> NoReturn:
        raise RPCError(Status.NOT_FOUND, "no such thing: 100 % gone ☂\n")

    async with raw_client({BAD: refuse}) as (peer, _):
        answer = await peer.answer(peer.request(headers_with(REQUEST, path=BAD.encode()), end=True))
    assert answer.headers == [
        {
            b":status": b"200",
            b"content-type": b"application/grpc",
            b"grpc-status": b"5",
            b"grpc-message": b"no such thing: 100 %25 gone %E2%98%82%0A",
        }
    ]
    assert (answer.data, answer.reset) == (b"", None)


async def test_headers_messages_trailers() -> None:
    async with raw_client() as (peer, _):
        request = message(b"one") + message(b"") + message(b"x" * 100_000)
        stream_id = peer.request(headers_with(REQUEST), request[:50_000], end=False)
        await peer.wait_for(h2.events.RemoteSettingsChanged)
        peer.send_data(stream_id, request[50_000:], end=True)
        answer = await peer.answer(stream_id)
    assert answer.data == request
    assert answer.headers == [
        {b":status": b"200", b"content-type": b"application/grpc"},
        {b"grpc-status": b"0", b"grpc-message": b""},
    ]


async def test_an_answer_before_the_end_of_the_request_resets_it() -> None:
    def open_short(call: ServerCall) -> Callable[[], Awaitable[None]]:
        async def body() -> None:
            call.send(b"enough")

        return body

    async with raw_client({BAD: open_short}) as (peer, _):
        stream_id = peer.request(headers_with(REQUEST, path=BAD.encode()), end=False)
        ended = await peer.wait_for(h2.events.StreamEnded)
        reset = await peer.wait_for(h2.events.StreamReset)
    assert ended.stream_id == reset.stream_id == stream_id
    assert reset.error_code == 0


async def test_metadata() -> None:
    seen: list[ServerCall] = []

    def open_call(call: ServerCall) -> Callable[[], Awaitable[None]]:
        seen.append(call)

        async def body() -> None:
            call.send_initial_metadata({"initial": ["a", "b"], "initial-bin": [b"\x00\xff"]})
            call.send_initial_metadata({"too": ["late"]})
            call.finish(Status.OK, trailers={"trailing-bin": [b"\x01", b""]})

        return body

    sent: Metadata = {"plain": ["1", "2"], "some-bin": [b"\xfe\xff"]}
    async with connected({BAD: open_call}) as ends:
        call = ends.call(BAD, sent, timeout_s=7)
        assert await call.response() == {"initial": ["a", "b"], "initial-bin": [b"\x00\xff"]}
        await call.ended.wait()
    assert (call.status, call.message) == (Status.OK, "")
    assert call.trailers == {"trailing-bin": [b"\x01", b""]}
    assert seen[0].metadata == sent
    assert (seen[0].path, seen[0].user_agent, seen[0].timeout) == (BAD, "test/1", 7)


async def test_trailers_follow_what_waits() -> None:
    """The peer's window is used up when the call ends with much in its queue."""
    flow = Flow()

    def open_burst(call: ServerCall) -> Callable[[], Awaitable[None]]:
        async def body() -> None:
            framed = message(b"y" * 300_000)
            call.forward(flow, len(framed), framed)

        return body

    async with raw_client({BAD: open_burst}) as (peer, _):
        answer = await peer.answer(peer.request(headers_with(REQUEST, path=BAD.encode()), end=True))
    assert answer.data == message(b"y" * 300_000)
    assert answer.last[b"grpc-status"] == b"0"
    assert (flow.queued, flow.taken) == (0, 300_005)


async def test_what_comes_while_the_trailers_wait() -> None:
    closed: list[tuple[Status, str]] = []

    def open_burst(call: ServerCall) -> Callable[[], Awaitable[None]]:
        async def body() -> None:
            framed = message(b"y" * 300_000)
            call.forward(Flow(), len(framed), framed)

        call.on_close = lambda status, text: closed.append((status, text))
        return body

    async with raw_client({BAD: open_burst}) as (peer, server):
        (first, second) = (
            peer.request(headers_with(REQUEST, path=BAD.encode()), end=False) for _ in range(2)
        )
        while len(closed) < 2:
            await trio.testing.wait_all_tasks_blocked()
        # The answer is complete, but the windows do not let it out.
        peer.send_data(first, message(b"not wanted"), end=True)
        peer.send_data(second, message(b"not wanted"))
        peer.h2.reset_stream(second, 8)
        peer.flush()
        answer = await peer.answer(first)
        assert answer.data == message(b"y" * 300_000)
        assert answer.last[b"grpc-status"] == b"0"
        (connection,) = server.connections
        assert not connection.streams
    assert closed == [(Status.OK, ""), (Status.OK, "")]


async def test_an_unused_answer_is_dropped() -> None:
    def open_call(call: ServerCall) -> Callable[[], Awaitable[None]]:
        async def body() -> None:
            call.finish(Status.ABORTED, "first")
            call.finish(Status.INTERNAL, "second")
            call.send_initial_metadata()
            call.send(b"late")
            await trio.lowlevel.checkpoint()
            raise AssertionError("not reached: the call is over")

        return body

    async with connected({BAD: open_call}) as ends:
        started = ends.call(BAD)
        await started.ended.wait()
        assert (started.status, started.message) == (Status.ABORTED, "first")
        await ends.check_bystander()


# -- requests that are refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/test.Service/Other", "unknown method Other for service test.Service"),
        ("/other.Service/Echo", "unknown service other.Service"),
        ("//Echo", "unknown service "),
        ("/Echo", 'malformed method name: "/Echo"'),
        ("test.Service/Echo", 'malformed method name: "test.Service/Echo"'),
        ('"', 'malformed method name: "\\""'),
    ],
)
async def test_unknown_methods(path: str, text: str) -> None:
    async with connected() as ends:
        call = ends.call(path)
        with pytest.raises(RPCError) as caught:
            await call.response()
        assert (caught.value.status, caught.value.message) == (Status.UNIMPLEMENTED, text)
        await ends.check_bystander()


@pytest.mark.parametrize(
    ("changed", "http_status", "status", "text"),
    [
        (
            {"content_type": b"text/html"},
            b"415",
            3,
            b'invalid gRPC request content-type "text/html"',
        ),
        ({"content_type": None}, b"415", 3, b'invalid gRPC request content-type ""'),
        (
            {"content_type": b"application/grpcx"},
            b"415",
            3,
            b'invalid gRPC request content-type "application/grpcx"',
        ),
        (
            {"content_type": b"a\xff"},
            b"415",
            3,
            b'invalid gRPC request content-type "a\\xff"',
        ),
        (
            {"method": b"GET"},
            b"405",
            13,
            b'Received a HEADERS frame with :method "GET" which should be POST',
        ),
        (
            {"grpc_encoding": b"gzip"},
            b"200",
            12,
            b'grpc: Decompressor is not installed for grpc-encoding "gzip"',
        ),
        ({"grpc_timeout": b"1h"}, b"400", 13, b"malformed grpc-timeout: '1h'"),
        ({"x_bin": b"!"}, b"400", 13, None),
    ],
)
async def test_malformed_requests(
    changed: dict[str, bytes | None], http_status: bytes, status: int, text: bytes | None
) -> None:
    async with raw_client() as (peer, _):
        stream_id = peer.request(headers_with(REQUEST, **changed), message(b"never read"), end=True)
        answer = await peer.answer(stream_id)
        assert len(answer.headers) == 1
        assert answer.last[b":status"] == http_status
        assert answer.last[b"content-type"] == b"application/grpc"
        assert answer.last[b"grpc-status"] == b"%d" % status
        if text is not None:
            assert answer.last[b"grpc-message"] == text
        stream_id = peer.request(headers_with(REQUEST), message(b"still there"), end=True)
        assert (await peer.answer(stream_id)).data == message(b"still there")


@pytest.mark.parametrize(
    "content_type", [b"application/grpc", b"application/grpc+proto", b"application/grpc;x"]
)
async def test_accepted_content_types(content_type: bytes) -> None:
    async with raw_client() as (peer, _):
        stream_id = peer.request(
            headers_with(REQUEST, content_type=content_type, grpc_encoding=b"identity"),
            message(b"hi"),
            end=True,
        )
        answer = await peer.answer(stream_id)
    assert answer.data == message(b"hi")


async def test_trailers_of_a_request_mean_nothing() -> None:
    async with raw_client() as (peer, _):
        stream_id = peer.request(headers_with(REQUEST), message(b"hi"), end=False)
        peer.h2.send_headers(stream_id, [(b"x-checksum", b"1")], end_stream=True)
        peer.flush()
        answer = await peer.answer(stream_id)
    assert answer.data == message(b"hi")
    assert answer.last[b"grpc-status"] == b"0"


@pytest.mark.parametrize(
    ("data", "status", "text"),
    [
        (
            b"\x01\x00\x00\x00\x01x",
            13,
            b"grpc: compressed flag set with identity or empty encoding",
        ),
        (b"\x02\x00\x00\x00\x01x", 13, b"grpc: received unexpected payload format 2"),
        (
            b"\x00\x00\x00\x04\x01x",
            8,
            b"grpc: received message larger than max (1025 vs. 1024)",
        ),
    ],
)
async def test_messages_that_are_refused(
    data: bytes, status: int, text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with raw_client(limits=attrs.evolve(LIMITS, max_message_size=1024)) as (peer, _):
        bystander = peer.request(headers_with(REQUEST), message(b"before"), end=False)
        await peer.wait_for(h2.events.DataReceived)
        # Behind a good message in the same batch, and with another behind.
        sent = message(b"good") + data + message(b"not seen")
        stream_id = peer.request(headers_with(REQUEST), sent, end=True)
        answer = await peer.answer(stream_id)
        assert answer.data == message(b"good")
        assert answer.last == {b"grpc-status": b"%d" % status, b"grpc-message": text}
        peer.send_data(bystander, message(b"after"), end=True)
        assert (await peer.answer(bystander)).data == message(b"after")
    assert caplog.messages == [f"call of {PATH} ended: {text.decode()}"]


# -- errors and bugs of handlers -------------------------------------------------------------------


def raising(error: Exception, where: str) -> Callable[[ServerCall], Callable[[], Awaitable[None]]]:
    """Return an opener whose call raises *error* in one of its parts."""

    def fail(*_: object) -> NoReturn:
        raise error

    def open_call(call: ServerCall) -> Callable[[], Awaitable[None]]:
        call.receive = lambda _size, _head, _rest: None
        if where == "opener":
            fail()
        if where == "receiver":
            call.receive = fail
        if where == "half close":
            call.on_half_close = fail
        if where == "close":
            call.on_close = fail
            call.on_half_close = call.finish
        if where == "task":
            call.start_soon(failing)
        return failing if where == "body" else idle

    async def failing() -> None:
        await trio.lowlevel.checkpoint()
        fail()

    return open_call


async def call_bad(error: Exception, where: str) -> tuple[Status, str]:
    async with connected({BAD: raising(error, where)}) as ends:
        call = ends.call(BAD)
        call.send(b"message")
        call.half_close()
        with trio.fail_after(5):
            await call.ended.wait()
        await ends.check_bystander()
    return call.status, call.message


@pytest.mark.parametrize("where", ["opener", "receiver", "body", "task"])
async def test_rpc_errors(where: str, caplog: pytest.LogCaptureFixture) -> None:
    error = RPCError(Status.FAILED_PRECONDITION, "not now")
    assert await call_bad(error, where) == (Status.FAILED_PRECONDITION, "not now")
    assert [record.levelno for record in caplog.records if record.exc_info] == []


@pytest.mark.parametrize("where", ["opener", "receiver", "body", "task", "half close"])
async def test_bugs(where: str, caplog: pytest.LogCaptureFixture) -> None:
    assert await call_bad(ValueError("oops"), where) == (Status.INTERNAL, "internal error")
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.name == "clusterproxy.rpc"
    assert "bug" in record.message


async def test_a_bug_at_the_end_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert await call_bad(ValueError("oops"), "close") == (Status.OK, "")
    assert [record.message for record in caplog.records] == ["bug at the end of a call"]


async def test_a_status_that_is_none() -> None:
    error = RPCError(99, "what")
    assert await call_bad(error, "body") == (Status.UNKNOWN, "what")
    assert await call_bad(error, "receiver") == (Status.UNKNOWN, "what")


async def test_metadata_that_cannot_be_sent_is_a_bug(caplog: pytest.LogCaptureFixture) -> None:
    def open_call(call: ServerCall) -> Callable[[], Awaitable[None]]:
        async def body() -> None:
            call.send_initial_metadata({"x": ["\n"]})

        return body

    async with raw_client({BAD: open_call}) as (peer, _):
        answer = await peer.answer(peer.request(headers_with(REQUEST, path=BAD.encode()), end=True))
    assert answer.last[b":status"] == b"200"
    assert answer.last[b"grpc-status"] == b"13"
    assert caplog.messages == [f"bug in a call of {BAD}"]


async def test_a_message_nobody_asked_for() -> None:
    """The body does not take messages."""
    async with connected({BAD: lambda _call: idle}) as ends:
        call = ends.call(BAD)
        call.send(b"message")
        await call.ended.wait()
        assert (call.status, call.message) == (
            Status.INTERNAL,
            "message before the call was accepted",
        )


async def test_no_message_is_delivered_after_the_end() -> None:
    received: list[bytes] = []

    def open_call(call: ServerCall) -> Callable[[], Awaitable[None]]:
        def receive(_size: int, head: memoryview, _rest: object) -> None:
            received.append(bytes(head[5:]))
            call.finish(Status.OUT_OF_RANGE, "one is enough")

        call.receive = receive
        return idle

    async with raw_client({BAD: open_call}) as (peer, _):
        stream_id = peer.request(
            headers_with(REQUEST, path=BAD.encode()), message(b"1") + message(b"2"), end=False
        )
        answer = await peer.answer(stream_id)
        assert answer.last[b"grpc-status"] == b"11"
    assert received == [b"1"]


# -- the end of calls ------------------------------------------------------------------------------


async def test_deadline(autojump_clock: trio.testing.MockClock) -> None:
    closed: list[tuple[Status, str]] = []

    def open_call(call: ServerCall) -> Callable[[], Awaitable[None]]:
        call.on_close = lambda status, text: closed.append((status, text))
        return idle

    async with connected({BAD: open_call}) as ends:
        started = trio.current_time()
        call = ends.call(BAD, timeout_s=2.5)
        await call.ended.wait()
        assert trio.current_time() - started == pytest.approx(2.5)
        assert (call.status, call.message) == (
            Status.DEADLINE_EXCEEDED,
            "context deadline exceeded",
        )
        await ends.check_bystander()
    assert closed == [(Status.DEADLINE_EXCEEDED, "context deadline exceeded")]


async def test_an_answer_within_the_deadline(autojump_clock: trio.testing.MockClock) -> None:
    async def body() -> None:
        await trio.sleep(2)

    async with connected({BAD: lambda _call: body}) as ends:
        call = ends.call(BAD, timeout_s=2.5)
        await call.ended.wait()
        assert call.status is Status.OK


class Watched:
    """A call whose end is observed."""

    def __init__(self) -> None:
        self.opened = trio.Event()
        self.cancelled = trio.Event()
        self.closed: list[tuple[Status, str]] = []

    def open(self, call: ServerCall) -> Callable[[], Awaitable[None]]:
        call.on_close = lambda status, text: self.closed.append((status, text))
        call.start_soon(self._early)
        return self._body

    async def _early(self) -> None:
        # Started before the call had its nursery.
        await trio.sleep_forever()

    async def _body(self) -> None:
        self.opened.set()
        try:
            await trio.sleep_forever()
        finally:
            self.cancelled.set()


@pytest.mark.parametrize(
    ("code", "status"),
    [(0x8, Status.CANCELLED), (0x7, Status.UNAVAILABLE), (0x1, Status.INTERNAL)],
)
async def test_a_reset_cancels_the_call(code: int, status: Status) -> None:
    watched = Watched()
    async with raw_client({BAD: watched.open}) as (peer, _):
        stream_id = peer.request(headers_with(REQUEST, path=BAD.encode()), end=False)
        await watched.opened.wait()
        peer.h2.reset_stream(stream_id, code)
        peer.flush()
        await watched.cancelled.wait()
        stream_id = peer.request(headers_with(REQUEST), message(b"still there"), end=True)
        assert (await peer.answer(stream_id)).data == message(b"still there")
    assert watched.closed == [(status, "stream reset by the peer")]


async def test_a_reset_before_the_body_ran() -> None:
    """Request and reset come in one batch."""
    watched = Watched()
    async with raw_client({BAD: watched.open}) as (peer, _):
        stream_id = peer.h2.get_next_available_stream_id()
        peer.h2.send_headers(stream_id, headers_with(REQUEST, path=BAD.encode()))
        peer.h2.reset_stream(stream_id, 8)
        peer.flush()
        await watched.cancelled.wait()
    assert watched.closed == [(Status.CANCELLED, "stream reset by the peer")]


@pytest.mark.parametrize("window", [65_535, 0])
async def test_cancel_resets_the_call(window: int) -> None:
    """Also where the peer leaves no window, in which an orderly end would wait for ever."""
    watched = Watched()
    calls: list[ServerCall] = []

    def open_call(call: ServerCall) -> Callable[[], Awaitable[None]]:
        calls.append(call)
        return watched.open(call)

    async with raw_client({BAD: open_call}) as (peer, _):
        peer.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window})
        stream_id = peer.request(headers_with(REQUEST, path=BAD.encode()), end=False)
        await watched.opened.wait()
        (call,) = calls
        call.send(b"waits" if not window else b"goes")
        call.cancel()
        reset = await peer.wait_for(h2.events.StreamReset)
        await watched.cancelled.wait()
        call.cancel()
        call.send(b"late")
        call.finish()
        # Nothing follows, not even when it could, and others go on.
        peer.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 65_535})
        other = peer.request(headers_with(REQUEST), message(b"still there"), end=True)
        assert (await peer.answer(other)).data == message(b"still there")
        last = [type(e) for e in peer.events if getattr(e, "stream_id", None) == stream_id]
        assert h2.events.StreamEnded not in last
    assert reset.error_code == 8
    assert watched.closed == [(Status.CANCELLED, "cancelled")]


@pytest.mark.parametrize("cut", [1, 5, 7])
async def test_an_end_in_the_middle_of_a_message(cut: int) -> None:
    watched = Watched()
    sizes: list[int] = []
    half_closed = trio.Event()

    def open_call(call: ServerCall) -> Callable[[], Awaitable[None]]:
        call.receive = lambda size, _head, _rest: sizes.append(size)
        call.on_half_close = half_closed.set
        return watched.open(call)

    async with raw_client({BAD: open_call}) as (peer, _):
        headers = headers_with(REQUEST, path=BAD.encode())
        stream_id = peer.request(headers, message(b"whole") + message(b"broken")[:cut], end=True)
        answer = await peer.answer(stream_id)
        await watched.cancelled.wait()
    assert (answer.last[b"grpc-status"], answer.last[b"grpc-message"]) == (b"13", b"unexpected EOF")
    assert watched.closed == [(Status.INTERNAL, "unexpected EOF")]
    assert sizes == [10]
    assert not half_closed.is_set()


async def test_a_lost_connection_cancels_the_calls() -> None:
    watched = Watched()
    async with raw_client({BAD: watched.open}) as (peer, server):
        peer.request(headers_with(REQUEST, path=BAD.encode()), end=False)
        await watched.opened.wait()
        assert len(server.connections) == 1
        peer.close()
        await watched.cancelled.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert not server.connections
    ((status, text),) = watched.closed
    assert status is Status.CANCELLED
    assert text.startswith("connection ")


async def served(
    server: RpcServer, wire: bytes, caplog: pytest.LogCaptureFixture
) -> list[tuple[str, int, str]]:
    """Serve a connection on which *wire* comes, then its end; return what was logged."""
    ours, theirs = transports()
    assert ours.send([wire])
    ours.send_eof()
    with caplog.at_level(logging.DEBUG, "clusterproxy.rpc"):
        await server.serve(theirs)
    ours.close()
    assert theirs.closed
    return caplog.record_tuples


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


async def test_the_log_says_why_a_connection_ended(caplog: pytest.LogCaptureFixture) -> None:
    server = RpcServer({}, limits=LIMITS, peers="an agent")
    assert await served(server, b"", caplog) == [
        (
            "clusterproxy.rpc",
            logging.DEBUG,
            "connection of an agent ended: connection closed by the peer",
        )
    ]


async def test_the_log_warns_of_a_peer_that_breaks_a_rule(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = RpcServer({}, limits=LIMITS)
    ((name, level, text),) = await served(server, b"GET / HTTP/1.1\r\n\r\n" + bytes(20), caplog)
    assert (name, level) == ("clusterproxy.rpc", logging.WARNING)
    assert text.startswith("connection of a peer ended: protocol error: ")


async def test_the_log_warns_of_a_peer_that_asks_too_much(
    caplog: pytest.LogCaptureFixture,
) -> None:
    exceeded: list[str] = []
    server = RpcServer({}, limits=LIMITS, on_limit=exceeded.append, peers="a client")
    wire = PREFACE + 1000 * b"\0\0\0\x04\0\0\0\0\0"
    assert await served(server, wire, caplog) == [
        (
            "clusterproxy.rpc",
            logging.WARNING,
            "connection of a client ended: too many SETTINGS",
        )
    ]
    assert exceeded == ["control_frames"]


async def test_a_task_of_a_closed_call_is_not_started() -> None:
    def open_call(call: ServerCall) -> Callable[[], Awaitable[None]]:
        call.finish()
        call.start_soon(idle)
        return idle

    async with connected({BAD: open_call}) as ends:
        call = ends.call(BAD)
        await call.ended.wait()
        assert call.status is Status.OK


async def test_a_bug_on_a_connection_is_its_own(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = transports()
    server = RpcServer({}, limits=LIMITS)

    async def fail() -> NoReturn:
        await trio.lowlevel.checkpoint()
        raise ValueError("oops")

    monkeypatch.setattr(type(theirs), "receive", lambda _self: fail())
    await server.serve(theirs)
    ours.close()
    assert not server.connections
    assert theirs.closed
    assert caplog.record_tuples == [("clusterproxy.rpc", logging.ERROR, "bug on a connection")]


# -- draining --------------------------------------------------------------------------------------


async def test_drain_waits_for_open_calls() -> None:
    async with connected() as ends:
        call = ends.call()
        inbox = Inbox(call)
        call.send(b"before")
        await inbox.wait(1)
        ends.server.drain()
        with trio.fail_after(5):
            while not ends.connection.draining:
                await trio.lowlevel.checkpoint()
        with pytest.raises(trio.ClosedResourceError):
            ends.call()
        call.send(b"after")
        assert await inbox.wait(2) == [b"before", b"after"]
        call.half_close()
        await call.ended.wait()
        assert call.status is Status.OK


async def test_a_drained_connection_is_closed_after_its_last_call(
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with connected() as ends:
        call = ends.call()
        await trio.testing.wait_all_tasks_blocked()
        ends.server.drain()
        await trio.sleep(60)
        assert ends.connection.lost is None
        call.half_close()
        await call.ended.wait()
        # The client may close first, but it is not waited for for ever.
        await trio.sleep(0.9)
        assert ends.server.connections
        await trio.sleep(0.2)
        assert not ends.server.connections
        assert ends.connection.lost == "connection closed by the peer"


async def test_connections_of_a_draining_server(autojump_clock: trio.testing.MockClock) -> None:
    server = RpcServer({PATH: open_echo}, limits=LIMITS)
    server.drain()
    ours, theirs = transports()
    client = Http2Connection(ours, client=True, limits=LIMITS)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.run)
        start = trio.current_time()
        await server.serve(theirs)
        assert trio.current_time() == start + 1
    assert client.draining
