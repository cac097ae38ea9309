"""Tells in ClusterProfiles how their clusters are reached through the user server.

Source: KEP-4322 and KEP-5339 of Kubernetes (cluster-inventory-api); upstream ``pkg/clusterprofile``.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from clusterproxy.kube.resource import (
    CLUSTER_PROFILES,
    MANAGED_PROXY_CONFIGURATIONS,
    SECRETS,
    list_at,
    map_at,
    text_at,
    value_at,
)

from .configuration import (
    MAIN_CONFIGURATION,
    USER_SERVER_SECRET,
    InvalidConfiguration,
    parse_configuration,
)
from .objects import find

if TYPE_CHECKING:
    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.resource import Object

_log = logging.getLogger("clusterproxy.addon")

#: The provider's name, and the manager of the profiles that are ours to fill.
PROVIDER: Final = "open-cluster-management"

#: Which profiles are watched.
SELECTOR: Final = f"x-k8s.io/cluster-manager={PROVIDER},open-cluster-management.io/cluster-name"

_EXEC: Final = "client.authentication.k8s.io/exec"
_RETRY_S: Final = 60.0
_PORT: Final = 9092


def access_provider(profile_name: str, namespace: str, certificate: str) -> Object:
    """Return the entry of ``status.accessProviders``; *certificate* is in base64, as the secret has it."""
    return {
        "name": PROVIDER,
        "cluster": {
            "server": f"https://cluster-proxy-addon-user.{namespace}:{_PORT}/{profile_name}",
            "certificate-authority-data": certificate,
            "extensions": [{"name": _EXEC, "extension": {"clusterName": profile_name}}],
        },
    }


def with_provider(providers: list[Any], entry: Object) -> list[Any] | None:
    """Return *providers* with *entry* in the place of its namesake, or None if it is there already.

    The entries of others stay as they are, and where they are.
    """
    for place, provider in enumerate(providers):
        if text_at(provider, "name") == entry["name"]:
            if provider == entry:
                return None
            return [*providers[:place], entry, *providers[place + 1 :]]
    return [*providers, entry]


class ClusterProfileReconciler:
    """Keeps our entry in one profile. A profile that is not selected is not touched."""

    def __init__(self, api: KubeApi, signer_secret: str) -> None:
        self._api = api
        self._signer_secret = signer_secret

    async def reconcile(self, key: tuple[str, str]) -> float | None:
        """Look at a profile; return seconds until it is to be looked at again, or None.

        Raises:
          KubeError: what the apiserver says.
        """
        namespace, name = key
        profile = await find(self._api, CLUSTER_PROFILES, name, namespace)
        if profile is None or not _selected(profile):
            return None
        entry = await self._entry(name)
        if entry is None:
            return _RETRY_S
        providers = with_provider(list_at(profile, "status", "accessProviders"), entry)
        if providers is None:
            return None
        # Lists are replaced as a whole: only while nobody else has changed them. Conditions that were
        # never set would not pass validation as null.
        patch: Object = {
            "metadata": {"resourceVersion": profile["metadata"]["resourceVersion"]},
            "status": {"accessProviders": providers},
        }
        if value_at(profile, "status", "conditions") is None:
            patch["status"]["conditions"] = []
        await self._api.patch(CLUSTER_PROFILES, name, patch, namespace, subresource="status")
        _log.info("cluster profile %s/%s: access provider set", namespace, name)
        return None

    async def _entry(self, profile_name: str) -> Object | None:
        live = await find(self._api, MANAGED_PROXY_CONFIGURATIONS, MAIN_CONFIGURATION)
        if live is None:
            return None
        try:
            configuration = parse_configuration(live, signer_secret=self._signer_secret)
        except InvalidConfiguration:
            return None
        namespace = configuration.proxy_server.namespace
        secret = await find(self._api, SECRETS, USER_SERVER_SECRET, namespace)
        certificate = text_at(secret or {}, "data", "tls.crt")
        if not certificate:
            return None
        return access_provider(profile_name, namespace, certificate)


def _selected(profile: Object) -> bool:
    labels = map_at(profile, "metadata", "labels")
    return (
        labels.get("x-k8s.io/cluster-manager") == PROVIDER
        and "open-cluster-management.io/cluster-name" in labels
    )
