from __future__ import annotations

import base64
import json
import subprocess
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from kube.build import kube_program
from kube.control_plane import eventually
from kube.hello_addon import (
    CLUSTER,
    CSR,
    SIGNER,
    WORK,
    HelloAddOn,
    config_map,
    lease,
    settled,
    space,
    work,
)
from kube.klusterlet import Klusterlet, secret_data
from kube.klusterlet_credentials import Registration, certificate_is_good
from kube.kubeconfigs import certificate_request, new_key
from kube.ocm_resources import (
    ADDON_LABEL,
    CLUSTER_LABEL,
    KUBE_CLIENT_SIGNER,
)

if TYPE_CHECKING:
    from pathlib import Path

    from kube.control_plane import ControlPlane
    from kube.ocm_hub import OcmHub

pytestmark = pytest.mark.kube

Object = dict[str, Any]


@pytest.fixture
def plane(ocm_hub: OcmHub) -> ControlPlane:
    return ocm_hub.plane


@pytest.fixture
def cluster(accepted_cluster: str) -> str:
    return accepted_cluster


def test_certificates(
    ocm_hub: OcmHub, managed: ControlPlane, plane: ControlPlane, cluster: str, tmp_path: Path
) -> None:
    namespace = f"{cluster}-addons"
    addon = HelloAddOn(plane, cluster, namespace)
    addon.register()
    with Klusterlet(ocm_hub, managed, cluster) as klusterlet:
        request = addon.request(KUBE_CLIENT_SIGNER)
        spec = request["spec"]
        assert request["metadata"]["name"].startswith(f"addon-{cluster}-hello-")
        assert spec["username"] == f"system:open-cluster-management:{cluster}:agent"
        assert f"system:open-cluster-management:{cluster}" in spec["groups"]
        asked = x509.load_pem_x509_csr(base64.b64decode(spec["request"]))
        assert asked.subject.rfc4514_string() == "CN=hello-agent,O=hello-agents"
        names = asked.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["hello.addon.open-cluster-management.io"]
        addon.approve(request)
        own = addon.request(SIGNER)
        addon.approve(own)
        addon.sign(plane.call("GET", plane.path_of(own)))
        # There is no place for them before the add-on's work has made it.
        managed.apply(space(namespace))
        secret = f"hello-{SIGNER.replace('/', '-')}-client-cert"
        eventually(lambda: secret_data(managed, namespace, secret), "the own certificate is there")
        data = eventually(
            lambda: secret_data(managed, namespace, "hello-hub-kubeconfig"),
            "the kubeconfig is there",
        )
        assert data.keys() == {"tls.crt", "tls.key", "kubeconfig", "cluster-name"}
        assert whoami(data, tmp_path) == "hello-agent"
        addon.condition("ClusterCertificateRotated")
        assert addon.read()["status"]["registrations"][0]["kubeClient"]["driver"] == "csr"
        # Who is somebody else from now on needs another certificate, and the old one is taken away.
        known = request["metadata"]["name"]
        addon.register(user="hello-agent-2")
        eventually(
            lambda: secret_data(managed, namespace, "hello-hub-kubeconfig") is None,
            "the old one is gone",
        )
        again = addon.request(KUBE_CLIENT_SIGNER, without=(known,))
        addon.approve(again)
        data = eventually(
            lambda: secret_data(managed, namespace, "hello-hub-kubeconfig"), "the new one is there"
        )
        assert whoami(data, tmp_path) == "hello-agent-2"
        assert len(addon.requests(SIGNER)) == 1
        assert klusterlet.alive
    # A new one finds all as it should be.
    made = {each["metadata"]["name"] for each in addon.requests(KUBE_CLIENT_SIGNER)}
    with Klusterlet(ocm_hub, managed, cluster):
        managed.apply(lease(namespace, datetime.now(UTC)))
        addon.condition("Available")
        assert {e["metadata"]["name"] for e in addon.requests(KUBE_CLIENT_SIGNER)} == made
        plane.delete(addon.read())
        eventually(lambda: secret_data(managed, namespace, secret) is None, "secrets are gone")
    managed.delete(space(namespace))


