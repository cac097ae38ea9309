"""The real kubectl in a far cluster, beside the same at the cluster's own apiserver."""

from __future__ import annotations

import json
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Final

import httpx

from .cases import chosen
from .far import far_cluster
from .programs import NotMeasured
from .samples import Sample
from .userserver import in_turns

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from kube.kubectl import Kubectl

    from .far import Far
    from .samples import Row

PART: Final = "kubectl"
WAYS: Final = ("without", "ours")
PODS, QUICK_PODS = 5000, 200
EXEC: Final = "exec: 64 B there and back, at rest"
LOGS: Final = "logs of 64 MiB"
_LINE: Final = b"x" * 63 + b"\n"
_LOG_MIB: Final = 64


def pods_name(count: int) -> str:
    """Return a row's name."""
    return f"get pods -A with {count:,} pods"


def kubectl(rounds: int, pods: int, folder: Path, words: Sequence[str]) -> Iterator[Row]:
    """Measure what was asked for, in one far cluster."""
    if not any(chosen(PART, name, words) for name in (pods_name(pods), EXEC, LOGS)):
        return
    (folder / "kubectl").mkdir()
    with far_cluster(folder / "kubectl") as far:
        from far_cluster import namespaced, talking_pod
        from test_user_server_kube import role, rule

        managed = far.cluster.managed
        namespace, token = namespaced(managed, "user")
        role(managed, namespace, "user", rule("pods pods/log pods/exec", "*"), cluster_wide=True)
        ways = {
            "without": _directly(far, token, namespace),
            "ours": far.cluster.kubectl(folder / "kubectl", token, namespace),
        }
        if chosen(PART, pods_name(pods), words):
            _make_pods(far, pods)
            for way in WAYS:
                _get_pods(ways[way], pods)
            measure = partial(_measure_pods, ways, pods)
            yield in_turns(PART, pods_name(pods), measure, WAYS, rounds, "s", "s", -1)
        with talking_pod(managed, namespace, folder / "kubectl" / "pods") as kubelet:
            if chosen(PART, EXEC, words):
                trips = 500 if rounds > 1 else 50
                yield in_turns(
                    PART, EXEC, lambda way: _exec(ways[way], trips), WAYS, min(rounds, 3), "p99", "ms", -1
                )
            if chosen(PART, LOGS, words):
                with (kubelet.directory / "talker" / "main.log").open("ab") as log:
                    log.write(_LINE * (_LOG_MIB * (1 << 20) // len(_LINE)))
                yield in_turns(PART, LOGS, lambda way: _logs(ways[way]), WAYS, min(rounds, 3), "mbit_s", "Mbit/s", 1)


def _directly(far: Far, token: str, namespace: str) -> Kubectl:
    from kube.kubectl import Kubectl

    managed = far.cluster.managed
    config = json.loads(managed.admin_kubeconfig.read_text())
    config["users"] = [{"name": "user", "user": {"token": token}}]
    path = far.folder / "direct.kubeconfig"
    path.write_text(json.dumps(config))
    return Kubectl(path, namespace)


def _make_pods(far: Far, count: int) -> None:
    """Make pods that nobody runs, with what makes those of a Deployment large."""
    managed = far.cluster.managed
    namespace = managed.create_namespace()
    container = {
        "name": "main",
        "image": "registry.example/team/application:v1.2.3",
        "args": ["--verbose", "--address=:8080", "--cache-size=1024"],
        "env": [{"name": f"SETTING_{number}", "value": f"of the application {number}"} for number in range(12)],
        "ports": [{"containerPort": 8080, "name": "http"}],
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
        "readinessProbe": {"httpGet": {"path": "/readyz", "port": 8080}},
    }
    url = f"{managed.server}/api/v1/namespaces/{namespace}/pods"
    with (
        httpx.Client(verify=managed.admin_tls, trust_env=False, timeout=60) as client,
        ThreadPoolExecutor(8) as workers,
    ):

        def make(number: int) -> None:
            pod = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": f"application-{number}", "labels": {"app": "application", "number": str(number)}},
                "spec": {"containers": [container]},
            }
            client.post(url, json=pod).raise_for_status()

        list(workers.map(make, range(count)))


def _get_pods(kubectl: Kubectl, count: int) -> float:
    begin = time.monotonic()
    text = kubectl.run("get", "pods", "-A", "--no-headers", within_s=120)
    took = time.monotonic() - begin
    if len(text.splitlines()) < count:
        msg = f"kubectl has shown {len(text.splitlines())} of {count} pods"
        raise NotMeasured(msg)
    return took


def _measure_pods(ways: dict[str, Kubectl], count: int, way: str) -> Sample:
    return Sample(figures={"s": _get_pods(ways[way], count)})


def _exec(kubectl: Kubectl, trips: int) -> Sample:
    """Write a line to cat in the pod and wait for it, again and again, with a rest between."""
    command = kubectl._command(("exec", "-i", "talker", "--", "cat"))
    took: list[float] = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=kubectl._environment(), bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            # The first ones wait for the stream to be there.
            for _ in range(trips + 5):
                begin = time.perf_counter()
                process.stdin.write(_LINE)
                left = len(_LINE)
                while left:
                    data = os.read(process.stdout.fileno(), left)
                    if not data:
                        raise NotMeasured("kubectl exec has ended")
                    left -= len(data)
                took.append((time.perf_counter() - begin) * 1000)
                time.sleep(0.01)
        finally:
            process.kill()
    took = sorted(took[5:])
    return Sample(figures={"p50": took[len(took) // 2], "p99": took[int(len(took) * 0.99)]})


def _logs(kubectl: Kubectl) -> Sample:
    command = kubectl._command(("logs", "talker", "--tail=-1"))
    begin = time.monotonic()
    size = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=kubectl._environment(), bufsize=0) as process:
        assert process.stdout is not None
        while data := os.read(process.stdout.fileno(), 1 << 20):
            size += len(data)
    took = time.monotonic() - begin
    if process.returncode or size < _LOG_MIB << 20:
        msg = f"kubectl logs ended with {process.returncode} after {size} bytes"
        raise NotMeasured(msg)
    return Sample(figures={"mbit_s": size * 8 / 1e6 / took})
