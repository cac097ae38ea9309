"""The manager in a hub of Open Cluster Management, with its own add-on manager: from a cluster to its agent."""

from __future__ import annotations

import base64
import json
import logging
import os
import signal
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
import yaml
from cryptography import x509

from clusterproxy.addon.registration import (
    AGENT_SIGNER,
    KUBE_CLIENT_SIGNER,
    agent_registrations,
)
from clusterproxy.addon.spec_hash import spec_hash
from clusterproxy.errors import KubeError
from clusterproxy.kube.client import open_kube_api
from clusterproxy.kube.resource import CERTIFICATE_SIGNING_REQUESTS
from kube.addon_installation import (
    ADDON,
    CLUSTER,
    NAME,
    OF_HUB,
    OF_TUNNEL,
    PROXY,
    AddOnInstallation,
    addon_installed,
    agent_there,
)
from kube.control_plane import ApiError, eventually
from kube.installation import MPC, PREFIX, RBAC, installed
from kube.klusterlet import Klusterlet, secret_data
from kube.kubeconfigs import certificate_request, encoded, new_key
from kube.ocm_resources import ADDON_LABEL, CLUSTER_LABEL
from kube.test_manager import put_secret

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kube.control_plane import ControlPlane
    from kube.ocm_hub import OcmHub

pytestmark = pytest.mark.kube

Object = dict[str, Any]

_log = logging.getLogger(__name__)

_DEFINITION: Final = Path(__file__).parents[2] / "deploy/crds/managedproxyconfigurations.yaml"

CSR: Final = "certificates.k8s.io/v1"
CONFIGS: Final = {
    "managedproxyconfigurations": f"managedproxyconfigurations.{PROXY}//cluster-proxy",
}
DEPLOYMENT: Final = "Deployment cluster-proxy-proxy-agent"
SERVING_CERTIFICATE: Final = "cluster-proxy-service-proxy-server-cert"


@pytest.fixture
def manager(ocm_hub: OcmHub, tmp_path: Path) -> Iterator[AddOnInstallation]:
    with addon_installed(ocm_hub, tmp_path) as installation:
        yield installation


@pytest.fixture
def at_work(manager: AddOnInstallation) -> AddOnInstallation:
    """A manager that clusters can have the add-on by, without service proxies."""
    manager.offer()
    manager.configure()
    manager.run()
    manager.await_reconciled()
    return manager


@pytest.fixture
def cluster(accepted_cluster: str) -> str:
    return accepted_cluster


# -- D2, D3, D5, D7, D8 ----------------------------------------------------------------------------


