"""A client's HTTP/1.1 connection: requests one after the other."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.http1.bodies import Buffer, ChunkedBody, Decoder, LengthBody
from clusterproxy.http1.grammar import (
    BadMessage,
    RequestHead,
    has_bare_lf,
    parse_request,
    write_head,
)

from .exchange import Request
from .fields import end_to_end, first, joined, upgrade_of, wants_trailers
from .incoming import NO_BODY, ClientGone, Incoming, phrase
from .wire import SocketWire

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clusterproxy.transport.stream import Transport

    from .exchange import Headers
    from .limits import ServerLimits

# A read of a head.
_READ: Final = 64 * 1024

# Bodies are read in larger bites.
_READ_BODY: Final = 256 * 1024

# How long a client may go on sending what nobody reads, before the socket is closed under it: a reset can overtake the
# answer (RFC 9112 §9.6). As Go's rstAvoidanceDelay.
_LINGER_S: Final = 0.5


def _nothing() -> None:
    """Nobody wants to know."""


class Http1Connection:
    """One connection of a client.

    Attributes:
      deadline: when it has had enough time for what it should send now.
      exchange: the request at hand.
      busy: a request has begun to come, or waits for its answer.
      upgraded: it speaks something else by now.

    Args:
      peer: the client's address.
      handle: serves a request.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        peer: str,
        limits: ServerLimits,
        handle: Callable[[Incoming], Awaitable[None]],
    ) -> None:
        self.transport = transport
        self.peer = peer
        self.limits = limits
        self._handle = handle
        self._rest: bytes = b""
        self._first = True
        self.deadline = trio.current_time() + limits.header_timeout_s
        self.exchange: Http1Exchange | None = None
        self.busy = False
        self.draining = False
        self.upgraded = False
        self.hung = False
        self.on_close: Callable[[], None] = _nothing

    async def run(self) -> None:
        """Serve requests until the client or a rule ends that. Cancellation: closes at once."""
        try:
            early = self.transport.receive_early()
            self._rest = bytes(early)
            while await self._serve_one():
                if self.draining:
                    break
        except (trio.BrokenResourceError, trio.ClosedResourceError, ClientGone):
            pass
        finally:
            self.exchange = None
            self.busy = False
            self.close()

    def close(self, *, reset: bool = False) -> None:
        """Close at once. Idempotent."""
        self.release()
        self.transport.close(reset=reset)

    def release(self) -> None:
        """Have nobody watch the socket any more. Idempotent: another socket may soon have its number."""
        on_close, self.on_close = self.on_close, _nothing
        on_close()

    async def _serve_one(self) -> bool:
        """Serve one request; return whether another may follow."""
        try:
            head = await self._read_head()
            if head is None:
                return False
            exchange = self._open(head)
        except BadMessage as error:
            await self._refuse(error)
            return False
        self.exchange = exchange
        self.busy = True
        self.deadline = float("inf")
        await self._handle(exchange)
        self.exchange = None
        self.busy = False
        if exchange.gone or self.transport.closed or self.upgraded:
            return False
        if exchange.keep and exchange.body_done:
            self._rest = bytes(exchange.body.rest) if exchange.read else self._rest
            limits = self.limits
            wait = limits.header_timeout_s if self._rest else limits.idle_timeout_s
            self.deadline = trio.current_time() + wait
            self._first = False
            return True
        await self._linger()
        return False

    async def _read_head(self) -> bytes | None:
        data: bytes | bytearray = self._rest
        searched = 0
        while True:
            end = data.find(b"\r\n\r\n", searched)
            if end >= 0:
                if end > self.limits.max_header_bytes:
                    raise BadMessage("", 431)
                self._rest = bytes(data[end + 4 :])
                return bytes(data[: end + 2])
            if len(data) > self.limits.max_header_bytes:
                raise BadMessage("", 431)
            if has_bare_lf(data, max(0, searched)):
                raise BadMessage("malformed line end")
            searched = max(0, len(data) - 3)
            # Nothing is kept for a connection that waits.
            self._rest = b""
            self.busy = bool(data)
            view = await self.transport.receive(_READ)
            if not view:
                return None
            if not data:
                data = bytes(view)
                if not self._first:
                    self.deadline = trio.current_time() + self.limits.header_timeout_s
            else:
                if isinstance(data, bytes):
                    data = bytearray(data)
                data += view

    def _open(self, data: bytes) -> Http1Exchange:
        head = parse_request(data)
        expectation = first(head.headers, b"expect")
        if expectation and expectation.lower() != b"100-continue":
            raise BadMessage("", 417)
        return Http1Exchange(self, head)

    async def _refuse(self, error: BadMessage) -> None:
        """Answer a request that was not understood, as Go does."""
        text = b"%d %b" % (error.status, phrase(error.status))
        body = text + b": " + error.text.encode() if error.text else text
        head = (
            b"HTTP/1.1 %b\r\nContent-Type: text/plain; charset=utf-8\r\n"
            b"Connection: close\r\n\r\n%b" % (text, body)
        )
        self.deadline = trio.current_time() + self.limits.header_timeout_s
        await self.send([head])
        await self._linger()

    async def _linger(self) -> None:
        with trio.move_on_after(_LINGER_S):
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                self.transport.send_eof()
                while await self.transport.receive(_READ):
                    await trio.lowlevel.checkpoint()

    async def receive(self) -> Buffer:
        """Return what the client has sent, lent until the next checkpoint.

        Raises:
          ClientGone
        """
        if self._rest:
            rest, self._rest = self._rest, b""
            return rest
        try:
            view = await self.transport.receive(_READ_BODY)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ClientGone(str(error)) from error
        if not view:
            raise ClientGone("unexpected EOF")
        return view

    def take_rest(self) -> bytes:
        """Return what was read ahead."""
        rest, self._rest = self._rest, b""
        return rest

    async def send(self, parts: list[Buffer]) -> bool:
        """Send; returns when there is room for more, and whether there was at once.

        Raises:
          ClientGone
        """
        try:
            if self.transport.send(parts):
                return True
            await self.transport.drain()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ClientGone(str(error)) from error
        return False

    def hung_up(self, gone: bool) -> None:
        """The client has ended its side, perhaps without our having read all it sent; *gone*: it takes no answer."""
        self.hung = True
        # As Go: whoever has no more to say does not wait for an answer. Whom an answer cannot reach is not
        # waited for even where nobody reads what he has sent.
        if self.exchange is not None and (gone or self.exchange.body_done):
            self.exchange.leave()

    def drain(self) -> None:
        """Serve no more than the request at hand."""
        self.draining = True
        if not self.busy and not self.upgraded:
            self.close()


