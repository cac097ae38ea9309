"""Tells the hub's add-on manager which version of a configuration is meant, and which of them an add-on is to have."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import attrs

from clusterproxy.kube.api import Change
from clusterproxy.kube.resource import CLUSTER_MANAGEMENT_ADDONS, text_at

from .addon_api import patch_status, versioned
from .chart_values import UnrenderableError
from .deployment_config import GROUP, RESOURCE
from .index import Index
from .registration import ADDON_NAME
from .spec_hash import (
    ConfigKey,
    addon_configs_patch,
    config_keys,
    default_configs_patch,
    desired_hashes,
    spec_hash,
)

if TYPE_CHECKING:
    from clusterproxy.kube.api import KubeApi, WatchEvent
    from clusterproxy.kube.resource import Object

    from .fleet import Fleet
    from .registration import AddonVersion

_log = logging.getLogger("clusterproxy.addon")

_LIFECYCLE: Final = "addon.open-cluster-management.io/lifecycle"


@attrs.frozen(kw_only=True)
class AddonConfig:
    """How an add-on is configured.

    Attributes:
      deployment_config: the AddOnDeploymentConfig that it refers to, None if it refers to none.
      problem: why there is none although it refers to one, empty if there is.
      awaited: whether the hub has yet to say that the add-on is to have a configuration as it is now: it lets clusters
        have a new one group by group.
    """

    deployment_config: Object | None = None
    problem: str = ""
    awaited: bool = False

    def usable(self) -> Object | None:
        """Return the AddOnDeploymentConfig.

        Raises:
          UnrenderableError: there is none.
        """
        if self.problem:
            raise UnrenderableError([self.problem])
        return self.deployment_config


class AddonConfigs:
    """The configurations that add-ons refer to.

    What they are is known once all that *fleet* watches is synced, not before.
    """

    def __init__(self, api: KubeApi, fleet: Fleet, version: AddonVersion) -> None:
        self._api = api
        self._fleet = fleet
        self._management = versioned(CLUSTER_MANAGEMENT_ADDONS, version)
        self._clusters: Index[ConfigKey] = Index()
        fleet.addons.subscribe(self._note)

    def of(self, addon: Object) -> AddonConfig:
        """Return how an add-on is configured."""
        desired = desired_hashes(addon)
        found = self._fleet.configs(desired)
        awaited = any(spec_hash(config) != desired[key] for key, config in found.items())
        # Of several the first counts, as in the original.
        for key in desired:
            if (key.group, key.resource) == (GROUP, RESOURCE):
                problem = (
                    ""
                    if key in found
                    else f"AddOnDeploymentConfig {key.namespace}/{key.name} not found"
                )
                return AddonConfig(
                    deployment_config=found.get(key), problem=problem, awaited=awaited
                )
        return AddonConfig(awaited=awaited)

    def patch(self, addon: Object) -> Object | None:
        """Return the patch of an add-on's status that says what its configurations are, None if it does."""
        return addon_configs_patch(addon, self._fleet.configs(config_keys(addon)))

    def users(self, key: ConfigKey) -> list[str]:
        """Return the clusters whose add-ons refer to a configuration."""
        return self._clusters.under(key)

    def _note(self, event: WatchEvent) -> None:
        is_there = event.change is not Change.DELETED
        cluster = text_at(event.object, "metadata", "namespace")
        self._clusters.put(cluster, config_keys(event.object) if is_there else ())

    async def reconcile(self, name: str) -> float | None:
        """Write the hashes into the status of a ClusterManagementAddOn.

        Raises:
          KubeError: what the apiserver says.
        """
        management = self._fleet.management.items.get(("", name))
        if name != ADDON_NAME or management is None:
            return None
        if text_at(management, "metadata", "annotations", _LIFECYCLE) == "self":
            # Of releases that installed add-ons themselves. The original empties it (addon-framework pkg/addonmanager/
            # controllers/cmamanagedby), and the hub's add-on manager goes on leaving the add-on alone.
            change: Object = {"metadata": {"annotations": {_LIFECYCLE: None}}}
            await self._api.patch(self._management, name, change)
            _log.info(
                "ClusterManagementAddOn %s: the hub's add-on manager looks after it now", name
            )
            # What was written comes back as a change.
            return None
        configs = self._fleet.configs(config_keys(management))
        patch = default_configs_patch(management, configs)
        if patch is not None:
            await patch_status(self._api, self._management, management, patch)
        return None
