"""A server for one HTTP/1.1 connection: small answers to GET and HEAD, hard limits for everything a peer may send."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from http import HTTPStatus

import attrs
import h11
import trio

from clusterproxy.http1.messages import Request, Response

logger = logging.getLogger("clusterproxy.http1")

Handler = Callable[[Request], Awaitable[Response] | Response]

METHODS = ("GET", "HEAD")
MAX_DISCARDED_BODY_BYTES = 65_536
# How long a peer that is being refused may go on sending before the socket is closed under it.
LINGER_S = 0.5
_RECEIVE_BYTES = 4096


class _RefusedError(Exception):
    """The request is answered with this status and the connection closed."""

    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.response = attrs.evolve(_error(status), headers=headers or {})


async def serve_http(
    stream: trio.abc.Stream,
    handler: Handler,
    *,
    header_timeout_s: float = 60,
    idle_timeout_s: float = 60,
    max_header_bytes: int = 16_384,
) -> None:
    """Serve HTTP/1.1 with keep-alive on *stream* until the peer ends, breaks a rule or is idle; then close the stream.

    *handler* may be a plain or an async function. A request's head must be complete *header_timeout_s* after its first
    byte (408), and so must a body, which is thrown away (413 above 64 KiB). A head above *max_header_bytes* is 431,
    garbage 400, a method other than GET and HEAD 405, an exception of *handler* 500 with a traceback in the log. A peer
    that sends nothing, or does not take an answer, within *idle_timeout_s* is cut off.

    Cancellation closes the stream at once, in the middle of an answer if need be. A broken stream is no error.
    """
    async with stream:
        connection = _Connection(
            stream=stream,
            handler=handler,
            header_timeout_s=header_timeout_s,
            idle_timeout_s=idle_timeout_s,
            protocol=h11.Connection(h11.SERVER, max_incomplete_event_size=max_header_bytes),
        )
        try:
            await connection.serve()
        except (trio.BrokenResourceError, trio.TooSlowError) as exc:
            logger.debug("connection lost: %r", exc)


@attrs.define(kw_only=True)
class _Connection:
    stream: trio.abc.Stream
    handler: Handler
    header_timeout_s: float
    idle_timeout_s: float
    protocol: h11.Connection
    is_head: bool = False

    async def serve(self) -> None:
        try:
            while (head := await self._next_head()) is not None:
                await self._discard_body()
                await self._answer(head)
                if self.protocol.states != {h11.CLIENT: h11.DONE, h11.SERVER: h11.DONE}:
                    break
                self.protocol.start_next_cycle()
            else:
                return
        except _RefusedError as exc:
            await self._refuse(exc.response)
        except h11.RemoteProtocolError as exc:
            await self._refuse(_error(exc.error_status_hint))
        await self._linger()

    async def _next_head(self) -> h11.Request | None:
        self.is_head = False
        if not self.protocol.trailing_data[0]:
            with trio.fail_after(self.idle_timeout_s):
                if not await self._receive():
                    return None
        with trio.move_on_after(self.header_timeout_s):
            while True:
                event = self.protocol.next_event()
                if isinstance(event, h11.Request):
                    self.is_head = event.method == b"HEAD"
                    return event
                if not await self._receive():
                    return None
        raise _RefusedError(HTTPStatus.REQUEST_TIMEOUT)

    async def _discard_body(self) -> None:
        if self._must_close:
            return
        size = 0
        with trio.move_on_after(self.header_timeout_s):
            while True:
                event = self.protocol.next_event()
                if isinstance(event, h11.EndOfMessage):
                    return
                if isinstance(event, h11.Data):
                    size += len(event.data)
                    if size > MAX_DISCARDED_BODY_BYTES:
                        raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
                else:
                    await self._receive()
        raise _RefusedError(HTTPStatus.REQUEST_TIMEOUT)

    async def _answer(self, head: h11.Request) -> None:
        method = head.method.decode("ascii")
        if method not in METHODS:
            raise _RefusedError(HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": ", ".join(METHODS)})
        headers = ((name.decode("ascii"), value.decode("latin-1")) for name, value in head.headers)
        request = Request.parse(method, head.target.decode("ascii"), headers)
        try:
            result = self.handler(request)
            response = await result if inspect.isawaitable(result) else result
            message = h11_response(response, close=self._must_close)
        except Exception:
            logger.exception("handler failed: %s %s", method, request.target)
            response = _error(HTTPStatus.INTERNAL_SERVER_ERROR)
            message = h11_response(response, close=self._must_close)
        await self._send(message, response.body)

    @property
    def _must_close(self) -> bool:
        # Who asked whether to send a body gets the final answer instead, and may send the body or not: there is no
        # telling where the next request would begin (RFC 9110 §10.1.1).
        return self.protocol.they_are_waiting_for_100_continue

    async def _refuse(self, response: Response) -> None:
        await self._send(h11_response(response, close=True), response.body)

    async def _send(self, message: h11.Response, body: bytes) -> None:
        events: list[h11.Response | h11.Data | h11.EndOfMessage] = [message, h11.EndOfMessage()]
        if body and not self.is_head:
            events.insert(1, h11.Data(data=body))
        data = b"".join(self.protocol.send(event) or b"" for event in events)
        with trio.fail_after(self.idle_timeout_s):
            await self.stream.send_all(data)

    async def _receive(self) -> bool:
        data = await self.stream.receive_some(_RECEIVE_BYTES)
        self.protocol.receive_data(bytes(data))
        return bool(data)

    async def _linger(self) -> None:
        # A socket that is closed with unread input resets, and the reset can overtake the answer (RFC 9112 §9.6).
        with trio.move_on_after(LINGER_S):
            if isinstance(self.stream, trio.abc.HalfCloseableStream):
                await self.stream.send_eof()
            while await self.stream.receive_some(_RECEIVE_BYTES):
                pass


def h11_response(response: Response, *, close: bool = False) -> h11.Response:
    """Return the head of *response*.

    Raises:
        h11.LocalProtocolError: a header of the response is not one.
    """
    headers = {
        "Date": formatdate(usegmt=True),
        "Content-Type": response.content_type,
        "Content-Length": str(len(response.body)),
        **response.headers,
    }
    if close:
        headers["Connection"] = "close"
    reason = HTTPStatus(response.status).phrase
    return h11.Response(status_code=response.status, headers=list(headers.items()), reason=reason)


def _error(status: int) -> Response:
    return Response.text(f"{status} {HTTPStatus(status).phrase}", status)
