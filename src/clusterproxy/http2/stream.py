"""One HTTP/2 stream: what it sends within the peer's windows, what it grants within its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from clusterproxy.transport.pace import SHORT_WINDOW, current_pace

from .flow import QUANTUM, Buffer, Flow, Schedule

if TYPE_CHECKING:
    from collections.abc import Callable

    from .adapter import H2Stream
    from .connection import Http2Connection

Header = tuple[bytes, bytes]

# Answers that a peer asked for and does not fetch; more than this of them is not a slow peer.
_URGENT_LIMIT: Final = 256 * 1024

# Grants are gathered up to this, however large the window: what is gathered is not under way.
_LARGE_GRANT: Final = 1024 * 1024

# But not from a peer that has less than this.
_SMALL_GRANT: Final = 16 * 1024

_TAKING: Final = memoryview(b"")


class StreamHandler(Protocol):
    """What a stream tells its owner. All of it is called by the connection's reader: never wait."""

    def on_headers(self, headers: list[Header]) -> None:
        """A response, or trailers, arrived."""

    def on_data(self, view: memoryview) -> bool:
        """A part of the body arrived, lent until :meth:`settle`; return whether that is wanted."""
        ...

    def settle(self) -> None:
        """The buffers of this batch are about to be used again."""

    def on_end(self) -> None:
        """The peer has ended its side."""

    def on_reset(self, code: int, reason: str) -> None:
        """The stream is gone: reset, or its connection lost. Called at most once, and last."""


