"""Ports of pods through a real apiserver and a kubelet's own code, in each way that apiservers have for it."""

from __future__ import annotations

import logging
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import attrs
import pytest
import trio

from clusterproxy.addon_agent.library import forward_to_pods
from clusterproxy.addon_agent.pod_stream import PodPort, PodStreamError, open_pod_stream
from clusterproxy.kube.client import open_kube_api
from kube.containers import Command
from kube.control_plane import eventually
from kube.installation import RBAC
from kube.node import WEBSOCKETS, Node
from kube.process_kubelet import ProcessKubelet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from clusterproxy.kube.client import KubeClient
    from kube.control_plane import ControlPlane

pytestmark = pytest.mark.timeout(120)

Object = dict[str, Any]

ECHO: Final = 7001
TALK: Final = 7002
NOBODY: Final = 9

# Port 7001 says what it hears, and "bye" after the end; 7002 says a lot and the end first, and then listens.
PROGRAM: Final = f"""
import os, socket, threading

def echo(sock):
    while data := sock.recv(65536):
        sock.sendall(data)
    sock.sendall(b"bye " + os.environ["POD_NAME"].encode())
    print("end of echo", flush=True)

def talk(sock):
    sock.sendall(b"x" * {4 << 20})
    sock.shutdown(socket.SHUT_WR)
    heard = 0
    while data := sock.recv(65536):
        heard += len(data)
    print("heard", heard, flush=True)

def serve(sock, function):
    with sock:
        try:
            function(sock)
        except OSError as error:
            print(error, flush=True)

def listen(port, function):
    listener = socket.create_server((os.environ["POD_IP"], port))
    while True:
        sock, _ = listener.accept()
        threading.Thread(target=serve, args=(sock, function), daemon=True).start()

threading.Thread(target=listen, args=({ECHO}, echo), daemon=True).start()
listen({TALK}, talk)
"""
COMMANDS: Final = {"/echo": Command((sys.executable, "-u", "-c", PROGRAM))}


def pod(namespace: str, name: str, **container: Any) -> Object:
    fields = {"POD_NAME": "metadata.name", "POD_IP": "status.podIP"}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": "echo"}},
        "spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "main",
                    "image": "echo",
                    "command": ["/echo"],
                    "env": [
                        {"name": key, "valueFrom": {"fieldRef": {"fieldPath": path}}}
                        for key, path in fields.items()
                    ],
                    "readinessProbe": {"tcpSocket": {"port": ECHO}, "periodSeconds": 1},
                    **container,
                }
            ],
        },
    }


def is_ready(plane: ControlPlane, namespace: str, name: str) -> bool:
    found = plane.get("v1", "Pod", name, namespace) or {}
    conditions = found.get("status", {}).get("conditions", ())
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def allow(plane: ControlPlane, namespace: str, verbs: list[str]) -> Path:
    """Return a kubeconfig of somebody who may do what agents may, with these verbs for port-forward."""
    account = {"name": "forwarder", "namespace": namespace}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "forwarder"}
    plane.apply(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account},
        {
            "apiVersion": RBAC,
            "kind": "Role",
            "metadata": account,
            "rules": [
                {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list"]},
                {"apiGroups": [""], "resources": ["pods/portforward"], "verbs": verbs},
            ],
        },
        {
            "apiVersion": RBAC,
            "kind": "RoleBinding",
            "metadata": account,
            "roleRef": reference,
            "subjects": [{"kind": "ServiceAccount", **account}],
        },
    )
    return plane.kubeconfig_for(namespace, "forwarder")


@attrs.frozen
class Place:
    """A pod with two ports, and who may reach them."""

    plane: ControlPlane
    namespace: str
    kubelet: ProcessKubelet
    kubeconfig: Path
    way: str

    def port(self, port: int, name: str = "echo") -> PodPort:
        return PodPort(self.namespace, name, port)

    def log(self) -> str:
        return self.kubelet.log("echo")


