"""What the two programs decide about a request: an answer of their own, or where it goes on to and with which headers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeAlias

import attrs

if TYPE_CHECKING:
    from .origin import Origin

#: Names in lower case, values as they came, in the order in which they came.
Headers: TypeAlias = list[tuple[bytes, bytes]]


@attrs.frozen(kw_only=True)
class Request:
    """The head of a request, whichever protocol it came in.

    Attributes:
      method: such as ``GET``.
      target: path and query as they came, percent-encoding and all; begins with ``/`` (or is ``*``).
      headers: without those of HTTP/2's pseudo-header fields; ``host`` is there, from ``:authority`` if need be.
      peer: the address it came from, without a port.
      secure: whether it came over TLS.
    """

    method: str
    target: bytes
    headers: Headers
    peer: str
    secure: bool = True


@attrs.frozen
class Answer:
    """A whole response of our own, plain text; a newline is added as Go's ``http.Error`` does."""

    status: int
    text: str
    headers: Headers = attrs.field(factory=list[tuple[bytes, bytes]])


@attrs.frozen
class Forward:
    """A request goes on.

    Attributes:
      origin: who gets it.
      target: path and query to ask for there, percent-encoding and all.
      headers: those of the request as the origin is to see them; what belongs to one hop is removed by the proxy.
    """

    origin: Origin
    target: bytes
    headers: Headers


#: Called with every request. Raises nothing; is cancelled when the client goes away.
Decide: TypeAlias = Callable[[Request], Awaitable[Answer | Forward]]
