"""A tunnel over gRPC: one HTTP/2 connection, and a stream of it for each dial."""

from __future__ import annotations

import logging
import random
from typing import TYPE_CHECKING, Final, Never

import trio

from clusterproxy.errors import ConnectError
from clusterproxy.http2.adapter import H2Error
from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.rpc.channel import start_call
from clusterproxy.rpc.keepalive import BETWEEN_OURS, TIMEOUT_S
from clusterproxy.tunnel.extension import offer

from .connecting import connect, local_address
from .failures import (
    closed_tunnel,
    going_away,
    lost_at_start,
    no_http2,
    timed_out_connect,
    unreached_server,
)
from .proxy_call import ProxyCall
from .tunnel import Progress, Tunnel, TunnelConfig

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from clusterproxy.transport.stream import Transport

    from .stream import TunnelStream

_log = logging.getLogger("clusterproxy.client")

_PATH: Final = "/ProxyService/Proxy"

# Of each stream. A smaller one makes smaller batches.
_WINDOW: Final = 4 * 1024 * 1024

# grpc-go servers end the connection of a client that PINGs more often than every five minutes, or
# without a stream (keepalive.EnforcementPolicy). A tenth more, for clocks differ.
_GO_KEEPALIVE_S: Final = 330.0
_LOOK_S: Final = 1.0

# Between attempts to reach the server again, when they fail: as grpc's, but with a lower end.
_FIRST_BACKOFF_S: Final = 0.2
_BACKOFF_FACTOR: Final = 1.6
_MAX_BACKOFF_S: Final = 10.0

# Before each new attempt where the last connection was ended in order before it was of use: what a
# server has not looked at is safe to try again (RFC 9113 §6.8), but not for ever.
_FAREWELL_PAUSES: Final = (0.05, 0.2)

# How often a dial looks again for a place among the streams that the server allows.
_RETRY_S: Final = 0.1