def test_a_cluster_gets_its_agent(
    ocm_hub: OcmHub,
    managed: ControlPlane,
    at_work: AddOnInstallation,
    cluster: str,
) -> None:
    manager = at_work
    with Klusterlet(ocm_hub, managed, cluster):
        began = time.monotonic()
        with manager.enabled(cluster):
            secrets = [
                manager.eventually(
                    partial(secret_data, managed, manager.agents, name), f"{name} is there"
                )
                for name in (OF_HUB, OF_TUNNEL)
            ]
            manager.eventually(lambda: agent_there(managed, manager.agents), "the agent is there")
            took = time.monotonic() - began
            manager.await_said(cluster, "ManifestApplied", reason="AddonManifestApplied")
            manager.await_said(cluster, "RegistrationApplied", reason="SetPermissionApplied")
            manager.await_said(cluster, "Progressing", "False", "Completed")
            # About 2 s; --log-cli-level=INFO shows it.
            _log.info("from the add-on to the secrets and the agent: %.1f s", took)
            assert took < 10
            # D2, D3
            status = manager.addon(cluster)["status"]
            assert status["supportedConfigs"] == [
                {"group": PROXY, "resource": "managedproxyconfigurations"},
                {"group": ADDON, "resource": "addondeploymentconfigs"},
            ]
            assert status["namespace"] == manager.agents
            of_kube, own = status["registrations"]
            assert of_kube["kubeClient"]["driver"] == "csr"
            assert own["customSigner"]["signerName"] == AGENT_SIGNER
            # A7, and whose it is
            leaf = x509.load_pem_x509_certificate(secrets[1]["tls.crt"])
            names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            uri = f"urn:open-cluster-management:cluster-proxy:cluster:{cluster}"
            assert names.get_values_for_type(x509.UniformResourceIdentifier) == [uri]
            leaf.verify_directly_issued_by(
                x509.load_pem_x509_certificate(manager.secret("cluster-proxy-signer")["ca.crt"])
            )
            # Its rights
            for kind in ("Role", "RoleBinding"):
                found = manager.get(RBAC, kind, "cluster-proxy-addon-agent", cluster)
                [owner] = found["metadata"]["ownerReferences"]
                assert (owner["kind"], owner["blockOwnerDeletion"]) == ("ManagedClusterAddOn", True)
            review = ("cluster-proxy-addon-agent-tokenreview", "default")
            assert manager.get(RBAC, "ClusterRoleBinding", *review)["subjects"]
            # D5, D7, C18
            work = manager.work(cluster)
            assert work["metadata"]["name"] == "addon-cluster-proxy-deploy-0"
            [owner] = work["metadata"]["ownerReferences"]
            assert (owner["kind"], owner["controller"]) == ("ManagedClusterAddOn", True)
            live = manager.configuration()
            assert manager.hashes(cluster) == {
                CONFIGS["managedproxyconfigurations"]: spec_hash(live)
            }
        # D8
        manager.eventually(
            lambda: agent_there(managed, manager.agents) is None, "the agent is removed"
        )
        assert managed.get("v1", "Namespace", manager.agents) is not None
        manager.eventually(
            lambda: manager.plane.get(RBAC, "Role", "cluster-proxy-addon-agent", cluster) is None,
            "its rights are gone",
        )
    assert manager.running, manager.log_text()


# -- D1, D4 ----------------------------------------------------------------------------------------


def test_nothing_before_the_hub_has_taken_the_addon(
    ocm_hub: OcmHub, manager: AddOnInstallation, cluster: str
) -> None:
    ocm_hub.accept("other", "unaccepted")
    plane = manager.plane
    found = plane.get(CLUSTER, "ManagedCluster", "unaccepted")
    assert found is not None
    plane.patch(found, {"spec": {"hubAcceptsClient": False}})
    program = ocm_hub.pids()["addon-manager"]
    os.kill(program, signal.SIGSTOP)
    try:
        # Of an old release, which installed the add-on itself.
        offered = manager.offer("self")
        manager.configure()
        manager.run()
        manager.await_reconciled()
        manager.eventually(
            lambda: "annotations" not in manager.offered()["metadata"],
            "the hub's add-on manager may look after it",
        )
        manager.enable("unaccepted", owner=offered)
        manager.enable(cluster)
        manager.enable("other", owner=offered)
        manager.await_said("other", "RegistrationApplied")
        manager.settle()
        for each in (cluster, "unaccepted"):
            assert "registrations" not in manager.addon(each).get("status", {}), each
            role = plane.get(RBAC, "Role", "cluster-proxy-addon-agent", each)
            assert role is None, each
        assert not manager.works("other")
    finally:
        os.kill(program, signal.SIGCONT)
    try:
        for each in (cluster, "other"):
            manager.await_said(each, "Configured")
            manager.await_work(each, lambda there: there[DEPLOYMENT], f"{each} has a work")
        assert not manager.works("unaccepted")
    finally:
        ocm_hub.remove("other", "unaccepted")


# -- D6, D7, C13 -----------------------------------------------------------------------------------


