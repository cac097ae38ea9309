"""Our receiving half against plain h2: the same bytes, however they are cut, mean the same.

One side is an ``Http2Connection`` whose reader is the test: DATA passes by h2. The other is h2 as it
is, fed frame by frame, with the same settings; it is granted what ours grants, when ours does.
Everything that can be seen from outside is compared: what the handlers were told, h2's events, every
frame sent, the windows of the connection and the streams in both directions, and the error.
"""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any

import hpack
import pytest
import trio
from examples import examples
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    PingAckReceived,
    PingReceived,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import H2Error, ProtocolError
from h2.settings import SettingCodes, Settings
from h2_peers import (
    ACK,
    CONTINUATION,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PADDED,
    PREFACE,
    PRIORITY,
    PRIORITY_FLAG,
    PUSH_PROMISE,
    REQUEST,
    RESPONSE,
    RST_STREAM,
    TRAILERS,
    Handler,
    Wired,
    data,
    goaway,
    parse_frames,
    raw,
    settings,
    window_update,
)
from hyperframe.frame import GoAwayFrame, WindowUpdateFrame
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from clusterproxy.http2.limits import Http2Limits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Header = tuple[bytes, bytes]
Item = tuple[Any, ...]

# Windows small enough to be overdrawn. The limits that h2 does not have are out of reach, except that
# of the header list, which it shares.
LIMITS = Http2Limits(
    max_window=0,
    window=20_000,
    connection_window=70_000,
    max_frame_size=16_384,
    max_streams=6,
    max_header_list=4096,
    max_resets_per_s=10**6,
    max_control_frames_per_s=10**6,
)


def comparable_events(received: Sequence[Event]) -> list[str]:
    # These may pass by h2; what becomes of them is compared otherwise (payloads, output, answers, windows).
    passing = DataReceived | PingReceived | PingAckReceived | WindowUpdated
    return [repr(event) for event in received if not isinstance(event, passing)]


class Ours(Wired):
    def __init__(self, *, client: bool) -> None:
        super().__init__(client=client, limits=LIMITS)
        self.credits: list[tuple[int, int | None]] = []
        self.events: list[str] = []
        h2 = self.connection.h2
        increment, handle = h2.increment_flow_control_window, self.connection.handle

        def note_credit(size: int, stream_id: int | None = None) -> None:
            self.credits.append((size, stream_id))
            increment(size, stream_id)

        def note_events(received: Any) -> None:
            self.events += comparable_events(received)
            handle(received)

        h2.increment_flow_control_window = note_credit  # type: ignore[method-assign, assignment]
        self.connection.handle = note_events  # type: ignore[method-assign]
        self.answers: list[bytes] = []
        self.connection.note_answer = lambda payload: self.answers.append(bytes(payload))  # type: ignore[method-assign]

    @property
    def amid_plain_data(self) -> bool:
        return self.connection._receiver._data_stream is not None


