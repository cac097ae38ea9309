"""The proxy agent program: certificates, sessions, probes, shutdown."""

from __future__ import annotations

import contextlib
import logging
import signal
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.errors import ConfigError
from clusterproxy.rpc.keepalive import keep_alive
from clusterproxy.telemetry.admin import agent_admin_handler, agent_health_handler
from clusterproxy.telemetry.agent_metrics import AgentMetrics
from clusterproxy.telemetry.listener import serve_http_socket
from clusterproxy.transport.listener import accept_forever, listen_tcp
from clusterproxy.transport.reload import ReloadingContext
from clusterproxy.transport.tls import client_context
from clusterproxy.tunnel.budget import Budget

from .dialer import ServerDialer
from .resolver import Resolver
from .servers import Servers
from .state import AgentState, PacketCounters

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, AsyncIterator

    from .config import AgentConfig
    from .leases import LeaseCount

_log = logging.getLogger("clusterproxy.agent")

# A Go server punishes PINGs that come oftener than every 30 s (its EnforcementPolicy.MinTime).
_DEFAULT_KEEPALIVE_S: Final = 33.0
# grpc-go's clients never PING oftener (internal.KeepaliveMinPingTime).
_MIN_KEEPALIVE_S: Final = 10.0


def _keepalive_s(config: AgentConfig) -> float:
    # Upstream's default of an hour notices a frozen server after an hour.
    if "keepalive-time" in config.given:
        return max(_MIN_KEEPALIVE_S, config.keepalive_time_s)
    return _DEFAULT_KEEPALIVE_S


def _contexts(config: AgentConfig, metrics: AgentMetrics) -> ReloadingContext:
    flags = {"cert": "agent-cert", "key": "agent-key", "ca": "ca-cert"}
    if not config.ca_cert:
        raise ConfigError("ca-cert", "failed to load CA cert: --ca-cert must be set")

    def factory() -> ssl.SSLContext:
        try:
            return client_context(
                ca=config.ca_cert,
                cert=config.agent_cert or None,
                key=config.agent_key or None,
                alpn=[*config.alpn_protos, *({"h2"} - set(config.alpn_protos))],
            )
        except ConfigError as error:
            raise ConfigError(flags.get(error.field, error.field), error.message) from error

    def on_reload(result: str) -> None:
        metrics.certificate_reload_total.labels(result).inc()
        note_expiry()

    def note_expiry() -> None:
        not_after = contexts.not_after()
        if not_after is not None:
            metrics.certificate_expiry_seconds.labels(config.agent_cert).set(not_after)

    files = [file for file in (config.ca_cert, config.agent_cert, config.agent_key) if file]
    contexts = ReloadingContext(
        factory, files, certificate=config.agent_cert or None, on_reload=on_reload
    )
    note_expiry()
    return contexts


async def run_agent(config: AgentConfig) -> int:
    """Run a proxy agent until it is told to end by SIGINT or SIGTERM; return its exit status.

    The first signal drains: servers are told to choose other agents, what is open goes on. The agent
    ends at the second signal, or when nothing was seen for ten seconds.

    Raises:
      ConfigError: a file does not load, an address cannot be used, or leases are to be counted and there
        is no way to Kubernetes.
    """
    metrics = AgentMetrics()
    async with _lease_count(config, metrics) as leases:
        return await _run(config, metrics, leases)


@contextlib.asynccontextmanager
async def _lease_count(
    config: AgentConfig, metrics: AgentMetrics
) -> AsyncGenerator[LeaseCount | None]:
    if not config.count_server_leases:
        yield None
        return
    # Not before it is needed: the official client takes more memory than the rest of the program.
    from clusterproxy.kube.client import open_kube_api

    from .leases import LeaseCount

    async with open_kube_api(config.kubeconfig) as api:
        yield LeaseCount(api, config, metrics)


async def _run(config: AgentConfig, metrics: AgentMetrics, leases: LeaseCount | None) -> int:
    tls = _contexts(config, metrics)
    state = AgentState(
        config=config,
        metrics=metrics,
        budget=Budget(each=config.connection_buffer_bytes, total=config.total_buffer_bytes),
        resolver=Resolver(),
        data_packets=PacketCounters(metrics),
    )
    dialer = ServerDialer(state, tls)
    servers = Servers(state, dialer, leases)
    health = agent_health_handler(metrics, lambda: servers.connected)
    admin = agent_admin_handler(
        health_port=config.health_server_port, enable_profiling=config.enable_profiling
    )
    with contextlib.ExitStack() as opened:
        probes = [
            (
                opened.enter_context(
                    listen_tcp(
                        config.health_server_host, config.health_server_port, "health-server-port"
                    )
                ),
                partial(serve_http_socket, health),
            ),
            (
                opened.enter_context(
                    listen_tcp(
                        config.admin_bind_address, config.admin_server_port, "admin-server-port"
                    )
                ),
                partial(serve_http_socket, admin),
            ),
        ]
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as process:
                for listener, serve in probes:
                    process.start_soon(accept_forever, listener, serve, process)
                process.start_soon(tls.watch)
                process.start_soon(keep_alive, dialer.connections, _keepalive_s(config))
                if leases is not None:
                    process.start_soon(leases.run)
                process.start_soon(servers.sync)
                await anext(signals)
                _log.info("draining", extra={"agent_id": config.agent_id})
                await _drain(servers, signals)
                process.cancel_scope.cancel()
    _log.info("stopped", extra={"agent_id": config.agent_id})
    return 0


async def _drain(servers: Servers, signals: AsyncIterator[int]) -> None:
    async with trio.open_nursery() as nursery:

        async def second_signal() -> None:
            await anext(signals)
            nursery.cancel_scope.cancel()

        nursery.start_soon(second_signal)
        await servers.drain()
        nursery.cancel_scope.cancel()
