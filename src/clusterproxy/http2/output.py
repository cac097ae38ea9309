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

    from clusterproxy.transport.stream import Buffer, Transport

    from .adapter import Adapter
    from .stream import Stream

_log = logging.getLogger("clusterproxy.http2")

# RFC 9113 §4.1: length (24), type (8), flags (8), stream (31).
_pack = Struct(">HBBBI").pack

# Write out within a batch when so much has gathered.
_HIGH_WATER: Final = 256 * 1024


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
        self.max_frame_size = h2.max_outbound_frame_size
        #: Bytes of payload put out since the beginning.
        self.sent = 0
        #: Bytes that have gathered.
        self.waiting = 0

    # -- putting frames down -----------------------------------------------------------------------

    def put_data(self, stream_id: int, size: int, head: Buffer, rest: tuple[Buffer, ...]) -> None:
        """Put *size* bytes down as DATA; the windows allow it. The buffers are lent for this batch."""
        frames = self._frames
        if self._open_stream == stream_id and self._open_size + size <= self.max_frame_size:
            # Messages that go out together share a frame: a header less, and a frame less to look at.
            self._open_size = length = self._open_size + size
            frames[self._open] = _pack(length >> 8, length & 255, 0, 0, stream_id)
            frames.append(head)
            if rest:
                frames.extend(rest)
        elif size <= self.max_frame_size:
            self._open, self._open_stream, self._open_size = len(frames), stream_id, size
            frames.append(_pack(size >> 8, size & 255, 0, 0, stream_id))
            frames.append(head)
            if rest:
                frames.extend(rest)
        elif rest:
            self._open_stream = 0
            self._put_frames(stream_id, size, (head, *rest))
        else:
            self._open_stream = 0
            view, largest = memoryview(head), self.max_frame_size
            for start in range(0, size, largest):
                piece = view[start : start + largest]
                length = len(piece)
                frames.append(_pack(length >> 8, length & 255, 0, 0, stream_id))
                frames.append(piece)
        self.sent += size
        self.waiting += size
        if self.waiting >= _HIGH_WATER:
            self._write()
        else:
            self.post()

    def _put_frames(self, stream_id: int, size: int, parts: tuple[Buffer, ...]) -> None:
        frames, largest = self._frames, self.max_frame_size
        room = 0
        for part in parts:
            view = memoryview(part)
            start, end = 0, len(view)
            while start < end:
                if not room:
                    room = min(size, largest)
                    size -= room
                    frames.append(_pack(room >> 8, room & 255, 0, 0, stream_id))
                stop = min(end, start + room)
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
