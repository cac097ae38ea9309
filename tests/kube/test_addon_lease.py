"""A cluster's add-on is available as long as it has a tunnel: the pod that the manager deploys, with the real programs."""

from __future__ import annotations

import ssl
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import httpx
import pytest
import trio
from go_tools import go_tool

import clusterproxy
from clusterproxy.addon_agent.library import (
    PROXY_SERVERS,
    forward_to_pods,
    open_hub,
    tls_of_secrets,
)
from clusterproxy.kube.resource import MANAGED_CLUSTER_ADDONS
from kube.addon_installation import ADDON, NAME, OF_TUNNEL, AddOnInstallation, addon_installed
from kube.containers import Command
from kube.control_plane import eventually
from kube.klusterlet import Klusterlet
from kube.node import Node
from kube.process_kubelet import PROXY_SERVER_BINDS, ProcessKubelet
from kube.service_relay import ServiceRelay

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kube.control_plane import ControlPlane
    from kube.ocm_hub import OcmHub

pytestmark = [pytest.mark.kube, pytest.mark.timeout(240)]

Object = dict[str, Any]

PROGRAMS = Path(sys.executable).parent
LEASE_S = 2
SERVERS = {
    "/proxy-server": Command((str(PROGRAMS / "proxy-server"),), PROXY_SERVER_BINDS),
    "/bin/sh": Command(("/bin/sh",)),
}
# Containers of a pod have localhost in common; here they have the pod's address.
AGENTS = {
    "/proxy-agent": Command(
        (str(PROGRAMS / "proxy-agent"),),
        ("--health-server-host={pod_ip}", "--admin-bind-address={pod_ip}"),
    ),
    "/agent": Command(
        (sys.executable, "-m", "clusterproxy", "addon-agent"),
        (
            "--health-probe-bind-address={pod_ip}:8888",
            "--proxy-agent-health-address={pod_ip}:8093",
            # Where the pod's folder is.
            "--certificate-directory=volumes/hub",
            f"--lease-interval={LEASE_S}s",
        ),
    ),
}


@pytest.fixture
def manager(ocm_hub: OcmHub, tmp_path: Path) -> Iterator[AddOnInstallation]:
    with addon_installed(ocm_hub, tmp_path) as installation:
        yield installation


def addon_line(manager: AddOnInstallation, cluster: str) -> list[str]:
    """What ``kubectl get managedclusteraddon -n CLUSTER`` prints of the add-on."""
    plane = manager.plane
    url = plane.server + plane.path(f"{ADDON}/v1beta1", "ManagedClusterAddOn", cluster)
    table = httpx.get(
        url,
        headers={"Accept": "application/json;as=Table;v=v1;g=meta.k8s.io"},
        verify=plane.admin_tls,
        trust_env=False,
    ).json()
    assert [each["name"] for each in table["columnDefinitions"]][:4] == [
        "Name",
        "Available",
        "Degraded",
        "Progressing",
    ]
    [row] = table["rows"]
    return [cell or "" for cell in row["cells"]]


def renewed_at(managed: ControlPlane, manager: AddOnInstallation) -> str:
    lease = managed.get("coordination.k8s.io/v1", "Lease", NAME, manager.agents)
    assert lease is not None
    assert lease["spec"]["leaseDurationSeconds"] == 60
    text: str = lease["spec"]["renewTime"]
    return text


def pod_of(managed: ControlPlane, manager: AddOnInstallation) -> Object | None:
    pods = managed.list("v1", "Pod", manager.agents)
    running = [pod for pod in pods if pod.get("status", {}).get("phase") == "Running"]
    return running[0] if len(running) == 1 else None


def health(pod: Object) -> tuple[int, str]:
    answer = httpx.get(f"http://{pod['status']['podIP']}:8888/healthz?verbose", trust_env=False)
    return answer.status_code, answer.text


def test_available_while_there_is_a_tunnel(
    ocm_hub: OcmHub,
    managed: ControlPlane,
    manager: AddOnInstallation,
    accepted_cluster: str,
    tmp_path: Path,
) -> None:
    cluster, plane = accepted_cluster, manager.plane
    address = plane.service_address()
    manager.offer()
    entrypoint = {"type": "Hostname", "hostname": {"value": address}}
    manager.configure(proxyServer={"entrypoint": entrypoint}, proxyAgent={"replicas": 1})
    manager.run()
    manager.await_reconciled()
    folders = [tmp_path / "servers", tmp_path / "agents"]
    servers = ProcessKubelet(plane, manager.namespace, SERVERS, folders[0])
    agents = ProcessKubelet(managed, manager.agents, AGENTS, folders[1])

    def relay() -> ServiceRelay:
        return ServiceRelay(plane, manager.namespace, "proxy-entrypoint", address=address)

    with (
        servers,
        agents,
        Klusterlet(ocm_hub, managed, cluster, lease_s=LEASE_S),
        manager.enabled(cluster),
    ):
        # No tunnel yet, so nothing is promised.
        pod = eventually(lambda: pod_of(managed, manager), "the agent's pod runs")
        manager.await_said(cluster, "Available", "Unknown", "ManagedClusterAddOnLeaseNotFound")
        eventually(lambda: health(pod)[0] == 200, "probes are answered")
        with relay():
            # E1
            manager.await_said(cluster, "Available", "True", "ManagedClusterAddOnLeaseUpdated")
            manager.await_said(cluster, "Progressing", "False", "Completed")
            assert addon_line(manager, cluster)[:4] == [NAME, "True", "", "False"]
            first = renewed_at(managed, manager)
            eventually(lambda: renewed_at(managed, manager) > first, "it is renewed")
        # E2: it is not renewed, and the klusterlet draws its conclusion.
        manager.await_said(cluster, "Available", "False", "ManagedClusterAddOnLeaseUpdateStopped")
        assert addon_line(manager, cluster)[1] == "False"
        last = renewed_at(managed, manager)
        with relay():
            manager.await_said(cluster, "Available", "True", "ManagedClusterAddOnLeaseUpdated")
            assert renewed_at(managed, manager) > last
            renew_certificate(managed, manager, agents, pod)
        log = agents.log(pod["metadata"]["name"], "addon-agent")
        assert log.count("has a tunnel") == 2, log
        assert "has no tunnel" in log


