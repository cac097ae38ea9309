"""The manager against a real apiserver: what the hub's side of the tunnel looks like, and stays like."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
import statistics
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from clusterproxy.addon.certificates import (
    Leaf,
    Usage,
    issue,
    load_authority,
    new_authority,
    new_key,
)
from kube.control_plane import eventually
from kube.installation import ACCOUNT, PREFIX, RBAC, Installation, installed, sans

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kube.control_plane import ControlPlane, Object

pytestmark = pytest.mark.kube


@pytest.fixture
def manager(hub: ControlPlane, tmp_path: Path) -> Iterator[Installation]:
    with installed(hub, tmp_path) as installation:
        yield installation


def put_secret(
    manager: Installation, name: str, data: dict[str, bytes], kind: str = "Opaque"
) -> Object:
    [secret] = manager.plane.apply(
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": manager.namespace},
            "type": kind,
            "data": {key: base64.b64encode(value).decode() for key, value in data.items()},
        }
    )
    return secret


def put_service_status(manager: Installation, name: str, ingress: list[dict[str, str]]) -> None:
    service = manager.get("v1", "Service", name)
    manager.plane.patch(
        service, {"status": {"loadBalancer": {"ingress": ingress}}}, subresource="status"
    )


# -- B1, B2, B5, B12 -------------------------------------------------------------------------------


def test_a_configuration_of_any_name_gets_all_objects(manager: Installation) -> None:
    manager.configure(
        "cluster-proxy-config", proxyServer={"replicas": 3, "image": "example.com/server:1"}
    )
    manager.start()
    manager.await_condition("ProxyServerDeployed", name="cluster-proxy-config")
    live = manager.await_reconciled("cluster-proxy-config")
    deployment = manager.deployment("cluster-proxy-config")
    assert deployment["spec"]["replicas"] == 3
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "example.com/server:1"
    assert container["args"][0] == "--server-count=3"
    assert set(manager.secret("proxy-client")) == {"tls.crt", "tls.key"}
    owned = [
        manager.get(*kind)
        for kind in (
            ("v1", "ServiceAccount", "cluster-proxy"),
            ("v1", "ServiceAccount", "cluster-proxy-config-proxy-server"),
            ("v1", "Service", "proxy-entrypoint"),
            ("v1", "Secret", "proxy-server-ca"),
            ("apps/v1", "Deployment", "cluster-proxy-config"),
            (RBAC, "Role", "cluster-proxy-addon-agent:portforward"),
            (RBAC, "RoleBinding", "cluster-proxy-addon-agent:portforward"),
        )
    ]
    for obj in owned:
        [owner] = obj["metadata"]["ownerReferences"]
        assert owner["uid"] == live["metadata"]["uid"], obj["kind"]
        assert not owner.get("controller")
        assert owner["blockOwnerDeletion"]
    # Certificates are the main configuration's, which is not there.
    assert "ownerReferences" not in manager.get("v1", "Secret", "proxy-client")["metadata"]


def test_placement_and_replicas_follow(manager: Installation) -> None:
    manager.configure()
    manager.start()
    manager.await_reconciled()
    toleration = {"key": "dedicated", "operator": "Exists", "effect": "NoSchedule"}
    live = manager.configure(
        proxyServer={
            "replicas": 2,
            "nodePlacement": {"nodeSelector": {"role": "infra"}, "tolerations": [toleration]},
            "additionalArgs": ["--v=3"],
        }
    )
    manager.await_reconciled()
    deployment = manager.deployment()
    pod = deployment["spec"]["template"]["spec"]
    assert deployment["spec"]["replicas"] == 2
    assert pod["nodeSelector"] == {"role": "infra"}
    assert pod["tolerations"] == [toleration]
    assert "--v=3" in pod["containers"][0]["args"]
    generation = str(live["metadata"]["generation"])
    assert deployment["metadata"]["annotations"][f"{PREFIX}configuration-generation"] == generation
    assert deployment["metadata"]["labels"][f"{PREFIX}configuration-generation"] == generation
    manager.configure()
    manager.await_reconciled()
    pod = manager.deployment()["spec"]["template"]["spec"]
    assert "nodeSelector" not in pod
    assert "tolerations" not in pod


def test_without_an_entrypoint_it_is_port_forward(manager: Installation) -> None:
    manager.configure(proxyServer={"entrypoint": None})
    manager.start()
    manager.await_reconciled()
    assert manager.condition("EntrypointProvisioned")["status"] == "True"  # type: ignore[index]


def test_ports_are_honoured(manager: Installation) -> None:
    manager.configure(
        deploy={
            "ports": {
                "proxyServer": 18090,
                "agentServer": 18091,
                "healthServer": 18092,
                "adminServer": 18095,
            }
        }
    )
    manager.start()
    manager.await_reconciled()
    args = manager.container()["args"]
    for flag in ("server-port=18090", "agent-port=18091", "health-port=18092", "admin-port=18095"):
        assert f"--{flag}" in args
    ports = manager.get("v1", "Service", "proxy-entrypoint")["spec"]["ports"]
    assert [(each["port"], each["targetPort"]) for each in ports] == [(8090, 18090), (8091, 18091)]


# -- B3, B4 ----------------------------------------------------------------------------------------


def test_what_is_changed_or_deleted_by_hand_comes_back(manager: Installation) -> None:
    manager.configure()
    manager.start()
    manager.await_reconciled()
    manager.settle()
    service = manager.get("v1", "Service", "proxy-entrypoint")
    kept = {
        key: service["spec"][key]
        for key in ("clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy")
    }
    good_hash = service["metadata"]["annotations"][f"{PREFIX}rendered-hash"]
    port = {"name": "proxy-server", "port": 9999, "targetPort": 9999, "protocol": "TCP"}
    manager.plane.patch(
        service,
        {
            "metadata": {"annotations": {f"{PREFIX}rendered-hash": "stale", "mine": "stays"}},
            "spec": {"ports": [port, service["spec"]["ports"][1]]},
        },
    )

    def repaired() -> Object | None:
        found = manager.get("v1", "Service", "proxy-entrypoint")
        return found if found["spec"]["ports"][0]["port"] == 8090 else None

    found = eventually(repaired, "the port is back")
    assert found["metadata"]["annotations"][f"{PREFIX}rendered-hash"] == good_hash
    assert found["metadata"]["annotations"]["mine"] == "stays"
    assert {key: found["spec"][key] for key in kept} == kept

    took: list[float] = []
    for kind in (
        ("v1", "Secret", "proxy-server"),
        ("v1", "Secret", "proxy-server-ca"),
        ("v1", "Service", "proxy-entrypoint"),
        ("apps/v1", "Deployment", "cluster-proxy"),
        (RBAC, "Role", "cluster-proxy-addon-agent:portforward"),
        (RBAC, "RoleBinding", "cluster-proxy-addon-agent:portforward"),
        ("v1", "ServiceAccount", "cluster-proxy"),
    ):
        gone = manager.get(*kind)
        manager.plane.delete(gone)
        began = time.monotonic()

        def back(kind: tuple[str, str, str] = kind, uid: str = gone["metadata"]["uid"]) -> bool:
            found = manager.find(*kind)
            return found is not None and found["metadata"]["uid"] != uid

        eventually(back, f"{kind} is back")
        took.append(time.monotonic() - began)
    # On a busy machine one of them may take longer.
    assert statistics.median(took) < 1, took
    assert manager.running


# -- B8, B9 ----------------------------------------------------------------------------------------


def test_an_authority_that_is_there_is_used(manager: Installation) -> None:
    authority = new_authority(datetime.now(UTC))
    put_secret(manager, "cluster-proxy-signer", {"ca.crt": authority.crt, "ca.key": authority.key})
    manager.configure()
    manager.start()
    manager.await_reconciled()
    for name in ("proxy-server", "agent-server", "proxy-client"):
        manager.certificate(name).verify_directly_issued_by(authority.certificate)
    assert manager.secret("proxy-server-ca")["ca.crt"] == authority.crt
    assert manager.secret("cluster-proxy-signer") == {
        "ca.crt": authority.crt,
        "ca.key": authority.key,
    }
    [owner] = manager.get("v1", "Secret", "cluster-proxy-signer")["metadata"]["ownerReferences"]
    assert owner["name"] == "cluster-proxy"


def _pem(key: Any, form: serialization.PrivateFormat) -> bytes:
    pem: bytes = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    return pem


def _bad_signers() -> dict[str, tuple[dict[str, bytes], str]]:
    authority = new_authority(datetime.now(UTC))
    key = authority.private_key
    other = rsa.generate_private_key(65537, 2048)
    pkcs8, pkcs1 = serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL
    return {
        "pkcs1": ({"ca.crt": authority.crt, "ca.key": _pem(key, pkcs1)}, "ca.key"),
        "ec": (
            {
                "ca.crt": authority.crt,
                "ca.key": _pem(ec.generate_private_key(ec.SECP256R1()), pkcs8),
            },
            "ca.key",
        ),
        "foreign key": ({"ca.crt": authority.crt, "ca.key": _pem(other, pkcs8)}, "ca.key"),
        "no certificate": ({"ca.key": authority.key}, "ca.crt"),
        "wrong keys": ({"tls.crt": authority.crt, "tls.key": authority.key}, "ca."),
        "garbage": (
            {"ca.crt": b"-----BEGIN CERTIFICATE-----\nAA\n", "ca.key": authority.key},
            "ca.crt",
        ),
    }


BAD_SIGNERS = _bad_signers()


@pytest.mark.parametrize("case", BAD_SIGNERS)
def test_a_bad_authority_is_told_and_left_alone(manager: Installation, case: str) -> None:
    data, named = BAD_SIGNERS[case]
    put_secret(manager, "cluster-proxy-signer", data)
    manager.configure()
    manager.start()
    told = manager.await_condition("ProxyServerSecretSigned", "False", message=named)
    assert told["reason"] == "SignerInvalid"
    assert f"{manager.namespace}/cluster-proxy-signer" in told["message"]
    assert manager.secret("cluster-proxy-signer") == data
    assert manager.find("v1", "Secret", "proxy-server") is None
    assert manager.find("apps/v1", "Deployment", "cluster-proxy") is None
    # Mended, it goes on by itself.
    good = new_authority(datetime.now(UTC))
    manager.plane.delete(manager.get("v1", "Secret", "cluster-proxy-signer"))
    eventually(
        lambda: manager.find("v1", "Secret", "cluster-proxy-signer") is not None, "a new authority"
    )
    manager.await_condition("ProxyServerSecretSigned")
    assert good.crt != manager.secret("cluster-proxy-signer")["ca.crt"]


def test_certificates_are_issued_anew_when_they_must_be(manager: Installation) -> None:
    now = datetime.now(UTC)
    authority = new_authority(now - timedelta(days=400))
    put_secret(manager, "cluster-proxy-signer", {"ca.crt": authority.crt, "ca.key": authority.key})
    names = (
        "127.0.0.1",
        "localhost",
        f"proxy-entrypoint.{manager.namespace}",
        f"proxy-entrypoint.{manager.namespace}.svc",
    )

    def leaf(*hosts: str) -> Leaf:
        return Leaf(name="x", hosts=hosts or names, usage=Usage.SERVER)

    tls = "kubernetes.io/tls"

    def put(name: str, pair: tuple[bytes, bytes], kind: str = tls) -> bytes:
        put_secret(manager, name, {"tls.crt": pair[0], "tls.key": pair[1]}, kind)
        return pair[0]

    # In use since 150 of 180 days.
    aged = put("proxy-server", issue(authority, leaf(), now - timedelta(days=150)))
    # Another CA's.
    foreign = put("agent-server", issue(new_authority(now), leaf(), now))
    # Of the wrong type: it cannot be changed.
    untyped = put(
        "proxy-client",
        issue(authority, Leaf(name="x", hosts=names, usage=Usage.CLIENT), now),
        "Opaque",
    )
    manager.configure()
    manager.start()
    manager.await_reconciled()
    for name, old in (("proxy-server", aged), ("agent-server", foreign), ("proxy-client", untyped)):
        fresh = manager.certificate(name)
        assert fresh.public_bytes(serialization.Encoding.PEM) not in old
        fresh.verify_directly_issued_by(authority.certificate)
        assert manager.get("v1", "Secret", name)["type"] == tls
        assert fresh.not_valid_after_utc - fresh.not_valid_before_utc == timedelta(
            days=180, seconds=1
        )
    versions = manager.settle()

    # Names change, rubbish is written into them, and what is good stays as it is.
    manager.configure(
        authentication={
            "signer": {
                "type": "SelfSigned",
                "selfSigned": {"additionalSANs": ["hub.example.com", "192.0.2.7"]},
            },
            "dump": {"secrets": {}},
        }
    )
    for name in ("proxy-server", "agent-server", "proxy-client"):

        def renamed(name: str = name) -> bool:
            hosts, addresses = sans(manager.certificate(name))
            return "hub.example.com" in hosts and "192.0.2.7" in addresses

        eventually(renamed, f"{name} has the new names")
    manager.await_reconciled()
    versions = manager.settle()
    put("agent-server", (b"rubbish", b"rubbish"))
    eventually(
        lambda: b"rubbish" not in manager.secret("agent-server")["tls.crt"], "it is replaced"
    )
    after = manager.settle()
    assert after["Secret proxy-server"] == versions["Secret proxy-server"]


# -- rotation of the authority ---------------------------------------------------------------------


def annotate(manager: Installation, **annotations: str) -> None:
    """Write annotations of the authority's secret; underscores stand for hyphens."""
    manager.plane.patch(
        manager.get("v1", "Secret", "cluster-proxy-signer"),
        {
            "metadata": {
                "annotations": {
                    PREFIX + key.replace("_", "-"): value for key, value in annotations.items()
                }
            }
        },
    )


