"""What the add-on's pure parts write, as a real apiserver takes it and gives it out: said once, it is not said again."""

from __future__ import annotations

import base64
import copy
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from golden_objects import golden

from clusterproxy.addon.agent_permissions import agent_permissions
from clusterproxy.addon.certificates import issued_by, new_authority
from clusterproxy.addon.csr import Verdict, approval, approved, needs_signature, signed
from clusterproxy.addon.drift import merge
from clusterproxy.addon.manifest_work import applied_patch, render_failed_patch, work_patch, works
from clusterproxy.addon.registration import (
    AGENT_SIGNER,
    AddonVersion,
    Permission,
    Subject,
    Wanted,
    agent_registrations,
    hub_subject,
    next_status_patch,
    read_registrations,
)
from clusterproxy.addon.spec_hash import addon_configs_patch, config_keys, spec_hash
from kube.control_plane import ApiError, eventually

if TYPE_CHECKING:
    from collections.abc import Callable

    from kube.control_plane import ControlPlane, Object
    from kube.ocm_hub import OcmHub

pytestmark = pytest.mark.kube

NOW = datetime(2026, 11, 26, 6, 0, 0, tzinfo=UTC)
CSR = "certificates.k8s.io/v1"
CLUSTER = "cluster.open-cluster-management.io/v1"
ADDON = "addon.open-cluster-management.io"
WORK = "work.open-cluster-management.io/v1"


def cluster_on(hub: ControlPlane, version: AddonVersion) -> tuple[Object, Object]:
    """Make a managed cluster with the add-on, and return both."""
    name = hub.create_namespace()
    cluster, addon = hub.apply(
        {
            "apiVersion": CLUSTER,
            "kind": "ManagedCluster",
            "metadata": {"name": name},
            "spec": {"hubAcceptsClient": True},
        },
        {
            "apiVersion": f"{ADDON}/{version}",
            "kind": "ManagedClusterAddOn",
            "metadata": {"name": "cluster-proxy", "namespace": name},
            "spec": {},
        },
    )
    return cluster, addon


def repeated(hub: ControlPlane, obj: Object, patch: Callable[[Object], Object | None]) -> Object:
    """Do what *patch* says until it says nothing, and return the object then."""
    changes: list[Object] = []
    while (change := patch(obj)) is not None:
        changes.append(change)
        assert len(changes) < 10, "there is always something to do"
        try:
            obj = hub.patch(obj, change, subresource="status")
        except ApiError as error:
            # OCM's own controllers write status, too.
            if error.status != 409:
                raise
            obj = hub.call("GET", hub.path_of(obj))
    return obj


def registered(plane: ControlPlane, addon: Object, version: AddonVersion) -> Object:
    """Register the agent until there is nothing to do, and return the add-on then."""

    def step(obj: Object) -> Object | None:
        ready = Permission(ready=bool(hub_subject(obj, version).user))
        wanted = Wanted(ca_crt=b"ca", install_namespace="install-ns", permission=ready)
        return next_status_patch(obj, wanted, NOW, version)

    return repeated(plane, addon, step)


def test_the_status_of_an_addon(hub: ControlPlane) -> None:
    _, addon = cluster_on(hub, AddonVersion.V1BETA1)
    addon = registered(hub, addon, AddonVersion.V1BETA1)
    assert addon["status"]["conditions"][0]["reason"] == "SetPermissionApplied"
    addon = repeated(hub, addon, lambda obj: render_failed_patch(obj, "why", NOW))
    addon = repeated(hub, addon, lambda obj: applied_patch(obj, [], NOW))
    assert [each["type"] for each in addon["status"]["conditions"]] == ["RegistrationApplied"]
    stale = copy.deepcopy(addon)
    repeated(hub, addon, lambda obj: render_failed_patch(obj, "why", NOW))
    change = render_failed_patch(stale, "another", NOW)
    assert change is not None
    with pytest.raises(ApiError) as refused:
        hub.patch(stale, change, subresource="status")
    assert refused.value.status == 409


@pytest.mark.parametrize("version", AddonVersion)
def test_the_status_where_ocm_converts_it(ocm_hub: OcmHub, version: AddonVersion) -> None:
    plane = ocm_hub.plane
    _, addon = cluster_on(plane, version)
    addon = registered(plane, addon, version)
    assert addon["status"]["conditions"][0]["reason"] == "SetPermissionApplied"
    assert read_registrations(addon, version) == agent_registrations(b"ca")
    # Klusterlets write the old version. This one decides for tokens, and says later who its agent is.
    name = addon["metadata"]["namespace"]
    old = plane.get(f"{ADDON}/v1alpha1", "ManagedClusterAddOn", "cluster-proxy", name)
    assert old is not None
    registrations = old["status"]["registrations"]
    registrations[0] = {"signerName": "kubernetes.io/kube-apiserver-client"}
    token = {"kubeClientDriver": "token", "registrations": registrations}
    old = plane.patch(old, {"status": token}, subresource="status")
    addon = plane.call("GET", plane.path_of(addon))
    assert hub_subject(addon, version) == Subject()
    addon = registered(plane, addon, version)
    assert addon["status"]["conditions"][0]["reason"] == "PermissionConfigPending"
    old = plane.call("GET", plane.path_of(old))
    account = f"system:serviceaccount:{name}:cluster-proxy-agent"
    registrations = old["status"]["registrations"]
    registrations[0] = {**registrations[0], "subject": {"user": account}}
    plane.patch(old, {"status": {"registrations": registrations}}, subresource="status")
    addon = registered(plane, plane.call("GET", plane.path_of(addon)), version)
    assert addon["status"]["conditions"][0]["reason"] == "SetPermissionApplied"
    assert hub_subject(addon, version) == Subject(user=account)