def test_whatever_changes_is_rendered_at_once(manager: AddOnInstallation, cluster: str) -> None:
    plane = manager.plane
    manager.offer()
    manager.configure()
    manager.run(service_proxy=True)
    manager.await_reconciled()
    manager.enable(cluster)
    # D6: an error is told, and recovered from without a wait.
    manager.await_said(
        cluster, "ManifestApplied", "False", "ManifestWorkApplyFailed", SERVING_CERTIFICATE
    )
    ca = manager.secret("cluster-proxy-signer")["ca.crt"]
    put_secret(manager, SERVING_CERTIFICATE, {"tls.crt": b"one", "tls.key": b"key"})
    serving = "Secret cluster-proxy-service-proxy-server-certificates"

    def crt(manifest: Object, key: str = "tls.crt") -> bytes:
        return base64.b64decode(manifest["data"][key])

    manager.await_work(cluster, lambda there: crt(there[serving]) == b"one", "it is rendered")
    eventually(lambda: manager.said(cluster, "ManifestApplied") is None, "the error is taken back")
    # The service proxies' certificate
    put_secret(manager, SERVING_CERTIFICATE, {"tls.crt": b"two", "tls.key": b"key"})
    manager.await_work(cluster, lambda there: crt(there[serving]) == b"two", "the new certificate")
    # The ManagedProxyConfiguration
    live = manager.configure(proxyAgent={"replicas": 2, "image": "quay.io/a/agent:v2"})
    manager.await_work(
        cluster,
        lambda there: (
            (there[DEPLOYMENT]["spec"]["replicas"], generation(there))
            == (2, live["metadata"]["generation"])
        ),
        "the new configuration",
    )
    key = CONFIGS["managedproxyconfigurations"]
    manager.eventually(
        lambda: manager.hashes(cluster)[key] == spec_hash(live), "the work has the hash of it"
    )
    # The cluster's mirrors
    found = plane.get(CLUSTER, "ManagedCluster", cluster)
    assert found is not None
    mirrors = {"registries": [{"source": "quay.io/a", "mirror": "mirror.example/b"}]}
    annotations = {"open-cluster-management.io/image-registries": json.dumps(mirrors)}
    plane.patch(found, {"metadata": {"annotations": annotations}})
    manager.await_work(
        cluster,
        lambda there: "mirror.example/b/agent:v2" in images(there[DEPLOYMENT]),
        "the cluster's mirror",
    )
    # Somebody's hand
    work = manager.work(cluster)
    plane.patch(work, {"spec": {"workload": {"manifests": []}}, "metadata": {"labels": {"a": "b"}}})
    work = manager.await_work(cluster, lambda there: there[DEPLOYMENT], "the work is put right")
    assert work["metadata"]["labels"]["a"] == "b"
    plane.delete(manager.work(cluster))
    manager.await_work(
        cluster, lambda there: there[DEPLOYMENT], "the work is made anew after it was deleted"
    )
    plane.delete(manager.get(RBAC, "Role", "cluster-proxy-addon-agent", cluster) | kind_of("Role"))
    manager.eventually(
        lambda: plane.get(RBAC, "Role", "cluster-proxy-addon-agent", cluster),
        "the role is made anew",
    )
    # The address of the load balancer
    entrypoint = {"type": "LoadBalancerService", "loadBalancerService": {"name": "lb"}}
    manager.configure(proxyServer={"entrypoint": entrypoint})
    manager.await_said(
        cluster, "ManifestApplied", "False", "ManifestWorkApplyFailed", "not yet provisioned"
    )
    service = manager.get("v1", "Service", "lb")
    address = {"loadBalancer": {"ingress": [{"hostname": "lb.example"}]}}
    plane.patch(service, {"status": address}, subresource="status")
    manager.await_work(
        cluster,
        lambda there: "--proxy-server-host=lb.example" in arguments(there[DEPLOYMENT]),
        "the load balancer's address",
    )
    # The authorities
    secret = manager.get("v1", "Secret", "cluster-proxy-signer")
    plane.patch(secret, {"metadata": {"annotations": {f"{PREFIX}rotate-ca": "1"}}})
    manager.await_work(
        cluster,
        lambda there: (
            ca in (bundle := crt(there["Secret cluster-proxy-ca"], "ca.crt"))
            and bundle.count(b"BEGIN") == 2
        ),
        "both authorities",
    )
    assert manager.running, manager.log_text()


def generation(there: dict[str, Object]) -> int:
    annotations = there[DEPLOYMENT]["metadata"]["annotations"]
    return int(annotations[f"{PREFIX}configuration-generation"])


