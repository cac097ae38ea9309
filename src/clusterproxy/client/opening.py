"""Opens tunnels."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Literal

import trio

from clusterproxy import __version__
from clusterproxy.errors import ConfigError
from clusterproxy.grpc.metadata import is_sendable
from clusterproxy.telemetry.client_metrics import ClientMetrics

from .access import Credentials, Server
from .connect_tunnel import ConnectTunnel
from .grpc_tunnel import GrpcTunnel
from .tunnel import Tunnel, TunnelConfig

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator

    from .access import ClientTLS


@contextlib.asynccontextmanager
async def open_tunnel(
    server: str | Server,
    *,
    mode: Literal["grpc", "http-connect"] = "grpc",
    tls: ClientTLS | ssl.SSLContext | None = None,
    reusable: bool = True,
    connect_timeout: float = 20.0,
    dial_timeout: float = 30.0,
    keepalive: float | None = None,
    user_agent: str = "",
    metrics: ClientMetrics | None = None,
) -> AsyncGenerator[Tunnel]:
    """Open a way to services through a proxy server, for as long as the block runs.

    The connection to the server is made on entering, and made again whenever a dial finds that it was
    lost. Leaving the block ends every stream. An exception of the block leaves it as it is, in no group.

    Args:
      server: ``HOST:PORT``, or ``unix:///PATH``.
      mode: what the server was started with. Over gRPC all streams share one connection.
      tls: files, or a context; its ALPN protocols are set here. None is for Unix sockets, and for ports
        that something else secures.
      reusable: whether there may be several dials, at once or one after the other. A single-use tunnel
        ends with its stream.
      connect_timeout: seconds for everything up to a usable connection.
      dial_timeout: seconds for a dial; ``trio.fail_after`` around a dial can shorten it.
      keepalive: seconds of silence before the server is asked whether it still lives. By default it is
        5 if the server is clusterproxy's; a Go server allows no less than 300.
      user_agent: put before the library's own.
      metrics: where to count; tunnels may share it.

    Raises:
      ConnectError: the server cannot be used; it says why, and what to do.
      ConfigError: the arguments, or a file that they name, cannot be used.

    Cancellation: ends every stream at once.
    """
    where = Server.parse(server) if isinstance(server, str) else server
    if mode not in ("grpc", "http-connect"):
        raise ConfigError("mode", f"mode must be grpc or http-connect, not {mode!r}")
    if not is_sendable(user_agent):
        raise ConfigError("user_agent", "user_agent must be printable ASCII: it becomes a header")
    alpn = ("h2",) if mode == "grpc" else ("http/1.1",)
    config = TunnelConfig(
        server=where,
        credentials=None if tls is None else Credentials(tls, where, alpn),
        reusable=reusable,
        connect_timeout_s=connect_timeout,
        dial_timeout_s=dial_timeout,
        keepalive_s=keepalive,
        user_agent=f"{user_agent} clusterproxy/{__version__}".strip(),
        metrics=metrics or ClientMetrics(),
    )
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        tunnel = GrpcTunnel(config, nursery) if mode == "grpc" else ConnectTunnel(config)
        try:
            await tunnel.connect()
            yield tunnel
        except BaseException as error:
            # Raised below, where no nursery makes a group of it.
            failure = error
        tunnel.end()
        # Where somebody outside has cancelled, too: the tasks here would raise that, and nobody would see the failure.
        nursery.cancel_scope.shield = True
        nursery.cancel_scope.cancel()
    if failure is not None:
        try:
            raise failure
        finally:
            del failure
