"""Kinds of objects, and where the apiserver has them. Pure."""

from __future__ import annotations

from typing import Any, Final, TypeAlias, cast
from urllib.parse import quote

import attrs

Object: TypeAlias = dict[str, Any]
"""An object as its JSON says it. What is read from it may be of any shape: it is checked where it is used."""


def value_at(obj: Object, *path: str) -> Any:  # noqa: ANN401  it is what it is
    """Return what is at *path* in an object, None if there is nothing or the way is blocked by no object."""
    found: Any = obj
    for key in path:
        if not isinstance(found, dict):
            return None
        found = cast("Object", found).get(key)
    return found


def text_at(obj: Object, *path: str) -> str:
    """Return the text at *path* in an object, empty if there is none."""
    found = value_at(obj, *path)
    return found if isinstance(found, str) else ""


def map_at(obj: Object, *path: str) -> Object:
    """Return the object at *path* in an object, empty if there is none."""
    found = value_at(obj, *path)
    return cast("Object", found) if isinstance(found, dict) else {}


def list_at(obj: Object, *path: str) -> list[Any]:
    """Return the list at *path* in an object, empty if there is none."""
    found: list[Any] | None = value_at(obj, *path)
    return found if isinstance(found, list) else []


@attrs.frozen
class Resource:
    """A kind of objects.

    Attributes:
      group: the API group, empty for the core.
      plural: its name in paths.
      namespaced: whether an object of it is in a namespace.
    """

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        """What an object of it says as ``apiVersion``."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        """Its name as kubectl takes it, ``deployments.apps``."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(
        self, namespace: str | None = None, name: str | None = None, subresource: str | None = None
    ) -> str:
        """Return the path of a collection, of an object, or of a part of one.

        Without a namespace a collection is that of all namespaces.
        """
        parts = ["apis", self.group] if self.group else ["api"]
        parts.append(self.version)
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [part for part in (name, subresource) if part]
        return "/" + "/".join(quote(part, safe="") for part in parts)


NAMESPACES: Final = Resource("", "v1", "namespaces", "Namespace", namespaced=False)
SECRETS: Final = Resource("", "v1", "secrets", "Secret")
CONFIG_MAPS: Final = Resource("", "v1", "configmaps", "ConfigMap")
SERVICES: Final = Resource("", "v1", "services", "Service")
PODS: Final = Resource("", "v1", "pods", "Pod")
SERVICE_ACCOUNTS: Final = Resource("", "v1", "serviceaccounts", "ServiceAccount")
EVENTS: Final = Resource("", "v1", "events", "Event")
DEPLOYMENTS: Final = Resource("apps", "v1", "deployments", "Deployment")
NETWORK_POLICIES: Final = Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy")
ROLES: Final = Resource("rbac.authorization.k8s.io", "v1", "roles", "Role")
ROLE_BINDINGS: Final = Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding")
LEASES: Final = Resource("coordination.k8s.io", "v1", "leases", "Lease")
TOKEN_REVIEWS: Final = Resource(
    "authentication.k8s.io", "v1", "tokenreviews", "TokenReview", namespaced=False
)
MANAGED_PROXY_CONFIGURATIONS: Final = Resource(
    "proxy.open-cluster-management.io",
    "v1alpha1",
    "managedproxyconfigurations",
    "ManagedProxyConfiguration",
    namespaced=False,
)
CLUSTER_PROFILES: Final = Resource(
    "multicluster.x-k8s.io", "v1alpha1", "clusterprofiles", "ClusterProfile"
)
CLUSTER_ROLES: Final = Resource(
    "rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", namespaced=False
)
CLUSTER_ROLE_BINDINGS: Final = Resource(
    "rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False
)
CERTIFICATE_SIGNING_REQUESTS: Final = Resource(
    "certificates.k8s.io",
    "v1",
    "certificatesigningrequests",
    "CertificateSigningRequest",
    namespaced=False,
)
MANAGED_CLUSTERS: Final = Resource(
    "cluster.open-cluster-management.io",
    "v1",
    "managedclusters",
    "ManagedCluster",
    namespaced=False,
)
MANIFEST_WORKS: Final = Resource(
    "work.open-cluster-management.io", "v1", "manifestworks", "ManifestWork"
)

# Of the add-on API a hub serves v1alpha1, and v1beta1 if it is not old.
MANAGED_CLUSTER_ADDONS: Final = Resource(
    "addon.open-cluster-management.io", "v1beta1", "managedclusteraddons", "ManagedClusterAddOn"
)
CLUSTER_MANAGEMENT_ADDONS: Final = Resource(
    "addon.open-cluster-management.io",
    "v1beta1",
    "clustermanagementaddons",
    "ClusterManagementAddOn",
    namespaced=False,
)
ADDON_DEPLOYMENT_CONFIGS: Final = Resource(
    "addon.open-cluster-management.io", "v1beta1", "addondeploymentconfigs", "AddOnDeploymentConfig"
)
