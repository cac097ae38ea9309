"""A trivial add-on for tests of what is around add-ons: the test itself is its manager."""

from __future__ import annotations

import base64
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID

from kube.control_plane import eventually
from kube.kubeconfigs import new_key
from kube.ocm_resources import (
    ADDON_LABEL,
    CLUSTER_LABEL,
    has_condition,
)

if TYPE_CHECKING:
    from kube.control_plane import ControlPlane

Object = dict[str, Any]

ADDON: Final = "addon.open-cluster-management.io"
CLUSTER: Final = "cluster.open-cluster-management.io"
WORK: Final = "work.open-cluster-management.io/v1"
CSR: Final = "certificates.k8s.io/v1"
SIGNER: Final = "example.com/hello-signer"


class HelloAddOn:
    """An add-on of one cluster, whose manager the test is."""

    def __init__(self, plane: ControlPlane, cluster: str, namespace: str) -> None:
        self.plane = plane
        self.cluster = cluster
        self.namespace = namespace
        meta = {"name": "hello", "namespace": cluster}
        plane.apply(
            {
                "apiVersion": f"{ADDON}/v1beta1",
                "kind": "ManagedClusterAddOn",
                "metadata": meta,
                "spec": {},
            }
        )

    def read(self, version: str = "v1beta1") -> Object:
        found = self.plane.get(f"{ADDON}/{version}", "ManagedClusterAddOn", "hello", self.cluster)
        assert found is not None
        return found

    def register(self, *, user: str = "hello-agent") -> None:
        """Say what the add-on needs, as the manager of one does."""
        subject = {"user": user, "groups": ["hello-agents"]}
        registrations: list[Object] = [
            {"type": "kubeClient", "kubeClient": {"subject": subject}},
            {
                "type": "customSigner",
                "customSigner": {
                    "signerName": SIGNER,
                    "subject": {"user": "hello", "organizationUnits": ["signer-1"]},
                },
            },
        ]
        for each, present in zip(
            registrations, self.read().get("status", {}).get("registrations", ()), strict=False
        ):
            if driver := present.get("kubeClient", {}).get("driver"):
                each["kubeClient"]["driver"] = driver
        status = {"namespace": self.namespace, "registrations": registrations}
        self.plane.patch(self.read(), {"status": status}, subresource="status")

    def requests(self, signer: str) -> list[Object]:
        selector = f"{CLUSTER_LABEL}={self.cluster},{ADDON_LABEL}=hello"
        found = self.plane.list(CSR, "CertificateSigningRequest", selector=selector)
        kind = {"apiVersion": CSR, "kind": "CertificateSigningRequest"}
        return [each | kind for each in found if each["spec"]["signerName"] == signer]

    def request(self, signer: str, *, without: tuple[str, ...] = ()) -> Object:
        """Wait for a request of the klusterlet, other than those."""

        def made() -> Object | None:
            new = [r for r in self.requests(signer) if r["metadata"]["name"] not in without]
            return new[0] if new else None

        return eventually(made, f"the klusterlet asks {signer}")

    def approve(self, request: Object) -> None:
        approved = {"type": "Approved", "status": "True", "reason": "Test", "message": "by a test"}
        body = request | {"status": {"conditions": [approved]}}
        self.plane.call("PUT", self.plane.path_of(request) + "/approval", body)

    def sign(self, request: Object) -> None:
        """Sign an approved request, as the add-on's own signer."""
        asked = x509.load_pem_x509_csr(base64.b64decode(request["spec"]["request"]))
        now = datetime.now(UTC)
        issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "hello-ca")])
        certificate = (
            x509.CertificateBuilder(issuer, asked.subject, asked.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + timedelta(days=180))
            .sign(new_key(), hashes.SHA256())
        )
        pem = base64.b64encode(certificate.public_bytes(serialization.Encoding.PEM)).decode()
        self.plane.patch(request, {"status": {"certificate": pem}}, subresource="status")

    def condition(self, kind: str, status: str = "True") -> None:
        eventually(
            lambda: has_condition(self.read(), kind, status),
            f"{kind} is {status} for {self.read()}",
        )


def work(cluster: str, *manifests: Object, orphan: str = "") -> Object:
    """Return a work; *orphan* is a namespace that it leaves when it goes, "all" for everything."""
    spec: Object = {"workload": {"manifests": list(manifests)}}
    if orphan == "all":
        spec["deleteOption"] = {"propagationPolicy": "Orphan"}
    elif orphan:
        rule = {"group": "", "resource": "namespaces", "name": orphan, "namespace": ""}
        spec["deleteOption"] = {
            "propagationPolicy": "SelectivelyOrphan",
            "selectivelyOrphans": {"orphaningRules": [rule]},
        }
    meta = {"name": "hello-0", "namespace": cluster}
    return {"apiVersion": WORK, "kind": "ManifestWork", "metadata": meta, "spec": spec}


def space(name: str) -> Object:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def config_map(namespace: str, name: str, **data: str) -> Object:
    meta = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": data}


def settled(plane: ControlPlane, cluster: str) -> Object:
    """Wait until the work is applied as it is now, and return it."""

    def applied() -> Object | None:
        found = plane.get(WORK, "ManifestWork", "hello-0", cluster)
        assert found is not None
        conditions = found.get("status", {}).get("conditions", ())
        good = [
            each["status"] == "True"
            and each.get("observedGeneration") == found["metadata"]["generation"]
            for each in conditions
        ]
        return found if len(good) == 2 and all(good) else None

    try:
        return eventually(applied, "the work is applied")
    except AssertionError as error:
        found = plane.get(WORK, "ManifestWork", "hello-0", cluster)
        raise AssertionError(f"{error}: {found}") from error


def lease(namespace: str, renewed: datetime) -> Object:
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": "hello", "namespace": namespace},
        "spec": {
            "leaseDurationSeconds": 60,
            "renewTime": f"{renewed:%Y-%m-%dT%H:%M:%S.%fZ}",
        },
    }
