"""An installation of the Go original with one managed cluster, to be migrated: for test_migration.py.

The chart is the original's by Helm, the proxy server and the proxy agent are the original's programs, run by a process kubelet
under the original's Deployments. Its manager cannot be had: :mod:`kube.go_manager` plays its part. Neither can its add-on agent: ours
runs in its place.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import trio
from go_tools import go_tool

import clusterproxy
from kube.addon_installation import AGENT, OF_HUB, OF_TUNNEL
from kube.containers import Command
from kube.control_plane import ApiError, eventually
from kube.go_manager import GoManager
from kube.klusterlet import Klusterlet, secret_data
from kube.ocm_resources import REQUESTS
from kube.process_kubelet import PROXY_SERVER_BINDS, ProcessKubelet
from kube.service_relay import ServiceRelay
from kube.test_addon_lease import AGENTS as OUR_AGENTS
from kube.test_hub_chart import CHART, NAMESPACE, Hub, originals_chart
from kube.test_rolling_update import DIALS_PER_S, Traffic, echo, write

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

    from kube.control_plane import ControlPlane
    from kube.ocm_hub import OcmHub

Object = dict[str, Any]

#: An agent may claim the name of its cluster, and must be able to dial it.
CLUSTER: Final = "localhost"
AGENTS: Final = "open-cluster-management-cluster-proxy"
SERVER: Final = "cluster-proxy"
ORIGINAL_IMAGE: Final = "quay.io/open-cluster-management/cluster-proxy:latest"
OUR_IMAGE: Final = "registry.example/team/cluster-proxy:v0.12.0"
DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "migration.md"

_PROGRAMS: Final = Path(sys.executable).parent
_MIB: Final = 2**20
#: Eleven seconds a copy, less than any server or agent has to end.
COPY_MIB: Final = 256
_COPY_MIB_PER_S: Final = 24


def _hub_programs() -> dict[str, dict[str, Command]]:
    ours = {
        "/manager": Command(
            (sys.executable, "-m", "clusterproxy", "addon-manager"),
            ("--metrics-bind-address={pod_ip}:58080", "--health-probe-bind-address={pod_ip}:58081"),
        ),
        "/proxy-server": Command((str(_PROGRAMS / "proxy-server"),), PROXY_SERVER_BINDS),
    }
    theirs = {
        "/manager": Command(("/bin/sh", "-c", "exec sleep 3600", "manager")),
        "/proxy-server": Command((str(go_tool("server")),), PROXY_SERVER_BINDS),
    }
    return {OUR_IMAGE: ours, ORIGINAL_IMAGE: theirs}


def _agent_programs() -> dict[str, dict[str, Command]]:
    go = attrs.evolve(OUR_AGENTS["/proxy-agent"], program=(str(go_tool("agent")),))
    return {OUR_IMAGE: OUR_AGENTS, ORIGINAL_IMAGE: OUR_AGENTS | {"/proxy-agent": go}}


class _Kubelet(ProcessKubelet):
    """Runs the original's programs in containers of its image, and ours in those of ours."""

    def __init__(
        self,
        plane: ControlPlane,
        namespace: str,
        of_images: Mapping[str, Mapping[str, Command]],
        directory: Path,
    ) -> None:
        super().__init__(plane, namespace, {"/bin/sh": Command(("/bin/sh",))}, directory)
        self._of_images = of_images

    def commands_of(self, image: str) -> Mapping[str, Command]:
        return {**self.commands, **self._of_images[image]}


# -- document --------------------------------------------------------------------------------------


def commands(step: str) -> str:
    """Return the commands of a step of the document."""
    text = DOCUMENT.read_text(encoding="utf-8")
    found = re.findall(
        rf"^<!-- {re.escape(step)} -->\n+```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE
    )
    assert len(found) == 1, f"{step}: {len(found)} blocks"
    block: str = found[0]
    return block


def command(step: str) -> str:
    """Return the commands of a step, with our chart where it says which."""
    text = commands(step).replace("ocm/cluster-proxy", CHART)
    return text.replace(" --version 0.12.0", "")


# -- traffic ---------------------------------------------------------------------------------------


@cache
def _piece() -> bytes:
    return random.Random(9).randbytes(_MIB)  # noqa: S311


@cache
def _digest() -> str:
    whole = hashlib.sha256()
    for number in range(COPY_MIB):
        whole.update(number.to_bytes(4, "big") + _piece()[4:])
    return whole.hexdigest()