def asked_for(told: Object) -> str:
    """Return the value that a condition asks an administrator to write."""
    found: str = told["message"].rpartition("=")[2]
    return found


def await_rotation(manager: Installation, reason: str, *, message: str = "") -> Object:
    def there() -> Object | None:
        found = manager.condition("CARotation")
        good = found and found["reason"] == reason and message in found["message"]
        return found if good else None

    return eventually(there, f"CARotation is {reason}: {manager.condition('CARotation')}")


@contextlib.contextmanager
def silent_cluster(manager: Installation) -> Iterator[str]:
    """A cluster with an agent that has no authority that anybody knows of, and nobody that looks after it."""
    name, plane = f"silent-{manager.namespace}", manager.plane
    meta = {"name": "cluster-proxy", "namespace": name}
    labels = {"open-cluster-management.io/addon-name": "cluster-proxy"}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "cluster-proxy-ca"}}
    cluster, *_ = made = plane.apply(
        {
            "apiVersion": "cluster.open-cluster-management.io/v1",
            "kind": "ManagedCluster",
            "metadata": {"name": name},
            "spec": {"hubAcceptsClient": True},
        },
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}},
        {
            "apiVersion": "addon.open-cluster-management.io/v1beta1",
            "kind": "ManagedClusterAddOn",
            "metadata": meta,
            "spec": {},
        },
        {
            "apiVersion": "work.open-cluster-management.io/v1",
            "kind": "ManifestWork",
            "metadata": meta | {"name": "addon-cluster-proxy-deploy-0", "labels": labels},
            "spec": {"workload": {"manifests": [secret]}},
        },
    )
    joined = {
        "type": "ManagedClusterJoined",
        "status": "True",
        "reason": "Joined",
        "message": "",
        "lastTransitionTime": "2026-11-26T06:00:00Z",
    }
    plane.patch(cluster, {"status": {"conditions": [joined]}}, subresource="status")
    try:
        yield name
    finally:
        for each in reversed(made):
            plane.delete(each)


