"""AddOnDeploymentConfigs of managed clusters."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from e2e.world import ADDON, AGENTS, NAMESPACE

if TYPE_CHECKING:
    from collections.abc import Generator

    from e2e.world import World

Object = dict[str, Any]

_NAME = "of-a-test"


@contextlib.contextmanager
def configured(world: World, cluster: str, **spec: Any) -> Generator[None]:
    """Have the add-on of a cluster refer to such an AddOnDeploymentConfig in the block, and to none after it."""
    plane = world.hub.plane
    config = {
        "apiVersion": ADDON,
        "kind": "AddOnDeploymentConfig",
        "metadata": {"name": _NAME, "namespace": NAMESPACE},
        # Without a namespace the definition has another one.
        "spec": {"agentInstallNamespace": AGENTS, **spec},
    }
    reference = {
        "group": ADDON.partition("/")[0],
        "resource": "addondeploymentconfigs",
        "name": _NAME,
        "namespace": NAMESPACE,
    }
    addon = {"apiVersion": ADDON, "kind": "ManagedClusterAddOn"} | world.addon(cluster)
    plane.apply(config)
    plane.patch(addon, {"spec": {"configs": [reference]}})
    try:
        yield
    finally:
        plane.patch(addon, {"spec": {"configs": []}})
        plane.delete(config)


def variables(**values: str) -> list[Object]:
    """Return ``customizedVariables``."""
    return [{"name": name, "value": value} for name, value in values.items()]


def referred(world: World, cluster: str) -> bool:
    """Whether OCM says of which content the configuration is that the add-on is to have."""
    found = world.addon(cluster)["status"].get("configReferences", ())
    return any(
        each["resource"] == "addondeploymentconfigs" and each["desiredConfig"]["specHash"]
        for each in found
    )