def test_who_has_asked_ten_times_asks_no_more(
    ocm_hub: OcmHub, managed: ControlPlane, plane: ControlPlane, cluster: str
) -> None:
    request = base64.b64encode(certificate_request(new_key(), "hello-agent", ["hello-agents"]))
    meta = {
        "generateName": f"addon-{cluster}-hello-",
        "labels": {CLUSTER_LABEL: cluster, ADDON_LABEL: "hello"},
    }
    spec = {"request": request.decode(), "signerName": SIGNER, "usages": ["client auth"]}
    for _ in range(10):
        body = {"metadata": meta, "spec": spec}
        plane.call("POST", plane.path(CSR, "CertificateSigningRequest"), body)
    addon = HelloAddOn(plane, cluster, "somewhere")
    addon.register()
    with Klusterlet(ocm_hub, managed, cluster):
        addon.condition("ClusterCertificateRotated", "False")
        assert addon.requests(KUBE_CLIENT_SIGNER) == []


def test_tokens(
    ocm_hub: OcmHub, managed: ControlPlane, plane: ControlPlane, cluster: str, tmp_path: Path
) -> None:
    namespace = f"{cluster}-addons"
    managed.apply(space(namespace))
    addon = HelloAddOn(plane, cluster, namespace)
    # OCM's add-on manager makes the account.
    addon.register()
    with Klusterlet(ocm_hub, managed, cluster, driver="token"):
        addon.condition("TokenInfrastructureReady")
        data = eventually(
            lambda: secret_data(managed, namespace, "hello-hub-kubeconfig"), "the token is there"
        )
        user = f"system:serviceaccount:{cluster}:hello-agent"
        assert data.keys() == {"token", "kubeconfig", "cluster-name"}
        assert whoami(data, tmp_path) == user
        of_kube = addon.read()["status"]["registrations"][0]["kubeClient"]
        assert (of_kube["driver"], of_kube["subject"]["user"]) == ("token", user)
        assert addon.requests(KUBE_CLIENT_SIGNER) == []
        addon.condition("TokenRefreshed")
    managed.delete(space(namespace))


def test_leases(ocm_hub: OcmHub, managed: ControlPlane, plane: ControlPlane, cluster: str) -> None:
    namespace = f"{cluster}-addons"
    managed.apply(space(namespace))
    addon = HelloAddOn(plane, cluster, namespace)
    addon.register()

    def label(value: str) -> None:
        def labelled() -> bool:
            found = plane.get(f"{CLUSTER}/v1", "ManagedCluster", cluster)
            labels = (found or {})["metadata"].get("labels", {})
            return bool(labels.get("feature.open-cluster-management.io/addon-hello") == value)

        eventually(labelled, f"the cluster says that the add-on is {value}")

    with Klusterlet(ocm_hub, managed, cluster, lease_s=1.0):
        addon.condition("Available", "Unknown")
        label("unreachable")
        managed.apply(lease(namespace, datetime.now(UTC)))
        addon.condition("Available")
        label("available")
        # Five seconds later nobody has renewed it.
        addon.condition("Available", "False")
        label("unhealthy")
        plane.delete(addon.read())
    managed.delete(space(namespace))


