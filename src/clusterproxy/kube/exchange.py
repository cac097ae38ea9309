"""One request in a thread, which can be broken off from outside.

urllib3 blocks. What frees its thread at any point (connecting, in a handshake, waiting, reading) is that the socket of that
very request is shut down. A connection therefore tells the request that runs in its thread of its socket, before it
connects and each time it is used.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import trio
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError
from urllib3.util.ssl_ import create_urllib3_context, resolve_cert_reqs

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from urllib3 import PoolManager

T = TypeVar("T")

CONNECT_TIMEOUT_S: Final = 5.0

# A peer that is gone without a word is noticed after about 45 s, also by a watch on which nothing happens.
_SOCKET_OPTIONS: Final = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 45_000),
)

# In Go whatever a kubeconfig has for an authority is one, the certificate of an intermediate or of the apiserver itself too.
VERIFY_FLAGS: Final = ssl.VERIFY_X509_PARTIAL_CHAIN

_running = threading.local()


class Exchange:
    """A request and its answer. As a context, in its thread: the one whose connections tell of their sockets."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # A duplicate: the TLS socket takes the descriptor of the plain one away during the handshake.
        self._handle: socket.socket | None = None
        self._aborted = False

    def __enter__(self) -> Self:
        _running.exchange = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _running.exchange = None

    def use(self, descriptor: int) -> None:
        """Note the socket in use.

        Raises:
          ConnectionAbortedError: the request was broken off.
        """
        with self._lock:
            self._drop()
            if self._aborted:
                raise ConnectionAbortedError("the request was broken off")
            self._handle = socket.socket(fileno=os.dup(descriptor))

    def abort(self) -> None:
        """Break the request off: whatever its thread waits for fails at once. From any thread, at any time."""
        with self._lock:
            self._aborted = True
            if self._handle is not None:
                with contextlib.suppress(OSError):
                    self._handle.shutdown(socket.SHUT_RDWR)

    def finish(self) -> None:
        """Let go of the socket: from now on it belongs to the next request, or is closed."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None


async def in_thread(
    exchange: Exchange, work: Callable[[], T], name: str, limiter: trio.CapacityLimiter
) -> T:
    """Run a part of an exchange in a thread.

    Args:
      work: blocks on sockets that *exchange* knows of, and returns its errors.

    Cancellation: breaks *exchange* off and waits for the thread, which only the resolver of names can make long.
    """
    ended = False

    async def abort_if_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if not ended:
                exchange.abort()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(abort_if_cancelled)
        result = await trio.to_thread.run_sync(work, thread_name=name, limiter=limiter)
        ended = True
        nursery.cancel_scope.cancel()
    return result


def bare_host(host: str) -> str:
    """Return a proxy's host without the brackets that its URL has around an IPv6 address."""
    return host.removeprefix("[").removesuffix("]")


def _connected_socket(connection: HTTPConnection, host: str, port: int) -> socket.socket:
    """Connect as urllib3 does (util/connection.py), but tell the exchange of the socket first."""
    exchange: Exchange = _running.exchange
    host = bare_host(host)
    failure: OSError = OSError("the name has no address")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise NewConnectionError(connection, f"cannot look up {host}: {error}") from error
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        try:
            for option in _SOCKET_OPTIONS:
                sock.setsockopt(*option)
            exchange.use(sock.fileno())
            sock.settimeout(CONNECT_TIMEOUT_S)
            sock.connect(address)
        except OSError as error:
            sock.close()
            failure = error
        else:
            return sock
    raise NewConnectionError(connection, f"cannot connect to {host}:{port}: {failure}") from failure


class _PlainConnection(HTTPConnection):
    def _new_conn(self) -> socket.socket:
        return _connected_socket(self, self._dns_host, self.port)

    def putrequest(
        self, method: str, url: str, skip_host: bool = False, skip_accept_encoding: bool = False
    ) -> None:
        if self.sock is not None:
            _running.exchange.use(self.sock.fileno())
        super().putrequest(method, url, skip_host, skip_accept_encoding)


class _TlsConnection(_PlainConnection, HTTPSConnection):
    def connect(self) -> None:
        # Made for each connection: certificates that were renewed in place are read again. The flags leave
        # VERIFY_X509_STRICT out, which fails CAs of existing installations.
        context = create_urllib3_context(
            cert_reqs=resolve_cert_reqs(self.cert_reqs), verify_flags=VERIFY_FLAGS
        )
        if not (self.ca_certs or self.ca_cert_data):
            context.load_default_certs()
        self.ssl_context = context
        super().connect()


class _PlainPool(HTTPConnectionPool):
    ConnectionCls: Any = _PlainConnection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls: Any = _TlsConnection


def install(manager: PoolManager) -> None:
    """Have all connections that *manager* makes belong to exchanges."""
    classes: Any = {"http": _PlainPool, "https": _TlsPool}
    manager.pool_classes_by_scheme = classes
