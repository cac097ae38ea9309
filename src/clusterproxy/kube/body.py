"""What follows the head of an apiserver's answer: one document, or the events of a watch."""

from __future__ import annotations

from collections import deque
from http.client import HTTPException
from typing import TYPE_CHECKING, Final

import trio
from urllib3.exceptions import HTTPError

from clusterproxy.errors import KubeError, KubeUnavailable

from .answer import Answer, retry_after, watch_event
from .exchange import Exchange, in_thread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from urllib3.response import BaseHTTPResponse

    from .api import WatchEvent

BODY_LIMIT: Final = 64 * 1024 * 1024
_CHUNK: Final = 64 * 1024

#: What urllib3 lets through, files of credentials, and a header that cannot be sent.
TRANSPORT_ERRORS: Final = (HTTPError, HTTPException, OSError, ValueError)


def read_answer(call: str, response: BaseHTTPResponse) -> Answer | KubeError:
    """Read an answer to its end, in a thread; or return what is wrong with it."""
    body = bytearray()
    while chunk := response.read(_CHUNK):
        body += chunk
        if len(body) > BODY_LIMIT:
            response.close()
            return KubeUnavailable(f"{call}: an answer of more than {BODY_LIMIT} bytes")
    response.release_conn()
    return Answer(
        call, response.status, bytes(body), retry_after(response.headers.get("Retry-After"))
    )


def unavailable(call: str, error: Exception) -> KubeUnavailable:
    """Return the error for what a transport raised."""
    return KubeUnavailable(f"{call}: {str(error) or type(error).__name__}")


class WatchEvents:
    """The events of a watch, as they come.

    No thread runs while nobody waits for one.

    Args:
      call: what was asked, for messages.
      deadline: when the watch must have ended, on trio's clock.
      limiter: of the threads that wait for events.

    Raises:
      KubeError: the watch has failed.

    Cancellation: ends the watch.
    """

    def __init__(
        self,
        call: str,
        exchange: Exchange,
        response: BaseHTTPResponse,
        deadline: float,
        limiter: trio.CapacityLimiter,
    ) -> None:
        self._call = call
        self._exchange = exchange
        self._response = response
        self._deadline = deadline
        self._limiter = limiter
        self._lines: deque[bytes] = deque()
        self._rest = bytearray()

    def __aiter__(self) -> AsyncIterator[WatchEvent]:
        return self

    async def __anext__(self) -> WatchEvent:
        if self._lines:
            await trio.lowlevel.checkpoint()
        while not self._lines:
            found: bytes | KubeError = KubeUnavailable(f"{self._call}: the watch does not end")
            with trio.move_on_at(self._deadline):
                found = await in_thread(self._exchange, self._read, "kube watch", self._limiter)
            if isinstance(found, KubeError):
                raise found
            if not found:
                if self._rest:
                    raise KubeUnavailable(f"{self._call}: the watch ended within an event")
                raise StopAsyncIteration
            self._take(found)
        return watch_event(self._call, self._lines.popleft())

    def _take(self, data: bytes) -> None:
        first, *others = data.split(b"\n")
        self._rest += first
        for piece in others:
            if self._rest.strip():
                self._lines.append(bytes(self._rest))
            self._rest = bytearray(piece)
        if len(self._rest) > BODY_LIMIT:
            raise KubeUnavailable(f"{self._call}: an event of more than {BODY_LIMIT} bytes")

    def _read(self) -> bytes | KubeError:
        try:
            return self._response.read1(_CHUNK)
        except TRANSPORT_ERRORS as error:
            return unavailable(self._call, error)
