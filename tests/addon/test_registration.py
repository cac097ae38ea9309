from __future__ import annotations

import base64
import copy
import hashlib
from datetime import UTC, datetime
from typing import Any

import attrs
import pytest
from golden_objects import golden
from hypothesis import given, settings
from hypothesis import strategies as st

from clusterproxy.addon.registration import (
    AGENT_SIGNER,
    KUBE_CLIENT_SIGNER,
    AddonVersion,
    Permission,
    Registration,
    Subject,
    Wanted,
    agent_registrations,
    hub_subject,
    is_deleting,
    is_owned,
    next_status_patch,
    read_registrations,
    supported_configs_patch,
)

NOW = datetime(2026, 11, 26, 6, 0, 0, tzinfo=UTC)
CA = b"-----BEGIN CERTIFICATE-----\n"
UNIT = f"signer-{base64.b64encode(hashlib.sha256(CA).digest()).hex()}"
ACCOUNT = "system:serviceaccount:cluster1:cluster-proxy-agent"

READY = Permission(ready=True)
PENDING = Permission(ready=False)
WANTED = Wanted(ca_crt=CA, install_namespace="install-ns", permission=READY)

Object = dict[str, Any]


def addon(**status: Any) -> Object:
    return {
        "metadata": {
            "name": "cluster-proxy",
            "namespace": "cluster1",
            "uid": "u",
            "resourceVersion": "5",
        },
        "spec": {},
        "status": status,
    }


def steps(
    obj: Object, wanted: Wanted = WANTED, version: AddonVersion = AddonVersion.V1BETA1
) -> list[Object]:
    """Take all steps, giving rights as soon as there is somebody to give them to; return the patches of the status."""
    taken: list[Object] = []
    while True:
        ready = bool(hub_subject(obj, version).user)
        now = attrs.evolve(wanted, permission=Permission(ready=ready))
        patch = next_status_patch(obj, now, NOW, version)
        if patch is None:
            return taken
        assert patch["metadata"] == {"uid": "u", "resourceVersion": "5"}
        taken.append(patch["status"])
        obj["status"] = {**obj["status"], **patch["status"]}
        assert len(taken) < 9


def condition(status: Object) -> tuple[str, str, str]:
    (found,) = (each for each in status["conditions"] if each["type"] == "RegistrationApplied")
    assert found.keys() == {"type", "status", "reason", "message", "lastTransitionTime"}
    return found["status"], found["reason"], found["message"]


KUBE_CLIENT: Object = {
    "type": "kubeClient",
    "kubeClient": {
        "subject": {
            "user": "open-cluster-management:cluster-proxy:addon-agent",
            "groups": ["open-cluster-management:cluster-proxy"],
        }
    },
}
CUSTOM_SIGNER: Object = {
    "type": "customSigner",
    "customSigner": {
        "signerName": "open-cluster-management.io/proxy-agent-signer",
        "subject": {
            "user": "open-cluster-management:cluster-proxy:proxy-agent",
            "groups": ["open-cluster-management:cluster-proxy"],
            "organizationUnits": [UNIT],
        },
    },
}


def test_the_steps_that_one_sees() -> None:
    # C17, D2, D3
    obj = addon(conditions=[{"type": "Configured", "status": "True"}])
    first, second, third = steps(obj)
    assert first == {
        "supportedConfigs": [
            {"group": "proxy.open-cluster-management.io", "resource": "managedproxyconfigurations"},
            {"group": "addon.open-cluster-management.io", "resource": "addondeploymentconfigs"},
        ]
    }
    assert second["registrations"] == [KUBE_CLIENT, CUSTOM_SIGNER]
    assert second["namespace"] == "install-ns"
    assert condition(second) == (
        "False",
        "PermissionConfigPending",
        "registration subject not ready",
    )
    assert third.keys() == {"conditions"}
    assert condition(third) == (
        "True",
        "SetPermissionApplied",
        "Registration of the addon agent is configured",
    )
    assert obj["status"]["conditions"][0] == {"type": "Configured", "status": "True"}


def test_the_flat_shape_of_v1alpha1() -> None:
    obj = addon(kubeClientDriver="csr")
    _, second, _ = steps(obj, version=AddonVersion.V1ALPHA1)
    assert second["registrations"] == [
        {"signerName": KUBE_CLIENT_SIGNER, "subject": KUBE_CLIENT["kubeClient"]["subject"]},
        {
            "signerName": AGENT_SIGNER,
            "subject": {
                "user": "open-cluster-management:cluster-proxy:proxy-agent",
                "groups": ["open-cluster-management:cluster-proxy"],
                "organizationUnit": [UNIT],
            },
        },
    ]
    assert obj["status"]["kubeClientDriver"] == "csr"


