"""A far cluster with real parts on both ends: who somebody is there, streams, services, and versions that mix.

Rows A9, A15, A16, A18 to A20, A24 to A27, G3, G7 and H2 to H7 through the whole chain. What kubectl does with an account
of the managed cluster is in test_user_server_kube.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import subprocess
from typing import TYPE_CHECKING, Any, Final

import attrs
import httpx
import kubernetes.client
import kubernetes.stream
import kubernetes.watch
import pytest
import trustme
from certificates import write_pair
from cluster import LOOPBACK, wait_until
from far_cluster import (
    AUDIENCE,
    CLUSTER,
    OLD_CLUSTER,
    FarCluster,
    far_cluster,
    hello,
    namespaced,
    original_user_server,
    talking_pod,
)
from go_tools import go_module_program, needs_go
from http_peers import curl, http2_client, needs_curl, open_websocket
from kube.kubectl import KubectlError
from oidc import missing_node
from prometheus import Prometheus
from test_user_server_kube import role, rule
from websocket import WebSocketBadStatusException, WebSocketConnectionClosedException

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    from kube.control_plane import ControlPlane, Object
    from kube.kubectl import Kubectl

pytestmark = [pytest.mark.programs, needs_go]

FIRST_PORT: Final = 27500
ADDRESSES: Final = ("127.0.50.1", "127.0.50.2")
SERVICES: Final = "127.0.51"
EVERYTHING: Final = rule("pods pods/log pods/exec pods/portforward pods/attach configmaps", "*")


@pytest.fixture(scope="module")
def far(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    hub: ControlPlane,
    managed: ControlPlane,
) -> Generator[FarCluster]:
    issuer = None if missing_node() else request.getfixturevalue("oidc_issuer")
    directory = tmp_path_factory.mktemp("far")
    with far_cluster(
        directory, hub, managed, issuer, first_port=FIRST_PORT, addresses=ADDRESSES
    ) as everything:
        yield everything


@attrs.frozen
class Somebody:
    """A user, by a token, with the right to do everything in a namespace of the managed cluster.

    Attributes:
      name: what the managed cluster calls him.
      groups: likewise; None: whichever they are.
    """

    token: str
    name: str
    groups: frozenset[str] | None = None

    def kubectl(self, far: FarCluster, directory: Path, namespace: str, **options: Any) -> Kubectl:
        return far.kubectl(directory, self.token, namespace, **options)


@attrs.frozen
class People:
    """Users of a namespace."""

    namespace: str
    everybody: dict[str, Somebody]


@pytest.fixture(scope="module")
def people(far: FarCluster) -> People:
    namespace, managed_token = namespaced(far.managed, "user")
    at_hub, hub_token = namespaced(far.hub, "user")
    found = {
        "managed": Somebody(managed_token, f"system:serviceaccount:{namespace}:user"),
        "hub": Somebody(
            hub_token,
            f"cluster:hub:system:serviceaccount:{at_hub}:user",
            frozenset(
                {
                    "system:serviceaccounts",
                    f"system:serviceaccounts:{at_hub}",
                    "system:authenticated",
                }
            ),
        ),
    }
    if far.issuer is not None:
        token = far.issuer.token(
            "admin", audience=AUDIENCE, email="engineer@example.com", groups=["team"]
        )
        found["oidc"] = Somebody(
            token, "oidc:engineer@example.com", frozenset({"oidc:team", "system:authenticated"})
        )
    for somebody in found.values():
        far.grant(namespace, somebody.name, EVERYTHING)
    return People(namespace, found)


@pytest.fixture(params=["managed", "hub", "oidc"])
def somebody(request: pytest.FixtureRequest, people: People) -> Somebody:
    if request.param not in people.everybody:
        pytest.skip(missing_node())
    return people.everybody[request.param]


@pytest.fixture(scope="module")
def pod(
    far: FarCluster, people: People, tmp_path_factory: pytest.TempPathFactory
) -> Generator[Path]:
    with talking_pod(far.managed, people.namespace, tmp_path_factory.mktemp("pods")) as kubelet:
        yield kubelet.directory


# -- who somebody is -----------------------------------------------------------------------------------


def whoami(kubectl: Kubectl) -> Object:
    told: Object = json.loads(kubectl.run("auth", "whoami", "-o", "json"))
    info: Object = told["status"]["userInfo"]
    return info


def test_who_somebody_is(
    far: FarCluster, people: People, somebody: Somebody, tmp_path: Path
) -> None:
    """A24 to A26, H5, H6, H16: told by kubectl, and what follows from it."""
    kubectl = somebody.kubectl(far, tmp_path, people.namespace)
    info = whoami(kubectl)
    assert info["username"] == somebody.name
    if somebody.groups is not None:
        assert len(info["groups"]) == len(somebody.groups)
        assert set(info["groups"]) == somebody.groups
    assert kubectl.run("get", "configmap", "kube-root-ca.crt", "-o", "name")
    with pytest.raises(KubectlError, match=f'User "{somebody.name}" cannot get resource "secrets"'):
        kubectl.run("get", "secret", "x")
    with pytest.raises(KubectlError, match=f'User "{somebody.name}" cannot list'):
        attrs.evolve(kubectl, namespace="kube-system").run("get", "pods")


def test_what_somebody_may_follows_what_he_is_given(far: FarCluster, somebody: Somebody) -> None:
    """A25, A26: nothing of it is remembered on the way."""
    namespace = far.managed.create_namespace()
    path = f"api/v1/namespaces/{namespace}/configmaps"
    with far.client(somebody.token) as client:
        assert client.get(path).status_code == 403
        far.grant(namespace, somebody.name, rule("configmaps", "list"))
        wait_until(lambda: client.get(path).status_code == 200, "he may list them")


def test_somebody_else(far: FarCluster, tmp_path: Path) -> None:
    """A15: ``kubectl --as`` is the managed apiserver's own business, by the name that it knows."""
    namespace, token = namespaced(far.managed, "impersonator")
    role(
        far.managed,
        namespace,
        "impersonator",
        rule("users", "impersonate", names=("alice",)),
        rule("groups", "impersonate", names=("crew",)),
        cluster_wide=True,
    )
    kubectl = far.kubectl(tmp_path, token, namespace)
    allowed: tuple[tuple[tuple[str, ...], set[str]], ...] = (
        ((), {"system:authenticated"}),
        (("--as-group=crew",), {"crew", "system:authenticated"}),
    )
    for options, groups in allowed:
        info = whoami(attrs.evolve(kubectl, options=("--as=alice", *options)))
        assert (info["username"], set(info["groups"])) == ("alice", groups)
    for options in (("--as=bob",), ("--as=alice", "--as-group=system:masters")):
        with pytest.raises(KubectlError, match="you do not have permission"):
            whoami(attrs.evolve(kubectl, options=options))


