"""A connection whose reader is the test: streams, windows, limits and its end, without a socket."""

from __future__ import annotations

import gc
import weakref
from typing import TYPE_CHECKING, cast

import attrs
import hpack
import pytest
import trio
import trio.testing
from h2.errors import ErrorCodes
from h2.exceptions import TooManyStreamsError
from h2_peers import (
    ACK,
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    REQUEST,
    RESPONSE,
    RST_STREAM,
    TRAILERS,
    FakeTransport,
    Handler,
    Wired,
    data,
    data_of,
    goaway,
    goaways,
    granted,
    parse_frames,
    raw,
    settings,
    types,
    window_update,
)
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
)

from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.flow import QUANTUM, Flow
from clusterproxy.http2.limits import Growth, Http2Limits
from clusterproxy.http2.stream import Stream
from clusterproxy.transport.outbox import current_outbox
from clusterproxy.transport.pace import SHORT_WINDOW, Gait

if TYPE_CHECKING:
    from collections.abc import Callable

    from h2.stream import H2Stream
    from trio.testing import MockClock

    from clusterproxy.http2.stream import Header
    from clusterproxy.transport.stream import Transport

LARGEST = 2**31 - 1


class Peer:
    """Header blocks of the other end."""

    def __init__(self) -> None:
        self.encoder = hpack.Encoder()

    def headers(self, stream_id: int, headers: list[Header], *, end: bool = False) -> bytes:
        flags = END_HEADERS | (END_STREAM if end else 0)
        return raw(HEADERS, flags, stream_id, self.encoder.encode(headers))


def server(
    streams: int = 1, *, limits: Http2Limits | None = None, window: int = LARGEST
) -> tuple[Wired, Peer]:
    """A server with *streams* open streams; the client's windows do not limit what it sends."""
    wired, peer = Wired(limits=limits), Peer()
    wired.receive(PREFACE, settings({4: window}), window_update(0, LARGEST - 65_535))
    for index in range(streams):
        wired.receive(peer.headers(2 * index + 1, REQUEST))
    wired.take_sent()
    return wired, peer


def client(streams: int = 1) -> tuple[Wired, Peer]:
    wired, peer = Wired(client=True), Peer()
    wired.receive(settings({4: LARGEST}), window_update(0, LARGEST - 65_535))
    for _ in range(streams):
        stream = wired.open()
        wired.receive(peer.headers(stream.id, RESPONSE))
    wired.take_sent()
    return wired, peer


def frames_of(wired: Wired) -> list[Frame]:
    return parse_frames(wired.take_sent())


def data_sizes(wire: bytes) -> list[int]:
    return [len(frame.data) for frame in parse_frames(wire) if isinstance(frame, DataFrame)]


def error_of(wired: Wired) -> int:
    """The error of a connection that ended itself with a GOAWAY."""
    assert wired.connection.lost
    assert wired.transport.closed
    *_, last = parse_frames(wired.transport.sent.removeprefix(PREFACE))
    assert isinstance(last, GoAwayFrame)
    return int(last.error_code)


# -- life of a stream ------------------------------------------------------------------------------------


async def test_greeting_of_a_server() -> None:
    wired = Wired(limits=Http2Limits(window=70_000, connection_window=80_000, max_streams=7))
    [sent, window] = frames_of(wired)
    assert isinstance(sent, SettingsFrame)
    assert (sent.settings[3], sent.settings[4]) == (7, 70_000)
    assert types([window]) == ["WindowUpdate"]
    assert wired.connection.h2.inbound_window == 80_000


async def test_a_call_seen_by_the_server() -> None:
    wired, peer = server(0)
    wired.receive(peer.headers(1, REQUEST), data(1, b"one"), data(1, b"two"))
    wired.receive(data(1, b"end", end=True))
    stream, handler = wired.stream(1), wired.handlers[1]
    assert handler.headers == [REQUEST]
    assert (handler.data, handler.ended) == (bytearray(b"onetwoend"), True)
    assert handler.settled == 2, "once for each batch"
    connection = wired.connection
    connection.send_headers(stream, RESPONSE)
    stream.send(None, 6, b"answer")
    connection.send_headers(stream, TRAILERS, end=True)
    sent = frames_of(wired)
    assert types(sent) == ["Headers", "Data", "Headers"]
    assert set(sent[2].flags) == {"END_STREAM", "END_HEADERS"}
    assert not connection.streams
    assert not connection.h2.streams
    assert handler.reset is None, "an end is no reset"


async def test_a_call_seen_by_the_client() -> None:
    wired, peer = client(0)
    stream = wired.open()
    stream.send(None, 5, b"hello")
    wired.connection.end_stream(stream)
    assert types(frames_of(wired)) == ["Headers", "Data", "Data"]
    wired.receive(peer.headers(1, RESPONSE), data(1, b"answer"))
    wired.receive(peer.headers(1, TRAILERS, end=True))
    handler = wired.handlers[1]
    assert handler.headers == [RESPONSE, TRAILERS]
    assert (handler.data, handler.ended, handler.reset) == (bytearray(b"answer"), True, None)
    assert not wired.connection.streams
    assert not wired.connection.h2.streams


async def test_an_answer_before_the_request_has_ended() -> None:
    wired, peer = server()
    wired.connection.send_headers(wired.stream(1), RESPONSE + TRAILERS, end=True)
    headers, reset = frames_of(wired)
    assert isinstance(headers, HeadersFrame)
    assert isinstance(reset, RstStreamFrame)
    assert reset.error_code == ErrorCodes.NO_ERROR
    before = wired.connection.h2.inbound_window
    wired.receive(data(1, bytes(1000)), peer.headers(1, TRAILERS, end=True))
    assert wired.handlers[1].data == b""
    assert wired.connection.h2.inbound_window == before - 1000
    assert wired.connection.lost is None


async def test_a_request_without_a_body() -> None:
    wired, peer = server(0)
    wired.receive(peer.headers(1, REQUEST, end=True))
    assert wired.handlers[1].ended
    stream = wired.stream(1)
    wired.connection.send_headers(stream, RESPONSE + TRAILERS, end=True)
    assert types(frames_of(wired)) == ["Headers"]


async def test_on_a_stream_that_is_gone_nothing_is_sent() -> None:
    wired, _ = server()
    stream = wired.stream(1)
    connection = wired.connection
    connection.reset_stream(stream, ErrorCodes.CANCEL)
    assert types(frames_of(wired)) == ["RstStream"]
    flow = Flow()
    connection.reset_stream(stream, ErrorCodes.CANCEL)
    connection.send_headers(stream, RESPONSE)
    connection.end_stream(stream)
    stream.send(flow, 3, b"abc")
    stream.resume_flow(flow)
    stream.release(-(10**6))
    assert frames_of(wired) == []
    assert wired.handlers[1].reset is None, "whoever resets knows"


async def test_on_a_connection_that_is_lost_nothing_is_sent() -> None:
    wired, _ = server()
    stream, connection = wired.stream(1), wired.connection
    connection.fail("test")
    wired.take_sent()
    connection.fail("again", ErrorCodes.INTERNAL_ERROR)
    connection.exceed("limit", "again")
    connection.send_headers(stream, RESPONSE)
    connection.end_stream(stream)
    connection.reset_stream(stream, ErrorCodes.CANCEL)
    connection.grant(stream, 1000)
    connection.ping()
    connection.check_alive(10**9, 1, 1)
    connection.announce_end()
    connection.output.flush()
    assert wired.take_sent() == b""
    assert (connection.lost, wired.exceeded) == ("test", [])
    with pytest.raises(trio.ClosedResourceError, match="test"):
        wired.open()


