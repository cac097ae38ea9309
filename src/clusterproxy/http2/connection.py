"""One HTTP/2 connection: reads frames, keeps the windows, writes once a batch.

DATA without flags on an open stream, nearly all of the traffic, is cut here and never passes through
h2; every other frame does. Both count in the same windows (h2's), so it does not matter which way a
byte came. The differential test in ``tests/http2/test_differential.py`` holds this path against h2.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from struct import Struct
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio

from clusterproxy.transport.outbox import current_outbox

from .adapter import Adapter, ErrorCode, H2Error, events
from .limits import Http2Limits, Meter
from .stream import Header, Stream, StreamHandler

if TYPE_CHECKING:
    from clusterproxy.transport.stream import Buffer, Transport

_log = logging.getLogger("clusterproxy.http2")

_unpack = Struct(">HBBBI").unpack_from
_HEADER_SIZE: Final = 9
_PREFACE_SIZE: Final = 24

# Frame types, RFC 9113 §6.
_DATA, _HEADERS, _CONTINUATION = 0x0, 0x1, 0x9
_END_HEADERS: Final = 0x4

# Write out within a batch when so much has gathered.
_HIGH_WATER: Final = 256 * 1024

# Acknowledgements and the like that a peer causes and does not read.
_BACKLOG_LIMIT: Final = 1024 * 1024

# No frame but DATA has a reason to be larger (a header block is limited as a whole).
_MAX_CONTROL_FRAME: Final = 64 * 1024

# Batches after which a busy connection lets the others run.
_BATCHES: Final = 2

# A control frame more may come for so many bytes moved.
_BYTES_PER_CONTROL_FRAME: Final = 1024

#: Opens the handler of a request: ``(stream, headers)``. Called by the reader: never waits.
RequestOpener = Callable[[Stream, list[Header]], StreamHandler]


@attrs.define
class _Ping:
    sent: float
    acknowledged: Callable[[], None] | None


class Http2Connection:
    """One connection. :meth:`run` serves it; everything else is synchronous.

    Args:
      transport: connected, TLS shaken hands.
      client: whether this is the client's end.
      limits: what the peer may ask.
      on_request: (server) opens a handler for each request.
      on_limit: told the name of a limit that the peer exceeded.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        client: bool,
        limits: Http2Limits,
        on_request: RequestOpener | None = None,
        on_limit: Callable[[str], None] | None = None,
    ) -> None:
        self.transport = transport
        self.limits = limits
        self.h2 = Adapter(
            client=client,
            window=limits.window,
            max_frame_size=limits.max_frame_size,
            max_streams=limits.max_streams,
            max_header_list=limits.max_header_list,
        )
        self.max_frame_size = self.h2.max_outbound_frame_size
        self.streams: dict[int, Stream] = {}
        self.out: list[Buffer] = []
        self.blocked = False
        self.lost: str | None = None
        self.draining = False
        self.last_read = 0.0
        self.nursery: trio.Nursery | None = None
        #: Called once when the last stream of a draining connection has ended.
        self.on_idle: Callable[[], None] | None = None
        self._client = client
        self._on_request = on_request
        self._on_limit = on_limit
        self._outbox = current_outbox()
        self._posted = False
        self._out_size = 0
        self._ready: dict[Stream, None] = {}
        self._plain: dict[int, Stream] = {}
        self._unsettled: dict[Stream, None] = {}
        self._thirsty: dict[Stream, None] = {}
        # The frame that is being received: bytes to come, and its stream if it is plain DATA.
        self._left = 0 if client else _PREFACE_SIZE
        self._data_stream: Stream | None = None
        self._partial_header = b""
        self._header_block = 0
        self._moved = 0
        self._resets = Meter(limits.max_resets_per_s, 5 * limits.max_resets_per_s)
        self._controls = Meter(limits.max_control_frames_per_s, limits.max_control_frames_per_s)
        self._pings: dict[bytes, _Ping] = {}
        self._ping_count = 0
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(limits.connection_window - 65535)

    # -- life --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the connection until it ends; ``lost`` then says why.

        Each stream's handler is told the end of its stream, also upon cancellation.
        Cancellation: closes the connection at once.
        """
        async with trio.open_nursery() as nursery:
            self.nursery = nursery
            try:
                self._pull()
                await self._read()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self.lost = self.lost or f"connection broken: {error}"
            finally:
                self.nursery = None
                self._end()
                nursery.cancel_scope.cancel()

    async def _read(self) -> None:
        transport, outbox = self.transport, self._outbox
        batches = 0
        while not self.lost:
            view = await transport.receive()
            if not view:
                self.lost = "connection closed by the peer"
                return
            self.last_read = trio.current_time()
            with outbox:
                self._receive(view)
            batches += 1
            if batches == _BATCHES:
                batches = 0
                await trio.lowlevel.checkpoint()

    def _end(self) -> None:
        self.lost = self.lost or "cancelled"
        with self._outbox:
            self.transport.close()
            self._plain.clear()
            self._ready.clear()
            for stream in list(self.streams.values()):
                self._forget(stream, ErrorCode.CANCEL, self.lost, tell=True)

    def fail(self, reason: str, code: ErrorCode | None = None) -> None:
        """End the connection, with a GOAWAY if there is a *code*; streams are told by the reader."""
        if self.lost:
            return
        self.lost = reason
        if code is not None:
            self.h2.error_goaway(code, reason.encode())
        data = self.h2.data_to_send()
        if data:
            self.out.append(data)
        if self.out and not self.blocked:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                self.transport.send(self.out)
        self.out = []
        self.transport.close()

    def exceed(self, limit: str, reason: str) -> None:
        """End the connection of a peer that asks too much."""
        if self._on_limit is not None:
            self._on_limit(limit)
        self.fail(reason, ErrorCode.ENHANCE_YOUR_CALM)

    # -- receiving ---------------------------------------------------------------------------------

    def _receive(self, view: memoryview) -> None:
        """Dispatch one batch. Buffers are lent to the handlers until the end of it."""
        try:
            self._moved += len(view)
            self._cut(view)
        except H2Error as error:
            self.fail(f"protocol error: {error}")
        for stream in self._unsettled:
            if stream.handler is not None:
                stream.handler.settle()
        self._unsettled.clear()
        if self.lost:
            return
        for stream in self._thirsty:
            stream.credit()
        self._thirsty.clear()
        granted = self.limits.connection_window - self.h2.inbound_window
        if granted > self.limits.connection_window // 2:
            # On receipt and not on consumption: a stream that is not read must not starve others.
            self.h2.increment_flow_control_window(granted)
            self._pull()

    def _cut(self, view: memoryview) -> None:
        plain, take, largest = self._plain, self.h2.take, self.limits.max_frame_size
        position, end = 0, len(view)
        while position < end and not self.lost:
            if self._left:
                position = self._continue_frame(view, position)
                continue
            if self._partial_header or end - position < _HEADER_SIZE:
                position = self._gather_header(view, position)
                continue
            high, low, kind, flags, stream_id = _unpack(view, position)
            size = high << 8 | low
            if (
                kind == _DATA
                and not flags
                and (stream := plain.get(stream_id)) is not None
                and size <= largest
                and not self._header_block
                and size
            ):
                position += _HEADER_SIZE
                if not take(stream.h2, size):
                    self.fail("more DATA than the window allows", ErrorCode.FLOW_CONTROL_ERROR)
                    return
                if stream.h2.inbound_flow_control_window < stream.low:
                    self._thirsty[stream] = None
                stop = position + size
                if stop > end:
                    self._left = stop - end
                    self._data_stream = stream
                    stop = end
                if stop > position:
                    self._deliver(stream, view[position:stop])
                position = stop
            else:
                position = self._begin_frame(view, position, kind, flags, size)

    def _gather_header(self, view: memoryview, position: int) -> int:
        """Collect a frame header that is cut by the end of a batch."""
        missing = _HEADER_SIZE - len(self._partial_header)
        self._partial_header += view[position : position + missing]
        position += missing
        if len(self._partial_header) == _HEADER_SIZE:
            header, self._partial_header = self._partial_header, b""
            self._cut_header(memoryview(header))
        return position

    def _cut_header(self, header: memoryview) -> None:
        # A header alone: the same decisions as in _cut, the payload comes as "the rest of the frame".
        high, low, kind, flags, stream_id = _unpack(header)
        size = high << 8 | low
        stream = self._plain.get(stream_id)
        if (
            kind == _DATA
            and not flags
            and stream is not None
            and 0 < size <= self.limits.max_frame_size
            and not self._header_block
        ):
            if not self.h2.take(stream.h2, size):
                self.fail("more DATA than the window allows", ErrorCode.FLOW_CONTROL_ERROR)
                return
            self._thirsty[stream] = None
            self._left = size
            self._data_stream = stream
        else:
            self._begin_frame(header, 0, kind, flags, size)

    def _continue_frame(self, view: memoryview, position: int) -> int:
        piece = view[position : position + self._left]
        self._left -= len(piece)
        stream = self._data_stream
        if stream is None:
            self._handle(self.h2.receive(piece))
        else:
            if not self._left:
                self._data_stream = None
            # Reset in the middle of a frame: the rest was accounted for and is dropped.
            if self._plain.get(stream.id) is stream:
                self._deliver(stream, piece)
        return position + len(piece)

    def _begin_frame(self, view: memoryview, position: int, kind: int, flags: int, size: int) -> int:
        """Pass a frame, or as much of it as is here, to h2."""
        self._check_frame(kind, flags, size)
        if self.lost:
            return len(view)
        stop = min(len(view), position + _HEADER_SIZE + size)
        self._left = position + _HEADER_SIZE + size - stop
        self._handle(self.h2.receive(view[position:stop]))
        return stop

    def _check_frame(self, kind: int, flags: int, size: int) -> None:
        """Cut off what h2 would let pass: floods, and frames that only cost memory."""
        if kind in (_HEADERS, _CONTINUATION):
            self._header_block += size + _HEADER_SIZE
            # The list limit is on the uncompressed size; the block may not be larger by much.
            if self._header_block > 2 * self.limits.max_header_list:
                self.exceed("header_list", "header block too large")
            if flags & _END_HEADERS:
                self._header_block = 0
            if kind == _HEADERS:
                return
        elif kind != _DATA and size > _MAX_CONTROL_FRAME:
            self.exceed("control_frames", f"frame of type {kind} with {size} bytes")
        elif kind == _DATA and size:
            return
        earned, self._moved = self._moved / _BYTES_PER_CONTROL_FRAME, 0
        if not self._controls.spend(self.last_read, earned):
            self.exceed("control_frames", "too many control frames")

    def _deliver(self, stream: Stream, view: memoryview) -> None:
        handler = stream.handler
        if handler is not None and handler.on_data(view):
            self._unsettled[stream] = None

    def _handle(self, received: list[events.Event]) -> None:
        for event in received:
            if self.lost:
                break
            handle = _HANDLERS.get(type(event))
            if handle is not None:
                handle(self, event)
        self._pull()

    def _on_request_received(self, event: events.RequestReceived) -> None:
        stream_id = event.stream_id
        if self.draining or self._on_request is None:
            # Beyond the stream that the final GOAWAY named: the client may try elsewhere.
            self.h2.reset_stream(stream_id, ErrorCode.REFUSED_STREAM)
            self.h2.retire(stream_id)
            return
        stream = Stream(self, stream_id, self.h2.streams[stream_id], self.limits.window)
        self.streams[stream_id] = stream
        self._note_body(stream, event)
        stream.handler = self._on_request(stream, event.headers)

    def _on_response_received(self, event: events.ResponseReceived) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is None:
            return
        self._note_body(stream, event)
        if stream.handler is not None:
            stream.handler.on_headers(event.headers)

    def _note_body(
        self, stream: Stream, event: events.RequestReceived | events.ResponseReceived
    ) -> None:
        # h2 has already seen the end that a later event will tell of.
        stream.peer_ended = event.stream_ended is not None
        if not stream.peer_ended and self.h2.is_plain(stream.id):
            self._plain[stream.id] = stream

    def _on_trailers_received(self, event: events.TrailersReceived) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is not None and stream.handler is not None:
            stream.peer_ended = True
            stream.handler.on_headers(event.headers)

    def _on_data_received(self, event: events.DataReceived) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is None:
            return
        stream.peer_ended = event.stream_ended is not None
        self._thirsty[stream] = None
        if event.data:
            self._deliver(stream, memoryview(event.data))

    def _on_stream_ended(self, event: events.StreamEnded) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is None:
            return
        stream.peer_ended = True
        self._plain.pop(stream.id, None)
        if stream.handler is not None:
            stream.handler.on_end()
        self._retire(stream)

    def _on_stream_reset(self, event: events.StreamReset) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is None:
            return
        if event.remote_reset and not stream.responded and not self._client:
            if not self._resets.spend(self.last_read):
                self.exceed("resets", "too many streams reset")
        self._forget(stream, int(event.error_code), "stream reset by the peer", tell=True)

    def _on_window_updated(self, event: events.WindowUpdated) -> None:
        if event.stream_id:
            stream = self.streams.get(event.stream_id)
            if stream is None or not stream.congested:
                return
            self._ready[stream] = None
        self._post()

    def _on_settings_changed(self, _event: events.RemoteSettingsChanged) -> None:
        self.max_frame_size = self.h2.max_outbound_frame_size
        for stream in self.streams.values():
            if stream.congested:
                self._ready[stream] = None
        self._post()

    def _on_ping_acknowledged(self, event: events.PingAckReceived) -> None:
        ping = self._pings.pop(event.ping_data, None)
        if ping is not None and ping.acknowledged is not None:
            ping.acknowledged()

    def _on_goaway(self, event: events.ConnectionTerminated) -> None:
        if event.error_code != ErrorCode.NO_ERROR:
            debug = (event.additional_data or b"").decode("utf-8", "replace")
            self.fail(f"GOAWAY {event.error_code!s}: {debug}")
            return
        self.draining = True
        for stream in list(self.streams.values()):
            if self._client and stream.id > (event.last_stream_id or 0):
                self._forget(stream, ErrorCode.REFUSED_STREAM, "not accepted before GOAWAY", tell=True)
        self._check_idle()

    # -- streams -----------------------------------------------------------------------------------

    def open_stream(self, headers: list[Header], handler: StreamHandler) -> Stream:
        """Send a request. There is no checkpoint between taking the id and sending it.

        Raises:
          trio.ClosedResourceError: the connection is lost.
          H2Error: the peer takes no more streams.
        """
        if self.lost or self.draining:
            raise trio.ClosedResourceError(self.lost or "the peer takes no more streams")
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, headers)
        stream = Stream(self, stream_id, self.h2.streams[stream_id], self.limits.window)
        stream.handler = handler
        self.streams[stream_id] = stream
        self._pull()
        return stream

    def send_headers(self, stream: Stream, headers: list[Header], *, end: bool = False) -> None:
        """Send response headers, or trailers; on a stream that is gone this does nothing."""
        if not stream.open or self.lost:
            return
        self.h2.send_headers(stream.id, headers, end_stream=end)
        stream.responded = True
        if end and not stream.peer_ended:
            # grpc-go does the same: the answer is complete, whatever is still on its way up.
            self.h2.reset_stream(stream.id, ErrorCode.NO_ERROR)
        self._pull()
        if end:
            self._forget(stream, ErrorCode.NO_ERROR, "finished", tell=False)

    def end_stream(self, stream: Stream) -> None:
        """Half-close our side."""
        if stream.open and not self.lost:
            self.h2.end_stream(stream.id)
            self._pull()
            self._retire(stream)

    def reset_stream(self, stream: Stream, code: ErrorCode) -> None:
        """Reset a stream; its handler is not told. What it has queued is dropped."""
        if not stream.open or self.lost:
            return
        self.h2.reset_stream(stream.id, code)
        self._pull()
        self._forget(stream, code, "reset", tell=False)

    def refuse_stream(self, stream: Stream, reason: str) -> None:
        """Reset a stream whose peer asks too much, and tell its handler."""
        if self._on_limit is not None:
            self._on_limit("answers")
        self.h2.reset_stream(stream.id, ErrorCode.ENHANCE_YOUR_CALM)
        self._pull()
        self._forget(stream, ErrorCode.ENHANCE_YOUR_CALM, reason, tell=True)

    def _retire(self, stream: Stream) -> None:
        """Forget a stream that both sides have ended."""
        if stream.h2.closed:
            self._forget(stream, ErrorCode.NO_ERROR, "finished", tell=False)

    def _forget(self, stream: Stream, code: int, reason: str, *, tell: bool) -> None:
        if not stream.open:
            return
        stream.open = False
        self.streams.pop(stream.id, None)
        self._plain.pop(stream.id, None)
        self._ready.pop(stream, None)
        self._thirsty.pop(stream, None)
        self.h2.retire(stream.id)
        if tell and stream.handler is not None:
            stream.handler.on_reset(code, reason)
        self._check_idle()

    def _check_idle(self) -> None:
        if self.draining and not self.streams and self.on_idle is not None:
            on_idle, self.on_idle = self.on_idle, None
            on_idle()

    # -- windows, pings, the end -------------------------------------------------------------------

    def grant(self, stream: Stream, size: int) -> None:
        """Let the peer send *size* bytes more on a stream."""
        if not self.lost:
            self.h2.increment_flow_control_window(size, stream.id)
            self._pull()

    def ping(self, acknowledged: Callable[[], None] | None = None) -> None:
        """Send a PING; *acknowledged* is called when the answer comes."""
        if self.lost:
            return
        self._ping_count += 1
        payload = self._ping_count.to_bytes(8, "big")
        self._pings[payload] = _Ping(trio.current_time(), acknowledged)
        self.h2.ping(payload)
        self._pull()

    def check_alive(self, now: float, interval: float, timeout: float) -> None:
        """Keep alive: PING after *interval* seconds of silence, end *timeout* seconds later."""
        if self.lost:
            return
        if self._pings:
            oldest = next(iter(self._pings.values()))
            if now - max(oldest.sent, self.last_read) > timeout:
                self.fail("keepalive ping failed to receive ACK within timeout")
        elif now - self.last_read >= interval:
            self.ping()

    def announce_end(self) -> None:
        """Tell the peer to open no more streams here; open ones go on (RFC 9113 §6.8).

        The final GOAWAY follows when the peer has answered a PING, that is, when it has surely seen
        the first one.
        """
        if self.lost or self.draining:
            return
        self.h2.announce_goaway()
        self.ping(self._final_goaway)

    def _final_goaway(self) -> None:
        if not self.lost:
            self.draining = True
            self.h2.final_goaway()
            self._pull()
            self._check_idle()

    # -- writing -----------------------------------------------------------------------------------

    def enqueue(self, stream: Stream) -> None:
        """Note that a stream has something queued."""
        self._ready[stream] = None
        if not self.blocked:
            self._post()

    def wrote(self, size: int) -> None:
        """Note that bytes were appended to ``out``."""
        self._moved += size
        self._out_size += size
        if self._out_size >= _HIGH_WATER:
            self._write()
        else:
            self._post()

    def _pull(self) -> None:
        """Take over h2's output, so that it stays in order with ours."""
        data = self.h2.data_to_send()
        if data:
            self.out.append(data)
            self._out_size += len(data)
            if self.blocked and self._out_size > _BACKLOG_LIMIT:
                self.exceed("backlog", "the peer does not read its answers")
            self._post()

    def _post(self) -> None:
        if not self._posted:
            self._posted = True
            self._outbox.post(self)

    def flush(self) -> None:
        """Write out what has gathered, and what may go now of what was queued."""
        # Still posted meanwhile: what the pump itself appends is written below.
        if not self.lost and not self.blocked:
            self._pump()
            self._write()
        self._posted = False

    def _pump(self) -> None:
        ready = self._ready
        while ready and not self.blocked and self.h2.outbound_flow_control_window > 0:
            stream = next(iter(ready))
            del ready[stream]
            if stream.pump():
                ready[stream] = None

    def _write(self) -> None:
        if self.blocked or self.lost or not self.out:
            return
        out, self.out, self._out_size = self.out, [], 0
        try:
            if self.transport.send(out):
                return
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.fail(f"connection broken: {error}")
            return
        self.blocked = True
        if self.nursery is not None:
            self.nursery.start_soon(self._drain)

    async def _drain(self) -> None:
        """Write while the socket is full; the only task besides the reader, and only then."""
        try:
            await self.transport.drain()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self.fail(f"connection broken: {error}")
            return
        self.blocked = False
        with self._outbox:
            # What gathered meanwhile is older than what is queued. If the socket fills up again,
            # this starts the next such task.
            self._write()
            self._post()


_HANDLERS: Final[dict[type[events.Event], Callable[[Http2Connection, Any], None]]] = {
    events.RequestReceived: Http2Connection._on_request_received,  # noqa: SLF001
    events.ResponseReceived: Http2Connection._on_response_received,  # noqa: SLF001
    events.TrailersReceived: Http2Connection._on_trailers_received,  # noqa: SLF001
    events.DataReceived: Http2Connection._on_data_received,  # noqa: SLF001
    events.StreamEnded: Http2Connection._on_stream_ended,  # noqa: SLF001
    events.StreamReset: Http2Connection._on_stream_reset,  # noqa: SLF001
    events.WindowUpdated: Http2Connection._on_window_updated,  # noqa: SLF001
    events.RemoteSettingsChanged: Http2Connection._on_settings_changed,  # noqa: SLF001
    events.PingAckReceived: Http2Connection._on_ping_acknowledged,  # noqa: SLF001
    events.ConnectionTerminated: Http2Connection._on_goaway,  # noqa: SLF001
}
