"""The kinds of Open Cluster Management that its stand-ins use, and what is the same for all of them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

from clusterproxy.kube.resource import Resource

Object = dict[str, Any]

_RBAC: Final = "rbac.authorization.k8s.io"
_OCM: Final = "open-cluster-management.io"

# OCM's own programs speak v1alpha1 with add-ons.
ADDONS: Final = Resource(f"addon.{_OCM}", "v1alpha1", "managedclusteraddons", "ManagedClusterAddOn")
CLUSTERS: Final = Resource(
    f"cluster.{_OCM}", "v1", "managedclusters", "ManagedCluster", namespaced=False
)
CLUSTER_SETS: Final = Resource(
    f"cluster.{_OCM}", "v1beta2", "managedclustersets", "ManagedClusterSet", namespaced=False
)
WORKS: Final = Resource(f"work.{_OCM}", "v1", "manifestworks", "ManifestWork")
APPLIED_WORKS: Final = Resource(
    f"work.{_OCM}", "v1", "appliedmanifestworks", "AppliedManifestWork", namespaced=False
)
REQUESTS: Final = Resource(
    "certificates.k8s.io",
    "v1",
    "certificatesigningrequests",
    "CertificateSigningRequest",
    namespaced=False,
)
CLUSTER_ROLES: Final = Resource(_RBAC, "v1", "clusterroles", "ClusterRole", namespaced=False)
CLUSTER_ROLE_BINDINGS: Final = Resource(
    _RBAC, "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False
)

CLUSTER_LABEL: Final = f"{_OCM}/cluster-name"
ADDON_LABEL: Final = f"{_OCM}/addon-name"
KUBE_CLIENT_SIGNER: Final = "kubernetes.io/kube-apiserver-client"
USER_PREFIX: Final = f"system:{_OCM.removesuffix('.io')}:"
"""Of the name of an agent; who has the group of this and the cluster's name is that cluster's."""


def condition(
    kind: str, status: str, reason: str, message: str = "", *, generation: int | None = None
) -> Object:
    """Return a condition as of now."""
    found = {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
    }
    return found if generation is None else found | {"observedGeneration": generation}


def with_conditions(present: list[Object], *wanted: Object) -> list[Object]:
    """Return conditions with these in the place of those of their types, which keep the time of their status."""
    merged = {each["type"]: each for each in present}
    for each in wanted:
        there = merged.get(each["type"], {})
        same = there.get("status") == each["status"]
        since = there["lastTransitionTime"] if same else each["lastTransitionTime"]
        merged[each["type"]] = each | {"lastTransitionTime": since}
    return list(merged.values())


def has_condition(obj: Object, kind: str, status: str = "True") -> bool:
    """Tell whether an object has a condition with this status."""
    conditions = obj.get("status", {}).get("conditions") or ()
    return any(each["type"] == kind and each["status"] == status for each in conditions)
