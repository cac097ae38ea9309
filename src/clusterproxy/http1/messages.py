"""Requests and responses as handlers see them."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

TEXT = "text/plain; charset=utf-8"


@attrs.frozen(kw_only=True)
class Request:
    """A request whose body, if any, was thrown away."""

    method: str
    target: str
    """As it came."""
    headers: Mapping[str, str] = attrs.field(factory=dict[str, str])
    """Names in lower case; of repeated fields the last."""
    authority: str = ""
    """Host and port asked for: those of an absolute target before those of ``host`` (RFC 9112 §3.2.2)."""
    path: str
    """Without percent-encoding."""
    query: Mapping[str, list[str]] = attrs.field(factory=dict[str, list[str]])

    @classmethod
    def parse(cls, method: str, target: str, headers: Iterable[tuple[str, str]] = ()) -> Request:
        """Split a request *target* in origin or absolute form; never fails, a nonsense target is just an unknown path."""
        fields = {name.lower(): value for name, value in headers}
        path, _, query = target.partition("?")
        authority = fields.get("host", "")
        scheme, is_absolute, rest = path.partition("://")
        if is_absolute and "/" not in scheme:
            authority, _, rest = rest.partition("/")
            path = "/" + rest
        return cls(
            method=method,
            target=target,
            headers=fields,
            authority=authority,
            path=unquote(path),
            query=parse_qs(query, keep_blank_values=True),
        )


@attrs.frozen
class Response:
    """A whole response; the server adds Date, Content-Length and Connection."""

    status: int = 200
    body: bytes = b""
    content_type: str = TEXT
    headers: Mapping[str, str] = attrs.field(factory=dict[str, str], kw_only=True)

    @classmethod
    def text(cls, text: str, status: int = 200) -> Response:
        """Return a plain text response."""
        return cls(status, text.encode())