def images(deployment: Object) -> set[str]:
    return {each["image"] for each in deployment["spec"]["template"]["spec"]["containers"]}


def arguments(deployment: Object) -> list[str]:
    containers = deployment["spec"]["template"]["spec"]["containers"]
    return [arg for each in containers for arg in each.get("args", ())]


def kind_of(kind: str) -> Object:
    return {"apiVersion": RBAC, "kind": kind}


# -- A5, D5, D7 ------------------------------------------------------------------------------------


def test_a_cluster_can_be_configured_by_itself(
    ocm_hub: OcmHub, managed: ControlPlane, at_work: AddOnInstallation, cluster: str
) -> None:
    manager = at_work
    key = f"addondeploymentconfigs.{ADDON}/{manager.namespace}/own"
    with Klusterlet(ocm_hub, managed, cluster), manager.enabled(cluster, "own"):
        manager.await_said(
            cluster, "ManifestApplied", "False", "ManifestWorkApplyFailed", "own not found"
        )
        config = manager.config("own", nodePlacement={"nodeSelector": {"a": "b"}})
        manager.await_said(cluster, "ManifestApplied")
        manager.await_said(cluster, "Progressing", "False", "Completed")
        assert manager.hashes(cluster)[key] == spec_hash(config)
        agent = agent_there(managed, manager.agents)
        assert agent is not None
        assert agent["spec"]["template"]["spec"]["nodeSelector"] == {"a": "b"}
        # What the cluster refuses
        bad = [{"name": "agentDeploymentName", "value": "No_Name"}]
        config = manager.config("own", customizedVariables=bad)
        manager.await_said(
            cluster, "ManifestApplied", "False", "AddonManifestAppliedFailed", "No_Name"
        )
        # What cannot be rendered
        manager.config("own", customizedVariables=[{"name": "replicas", "value": "many"}])
        manager.await_said(
            cluster, "ManifestApplied", "False", "ManifestWorkApplyFailed", "replicas"
        )
        config = manager.config("own", customizedVariables=[{"name": "replicas", "value": "2"}])
        manager.await_said(cluster, "ManifestApplied")
        manager.eventually(
            lambda: manager.hashes(cluster)[key] == spec_hash(config), "the work has its hash"
        )
        assert manager.manifest(cluster, "Deployment")["spec"]["replicas"] == 2
        manager.await_said(cluster, "Progressing", "False", "Completed")


# -- D9, D10 ---------------------------------------------------------------------------------------


def test_agents_with_tokens_all_keep_their_rights(
    ocm_hub: OcmHub, managed: ControlPlane, at_work: AddOnInstallation, cluster: str
) -> None:
    manager = at_work
    plane = manager.plane
    ocm_hub.accept("second")
    manager.config("elsewhere", agentInstallNamespace=f"{manager.agents}-2")
    clusters = (cluster, "second")
    try:
        with (
            Klusterlet(ocm_hub, managed, cluster, driver="token"),
            Klusterlet(ocm_hub, managed, "second", driver="token"),
        ):
            manager.enable(cluster)
            manager.enable("second", "elsewhere")
            for each in clusters:
                manager.await_said(each, "RegistrationApplied")
                user = f"system:serviceaccount:{each}:cluster-proxy-agent"
                manager.eventually(
                    partial(is_registered, manager, each, {"user": user}), f"{user} is registered"
                )
            manager.eventually(
                lambda: all(may_all(plane, manager.namespace, each) for each in clusters),
                "both have their rights",
            )
            # The subject stays when the manager looks again.
            manager.configure(proxyAgent={"replicas": 2})
            for each in clusters:
                manager.await_work(
                    each, lambda there: there[DEPLOYMENT]["spec"]["replicas"] == 2, "it changes"
                )
                user = f"system:serviceaccount:{each}:cluster-proxy-agent"
                assert is_registered(manager, each, {"user": user})
            manager.disable("second")
            names = (
                ("RoleBinding", "cluster-proxy-addon-agent:portforward:second"),
                ("ClusterRoleBinding", "cluster-proxy-addon-agent-tokenreview:second"),
            )
            manager.eventually(
                lambda: not any(plane.get(RBAC, *each, manager.namespace) for each in names),
                "what the second had is gone",
            )
            assert may_all(plane, manager.namespace, cluster)
            manager.disable(cluster)
    finally:
        ocm_hub.remove("second")


