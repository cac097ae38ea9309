"""A far cluster in full: two real apiservers, and between them our programs, as users of the hub meet them.

``loopback`` is a managed cluster with our service proxy; ``old`` is the same with the original's, as far as
conformance/cmd/original plays it. The service proxies find Services by their names, as in a pod: a file in the place of
/etc/hosts says where they are.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import itertools
import json
import os
import ssl
import subprocess
import threading
from typing import TYPE_CHECKING, Final

import attrs
import httpx
import trustme
from certificates import write_pair
from cluster import LOOPBACK, PROGRAM, wait_until
from go_tools import go_module_program
from kube.control_plane import eventually
from kube.node import Node
from kube.process_kubelet import ProcessKubelet, shows_account
from kube.test_kubectl_direct import COMMANDS, ready, talker
from test_user_server_kube import Far, account, role, rule
from user_server_stage import CONFIG_MAP, SERVICE_PROXY_PORT, Hub

from clusterproxy.tunnel.agent_identity import service_proxy_host

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

    from kube.control_plane import ControlPlane, Object
    from oidc import OidcIssuer

CLUSTER: Final = "loopback"
OLD_CLUSTER: Final = "old"
CA_CONFIG_MAP: Final = "oidc-ca"
AUDIENCE: Final = "kubernetes"
REVIEW: Final = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
WHOAMI: Final = "apis/authentication.k8s.io/v1/selfsubjectreviews"
RBAC: Final = "rbac.authorization.k8s.io"

_numbers: Final = itertools.count(1)

# The address is bound over, so that what is written to the file counts at once.
_SEES_HOSTS: Final = 'mount --bind "$0" /etc/hosts && exec "$@"'


def sees_hosts(hosts: Path) -> tuple[str, ...]:
    """Return what is put before a command that finds names in a file of ours; only within a mount namespace of its own."""
    return ("sh", "-c", _SEES_HOSTS, str(hosts))


def in_own_namespace() -> tuple[str, ...]:
    own_root = () if os.geteuid() == 0 else ("--map-root-user",)
    return ("unshare", "--mount", *own_root, "--")


class FarHub(Hub):
    """A hub whose agent stands for all clusters, and reaches each by its own name, too."""

    def start_agents(self) -> None:
        names = (name for each in self.clusters for name in (each, service_proxy_host(each)))
        self.start_agent(f"--agent-identifiers={'&'.join(f'host={name}' for name in names)}")


@attrs.frozen
class FarCluster(Far):
    """A cluster behind the tunnel, and what it is made of.

    Attributes:
      proxy_home: the namespace of the service proxy in the managed cluster.
      hosts: where names are looked up in the managed cluster.
      services: signs the certificates of services that the service proxy trusts.
      issuer: None without Node.
      processes: the service proxies, ours and the original's.
    """

    directory: Path
    proxy_home: str
    hosts: Path
    services: trustme.CA
    authority: trustme.CA
    issuer: OidcIssuer | None
    health_port: int
    processes: dict[str, subprocess.Popen[bytes]] = attrs.field(factory=dict)

    def at(self, cluster: str) -> FarCluster:
        """Return the same by the name of another cluster."""
        return attrs.evolve(self, url=f"{self.url.rpartition('/')[0]}/{cluster}")

    def service_url(self, reference: str, namespace: str, path: str = "") -> str:
        return f"{self.url}/api/v1/namespaces/{namespace}/services/{reference}/proxy-service/{path}"

    def expose(self, *entries: dict[str, str]) -> None:
        """Let these services be reached, and no others."""
        # One more, by which it shows that the list is in force.
        mark = f"told-{next(_numbers)}"
        self.name(f"mark.{mark}.svc", LOOPBACK)
        told = [*entries, {"namespace": mark, "service": "mark"}]
        self.hub.apply(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": CONFIG_MAP, "namespace": self.home},
                "data": {"services": json.dumps(told)},
            }
        )
        with self.client("none") as client:
            # Nothing listens there.
            url = self.service_url("http:mark:1", mark)
            wait_until(lambda: client.get(url).status_code == 502, "the list was read")

    def name(self, host: str, address: str) -> None:
        """Have the managed cluster find a host at an address."""
        with self.hosts.open("a") as hosts:
            hosts.write(f"{address} {host}\n")

    def trust_issuer(self, *authorities: str) -> None:
        """Tell the service proxy by which CAs to believe the issuer."""
        self.managed.apply(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": CA_CONFIG_MAP, "namespace": self.proxy_home},
                "data": {"ca.crt": "".join(authorities)},
            }
        )

    def whoami(self, token: str, **headers: str) -> Object:
        """Return who the managed apiserver takes somebody for."""
        with self.client(token, **headers) as client:
            answer = client.post(WHOAMI, json=REVIEW)
        assert answer.status_code == 201, (answer.status_code, answer.text)
        info: Object = answer.json()["status"]["userInfo"]
        return info

    def refused(self, token: str, **headers: str) -> str:
        """Return why somebody is nobody, when asked by whom he is."""
        with self.client(token, **headers) as client:
            answer = client.post(WHOAMI, json=REVIEW)
        assert answer.status_code == 401, (answer.status_code, answer.text)
        return answer.text

    def reviews(self) -> float:
        """How often somebody has been told by the managed apiserver who he is: it counts itself."""
        with httpx.Client(verify=self.managed.admin_tls, trust_env=False, timeout=30) as admin:
            text = admin.get(f"{self.managed.server}/metrics").text
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith("apiserver_request_total{")
            and 'resource="selfsubjectreviews"' in line
            and 'code="201"' in line
        )

    def forwarded(self) -> float:
        """How many requests our service proxy has passed on."""
        with httpx.Client(trust_env=False) as client:
            text = client.get(f"http://{self.addresses[0]}:{self.health_port}/metrics").text
        outcomes = ("apiserver", "impersonated", "service")
        return sum(
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith(
                tuple(
                    f'clusterproxy_service_proxy_requests_total{{outcome="{o}"}}' for o in outcomes
                )
            )
        )

    @property
    def addresses(self) -> Sequence[str]:
        """Where the service proxies are: ours, and the original's."""
        return list(self.programs.clusters.values())

    def grant(self, namespace: str, user: str, *rules: Object) -> None:
        """Give a user of this name rights in a namespace of the managed cluster."""
        metadata = {"name": f"of-{base64.b32encode(user.encode()).decode().strip('=').lower()}"}
        api = {"apiVersion": f"{RBAC}/v1"}
        metadata["namespace"] = namespace
        self.managed.apply(
            {**api, "kind": "Role", "metadata": metadata, "rules": list(rules)},
            {
                **api,
                "kind": "RoleBinding",
                "metadata": metadata,
                "roleRef": {"apiGroup": RBAC, "kind": "Role", "name": metadata["name"]},
                "subjects": [{"apiGroup": RBAC, "kind": "User", "name": user}],
            },
        )


