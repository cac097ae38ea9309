"""The server's side of an HTTP proxy: CONNECT, and requests for http:// URLs in absolute form.

RFC 9110 §7 and §9.3.6, RFC 9112 §3.2. Each request of the second kind gets a connection of its own to its
destination; the connection of the client is kept.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import h11
import trio

from clusterproxy.errors import DialCause, DialError

from .forward import forward_stream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from .stream import TunnelStream

    Dial = Callable[[str], Awaitable[TunnelStream]]

_MAX_HEAD: Final = 64 * 1024

# For a request's head, from the end of the one before.
_HEAD_TIMEOUT_S: Final = 60.0

# How long a client that was refused may go on sending: closing earlier could reset the answer away.
_LINGER_S: Final = 0.5

_ADDRESS: Final = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}")
_ABSOLUTE: Final = re.compile(rb"http://(?:[^/?@]*@)?([^/?@]+)(.*)", re.IGNORECASE | re.DOTALL)

# RFC 9110 §7.6.1, and what speaks to the proxy itself. Transfer-Encoding stays: h11 acts on it.
_HOP_BY_HOP: Final = frozenset(
    (
        b"connection",
        b"host",
        b"keep-alive",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"upgrade",
    )
)

_STATUS: Final = {
    DialCause.NO_AGENT: HTTPStatus.SERVICE_UNAVAILABLE,
    DialCause.POLICY: HTTPStatus.FORBIDDEN,
    DialCause.TIMEOUT: HTTPStatus.GATEWAY_TIMEOUT,
}

_USAGE: Final = (
    "This is an HTTP proxy of clusterproxy. It serves CONNECT and http:// URLs:\n"
    "  curl -x http://THIS_ADDRESS http://SERVICE:PORT/\n"
)


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.status = status
        self.text = text


async def serve_http_proxy(
    stream: trio.SocketStream,
    dial: Dial,
    *,
    on_broken: Callable[[TunnelStream, str], None] | None = None,
) -> None:
    """Serve one client of the proxy until it or we end the connection; *stream* is closed then.

    Args:
      dial: connects to "host:port". Its DialError is told to the client: status 403, 502, 503 or 504, and a text.
      on_broken: as of :func:`forward_stream`, for CONNECT.

    Cancellation closes the client's connection and what was dialled for it. A broken client is no error.
    """
    async with stream:
        try:
            await _Proxy(stream, dial, on_broken).serve()
        except* trio.BrokenResourceError:
            pass


class _Proxy:
    def __init__(
        self,
        stream: trio.SocketStream,
        dial: Dial,
        on_broken: Callable[[TunnelStream, str], None] | None,
    ) -> None:
        self._on_broken = on_broken
        self._stream = stream
        self._dial = dial
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)
        self._method = b""

    async def serve(self) -> None:
        try:
            while (request := await self._next_request()) is not None:
                if request.method == b"CONNECT":
                    await self._connect(request)
                    return
                await self._relay(request)
                if self._http.states != {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}:
                    break
                self._http.start_next_cycle()
            else:
                return
        except _Refused as refusal:
            await self._answer(refusal.status, refusal.text)
        except h11.RemoteProtocolError as error:
            await self._answer(error.error_status_hint, f"{error}\n")
        await self._linger()

    async def _next_request(self) -> h11.Request | None:
        with trio.move_on_after(_HEAD_TIMEOUT_S):
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Request):
                    self._method = event.method
                    return event
                if not await self._receive():
                    return None
        return None

    async def _receive(self) -> bool:
        data = await self._stream.receive_some()
        self._http.receive_data(bytes(data))
        return bool(data)

    async def _send(self, event: h11.Event) -> None:
        data = self._http.send(event)
        if data:
            await self._stream.send_all(data)

    async def _answer(self, status: int, text: str) -> None:
        """Answer with an error of our own, if the answer has not begun."""
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        body = text.encode()
        headers = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        await self._send(
            h11.Response(status_code=status, headers=headers, reason=HTTPStatus(status).phrase)
        )
        if self._method != b"HEAD":
            await self._send(h11.Data(data=body))
        await self._send(h11.EndOfMessage())

    async def _linger(self) -> None:
        with trio.move_on_after(_LINGER_S):
            await self._stream.send_eof()
            while await self._stream.receive_some():
                pass

    async def _dialed(self, address: bytes) -> TunnelStream:
        if not _ADDRESS.fullmatch(address):
            raise _Refused(HTTPStatus.BAD_REQUEST, "The destination must be HOST:PORT.\n")
        try:
            return await self._dial(address.decode("ascii"))
        except DialError as error:
            status = _STATUS.get(error.cause, HTTPStatus.BAD_GATEWAY)
            raise _Refused(status, f"{error}\n") from error

    # -- CONNECT -----------------------------------------------------------------------------------

    async def _connect(self, request: h11.Request) -> None:
        if not isinstance(self._http.next_event(), h11.EndOfMessage):
            raise _Refused(HTTPStatus.BAD_REQUEST, "A CONNECT request has no content.\n")
        self._http.next_event()  # PAUSED: what follows is not HTTP
        async with await self._dialed(request.target) as remote:
            await self._send(
                h11.Response(status_code=200, headers=[], reason="Connection established")
            )
            early, _ = self._http.trailing_data
            if early:
                await remote.send_all(early)
            await forward_stream(self._stream, remote, on_broken=self._on_broken)

    # -- requests in absolute form -----------------------------------------------------------------

    async def _relay(self, request: h11.Request) -> None:
        authority, target = _split(request)
        address = authority if _ADDRESS.fullmatch(authority) else authority + b":80"
        headers = [
            (b"Host", authority),
            *_end_to_end(request.headers.raw_items()),
            (b"Via", b"1.1 clusterproxy"),
            (b"Connection", b"close"),
        ]
        http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
        head = http.send(h11.Request(method=request.method, target=target, headers=headers))
        refusal: _Refused | None = None
        async with await self._dialed(address) as remote, trio.open_nursery() as nursery:
            nursery.start_soon(self._upload, http, remote, head)
            try:
                await self._download(http, remote)
            except _Refused as error:
                refusal = error
            nursery.cancel_scope.cancel()
        if refusal is not None:
            raise refusal

    async def _upload(
        self, http: h11.Connection, remote: trio.abc.Stream, data: bytes | None
    ) -> None:
        """Send a request. What goes wrong here shows in the answer, or in that there is none."""
        try:
            while http.our_state is not h11.DONE:
                if data:
                    await remote.send_all(data)
                    data = None
                event = self._http.next_event()
                if isinstance(event, h11.Data | h11.EndOfMessage):
                    # Trailers are left out, as RFC 9110 §6.5.1 allows.
                    data = http.send(event if isinstance(event, h11.Data) else h11.EndOfMessage())
                else:
                    await self._receive()
            if data:
                await remote.send_all(data)
        except (trio.BrokenResourceError, h11.RemoteProtocolError):
            pass

    async def _download(self, http: h11.Connection, remote: trio.abc.Stream) -> None:
        """Send the answer on."""
        try:
            while True:
                event = http.next_event()
                match event:
                    case h11.Response():
                        headers = _end_to_end(event.headers.raw_items())
                        await self._send(
                            h11.Response(
                                status_code=event.status_code, headers=headers, reason=event.reason
                            )
                        )
                    case h11.InformationalResponse():
                        # A client of HTTP/1.0 takes the first one for the answer (RFC 9110 §15.2).
                        if self._http.their_http_version != b"1.0":
                            await self._send(event)
                    case h11.Data():
                        await self._send(event)
                    case h11.EndOfMessage():
                        await self._send(h11.EndOfMessage())
                        return
                    case _:
                        try:
                            data = await remote.receive_some()
                        except trio.BrokenResourceError as error:
                            text = f"The connection to the service broke: {error}\n"
                            raise _Refused(HTTPStatus.BAD_GATEWAY, text) from error
                        http.receive_data(bytes(data))
        except h11.RemoteProtocolError as error:
            text = f"The service's answer is not HTTP/1.1: {error}\n"
            raise _Refused(HTTPStatus.BAD_GATEWAY, text) from error


def _split(request: h11.Request) -> tuple[bytes, bytes]:
    """Return the authority of a request's target, and its target in origin form."""
    found = _ABSOLUTE.fullmatch(request.target)
    if found is None:
        text = _USAGE if request.target.startswith(b"/") else "Only http:// URLs, or CONNECT.\n"
        raise _Refused(HTTPStatus.BAD_REQUEST, text)
    authority, rest = found.groups()
    if not rest:
        return authority, b"*" if request.method == b"OPTIONS" else b"/"
    return authority, rest if rest.startswith(b"/") else b"/" + rest


def _end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Leave out what concerns one hop alone, and the Host, which the target replaces."""
    fields = [(name.lower(), name, value) for name, value in headers]
    dropped = {
        option.strip().lower()
        for name, _, value in fields
        if name == b"connection"
        for option in value.split(b",")
    }
    # What says where the content ends is for all, whatever Connection says of it.
    dropped -= {b"content-length", b"transfer-encoding"}
    if any(name == b"transfer-encoding" for name, _, _ in fields):
        # It counts, and who sends both may want the next one to believe the other (RFC 9112 §6.3).
        dropped.add(b"content-length")
    dropped |= _HOP_BY_HOP
    return [(written, value) for name, written, value in fields if name not in dropped]