# -- streams -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pod")
@pytest.mark.parametrize("websockets", [False, True], ids=["spdy", "websocket"])
def test_streams(
    far: FarCluster, people: People, somebody: Somebody, tmp_path: Path, websockets: bool
) -> None:
    """A16, A18, G7: an upgrade goes on as whom the request comes from, and carries bytes as they are."""
    kubectl = somebody.kubectl(far, tmp_path, people.namespace, websockets=websockets)
    data = os.urandom(1 << 20)
    assert kubectl.exec("talker", "cat", stdin=data) == data
    with pytest.raises(KubectlError) as failed:
        kubectl.exec("talker", "sh", "-c", "echo of the command >&2; exit 7")
    assert failed.value.status == 7
    assert "of the command" in failed.value.message
    with kubectl.start("exec", "-i", "talker", "--", "cat") as running:
        for line in (b"one\n", b"two\n"):
            running.write(line)
            running.until(line)
        running.close_stdin()
        assert running.wait() == 0
    with (
        kubectl.start("logs", "-f", "--tail=1", "talker") as logs,
        kubectl.start("attach", "-i", "talker") as attached,
    ):
        word = b"%b by %b\n" % (somebody.name.encode(), b"websocket" if websockets else b"spdy")

        def said_back() -> bool:
            attached.write(word)
            return word in attached.out

        wait_until(said_back, "it is attached")
        logs.until(word)
        attached.close_stdin()
    with (
        kubectl.port_forward("pod/talker", 8080) as (port, running),
        httpx.Client(trust_env=False) as client,
    ):
        for _ in range(3):
            assert client.post(f"http://{LOOPBACK}:{port}/", content=data).content == data
        assert running.process.poll() is None
    (tmp_path / "file").write_bytes(data)
    name = f"copied-{websockets}"
    kubectl.copy(str(tmp_path / "file"), f"talker:{name}")
    kubectl.copy(f"talker:{name}", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data


@pytest.mark.usefixtures("pod")
@pytest.mark.parametrize("websockets", [False, True], ids=["spdy", "websocket"])
def test_streams_of_nobody(
    far: FarCluster, people: People, tmp_path: Path, websockets: bool
) -> None:
    """An upgrade is refused as any other request is, before anything is upgraded."""
    _, stranger = namespaced(far.hub, "stranger")
    for token, text in (("garbage", "authentication failed"), (stranger, "cannot get resource")):
        kubectl = far.kubectl(tmp_path, token, people.namespace, websockets=websockets)
        with pytest.raises(KubectlError) as failed:
            kubectl.exec("talker", "true")
        # kubectl shows a text that is no Status to some extent only.
        assert text in failed.value.message or "logged in" in failed.value.message, failed.value


def test_a_watch(far: FarCluster, people: People, somebody: Somebody, tmp_path: Path) -> None:
    """A17, by kubectl, which speaks HTTP/2."""
    kubectl = somebody.kubectl(far, tmp_path, people.namespace)
    name = f"seen-{somebody.name.replace(':', '-').replace('@', '-').lower()}"
    with kubectl.start(
        "get", "configmaps", "-w", "--output-watch-events", "--no-headers"
    ) as running:
        running.until(rb"ADDED +kube-root-ca.crt")
        kubectl.run("create", "configmap", name)
        running.until(rf"ADDED +{name}".encode())
        kubectl.run("delete", "configmap", name)
        running.until(rf"DELETED +{name}".encode())


# -- other clients -------------------------------------------------------------------------------------


@needs_curl
@pytest.mark.parametrize("version", ["1.1", "2"])
def test_curl(
    far: FarCluster, people: People, somebody: Somebody, version: str, tmp_path: Path
) -> None:
    ca = tmp_path / "ca"
    ca.write_bytes(far.authority.cert_pem.bytes())
    found = curl(
        f"{far.url}/api/v1/namespaces/{people.namespace}/pods?limit=1",
        f"--http{version}",
        "--compressed",
        "--header",
        f"Authorization: Bearer {somebody.token}",
        ca=ca,
    )
    assert (found.status, found.version, found.error) == (200, version, "")
    assert json.loads(found.body)["kind"] == "PodList"


def test_an_http2_client(far: FarCluster, people: People, somebody: Somebody) -> None:
    """Many at once on one connection, and what is large."""
    path = f"{far.url}/api/v1/namespaces/{people.namespace}/configmaps"
    with http2_client(
        far.directory / "service-proxy-ca.crt",
        headers={"Authorization": f"Bearer {somebody.token}"},
        timeout=30,
    ) as client:
        name = f"large-{somebody.name.rpartition(':')[2].replace('@', '-')}"
        large = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name},
            "data": {"text": "x" * 900_000},
        }
        answer = client.post(path, json=large)
        assert (answer.status_code, answer.http_version) == (201, "HTTP/2")
        assert client.get(f"{path}/{name}").json()["data"] == large["data"]
        assert client.delete(f"{path}/{name}").status_code == 200