class Plain:
    """h2 as it is, and what a handler would be told of its events."""

    def __init__(self, *, client: bool) -> None:
        self.client = client
        self.h2 = H2Connection(
            H2Configuration(
                client_side=client,
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        values: dict[SettingCodes | int, int] = {
            SettingCodes.INITIAL_WINDOW_SIZE: LIMITS.window,
            SettingCodes.MAX_FRAME_SIZE: LIMITS.max_frame_size,
            SettingCodes.MAX_HEADER_LIST_SIZE: LIMITS.max_header_list,
        }
        if client:
            values[SettingCodes.ENABLE_PUSH] = 0
        else:
            values[SettingCodes.MAX_CONCURRENT_STREAMS] = LIMITS.max_streams
        self.h2.local_settings = Settings(client=client, initial_values=values)  # type: ignore[arg-type]
        self.h2.max_inbound_frame_size = LIMITS.max_frame_size
        self.h2.decoder.max_header_list_size = LIMITS.max_header_list
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(LIMITS.connection_window - 65535)
        self.handlers: dict[int, Handler] = {}
        self.open: set[int] = set()
        self.ended: set[int] = set()
        self.draining = False
        self.dead = False
        self.error: ErrorCodes | None = None
        self.events: list[str] = []
        self.answers: list[bytes] = []
        self.sent = bytearray()
        self.pull()

    def pull(self) -> None:
        self.sent += self.h2.data_to_send()
        # h2 forgets closed streams when the next one is opened (and when asked for their number), ours
        # at once; what comes for them then is judged a little differently.
        self.counts = self.h2.open_inbound_streams, self.h2.open_outbound_streams

    def receive(self, frame: bytes) -> None:
        if self.dead:
            return
        state = self.h2.state_machine.state
        try:
            received = self.h2.receive_data(frame)
        except ProtocolError as error:
            self.dead, self.error = True, error.error_code
            self.pull()
            return
        self.events += comparable_events(received)
        for event in received:
            if isinstance(event, PingAckReceived):
                self.answers.append(event.ping_data)
            if isinstance(event, ConnectionTerminated):
                if event.error_code != ErrorCodes.NO_ERROR:
                    self.dead = True
                else:
                    # The one thing in which ours is meant to differ, see test_adapter.py.
                    self.h2.state_machine.state = state
                    self._on_graceful_goaway(event.last_stream_id or 0)
            else:
                self._on_event(event)
        self.pull()

    def _on_event(self, event: Event) -> None:
        stream_id = int(getattr(event, "stream_id", 0) or 0)
        if isinstance(event, RequestReceived):
            # h2 lets a server make requests of a client.
            if self.draining or self.client:
                self.h2.reset_stream(stream_id, ErrorCodes.REFUSED_STREAM)
                return
            self.handlers[stream_id] = Handler()
            self.open.add(stream_id)
        if stream_id not in self.open:
            return
        handler = self.handlers[stream_id]
        match event:
            case RequestReceived() | ResponseReceived() | TrailersReceived():
                handler.on_headers(event.headers)
            case DataReceived():
                handler.data += event.data or b""
            case StreamEnded():
                handler.on_end()
                self.ended.add(stream_id)
                self.close_if_done(stream_id)
            case StreamReset():
                handler.on_reset(event.error_code or 0, "")
                self.open.discard(stream_id)
            case _:
                pass

    def _on_graceful_goaway(self, last: int) -> None:
        self.draining = True
        for stream_id in sorted(self.open):
            if self.client and stream_id > last:
                self.handlers[stream_id].on_reset(ErrorCodes.REFUSED_STREAM, "")
                self.open.discard(stream_id)

    def close_if_done(self, stream_id: int) -> None:
        stream = self.h2.streams.get(stream_id)
        if stream is None or stream.closed:
            self.open.discard(stream_id)


class Bench:
    """Both sides, and a peer that makes the bytes."""

    def __init__(self, *, client: bool, cuts: Iterator[int]) -> None:
        self.client = client
        self.ours = Ours(client=client)
        self.plain = Plain(client=client)
        self._cuts = cuts
        self._encoder = hpack.Encoder()
        self._next_id = 1
        self._frames: list[bytes] = []
        self._deferred: list[tuple[int, int | None]] = []
        self._responded: set[int] = set()
        self._finished: set[int] = set()

    # -- what the peer sends -----------------------------------------------------------------------

    def put(self, *frames: bytes) -> None:
        self._frames += frames

    def put_headers(
        self, stream_id: int, headers: list[Header], flags: int, pieces: int, between: bytes = b""
    ) -> None:
        """A header block in HEADERS and *pieces* CONTINUATIONs, with something *between* them."""
        block = self._encoder.encode(headers)
        step = len(block) // (pieces + 1) + 1
        parts = [block[at : at + step] for at in range(0, len(block), step)]
        last = len(parts) - 1
        for index, part in enumerate(parts):
            piece = part
            kind, piece_flags = CONTINUATION, 0
            if not index:
                kind, piece_flags = HEADERS, flags
                if flags & PRIORITY_FLAG:
                    piece = b"\0\0\0\0\x10" + piece
                if flags & PADDED:
                    piece = b"\x03" + piece + bytes(3)
            if index == last:
                piece_flags |= END_HEADERS
            self.put(raw(kind, piece_flags, stream_id, piece))
            if between and index < last:
                self.put(between)

    def open_stream(self, flags: int, pieces: int, extra: list[Header], skip: int) -> None:
        if self.client:
            self.flush()
            self._open_ours()
            return
        self._next_id += 2 * skip
        self.put_headers(self._next_id, REQUEST + extra, flags, pieces)
        self._next_id += 2

    def _open_ours(self) -> None:
        if self.plain.dead:
            return
        stream_id = self.plain.h2.get_next_available_stream_id()
        if self.plain.draining:
            with pytest.raises(trio.ClosedResourceError):
                self.ours.open()
            return
        try:
            self.plain.h2.send_headers(stream_id, REQUEST)
        except H2Error as error:
            with pytest.raises(type(error)):
                self.ours.open()
            return
        self.plain.pull()
        self.plain.handlers[stream_id] = Handler()
        self.plain.open.add(stream_id)
        assert self.ours.open().id == stream_id

    # -- what our side does ------------------------------------------------------------------------

    def act(self, name: str, stream_id: int, size: int) -> None:
        self.flush()
        plain, connection = self.plain, self.ours.connection
        if plain.dead or stream_id not in plain.open:
            return
        stream = connection.streams[stream_id]
        can_send = stream_id not in self._finished and (self.client or stream_id in self._responded)
        if name == "respond":
            if self.client or stream_id in self._finished | self._responded:
                return
            plain.h2.send_headers(stream_id, RESPONSE)
            connection.send_headers(stream, RESPONSE)
            self._responded.add(stream_id)
        elif name == "finish":
            if self.client or not can_send:
                return
            plain.h2.send_headers(stream_id, TRAILERS, end_stream=True)
            if stream_id not in plain.ended:
                plain.h2.reset_stream(stream_id, ErrorCodes.NO_ERROR)
            plain.open.discard(stream_id)
            connection.send_headers(stream, TRAILERS, end=True)
        elif name == "end":
            if not can_send:
                return
            plain.h2.end_stream(stream_id)
            self._finished.add(stream_id)
            plain.close_if_done(stream_id)
            connection.end_stream(stream)
        elif name == "reset":
            plain.h2.reset_stream(stream_id, ErrorCodes.CANCEL)
            plain.open.discard(stream_id)
            connection.reset_stream(stream, ErrorCodes.CANCEL)
        elif name == "hold":
            handler = self.ours.handlers[stream_id]
            handler.hold = not handler.hold
        elif name == "send":
            if not can_send or size > plain.h2.local_flow_control_window(stream_id):
                return
            body = bytes(size)
            # Ours fills TLS records when frames are no larger than those.
            largest = plain.h2.max_outbound_frame_size
            largest -= 9 if largest == 16_384 else 0
            for at in range(0, size, largest):
                plain.h2.send_data(stream_id, body[at : at + largest])
            stream.send(None, size, body)
        plain.pull()
        self.compare()

    # -- feeding and comparing ---------------------------------------------------------------------

    def flush(self) -> None:
        """Let everything put down arrive, cut anywhere, and compare at its end."""
        frames, self._frames = self._frames, []
        wire = b"".join(frames)
        position, reached = 0, 0
        while position < len(wire):
            stop = position + next(self._cuts)
            if not self.ours.connection.lost:
                self.ours.receive(wire[position:stop])
            position = stop
            while frames and reached + len(frames[0]) <= position:
                frame = frames.pop(0)
                reached += len(frame)
                self.plain.receive(frame)
                self._grant_deferred()
            # Ours counts a DATA frame at its header, h2 at its end: grant when both have.
            self._deferred += self.ours.credits
            self.ours.credits.clear()
            if not self.ours.amid_plain_data:
                self._grant_deferred()
        self.compare()

    def _grant_deferred(self) -> None:
        if not self.plain.dead:
            for size, stream_id in self._deferred:
                self.plain.h2.increment_flow_control_window(size, stream_id)
            self.plain.pull()
        self._deferred.clear()

    def compare(self) -> None:
        ours, plain = self.ours, self.plain
        connection = ours.connection
        assert bool(connection.lost) == plain.dead, connection.lost
        assert ours.handlers.keys() == plain.handlers.keys()
        for stream_id, expected in plain.handlers.items():
            handler = ours.handlers[stream_id]
            assert handler.headers == expected.headers
            assert handler.data == expected.data
            assert handler.ended == expected.ended
            assert not handler.lent
            if expected.reset is None:
                assert handler.reset is None
            else:
                assert handler.reset is not None
                assert handler.reset[0] == expected.reset[0]
        assert ours.events == plain.events
        assert ours.answers == plain.answers
        assert comparable(ours.transport.sent) == comparable(plain.sent)
        if plain.dead:
            sent = parse_frames(ours.transport.sent.removeprefix(PREFACE))
            codes = [frame.error_code for frame in sent if isinstance(frame, GoAwayFrame)]
            assert codes == ([] if plain.error is None else [plain.error])
            return
        h2 = connection.h2
        assert h2.inbound_window == plain.h2.inbound_flow_control_window
        assert h2.outbound_flow_control_window == plain.h2.outbound_flow_control_window
        assert h2.max_outbound_frame_size == plain.h2.max_outbound_frame_size
        assert connection.output.max_frame_size == h2.max_outbound_frame_size
        assert connection.streams.keys() == plain.open
        for stream_id in plain.open:
            mine, theirs = h2.streams[stream_id], plain.h2.streams[stream_id]
            assert mine is connection.streams[stream_id].h2
            assert mine.inbound_flow_control_window == theirs.inbound_flow_control_window
            assert mine.outbound_flow_control_window == theirs.outbound_flow_control_window
            assert mine.state_machine.state == theirs.state_machine.state

    def finish(self) -> None:
        """End the connection: every stream that is open is told, once."""
        open_before = set(self.ours.connection.streams)
        self.ours.connection._end()
        for stream_id in open_before:
            assert self.ours.handlers[stream_id].reset is not None
        assert not self.ours.connection.streams
        assert not self.ours.connection._receiver.plain


def comparable(wire: bytes | bytearray) -> list[bytes]:
    frames: list[bytes] = []
    for frame in parse_frames(wire.removeprefix(PREFACE)):
        if isinstance(frame, WindowUpdateFrame):
            continue
        if isinstance(frame, GoAwayFrame):
            frame.additional_data = b""
        frames.append(frame.serialize())
    return frames


def run(items: list[Item], cuts: list[int], *, client: bool) -> None:
    bench = Bench(client=client, cuts=cycle(cuts))
    bench.put(*([] if client else [PREFACE]), settings({}), settings({}, ack=True))
    for _ in range(3):
        bench.open_stream(0, 0, [], 0)
    if client:
        for stream_id in (1, 3, 5):
            bench.put_headers(stream_id, RESPONSE, 0, 0)
    for name, *args in items:
        match name:
            case "open":
                bench.open_stream(*args)
            case "headers":
                bench.put_headers(*args)
            case "act":
                bench.act(*args)
            case _:
                bench.put(args[0])
        if bench.plain.dead:
            break
    bench.flush()
    bench.finish()


# -- what may come -------------------------------------------------------------------------------------

known_ids = st.sampled_from([1, 3, 5, 7])
any_ids = st.one_of(known_ids, st.sampled_from([0, 2, 9, 11, 101]))
sizes = st.one_of(
    st.integers(0, 300), st.sampled_from([0, 1, 5000, 9999, 10_000, 16_383, 16_384, 16_385, 20_001])
)
pads = st.one_of(st.none(), st.none(), st.integers(0, 255))
pieces = st.sampled_from([0, 0, 0, 1, 3])
header_flags = st.sampled_from(
    [0, 0, 0, END_STREAM, PADDED, PRIORITY_FLAG, PADDED | PRIORITY_FLAG | END_STREAM]
)
extras = st.sampled_from(
    [
        [],
        [],
        [(b"content-length", b"300")],
        [(b"content-length", b"0")],
        [(b"content-length", b"x")],
        [(b"long", b"v" * 3000)],
        [(b"too-long", b"v" * 5000)],
        [(b"UPPER", b"case")],
        [(b"te", b"trailers")],
    ]
)
later_headers = st.sampled_from(
    [RESPONSE, TRAILERS, REQUEST, [(b":status", b"100")], [*RESPONSE, (b"content-length", b"7")]]
)
data_frames = st.builds(
    lambda i, n, end, pad: data(i, bytes(n % 251 for n in range(n)), end=end, pad=pad),
    known_ids,
    sizes,
    st.sampled_from([False, False, False, True]),
    pads,
)
settings_frames = st.dictionaries(
    st.sampled_from([1, 2, 3, 4, 4, 5, 6, 8, 0x99]),
    st.sampled_from([0, 1, 2, 100, 4096, 16_384, 20_000, 65_535, 2**24 - 1, 2**31 - 1, 2**31]),
    max_size=2,
).map(settings)
legal_settings = st.one_of(
    st.sampled_from([0, 1, 100, 65_535, 200_000]).map(lambda v: settings({4: v})),
    st.sampled_from([16_384, 20_000, 2**24 - 1]).map(lambda v: settings({5: v})),
    st.sampled_from([0, 64, 4096]).map(lambda v: settings({1: v})),
)
window_updates = st.builds(
    window_update, any_ids, st.sampled_from([0, 1, 100, 70_000, 2**30, 2**31 - 1])
)
resets = st.builds(
    lambda i, code: raw(RST_STREAM, 0, i, code.to_bytes(4, "big")),
    any_ids,
    st.sampled_from([0, 1, 7, 8, 11, 99]),
)
pings = st.builds(
    lambda flags, body: raw(6, flags, 0, body),
    st.sampled_from([0, ACK]),
    st.binary(min_size=8, max_size=8),
)
priorities = st.builds(
    lambda i, on: raw(PRIORITY, 0, i, on.to_bytes(4, "big") + b"\x10"), any_ids, any_ids
)
unknown = st.builds(raw, st.integers(10, 255), st.integers(0, 255), any_ids, st.binary(max_size=40))
goaway_frames = st.builds(
    goaway, st.sampled_from([0, 1, 3, 2**31 - 1]), st.sampled_from([0, 0, 0, 1, 11])
)
wild = st.builds(raw, st.integers(0, 12), st.integers(0, 255), any_ids, st.binary(max_size=30))
half_promise = st.just(raw(PUSH_PROMISE, 0, 1, b"\0\0\0\x02\x82"))


class Wire(bytes):
    """A frame that a failure shows in short."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"Wire({bytes(self[:20])!r} + {max(0, len(self) - 20)} bytes)"


def frames(strategy: st.SearchStrategy[bytes]) -> st.SearchStrategy[Item]:
    return strategy.map(lambda frame: ("frame", Wire(frame)))


bulk = st.builds(
    lambda i, n: data(i, bytes(n)), known_ids, st.sampled_from([1, 500, 9000, 10_000, 16_384])
)
legal_window_updates = st.builds(window_update, known_ids, st.sampled_from([1, 100, 70_000]))
illegal = st.one_of(
    st.one_of(data_frames, settings_frames, window_updates, goaway_frames, wild, half_promise).map(
        lambda frame: ("frame", Wire(frame))
    ),
    st.tuples(
        st.just("headers"),
        any_ids,
        later_headers,
        st.sampled_from([END_STREAM, 0, PADDED]),
        pieces,
        st.one_of(st.just(b""), data_frames, pings),
    ),
)
actions = st.tuples(
    st.just("act"),
    st.sampled_from(
        ["respond", "respond", "finish", "end", "reset", "hold", "hold", "send", "send"]
    ),
    known_ids,
    st.sampled_from([1, 1000, 17_000, 40_000]),
)
items = st.one_of(
    frames(bulk),
    frames(bulk),
    frames(bulk),
    frames(bulk),
    frames(data_frames),
    frames(data_frames),
    actions,
    actions,
    actions,
    frames(st.one_of(legal_settings, legal_window_updates)),
    frames(st.one_of(resets, pings, priorities, unknown)),
    st.tuples(st.just("open"), header_flags, pieces, extras, st.sampled_from([0, 0, 0, 1])),
    st.tuples(
        st.just("headers"), known_ids, st.just(TRAILERS), st.just(END_STREAM), pieces, st.just(b"")
    ),
    illegal,
)
cut_sizes = st.lists(
    st.one_of(st.integers(1, 30), st.integers(1, 20_000), st.sampled_from([1, 9, 10, 10**6])),
    min_size=1,
    max_size=12,
)
thorough = hypothesis_settings(
    derandomize=True,
    deadline=None,
    max_examples=examples(600),
    suppress_health_check=[HealthCheck.too_slow],
)

FULL = Wire(data(1, bytes(10_000)))
RESET_3 = raw(RST_STREAM, 0, 3, b"\0\0\0\x08")


@example(items=[("frame", FULL), ("frame", data(1, b"tail", end=True))], cuts=[10**6])
@example(items=[("act", "hold", 1, 0)] + [("frame", FULL)] * 3, cuts=[5])
@example(items=[("act", "reset", 1, 0)] + [("frame", FULL)] * 9, cuts=[9])
@example(items=[("act", "hold", i, 0) for i in (1, 3, 5)] + [("frame", FULL)] * 3, cuts=[9])
@example(items=[("frame", Wire(data(i, bytes(16_384)))) for i in (1, 3, 5, 1, 3)], cuts=[10**6])
@example(
    items=[("open", 0, 0, [(b"content-length", b"5")], 0), ("frame", Wire(data(7, b"123456")))],
    cuts=[3],
)
@example(items=[("frame", Wire(data(1, b"", end=True))), ("frame", FULL)], cuts=[10**6])
@example(items=[("headers", 7, REQUEST, 0, 1, data(1, b"amid it"))], cuts=[1])
@example(items=[("frame", RESET_3), ("frame", data(3, bytes(500)))], cuts=[700])
@example(
    items=[("frame", raw(PUSH_PROMISE, 0, 1, b"\0\0\0\x02\x82")), ("frame", FULL)], cuts=[10**6]
)
@given(items=st.lists(items, max_size=25), cuts=cut_sizes)
@thorough
async def test_a_server_receives_as_h2_does(items: list[Item], cuts: list[int]) -> None:
    run(items, cuts, client=False)


@example(
    items=[("frame", raw(PUSH_PROMISE, 0, 1, b"\0\0\0\x02\x82")), ("frame", FULL)], cuts=[10**6]
)
@given(items=st.lists(items, max_size=25), cuts=cut_sizes)
@thorough
async def test_a_client_receives_as_h2_does(items: list[Item], cuts: list[int]) -> None:
    run(items, cuts, client=True)