async def test_reset_by_the_peer() -> None:
    wired, _ = server(2)
    wired.receive(data(1, b"part"), raw(RST_STREAM, 0, 1, b"\0\0\0\x08"), data(1, b"more"))
    assert wired.handlers[1].reset == (8, "stream reset by the peer")
    assert wired.handlers[1].data == b"part"
    assert list(wired.connection.streams) == [3]
    assert wired.handlers[3].reset is None


@pytest.mark.parametrize("by_peer", [False, True])
async def test_a_reset_in_the_middle_of_a_data_frame(by_peer: bool) -> None:
    wired, _ = server(2)
    frame = data(1, bytes(1000))
    wired.receive(frame[:500])
    assert len(wired.handlers[1].data) == 491
    if by_peer:
        # It cannot come within the frame; but the handler may give up in the midst of a batch.
        wired.handlers[1].on_piece = lambda s: wired.connection.reset_stream(s, ErrorCodes.CANCEL)
    else:
        wired.connection.reset_stream(wired.stream(1), ErrorCodes.CANCEL)
    wired.receive(frame[500:] + data(1, b"late") + data(3, b"fine"))
    assert len(wired.handlers[1].data) == (1000 if by_peer else 491)
    assert wired.handlers[3].data == b"fine"
    assert wired.connection.lost is None
    assert wired.connection.h2.inbound_window == wired.connection.limits.connection_window - 1008


@pytest.mark.parametrize("last", [data(1, b"x", end=True), raw(0, END_STREAM, 1)])
async def test_a_handler_gives_up_upon_the_last_frame(last: bytes) -> None:
    """For h2 the stream is closed already; the others must not suffer."""
    wired, _ = client(2)
    handler, connection = wired.handlers[1], wired.connection

    class GivesUp(Handler):
        def on_end(self) -> None:
            connection.reset_stream(stream, ErrorCodes.NO_ERROR)

    stream = wired.stream(1)
    connection.end_stream(stream)
    wired.take_sent()
    if len(last) > 9:
        handler.on_piece = lambda s: connection.reset_stream(s, ErrorCodes.CANCEL)
    else:
        stream.handler = GivesUp()
    wired.receive(last)
    assert frames_of(wired) == []
    assert connection.lost is None
    assert list(connection.streams) == [3]
    assert list(connection.h2.streams) == [3]


async def test_a_peer_that_overflows_our_window_of_a_stream_loses_it() -> None:
    """h2 resets the stream by itself; the owner is told."""
    wired, _ = server(2, window=LARGEST)
    wired.receive(window_update(1, LARGEST))
    handler = wired.handlers[1]
    assert handler.reset == (ErrorCodes.FLOW_CONTROL_ERROR, "stream reset by the peer")
    assert types(frames_of(wired)) == ["RstStream"]
    assert list(wired.connection.streams) == [3]


async def test_a_response_that_nobody_waits_for() -> None:
    wired, peer = client()
    wired.connection.reset_stream(wired.stream(1), ErrorCodes.CANCEL)
    wired.receive(
        peer.headers(1, RESPONSE), data(1, b"x"), data(1, b""), peer.headers(1, TRAILERS, end=True)
    )
    assert wired.connection.lost is None


async def test_an_informational_response_is_passed_over() -> None:
    wired, peer = client(0)
    wired.open()
    wired.receive(peer.headers(1, [(b":status", b"100")]), peer.headers(1, RESPONSE))
    assert wired.handlers[1].headers == [RESPONSE]


async def test_padding_and_content_length_go_the_slow_way() -> None:
    wired, peer = server()
    wired.receive(peer.headers(3, [*REQUEST, (b"content-length", b"9")]))
    wired.receive(data(1, b"padded", pad=200), data(3, b"counted"), data(3, b"!!", end=True))
    assert wired.handlers[1].data == b"padded"
    assert wired.handlers[3].data == b"counted!!"
    assert wired.stream(1).h2.inbound_flow_control_window == 1024 * 1024 - 207
    wired.receive(peer.headers(5, [*REQUEST, (b"content-length", b"1")]))
    wired.receive(data(5, b"too much"))
    assert error_of(wired) == ErrorCodes.PROTOCOL_ERROR


# -- receiving: windows ----------------------------------------------------------------------------------

SMALL = Http2Limits(window=40_000, max_window=0, connection_window=100_000, max_frame_size=16_384)


async def test_an_unread_stream_starves_nobody() -> None:
    wired, _ = server(2, limits=SMALL)
    wired.handlers[1].hold = True
    for _ in range(4):
        wired.receive(data(1, bytes(10_000)))
    assert granted(wired.take_sent(), 1) == 0
    for _ in range(50):
        wired.receive(data(3, bytes(10_000)))
    sent = wired.take_sent()
    assert granted(sent, 1) == 0
    assert granted(sent, 3) >= 490_000
    assert granted(sent, 0) >= 440_000
    wired.stream(1).release(40_000)
    assert granted(wired.take_sent(), 1) == 40_000


async def test_what_is_held_is_not_granted() -> None:
    wired, _ = server(limits=SMALL)
    stream, handler = wired.stream(1), wired.handlers[1]
    handler.hold = True
    wired.receive(data(1, bytes(16_000)), data(1, bytes(16_000)))
    assert granted(wired.take_sent(), 1) == 0
    stream.release(5000)
    assert wired.take_sent() == b"", "not worth a frame"
    stream.release(5000)
    assert granted(wired.take_sent(), 1) == 10_000
    stream.release(22_000)
    assert granted(wired.take_sent(), 1) == 22_000
    assert stream.h2.inbound_flow_control_window == SMALL.window


async def test_a_peer_that_can_hardly_send_is_granted_less() -> None:
    limits = Http2Limits(window=200_000, max_window=0, connection_window=400_000)
    wired, _ = server(limits=limits)
    stream, handler = wired.stream(1), wired.handlers[1]
    handler.hold = True
    for _ in range(19):
        wired.receive(data(1, bytes(10_000)))
    assert granted(wired.take_sent(), 1) == 0
    stream.release(16_383)
    assert granted(wired.take_sent(), 1) == 0
    stream.release(1)
    assert granted(wired.take_sent(), 1) == 16_384
    stream.release(49_999)
    assert granted(wired.take_sent(), 1) == 0
    stream.release(1)
    assert granted(wired.take_sent(), 1) == 50_000


async def send_over_a_line(wired: Wired, *stream_ids: int, windows: int, round_trip: float) -> None:
    """Fill the window of each stream so many times, and answer PINGs a round trip later."""
    for _ in range(windows):
        for stream_id in stream_ids:
            left = wired.stream(stream_id).h2.inbound_flow_control_window
            while left > 0:
                wired.receive(data(stream_id, bytes(min(left, 16_384))))
                left -= 16_384
        await trio.sleep(round_trip)
        answer_pings(wired)


def growing(*, left: int = 1_000_000) -> Http2Limits:
    return attrs.evolve(SMALL, max_window=400_000, connection_window=2_000_000, growth=Growth(left))


async def test_a_window_grows_to_what_a_long_line_holds(
    autojump_clock: trio.testing.MockClock,
) -> None:
    limits = growing()
    wired, _ = server(limits=limits)
    await send_over_a_line(wired, 1, windows=3, round_trip=0.1)
    assert SMALL.window < wired.stream(1).window < 400_000
    await send_over_a_line(wired, 1, windows=60, round_trip=0.1)
    assert wired.stream(1).window == limits.max_window
    assert wired.connection.lost is None


