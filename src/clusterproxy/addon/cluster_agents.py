"""Looks after the agents of all clusters: what is watched for them, and who acts on it.

Source: addon-framework ``pkg/addonmanager``, in which each part of this is a controller of its own; upstream
``pkg/proxyagent/agent``. Here one reconciler takes a cluster through all of it, so that no two write the same status.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Never

import trio

from clusterproxy.errors import KubeError
from clusterproxy.kube.api import Change
from clusterproxy.kube.controller import Controller
from clusterproxy.kube.reflector import Reflector
from clusterproxy.kube.resource import (
    ADDON_DEPLOYMENT_CONFIGS,
    MANAGED_CLUSTER_ADDONS,
    SECRETS,
    text_at,
    value_at,
)

from .addon_api import NotInstalled, discover, patch_status, versioned
from .addon_configs import AddonConfigs
from .addon_csrs import RequestReconciler
from .addon_deploy import Deployer
from .addon_registration import Registrar
from .agent_rights import AgentRights
from .ca_delivery import all_have
from .configuration import MAIN_CONFIGURATION, SERVICE_PROXY_SECRET
from .fleet import Fleet, lean
from .hub_sight import HubSight, look
from .registration import ADDON_NAME, is_deleting, is_owned
from .spec_hash import ConfigKey

if TYPE_CHECKING:
    from clusterproxy.kube.api import WatchEvent
    from clusterproxy.kube.resource import Object

    from .certificates import Authority
    from .config import ManagerConfig
    from .program import Hub
    from .registration import AddonVersion
    from .signer import Signer

_log = logging.getLogger("clusterproxy.addon")

# Even if nothing is told to have changed.
_RESYNC_S: Final = 600.0

# Each waits for the apiserver most of the time; a cluster that fails is not waited for.
_WORKERS: Final = 4

# How soon it is noticed that Open Cluster Management has been installed.
_LOOK_AGAIN_S: Final = 10.0

_HUB: Final = "hub"


def _now() -> datetime:
    return datetime.now(UTC)


class ClusterAgents:
    """The agents of all clusters, while this manager leads.

    Args:
      configurations: the ManagedProxyConfigurations, which somebody else keeps up to date.
    """

    def __init__(
        self, hub: Hub, config: ManagerConfig, signer: Signer, configurations: Reflector
    ) -> None:
        self._hub = hub
        self._config = config
        self._signer = signer
        self._configurations = configurations
        self._sight: HubSight | None = None
        self._seen = trio.Event()
        self._versions: dict[str, tuple[object, ...]] = {}
        self._looks: Controller[str] = Controller("addonhub", self._look, metrics=hub.metrics)
        self._at_work: _Controllers | None = None

    def hub_changed(self) -> None:
        """Take note that something of the hub's side may have changed: an authority, a load balancer's address."""
        self._looks.enqueue(_HUB)

    def delivered(self, bundle: bytes) -> bool:
        """Return whether all clusters say that their agents have all authorities of a bundle."""
        return self._at_work is not None and self._at_work.delivered(bundle)

    async def run(self) -> Never:
        """Look after them, until cancelled."""
        async with trio.open_nursery() as nursery:
            version = await self._await_ocm()
            self._configurations.subscribe(self._configuration_changed)
            nursery.start_soon(self._looks.run)
            self.hub_changed()
            await self._configurations.synced.wait()
            await self._seen.wait()
            self._at_work = _Controllers(self._hub, self._config, self._configurations, version)
            if self._sight is not None:
                self._at_work.take(self._sight)
            nursery.start_soon(self._at_work.run)
        raise AssertionError  # pragma: no cover  the nursery ends by cancellation only

    async def _await_ocm(self) -> AddonVersion:
        told = ""
        while True:
            try:
                version = await discover(self._hub.api)
            except (NotInstalled, KubeError) as error:
                if str(error) != told:
                    told = str(error)
                    _log.warning("no agents yet, waiting for Open Cluster Management: %s", told)
            else:
                _log.info("clusters get agents by the add-on API %s", version)
                return version
            await trio.sleep(_LOOK_AGAIN_S)

    def _configuration_changed(self, event: WatchEvent) -> None:
        name = text_at(event.object, "metadata", "name")
        if name == MAIN_CONFIGURATION:
            self.hub_changed()
        # What the manager says in its status is no news.
        version = (
            event.change is Change.DELETED,
            *(value_at(event.object, "metadata", key) for key in ("uid", "generation")),
        )
        if self._versions.get(name) != version:
            self._versions[name] = version
            if self._at_work is not None:
                self._at_work.configuration_changed()

    async def _look(self, _key: str) -> float | None:
        await self._configurations.synced.wait()
        live = self._configurations.items.get(("", MAIN_CONFIGURATION))
        sight = await look(self._hub.api, self._signer, live)
        if sight != self._sight:
            self._sight = sight
            self._seen.set()
            if self._at_work is not None:
                self._at_work.take(sight)
        return _RESYNC_S


class _Controllers:
    """What works once it is known how to speak with the hub."""

    def __init__(
        self, hub: Hub, config: ManagerConfig, configurations: Reflector, version: AddonVersion
    ) -> None:
        api, metrics = hub.api, hub.metrics
        self._api = api
        self._addons = versioned(MANAGED_CLUSTER_ADDONS, version)
        self._sight = HubSight()
        self._fleet = Fleet(api, configurations, version)
        self._certificates = Reflector(
            api,
            SECRETS,
            config.signer_secret_namespace,
            field_selector=f"metadata.name={SERVICE_PROXY_SECRET}",
            keep=lean,
        )
        self._clusters: Controller[str] = Controller(
            "managedclusteraddon", self._reconcile, workers=_WORKERS, metrics=metrics
        )
        self._rights = AgentRights(api, version, self._clusters.enqueue, self._all_changed)
        self._configs = AddonConfigs(api, self._fleet, version)
        self._registrar = Registrar(api, config, self._configs, self._rights, version, _now)
        self._deployer = Deployer(api, config, self._fleet, self._configs, version, _now)
        self._requests = RequestReconciler(api, self._fleet, hub.events, self._authority, _now)
        self._requests_controller: Controller[str] = Controller(
            "certificatesigningrequest",
            self._requests.reconcile,
            workers=_WORKERS,
            metrics=metrics,
        )
        self._management: Controller[str] = Controller(
            "clustermanagementaddon", self._configs.reconcile, metrics=metrics
        )
        self._known: dict[str, Object] = {}
        self._synced = False
        self._subscribe()

    def delivered(self, bundle: bytes) -> bool:
        """See :meth:`ClusterAgents.delivered`. Before all is known, nothing is delivered."""
        return self._synced and all_have(self._fleet, bundle)

    async def run(self) -> Never:
        """Act on whatever changes, until cancelled."""
        async with trio.open_nursery() as nursery:
            reflectors = (*self._fleet.reflectors, self._certificates)
            for reflector in reflectors:
                nursery.start_soon(reflector.run)
            await nursery.start(self._rights.run)
            for reflector in reflectors:
                await reflector.synced.wait()
            self._synced = True
            # Not before: what is not known yet would be taken for gone.
            for controller in (self._clusters, self._requests_controller, self._management):
                nursery.start_soon(controller.run)
        raise AssertionError  # pragma: no cover  the nursery ends by cancellation only

    # -- what changes ------------------------------------------------------------------------------

    def _subscribe(self) -> None:
        fleet = self._fleet
        fleet.clusters.subscribe(self._cluster_changed)
        fleet.addons.subscribe(self._addon_changed)
        fleet.works.subscribe(
            lambda event: self._clusters.enqueue(text_at(event.object, "metadata", "namespace"))
        )
        fleet.deployment_configs.subscribe(self._deployment_config_changed)
        fleet.management.subscribe(
            lambda event: self._management.enqueue(text_at(event.object, "metadata", "name"))
        )
        fleet.requests.subscribe(
            lambda event: self._requests_controller.enqueue(
                text_at(event.object, "metadata", "name")
            )
        )
        self._certificates.subscribe(lambda _event: self._all_changed())

    def take(self, sight: HubSight) -> None:
        """Act on another hub's side."""
        self._sight = sight
        self._all_changed()

    def configuration_changed(self) -> None:
        """Act on another ManagedProxyConfiguration, which has another hash."""
        self._management.enqueue(ADDON_NAME)
        self._all_changed()

    def _all_changed(self) -> None:
        for cluster, _ in self._fleet.addons.items:
            self._clusters.enqueue(cluster)
        for name in self._requests.open_requests():
            self._requests_controller.enqueue(name)

    def _cluster_changed(self, event: WatchEvent) -> None:
        name = text_at(event.object, "metadata", "name")
        if event.change is Change.DELETED:
            self._known.pop(name, None)
        elif self._known.get(name) == event.object:
            # The heartbeat of its klusterlet.
            return
        else:
            self._known[name] = event.object
        self._one_changed(name)

    def _addon_changed(self, event: WatchEvent) -> None:
        self._one_changed(text_at(event.object, "metadata", "namespace"))

    def _one_changed(self, cluster: str) -> None:
        self._clusters.enqueue(cluster)
        for name in self._requests.open_requests(cluster):
            self._requests_controller.enqueue(name)

    def _deployment_config_changed(self, event: WatchEvent) -> None:
        key = ConfigKey(
            ADDON_DEPLOYMENT_CONFIGS.group,
            ADDON_DEPLOYMENT_CONFIGS.plural,
            text_at(event.object, "metadata", "namespace"),
            text_at(event.object, "metadata", "name"),
        )
        self._management.enqueue(ADDON_NAME)
        for cluster in self._configs.users(key):
            self._clusters.enqueue(cluster)

    # -- what is done ------------------------------------------------------------------------------

    def _authority(self) -> Authority | None:
        return self._sight.authority

    async def _reconcile(self, name: str) -> float | None:
        cluster, addon = self._fleet.cluster(name), self._fleet.addon(name)
        accepted = cluster is not None and value_at(cluster, "spec", "hubAcceptsClient") is True
        if addon is None or is_deleting(addon) or not accepted:
            # What it owns is collected with it.
            await self._rights.take(name)
            return None
        if cluster is None or is_deleting(cluster) or not is_owned(addon):
            return None
        sight = self._sight
        if (patch := self._configs.patch(addon)) is not None:
            addon = await patch_status(self._api, self._addons, addon, patch)
        addon = await self._registrar.register(addon, cluster, sight)
        if self._is_outdated(sight):
            return None
        certificate = next(iter(self._certificates.items.values()), None)
        again = await self._deployer.deploy(addon, cluster, sight, certificate)
        return _RESYNC_S if again is None else again

    def _is_outdated(self, sight: HubSight) -> bool:
        """Whether there is another configuration than was seen: a work would get its hash without being made of it."""
        live = self._fleet.configurations.items.get(("", MAIN_CONFIGURATION))
        seen = sight.configuration
        if live is None or seen is None:
            return False
        return (seen.uid, seen.generation) != (
            value_at(live, "metadata", "uid"),
            value_at(live, "metadata", "generation"),
        )
