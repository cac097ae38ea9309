"""The client's end of gRPC calls on one connection."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.errors import RPCError
from clusterproxy.grpc import (
    Metadata,
    MetadataError,
    Status,
    decode_headers,
    decode_message,
    encode_headers,
    format_timeout,
    status_from_h2,
    status_from_http,
)
from clusterproxy.http2.adapter import ErrorCode

from .call import Call

if TYPE_CHECKING:
    from clusterproxy.http2.connection import Http2Connection
    from clusterproxy.http2.stream import Header

_CONTENT_TYPE: Final = b"application/grpc"

# Nobody looks at it before: what a peer calls a status can be of any length, and int() takes 4,300 digits.
_HTTP_STATUS: Final = re.compile(rb"[0-9]{3}")


class ClientCall(Call):
    """The client's end of a call.

    Attributes:
      initial_metadata: what the server sent with its response, once :meth:`response` returned.
      status, message, trailers: how the call ended, once it is closed.
      refused: whether it ended without the server having looked at it (RFC 9113 §8.7).
    """

    def __init__(self, connection: Http2Connection) -> None:
        super().__init__(connection)
        self.initial_metadata: Metadata = {}
        self.trailers: Metadata = {}
        self.status = Status.UNKNOWN
        self.message = ""
        self.refused = False
        self._responded = False
        self._settled = trio.Event()
        self.ended = trio.Event()

    async def response(self) -> Metadata:
        """Wait for the response headers and return their metadata.

        Raises:
          RPCError: the call ended instead.
        """
        await self._settled.wait()
        if not self._responded:
            raise RPCError(self.status, self.message)
        return self.initial_metadata

    def half_close(self) -> None:
        """Tell the server that nothing more will be sent, once everything is on its way."""
        if not self.closed:
            self.stream.when_sent(lambda: self.connection.end_stream(self.stream))

    def cancel(self) -> None:
        """Reset the call. Idempotent."""
        if not self.closed:
            self.abort(Status.CANCELLED, "cancelled")

    def abort(self, status: Status, message: str) -> None:
        self.connection.reset_stream(self.stream, ErrorCode.CANCEL)
        self._finish(status, message)

    def _finish(self, status: Status, message: str) -> None:
        if not self.closed:
            self.status, self.message = status, message
            self._close(status, message)
            self._settled.set()
            self.ended.set()

    # -- http2.stream.StreamHandler ----------------------------------------------------------------

    def on_headers(self, headers: list[Header]) -> None:
        fields = dict(headers)
        try:
            if not self._responded and b":status" in fields:
                self._on_response(fields, headers)
            if b"grpc-status" in fields:
                self._on_trailers(fields, headers)
        except MetadataError as error:
            self.abort(Status.INTERNAL, str(error))

    def _on_response(self, fields: dict[bytes, bytes], headers: list[Header]) -> None:
        http_status = fields[b":status"]
        content_type = fields.get(b"content-type", b"")
        if http_status != b"200" or not content_type.startswith(_CONTENT_TYPE):
            if b"grpc-status" in fields:
                return
            number = int(http_status) if _HTTP_STATUS.fullmatch(http_status) else 0
            text = (
                f"unexpected HTTP status code received from server: {number}; "
                f'content-type "{content_type.decode("utf-8", "replace")}"'
            )
            self.abort(status_from_http(number), text)
            return
        self._responded = b"grpc-status" not in fields
        if self._responded:
            self.initial_metadata = decode_headers(headers)
            self._settled.set()

    def _on_trailers(self, fields: dict[bytes, bytes], headers: list[Header]) -> None:
        value = fields[b"grpc-status"]
        try:
            status = Status(int(value))
        except ValueError:
            status = Status.UNKNOWN
        self.trailers = decode_headers(headers)
        self._on_answered(status, decode_message(fields.get(b"grpc-message", b"")))

    def _on_answered(self, status: Status, message: str) -> None:
        """The server is done with the call, whatever is still on its way to it."""
        if not self.stream.h2.closed:
            self.connection.reset_stream(self.stream, ErrorCode.NO_ERROR)
        self._finish(status, message)

    def on_end(self) -> None:
        if not self.closed:
            self._on_answered(Status.INTERNAL, "server closed the stream without sending trailers")

    def on_reset(self, code: int, reason: str) -> None:
        self.refused = code == ErrorCode.REFUSED_STREAM
        # A lost connection is UNAVAILABLE; a reset says itself what it means.
        self._finish(Status.UNAVAILABLE if self.connection.lost else status_from_h2(code), reason)


def start_call(
    connection: Http2Connection,
    path: str,
    *,
    authority: str,
    secure: bool,
    metadata: Metadata,
    user_agent: str,
    timeout_s: float | None = None,
) -> ClientCall:
    """Start a call; set its callbacks before the next checkpoint.

    Raises:
      trio.ClosedResourceError: the connection is lost or takes no more calls.
      MetadataError: metadata that gRPC cannot carry.
    """
    headers: list[Header] = [
        (b":method", b"POST"),
        (b":scheme", b"https" if secure else b"http"),
        (b":path", path.encode()),
        (b":authority", authority.encode()),
        (b"content-type", _CONTENT_TYPE),
        (b"user-agent", user_agent.encode()),
        (b"te", b"trailers"),
    ]
    if timeout_s is not None:
        headers.append((b"grpc-timeout", format_timeout(timeout_s)))
    call = ClientCall(connection)
    call.bind(connection.open_stream(headers + encode_headers(metadata), call))
    return call
