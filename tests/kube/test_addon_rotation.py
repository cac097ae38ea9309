"""The authority is replaced while clusters have agents: OCM's add-on manager, klusterlets, nobody's hand."""

from __future__ import annotations

import base64
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from agents import pair
from cryptography import x509

from clusterproxy.addon.ca_delivery import NOT_APPLIED, NOT_AVAILABLE, REPLACED
from clusterproxy.addon.certificates import issued_by
from kube.addon_installation import CLUSTER, OF_TUNNEL, AddOnInstallation, addon_installed
from kube.control_plane import eventually
from kube.installation import MPC, PREFIX, installed
from kube.klusterlet import Klusterlet, secret_data
from kube.test_manager import annotate, asked_for, await_rotation, put_secret

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kube.control_plane import ControlPlane
    from kube.ocm_hub import OcmHub

pytestmark = pytest.mark.kube

Object = dict[str, Any]

DEFINITION = Path(__file__).parents[2] / "deploy/crds/managedproxyconfigurations.yaml"

_SIGNER = "cluster-proxy-signer"
_SERVING = "cluster-proxy-service-proxy-server-cert"


@pytest.fixture
def manager(ocm_hub: OcmHub, tmp_path: Path) -> Iterator[AddOnInstallation]:
    with addon_installed(ocm_hub, tmp_path) as installation:
        installation.offer()
        installation.configure()
        yield installation


@pytest.fixture
def cluster(accepted_cluster: str) -> str:
    return accepted_cluster


def authorities(pem: bytes) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(pem)


def await_agent(manager: AddOnInstallation, managed: ControlPlane, cluster: str) -> None:
    manager.eventually(
        lambda: secret_data(managed, manager.agents, OF_TUNNEL), "the agent has a certificate"
    )
    manager.await_said(cluster, "ManifestApplied")


def set_available(manager: AddOnInstallation, cluster: str, status: str) -> None:
    """Say what the hub says of a cluster when its klusterlet renews its lease, or does not any more."""
    found = manager.plane.get(CLUSTER, "ManagedCluster", cluster)
    assert found is not None
    kind = "ManagedClusterConditionAvailable"
    kept = [each for each in found["status"]["conditions"] if each["type"] != kind]
    said = {
        "type": kind,
        "status": status,
        "reason": "ManagedClusterLeaseUpdateStopped",
        "message": "Registration agent stopped updating its lease.",
        "lastTransitionTime": "2026-11-26T06:00:00Z",
    }
    change = {"status": {"conditions": [*kept, said]}}
    manager.plane.patch(found, change, subresource="status")


def test_an_authority_is_replaced_without_a_hand(
    ocm_hub: OcmHub, managed: ControlPlane, manager: AddOnInstallation, cluster: str
) -> None:
    manager.run()
    manager.await_reconciled()
    with Klusterlet(ocm_hub, managed, cluster), manager.enabled(cluster):
        await_agent(manager, managed, cluster)
        old = manager.secret(_SIGNER)["ca.crt"]
        [first] = authorities(old)
        annotate(manager, ca_overlap="2s", rotate_ca="1")
        seen: list[tuple[int, bool, int]] = []

        def over() -> bool:
            there = secret_data(managed, manager.agents, OF_TUNNEL) or {}
            trusted = authorities(
                (secret_data(managed, manager.agents, "cluster-proxy-ca") or {})["ca.crt"]
            )
            server = manager.certificate("agent-server")
            bundle = authorities(manager.secret("proxy-server-ca")["ca.crt"])
            signs = manager.secret(_SIGNER)["ca.crt"]
            # Each trusts the other all the time.
            assert any(issued_by(server, each) for each in trusted)
            if "tls.crt" in there:
                leaf = x509.load_pem_x509_certificate(there["tls.crt"])
                assert any(issued_by(leaf, each) for each in bundle)
            now = (len(bundle), signs == old, len(trusted))
            if not seen or seen[-1] != now:
                seen.append(now)
            return signs != old and now == (1, False, 1)

        manager.eventually(over, f"the rotation is over: {seen}")
        # First all trust it, then it signs, then the old one goes.
        assert (2, True, 2) in seen
        assert (2, False, 2) in seen
        eventually(lambda: manager.condition("CARotation") is None, "there is nothing to tell")
        [new] = authorities(manager.secret(_SIGNER)["ca.crt"])
        assert new != first
        assert set(manager.secret(_SIGNER)) == {"ca.crt", "ca.key"}
        leaf = x509.load_pem_x509_certificate(
            (secret_data(managed, manager.agents, OF_TUNNEL) or {})["tls.crt"]
        )
        assert issued_by(leaf, new)
        found = manager.get("v1", "Secret", _SIGNER)["metadata"]["annotations"]
        assert not {f"{PREFIX}ca-delivered", f"{PREFIX}ca-retire"} & set(found)
        # What was noted for that is taken back.
        eventually(lambda: manager.said(cluster, REPLACED) is None, "nothing is noted any more")
        manager.await_said(cluster, "ManifestApplied")
        manager.settle()
    assert manager.running, manager.log_text()


