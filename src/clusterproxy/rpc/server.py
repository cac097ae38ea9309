"""A gRPC server: opens a handler for each call of a known method."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.errors import RPCError
from clusterproxy.gotext import quote
from clusterproxy.grpc import (
    Metadata,
    MetadataError,
    Status,
    decode_headers,
    encode_headers,
    encode_message,
    parse_timeout,
    status_from_h2,
)
from clusterproxy.http2.adapter import ErrorCode
from clusterproxy.http2.connection import Http2Connection

from .call import Call

if TYPE_CHECKING:
    from clusterproxy.http2.flow import Flow
    from clusterproxy.http2.limits import Http2Limits
    from clusterproxy.http2.stream import Header, Stream
    from clusterproxy.transport.records import Buffer
    from clusterproxy.transport.stream import Transport

_log = logging.getLogger("clusterproxy.rpc")

_CONTENT_TYPE: Final = b"application/grpc"

# How long the peer of a drained connection may take to close it.
_LINGER_S: Final = 1.0

#: Called by the reader for each call of a method, before any message: sets ``call.receive`` and the
#: like without waiting, and returns what then runs as the call's task. The call ends with OK when
#: that returns, or with the status of the RPCError that it raises.
Opener = Callable[["ServerCall"], Callable[[], Awaitable[None]]]


class ServerCall(Call):
    """The server's end of a call.

    Attributes:
      path: the method, ``/service/method``.
      metadata: what the client sent with the request.
      timeout: seconds that the client grants, or None.
      user_agent: as the client sent it.
    """

    def __init__(self, connection: Http2Connection, stream: Stream, headers: list[Header]) -> None:
        super().__init__(connection)
        self._stream = stream
        fields = dict(headers)
        self.path = fields.get(b":path", b"").decode("utf-8", "replace")
        self.user_agent = fields.get(b"user-agent", b"").decode("utf-8", "replace")
        self.metadata: Metadata = {}
        self.timeout: float | None = None
        self._responded = False
        self._fields = fields
        self._headers = headers

    # -- opening -----------------------------------------------------------------------------------

    def check(self) -> bool:
        """Look at the request's headers as grpc-go does; if they are wrong, answer and return False.

        Source: grpc-go internal/transport/http2_server.go, operateHeaders.
        """
        fields = self._fields
        content_type = fields.get(b"content-type", b"")
        if not _is_grpc(content_type):
            text = f"invalid gRPC request content-type {_quote(content_type)}"
            self._refuse(b"415", Status.INVALID_ARGUMENT, text)
            return False
        method = fields.get(b":method", b"")
        if method != b"POST":
            text = f"Received a HEADERS frame with :method {_quote(method)} which should be POST"
            self._refuse(b"405", Status.INTERNAL, text)
            return False
        encoding = fields.get(b"grpc-encoding", b"identity")
        if encoding != b"identity":
            text = f"grpc: Decompressor is not installed for grpc-encoding {_quote(encoding)}"
            self.finish(Status.UNIMPLEMENTED, text)
            return False
        try:
            self.metadata = decode_headers(self._headers)
            if b"grpc-timeout" in fields:
                self.timeout = parse_timeout(fields[b"grpc-timeout"])
        except MetadataError as error:
            self._refuse(b"400", Status.INTERNAL, str(error))
            return False
        del self._fields, self._headers
        return True

    def _refuse(self, http_status: bytes, status: Status, message: str) -> None:
        headers = [(b":status", http_status), (b"content-type", _CONTENT_TYPE)]
        self._end(headers, status, message, {})

    # -- answering ---------------------------------------------------------------------------------

    def send_initial_metadata(self, metadata: Metadata | None = None) -> None:
        """Send the response headers now; otherwise they go with the first message.

        Raises:
          MetadataError: metadata that gRPC cannot carry.
        """
        if self.closed or self._responded:
            return
        headers = [(b":status", b"200"), (b"content-type", _CONTENT_TYPE)]
        headers += encode_headers(metadata or {})
        self._responded = True
        self.connection.send_headers(self.stream, headers)

    def forward(
        self, flow: Flow | None, size: int, head: Buffer, rest: tuple[Buffer, ...] = ()
    ) -> None:
        if not self._responded:
            self.send_initial_metadata()
        super().forward(flow, size, head, rest)

    def finish(
        self, status: Status = Status.OK, message: str = "", trailers: Metadata | None = None
    ) -> None:
        """End the call once everything sent before is on its way. Idempotent.

        Raises:
          MetadataError: trailers that gRPC cannot carry.
        """
        if self.closed:
            return
        headers: list[Header] = []
        if not self._responded:
            # "Trailers-only" (PROTOCOL-HTTP2.md, "Responses").
            headers = [(b":status", b"200"), (b"content-type", _CONTENT_TYPE)]
        self._end(headers, status, message, trailers or {})

    def _end(self, headers: list[Header], status: Status, message: str, trailers: Metadata) -> None:
        headers += [(b"grpc-status", b"%d" % status), (b"grpc-message", encode_message(message))]
        headers += encode_headers(trailers)
        stream = self.stream
        stream.when_sent(lambda: self.connection.send_headers(stream, headers, end=True))
        self._close(status, message)

    def cancel(self) -> None:
        """Reset the call at once, also where the peer leaves no window for an orderly end."""
        if not self.closed:
            self.connection.reset_stream(self.stream, ErrorCode.CANCEL)
            self._close(Status.CANCELLED, "cancelled")

    # -- http2.stream.StreamHandler ----------------------------------------------------------------

    def on_headers(self, headers: list[Header]) -> None:
        """Trailers of a request have no meaning in gRPC."""

    def on_end(self) -> None:
        if self.closed:
            return
        if self._assembler.pending:
            self.abort(Status.INTERNAL, "unexpected EOF")
            return
        try:
            self.on_half_close()
        except Exception:
            self._fail_by_bug("bug at the end of the requests")

    def on_reset(self, code: int, reason: str) -> None:
        self._close(status_from_h2(code), reason)

    def abort(self, status: Status, message: str) -> None:
        _log.warning("call of %s ended: %s", self.path, message, extra={"status": status.go_name})
        self.finish(status, message)


def _quote(value: bytes) -> str:
    return quote(value.decode("utf-8", "surrogateescape"))


def _is_grpc(content_type: bytes) -> bool:
    return content_type == _CONTENT_TYPE or content_type.startswith(
        (_CONTENT_TYPE + b"+", _CONTENT_TYPE + b";")
    )


class RpcServer:
    """Serves gRPC on the connections that are given to it.

    Args:
      methods: an opener for each path.
      limits: of each connection.
      on_limit: told the name of each limit that a peer exceeded.
      peers: what the log calls whoever connects.
    """

    def __init__(
        self,
        methods: Mapping[str, Opener],
        *,
        limits: Http2Limits,
        on_limit: Callable[[str], None] | None = None,
        peers: str = "a peer",
    ) -> None:
        self._peers = peers
        self._methods = dict(methods)
        self._services = {path.rpartition("/")[0] for path in methods}
        self._limits = limits
        self._on_limit = on_limit
        self.connections: set[Http2Connection] = set()
        self._draining = False

    async def serve(self, transport: Transport) -> None:
        """Serve one connection until it ends; the log says why it did.

        Cancellation: closes it at once.
        """
        connection: Http2Connection = Http2Connection(
            transport,
            client=False,
            limits=self._limits,
            on_request=lambda stream, headers: self._open(connection, stream, headers),
            on_limit=self._on_limit,
        )
        self.connections.add(connection)
        try:
            if self._draining:
                self._drain(connection)
            await connection.run()
        except* Exception:
            # A bug ends this connection and nothing else.
            _log.exception("bug on a connection")
        finally:
            self.connections.discard(connection)
            level = logging.WARNING if connection.at_fault else logging.DEBUG
            _log.log(level, "connection of %s ended: %s", self._peers, connection.lost)

    def drain(self) -> None:
        """Announce the end to all connections; each is closed soon after its last call has ended."""
        self._draining = True
        for connection in self.connections:
            self._drain(connection)

    def _drain(self, connection: Http2Connection) -> None:
        connection.on_idle = lambda: connection.start_soon(_linger, connection)
        connection.announce_end()

    def _open(
        self, connection: Http2Connection, stream: Stream, headers: list[Header]
    ) -> ServerCall:
        call = ServerCall(connection, stream, headers)
        if not call.check():
            return call
        opener = self._methods.get(call.path)
        if opener is None:
            call.finish(Status.UNIMPLEMENTED, self._unknown(call.path))
            return call
        try:
            body = opener(call)
        except RPCError as error:
            call.finish(Status(error.status), error.message)
        except Exception:
            _log.exception("bug while opening a call of %s", call.path)
            call.finish(Status.INTERNAL, "internal error")
        else:
            connection.start_soon(self._run, call, body)
        return call

    def _unknown(self, path: str) -> str:
        # Texts of grpc-go: server.go, handleStream.
        service, _, method = path.rpartition("/")
        if not service.startswith("/"):
            return f"malformed method name: {quote(path)}"
        if service in self._services:
            return f"unknown method {method} for service {service[1:]}"
        return f"unknown service {service[1:]}"

    async def _run(self, call: ServerCall, body: Callable[[], Awaitable[None]]) -> None:
        status, message = Status.OK, ""
        try:
            async with trio.open_nursery() as nursery:
                if call.timeout is not None:
                    nursery.cancel_scope.deadline = trio.current_time() + call.timeout
                call.attach(nursery)
                await body()
                nursery.cancel_scope.cancel()
            if call.timeout is not None and not call.closed and _expired(nursery.cancel_scope):
                status, message = Status.DEADLINE_EXCEEDED, "context deadline exceeded"
        except* RPCError as group:
            error = _first(group)
            status, message = Status(error.status), error.message
        except* Exception:
            _log.exception("bug in a call of %s", call.path)
            status, message = Status.INTERNAL, "internal error"
        call.finish(status, message)


async def _linger(connection: Http2Connection) -> None:
    # Closing while something is on its way in either direction would be a reset, and the peer could
    # lose the last trailers. It closes for its part when it sees the GOAWAY (grpc-go:
    # internal/transport/http2_server.go, newHTTP2Server).
    await trio.sleep(_LINGER_S)
    connection.fail("drained")


def _expired(scope: trio.CancelScope) -> bool:
    return scope.deadline <= trio.current_time()


def _first(group: BaseExceptionGroup[RPCError]) -> RPCError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, RPCError)  # noqa: S101
    return error