def test_a_rotation_waits_until_agents_have_the_authority(manager: Installation) -> None:
    with silent_cluster(manager) as cluster:
        rotation_that_waits_for(cluster, manager)


def rotation_that_waits_for(cluster: str, manager: Installation) -> None:
    manager.configure()
    manager.start()
    manager.await_reconciled()
    old = manager.secret("cluster-proxy-signer")["ca.crt"]
    assert manager.condition("CARotation") is None
    # What cannot be read is told, if there is nothing else to be told, too.
    annotate(manager, ca_overlap="soon")
    told = await_rotation(manager, "InvalidAnnotation", message='"soon"')
    assert told["status"] == "False"
    annotate(manager, ca_overlap="0s")
    eventually(lambda: manager.condition("CARotation") is None, "it is told no more")

    annotate(manager, rotate_ca="1")
    told = await_rotation(manager, "AwaitingDelivery", message=f": {cluster} (not available). ")
    assert told["status"] == "False"
    bundle = manager.secret("proxy-server-ca")["ca.crt"]
    assert bundle.startswith(old)
    assert asked_for(told) == hashlib.sha256(bundle).hexdigest()[:16]
    command = f"kubectl -n {manager.namespace} annotate secret cluster-proxy-signer --overwrite"
    assert f"{command} {PREFIX}ca-delivered=" in told["message"]
    # It is no matter of time, and nothing is written meanwhile.
    manager.settle()
    annotate(manager, ca_delivered="something else")
    manager.settle()
    assert manager.secret("cluster-proxy-signer")["ca.crt"] == old
    manager.await_reconciled()
    event = next(
        event
        for event in manager.plane.list("v1", "Event")
        if event["reason"] == "CARotation" and event["message"] == told["message"]
    )
    assert event["type"] == "Warning"

    annotate(manager, ca_delivered=asked_for(told))
    told = await_rotation(manager, "Retiring")
    assert told["status"] == "True"
    middle = manager.secret("cluster-proxy-signer")
    assert middle["previous-ca.crt"] == old
    authority = load_authority(middle["ca.crt"], middle["ca.key"])
    for name in ("proxy-server", "agent-server", "proxy-client"):
        manager.certificate(name).verify_directly_issued_by(authority.certificate)
    manager.settle()

    # Another one can be asked for at once.
    annotate(manager, rotate_ca="2")
    told = await_rotation(manager, "AwaitingDelivery")
    bundle = manager.secret("proxy-server-ca")["ca.crt"]
    assert bundle.count(b"BEGIN CERTIFICATE") == 3
    annotate(manager, ca_delivered=asked_for(told))
    told = await_rotation(manager, "Retiring")
    signer = manager.secret("cluster-proxy-signer")
    assert signer["previous-ca.crt"] == middle["ca.crt"] + old
    assert f"{PREFIX}ca-retire=" in told["message"]
    annotate(manager, ca_retire=asked_for(told))
    eventually(lambda: manager.condition("CARotation") is None, "the rotation is over")
    assert set(manager.secret("cluster-proxy-signer")) == {"ca.crt", "ca.key"}
    assert manager.secret("proxy-server-ca")["ca.crt"] == signer["ca.crt"]
    manager.settle()


