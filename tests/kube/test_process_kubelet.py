"""What plays nodes and services behaves as they do."""

from __future__ import annotations

import base64
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx
import pytest

from kube.containers import Command
from kube.control_plane import eventually
from kube.process_kubelet import ProcessKubelet
from kube.service_relay import ServiceRelay, backends
from kube.volumes import expanded, moved, publish

if TYPE_CHECKING:
    from kube.control_plane import ControlPlane

COMMANDS = {
    "/page": Command((sys.executable, str(Path(__file__).with_name("page.py")))),
    "/sleep": Command(("sleep",)),
    "/false": Command(("false",)),
}


def secret(namespace: str, text: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": "page", "namespace": namespace},
        "data": {"text": base64.b64encode(text.encode()).decode()},
    }


def deployment(namespace: str, version: str, **pod: Any) -> dict[str, Any]:
    labels = {"app": "page"}
    container = {
        "name": "page",
        "image": "page",
        "command": ["/page"],
        "args": ["--file", "/etc/page/text", "$(VERSION)"],
        "env": [
            {"name": "VERSION", "value": version},
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        ],
        "ports": [{"name": "http", "containerPort": 8080}],
        "volumeMounts": [{"name": "text", "mountPath": "/etc/page"}],
        "readinessProbe": {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 1},
        "lifecycle": {"preStop": {"exec": {"command": ["/sleep", "1.5"]}}},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "page", "namespace": namespace},
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": labels},
            "strategy": {"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": {
                "metadata": {"labels": labels},
                "spec": {
                    "containers": [container],
                    "volumes": [{"name": "text", "secret": {"secretName": "page"}}],
                    **pod,
                },
            },
        },
    }


def service(namespace: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "page", "namespace": namespace},
        "spec": {
            "selector": {"app": "page"},
            "ports": [{"name": "web", "port": 8000, "targetPort": "http"}],
        },
    }


def rolled_out(plane: ControlPlane, namespace: str) -> bool:
    found = plane.get("apps/v1", "Deployment", "page", namespace)
    assert found is not None
    status, wanted = found.get("status", {}), found["spec"]["replicas"]
    return bool(
        status.get("observedGeneration") == found["metadata"]["generation"]
        and status.get("updatedReplicas") == status.get("readyReplicas") == wanted
        and status.get("replicas") == wanted
    )


