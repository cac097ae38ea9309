"""One request as it came in, and the way back to its client, whichever protocol that speaks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.transport.outbox import current_outbox

if TYPE_CHECKING:
    from clusterproxy.http1.bodies import Buffer

    from .exchange import Answer, Headers, Request

#: The response has no body, whatever its fields say.
NO_BODY: Final = -1


class ClientGone(Exception):
    """The client does not wait for an answer any more, or broke the rules.

    Attributes:
      status: of the answer that tells it so; 0: none.
    """

    def __init__(self, text: str = "", status: int = 0) -> None:
        super().__init__(text)
        self.status = status


class Incoming(ABC):
    """One request.

    What is put is gathered, in order; :meth:`flush` sends it and waits until there is room for more. Views
    that are put are lent until the next checkpoint.

    Attributes:
      request: its head, without what concerns one hop only.
      body_length: bytes of the body, 0 if there is none, None if that is not known before its end.
      expects_continue: the client waits to be asked for the body.
      upgrade: the protocol that the client wants to switch to; empty: none.
      takes_trailers: the client said that it looks at trailers.
      trailer_names: what the request announces of them.
      trailers: those of the request, once :attr:`body_done`.
      started: the head of the final response was put.
      finished: so was its end.
      status: of that response, 0 before.
      gone: the client has.
      discarded: something of the body was thrown away, for it is answered already: whom it was for has not got all of it.
    """

    request: Request
    body_length: int | None
    expects_continue: bool
    upgrade: bytes
    takes_trailers: bool
    trailer_names: bytes
    trailers: Headers
    body_done: bool

    def __init__(self) -> None:
        self.outbox = current_outbox()
        self.scope = trio.CancelScope()
        self.started = False
        self.finished = False
        self.status = 0
        self.gone = False
        self.discarded = False

    def leave(self) -> None:
        """The client has gone: nobody works for it any more."""
        self.gone = True
        self.scope.cancel()

    @abstractmethod
    async def receive_body(self) -> list[Buffer]:
        """Return the next parts of the body, lent until the next checkpoint; look at ``body_done`` then.

        Raises:
          ClientGone
        """

    @abstractmethod
    def put_informational(self, status: int, headers: Headers) -> None:
        """Send a 1xx response at once."""

    @abstractmethod
    def put_head(self, status: int, reason: bytes, headers: Headers, length: int | None) -> None:
        """Put the head of the response; *length* is that of its body, None if it is not known, or NO_BODY.

        Raises:
          ValueError: *headers* cannot be sent.
        """

    @abstractmethod
    def put_data(self, pieces: list[Buffer]) -> None:
        """Put a part of the body."""

    @abstractmethod
    def put_end(self, trailers: Headers) -> None:
        """Put the end of the body."""

    @abstractmethod
    async def flush(self) -> bool:
        """Send what was put, and wait until there is room for more; return whether there was at once.

        Raises:
          ClientGone
        """

    @abstractmethod
    def abort(self) -> None:
        """The response cannot be finished: let the client see that."""

    async def answer(self, answer: Answer) -> None:
        """Send a whole response of our own, as Go's ``http.Error``.

        Raises:
          ClientGone
        """
        body = (answer.text + "\n").encode() if answer.text else b""
        with self.outbox:
            self.put_head(
                answer.status, b"", error_fields(answer.headers, text=bool(body)), len(body)
            )
            if body and self.request.method != "HEAD":
                self.put_data([body])
            self.put_end([])
        await self.flush()


def error_fields(headers: Headers, *, text: bool) -> Headers:
    """Return the fields of Go's ``http.Error`` behind *headers*."""
    fields = list(headers)
    if text:
        fields += (
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"x-content-type-options", b"nosniff"),
        )
    fields.append((b"date", formatdate(usegmt=True).encode()))
    return fields


def phrase(status: int) -> bytes:
    """Return the usual words for a status, as Go writes them."""
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b"status code %d" % status