async def test_a_window_stays_small_where_the_line_is_short(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Answers that come late because they wait behind the data do not make the line longer."""
    wired, _ = server(limits=growing())
    wired.connection.ping()
    await trio.sleep(0.001)
    answer_pings(wired)
    await send_over_a_line(wired, 1, windows=20, round_trip=0.1)
    assert wired.stream(1).window == SMALL.window


async def test_a_line_is_measured_with_data_only(autojump_clock: trio.testing.MockClock) -> None:
    """A Go server ends a connection that PINGs three times without having been sent DATA."""
    wired, _ = server(limits=growing())
    stream = wired.stream(1)
    wired.handlers[1].hold = True
    for _ in range(2):
        wired.receive(data(1, bytes(16_384)))
    wired.take_sent()
    pings = 0
    for _ in range(3):
        # Something else that the peer says; its answers to PINGs are of that kind, too.
        wired.receive(raw(PING, 0, 0, bytes(8)))
        stream.release(10_000)
        sent = answer_pings(wired)
        pings += sum(isinstance(f, PingFrame) and "ACK" not in f.flags for f in sent)
        await trio.sleep(1)
    assert pings == 1


async def test_windows_grow_within_a_budget_and_give_it_back(
    autojump_clock: trio.testing.MockClock,
) -> None:
    limits = growing(left=100_000)
    wired, _ = server(2, limits=limits)
    await send_over_a_line(wired, 1, 3, windows=20, round_trip=0.1)
    grown = sum(wired.stream(number).window - SMALL.window for number in (1, 3))
    assert grown == 100_000
    assert limits.growth.left == 0
    for number in (1, 3):
        wired.connection.reset_stream(wired.stream(number), ErrorCodes.CANCEL)
    assert limits.growth.left == 100_000


async def test_one_connection_does_not_take_all_growth(
    autojump_clock: trio.testing.MockClock,
) -> None:
    limits = growing()
    wired, _ = server(4, limits=limits)
    await send_over_a_line(wired, 1, 3, 5, 7, windows=20, round_trip=0.1)
    assert limits.growth.left == 1_000_000 - limits.max_window


async def test_little_is_under_way_while_somebody_waits_for_a_short_answer(
    autojump_clock: trio.testing.MockClock,
) -> None:
    mib = 1 << 20
    limits = Http2Limits(window=4 * mib, max_window=0)
    wired, _ = server(limits=limits)
    bulk, keys = Gait(), Gait()
    bulk.note(mib)
    keys.note(10)
    for _ in range(400):
        wired.receive(data(1, bytes(16_384)))
        if wired.stream(1).h2.inbound_flow_control_window < 16_384:
            break
    h2 = wired.stream(1).h2
    assert h2.inbound_flow_control_window <= SHORT_WINDOW
    await trio.sleep(1.0)
    wired.receive(data(1, bytes(16_384)))
    assert h2.inbound_flow_control_window == limits.window


async def test_nothing_is_granted_once_the_peer_has_ended() -> None:
    wired, peer = server(3, limits=SMALL)
    wired.receive(data(1, bytes(16_000)), data(1, b"", end=True))
    wired.receive(data(3, bytes(16_000), end=True))
    wired.receive(data(5, bytes(16_000)), peer.headers(5, TRAILERS, end=True))
    sent = wired.take_sent()
    assert [granted(sent, i) for i in (1, 3, 5)] == [0, 0, 0]
    assert wired.handlers[5].headers == [REQUEST, TRAILERS]


async def test_the_window_of_a_connection_comes_back_for_data_of_streams_that_are_gone() -> None:
    wired, _ = server(2, limits=SMALL)
    wired.connection.reset_stream(wired.stream(1), ErrorCodes.CANCEL)
    for _ in range(100):
        wired.receive(data(1, bytes(10_000)))
        assert wired.connection.h2.inbound_window >= 50_000
    assert wired.connection.lost is None


@pytest.mark.parametrize("cut", [5, 9, 12, 10**6])
async def test_an_overdraft_is_cut_off_at_its_header(cut: int) -> None:
    wired, _ = server(limits=SMALL)
    wired.handlers[1].hold = True
    wired.receive(data(1, bytes(16_000)), data(1, bytes(16_000)))
    frame = data(1, bytes(8001))
    wired.receive(frame[:cut])
    if cut < 9:
        wired.receive(frame[cut:])
    assert error_of(wired) == ErrorCodes.FLOW_CONTROL_ERROR
    assert len(wired.handlers[1].data) == 32_000


@pytest.mark.parametrize("end", [False, True])
async def test_a_data_frame_that_is_too_large_is_cut_off_at_its_header(end: bool) -> None:
    wired, _ = server(limits=SMALL)
    wired.receive(data(1, bytes(16_385), end=end)[:9])
    assert error_of(wired) == ErrorCodes.FRAME_SIZE_ERROR


async def test_buffers_are_lent_for_one_batch() -> None:
    wired, _ = server(2)
    batches: list[int] = []
    for handler in wired.handlers.values():
        handler.on_piece = lambda _s: batches.append(len(wired.connection._unsettled))
    wired.receive(data(1, b"a"), data(1, b"b"), data(3, b"c"))
    assert [wired.handlers[i].settled for i in (1, 3)] == [1, 1]
    assert not wired.connection._unsettled
    wired.receive(data(3, b"d"))
    assert [wired.handlers[i].settled for i in (1, 3)] == [1, 2]


async def test_a_handler_that_does_not_want_data_is_not_settled() -> None:
    class Bored(Handler):
        def on_data(self, view: memoryview) -> bool:
            self.data += view
            return False

    wired, peer = server(0)
    wired.make_handler = lambda _s, _h: Bored()
    wired.receive(peer.headers(1, REQUEST), data(1, b"x"))
    assert wired.handlers[1].data == b"x"
    assert wired.handlers[1].settled == 0


# -- sending: windows and frames -------------------------------------------------------------------------


def answered(wired: Wired, stream_id: int = 1) -> Stream:
    stream = wired.stream(stream_id)
    wired.connection.send_headers(stream, RESPONSE)
    wired.take_sent()
    return stream


async def test_a_sender_stays_within_the_window_of_the_stream() -> None:
    wired, _ = server(window=10)
    stream = answered(wired)
    flow = Flow()
    stream.send(flow, 8, b"01234", (b"567",))
    assert (flow.taken, flow.queued) == (8, 0)
    stream.send(flow, 9, b"89abc", (b"de", b"fg"))
    stream.send(None, 2, b"!!")
    # Part of a message is on its way, so the urgent one waits for the rest of it.
    assert data_of(wired.take_sent(), 1) == b"0123456789"
    wired.receive(window_update(1, 6))
    assert data_of(wired.take_sent(), 1) == b"abcdef"
    wired.receive(window_update(1, 100))
    assert data_of(wired.take_sent(), 1) == b"g!!"
    assert not stream.waiting
    assert flow.taken == 17


async def test_a_sender_stays_within_the_window_of_the_connection() -> None:
    wired, peer = Wired(), Peer()
    wired.receive(
        PREFACE, settings({4: LARGEST}), peer.headers(1, REQUEST), peer.headers(3, REQUEST)
    )
    one, two = answered(wired, 1), answered(wired, 3)
    one.send(None, 65_000, bytes(65_000))
    two.send(None, 1000, b"x" * 1000)
    sent = wired.take_sent()
    assert (len(data_of(sent, 1)), len(data_of(sent, 3))) == (65_000, 535)
    one.send(None, 2000, b"y" * 2000)
    assert wired.take_sent() == b""
    wired.receive(window_update(0, 500))
    sent = wired.take_sent()
    assert len(data_of(sent, 1)) + len(data_of(sent, 3)) == 500
    wired.receive(window_update(0, 10_000))
    sent += wired.take_sent()
    assert (len(data_of(sent, 1)), len(data_of(sent, 3))) == (2000, 465)


@pytest.mark.parametrize("place", range(1, 13))
@pytest.mark.parametrize("whose", [0, 1], ids=["connection", "stream"])
async def test_a_grant_that_comes_in_two_reads_lets_go_what_waits(whose: int, place: int) -> None:
    wired, _ = server(window=10 if whose else LARGEST)
    stream = answered(wired)
    if not whose:
        wired.connection.h2.outbound_flow_control_window = 10
    stream.send(None, 15, b"0123456789abcde")
    assert data_of(wired.take_sent(), 1) == b"0123456789"
    grant = window_update(whose, 5)
    wired.receive(grant[:place])
    assert wired.take_sent() == b""
    wired.receive(grant[place:])
    assert data_of(wired.take_sent(), 1) == b"abcde"


async def test_how_much_could_go_now() -> None:
    wired, _ = server(window=1000)
    stream = answered(wired)
    assert stream.room == 1000
    stream.send(None, 400, bytes(400))
    assert stream.room == 600
    stream.send(None, 700, bytes(700))
    wired.receive(window_update(1, 50))
    assert stream.room == 0, "something waits"
    wired.receive(window_update(1, 10**6))
    assert stream.room == 10**6 - 50
    wired.connection.output.blocked = True
    assert stream.room == 0
    narrow, peer = Wired(), Peer()
    narrow.receive(PREFACE, settings({4: LARGEST}), peer.headers(1, REQUEST))
    assert narrow.stream(1).room == 65_535


async def test_a_window_may_become_negative() -> None:
    wired, _ = server(window=1000)
    stream = answered(wired)
    stream.send(None, 900, bytes(900))
    wired.receive(settings({4: 100}))
    wired.take_sent()
    assert stream.h2.outbound_flow_control_window == -800
    stream.send(None, 50, bytes(50))
    wired.receive(window_update(1, 800))
    assert wired.take_sent() == b""
    wired.receive(window_update(1, 20))
    assert len(data_of(wired.take_sent(), 1)) == 20
    wired.receive(settings({4: 1000}))
    assert len(data_of(wired.take_sent(), 1)) == 30
    assert stream.h2.outbound_flow_control_window == 1000 - 900 - 50 + 820


async def test_frames_are_as_large_as_the_peer_takes_them() -> None:
    wired, _ = server()
    stream = answered(wired)
    body = bytes(n % 253 for n in range(50_000))
    stream.send(None, 50_000, body[:5], (body[5:40_000], b"", body[40_000:]))
    sent = wired.take_sent()
    assert data_sizes(sent) == [16_375] * 3 + [875]
    assert data_of(sent, 1) == body
    wired.receive(settings({5: 40_000}))
    wired.take_sent()
    stream.send(None, 50_000, body[:30_000], (body[30_000:],))
    sent = wired.take_sent()
    assert data_sizes(sent) == [40_000, 10_000]
    assert data_of(sent, 1) == body
    wired.receive(settings({5: 2**20}))
    wired.take_sent()
    stream.send(None, 50_000, body)
    assert data_sizes(wired.take_sent()) == [50_000]


async def test_flows_of_a_stream_share_it_and_streams_share_the_connection() -> None:
    wired, peer = Wired(), Peer()
    wired.receive(
        PREFACE, settings({4: LARGEST}), peer.headers(1, REQUEST), peer.headers(3, REQUEST)
    )
    one, two = answered(wired, 1), answered(wired, 3)
    one.send(None, 65_535, bytes(65_535))
    flows = [Flow() for _ in range(3)]
    for _ in range(20):
        one.send(flows[0], QUANTUM, bytes(QUANTUM))
        one.send(flows[1], QUANTUM // 2, bytes(QUANTUM // 2))
        two.send(flows[2], QUANTUM, bytes(QUANTUM))
    wired.take_sent()
    for _ in range(6):
        wired.receive(window_update(0, 2 * QUANTUM))
    assert flows[2].taken == 6 * QUANTUM
    assert flows[0].taken + flows[1].taken == 6 * QUANTUM
    assert abs(flows[0].taken - flows[1].taken) <= 2 * QUANTUM


async def test_what_is_sent_now_does_not_overtake_what_may_go_now() -> None:
    wired, _ = server(window=0)
    stream = answered(wired)
    with current_outbox():
        stream.send(None, 1, b"1")
        wired.receive(window_update(1, 100))
        stream.send(None, 1, b"2")
    assert data_of(wired.take_sent(), 1) == b"12"


async def test_a_stream_that_is_gone_does_not_wait_for_a_window() -> None:
    wired, peer = Wired(), Peer()
    wired.receive(PREFACE, settings({4: LARGEST}), peer.headers(1, REQUEST))
    stream = answered(wired)
    stream.send(None, 70_000, bytes(70_000))
    assert stream in wired.connection.output._ready
    wired.connection.reset_stream(stream, ErrorCodes.CANCEL)
    assert not wired.connection.output._ready
    wired.take_sent()
    wired.receive(window_update(0, 10_000))
    assert wired.take_sent() == b""


async def test_nothing_is_written_before_the_start() -> None:
    transport = FakeTransport()
    connection = Http2Connection(cast("Transport", transport), client=True, limits=Http2Limits())
    stream = connection.open_stream(REQUEST, Handler())
    stream.send(None, 5, b"hello")
    connection.announce_end()
    assert transport.sent == b""
    connection.output.start()
    sent = parse_frames(transport.sent.removeprefix(PREFACE))
    assert types(sent) == ["Settings", "WindowUpdate", "Headers", "GoAway", "Ping", "Data"]


async def test_a_held_flow_and_its_release() -> None:
    wired, _ = server()
    stream, flow = answered(wired), Flow()
    flow.held = True
    stream.send(flow, 4, b"held")
    stream.send(None, 5, b"other")
    assert data_of(wired.take_sent(), 1) == b"other"
    stream.resume_flow(flow)
    assert data_of(wired.take_sent(), 1) == b"held"
    flow.held = True
    stream.send(flow, 7, b"dropped")
    assert stream.drop_flow(flow) == 7
    stream.resume_flow(flow)
    assert wired.take_sent() == b""


async def test_what_on_drain_sends_goes_behind() -> None:
    wired, _ = server(window=0)
    stream = answered(wired)
    flow = Flow()
    answers = [b"2", b"3"]

    def more(_size: int) -> None:
        if answers:
            stream.send(flow, 1, answers.pop(0))
            stream.send(None, 1, b"u")

    flow.on_drain = more
    stream.send(flow, 1, b"1")
    wired.receive(window_update(1, 100))
    assert data_of(wired.take_sent(), 1) == b"1u2u3"
    assert not stream.waiting


async def test_on_drain_may_reset_the_stream() -> None:
    wired, _ = server(window=0)
    stream = answered(wired)
    flow = Flow(lambda _size: wired.connection.reset_stream(stream, ErrorCodes.CANCEL))
    stream.send(flow, 1, b"1")
    stream.send(flow, 1, b"2")
    wired.receive(window_update(1, 100))
    assert types(frames_of(wired)) == ["RstStream"]


async def test_an_end_waits_for_what_was_sent_before() -> None:
    wired, _ = server(window=10)
    stream, connection = answered(wired), wired.connection
    stream.send(None, 25, bytes(25))
    stream.when_sent(lambda: connection.send_headers(stream, TRAILERS, end=True))
    assert types(frames_of(wired)) == ["Data"]
    wired.receive(window_update(1, 10))
    assert types(frames_of(wired)) == ["Data"]
    # The last byte fills the window: the end needs none.
    wired.receive(window_update(1, 5))
    assert types(frames_of(wired)) == ["Data", "Headers", "RstStream"]
    assert not connection.streams


async def test_an_end_needs_no_window_of_the_connection() -> None:
    wired, peer = Wired(), Peer()
    wired.receive(PREFACE, settings({4: LARGEST}), peer.headers(1, REQUEST))
    stream, connection = answered(wired), wired.connection
    with current_outbox():
        stream.send(None, 65_535, bytes(65_535))
        stream.send(None, QUANTUM, bytes(QUANTUM))
        stream.when_sent(lambda: connection.send_headers(stream, TRAILERS, end=True))
    wired.take_sent()
    wired.receive(window_update(0, QUANTUM))
    assert connection.h2.outbound_flow_control_window == 0
    assert types(frames_of(wired)) == ["Data"] * 5 + ["Headers", "RstStream"]


async def test_an_end_with_nothing_before_it_goes_at_once() -> None:
    wired, _ = client(0)
    stream = wired.open()
    stream.when_sent(lambda: wired.connection.end_stream(stream))
    assert types(frames_of(wired)) == ["Headers", "Data"]


async def test_answers_that_are_not_fetched() -> None:
    wired, _ = server(2, window=0)
    stream = answered(wired)
    for _ in range(256):
        stream.send(None, 1024, bytes(1024))
    assert stream.open
    stream.send(None, 1, b"1")
    assert wired.exceeded == ["answers"]
    [frame] = frames_of(wired)
    assert isinstance(frame, RstStreamFrame)
    assert frame.error_code == ErrorCodes.ENHANCE_YOUR_CALM
    assert wired.handlers[1].reset == (11, "the peer does not fetch its answers")
    assert list(wired.connection.streams) == [3]


async def test_answers_that_are_not_fetched_without_anybody_to_tell() -> None:
    wired, _ = server(window=0)
    wired.connection._on_limit = None
    stream = answered(wired)
    stream.send(None, 1, b"1")
    stream.send(None, 300_000, bytes(300_000))
    assert not stream.open
    wired.connection.exceed("limit", "reason")
    assert error_of(wired) == ErrorCodes.ENHANCE_YOUR_CALM


# -- sending: a full socket ------------------------------------------------------------------------------


async def until_written(wired: Wired) -> list[Frame]:
    wired.transport.make_room()
    await trio.testing.wait_all_tasks_blocked()
    return frames_of(wired)


async def test_a_full_socket_keeps_the_order(nursery: trio.Nursery) -> None:
    wired, _ = server(2)
    connection = wired.connection
    connection._nursery = nursery
    stream = wired.stream(1)
    wired.transport.full = True
    flow, other = Flow(), Flow()
    connection.send_headers(stream, RESPONSE)
    assert connection.output.blocked
    stream.send(flow, 1, b"1")
    stream.send(other, 1, b"2")
    wired.receive(raw(PING, 0, 0, b"answerme"))
    stream.send(None, 1, b"0")
    stream.when_sent(lambda: connection.send_headers(stream, TRAILERS, end=True))
    connection.send_headers(wired.stream(3), RESPONSE)
    assert (flow.queued, len(wired.transport.sent)) == (1, 0)
    sent = await until_written(wired)
    assert types(sent) == [
        "Headers",
        "Ping",
        "Headers",
        "Data",  # what goes out together shares a frame
        "Headers",
        "RstStream",
    ]
    assert [f.stream_id for f in sent] == [1, 0, 3, 1, 1, 1]
    assert b"".join(f.data for f in sent if isinstance(f, DataFrame)) == b"012"
    assert not connection.output.blocked


async def test_a_socket_that_fills_up_again(nursery: trio.Nursery) -> None:
    wired, _ = server()
    connection = wired.connection
    connection._nursery = nursery
    stream = answered(wired)
    wired.transport.full = True
    for n in range(6):
        stream.send(None, 50_000, bytes([n]) * 50_000)
    received = b""
    for _ in range(12):
        wired.transport.make_room()
        wired.transport.full = True
        await trio.testing.wait_all_tasks_blocked()
        received += data_of(wired.take_sent(), 1)
    assert received == b"".join(bytes([n]) * 50_000 for n in range(6))
    assert not stream.waiting


async def test_much_in_one_batch_is_written_in_between(nursery: trio.Nursery) -> None:
    wired, _ = server()
    wired.connection._nursery = nursery
    stream = answered(wired)
    with current_outbox():
        stream.send(None, 400_000, bytes(400_000))
        assert wired.transport.sent == b""
        stream.send(None, 400_000, bytes(400_000))
        assert len(wired.transport.sent) > 800_000
        wired.transport.full = True
        stream.send(None, 600_000, b"1" * 600_000)
        assert wired.connection.output.blocked
        stream.send(None, 1, b"2")
        assert stream.waiting
    wired.take_sent()
    sent = await until_written(wired)
    body = b"".join(f.data for f in sent if isinstance(f, DataFrame))
    assert body == b"1" * 600_000 + b"2"


async def test_a_lent_buffer_may_be_used_again_after_the_batch(nursery: trio.Nursery) -> None:
    wired, _ = server()
    wired.connection._nursery = nursery
    stream = answered(wired)
    buffer = bytearray(b"first")
    wired.transport.full = True
    with current_outbox():
        stream.send(None, 5, memoryview(buffer))
    buffer[:] = b"XXXXX"
    buffer = bytearray(b"other")
    with current_outbox():
        stream.send(None, 5, memoryview(buffer))
    buffer[:] = b"XXXXX"
    sent = await until_written(wired)
    assert [f.data for f in sent if isinstance(f, DataFrame)] == [b"first", b"other"]


@pytest.mark.parametrize(
    "error", [trio.BrokenResourceError("gone"), trio.ClosedResourceError("gone")]
)
@pytest.mark.parametrize("while_draining", [False, True])
async def test_a_broken_socket(
    nursery: trio.Nursery, error: Exception, while_draining: bool
) -> None:
    wired, _ = server()
    connection = wired.connection
    connection._nursery = nursery
    stream = answered(wired)
    if while_draining:
        wired.transport.full = True
        stream.send(None, 1, b"1")
    wired.transport.broken = error
    if while_draining:
        await until_written(wired)
    else:
        stream.send(None, 1, b"1")
    assert connection.lost == "connection broken: gone"
    assert wired.transport.closed
    stream.send(None, 1, b"2")
    assert wired.take_sent() == b""


async def test_a_goaway_to_a_socket_that_is_gone() -> None:
    wired, _ = server()
    wired.transport.broken = trio.BrokenResourceError("gone")
    wired.connection.fail("test", ErrorCodes.INTERNAL_ERROR)
    assert wired.connection.lost == "test"


async def test_a_bug_in_what_is_called_while_writing_ends_that_connection_only(
    caplog: pytest.LogCaptureFixture,
) -> None:
    wired, _ = server(window=0)
    stream = answered(wired)
    stream.send(None, 1, b"1")

    def bug() -> None:
        raise ZeroDivisionError

    stream.when_sent(bug)
    wired.receive(window_update(1, 10))
    assert wired.connection.lost == "connection broken: internal error"
    assert "bug while writing" in caplog.text
    other, _ = server()
    with current_outbox():
        answered_other = other.stream(1)
        other.connection.send_headers(answered_other, RESPONSE)
    assert types(frames_of(other)) == ["Headers"]


# -- limits ----------------------------------------------------------------------------------------------

LOW = Http2Limits(max_resets_per_s=10, max_control_frames_per_s=100, max_header_list=1000)


def flood(wired: Wired, frames: Callable[[int], bytes], count: int = 1000) -> int:
    """Send up to *count* batches; return how many it took to be cut off."""
    for n in range(count):
        wired.receive(frames(n))
        if wired.connection.lost:
            assert error_of(wired) == ErrorCodes.ENHANCE_YOUR_CALM
            return n
    return count


async def test_rapid_reset(autojump_clock: MockClock) -> None:
    wired, peer = server(0, limits=LOW)

    def open_and_reset(n: int) -> bytes:
        return peer.headers(2 * n + 1, REQUEST) + raw(RST_STREAM, 0, 2 * n + 1, b"\0\0\0\x08")

    assert flood(wired, open_and_reset) == 50
    assert wired.exceeded == ["resets"]
    wired.connection._end()
    assert len(wired.handlers) == 51
    assert all(handler.reset for handler in wired.handlers.values())
    assert not wired.connection.streams


@pytest.mark.parametrize("way", ["window", "data", "trailers"])
async def test_resets_that_the_client_has_us_make(autojump_clock: MockClock, way: str) -> None:
    """CVE-2025-8671: frames that are wrong for a stream end it as its client's own reset does."""
    wired, peer = server(0, limits=LOW)

    def open_and_break(n: int) -> bytes:
        number = 2 * n + 1
        if way == "window":
            return peer.headers(number, REQUEST) + window_update(number, LARGEST)
        opened = peer.headers(number, REQUEST, end=True)
        if way == "data":
            return opened + data(number, b"x")
        return opened + peer.headers(number, TRAILERS, end=True)

    assert flood(wired, open_and_break) == 50
    assert wired.exceeded == ["resets"]


async def test_resets_at_a_bearable_rate(autojump_clock: MockClock) -> None:
    wired, peer = server(0, limits=LOW)
    for n in range(200):
        wired.receive(peer.headers(2 * n + 1, REQUEST), raw(RST_STREAM, 0, 2 * n + 1, bytes(4)))
        await trio.sleep(0.1)
    assert wired.connection.lost is None


async def test_resets_of_calls_that_were_useful_are_no_flood() -> None:
    wired, peer = server(0, limits=LOW)
    for n in range(90):
        wired.receive(peer.headers(2 * n + 1, REQUEST))
        wired.stream(2 * n + 1).useful = True
        wired.receive(raw(RST_STREAM, 0, 2 * n + 1, bytes(4)))
    assert wired.connection.lost is None


async def test_a_server_may_reset_as_it_likes() -> None:
    wired, _ = client(0)
    for _ in range(2000):
        wired.receive(raw(RST_STREAM, 0, wired.open().id, b"\0\0\0\x07"))
    assert wired.connection.lost is None
    assert all(handler.reset for handler in wired.handlers.values())


CONTROL_FRAMES = {
    "ping": raw(PING, 0, 0, bytes(8)),
    "ping ack": raw(PING, ACK, 0, bytes(8)),
    "settings": settings({4: 70_000}),
    "priority": raw(PRIORITY, 0, 1, b"\0\0\0\0\x10"),
    "empty data": data(1, b""),
    "window update": window_update(1, 1),
    "reset of a stream that is gone": raw(RST_STREAM, 0, 3, bytes(4)),
    "unknown": raw(200, 0, 0, b"?"),
}


@pytest.mark.parametrize("name", CONTROL_FRAMES)
@pytest.mark.parametrize("at_once", [False, True])
async def test_floods_of_control_frames(
    autojump_clock: MockClock, name: str, at_once: bool
) -> None:
    wired, _ = server(2, limits=LOW, window=0)
    wired.connection.reset_stream(wired.stream(3), ErrorCodes.CANCEL)
    frame = CONTROL_FRAMES[name]
    if at_once:
        wired.receive(frame * 200)
        assert error_of(wired) == ErrorCodes.ENHANCE_YOUR_CALM
    else:
        # A few more than the limit says, paid for by their own bytes.
        assert flood(wired, lambda _n: frame) < 110
    assert wired.exceeded == ["control_frames"]
    assert "too many" in (wired.connection.lost or "")


async def test_settings_cost_more_than_other_frames(autojump_clock: MockClock) -> None:
    wired, _ = server()
    for n in range(90):
        wired.receive(settings({4: 70_000 + n}))
    await trio.sleep(5)
    for n in range(50):
        wired.receive(settings({4: 70_000 + n}))
    assert wired.connection.lost is None
    wired.receive(settings({}) * 20)
    assert wired.connection.lost == "too many SETTINGS"


async def test_control_frames_at_a_bearable_rate(autojump_clock: MockClock) -> None:
    wired, _ = server(limits=LOW)
    for _ in range(50):
        wired.receive(raw(PING, 0, 0, bytes(8)) * 50)
        await trio.sleep(0.5)
    assert wired.connection.lost is None


async def test_a_busy_go_peer_is_not_punished(autojump_clock: MockClock) -> None:
    """grpc-go: WINDOW_UPDATE for stream and connection, one PING a batch to measure the line."""
    wired, _ = server(limits=LOW)
    stream = answered(wired)
    for _ in range(3000):
        wired.receive(data(1, bytes(16_384)), raw(PING, 0, 0, bytes(8)))
    assert wired.connection.lost is None
    # Downloading: it sends nothing but these.
    for _ in range(3000):
        stream.send(None, 16_384, bytes(16_384))
        wired.receive(window_update(1, 16_384), window_update(0, 16_384), raw(PING, 0, 0, bytes(8)))
        wired.take_sent()
    assert wired.connection.lost is None


async def test_a_huge_control_frame_is_cut_off_at_its_header() -> None:
    wired, _ = server()
    wired.receive(raw(200, 0, 0, bytes(64 * 1024)))
    assert wired.connection.lost is None or "overlong" in wired.connection.lost
    wired, _ = server()
    wired.receive((64 * 1024 + 1).to_bytes(3, "big") + bytes((200, 0)) + bytes(4))
    assert error_of(wired) == ErrorCodes.ENHANCE_YOUR_CALM
    assert wired.exceeded == ["control_frames"]


async def test_a_continuation_flood() -> None:
    wired, peer = server(0, limits=LOW)
    block = peer.encoder.encode(REQUEST)
    wired.receive(raw(HEADERS, 0, 1, block))
    taken = 0
    while not wired.connection.lost:
        wired.receive(raw(CONTINUATION, 0, 1, bytes(100)))
        taken += 1
    assert taken <= 20
    assert error_of(wired) == ErrorCodes.ENHANCE_YOUR_CALM
    assert wired.exceeded == ["header_list"]


async def test_a_flood_of_empty_continuations() -> None:
    wired, peer = server(0, limits=Http2Limits(max_control_frames_per_s=20))
    wired.receive(raw(HEADERS, 0, 1, peer.encoder.encode(REQUEST)))
    wired.receive(raw(CONTINUATION, 0, 1) * 40)
    assert error_of(wired) == ErrorCodes.ENHANCE_YOUR_CALM
    assert wired.exceeded == ["control_frames"]


async def test_a_large_header_block_in_one_frame() -> None:
    wired, _ = server(0, limits=LOW)
    wired.receive(raw(HEADERS, END_HEADERS, 1, bytes(2001))[:9])
    assert error_of(wired) == ErrorCodes.ENHANCE_YOUR_CALM
    assert wired.exceeded == ["header_list"]


async def test_header_blocks_are_counted_one_by_one() -> None:
    wired, peer = server(0, limits=LOW)
    for n in range(100):
        block = peer.encoder.encode([*REQUEST, (b"n", b"%d" % n * 100)])
        wired.receive(raw(HEADERS, 0, 2 * n + 1, block[:20]))
        wired.receive(raw(CONTINUATION, END_HEADERS, 2 * n + 1, block[20:]))
    assert wired.connection.lost is None
    assert len(wired.handlers) == 100


@pytest.mark.parametrize("begin", [HEADERS, PUSH_PROMISE])
@pytest.mark.parametrize("amid", [data(1, b"x"), raw(PING, 0, 0, bytes(8))])
@pytest.mark.parametrize("cut", [0, 5])
async def test_something_amid_a_header_block(begin: int, amid: bytes, cut: int) -> None:
    wired, peer = server()
    block = (b"\0\0\0\x02" if begin == PUSH_PROMISE else b"") + peer.encoder.encode(REQUEST)
    wired.receive(raw(begin, 0, 3, block), amid[:cut])
    wired.receive(amid[cut:])
    assert error_of(wired) == ErrorCodes.PROTOCOL_ERROR
    assert wired.handlers[1].data == b""


async def test_a_peer_that_does_not_read_its_answers(nursery: trio.Nursery) -> None:
    wired, _ = server()
    wired.connection._nursery = nursery
    wired.transport.full = True
    wired.connection.ping()
    batch = raw(PING, 0, 0, bytes(8)) * 1000
    taken = 0
    while not wired.connection.lost:
        wired.receive(batch)
        wired.connection._receiver.moved = 10**9  # not the business of this test
        taken += 1
    assert taken == 2**20 // 17_000 + 1, "17,000 bytes of answers to a batch"
    assert wired.exceeded == ["backlog"]
    assert wired.connection.lost == "the peer does not read its answers"


async def test_more_streams_than_allowed() -> None:
    wired, peer = server(0, limits=Http2Limits(max_streams=3))
    for stream_id in (1, 3, 5):
        wired.receive(peer.headers(stream_id, REQUEST))
    wired.receive(raw(RST_STREAM, 0, 3, bytes(4)), peer.headers(7, REQUEST))
    assert list(wired.connection.streams) == [1, 5, 7]
    wired.receive(peer.headers(9, REQUEST))
    assert wired.connection.lost
    assert wired.connection.at_fault
    assert wired.exceeded == ["streams"]


async def test_a_header_list_that_is_too_large() -> None:
    """Small on the wire, for every field after the first is a reference to it."""
    wired, peer = server(0, limits=Http2Limits(max_header_list=4096))
    wired.receive(peer.headers(1, [*REQUEST, *[(b"x-filler", b"y" * 1000)] * 5]))
    assert wired.connection.lost
    assert wired.connection.at_fault
    assert wired.exceeded == ["header_list"]


async def test_the_peers_limit_of_streams() -> None:
    wired = Wired(client=True)
    wired.receive(settings({3: 1}))
    stream = wired.open()
    with pytest.raises(TooManyStreamsError):
        wired.open()
    wired.connection.reset_stream(stream, ErrorCodes.CANCEL)
    assert wired.open().id == 3


async def test_a_server_that_makes_requests_is_refused() -> None:
    wired, peer = client()
    wired.receive(peer.headers(2, REQUEST, end=True))
    [frame] = frames_of(wired)
    assert isinstance(frame, RstStreamFrame)
    assert frame.error_code == ErrorCodes.REFUSED_STREAM
    assert list(wired.connection.h2.streams) == [1]


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00" * 10,
        PREFACE[:-1] + b"!",
        bytes(50),
    ],
)
async def test_something_that_is_not_http2(garbage: bytes) -> None:
    wired = Wired()
    wired.receive(garbage)
    assert wired.connection.lost == "protocol error: Invalid HTTP/2 preamble."
    assert wired.transport.closed
    # As grpc-go, without a GOAWAY: whoever is there does not speak HTTP/2.
    assert goaways(wired.take_sent()) == []


