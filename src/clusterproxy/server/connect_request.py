"""What a request to an HTTP CONNECT proxy asks for, and where the next one begins."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import h11

# As Go's net/http, which reads on so far to keep a connection.
_MAX_SKIPPED_BODY: Final = 256 * 1024

# An authority as Go's net/url reads it: user information, then an address in brackets with or without a zone (RFC 6874),
# or whatever may be a name; behind the last colon is a port.
_NAME: Final = rb"-A-Za-z0-9._~!$&'()*+,;=<>\"\[\]"
_TARGET: Final = re.compile(
    rb"(?:[^@/?]*@)?"
    rb"(?P<host>\[[0-9A-Fa-f:.]+(?:%%25[-A-Za-z0-9._~]+)?\]|(?!\[)(?:[%b:]*(?=:[0-9]*(?:[/?]|\Z))|[%b]*))"
    rb"(?P<port>:[0-9]*)?(?:[/?].*)?" % (_NAME, _NAME)
)


def target_of(request: h11.Request) -> str:
    """Return what a CONNECT request wants to be dialled, nothing if it cannot be told (RFC 9110 §9.3.6)."""
    found = _TARGET.fullmatch(request.target)
    if found is None:
        return ""
    return (found["host"].replace(b"%25", b"%") + (found["port"] or b"")).decode("ascii")


def body_to_skip(request: h11.Request) -> int | None:
    """Return the size of a request's body, None if the connection ends with this request."""
    size = 0
    if request.http_version != b"1.1":
        return None
    expects = False
    for name, value in request.headers:
        if name == b"transfer-encoding":
            return None
        if name == b"connection":
            if b"close" in (option.strip() for option in value.lower().split(b",")):
                return None
        elif name == b"content-length":
            size = int(value)
        elif name == b"expect":
            # With our answer there is no reason any more to send the body, and nobody says whether it comes.
            expects = True
    return size if size <= _MAX_SKIPPED_BODY and not (expects and size) else None
