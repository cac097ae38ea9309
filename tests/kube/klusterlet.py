"""A stand-in for OCM's klusterlet, whose own programs cannot be built (a dependency is refused): it registers a
cluster, has add-ons registered (:mod:`kube.klusterlet_addons`) and applies works (:mod:`kube.klusterlet_work`).

It is known to both apiservers by the names that a klusterlet has, with the rights that OCM's own files give those and
no others; so what it cannot do, a klusterlet cannot do either.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any, Final, Literal

import trio

from clusterproxy.errors import Forbidden, NotFound
from clusterproxy.kube.client import open_kube_api
from kube.background import Background
from kube.control_plane import eventually
from kube.klusterlet_addons import AddOnAgent
from kube.klusterlet_work import WorkAgent
from kube.kubeconfigs import certificate_request, encoded, key_pem, kubeconfig, new_key
from kube.ocm_manifests import (
    KLUSTERLET,
    KLUSTERLET_NAMESPACE,
    REGISTRATION_ACCOUNT,
    WORK_ACCOUNT,
    ocm_objects,
)
from kube.ocm_resources import (
    APPLIED_WORKS,
    CLUSTER_LABEL,
    CLUSTERS,
    KUBE_CLIENT_SIGNER,
    REQUESTS,
    USER_PREFIX,
    condition,
    with_conditions,
)

if TYPE_CHECKING:
    from clusterproxy.kube.api import KubeApi
    from kube.control_plane import ControlPlane
    from kube.ocm_hub import OcmHub

Object = dict[str, Any]
Driver = Literal["csr", "token"]

_JOIN_WITHIN_S: Final = 20.0
_AGGREGATE: Final = "open-cluster-management:klusterlet-work:aggregate"


class Klusterlet(Background):
    """Is a cluster's klusterlet while its block lasts; a new one of the same name goes on where it ended.

    Args:
      hub: has accepted the cluster (:meth:`kube.ocm_hub.OcmHub.accept`) or will.
      managed: where add-ons are installed. Of several clusters only one at a time may have an add-on there, as its
        objects have the same names for all of them.
      cluster: its name.
      driver: how add-ons get their rights on the hub: by a certificate, or as a service account by a token.
      lease_s: how long an add-on that renews its lease no more is available yet, a fifth of it.
      expiration_s: of the certificates and tokens that it asks for; None for what their signer thinks right.
      hub_server: the hub's apiserver's URL for add-ons, if they find it elsewhere.
    """

    def __init__(
        self,
        hub: OcmHub,
        managed: ControlPlane,
        cluster: str,
        *,
        driver: Driver = "csr",
        lease_s: float = 60.0,
        expiration_s: int | None = None,
        hub_server: str = "",
    ) -> None:
        super().__init__()
        self.hub = hub
        self.managed = managed
        self.cluster = cluster
        self.driver = driver
        self.lease_s = lease_s
        self.expiration_s = expiration_s
        self.hub_server = hub_server
        self.user = f"{USER_PREFIX}{cluster}:agent"
        self.hub_kubeconfig = managed.directory / f"klusterlet.{cluster}.kubeconfig"

    async def main(self, *, task_status: trio.TaskStatus[None]) -> None:
        registration, work = await trio.to_thread.run_sync(install, self.managed)
        with trio.fail_after(_JOIN_WITHIN_S):
            await self._get_certificate()
        async with (
            open_kube_api(str(self.hub_kubeconfig), qps=200, burst=200) as hub,
            open_kube_api(registration, qps=200, burst=200) as local,
            open_kube_api(work, qps=200, burst=200) as worker,
            trio.open_nursery() as nursery,
        ):
            addons = AddOnAgent(
                hub,
                local,
                cluster=self.cluster,
                agent="agent",
                driver=self.driver,
                kubeconfig=self._addon_kubeconfig(),
                lease_s=self.lease_s,
                expiration_s=self.expiration_s,
            )
            with trio.fail_after(_JOIN_WITHIN_S):
                await self._join(hub)
            nursery.start_soon(addons.run)
            nursery.start_soon(WorkAgent(hub, worker, self.managed, self.cluster).run)
            task_status.started()

    def _addon_kubeconfig(self) -> str:
        """Return what an add-on's secret says, beside which the files are that it names."""
        user: Object = {"client-certificate": "tls.crt", "client-key": "tls.key"}
        if self.driver == "token":
            user = {"tokenFile": "token"}
        return kubeconfig(self.hub.plane, user, namespace="configuration", server=self.hub_server)

    async def _get_certificate(self) -> None:
        """Get the certificate that makes it its cluster's, by the rights that everybody has to ask for one."""
        key = new_key()
        groups = (USER_PREFIX + self.cluster, f"{USER_PREFIX}managed-clusters")
        request: Object = {
            "metadata": {
                "generateName": f"{self.cluster}-",
                "labels": {CLUSTER_LABEL: self.cluster},
            },
            "spec": {
                "request": encoded(certificate_request(key, self.user, groups)),
                "signerName": KUBE_CLIENT_SIGNER,
                "usages": ["digital signature", "key encipherment", "client auth"],
            },
        }
        async with open_kube_api(self.hub.bootstrap_kubeconfig) as api:
            name = (await api.create(REQUESTS, request))["metadata"]["name"]
            while True:
                found = await api.get(REQUESTS, name)
                if certificate := found.get("status", {}).get("certificate"):
                    break
                await trio.sleep(0.05)
        user = {"client-certificate-data": certificate, "client-key-data": encoded(key_pem(key))}
        self.hub_kubeconfig.write_text(kubeconfig(self.hub.plane, user))

    async def _join(self, hub: KubeApi) -> None:
        """Tell the hub that the cluster is there, once it may."""
        version = await trio.to_thread.run_sync(self.managed.call, "GET", "/version")
        cluster: Object = {}
        while not cluster:
            try:
                cluster = await hub.get(CLUSTERS, self.cluster)
            except (NotFound, Forbidden):
                await trio.sleep(0.05)
        status = cluster.get("status", {})
        conditions = with_conditions(
            status.get("conditions") or [],
            condition(
                "ManagedClusterJoined", "True", "ManagedClusterJoined", "Managed cluster joined"
            ),
            condition(
                "ManagedClusterConditionAvailable",
                "True",
                "ManagedClusterAvailable",
                "Managed cluster is available",
            ),
        )
        change = {
            "metadata": {"resourceVersion": cluster["metadata"]["resourceVersion"]},
            "status": {
                "conditions": conditions,
                "version": {"kubernetes": version["gitVersion"]},
            },
        }
        await hub.patch(CLUSTERS, self.cluster, change, subresource="status")