# -- PING and keepalive ----------------------------------------------------------------------------------


async def test_a_ping_and_its_answer() -> None:
    wired, _ = server()
    answered_pings: list[int] = []
    wired.connection.ping(lambda: answered_pings.append(1))
    wired.connection.ping()
    wired.connection.ping(lambda: answered_pings.append(3))
    first, second, third = (f for f in frames_of(wired) if isinstance(f, PingFrame))
    wired.receive(raw(PING, ACK, 0, b"whatever"))
    assert answered_pings == []
    for frame in (third, second, first, first):
        wired.receive(raw(PING, ACK, 0, frame.opaque_data))
    assert answered_pings == [3, 1]
    assert not wired.connection._pings


async def test_a_ping_is_answered_at_once() -> None:
    wired, _ = server()
    wired.receive(raw(PING, 0, 0, b"question"))
    [frame] = frames_of(wired)
    assert isinstance(frame, PingFrame)
    assert (frame.opaque_data, set(frame.flags)) == (b"question", {"ACK"})


async def test_a_peer_that_never_answers_pings() -> None:
    wired, _ = server()
    for _ in range(10_000):
        wired.connection.ping()
    assert wired.connection.lost is None
    wired.connection.ping()
    assert error_of(wired) == ErrorCodes.ENHANCE_YOUR_CALM
    assert wired.exceeded == ["pings"]