@contextlib.contextmanager
def far_cluster(
    directory: Path,
    hub: ControlPlane,
    managed: ControlPlane,
    issuer: OidcIssuer | None,
    *,
    first_port: int,
    addresses: tuple[str, str],
) -> Generator[FarCluster]:
    """Run everything in the block; *addresses* are those of the service proxies."""
    authority, services = trustme.CA(), trustme.CA()
    clusters = dict(zip((CLUSTER, OLD_CLUSTER), addresses, strict=True))
    home, proxy_home = hub.create_namespace(), managed.create_namespace()
    # The rights that the chart gives (templates/user-rbac.yaml).
    account(hub, home, "cluster-proxy-addon-user")
    names = ("ocm-tls-profile", CONFIG_MAP)
    role(hub, home, "cluster-proxy-addon-user", rule("configmaps", "get list watch", names=names))
    hosts = directory / "hosts"
    hosts.write_text(
        "127.0.0.1 localhost\n"
        + "".join(
            f"{address} {service_proxy_host(name)}\n127.0.0.1 {name}\n"
            for name, address in clusters.items()
        )
    )
    programs = FarHub(
        directory,
        first_port,
        authority,
        kubeconfig=hub.kubeconfig_for(home, "cluster-proxy-addon-user"),
        clusters=clusters,
        namespace=home,
    )
    programs.commands["agent"] = (*in_own_namespace(), *sees_hosts(hosts), *PROGRAM, "agent")
    far = FarCluster(
        hub,
        managed,
        programs,
        f"https://{LOOPBACK}:{programs.user_port}/{CLUSTER}",
        programs.service_proxy_ca,
        home,
        directory,
        proxy_home,
        hosts,
        services,
        authority,
        issuer,
        first_port + 9,
    )
    with contextlib.ExitStack() as opened:
        opened.callback(programs.close)
        starts = {"service-proxy": start_service_proxy, "original": start_original}
        for name, start in starts.items():
            process = far.processes[name] = start(far)
            opened.callback(process.wait)
            opened.callback(process.kill)
        programs.start()

        def up() -> bool:
            with far.client("none") as client, far.at(OLD_CLUSTER).client("none") as other:
                return 502 not in (
                    client.get("version").status_code,
                    other.get("version").status_code,
                )

        wait_until(up, "the service proxies answer")
        if issuer is not None:
            far.trust_issuer(issuer.ca)
        yield far