class SteadyRequests:
    """Requests through a Service, one after another, each by a connection of its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.versions: list[str] = []
        self.failures: list[Exception] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                answer = httpx.get(self.url, trust_env=False, timeout=5)
                self.versions.append(answer.json()["arguments"][0])
            except (httpx.HTTPError, ValueError) as error:
                self.failures.append(error)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_deployment_rolls_over_without_a_failed_request(hub: ControlPlane, tmp_path: Path) -> None:
    namespace = hub.create_namespace()
    hub.apply(service(namespace), deployment(namespace, "one"))
    with ProcessKubelet(hub, namespace, COMMANDS, tmp_path) as kubelet:
        # Pods wait for their secret, and say so.
        eventually(
            lambda: any(
                "Secret page not found" in str(pod.get("status"))
                for pod in hub.list("v1", "Pod", namespace)
            ),
            "the pods wait",
        )
        hub.apply(secret(namespace, "first"))
        eventually(lambda: rolled_out(hub, namespace), "the first pods are ready")
        with ServiceRelay(hub, namespace, "page", delay_s=0.5) as relay:
            url = f"http://{relay.address}:8000/"
            with SteadyRequests(url) as requests:
                hub.apply(deployment(namespace, "two"))
                eventually(lambda: rolled_out(hub, namespace), "the new pods are ready")
                eventually(lambda: requests.versions[-20:] == ["two"] * 20, "only they answer")
                eventually(
                    lambda: len(hub.list("v1", "Pod", namespace)) == 2, "the old pods are gone"
                )
            assert requests.failures == []
            assert requests.versions[0] == "one"

            before = {pod["metadata"]["name"] for pod in hub.list("v1", "Pod", namespace)}
            hub.apply(secret(namespace, "second"))
            eventually(
                lambda: httpx.get(url, trust_env=False).json()["text"] == "second",
                "a change of the secret arrives",
            )
            assert httpx.get(url, trust_env=False).json()["pod"] in before
        pids = kubelet.pids()
    assert pids
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_container_that_dies_is_restarted_in_its_pod(hub: ControlPlane, tmp_path: Path) -> None:
    namespace = hub.create_namespace()
    hub.apply(secret(namespace, "text"), deployment(namespace, "one"))
    with ProcessKubelet(hub, namespace, COMMANDS, tmp_path) as kubelet:
        eventually(lambda: rolled_out(hub, namespace), "the pods are ready")
        os.kill(kubelet.pids()[0], signal.SIGKILL)

        def restarts() -> dict[int, dict[str, Any]]:
            pods = hub.list("v1", "Pod", namespace)
            statuses = [pod["status"]["containerStatuses"][0] for pod in pods]
            return {status["restartCount"]: status for status in statuses}

        eventually(lambda: restarts().keys() == {0, 1}, "one is restarted")
        eventually(lambda: rolled_out(hub, namespace), "it is ready again")
        died = restarts()[1]["lastState"]["terminated"]
        assert died["exitCode"] == 137


@pytest.mark.parametrize("probe", ["livenessProbe", "startupProbe"])
def test_container_whose_probe_fails_is_ended_and_restarted(
    hub: ControlPlane, tmp_path: Path, probe: str
) -> None:
    namespace = hub.create_namespace()
    failing = deployment(namespace, "one")
    failing["spec"]["replicas"] = 1
    [container] = failing["spec"]["template"]["spec"]["containers"]
    container[probe] = {
        "exec": {"command": ["/false"]},
        "periodSeconds": 1,
        "failureThreshold": 2,
    }
    container["lifecycle"] = {"preStop": {"sleep": {"seconds": 1}}}
    hub.apply(secret(namespace, "text"), failing)
    with ProcessKubelet(hub, namespace, COMMANDS, tmp_path):

        def status() -> dict[str, Any]:
            [pod] = hub.list("v1", "Pod", namespace)
            found: dict[str, Any] = (pod["status"].get("containerStatuses") or [{}])[0]
            return found

        eventually(lambda: status().get("restartCount"), "it is restarted")
        assert status()["lastState"]["terminated"]["exitCode"] == 128 + signal.SIGTERM
        if probe == "startupProbe":
            assert not status()["ready"]


@pytest.mark.parametrize(
    ("automount", "found"), [(True, ["ca.crt", "namespace", "token"]), (False, [])]
)
def test_pod_finds_its_service_account_where_programs_look_for_it(
    hub: ControlPlane, tmp_path: Path, automount: bool, found: list[str]
) -> None:
    namespace = hub.create_namespace()
    hub.apply(
        secret(namespace, "text"),
        deployment(namespace, "one", automountServiceAccountToken=automount),
    )
    with ProcessKubelet(hub, namespace, COMMANDS, tmp_path):
        eventually(lambda: rolled_out(hub, namespace), "the pods are ready")
        address = hub.list("v1", "Pod", namespace)[0]["status"]["podIP"]
        answer = httpx.get(f"http://{address}:8080/", trust_env=False).json()
        assert answer["account"] == found


def test_unknown_command_is_told(hub: ControlPlane, tmp_path: Path) -> None:
    namespace = hub.create_namespace()
    hub.apply(secret(namespace, "text"), deployment(namespace, "one"))
    with (
        pytest.raises(ExceptionGroup) as failed,
        ProcessKubelet(hub, namespace, {}, tmp_path) as kubelet,
    ):
        eventually(lambda: not kubelet.alive, "the kubelet gives up")
    assert "no program is known for the container's command ['/page'" in repr(failed.value)


def test_files_of_a_volume_change_together(tmp_path: Path) -> None:
    publish(tmp_path, {"tls.crt": b"1", "tls.key": b"1", "old": b"1"})
    first = (tmp_path / "..data").resolve()
    publish(tmp_path, {"tls.crt": b"1", "tls.key": b"1", "old": b"1"})
    assert (tmp_path / "..data").resolve() == first
    publish(tmp_path, {"tls.crt": b"2", "tls.key": b"2", "deep/new": b"2"})
    assert not first.exists()
    seen = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    assert seen == {"tls.crt": b"2", "tls.key": b"2"}
    assert (tmp_path / "deep" / "new").read_bytes() == b"2"
    assert os.readlink(tmp_path / "tls.crt") == "..data/tls.crt"


def test_paths_of_mounts_are_moved(tmp_path: Path) -> None:
    mounts = {"/etc/pki": tmp_path / "a", "/etc/pki/ca": tmp_path / "b"}
    assert moved("--ca=/etc/pki/ca/ca.crt", mounts) == f"--ca={tmp_path}/b/ca.crt"
    assert moved("/etc/pki", mounts) == f"{tmp_path}/a"
    assert moved("a:/etc/pki/x,/etc/pki/y", mounts) == f"a:{tmp_path}/a/x,{tmp_path}/a/y"
    assert moved("--x=/etc/pki-other /srv/etc/pki", mounts) == "--x=/etc/pki-other /srv/etc/pki"


def test_variables_in_arguments_are_expanded() -> None:
    variables = {"POD_IP": "127.0.1.1"}
    assert expanded("$(POD_IP):1 $(NONE) $$(POD_IP)", variables) == "127.0.1.1:1 $(NONE) $(POD_IP)"


def test_connections_go_to_ready_pods_and_only_without_any_to_ending_ones() -> None:
    def pod(address: str, *, ready: bool, **meta: str) -> dict[str, Any]:
        ports = [{"name": "http", "containerPort": 8080}]
        return {
            "metadata": {"name": address, **meta},
            "spec": {"containers": [{"ports": ports}]},
            "status": {
                "podIP": address,
                "phase": "Running",
                "conditions": [{"type": "Ready", "status": str(ready)}],
            },
        }

    ready = pod("127.0.1.1", ready=True)
    ending = pod("127.0.1.2", ready=True, deletionTimestamp="2026-01-02T03:04:05Z")
    failing = pod("127.0.1.3", ready=False)
    over = {**ready, "status": {**ready["status"], "phase": "Failed"}}
    waiting = {**ready, "status": {"phase": "Pending"}}
    of_namespace = service("ns")
    assert backends(of_namespace, [ready, ending, failing, over, waiting]) == {
        "web": [("127.0.1.1", 8080)]
    }
    assert backends(of_namespace, [ending, failing]) == {"web": [("127.0.1.2", 8080)]}
    assert backends(of_namespace, [failing]) == {"web": []}
    of_namespace["spec"]["publishNotReadyAddresses"] = True
    of_namespace["spec"]["ports"][0]["targetPort"] = 9
    assert backends(of_namespace, [ending, failing]) == {
        "web": [("127.0.1.2", 9), ("127.0.1.3", 9)]
    }
