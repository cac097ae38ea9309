"""What the hub has of the clusters and of their add-on, kept up to date in one place."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Final, cast

from clusterproxy.kube.api import Change
from clusterproxy.kube.reflector import Reflector
from clusterproxy.kube.resource import (
    ADDON_DEPLOYMENT_CONFIGS,
    CERTIFICATE_SIGNING_REQUESTS,
    CLUSTER_MANAGEMENT_ADDONS,
    MANAGED_CLUSTER_ADDONS,
    MANAGED_CLUSTERS,
    MANAGED_PROXY_CONFIGURATIONS,
    MANIFEST_WORKS,
    list_at,
    map_at,
    text_at,
    value_at,
)

from .addon_api import versioned
from .agent_permissions import ADDON_LABEL, CLUSTER_LABEL
from .certificate_request import TOO_LARGE
from .csr import cluster_of
from .leaves import secret_data
from .merge_patch import condition_at
from .registration import ADDON_NAME, AGENT_SIGNER

if TYPE_CHECKING:
    from collections.abc import Iterable

    from clusterproxy.kube.api import KubeApi, WatchEvent
    from clusterproxy.kube.resource import Object

    from .registration import AddonVersion
    from .spec_hash import ConfigKey

#: Our add-on's objects among others.
BY_NAME: Final = f"metadata.name={ADDON_NAME}"
BY_LABEL: Final = f"{ADDON_LABEL}={ADDON_NAME}"

_PACKED: Final = "packed"
_ISSUED: Final = "issued"

# What is waited for, and from whom nothing is heard.
_CONDITIONS: Final = ("ManagedClusterJoined", "ManagedClusterConditionAvailable")
# Whoever may ask for certificates may ask for many: of an agent a request has 3 KiB.
_LARGEST_REQUEST: Final = 32 * 1024


class Fleet:
    """The clusters, their add-ons, and what is made of and for those.

    Args:
      configurations: the ManagedProxyConfigurations, which somebody else keeps up to date.
      version: of the add-on API that the hub serves.
    """

    def __init__(self, api: KubeApi, configurations: Reflector, version: AddonVersion) -> None:
        self.configurations = configurations
        self.clusters = Reflector(api, MANAGED_CLUSTERS, keep=_cluster)
        self.addons = Reflector(
            api, versioned(MANAGED_CLUSTER_ADDONS, version), field_selector=BY_NAME, keep=lean
        )
        self.management = Reflector(
            api, versioned(CLUSTER_MANAGEMENT_ADDONS, version), field_selector=BY_NAME, keep=lean
        )
        self.deployment_configs = Reflector(
            api, versioned(ADDON_DEPLOYMENT_CONFIGS, version), keep=lean
        )
        self.works = Reflector(api, MANIFEST_WORKS, label_selector=BY_LABEL, keep=_pack)
        self.requests = Reflector(
            api, CERTIFICATE_SIGNING_REQUESTS, label_selector=BY_LABEL, keep=_request
        )
        self._works: dict[str, dict[str, Object]] = {}
        self.works.subscribe(self._note_work)
        self._issued: dict[str, dict[str, bytes]] = {}
        self.requests.subscribe(self._note_request)

    @property
    def reflectors(self) -> tuple[Reflector, ...]:
        """All that has to run and to be synced, but the configurations."""
        return (
            self.clusters,
            self.addons,
            self.management,
            self.deployment_configs,
            self.works,
            self.requests,
        )

    def cluster(self, name: str) -> Object | None:
        """Return the ManagedCluster of a name, None if there is none."""
        return self.clusters.items.get(("", name))

    def addon(self, cluster: str) -> Object | None:
        """Return the add-on of a cluster, None if it has none."""
        return self.addons.items.get((cluster, ADDON_NAME))

    def works_of(self, cluster: str) -> list[Object]:
        """Return the works of a cluster that say that they are the add-on's."""
        return [_unpack(work) for work in self._works.get(cluster, {}).values()]

    def issued(self, cluster: str) -> list[bytes]:
        """Return the certificates for the tunnel that a cluster was given of late, as PEM."""
        return list(self._issued.get(cluster, {}).values())

    def configs(self, keys: Iterable[ConfigKey]) -> dict[ConfigKey, Object]:
        """Return those of the configurations that there are."""
        reflectors = {
            (resource.group, resource.plural): reflector
            for resource, reflector in (
                (MANAGED_PROXY_CONFIGURATIONS, self.configurations),
                (ADDON_DEPLOYMENT_CONFIGS, self.deployment_configs),
            )
        }
        found: dict[ConfigKey, Object] = {}
        for key in keys:
            reflector = reflectors.get((key.group, key.resource))
            if reflector is not None and (key.namespace, key.name) in reflector.items:
                found[key] = reflector.items[key.namespace, key.name]
        return found

    def _note_work(self, event: WatchEvent) -> None:
        namespace = text_at(event.object, "metadata", "namespace")
        name = text_at(event.object, "metadata", "name")
        there = self._works.setdefault(namespace, {})
        if event.change is Change.DELETED:
            there.pop(name, None)
        else:
            there[name] = event.object
        if not there:
            del self._works[namespace]

    def _note_request(self, event: WatchEvent) -> None:
        cluster = issued_to(event.object)
        if not cluster:
            return
        name = text_at(event.object, "metadata", "name")
        there = self._issued.setdefault(cluster, {})
        if event.change is Change.DELETED:
            there.pop(name, None)
        else:
            there[name] = event.object[_ISSUED]["certificate"]
        if not there:
            del self._issued[cluster]