def test_through_the_apiserver_of_the_hub(
    ocm_hub: OcmHub,
    managed: ControlPlane,
    manager: AddOnInstallation,
    accepted_cluster: str,
    kube_slot: int,
    tmp_path: Path,
) -> None:
    """Rows E4 and E5, and J1: no proxy server has an address, and neither port is the one that Go has built in."""
    cluster, plane = accepted_cluster, manager.plane
    apiserver = managed.service_address()
    (tmp_path / "hosts").write_text(f"127.0.0.1 localhost\n{apiserver} {cluster}\n")
    # In a cluster a Service has that name.
    known = 'mount --bind "$0" /etc/hosts && exec "$@"'
    program = ("unshare", "--mount", "sh", "-c", known, str(tmp_path / "hosts"))
    commands = AGENTS | {
        "/proxy-agent": attrs.evolve(
            AGENTS["/proxy-agent"], program=(*program, *AGENTS["/proxy-agent"].program)
        )
    }
    manager.offer()
    manager.configure(
        proxyServer={
            "entrypoint": {"type": "PortForward", "port": 15091 + kube_slot},
            "replicas": 2,
        },
        proxyAgent={"replicas": 1},
        deploy={"ports": {"agentServer": 9191}},
    )
    manager.run()
    manager.await_reconciled()
    servers = ProcessKubelet(plane, manager.namespace, SERVERS, tmp_path / "servers")
    agents = ProcessKubelet(managed, manager.agents, commands, tmp_path / "agents")
    with (
        servers,
        Node(servers),
        agents,
        Klusterlet(ocm_hub, managed, cluster, lease_s=LEASE_S),
        manager.enabled(cluster),
    ):
        manager.await_said(cluster, "Available", "True", "ManagedClusterAddOnLeaseUpdated")
        eventually(lambda: all_have_the_agent(manager, 2), "both servers have the agent")
        pod = pod_of(managed, manager)
        assert pod is not None
        verbose = "[+]certificates ok\n[+]port forward proxy readiness ok\nhealthz check passed\n"
        assert health(pod) == (200, verbose)
        table = trio.run(proxy_health, manager, managed, apiserver)
        assert table == [(cluster, "True", "True", "True")]
        # A server is replaced: the agent finds the new one.
        before = {each["metadata"]["name"]: each for each in server_pods(manager)}
        plane.delete({"apiVersion": "v1", "kind": "Pod"} | next(iter(before.values())))

        def replaced() -> bool:
            now = {each["metadata"]["name"] for each in server_pods(manager)}
            return len(now) == 2 and now != before.keys() and all_have_the_agent(manager, 2)

        eventually(replaced, "the new server has the agent", within_s=60)
        assert trio.run(proxy_health, manager, managed, apiserver) == table
        found = managed.get("v1", "Pod", pod["metadata"]["name"], manager.agents)
        assert found is not None
        assert {each["restartCount"] for each in found["status"]["containerStatuses"]} == {0}


def server_pods(manager: AddOnInstallation) -> list[Object]:
    return manager.plane.list("v1", "Pod", manager.namespace, selector=PROXY_SERVERS)


def all_have_the_agent(manager: AddOnInstallation, servers: int) -> bool:
    answers = [
        httpx.get(f"http://{pod['status']['podIP']}:8092/readyz", trust_env=False)
        for pod in server_pods(manager)
        if pod.get("status", {}).get("phase") == "Running"
    ]
    return len(answers) == servers and all(answer.status_code == 200 for answer in answers)