# The last one as on apiservers before 1.31: no WebSockets, here because "get" is not allowed.
@pytest.fixture(scope="module", params=["websocket-to-kubelet", "websocket-to-apiserver", "spdy"])
def place(
    request: pytest.FixtureRequest, managed: ControlPlane, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    namespace = managed.create_namespace()
    features = (WEBSOCKETS,) if request.param == "websocket-to-kubelet" else ()
    # From 1.35 on WebSockets need "create" as well.
    verbs = ["create"] if request.param == "spdy" else ["get", "create"]
    kubeconfig = allow(managed, namespace, verbs)
    folder = tmp_path_factory.mktemp("pods")
    with ProcessKubelet(managed, namespace, COMMANDS, folder) as kubelet, Node(kubelet, features):
        managed.apply(pod(namespace, "echo"))
        eventually(lambda: is_ready(managed, namespace, "echo"), "the pod is ready")
        yield Place(managed, namespace, kubelet, kubeconfig, request.param)


@pytest.fixture
async def api(place: Place) -> AsyncIterator[KubeClient]:
    async with open_kube_api(str(place.kubeconfig)) as client:
        yield client


async def test_there_and_back(
    place: Place, api: KubeClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "clusterproxy.addon_agent")
    async with open_pod_stream(api, place.port(ECHO)) as stream:
        for word in (b"hello", b"again"):
            await stream.send_all(word)
            assert await stream.receive_some() == word
        # The other direction goes on after the end of this one.
        await stream.send_eof()
        assert await receive_all(stream) == b"bye echo"
        assert await stream.receive_some() == b""
    assert ("no WebSocket" in caplog.text) == (place.way == "spdy")
    assert "is forbidden" in caplog.text or place.way != "spdy"


async def test_much_in_both_directions(place: Place, api: KubeClient) -> None:
    data = os.urandom(8 << 20)
    async with open_pod_stream(api, place.port(ECHO)) as stream, trio.open_nursery() as nursery:

        async def send() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        nursery.start_soon(send)
        received = await receive_all(stream)
    assert received == data + b"bye echo"


async def test_all_arrives_that_a_pod_says_before_it_ends(place: Place, api: KubeClient) -> None:
    async with open_pod_stream(api, place.port(TALK)) as stream:
        await stream.send_all(b"y" * 70_000)
        assert await receive_all(stream) == b"x" * (4 << 20)
        # A kubelet carries nothing to the pod any more then.
        assert stream.over


async def test_nobody_listens(place: Place, api: KubeClient) -> None:
    told = "failed to connect to port 9 of pod"
    # The kubelet may know it before the streams are open, or after.
    with pytest.raises((PodStreamError, trio.BrokenResourceError), match=told):
        async with open_pod_stream(api, place.port(NOBODY)) as stream:
            await receive_all(stream)


async def test_no_such_pod(place: Place, api: KubeClient) -> None:
    with pytest.raises(PodStreamError, match=r'/other:7001: pods "other" not found'):
        async with open_pod_stream(api, place.port(ECHO, "other")):
            raise AssertionError


async def test_a_stalled_stream_disturbs_no_other(place: Place, api: KubeClient) -> None:
    sent = 0
    async with (
        open_pod_stream(api, place.port(TALK)),
        open_pod_stream(api, place.port(ECHO)) as stalled,
        open_pod_stream(api, place.port(ECHO)) as stream,
        trio.open_nursery() as nursery,
    ):

        async def send_without_end() -> None:
            nonlocal sent
            while True:
                await stalled.send_all(bytes(1 << 20))
                sent += 1

        # Nobody reads what it echoes, and nobody reads the first one.
        nursery.start_soon(send_without_end)
        before = -1
        while before != sent:
            before = sent
            await trio.sleep(0.5)
        with trio.fail_after(10):
            for _ in range(100):
                await stream.send_all(b"hello")
                assert await stream.receive_some() == b"hello"
        assert sent == before
        nursery.cancel_scope.cancel()


async def test_the_end_of_the_block_ends_it_at_the_pod(place: Place, api: KubeClient) -> None:
    before = place.log().count("end of echo")
    async with open_pod_stream(api, place.port(ECHO)) as stream:
        await stream.send_all(b"hello")
        assert await stream.receive_some() == b"hello"
    await until(lambda: place.log().count("end of echo") > before)
    with trio.move_on_after(0.2) as scope:
        async with open_pod_stream(api, place.port(ECHO)) as stream:
            await stream.receive_some()
    assert scope.cancelled_caught
    await until(lambda: place.log().count("end of echo") > before + 1)


async def test_a_local_port(place: Place, api: KubeClient) -> None:
    async with forward_to_pods(api, place.namespace, "app=echo", ECHO) as port:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"hello")
            assert await stream.receive_some() == b"hello"
            await stream.send_eof()
            assert await receive_all(stream) == b"bye echo"
        # As many as there are, each by itself.
        async with trio.open_nursery() as nursery:
            for number in range(10):
                nursery.start_soon(converse, port, str(number).encode() * 100_000)
    with pytest.raises(OSError, match="all attempts to connect"):
        await trio.open_tcp_stream("127.0.0.1", port)


async def converse(port: int, words: bytes) -> None:
    async with (
        await trio.open_tcp_stream("127.0.0.1", port) as stream,
        trio.open_nursery() as nursery,
    ):

        async def send() -> None:
            await stream.send_all(words)
            await stream.send_eof()

        nursery.start_soon(send)
        assert await receive_all(stream) == words + b"bye echo"


async def test_it_is_told_why_a_local_port_leads_nowhere(
    place: Place, api: KubeClient, caplog: pytest.LogCaptureFixture
) -> None:
    # A program's own level. The kubelet may know it before the streams are open, or after.
    caplog.set_level(logging.INFO, "clusterproxy")
    for selector, port, why in (
        ("app=other", ECHO, f"no pod with app=other runs in the namespace {place.namespace}"),
        ("app=echo", NOBODY, "failed to connect to port 9"),
    ):
        async with (
            forward_to_pods(api, place.namespace, selector, port) as local,
            await trio.open_tcp_stream("127.0.0.1", local) as stream,
        ):
            assert await receive_all(stream) == b""
            assert why in caplog.text


async def receive_all(stream: trio.abc.ReceiveStream) -> bytes:
    received = bytearray()
    with trio.fail_after(30):
        async for data in stream:
            received += data
    return bytes(received)


async def until(probe: Any) -> None:
    await trio.to_thread.run_sync(partial(eventually, probe, "it comes true"))
