"""Which fields of a message go on to the next hop (RFC 9110 §7.6; Go's httputil.ReverseProxy). Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from clusterproxy.http1.grammar import is_token, spell, tokens

if TYPE_CHECKING:
    from .exchange import Headers

# Those of Go's hopHeaders, and what says where a body ends, which is each hop's own business.
_HOP: Final = frozenset(
    {
        b"connection",
        b"proxy-connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
    }
)

# RFC 9110 §6.5.1, and whatever says who somebody is: some servers put trailers among the headers.
_NO_TRAILERS: Final = frozenset(
    {
        b"authorization",
        b"cache-control",
        b"content-encoding",
        b"content-range",
        b"content-type",
        b"cookie",
        b"expect",
        b"forwarded",
        b"host",
        b"max-forwards",
        b"pragma",
        b"range",
        b"set-cookie",
    }
)
_NO_TRAILER_PREFIXES: Final = (
    b"if-",
    b"proxy-",
    b"impersonate-",
    b"cluster-proxy-",
    b"x-forwarded-",
    b"x-remote-",
)


def end_to_end(headers: Headers, connection: frozenset[bytes]) -> Headers:
    """Return *headers* without those of this hop, *connection* being the options of ``Connection``.

    A request's are cut before anybody decides about it: otherwise ``Connection: Impersonate-User`` would
    take away what the deciding program has set.
    """
    # Who is asked is nobody's to take away.
    dropped = _HOP | (connection - {b"host"}) if connection else _HOP
    return [field for field in headers if field[0] not in dropped]


def connection_options(headers: Headers) -> frozenset[bytes]:
    """Return what is listed in ``Connection``, in lower case."""
    options: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            options |= tokens(value)
    return frozenset(options)


def first(headers: Headers, name: bytes) -> bytes:
    """Return the first value of a field, empty without one."""
    for found, value in headers:
        if found == name:
            return value
    return b""


def joined(headers: Headers, name: bytes) -> bytes:
    """Return all values of a field as one list."""
    return b", ".join(value for found, value in headers if found == name)


def upgrade_of(headers: Headers, connection: frozenset[bytes]) -> bytes:
    """Return the protocol that a message wants to switch to, empty if none.

    That to HTTP/2 is no more (RFC 9113 §3.1): behind it a client would get past whoever decides about requests.
    """
    protocol = first(headers, b"upgrade") if b"upgrade" in connection else b""
    return b"" if b"h2c" in tokens(protocol) else protocol


def is_printable(value: bytes) -> bool:
    """Whether *value* is printable ASCII, as Go asks of the names of protocols."""
    return all(0x20 <= byte <= 0x7E for byte in value)


def wants_trailers(headers: Headers) -> bool:
    """Whether ``TE`` lists trailers."""
    return any(b"trailers" in tokens(value) for name, value in headers if name == b"te")


def append_forwarded_for(headers: Headers, peer: str) -> None:
    """Add *peer* to ``X-Forwarded-For``, several of them made one; a Unix socket's has no address."""
    if not peer:
        return
    prior = [value for name, value in headers if name == b"x-forwarded-for"]
    if prior:
        headers[:] = [field for field in headers if field[0] != b"x-forwarded-for"]
    headers.append((b"x-forwarded-for", b", ".join((*prior, peer.encode()))))


def join_cookies(headers: Headers) -> Headers:
    """Make one of the pieces that HTTP/2 may cut a ``cookie`` into (RFC 9113 §8.2.3)."""
    pieces = [value for name, value in headers if name == b"cookie"]
    if len(pieces) < 2:
        return headers
    rest = [field for field in headers if field[0] != b"cookie"]
    rest.append((b"cookie", b"; ".join(pieces)))
    return rest


def announcement(names: bytes) -> bytes:
    """Return those of the *names* in ``Trailer`` that may stand behind a body."""
    listed = [(name, b"") for name in sorted(tokens(names)) if is_token(name)]
    return b", ".join(spell(name) for name, _ in trailers_of(listed))


def trailers_of(fields: Headers) -> Headers:
    """Return those of *fields* that may stand behind a body."""
    return [
        field
        for field in fields
        if field[0] not in _HOP
        and field[0] not in _NO_TRAILERS
        and not field[0].startswith(_NO_TRAILER_PREFIXES)
    ]