async def test_keepalive(autojump_clock: MockClock) -> None:
    wired, _ = server()
    connection = wired.connection

    def look() -> list[Frame]:
        connection.check_alive(trio.current_time(), 30, 20)
        return frames_of(wired)

    await trio.sleep(29)
    assert look() == []
    await trio.sleep(1)
    [ping] = look()
    assert isinstance(ping, PingFrame)
    await trio.sleep(19)
    assert look() == []
    wired.receive(raw(PING, ACK, 0, ping.opaque_data))
    await trio.sleep(29)
    assert look() == []
    await trio.sleep(1)
    assert types(look()) == ["Ping"]
    # Anything that comes is a sign of life, also without the answer.
    await trio.sleep(15)
    wired.receive(data(1, b"alive"))
    await trio.sleep(20)
    assert look() == []
    await trio.sleep(1)
    assert look() == []
    assert connection.lost == "keepalive ping failed to receive ACK within timeout"
    assert wired.transport.closed


async def test_a_peer_that_never_greets(autojump_clock: MockClock) -> None:
    wired, greeted = Wired(), Wired(client=True)
    greeted.receive(settings({}))
    await trio.sleep(20)
    wired.receive(PREFACE)
    for one in (wired, greeted):
        one.connection.check_alive(trio.current_time(), 30, 20)
    assert wired.connection.lost is None
    await trio.sleep(0.5)
    for one in (wired, greeted):
        one.connection.check_alive(trio.current_time(), 30, 20)
    assert greeted.connection.lost is None
    assert wired.transport.closed
    assert "preface" in str(wired.connection.lost)