def test_a_rotation_waits_for_all_configurations(manager: Installation) -> None:
    manager.plane.apply(
        {
            "apiVersion": RBAC,
            "kind": "ClusterRoleBinding",
            "metadata": {"name": f"all:{manager.namespace}"},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "cluster-admin",
            },
            "subjects": [
                {"kind": "ServiceAccount", "name": ACCOUNT, "namespace": manager.namespace}
            ],
        }
    )
    another = manager.plane.create_namespace()
    manager.configure()
    entrypoint = {"type": "LoadBalancerService", "loadBalancerService": {"name": "entry"}}
    manager.configure("another", proxyServer={"namespace": another, "entrypoint": entrypoint})
    manager.start()
    manager.await_reconciled()
    old = manager.secret("cluster-proxy-signer")["ca.crt"]
    annotate(manager, ca_overlap="0s", rotate_ca="1")
    told = await_rotation(manager, "AwaitingHub", message=f"Secret {another}/proxy-server-ca")
    assert told["status"] == "True"
    bundle = eventually(
        lambda: next(
            (
                found
                for found in [manager.secret("proxy-server-ca")["ca.crt"]]
                if found.count(b"BEGIN CERTIFICATE") == 2
            ),
            None,
        ),
        "both are trusted",
    )
    # Agents have it, and not all of the hub.
    annotate(manager, ca_delivered=hashlib.sha256(bundle).hexdigest()[:16])
    manager.settle()
    assert manager.secret("cluster-proxy-signer")["ca.crt"] == old
    service = manager.get("v1", "Service", "entry", another)
    manager.plane.patch(
        service,
        {"status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}},
        subresource="status",
    )
    manager.await_reconciled("another")
    eventually(lambda: manager.condition("CARotation") is None, "the rotation is over")
    assert manager.secret("cluster-proxy-signer")["ca.crt"] != old


def test_somebodys_authority_is_not_replaced_when_it_has_expired(manager: Installation) -> None:
    key = new_key()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Example Corp")])
    begin = datetime.now(UTC) - timedelta(days=2)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(begin)
        .not_valid_after(begin + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    data = {
        "ca.crt": certificate.public_bytes(serialization.Encoding.PEM),
        "ca.key": _pem(key, serialization.PrivateFormat.PKCS8),
    }
    put_secret(manager, "cluster-proxy-signer", data)
    manager.configure()
    manager.start()
    told = manager.await_condition("ProxyServerSecretSigned", "False", message="expired at")
    assert told["reason"] == "SignerInvalid"
    manager.settle()
    assert manager.secret("cluster-proxy-signer") == data
    annotate(manager, rotate_ca="please")
    manager.await_reconciled()
    assert manager.secret("cluster-proxy-signer")["ca.crt"] != data["ca.crt"]


# -- B10, B11 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [{"ip": "192.0.2.10"}, {"hostname": "lb.example.com"}], ids=str)
def test_load_balancer(manager: Installation, address: dict[str, str]) -> None:
    annotations = [
        {"key": "service.beta.kubernetes.io/aws-load-balancer-type", "value": "nlb"},
        {"key": "example.com/url", "value": "https://example.com/?a=b"},
        {"key": "not valid!", "value": "x"},
    ]
    manager.configure(
        proxyServer={
            "entrypoint": {
                "type": "LoadBalancerService",
                "loadBalancerService": {"name": "entry", "annotations": annotations},
            }
        }
    )
    manager.start()
    waiting = manager.await_condition("EntrypointProvisioned", "False")
    assert waiting["message"].endswith("not yet provisioned")
    service = manager.get("v1", "Service", "entry")
    assert service["spec"]["type"] == "LoadBalancer"
    assert service["metadata"]["annotations"] == {
        "service.beta.kubernetes.io/aws-load-balancer-type": "nlb",
        "example.com/url": "https://example.com/?a=b",
    }
    assert "ownerReferences" not in service["metadata"]
    assert manager.find("v1", "Secret", "proxy-server") is None
    assert manager.find("apps/v1", "Deployment", "cluster-proxy") is None
    eventually(
        lambda: any(
            event["reason"] == "InvalidAnnotation" and "annotations[2]" in event["message"]
            for event in manager.plane.list("v1", "Event")
        ),
        "the bad annotation is told",
    )

    put_service_status(manager, "entry", [address])
    manager.await_reconciled()
    hosts, addresses = sans(manager.certificate("agent-server"))
    assert next(iter(address.values())) in hosts
    assert ("ip" in address) == ("192.0.2.10" in addresses)
    manager.settle()
    # It is never written again, whatever becomes of it.
    service = manager.get("v1", "Service", "entry")
    manager.plane.patch(service, {"spec": {"loadBalancerSourceRanges": ["192.0.2.0/24"]}})
    manager.configure(
        proxyServer={
            "entrypoint": {"type": "LoadBalancerService", "loadBalancerService": {"name": "entry"}}
        }
    )
    manager.await_reconciled()
    manager.settle()
    service = manager.get("v1", "Service", "entry")
    assert service["spec"]["loadBalancerSourceRanges"] == ["192.0.2.0/24"]
    assert "example.com/url" in service["metadata"]["annotations"]


def test_hostname_is_in_the_certificates(manager: Installation) -> None:
    manager.configure(
        proxyServer={
            "entrypoint": {
                "type": "Hostname",
                "hostname": {"value": "hub.example.com"},
                "port": 443,
            }
        }
    )
    manager.start()
    manager.await_reconciled()
    for name in ("proxy-server", "agent-server"):
        assert "hub.example.com" in sans(manager.certificate(name))[0]
    # The port is the agents' alone.
    ports = manager.get("v1", "Service", "proxy-entrypoint")["spec"]["ports"]
    assert [each["port"] for each in ports] == [8090, 8091]


def test_user_server(manager: Installation) -> None:
    manager.configure(userServer={"additionalSANs": ["proxy.example.com"]})
    manager.start()
    manager.await_reconciled()
    manager.await_condition("UserServerSecretSigned")
    hosts, addresses = sans(manager.certificate("cluster-proxy-user-serving-cert"))
    service = "cluster-proxy-addon-user"
    assert hosts == {
        "127.0.0.1",
        "localhost",
        service,
        f"{service}.{manager.namespace}",
        f"{service}.{manager.namespace}.svc",
        f"{service}.{manager.namespace}.svc.cluster.local",
        "proxy.example.com",
    }
    assert addresses == {"127.0.0.1"}


def test_without_user_server_there_is_no_certificate_of_it(manager: Installation) -> None:
    manager.configure()
    manager.start()
    manager.await_reconciled()
    assert manager.find("v1", "Secret", "cluster-proxy-user-serving-cert") is None
    assert manager.condition("UserServerSecretSigned") is None


# -- B6, B7 and the TLS profile --------------------------------------------------------------------


def put_profile(manager: Installation, data: dict[str, str]) -> Object:
    [found] = manager.plane.apply(
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "ocm-tls-profile", "namespace": manager.namespace},
            "data": data,
        }
    )
    return found


