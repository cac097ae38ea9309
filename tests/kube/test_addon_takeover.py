"""D12: of several managers one acts, and when that one is killed another one goes on, with clusters as with all else."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509

from clusterproxy.addon.certificates import issued_by
from kube.addon_installation import OF_TUNNEL, AddOnInstallation, addon_installed, agent_there
from kube.control_plane import eventually
from kube.klusterlet import Klusterlet, secret_data

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from kube.control_plane import ControlPlane
    from kube.ocm_hub import OcmHub

pytestmark = [pytest.mark.kube, pytest.mark.timeout(180)]

Object = dict[str, Any]

_LEASE = "cluster-proxy-addon-manager"
# The lease of one that was killed has to pass.
_WITHIN_S = 40.0


@pytest.fixture
def manager(ocm_hub: OcmHub, tmp_path: Path) -> Generator[AddOnInstallation]:
    with addon_installed(ocm_hub, tmp_path) as installation:
        yield installation


@pytest.fixture
def another(manager: AddOnInstallation, tmp_path: Path) -> Generator[AddOnInstallation]:
    """Another replica of the same Deployment."""
    second = AddOnInstallation.__new__(AddOnInstallation)
    second.__dict__ |= manager.__dict__ | {"_program": None, "log": tmp_path / "second.log"}
    yield second
    if second.running:
        second.stop()


def test_another_manager_gives_clusters_their_agents_when_the_leader_is_killed(
    ocm_hub: OcmHub,
    managed: ControlPlane,
    manager: AddOnInstallation,
    another: AddOnInstallation,
    accepted_cluster: str,
) -> None:
    cluster, late = accepted_cluster, f"{accepted_cluster}-late"
    manager.offer()
    manager.configure()
    manager.run("--leader-elect=true")
    manager.await_reconciled()
    leader = holder(manager)
    another.run("--leader-elect=true")
    eventually(lambda: _LEASE in another.log_text(), "the other one waits")
    ocm_hub.accept(late)
    try:
        with Klusterlet(ocm_hub, managed, late) as klusterlet:
            manager.enable(cluster)
            manager.await_said(cluster, "RegistrationApplied")
            manager.eventually(lambda: manager.works(cluster), "the cluster has a work")
            before = manager.settle()
            authority = manager.secret("cluster-proxy-signer")["ca.crt"]
            os.kill(manager.pid, signal.SIGKILL)
            manager.enable(late)
            # Nobody leads.
            assert not manager.works(late)
            eventually(
                lambda: holder(manager) not in {"", leader}, "another leads", within_s=_WITHIN_S
            )
            another.eventually(lambda: agent_there(managed, manager.agents), "the agent is there")
            there = another.eventually(
                lambda: secret_data(managed, manager.agents, OF_TUNNEL), "and its certificate"
            )
            leaf = x509.load_pem_x509_certificate(there["tls.crt"])
            assert issued_by(leaf, x509.load_pem_x509_certificate(authority))
            another.await_said(late, "ManifestApplied")
            # What the first one has made is as it was.
            after = another.settle()
            names = [name for name in before if name.startswith("ManifestWork")]
            assert names
            assert {name: after[name] for name in names} == {name: before[name] for name in names}
            assert manager.secret("cluster-proxy-signer")["ca.crt"] == authority
            assert klusterlet.alive
            another.disable(late)
            eventually(lambda: agent_there(managed, manager.agents) is None, "it is removed")
        assert another.stop() == 0
    finally:
        ocm_hub.remove(late)


def holder(manager: AddOnInstallation) -> str:
    lease = manager.get("coordination.k8s.io/v1", "Lease", _LEASE)
    found: str = lease["spec"]["holderIdentity"]
    return found