@pytest.mark.parametrize("cut", [1, 8, 9, 16, 17])
async def test_a_ping_that_is_cut_is_answered_too(cut: int) -> None:
    wired, _ = server()
    frame = raw(PING, 0, 0, b"question")
    wired.receive(frame[:cut])
    wired.receive(frame[cut:] + data(1, b"x"))
    [sent] = frames_of(wired)
    assert isinstance(sent, PingFrame)
    assert (sent.opaque_data, set(sent.flags)) == (b"question", {"ACK"})
    assert wired.handlers[1].data == b"x"


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (raw(PING, 0, 1, bytes(8)), ErrorCodes.PROTOCOL_ERROR),
        (raw(PING, 0, 0, bytes(7)), ErrorCodes.FRAME_SIZE_ERROR),
        (raw(PING, ACK, 0, bytes(9)), ErrorCodes.FRAME_SIZE_ERROR),
    ],
)
async def test_a_wrong_ping(frame: bytes, code: ErrorCodes) -> None:
    wired, _ = server()
    wired.receive(frame)
    assert error_of(wired) in (code, ErrorCodes.PROTOCOL_ERROR)


async def test_answers_stay_in_order() -> None:
    wired, _ = server()
    wired.receive(
        raw(PING, 0, 0, b"1" * 8),
        settings({}),
        raw(PING, 0, 0, b"2" * 8),
        raw(PING, 8, 0, b"3" * 8),
    )
    assert types(frames_of(wired)) == ["Ping", "Settings", "Ping", "Ping"]