def test_a_cluster_that_is_away_is_named_and_an_administrator_decides(
    ocm_hub: OcmHub, managed: ControlPlane, manager: AddOnInstallation, cluster: str
) -> None:
    manager.run()
    manager.await_reconciled()
    with Klusterlet(ocm_hub, managed, cluster):
        manager.enable(cluster)
        await_agent(manager, managed, cluster)
    old = manager.secret(_SIGNER)["ca.crt"]
    annotate(manager, ca_overlap="0s", rotate_ca="1")
    # As long as it is not known to be away it may come by itself.
    told = await_rotation(manager, "AwaitingAgents", message=f": {cluster}. ")
    assert told["status"] == "True"
    set_available(manager, cluster, "Unknown")
    told = await_rotation(manager, "AwaitingDelivery", message=f": {cluster} ({NOT_AVAILABLE}). ")
    assert told["status"] == "False"
    manager.settle()
    assert manager.secret(_SIGNER)["ca.crt"] == old
    annotate(manager, ca_delivered=asked_for(told))
    told = await_rotation(manager, "Retiring", message=f": {cluster} ({NOT_AVAILABLE}). ")
    assert told["status"] == "True"
    # It is trusted on, for nobody has said that the agent has another certificate.
    manager.settle()
    assert manager.secret(_SIGNER)["previous-ca.crt"] == old
    # A manager that is started anew knows no more and no less.
    manager.stop()
    manager.run()
    set_available(manager, cluster, "True")
    with Klusterlet(ocm_hub, managed, cluster):
        eventually(lambda: manager.condition("CARotation") is None, "the rotation is over")
        [new] = authorities(manager.secret("proxy-server-ca")["ca.crt"])
        leaf = x509.load_pem_x509_certificate(
            (secret_data(managed, manager.agents, OF_TUNNEL) or {})["tls.crt"]
        )
        assert issued_by(leaf, new)
        manager.disable(cluster)


def test_without_open_cluster_management_an_administrator_answers_for_agents(
    managed: ControlPlane, tmp_path: Path
) -> None:
    [definition] = managed.apply(yaml.safe_load(DEFINITION.read_text()))
    try:
        eventually(lambda: managed.list(MPC, "ManagedProxyConfiguration") == [], "it is served")
        with installed(managed, tmp_path) as manager:
            manager.configure()
            manager.start()
            manager.await_reconciled()
            annotate(manager, ca_overlap="0s", rotate_ca="1")
            told = await_rotation(manager, "AwaitingDelivery", message="before all agents have")
            annotate(manager, ca_delivered=asked_for(told))
            told = await_rotation(manager, "Retiring", message="for agents may have certificates")
            annotate(manager, ca_retire=asked_for(told))
            eventually(lambda: manager.condition("CARotation") is None, "the rotation is over")
    finally:
        managed.delete(definition)


def bundle_of(there: dict[str, Object]) -> bytes:
    return base64.b64decode(there["Secret cluster-proxy-ca"]["data"]["ca.crt"])