@pytest.mark.usefixtures("pod")
def test_a_websocket(far: FarCluster, people: People, somebody: Somebody) -> None:
    command = "?command=echo&command=hi&stdout=true&stderr=true"
    url = f"{far.url}/api/v1/namespaces/{people.namespace}/pods/talker/exec{command}"
    url = url.replace("https:", "wss:")
    ca = far.directory / "service-proxy-ca.crt"
    identity = {"Authorization": f"Bearer {somebody.token}"}
    with contextlib.closing(
        open_websocket(url, ca, protocols=("v4.channel.k8s.io",), headers=identity)
    ) as stream:
        assert stream.getsubprotocol() == "v4.channel.k8s.io"
        frames: list[str | bytes] = []
        # It ends without a word.
        with contextlib.suppress(WebSocketConnectionClosedException):
            while True:
                frames.append(stream.recv())
    assert b"\x01hi\n" in frames
    with pytest.raises(WebSocketBadStatusException) as refused:
        open_websocket(url, ca, headers={"Authorization": "Bearer garbage"})
    assert refused.value.status_code == 401
    assert b"authentication failed" in (refused.value.resp_body or b"")


# -- services ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hellos(far: FarCluster) -> Generator[str]:
    """Services of a namespace, over HTTP, HTTPS, and HTTPS by a CA that nobody trusts; gives the namespace."""
    namespace = far.managed.create_namespace()
    names = ("hello-world", "hello-world-https", "foreign")
    addresses = {name: f"{SERVICES}.{number}" for number, name in enumerate(names, 1)}
    for name, address in addresses.items():
        far.name(f"{name}.{namespace}.svc", address)
    with (
        hello("hello-world", addresses["hello-world"], 8000),
        hello(
            "hello-world-https",
            addresses["hello-world-https"],
            8443,
            far.services.issue_cert(f"hello-world-https.{namespace}.svc"),
        ),
        hello(
            "foreign",
            addresses["foreign"],
            8443,
            trustme.CA().issue_cert(f"foreign.{namespace}.svc"),
        ),
    ):
        far.expose(
            {"namespace": namespace, "service": "hello-world", "port": "8000", "protocol": "http"},
            {"namespace": namespace, "service": "hello-world-https"},
            {"namespace": namespace, "service": "foreign"},
        )
        yield namespace


