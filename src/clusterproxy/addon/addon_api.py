"""Which version of the add-on API the hub serves, and how objects of it are written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from clusterproxy.errors import ClusterProxyError, Conflict, NotFound
from clusterproxy.kube.resource import (
    ADDON_DEPLOYMENT_CONFIGS,
    CLUSTER_MANAGEMENT_ADDONS,
    MANAGED_CLUSTER_ADDONS,
    MANAGED_CLUSTERS,
    MANIFEST_WORKS,
    text_at,
)

from .registration import ADDON_NAME, AddonVersion

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.resource import Object, Resource

_ADDON_KINDS: Final = (CLUSTER_MANAGEMENT_ADDONS, MANAGED_CLUSTER_ADDONS, ADDON_DEPLOYMENT_CONFIGS)

_OTHER_KINDS: Final = (MANAGED_CLUSTERS, MANIFEST_WORKS)


class NotInstalled(ClusterProxyError):
    """Open Cluster Management is not on this hub; the text says what there is not."""


def versioned(resource: Resource, version: AddonVersion) -> Resource:
    """Return a kind of the add-on API in the version that the hub serves."""
    return attrs.evolve(resource, version=version.value)


async def discover(api: KubeApi) -> AddonVersion:
    """Return the version of the add-on API to speak: v1beta1, or v1alpha1 with an old hub.

    Raises:
      NotInstalled: a kind that is needed is not served.
      KubeError: what else the apiserver says.
    """
    absent = [each for each in _OTHER_KINDS if not await _is_served(api, each)]
    lacking: list[Resource] = []
    for version in AddonVersion:
        kinds = [versioned(resource, version) for resource in _ADDON_KINDS]
        lacking = [each for each in kinds if not await _is_served(api, each)]
        if not lacking and not absent:
            return version
    names = ", ".join(f"{each.qualified}/{each.version}" for each in (*absent, *lacking))
    raise NotInstalled(f"the hub does not serve {names}")


async def patch_status(api: KubeApi, resource: Resource, obj: Object, patch: Object) -> Object:
    """Patch the status of an object that has been read before; return it as it is then.

    Raises:
      Conflict: it is another by now, or gone.
      KubeError: what else the apiserver says.
    """
    name, namespace = text_at(obj, "metadata", "name"), text_at(obj, "metadata", "namespace")
    try:
        return await api.patch(resource, name, patch, namespace or None, subresource="status")
    except NotFound as error:
        raise Conflict(error.message, status=error.status, reason=error.reason) from error


@attrs.frozen
class AddonStatus:
    """Writes the status of the clusters' add-ons.

    Attributes:
      version: of the add-on API that the hub serves.
      now: returns the time.
    """

    _api: KubeApi
    version: AddonVersion
    now: Callable[[], datetime]

    async def write(self, addon: Object, patch: Object | None) -> Object:
        """Patch the status of an add-on, if there is a patch; return the add-on as it is then.

        Raises:
          Conflict: it is another by now, or gone.
          KubeError: what else the apiserver says.
        """
        if patch is None:
            return addon
        resource = versioned(MANAGED_CLUSTER_ADDONS, self.version)
        return await patch_status(self._api, resource, addon, patch)


async def _is_served(api: KubeApi, resource: Resource) -> bool:
    try:
        # Of one name: there may be thousands.
        await api.list(resource, field_selector=f"metadata.name={ADDON_NAME}")
    except NotFound:
        return False
    return True