class GrpcTunnel(Tunnel):
    """See :func:`~clusterproxy.client.opening.open_tunnel`.

    Args:
      nursery: for everything that lives as long as the tunnel.
    """

    def __init__(self, config: TunnelConfig, nursery: trio.Nursery) -> None:
        super().__init__(config)
        self._nursery = nursery
        self._limits = Http2Limits(window=_WINDOW)
        self._current: Http2Connection | None = None
        self._connections: dict[Http2Connection, Transport] = {}
        self._calls: set[ProxyCall] = set()
        self._waiting: set[trio.CancelScope] = set()
        self._connecting = trio.Lock()
        self._attempts = 0
        self._failures = 0
        self._failure: ConnectError | None = None
        self._not_before = 0.0
        self._freed = trio.Event()
        nursery.start_soon(self._keep_alive)

    def _spawn(self, function: Callable[..., Awaitable[None]]) -> None:
        if not self._closing:
            self._nursery.start_soon(function)

    # -- the connection ----------------------------------------------------------------------------

    async def connect(self) -> None:
        if await self._ready_while_open() is None:
            raise closed_tunnel(self._config.server)

    async def _ready_while_open(self) -> Http2Connection | None:
        """As :meth:`_ready`; None if the tunnel is closed, be it meanwhile."""
        if self.closed:
            return None
        with trio.CancelScope() as scope:
            self._waiting.add(scope)
            try:
                connection = await self._ready()
            finally:
                self._waiting.discard(scope)
                self._check_done()
            if not self.closed:
                return connection
        return None

    async def _ready(self) -> Http2Connection:
        """Return a connection that takes streams, a new one if need be.

        Raises:
          ConnectError: there is none to be had.
        """
        attempts = self._attempts
        async with self._connecting:
            current = self._current
            if current is not None and not current.lost and not current.draining:
                return current
            if self._failure is not None and self._attempts != attempts:
                # Who waited for the same attempt has the same error.
                raise self._failure
            await trio.sleep(max(0.0, self._not_before - trio.current_time()))
            self._failure = None
            try:
                connection = await self._connect()
            except ConnectError as error:
                self._failure = error
                pause = min(_MAX_BACKOFF_S, _FIRST_BACKOFF_S * _BACKOFF_FACTOR**self._failures)
                self._failures += 1
                self._not_before = trio.current_time() + pause * random.uniform(0.8, 1.2)  # noqa: S311
                raise
            finally:
                self._attempts += 1
            self._failures = 0
            self._current = connection
            return connection

    async def _connect(self) -> Http2Connection:
        config = self._config
        with trio.move_on_after(config.connect_timeout_s):
            for pause in (*_FAREWELL_PAUSES, 0.0):
                connection = await self._open()
                if not connection.draining:
                    return connection
                # One of the last that this server has taken: the next one may go to another.
                await trio.sleep(pause)
            raise going_away(config.server)
        raise timed_out_connect(config.server, config.connect_timeout_s)

    async def _open(self) -> Http2Connection:
        """Return a new connection that the server has answered on; it may be draining already."""
        config = self._config
        transport = await connect(
            config.server,
            config.credentials,
            timeout_s=config.connect_timeout_s,
            user_timeout=True,
        )
        if transport.tls is not None and transport.tls.selected_alpn_protocol() != "h2":
            # As grpc-go.
            transport.close()
            raise no_http2(config.server, "it has not chosen it in TLS")
        connection = Http2Connection(transport, client=True, limits=self._limits)
        settled = trio.Event()
        self._nursery.start_soon(self._run, connection, transport, settled)
        try:
            # An answer means that this is HTTP/2, and that the client's certificate was accepted.
            await trio.lowlevel.checkpoint()
            connection.ping(settled.set)
            await settled.wait()
        except BaseException:
            connection.fail("cancelled")
            raise
        if connection.at_fault:
            raise no_http2(config.server, connection.lost or "")
        if connection.lost and not connection.draining:
            raise lost_at_start(config.server, connection.lost, tls=transport.secure)
        return connection

    async def _run(
        self, connection: Http2Connection, transport: Transport, settled: trio.Event
    ) -> None:
        self._connections[connection] = transport
        connection.on_idle = lambda: connection.fail("no longer needed")
        try:
            await connection.run()
        except* Exception:
            # A bug ends this connection, and neither the tunnel nor the program that uses it.
            _log.exception("bug on a connection")
        finally:
            del self._connections[connection]
            settled.set()
            if self._current is connection:
                self._current = None
                if not self._closing:
                    _log.info("connection to %s lost: %s", self._config.server, connection.lost)
            self._check_done()

    async def _keep_alive(self) -> Never:
        interval = self._config.keepalive_s or _GO_KEEPALIVE_S
        while True:
            await trio.sleep(_LOOK_S)
            now = trio.current_time()
            for connection in list(self._connections):
                if connection.streams or connection.keepalive is not None:
                    connection.check_alive(now, interval, TIMEOUT_S)

    def renew(self) -> None:
        """Let the next dial make a connection of its own; streams that are open go on.

        It is with the certificates as they are now, and may reach another server of the same name.
        """
        current, self._current = self._current, None
        if current is not None:
            current.announce_end()

    # -- dials -------------------------------------------------------------------------------------

    async def _dial(self, address: str, progress: Progress) -> TunnelStream:
        try:
            return await self._dial_over_any(address, progress)
        except ConnectError as error:
            if not self._config.reusable:
                self.end()
            raise unreached_server(address, error) from error

    async def _dial_over_any(self, address: str, progress: Progress) -> TunnelStream:
        farewells = 0
        while True:
            progress.connected = progress.asked = False
            connection = await self._ready_while_open()
            if connection is None:
                raise self._closed_error(address)
            progress.connected = True
            freed = self._freed
            dial = self._start(connection, address)
            if dial is not None:
                progress.asked = True
                stream = await dial.dial()
                if stream is not None:
                    return stream
            if not connection.lost and not connection.draining:
                # It takes no more streams for now.
                progress.asked = False
                if self._config.spread and connection.streams:
                    if self._current is connection:
                        self.renew()
                    continue
                with trio.move_on_after(_RETRY_S):
                    await freed.wait()
            elif farewells == len(_FAREWELL_PAUSES):
                raise going_away(self._config.server)
            else:
                await trio.sleep(_FAREWELL_PAUSES[farewells])
                farewells += 1

    def _start(self, connection: Http2Connection, address: str) -> ProxyCall | None:
        config = self._config
        try:
            call = start_call(
                connection,
                _PATH,
                authority=config.server.authority,
                secure=config.credentials is not None,
                metadata=offer(),
                user_agent=config.user_agent,
            )
        except (trio.ClosedResourceError, H2Error):
            return None

        def accepted() -> None:
            if config.keepalive_s is None:
                connection.keepalive = BETWEEN_OURS

        def over(ended: ProxyCall) -> None:
            self._calls.discard(ended)
            if not ended.refused:
                # What was refused had no place: others that were would only ask again, and it would wake itself.
                self._freed.set()
                self._freed = trio.Event()
            if not config.reusable and not ended.refused:
                self.end()
            self._check_done()

        dial = ProxyCall(
            call,
            address,
            local_address(self._connections[connection]),
            metrics=config.metrics,
            spawn=self._spawn,
            on_accepted=accepted,
            on_over=over,
        )
        self._calls.add(dial)
        return dial

    # -- the end -----------------------------------------------------------------------------------

    def end(self) -> None:
        if self._closing:
            return
        self._closing = True
        # Its traceback refers to us.
        self._failure = None
        for scope in self._waiting:
            scope.cancel()
        for call in list(self._calls):
            call.end()
        for connection in list(self._connections):
            connection.fail("the tunnel was closed")
        self._check_done()

    def _check_done(self) -> None:
        if self._closing and not self._calls and not self._connections and not self._waiting:
            self._done.set()