@needs_curl
@pytest.mark.parametrize("version", ["1.1", "2"])
def test_services(far: FarCluster, hellos: str, version: str) -> None:
    """A19, A20, G3, H3: nobody on the way asks who it is, and what is his goes to the service."""
    ca = far.directory / "service-proxy-ca.crt"

    def ask(reference: str, path: str = "", *options: str) -> Any:
        return curl(far.service_url(reference, hellos, path), f"--http{version}", *options, ca=ca)

    for reference in (
        "http:hello-world:8000",
        "https:hello-world-https:8443",
        "hello-world-https:8443",
    ):
        found = ask(reference, "a%2Fb/?q=%20x", "--header", "Authorization: Bearer of-the-service")
        assert (found.status, found.version, found.error) == (200, version, "")
        told = json.loads(found.body)
        assert told["hello"] == f"Hello from {reference.split(':')[-2]}"
        assert told["path"] == "/a%2Fb/?q=%20x"
        headers = dict(map(tuple, told["headers"]))
        assert headers["authorization"] == "Bearer of-the-service"
        assert headers["host"] == f"{LOOPBACK}:{far.programs.user_port}"
        assert headers["x-forwarded-for"].startswith(LOOPBACK)
        assert not [name for name in headers if name.startswith("cluster-proxy-")]
    assert ask("http:hello-world:8000", "", "--data-binary", "sent").body == b"sent"
    found = ask("https:foreign:8443")
    assert found.status == 502
    assert b"certificate" in found.body
    # What is exposed is what is in the list.
    for reference in ("http:hello-world:8001", "https:hello-world:8000"):
        found = ask(reference)
        assert found.status == 403
        text = f"service {hellos}/hello-world is not in the exposed services allowlist\n"
        assert found.body.startswith(text.encode())


