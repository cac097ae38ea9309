"""One HTTP/2 connection: its life, its streams, and what h2 says of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

import attrs
import trio

from clusterproxy.transport.outbox import current_outbox

from .adapter import Adapter, ErrorCode, H2Error, events, exceeded_limit
from .limits import Http2Limits, Meter, Share
from .line import Line
from .output import Output
from .receiver import FrameReceiver
from .stream import Header, Stream, StreamHandler

if TYPE_CHECKING:
    from clusterproxy.transport.stream import Transport

# Acknowledgements and the like that a peer causes and does not read.
_BACKLOG_LIMIT: Final = 1024 * 1024

# PINGs of ours without an answer: a peer that goes on talking and leaves them is not slow.
_PING_LIMIT: Final = 10_000

# A peer's SETTINGS come with its first bytes (RFC 9113 §3.4).
_GREETING_S: Final = 20.0

# Between two looks at whether a peer is alive there was a pause if it was more.
_PAUSE_S: Final = 3.0

# How long after the announcement the end is final at the latest.
_GOAWAY_S: Final = 5.0

# What stands before the payload of a PING and of its answer, RFC 9113 §6.7.
_PING: Final = b"\x00\x00\x08\x06\x00\x00\x00\x00\x00"
_PING_ACK: Final = b"\x00\x00\x08\x06\x01\x00\x00\x00\x00"

#: Opens the handler of a request: ``(stream, headers)``. Called by the reader: never waits.
RequestOpener = Callable[[Stream, list[Header]], StreamHandler]


@attrs.frozen
class _Ping:
    sent: float
    acknowledged: Callable[[], None] | None


class Http2Connection:
    """One connection. :meth:`run` serves it; everything else is synchronous.

    Attributes:
      lost: why the connection is over, or None.
      at_fault: whether it is over because the peer broke a rule.
      draining: no more streams are opened on it; those that are open go on.
      line: how much is under way here when the line is full.
      windows, credit: what its streams' windows, and credit that is granted on them, may grow by.
      keepalive: silence before a PING and after it in seconds, where the general ones do not hold.
      on_idle: called once when the last stream of a draining connection has ended.
      on_goaway: called once when the peer has announced the end of the connection.

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
        self.limits = limits
        self.h2 = Adapter(
            client=client,
            window=limits.window,
            max_frame_size=limits.max_frame_size,
            max_streams=limits.max_streams,
            max_header_list=limits.max_header_list,
        )
        self.output = Output(
            transport,
            self.h2,
            self.start_soon,
            lambda error: self.fail(f"connection broken: {error}"),
        )
        self.streams: dict[int, Stream] = {}
        self.lost: str | None = None
        self.at_fault = False
        self.draining = False
        self.on_idle: Callable[[], None] | None = None
        self.on_goaway: Callable[[], None] | None = None
        self.keepalive: tuple[float, float] | None = None
        self._transport = transport
        self._client = client
        self._on_request = on_request
        self._on_limit = on_limit
        self._nursery: trio.Nursery | None = None
        self._outbox = current_outbox()
        self.line = Line()
        self._received = 0
        # Whether DATA came since the line was measured last.
        self._fed = False
        self.windows = Share(limits.growth, limits.max_window)
        self.credit = Share(limits.growth, limits.max_window)
        self._receiver = FrameReceiver(self.h2, limits, client=client)
        self._unsettled: dict[StreamHandler, None] = {}
        self._resets = Meter(limits.max_resets_per_s, 5 * limits.max_resets_per_s)
        self._pings: dict[bytes, _Ping] = {}
        self._ping_count = 0
        self._opened = self._last_read = self._looked = trio.current_time()
        self._greeted = False
        self._sent = 0
        self.h2.initiate_connection()
        self.h2.increment_flow_control_window(limits.connection_window - 65535)

    @property
    def peer_host(self) -> str:
        """The peer's IP address, or nothing: on a Unix socket, and when the connection is gone."""
        try:
            name: Any = self._transport.sock.getpeername()
        except OSError:
            return ""
        return "" if isinstance(name, (str, bytes)) else str(name[0])

    @property
    def peer_certificate(self) -> dict[str, Any]:
        """What the peer's certificate says, as :meth:`ssl.SSLSocket.getpeercert`; empty if it has shown none.

        Raises:
          ValueError: it cannot be read, or the connection is gone.
        """
        if self._transport.secure and self._transport.tls is None:
            raise ValueError("the connection is gone")
        return (self._transport.tls and self._transport.tls.getpeercert()) or {}

    # -- life --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the connection until it ends; ``lost`` then says why.

        Each stream's handler is told the end of its stream, also upon cancellation.
        Cancellation: closes the connection at once.
        """
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                early = self._transport.receive_early()
                with self._outbox:
                    # One write for our SETTINGS and the answer to the peer's: a Go client waits for both.
                    self.output.start()
                    if early:
                        self._receive(early)
                await self._read()
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                self.lost = self.lost or f"connection broken: {error}"
            finally:
                self._nursery = None
                self._end()
                nursery.cancel_scope.cancel()

    def start_soon(self, function: Callable[..., Awaitable[None]], *args: object) -> None:
        """Start a task that ends with the connection."""
        if self._nursery is not None:
            self._nursery.start_soon(function, *args)

    async def _read(self) -> None:
        transport, outbox = self._transport, self._outbox
        while not self.lost:
            view = await transport.receive(self.limits.max_read)
            if not view:
                self.lost = "connection closed by the peer"
                return
            with outbox:
                self._receive(view)

    def _receive(self, view: memoryview) -> None:
        """Dispatch one batch. Its buffers are lent to the handlers until the end of it."""
        self._last_read = trio.current_time()
        self._received += len(view)
        receiver = self._receiver
        # Also what other connections' batches made it send: the peer's WINDOW_UPDATEs follow that too.
        sent = self.output.sent
        receiver.moved += sent - self._sent
        self._sent = sent
        try:
            receiver.receive(self, view, self._last_read)
        except H2Error as error:
            self.output.pull()
            self.at_fault = True
            limit = exceeded_limit(error)
            if limit is not None:
                self.note_limit(limit)
            self.fail(f"protocol error: {error}")
        for handler in self._unsettled:
            handler.settle()
        self._unsettled.clear()
        if self.lost:
            return
        if receiver.thirsty:
            for stream in receiver.thirsty:
                stream.credit()
            receiver.thirsty.clear()
        window = self.limits.connection_window
        used = window - self.h2.inbound_window
        if used > window // 8:
            # On receipt and not on consumption: a stream that is not read must not starve others.
            self.h2.increment_flow_control_window(used)
            self.output.pull()

    def _end(self) -> None:
        if not self.lost:
            # Cancelled: what is open does not go on, but the peer learns that it was no accident.
            self.lost = "cancelled"
            self.h2.final_goaway()
            self.output.pull()
        with self._outbox:
            self.output.close()
            self._transport.close()
            self._receiver.plain.clear()
            for stream in list(self.streams.values()):
                self._forget(stream, ErrorCode.CANCEL, self.lost, tell=True)
        # Cycles of references would keep all of it until the garbage collector comes by.
        self._on_request = self._on_limit = self.on_idle = self.on_goaway = None
        self._pings.clear()
        self.output.dispose()
        self.h2.dispose()

    def fail(self, reason: str, code: ErrorCode | None = None) -> None:
        """End the connection, with a GOAWAY if there is a *code*; streams are told by the reader."""
        if self.lost:
            return
        self.lost = reason
        if code is not None:
            self.at_fault = True
            self.h2.error_goaway(code, reason.encode())
            self.output.pull()
        self.output.close()
        self._transport.close()

    def note_limit(self, limit: str) -> None:
        """Count that the peer has exceeded a limit."""
        if self._on_limit is not None:
            self._on_limit(limit)

    def exceed(self, limit: str, reason: str) -> None:
        """End the connection of a peer that asks too much."""
        if not self.lost:
            self.note_limit(limit)
        self.fail(reason, ErrorCode.ENHANCE_YOUR_CALM)

    # -- what the receiver has cut -----------------------------------------------------------------

    def deliver(self, stream: Stream, view: memoryview) -> None:
        self._fed = True
        handler = stream.handler
        if handler is not None and handler.on_data(view):
            self._unsettled[handler] = None

    def handle(self, received: Sequence[events.Event]) -> None:
        for event in received:
            if self.lost:
                return
            handle = self._handlers.get(type(event))
            if handle is not None:
                handle(self, event)
        self.output.pull()
        self._check_backlog()

    def answer_ping(self, payload: memoryview) -> None:
        self.output.put(_PING_ACK + payload)
        self._check_backlog()

    def _check_backlog(self) -> None:
        if self.output.blocked and self.output.waiting > _BACKLOG_LIMIT:
            self.exceed("backlog", "the peer does not read its answers")

    def _on_request_received(self, event: events.RequestReceived) -> None:
        stream_id = event.stream_id
        if self.draining or self._on_request is None:
            # Beyond the stream that the final GOAWAY named: the client may try elsewhere.
            self.h2.reset_stream(stream_id, ErrorCode.REFUSED_STREAM)
            self.h2.retire(stream_id)
            return
        stream = self._add_stream(stream_id)
        self._note_body(stream, event)
        handler = self._on_request(stream, event.headers)
        # It may have been answered, and be over, already.
        if stream.open:
            stream.handler = handler

    def _on_response_received(self, event: events.ResponseReceived) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is not None and stream.handler is not None:
            self._note_body(stream, event)
            stream.handler.on_headers(event.headers)

    def _note_body(
        self, stream: Stream, event: events.RequestReceived | events.ResponseReceived
    ) -> None:
        # h2 has already seen the end that a later event will tell of.
        stream.peer_ended = event.stream_ended is not None
        if not stream.peer_ended and self.h2.is_plain(stream.id):
            self._receiver.plain[stream.id] = stream

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
        self._receiver.thirsty[stream] = None
        if event.data:
            self.deliver(stream, memoryview(event.data))

    def _on_stream_ended(self, event: events.StreamEnded) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is None:
            return
        stream.peer_ended = True
        self._receiver.plain.pop(stream.id, None)
        if stream.handler is not None:
            stream.handler.on_end()
        self._retire(stream)

    def _on_stream_reset(self, event: events.StreamReset) -> None:
        stream = self.streams.get(event.stream_id)
        if stream is None:
            return
        # Whoever resets it: a client can have h2 do that, by frames that are wrong for the stream (CVE-2025-8671).
        wasted = not stream.useful and not self._client
        if wasted and not self._resets.spend(self._last_read):
            self.exceed("resets", "too many streams reset")
        self._forget(stream, int(event.error_code), "stream reset by the peer", tell=True)

    def _on_window_updated(self, event: events.WindowUpdated) -> None:
        self.window_opened(event.stream_id or 0)

    def window_opened(self, stream_id: int) -> None:
        if not stream_id:
            self.output.post()
            return
        stream = self.streams.get(stream_id)
        if stream is not None and stream.waiting:
            self.output.enqueue(stream)

    def _on_settings_changed(self, _event: events.RemoteSettingsChanged) -> None:
        self._greeted = True
        self.output.frame_up_to(self.h2.max_outbound_frame_size)
        for stream in self.streams.values():
            if stream.waiting:
                self.output.enqueue(stream)

    def note_answer(self, payload: memoryview) -> None:
        ping = self._pings.pop(bytes(payload), None)
        if ping is None:
            return
        self.line.note_round_trip(self._last_read - ping.sent)
        if ping.acknowledged is not None:
            ping.acknowledged()

    def _on_ping_acknowledged(self, event: events.PingAckReceived) -> None:
        self.note_answer(memoryview(event.ping_data))

    def _on_goaway(self, event: events.ConnectionTerminated) -> None:
        if event.error_code != ErrorCode.NO_ERROR:
            debug = (event.additional_data or b"").decode("utf-8", "replace")
            self.fail(f"GOAWAY {event.error_code!s}: {debug}")
            return
        self.draining = True
        for stream in list(self.streams.values()):
            if self._client and stream.id > (event.last_stream_id or 0):
                self._forget(
                    stream, ErrorCode.REFUSED_STREAM, "not accepted before GOAWAY", tell=True
                )
        self._check_idle()
        if self.on_goaway is not None:
            on_goaway, self.on_goaway = self.on_goaway, None
            on_goaway()

    # -- streams -----------------------------------------------------------------------------------

    def _add_stream(self, stream_id: int) -> Stream:
        stream = Stream(self, stream_id, self.h2.streams[stream_id], self.limits.window)
        self.streams[stream_id] = stream
        return stream

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
        stream = self._add_stream(stream_id)
        stream.handler = handler
        self.output.pull()
        return stream

    def send_headers(self, stream: Stream, headers: list[Header], *, end: bool = False) -> None:
        """Send response headers, or trailers; on a stream that is gone this does nothing."""
        if not stream.open or self.lost:
            return
        self.h2.send_headers(stream.id, headers, end_stream=end)
        if end and not stream.peer_ended:
            # grpc-go does the same: the answer is complete, whatever is still on its way up.
            self.h2.reset_stream(stream.id, ErrorCode.NO_ERROR)
        self.output.pull()
        if end:
            self._forget(stream, ErrorCode.NO_ERROR, "finished", tell=False)

    def end_stream(self, stream: Stream) -> None:
        """Half-close our side."""
        if stream.open and not self.lost:
            self.h2.end_stream(stream.id)
            self.output.pull()
            self._retire(stream)

    def reset_stream(self, stream: Stream, code: ErrorCode, *, told: str = "") -> None:
        """Reset a stream; what it has queued is dropped. Its handler is *told*, if at all."""
        if not stream.open or self.lost:
            return
        # A handler may give up upon the last frame: for h2 the stream is over then.
        if not stream.h2.closed:
            self.h2.reset_stream(stream.id, code)
            self.output.pull()
        self._forget(stream, code, told, tell=bool(told))

    def refuse_stream(self, stream: Stream, reason: str) -> None:
        """Reset a stream whose peer asks too much, and tell its handler."""
        self.note_limit("answers")
        self.reset_stream(stream, ErrorCode.ENHANCE_YOUR_CALM, told=reason)

    def _retire(self, stream: Stream) -> None:
        """Forget a stream that both sides have ended."""
        if stream.h2.closed:
            self._forget(stream, ErrorCode.NO_ERROR, "finished", tell=False)

    def _forget(self, stream: Stream, code: int, reason: str, *, tell: bool) -> None:
        if not stream.open:
            return
        stream.open = False
        self.streams.pop(stream.id, None)
        self._receiver.plain.pop(stream.id, None)
        self._receiver.thirsty.pop(stream, None)
        self.output.forget(stream)
        self.h2.retire(stream.id)
        handler, stream.handler = stream.handler, None
        if tell and handler is not None:
            handler.on_reset(code, reason)
        stream.close()
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
            self.output.pull()

    def measure(self) -> None:
        """See how much the line holds, unless that was done a moment ago."""
        # A Go server counts PINGs without DATA in between against its peer, and consumers may take for
        # long what has come before.
        if self._fed and self.line.begin(self._received, self._last_read):
            self._fed = False
            self.ping(self._measured)

    def _measured(self) -> None:
        self.line.end(self._received, self._last_read)

    def ping(self, acknowledged: Callable[[], None] | None = None) -> None:
        """Send a PING; *acknowledged* is called when the answer comes."""
        if self.lost:
            return
        if len(self._pings) >= _PING_LIMIT:
            self.exceed("pings", "the peer does not answer PINGs")
            return
        self._ping_count += 1
        payload = self._ping_count.to_bytes(8, "big")
        self._pings[payload] = _Ping(trio.current_time(), acknowledged)
        self.output.pull()
        self.output.put(_PING + payload)

    def check_alive(self, now: float, interval: float, timeout: float) -> None:
        """Keep alive: PING after *interval* seconds of silence, end *timeout* seconds later.

        Called every second or so.
        """
        paused = now - self._looked > _PAUSE_S
        self._looked = now
        # After a pause of this process answers may be here that nobody has read yet.
        if self.lost or paused:
            return
        if self.keepalive is not None:
            interval, timeout = self.keepalive
        if not self._greeted and now - self._opened > _GREETING_S:
            self.fail("no HTTP/2 preface from the peer")
        elif self._pings:
            oldest = next(iter(self._pings.values()))
            if now - max(oldest.sent, self._last_read) > timeout:
                self.fail("keepalive ping failed to receive ACK within timeout")
        elif now - self._last_read >= interval:
            self.ping()

    def announce_end(self) -> None:
        """Tell the peer to open no more streams here; open ones go on (RFC 9113 §6.8).

        The final GOAWAY follows when the peer has answered a PING, that is, when it has surely seen
        the first one.
        """
        if self.lost:
            return
        if self.draining:
            self._check_idle()
            return
        self.h2.announce_goaway()
        self.ping(self._final_goaway)
        self.start_soon(self._insist)

    async def _insist(self) -> None:
        # A peer that does not even answer a PING must not use up the whole grace.
        await trio.sleep(_GOAWAY_S)
        self._final_goaway()

    def _final_goaway(self) -> None:
        if self.draining:
            return
        self.draining = True
        self.h2.final_goaway()
        self.output.pull()
        self._check_idle()

    _handlers: ClassVar[dict[type[events.Event], Callable[[Http2Connection, Any], None]]] = {
        events.RequestReceived: _on_request_received,
        events.ResponseReceived: _on_response_received,
        events.TrailersReceived: _on_trailers_received,
        events.DataReceived: _on_data_received,
        events.StreamEnded: _on_stream_ended,
        events.StreamReset: _on_stream_reset,
        events.WindowUpdated: _on_window_updated,
        events.RemoteSettingsChanged: _on_settings_changed,
        events.PingAckReceived: _on_ping_acknowledged,
        events.ConnectionTerminated: _on_goaway,
    }
