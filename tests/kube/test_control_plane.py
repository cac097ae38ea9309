"""The control planes of the tests behave as a cluster's."""

from __future__ import annotations

import json
import os
import ssl
import threading
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from kube.control_plane import ApiError, eventually

if TYPE_CHECKING:
    from kube.control_plane import ControlPlane

pytestmark = pytest.mark.kube

MPC = "proxy.open-cluster-management.io/v1alpha1"


def as_account(plane: ControlPlane, namespace: str, account: str) -> httpx.Client:
    """A client with the rights in a service account's kubeconfig."""
    config = json.loads(plane.kubeconfig_for(namespace, account).read_text())
    token = config["users"][0]["user"]["token"]
    return httpx.Client(
        base_url=config["clusters"][0]["cluster"]["server"],
        headers={"Authorization": f"Bearer {token}"},
        verify=ssl.create_default_context(cafile=plane.ca),
        trust_env=False,
    )


def configuration(name: str, **spec: Any) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "authentication": {},
        "proxyServer": {"image": "server"},
        "proxyAgent": {"image": "agent"},
    }
    return {
        "apiVersion": MPC,
        "kind": "ManagedProxyConfiguration",
        "metadata": {"name": name},
        "spec": wanted | spec,
    }


def test_both_planes_are_up(hub: ControlPlane, managed: ControlPlane) -> None:
    for plane in (hub, managed):
        version = plane.call("GET", "/version")
        assert version["gitVersion"].startswith("v1."), version
        assert set(plane.pids()) == {"etcd", "kube-apiserver", "kube-controller-manager"}
    assert hub.get("v1", "Namespace", "default") is not None
    assert not set(hub.pids().values()) & set(managed.pids().values())


def test_hub_has_the_custom_resources(hub: ControlPlane) -> None:
    found = {
        crd["spec"]["names"]["kind"]: crd
        for crd in hub.list("apiextensions.k8s.io/v1", "CustomResourceDefinition")
    }
    assert {"ManagedClusterAddOn", "ManifestWork", "ManagedProxyConfiguration"} <= found.keys()
    assert "v1beta1" in found["ManagedClusterAddOn"]["status"]["storedVersions"]
    profile = found["ClusterProfile"]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    assert "accessProviders" in profile["properties"]["status"]["properties"]


def test_account_has_the_rights_that_it_was_given_and_no_others(hub: ControlPlane) -> None:
    namespace = hub.create_namespace()
    hub.apply(
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": "reader", "namespace": namespace},
        }
    )
    path = f"/api/v1/namespaces/{namespace}/configmaps"
    with as_account(hub, namespace, "reader") as reader:
        denied = reader.get(path)
        assert denied.status_code == 403
        assert f"system:serviceaccount:{namespace}:reader" in denied.json()["message"]

        rbac = {"apiVersion": "rbac.authorization.k8s.io/v1"}
        meta = {"metadata": {"name": "reader", "namespace": namespace}}
        rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["list"]}]
        subject = {"kind": "ServiceAccount", "name": "reader", "namespace": namespace}
        reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "reader"}
        hub.apply(
            {**rbac, "kind": "Role", **meta, "rules": rules},
            {**rbac, "kind": "RoleBinding", **meta, "roleRef": reference, "subjects": [subject]},
        )
        eventually(lambda: reader.get(path).is_success, "the role takes effect")
        assert reader.get(path.replace("configmaps", "secrets")).status_code == 403