def test_a_pod_of_a_headless_service(far: FarCluster) -> None:
    """By the name that the cluster's resolver has for it, and its certificate."""
    namespace = far.managed.create_namespace()
    address = f"{SERVICES}.5"
    far.name(f"web-0.web.{namespace}.svc", address)
    far.expose({"namespace": namespace, "service": "web-0.web"})
    certificate = far.services.issue_cert(f"*.web.{namespace}.svc")
    with hello("web-0", address, 8443, certificate), far.client("of-the-service") as client:
        answer = client.get(far.service_url("https:web-0.web:8443", namespace))
    assert answer.status_code == 200, answer.text
    assert answer.json()["hello"] == "Hello from web-0"


def test_a_websocket_of_a_service(far: FarCluster, tmp_path: Path) -> None:
    """G7: by names that its client sends, and byte for byte in both directions."""
    namespace = far.managed.create_namespace()
    address, name = f"{SERVICES}.4", f"echo.{namespace}.svc"
    far.name(name, address)
    cert, key = write_pair(far.services, tmp_path, "echo", name)
    command = (
        str(go_module_program("./cmd/httpload")),
        "serve",
        f"-listen={address}:8443",
        f"-cert={cert}",
        f"-key={key}",
    )
    ca = far.directory / "service-proxy-ca.crt"
    url = far.service_url("https:echo:8443", namespace, "echo?a=b").replace("https:", "wss:", 1)
    with subprocess.Popen(command) as service:
        try:
            wait_until(lambda: connects(address, 8443), "the service listens")
            with pytest.raises(WebSocketBadStatusException) as refused:
                open_websocket(url, ca)
            assert refused.value.status_code == 403
            far.expose({"namespace": namespace, "service": "echo"})
            # The service wants to know where its page is from.
            origin = {"Origin": "https://page.example"}
            with contextlib.closing(open_websocket(url, ca, headers=origin)) as stream:
                for data in ("text", "x" * 200_000):
                    stream.send(data)
                    received = ""
                    while len(received) < len(data):
                        received += str(stream.recv())
                    assert received == data
        finally:
            service.kill()


def connects(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=5):
        return True
    return False


def test_prometheus(far: FarCluster, tmp_path: Path) -> None:
    """With its own idea of URLs, behind ``/proxy-service/``: queries, redirections, and what is compressed."""
    namespace = far.managed.create_namespace()
    address, port = f"{SERVICES}.9", 9090
    far.name(f"prometheus.{namespace}.svc", address)
    url = far.service_url(f"http:prometheus:{port}", namespace)
    options = {"web.external-url": url, "web.route-prefix": "/"}
    ca = ssl.create_default_context(cafile=far.ca)
    with (
        Prometheus(tmp_path / "prometheus", address, port, options),
        httpx.Client(base_url=url, verify=ca, http2=True, timeout=30, trust_env=False) as client,
    ):
        query = {"query": 'up{job="itself"}'}
        assert client.get("api/v1/query", params=query).status_code == 403
        far.expose({"namespace": namespace, "service": "prometheus", "port": str(port)})
        for answer in (
            client.get("api/v1/query", params=query),
            client.post("api/v1/query", data=query),
        ):
            assert answer.status_code == 200
            (result,) = answer.json()["data"]["result"]
            assert result["value"][1] == "1"
        root = client.get("")
        assert root.is_redirect
        # It leads to where a browser finds it.
        assert str(root.url.join(root.headers["location"])).startswith(url)
        metrics = client.get("metrics", headers={"Accept-Encoding": "gzip"})
        assert metrics.headers["content-encoding"] == "gzip"
        assert "prometheus_build_info" in metrics.text
        assert client.get("-/ready").status_code == 200
        assert client.get("api/v1/query", params={"query": "{"}).status_code == 400


