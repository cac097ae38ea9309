"""What the hub's programs have in common: ports, signals, a lease, and the apiserver."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs
import trio

from clusterproxy.kube.client import open_kube_api
from clusterproxy.kube.events import EventRecorder
from clusterproxy.kube.leader import LeaderElection, LeadershipLost, make_identity
from clusterproxy.telemetry.admin import metrics_handler, probe_handler
from clusterproxy.telemetry.controller_metrics import ControllerMetrics
from clusterproxy.telemetry.listener import serve_http_socket
from clusterproxy.transport.listener import accept_forever, listen_tcp

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Sequence

    from clusterproxy.http1 import Handler
    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.resource import Resource

    from .config import BindAddress

_log = logging.getLogger("clusterproxy.addon")


@attrs.frozen(kw_only=True)
class Lease:
    """The lease that only one of several replicas has."""

    namespace: str
    name: str


@attrs.frozen(kw_only=True)
class Hub:
    """What a program works with."""

    api: KubeApi
    events: EventRecorder
    metrics: ControllerMetrics


async def run_on_hub(
    component: str,
    work: Callable[[Hub], Awaitable[None]],
    *,
    kubeconfig: str,
    qps: float,
    burst: int,
    lease: Lease | None,
    ports: dict[str, tuple[BindAddress, str]],
) -> int:
    """Run *work* until SIGINT or SIGTERM, or until the lease is lost; return the exit status.

    *ports* has ``metrics`` and ``health``, each with the flag that names it.

    Raises:
      ConfigError: the kubeconfig or an address cannot be used.
    """
    metrics = ControllerMetrics()

    def count(verb: str, _resource: Resource, status: int, _seconds: float) -> None:
        metrics.rest_client_requests_total.labels(str(status or "<error>"), verb, "").inc()

    handlers = {"metrics": metrics_handler(metrics), "health": probe_handler()}
    with contextlib.ExitStack() as opened:
        listeners = [
            (opened.enter_context(listen_tcp(address.host, address.port, flag)), handlers[name])
            for name, (address, flag) in ports.items()
            if address.port
        ]
        async with open_kube_api(kubeconfig, qps=qps, burst=burst, on_request=count) as api:
            hub = Hub(api=api, events=EventRecorder(api, component=component), metrics=metrics)
            return await _run(hub, work, listeners, lease)


async def _run(
    hub: Hub,
    work: Callable[[Hub], Awaitable[None]],
    listeners: Sequence[tuple[socket.socket, Handler]],
    lease: Lease | None,
) -> int:
    status = 0
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as process:

            async def lead() -> None:
                nonlocal status
                try:
                    await _lead(hub, work, lease)
                except LeadershipLost as error:
                    # As the original: whoever leads now must not be disturbed by what is half done here.
                    _log.error("leadership lost: %s", error)
                    status = 1
                    process.cancel_scope.cancel()

            for listener, handler in listeners:
                process.start_soon(
                    accept_forever, listener, partial(serve_http_socket, handler), process
                )
            process.start_soon(hub.events.run)
            process.start_soon(lead)
            await anext(signals)
            _log.info("stopping")
            process.cancel_scope.cancel()
    _log.info("stopped")
    return status


async def _lead(hub: Hub, work: Callable[[Hub], Awaitable[None]], lease: Lease | None) -> None:
    if lease is None:
        await work(hub)
        return
    gauge = hub.metrics.leader_election_master_status.labels(lease.name)
    gauge.set(0)

    async def leading() -> None:
        gauge.set(1)
        await work(hub)

    await LeaderElection(
        hub.api,
        namespace=lease.namespace,
        name=lease.name,
        identity=make_identity(),
        events=hub.events,
    ).run(leading)


def own_namespace(given: str) -> str:
    """Return the namespace of this pod: as the environment says, else as its service account does."""
    if given:
        return given
    with contextlib.suppress(OSError), open(_NAMESPACE_FILE, encoding="utf-8") as file:
        return file.read().strip()
    return ""


_NAMESPACE_FILE: Final = os.path.join("/var/run/secrets/kubernetes.io/serviceaccount", "namespace")
