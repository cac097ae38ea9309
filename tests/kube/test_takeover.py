"""From the original's manager to ours and back: nothing is made anew that need not be, and one of them acts at a time."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from compatibility import differences, meaning
from golden_objects import HOSTNAME, golden, golden_configuration

from kube.control_plane import eventually
from kube.go_installation import give_rights, install, sent_deployment
from kube.installation import Installation, installed

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kube.control_plane import ControlPlane, Object

pytestmark = pytest.mark.kube

FOREIGN = {
    "type": "Foreign",
    "status": "True",
    "reason": "Theirs",
    "message": "",
    "lastTransitionTime": "2026-01-02T03:04:05Z",
}
LEASE = ("coordination.k8s.io/v1", "Lease", "cluster-proxy-addon-manager")
DEPLOYMENT = ("Deployment", "cluster-proxy")
PORT_FORWARD_ROLE = ("Role", "cluster-proxy-addon-agent:portforward")


@pytest.fixture
def manager(hub: ControlPlane, tmp_path: Path) -> Iterator[Installation]:
    with installed(hub, tmp_path) as installation:
        yield installation


def again(
    manager: Installation, made: dict[tuple[str, str], Object]
) -> dict[tuple[str, str], Object]:
    """Return the same objects as they are now."""
    return {
        (kind, name): manager.get(obj["apiVersion"], kind, name)
        for (kind, name), obj in made.items()
    }


@pytest.mark.parametrize("rights", ["ours", "the original's"])
def test_an_installation_of_the_originals_is_taken_over(manager: Installation, rights: str) -> None:
    if rights != "ours":
        give_rights(manager)
    made = install(manager, HOSTNAME)
    live = manager.configuration()
    conditions = [*live["status"]["conditions"], FOREIGN]
    manager.plane.patch(live, {"status": {"conditions": conditions}}, subresource="status")
    names = manager.settle().keys()
    before = again(manager, made)

    manager.start("--leader-elect=true")
    configuration = manager.await_reconciled()
    versions = manager.settle()
    after = again(manager, made)

    for key, obj in after.items():
        assert obj["metadata"]["uid"] == before[key]["metadata"]["uid"], key
        if key == PORT_FORWARD_ROLE:
            # It has less rights, and is the same else.
            assert obj["rules"] != before[key]["rules"]
            assert obj["metadata"]["ownerReferences"] == before[key]["metadata"]["ownerReferences"]
        elif key != DEPLOYMENT:
            # Annotations, certificates, owners: all of it.
            assert obj == before[key], key
    # It was changed in place, in one step.
    assert after[DEPLOYMENT]["metadata"]["generation"] == 2
    assert after[DEPLOYMENT]["spec"]["selector"] == before[DEPLOYMENT]["spec"]["selector"]
    assert after[DEPLOYMENT]["spec"]["strategy"]["type"] == "RollingUpdate"
    new = {name for name in versions.keys() - names if not name.startswith("Event ")}
    assert new == {"ServiceAccount cluster-proxy-proxy-server"}
    assert "orbidden" not in manager.log_text()
    status = configuration["status"]["conditions"]
    assert FOREIGN in status
    # The certificates are the same, so nothing has happened to what is told of them.
    for condition in conditions:
        if condition["type"].endswith("SecretSigned"):
            [now] = [each for each in status if each["type"] == condition["type"]]
            assert now["lastTransitionTime"] == condition["lastTransitionTime"]


def test_and_back(manager: Installation) -> None:
    made = install(manager, HOSTNAME)
    manager.start()
    manager.await_reconciled()
    manager.settle()
    assert manager.stop() == 0
    ours = again(manager, made)[DEPLOYMENT]
    # The original goes by these two, and replaces the whole object if one of them is another.
    theirs = sent_deployment(manager, HOSTNAME)
    prefix = "proxy.open-cluster-management.io"
    annotations, wanted = (each["metadata"]["annotations"] for each in (ours, theirs))
    assert annotations[f"{prefix}/tls-config-hash"] == wanted[f"{prefix}/tls-config-hash"]
    assert annotations[f"{prefix}/rendered-hash"] != wanted[f"{prefix}/rendered-hash"]
    theirs["metadata"]["resourceVersion"] = ours["metadata"]["resourceVersion"]
    replaced = manager.plane.call("PUT", manager.plane.path_of(theirs), theirs)
    assert replaced["metadata"]["uid"] == made[DEPLOYMENT]["metadata"]["uid"]
    configuration = manager.configuration()
    found = differences(
        meaning(golden(HOSTNAME)[DEPLOYMENT], golden_configuration(HOSTNAME)),
        meaning(replaced, configuration),
    )
    # Nothing of ours is left; its third generation, in another namespace.
    assert found == {"metadata.generation", "metadata.namespace"}


@pytest.mark.parametrize("end", ["released", "left"])
def test_while_the_originals_manager_leads_ours_does_nothing(
    end: str, manager: Installation
) -> None:
    def now() -> str:
        return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}Z"

    acquired = now()
    lease: Object = {
        "apiVersion": LEASE[0],
        "kind": LEASE[1],
        "metadata": {"name": LEASE[2], "namespace": manager.namespace},
        "spec": {
            "holderIdentity": "go-manager_5f0d0c3e-3c9c-4a57-9a2e-1d6f0f6f7a11",
            # The original's is 15; the test is not to last so long.
            "leaseDurationSeconds": 3,
            "acquireTime": acquired,
            "renewTime": acquired,
            "leaseTransitions": 4,
        },
    }
    manager.plane.call("POST", manager.plane.path(LEASE[0], LEASE[1], manager.namespace), lease)
    configuration = manager.configure()
    manager.start("--leader-elect=true")
    eventually(lambda: "waiting to lead" in manager.log_text(), "ours waits for the lease")
    before = manager.versions()
    until = time.monotonic() + 8.0
    while time.monotonic() < until:
        manager.plane.patch(lease, {"spec": {"renewTime": now()}})
        assert manager.running, manager.log_text()
        time.sleep(0.5)
    assert manager.versions() == before
    assert manager.configuration() == configuration
    if end == "released":
        manager.plane.patch(
            lease, {"spec": {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": now()}}
        )
    manager.await_reconciled()
    spec = manager.get(*LEASE)["spec"]
    assert spec["holderIdentity"] not in {"", lease["spec"]["holderIdentity"]}
    assert spec["leaseTransitions"] == 5
    assert spec["leaseDurationSeconds"] == 15