# -- old and new ---------------------------------------------------------------------------------------


def test_an_old_hub(
    far: FarCluster, people: People, pod: Path, hellos: str, tmp_path: Path
) -> None:
    """The original's user server, with a tunnel for each request, is understood by our service proxy."""
    with original_user_server(far, FIRST_PORT + 10) as old:
        for number, somebody in enumerate(people.everybody.values()):
            folder = tmp_path / str(number)
            folder.mkdir()
            for websockets in (False, True):
                kubectl = somebody.kubectl(old, folder, people.namespace, websockets=websockets)
                assert whoami(kubectl)["username"] == somebody.name
                assert kubectl.exec("talker", "cat", stdin=b"hello") == b"hello"
        assert "authentication failed" in old.refused("garbage")
        with old.client("of-the-service") as client:
            for reference in ("http:hello-world:8000", "https:hello-world-https:8443"):
                answer = client.get(old.service_url(reference, hellos, "a?b=c"))
                assert answer.json()["path"] == "/a?b=c"
            # What it takes for no port is for the service proxy to refuse.
            answer = client.get(old.service_url("hello-world", hellos))
            assert (answer.status_code, answer.text) == (400, "invalid request headers\n")
            # A spelling of the apiserver that it lets through.
            url = old.service_url("http:Kubernetes:0443", "Default", "version")
            answer = client.get(url)
            assert answer.status_code == 401


def test_an_old_cluster(
    far: FarCluster, people: People, pod: Path, hellos: str, tmp_path: Path
) -> None:
    """Our user server's requests say to the original's service proxy, each once, where they are to go."""
    old = far.at(OLD_CLUSTER)
    somebody = people.everybody["managed"]
    for websockets in (False, True):
        kubectl = somebody.kubectl(old, tmp_path, people.namespace, websockets=websockets)
        assert whoami(kubectl)["username"] == somebody.name
        assert kubectl.run("get", "pods", "-o", "name") == "pod/talker\n"
        assert kubectl.exec("talker", "cat", stdin=b"hello") == b"hello"
        with kubectl.start("logs", "-f", "talker") as running:
            running.until(rb"ready\n")
    for http2 in (False, True):
        with httpx.Client(
            verify=ssl.create_default_context(cafile=far.ca),
            http1=not http2,
            http2=http2,
            headers=[("Cluster-Proxy-Port", "1"), ("cluster_proxy_service", "evil")],
            trust_env=False,
            timeout=30,
        ) as client:
            far.expose({"namespace": hellos, "service": "hello-world"})
            answer = client.get(old.service_url("http:hello-world:8000", hellos, "a%2Fb?c=d"))
            told = answer.json()
            assert told["path"] == "/a%2Fb?c=d"
            said = {name: value for name, value in told["headers"] if "cluster" in name}
            assert said == {
                "cluster-proxy-proto": "http",
                "cluster-proxy-namespace": hellos,
                "cluster-proxy-service": "hello-world",
                "cluster-proxy-port": "8000",
            }


# -- without a user server -----------------------------------------------------------------------------