async def send_copy(stream: trio.SocketStream) -> None:
    """Be the service that sends the copy, at a steady pace."""
    began = trio.current_time()
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        async with stream:
            for number in range(COPY_MIB):
                await stream.send_all(number.to_bytes(4, "big") + _piece()[4:])
                await trio.sleep_until(began + (number + 1) / _COPY_MIB_PER_S)


@attrs.define
class Load(Traffic):
    """Steady single-use dials to the cluster, and copies one after the other, each by one connection.

    Attributes:
      copies: how many have arrived whole.
      tried: how many were begun, or tried to.
      cut: which others have ended, and why.
      refused: why others have not begun.
    """

    copies: int = 0
    tried: int = 0
    cut: list[tuple[int, str]] = attrs.field(factory=list)
    refused: list[str] = attrs.field(factory=list)
    slowest_s: float = 0.0

    async def run_all(self, echo: int, source: int) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._dials, echo)
            nursery.start_soon(self._copies, source)

    async def dials(self, port: int) -> bool:
        """Whether a dial succeeds, which does not count."""
        probe = Traffic(self.server, self.folder)
        await probe._dial(f"{CLUSTER}:{port}")
        return not probe.failures

    async def _dials(self, port: int) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                nursery.start_soon(self._timed_dial, f"{CLUSTER}:{port}")
                self.begun += 1
                await trio.sleep(1 / DIALS_PER_S)

    async def _timed_dial(self, address: str) -> None:
        began = trio.current_time()
        await self._dial(address)
        self.slowest_s = max(self.slowest_s, trio.current_time() - began)

    async def _copies(self, port: int) -> None:
        while True:
            got, problem = 0, ""
            self.tried += 1
            try:
                async with self._copy(f"{CLUSTER}:{port}") as pieces:
                    whole = hashlib.sha256()
                    async for data in pieces:
                        whole.update(data)
                        got += len(data)
                if whole.hexdigest() != _digest():
                    problem = "it has ended, or is another"
            except (clusterproxy.ClusterProxyError, trio.BrokenResourceError) as error:
                problem = str(error)
            self.copies += not problem
            if problem and got:
                self.cut.append((self.tried, f"{problem} after {got // _MIB} MiB"))
            elif problem:
                self.refused.append(problem)
            if problem:
                await trio.sleep(0.5)

    @contextlib.asynccontextmanager
    async def _copy(self, address: str) -> AsyncGenerator[trio.abc.ReceiveStream]:
        opened = clusterproxy.open_tunnel(self.server, tls=self.tls(), reusable=False)
        async with opened as tunnel, await tunnel.dial(address) as stream:
            yield stream


# -- installation ----------------------------------------------------------------------------------