def test_the_hash_of_a_configuration(hub: ControlPlane) -> None:
    name = hub.create_namespace()
    (config,) = hub.apply(
        {
            "apiVersion": f"{ADDON}/v1beta1",
            "kind": "AddOnDeploymentConfig",
            "metadata": {"name": "adc", "namespace": name},
            "spec": {"customizedVariables": [{"name": "replicas", "value": "<2>"}]},
        }
    )
    _, addon = cluster_on(hub, AddonVersion.V1BETA1)
    reference = {"group": ADDON, "resource": "addondeploymentconfigs"}
    meant = {"namespace": name, "name": "adc"}
    addon = hub.patch(addon, {"spec": {"configs": [{**reference, **meant}]}})
    status = {
        "configReferences": [{**reference, "lastObservedGeneration": 0, "desiredConfig": meant}]
    }
    addon = hub.patch(addon, {"status": status}, subresource="status")
    (key,) = config_keys(addon)
    addon = repeated(hub, addon, lambda obj: addon_configs_patch(obj, {key: config}))
    (found,) = addon["status"]["configReferences"]
    assert found["lastObservedGeneration"] == 1
    assert found["desiredConfig"]["specHash"] == spec_hash(config)


def test_the_rights_of_an_agent(hub: ControlPlane) -> None:
    proxy_namespace = hub.create_namespace()
    cluster, addon = cluster_on(hub, AddonVersion.V1BETA1)
    name = cluster["metadata"]["name"]
    client = {"driver": "token", "subject": {"user": f"system:serviceaccount:{name}:agent"}}
    addon["status"] = {"registrations": [{"type": "kubeClient", "kubeClient": client}]}
    given = agent_permissions(addon, cluster, hub_subject(addon), proxy_namespace=proxy_namespace)
    assert len(given.objects) == 6
    for _, obj in given.objects:
        (live,) = hub.apply(obj)
        assert merge(live, obj) is None


def test_a_work_and_its_patch(hub: ControlPlane) -> None:
    _, addon = cluster_on(hub, AddonVersion.V1BETA1)
    rendered = golden("02-hub-addon")["ManifestWork", "addon-cluster-proxy-deploy-0"]
    manifests = rendered["spec"]["workload"]["manifests"]
    (wanted,) = works(addon, manifests).wanted
    path = hub.path(WORK, "ManifestWork", addon["metadata"]["namespace"])
    live = hub.call("POST", path, wanted)
    assert work_patch(live, wanted) is None
    broken = {
        "metadata": {"labels": None, "ownerReferences": []},
        "spec": {
            "workload": {"manifests": manifests[:2]},
            "deleteOption": {"propagationPolicy": "Orphan", "selectivelyOrphans": None},
            "executor": {"subject": {"type": "ServiceAccount", "serviceAccount": {"name": "a", "namespace": "b"}}},
        },
    }  # fmt: skip
    live = hub.patch(live, broken)
    change = work_patch(live, wanted)
    assert change is not None
    live = hub.patch(live, change)
    assert live["spec"] == wanted["spec"]
    assert work_patch(live, wanted) is None


def test_a_request_is_approved_and_signed(hub: ControlPlane) -> None:
    cluster, addon = cluster_on(hub, AddonVersion.V1BETA1)
    name = cluster["metadata"]["name"]
    authority = new_authority(NOW)
    subject = agent_registrations(authority.crt)[1].subject
    attributes = [
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, subject.groups[0]),
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, subject.organization_units[0], _validate=False),
        x509.NameAttribute(NameOID.COMMON_NAME, subject.user),
    ]  # fmt: skip
    content = x509.CertificateSigningRequestBuilder(x509.Name(attributes)).sign(
        ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()
    )
    # As the klusterlet's hub identity, whom an administrator is here.
    request = hub.call(
        "POST",
        hub.path(CSR, "CertificateSigningRequest"),
        {
            "apiVersion": CSR,
            "kind": "CertificateSigningRequest",
            "metadata": {
                "generateName": f"addon-{name}-cluster-proxy-",
                "labels": {
                    "open-cluster-management.io/addon-name": "cluster-proxy",
                    "open-cluster-management.io/cluster-name": name,
                },
            },
            "spec": {
                "request": base64.b64encode(content.public_bytes(Encoding.PEM)).decode(),
                "signerName": AGENT_SIGNER,
                "usages": ["digital signature", "key encipherment", "client auth"],
            },
        },
    )
    assert approval(request, cluster, addon, authority.crt).reason == "UnknownRequester"
    user = f"system:open-cluster-management:{name}:agent"
    asked = {"username": user, "groups": [f"system:open-cluster-management:{name}"]}

    def from_klusterlet(obj: Object) -> Object:
        return {**obj, "spec": {**obj["spec"], **asked}}

    decision = approval(from_klusterlet(request), cluster, addon, authority.crt)
    assert decision.verdict is Verdict.APPROVE
    path = hub.path_of(request)
    request = hub.call("PUT", f"{path}/approval", approved(request, decision))
    assert needs_signature(request)
    after = signed(from_klusterlet(request), cluster, addon, authority, NOW)
    hub.call("PUT", f"{path}/status", {**after, "spec": request["spec"]})
    found = eventually(lambda: hub.call("GET", path)["status"].get("certificate"), "a certificate")
    certificate = x509.load_pem_x509_certificate(base64.b64decode(found))
    assert issued_by(certificate, authority.certificate)
