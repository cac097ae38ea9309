"""Cuts received bytes into frames, and DATA past h2.

DATA without flags on an open stream, nearly all of the traffic, never passes through h2; every other
frame does, as it comes. Both count in the same windows (h2's), so it does not matter which way a byte
came. The differential test in ``tests/http2/test_differential.py`` holds this against plain h2.
"""

from __future__ import annotations

from struct import Struct
from typing import TYPE_CHECKING, Final, Protocol

from .adapter import Adapter, ErrorCode, events
from .limits import Http2Limits, Meter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .stream import Stream

_unpack = Struct(">HBBBI").unpack_from
_HEADER_SIZE: Final = 9
_PREFACE_SIZE: Final = 24

# Frame types, RFC 9113 §6.
_DATA, _HEADERS, _SETTINGS, _PUSH_PROMISE, _PING, _CONTINUATION = 0x0, 0x1, 0x4, 0x5, 0x6, 0x9
_WINDOW_UPDATE: Final = 0x8
_PING_SIZE: Final = 8
_ACK: Final = 0x1
_INCREMENT: Final = 4

# The stream of frames that concern the whole connection.
_CONNECTION: Final = memoryview(bytes(4))

# Each costs a walk over all streams. grpc-go sends a few while it measures the line.
_SETTINGS_PER_S: Final = 10
_SETTINGS_BURST: Final = 100
_END_HEADERS: Final = 0x4

# No frame but DATA has a reason to be larger (a header block is limited as a whole).
_MAX_CONTROL_FRAME: Final = 64 * 1024

# A control frame more may come for so many bytes moved.
_BYTES_PER_CONTROL_FRAME: Final = 1024


class FrameSink(Protocol):
    """Whom a receiver tells of what it has cut."""

    lost: str | None

    def deliver(self, stream: Stream, view: memoryview) -> None:
        """Take a part of a DATA payload, lent until the end of the batch."""

    def handle(self, received: Sequence[events.Event]) -> None:
        """Take what h2 made of another frame."""

    def answer_ping(self, payload: memoryview) -> None:
        """Acknowledge a PING."""

    def note_answer(self, payload: memoryview) -> None:
        """A PING of ours was acknowledged."""

    def window_opened(self, stream_id: int) -> None:
        """The peer has granted something on a stream, or (0) on the connection."""

    def fail(self, reason: str, code: ErrorCode | None = None) -> None:
        """End the connection; ``lost`` is set when this returns."""

    def exceed(self, limit: str, reason: str) -> None:
        """End the connection of a peer that asks too much."""