@attrs.define(kw_only=True)
class Migration:
    """The installation while it is migrated.

    Attributes:
      host: of the hub's entrypoint.
      given: names of the agents' requests for certificates when all began.
    """

    release: Hub
    managed: ControlPlane
    go: GoManager
    load: Load
    host: str
    folder: Path
    given: set[str] = attrs.field(factory=set)
    _secrets: dict[str, Any] = attrs.field(factory=dict)

    @property
    def plane(self) -> ControlPlane:
        return self.release.plane

    # -- what is done ------------------------------------------------------------------------------

    async def run(self, step: str, **given: str) -> str:
        """Run the document's commands of a step, with these variables."""
        return await self.run_text(command(step), **given)

    async def run_text(self, commands: str, **given: str) -> str:
        environment = self.release.environment | given

        def go() -> str:
            done = subprocess.run(
                ("/bin/bash", "-euo", "pipefail", "-c", commands),
                cwd=self.folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=180,
                check=False,
            )
            assert done.returncode == 0, f"{commands}{done.stdout}{done.stderr}"
            return done.stdout

        return await trio.to_thread.run_sync(go)

    async def until(self, probe: Callable[[], Any], what: str, *, within_s: float = 90) -> None:
        def told() -> None:
            try:
                eventually(probe, what, within_s=within_s)
            except AssertionError as error:
                raise AssertionError(f"{error}\n{self.told()}") from error

        await trio.to_thread.run_sync(told)

    async def until_servers_are(self, image: str) -> None:
        """Wait until all proxy servers have an image, and no other is there any more."""
        where = (self.plane, NAMESPACE, SERVER, "proxy-server")
        await self.until(lambda: all_have(*where, image), f"servers: {image}")

    async def until_agents_are(self, image: str) -> None:
        """Likewise, of proxy agents."""
        where = (self.managed, AGENTS, AGENT, "proxy-agent")
        await self.until(lambda: all_have(*where, image), f"agents: {image}")

    def patch_server_image(self, image: str) -> None:
        """Change an image by hand, which Helm does not see."""
        self.plane.patch(self.configuration(), {"spec": {"proxyServer": {"image": image}}})

    def configuration(self) -> Object:
        return {
            "apiVersion": "proxy.open-cluster-management.io/v1alpha1",
            "kind": "ManagedProxyConfiguration",
            **self.release.configuration(),
        }

    def write_values(self, **more: Any) -> None:
        """Write the values that the document says to write."""
        values = {
            "registry": "registry.example/team",
            "proxyServer": {"entrypointAddress": self.host},
        }
        (self.folder / "values.yaml").write_text(json.dumps(values | more))

    def server_pods(self) -> set[str]:
        """Return the names of the proxy servers' pods."""
        selector = "proxy.open-cluster-management.io/component-name=proxy-server"
        pods = self.plane.list("v1", "Pod", NAMESPACE, selector)
        return {pod["metadata"]["name"] for pod in pods}

    def ours_manages(self) -> bool:
        """Whether a pod of our manager is there."""
        pods = self.plane.list("v1", "Pod", NAMESPACE, "component=cluster-proxy-manager")
        return any(pod["spec"]["containers"][0]["image"] == OUR_IMAGE for pod in pods)

    # -- what has come of it -----------------------------------------------------------------------

    def note(self) -> None:
        """Remember what has to stay."""
        self.given = {each["metadata"]["name"] for each in self.go.requests()}
        self._secrets = self.secrets()

    def secrets(self) -> dict[str, Any]:
        """Return the data of all secrets with keys or certificates, of the hub and of the cluster."""
        found: dict[str, Any] = {
            each["metadata"]["name"]: each["data"]
            for each in self.plane.list("v1", "Secret", NAMESPACE)
            if not each["metadata"]["name"].startswith("sh.helm.")
        }
        for name in (OF_TUNNEL, OF_HUB, "cluster-proxy-ca"):
            found[f"{CLUSTER}/{name}"] = secret_data(self.managed, AGENTS, name)
        return found

    def assert_nothing_is_new(self) -> None:
        """No agent has asked for a certificate, and no key or certificate is another."""
        assert {each["metadata"]["name"] for each in self.go.requests()} == self.given
        now = self.secrets()
        assert {name for name in now if now[name] != self._secrets.get(name)} == set()
        assert now.keys() == self._secrets.keys()

    def told(self) -> str:
        """Return what is known when something does not come."""
        logs = sorted(self.folder.glob("*/*/*.log"))
        ends = [f"{log}:\n{log.read_text(errors='replace')[-1500:]}" for log in logs]
        conditions = self.configuration().get("status", {}).get("conditions")
        return "\n".join([json.dumps(conditions, indent=1), *self.load.failures[-5:], *ends])

    async def until_dials_work(self, *, within_s: float = 60.0) -> None:
        """Wait until all dials of a second succeed."""
        with trio.fail_after(within_s):
            failed = -1
            while failed != len(self.load.failures):
                failed = len(self.load.failures)
                await self.load.reach(self.load.begun + DIALS_PER_S)

    def tell(self, what: str) -> str:
        """Say how the load is doing."""
        load = self.load
        return (
            f"{what}: {load.done} dials, {len(load.failures)} failed, the slowest took {load.slowest_s:.1f} s; "
            f"{load.copies} copies, {len(load.cut)} cut, {len(load.refused)} refused; "
            f"{len(self.go.requests()) - len(self.given)} registrations"
        )

    async def steady(self, seconds: float = 4.0) -> None:
        """Wait for all dials of a while, which none may fail."""
        failed = len(self.load.failures)
        await self.load.reach(self.load.begun + int(seconds * DIALS_PER_S))
        assert self.load.failures[failed:] == []


def all_have(plane: ControlPlane, namespace: str, name: str, container: str, image: str) -> bool:
    """Whether a container of all pods of a Deployment has an image, and no other pod is there any more."""
    found = plane.get("apps/v1", "Deployment", name, namespace)
    if found is None:
        return False
    labels = found["spec"]["selector"]["matchLabels"]
    selector = ",".join(f"{key}={value}" for key, value in labels.items())
    pods = plane.list("v1", "Pod", namespace, selector)
    containers = [each for pod in pods for each in pod["spec"]["containers"]]
    status = found.get("status", {})
    return (
        status.get("observedGeneration") == found["metadata"]["generation"]
        and status.get("availableReplicas") == found["spec"]["replicas"] == len(pods)
        and {each["image"] for each in containers if each["name"] == container} == {image}
    )


