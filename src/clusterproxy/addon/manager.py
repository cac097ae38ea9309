"""The hub's manager: what it watches, and who looks after what has changed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final, Never

import trio

from clusterproxy.kube.api import Change
from clusterproxy.kube.controller import Controller
from clusterproxy.kube.reflector import Reflector
from clusterproxy.kube.resource import (
    CLUSTER_PROFILES,
    MANAGED_PROXY_CONFIGURATIONS,
    SECRETS,
    text_at,
    value_at,
)
from clusterproxy.kube.tls_profile_watch import ProfileWatch

from .cluster_agents import ClusterAgents
from .cluster_profiles import SELECTOR, ClusterProfileReconciler
from .configuration import MAIN_CONFIGURATION, USER_SERVER_SECRET
from .owned import OwnedObjects
from .program import Hub, Lease, run_on_hub
from .reconciler import ConfigurationReconciler
from .signer import Signer

if TYPE_CHECKING:
    from clusterproxy.kube.api import WatchEvent
    from clusterproxy.kube.resource import Object

    from .config import ManagerConfig

_log = logging.getLogger("clusterproxy.addon")

#: The lease's name: the original's, so that of both only one is at work.
LEASE: Final = "cluster-proxy-addon-manager"


async def run_manager(config: ManagerConfig) -> int:
    """Run the manager until SIGINT or SIGTERM, or until its lease is lost; return its exit status.

    Raises:
      ConfigError: the kubeconfig or an address cannot be used.
    """
    return await run_on_hub(
        LEASE,
        lambda hub: Manager(hub, config).run(),
        kubeconfig=config.kubeconfig,
        qps=config.kube_api_qps,
        burst=config.kube_api_burst,
        lease=Lease(namespace=config.pod_namespace, name=LEASE) if config.leader_elect else None,
        ports={
            "metrics": (config.metrics_address, "metrics-bind-address"),
            "health": (config.health_address, "health-probe-bind-address"),
        },
    )


class Manager:
    """The controllers of one manager, while it leads."""

    def __init__(self, hub: Hub, config: ManagerConfig) -> None:
        self._hub = hub
        self._config = config
        self._seen: dict[str, tuple[object, ...]] = {}
        self._profiles = ProfileWatch(hub.api, config.pod_namespace, self._all_changed)
        self._configurations = Reflector(hub.api, MANAGED_PROXY_CONFIGURATIONS)
        signer = Signer(hub.api, config.signer_secret_namespace, config.signer_secret_name)
        self._owned = OwnedObjects(hub.api, self._changed)
        self._reconciler = ConfigurationReconciler(
            hub.api,
            signer=signer,
            owned=self._owned,
            events=hub.events,
            metrics=hub.metrics,
            tls=lambda: (self._profiles.profile, self._profiles.problem),
            agents=lambda state: self._agents.lacking(state),
            image_pull_policy=config.image_pull_policy,
        )
        self._controller: Controller[str] = Controller(
            "managedproxyconfiguration", self._reconciler.reconcile, metrics=hub.metrics
        )

        self._agents = ClusterAgents(
            hub,
            config,
            signer,
            self._configurations,
            lambda: self._controller.enqueue(MAIN_CONFIGURATION),
        )

    def _changed(self, name: str) -> None:
        if name == MAIN_CONFIGURATION:
            self._agents.hub_changed()
        self._controller.enqueue_after(name, self._reconciler.pause(name))

    def _all_changed(self) -> None:
        for _, name in self._configurations.items:
            self._controller.enqueue(name)

    async def run(self) -> Never:
        """Keep everything as configured, until cancelled."""
        self._configurations.subscribe(self._configuration_changed)
        async with trio.open_nursery() as nursery:
            await nursery.start(self._profiles.run)
            nursery.start_soon(self._configurations.run)
            nursery.start_soon(self._owned.run)
            nursery.start_soon(self._controller.run)
            nursery.start_soon(self._agents.run)
            if self._config.gates["ClusterProfile"]:
                nursery.start_soon(self._run_cluster_profiles)
            await self._configurations.synced.wait()
            if ("", MAIN_CONFIGURATION) not in self._configurations.items:
                _log.warning(
                    "there is no ManagedProxyConfiguration %s yet: waiting for it",
                    MAIN_CONFIGURATION,
                )
        raise AssertionError  # pragma: no cover  the nursery ends by cancellation only

    def _configuration_changed(self, event: WatchEvent) -> None:
        name = text_at(event.object, "metadata", "name")
        if event.change is Change.DELETED:
            self._owned.forget(name)
            self._seen.pop(name, None)
        elif not self._is_news(event.object):
            return
        self._controller.enqueue(name)
        # A namespace may be free now that another one waits for, and what others own is the main one's.
        self._all_changed()

    def _is_news(self, configuration: Object) -> bool:
        """Whether something but the status has changed, which we write: it would have us look again at once."""
        keys = ("uid", "generation", "annotations", "labels", "deletionTimestamp")
        news = tuple(value_at(configuration, "metadata", key) for key in keys)
        name = text_at(configuration, "metadata", "name")
        if self._seen.get(name) == news:
            return False
        self._seen[name] = news
        return True

    async def _run_cluster_profiles(self) -> Never:
        api = self._hub.api
        reconciler = ClusterProfileReconciler(api, self._config.signer_secret_name)
        controller: Controller[tuple[str, str]] = Controller(
            "clusterprofile", reconciler.reconcile, metrics=self._hub.metrics
        )
        profiles = Reflector(api, CLUSTER_PROFILES, label_selector=SELECTOR)
        secrets = Reflector(
            api,
            SECRETS,
            self._config.pod_namespace,
            field_selector=f"metadata.name={USER_SERVER_SECRET}",
        )

        def all_changed(_event: WatchEvent) -> None:
            for key in profiles.items:
                controller.enqueue(key)

        def changed(event: WatchEvent) -> None:
            metadata = event.object["metadata"]
            controller.enqueue((metadata["namespace"], metadata["name"]))

        profiles.subscribe(changed)
        # The secret is made anew whenever the configuration changes what it is to say.
        secrets.subscribe(all_changed)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(profiles.run)
            nursery.start_soon(secrets.run)
            nursery.start_soon(controller.run)
        raise AssertionError  # pragma: no cover  the nursery ends by cancellation only
