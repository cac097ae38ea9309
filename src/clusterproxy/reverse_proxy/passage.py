"""Passes one request on, and the answer back (Go's httputil.ReverseProxy and http.Transport)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.gotext import quote
from clusterproxy.http1.bodies import (
    ChunkedBody,
    Decoder,
    LengthBody,
    Truncated,
    UntilClose,
)
from clusterproxy.http1.grammar import BadMessage, ResponseHead, is_target, parse_length, write_head

from .fields import (
    announcement,
    append_forwarded_for,
    connection_options,
    end_to_end,
    first,
    is_printable,
    joined,
    trailers_of,
    upgrade_of,
)
from .http1_server import Http1Exchange
from .incoming import NO_BODY, ClientGone
from .origin import MAX_RESPONSE_HEAD, Stale, UpstreamError
from .switch import copy_both_ways

if TYPE_CHECKING:
    from clusterproxy.http1.bodies import Buffer

    from .exchange import Forward
    from .incoming import Incoming
    from .origin import Connection

# What may be sent again on a new connection if the old one turns out to be closed (Go's Request.isReplayable).
_REPLAYABLE: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})

# What may be, if nothing of its body has been asked for: an origin may have acted upon the head alone, so a proxy must not
# send anything again that is not idempotent (RFC 9110 §9.2.2).
_IDEMPOTENT: Final = _REPLAYABLE | {"PUT", "DELETE"}

# Methods whose requests say that they have no body (Go's transferWriter.shouldSendContentLength).
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})

# Responses before the final one that are passed on; their fields together take no more than those of one response.
_MOST_INFORMATIONAL: Final = 100

# A read of a body: small until its consumer has kept pace, for what a slow one does not take has to be kept.
_LEAST_READ: Final = 32 * 1024
_MOST_READ: Final = 512 * 1024

# Over HTTP/2 each piece would be a frame.
_MOST_PIECES: Final = 64

_NOTHING: Final[frozenset[bytes]] = frozenset()
_EXPECTATION: Final = frozenset({b"expect"})

_CONTINUE: Final = 100
_SWITCHING: Final = 101


class Passage:
    """One request on its way to an origin."""

    def __init__(self, incoming: Incoming, forward: Forward) -> None:
        self._incoming = incoming
        self._forward = forward
        self._origin = forward.origin
        self._pool = forward.origin.pool
        # The body went to the origin, all of it.
        self._sent = incoming.body_length == 0
        # There is one, and nothing of it was asked for.
        self._unbegun = not self._sent
        self._continue = trio.Event() if incoming.expects_continue else None
        self._client_error: ClientGone | None = None

    async def run(self) -> None:
        """Pass it on, and the answer back.

        Raises:
          UpstreamError, ClientGone, and what connections raise: it has not come to an end.

        Cancellation: gives up the connection to the origin.
        """
        incoming = self._incoming
        head = self._render()
        # A GET for another protocol may be a command in a container.
        method = "" if incoming.upgrade else incoming.request.method
        replayable = self._sent and method in _REPLAYABLE
        while True:
            connection = await self._pool.take(self._origin)
            try:
                kept = await self._converse(connection, head)
            except Stale as error:
                connection.abort()
                again = replayable or (self._unbegun and method in _IDEMPOTENT)
                if not (connection.reused and again):
                    raise UpstreamError(str(error) or "EOF") from error
            except BaseException:
                connection.abort()
                raise
            else:
                if kept:
                    self._pool.put(connection)
                else:
                    self._pool.close(connection)
                return

    # -- the request -------------------------------------------------------------------------------

    def _render(self) -> bytes:
        """Return the head as the origin sees it.

        Raises:
          UpstreamError: it cannot be sent.
        """
        incoming, forward = self._incoming, self._forward
        method = incoming.request.method
        # Nobody but us says what concerns this hop, whatever the deciding program has left in.
        headers = end_to_end(
            forward.headers, _NOTHING if incoming.expects_continue else _EXPECTATION
        )
        if not first(headers, b"host"):
            # A request of HTTP/1.0 may have none, and any an empty one.
            headers = [field for field in headers if field[0] != b"host"]
            headers.insert(0, (b"host", f"{self._origin.host}:{self._origin.port}".encode()))
        append_forwarded_for(headers, incoming.request.peer)
        if incoming.takes_trailers:
            headers.append((b"te", b"trailers"))
        if incoming.upgrade:
            if not is_printable(incoming.upgrade):
                shown = quote(incoming.upgrade.decode("utf-8", "surrogateescape"))
                raise UpstreamError(f"client tried to switch to invalid protocol {shown}")
            headers += ((b"connection", b"Upgrade"), (b"upgrade", incoming.upgrade))
        length = incoming.body_length
        if length is None:
            headers.append((b"transfer-encoding", b"chunked"))
            names = announcement(incoming.trailer_names)
            if names:
                headers.append((b"trailer", names))
        elif length or method in _WITH_BODY:
            headers.append((b"content-length", b"%d" % length))
        target = forward.target
        if not is_target(target) and target != b"*":
            raise UpstreamError("invalid request target")
        try:
            return write_head(b"%b %b HTTP/1.1" % (method.encode(), target), headers)
        except ValueError as error:
            raise UpstreamError(str(error)) from error

    async def _converse(self, connection: Connection, head: bytes) -> bool:
        """Send the request and pass the answer on; return whether the connection can be used again."""
        try:
            await connection.wire.send([head])
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise Stale(str(error)) from error
        if self._sent:
            return await self._answer(connection)
        kept = False
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_body, connection, nursery.cancel_scope)
            try:
                kept = await self._answer(connection)
            except Exception as error:
                # Raised below, where no nursery makes a group of it.
                failure = error
            nursery.cancel_scope.cancel()
        self._check_client()
        if failure is not None:
            try:
                raise failure
            finally:
                del failure
        return kept and self._sent

    def _check_client(self) -> None:
        if self._client_error is not None:
            raise self._client_error

    async def _send_body(self, connection: Connection, scope: trio.CancelScope) -> None:
        incoming, wire = self._incoming, connection.wire
        if self._continue is not None:
            with trio.move_on_after(self._pool.expect_continue_s):
                await self._continue.wait()
            if not self._continue.is_set() and not incoming.started:
                self._continue.set()
                incoming.put_informational(_CONTINUE, [])
        self._unbegun = False
        chunked = incoming.body_length is None
        try:
            done = False
            while not done:
                pieces = await incoming.receive_body()
                if incoming.discarded:
                    # The origin waits for what it will not get: it must get nothing else in its place.
                    return
                done = incoming.body_done
                parts: list[Buffer] = list(pieces)
                if chunked:
                    if pieces:
                        parts = [b"%x\r\n" % sum(map(len, pieces)), *pieces, b"\r\n"]
                    if done:
                        parts.append(write_head(b"0", trailers_of(incoming.trailers)))
                await wire.send(parts)
            self._sent = True
        except ClientGone as error:
            self._client_error = error
            scope.cancel()
        except (trio.BrokenResourceError, trio.ClosedResourceError, ValueError):
            # The origin takes no more; it may have said why.
            pass

    # -- the response ------------------------------------------------------------------------------

    async def _answer(self, connection: Connection) -> bool:
        incoming = self._incoming
        early = b""
        room = MAX_RESPONSE_HEAD
        for _ in range(_MOST_INFORMATIONAL):
            head, rest = await connection.receive_head(early)
            if head.status == _SWITCHING:
                return await self._switch(connection, head, bytes(rest))
            if head.status > _SWITCHING + 98:
                return await self._pass_on(connection, head, rest)
            early = bytes(rest)
            # Nobody waits until the client has taken them.
            room -= sum(len(name) + len(value) for name, value in head.headers)
            if room < 0:
                break
            self._pass_informational(incoming, head)
        raise UpstreamError("net/http: too many 1xx informational responses")

    def _pass_informational(self, incoming: Incoming, head: ResponseHead) -> None:
        is_continue = head.status == _CONTINUE
        if is_continue:
            if self._continue is None or self._continue.is_set():
                # Nobody asked, or was answered already.
                return
            self._continue.set()
        fields = end_to_end(head.headers, connection_options(head.headers))
        incoming.put_informational(head.status, fields)

    async def _pass_on(self, connection: Connection, head: ResponseHead, rest: Buffer) -> bool:
        incoming, wire = self._incoming, connection.wire
        method = incoming.request.method
        options = connection_options(head.headers)
        body, length = _body_of(method, head)
        fields = end_to_end(head.headers, options)
        declared = first(head.headers, b"content-length")
        if length == NO_BODY and head.status != 204 and declared:
            fields.append((b"content-length", declared))
        if length is None:
            names = announcement(joined(head.headers, b"trailer"))
            if names:
                fields.append((b"trailer", names))
        # A body where there is none: more of it may come when somebody else waits for an answer.
        excess = body.done and len(rest) > 0
        view: Buffer = rest
        size = _LEAST_READ
        try:
            with incoming.outbox:
                incoming.put_head(head.status, head.reason, fields, length)
                self._put(body, view)
            await incoming.flush()
            while not body.done:
                if body.more:
                    await trio.lowlevel.checkpoint()
                    view = b""
                else:
                    view = await wire.receive(size)
                    if not view:
                        body.end()
                with incoming.outbox:
                    self._put(body, view)
                prompt = await incoming.flush()
                size = min(2 * size, _MOST_READ) if prompt else _LEAST_READ
        except BadMessage as error:
            raise UpstreamError(error.text) from error
        except Truncated:
            raise UpstreamError("unexpected EOF") from None
        return (
            not isinstance(body, UntilClose)
            and not excess
            # To some servers it is a tunnel from now on (RFC 9110 §9.3.6).
            and method != "CONNECT"
            and not len(body.rest)
            and head.minor == 1
            and b"close" not in options
        )

    def _put(self, body: Decoder, view: Buffer) -> None:
        incoming = self._incoming
        pieces: list[Buffer] = []
        if (len(view) or body.more) and not body.done:
            pieces = body.feed(view)
        if len(pieces) > _MOST_PIECES:
            pieces = [b"".join(pieces)]
        if pieces:
            incoming.put_data(pieces)
        if body.done:
            incoming.put_end(trailers_of(body.trailers))

    async def _switch(self, connection: Connection, head: ResponseHead, rest: bytes) -> bool:
        """Both ends go on in another protocol (Go's handleUpgradeResponse)."""
        incoming = self._incoming
        if not self._sent:
            # RFC 9110 §7.8: what we still send would be part of the other protocol.
            raise UpstreamError("backend switched protocols before the end of the request")
        asked = incoming.upgrade
        options = connection_options(head.headers)
        given = upgrade_of(head.headers, options)
        if not is_printable(given):
            shown = quote(given.decode("utf-8", "surrogateescape"))
            raise UpstreamError(f"backend tried to switch to invalid protocol {shown}")
        if asked.lower() != given.lower() or not asked:
            raise UpstreamError(
                f"backend tried to switch protocol {quote(given.decode())} "
                f"when {quote(asked.decode())} was requested"
            )
        # Nobody asks for it over HTTP/2 (RFC 9113 §8.6).
        assert isinstance(incoming, Http1Exchange)  # noqa: S101
        incoming.put_switch(head.reason, end_to_end(head.headers, options), given)
        await incoming.flush()
        client, ahead = incoming.take_wire()
        await copy_both_ways(client, connection.wire, ahead, rest)
        return False


def _body_of(method: str, head: ResponseHead) -> tuple[Decoder, int | None]:
    """Return the decoder of a response's body and its length, None if that is unknown (RFC 9112 §6.3).

    Raises:
      UpstreamError: it means two things.
    """
    if method == "HEAD" or head.status in (204, 304):
        return LengthBody(0), NO_BODY
    codings = [value for name, value in head.headers if name == b"transfer-encoding"]
    if codings and head.minor:
        if len(codings) > 1 or codings[0].lower() != b"chunked":
            raise UpstreamError("unsupported transfer encoding")
        return ChunkedBody(), None
    if codings:
        raise UpstreamError("transfer encoding in an HTTP/1.0 response")
    lengths = {value for name, value in head.headers if name == b"content-length"}
    if not lengths:
        return UntilClose(), None
    if len(lengths) > 1:
        raise UpstreamError("conflicting Content-Length values")
    try:
        length = parse_length(lengths.pop())
    except BadMessage as error:
        raise UpstreamError(error.text) from error
    return LengthBody(length), length