def original_release(folder: Path, host: str) -> str:
    """Return the chart of the original's release: its manager, an entrypoint, and all clusters."""
    chart = Path(originals_chart(folder))
    for name in ("Deployment-cluster-proxy-addon-user", "Service-cluster-proxy-addon-user"):
        (chart / "templates" / f"{name}.yaml").unlink()
    file = chart / "templates" / "ManagedProxyConfiguration-cluster-proxy.yaml"
    configuration = json.loads(file.read_text())
    entrypoint = {"type": "Hostname", "hostname": {"value": host}, "port": 8091}
    configuration["spec"]["proxyServer"]["entrypoint"] = entrypoint
    configuration["metadata"].pop("annotations", None)
    file.write_text(json.dumps(configuration))
    return str(chart)


@contextlib.asynccontextmanager
async def original_installed(
    ocm_hub: OcmHub, managed: ControlPlane, release: Hub, folder: Path
) -> AsyncGenerator[Migration]:
    """Have an installation of the original's, with its tunnel up and a load on it, while the block lasts."""
    in_thread = trio.to_thread.run_sync
    plane = ocm_hub.plane
    host = plane.service_address()
    await in_thread(ocm_hub.accept, CLUSTER)
    await in_thread(release.install, original_release(folder / "original", host))
    go = GoManager(plane, NAMESPACE, CLUSTER, host)
    await in_thread(go.start)
    await in_thread(go.make_hub)
    for name in ("hub", "agents"):
        (folder / name).mkdir()
    hub_pods = _Kubelet(plane, NAMESPACE, _hub_programs(), folder / "hub")
    agent_pods = _Kubelet(managed, AGENTS, _agent_programs(), folder / "agents")
    load = Load(f"{host}:8090", folder)
    migration = Migration(
        release=release, managed=managed, go=go, load=load, host=host, folder=folder
    )
    try:
        with (
            hub_pods,
            agent_pods,
            ServiceRelay(plane, NAMESPACE, "proxy-entrypoint", address=host),
            Klusterlet(ocm_hub, managed, CLUSTER),
        ):
            await migration.until(lambda: go.has_addon, "the cluster has the add-on")
            await in_thread(go.register)
            await in_thread(go.write_work)
            await migration.until_servers_are(ORIGINAL_IMAGE)
            await migration.until_agents_are(ORIGINAL_IMAGE)
            await in_thread(migration.note)
            async with _loaded(load, go):
                await migration.steady()
                yield migration
            await in_thread(release.uninstall)
            await migration.until(lambda: not go.works(), "the agent is removed")
    finally:
        ocm_hub.remove(CLUSTER)
        gone = "the cluster's namespace is gone"
        await migration.until(lambda: plane.get("v1", "Namespace", CLUSTER) is None, gone)
        for request in go.requests():
            plane.delete({"apiVersion": REQUESTS.api_version, "kind": REQUESTS.kind, **request})
        for where, namespace in ((plane, NAMESPACE), (managed, AGENTS)):
            remove_pods(where, namespace)


@contextlib.asynccontextmanager
async def _loaded(load: Load, go: GoManager) -> AsyncGenerator[None]:
    secrets = go.secrets
    client, authority = secrets["proxy-client"], secrets["proxy-server-ca"]
    contents = {
        "client.crt": client["tls.crt"],
        "client.key": client["tls.key"],
        "client-ca.crt": authority["ca.crt"],
    }
    write(load.folder, contents)
    async with trio.open_nursery() as nursery:
        [echoes] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        [copies] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, echo, [echoes])
        nursery.start_soon(trio.serve_listeners, send_copy, [copies])
        ports = [each.socket.getsockname()[1] for each in (echoes, copies)]
        with trio.fail_after(30):
            while not await load.dials(ports[0]):  # noqa: ASYNC110
                await trio.sleep(0.1)
        nursery.start_soon(load.run_all, *ports)
        yield
        nursery.cancel_scope.cancel()


def remove_pods(plane: ControlPlane, namespace: str) -> None:
    """Remove the pods of a namespace whose kubelet is gone."""
    for pod in plane.list("v1", "Pod", namespace):
        path = plane.path("v1", "Pod", namespace, pod["metadata"]["name"])
        with contextlib.suppress(ApiError):
            plane.call("DELETE", f"{path}?gracePeriodSeconds=0")
