"""What a test of the whole has: a hub of OCM, two managed clusters, and an operator who installs the add-on."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import os
import re
import threading
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import attrs
import httpx
import trustme
from cryptography import x509
from helm_programs import helm_environment, helm_program, package
from kube.build import kubectl_command
from kube.control_plane import ApiError, eventually
from kube.crds import ocm_definitions
from kube.klusterlet import Klusterlet
from kube.ocm_hub import OcmHub, Webhook

from clusterproxy.addon_agent.library import PROXY_SERVERS
from e2e.cluster import HUB_API, HUB_PROXY, Cluster, Workstation
from e2e.hello import populate
from e2e.network import Programs

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Generator
    from types import TracebackType

    from kube.control_plane import ControlPlane

Object = dict[str, Any]

NAMESPACE: Final = "open-cluster-management-addon"
AGENTS: Final = "open-cluster-management-cluster-proxy"
ADDON: Final = "addon.open-cluster-management.io/v1beta1"
MPC: Final = "proxy.open-cluster-management.io/v1alpha1"
USER_SERVER: Final = f"cluster-proxy-addon-user.{NAMESPACE}.svc:9092"
PROXY: Final = f"proxy-entrypoint.{NAMESPACE}.svc:8090"
CLUSTERS: Final = ("cluster1", "cluster2")
VALUES: Final = (
    "registry=registry.example/team",
    f"proxyServer.entrypointAddress={HUB_PROXY}",
    "enableServiceProxy=true",
    "userServer.enabled=true",
    "exposedServices[0].namespace=default",
    "exposedServices[0].service=hello-world",
    "exposedServices[0].port=8000",
    "exposedServices[0].protocol=http",
    "exposedServices[1].namespace=default",
    "exposedServices[1].service=hello-world-https",
)

HELM: Final = "helm"
KUBECTL: Final = "kubectl"


@attrs.frozen
class Operator:
    """Somebody with helm, kubectl and curl in the hub's network, who is an administrator there."""

    station: Workstation
    environment: dict[str, str]

    def run(self, command: str, *, within_s: float = 60.0) -> str:
        """Return what a line of the shell writes; it must succeed."""
        words = ("bash", "-ceu", command)
        return self.station.output(*words, environment=self.environment, within_s=within_s)

    def start(self, log: Path, command: str) -> subprocess.Popen[bytes]:
        return self.station.start(log, "bash", "-ceu", command, environment=self.environment)


