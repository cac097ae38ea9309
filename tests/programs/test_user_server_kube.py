"""The user server before the real service proxy and real apiservers: what the end-to-end rows say (A11 to A18).

What kubectl does in a far cluster, and the commands of docs/kubectl.md.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import httpx
import pytest
import trustme
from certificates import write_pair
from cluster import LOOPBACK, wait_until
from kube.build import kubectl_command
from kube.control_plane import eventually
from kube.kubectl import Kubectl, KubectlError
from kube.node import Node
from kube.process_kubelet import ProcessKubelet
from kube.test_kubectl_direct import COMMANDS, ready, talker
from user_server_stage import CONFIG_MAP, SERVICE_PROXY_PORT, Hub

from clusterproxy.tunnel.agent_identity import service_proxy_host

if TYPE_CHECKING:
    from collections.abc import Generator

    from kube.control_plane import ControlPlane, Object

pytestmark = pytest.mark.programs

FIRST_PORT: Final = 27480
ADDRESS: Final = "127.0.48.1"
CLUSTER: Final = "loopback"

GUIDE: Final = Path(__file__).parents[2] / "docs" / "kubectl.md"

# The folder of a pod's account is no flag: a pod has one.
_SERVICE_PROXY: Final = """
import json, sys, trio
from clusterproxy.service_proxy.config import ServiceProxyConfig
from clusterproxy.service_proxy.program import run_service_proxy
config = ServiceProxyConfig(**json.loads(sys.argv[1]))
config.validate()
raise SystemExit(trio.run(run_service_proxy, config))
"""


def account(plane: ControlPlane, namespace: str, name: str) -> None:
    plane.apply(
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": name, "namespace": namespace},
        }
    )


def role(
    plane: ControlPlane,
    namespace: str,
    name: str,
    *rules: Object,
    to: str = "",
    cluster_wide: bool = False,
) -> None:
    """Give an account of the namespace (of the role's name, by default) these rights."""
    kind = "ClusterRole" if cluster_wide else "Role"
    # Names of what is not in a namespace are everybody's.
    metadata = {"name": f"{namespace}-{name}"} | ({} if cluster_wide else {"namespace": namespace})
    subject = {"kind": "ServiceAccount", "name": to or name, "namespace": namespace}
    group = "rbac.authorization.k8s.io"
    api = {"apiVersion": f"{group}/v1"}
    plane.apply(
        {**api, "kind": kind, "metadata": metadata, "rules": list(rules)},
        {
            **api,
            "kind": f"{kind}Binding",
            "metadata": metadata,
            "roleRef": {"apiGroup": group, "kind": kind, "name": metadata["name"]},
            "subjects": [subject],
        },
    )


def rule(resources: str, verbs: str, group: str = "", names: tuple[str, ...] = ()) -> Object:
    named = {"resourceNames": list(names)} if names else {}
    return {
        "apiGroups": [group],
        "resources": resources.split(),
        "verbs": verbs.split(),
        **named,
    }


def start_service_proxy(
    directory: Path, authority: trustme.CA, hub: ControlPlane, managed: ControlPlane, home: str
) -> subprocess.Popen[bytes]:
    """Start the program with the rights that the agent's chart gives it."""
    account(managed, home, "cluster-proxy")
    role(
        managed,
        home,
        "cluster-proxy",
        rule("tokenreviews", "create", "authentication.k8s.io"),
        rule("users groups", "impersonate"),
        cluster_wide=True,
    )
    role(managed, home, "profile", rule("configmaps", "get list watch"), to="cluster-proxy")
    at_hub = hub.create_namespace()
    account(hub, at_hub, "agent")
    role(
        hub,
        at_hub,
        "agent",
        rule("tokenreviews", "create", "authentication.k8s.io"),
        cluster_wide=True,
    )
    own = directory / "own-account"
    own.mkdir()
    (own / "token").write_text(managed.token_for(home, "cluster-proxy"))
    (own / "ca.crt").write_bytes(managed.ca.read_bytes())
    cert, key = write_pair(authority, directory, "service-proxy", service_proxy_host(CLUSTER))
    config = {
        "cert": cert,
        "key": key,
        "bind_address": ADDRESS,
        "port": SERVICE_PROXY_PORT,
        "health_port": FIRST_PORT + 9,
        "hub_kubeconfig": str(hub.kubeconfig_for(at_hub, "agent")),
        "kubeconfig": str(managed.kubeconfig_for(home, "cluster-proxy")),
        "kube_api_address": managed.server.removeprefix("https://"),
        "service_account": str(own),
        "pod_namespace": home,
    }
    with (directory / "service-proxy.log").open("wb") as log:
        return subprocess.Popen(
            (sys.executable, "-c", _SERVICE_PROXY, json.dumps(config)), stdout=log, stderr=log
        )


@attrs.frozen
class Far:
    """A cluster behind the tunnel.

    Attributes:
      url: of the cluster at the user server.
      ca: the file with the CA of the user server.
      home: the namespace of the user server at the hub.
    """

    hub: ControlPlane
    managed: ControlPlane
    programs: Hub
    url: str
    ca: str
    home: str

    def client(self, token: str, **headers: str) -> httpx.Client:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.Client(
            base_url=f"{self.url}/",
            verify=self._context(),
            headers={"Authorization": f"Bearer {token}", **named},
            timeout=30,
            trust_env=False,
        )

    def _context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=self.ca)

    def kubectl(self, directory: Path, token: str, namespace: str, **options: Any) -> Kubectl:
        path = directory / f"far-{namespace}.kubeconfig"
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "far",
                    "contexts": [{"name": "far", "context": {"cluster": "far", "user": "u"}}],
                    "clusters": [
                        {
                            "name": "far",
                            "cluster": {"server": self.url, "certificate-authority": self.ca},
                        }
                    ],
                    "users": [{"name": "u", "user": {"token": token}}],
                }
            )
        )
        return Kubectl(path, namespace, **options)