def test_agents_that_have_to_wait_for_a_configuration_get_authorities_and_certificates(
    ocm_hub: OcmHub, managed: ControlPlane, manager: AddOnInstallation, cluster: str
) -> None:
    first, second = pair(), pair()
    put_secret(manager, _SERVING, first)
    manager.run(service_proxy=True)
    manager.await_reconciled()
    deployment = "Deployment cluster-proxy-proxy-agent"
    serving = "Secret cluster-proxy-service-proxy-server-certificates"

    def has(there: dict[str, Object], replicas: int, trusted: int) -> bool:
        found = base64.b64decode(there[serving]["data"]["tls.crt"])
        return (
            there[deployment]["spec"]["replicas"],
            found,
            bundle_of(there).count(b"BEGIN"),
        ) == (replicas, second["tls.crt"], trusted)

    with Klusterlet(ocm_hub, managed, cluster):
        manager.enable(cluster)
        await_agent(manager, managed, cluster)
        hashes = manager.hashes(cluster)
        replicas = manager.manifest(cluster, "Deployment")["spec"]["replicas"]
        program = ocm_hub.pids()["addon-manager"]
        # Nobody says that the cluster is to have the new configuration.
        os.kill(program, signal.SIGSTOP)
        try:
            manager.configure(proxyAgent={"replicas": replicas + 1})
            manager.await_reconciled()
            put_secret(manager, _SERVING, second)
            annotate(manager, rotate_ca="1")
            manager.await_work(
                cluster, lambda there: has(there, replicas, 2), "the work is refreshed"
            )
            # It is not held for that configuration's.
            assert manager.hashes(cluster) == hashes
            told = await_rotation(manager, "Delivered")
            assert told["status"] == "True"
        finally:
            os.kill(program, signal.SIGCONT)
        manager.await_work(
            cluster, lambda there: has(there, replicas + 1, 2), "it gets the configuration"
        )
        assert manager.hashes(cluster) != hashes
        # A certificate that is none replaces none.
        name = "ManifestWorkApplyFailed"
        unusable = first | {"tls.key": second["tls.key"]}
        put_secret(manager, _SERVING, unusable)
        manager.await_said(cluster, "ManifestApplied", "False", name, "is not the key of tls.crt")
        manager.await_work(cluster, lambda there: has(there, replicas + 1, 2), "it keeps its own")
        put_secret(manager, _SERVING, second)
        manager.await_said(cluster, "ManifestApplied")
        # One whose configuration cannot be rendered keeps what it has, and trusts what is to be trusted.
        manager.config("bad", customizedVariables=[{"name": "replicas", "value": "many"}])
        manager.enable(cluster, "bad")
        manager.await_said(
            cluster, "ManifestApplied", "False", "ManifestWorkApplyFailed", "replicas"
        )
        manager.configure(proxyAgent={"replicas": replicas})
        manager.await_reconciled()
        annotate(manager, rotate_ca="2")
        manager.await_work(
            cluster,
            lambda there: (
                bundle_of(there) == manager.secret("proxy-server-ca")["ca.crt"]
                and has(there, replicas + 1, 2)
            ),
            "it is refreshed although it cannot be rendered",
        )
        manager.disable(cluster)


def test_a_work_that_a_cluster_does_not_apply_holds_it(
    ocm_hub: OcmHub, managed: ControlPlane, manager: AddOnInstallation, cluster: str
) -> None:
    manager.run()
    manager.await_reconciled()
    with Klusterlet(ocm_hub, managed, cluster):
        bad = [{"name": "agentDeploymentName", "value": "No_Name"}]
        manager.config("bad", customizedVariables=bad)
        manager.enable(cluster, "bad")
        manager.await_said(
            cluster, "ManifestApplied", "False", "AddonManifestAppliedFailed", "No_Name"
        )
        annotate(manager, ca_overlap="0s", rotate_ca="1")
        await_rotation(manager, "AwaitingDelivery", message=f": {cluster} ({NOT_APPLIED}). ")
        manager.config("bad")
        eventually(lambda: manager.condition("CARotation") is None, "the rotation is over")
        manager.disable(cluster)