# -- the end ---------------------------------------------------------------------------------------------


def answer_pings(wired: Wired) -> list[Frame]:
    sent = frames_of(wired)
    for frame in sent:
        if isinstance(frame, PingFrame) and "ACK" not in frame.flags:
            wired.receive(raw(PING, ACK, 0, frame.opaque_data))
    return sent


async def test_an_announced_end() -> None:
    wired, peer = server()
    connection = wired.connection
    idle: list[bool] = []
    connection.on_idle = lambda: idle.append(True)
    connection.announce_end()
    # What was on its way is taken.
    wired.receive(peer.headers(3, REQUEST))
    sent = answer_pings(wired)
    assert types(sent) == ["GoAway", "Ping"]
    assert connection.draining
    [final] = goaways(wired.take_sent())
    assert (final.last_stream_id, final.error_code) == (3, 0)
    # What comes now may be tried elsewhere.
    wired.receive(peer.headers(5, REQUEST), data(5, b"body"), data(1, b"goes on"))
    refused, *_ = frames_of(wired)
    assert isinstance(refused, RstStreamFrame)
    assert (refused.stream_id, refused.error_code) == (5, ErrorCodes.REFUSED_STREAM)
    assert wired.handlers[1].data == b"goes on"
    assert 5 not in wired.handlers
    connection.announce_end()
    assert wired.take_sent() == b"", "once is enough"
    connection.send_headers(wired.stream(1), TRAILERS, end=True)
    assert idle == []
    wired.receive(raw(RST_STREAM, 0, 3, bytes(4)))
    assert idle == [True]
    assert connection.lost is None


