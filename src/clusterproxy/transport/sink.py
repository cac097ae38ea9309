"""The bytes that go out of a tunnel into a plain byte stream: a client's or a service's socket."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

import trio

from .outbox import current_outbox

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from .records import Buffer
    from .stream import Transport

_log = logging.getLogger("clusterproxy.transport")

# Parts share buffers of this size, unless they are large enough to need none.
_SMALL: Final = 32 * 1024
_LARGE: Final = 16 * 1024

# One write takes at most so much of the queue.
_CHUNK: Final = 256 * 1024


class Spawn(Protocol):
    def __call__(self, function: Callable[..., Awaitable[None]], /, *args: object) -> None:
        """Start a task that lives as long as the connection."""


def _nobody(*_: object) -> None:
    """The connection is over."""


class ByteSink:
    """Writes to a transport without waiting; what it does not take is queued.

    Attributes:
      queued: bytes that wait, in the queue or for room in the socket.
      taken: bytes that the peer has taken since the beginning, as far as the kernel knows.
      on_drain: called whenever ``queued`` has shrunk, or has grown at the end of a batch.
      broken: whether a write failed; from then on everything is dropped.

    Args:
      spawn: starts the task that writes while the socket is full.
      on_broken: called once when a write fails.
    """

    __slots__ = (
        "_finish",
        "_lent",
        "_on_broken",
        "_outbox",
        "_posted",
        "_queue",
        "_spawn",
        "_taken",
        "_transport",
        "_writing",
        "broken",
        "on_drain",
        "queued",
    )

    def __init__(
        self, transport: Transport, spawn: Spawn, on_broken: Callable[[str], None]
    ) -> None:
        self._transport = transport
        self._spawn = spawn
        self._on_broken = on_broken
        self._outbox = current_outbox()
        # Most sinks never have to wait, and an empty deque takes 624 bytes.
        self._queue: deque[bytes | bytearray] | None = None
        self._lent: list[Buffer] = []
        self._posted = False
        self._writing = False
        self._finish: Callable[[], None] | None = None
        self.queued = 0
        self._taken = 0
        self.broken = False
        self.on_drain: Callable[[], None] = lambda: None

    @property
    def taken(self) -> int:
        # Not what went into the socket: its buffer may be megabytes, and the kernel tells of room only
        # when a third of it is free, so a slow peer would seem to take nothing for a long time.
        return self._taken - self._transport.outstanding()

    def send(self, parts: Sequence[Buffer]) -> None:
        """Send bytes; the buffers are lent for this batch."""
        if self.broken:
            return
        if self._writing:
            for part in parts:
                self._enqueue(part)
            return
        self._lent.extend(parts)
        if not self._posted:
            self._posted = True
            self._outbox.post(self)

    def _enqueue(self, part: Buffer) -> None:
        # Small parts share a buffer: an object for each would be many times what it holds.
        queue = self._queue
        if queue is None:
            queue = self._queue = deque()
        tail = queue[-1] if queue else None
        if isinstance(tail, bytearray) and len(tail) < _SMALL:
            tail += part
        else:
            queue.append(bytes(part) if len(part) >= _LARGE else bytearray(part))
        self.queued += len(part)

    def flush(self) -> None:
        """Write what was lent in this batch; never raises."""
        try:
            self._flush()
        except Exception:
            # Flushed at the end of somebody else's batch: a bug here is not theirs.
            _log.exception("bug while writing")
            # It may be in what is called here, so do not call that again.
            self.on_drain = lambda: None
            self._break("internal error")

    def _flush(self) -> None:
        self._posted = False
        lent = self._lent
        if not lent or self.broken:
            return
        self._lent = []
        size = sum(map(len, lent))
        try:
            sent = self._transport.send(lent)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._break(str(error))
            return
        if sent:
            self._taken += size
            self._check_finish()
            return
        unsent = self._transport.unsent
        self._taken += max(0, size - unsent)
        self.queued += unsent
        self._writing = True
        self._spawn(self._write)
        self.on_drain()

    async def _write(self) -> None:
        """Write the queue until it is empty; the only writer meanwhile."""
        transport = self._transport
        try:
            while True:
                while transport.blocked:
                    waiting = transport.unsent
                    await transport.drain_some()
                    self._took(waiting - transport.unsent)
                queue = self._queue
                if not queue:
                    break
                chunk: list[Buffer] = []
                size = 0
                while queue and size < _CHUNK:
                    part = queue.popleft()
                    chunk.append(part)
                    size += len(part)
                if transport.send(chunk):
                    self._took(size)
                else:
                    self._took(size - transport.unsent)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            self._break(str(error))
            return
        self._writing = False
        self._queue = None
        self._check_finish()

    def _took(self, size: int) -> None:
        # TLS adds bytes of its own, so the count of what waits in the socket is only about right.
        size = max(0, min(size, self.queued))
        self.queued -= size
        self._taken += size
        self.on_drain()

    def finish(self, done: Callable[[], None]) -> None:
        """Call *done* once everything sent so far is with the kernel, or lost."""
        self._finish = done
        self._check_finish()

    def _check_finish(self) -> None:
        if self._finish is not None and not self._writing and not self._lent:
            done, self._finish = self._finish, None
            done()

    def discard(self) -> None:
        """Drop what waits, and everything that is sent from now on."""
        self.broken = True
        self._writing = False
        self._lent.clear()
        self._queue = None
        self.queued = 0
        self._check_finish()

    def dispose(self) -> None:
        """Refer to the connection no more, which is over."""
        self._on_broken = self._spawn = self.on_drain = _nobody

    def _break(self, reason: str) -> None:
        if self.broken:
            return
        self.discard()
        self.on_drain()
        self._on_broken(reason)