def test_tls_profile(manager: Installation) -> None:
    suites = "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384"
    profile = put_profile(manager, {"minTLSVersion": "VersionTLS12", "cipherSuites": suites})
    manager.configure(proxyServer={"additionalArgs": ["--v=2"]})
    manager.start()
    manager.await_reconciled()
    assert manager.container()["args"][-3:] == [
        "--v=2",
        f"--cipher-suites={suites}",
        "--tls-min-version=VersionTLS12",
    ]

    put_profile(manager, {"minTLSVersion": "TLSv1.3", "cipherSuites": suites + ",NO_SUCH"})
    eventually(
        lambda: manager.container()["args"][-1] == "--tls-min-version=VersionTLS13", "TLS 1.3"
    )
    assert f"--cipher-suites={suites}" in manager.container()["args"]

    # A mistake is told, and what was good stays.
    put_profile(manager, {"minTLSVersion": "TLS9"})
    told = manager.await_condition("ConfigurationValid", "False", message="minTLSVersion")
    assert told["reason"] == "InvalidTLSProfile"
    assert manager.container()["args"][-1] == "--tls-min-version=VersionTLS13"

    manager.plane.delete(profile)
    eventually(
        lambda: manager.container()["args"][-2:] == ["--v=2", "--tls-min-version=VersionTLS12"],
        "the default is back",
    )
    manager.await_condition("ConfigurationValid")


# -- bad input, providers of certificates ----------------------------------------------------------


def test_an_invalid_configuration_is_told_and_nothing_is_touched(manager: Installation) -> None:
    manager.configure()
    manager.start()
    manager.await_reconciled()
    before = manager.settle()
    manager.configure(
        proxyServer={
            "image": "",
            "entrypoint": {"type": "Hostname", "hostname": {"value": "not a host"}},
        }
    )
    told = manager.await_condition("ConfigurationValid", "False")
    assert told["reason"] == "InvalidConfiguration"
    assert "spec.proxyServer.image" in told["message"]
    assert "spec.proxyServer.entrypoint.hostname.value" in told["message"]
    after = manager.settle()
    for name, version in before.items():
        if not name.startswith(("configuration", "Event")):
            assert after[name] == version, name
    manager.configure()
    manager.await_reconciled()
    manager.await_condition("ConfigurationValid")


