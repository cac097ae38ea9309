"""The sending half of a connection: gathers frames, and writes once a batch."""

from __future__ import annotations

import logging
from contextlib import suppress
from struct import Struct
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.transport.outbox import current_outbox

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clusterproxy.transport.records import Buffer
    from clusterproxy.transport.stream import Transport

    from .adapter import Adapter
    from .stream import Stream

_log = logging.getLogger("clusterproxy.http2")

# RFC 9113 §4.1: length (24), type (8), flags (8), stream (31).
_pack = Struct(">HBBBI").pack

_HEADER_SIZE: Final = 9

# The largest TLS record, and the default of SETTINGS_MAX_FRAME_SIZE, which Go peers keep.
_RECORD: Final = 16_384

# Write out within a batch when so much has gathered.
_HIGH_WATER: Final = 512 * 1024


def _nobody(_: object) -> None:
    """The connection is over."""


class Output:
    """Writes a connection's frames without waiting.

    While the socket is full, and before :meth:`start`, (``blocked``) messages stay in their streams'
    queues; only h2's own frames are appended meanwhile.

    Args:
      spawn: starts the task that waits for room in the socket, the only writer then.
      on_broken: told that the connection broke.
    """

    __slots__ = (
        "_frames",
        "_h2",
        "_largest",
        "_on_broken",
        "_open",
        "_open_size",
        "_open_stream",
        "_outbox",
        "_posted",
        "_ready",
        "_spawn",
        "_transport",
        "blocked",
        "closed",
        "max_frame_size",
        "sent",
        "waiting",
    )

    def __init__(
        self,
        transport: Transport,
        h2: Adapter,
        spawn: Callable[[Callable[[], Awaitable[None]]], None],
        on_broken: Callable[[str], None],
    ) -> None:
        self._transport = transport
        self._h2 = h2
        self._spawn = spawn
        self._on_broken = on_broken
        self._outbox = current_outbox()
        self._frames: list[Buffer] = []
        self._ready: dict[Stream, None] = {}
        self._posted = False
        # The last DATA frame, while another message may join it: its header's place, stream and size.
        self._open = self._open_stream = self._open_size = 0
        self.blocked = True
        self.closed = False
        self.frame_up_to(h2.max_outbound_frame_size)
        #: Bytes of payload put out since the beginning.
        self.sent = 0
        #: Bytes that have gathered.
        self.waiting = 0

    def frame_up_to(self, size: int) -> None:
        """Set the peer's SETTINGS_MAX_FRAME_SIZE."""
        self.max_frame_size = size
        # With its header the default makes a frame that fills a TLS record, and no rest of one.
        self._largest = _RECORD - _HEADER_SIZE if size == _RECORD else size

    # -- putting frames down -----------------------------------------------------------------------

    def put_data(self, stream_id: int, size: int, head: Buffer, rest: tuple[Buffer, ...]) -> None:
        """Put *size* bytes down as DATA; the windows allow it. The buffers are lent for this batch."""
        frames = self._frames
        # What goes out together on a stream shares frames: less headers, and less frames to look at.
        length = size + self._open_size if self._open_stream == stream_id else size
        if length > self._largest:
            self._put_frames(stream_id, size, (head, *rest))
        else:
            header = _pack(length >> 8, length & 255, 0, 0, stream_id)
            if length > size:
                frames[self._open] = header
            else:
                self._open, self._open_stream = len(frames), stream_id
                frames.append(header)
            self._open_size = length
            frames.append(head)
            if rest:
                frames.extend(rest)
        self.sent += size
        self.waiting += size
        if self.waiting >= _HIGH_WATER:
            self._write()
        else:
            self.post()

    def _put_frames(self, stream_id: int, size: int, parts: tuple[Buffer, ...]) -> None:
        """Cut what is more than a frame, the one that is open included."""
        frames, largest = self._frames, self._largest
        full = _pack(largest >> 8, largest & 255, 0, 0, stream_id)
        room = 0
        if self._open_stream == stream_id:
            room = largest - self._open_size
            frames[self._open] = full
        left = size - room
        self._open_stream = stream_id
        for part in parts:
            view, start, end = memoryview(part), 0, len(part)
            while start < end:
                if not room:
                    self._open = len(frames)
                    if left >= largest:
                        frames.append(full)
                        room = self._open_size = largest
                    else:
                        frames.append(_pack(left >> 8, left & 255, 0, 0, stream_id))
                        room = self._open_size = left
                    left -= room
                stop = start + room
                if stop > end:
                    stop = end
                frames.append(view[start:stop])
                room -= stop - start
                start = stop

    def pull(self) -> None:
        """Take over h2's output, so that it stays in order with ours."""
        data = self._h2.data_to_send()
        if data:
            self.put(data)

    def put(self, frames: bytes) -> None:
        """Put whole frames down that no window counts; they go out while the socket is full, too."""
        self._open_stream = 0
        self._frames.append(frames)
        self.waiting += len(frames)
        self.post()

    # -- writing -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to write: from now on *spawn* works, should the socket be full."""
        self.blocked = False
        self.pull()
        self.post()

    def enqueue(self, stream: Stream) -> None:
        """Note that a stream has something queued that may go now."""
        self._ready[stream] = None
        if not self.blocked:
            self.post()

    def forget(self, stream: Stream) -> None:
        """A stream is gone."""
        self._ready.pop(stream, None)

    def post(self) -> None:
        """Write at the end of the batch."""
        if not self._posted:
            self._posted = True
            self._outbox.post(self)

    def flush(self) -> None:
        """Write out what has gathered, and what may go now of what was queued."""
        # Still posted meanwhile: what the pump itself puts down is written below.
        try:
            if not self.blocked and not self.closed:
                self._pump()
                self._write()
        except Exception:
            # Flushed at the end of somebody else's batch: a bug here is not theirs.
            _log.exception("bug while writing")
            self._on_broken("internal error")
        finally:
            self._posted = False

    def _pump(self) -> None:
        ready, h2 = self._ready, self._h2
        while ready and not self.blocked and not self.closed:
            stream = next(iter(ready))
            # An end behind the last message needs no window.
            if stream.waiting and h2.outbound_flow_control_window <= 0:
                return
            del ready[stream]
            if stream.pump():
                ready[stream] = None

    def _write(self) -> None:
        if self.blocked or self.closed or not self._frames:
            return
        frames, self._frames, self.waiting = self._frames, [], 0
        self._open_stream = 0
        try:
            if self._transport.send(frames):
                return
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._on_broken(str(error))
            return
        self.blocked = True
        self._spawn(self._drain)

    async def _drain(self) -> None:
        try:
            await self._transport.drain()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._on_broken(str(error))
            return
        self.blocked = False
        with self._outbox:
            # What gathered meanwhile is older than what is queued. If the socket fills up again,
            # this starts the next such task.
            self._write()
            self.post()

    def close(self) -> None:
        """Write what the socket takes of what has gathered, and nothing from then on."""
        if self.closed:
            return
        self.closed = True
        if self._frames and not self.blocked:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                self._transport.send(self._frames)
        self._frames = []
        self._ready.clear()

    def dispose(self) -> None:
        """Refer to the connection no more, which is over."""
        self._on_broken = self._spawn = _nobody