def test_works(ocm_hub: OcmHub, managed: ControlPlane, plane: ControlPlane, cluster: str) -> None:
    namespace = f"{cluster}-works"
    account: Object = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": {"name": "hello", "namespace": namespace},
    }
    with Klusterlet(ocm_hub, managed, cluster):
        two = config_map(namespace, "two", a="1")
        plane.apply(
            work(
                cluster,
                space(namespace),
                config_map(namespace, "one", a="1"),
                two,
                account,
                orphan=namespace,
            )
        )
        found = settled(plane, cluster)
        manifests = found["status"]["resourceStatus"]["manifests"]
        assert [each["resourceMeta"]["resource"] for each in manifests] == [
            "namespaces",
            "configmaps",
            "configmaps",
            "serviceaccounts",
        ]
        one = managed.get("v1", "ConfigMap", "one", namespace)
        assert one is not None
        [owner] = one["metadata"]["ownerReferences"]
        record = managed.get(WORK, "AppliedManifestWork", owner["name"])
        assert record is not None
        assert record["metadata"]["uid"] == owner["uid"]
        kept = managed.get("v1", "Namespace", namespace)
        assert kept is not None
        assert "ownerReferences" not in kept["metadata"]
        # Changed, left out, and one that cannot be.
        wrong = config_map("nowhere", "three")
        unknown = {"apiVersion": "example.com/v1", "kind": "Odd", "metadata": {"name": "odd"}}
        forbidden = {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {"name": "hello"},
            "provisioner": "example.com/none",
        }
        plane.apply(
            work(
                cluster,
                space(namespace),
                config_map(namespace, "one", a="2"),
                wrong,
                unknown,
                forbidden,
                orphan=namespace,
            )
        )

        def failed() -> Object | None:
            found = plane.get(WORK, "ManifestWork", "hello-0", cluster)
            assert found is not None
            generation = found["metadata"]["generation"]
            told = [
                each
                for each in found.get("status", {}).get("conditions", ())
                if each["status"] == "False" and each.get("observedGeneration") == generation
            ]
            return found if len(told) == 2 else None

        found = eventually(failed, "three manifests cannot be applied")
        manifests = found["status"]["resourceStatus"]["manifests"]
        said = [each["conditions"][0]["message"] for each in manifests]
        assert said[:2] == ["Apply manifest complete"] * 2
        assert 'namespaces "nowhere" not found' in said[2]
        assert 'no matches for kind "Odd"' in said[3]
        assert "is forbidden" in said[4]
        one = managed.get("v1", "ConfigMap", "one", namespace)
        assert one is not None
        assert one["data"] == {"a": "2"}
        eventually(
            lambda: managed.get("v1", "ConfigMap", "two", namespace) is None, "two is removed"
        )
        plane.delete(work(cluster))
        eventually(
            lambda: plane.get(WORK, "ManifestWork", "hello-0", cluster) is None,
            "the work is removed",
        )
        assert managed.get("v1", "ConfigMap", "one", namespace) is None
        assert managed.get("v1", "ServiceAccount", "hello", namespace) is None
        kept = managed.get("v1", "Namespace", namespace)
        assert kept is not None
        assert kept["status"]["phase"] == "Active"
        assert managed.get(WORK, "AppliedManifestWork", owner["name"]) is None
    managed.delete(space(namespace))


def test_works_leave_what_is_to_stay(
    ocm_hub: OcmHub, managed: ControlPlane, plane: ControlPlane, cluster: str
) -> None:
    namespace = f"{cluster}-works"
    manifests = (space(namespace), config_map(namespace, "one"), config_map(namespace, "two"))
    with Klusterlet(ocm_hub, managed, cluster):
        plane.apply(work(cluster, *manifests))
        settled(plane, cluster)
        plane.apply(work(cluster, *manifests, orphan="all"))
        settled(plane, cluster)
        for name in ("one", "two"):
            kept = managed.get("v1", "ConfigMap", name, namespace)
            assert kept is not None
            assert "ownerReferences" not in kept["metadata"]
        # What is left out of it is as well nobody's.
        plane.apply(work(cluster, *manifests[:2], orphan="all"))
        settled(plane, cluster)
        plane.delete(work(cluster))
        eventually(
            lambda: plane.get(WORK, "ManifestWork", "hello-0", cluster) is None,
            "the work is removed",
        )
        for name in ("one", "two"):
            assert managed.get("v1", "ConfigMap", name, namespace) is not None
    managed.delete(space(namespace))


