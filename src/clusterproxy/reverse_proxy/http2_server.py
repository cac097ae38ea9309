"""A client's HTTP/2 connection: each request a stream of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.http1.grammar import (
    MAX_FIELDS,
    BadMessage,
    is_host,
    is_target,
    is_token,
    parse_length,
)
from clusterproxy.http2.adapter import ErrorCode
from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.flow import Flow

from .exchange import Request
from .fields import end_to_end, first, join_cookies, joined, wants_trailers
from .incoming import NO_BODY, ClientGone, Incoming, error_fields, phrase

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clusterproxy.http1.bodies import Buffer
    from clusterproxy.http2.stream import Header, Stream
    from clusterproxy.transport.stream import Transport

    from .exchange import Headers
    from .limits import ServerLimits

# What each field counts for beside its bytes (RFC 9113 §10.5.1).
_FIELD: Final = 32

# Pieces of bodies share buffers of this size.
_SMALL: Final = 16 * 1024

_NO_OPTIONS: Final[frozenset[bytes]] = frozenset()


class Http2Server:
    """One connection of a client."""

    def __init__(
        self,
        transport: Transport,
        *,
        peer: str,
        limits: ServerLimits,
        handle: Callable[[Incoming], Awaitable[None]],
    ) -> None:
        self.peer = peer
        self.limits = limits
        self._secure = transport.secure
        self._handle = handle
        self.connection = Http2Connection(
            transport, client=False, limits=limits.http2(), on_request=self._open
        )
        self.deadline = trio.current_time() + limits.header_timeout_s

    async def run(self) -> None:
        """Serve requests until the connection ends. Cancellation: resets what is open and closes."""
        await self.connection.run()

    @property
    def busy(self) -> bool:
        """Whether requests are under way."""
        return bool(self.connection.streams)

    def drain(self) -> None:
        """Serve no more than the requests at hand."""
        connection = self.connection
        connection.on_idle = lambda: connection.start_soon(_part, connection)
        connection.announce_end()

    def expire(self) -> None:
        """The connection has had nothing to do for too long."""
        self.drain()

    def _open(self, stream: Stream, headers: list[Header]) -> Http2Exchange:
        exchange = Http2Exchange(self.connection, stream)
        refusal = exchange.open(headers, self.peer, self.limits, secure=self._secure)
        if refusal:
            exchange.refuse(refusal)
        else:
            # Until it is answered its reset would be one of those that cost much for little.
            self.connection.start_soon(self._run, exchange)
        return exchange

    async def _run(self, exchange: Http2Exchange) -> None:
        try:
            await self._handle(exchange)
        finally:
            exchange.close()
            self.deadline = trio.current_time() + self.limits.idle_timeout_s


class Http2Exchange(Incoming):
    """One request; the handler of its stream (http2.stream.StreamHandler)."""

    def __init__(self, connection: Http2Connection, stream: Stream) -> None:
        super().__init__()
        self._connection = connection
        self._stream = stream
        self._flow = Flow(self._drained)
        self._sent = trio.Event()
        self._arrived = trio.Event()
        self._pieces: list[Buffer] = []
        self._queued = 0
        self.upgrade = b""
        self.body_length: int | None = None
        self.trailers: Headers = []
        self.body_done = stream.peer_ended
        self._ended = stream.peer_ended
        # Bytes of the body that have come, and what is wrong with its end.
        self._size = 0
        self._flaw = ""

    # -- the request -------------------------------------------------------------------------------

    def open(self, headers: list[Header], peer: str, limits: ServerLimits, *, secure: bool) -> int:
        """Look at the request; return the status of the answer if it is none."""
        size = sum(len(name) + len(value) + _FIELD for name, value in headers)
        if size > limits.max_header_bytes or len(headers) > MAX_FIELDS:
            return 431
        pseudo: dict[bytes, bytes] = {}
        fields: Headers = []
        hosts: list[bytes] = []
        lengths: list[bytes] = []
        for name, value in headers:
            if name.startswith(b":"):
                pseudo[name] = value
            elif name == b"host":
                hosts.append(value)
            elif name == b"content-length":
                lengths.append(value)
            else:
                fields.append((name, value))
        method, target = pseudo.get(b":method", b""), pseudo.get(b":path", b"")
        authority = pseudo.get(b":authority")
        if authority is not None:
            hosts.append(authority)
        # All are for the same thing (RFC 9113 §8.3.1): two of them are two requests.
        authority = hosts[0] if len(set(hosts)) == 1 else b""
        if (
            not authority
            or not is_host(authority)
            or not is_token(method)
            or not (is_target(target) or (target == b"*" and method == b"OPTIONS"))
            or any(_is_broken(value) or not is_token(name) for name, value in fields)
        ):
            return 400
        self.body_length = 0 if self.body_done else None
        if lengths:
            try:
                length = parse_length(lengths[0])
            except BadMessage:
                return 400
            # That DATA keeps to it is seen by h2, but not where trailers end the body.
            if len(lengths) > 1 or (self.body_done and length):
                return 400
            self.body_length = length
        expectation = first(fields, b"expect")
        if expectation and expectation.lower() != b"100-continue":
            return 417
        self.expects_continue = bool(expectation) and not self.body_done
        self.takes_trailers = wants_trailers(fields)
        self.trailer_names = b"" if self.body_done else joined(fields, b"trailer")
        self.request = Request(
            method=method.decode("ascii"),
            target=target,
            headers=[(b"host", authority), *join_cookies(end_to_end(fields, _NO_OPTIONS))],
            peer=peer,
            secure=secure,
        )
        return 0

    def refuse(self, status: int) -> None:
        """Answer a request that is none."""
        body = b"%d %b\n" % (status, phrase(status))
        fields = error_fields([(b"content-length", b"%d" % len(body))], text=True)
        self._connection.send_headers(self._stream, [(b":status", b"%d" % status), *fields])
        self._stream.send(self._flow, len(body), body)
        self.put_end([])

    async def receive_body(self) -> list[Buffer]:
        while not self._pieces:
            if self._ended:
                self._check_trailers()
                self.body_done = True
                return []
            self._arrived = trio.Event()
            await self._arrived.wait()
        pieces, self._pieces = self._pieces, []
        size, self._queued = self._queued, 0
        self.body_done = self._ended
        self._stream.release(size)
        if self._ended:
            self._check_trailers()
        return pieces

    def _check_trailers(self) -> None:
        if self._flaw:
            raise ClientGone(self._flaw, 400)

    def on_headers(self, headers: list[Header]) -> None:
        self.trailers = list(headers)
        if any(_is_broken(value) or not is_token(name) for name, value in headers):
            self._flaw = "malformed trailer field"
        elif self.body_length not in (None, self._size):
            # The origin was told the length: it would take the rest from the next request (RFC 9113 §8.1.1).
            self._flaw = "the body is shorter than Content-Length"

    def on_data(self, view: memoryview) -> bool:
        self._size += len(view)
        if self.finished:
            self.discarded = True
            return False
        pieces = self._pieces
        tail = pieces[-1] if pieces else b""
        if isinstance(tail, bytearray) and len(tail) < _SMALL:
            # An object for each of a thousand small frames would be many times what they hold.
            tail += view
        else:
            pieces.append(bytearray(view) if len(view) < _SMALL else bytes(view))
        self._queued += len(view)
        # What waits here the client may not send again.
        self._stream.hold(len(view))
        self._arrived.set()
        return False

    def settle(self) -> None:
        """Nothing is borrowed."""

    def on_end(self) -> None:
        self._ended = True
        self._arrived.set()

    def on_reset(self, code: int, reason: str) -> None:
        self._pieces.clear()
        self.finished = True
        self.leave()
        self._arrived.set()
        self._sent.set()

    # -- the response ------------------------------------------------------------------------------

    def put_informational(self, status: int, headers: Headers) -> None:
        self._connection.send_headers(self._stream, [(b":status", b"%d" % status), *headers])

    def put_head(self, status: int, reason: bytes, headers: Headers, length: int | None) -> None:
        if any(_is_broken(value) for _, value in headers):
            raise ValueError("a header field contains a line break or NUL")
        self.started = True
        self.status = status
        self._stream.useful = True
        fields = [(b":status", b"%d" % status), *headers]
        if length is not None and length != NO_BODY:
            fields.append((b"content-length", b"%d" % length))
        self._connection.send_headers(self._stream, fields)

    def put_data(self, pieces: list[Buffer]) -> None:
        stream, flow = self._stream, self._flow
        for piece in pieces:
            stream.send(flow, len(piece), piece)

    def put_end(self, trailers: Headers) -> None:
        self.finished = True
        self._stream.when_sent(lambda: self._finish(trailers))

    def _finish(self, trailers: Headers) -> None:
        connection, stream = self._connection, self._stream
        if trailers:
            connection.send_headers(stream, trailers, end=True)
            return
        connection.end_stream(stream)
        if stream.open:
            # The answer is complete, whatever is still on its way up.
            connection.reset_stream(stream, ErrorCode.NO_ERROR)

    async def flush(self) -> bool:
        at_once = not self._flow.queued
        # Whose stream is reset is cancelled.
        while self._flow.queued:
            self._sent = trio.Event()
            await self._sent.wait()
        return at_once

    def _drained(self, _size: int) -> None:
        if not self._flow.queued:
            self._sent.set()

    def abort(self) -> None:
        if not self.finished:
            self.finished = True
            self._connection.reset_stream(self._stream, ErrorCode.INTERNAL_ERROR)

    def close(self) -> None:
        """Nobody works on this request any more."""
        self._pieces.clear()
        self._flow.on_drain = None


async def _part(connection: Http2Connection) -> None:
    # The client closes when it sees the GOAWAY; closing first could reset what is on its way.
    await trio.sleep(1.0)
    connection.fail("drained")


def _is_broken(value: bytes) -> bool:
    return b"\r" in value or b"\n" in value or b"\0" in value