def is_registered(manager: AddOnInstallation, cluster: str, subject: Object) -> bool:
    """Whether that is who the cluster's agent is on the hub."""
    return any(
        each["kubeClient"].get("subject") == subject
        for each in manager.addon(cluster).get("status", {}).get("registrations", ())
        if each["type"] == "kubeClient"
    )


def may_all(plane: ControlPlane, proxy_namespace: str, cluster: str) -> bool:
    """Whether the account of a cluster's agent may do what agents do."""
    return all(
        plane.call(
            "POST",
            "/apis/authorization.k8s.io/v1/subjectaccessreviews",
            {
                "spec": {
                    "user": f"system:serviceaccount:{cluster}:cluster-proxy-agent",
                    "resourceAttributes": attributes,
                }
            },
        )["status"]["allowed"]
        for attributes in (
            {"group": "authentication.k8s.io", "resource": "tokenreviews", "verb": "create"},
            {
                "group": "coordination.k8s.io",
                "resource": "leases",
                "verb": "update",
                "namespace": cluster,
            },
            {
                "resource": "pods",
                "subresource": "portforward",
                "verb": "create",
                "namespace": proxy_namespace,
            },
        )
    )


# -- bad requests ----------------------------------------------------------------------------------


def test_only_right_requests_are_approved(
    ocm_hub: OcmHub, managed: ControlPlane, at_work: AddOnInstallation, cluster: str
) -> None:
    manager = at_work
    plane = manager.plane
    ocm_hub.accept("victim")
    with Klusterlet(ocm_hub, managed, cluster) as klusterlet, manager.enabled(cluster):
        manager.enable("victim")
        for each in (cluster, "victim"):
            manager.await_said(each, "RegistrationApplied")
        manager.await_said(cluster, "ManifestApplied")
        ca = manager.secret("cluster-proxy-signer")["ca.crt"]
        subjects = {each.signer: each.subject for each in agent_registrations(ca)}
        own = subjects[AGENT_SIGNER]
        good: Object = {
            "user": own.user,
            "groups": own.groups,
            "units": own.organization_units,
            "names": ("cluster-proxy.addon.open-cluster-management.io",),
        }
        admin = {"user": "admin", "groups": ("admins",), "units": (), "names": ()}
        asked = {
            "ForeignSubject": request(cluster, AGENT_SIGNER, good | {"user": "cluster-admin"}),
            "ForeignSubject ": request(cluster, KUBE_CLIENT_SIGNER, admin),
            "UnknownSigner": request(cluster, "kubernetes.io/kubelet-serving", good),
            "ForeignName": request(cluster, AGENT_SIGNER, good | {"names": ("proxy-entrypoint",)}),
            "ForeignRequester": request("victim", AGENT_SIGNER, good),
            "ClusterNotFound": request("nowhere", AGENT_SIGNER, good),
        }
        made = trio.run(ask, klusterlet.hub_kubeconfig, list(asked.values()))
        assert None not in made
        for reason, name in zip(asked, made, strict=True):
            told = partial(is_told, plane, reason.strip(), name or "")
            manager.eventually(told, f"it is told of {reason}")
        # An administrator of the hub is no klusterlet.
        forged = plane.call(
            "POST",
            plane.path(CSR, "CertificateSigningRequest"),
            request(cluster, AGENT_SIGNER, good),
        )["metadata"]["name"]
        manager.eventually(
            lambda: is_told(plane, "UnknownRequester", forged), "it is told of the forged label"
        )
        # Approved by hand, it is not signed either.
        found = plane.get(CSR, "CertificateSigningRequest", forged)
        assert found is not None
        approved = {"type": "Approved", "status": "True", "reason": "Test", "message": "by hand"}
        body = found | {"status": {"conditions": [approved]}}
        plane.call("PUT", plane.path_of(found) + "/approval", body)
        # A cluster that is not accepted any more
        of_cluster = plane.get(CLUSTER, "ManagedCluster", cluster)
        assert of_cluster is not None
        plane.patch(of_cluster, {"spec": {"hubAcceptsClient": False}})
        [early] = trio.run(ask, klusterlet.hub_kubeconfig, [request(cluster, AGENT_SIGNER, good)])
        if early is not None:
            # The hub has not taken the cluster's right to ask away yet.
            manager.eventually(
                lambda: is_told(plane, "ClusterNotAccepted", early), "it is told of the cluster"
            )
        plane.patch(of_cluster, {"spec": {"hubAcceptsClient": True}})

        def asked_again() -> str | None:
            right = [request(cluster, AGENT_SIGNER, good)]
            [name] = trio.run(ask, klusterlet.hub_kubeconfig, right)
            return name

        late = early or manager.eventually(asked_again, "the cluster may ask again")
        # What is right is signed as soon as it may be.
        manager.eventually(lambda: issued(plane, late), "the right one is signed")
        assert not any(issued(plane, name) for name in (*made, forged))
        for name in (*made, forged):
            plane.call("DELETE", plane.path(CSR, "CertificateSigningRequest", name=name or ""))
    ocm_hub.remove("victim")


