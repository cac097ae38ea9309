"""A server of the reverse proxy: accepts, shakes hands, serves, and ends in order."""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import trio

from clusterproxy.transport.listener import Handshakes, accept_forever

from .hangup import HangupWatch
from .http1_server import Http1Connection
from .http2_server import Http2Server
from .limits import ServerLimits
from .observer import Observer
from .relay import Relay, bad_gateway

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from clusterproxy.transport.stream import Transport

    from .drain import Drain
    from .exchange import Answer, Decide, Forward, Request

_log = logging.getLogger("clusterproxy.proxy")

#: What a context must offer, in this order.
ALPN: Final = ("h2", "http/1.1")

# How often deadlines are looked at: one task for all connections.
_LOOK_S: Final = 1.0

# How often is seen whether all requests are over, while the server ends.
_PART_S: Final = 0.05


def _nothing(_: object) -> None:
    """Nobody wants to know."""


class ProxyServer:
    """Serves connections, however they come.

    Attributes:
      hangups: to be run.
    """

    def __init__(
        self,
        relay: Relay,
        context: Callable[[], ssl.SSLContext] | None,
        limits: ServerLimits,
        on_handshake_failure: Callable[[str], None],
    ) -> None:
        self._relay = relay
        self._context = context
        self._limits = limits
        self._handshakes = Handshakes(limits.max_handshakes, _nothing, on_handshake_failure)
        self.hangups = HangupWatch()
        self.http1: set[Http1Connection] = set()
        self.http2: set[Http2Server] = set()
        self._draining = False

    async def serve(self, sock: socket.socket) -> None:
        """Serve one connection."""
        peer = _peer_of(sock)
        transport = await self._handshakes.shake(
            sock, self._context() if self._context is not None else None
        )
        if transport is None:
            return
        tls = transport.tls
        if tls is not None and tls.selected_alpn_protocol() == "h2":
            await self.serve_http2(transport, peer)
        else:
            await self.serve_http1(transport, peer)

    async def serve_http1(self, transport: Transport, peer: str) -> None:
        """Serve a connection that has shaken hands. Cancellation: closes it at once."""
        connection = Http1Connection(
            transport, peer=peer, limits=self._limits, handle=self._relay.handle
        )
        fd = transport.sock.fileno()
        self.http1.add(connection)
        self.hangups.watch(fd, connection.hung_up)
        connection.on_close = lambda: self.hangups.forget(fd)
        if self._draining:
            connection.draining = True
        try:
            await connection.run()
        finally:
            self.http1.discard(connection)

    async def serve_http2(self, transport: Transport, peer: str) -> None:
        """Serve a connection that has shaken hands. Cancellation: closes it at once."""
        server = Http2Server(transport, peer=peer, limits=self._limits, handle=self._relay.handle)
        self.http2.add(server)
        try:
            if self._draining:
                server.drain()
            await server.run()
        finally:
            self.http2.discard(server)

    async def expire(self) -> None:
        """Close connections that have taken too long."""
        while True:
            await trio.sleep(_LOOK_S)
            now = trio.current_time()
            for connection in list(self.http1):
                if connection.deadline <= now:
                    connection.close()
            for server in list(self.http2):
                if server.deadline <= now and not server.busy:
                    server.expire()

    def drain(self) -> None:
        """Serve no more than what is under way."""
        self._draining = True
        for connection in list(self.http1):
            connection.drain()
        for server in list(self.http2):
            server.drain()

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer."""
        return any(connection.busy for connection in self.http1) or any(
            server.busy for server in self.http2
        )


async def serve_http(
    listeners: Sequence[socket.socket],
    *,
    context: Callable[[], ssl.SSLContext] | None,
    decide: Decide,
    fail: Callable[[Request, Forward, Exception], Answer] = bad_gateway,
    limits: ServerLimits | None = None,
    drain: Drain | None = None,
    observer: Observer | None = None,
    on_handshake_failure: Callable[[str], None] = _nothing,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until *drain* has ended.

    Args:
      listeners: listening sockets (``transport.listener.listen_tcp``), closed at the end.
      context: gives the TLS context for the next handshake (``ReloadingContext.current``), with :data:`ALPN`; None: no TLS,
        and HTTP/1.1 only.
      decide: says what becomes of each request.
      fail: says what the client is told when a request could not go on.

    Cancellation: closes everything at once.
    """
    server = ProxyServer(
        Relay(decide=decide, fail=fail, observer=observer or Observer()),
        context,
        limits or ServerLimits(),
        on_handshake_failure,
    )
    async with trio.open_nursery() as connections:
        connections.start_soon(server.hangups.run)
        connections.start_soon(server.expire)
        async with trio.open_nursery() as accepting:
            for listener in listeners:
                accepting.start_soon(accept_forever, listener, server.serve, connections)
            task_status.started()
            if drain is None:
                await trio.sleep_forever()
            else:
                await drain.wait_closing()
            accepting.cancel_scope.cancel()
        server.drain()
        assert drain is not None  # noqa: S101
        with trio.move_on_at(drain.deadline):
            while server.busy:  # noqa: ASYNC110  as Go's Shutdown
                await trio.sleep(_PART_S)
        connections.cancel_scope.cancel()


def _peer_of(sock: socket.socket) -> str:
    with suppress(OSError):
        name: Any = sock.getpeername()
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            # An IPv4 client of a socket for both.
            return str(name[0]).removeprefix("::ffff:")
    return ""