# Its program takes long to build, the first time.
@pytest.mark.timeout(400)
def test_client_go(far: FarCluster, people: People, pod: Path, tmp_path: Path) -> None:
    """A9: the documentation's snippet, with client-go, at the managed apiserver itself."""
    path = tmp_path / "kubeconfig"
    somebody = people.everybody["managed"]
    cluster = {
        "server": "https://unused.invalid",
        "certificate-authority": str(far.managed.ca),
        # The certificate is not for the name of the cluster.
        "tls-server-name": "kubernetes.default.svc",
    }
    path.write_text(
        json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "clusters": [{"name": "c", "cluster": cluster}],
                "users": [{"name": "u", "user": {"token": somebody.token}}],
            }
        )
    )
    programs = far.programs
    port = far.managed.server.rpartition(":")[2]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        command = (
            str(go_module_program("./cmd/docsnippet")),
            f"-proxy={LOOPBACK}:{programs.port}",
            f"-ca={programs.ca}",
            f"-cert={programs.client_cert}",
            f"-key={programs.client_key}",
            f"-kubeconfig={path}",
            f"-pods={people.namespace}",
            *options,
        )
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = run(f"-cluster={CLUSTER}:{port}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["v1.36.3", "talker"]
    # Who is nobody's cluster.
    done = run(f"-cluster=nobody:{port}")
    assert done.returncode == 1
    assert "No agent available" in done.stderr


def test_the_python_client(far: FarCluster, people: People, pod: Path) -> None:
    """Programs that can only dial themselves: ``clusterproxy forward`` is the apiserver's address for them."""
    port = far.managed.server.rpartition(":")[2]
    somebody = people.everybody["managed"]
    # The port is the agent's way to the apiserver; the name of the cluster chooses the agent.
    with far.programs.listener("forward", f"{CLUSTER}:{port}", "--listen", "0") as listener:
        # Of its types it has told part only.
        library: Any = kubernetes
        config = library.client.Configuration(host=f"https://{LOOPBACK}:{listener.port()}")
        config.ssl_ca_cert = str(far.managed.ca)
        config.tls_server_name = "kubernetes.default.svc"
        config.api_key = {"authorization": somebody.token}
        config.api_key_prefix = {"authorization": "Bearer"}
        config.proxy = None
        with library.client.ApiClient(config) as api:
            core = library.client.CoreV1Api(api)
            pods = core.list_namespaced_pod(people.namespace).items
            assert [each.metadata.name for each in pods] == ["talker"]
            review = library.client.AuthenticationV1Api(api).create_self_subject_review(
                library.client.V1SelfSubjectReview()
            )
            assert review.status.user_info.username == somebody.name
            maps = core.list_namespaced_config_map(people.namespace)
            watch = library.watch.Watch()
            core.create_namespaced_config_map(
                people.namespace, library.client.V1ConfigMap(metadata={"name": "by-python"})
            )
            for event in watch.stream(
                core.list_namespaced_config_map,
                people.namespace,
                resource_version=maps.metadata.resource_version,
                timeout_seconds=30,
            ):
                if event["object"].metadata.name == "by-python":
                    watch.stop()
            assert event["type"] == "ADDED"
            with pytest.raises(library.client.ApiException) as refused:
                core.list_node()
            assert refused.value.status == 403


@pytest.mark.usefixtures("pod")
def test_the_python_client_of_a_url(far: FarCluster, people: People, somebody: Somebody) -> None:
    """The user server's URL is the apiserver's address for it, and it executes commands by a WebSocket."""
    library: Any = kubernetes
    config = library.client.Configuration(host=far.url)
    config.ssl_ca_cert = far.ca
    config.api_key = {"authorization": somebody.token}
    config.api_key_prefix = {"authorization": "Bearer"}
    config.proxy = None
    with library.client.ApiClient(config) as api:
        core = library.client.CoreV1Api(api)
        review = library.client.AuthenticationV1Api(api).create_self_subject_review(
            library.client.V1SelfSubjectReview()
        )
        assert review.status.user_info.username == somebody.name
        told = library.stream.stream(
            core.connect_get_namespaced_pod_exec,
            "talker",
            people.namespace,
            command=["echo", "hello"],
            stdout=True,
            _preload_content=False,
        )
        told.run_forever(timeout=20)
        assert (told.read_stdout(), told.returncode) == ("hello\n", 0)
        # It closes nothing by itself.
        told.sock.shutdown()
        text = core.read_namespaced_pod_log("talker", people.namespace, limit_bytes=6)
        assert text == "ready\n"