class FrameReceiver:
    """The receiving half of a connection.

    Attributes:
      plain: the streams whose DATA may pass by h2.
      thirsty: streams that have used much of their window in this batch.
      moved: bytes sent and received since control frames were last counted; they earn some.
    """

    def __init__(self, h2: Adapter, limits: Http2Limits, *, client: bool) -> None:
        self.plain: dict[int, Stream] = {}
        self.thirsty: dict[Stream, None] = {}
        self.moved = 0
        self._h2 = h2
        self._limits = limits
        # The frame that is being received: bytes to come, and its stream if it is plain DATA.
        self._left = 0 if client else _PREFACE_SIZE
        self._data_stream: Stream | None = None
        self._partial_header = b""
        self._header_block = 0
        self._controls = Meter(limits.max_control_frames_per_s, limits.max_control_frames_per_s)
        self._settings = Meter(_SETTINGS_PER_S, _SETTINGS_BURST)
        self._now = 0.0

    def receive(self, sink: FrameSink, view: memoryview, now: float) -> None:
        """Cut one batch and tell *sink*, to which no reference is kept.

        Raises:
          H2Error: the peer broke the protocol; a GOAWAY that says so is in h2's output.
        """
        self._now = now
        self.moved += len(view)
        plain, take = self.plain, self._h2.take
        largest = self._limits.max_frame_size
        position, end = 0, len(view)
        while position < end and not sink.lost:
            if self._left:
                position = self._continue_frame(sink, view, position)
                continue
            if self._partial_header or end - position < _HEADER_SIZE:
                position = self._gather_header(sink, view, position)
                continue
            high, low, kind, flags, stream_id = _unpack(view, position)
            size = high << 8 | low
            if (
                kind == _DATA
                and not flags
                and (stream := plain.get(stream_id)) is not None
                and 0 < size <= largest
                and not self._header_block
            ):
                position += _HEADER_SIZE
                if not take(stream.h2, size):
                    self._overdraft(sink)
                    return
                if stream.h2.inbound_flow_control_window < stream.low:
                    self.thirsty[stream] = None
                stop = position + size
                if stop > end:
                    self._left = stop - end
                    self._data_stream = stream
                    stop = end
                if stop > position:
                    sink.deliver(stream, view[position:stop])
                position = stop
            else:
                position = self._begin_frame(sink, view, position, kind, flags, size)

    def _overdraft(self, sink: FrameSink) -> None:
        sink.fail("more DATA than the window allows", ErrorCode.FLOW_CONTROL_ERROR)

    def _gather_header(self, sink: FrameSink, view: memoryview, position: int) -> int:
        """Collect a frame header that is cut by the end of a batch."""
        missing = _HEADER_SIZE - len(self._partial_header)
        self._partial_header += view[position : position + missing]
        position += missing
        if len(self._partial_header) == _HEADER_SIZE:
            header, self._partial_header = memoryview(self._partial_header), b""
            self._begin_alone(sink, header)
        return position

    def _begin_alone(self, sink: FrameSink, header: memoryview) -> None:
        """Begin a frame of which only the header is here; the payload continues it."""
        high, low, kind, flags, stream_id = _unpack(header)
        size = high << 8 | low
        stream = self.plain.get(stream_id)
        if (
            kind != _DATA
            or flags
            or stream is None
            or not 0 < size <= self._limits.max_frame_size
            or self._header_block
        ):
            self._begin_frame(sink, header, 0, kind, flags, size)
        elif self._h2.take(stream.h2, size):
            self.thirsty[stream] = None
            self._left = size
            self._data_stream = stream
        else:
            self._overdraft(sink)

    def _continue_frame(self, sink: FrameSink, view: memoryview, position: int) -> int:
        piece = view[position : position + self._left]
        self._left -= len(piece)
        stream = self._data_stream
        if stream is None:
            sink.handle(self._h2.receive(piece))
        else:
            if not self._left:
                self._data_stream = None
            # Reset in the middle of a frame: the rest was accounted for and is dropped.
            if self.plain.get(stream.id) is stream:
                sink.deliver(stream, piece)
        return position + len(piece)

    def _begin_frame(
        self, sink: FrameSink, view: memoryview, position: int, kind: int, flags: int, size: int
    ) -> int:
        """Pass a frame, or as much of it as is here, to h2."""
        self._check_frame(sink, kind, flags, size)
        if sink.lost:
            return len(view)
        end = position + _HEADER_SIZE + size
        if kind == _PING and size == _PING_SIZE and flags <= _ACK and not self._header_block:
            start = position + _HEADER_SIZE
            if len(view) >= end and view[position + 5 : start] == _CONNECTION:
                # grpc-go sends one for nearly every small message; through h2 each costs 40 µs.
                if flags:
                    sink.note_answer(view[start:end])
                else:
                    sink.answer_ping(view[start:end])
                return end
        if kind == _WINDOW_UPDATE and size == _INCREMENT and not self._header_block:
            start = position + _HEADER_SIZE
            stream_id = int.from_bytes(view[position + 5 : start], "big")
            increment = int.from_bytes(view[start:end], "big")
            if len(view) >= end and self._h2.open_window(stream_id, increment):
                # They come with every bulk transfer, a thousand for a GiB and more.
                sink.window_opened(stream_id)
                return end
        stop = min(len(view), end)
        self._left = end - stop
        sink.handle(self._h2.receive(view[position:stop]))
        return stop

    def _check_frame(self, sink: FrameSink, kind: int, flags: int, size: int) -> None:
        """Cut off what h2 would let pass: floods, and frames that only cost memory."""
        if kind in (_HEADERS, _PUSH_PROMISE, _CONTINUATION):
            self._header_block += size + _HEADER_SIZE
            # The list limit is on the uncompressed size; the block may not be larger by much.
            if self._header_block > 2 * self._limits.max_header_list:
                sink.exceed("header_list", "header block too large")
            if flags & _END_HEADERS:
                self._header_block = 0
            if kind == _HEADERS:
                return
        elif kind == _DATA:
            if size > self._limits.max_frame_size:
                # h2 says so too, but only once it has gathered all of it.
                sink.fail("DATA frame too large", ErrorCode.FRAME_SIZE_ERROR)
            if size:
                return
        elif kind == _SETTINGS and not self._settings.spend(self._now):
            sink.exceed("control_frames", "too many SETTINGS")
        elif size > _MAX_CONTROL_FRAME:
            sink.exceed("control_frames", f"frame of type {kind} with {size} bytes")
        earned, self.moved = self.moved / _BYTES_PER_CONTROL_FRAME, 0
        if not self._controls.spend(self._now, earned):
            sink.exceed("control_frames", "too many control frames")
