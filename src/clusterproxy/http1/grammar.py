"""The heads of HTTP/1.1 messages as a proxy has to read them: strictly, for what two readers understand differently is
how requests are smuggled (RFC 9112 §11.2). Pure.

h11 takes 80 µs for a request and its answer; this takes a tenth, and ``tests/http1/test_http1_grammar.py`` holds it against h11.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import attrs

if TYPE_CHECKING:
    from collections.abc import Iterable

Headers = list[tuple[bytes, bytes]]

_TOKEN_BYTES: Final = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
_VALUE_BYTES: Final = rb"[^\x00-\x08\x0a-\x1f\x7f]"
_FIELDS: Final = re.compile(rb"(?:%b++:%b*+\r\n)*+" % (_TOKEN_BYTES, _VALUE_BYTES))
_REQUEST_LINE: Final = re.compile(
    rb"(%b++) ([^\x00-\x20\x7f]++) HTTP/([0-9])\.([0-9])\r\n" % _TOKEN_BYTES
)
_STATUS_LINE: Final = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: (%b*+))?\r\n" % _VALUE_BYTES)
_TOKEN: Final = re.compile(rb"%b++" % _TOKEN_BYTES)
_TARGET: Final = re.compile(rb"/[^\x00-\x20\x7f]*+")
_ABSOLUTE: Final = re.compile(rb"https?://([^/?#@]++)((?:[/?].*+)?)", re.IGNORECASE)
# As Go's httpguts.ValidHostHeader, without what needs no place in it.
_HOST: Final = re.compile(rb"[A-Za-z0-9!$%&'()*+,\-.:;=\[\]_~]*+")
_DIGITS: Final = re.compile(rb"[0-9]{1,18}")
_BARE_LF: Final = re.compile(rb"(?<!\r)\n")
# Begins where the space does: from each place in it anew, a long line would take hours.
_FOLD: Final = re.compile(rb"(?<![ \t])[ \t]*+(?:\r\n[ \t]++)++")

#: More fields than this are no honest message's.
MAX_FIELDS: Final = 3000

# How a name is written and what follows it; most messages have the same few dozen.
_written: dict[bytes, bytes] = {}
_MOST_WRITTEN: Final = 2048


class BadMessage(Exception):
    """A message that breaks the grammar, or that means two things.

    Attributes:
      status: what a server answers to such a request.
      text: what is wrong with it.
    """

    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@attrs.frozen
class RequestHead:
    """The head of a request.

    Attributes:
      target: path and query, beginning with ``/``, or ``*``.
      headers: names in lower case; exactly one ``host`` (RFC 9112 §3.2), of HTTP/1.0 perhaps none.
      length: of the body; None if it is chunked.
      minor: 1 for HTTP/1.1, 0 for HTTP/1.0.
      connection: the options of ``Connection``, in lower case.
    """

    method: bytes
    target: bytes
    headers: Headers
    length: int | None
    minor: int
    connection: frozenset[bytes]


@attrs.frozen
class ResponseHead:
    """The head of a response; names in lower case."""

    status: int
    reason: bytes
    headers: Headers
    minor: int


def parse_request(head: bytes) -> RequestHead:
    """Parse a request's head: its lines with their ends, without the empty one.

    Raises:
      BadMessage: it is not to be trusted.
    """
    line = _REQUEST_LINE.match(head)
    if line is None:
        raise BadMessage("malformed request line")
    method, target, major, digit = line.groups()
    if major != b"1" or digit not in b"01":
        raise BadMessage("unsupported protocol version", 505)
    headers = _parse_fields(head, line.end())
    minor = int(digit)
    hosts = lengths = codings = 0
    host = length = coding = b""
    connection: set[bytes] = set()
    for name, value in headers:
        if name == b"host":
            hosts += 1
            host = value
        elif name == b"content-length":
            lengths += 1
            length = value
        elif name == b"transfer-encoding":
            codings += 1
            coding = value
        elif name == b"connection":
            connection |= tokens(value)
    if hosts > 1:
        raise BadMessage("too many Host headers")
    if not hosts and minor:
        raise BadMessage("missing required Host header")
    if not _HOST.fullmatch(host):
        raise BadMessage("malformed Host header")
    if not target.startswith(b"/") and not (target == b"*" and method == b"OPTIONS"):
        target, host = _split_absolute(target)
        headers = [(b"host", host), *(field for field in headers if field[0] != b"host")]
    size: int | None = 0
    if codings:
        if lengths:
            raise BadMessage("both Content-Length and Transfer-Encoding")
        if not minor:
            raise BadMessage("Transfer-Encoding in an HTTP/1.0 request")
        if codings > 1 or coding.lower() != b"chunked":
            raise BadMessage("unsupported transfer encoding", 501)
        size = None
    elif lengths:
        if lengths > 1:
            raise BadMessage("more than one Content-Length")
        size = parse_length(length)
    return RequestHead(method, target, headers, size, minor, frozenset(connection))


def _split_absolute(target: bytes) -> tuple[bytes, bytes]:
    # RFC 9112 §3.2.2: the target's authority is the host, whatever Host says.
    found = _ABSOLUTE.fullmatch(target)
    if found is None or not _HOST.fullmatch(found[1]):
        raise BadMessage("malformed request target")
    path = found[2]
    return path if path.startswith(b"/") else b"/" + path, found[1]


def parse_response(head: bytes) -> ResponseHead:
    """Parse a response's head: its lines with their ends, without the empty one.

    Raises:
      BadMessage: it is not to be trusted.
    """
    line = _STATUS_LINE.match(head)
    if line is None:
        raise BadMessage("malformed HTTP response")
    minor, status, reason = line.groups()
    headers = _parse_fields(head, line.end())
    return ResponseHead(int(status), reason or b"", headers, int(minor))


def normalize_lines(head: bytes) -> bytes:
    """Mend what old servers do to their lines: ends without CR, and values on several lines (RFC 9112 §§2.2, 5.2)."""
    return _FOLD.sub(b" ", _BARE_LF.sub(b"\r\n", head))


def has_bare_lf(data: bytes | bytearray, start: int = 0) -> bool:
    """Whether a line ends without CR."""
    return _BARE_LF.search(data, start) is not None


def parse_fields(block: bytes) -> Headers:
    """Parse field lines, each with its end.

    Raises:
      BadMessage
    """
    return _parse_fields(block, 0)


def _parse_fields(head: bytes, start: int) -> Headers:
    if not _FIELDS.fullmatch(head, start):
        raise BadMessage("malformed header field")
    if start == len(head):
        return []
    lines = head[start:-2].split(b"\r\n")
    if len(lines) > MAX_FIELDS:
        raise BadMessage("too many header fields", 431)
    headers: Headers = []
    for line in lines:
        name, _, value = line.partition(b":")
        headers.append((name.lower(), value.strip(b" \t")))
    return headers


def parse_length(value: bytes) -> int:
    """Return what a ``Content-Length`` says.

    Raises:
      BadMessage: it is no number.
    """
    if not _DIGITS.fullmatch(value):
        raise BadMessage("bad Content-Length")
    return int(value)


def tokens(value: bytes) -> frozenset[bytes]:
    """Return the members of a comma-separated list, in lower case."""
    return frozenset(part for item in value.lower().split(b",") if (part := item.strip(b" \t")))


def is_token(value: bytes) -> bool:
    """Whether *value* can be a method or the name of a field."""
    return _TOKEN.fullmatch(value) is not None


def is_target(value: bytes) -> bool:
    """Whether *value* can be a target in origin form."""
    return _TARGET.fullmatch(value) is not None


def is_host(value: bytes) -> bool:
    """Whether *value* can be a ``Host``."""
    return _HOST.fullmatch(value) is not None


def write_head(line: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Return a head with its empty line, names spelled as Go does.

    Raises:
      ValueError: a name or a value would be something else on the wire than it is here.
    """
    written = _written
    lines = [line]
    for name, value in headers:
        start = written.get(name)
        if start is None:
            start = _spell(name)
        lines.append(start + value)
    lines.append(b"\r\n")
    head = b"\r\n".join(lines)
    count = len(lines)
    if head.count(b"\n") != count or head.count(b"\r") != count or b"\0" in head:
        raise ValueError("a header field contains a line break or NUL")
    return head


def spell(name: bytes) -> bytes:
    """Return the name of a field as Go spells it.

    Raises:
      ValueError: it is none.
    """
    return (_written.get(name) or _spell(name))[:-2]


def _spell(name: bytes) -> bytes:
    """Return a name as Go's ``textproto.CanonicalMIMEHeaderKey`` writes it, with the colon."""
    if not is_token(name):
        raise ValueError(f"invalid header field name {name!r}")
    start = b"-".join(part.capitalize() for part in name.split(b"-")) + b": "
    if len(_written) < _MOST_WRITTEN and len(name) < 64:
        _written[name] = start
    return start