def test_a_changed_authority_changes_the_unit_only() -> None:
    # C17
    obj = addon()
    steps(obj)
    (changed,) = steps(obj, attrs.evolve(WANTED, ca_crt=b"another"))
    assert changed.keys() == {"registrations"}
    assert changed["registrations"][0] == KUBE_CLIENT
    (unit,) = changed["registrations"][1]["customSigner"]["subject"]["organizationUnits"]
    assert unit != UNIT
    assert len(unit) == len("signer-") + 88


def test_the_driver_stays() -> None:
    obj = addon()
    steps(obj)
    obj["status"]["registrations"][0]["kubeClient"]["driver"] = "csr"
    obj["status"]["registrations"][0]["kubeClient"]["subject"] = {"user": "somebody"}
    (patch,) = steps(obj)
    assert patch["registrations"][0] == {
        "type": "kubeClient",
        "kubeClient": {**KUBE_CLIENT["kubeClient"], "driver": "csr"},
    }


def test_who_the_agent_is() -> None:
    shared = agent_registrations(CA)[0].subject
    for registrations, subject in (
        ([], Subject()),
        ([CUSTOM_SIGNER, None, {"type": "kubeClient", "kubeClient": {"driver": 5}}], Subject()),
        ([KUBE_CLIENT], shared),
        # Nobody but a klusterlet that uses tokens says who it is.
        ([{"type": "kubeClient", "kubeClient": {"subject": {"user": "admin"}}}], shared),
        ([{"type": "kubeClient", "kubeClient": {"driver": "csr", "subject": {"user": "a"}}}], shared),
        ([{"type": "kubeClient", "kubeClient": {"driver": "token", "subject": {"user": "a"}}}], Subject(user="a")),
        ([{"type": "kubeClient", "kubeClient": {"driver": "token"}}], Subject()),
    ):  # fmt: skip
        assert hub_subject(addon(registrations=registrations)) == subject


def test_with_tokens_the_subject_stays() -> None:
    # D9
    obj = addon()
    steps(obj)
    client = {"driver": "token", "subject": {"user": ACCOUNT}}
    obj["status"]["registrations"][0]["kubeClient"] = client
    assert steps(obj) == []
    assert hub_subject(obj) == Subject(user=ACCOUNT)
    (patch,) = steps(obj, attrs.evolve(WANTED, ca_crt=b"another"))
    assert patch["registrations"][0] == {"type": "kubeClient", "kubeClient": client}


@pytest.mark.parametrize("subject", [{}, {"subject": {}}, {"subject": {"user": "", "groups": []}}])
def test_with_tokens_and_no_subject_yet(subject: Object) -> None:
    # D9
    obj = addon(
        registrations=[{"type": "kubeClient", "kubeClient": {"driver": "token", **subject}}]
    )
    _, second = steps(obj)
    assert second["registrations"] == [
        {"type": "kubeClient", "kubeClient": {"driver": "token"}},
        CUSTOM_SIGNER,
    ]
    assert condition(second)[:2] == ("False", "PermissionConfigPending")
    # As the conversion of the original gives it out.
    obj["status"]["registrations"][0]["kubeClient"] = {"driver": "token", "subject": {"user": ""}}
    assert steps(obj) == []
    obj["status"]["registrations"][0]["kubeClient"]["subject"] = {"user": ACCOUNT}
    (last,) = steps(obj)
    assert condition(last)[0] == "True"


def test_with_tokens_in_v1alpha1() -> None:
    version = AddonVersion.V1ALPHA1
    obj = addon(kubeClientDriver="token")
    entry = {"signerName": KUBE_CLIENT_SIGNER, "subject": {"user": ACCOUNT}}
    obj["status"]["registrations"] = [entry]
    _, second = steps(obj, version=version)
    assert second["registrations"][0] == entry
    assert hub_subject(obj, version) == Subject(user=ACCOUNT)


def test_rights_that_were_not_given() -> None:
    obj = addon()
    steps(obj)
    obj["status"]["registrations"] = []
    failed = attrs.evolve(
        WANTED, install_namespace="else", permission=Permission(ready=False, error="no way")
    )
    patch = next_status_patch(obj, failed, NOW)
    assert patch is not None
    # Nothing else is written until that is mended.
    assert patch["status"].keys() == {"conditions"}
    assert condition(patch["status"]) == (
        "False",
        "SetPermissionFailed",
        "Failed to set permission for hub agent: no way",
    )


