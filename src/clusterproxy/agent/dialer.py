"""Connects to a proxy server: TCP or a proxy, TLS, HTTP/2, and the Connect call."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy import __version__
from clusterproxy.errors import ClusterProxyError
from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.limits import Growth, Http2Limits
from clusterproxy.rpc.channel import start_call
from clusterproxy.rpc.keepalive import BETWEEN_OURS
from clusterproxy.transport.stream import Transport, tune
from clusterproxy.tunnel.extension import offer

from .dial import dial
from .dialtext import join_host_port
from .proxyenv import connect_via_proxy, proxy_for
from .session import Session

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncGenerator

    from clusterproxy.grpc import Metadata
    from clusterproxy.transport.reload import ReloadingContext

    from .state import AgentState

_log = logging.getLogger("clusterproxy.agent")

USER_AGENT: Final = f"clusterproxy/{__version__}"

# One stream carries everything that goes to this cluster.
_WINDOW: Final = 4 * 1024 * 1024

_PATH: Final = "/AgentService/Connect"

# For everything up to the server's headers. grpc-go gives 20 s to connect and waits for ever then.
_CONNECT_TIMEOUT_S: Final = 20.0


class ServerUnreachable(ClusterProxyError):
    """No session could be opened to a server."""


class ServerDialer:
    """Opens sessions to the servers of one agent.

    Attributes:
      connections: those that are open, for keepalive.
    """

    def __init__(self, state: AgentState, tls: ReloadingContext) -> None:
        self._state = state
        self._tls = tls
        self._limits = Http2Limits(
            window=_WINDOW,
            growth=Growth(state.config.total_buffer_bytes // 2),
            max_message_size=state.config.max_message_bytes,
        )
        self.connections: set[Http2Connection] = set()

    @contextlib.asynccontextmanager
    async def open_session(self, host: str, port: int) -> AsyncGenerator[Session]:
        """Connect and greet; the session's connection is closed on leaving.

        Raises:
          OSError, ClusterProxyError, trio.TooSlowError, trio.BrokenResourceError: no session.
        """
        with trio.fail_after(_CONNECT_TIMEOUT_S) as limit:
            transport = await self._connect(host, port)
            connection = Http2Connection(transport, client=True, limits=self._limits)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(connection.run)
                self.connections.add(connection)
                try:
                    await trio.lowlevel.checkpoint()
                    call = start_call(
                        connection,
                        _PATH,
                        authority=host,
                        secure=True,
                        metadata=self._metadata(),
                        user_agent=USER_AGENT,
                    )
                    session = Session(self._state, call)
                    await session.greet()
                    if session.extended and "keepalive-time" not in self._state.config.given:
                        connection.keepalive = BETWEEN_OURS
                    limit.deadline = float("inf")
                    yield session
                finally:
                    self.connections.discard(connection)
                    nursery.cancel_scope.cancel()

    async def _connect(self, host: str, port: int) -> Transport:
        sock = await self._connect_tcp(host, port)
        tune(sock, user_timeout=True)
        transport = Transport(sock, self._tls.current(), server_hostname=host)
        try:
            await transport.handshake()
            # As grpc-go: a server that selects no protocol is none of ours.
            if transport.tls is None or transport.tls.selected_alpn_protocol() is None:
                raise ServerUnreachable("missing selected ALPN property")  # noqa: TRY301
        except BaseException:
            transport.close()
            raise
        return transport

    async def _connect_tcp(self, host: str, port: int) -> socket.socket:
        proxy = proxy_for(host, port, self._state.config.proxy_environment)
        resolver = self._state.resolver
        timeout = _CONNECT_TIMEOUT_S
        if proxy is None:
            return await dial(
                "tcp", join_host_port(host, port), timeout_s=timeout, resolver=resolver
            )
        sock = await dial("tcp", proxy.address, timeout_s=timeout, resolver=resolver)
        try:
            await connect_via_proxy(sock, host, port, proxy, user_agent=USER_AGENT)
        except BaseException:
            sock.close()
            raise
        return sock

    def _metadata(self) -> Metadata:
        config = self._state.config
        metadata: Metadata = {
            "agentid": [config.agent_id],
            "agentidentifiers": [config.agent_identifiers],
            **offer(),
        }
        path = config.service_account_token_path
        if path:
            # Anew for each connection: tokens are rotated.
            token = Path(path).read_text(encoding="utf-8")
            metadata["authorization"] = [f"Bearer {token}"]
        return metadata