def test_cert_manager_is_answered(manager: Installation) -> None:
    manager.configure(authentication={"signer": {"type": "CertManager"}})
    manager.start()
    told = manager.await_condition("ConfigurationValid", "False")
    assert told["reason"] == "SignerNotSupported"
    assert "not supported yet" in told["message"]
    assert manager.find("v1", "Secret", "cluster-proxy-signer") is None


def test_provided_certificates(manager: Installation) -> None:
    now = datetime.now(UTC)
    authority = new_authority(now)
    hosts = (
        "localhost",
        "127.0.0.1",
        f"proxy-entrypoint.{manager.namespace}",
        f"proxy-entrypoint.{manager.namespace}.svc",
        "extra.example.com",
    )
    manager.configure(authentication={"signer": {"type": "Provided"}, "dump": {"secrets": {}}})
    manager.start()
    manager.await_condition("ProxyServerSecretSigned", "False", message="proxy-server-ca")
    put_secret(manager, "proxy-server-ca", {"ca.crt": authority.crt})
    manager.await_condition("ConfigurationValid", "False", message="proxy-client")
    for name, usage in (
        ("proxy-server", Usage.SERVER),
        ("agent-server", Usage.SERVER),
        ("proxy-client", Usage.CLIENT),
    ):
        crt, key = issue(authority, Leaf(name=name, hosts=hosts, usage=usage), now)
        put_secret(manager, name, {"tls.crt": crt, "tls.key": key}, "kubernetes.io/tls")
    manager.await_reconciled()
    assert manager.find("v1", "Secret", "cluster-proxy-signer") is None
    # Agents are signed by another authority than servers believe, as after a change from SelfSigned.
    other = new_authority(now)
    put_secret(manager, "cluster-proxy-signer", {"ca.crt": other.crt, "ca.key": other.key})
    told = manager.await_condition("ConfigurationValid", "False", message="no agent can connect")
    assert f"{manager.namespace}/proxy-server-ca: ca.crt does not hold" in told["message"]
    put_secret(manager, "proxy-server-ca", {"ca.crt": authority.crt + other.crt})
    manager.await_condition("ConfigurationValid")
    assert manager.secret("cluster-proxy-signer") == {"ca.crt": other.crt, "ca.key": other.key}
    before = manager.settle()
    # One that would not be believed is told, with what is wrong, and left to its owner.
    crt, key = issue(
        authority, Leaf(name="x", hosts=("other.example.com",), usage=Usage.SERVER), now
    )
    put_secret(manager, "agent-server", {"tls.crt": crt, "tls.key": key}, "kubernetes.io/tls")
    told = manager.await_condition("AgentServerSecretSigned", "False")
    assert "is not for 127.0.0.1" in told["message"]
    assert manager.secret("agent-server")["tls.crt"] == crt
    after = manager.settle()
    assert after["Deployment cluster-proxy"] == before["Deployment cluster-proxy"]
    # What does not depend on it is done.
    spec: dict[str, Any] = {
        "authentication": {"signer": {"type": "Provided"}, "dump": {"secrets": {}}},
        "proxyServer": {"replicas": 2},
    }
    manager.configure("cluster-proxy", **spec)
    eventually(lambda: manager.deployment()["spec"]["replicas"] == 2, "it goes on deploying")
    manager.await_condition("ConfigurationValid", "False", message="is not for 127.0.0.1")
    # Without it no pod can be started.
    manager.plane.delete(manager.get("v1", "Secret", "agent-server"))
    manager.await_condition("ConfigurationValid", "False", message="is not there")
    spec["proxyServer"] = {"replicas": 3}
    manager.configure("cluster-proxy", **spec)
    manager.settle()
    assert manager.deployment()["spec"]["replicas"] == 2
    # One that ends soon is good, and that it does is told once.
    old = new_authority(now - timedelta(days=400), private_key=authority.private_key)
    leaf = Leaf(name="x", hosts=hosts, usage=Usage.SERVER)
    crt, key = issue(old, leaf, now - timedelta(days=150))
    put_secret(manager, "agent-server", {"tls.crt": crt, "tls.key": key}, "kubernetes.io/tls")
    manager.await_condition("AgentServerSecretSigned", message="80% of its life is over")
    manager.await_reconciled()
    eventually(lambda: manager.deployment()["spec"]["replicas"] == 3, "all is well")
    manager.settle()
    manager.plane.patch(manager.configuration(), {"metadata": {"annotations": {"touched": "yes"}}})
    manager.settle()
    [event] = [
        event
        for event in manager.plane.list("v1", "Event")
        if event["reason"] == "CertificateExpiring"
        and f"{manager.namespace}/agent-server" in event["message"]
    ]
    assert event["count"] == 1


def test_metrics_are_of_the_certificates_that_are_wanted(manager: Installation) -> None:
    address = "127.66.0.1:18080"
    manager.configure(userServer={})
    manager.start(f"--metrics-bind-address={address}")
    manager.await_reconciled()

    def measured() -> set[str]:
        text = httpx.get(f"http://{address}/metrics").text
        return set(re.findall('secret_certificate_expiry_seconds{.*secret="(.*)"}', text))

    user = "cluster-proxy-user-serving-cert"
    assert measured() == {"proxy-server", "agent-server", "proxy-client", user}
    secrets = {"signingProxyServerSecretName": "renamed"}
    manager.plane.patch(
        manager.configuration(),
        {"spec": {"userServer": None, "authentication": {"dump": {"secrets": secrets}}}},
    )
    wanted = {"renamed", "agent-server", "proxy-client"}
    eventually(lambda: measured() == wanted, "those that are not wanted are gone")
    manager.plane.delete(manager.configuration())
    eventually(lambda: measured() == set(), "all are gone")