class Stream:
    """One stream of a connection.

    Sending never waits: what the windows or the socket do not take is queued, and whoever sends
    looks at ``Flow.queued`` or is told by ``Flow.on_drain``.

    Receiving: the peer may always send ``window`` bytes more than were consumed. What the owner has
    put into somebody else's queue it declares by :meth:`hold` and :meth:`release`.

    Attributes:
      peer_ended: the peer will send nothing more.
      useful: set by the owner once the stream has served its purpose; a peer that resets many
        streams before that is cut off.
      shared: set by the owner if what is sent here is asked for by others than the peer.
      window: what the peer may send before it is consumed. Grows with the line, see :meth:`credit`.
    """

    __slots__ = (
        "_finish",
        "_held",
        "_output",
        "_pace",
        "_partial",
        "connection",
        "h2",
        "handler",
        "id",
        "low",
        "open",
        "peer_ended",
        "schedule",
        "shared",
        "useful",
        "window",
    )

    def __init__(
        self, connection: Http2Connection, stream_id: int, state: H2Stream, window: int
    ) -> None:
        self.connection = connection
        self._output = connection.output
        self._pace = current_pace()
        self.id = stream_id
        self.h2 = state
        self.handler: StreamHandler | None = None
        self.open = True
        self.peer_ended = False
        self.useful = False
        self.shared = False
        self.schedule = Schedule()
        self.window = window
        self.low = window - _gathered(window)
        self._held = 0
        self._partial: memoryview | None = None
        self._finish: Callable[[], None] | None = None

    # -- sending -----------------------------------------------------------------------------------

    def send(
        self, flow: Flow | None, size: int, head: Buffer, rest: tuple[Buffer, ...] = ()
    ) -> None:
        """Send one message of *size* bytes, given in buffers that are only lent for this batch.

        Without a *flow* it goes before everything that waits. On a stream that is gone it is dropped.
        """
        if not self.open:
            return
        if (
            not self._output.blocked
            and self._partial is None
            and not self.schedule
            and size <= self.h2.outbound_flow_control_window
            and size <= self.connection.h2.outbound_flow_control_window
            and (flow is None or not flow.held)
        ):
            self._emit(size, head, rest)
            if flow is not None:
                flow.taken += size
            return
        message = b"".join((head, *rest))
        if flow is not None:
            self.schedule.put(flow, message)
        else:
            self.schedule.put_urgent(message)
            if not self.shared and self.schedule.urgent_size > _URGENT_LIMIT:
                self.connection.refuse_stream(self, "the peer does not fetch its answers")
                return
        self._output.enqueue(self)

    def send_run(self, flow: Flow, size: int, view: memoryview) -> None:
        """Send messages of *size* bytes each that lie one behind the other, as :meth:`send`."""
        start = 0
        if (
            not self._output.blocked
            and self._partial is None
            and not self.schedule
            and not flow.held
            and self.open
        ):
            window = min(
                self.h2.outbound_flow_control_window,
                self.connection.h2.outbound_flow_control_window,
            )
            start = min(window, len(view)) // size * size
            if start > 0:
                self._emit(start, view[:start], ())
                flow.taken += start
            start = max(0, start)
        for at in range(start, len(view), size):
            self.send(flow, size, view[at : at + size])

    @property
    def room(self) -> int:
        """Bytes that could go now, at most."""
        if self._output.blocked or self.waiting:
            return 0
        return min(
            self.h2.outbound_flow_control_window, self.connection.h2.outbound_flow_control_window
        )

    @property
    def waiting(self) -> bool:
        """Whether something is queued."""
        return self._partial is not None or bool(self.schedule)

    def resume_flow(self, flow: Flow) -> None:
        """Let a flow that was held go on."""
        flow.held = False
        if self.open:
            self.schedule.activate(flow)
            self._output.enqueue(self)

    def drop_flow(self, flow: Flow) -> int:
        """Forget what a flow has queued; return how many bytes that was."""
        return self.schedule.drop(flow)

    def when_sent(self, finish: Callable[[], None]) -> None:
        """Call *finish* once all that was sent so far is on its way; at most one at a time."""
        if not self.waiting:
            finish()
        else:
            self._finish = finish

    def pump(self) -> bool:
        """Send queued messages for one turn; return whether another turn could send more now."""
        connection_h2 = self.connection.h2
        turn = QUANTUM
        # Behind the last message there may be an end, which needs no window: do not leave it waiting.
        while self.open and (turn > 0 or not self.waiting):
            if self._output.blocked:
                return True
            # A change of SETTINGS can make a window negative (RFC 9113 §6.9.2).
            window = min(
                self.h2.outbound_flow_control_window, connection_h2.outbound_flow_control_window
            )
            if window <= 0 and self.waiting:
                return self.h2.outbound_flow_control_window > 0
            data = self._partial
            if data is None:
                # What on_drain may send goes behind the message that is being taken.
                self._partial = _TAKING
                message = self.schedule.take()
                self._partial = None
                if self._gone():
                    return False
                if message is None:
                    finish, self._finish = self._finish, None
                    if finish is not None:
                        finish()
                    return False
                data = memoryview(message)
            size = len(data)
            self._partial = data[window:] if size > window else None
            self._emit(min(size, window), data[:window], ())
            turn -= size
        return self.open

    def _gone(self) -> bool:
        # What on_drain does can end the stream while it is pumped.
        return not self.open

    def _emit(self, size: int, head: Buffer, rest: tuple[Buffer, ...]) -> None:
        self.h2.outbound_flow_control_window -= size
        self.connection.h2.outbound_flow_control_window -= size
        self._output.put_data(self.id, size, head, rest)

    # -- receiving ---------------------------------------------------------------------------------

    def hold(self, size: int) -> None:
        """Count bytes that this stream brought and that wait in another queue."""
        self._held += size

    def release(self, size: int) -> None:
        """Give back what was held."""
        self._held -= size
        self.credit()

    def credit(self) -> None:
        """Grant what was consumed, if it is worth a frame; to a peer that cannot send, little is.

        The window grows to what the line holds, within the limits.
        """
        if not self.open or self.peer_ended:
            return
        limits, line, window = self.connection.limits, self.connection.line, self.window
        if self._pace.hurried:
            window = min(window, max(SHORT_WINDOW, line.size))
        granted = self.h2.inbound_flow_control_window
        room = window - self._held - granted
        if room < _gathered(window) and (room < _SMALL_GRANT or granted >= _SMALL_GRANT):
            return
        wanted = min(line.size, limits.max_window) - self.window
        if wanted > 0:
            more = self.connection.windows.take(wanted)
            self.window += more
            self.low = self.window - _gathered(self.window)
            room += more
        self.connection.grant(self, room)
        if limits.max_window:
            self.connection.measure()

    def close(self) -> None:
        """The stream is gone: forget what waits, and what the window had grown by."""
        self.schedule.clear()
        self._finish = None
        initial = self.connection.limits.window
        self.connection.windows.give_back(self.window - initial)
        self.window = initial


def _gathered(window: int) -> int:
    return min(window // 4, _LARGE_GRANT)
