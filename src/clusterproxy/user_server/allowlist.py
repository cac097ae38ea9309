"""Follows the ConfigMap with the services that users may reach.

Source: upstream ``pkg/userserver/service_allowlist_watcher.go``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Never

import trio

from clusterproxy.errors import ConfigError
from clusterproxy.kube.api import Change
from clusterproxy.kube.reflector import Reflector
from clusterproxy.kube.resource import CONFIG_MAPS

from .exposed_services import ExposedServices, parse_exposed_services

if TYPE_CHECKING:
    from clusterproxy.kube.api import KubeApi, WatchEvent

    from .metrics import UserServerMetrics
    from .target import Target

_log = logging.getLogger("clusterproxy.user_server")

# Kubernetes' apiservers are reached while this lasts or not soon.
_PATIENCE_S: Final = 5.0


class Allowlist:
    """The list that is in force. Nothing is exposed before it was read, and while there is no ConfigMap.

    Attributes:
      where: namespace and name of the ConfigMap.
      problem: what is wrong with the ConfigMap as it is now, so that an older list holds; empty if nothing.
    """

    def __init__(self, api: KubeApi, namespace: str, name: str, metrics: UserServerMetrics) -> None:
        self.where = f"{namespace}/{name}"
        self.problem = ""
        self._reflector = Reflector(
            api, CONFIG_MAPS, namespace, field_selector=f"metadata.name={name}"
        )
        self._metrics = metrics
        self._services = ExposedServices()

    @property
    def known(self) -> bool:
        """Whether the ConfigMap was read, or known not to be there."""
        return self._reflector.synced.is_set()

    @property
    def trouble(self) -> str:
        """What keeps it from being up to date, empty if nothing."""
        return self._reflector.trouble

    def allows(self, target: Target) -> bool:
        """Whether a service is exposed."""
        return self._services.allows(target)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> Never:
        """Follow the ConfigMap until cancelled; started when it is known, or it takes too long to find out."""
        self._reflector.subscribe(self._take)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._reflector.run)
            with trio.move_on_after(_PATIENCE_S):
                await self._reflector.synced.wait()
            if not self.known:
                _log.warning(
                    "ConfigMap %s cannot be read yet, no service is exposed: %s",
                    self.where,
                    self.trouble or "no answer",
                )
            task_status.started()
            await self._reflector.synced.wait()
            if not self._reflector.items:
                self._metrics.exposed_services_valid.set(1)
                _log.warning("there is no ConfigMap %s: no service is exposed", self.where)
        raise AssertionError  # pragma: no cover  the nursery ends by cancellation only

    def _take(self, event: WatchEvent) -> None:
        if event.change is Change.DELETED:
            _log.warning("ConfigMap %s was deleted: no service is exposed", self.where)
            services = ExposedServices()
        else:
            try:
                services = parse_exposed_services(event.object)
            except ConfigError as error:
                self.problem = error.message
                self._metrics.exposed_services_valid.set(0)
                _log.error(
                    "ConfigMap %s has a mistake, the %d entries of the last good list stay in force: %s",
                    self.where,
                    len(self._services.entries),
                    error.message,
                )
                return
            _log.info(
                "ConfigMap %s exposes services: %d entries", self.where, len(services.entries)
            )
        self.problem = ""
        self._services = services
        self._metrics.exposed_services_valid.set(1)
        self._metrics.exposed_services.set(len(services.entries))
