"""What waits to be sent on one stream: flows of whole messages, taken in turn.

A stream may carry many proxied connections. Each has a :class:`Flow`, a queue of its own, so that
one which has much to send does not keep the others waiting: the :class:`Schedule` takes from them by
deficit round robin (Shreedhar and Varghese, 1996). Small packets of the protocol go first. Pure: no
input or output.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

Buffer = bytes | bytearray | memoryview

# Messages share buffers of this size, unless they are large enough to need none.
_SMALL: Final = 32 * 1024
_LARGE: Final = 16 * 1024

#: Bytes that each flow may send in its turn.
QUANTUM: Final = 64 * 1024


def _nobody(_size: int) -> None:
    """Nobody counts."""


class Flow:
    """The queue of one proxied connection on a stream.

    Attributes:
      queued: bytes that wait.
      taken: bytes that have gone out of the queue since the beginning.
      on_drain: called with the number of bytes whenever some have gone out.
    """

    __slots__ = ("deficit", "held", "messages", "on_drain", "queued", "scheduled", "taken")

    def __init__(self, on_drain: Callable[[int], None] | None = None) -> None:
        # Most flows never have to wait, and an empty deque takes 624 bytes.
        self.messages: deque[bytes | bytearray] | None = None
        self.queued = 0
        self.taken = 0
        self.deficit = 0
        self.held = False
        self.scheduled = False
        self.on_drain = on_drain


class Schedule:
    """Chooses the next message of a stream."""

    __slots__ = (
        "_active",
        "_urgent",
        "account",
        "queued",
        "urgent_put",
        "urgent_size",
        "urgent_taken",
    )

    def __init__(self) -> None:
        self._active: deque[Flow] = deque()
        self._urgent: deque[Buffer] = deque()
        self.urgent_size = 0
        #: Bytes that wait in flows, and who is told when that changes, by how much.
        self.queued = 0
        self.account: Callable[[int], None] = _nobody
        #: How many urgent messages have been queued, and how many of them have gone out.
        self.urgent_put = self.urgent_taken = 0

    def __bool__(self) -> bool:
        return bool(self._urgent or self._active)

    def put_urgent(self, message: Buffer) -> None:
        """Add a message that goes out before those of all flows."""
        self._urgent.append(message)
        self.urgent_put += 1
        self.urgent_size += len(message)

    def put(self, flow: Flow, message: bytes) -> None:
        """Add a message behind the others of its flow."""
        # Small messages share a buffer: an object for each would be many times what it holds. The
        # first one does not grow: its size is what the flow's turn was granted for.
        messages = flow.messages
        if messages is None:
            messages = flow.messages = deque()
        tail = messages[-1] if len(messages) > 1 else None
        if isinstance(tail, bytearray) and len(tail) < _SMALL:
            tail += message
        else:
            messages.append(message if len(message) >= _LARGE else bytearray(message))
        flow.queued += len(message)
        self._count(len(message))
        self.activate(flow)

    def _count(self, size: int) -> None:
        self.queued += size
        self.account(size)

    def clear(self) -> None:
        """Forget everything, and count no more; the stream is gone."""
        self._count(-self.queued)
        self.account = _nobody
        for flow in self._active:
            flow.scheduled = False
        self._active.clear()
        self._urgent.clear()

    def activate(self, flow: Flow) -> None:
        """Let a flow take part, if it has something to send and is not held."""
        if flow.messages and not flow.scheduled and not flow.held:
            flow.scheduled = True
            self._active.append(flow)

    def drop(self, flow: Flow) -> int:
        """Forget what a flow has queued; return how many bytes that was."""
        dropped = flow.queued
        self._count(-dropped)
        flow.messages = None
        flow.queued = flow.deficit = 0
        if flow.scheduled:
            flow.scheduled = False
            self._active.remove(flow)
        return dropped

    def take(self) -> Buffer | None:
        """Remove and return the next message, or None if nothing may go."""
        if self._urgent:
            message = self._urgent.popleft()
            self.urgent_taken += 1
            self.urgent_size -= len(message)
            return message
        active = self._active
        while active:
            flow = active[0]
            messages = flow.messages
            if flow.held or not messages:
                flow.scheduled = False
                active.popleft()
                continue
            size = len(messages[0])
            if size > flow.deficit and len(active) > 1:
                # With one flow alone nobody waits for its turn to end.
                flow.deficit += QUANTUM
                if size > flow.deficit:
                    active.rotate(-1)
                    continue
            message = messages.popleft()
            flow.deficit = max(0, flow.deficit - size)
            flow.queued -= size
            self._count(-size)
            flow.taken += size
            if not messages:
                flow.messages = None
                flow.deficit = 0
                flow.scheduled = False
                active.popleft()
            elif flow.deficit < len(messages[0]):
                active.rotate(-1)
            if flow.on_drain is not None:
                flow.on_drain(size)
            return message
        return None