class Http1Exchange(Incoming):
    """One request of such a connection."""

    def __init__(self, connection: Http1Connection, head: RequestHead) -> None:
        super().__init__()
        self._connection = connection
        headers = head.headers
        options = head.connection
        self.body_length = head.length
        self.upgrade = upgrade_of(headers, options) if b"upgrade" in options else b""
        self.takes_trailers = b"te" in options and wants_trailers(headers)
        self.trailer_names = joined(headers, b"trailer") if head.length is None else b""
        self._minor = head.minor
        self.keep = bool(head.minor) and b"close" not in options
        self.expects_continue = bool(head.minor and head.length != 0 and first(headers, b"expect"))
        self.request = Request(
            method=head.method.decode("ascii"),
            target=head.target,
            headers=end_to_end(headers, options),
            peer=connection.peer,
            secure=connection.transport.secure,
        )
        self.body: Decoder = ChunkedBody() if head.length is None else LengthBody(head.length)
        self.body_done = self.body.done
        self.trailers: Headers = []
        self.read = False
        self._chunked = False
        self._delimited = True
        self._parts: list[Buffer] = []

    # -- the request -------------------------------------------------------------------------------

    async def receive_body(self) -> list[Buffer]:
        body = self.body
        # What follows it is the next request.
        while not self.body_done:
            if body.more:
                await trio.lowlevel.checkpoint()
                view: Buffer = b""
            else:
                view = await self._connection.receive()
            self.read = True
            try:
                pieces = body.feed(view)
            except BadMessage as error:
                self.keep = False
                raise ClientGone(error.text, error.status) from error
            if body.done:
                self.body_done = True
                self.trailers = body.trailers
                body.rest = bytes(body.rest)
                if self._connection.hung:
                    self.leave()
            if pieces:
                return pieces
        return []

    # -- the response ------------------------------------------------------------------------------

    def put_informational(self, status: int, headers: Headers) -> None:
        if not self._minor:
            return
        self._parts.append(write_head(b"HTTP/1.1 %d %b" % (status, phrase(status)), headers))
        transport = self._connection.transport
        # What the socket does not take goes out with the next flush.
        parts, self._parts = self._parts, []
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            transport.send(parts)

    def put_head(self, status: int, reason: bytes, headers: Headers, length: int | None) -> None:
        fields = headers
        if length is None:
            if self._minor:
                self._chunked = True
                fields = [*headers, (b"transfer-encoding", b"chunked")]
            else:
                self.keep = self._delimited = False
        elif length != NO_BODY:
            fields = [*headers, (b"content-length", b"%d" % length)]
        if self.keep and (
            self._connection.draining or (not self.body_done and not self._finish_body())
        ):
            # There would be no telling where the next request begins, or nobody reads it.
            self.keep = False
        if not self.keep and self._minor:
            fields = [*fields, (b"connection", b"close")]
        head = write_head(b"HTTP/1.1 %d %b" % (status, reason or phrase(status)), fields)
        self.started = True
        self.status = status
        self._parts.append(head)

    def _finish_body(self) -> bool:
        """Take the rest of the body if it is here already: nobody asks for it any more."""
        rest = self._connection.take_rest()
        if rest:
            self.read = self.discarded = True
            try:
                self.body.feed(rest)
            except BadMessage:
                return False
            self.body.rest = bytes(self.body.rest)
            self.body_done = self.body.done
        return self.body_done

    def put_switch(self, reason: bytes, headers: Headers, protocol: bytes) -> None:
        """Put the head of a 101 response: from now on the connection belongs to both ends."""
        fields = [*headers, (b"connection", b"Upgrade"), (b"upgrade", protocol)]
        self._parts.append(write_head(b"HTTP/1.1 101 %b" % (reason or phrase(101)), fields))
        self.started = self.finished = True
        self.status = 101
        self._connection.upgraded = True
        self._connection.busy = False
        # An end of one direction is the other protocol's own affair.
        self._connection.release()

    def put_data(self, pieces: list[Buffer]) -> None:
        parts = self._parts
        if self._chunked:
            parts.append(b"%x\r\n" % sum(map(len, pieces)))
            parts += pieces
            parts.append(b"\r\n")
        else:
            parts += pieces

    def put_end(self, trailers: Headers) -> None:
        self.finished = True
        if self._chunked:
            self._parts.append(write_head(b"0", trailers))

    async def flush(self) -> bool:
        parts, self._parts = self._parts, []
        return not parts or await self._connection.send(parts)

    def abort(self) -> None:
        # Without its end a chunked body, or one with a length, is known to be cut; any other only by a reset.
        self.gone = True
        parts, self._parts = self._parts, []
        transport = self._connection.transport
        if self._delimited and not transport.closed:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                transport.send(parts)
        self._connection.close(reset=not self._delimited)

    # -- another protocol --------------------------------------------------------------------------

    def take_wire(self) -> tuple[SocketWire, bytes]:
        """Return the client's connection, and what was read of it ahead."""
        rest = bytes(self.body.rest) if self.read else self._connection.take_rest()
        return SocketWire(self._connection.transport), rest
