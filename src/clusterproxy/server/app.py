"""The proxy server program: listeners, certificates, shutdown."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, Never

import attrs
import trio

from clusterproxy.errors import ConfigError
from clusterproxy.http2.limits import Growth, Http2Limits
from clusterproxy.rpc.keepalive import keep_alive
from clusterproxy.rpc.server import RpcServer
from clusterproxy.telemetry.admin import server_admin_handler, server_health_handler
from clusterproxy.telemetry.listener import serve_http_socket
from clusterproxy.telemetry.server_metrics import ServerMetrics
from clusterproxy.transport.listener import Handshakes, accept_forever, listen_tcp, listen_unix
from clusterproxy.transport.reload import ReloadingContext
from clusterproxy.transport.stream import Transport, tune
from clusterproxy.transport.tls import server_context
from clusterproxy.tunnel.budget import Budget

from .agent_identity import ClientCheck, identified_opener
from .backend import backend_opener
from .backends import BackendPool
from .connect import ConnectTunnel
from .farewell import take_leave
from .frontend import frontend_opener
from .leases import ServerLease
from .state import PacketCounters, ServerState
from .status import status_route
from .token_authentication import TokenReviews, authenticated_opener, end_strangers

if TYPE_CHECKING:
    import socket
    import ssl
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator

    from clusterproxy.kube.api import KubeApi

    from .config import ServerConfig

_log = logging.getLogger("clusterproxy.server")

# How often queues at rest are held against a budget that others have made smaller.
_LOOK_S: Final = 5.0

# At the end of a server: who has just connected is about to ask for something.
_IDLE_S: Final = 1.0

# What grpc-go's servers make of no keepalive time, and of a very short one.
_DEFAULT_KEEPALIVE_S: Final = 2 * 3600.0
_MIN_KEEPALIVE_S: Final = 1.0

# An agent has one stream on its connection, which carries everything that comes from its cluster.
_AGENT_STREAMS: Final = 100
_AGENT_WINDOW: Final = 4 * 1024 * 1024

_PROXY: Final = "/ProxyService/Proxy"
_CONNECT: Final = "/AgentService/Connect"


def _keepalive_s(interval_s: float) -> float:
    # grpc-go: internal/transport/http2_server.go, NewServerTransport, and server.go, KeepaliveParams.
    return max(_MIN_KEEPALIVE_S, interval_s) if interval_s else _DEFAULT_KEEPALIVE_S


class ProxyServer:
    """One proxy server: what its listeners share.

    Args:
      api: there if the configuration needs one.

    Raises:
      ConfigError: a certificate, key or CA file does not load.
    """

    def __init__(self, config: ServerConfig, api: KubeApi | None = None) -> None:
        self.config = config
        self.metrics = ServerMetrics()
        self.state = ServerState(
            config=config,
            metrics=self.metrics,
            pool=BackendPool(config.proxy_strategies, self.metrics),
            budget=Budget(each=config.connection_buffer_bytes, total=config.total_buffer_bytes),
            data_packets=PacketCounters(self.metrics),
        )
        limits = Http2Limits(
            growth=Growth(config.total_buffer_bytes // 2),
            max_streams=config.max_concurrent_streams,
            max_header_list=config.max_header_list_bytes,
            max_message_size=config.max_message_bytes,
            max_resets_per_s=config.max_resets_per_s,
            max_control_frames_per_s=config.max_control_frames_per_s,
        )
        self.frontends = RpcServer(
            {_PROXY: frontend_opener(self.state)},
            limits=limits,
            on_limit=self._count_limit,
            peers="a client",
        )
        self._client_check = ClientCheck(self.state)
        open_backend = backend_opener(self.state)
        if config.authenticates_agents:
            assert api is not None  # noqa: S101  whoever asks for the one brings the other
            open_backend = authenticated_opener(self.state, TokenReviews(api, config))
        self.lease: ServerLease | None = None
        if config.enable_lease_controller:
            assert api is not None  # noqa: S101
            self.lease = ServerLease(api, config, self.metrics)
        self.agents = RpcServer(
            {_CONNECT: identified_opener(self.state, open_backend)},
            limits=attrs.evolve(limits, max_streams=_AGENT_STREAMS, window=_AGENT_WINDOW),
            on_limit=self._count_limit,
            peers="an agent",
        )
        self.draining = False
        self._clients = 0
        self._tunnels: set[ConnectTunnel] = set()
        self._idle = trio.Event()
        self._handshakes = Handshakes(
            config.max_handshakes,
            self.metrics.handshakes_in_flight.set,
            lambda reason: self.metrics.handshake_failures_total.labels(reason).inc(),
        )
        self._agent_tls = self._contexts("cluster", ["h2"])
        # Upstream turns HTTP/2 off for CONNECT (TLSNextProto).
        alpn = ["h2"] if config.mode == "grpc" else ["http/1.1"]
        self._client_tls = None if config.uds_name else self._contexts("server", alpn)

    def _count_limit(self, limit: str) -> None:
        self.metrics.limit_exceeded_total.labels(limit).inc()

    def _contexts(self, side: str, alpn: list[str]) -> ReloadingContext:
        config = self.config
        cert, key, ca = (getattr(config, f"{side}_{name}") for name in ("cert", "key", "ca_cert"))
        if not cert:
            raise ConfigError(f"{side}-cert", f"--{side}-cert and --{side}-key must be set")

        def factory() -> ssl.SSLContext:
            try:
                return server_context(
                    cert=cert,
                    key=key,
                    client_ca=ca or None,
                    min_version=config.tls_min_version,
                    cipher_suites=config.cipher_suites,
                    alpn=alpn,
                )
            except ConfigError as error:
                # The flag is named as the operator knows it.
                field = {"cert": "cert", "key": "key"}.get(error.field, "ca-cert")
                raise ConfigError(f"{side}-{field}", error.message) from error

        def on_reload(result: str) -> None:
            self.metrics.certificate_reload_total.labels(result).inc()
            self._note_expiry(cert, contexts)

        files = [file for file in (cert, key, ca) if file]
        contexts = ReloadingContext(factory, files, certificate=cert, on_reload=on_reload)
        self._note_expiry(cert, contexts)
        return contexts

    def _note_expiry(self, cert: str, contexts: ReloadingContext) -> None:
        not_after = contexts.not_after()
        if not_after is not None:
            self.metrics.certificate_expiry_seconds.labels(cert).set(not_after)

    def ready(self) -> tuple[bool, str]:
        """Whether dials can be served, and what to say if not."""
        if self.draining:
            return False, "shutting down"
        return self.state.pool.ready, "no connection to any proxy agent"

    # -- connections -------------------------------------------------------------------------------

    async def serve_agent(self, sock: socket.socket) -> None:
        """Serve one accepted connection of an agent."""
        transport = await self._handshakes.shake(sock, self._agent_tls.current())
        if transport is not None:
            await self._serve_rpc(self.agents, transport)

    async def _serve_rpc(self, server: RpcServer, transport: Transport) -> None:
        if transport.tls is not None and transport.tls.selected_alpn_protocol() != "h2":
            transport.close()
            self.metrics.handshake_failures_total.labels("alpn").inc()
            _log.info("TLS handshake failed: the peer does not offer h2")
            return
        tune(transport.sock, user_timeout=True)
        await server.serve(transport)

    async def serve_client(self, sock: socket.socket) -> None:
        """Serve one accepted connection of a client."""
        with self._counted():
            context = None if self._client_tls is None else self._client_tls.current()
            transport = await self._handshakes.shake(sock, context)
            if transport is None:
                return
            if not self._client_check.admits(transport):
                transport.close()
            elif self.config.mode == "grpc":
                await self._serve_rpc(self.frontends, transport)
            else:
                tunnel = ConnectTunnel(self.state, transport)
                self._tunnels.add(tunnel)
                try:
                    await tunnel.run()
                finally:
                    self._tunnels.discard(tunnel)

    @contextlib.contextmanager
    def _counted(self) -> Generator[None]:
        self._clients += 1
        try:
            yield
        finally:
            self._clients -= 1
            if self.draining and not self._clients:
                self._idle.set()

    # -- life --------------------------------------------------------------------------------------

    async def maintain(self) -> None:
        """Keep certificates fresh and connections alive, until cancelled."""
        config = self.config
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._look_at_queues)
            nursery.start_soon(self._agent_tls.watch)
            if self._client_tls is not None:
                nursery.start_soon(self._client_tls.watch)
            if config.authenticates_agents:
                nursery.start_soon(end_strangers, self.agents.connections, self.state.pool)
            for server, interval_s in (
                (self.agents, config.keepalive_time_s),
                (self.frontends, config.frontend_keepalive_time_s),
            ):
                nursery.start_soon(keep_alive, server.connections, _keepalive_s(interval_s))

    async def _look_at_queues(self) -> None:
        while True:
            await trio.sleep(_LOOK_S)
            self.state.look_at_queues()

    async def drain(self) -> None:
        """Take no more calls, and wait for those that are open while agents go to other servers."""
        self.draining = True
        self.state.arrivals.close()
        if not self._clients:
            return
        self.frontends.drain()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                take_leave,
                self.state.pool,
                self.frontends.connections,
                self.config.graceful_shutdown_timeout_s,
            )
            nursery.start_soon(self._part_from_idle)
            await self._idle.wait()
            nursery.cancel_scope.cancel()

    async def _part_from_idle(self) -> Never:
        """End connections without a request, as GOAWAY does for gRPC: HTTP/1.1 has no word for it."""
        await trio.sleep(_IDLE_S)
        while True:
            for tunnel in list(self._tunnels):
                tunnel.part_from_idle(_IDLE_S)
            await trio.sleep(_IDLE_S / 4)


@contextlib.contextmanager
def _unlinked(path: str) -> Generator[None]:
    """Remove our Unix socket at the end, but not the one of a server that has taken over meanwhile."""
    ours = _identity(path)
    try:
        yield
    finally:
        if ours is not None and _identity(path) == ours:
            Path(path).unlink(missing_ok=True)


def _identity(path: str) -> tuple[int, int, int] | None:
    """Return what tells a file from a later one of the same path, None if there is none.

    Not the number of the inode alone: that of a file that was removed is given to the next one.
    """
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


@contextlib.asynccontextmanager
async def _kube_api(config: ServerConfig) -> AsyncGenerator[KubeApi | None]:
    if not config.needs_kubernetes:
        yield None
        return
    # Not before it is needed: the official client takes more memory than the rest of the program.
    from clusterproxy.kube.client import open_kube_api

    async with open_kube_api(
        config.kubeconfig, qps=config.kubeconfig_qps, burst=config.kubeconfig_burst
    ) as api:
        yield api


async def run_server(config: ServerConfig) -> int:
    """Run a proxy server until it is told to end by SIGINT or SIGTERM; return its exit status.

    The first signal starts a graceful end: not ready, no new connections, GOAWAY, no lease any more, and
    open tunnels go on for ``graceful_shutdown_timeout_s``. The second one ends it at once, with status 1.

    Raises:
      ConfigError: a file does not load, an address cannot be used, or Kubernetes is needed and there is
        no way to it.
    """
    async with _kube_api(config) as api:
        return await _listen(ProxyServer(config, api))


async def _listen(server: ProxyServer) -> int:
    config = server.config
    health = server_health_handler(server.metrics, server.ready)
    admin = server_admin_handler(
        server.metrics,
        enable_profiling=config.enable_profiling,
        status=status_route(server.state, server.ready),
    )
    listeners: list[tuple[socket.socket, Callable[[socket.socket], Awaitable[None]]]] = []
    with contextlib.ExitStack() as opened:
        if config.uds_name:
            client = listen_unix(config.uds_name, delete_existing=config.delete_existing_uds_file)
            opened.enter_context(_unlinked(config.uds_name))
        else:
            client = listen_tcp(config.server_bind_address, config.server_port, "server-port")
        listeners.append((opened.enter_context(client), server.serve_client))
        for host, port, flag, serve in (
            (config.agent_bind_address, config.agent_port, "agent-port", server.serve_agent),
            (
                config.health_bind_address,
                config.health_port,
                "health-port",
                partial(serve_http_socket, health),
            ),
            (
                config.admin_bind_address,
                config.admin_port,
                "admin-port",
                partial(serve_http_socket, admin),
            ),
        ):
            listeners.append((opened.enter_context(listen_tcp(host, port, flag)), serve))
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            return await _run(server, listeners, signals)


async def _run(
    server: ProxyServer,
    listeners: list[tuple[socket.socket, Callable[[socket.socket], Awaitable[None]]]],
    signals: AsyncIterator[int],
) -> int:
    config = server.config
    status = 0
    async with trio.open_nursery() as process:
        process.start_soon(server.maintain)
        if server.lease is not None:
            process.start_soon(server.lease.run)
        tunnels, probes = listeners[:2], listeners[2:]
        async with trio.open_nursery() as connections:
            for listener, serve in probes:
                # Until the very end: who looks after the process sees it drain.
                process.start_soon(accept_forever, listener, serve, process)
            async with trio.open_nursery() as accepting:
                for listener, serve in tunnels:
                    accepting.start_soon(accept_forever, listener, serve, connections)
                where = config.uds_name or f"port {config.server_port}"
                _log.info(
                    "serving %s clients on %s, agents on port %d",
                    config.mode,
                    where,
                    config.agent_port,
                    extra={"server_id": config.server_id},
                )
                await anext(signals)
                accepting.cancel_scope.cancel()
            if server.lease is not None:
                server.lease.release()
            _log.info("draining for up to %g s", config.graceful_shutdown_timeout_s)
            async with trio.open_nursery() as draining:

                async def force() -> None:
                    nonlocal status
                    await anext(signals)
                    status = 1
                    draining.cancel_scope.cancel()

                draining.start_soon(force)
                with trio.move_on_after(config.graceful_shutdown_timeout_s):
                    await server.drain()
                draining.cancel_scope.cancel()
            connections.cancel_scope.cancel()
        if server.lease is not None and not status:
            await server.lease.over.wait()
        process.cancel_scope.cancel()
    _log.info("stopped")
    return status
