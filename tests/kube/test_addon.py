"""The manager in a hub of Open Cluster Management, with its own add-on manager: from a cluster to its agent."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
import yaml
from agents import pair
from cryptography import x509

from clusterproxy.addon.registration import (
    AGENT_SIGNER,
    KUBE_CLIENT_SIGNER,
    agent_registrations,
)
from clusterproxy.addon.spec_hash import spec_hash
from clusterproxy.errors import KubeError
from clusterproxy.kube.client import open_kube_api
from clusterproxy.kube.resource import CERTIFICATE_SIGNING_REQUESTS, LEASES
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
    one, two = pair(), pair()
    put_secret(manager, SERVING_CERTIFICATE, one)
    serving = "Secret cluster-proxy-service-proxy-server-certificates"

    def crt(manifest: Object, key: str = "tls.crt") -> bytes:
        return base64.b64decode(manifest["data"][key])

    manager.await_work(
        cluster, lambda there: crt(there[serving]) == one["tls.crt"], "it is rendered"
    )
    eventually(lambda: manager.said(cluster, "ManifestApplied") is None, "the error is taken back")
    # The service proxies' certificate
    put_secret(manager, SERVING_CERTIFICATE, two)
    manager.await_work(
        cluster, lambda there: crt(there[serving]) == two["tls.crt"], "the new certificate"
    )
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
    # Without its label the manager does not see it any more.
    plane.patch(manager.work(cluster), {"metadata": {"labels": {ADDON_LABEL: None}}})
    manager.await_work(cluster, lambda there: there[DEPLOYMENT], "the work has its label again")
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


def test_without_a_configuration_every_addon_says_so(
    manager: AddOnInstallation, cluster: str
) -> None:
    # C5, D2
    manager.offer()
    manager.run()
    manager.enable(cluster)
    said = ("RegistrationApplied", "False", "SetPermissionFailed")
    missing = f'managedproxyconfigurations.{PROXY} "cluster-proxy" not found'
    manager.await_said(cluster, *said, f"Failed to set permission for hub agent: {missing}")
    status = manager.addon(cluster)["status"]
    assert [each["resource"] for each in status["supportedConfigs"]] == [
        "managedproxyconfigurations",
        "addondeploymentconfigs",
    ]
    assert not status.get("registrations")
    names = ("signingProxyServerSecretName", "signingAgentServerSecretName")
    wrong = {"dump": {"secrets": dict.fromkeys(names, "one")}}
    manager.configure(authentication=wrong)
    manager.await_said(cluster, *said, "spec.authentication.dump.secrets.signingAgentServer")
    manager.configure()
    manager.await_said(cluster, "RegistrationApplied")
    manager.await_work(cluster, lambda there: there[DEPLOYMENT], "it gets its agent")
    # Of one that is registered that is no news: what it has it keeps.
    manager.configure(authentication=wrong)
    manager.await_said(
        cluster, "ManifestApplied", "False", "ManifestWorkApplyFailed", "signingAgentServer"
    )
    manager.await_said(cluster, "RegistrationApplied")
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
            # Who may make pods there has all that their accounts have.
            for verb in ("create", "update", "patch", "delete"):
                assert not may(plane, cluster, verb, "pods", namespace=manager.namespace), verb
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


def may(plane: ControlPlane, cluster: str, verb: str, resource: str, **more: str) -> bool:
    """Whether the account of a cluster's agent may do something on the hub."""
    attributes = {"verb": verb, "resource": resource, **more}
    user = f"system:serviceaccount:{cluster}:cluster-proxy-agent"
    review = {"spec": {"user": user, "resourceAttributes": attributes}}
    path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
    return bool(plane.call("POST", path, review)["status"]["allowed"])


