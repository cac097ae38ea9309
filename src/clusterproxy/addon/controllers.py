"""``controllers``: keeps the serving certificate that all service proxies share, beside the user server."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Never

import trio

from clusterproxy.kube.controller import Controller
from clusterproxy.kube.reflector import Reflector
from clusterproxy.kube.resource import SECRETS

from .configuration import SERVICE_PROXY_SECRET
from .contention import Contention
from .hub_objects import service_proxy_leaf
from .leaves import ensure_leaf
from .objects import find
from .program import Hub, Lease, own_namespace, run_on_hub
from .signer import Signer

if TYPE_CHECKING:
    from .config import ControllersConfig

_log = logging.getLogger("clusterproxy.addon")

#: The lease's name is the original's.
LEASE: Final = "cluster-proxy-service-proxy"

_RESYNC_S: Final = 600.0


async def run_controllers(config: ControllersConfig) -> int:
    """Run until SIGINT or SIGTERM, or until the lease is lost; return the exit status.

    Raises:
      ConfigError: the kubeconfig or an address cannot be used.
    """
    namespace = own_namespace(config.pod_namespace) or config.certificates_namespace
    return await run_on_hub(
        LEASE,
        lambda hub: ServiceProxyCertificate(hub, config).run(),
        kubeconfig=config.kubeconfig,
        qps=20.0,
        burst=30,
        lease=Lease(namespace=namespace, name=LEASE) if config.enable_leader_election else None,
        ports={
            "metrics": (config.metrics_address, "metrics-addr"),
            "health": (config.health_address, "health-probe-addr"),
        },
    )


class ServiceProxyCertificate:
    """The certificate of the service proxies. Without a CA there is none, and it is waited for."""

    def __init__(self, hub: Hub, config: ControllersConfig) -> None:
        self._hub = hub
        self._config = config
        self._contention = Contention()
        self._signer = Signer(hub.api, config.signer_secret_namespace, config.signer_secret_name)

    async def run(self) -> Never:
        """Keep the certificate, until cancelled."""
        config = self._config
        controller: Controller[str] = Controller(
            "serviceproxycertificate", self._reconcile, metrics=self._hub.metrics
        )
        async with trio.open_nursery() as nursery:
            for namespace, name in (
                (config.signer_secret_namespace, config.signer_secret_name),
                (config.certificates_namespace, SERVICE_PROXY_SECRET),
            ):
                reflector = Reflector(
                    self._hub.api, SECRETS, namespace, field_selector=f"metadata.name={name}"
                )
                reflector.subscribe(lambda _event: controller.enqueue(SERVICE_PROXY_SECRET))
                nursery.start_soon(reflector.run)
            controller.enqueue(SERVICE_PROXY_SECRET)
            nursery.start_soon(controller.run)
        raise AssertionError  # pragma: no cover  the nursery ends by cancellation only

    async def _reconcile(self, name: str) -> float | None:
        config = self._config
        signer = await find(
            self._hub.api, SECRETS, config.signer_secret_name, config.signer_secret_namespace
        )
        if signer is None:
            _log.info(
                "waiting for the certificate authority in secret %s/%s, which the manager makes",
                config.signer_secret_namespace,
                config.signer_secret_name,
            )
            return _RESYNC_S
        now = datetime.now(UTC)
        state = await self._signer.state(None, now)
        end, issued = await ensure_leaf(
            self._hub.api,
            config.certificates_namespace,
            name,
            service_proxy_leaf(),
            state.authority,
            owner=None,
            now=now,
            contention=self._contention,
        )
        metrics = self._hub.metrics
        metrics.certificate_expiry_seconds.labels(config.certificates_namespace, name).set(
            end.timestamp()
        )
        if issued is not None:
            metrics.certificates_issued_total.labels(name).inc()
        return _RESYNC_S