async def test_a_peer_that_ignores_the_announcement(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    wired, peer = server()
    wired.connection._nursery = nursery
    wired.connection.announce_end()
    await trio.sleep(4)
    wired.receive(peer.headers(3, REQUEST))
    assert types(frames_of(wired)) == ["GoAway", "Ping"]
    await trio.sleep(2)
    [final] = goaways(wired.take_sent())
    assert final.last_stream_id == 3
    assert wired.connection.draining


async def test_an_end_is_final_once(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    wired, _ = server()
    wired.connection._nursery = nursery
    wired.connection.announce_end()
    answer_pings(wired)
    assert len(goaways(wired.take_sent())) == 1
    await trio.sleep(10)
    assert wired.take_sent() == b""


async def test_the_end_of_an_idle_connection() -> None:
    wired, _ = server(0)
    idle: list[bool] = []
    wired.connection.on_idle = lambda: idle.append(True)
    wired.connection.announce_end()
    assert idle == []
    answer_pings(wired)
    assert idle == [True]


async def test_the_end_of_a_connection_that_the_peer_is_leaving() -> None:
    wired, _ = server(0)
    wired.receive(goaway(0, 0))
    assert wired.connection.draining
    idle: list[bool] = []
    wired.connection.on_idle = lambda: idle.append(True)
    wired.connection.announce_end()
    assert idle == [True]


async def test_a_graceful_goaway_from_the_server() -> None:
    wired, _ = client(3)
    idle: list[bool] = []
    wired.connection.on_idle = lambda: idle.append(True)
    wired.receive(goaway(LARGEST, 0), data(3, b"goes on"))
    assert wired.handlers[3].data == b"goes on"
    with pytest.raises(trio.ClosedResourceError):
        wired.open()
    wired.receive(goaway(3, 0))
    assert wired.handlers[5].reset == (ErrorCodes.REFUSED_STREAM, "not accepted before GOAWAY")
    assert list(wired.connection.streams) == [1, 3]
    wired.receive(data(1, b"", end=True))
    for stream in list(wired.connection.streams.values()):
        wired.connection.end_stream(stream)
    assert idle == []
    wired.receive(data(3, b"last", end=True))
    assert idle == [True]


async def test_a_graceful_goaway_from_the_client() -> None:
    wired, peer = server()
    wired.receive(goaway(0, 0), data(1, b"goes on"), peer.headers(3, REQUEST))
    assert wired.handlers[1].data == b"goes on"
    assert types(frames_of(wired)) == ["RstStream"]


async def test_a_goaway_with_an_error() -> None:
    wired, _ = server()
    wired.receive(goaway(0, 11) + b"", data(1, b"ignored"))
    assert "ENHANCE_YOUR_CALM" in (wired.connection.lost or "") or "11" in (
        wired.connection.lost or ""
    )
    assert wired.handlers[1].data == b""
    wired.connection._end()
    reset = wired.handlers[1].reset
    assert reset is not None
    assert reset[0] == ErrorCodes.CANCEL
    assert reset[1].startswith("GOAWAY")


async def test_events_after_the_end_are_not_handled() -> None:
    wired, peer = server(0)

    def refuse(_stream: Stream, _headers: list[Header]) -> Handler:
        wired.connection.fail("enough")
        return Handler()

    wired.make_handler = refuse
    wired.receive(peer.headers(1, REQUEST, end=True), peer.headers(3, REQUEST))
    assert list(wired.handlers) == [1]
    assert not wired.handlers[1].ended


async def test_every_stream_is_told_of_the_end_once() -> None:
    wired, _ = server(5)
    wired.handlers[1].hold = True
    wired.receive(data(1, bytes(10)))
    wired.connection._end()
    wired.connection._end()
    assert wired.connection.lost == "cancelled"
    [sent] = goaways(wired.take_sent())
    assert (sent.last_stream_id, sent.error_code) == (9, 0)
    assert all(h.reset == (ErrorCodes.CANCEL, "cancelled") for h in wired.handlers.values())


async def test_tasks_end_with_the_connection() -> None:
    wired, _ = server()

    async def never() -> None:
        raise AssertionError

    wired.connection.start_soon(never)
    wired.connection._end()
    wired.connection.start_soon(never)
    await trio.testing.wait_all_tasks_blocked()


# -- nothing is left behind ------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["finish", "reset", "reset by peer", "end by peer first"])
async def test_nothing_is_left_of_streams_that_are_gone(how: str) -> None:
    wired, peer = server(0)
    connection = wired.connection
    left: list[weakref.ref[Handler | H2Stream]] = []
    stream: Stream | None = None
    flow: Flow | None = None
    for n in range(1000):
        stream_id = 2 * n + 1
        wired.receive(peer.headers(stream_id, REQUEST), data(stream_id, bytes(50)))
        stream = wired.stream(stream_id)
        flow = Flow()
        stream.send(flow, 10, bytes(10))
        left += [weakref.ref(wired.handlers[stream_id]), weakref.ref(stream.h2)]
        if how == "finish":
            connection.send_headers(stream, TRAILERS, end=True)
        elif how == "reset":
            connection.reset_stream(stream, ErrorCodes.CANCEL)
        elif how == "reset by peer":
            stream.useful = True
            wired.receive(raw(RST_STREAM, 0, stream_id, bytes(4)))
        else:
            wired.receive(data(stream_id, b"end", end=True))
            connection.send_headers(stream, TRAILERS, end=True)
        wired.take_sent()
    stream = flow = None
    wired.handlers.clear()
    gc.collect()
    assert not [ref for ref in left if ref() is not None]
    streams = [o for o in gc.get_objects() if isinstance(o, Stream)]
    assert [o for o in streams if o.connection is connection] == []
    assert not connection.streams
    assert not connection.h2.streams
    assert not connection._receiver.plain
    assert not connection._receiver.thirsty
    assert not connection._unsettled
    assert not connection.output._ready
    assert connection.output._frames == []
    assert connection.output.waiting == 0
    assert len(connection.h2._closed_streams) <= 1024