@pytest.mark.parametrize(
    ("configured", "annotation", "spec", "namespace"),
    [
        ("a", "b", "c", "a"),
        ("", "b", "c", "b"),
        ("", "", "c", "c"),
        ("", "", "", "open-cluster-management-agent-addon"),
        ("", 5, ["c"], "open-cluster-management-agent-addon"),
    ],
)
def test_where_it_is_installed(configured: str, annotation: Any, spec: Any, namespace: str) -> None:
    obj = addon()
    obj["metadata"]["annotations"] = {
        "addon.open-cluster-management.io/v1alpha1-install-namespace": annotation
    }
    obj["spec"]["installNamespace"] = spec
    steps(obj, attrs.evolve(WANTED, install_namespace=configured))
    assert obj["status"]["namespace"] == namespace


def test_who_owns_it() -> None:
    # D1
    obj = addon()
    owner = {"kind": "ClusterManagementAddOn", "name": "cluster-proxy"}
    for owners, owned in (
        ([owner], True),
        ([None, 5, {"kind": []}, owner], True),
        ([{**owner, "name": "other"}], False),
        ([{**owner, "kind": "Other"}], False),
        (None, False),
        ("x", False),
    ):
        obj["metadata"]["ownerReferences"] = owners
        assert is_owned(obj) == owned
    assert not is_deleting(obj)
    obj["metadata"]["deletionTimestamp"] = "2026-11-26T06:00:00Z"
    assert is_deleting(obj)


@pytest.mark.parametrize("situation", ["02-hub-addon", "07-hub-addon"])
def test_the_golden_status_is_reached(situation: str) -> None:
    obj = golden(situation)["ManagedClusterAddOn", "cluster-proxy"]
    wanted = copy.deepcopy(obj["status"])
    obj["metadata"] |= {"uid": "u", "resourceVersion": "5"}
    assert is_owned(obj)
    inputs = attrs.evolve(WANTED, install_namespace="open-cluster-management-cluster-proxy")
    # Taken over, only the CA is another.
    (patch,) = steps(copy.deepcopy(obj), inputs)
    assert patch.keys() == {"registrations"}
    obj["status"] = {"configReferences": wanted["configReferences"]}
    steps(obj, inputs)
    units = ["registrations", 1, "customSigner", "subject", "organizationUnits"]
    for status in (wanted, obj["status"]):
        signer = status[units[0]][units[1]][units[2]][units[3]]
        (unit,) = signer.pop(units[4])
        assert len(unit) == len(UNIT)
        for each in status["conditions"]:
            each.pop("lastTransitionTime")
        status["conditions"] = [each for each in status["conditions"] if each["type"] == "RegistrationApplied"]  # fmt: skip
    assert obj["status"] == wanted


TEXTS = st.text(max_size=3)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["type", "kubeClient", "customSigner", "subject", "driver", "user", "groups", "signerName", "status", "group", "resource"]),
        inner,
        max_size=4,
    ),
    max_leaves=10,
)  # fmt: skip
ENTRIES = st.lists(
    ANY
    | st.fixed_dictionaries({"type": st.just("kubeClient"), "kubeClient": ANY})
    | st.fixed_dictionaries({"type": st.just("customSigner"), "customSigner": ANY})
    | st.fixed_dictionaries({"signerName": st.just(KUBE_CLIENT_SIGNER), "subject": ANY})
)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "registrations": ANY | ENTRIES,
            "supportedConfigs": ANY,
            "conditions": ANY | st.lists(ANY),
            "kubeClientDriver": ANY | st.just("token"),
            "namespace": ANY,
        },
    )
    | ANY,
    st.sampled_from(AddonVersion),
)
def test_a_status_of_any_shape(status: Any, version: AddonVersion) -> None:
    obj: Object = {"metadata": {}, "status": status}
    read_registrations(obj, version)
    for permission in (READY, PENDING, Permission(ready=False, error="e")):
        inputs = attrs.evolve(WANTED, permission=permission)
        live = {**obj, "status": copy.deepcopy(status)}
        for _ in range(3):
            patch = next_status_patch(live, inputs, NOW, version)
            if patch is None:
                break
            there = live["status"] if isinstance(live["status"], dict) else {}
            live["status"] = {**there, **patch["status"]}
        assert next_status_patch(live, inputs, NOW, version) is None
        assert supported_configs_patch(live) is None
        if not permission.error:
            first, second = read_registrations(live, version)
            assert second == agent_registrations(CA)[1]
            assert isinstance(first, Registration)
            assert first.signer == KUBE_CLIENT_SIGNER
