"""Reads small JSON documents over HTTPS: what an OIDC issuer publishes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import SplitResult, urljoin, urlsplit

import h11
import trio

from clusterproxy import __version__
from clusterproxy.gotext import quote

from .oidc_claims import parse_object

if TYPE_CHECKING:
    import ssl

    from clusterproxy.kube.resource import Object

# Upstream's oidcHTTPTimeout, for all of a request.
_TIMEOUT_S: Final = 15.0
_LARGEST: Final = 1_048_576
_MOST_REDIRECTS: Final = 5
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_RECEIVE: Final = 65_536


class FetchError(Exception):
    """A document was not had; the text says which, and why."""


async def fetch_object(url: str, context: ssl.SSLContext) -> Object:
    """Return the JSON object at *url*, which has to be an ``https`` one. Redirects are followed to others of that kind.

    Raises:
      FetchError: there is none, or not within 15 s.

    Cancellation: closes the connection.
    """
    first = url
    try:
        with trio.fail_after(_TIMEOUT_S):
            for _ in range(_MOST_REDIRECTS + 1):
                status, location, body = await _get(url, context)
                if status not in _REDIRECTS or not location:
                    return _object(status, body)
                url = urljoin(url, location)
        raise _Unusable("too many redirects")
    except trio.TooSlowError as error:
        raise FetchError(f"Get {quote(first)}: context deadline exceeded") from error
    except trio.BrokenResourceError as error:
        # The TLS module's own words: which certificate is not believed, and why.
        raise FetchError(f"Get {quote(first)}: {error.__cause__ or 'connection broken'}") from error
    except (OSError, ValueError, h11.ProtocolError) as error:
        raise FetchError(f"Get {quote(first)}: {error}") from error


class _Unusable(ValueError):
    """An answer that is none."""


def _object(status: int, body: bytes) -> Object:
    if status != 200:
        raise _Unusable(f"status {status}: {body[:200].decode(errors='replace')}")
    return parse_object(body)


async def _get(url: str, context: ssl.SSLContext) -> tuple[int, str, bytes]:
    """Return the status of an answer, where it redirects to, and its body."""
    parts = urlsplit(url)
    if parts.scheme != "https" or not parts.hostname or not url.isascii():
        raise _Unusable(f"{quote(url)} is no https URL")
    protocol = h11.Connection(h11.CLIENT)
    sent = _request(protocol, parts)
    tcp = await trio.open_tcp_stream(parts.hostname, parts.port or 443)
    stream = trio.SSLStream(tcp, context, server_hostname=parts.hostname, https_compatible=True)
    try:
        await stream.send_all(sent)
        return await _response(stream, protocol)
    finally:
        await trio.aclose_forcefully(stream)


def _request(protocol: h11.Connection, parts: SplitResult) -> bytes:
    request = h11.Request(
        method="GET",
        target=(parts.path or "/") + (f"?{parts.query}" if parts.query else ""),
        headers=[
            ("Host", parts.netloc.rpartition("@")[2]),
            ("User-Agent", f"clusterproxy/{__version__}"),
            ("Accept", "application/json"),
            ("Connection", "close"),
        ],
    )
    return (protocol.send(request) or b"") + (protocol.send(h11.EndOfMessage()) or b"")


async def _response(
    stream: trio.SSLStream[trio.SocketStream], protocol: h11.Connection
) -> tuple[int, str, bytes]:
    status, location, body = 0, "", bytearray()
    while True:
        event = protocol.next_event()
        if event is h11.NEED_DATA:
            data = bytes(await stream.receive_some(_RECEIVE))
            if not data and not status:
                raise _Unusable("EOF")
            protocol.receive_data(data)
        elif isinstance(event, h11.Response):
            status = event.status_code
            location = dict(event.headers).get(b"location", b"").decode("latin-1")
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > _LARGEST:
                raise _Unusable(f"the answer is larger than {_LARGEST} bytes")
        elif isinstance(event, h11.EndOfMessage):
            return status, location, bytes(body)
