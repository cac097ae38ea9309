"""What the tests of HTTP/2 share: frames made by hand, fake transports and handlers that write down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import trio
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, WindowUpdateFrame

from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.transport.outbox import current_outbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from clusterproxy.http2.stream import Header, Stream
    from clusterproxy.transport.records import Buffer
    from clusterproxy.transport.stream import Transport

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS = 0, 1, 2, 3, 4
PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 5, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY_FLAG = 0x1, 0x1, 0x4, 0x8, 0x20

REQUEST: list[Header] = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/service/Method"),
    (b":authority", b"test"),
]
RESPONSE: list[Header] = [(b":status", b"200"), (b"content-type", b"application/grpc")]
TRAILERS: list[Header] = [(b"grpc-status", b"0")]


def raw(kind: int, flags: int, stream_id: int, body: bytes = b"") -> bytes:
    """Make a frame, legal or not."""
    head = len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big")
    return head + body


def data(stream_id: int, body: bytes, *, end: bool = False, pad: int | None = None) -> bytes:
    flags = END_STREAM if end else 0
    if pad is None:
        return raw(DATA, flags, stream_id, body)
    return raw(DATA, flags | PADDED, stream_id, bytes((pad,)) + body + bytes(pad))


def settings(values: dict[int, int], *, ack: bool = False) -> bytes:
    body = b"".join(k.to_bytes(2, "big") + v.to_bytes(4, "big") for k, v in values.items())
    return raw(SETTINGS, ACK if ack else 0, 0, body)


def window_update(stream_id: int, size: int) -> bytes:
    return raw(WINDOW_UPDATE, 0, stream_id, size.to_bytes(4, "big"))


def goaway(last: int, code: int) -> bytes:
    return raw(GOAWAY, 0, 0, last.to_bytes(4, "big") + code.to_bytes(4, "big"))


def parse_frames(wire: bytes | bytearray) -> list[Frame]:
    """Parse whole frames, without a preface."""
    frames: list[Frame] = []
    view = memoryview(bytes(wire))
    while view:
        frame, size = Frame.parse_frame_header(view[:9])
        assert len(view) >= 9 + size, "a frame is cut short"
        frame.parse_body(view[9 : 9 + size])
        frames.append(frame)
        view = view[9 + size :]
    return frames


def goaways(wire: bytes | bytearray) -> list[GoAwayFrame]:
    return [f for f in parse_frames(wire) if isinstance(f, GoAwayFrame)]


def granted(wire: bytes | bytearray, stream_id: int) -> int:
    """How many bytes WINDOW_UPDATEs have given to a stream (0: the connection)."""
    return sum(
        f.window_increment
        for f in parse_frames(wire)
        if isinstance(f, WindowUpdateFrame) and f.stream_id == stream_id
    )


def data_of(wire: bytes | bytearray, stream_id: int) -> bytes:
    return b"".join(
        f.data for f in parse_frames(wire) if isinstance(f, DataFrame) and f.stream_id == stream_id
    )


class FakeTransport:
    """Takes what is sent, as long as it is not ``full``; stands for a socket."""

    def __init__(self) -> None:
        self.sent = bytearray()
        self.full = False
        self.closed = False
        self.broken: Exception | None = None
        self._unsent = b""
        self._room = trio.Event()

    def send(self, parts: Sequence[Buffer]) -> bool:
        assert not self._unsent, "sent to a full socket"
        if self.broken is not None:
            raise self.broken
        if self.full:
            self._unsent = b"".join(parts)
            return False
        self.sent += b"".join(parts)
        return True

    def make_room(self) -> None:
        self.full = False
        self._room.set()

    async def drain(self) -> None:
        await self._room.wait()
        self._room = trio.Event()
        if self.broken is not None:
            raise self.broken
        self.sent += self._unsent
        self._unsent = b""

    async def receive(self) -> memoryview:
        await trio.sleep_forever()
        raise AssertionError

    def close(self) -> None:
        self.closed = True


class Handler:
    """Writes down what a stream tells its owner."""

    def __init__(self) -> None:
        self.headers: list[list[Header]] = []
        self.data = bytearray()
        self.ended = False
        self.reset: tuple[int, str] | None = None
        self.lent: list[memoryview] = []
        self.settled = 0
        self.hold = False
        self.stream: Stream | None = None
        self.on_piece: Callable[[Stream], None] | None = None

    def on_headers(self, headers: list[Header]) -> None:
        self.headers.append(list(headers))

    def on_data(self, view: memoryview) -> bool:
        assert self.reset is None
        assert not self.ended
        self.data += view
        self.lent.append(view)
        if self.stream is not None:
            if self.hold:
                self.stream.hold(len(view))
            if self.on_piece is not None:
                self.on_piece(self.stream)
        return True

    def settle(self) -> None:
        assert self.lent
        self.lent.clear()
        self.settled += 1

    def on_end(self) -> None:
        assert not self.ended
        self.ended = True

    def on_reset(self, code: int, reason: str) -> None:
        assert self.reset is None, "told twice"
        self.reset = (int(code), reason)


class Wired:
    """A connection on a fake transport whose reader is the test."""

    def __init__(self, *, client: bool = False, limits: Http2Limits | None = None) -> None:
        self.transport = FakeTransport()
        self.exceeded: list[str] = []
        self.handlers: dict[int, Handler] = {}
        self.make_handler: Callable[[Stream, list[Header]], Handler] = lambda _s, _h: Handler()
        self.connection = Http2Connection(
            cast("Transport", self.transport),
            client=client,
            limits=limits or Http2Limits(),
            on_request=None if client else self._on_request,
            on_limit=self.exceeded.append,
        )
        self.connection.output.start()

    def _on_request(self, stream: Stream, headers: list[Header]) -> Handler:
        handler = self.handlers[stream.id] = self.make_handler(stream, headers)
        handler.stream = stream
        handler.headers.append(list(headers))
        return handler

    def open(self, headers: list[Header] | None = None) -> Stream:
        handler = Handler()
        stream = self.connection.open_stream(headers or REQUEST, handler)
        handler.stream = stream
        self.handlers[stream.id] = handler
        return stream

    def stream(self, stream_id: int) -> Stream:
        return self.connection.streams[stream_id]

    def receive(self, *pieces: bytes) -> None:
        """Let a batch arrive; its buffer is used again afterwards."""
        buffer = bytearray(b"".join(pieces))
        with current_outbox():
            self.connection._receive(memoryview(buffer))
        buffer[:] = bytes(len(buffer))

    def take_sent(self) -> bytes:
        """Return what was sent since the last call, without a preface."""
        sent = bytes(self.transport.sent).removeprefix(PREFACE)
        self.transport.sent.clear()
        return sent


async def until(condition: Callable[[], object]) -> None:
    """Wait for what a task or a socket brings about."""
    while not condition():  # noqa: ASYNC110  there is no event for it
        await trio.sleep(0.001)


def types(frames: Iterable[Any]) -> list[str]:
    return [type(frame).__name__.removesuffix("Frame") for frame in frames]
