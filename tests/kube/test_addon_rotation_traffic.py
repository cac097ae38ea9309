"""The authority is replaced under steady dials, by the manager and a klusterlet alone: real servers, real agents, and no dial fails."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import trio
from cryptography import x509

from clusterproxy.addon.certificates import issued_by
from kube.addon_installation import OF_TUNNEL, AddOnInstallation, addon_installed
from kube.control_plane import eventually
from kube.klusterlet import Klusterlet, secret_data
from kube.process_kubelet import ProcessKubelet
from kube.test_manager import annotate
from kube.test_rolling_update import (
    AGENTS,
    COMMANDS,
    DIALS_PER_S,
    Traffic,
    configure,
    echo,
    entrypoint,
    running,
    until_rolled_out,
    write,
    write_client_files,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kube.control_plane import ControlPlane
    from kube.ocm_hub import OcmHub

pytestmark = [pytest.mark.kube, pytest.mark.timeout(300)]

# An agent may claim the name of its cluster, and must be able to dial it.
CLUSTER = "localhost"


@pytest.fixture
def manager(ocm_hub: OcmHub, tmp_path: Path) -> Iterator[AddOnInstallation]:
    with addon_installed(ocm_hub, tmp_path) as installation:
        installation.offer()
        yield installation


class TrafficToCluster(Traffic):
    async def run(self, port: int) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(self._dial, f"{CLUSTER}:{port}")
                self.begun += 1
                await trio.sleep(1 / DIALS_PER_S)


def agents(server: str, folder: Path) -> list[str]:
    files = [str(folder / name) for name in ("ca.crt", "agent.crt", "agent.key")]
    program = str(Path(__file__).with_name("many_agents.py"))
    return [sys.executable, program, server, str(AGENTS), *files, f"host={CLUSTER}"]


def mount_secrets(manager: AddOnInstallation, managed: ControlPlane, folder: Path) -> bool:
    """Write what a kubelet mounts of the agent's secrets; a secret that is not there stays as it was."""
    there = secret_data(managed, manager.agents, OF_TUNNEL)
    trusted = secret_data(managed, manager.agents, "cluster-proxy-ca")
    if there:
        write(folder, {"agent.crt": there["tls.crt"], "agent.key": there["tls.key"]})
    if trusted:
        write(folder, {"ca.crt": trusted["ca.crt"]})
    return bool(there and trusted)


def connected(manager: AddOnInstallation) -> bool:
    """Whether each server has agents of the cluster. They all claim the same, so there is one to choose."""
    pods = manager.plane.list("v1", "Pod", manager.namespace)
    texts = [httpx.get(f"http://{pod['status']['podIP']}:8092/metrics").text for pod in pods]
    return all(re.search(r"server_ready_backend_connections [1-9]", text) for text in texts)


async def test_no_dial_fails_while_agents_get_another_authority(
    ocm_hub: OcmHub, managed: ControlPlane, manager: AddOnInstallation, tmp_path: Path
) -> None:
    in_thread = trio.to_thread.run_sync
    address = manager.plane.service_address()
    configure(manager, address, 2)
    manager.run()
    manager.await_reconciled()
    old = manager.secret("cluster-proxy-signer")["ca.crt"]
    write_client_files(manager, tmp_path)
    (tmp_path / "pods").mkdir()
    kubelet = ProcessKubelet(manager.plane, manager.namespace, COMMANDS, tmp_path / "pods")
    ocm_hub.accept(CLUSTER)

    async def mount() -> None:
        while True:
            await trio.sleep(1)
            await in_thread(mount_secrets, manager, managed, tmp_path)
            await in_thread(write_client_files, manager, tmp_path)

    def over() -> bool:
        signer = manager.secret("cluster-proxy-signer")
        bundle = manager.secret("proxy-server-ca")["ca.crt"]
        return (
            signer["ca.crt"] != old
            and set(signer) == {"ca.crt", "ca.key"}
            and bundle == (signer["ca.crt"])
        )

    try:
        with (
            Klusterlet(ocm_hub, managed, CLUSTER),
            manager.enabled(CLUSTER),
            kubelet,
            entrypoint(manager, address) as relay,
        ):
            await until_rolled_out(manager, 2)
            await in_thread(
                lambda: eventually(
                    lambda: mount_secrets(manager, managed, tmp_path), "the agent has its secrets"
                )
            )
            command = agents(f"{relay.address}:8091", tmp_path)
            async with trio.open_nursery() as nursery:
                [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
                nursery.start_soon(trio.serve_listeners, echo, [listener])
                with running(tmp_path / "agents.log", *command):
                    await in_thread(
                        lambda: eventually(lambda: connected(manager), "all servers have agents")
                    )
                    traffic = TrafficToCluster(f"{relay.address}:8090", tmp_path)
                    nursery.start_soon(traffic.run, listener.socket.getsockname()[1])
                    nursery.start_soon(mount)
                    await traffic.reach(AGENTS)
                    annotate(manager, ca_overlap="12s", rotate_ca="now")
                    await in_thread(
                        lambda: eventually(over, "the old authority is gone", within_s=90)
                    )
                    await traffic.reach(traffic.done + 5 * DIALS_PER_S)
                    assert traffic.failures == [], "\n".join(traffic.failures)
                # The servers trust the new one alone, and so does an agent that connects now.
                authority = x509.load_pem_x509_certificate(
                    manager.secret("cluster-proxy-signer")["ca.crt"]
                )
                leaf = x509.load_pem_x509_certificate((tmp_path / "agent.crt").read_bytes())
                assert issued_by(leaf, authority)
                with running(tmp_path / "again.log", *command):
                    pass
                nursery.cancel_scope.cancel()
    finally:
        ocm_hub.remove(CLUSTER)