@pytest.fixture(scope="module")
def far(
    tmp_path_factory: pytest.TempPathFactory, hub: ControlPlane, managed: ControlPlane
) -> Generator[Far]:
    directory = tmp_path_factory.mktemp("far")
    authority = trustme.CA()
    home = hub.create_namespace()
    # The rights that the chart gives (templates/user-rbac.yaml).
    account(hub, home, "cluster-proxy-addon-user")
    role(
        hub,
        home,
        "cluster-proxy-addon-user",
        rule("configmaps", "get list watch", names=("ocm-tls-profile", CONFIG_MAP)),
    )
    programs = Hub(
        directory,
        FIRST_PORT,
        authority,
        kubeconfig=hub.kubeconfig_for(home, "cluster-proxy-addon-user"),
        clusters={CLUSTER: ADDRESS},
        namespace=home,
    )
    with contextlib.ExitStack() as opened:
        opened.callback(programs.close)
        process = start_service_proxy(
            directory, authority, hub, managed, managed.create_namespace()
        )
        opened.callback(process.wait)
        opened.callback(process.kill)
        programs.start()
        far = Far(
            hub,
            managed,
            programs,
            f"https://{LOOPBACK}:{programs.user_port}/{CLUSTER}",
            programs.service_proxy_ca,
            home,
        )

        def up() -> bool:
            assert process.poll() is None, (directory / "service-proxy.log").read_text()
            with far.client("none") as client:
                return client.get("healthz").status_code != 502

        wait_until(up, "the service proxy answers")
        yield far


class User:
    """An account of the managed cluster that may do everything with pods and ConfigMaps in one namespace."""

    def __init__(self, far: Far) -> None:
        self.namespace = far.managed.create_namespace()
        account(far.managed, self.namespace, "user")
        role(
            far.managed,
            self.namespace,
            "user",
            rule("pods pods/log pods/exec pods/portforward pods/attach configmaps", "*"),
        )
        self.token = far.managed.token_for(self.namespace, "user")

    @property
    def name(self) -> str:
        return f"system:serviceaccount:{self.namespace}:user"


