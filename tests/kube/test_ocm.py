from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from kube.control_plane import eventually
from kube.hello_addon import (
    ADDON,
    CLUSTER,
    WORK,
    HelloAddOn,
    space,
    work,
)
from kube.klusterlet import Klusterlet
from kube.ocm_resources import (
    ADDON_LABEL,
    KUBE_CLIENT_SIGNER,
    condition,
    has_condition,
    with_conditions,
)

if TYPE_CHECKING:
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


def test_definitions_store_v1alpha1_and_convert(plane: ControlPlane, cluster: str) -> None:
    [added] = plane.apply(
        {
            "apiVersion": f"{ADDON}/v1beta1",
            "kind": "ClusterManagementAddOn",
            "metadata": {"name": "converted"},
            "spec": {
                "defaultConfigs": [
                    {"group": ADDON, "resource": "addondeploymentconfigs", "name": "one"}
                ]
            },
        }
    )
    try:
        older = plane.get(f"{ADDON}/v1alpha1", "ClusterManagementAddOn", "converted")
        assert older is not None
        [supported] = older["spec"]["supportedConfigs"]
        assert supported["defaultConfig"] == {"name": "one"}
    finally:
        plane.delete(added)
    addon = HelloAddOn(plane, cluster, "somewhere")
    addon.register()
    older = addon.read("v1alpha1")
    of_kube, own = older["status"]["registrations"]
    assert of_kube["signerName"] == KUBE_CLIENT_SIGNER
    assert own["subject"]["organizationUnit"] == ["signer-1"]
    plane.patch(older, {"status": {"kubeClientDriver": "csr"}}, subresource="status")
    assert addon.read()["status"]["registrations"][0]["kubeClient"]["driver"] == "csr"
    for kind in ("managedclusteraddons", "clustermanagementaddons"):
        definition = plane.get(
            "apiextensions.k8s.io/v1", "CustomResourceDefinition", f"{kind}.{ADDON}"
        )
        assert definition is not None
        assert definition["status"]["storedVersions"] == ["v1alpha1"]


