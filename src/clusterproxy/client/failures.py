"""What went wrong, where, and what to do about it: made of exceptions, and of texts from the way.

Peers say why a dial failed in one line of text. An agent's is that of Go's net package, "dial tcp
10.0.0.1:443: connect: connection refused", whatever language the agent is written in.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
from typing import TYPE_CHECKING, Final, cast

from clusterproxy.errors import (
    ConnectCause,
    ConnectError,
    DialCause,
    DialError,
    DialReason,
    Hop,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .access import Server

_NO_AGENT: Final = "is the cluster's agent connected to this proxy server?"
_DNS: Final = "names are looked up by the agent, in its cluster"

# The first that is found in the text counts.
_TEXTS: Final[tuple[tuple[str, Hop, DialCause, str], ...]] = (
    (r"no agent available", Hop.SERVER, DialCause.NO_AGENT, _NO_AGENT),
    (
        r"timed out waiting for backend dial",
        Hop.AGENT,
        DialCause.TIMEOUT,
        "the agent did not answer the proxy server",
    ),
    (r"too many dials wait", Hop.AGENT, DialCause.OTHER, "the agent does not keep up; try later"),
    (
        r"backend context|backend .*gone|transport is closing",
        Hop.AGENT,
        DialCause.CLOSED,
        _NO_AGENT,
    ),
    (r"not allowed|forbidden|denied by|polic", Hop.AGENT, DialCause.POLICY, ""),
    (r"\blookup\b|no such host|unknown port", Hop.AGENT, DialCause.DNS, _DNS),
    (
        r"missing port|too many colons|invalid port|address \S* *too long|missing brackets",
        Hop.CLIENT,
        DialCause.OTHER,
        "HOST:PORT is needed",
    ),
    (
        r"connection refused",
        Hop.SERVICE,
        DialCause.REFUSED,
        "nothing listens there, as the agent sees it",
    ),
    (
        r"no route to host|network is unreachable|host is down|cannot assign requested address",
        Hop.SERVICE,
        DialCause.UNREACHABLE,
        "the agent's network does not reach it",
    ),
    (
        r"i/o timeout|timed out|deadline exceeded",
        Hop.SERVICE,
        DialCause.TIMEOUT,
        "the service did not answer the agent; is there a firewall between them?",
    ),
    (r"connection reset", Hop.SERVICE, DialCause.CLOSED, ""),
    (r"too many open files", Hop.AGENT, DialCause.OTHER, "the agent has reached its limit"),
)
_PATTERNS: Final = tuple(
    (re.compile(pattern, re.IGNORECASE), (hop, cause, advice))
    for pattern, hop, cause, advice in _TEXTS
)
_UNKNOWN: Final = (Hop.AGENT, DialCause.OTHER, "")


def refused_dial(address: str, text: str) -> DialError:
    """Return the error for a dial that was answered with *text*."""
    hop, cause, advice = next(
        (rest for pattern, rest in _PATTERNS if pattern.search(text)), _UNKNOWN
    )
    return DialError(
        DialReason.ENDPOINT, text, hop=hop, cause=cause, address=address, advice=advice
    )


_CAUSES: Final = {
    ConnectCause.DNS: DialCause.DNS,
    ConnectCause.REFUSED: DialCause.REFUSED,
    ConnectCause.UNREACHABLE: DialCause.UNREACHABLE,
    ConnectCause.TIMEOUT: DialCause.TIMEOUT,
    ConnectCause.CLOSED: DialCause.CLOSED,
}


def unreached_server(address: str, error: ConnectError) -> DialError:
    """Return the error for a dial that got no stream, because the server could not be used."""
    return DialError(
        DialReason.STREAM_SETUP,
        f"proxy server {error.server}: {error.message}",
        hop=Hop.SERVER,
        cause=_CAUSES.get(error.cause, DialCause.OTHER),
        address=address,
        advice=error.advice,
    )


# -- the server ------------------------------------------------------------------------------------

_EXPIRED: Final = frozenset((9, 10))  # X509_V_ERR_CERT_NOT_YET_VALID, …_CERT_HAS_EXPIRED
_WRONG_NAME: Final = frozenset((62, 63, 64))  # X509_V_ERR_HOSTNAME_MISMATCH, …EMAIL…, …IP_ADDRESS…

_UNREACHABLE: Final = frozenset((errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN))
_OUR_CERTIFICATE: Final = re.compile(
    r"ALERT_(CERTIFICATE|BAD_CERTIFICATE|UNKNOWN_CA|UNSUPPORTED_CERTIFICATE|ACCESS_DENIED"
    r"|HANDSHAKE_FAILURE)",
    re.IGNORECASE,
)
_FIX_CERTIFICATE: Final = (
    "it takes clients with a certificate of its CA only: check the client's cert and key"
)


def failed_connect(server: Server, error: OSError) -> ConnectError:
    """Return the error for a server that no connection could be made to."""
    if isinstance(error, ssl.SSLError):
        return failed_handshake(server, error)
    for found in _leaves(error):
        if isinstance(found, socket.gaierror):
            return ConnectError(
                str(server), ConnectCause.DNS, f"no such host: {found.strerror}", "check the name"
            )
    codes = {found.errno for found in _leaves(error) if isinstance(found, OSError)}
    if errno.ECONNREFUSED in codes:
        return ConnectError(
            str(server), ConnectCause.REFUSED, "connection refused", "is it running there?"
        )
    if errno.ENOENT in codes:
        return ConnectError(
            str(server), ConnectCause.SOCKET, "there is no such socket", "is the server running?"
        )
    if errno.EACCES in codes or errno.EPERM in codes:
        return ConnectError(
            str(server), ConnectCause.SOCKET, "permission denied", "who may use the socket?"
        )
    if codes & _UNREACHABLE:
        return ConnectError(str(server), ConnectCause.UNREACHABLE, "the network does not reach it")
    if errno.ETIMEDOUT in codes:
        return timed_out_connect(server)
    return ConnectError(str(server), ConnectCause.OTHER, str(error.strerror or error))


def timed_out_connect(server: Server, seconds: float = 0) -> ConnectError:
    """Return the error for a server that does not answer."""
    within = f" within {seconds:g} s" if seconds else ""
    return ConnectError(
        str(server), ConnectCause.TIMEOUT, f"no answer{within}", "is it the right address?"
    )


def failed_handshake(server: Server, error: ssl.SSLError) -> ConnectError:
    """Return the error for a server whose TLS cannot be used."""
    if isinstance(error, ssl.SSLCertVerificationError):
        text = str(error.verify_message)
        if error.verify_code in _EXPIRED:
            return ConnectError(
                str(server), ConnectCause.EXPIRED, f"its {text}", "compare the clocks, renew it"
            )
        if error.verify_code in _WRONG_NAME:
            advice = "name the server as its certificate does, or set the server name"
            return ConnectError(str(server), ConnectCause.NAME, text, advice)
        advice = "check that the CA certificate is that of this server"
        return ConnectError(
            str(server), ConnectCause.CA, f"its certificate is not trusted: {text}", advice
        )
    reason = str(error.reason or error)
    if "APPLICATION_PROTOCOL" in reason:
        return no_http2(server)
    if _OUR_CERTIFICATE.search(reason):
        return ConnectError(
            str(server),
            ConnectCause.CLIENT_CERTIFICATE,
            f"it refuses the client's certificate ({_words(reason)})",
            _FIX_CERTIFICATE,
        )
    advice = "is it a TLS port?" if "WRONG_VERSION" in reason or "HTTP" in reason else ""
    return ConnectError(str(server), ConnectCause.TLS, f"TLS failed: {_words(reason)}", advice)


def no_http2(server: Server, detail: str = "") -> ConnectError:
    """Return the error for a server that does not speak HTTP/2."""
    return ConnectError(
        str(server),
        ConnectCause.HTTP2,
        "it does not speak HTTP/2" + (f" ({detail})" if detail else ""),
        "is it the port for clients, and the server in gRPC mode?",
    )


def lost_at_start(server: Server, lost: str, *, tls: bool) -> ConnectError:
    """Return the error for a connection that ended, for the reason *lost*, before it was of use."""
    if _OUR_CERTIFICATE.search(lost):
        text = _words(lost.rpartition(": ")[2])
        return ConnectError(
            str(server),
            ConnectCause.CLIENT_CERTIFICATE,
            f"it refuses the client's certificate ({text})",
            _FIX_CERTIFICATE,
        )
    if tls:
        # With TLS 1.3 a server judges the client's certificate when the client is already done, and
        # its alert can be lost when it closes.
        return ConnectError(
            str(server), ConnectCause.CLOSED, f"{lost}, right after TLS", _FIX_CERTIFICATE
        )
    advice = "is it the port for clients, and does it want TLS?"
    return ConnectError(str(server), ConnectCause.CLOSED, lost, advice)


def going_away(server: Server) -> ConnectError:
    """Return the error for a server that ends every new connection in order before it is of use."""
    return ConnectError(
        str(server), ConnectCause.CLOSED, "it is going away", "is it being shut down or replaced?"
    )


def closed_tunnel(server: Server) -> ConnectError:
    """Return the error for a tunnel that nobody may connect any more."""
    return ConnectError(str(server), ConnectCause.CLOSED, "the tunnel was closed")


def _words(reason: str) -> str:
    return reason.lower().replace("_", " ")


def _leaves(error: BaseException | None) -> Iterator[BaseException]:
    """Return an exception, and those that it was made of: trio tries several addresses."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        for one in group.exceptions:
            yield from _leaves(one)
    elif error is not None:
        yield error
        yield from _leaves(error.__cause__)