@pytest.fixture(scope="module")
def user(far: Far) -> User:
    return User(far)


def review(client: httpx.Client) -> httpx.Response:
    return client.post(
        "apis/authentication.k8s.io/v1/selfsubjectreviews",
        json={"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"},
    )


def test_what_an_account_may(far: Far, user: User) -> None:
    """A11, A13, A14, A12."""
    with far.client(user.token) as client:
        allowed = client.get(f"api/v1/namespaces/{user.namespace}/pods")
        assert (allowed.status_code, allowed.json()["kind"]) == (200, "PodList")
        other = client.get("api/v1/namespaces/kube-system/pods")
        assert (other.status_code, other.json()["reason"]) == (403, "Forbidden")
        assert user.name in other.json()["message"]
        assert review(client).json()["status"]["userInfo"]["username"] == user.name
        unknown = client.get(f"{far.url.removesuffix(CLUSTER)}nobody/api")
        assert unknown.status_code == 502
    with far.client("nonsense") as client:
        assert client.get("api/v1/namespaces/default/pods").status_code == 401


def test_impersonation_by_the_client(far: Far, user: User) -> None:
    """A15"""
    managed, namespace = far.managed, user.namespace
    account(managed, namespace, "impersonator")
    role(
        managed,
        namespace,
        "impersonator",
        rule("users", "impersonate", names=("alice",)),
        cluster_wide=True,
    )
    token = managed.token_for(namespace, "impersonator")
    with far.client(token, Impersonate_User="alice") as client:
        assert review(client).json()["status"]["userInfo"]["username"] == "alice"
    with far.client(token, Impersonate_User="bob") as client:
        assert review(client).status_code == 403
    with far.client(user.token, Impersonate_User="alice") as client:
        assert review(client).status_code == 403
        # What a client says of one hop takes nothing away from what is said of the target.
        answer = client.get("version", headers={"Connection": "cluster-proxy-service, close"})
        assert answer.status_code in {200, 403}


def test_a_hubs_account(far: Far) -> None:
    """Known there as the hub's, with the rights that this name has been given."""
    namespace = far.hub.create_namespace()
    with far.client(far.hub.token_for(namespace, "default")) as client:
        info = review(client).json()["status"]["userInfo"]
        assert info["username"] == f"cluster:hub:system:serviceaccount:{namespace}:default"


def test_watch(far: Far, user: User) -> None:
    """A17: an event arrives while the watch is open."""
    path = f"api/v1/namespaces/{user.namespace}/configmaps"
    with (
        far.client(user.token) as client,
        client.stream("GET", f"{path}?watch=1&resourceVersion=0") as events,
    ):
        assert events.status_code == 200
        created = threading.Timer(
            0.2,
            lambda: far.managed.apply(
                {
                    "apiVersion": "v1",
                    "kind": "ConfigMap",
                    "metadata": {"name": "later", "namespace": user.namespace},
                }
            ),
        )
        created.start()
        for line in events.iter_lines():
            event = json.loads(line)
            if event["object"]["metadata"]["name"] == "later":
                assert event["type"] == "ADDED"
                break
        created.join()


def test_a_service_that_is_exposed(far: Far, user: User) -> None:
    """A21, and the way of one that is exposed as far as the service proxy."""
    exposed = f"/api/v1/namespaces/{user.namespace}/services/http:web:8080/proxy-service/"
    with far.client(user.token) as client:
        answer = client.get(exposed.removeprefix("/"))
        assert answer.status_code == 403
        assert answer.text.startswith(
            f"service {user.namespace}/web is not in the exposed services allowlist\n"
        )
        entry = answer.text.splitlines()[-1]
        far.hub.apply(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": CONFIG_MAP, "namespace": far.home},
                "data": {"services": entry},
            }
        )
        # There is no DNS here: the service proxy does not find it.
        wait_until(
            lambda: client.get(exposed.removeprefix("/")).status_code == 502, "it is exposed"
        )