def test_its_own_status_wakes_nobody(manager: Installation) -> None:
    address = "127.66.0.1:18080"
    manager.configure()
    manager.start(f"--metrics-bind-address={address}")
    manager.await_reconciled()
    manager.settle()

    def reconciles() -> float:
        text = httpx.get(f"http://{address}/metrics").text
        pattern = (
            'controller_runtime_reconcile_total{controller="managedproxyconfiguration",.*} (.*)'
        )
        return sum(map(float, re.findall(pattern, text)))

    before = reconciles()
    assert before
    live = manager.configuration()
    path = manager.plane.path_of(live)
    said = [{**each, "message": "changed"} for each in live["status"]["conditions"]]
    status = {**live["status"], "conditions": said}
    manager.plane.call("PUT", f"{path}/status", {**live, "status": status})
    manager.settle()
    manager.plane.patch(live, {"metadata": {"annotations": {"touched": "yes"}}})
    eventually(lambda: reconciles() > before, "an annotation is news")
    manager.settle()
    assert reconciles() == before + 1


# -- deletion, steady state, restarts --------------------------------------------------------------


def test_what_it_made_goes_with_the_configuration(manager: Installation) -> None:
    live = manager.configure()
    manager.start()
    manager.await_reconciled()
    manager.settle()
    manager.plane.delete(live)
    for kind in (
        ("apps/v1", "Deployment", "cluster-proxy"),
        ("v1", "Secret", "proxy-server"),
        ("v1", "Secret", "cluster-proxy-signer"),
        ("v1", "Service", "proxy-entrypoint"),
    ):
        eventually(lambda kind=kind: manager.find(*kind) is None, f"{kind} is collected")  # type: ignore[misc]
    assert manager.running
    # The manager waits for another, and serves it.
    manager.configure()
    manager.await_reconciled()


def test_nothing_is_written_in_steady_state_or_by_a_restart(manager: Installation) -> None:
    manager.configure(userServer={})
    manager.start("--leader-elect=true")
    manager.await_reconciled()
    before = manager.settle()
    assert manager.stop() == 0
    manager.start("--leader-elect=true")
    eventually(
        lambda: manager.plane.get(
            "coordination.k8s.io/v1", "Lease", "cluster-proxy-addon-manager", manager.namespace
        )["spec"]["holderIdentity"],  # type: ignore[index]
        "the new one leads",
    )
    # Every touch makes it look at everything.
    for turn in range(10):
        live = manager.configuration()
        manager.plane.patch(live, {"metadata": {"annotations": {"turn": str(turn)}}})
    after = manager.settle()
    for name, version in before.items():
        if not name.startswith("configuration"):
            assert after[name] == version, name
    assert manager.configuration()["status"] == {
        **manager.configuration()["status"],
        "lastObservedGeneration": manager.configuration()["metadata"]["generation"],
    }


def test_rights_that_are_lost_are_told_and_it_goes_on_when_they_are_back(
    manager: Installation,
) -> None:
    manager.configure()
    manager.start()
    manager.await_reconciled()
    role = manager.get(RBAC, "Role", "open-cluster-management:cluster-proxy:addon-manager")
    less = [
        {**rule, "verbs": ["get", "list", "watch"]} if "deployments" in rule["resources"] else rule
        for rule in role["rules"]
    ]
    manager.plane.patch(role, {"rules": less})
    manager.configure(proxyServer={"replicas": 2})
    told = manager.await_condition("Reconciled", "False", message="deployments")
    assert told["reason"] == "Forbidden"
    assert ACCOUNT in told["message"]
    # What is gone meanwhile is not said to be there.
    manager.plane.delete(manager.deployment())
    told = manager.await_condition("ProxyServerDeployed", "False")
    assert told["reason"] == "NotYetDeployed"
    manager.plane.patch(role, {"rules": role["rules"]})
    manager.await_reconciled()
    assert manager.deployment()["spec"]["replicas"] == 2


def test_the_apiserver_goes_and_comes_back(manager: Installation) -> None:
    manager.configure()
    manager.start()
    manager.await_reconciled()
    with manager.plane.stopped_apiserver():
        assert manager.running
    manager.configure(proxyServer={"replicas": 2})
    manager.await_reconciled()
    assert manager.deployment()["spec"]["replicas"] == 2


def test_it_is_started_before_its_configuration(manager: Installation) -> None:
    manager.start()
    eventually(lambda: "waiting for it" in manager.log_text(), "it says what it waits for")
    manager.configure()
    manager.await_reconciled()


def test_status_is_nobody_elses_loss(manager: Installation) -> None:
    live = manager.configure()
    foreign = {
        "type": "Foreign",
        "status": "True",
        "reason": "Theirs",
        "message": "",
        "lastTransitionTime": "2026-01-02T03:04:05Z",
    }
    manager.plane.patch(live, {"status": {"conditions": [foreign]}}, subresource="status")
    manager.start()
    live = manager.await_reconciled()
    assert foreign in live["status"]["conditions"]


def test_two_managers_one_acts(manager: Installation, hub: ControlPlane, tmp_path: Path) -> None:
    manager.configure()
    manager.start("--leader-elect=true")
    manager.await_reconciled()
    lease = manager.get("coordination.k8s.io/v1", "Lease", "cluster-proxy-addon-manager")
    assert lease["spec"]["leaseDurationSeconds"] == 15
    holder = lease["spec"]["holderIdentity"]
    second = Installation.__new__(Installation)
    second.__dict__ |= manager.__dict__ | {"_program": None, "log": tmp_path / "second.log"}
    second.start("--leader-elect=true")
    try:
        eventually(lambda: "cluster-proxy-addon-manager" in second.log_text(), "it waits")
        before = manager.settle()
        assert manager.stop() == 0

        def taken() -> bool:
            found = manager.get("coordination.k8s.io/v1", "Lease", "cluster-proxy-addon-manager")
            return found["spec"]["holderIdentity"] not in {"", holder}

        eventually(taken, "the second leads")
        manager.plane.delete(manager.get("v1", "Service", "proxy-entrypoint"))
        eventually(lambda: manager.find("v1", "Service", "proxy-entrypoint") is not None, "it acts")
        assert before["Secret proxy-server"] == manager.settle()["Secret proxy-server"]
    finally:
        assert second.stop() == 0


