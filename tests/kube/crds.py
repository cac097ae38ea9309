"""The custom resources of a hub: Open Cluster Management's, the cluster inventory's and our own."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, Final

import yaml

from kube.build import module_folder
from kube.ocm_manifests import HUB, ocm_objects

_OWN: Final = Path(__file__).parents[2] / "deploy" / "crds"
_OCM: Final = "open-cluster-management.io/api"
_INVENTORY: Final = Path(__file__).with_name("clusterprofiles.yaml")

_KINDS: Final = frozenset(
    {
        "AddOnDeploymentConfig",
        "ClusterManagementAddOn",
        "ManagedCluster",
        "ManagedClusterAddOn",
        "ManagedClusterSet",
        "ManagedClusterSetBinding",
        "ManifestWork",
        "Placement",
        "PlacementDecision",
    }
)


def custom_resource_definitions() -> list[dict[str, Any]]:
    """Return the definitions, one a kind.

    Raises:
      MissingProgramError: a module with them cannot be had.
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in ("addon", "cluster", "work"):
        for crd in _read_all(module_folder(_OCM) / folder):
            kind = crd["spec"]["names"]["kind"]
            # Later folders are those of newer versions, whose files have the older versions, too.
            if kind in _KINDS:
                found[kind] = _without_webhook(crd)
    for crd in (*_read(_INVENTORY), *_read_all(_OWN)):
        found[crd["spec"]["names"]["kind"]] = crd
    absent = _KINDS - found.keys()
    assert not absent, f"{_OCM} has no {absent}"
    return list(found.values())


def ocm_definitions(webhook: str, ca: bytes) -> list[dict[str, Any]]:
    """Return the definitions of a hub as OCM installs it, and ours.

    Args:
      webhook: whom the apiserver asks for conversions.
      ca: of that one's certificate, in PEM.

    Raises:
      MissingProgramError: OCM's module cannot be had.
    """
    bundle = base64.b64encode(ca).decode()
    found: dict[str, dict[str, Any]] = {}
    for crd in ocm_objects(f"{HUB}/crds", AddonAPIServiceCABundle=bundle):
        if "conversion" in crd["spec"]:
            # OCM's is a Service, behind which there are pods.
            crd["spec"]["conversion"]["webhook"]["clientConfig"] = {
                "url": webhook,
                "caBundle": bundle,
            }
        found[crd["spec"]["names"]["kind"]] = crd
    for crd in (*_read(_INVENTORY), *_read_all(_OWN)):
        found[crd["spec"]["names"]["kind"]] = crd
    return list(found.values())


def _read_all(folder: Path) -> list[dict[str, Any]]:
    return [crd for path in sorted(folder.rglob("*.yaml")) for crd in _read(path)]


def _read(path: Path) -> list[dict[str, Any]]:
    documents = yaml.safe_load_all(path.read_text())
    return [d for d in documents if d and d.get("kind") == "CustomResourceDefinition"]


def _without_webhook(crd: dict[str, Any]) -> dict[str, Any]:
    """Return a definition that stores the add-on kinds as v1beta1.

    OCM stores v1alpha1, which without its conversion webhook loses what only v1beta1 has.
    """
    crd["spec"].pop("conversion", None)
    versions = crd["spec"]["versions"]
    if crd["spec"]["group"].startswith("addon.") and any(v["name"] == "v1beta1" for v in versions):
        for version in versions:
            version["storage"] = version["name"] == "v1beta1"
    return crd