def may_all(plane: ControlPlane, proxy_namespace: str, cluster: str) -> bool:
    """Whether the account of a cluster's agent may do what agents do."""
    pods = {"namespace": proxy_namespace}
    lease = {"group": "coordination.k8s.io", "namespace": cluster}
    return (
        may(plane, cluster, "create", "tokenreviews", group="authentication.k8s.io")
        and may(plane, cluster, "update", "leases", name=NAME, **lease)
        and not may(plane, cluster, "update", "leases", name="managed-cluster-lease", **lease)
        and may(plane, cluster, "list", "pods", **pods)
        and may(plane, cluster, "create", "pods", subresource="portforward", **pods)
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
        foreign_uri = "urn:open-cluster-management:cluster-proxy:cluster:victim"
        label = f"metadata.labels[{CLUSTER_LABEL}]"
        asked = [
            # What is asked for, how its event is called, and what that says: field and fix.
            (
                request(cluster, AGENT_SIGNER, good | {"user": "cluster-admin"}),
                "ForeignSubject",
                "spec.request: the subject is",
            ),
            (
                request(cluster, KUBE_CLIENT_SIGNER, admin),
                "ForeignSubject",
                "registered are CN open-cluster-management:cluster-proxy:addon-agent",
            ),
            (
                request(cluster, "kubernetes.io/kubelet-serving", good),
                "UnknownSigner",
                f"spec.signerName is 'kubernetes.io/kubelet-serving': it must be {AGENT_SIGNER}",
            ),
            (
                request(cluster, AGENT_SIGNER, good | {"names": ("proxy-entrypoint",)}),
                "ForeignName",
                "spec.request: it is for 'proxy-entrypoint', and may be for",
            ),
            (
                request(cluster, AGENT_SIGNER, good | {"uris": (foreign_uri,)}),
                "ForeignName",
                f"spec.request: it must not have the URI '{foreign_uri}'",
            ),
            (
                request("victim", AGENT_SIGNER, good),
                "ForeignRequester",
                f"which is of cluster {cluster}, and the label {CLUSTER_LABEL} says victim",
            ),
            (
                request("nowhere", AGENT_SIGNER, good),
                "ClusterNotFound",
                f"{label}: there is no ManagedCluster nowhere",
            ),
            (large_request(cluster, good), "TooLarge", "spec.request: with labels and annotations"),
        ]
        made = trio.run(ask, klusterlet.hub_kubeconfig, [each for each, _, _ in asked])
        assert None not in made
        for (_, reason, text), name in zip(asked, made, strict=True):
            manager.eventually(
                partial(is_told, plane, reason, name or "", text), f"it is told of {reason}"
            )
        # An administrator of the hub is no klusterlet.
        forged = plane.call(
            "POST",
            plane.path(CSR, "CertificateSigningRequest"),
            request(cluster, AGENT_SIGNER, good),
        )["metadata"]["name"]
        manager.eventually(
            lambda: is_told(plane, "UnknownRequester", forged, f"{cluster}:… must do so"),
            "it is told of the forged label",
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
                lambda: is_told(
                    plane, "ClusterNotAccepted", early, "set spec.hubAcceptsClient to true"
                ),
                "it is told of the cluster",
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
        new_key(),
        wanted["user"],
        wanted["groups"],
        wanted["units"],
        names=wanted["names"],
        uris=wanted.get("uris", ()),
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


def large_request(cluster: str, wanted: Object) -> Object:
    """Return a request that is right, and so large that a few of its kind would fill the manager's memory."""
    found = request(cluster, AGENT_SIGNER, wanted)
    found["metadata"]["annotations"] = {"large": "x" * 100_000}
    return found


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


def is_told(plane: ControlPlane, reason: str, name: str, text: str) -> bool:
    """Whether there is an event that says why a request is left as it is, with *text* in what it says."""
    return any(
        (each["involvedObject"]["name"], each["reason"]) == (name, reason)
        and text in each["message"]
        for each in plane.list("v1", "Event", "default")
    )


def issued(plane: ControlPlane, name: str | None) -> bool:
    found = plane.get(CSR, "CertificateSigningRequest", name or "")
    return bool(found and found.get("status", {}).get("certificate"))


# -- bad input -------------------------------------------------------------------------------------


def test_what_is_wrong_is_told_and_what_runs_goes_on(
    manager: AddOnInstallation, cluster: str
) -> None:
    plane = manager.plane
    manager.offer()
    manager.configure()
    manager.run(service_proxy=True)
    manager.await_reconciled()
    # A secret that is not whole, or has no certificate and its key
    whole, other = pair(), pair()
    put_secret(manager, SERVING_CERTIFICATE, {"tls.crt": whole["tls.crt"]})
    manager.enable(cluster)
    said = ("ManifestApplied", "False", "ManifestWorkApplyFailed")
    manager.await_said(cluster, *said, f"secret {SERVING_CERTIFICATE} does not contain tls.key")
    assert not manager.works(cluster)
    for wrong, what in (
        ({"tls.crt": b"one"}, "tls.crt is no certificate in PEM"),
        ({"tls.key": other["tls.key"]}, "tls.key is not the key of tls.crt"),
    ):
        put_secret(manager, SERVING_CERTIFICATE, whole | wrong)
        manager.await_said(cluster, *said, what)
        manager.await_said(cluster, *said, "or delete the secret")
    assert not manager.works(cluster)
    put_secret(manager, SERVING_CERTIFICATE, whole)
    manager.await_work(cluster, lambda there: there[DEPLOYMENT], "it is rendered")
    before = manager.work(cluster)["spec"]
    # An annotation of the cluster
    found = plane.get(CLUSTER, "ManagedCluster", cluster)
    assert found is not None
    name = "open-cluster-management.io/image-registries"
    for text, what in (("{", "must be JSON"), ('{"registries": 1}', "registries: must be a list")):
        plane.patch(found, {"metadata": {"annotations": {name: text}}})
        where = f"ManagedCluster {cluster}: metadata.annotations[{name}]: {what}"
        manager.await_said(cluster, *said, where)
    plane.patch(found, {"metadata": {"annotations": {name: None}}})
    eventually(lambda: manager.said(cluster, "ManifestApplied") is None, "the error is taken back")
    # What the proxy servers' certificates are checked with
    bundle = manager.get("v1", "Secret", "proxy-server-ca")
    assert manager.work(cluster)["spec"] == before
    # The authority
    signer = manager.get("v1", "Secret", "cluster-proxy-signer")
    plane.patch(signer, {"data": {"ca.key": base64.b64encode(b"no key").decode()}})
    manager.await_said(
        cluster,
        "RegistrationApplied",
        "False",
        "SetPermissionFailed",
        "cluster-proxy-signer: ca.key",
    )
    assert manager.get("v1", "Secret", "proxy-server-ca")["data"] == bundle["data"]
    assert manager.work(cluster)["spec"] == before
    plane.patch(signer, {"data": signer["data"]})
    manager.await_said(cluster, "RegistrationApplied")
    # Somebody who says that the agent is somebody whom it is not
    addon = manager.addon(cluster)
    registrations = addon["status"]["registrations"]
    for subject, who in (
        ({"user": "admin"}, "user 'admin'"),
        ({"groups": ["system:masters"]}, "group 'system:masters'"),
    ):
        registrations[0]["kubeClient"] = {"driver": "token", "subject": subject}
        forged = {"registrations": registrations}
        plane.patch(addon, {"status": forged}, subresource="status")
        text = f"{who} is no agent of cluster {cluster}: the klusterlet must"
        manager.await_said(cluster, "RegistrationApplied", "False", "SetPermissionFailed", text)
    binding = manager.get(RBAC, "RoleBinding", "cluster-proxy-addon-agent", cluster)
    assert {each["name"] for each in binding["subjects"]} == {
        "open-cluster-management:cluster-proxy:addon-agent",
        "open-cluster-management:cluster-proxy",
    }
    assert manager.running, manager.log_text()


def test_who_changes_a_work_again_and_again_is_told_of(
    at_work: AddOnInstallation, cluster: str
) -> None:
    manager = at_work
    plane = manager.plane
    manager.enable(cluster)
    manager.await_work(cluster, lambda there: there[DEPLOYMENT], "the cluster has a work")

    def told() -> Object | None:
        if manager.manifest(cluster, "Deployment")["spec"]["replicas"] != 7:
            work = manager.work(cluster)
            manifests = work["spec"]["workload"]["manifests"]
            for each in manifests:
                if each["kind"] == "Deployment":
                    each["spec"]["replicas"] = 7
            plane.patch(work, {"spec": {"workload": {"manifests": manifests}}})
        said = manager.said(cluster, "ManifestApplied")
        return (
            said if said and "is changed again whenever it is repaired" in said["message"] else None
        )

    said = manager.eventually(told, "it is told of")
    assert (said["status"], said["reason"]) == ("False", "ManifestWorkApplyFailed")
    assert f"ManifestWork {cluster}/addon-cluster-proxy-deploy-0" in said["message"]
    # Who has had enough of it gets what is right.
    manager.await_work(
        cluster,
        lambda there: there[DEPLOYMENT]["spec"]["replicas"] != 7,
        "it is put right in the end",
    )


def test_an_addon_that_is_deleted_in_mid_flow(
    ocm_hub: OcmHub, managed: ControlPlane, at_work: AddOnInstallation, cluster: str
) -> None:
    manager = at_work
    plane = manager.plane
    with Klusterlet(ocm_hub, managed, cluster) as klusterlet:
        addon = manager.enable(cluster)
        manager.await_said(cluster, "ManifestApplied")
        # Somebody's finalizer keeps it for a while.
        plane.patch(addon, {"metadata": {"finalizers": ["test.example/wait"]}})
        plane.delete(addon)
        ca = manager.secret("cluster-proxy-signer")["ca.crt"]
        [own] = (each.subject for each in agent_registrations(ca) if each.signer == AGENT_SIGNER)
        wanted: Object = {
            "user": own.user,
            "groups": own.groups,
            "units": own.organization_units,
            "names": (),
        }
        [asked] = trio.run(ask, klusterlet.hub_kubeconfig, [request(cluster, AGENT_SIGNER, wanted)])
        assert asked is not None
        text = (
            f"no ManagedClusterAddOn cluster-proxy in namespace {cluster}, or it is being deleted"
        )
        manager.eventually(
            partial(is_told, plane, "AddonNotFound", asked, text), "it is told of the request"
        )
        # What goes does not come back, and nobody gets a certificate.
        plane.delete(
            manager.get(RBAC, "Role", "cluster-proxy-addon-agent", cluster) | kind_of("Role")
        )
        plane.delete(manager.work(cluster))
        manager.eventually(lambda: not manager.works(cluster), "the work is gone")
        manager.settle()
        assert plane.get(RBAC, "Role", "cluster-proxy-addon-agent", cluster) is None
        assert not manager.works(cluster)
        assert not issued(plane, asked)
        plane.patch(addon, {"metadata": {"finalizers": []}})
        manager.eventually(
            lambda: plane.get(f"{ADDON}/v1beta1", "ManagedClusterAddOn", NAME, cluster) is None,
            "it is gone",
        )
        # It comes again, and with it the right to a certificate.
        with manager.enabled(cluster):
            manager.await_said(cluster, "ManifestApplied")
            manager.eventually(lambda: issued(plane, asked), "the request is signed now")


def test_one_cluster_does_not_keep_the_others_waiting(
    ocm_hub: OcmHub, at_work: AddOnInstallation, cluster: str
) -> None:
    manager = at_work
    plane = manager.plane
    ocm_hub.accept("quiet")
    try:
        addon = manager.enable(cluster)
        manager.await_said(cluster, "RegistrationApplied")
        repairs = 0
        until = time.monotonic() + 10
        while time.monotonic() < until:
            if manager.addon(cluster)["status"].get("registrations"):
                # As its klusterlet may.
                repairs += 1
                plane.patch(addon, {"status": {"registrations": []}}, subresource="status")
        _log.info("the status was put right %d times in ten seconds", repairs)
        # Without turns for each it is hundreds.
        assert repairs < 90
        began = time.monotonic()
        manager.enable("quiet")
        manager.await_work("quiet", lambda there: there[DEPLOYMENT], "another has its work")
        assert time.monotonic() - began < 10
        manager.eventually(
            lambda: manager.addon(cluster)["status"].get("registrations"), "it is right in the end"
        )
    finally:
        ocm_hub.remove("quiet")


# -- documentation ---------------------------------------------------------------------------------

_INSTALL: Final = Path(__file__).parents[2] / "docs/install.md"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_what_the_document_says_of_a_cluster(
    ocm_hub: OcmHub, managed: ControlPlane, at_work: AddOnInstallation, cluster: str
) -> None:
    manager = at_work
    text = _INSTALL.read_text(encoding="utf-8")
    found = re.search(r"^```\n(kubectl get managedclusteraddon .*)\n(.*)\n```$", text, re.MULTILINE)
    assert found is not None
    command, line = found.groups()
    with Klusterlet(ocm_hub, managed, cluster, lease_s=1.0), manager.enabled(cluster):
        manager.await_said(cluster, "ManifestApplied")
        manager.await_said(cluster, "Progressing", "False", "Completed")
        # What the addon agent does while the proxy agent has a tunnel, with the rights that the agent has.
        kubeconfig = managed.kubeconfig_for(manager.agents, "cluster-proxy")
        trio.run(renew_lease, kubeconfig, manager.agents)
        manager.await_said(cluster, "Available")
        done = subprocess.run(  # noqa: S602  the document's command
            command,
            shell=True,
            env=os.environ | {"KUBECONFIG": str(manager.plane.admin_kubeconfig)},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        [printed] = [each for each in done.stdout.splitlines() if each.startswith(f"{cluster} ")]
        assert printed.split() == line.replace("<your cluster>", cluster).split()


async def renew_lease(kubeconfig: Path, namespace: str) -> None:
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
    metadata = {"name": NAME, "namespace": namespace}
    async with open_kube_api(str(kubeconfig)) as api:
        lease = await api.create(
            LEASES, {"metadata": metadata, "spec": {"leaseDurationSeconds": 60}}
        )
        await api.replace(LEASES, lease | {"spec": {**lease["spec"], "renewTime": now}})


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
