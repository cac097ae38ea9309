"""The way from the user server to the proxy servers: few connections, which all requests share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from clusterproxy import __version__
from clusterproxy.client.access import ClientTLS, Credentials, Server
from clusterproxy.client.grpc_tunnel import GrpcTunnel
from clusterproxy.client.tunnel import TunnelConfig
from clusterproxy.errors import DialCause, DialError
from clusterproxy.telemetry.client_metrics import ClientMetrics

if TYPE_CHECKING:
    from clusterproxy.client.stream import TunnelStream

    from .config import UserServerConfig

# Several proxy servers stand behind one name, and an agent that has just started, or that has lost a connection, is with
# some of them only. Upstream connects anew for each request and so reaches another one now and then. We do so when a
# server has no agent, which anybody can bring about by naming a cluster that is none: hence so few, and so seldom.
_WAYS: Final = 3
_SEARCH_S: Final = 10.0

_CONNECT_TIMEOUT_S: Final = 20.0
# The Go client's backstop.
_DIAL_TIMEOUT_S: Final = 30.0


class ProxyServers:
    """Dials through any of the proxy servers behind one address; connections are made when they are needed.

    Args:
      nursery: for everything that lives as long as the program.

    Raises:
      ConfigError: a certificate, key or CA file cannot be used.
    """

    def __init__(self, config: UserServerConfig, nursery: trio.Nursery) -> None:
        server = Server(host=config.host.removeprefix("[").removesuffix("]"), port=config.port)
        tls = ClientTLS(ca_cert=config.proxy_ca_cert, cert=config.proxy_cert, key=config.proxy_key)
        self._config = TunnelConfig(
            server=server,
            credentials=Credentials(tls, server, ("h2",)),
            reusable=True,
            connect_timeout_s=_CONNECT_TIMEOUT_S,
            dial_timeout_s=_DIAL_TIMEOUT_S,
            keepalive_s=None,
            user_agent=f"user-server clusterproxy/{__version__}",
            metrics=ClientMetrics(),
            # Whoever holds all places of a connection keeps nobody waiting.
            spread=True,
        )
        self._nursery = nursery
        self._ways: list[GrpcTunnel] = []
        self._searched = -_SEARCH_S

    async def dial(self, address: str) -> TunnelStream:
        """Connect to *address* as the agent sees it whose host it is.

        Raises:
          DialError: none of the servers that were tried has the agent, or it failed for another reason.

        Cancellation: as of :meth:`~clusterproxy.client.tunnel.Tunnel.dial`.
        """
        failure: DialError | None = None
        for number in range(_WAYS):
            if number == len(self._ways):
                self._ways.append(GrpcTunnel(self._config, self._nursery))
            try:
                return await self._ways[number].dial(address)
            except DialError as error:
                if error.cause is not DialCause.NO_AGENT:
                    # Where the last one says no more than that it cannot be reached, the first one knew better.
                    raise failure or error from None
                failure = failure or error
        self._search()
        assert failure is not None  # noqa: S101  there is at least one way
        raise failure

    def _search(self) -> None:
        """Have the last way lead to another server next time, if there was no such attempt lately."""
        now = trio.current_time()
        if now - self._searched >= _SEARCH_S:
            self._searched = now
            self._ways[-1].renew()

    def renew(self) -> None:
        """Use connections with the certificates as they are now; what is open goes on with the old ones."""
        for way in self._ways:
            way.renew()
