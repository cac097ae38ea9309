"""A stand-in for the hub's part of OCM's registration, whose own program cannot be built (a dependency is refused).

It does what an add-on sees of pkg/registration/hub: the namespace and the rights of each accepted cluster, the
certificates of klusterlets, the cluster sets that are always there, and the labels that tell of add-ons.
"""

from __future__ import annotations

import base64
import functools
import json
from typing import TYPE_CHECKING, Any, Final

import trio
from cryptography import x509
from cryptography.x509.oid import NameOID

from clusterproxy.errors import NotFound
from clusterproxy.kube.client import open_kube_api
from clusterproxy.kube.controller import Controller
from clusterproxy.kube.reflector import Reflector
from clusterproxy.kube.resource import NAMESPACES, ROLE_BINDINGS, list_at, map_at, text_at, value_at
from kube.background import Background
from kube.ocm_manifests import CLUSTER, CLUSTER_MANAGER_NAMESPACE, ocm_objects
from kube.ocm_resources import (
    ADDON_LABEL,
    ADDONS,
    CLUSTER_LABEL,
    CLUSTER_ROLE_BINDINGS,
    CLUSTER_ROLES,
    CLUSTER_SETS,
    CLUSTERS,
    KUBE_CLIENT_SIGNER,
    REQUESTS,
    USER_PREFIX,
    condition,
    has_condition,
    with_conditions,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from clusterproxy.kube.api import KubeApi

Object = dict[str, Any]

BOOTSTRAP_ACCOUNT: Final = "agent-registration-bootstrap"
BOOTSTRAP_USER: Final = f"system:serviceaccount:{CLUSTER_MANAGER_NAMESPACE}:{BOOTSTRAP_ACCOUNT}"
_FEATURE: Final = "feature.open-cluster-management.io/addon-"
_MANAGER: Final = "registration-controller"
_CLUSTER: Final = "CLUSTER"
_ALWAYS_THERE: Final[dict[str, Object]] = {
    "global": {"selectorType": "LabelSelector", "labelSelector": {}},
    "default": {"selectorType": "ExclusiveClusterSetLabel"},
}
_KINDS: Final = {
    each.kind: each for each in (CLUSTER_ROLES, CLUSTER_ROLE_BINDINGS, NAMESPACES, ROLE_BINDINGS)
}


class HubRegistration(Background):
    """Registers clusters while its block lasts, as an administrator."""

    def __init__(self, admin_kubeconfig: Path) -> None:
        super().__init__()
        self._admin_kubeconfig = admin_kubeconfig

    async def main(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with open_kube_api(str(self._admin_kubeconfig), qps=500, burst=500) as api:
            registration = _Registration(api)
            await registration.prepare()
            async with trio.open_nursery() as nursery:
                registration.start(nursery)
                task_status.started()


class _Registration:
    def __init__(self, api: KubeApi) -> None:
        self._api = api
        self._clusters = Reflector(api, CLUSTERS)
        self._addons = Reflector(api, ADDONS)
        self._requests = Reflector(api, REQUESTS, label_selector=f"{CLUSTER_LABEL},!{ADDON_LABEL}")
        self._by_cluster = Controller("clusters", self._reconcile_cluster, workers=8)
        self._by_request = Controller("requests", self._reconcile_request)
        self._clusters.subscribe(lambda event: self._by_cluster.enqueue(_name(event.object)))
        self._addons.subscribe(lambda event: self._by_cluster.enqueue(_namespace(event.object)))
        self._requests.subscribe(lambda event: self._by_request.enqueue(_name(event.object)))
        # What a cluster has got, not to be written anew whenever an add-on of it changes.
        self._with_rights: set[str] = set()

    async def prepare(self) -> None:
        for name, selector in _ALWAYS_THERE.items():
            cluster_set = {"metadata": {"name": name}, "spec": {"clusterSelector": selector}}
            await self._api.apply(CLUSTER_SETS, cluster_set, field_manager=_MANAGER, force=True)
        await self._apply(
            ocm_objects(
                CLUSTER,
                "managedcluster-registration-clusterrole.yaml",
                "managedcluster-work-clusterrole.yaml",
            )
        )

    def start(self, nursery: trio.Nursery) -> None:
        for each in (self._clusters, self._addons, self._requests):
            nursery.start_soon(each.run)
        for controller in (self._by_cluster, self._by_request):
            nursery.start_soon(controller.run)

    # -- clusters (pkg/registration/hub/managedcluster, addon/discovery_controller.go) ----------------

    async def _reconcile_cluster(self, name: str) -> None:
        cluster = self._clusters.items.get(("", name))
        accepted = cluster is not None and value_at(cluster, "spec", "hubAcceptsClient") is True
        if not accepted and name in self._with_rights:
            await self._withdraw(_rights(name))
            self._with_rights.discard(name)
        if cluster is None or text_at(cluster, "metadata", "deletionTimestamp"):
            return
        if accepted and name not in self._with_rights:
            space = {
                "kind": "Namespace",
                "metadata": {"name": name, "labels": {CLUSTER_LABEL: name}},
            }
            await self._apply([space, *_rights(name)])
            self._with_rights.add(name)
        if accepted:
            said = ("True", "HubClusterAdminAccepted", "Accepted by hub cluster admin")
        elif has_condition(cluster, "HubAcceptedManagedCluster"):
            said = ("False", "HubClusterAdminDenied", "Denied by hub cluster admin")
        else:
            return
        conditions = list_at(cluster, "status", "conditions")
        changed = with_conditions(conditions, condition("HubAcceptedManagedCluster", *said))
        if changed != conditions:
            await self._patch_cluster(cluster, {"status": {"conditions": changed}}, "status")
        else:
            await self._label(cluster)

    async def _label(self, cluster: Object) -> None:
        present = map_at(cluster, "metadata", "labels")
        wanted: dict[str, str | None] = {
            _FEATURE + addon: _feature(obj)
            for (namespace, addon), obj in self._addons.items.items()
            if namespace == _name(cluster) and not text_at(obj, "metadata", "deletionTimestamp")
        }
        gone = {key: None for key in present if key.startswith(_FEATURE) and key not in wanted}
        if any(present.get(key) != value for key, value in wanted.items()) or gone:
            await self._patch_cluster(cluster, {"metadata": {"labels": wanted | gone}}, None)

    async def _patch_cluster(self, cluster: Object, change: Object, part: str | None) -> None:
        version = {"resourceVersion": text_at(cluster, "metadata", "resourceVersion")}
        change = change | {"metadata": {**change.get("metadata", {}), **version}}
        await self._api.patch(CLUSTERS, _name(cluster), change, subresource=part)

    async def _apply(self, objects: Sequence[Object]) -> None:
        for obj in objects:
            await self._api.apply(_KINDS[obj["kind"]], obj, field_manager=_MANAGER, force=True)

    async def _withdraw(self, objects: Sequence[Object]) -> None:
        for obj in objects:
            try:
                await self._api.delete(_KINDS[obj["kind"]], _name(obj), _namespace(obj) or None)
            except NotFound:
                continue

    # -- certificates of klusterlets (pkg/registration/register/csr/approve_reconciler.go) -------------

    async def _reconcile_request(self, name: str) -> None:
        request = self._requests.items.get(("", name))
        if request is None or list_at(request, "status", "conditions"):
            return
        cluster = map_at(request, "metadata", "labels")[CLUSTER_LABEL]
        asked = x509.load_pem_x509_csr(base64.b64decode(request["spec"]["request"])).subject
        [user] = (each.value for each in asked.get_attributes_for_oid(NameOID.COMMON_NAME))
        groups = {each.value for each in asked.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)}
        if (
            request["spec"]["signerName"] != KUBE_CLIENT_SIGNER
            or groups - {f"{USER_PREFIX}managed-clusters"} != {USER_PREFIX + cluster}
            or not str(user).startswith(f"{USER_PREFIX}{cluster}:")
            or request["spec"]["username"] not in (BOOTSTRAP_USER, user)
        ):
            return
        reason = "AutoApprovedByHubCSRApprovingController"
        approved = condition("Approved", "True", reason, "Auto approved")
        request = request | {"status": {"conditions": [approved]}}
        await self._api.replace(REQUESTS, request, subresource="approval")


def _rights(cluster: str) -> list[Object]:
    """Return who may do what for an accepted cluster."""
    objects: list[Object] = json.loads(_rights_template().replace(_CLUSTER, cluster))
    return objects


@functools.cache
def _rights_template() -> str:
    objects = ocm_objects(
        CLUSTER,
        "managedcluster-clusterrole.yaml",
        "managedcluster-clusterrolebinding.yaml",
        "managedcluster-registration-rolebinding.yaml",
        "managedcluster-work-rolebinding.yaml",
        ManagedClusterName=_CLUSTER,
        Accepted="yes",
    )
    for obj in objects:
        # Of a controller that keeps the right until the klusterlet has removed all, which these tests need not.
        obj["metadata"].pop("finalizers", None)
    return json.dumps(objects)


def _feature(addon: Object) -> str:
    if has_condition(addon, "Available"):
        return "available"
    return "unhealthy" if has_condition(addon, "Available", "False") else "unreachable"


def _name(obj: Object) -> str:
    return text_at(obj, "metadata", "name")


def _namespace(obj: Object) -> str:
    return text_at(obj, "metadata", "namespace")