async def proxy_health(
    manager: AddOnInstallation, managed: ControlPlane, apiserver: str
) -> list[tuple[str, str, str, str]]:
    """Do what ``clusteradm proxy health`` does: its table, but for the latency."""
    table: list[tuple[str, str, str, str]] = []
    insecure = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    insecure.check_hostname, insecure.verify_mode = False, ssl.CERT_NONE
    async with trio.open_nursery() as nursery:
        [listener] = await trio.open_tcp_listeners(443, host=apiserver)
        nursery.start_soon(
            trio.serve_listeners, partial(relay, managed.addresses.apiserver), [listener]
        )
        async with open_hub(str(manager.plane.admin_kubeconfig)) as hub:
            tls = await tls_of_secrets(hub, manager.namespace)
            async with (
                forward_to_pods(hub, manager.namespace, PROXY_SERVERS, 8090) as port,
                clusterproxy.open_tunnel(f"localhost:{port}", tls=tls) as tunnel,
            ):
                for addon in (await hub.list(MANAGED_CLUSTER_ADDONS)).items:
                    if addon["metadata"]["name"] != NAME:
                        continue
                    cluster = addon["metadata"]["namespace"]
                    said = manager.said(cluster, "Available") or {}
                    async with await tunnel.dial(f"{cluster}:443") as stream:
                        secure = trio.SSLStream(
                            stream, insecure, server_hostname=cluster, https_compatible=True
                        )
                        request = (
                            f"GET /healthz HTTP/1.1\r\nHost: {cluster}\r\nConnection: close\r\n\r\n"
                        )
                        await secure.send_all(request.encode())
                        answer = b"".join([bytes(data) async for data in secure])
                    healthy = answer.endswith(b"\r\n\r\nok")
                    table.append((cluster, "True", said.get("status", ""), str(healthy)))
        nursery.cancel_scope.cancel()
    return table


async def relay(port: int, stream: trio.SocketStream) -> None:
    async def copy(source: trio.SocketStream, sink: trio.SocketStream) -> None:
        async for data in source:
            await sink.send_all(data)
        await sink.send_eof()

    async with (
        stream,
        await trio.open_tcp_stream("127.0.0.1", port) as onwards,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(copy, stream, onwards)
        nursery.start_soon(copy, onwards, stream)


def test_the_original_proxy_agent_is_restarted_once(
    ocm_hub: OcmHub,
    managed: ControlPlane,
    manager: AddOnInstallation,
    accepted_cluster: str,
    tmp_path: Path,
) -> None:
    """E3, with Go's proxy agent, which has read its certificate at its start."""
    cluster, plane = accepted_cluster, manager.plane
    address = plane.service_address()
    commands = AGENTS | {
        "/proxy-agent": attrs.evolve(AGENTS["/proxy-agent"], program=(str(go_tool("agent")),))
    }
    manager.offer()
    entrypoint = {"type": "Hostname", "hostname": {"value": address}}
    manager.configure(proxyServer={"entrypoint": entrypoint}, proxyAgent={"replicas": 1})
    manager.run()
    manager.await_reconciled()
    servers = ProcessKubelet(plane, manager.namespace, SERVERS, tmp_path / "servers")
    agents = ProcessKubelet(managed, manager.agents, commands, tmp_path / "agents")
    with (
        servers,
        agents,
        Klusterlet(ocm_hub, managed, cluster, lease_s=LEASE_S),
        manager.enabled(cluster),
        ServiceRelay(plane, manager.namespace, "proxy-entrypoint", address=address),
    ):
        manager.await_said(cluster, "Available", "True", "ManagedClusterAddOnLeaseUpdated")
        pod = pod_of(managed, manager)
        assert pod is not None
        name = pod["metadata"]["name"]
        delete_certificate(managed, manager)

        def restarts() -> dict[str, int]:
            found = managed.get("v1", "Pod", name, manager.agents) or {}
            statuses = found["status"]["containerStatuses"]
            return {each["name"]: each["restartCount"] for each in statuses}

        eventually(lambda: restarts()["proxy-agent"] == 1, "it is restarted", within_s=40)
        before = renewed_at(managed, manager)
        eventually(lambda: renewed_at(managed, manager) > before, "it has a tunnel again")
        assert health(pod)[0] == 200
        assert restarts() == {"proxy-agent": 1, "addon-agent": 0}
        assert agents.log(name, "addon-agent").count("this probe fails") == 1


def delete_certificate(managed: ControlPlane, manager: AddOnInstallation) -> None:
    """Have the klusterlet ask for another one."""
    secret = managed.get("v1", "Secret", OF_TUNNEL, manager.agents)
    assert secret is not None
    managed.delete({"apiVersion": "v1", "kind": "Secret"} | secret)


def renew_certificate(
    managed: ControlPlane, manager: AddOnInstallation, agents: ProcessKubelet, pod: Object
) -> None:
    """E3, with our proxy agent: it takes the new certificate, so no probe fails and nothing is restarted."""
    name = pod["metadata"]["name"]
    delete_certificate(managed, manager)
    eventually(
        lambda: (
            "the certificates have changed, and the proxy agent takes new ones"
            in agents.log(name, "addon-agent")
        ),
        "a probe has seen it",
        within_s=30,
    )
    eventually(
        lambda: "certificates reloaded" in agents.log(name, "proxy-agent"), "it has taken them"
    )
    assert health(pod)[0] == 200
    found = managed.get("v1", "Pod", name, manager.agents)
    assert found is not None
    assert {each["restartCount"] for each in found["status"]["containerStatuses"]} == {0}