def install(managed: ControlPlane) -> tuple[str, str]:
    """Install what a klusterlet has on its cluster; return the kubeconfigs of its registration and its work agent."""
    meta = {"namespace": KLUSTERLET_NAMESPACE}
    accounts = [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta | {"name": name}}
        for name in (REGISTRATION_ACCOUNT, WORK_ACCOUNT)
    ]
    aggregate = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {"name": _AGGREGATE},
        # Made by the operator (klusterlet_managed_reconcile.go: createAggregationRule).
        "aggregationRule": {
            "clusterRoleSelectors": [
                {"matchLabels": {"open-cluster-management.io/aggregate-to-work": "true"}}
            ]
        },
    }
    [definition] = ocm_objects(
        KLUSTERLET, "0000_01_work.open-cluster-management.io_appliedmanifestworks.crd.yaml"
    )
    managed.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": KLUSTERLET_NAMESPACE}},
        *accounts,
        aggregate,
        definition,
        *ocm_objects(
            KLUSTERLET,
            "klusterlet-registration-clusterrole.yaml",
            "klusterlet-registration-clusterrole-addon-management.yaml",
            "klusterlet-registration-clusterrolebinding.yaml",
            "klusterlet-registration-clusterrolebinding-addon-management.yaml",
            "klusterlet-work-clusterrole.yaml",
            "klusterlet-work-clusterrole-execution.yaml",
            "klusterlet-work-clusterrolebinding.yaml",
            "klusterlet-work-clusterrolebinding-aggregate.yaml",
            "klusterlet-work-clusterrolebinding-execution-admin.yaml",
        ),
    )
    eventually(lambda: managed.call("GET", APPLIED_WORKS.path()), "works can be recorded")
    registration, work = (
        managed.directory / f"{name}.kubeconfig" for name in (REGISTRATION_ACCOUNT, WORK_ACCOUNT)
    )
    for path in (registration, work):
        token = managed.token_for(KLUSTERLET_NAMESPACE, path.stem, seconds=86400)
        path.write_text(kubeconfig(managed, {"token": token}))
    return str(registration), str(work)


def secret_data(managed: ControlPlane, namespace: str, name: str) -> dict[str, bytes] | None:
    """Return what is in a secret, None if there is none."""
    secret = managed.get("v1", "Secret", name, namespace)
    if secret is None:
        return None
    return {key: base64.b64decode(value) for key, value in secret.get("data", {}).items()}