@pytest.fixture(scope="module")
def pod(far: Far, user: User, tmp_path_factory: pytest.TempPathFactory) -> Generator[None]:
    with (
        ProcessKubelet(
            far.managed, user.namespace, COMMANDS, tmp_path_factory.mktemp("pods")
        ) as kubelet,
        Node(kubelet),
    ):
        far.managed.apply(talker(user.namespace))
        eventually(lambda: ready(far.managed, user.namespace), "the pod is ready")
        yield


@pytest.mark.usefixtures("pod")
@pytest.mark.parametrize("websockets", [False, True], ids=["spdy", "websocket"])
def test_kubectl(far: Far, user: User, tmp_path: Path, websockets: bool) -> None:
    """A16, A18, and what else kubectl does."""
    kubectl = far.kubectl(tmp_path, user.token, user.namespace, websockets=websockets)
    assert kubectl.run("get", "pods", "-o", "name") == "pod/talker\n"
    assert user.name in kubectl.run("auth", "whoami")
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "applied"},
        "data": {"a": "b"},
    }
    kubectl.run("apply", "-f", "-", stdin=json.dumps(config_map).encode())
    assert kubectl.run("get", "configmap", "applied", "-o", "jsonpath={.data.a}") == "b"
    with pytest.raises(KubectlError, match="orbidden"):
        kubectl.run("get", "secrets")
    assert kubectl.exec("talker", "cat", stdin=b"hello") == b"hello"
    with kubectl.start("logs", "-f", "talker") as running:
        running.until(rb"ready\n")
    with (
        kubectl.port_forward("pod/talker", 8080) as (port, _),
        httpx.Client(trust_env=False) as client,
    ):
        assert client.post(f"http://{LOOPBACK}:{port}/", content=b"echo").content == b"echo"
    (tmp_path / "file").write_bytes(os.urandom(100_000))
    kubectl.copy(str(tmp_path / "file"), "talker:copied")
    kubectl.copy("talker:copied", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == (tmp_path / "file").read_bytes()


@pytest.mark.usefixtures("pod")
def test_the_guide(far: Far, user: User, tmp_path: Path) -> None:
    """Its commands are run in order, with the hub and the managed cluster as contexts of one kubeconfig."""
    namespace = "open-cluster-management-addon"
    hub = far.hub
    hub.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}},
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "proxy-server-ca", "namespace": namespace},
            "data": {"ca.crt": base64.b64encode(Path(far.ca).read_bytes()).decode()},
        },
    )
    (tmp_path / "bin").mkdir()
    shim = tmp_path / "bin" / "kubectl"
    shim.write_text(f'#!/bin/sh\nexec {shlex.join(kubectl_command())} "$@"\n')
    shim.chmod(0o755)
    contexts = {"hub": hub, CLUSTER: far.managed}
    merged: Object = {"apiVersion": "v1", "kind": "Config"}
    for key in ("clusters", "users", "contexts"):
        merged[key] = []
        for name, plane in contexts.items():
            found = json.loads(plane.admin_kubeconfig.read_text())[key][0]
            found["name"] = name
            if key == "contexts":
                found["context"] = {"cluster": name, "user": name}
            merged[key].append(found)
    (tmp_path / "config").write_text(json.dumps(merged))
    blocks = re.findall(r"^```sh\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    script = "".join(blocks)
    # What is another one for each reader.
    for told, here in (
        ("USER_SERVER=localhost:9092", f"USER_SERVER={LOOPBACK}:{far.programs.user_port}"),
        ("CLUSTER=cluster1", f"CLUSTER={CLUSTER}"),
        ("--context cluster1-admin", f"--context {CLUSTER}"),
        ("NAMESPACE=default", f"NAMESPACE={user.namespace}"),
    ):
        assert told in script, told
        script = script.replace(told, here)
    done = subprocess.run(
        ("bash", "-euo", "pipefail", "-c", script),
        cwd=tmp_path,
        env={
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "HOME": str(tmp_path),
            "KUBECONFIG": str(tmp_path / "config"),
        },
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "talker" in done.stdout
    assert f"system:serviceaccount:{user.namespace}:viewer" in done.stdout