def start_service_proxy(far: FarCluster) -> subprocess.Popen[bytes]:
    """Start it as in its pod, with the rights that the agent's chart gives it."""
    managed, hub, directory, home = far.managed, far.hub, far.directory, far.proxy_home
    account(managed, home, "cluster-proxy")
    tokens = rule("tokenreviews", "create", "authentication.k8s.io")
    role(
        managed,
        home,
        "cluster-proxy",
        tokens,
        rule("users groups", "impersonate"),
        cluster_wide=True,
    )
    role(managed, home, "configmaps", rule("configmaps", "get list watch"), to="cluster-proxy")
    at_hub = hub.create_namespace()
    account(hub, at_hub, "agent")
    role(hub, at_hub, "agent", tokens, cluster_wide=True)
    own = directory / "own-account"
    own.mkdir()
    (own / "token").write_text(managed.token_for(home, "cluster-proxy"))
    (own / "ca.crt").write_bytes(managed.ca.read_bytes())
    (own / "namespace").write_text(home)
    far.services.cert_pem.write_to_path(str(directory / "services-ca.crt"))
    cert, key = write_pair(far.authority, directory, "service-proxy", service_proxy_host(CLUSTER))
    oidc = () if far.issuer is None else (
        f"--oidc-issuer-url={far.issuer.issuer}",
        f"--oidc-client-id={AUDIENCE}",
        "--oidc-username-claim=email",
        "--oidc-username-prefix=oidc:",
        "--oidc-groups-claim=groups",
        "--oidc-groups-prefix=oidc:",
        f"--oidc-ca-configmap={CA_CONFIG_MAP}",
    )  # fmt: skip
    command = (
        *shows_account(own),
        *sees_hosts(far.hosts),
        *PROGRAM,
        "service-proxy",
        f"--cert={cert}",
        f"--key={key}",
        f"--additional-service-ca={directory / 'services-ca.crt'}",
        f"--hub-kubeconfig={hub.kubeconfig_for(at_hub, 'agent')}",
        f"--kube-api-address={managed.server.removeprefix('https://')}",
        f"--bind-address={far.addresses[0]}",
        f"--port={SERVICE_PROXY_PORT}",
        f"--health-port={far.health_port}",
        *oidc,
    )
    host, _, port = managed.server.removeprefix("https://").partition(":")
    environment = os.environ | {
        "POD_NAMESPACE": home,
        "KUBERNETES_SERVICE_HOST": host,
        "KUBERNETES_SERVICE_PORT": port,
    }
    with (directory / "service-proxy.log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def start_original(far: FarCluster) -> subprocess.Popen[bytes]:
    """Start what plays the original's service proxy, which knows no users but the managed cluster's."""
    directory = far.directory
    cert, key = write_pair(far.authority, directory, "original", service_proxy_host(OLD_CLUSTER))
    (directory / "roots.crt").write_bytes(
        far.managed.ca.read_bytes() + far.services.cert_pem.bytes()
    )
    command = (
        *in_own_namespace(),
        *sees_hosts(far.hosts),
        str(go_module_program("./cmd/original")),
        f"-listen={far.addresses[1]}:{SERVICE_PROXY_PORT}",
        f"-cert={cert}",
        f"-key={key}",
        f"-ca={directory / 'roots.crt'}",
        f"-apiserver={far.managed.server.removeprefix('https://')}",
        "service-proxy",
    )
    with (directory / "original-service-proxy.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


@contextlib.contextmanager
def original_user_server(far: FarCluster, port: int) -> Generator[FarCluster]:
    """Run what plays the original's user server, before the same proxy server; gives the cluster as seen by it."""
    programs = far.programs
    command = (
        str(go_module_program("./cmd/original")),
        f"-listen={LOOPBACK}:{port}",
        f"-cert={programs.user_cert}",
        f"-key={programs.user_key}",
        f"-ca={programs.service_proxy_ca}",
        f"-proxy={LOOPBACK}:{programs.port}",
        f"-proxy-ca={programs.ca}",
        f"-proxy-cert={programs.client_cert}",
        f"-proxy-key={programs.client_key}",
        "user-server",
    )
    with (
        (far.directory / "original-user-server.log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=log) as process,
    ):
        try:
            other = attrs.evolve(far, url=f"https://{LOOPBACK}:{port}/{CLUSTER}")

            def up() -> bool:
                with contextlib.suppress(httpx.TransportError), other.client("none") as client:
                    return client.get("version").status_code == 401
                return False

            wait_until(up, "the original's user server answers")
            yield other
        finally:
            process.kill()


# -- users and pods ------------------------------------------------------------------------------------


@contextlib.contextmanager
def talking_pod(plane: ControlPlane, namespace: str, directory: Path) -> Iterator[ProcessKubelet]:
    """Have a pod that talks, on a node of its own, while the block lasts."""
    with ProcessKubelet(plane, namespace, COMMANDS, directory) as kubelet, Node(kubelet):
        plane.apply(talker(namespace))
        eventually(lambda: ready(plane, namespace), "the pod is ready")
        yield kubelet


# -- services ------------------------------------------------------------------------------------------


class _Hello(http.server.BaseHTTPRequestHandler):
    """Says who it is and what it was asked; a POST is answered with its body."""

    protocol_version = "HTTP/1.1"
    hello = ""

    def do_GET(self) -> None:
        seen = [[name.lower(), value] for name, value in self.headers.items()]
        told = {"hello": self.hello, "path": self.path, "headers": seen}
        self._answer(json.dumps(told).encode())

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base's name
        pass


@contextlib.contextmanager
def hello(
    name: str, address: str, port: int, leaf: trustme.LeafCert | None = None
) -> Generator[None]:
    """Serve what says hello from *name*, over TLS with a certificate, while the block lasts."""
    handler = type("_Bound", (_Hello,), {"hello": f"Hello from {name}"})
    server = http.server.ThreadingHTTPServer((address, port), handler)
    server.daemon_threads = True
    if leaf is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        leaf.configure_cert(context)
        server.socket = context.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def namespaced(cluster: ControlPlane, *names: str) -> tuple[str, ...]:
    """Make a namespace with these accounts, and return it and their tokens."""
    namespace = cluster.create_namespace()
    for name in names:
        account(cluster, namespace, name)
    return (namespace, *(cluster.token_for(namespace, name) for name in names))