def test_placed_clusters_have_the_addon(
    ocm_hub: OcmHub, managed: ControlPlane, plane: ControlPlane, cluster: str
) -> None:
    namespace = plane.create_namespace()
    config = {
        "apiVersion": f"{ADDON}/v1beta1",
        "kind": "AddOnDeploymentConfig",
        "metadata": {"name": "hello", "namespace": namespace},
        "spec": {"agentInstallNamespace": "hello"},
    }
    default = {"group": ADDON, "resource": "addondeploymentconfigs", "name": "hello"}
    placed = {"type": "Placements", "placements": [{"name": "hello", "namespace": namespace}]}
    [*_, placement, management] = plane.apply(
        config,
        {
            "apiVersion": f"{CLUSTER}/v1beta2",
            "kind": "ManagedClusterSetBinding",
            "metadata": {"name": "global", "namespace": namespace},
            "spec": {"clusterSet": "global"},
        },
        {
            "apiVersion": f"{CLUSTER}/v1beta1",
            "kind": "Placement",
            "metadata": {"name": "hello", "namespace": namespace},
            "spec": {
                "clusterSets": ["global"],
                "predicates": [
                    {
                        "requiredClusterSelector": {
                            "labelSelector": {"matchLabels": {"wants": "hello"}}
                        }
                    }
                ],
            },
        },
        {
            "apiVersion": f"{ADDON}/v1beta1",
            "kind": "ClusterManagementAddOn",
            "metadata": {
                "name": "hello",
                "annotations": {"addon.open-cluster-management.io/lifecycle": "addon-manager"},
            },
            "spec": {
                "defaultConfigs": [{**default, "namespace": namespace}],
                "installStrategy": placed,
            },
        },
    )
    try:
        found = plane.get(f"{CLUSTER}/v1", "ManagedCluster", cluster)
        assert found is not None
        plane.patch(found, {"metadata": {"labels": {"wants": "hello"}}})

        def installed(version: str) -> Object | None:
            addon = plane.get(f"{ADDON}/{version}", "ManagedClusterAddOn", "hello", cluster)
            return addon if addon and addon["metadata"].get("ownerReferences") else None

        addon = eventually(lambda: installed("v1beta1"), "the cluster has the add-on")
        [owner] = addon["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"]) == (
            "ClusterManagementAddOn",
            management["metadata"]["uid"],
        )
        # The add-on's own manager says what it understands, and which configuration that is.
        supported = [{"group": ADDON, "resource": "addondeploymentconfigs"}]
        plane.patch(addon, {"status": {"supportedConfigs": supported}}, subresource="status")

        def configured() -> Object | None:
            addon = installed("v1beta1")
            return addon if has_condition(addon or {}, "Configured") else None

        try:
            addon = eventually(configured, "the add-on is configured")
        except AssertionError as error:
            raise AssertionError(f"{installed('v1beta1')}\n{ocm_hub.logs()}") from error
        [reference] = addon["status"]["configReferences"]
        assert reference["resource"] == "addondeploymentconfigs"
        assert reference["desiredConfig"]["name"] == "hello"
        # The add-on's manager says which version of the configuration that is, and what it has made of it.
        eventually(lambda: hash_references(plane, "abc"), "the configuration has a version")
        made = work(cluster, space("hello"), orphan="all")
        key = f"addondeploymentconfigs.{ADDON}/{namespace}/hello"
        made["metadata"] |= {
            "labels": {ADDON_LABEL: "hello"},
            "annotations": {"open-cluster-management.io/config-spec-hash": f'{{"{key}": "abc"}}'},
        }
        plane.apply(made)
        applied = condition("ManifestApplied", "True", "AddonManifestApplied")

        def told() -> bool:
            addon = installed("v1beta1")
            assert addon is not None
            present = addon["status"].get("conditions", [])
            if has_condition(addon, "ManifestApplied"):
                return True
            meta = {"resourceVersion": addon["metadata"]["resourceVersion"]}
            change = {"metadata": meta, "status": {"conditions": with_conditions(present, applied)}}
            plane.patch(addon, change, subresource="status")
            return True

        eventually(told, "it is told that the manifests are applied")

        def completed() -> bool:
            addon = installed("v1beta1")
            assert addon is not None
            reasons = {each["type"]: each["reason"] for each in addon["status"]["conditions"]}
            [reference] = addon["status"]["configReferences"]
            applied = reference.get("lastAppliedConfig", {}).get("specHash")
            return (reasons.get("Progressing"), applied) == ("Completed", "abc")

        with Klusterlet(ocm_hub, managed, cluster):
            try:
                eventually(completed, "the configuration is rolled out")
            except AssertionError as error:
                raise AssertionError(f"{installed('v1beta1')}\n{ocm_hub.logs()}") from error
            plane.delete(made)
            eventually(
                lambda: plane.get(WORK, "ManifestWork", "hello-0", cluster) is None,
                "the work is removed",
            )
        managed.delete(space("hello"))
        plane.patch(found, {"metadata": {"labels": {"wants": None}}})
        eventually(lambda: installed("v1beta1") is None, "the cluster has the add-on no more")
    finally:
        plane.delete(management)
        plane.delete(placement)


def hash_references(plane: ControlPlane, spec_hash: str) -> bool:
    """Give all references of the add-on to its configuration a hash, as its manager does."""
    management = plane.get(f"{ADDON}/v1beta1", "ClusterManagementAddOn", "hello")
    assert management is not None
    status = management.get("status", {})
    defaults = status.get("defaultConfigReferences", [])
    placed = [
        reference
        for progression in status.get("installProgressions", ())
        for reference in progression.get("configReferences", ())
    ]
    for reference in (*defaults, *placed):
        reference["desiredConfig"]["specHash"] = spec_hash
    meta = {"resourceVersion": management["metadata"]["resourceVersion"]}
    plane.patch(management, {"metadata": meta, "status": status}, subresource="status")
    return bool(defaults and placed)
