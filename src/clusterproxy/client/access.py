"""Where a proxy server is, and what its TLS needs."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Final
from urllib.parse import quote
from weakref import WeakKeyDictionary

import attrs

from clusterproxy.errors import ConfigError
from clusterproxy.transport.reload import ReloadingContext
from clusterproxy.transport.tls import client_context

if TYPE_CHECKING:
    import ssl
    from collections.abc import Sequence

_UNIX: Final = re.compile(r"unix:(?://)?(/.*[^/])|(/.*[^/])", re.DOTALL)
_TCP: Final = re.compile(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([A-Za-z0-9._-]+)):([0-9]{1,5})")


@attrs.frozen
class Server:
    """Where a proxy server listens for clients: a TCP address or a Unix socket.

    Attributes:
      host, port: a name or an address without brackets; empty and 0 for a Unix socket.
      path: of a Unix socket, or empty.
    """

    host: str = ""
    port: int = 0
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Server:
        """Parse ``HOST:PORT``, ``[IPv6]:PORT``, ``unix:///PATH`` or ``/PATH``.

        Raises:
          ConfigError: it is none of these.
        """
        unix = _UNIX.fullmatch(text)
        if unix is not None:
            return cls(path=unix[1] or unix[2])
        tcp = _TCP.fullmatch(text)
        if tcp is None or not 0 < int(tcp[3]) < 65536:
            raise ConfigError(
                "server", f"{text!r} is no server: HOST:PORT or unix:///PATH is needed"
            )
        return cls(host=tcp[1] or tcp[2], port=int(tcp[3]))

    @property
    def authority(self) -> str:
        """The ``:authority`` of requests; of a Unix socket it is the encoded path, as grpc-go's."""
        return quote(self.path, safe="") if self.path else str(self)

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@attrs.frozen(kw_only=True)
class ClientTLS:
    """What mutual TLS with a proxy server needs. Changed files are used from the next connection on.

    Tunnels that are opened with the same object share what was read from its files.

    Attributes:
      ca_cert: the file of the CAs that the server's certificate may be of; empty: the system's.
      cert, key: the files of the client's certificate and its key; empty: none.
      server_name: a name in the server's certificate; empty: the host that is connected to.
    """

    ca_cert: str | os.PathLike[str] = ""
    cert: str | os.PathLike[str] = ""
    key: str | os.PathLike[str] = ""
    server_name: str = ""


# To read certificates takes a millisecond, which is much for a tunnel of one connection.
_contexts: WeakKeyDictionary[ClientTLS, dict[tuple[str, ...], ReloadingContext]] = (
    WeakKeyDictionary()
)


def _contexts_of(tls: ClientTLS, alpn: Sequence[str]) -> ReloadingContext:
    """Return the TLS contexts of connections that offer *alpn*; raises ConfigError."""
    known = _contexts.setdefault(tls, {})
    contexts = known.get(tuple(alpn))
    if contexts is None:
        ca, cert, key = (os.fspath(path) for path in (tls.ca_cert, tls.cert, tls.key))
        contexts = known[tuple(alpn)] = ReloadingContext(
            lambda: client_context(ca=ca or None, cert=cert, key=key, alpn=alpn),
            [path for path in (ca, cert, key) if path],
        )
    return contexts


def _checked_name(name: str) -> str:
    try:
        # As the ssl module does it, in the middle of a connection.
        possible = b"\0" not in name.encode("idna")
    except UnicodeError:
        possible = False
    if not possible:
        raise ConfigError("server-name", f"{name!r} is no name of a host")
    return name


class Credentials:
    """Makes the TLS contexts of one tunnel's connections.

    Raises:
      ConfigError: a file or the server's name cannot be used.
    """

    def __init__(
        self, tls: ClientTLS | ssl.SSLContext, server: Server, alpn: Sequence[str]
    ) -> None:
        self.server_name = server.host or "localhost"
        self._alpn = list(alpn)
        if not isinstance(tls, ClientTLS):
            self._own: ssl.SSLContext | None = tls
            return
        self._own = None
        if tls.server_name:
            self.server_name = _checked_name(tls.server_name)
        self._files = _contexts_of(tls, alpn)

    def current(self) -> ssl.SSLContext:
        """Return the context for the next connection, which is to be made of it at once."""
        if self._own is not None:
            # Each time: whoever else uses it, an HTTP client or a tunnel of the other mode, sets theirs.
            if self._alpn:
                self._own.set_alpn_protocols(self._alpn)
            return self._own
        self._files.check()
        return self._files.current()