# -- service proxies -------------------------------------------------------------------------------


def test_controllers_keep_the_service_proxies_certificate(manager: Installation) -> None:
    name = "cluster-proxy-service-proxy-server-cert"
    manager.start(command="controllers")
    eventually(lambda: "waiting" in manager.log_text(), "it waits for the CA")
    authority = new_authority(datetime.now(UTC))
    put_secret(manager, "cluster-proxy-signer", {"ca.crt": authority.crt, "ca.key": authority.key})
    secret = eventually(lambda: manager.find("v1", "Secret", name), "it is issued")
    assert secret["type"] == "kubernetes.io/tls"
    hosts, addresses = sans(manager.certificate(name))
    assert hosts == {"*", "localhost", "127.0.0.1", "*.open-cluster-management.proxy"}
    assert addresses == {"127.0.0.1"}
    manager.certificate(name).verify_directly_issued_by(authority.certificate)
    manager.plane.delete(secret)
    eventually(lambda: manager.find("v1", "Secret", name), "it is back")
    fresh = new_authority(datetime.now(UTC))
    manager.plane.delete(manager.get("v1", "Secret", "cluster-proxy-signer"))
    put_secret(manager, "cluster-proxy-signer", {"ca.crt": fresh.crt, "ca.key": fresh.key})

    def follows() -> bool:
        certificate = manager.certificate(name)
        try:
            certificate.verify_directly_issued_by(load_authority(fresh.crt, fresh.key).certificate)
        except Exception:
            return False
        return True

    eventually(follows, "it follows the CA")


# -- cluster profiles (B13 to B18) -----------------------------------------------------------------

PROFILE = "multicluster.x-k8s.io/v1alpha1"
LABELS = {
    "x-k8s.io/cluster-manager": "open-cluster-management",
    "open-cluster-management.io/cluster-name": "cluster1",
}


def put_cluster_profile(manager: Installation, name: str, labels: dict[str, str]) -> Object:
    [found] = manager.plane.apply(
        {
            "apiVersion": PROFILE,
            "kind": "ClusterProfile",
            "metadata": {"name": name, "namespace": manager.namespace, "labels": labels},
            "spec": {"clusterManager": {"name": "open-cluster-management"}, "displayName": name},
        }
    )
    return found


def providers(manager: Installation, name: str) -> list[Object]:
    status = manager.get(PROFILE, "ClusterProfile", name).get("status", {})
    found: list[Object] = status.get("accessProviders", [])
    return found


def test_cluster_profiles(manager: Installation) -> None:
    profile = put_cluster_profile(manager, "first", LABELS)
    others = {"name": "another", "cluster": {"server": "https://example.com"}}
    manager.plane.patch(
        profile, {"status": {"accessProviders": [others], "conditions": []}}, subresource="status"
    )
    wrong: list[dict[str, str]] = [
        {},
        {"open-cluster-management.io/cluster-name": "cluster1"},
        {**LABELS, "x-k8s.io/cluster-manager": "someone-else"},
        {"x-k8s.io/cluster-manager": "open-cluster-management"},
    ]
    for place, labels in enumerate(wrong):
        put_cluster_profile(manager, f"wrong-{place}", labels)
    manager.start("--feature-gates=ClusterProfile=true")
    eventually(lambda: "waiting for it" in manager.log_text(), "there is no configuration")
    manager.configure()
    manager.await_reconciled()
    assert providers(manager, "first") == [others]
    # Without a user server there is nothing to tell; with one there is, soon.
    manager.configure(userServer={})
    eventually(lambda: len(providers(manager, "first")) == 2, "the provider is told")
    crt = base64.b64encode(manager.secret("cluster-proxy-user-serving-cert")["tls.crt"]).decode()
    assert providers(manager, "first") == [
        others,
        {
            "name": "open-cluster-management",
            "cluster": {
                "server": f"https://cluster-proxy-addon-user.{manager.namespace}:9092/first",
                "certificate-authority-data": crt,
                "extensions": [
                    {
                        "name": "client.authentication.k8s.io/exec",
                        "extension": {"clusterName": "first"},
                    }
                ],
            },
        },
    ]
    # Nothing is told twice: the profiles are looked at one after the other.
    touched = manager.plane.patch(profile, {"metadata": {"annotations": {"touched": "yes"}}})
    put_cluster_profile(manager, "second", LABELS)
    eventually(lambda: len(providers(manager, "second")) == 1, "a profile that comes later")
    found = manager.get(PROFILE, "ClusterProfile", "first")
    assert found["metadata"]["resourceVersion"] == touched["metadata"]["resourceVersion"]
    for place in range(len(wrong)):
        assert providers(manager, f"wrong-{place}") == []
    # A changed CA is told again.
    manager.plane.delete(manager.get("v1", "Secret", "cluster-proxy-user-serving-cert"))
    eventually(
        lambda: providers(manager, "first")[1]["cluster"]["certificate-authority-data"] != crt,
        "the new CA data",
    )


def test_without_the_gate_profiles_are_left_alone(manager: Installation) -> None:
    put_cluster_profile(manager, "untouched", LABELS)
    manager.configure(userServer={})
    manager.start()
    manager.await_reconciled()
    manager.settle()
    assert providers(manager, "untouched") == []
