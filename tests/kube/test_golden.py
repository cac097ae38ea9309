"""The manager's objects beside the original's: what differs is what docs/compatibility.md says, all of it and no more."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from compatibility import Place, differences, documented, meaning
from golden_objects import HOSTNAME, PORT_FORWARD, golden, golden_configuration

from kube.control_plane import eventually
from kube.installation import RBAC, Installation, installed

if TYPE_CHECKING:
    from pathlib import Path

    from kube.control_plane import ControlPlane, Object

pytestmark = pytest.mark.kube

NAMESPACE = "open-cluster-management-addon"
KINDS = (
    ("v1", "Secret"),
    ("v1", "Service"),
    ("v1", "ServiceAccount"),
    ("apps/v1", "Deployment"),
    (RBAC, "Role"),
    (RBAC, "RoleBinding"),
)


def objects(manager: Installation) -> dict[tuple[str, str], Object]:
    return {
        (kind, each["metadata"]["name"]): {"apiVersion": api_version, "kind": kind, **each}
        for api_version, kind in KINDS
        for each in manager.plane.list(api_version, kind, manager.namespace)
    }


def renamed(obj: Object, name: str) -> Object:
    """Return an object as if its namespace were the original's."""
    found: Object = json.loads(re.sub(rf"\b{name}\b", NAMESPACE, json.dumps(obj)))
    return found


def made_in(situation: str, manager: Installation) -> dict[tuple[str, str], Object]:
    """Let the manager make what the original made, and return it by kind and name."""
    before = objects(manager).keys()
    spec: Any = json.loads(
        json.dumps(golden_configuration(situation)["spec"]).replace(NAMESPACE, manager.namespace)
    )
    manager.configure(**spec)
    manager.start()
    manager.await_condition("ProxyServerDeployed", message="Replicas: 1")
    configuration = manager.await_reconciled()
    made = {key: obj for key, obj in objects(manager).items() if key not in before}
    made["ManagedProxyConfiguration", "cluster-proxy"] = configuration
    # In one of its own, for that of the manager was there before it.
    name = f"{manager.namespace}-made"
    manager.configure("another", proxyServer={"namespace": name})
    namespace = eventually(
        lambda: manager.plane.get("v1", "Namespace", name), "the namespace is made"
    )
    try:
        made["Namespace", NAMESPACE] = renamed(namespace, name)
    finally:
        manager.plane.delete(namespace)
    return {
        key: renamed(meaning(obj, configuration), manager.namespace) for key, obj in made.items()
    }


@pytest.fixture(scope="module")
def found(hub: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[Place]]:
    """The differences in each situation."""
    found: dict[str, set[Place]] = {}
    for situation in (HOSTNAME, PORT_FORWARD):
        directory: Path = tmp_path_factory.mktemp("golden")
        with installed(hub, directory) as manager:
            ours = made_in(situation, manager)
        owner = golden_configuration(situation)
        theirs = {key: meaning(obj, owner) for key, obj in golden(situation).items()}
        found[situation] = {
            (*key, path)
            for key in theirs.keys() | ours.keys()
            for path in (
                differences(theirs[key], ours[key]) if key in theirs and key in ours else {""}
            )
        }
    return found


@pytest.mark.parametrize("situation", [HOSTNAME, PORT_FORWARD])
def test_no_difference_is_undocumented(situation: str, found: dict[str, set[Place]]) -> None:
    undocumented = sorted(found[situation] - documented())
    assert not undocumented, "\n".join(map(str, undocumented))


def test_every_documented_difference_is_there(found: dict[str, set[Place]]) -> None:
    assert not documented() - set().union(*found.values())