def request(cluster: str, signer: str, wanted: Object) -> Object:
    pem = certificate_request(
        new_key(), wanted["user"], wanted["groups"], wanted["units"], names=wanted["names"]
    )
    return {
        "metadata": {
            "generateName": f"addon-{cluster}-cluster-proxy-",
            "labels": {CLUSTER_LABEL: cluster, ADDON_LABEL: NAME},
        },
        "spec": {
            "request": encoded(pem),
            "signerName": signer,
            "usages": ["digital signature", "key encipherment", "client auth"],
        },
    }


async def ask(kubeconfig: Path, requests: list[Object]) -> list[str | None]:
    """Make requests as a klusterlet; return their names, None for one that the hub has refused."""
    made: list[str | None] = []
    async with open_kube_api(str(kubeconfig)) as api:
        for each in requests:
            try:
                created = await api.create(CERTIFICATE_SIGNING_REQUESTS, each)
            except KubeError:
                made.append(None)
            else:
                made.append(created["metadata"]["name"])
    return made


def is_told(plane: ControlPlane, reason: str, name: str) -> bool:
    """Whether there is an event that says why a request is left as it is."""
    return any(
        (each["involvedObject"]["name"], each["reason"]) == (name, reason)
        for each in plane.list("v1", "Event", "default")
    )


def issued(plane: ControlPlane, name: str | None) -> bool:
    found = plane.get(CSR, "CertificateSigningRequest", name or "")
    return bool(found and found.get("status", {}).get("certificate"))


# -- D11 -------------------------------------------------------------------------------------------


def test_in_steady_state_nothing_is_written(
    ocm_hub: OcmHub, managed: ControlPlane, at_work: AddOnInstallation, cluster: str
) -> None:
    manager = at_work
    plane = manager.plane
    with Klusterlet(ocm_hub, managed, cluster), manager.enabled(cluster):
        manager.await_said(cluster, "ManifestApplied")
        manager.await_said(cluster, "Progressing", "False", "Completed")
        before = manager.settle()
        for again in range(10):
            # Everything is looked at because of it.
            found = plane.get(CLUSTER, "ManagedCluster", cluster)
            assert found is not None
            plane.patch(found, {"metadata": {"annotations": {"looked-at": str(again)}}})
            time.sleep(0.1)
        assert manager.settle() == before
        manager.stop()
        manager.run()
        manager.eventually(lambda: "clusters get agents" in last_run(manager), "it is at work")
        assert manager.settle(quiet_s=2.0) == before
        assert "WARNING" not in last_run(manager)


def last_run(manager: AddOnInstallation) -> str:
    return manager.log_text().rpartition(" stopped\n")[2]


# -- what there may not be -------------------------------------------------------------------------