def issued_to(request: Object) -> str:
    """Return the cluster that has been given a certificate for the tunnel by a request; empty if none was."""
    return text_at(request, _ISSUED, "cluster")


def lean(obj: Object) -> Object:
    """Return an object without what only the apiserver needs."""
    metadata = map_at(obj, "metadata")
    kept = {key: value for key, value in metadata.items() if key != "managedFields"}
    return {**obj, "metadata": kept}


def _cluster(obj: Object) -> Object:
    """What the add-on goes by. The rest changes every few minutes."""
    said = (condition_at(obj, kind) for kind in _CONDITIONS)
    metadata = map_at(obj, "metadata")
    kept = ("name", "uid", "labels", "annotations", "deletionTimestamp")
    return {
        "metadata": {key: metadata[key] for key in kept if key in metadata},
        "spec": {"hubAcceptsClient": value_at(obj, "spec", "hubAcceptsClient")},
        "status": {
            "conditions": [
                {key: each.get(key) for key in ("type", "status")} for each in said if each
            ]
        },
    }


def _pack(work: Object) -> Object:
    """A work is large, there are as many as clusters, and few are looked at."""
    metadata = map_at(work, "metadata")
    text = json.dumps(lean(work), separators=(",", ":"))
    return {
        "metadata": {"namespace": metadata.get("namespace"), "name": metadata.get("name")},
        _PACKED: zlib.compress(text.encode(), 1),
    }


def _unpack(kept: Object) -> Object:
    packed = kept.get(_PACKED)
    return cast("Object", json.loads(zlib.decompress(packed))) if packed is not None else kept


def _request(request: Object) -> Object:
    """Keep what may yet be approved or signed; of others, which the apiserver removes after an hour, what was issued."""
    conditions = {value_at(each, "type") for each in list_at(request, "status", "conditions")}
    done = (
        value_at(request, "status", "certificate") is not None
        or bool(conditions & {"Denied", "Failed"})
        or ("Approved" in conditions and text_at(request, "spec", "signerName") != AGENT_SIGNER)
    )
    metadata = map_at(request, "metadata")
    if done:
        left: Object = {"metadata": {"name": metadata.get("name")}}
        certificate = secret_data({"data": map_at(request, "status")}).get("certificate")
        if certificate and text_at(request, "spec", "signerName") == AGENT_SIGNER:
            left[_ISSUED] = {"cluster": cluster_of(request), "certificate": certificate}
        return left
    kept = lean(request)
    if len(json.dumps(kept)) <= _LARGEST_REQUEST:
        return kept
    labels = {key: text_at(metadata, "labels", key) for key in (ADDON_LABEL, CLUSTER_LABEL)}
    asked = ("signerName", "username", "groups")
    spec = {key: value_at(request, "spec", key) for key in asked}
    return {
        **{key: request[key] for key in ("apiVersion", "kind") if key in request},
        "metadata": {"name": metadata.get("name"), "uid": metadata.get("uid"), "labels": labels},
        "spec": {**spec, "request": TOO_LARGE},
    }