def test_works_that_go_while_the_klusterlet_is_away(
    ocm_hub: OcmHub, managed: ControlPlane, plane: ControlPlane, cluster: str
) -> None:
    namespace = f"{cluster}-works"
    managed.apply(space(namespace))
    with Klusterlet(ocm_hub, managed, cluster):
        plane.apply(work(cluster, config_map(namespace, "one")))
        settled(plane, cluster)
    plane.delete(work(cluster))
    waiting = plane.get(WORK, "ManifestWork", "hello-0", cluster)
    assert waiting is not None
    assert waiting["metadata"]["deletionTimestamp"]
    with Klusterlet(ocm_hub, managed, cluster):
        eventually(
            lambda: plane.get(WORK, "ManifestWork", "hello-0", cluster) is None,
            "the work is removed",
        )
    assert managed.get("v1", "ConfigMap", "one", namespace) is None
    managed.delete(space(namespace))


def test_rights_are_of_one_cluster(ocm_hub: OcmHub, managed: ControlPlane, cluster: str) -> None:
    ocm_hub.accept("somebody-else")
    works, secrets = (
        ocm_hub.plane.path(version, kind, cluster)
        for version, kind in ((WORK, "ManifestWork"), ("v1", "Secret"))
    )
    try:
        with Klusterlet(ocm_hub, managed, cluster) as klusterlet:
            kubeconfig = klusterlet.hub_kubeconfig
            assert kubectl(kubeconfig, "get", "--raw", works)["kind"] == "ManifestWorkList"
            for forbidden in (works.replace(cluster, "somebody-else"), secrets):
                with pytest.raises(AssertionError, match="Forbidden"):
                    kubectl(kubeconfig, "get", "--raw", forbidden)
            # Who is not accepted any more has no rights.
            found = ocm_hub.plane.get(f"{CLUSTER}/v1", "ManagedCluster", cluster)
            assert found is not None
            ocm_hub.plane.patch(found, {"spec": {"hubAcceptsClient": False}})

            def denied() -> bool:
                try:
                    kubectl(kubeconfig, "get", "--raw", works)
                except AssertionError as error:
                    return "Forbidden" in str(error)
                return False

            eventually(denied, "the cluster has no rights")
            assert klusterlet.alive
    finally:
        ocm_hub.remove("somebody-else")


def test_renewal_is_due_at_a_fifth_of_the_life() -> None:
    registration = Registration(
        addon="hello", signer=SIGNER, namespace="x", user="u", groups=("g",), units=()
    )
    begin = datetime(2026, 1, 1, tzinfo=UTC)
    key = new_key()
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "g"),
            x509.NameAttribute(NameOID.COMMON_NAME, "u"),
        ]
    )
    pem = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1)
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=100))
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    assert certificate_is_good(pem, registration, begin + timedelta(days=79))
    assert not certificate_is_good(pem, registration, begin + timedelta(days=81))
    for change in ({"user": "v"}, {"groups": ("g", "h")}, {"units": ("signer-2",)}):
        changed = attrs.evolve(registration, **change)
        assert not certificate_is_good(pem, changed, begin)
    assert not certificate_is_good(b"", registration, begin)


def kubectl(kubeconfig: Path, *arguments: str) -> Object:
    """Return what kubectl answers, which reads a kubeconfig as Go's programs do."""
    done = subprocess.run(
        (str(kube_program()), "kubectl", f"--kubeconfig={kubeconfig}", *arguments),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: Object = json.loads(done.stdout)
    return answer


def whoami(secret: dict[str, bytes], directory: Path) -> str:
    """Return as whom the apiserver knows who has this secret mounted."""
    for name, value in secret.items():
        (directory / name).write_bytes(value)
    answer = kubectl(directory / "kubeconfig", "auth", "whoami", "-o", "json")
    user: str = answer["status"]["userInfo"]["username"]
    return user