def test_without_the_right_to_review_tokens_all_else_works(
    manager: AddOnInstallation, cluster: str
) -> None:
    plane = manager.plane
    name = "open-cluster-management:cluster-proxy:addon-manager"
    role = manager.get(RBAC, "ClusterRole", name)
    kept = [
        rule
        for rule in role["rules"]
        if not {"clusterroles", "tokenreviews"} & set(rule["resources"])
    ]
    plane.patch(role | kind_of("ClusterRole"), {"rules": kept})
    try:
        manager.offer()
        manager.configure()
        manager.run()
        manager.enable(cluster)
        manager.await_said(cluster, "RegistrationApplied")
        manager.await_work(cluster, lambda there: there[DEPLOYMENT], "the cluster has a work")
        manager.settle()
        assert manager.log_text().count("agents get no right to review tokens") == 1
    finally:
        plane.patch(role | kind_of("ClusterRole"), {"rules": role["rules"]})


def test_a_hub_that_serves_v1alpha1_only(manager: AddOnInstallation, cluster: str) -> None:
    plane = manager.plane
    manager.offer()
    manager.configure()
    manager.config("own")
    manager.enable(cluster, "own")
    definitions = [
        f"{kind}.{ADDON}"
        for kind in ("managedclusteraddons", "clustermanagementaddons", "addondeploymentconfigs")
    ]
    serve(plane, definitions, v1beta1=False)
    try:
        manager.run()
        manager.eventually(lambda: "add-on API v1alpha1" in manager.log_text(), "it is at work")

        def registered() -> Object | None:
            addon = manager.addon(cluster, "v1alpha1")
            conditions = addon.get("status", {}).get("conditions", ())
            types = {each["type"] for each in conditions if each["status"] == "True"}
            return addon if {"RegistrationApplied", "Configured"} <= types else None

        addon = eventually(registered, "the agent is registered")
        of_kube, own = addon["status"]["registrations"]
        assert of_kube["signerName"] == KUBE_CLIENT_SIGNER
        assert own["subject"]["organizationUnit"]
        work = eventually(lambda: manager.works(cluster), "the cluster has a work")[0]
        [owner] = work["metadata"]["ownerReferences"]
        assert owner["apiVersion"] == f"{ADDON}/v1alpha1"
        assert (
            "own" in work["metadata"]["annotations"]["open-cluster-management.io/config-spec-hash"]
        )
    finally:
        serve(plane, definitions, v1beta1=True)


def serve(plane: ControlPlane, definitions: list[str], *, v1beta1: bool) -> None:
    for name in definitions:
        definition = plane.get("apiextensions.k8s.io/v1", "CustomResourceDefinition", name)
        assert definition is not None
        versions = definition["spec"]["versions"]
        for version in versions:
            if version["name"] == "v1beta1":
                version["served"] = v1beta1
        plane.patch(definition, {"spec": {"versions": versions}})

    def as_wanted() -> bool:
        for name in definitions:
            plural = name.partition(".")[0]
            try:
                plane.call("GET", f"/apis/{ADDON}/v1beta1/{plural}")
            except ApiError:
                if v1beta1:
                    return False
            else:
                if not v1beta1:
                    return False
        return True

    eventually(as_wanted, f"v1beta1 is {'' if v1beta1 else 'not '}served")


def test_without_open_cluster_management_the_hub_side_works(
    managed: ControlPlane, tmp_path: Path
) -> None:
    [definition] = managed.apply(yaml.safe_load(_DEFINITION.read_text()))
    try:
        eventually(lambda: managed.list(MPC, "ManagedProxyConfiguration") == [], "it is served")
        with installed(managed, tmp_path) as manager:
            manager.configure()
            manager.start()
            manager.await_reconciled()
            awaited = "waiting for Open Cluster Management: the hub does not serve "
            eventually(lambda: awaited in manager.log_text(), "it says what it waits for")
            manager.deployment()
            for kind in ("managedclusters.cluster", "manifestworks.work", "managedclusteraddons."):
                assert kind in manager.log_text()
            assert manager.log_text().count(awaited) == 1
    finally:
        managed.delete(definition)
