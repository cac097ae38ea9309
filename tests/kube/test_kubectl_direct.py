"""The real kubectl against an apiserver itself: what the same calls are compared with that go through proxies."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import httpx
import pytest
from http_peers import curl, http2_client, open_websocket
from websocket import WebSocketBadStatusException, WebSocketConnectionClosedException

from kube.containers import Command
from kube.control_plane import eventually
from kube.kubectl import Kubectl, KubectlError
from kube.node import WEBSOCKETS, Node
from kube.process_kubelet import ProcessKubelet

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kube.control_plane import ControlPlane

COMMANDS = {"/talker": Command((sys.executable, str(Path(__file__).with_name("talker.py"))))}
"""What a pod of :func:`talker` runs."""


def talker(namespace: str, name: str = "talker", **container: Any) -> dict[str, Any]:
    """Return a pod that says what it reads, and serves what it reads at port 8080."""
    volume = {"name": "data", "emptyDir": {}}
    spec = {
        "name": "main",
        "image": "talker",
        "command": ["/talker"],
        "stdin": True,
        "env": [
            {"name": "GREETING", "value": "hello"},
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        ],
        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
        "readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1},
        **container,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
        "spec": {"containers": [spec], "volumes": [volume], "terminationGracePeriodSeconds": 1},
    }


def ready(plane: ControlPlane, namespace: str, name: str = "talker") -> bool:
    """Whether a pod is ready."""
    pod = plane.get("v1", "Pod", name, namespace)
    conditions = (pod or {}).get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


@attrs.frozen
class Place:
    """A pod that talks, and who looks at it."""

    plane: ControlPlane
    kubelet: ProcessKubelet
    kubectl: Kubectl
    way: str


@pytest.fixture(scope="module", params=["spdy", "websocket-to-apiserver", "websocket-to-kubelet"])
def place(
    request: pytest.FixtureRequest, managed: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    namespace = managed.create_namespace()
    folder = tmp_path_factory.mktemp("pods")
    features = (WEBSOCKETS,) if request.param == "websocket-to-kubelet" else ()
    with (
        ProcessKubelet(managed, namespace, COMMANDS, folder) as kubelet,
        Node(kubelet, features),
    ):
        managed.apply(talker(namespace))
        eventually(lambda: ready(managed, namespace), "the pod is ready")
        kubectl = Kubectl(managed.admin_kubeconfig, namespace, websockets=request.param != "spdy")
        yield Place(managed, kubelet, kubectl, request.param)


def test_what_kubectl_gets(place: Place) -> None:
    assert place.kubectl.run("get", "pods", "-o", "name") == "pod/talker\n"
    assert "Client Version: v1.36.3" in place.kubectl.run("version")
    with pytest.raises(KubectlError, match=r'pods "other" not found') as failed:
        place.kubectl.run("get", "pod", "other")
    assert failed.value.status == 1


def test_exec(place: Place) -> None:
    kubectl = place.kubectl
    assert kubectl.exec("talker", "sh", "-c", "echo $GREETING; cat", stdin=b"a\0b") == (
        b"hello\na\0b"
    )
    data = os.urandom(3 << 20)
    assert kubectl.exec("talker", "tee", "/data/copy", stdin=data) == data
    assert kubectl.exec("talker", "cat", "/data/copy") == data
    with pytest.raises(KubectlError, match="command terminated with exit code 7") as failed:
        kubectl.exec("talker", "sh", "-c", "echo of the command >&2; exit 7")
    assert failed.value.status == 7
    assert "of the command" in failed.value.message
    with pytest.raises(KubectlError, match="exit code 137"):
        kubectl.exec("talker", "sh", "-c", "kill -9 $$")
    with pytest.raises(KubectlError, match=r'"nothing": executable file not found'):
        kubectl.exec("talker", "nothing")
    with pytest.raises(KubectlError, match="container other is not valid for pod talker"):
        kubectl.exec("talker", "true", container="other")


def test_streams_go_the_way_that_the_case_is_about(place: Place) -> None:
    before = _streams(place.plane)
    talking = attrs.evolve(place.kubectl, options=("--v=6",))
    with talking.start("exec", "talker", "--", "true") as running:
        assert running.wait() == 0
    # A WebSocket begins with GET; this kubectl asks for SPDY by POST.
    verbs = re.findall(rb'verb="(\w+)" url="[^"]*/exec\?', running.err)
    assert verbs == [b"POST" if place.way == "spdy" else b"GET"]
    after = _streams(place.plane)
    assert [kind for kind, n in after.items() if n > before.get(kind, 0)] == [
        "proxied_to_kubelet" if place.way == "websocket-to-kubelet" else "translated_at_apiserver"
    ]


def _streams(plane: ControlPlane) -> dict[str, float]:
    """Return how often the apiserver has served exec, by what it does with a WebSocket."""
    with httpx.Client(verify=plane.admin_tls, trust_env=False) as admin:
        text = admin.get(f"{plane.server}/metrics").text
    return {
        kind: float(n)
        for kind, n in re.findall(
            r'(?m)^apiserver_websocket_streaming_requests_total{proxy_type="(\w+)",subresource="exec"} (\S+)$',
            text,
        )
    }


def test_exec_goes_back_and_forth(place: Place) -> None:
    with place.kubectl.start("exec", "-i", "talker", "--", "cat") as running:
        for line in (b"one\n", b"two\n"):
            running.write(line)
            running.until(line)
        running.close_stdin()
        assert running.wait() == 0


def test_exec_on_a_terminal(place: Place) -> None:
    kubectl = place.kubectl
    # kubectl has a terminal only if it gets one. It tells the size of it once the process runs, perhaps after its first line.
    told = 'until test "$(stty size)" != "0 0"; do sleep 0.02; done; stty size; tty; exit 3'
    line = kubectl._command(("exec", "-it", "talker", "--", "sh", "-c", told))
    script = subprocess.run(
        (
            "script",
            "-qec",
            f"stty rows 33 cols 77; exec {' '.join(map(_quoted, line))}",
            os.devnull,
        ),
        env=kubectl._environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert b"33 77\r\n/dev/pts/" in script.stdout
    assert script.returncode == 3


def _quoted(word: str) -> str:
    return f"'{word}'"


def test_logs(place: Place) -> None:
    kubectl = place.kubectl
    assert kubectl.logs("talker").startswith("ready\n")
    with kubectl.start("logs", "-f", "talker", "--tail=1") as running:
        for word in ("a", "b"):
            with (place.kubelet.directory / "talker" / "main.stdin").open("w") as stdin:
                stdin.write(f"log {word}\n")
            running.until(rf"(?m)^log {word}\n".encode())
    assert kubectl.logs("talker", "--tail=2") == "log a\nlog b\n"
    assert kubectl.logs("talker", "--tail=0") == ""
    assert kubectl.logs("talker", "--limit-bytes=4") == "read"
    with pytest.raises(KubectlError, match="timestamps is not played"):
        kubectl.logs("talker", "--timestamps")


def test_attach(place: Place) -> None:
    with place.kubectl.start("attach", "-i", "talker") as running:
        # What was written before it was attached is not for it.
        eventually(lambda: _said_back(running), "it is attached")
        running.close_stdin()
    assert b"ready" not in running.out


def _said_back(running: Any) -> bool:
    running.write(b"attached\n")
    return b"attached\n" in running.out


def test_port_forward(place: Place) -> None:
    with place.kubectl.port_forward("pod/talker", 8080) as (port, running):
        data = os.urandom(1 << 20)
        url = f"http://127.0.0.1:{port}/"
        for _ in range(3):
            assert httpx.post(url, content=data, trust_env=False).content == data
        assert running.process.poll() is None
    with place.kubectl.port_forward("pod/talker", 9) as (port, running):
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)
        eventually(
            lambda: b"failed to connect to port 9 of pod" in running.err, "it says what is wrong"
        )


def test_copy(place: Place, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "file").write_bytes(content := os.urandom(1 << 20))
    place.kubectl.copy(str(source), "talker:there")
    place.kubectl.copy("talker:there", str(tmp_path / "back"))
    assert (tmp_path / "back" / "deep" / "file").read_bytes() == content
    archive = place.kubectl.exec("talker", "tar", "cf", "-", "there")
    with tarfile.open(fileobj=io.BytesIO(archive)) as found:
        assert "there/deep/file" in found.getnames()


def test_other_clients(managed: ControlPlane, place: Place) -> None:
    namespace = place.kubectl.namespace
    secret = managed.token_for(namespace, "default")
    managed.apply(
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "everything", "namespace": namespace},
            "roleRef": {
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "cluster-admin",
            },
            "subjects": [{"kind": "ServiceAccount", "name": "default", "namespace": namespace}],
        }
    )
    identity = {"Authorization": f"Bearer {secret}"}
    pods = f"{managed.server}/api/v1/namespaces/{namespace}/pods"
    for version in ("1.1", "2"):
        found = curl(
            pods, f"--http{version}", "--header", f"Authorization: Bearer {secret}", ca=managed.ca
        )
        assert (found.status, found.version, found.error) == (200, version, "")
        assert found.headers["content-type"] == ["application/json"]
        assert json.loads(found.body)["kind"] == "PodList"
    assert "SSL certificate problem" in curl(pods).error
    with http2_client(managed.ca) as client:
        answer = client.get(pods, headers=identity)
        assert (answer.status_code, answer.http_version) == (200, "HTTP/2")

    command = "?command=echo&command=hi&stdout=true&stderr=true"
    url = f"{pods}/talker/exec{command}".replace("https:", "wss:")
    with contextlib.closing(
        open_websocket(url, managed.ca, protocols=("v4.channel.k8s.io",), headers=identity)
    ) as stream:
        assert stream.getsubprotocol() == "v4.channel.k8s.io"
        frames: list[str | bytes] = []
        # It ends without a word.
        with contextlib.suppress(WebSocketConnectionClosedException):
            while True:
                frames.append(stream.recv())
    frames = [frame for frame in frames if len(frame) > 1]
    assert b"\x01hi\n" in frames
    assert json.loads(frames[-1][1:])["status"] == "Success"
    with pytest.raises(WebSocketBadStatusException) as refused:
        open_websocket(url, managed.ca)
    assert refused.value.status_code == 403


def test_streams_end_with_the_container_and_the_pod(place: Place) -> None:
    namespace = place.kubectl.namespace
    place.plane.apply(talker(namespace, "mortal"))
    eventually(lambda: ready(place.plane, namespace, "mortal"), "the pod is ready")
    kubectl = place.kubectl
    with (
        kubectl.start("logs", "-f", "mortal") as logs,
        kubectl.start("exec", "mortal", "--", "sh", "-c", "echo $$; exec sleep 600") as execution,
        kubectl.start("attach", "-i", "mortal") as attached,
    ):
        logs.until(b"ready\n")
        eventually(lambda: _said_back(attached), "it is attached")
        pid = int(execution.until(rb"(\d+)\n")[1])
        told = json.loads((place.kubelet.directory / "mortal.json").read_text())
        os.kill(told["containers"]["main"]["pid"], signal.SIGKILL)
        assert logs.wait() == 0
        assert execution.wait() == 137
        attached.wait()
        eventually(lambda: not os.path.exists(f"/proc/{pid}"), "the command has ended")
    eventually(lambda: ready(place.plane, namespace, "mortal"), "it is restarted")
    with kubectl.start("exec", "mortal", "--", "sleep", "600") as execution:
        kubectl.run("delete", "pod", "mortal")
        assert execution.wait() != 0
    with pytest.raises(KubectlError, match=r'pods "mortal" not found'):
        kubectl.logs("mortal")


def test_node_serves_only_its_apiserver_and_ends_with_its_commands(
    managed: ControlPlane, tmp_path: Path
) -> None:
    namespace = managed.create_namespace()
    with ProcessKubelet(managed, namespace, COMMANDS, tmp_path) as kubelet:
        managed.apply(talker(namespace))
        eventually(lambda: ready(managed, namespace), "the pod is ready")
        kubectl = Kubectl(managed.admin_kubeconfig, namespace)
        with pytest.raises(KubectlError, match=f'"{kubelet.node}" not found'):
            kubectl.logs("talker")
        with Node(kubelet) as node:
            url = f"https://127.0.0.1:{node.port}/healthz"
            trust = ssl.create_default_context(cafile=managed.ca)
            with pytest.raises(httpx.TransportError):
                httpx.get(url, verify=trust, trust_env=False)
            assert httpx.get(url, verify=managed.admin_tls, trust_env=False).text == "ok"
            with kubectl.start(
                "exec", "talker", "--", "sh", "-c", "echo $$; exec sleep 600"
            ) as run:
                pid = int(run.until(rb"(\d+)\n")[1])
                assert os.path.exists(f"/proc/{pid}")
        eventually(lambda: not os.path.exists(f"/proc/{pid}"), "the command has ended")