class World:
    """All clusters while its block lasts.

    Attributes:
      timings: how long what has taken, in seconds, for people.
      programs: the roots of containers.
      before: what there was in each cluster before the installation.
    """

    def __init__(self, directory: Path, roots: Path) -> None:
        self.directory = directory
        self.timings: dict[str, float] = {}
        self.files = directory / "files"
        self.files.mkdir()
        self.before: dict[str, set[str]] = {}
        self._tokens: dict[tuple[str, str], str] = {}
        self._opened = contextlib.ExitStack()
        image = os.environ.get("CLUSTERPROXY_E2E_IMAGE")
        self.programs = Programs(roots / "programs", None if image is None else Path(image))
        self.hub, *managed = (
            Cluster(name, number, directory / name, roots, self.programs)
            for number, name in enumerate(("hub", *CLUSTERS), 1)
        )
        self.managed = {each.name: each for each in managed}
        self.ocm: OcmHub
        self.operator: Operator
        self.repository = ""

    # -- life --------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._opened.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._opened.close()

    @contextlib.contextmanager
    def timed(self, what: str) -> Generator[None]:
        began = time.monotonic()
        yield
        self.timings[what] = time.monotonic() - began

    def _start(self) -> None:
        for each in (self.hub, *self.managed.values()):
            self._opened.enter_context(each)
        with self.timed("hub: control plane and OCM"):
            webhook_files = self.directory / "webhook"
            webhook_files.mkdir()
            webhook = Webhook(19443, webhook_files)
            self.hub.start(ocm_definitions(webhook.url, webhook.ca))
            self.ocm = self._opened.enter_context(OcmHub(self.hub.plane, webhook))
            self.hub.serve(NAMESPACE, "default")
            self.operator = self._operator()
        with self.timed("two clusters: control planes, registered"):
            for cluster in self.managed.values():
                cluster.start()
                self.ocm.accept(cluster.name)
                klusterlet = Klusterlet(
                    self.ocm, cluster.plane, cluster.name, hub_server=f"https://{HUB_API}:6443"
                )
                self._opened.enter_context(klusterlet)

    def _operator(self) -> Operator:
        folder = self.directory / "operator"
        station = Workstation(self.hub, NAMESPACE, folder)
        self._opened.callback(station.close)
        programs = folder / "bin"
        programs.mkdir()
        (programs / "helm").symlink_to(helm_program())
        kubectl = programs / "kubectl"
        kubectl.write_text(f'#!/bin/sh\nexec {" ".join(kubectl_command())} "$@"\n')
        kubectl.chmod(0o755)
        environment = helm_environment(
            folder / "helm",
            KUBECONFIG=str(self.hub.kubeconfig),
            KUBECACHEDIR=str(folder / "cache"),
            PATH=f"{programs}:{os.environ['PATH']}",
        )
        environment = {
            k: v for k, v in environment.items() if not re.fullmatch(r"(?i)\w+_proxy", k)
        }
        return Operator(station, environment)

    def serve_charts(self) -> None:
        """Serve the charts as ``make chart`` packs them, to the hub's network."""
        folder = self.directory / "charts"
        folder.mkdir()
        package(folder)
        handler = functools.partial(_Quiet, directory=str(folder))
        address = (f"{self.hub.segment.prefix}.0.1", 8879)
        server = self._opened.enter_context(ThreadingHTTPServer(address, handler))
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        self._opened.callback(thread.join)
        self._opened.callback(server.shutdown)
        self.repository = f"http://{address[0]}:{address[1]}"

    # -- the documentation's steps -----------------------------------------------------------------

    def install(self, *values: str) -> None:
        """Install the add-on, and wait until it is available everywhere."""
        self.serve_clusters()
        everything = (self.hub, *self.managed.values())
        self.before = {each.name: snapshot(each.plane) for each in everything}
        with self.timed("helm repo add, search"):
            self.serve_charts()
            self.operator.run(f"helm repo add ocm {self.repository}; helm repo update")
            found = self.operator.run("helm search repo ocm/cluster-proxy")
            assert re.search(r"(?m)^ocm/cluster-proxy\s+0\.\d+\.\d+\s", found), found
        with self.timed("helm install"):
            settings = " ".join(f"--set '{each}'" for each in (*VALUES, *values))
            self.operator.run(
                f"helm install -n {NAMESPACE} --create-namespace cluster-proxy ocm/cluster-proxy {settings}"
            )
        with self.timed("pods of the hub are ready, since helm install"):
            self.eventually(self.hub_is_ready, "the hub's pods are ready", within_s=90)
        with self.timed("AVAILABLE, since then"):
            self.connect_clusters()
            self.await_available()

    def serve_clusters(self) -> None:
        """Run nodes, names and what people have deployed in the managed clusters."""
        with self.timed("nodes and services of the clusters"):
            for each in self.managed.values():
                each.serve("default", AGENTS)
                populate(each)

    def connect_clusters(self) -> None:
        """Give the hub's entrypoint, which has an address now, to the clusters."""
        service = self.hub.plane.get("v1", "Service", "proxy-entrypoint", NAMESPACE)
        assert service is not None
        for cluster in self.managed.values():
            cluster.connect(self.hub, service["spec"]["clusterIP"])

    # -- clients -----------------------------------------------------------------------------------

    def client_files(self) -> tuple[Path, Path, Path]:
        """Return where the CA, certificate and key of clients are, as docs/install.md tells to get them."""
        content = self.secret("proxy-client")
        content["ca.crt"] = self.secret("proxy-server-ca")["ca.crt"]
        for name, data in content.items():
            part = self.files / f"{name}.part"
            part.write_bytes(data)
            part.rename(self.files / name)
        return self.files / "ca.crt", self.files / "tls.crt", self.files / "tls.key"

    @property
    def ca(self) -> Path:
        """Where the CA is that signs the user server's certificate, as it is now if the hub can be asked."""
        with contextlib.suppress(ApiError, httpx.TransportError):
            self.client_files()
        return self.files / "ca.crt"

    def foreign_pair(self) -> tuple[Path, Path]:
        """Return where a certificate and key are that nobody here trusts."""
        leaf = trustme.CA().issue_cert("foreign.example")
        cert, key = self.files / "foreign.crt", self.files / "foreign.key"
        leaf.cert_chain_pems[0].write_to_path(str(cert))
        leaf.private_key_pem.write_to_path(str(key))
        return cert, key

    def token(self, cluster: str, account: str) -> str:
        """Return a token of an account of e2e.hello in a managed cluster."""
        if (cluster, account) not in self._tokens:
            plane = self.managed[cluster].plane
            self._tokens[cluster, account] = plane.token_for("default", account)
        return self._tokens[cluster, account]

    # -- looks -------------------------------------------------------------------------------------

    def agent(self, cluster: str) -> Object:
        """Return the agents' Deployment in a cluster."""
        found = self.managed[cluster].plane.get(
            "apps/v1", "Deployment", "cluster-proxy-proxy-agent", AGENTS
        )
        assert found is not None
        return found

    def is_rolled_out(self, cluster: str) -> bool:
        """Whether the agents of a cluster are as configured, and ready."""
        return rolled_out(self.agent(cluster))

    def no_agents(self, cluster: str) -> bool:
        return not self.managed[cluster].pods(AGENTS)

    def agents_at_servers(self) -> list[int]:
        """Return how many agents each proxy server has."""
        pods = self.hub.plane.list("v1", "Pod", NAMESPACE, selector=PROXY_SERVERS)
        texts = [
            httpx.get(f"http://{pod['status']['podIP']}:8092/metrics", trust_env=False).text
            for pod in pods
        ]
        found = [re.search(r'grpc_connections{service_method="Connect"} (\d+)', t) for t in texts]
        return [int(each[1]) if each else 0 for each in found]

    def hub_is_ready(self) -> bool:
        found = self.hub.plane.list("apps/v1", "Deployment", NAMESPACE)
        names = {each["metadata"]["name"] for each in found}
        return names >= {
            "cluster-proxy",
            "cluster-proxy-addon-manager",
            "cluster-proxy-addon-user",
        } and all(map(rolled_out, found))

    def addon(self, cluster: str) -> Object:
        found = self.hub.plane.get(ADDON, "ManagedClusterAddOn", "cluster-proxy", cluster)
        return found or {}

    def available(self, cluster: str) -> str:
        conditions = self.addon(cluster).get("status", {}).get("conditions", ())
        found = [each["status"] for each in conditions if each["type"] == "Available"]
        return found[0] if found else ""

    def await_available(self) -> None:
        self.eventually(
            lambda: all(self.available(each) == "True" for each in CLUSTERS),
            "the add-on is available",
            within_s=120,
        )

    def load_balancer(self) -> Object | None:
        """Return the Service that asks for a load balancer."""
        found = [
            each
            for each in self.hub.plane.list("v1", "Service", NAMESPACE)
            if each["spec"]["type"] == "LoadBalancer"
        ]
        return {"apiVersion": "v1", "kind": "Service"} | found[0] if found else None

    def configuration(self) -> Object:
        found = self.hub.plane.get(MPC, "ManagedProxyConfiguration", "cluster-proxy")
        assert found is not None
        return found

    def secret(self, name: str) -> dict[str, bytes]:
        found = self.hub.plane.get("v1", "Secret", name, NAMESPACE)
        assert found is not None, name
        return {key: base64.b64decode(value) for key, value in found["data"].items()}

    def eventually(self, probe: Callable[[], Any], what: str, *, within_s: float = 60.0) -> Any:
        """Wait until *probe* returns something true; what is wrong otherwise is told with all that is known."""
        try:
            return eventually(probe, what, within_s=within_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.told()}") from error

    def told(self) -> str:
        addons = {name: self.addon(name).get("status") for name in CLUSTERS}
        parts = [json.dumps(addons), self.hub.told(NAMESPACE)]
        parts += [each.told(AGENTS) for each in self.managed.values()]
        return "\n".join([*parts, self.ocm.logs()])


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  it is called so
        pass


