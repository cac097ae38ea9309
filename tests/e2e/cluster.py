"""Clusters as an operator has them: control plane, network, node, Services and names."""

from __future__ import annotations

import contextlib
import json
import subprocess
from typing import TYPE_CHECKING, Any, Final, Self

import yaml
from kube.control_plane import Addresses, ControlPlane
from kube.kubeconfigs import kubeconfig
from kube.node import Node
from kube.process_kubelet import ProcessKubelet

from e2e.network import Programs, Segment
from e2e.services import Services

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from e2e.network import PodSandbox

Object = dict[str, Any]

_API_PORT: Final = 6443
#: In each cluster's segment: where it finds the hub.
_HUB_API: Final = "254.1"
_HUB_PROXY: Final = "254.2"
HUB_API: Final = "api.hub.example"
HUB_PROXY: Final = "proxy.hub.example"


class Cluster:
    """A cluster, while its block lasts.

    Attributes:
      plane: its control plane, which only this machine reaches by its address.
      kubeconfig: an administrator's, for those in the cluster's network.
    """

    def __init__(
        self, name: str, number: int, directory: Path, roots: Path, programs: Programs
    ) -> None:
        directory.mkdir()
        self.name = name
        self.directory = directory
        self.segment = Segment(name, number, roots / name, programs)
        first = 10_000 + 10 * number
        addresses = Addresses(
            apiserver=first,
            controller_manager=first + 1,
            etcd=first + 2,
            etcd_peer=first + 3,
            pods="",
            services="",
            cluster_ips=self.segment.cluster_ips,
            names=(HUB_API,) if name == "hub" else (),
        )
        self.plane = ControlPlane(name, directory, addresses)
        self.services: Services
        self.kubelets: dict[str, ProcessKubelet] = {}
        self.kubeconfig = directory / "inside.kubeconfig"
        self._opened = contextlib.ExitStack()

    # -- life --------------------------------------------------------------------------------------

    def start(self, definitions: Sequence[Object] = ()) -> None:
        self._opened.callback(self.plane.close)
        self.plane.start(definitions)
        self.kubeconfig.write_text(
            self.plane.admin_kubeconfig.read_text().replace(
                self.plane.server, f"https://{self.segment.apiserver}"
            )
        )

    def connect(self, hub: Cluster, entrypoint: str) -> None:
        """Let this cluster see of the hub the apiserver's port, and port 8091 of *entrypoint*, an address there."""
        api, proxy = (f"{self.segment.prefix}.{each}" for each in (_HUB_API, _HUB_PROXY))
        self.services.add(HUB_API, (api, _API_PORT), ("127.0.0.1", hub.plane.addresses.apiserver))
        self.services.add(HUB_PROXY, (proxy, 8091), (entrypoint, 8091))

    def serve(self, *namespaces: str) -> None:
        """Run what is at nodes: names and Services of these namespaces, and kubelets for them."""
        self.services = Services(self.plane, self.segment, namespaces)
        self._opened.enter_context(self.services)
        for namespace in namespaces:
            kubelet = ProcessKubelet(
                self.plane,
                namespace,
                {},
                self.directory / "pods" / namespace,
                sandbox=self._sandbox,
            )
            self.kubelets[namespace] = kubelet
            self._opened.enter_context(kubelet)
            self._opened.enter_context(Node(kubelet))

    def _sandbox(self, pod: Object) -> PodSandbox:
        meta = pod["metadata"]
        variables = {
            "KUBERNETES_SERVICE_HOST": self.segment.apiserver,
            "KUBERNETES_SERVICE_PORT": "443",
        }
        sandbox = self.segment.sandbox(meta["name"], variables)
        aliases = [
            " ".join((alias["ip"], *alias["hostnames"]))
            for alias in pod["spec"].get("hostAliases", ())
        ]
        self.services.serve_names(sandbox, meta["namespace"], *aliases)
        return sandbox

    def close(self) -> None:
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def cut_off(self) -> Generator[None]:
        """In the block nothing that this cluster sends to the hub gets there."""
        addresses = [f"{self.segment.prefix}.{each}" for each in (_HUB_API, _HUB_PROXY)]
        for address in addresses:
            self.segment.drop_address(address)
        try:
            yield
        finally:
            for address in addresses:
                self.segment.add_address(address)

    # -- looks -------------------------------------------------------------------------------------

    def pods(self, namespace: str) -> list[Object]:
        return self.plane.list("v1", "Pod", namespace)

    def logs(self, namespace: str) -> str:
        """Return the ends of what all containers of a namespace have written."""
        found = sorted((self.directory / "pods" / namespace).glob("*/*.log"))
        return "\n".join(
            f"-- {self.name} {path.parent.name}/{path.stem}:\n{path.read_text(errors='replace')[-3000:]}"
            for path in found
        )

    def told(self, namespace: str) -> str:
        """Return what there is to know of the pods of a namespace, for failed tests."""
        statuses = {
            each["metadata"]["name"]: each.get("status", {}).get("containerStatuses")
            for each in self.pods(namespace)
        }
        return yaml.safe_dump(statuses) + self.logs(namespace)


class Workstation:
    """Somebody's machine in a cluster's network: commands there know its Services by their names."""

    def __init__(self, cluster: Cluster, namespace: str, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._sandbox = cluster.segment.sandbox(f"workstation-{namespace}", {})
        cluster.services.serve_names(self._sandbox, namespace)
        self._cluster = cluster

    def run(
        self,
        *command: str,
        environment: Mapping[str, str] | None = None,
        within_s: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            (*self._sandbox.inside(), *command),
            cwd=self.directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
        )

    def start(
        self, log: Path, *command: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command that ends when it is told to."""
        with log.open("wb") as output:
            return subprocess.Popen(
                ("setpriv", "--pdeathsig=KILL", *self._sandbox.inside(), *command),
                cwd=self.directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def output(
        self,
        *command: str,
        environment: Mapping[str, str] | None = None,
        within_s: float = 60.0,
    ) -> str:
        """Return what a command writes; it must succeed."""
        done = self.run(*command, environment=environment, within_s=within_s)
        assert done.returncode == 0, f"$ {' '.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def close(self) -> None:
        self._cluster.services.forget(self._sandbox)
        self._sandbox.close()


def write_kubeconfig(path: Path, cluster: Cluster, token: str, **of_cluster: Any) -> Path:
    """Write a kubeconfig of a cluster's CA and a token, with more about the cluster."""
    config = json.loads(kubeconfig(cluster.plane, {"token": token}))
    config["clusters"][0]["cluster"] |= of_cluster
    path.write_text(json.dumps(config))
    return path
