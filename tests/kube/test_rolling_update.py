"""Proxy servers are replaced, and nobody's dial fails: the manager's own Deployment, the real controllers, real traffic."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import httpx
import pytest
import trio
from go_tools import go_module_program

import clusterproxy
from clusterproxy.addon.certificates import Leaf, Usage, issue, load_authority
from kube.containers import Command
from kube.control_plane import eventually
from kube.installation import Installation, installed
from kube.process_kubelet import PROXY_SERVER_BINDS, ProcessKubelet
from kube.service_relay import ServiceRelay

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from kube.control_plane import ControlPlane

pytestmark = [pytest.mark.kube, pytest.mark.timeout(240)]

AGENTS = 50
DIALS_PER_S = 25
CLUSTERS = "127.77.0"

COMMANDS = {
    "/proxy-server": Command(
        (str(Path(sys.executable).with_name("proxy-server")),), PROXY_SERVER_BINDS
    ),
    "/bin/sh": Command(("/bin/sh",)),
}


@pytest.fixture
def manager(hub: ControlPlane, tmp_path: Path) -> Iterator[Installation]:
    with installed(hub, tmp_path) as installation:
        yield installation


@contextlib.contextmanager
def running(log: Path, *command: str) -> Generator[subprocess.Popen[bytes]]:
    """Run many agents until they are told to end; they say how many they are when all are connected."""
    with (
        log.open("wb") as output,
        subprocess.Popen(
            ("setpriv", "--pdeathsig", "KILL", *command), stdout=output, stderr=output
        ) as program,
    ):
        try:
            eventually(lambda: _ready(log), f"{AGENTS} agents: {log}", within_s=30)
            yield program
            assert program.poll() is None, log.read_text()
        finally:
            program.terminate()
            program.wait(20)


def _ready(log: Path) -> bool:
    text = log.read_text()
    return f'"agents":{AGENTS}' in text or f"all {AGENTS} are connected" in text


def agents(kind: str, server: str, folder: Path, count: int = AGENTS) -> list[str]:
    """The command of many agents, each for one address."""
    files = [str(folder / name) for name in ("ca.crt", "agent.crt", "agent.key")]
    identifiers = f"ipv4={CLUSTERS}.%d"
    if kind == "go":
        program = go_module_program("./konnbench/agents")
        names = ("-ca", "-cert", "-key")
        flags = [word for pair in zip(names, files, strict=True) for word in pair]
        return [
            str(program),
            "-server",
            server,
            "-count",
            str(count),
            *flags,
            "-identifiers",
            identifiers,
        ]
    program = Path(__file__).with_name("many_agents.py")
    return [sys.executable, str(program), server, str(count), *files, identifiers]


def configure(manager: Installation, address: str, replicas: int, *args: str) -> None:
    signer = {"type": "SelfSigned", "selfSigned": {"additionalSANs": [address]}}
    manager.configure(
        authentication={"signer": signer, "dump": {"secrets": {}}},
        proxyServer={"replicas": replicas, "additionalArgs": list(args)},
    )


def entrypoint(manager: Installation, address: str) -> ServiceRelay:
    return ServiceRelay(manager.plane, manager.namespace, "proxy-entrypoint", address=address)


def write_agent_files(manager: Installation, folder: Path) -> None:
    """Give agents what the add-on gives them: the bundle, and a certificate of the CA that signs."""
    data = manager.secret("cluster-proxy-signer")
    authority = load_authority(data["ca.crt"], data["ca.key"])
    leaf = Leaf(name="agent", hosts=("agent",), usage=Usage.CLIENT)
    crt, key = issue(authority, leaf, datetime.now(UTC))
    contents = {
        "agent.crt": crt,
        "agent.key": key,
        "ca.crt": manager.secret("proxy-server-ca")["ca.crt"],
    }
    write(folder, contents)


def write_client_files(manager: Installation, folder: Path) -> None:
    secret = manager.secret("proxy-client")
    contents = {
        "client.crt": secret["tls.crt"],
        "client.key": secret["tls.key"],
        "client-ca.crt": manager.secret("proxy-server-ca")["ca.crt"],
    }
    write(folder, contents)


def write(folder: Path, contents: dict[str, bytes]) -> None:
    for name, content in contents.items():
        part = folder / f"{name}.part"
        part.write_bytes(content)
        part.rename(folder / name)


@attrs.define
class Traffic:
    """Steady dials, each by a tunnel of its own as most clients have it, all clusters in turn."""

    server: str
    folder: Path
    begun: int = 0
    done: int = 0
    failures: list[str] = attrs.field(factory=list)
    _one_more: trio.Event = attrs.field(factory=trio.Event)

    async def run(self, port: int) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                address = f"{CLUSTERS}.{self.begun % AGENTS + 1}:{port}"
                nursery.start_soon(self._dial, address)
                self.begun += 1
                await trio.sleep(1 / DIALS_PER_S)

    async def reach(self, done: int) -> None:
        """Wait until so many dials are over."""
        while self.done < done:
            await self._one_more.wait()

    def tls(self) -> clusterproxy.ClientTLS:
        return clusterproxy.ClientTLS(
            ca_cert=str(self.folder / "client-ca.crt"),
            cert=str(self.folder / "client.crt"),
            key=str(self.folder / "client.key"),
            server_name="localhost",
        )

    async def _dial(self, address: str) -> None:
        began = trio.current_time()
        try:
            opened = clusterproxy.open_tunnel(self.server, tls=self.tls(), reusable=False)
            async with opened as tunnel, await tunnel.dial(address) as stream:
                await stream.send_all(b"hello")
                answer = await stream.receive_some(100)
            if answer != b"hello":
                self.failures.append(f"{address}: {answer!r}")
        except (
            clusterproxy.ClusterProxyError,
            trio.BrokenResourceError,
            trio.TooSlowError,
        ) as error:
            self.failures.append(f"{address} after {trio.current_time() - began:.1f} s: {error}")
        self.done += 1
        self._one_more.set()
        self._one_more = trio.Event()


async def echo(stream: trio.SocketStream) -> None:
    with contextlib.suppress(trio.BrokenResourceError):
        async with stream:
            while data := await stream.receive_some():
                await stream.send_all(data)


async def until_rolled_out(manager: Installation, replicas: int) -> None:
    await trio.to_thread.run_sync(
        lambda: eventually(lambda: rolled_out(manager, replicas), "rolled out", within_s=90)
    )


async def until_connected(manager: Installation) -> None:
    """Wait until every server has all agents: only then nothing may fail."""

    def connected() -> bool:
        pods = manager.plane.list("v1", "Pod", manager.namespace)
        texts = [httpx.get(f"http://{pod['status']['podIP']}:8092/metrics").text for pod in pods]
        return all(f"server_ready_backend_connections {AGENTS}\n" in text for text in texts)

    await trio.to_thread.run_sync(
        lambda: eventually(connected, "all are connected to all", within_s=60)
    )


def rolled_out(manager: Installation, replicas: int) -> bool:
    deployment = manager.deployment()
    status = deployment.get("status", {})
    return (
        status.get("observedGeneration") == deployment["metadata"]["generation"]
        and status.get("updatedReplicas") == replicas
        and status.get("readyReplicas") == replicas
        and status.get("replicas") == replicas
        and not status.get("terminatingReplicas")
        and len(manager.plane.list("v1", "Pod", manager.namespace)) == replicas
    )


@pytest.mark.parametrize("kind", ["ours", "go"])
@pytest.mark.parametrize("replicas", [1, 2])
async def test_no_dial_fails_while_servers_are_replaced(
    manager: Installation, tmp_path: Path, replicas: int, kind: str
) -> None:
    address = manager.plane.service_address()
    configure(manager, address, replicas)
    manager.start()
    manager.await_reconciled()
    write_agent_files(manager, tmp_path)
    write_client_files(manager, tmp_path)
    kubelet = ProcessKubelet(manager.plane, manager.namespace, COMMANDS, tmp_path / "pods")
    (tmp_path / "pods").mkdir()

    with kubelet, entrypoint(manager, address) as relay:
        await until_rolled_out(manager, replicas)
        command = agents(kind, f"{relay.address}:8091", tmp_path)
        async with trio.open_nursery() as nursery:
            [listener] = await trio.open_tcp_listeners(0, host="0.0.0.0")
            nursery.start_soon(trio.serve_listeners, echo, [listener])
            with running(tmp_path / "agents.log", *command):
                await until_connected(manager)
                traffic = Traffic(f"{relay.address}:8090", tmp_path)
                nursery.start_soon(traffic.run, listener.socket.getsockname()[1])
                await traffic.reach(AGENTS)
                assert traffic.failures == [], "\n".join(traffic.failures)
                before = traffic.begun
                # Any change of what the pods are makes new ones.
                await trio.to_thread.run_sync(
                    lambda: configure(manager, address, replicas, "--v=1")
                )
                await trio.to_thread.run_sync(manager.await_reconciled)
                await until_rolled_out(manager, replicas)
                # Those that a new server holds for its agents are not done yet.
                at_end = traffic.begun
                await traffic.reach(at_end + 2 * AGENTS)
                assert traffic.failures == [], "\n".join(traffic.failures)
                assert at_end - before > AGENTS
            nursery.cancel_scope.cancel()


async def test_no_dial_fails_while_the_authority_is_replaced(
    manager: Installation, tmp_path: Path
) -> None:
    address = manager.plane.service_address()
    configure(manager, address, 2)
    manager.start()
    manager.await_reconciled()
    write_agent_files(manager, tmp_path)
    write_client_files(manager, tmp_path)
    old = manager.secret("cluster-proxy-signer")["ca.crt"]
    (tmp_path / "pods").mkdir()
    kubelet = ProcessKubelet(manager.plane, manager.namespace, COMMANDS, tmp_path / "pods")

    async def deliver() -> None:
        """What the add-on does for agents, and mounted secrets for clients: a second later."""
        while True:
            await trio.sleep(1)
            await trio.to_thread.run_sync(write_agent_files, manager, tmp_path)
            await trio.to_thread.run_sync(write_client_files, manager, tmp_path)

    def annotations() -> dict[str, str]:
        secret = manager.get("v1", "Secret", "cluster-proxy-signer")
        found: dict[str, str] = secret["metadata"].get("annotations", {})
        return found

    with kubelet, entrypoint(manager, address) as relay:
        await until_rolled_out(manager, 2)
        async with trio.open_nursery() as nursery:
            [listener] = await trio.open_tcp_listeners(0, host="0.0.0.0")
            nursery.start_soon(trio.serve_listeners, echo, [listener])
            with running(
                tmp_path / "agents.log", *agents("ours", f"{relay.address}:8091", tmp_path)
            ):
                await until_connected(manager)
                traffic = Traffic(f"{relay.address}:8090", tmp_path)
                nursery.start_soon(traffic.run, listener.socket.getsockname()[1])
                nursery.start_soon(deliver)
                await traffic.reach(AGENTS)
                manager.plane.patch(
                    manager.get("v1", "Secret", "cluster-proxy-signer"),
                    {
                        "metadata": {
                            "annotations": {
                                "proxy.open-cluster-management.io/ca-overlap": "12s",
                                "proxy.open-cluster-management.io/rotate-ca": "now",
                            }
                        }
                    },
                )

                def trusted() -> bytes | None:
                    bundle = manager.secret("proxy-server-ca")["ca.crt"]
                    return bundle if bundle.count(b"BEGIN CERTIFICATE") == 2 else None

                def switched() -> bytes | None:
                    present = manager.secret("cluster-proxy-signer")["ca.crt"]
                    return present if present != old else None

                both = await trio.to_thread.run_sync(
                    lambda: eventually(trusted, "both are trusted")
                )
                # The one that signs stands first.
                assert both.startswith(old)
                assert manager.secret("cluster-proxy-signer")["ca.crt"] == old
                # Those agents are not the add-on's: they have both within the overlap, for somebody sees to it.
                await traffic.reach(traffic.done + 3 * DIALS_PER_S)
                assert manager.secret("cluster-proxy-signer")["ca.crt"] == old
                new = await trio.to_thread.run_sync(
                    lambda: eventually(switched, "the new one signs", within_s=60)
                )
                authority = load_authority(new, manager.secret("cluster-proxy-signer")["ca.key"])

                def reissued() -> bool:
                    names = ("proxy-server", "agent-server", "proxy-client")
                    issuers = {manager.certificate(name).issuer for name in names}
                    bundle = manager.secret("proxy-server-ca")["ca.crt"]
                    return issuers == {authority.certificate.subject} and bundle == new + old

                await trio.to_thread.run_sync(lambda: eventually(reissued, "all is signed anew"))
                # Long enough for everybody to have taken the new certificates into use.
                await traffic.reach(traffic.done + 12 * DIALS_PER_S)
                assert traffic.failures == []
                assert annotations()["proxy.open-cluster-management.io/rotated-ca"] == "now"
            nursery.cancel_scope.cancel()