def rolled_out(deployment: Object) -> bool:
    status, wanted = deployment.get("status", {}), deployment["spec"]["replicas"]
    return bool(
        status.get("observedGeneration") == deployment["metadata"]["generation"]
        and status.get("updatedReplicas") == wanted
        and status.get("readyReplicas") == wanted
        and status.get("replicas") == wanted
        and not status.get("terminatingReplicas")
    )


#: What comes and goes without anybody's doing.
_FLEETING: Final = {"Event", "CertificateSigningRequest", "EndpointSlice", "IPAddress", "Lease"}  # fmt: skip


def snapshot(plane: ControlPlane) -> set[str]:
    """Return kinds and names of all objects of a control plane."""
    groups = [("v1", "/api/v1")]
    for group in plane.call("GET", "/apis")["groups"]:
        version = group["preferredVersion"]["groupVersion"]
        groups.append((version, f"/apis/{version}"))
    found: set[str] = set()
    for version, path in groups:
        for resource in plane.call("GET", path)["resources"]:
            kind = resource["kind"]
            if "list" not in resource["verbs"] or "/" in resource["name"] or kind in _FLEETING:
                continue
            for each in plane.list(version, kind):
                meta = each["metadata"]
                where = f"{meta['namespace']}/" if "namespace" in meta else ""
                found.add(f"{kind} {where}{meta['name']}")
    return found


def leaf_names(certificate: bytes) -> set[str]:
    """Return the DNS names of the first certificate in PEM."""
    leaf = x509.load_pem_x509_certificate(certificate)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return set(names.get_values_for_type(x509.DNSName))