def test_configuration_gets_its_defaults(hub: ControlPlane) -> None:
    [found] = hub.apply(
        configuration(
            "defaults",
            authentication={"signer": {}, "dump": {"secrets": {}}},
            deploy={"ports": {}},
            proxyServer={
                "image": "server",
                "entrypoint": {"type": "PortForward", "loadBalancerService": {}},
            },
        )
    )
    assert found["spec"] == {
        "authentication": {
            "signer": {"type": "SelfSigned"},
            "dump": {
                "secrets": {
                    "signingProxyServerSecretName": "proxy-server",
                    "signingProxyClientSecretName": "proxy-client",
                    "signingAgentServerSecretName": "agent-server",
                }
            },
        },
        "deploy": {
            "ports": {
                "proxyServer": 8090,
                "agentServer": 8091,
                "healthServer": 8092,
                "adminServer": 8095,
            }
        },
        "proxyServer": {
            "image": "server",
            "replicas": 3,
            "inClusterServiceName": "proxy-entrypoint",
            "namespace": "open-cluster-management-cluster-proxy",
            "entrypoint": {
                "type": "PortForward",
                "port": 8091,
                "loadBalancerService": {"name": "proxy-agent-entrypoint"},
            },
        },
        "proxyAgent": {"image": "agent", "replicas": 3},
    }
    hub.delete(found)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({"authentication": {"signer": {"type": "Self"}}}, "spec.authentication.signer.type"),
        (
            {"proxyServer": {"image": "server", "entrypoint": {"type": "Ingress"}}},
            "spec.proxyServer.entrypoint.type",
        ),
        (
            {"proxyServer": {"image": "s", "entrypoint": {"type": "Hostname", "port": 0}}},
            "spec.proxyServer.entrypoint.port",
        ),
        ({"proxyServer": {}}, "spec.proxyServer.image"),
        ({"deploy": {}}, "spec.deploy.ports"),
    ],
)
def test_configuration_is_checked(hub: ControlPlane, spec: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ApiError, match=complaint) as refused:
        hub.apply(configuration("refused", **spec))
    assert refused.value.status == 422
    assert hub.get(MPC, "ManagedProxyConfiguration", "refused") is None


def test_status_of_a_configuration_is_apart(hub: ControlPlane) -> None:
    condition = {
        "type": "ProxyServerDeployed",
        "status": "True",
        "reason": "SuccessfullyDeployed",
        "message": "Replicas: 1",
        "lastTransitionTime": "2026-01-02T03:04:05Z",
    }
    [found] = hub.apply({**configuration("status"), "status": {"lastObservedGeneration": 1}})
    assert "status" not in found
    changed = hub.patch(found, {"status": {"conditions": [condition]}}, subresource="status")
    assert changed["status"]["conditions"] == [condition]
    assert changed["metadata"]["generation"] == found["metadata"]["generation"]
    with pytest.raises(ApiError, match="reason"):
        hub.patch(
            found, {"status": {"conditions": [{**condition, "reason": ""}]}}, subresource="status"
        )
    hub.delete(found)


def test_what_an_object_owned_goes_with_it(hub: ControlPlane) -> None:
    namespace = hub.create_namespace()
    [owner] = hub.apply(configuration("owner"))
    reference = {
        "apiVersion": MPC,
        "kind": "ManagedProxyConfiguration",
        "name": "owner",
        "uid": owner["metadata"]["uid"],
        "blockOwnerDeletion": True,
    }
    hub.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": "owned",
                "namespace": namespace,
                "ownerReferences": [reference],
            },
        }
    )
    hub.delete(owner)
    eventually(lambda: hub.get("v1", "ConfigMap", "owned", namespace) is None, "it is collected")


def test_deployment_controller_makes_pods_with_tokens(managed: ControlPlane) -> None:
    namespace = managed.create_namespace()
    labels = {"app": "web"}
    managed.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "web", "namespace": namespace},
            "spec": {
                "replicas": 2,
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {"containers": [{"name": "web", "image": "web"}]},
                },
            },
        }
    )
    eventually(lambda: len(managed.list("v1", "Pod", namespace, "app=web")) == 2, "two pods")
    for pod in managed.list("v1", "Pod", namespace):
        [volume] = pod["spec"]["volumes"]
        assert any("serviceAccountToken" in source for source in volume["projected"]["sources"])


def test_apiserver_hangs_stops_and_comes_back(managed: ControlPlane) -> None:
    namespace = managed.create_namespace()
    trust = ssl.create_default_context(cafile=managed.ca)
    with httpx.Client(base_url=managed.server, verify=trust, trust_env=False) as client:
        with managed.hanging_apiserver(), pytest.raises(httpx.TimeoutException):
            client.get("/version", timeout=0.3)
        with managed.stopped_apiserver(), pytest.raises(httpx.ConnectError):
            client.get("/version")
        assert client.get("/version").is_success
    assert managed.get("v1", "Namespace", namespace) is not None
    assert all(os.path.exists(f"/proc/{pid}") for pid in managed.pids().values())


def test_it_works_at_once_after_a_restart_by_a_thread_that_ends(managed: ControlPlane) -> None:
    before = managed.pids()

    def restart() -> None:
        managed.stop_apiserver()
        managed.start_apiserver()

    thread = threading.Thread(target=restart)
    thread.start()
    thread.join()
    # The controllers look at new objects without a pause, and what the thread has started outlives it.
    managed.create_namespace()
    after = managed.pids()
    assert after["etcd"] == before["etcd"]
    assert not {after["kube-apiserver"], after["kube-controller-manager"]} & set(before.values())
