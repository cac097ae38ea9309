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
    SECRETS,
    text_at,
    value_at,
)

from .addon_api import AddonStatus, NotInstalled, discover
from .addon_configs import AddonConfigs
from .addon_csrs import RequestReconciler
from .addon_deploy import Deployer
from .addon_registration import Registrar
from .agent_rights import AgentRights
from .ca_delivery import CertificateNotes, Delivery
from .configuration import MAIN_CONFIGURATION, SERVICE_PROXY_SECRET
from .fleet import Fleet, issued_to, lean
from .hub_sight import HubSight, look
from .registration import ADDON_NAME, is_deleting, is_owned
from .spec_hash import ConfigKey
from .turns import Turns

if TYPE_CHECKING:
    from collections.abc import Callable

    from clusterproxy.kube.api import WatchEvent
    from clusterproxy.kube.resource import Object

    from .ca_rotation import State
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

# A klusterlet may write its add-on's status as often as it likes: all that it costs then is its own cluster's time.
_TURNS_AT_ONCE: Final = 60
_TURN_S: Final = 0.5

# Of a cluster's open requests so many are looked at again when something of the cluster has changed.
_NEWEST: Final = 20

# How soon it is noticed that Open Cluster Management has been installed.
_LOOK_AGAIN_S: Final = 10.0

_HUB: Final = "hub"


def _now() -> datetime:
    return datetime.now(UTC)


class ClusterAgents:
    """The agents of all clusters, while this manager leads.

    Args:
      configurations: the ManagedProxyConfigurations, which somebody else keeps up to date.
      delivered: is called when :meth:`lacking` may have another answer, as far as that matters soon.
    """

    def __init__(
        self,
        hub: Hub,
        config: ManagerConfig,
        signer: Signer,
        configurations: Reflector,
        delivered: Callable[[], None],
    ) -> None:
        self._hub = hub
        self._delivered = delivered
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

    def lacking(self, state: State) -> dict[str, str] | None:
        """Return the clusters whose agents have not what a phase of the CA's rotation gives them, and why not.

        None if it is not known which clusters there are. See :class:`~.ca_delivery.Delivery`.
        """
        return None if self._at_work is None else self._at_work.lacking(state)

    async def run(self) -> Never:
        """Look after them, until cancelled."""
        async with trio.open_nursery() as nursery:
            version = await self._await_ocm()
            self._configurations.subscribe(self._configuration_changed)
            nursery.start_soon(self._looks.run)
            self.hub_changed()
            await self._configurations.synced.wait()
            await self._seen.wait()
            self._at_work = _Controllers(
                self._hub, self._config, self._configurations, version, self._delivered
            )
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
        self,
        hub: Hub,
        config: ManagerConfig,
        configurations: Reflector,
        version: AddonVersion,
        delivered: Callable[[], None],
    ) -> None:
        api, metrics = hub.api, hub.metrics
        self._sight = HubSight()
        self._fleet = Fleet(api, configurations, version)
        self._delivered = delivered
        self._delivery = Delivery(self._fleet, delivered)
        self._notes = CertificateNotes()
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
        self._status = AddonStatus(api, version, _now)
        self._registrar = Registrar(config, self._configs, self._rights, self._status)
        self._deployer = Deployer(api, config, self._fleet, self._configs, self._status)
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
        self._turns = Turns(_TURNS_AT_ONCE, _TURN_S)
        self._synced = False
        self._subscribe()

    def lacking(self, state: State) -> dict[str, str] | None:
        """See :meth:`ClusterAgents.lacking`."""
        return self._delivery.lacking(state) if self._synced else None

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
            self._delivered()
            # Not before: what is not known yet would be taken for gone.
            for controller in (self._clusters, self._requests_controller, self._management):
                nursery.start_soon(controller.run)
        raise AssertionError  # pragma: no cover  the nursery ends by cancellation only

    # -- what changes ------------------------------------------------------------------------------

    def _subscribe(self) -> None:
        fleet = self._fleet
        fleet.clusters.subscribe(self._cluster_changed)
        fleet.addons.subscribe(self._addon_changed)
        fleet.works.subscribe(self._work_changed)
        fleet.deployment_configs.subscribe(self._deployment_config_changed)
        fleet.management.subscribe(
            lambda event: self._management.enqueue(text_at(event.object, "metadata", "name"))
        )
        fleet.requests.subscribe(self._request_changed)
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
        cluster = text_at(event.object, "metadata", "namespace")
        if event.change is Change.DELETED:
            self._notes.forget(cluster)
        else:
            self._notes.note(event.object)
        self._one_changed(cluster)

    def _work_changed(self, event: WatchEvent) -> None:
        cluster = text_at(event.object, "metadata", "namespace")
        self._delivery.note(cluster)
        self._clusters.enqueue(cluster)

    def _request_changed(self, event: WatchEvent) -> None:
        if self._sight.retiring and (cluster := issued_to(event.object)):
            # It may have said already that it has the certificate.
            self._clusters.enqueue(cluster)
        self._requests_controller.enqueue(text_at(event.object, "metadata", "name"))

    def _one_changed(self, cluster: str) -> None:
        self._delivery.note(cluster)
        self._clusters.enqueue(cluster)
        for name in self._requests.open_requests(cluster)[-_NEWEST:]:
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
            self._turns.forget(name)
            return None
        if cluster is None or is_deleting(cluster) or not is_owned(addon):
            return None
        if (wait := self._turns.take(name)) > 0:
            return wait
        sight = self._sight
        addon = await self._status.write(addon, self._configs.patch(addon))
        addon = await self._registrar.register(addon, cluster, sight)
        authority = sight.authority if sight.retiring else None
        issued = self._fleet.issued(name)
        notes = self._notes.patch(addon, issued, authority, self._status.now())
        addon = await self._status.write(addon, notes)
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
