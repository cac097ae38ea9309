"""The documentation's steps, one after the other, and who reaches what then: rows A of conformance-addon.md."""

from __future__ import annotations

import base64
import json
import re
import sys
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography import x509
from go_tools import go_module_program

from e2e.cluster import HUB_API, HUB_PROXY, Workstation, write_kubeconfig
from e2e.hello import OTHER_SPACE, SPACE
from e2e.world import ADDON, AGENTS, CLUSTERS, NAMESPACE, PROXY, USER_SERVER

if TYPE_CHECKING:
    from e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

Object = dict[str, Any]

OF_TUNNEL = "cluster-proxy-open-cluster-management.io-proxy-agent-signer-client-cert"
DIALS = str(Path(__file__).with_name("dials.py"))
PLACEMENT = "cluster.open-cluster-management.io/v1beta1"
SERVICE = f"api/v1/namespaces/{SPACE}/services"
WHOAMI = "apis/authentication.k8s.io/v1/selfsubjectreviews"


# -- what is installed -----------------------------------------------------------------------------


def test_the_documentations_checks(world: World) -> None:
    found = world.operator.run("kubectl get managedclusteraddon -A | grep cluster-proxy")
    lines = [line.split() for line in found.splitlines()]
    assert lines == [[each, "cluster-proxy", "True", "False"] for each in CLUSTERS]
    pods = world.operator.run(f"kubectl get pods -n {NAMESPACE} --no-headers")
    fields = [line.split() for line in pods.splitlines()]
    assert [(f[1], f[2], f[3]) for f in fields] == [
        ("1/1", "Running", "0"),
        ("1/1", "Running", "0"),
        ("2/2", "Running", "0"),
    ], pods


def test_all_is_deployed(world: World) -> None:
    """A1 to A4, and A6 but for a change of the configuration."""
    found = world.hub.plane.get(ADDON, "ClusterManagementAddOn", "cluster-proxy")
    assert found is not None
    decided = world.hub.plane.list(PLACEMENT, "PlacementDecision", NAMESPACE)
    chosen = [each["clusterName"] for one in decided for each in one["status"]["decisions"]]
    assert sorted(chosen) == list(CLUSTERS)
    for each in world.hub.plane.list("cluster.open-cluster-management.io/v1", "ManagedCluster"):
        said = {c["type"]: c["status"] for c in each["status"]["conditions"]}
        assert said["ManagedClusterConditionAvailable"] == "True", each
    assert [world.available(each) for each in CLUSTERS] == ["True", "True"]
    assert world.hub_is_ready()
    assert world.hub.plane.get("v1", "Service", "proxy-entrypoint", NAMESPACE) is not None
    configuration = world.configuration()
    conditions = {c["type"]: c["status"] for c in configuration["status"]["conditions"]}
    for kind in ("ProxyServerDeployed", "ProxyServerSecretSigned", "AgentServerSecretSigned", "UserServerSecretSigned"):  # fmt: skip
        assert conditions[kind] == "True", conditions
    for name in CLUSTERS:
        world.eventually(partial(world.is_rolled_out, name), "the agent is ready")
        agent = world.agent(name)
        generation = str(configuration["metadata"]["generation"])
        assert generation in agent["metadata"]["annotations"].values()
        for pod in world.managed[name].pods(AGENTS):
            assert generation in pod["metadata"]["annotations"].values()
        # Nothing was restarted on the way.
        restarts = {
            status["restartCount"]
            for pod in world.managed[name].pods(AGENTS)
            for status in pod["status"]["containerStatuses"]
        }
        assert restarts == {0}, world.managed[name].told(AGENTS)


def test_an_agents_certificate(world: World) -> None:
    """A7."""
    [authority] = x509.load_pem_x509_certificates(world.secret("proxy-server-ca")["ca.crt"])
    for cluster in world.managed.values():
        secret = cluster.plane.get("v1", "Secret", OF_TUNNEL, AGENTS)
        assert secret is not None
        leaf = x509.load_pem_x509_certificate(base64.b64decode(secret["data"]["tls.crt"]))
        valid = leaf.not_valid_after_utc - leaf.not_valid_before_utc
        assert abs(valid - timedelta(days=180)) < timedelta(days=1)
        [issuer] = (each.value for each in leaf.issuer)
        assert issuer == "open-cluster-management:cluster-proxy"
        leaf.verify_directly_issued_by(authority)


# -- the tunnel ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_the_documentations_go_client(world: World, cluster: str) -> None:
    """A9, with the documentation's text."""
    kubeconfig = write_kubeconfig(
        world.files / f"go-{cluster}.kubeconfig",
        world.managed[cluster],
        world.token(cluster, "reader"),
        **{"tls-server-name": "kubernetes.default.svc"},
    )
    program = str(go_module_program("./cmd/docsnippet"))
    ca, cert, key = world.client_files()
    said = world.operator.station.output(
        program, f"-proxy={PROXY}", f"-ca={ca}", f"-cert={cert}", f"-key={key}",
        f"-kubeconfig={kubeconfig}", f"-cluster={cluster}", f"-pods={SPACE}",
    )  # fmt: skip
    version, *pods = said.splitlines()
    assert version.startswith("v1.")
    assert sorted(name.rsplit("-", 2)[0] for name in pods) == ["hello-world", "hello-world-https"]


def test_the_python_library(world: World) -> None:
    """A9, of both clusters through one tunnel."""
    said = world.operator.station.output(
        sys.executable, DIALS, "--once", PROXY, *map(str, world.client_files()), *CLUSTERS
    )
    assert said.splitlines() == [f"{name} ok" for name in CLUSTERS]


@pytest.mark.parametrize("port", [8090, 8091])
def test_nobody_else_is_let_in(world: World, port: int) -> None:
    """A10."""
    ca, _, _ = world.client_files()
    other = world.foreign_pair()
    for options in ("", f"--cert {other[0]} --key {other[1]}"):
        host = PROXY.partition(":")[0]
        done = world.operator.station.run(
            *("bash", "-c", f"curl -sS --http2 --cacert {ca} {options} https://{host}:{port}/")
        )
        assert done.returncode in (35, 56), done
        assert re.search("alert|certificate required|unknown ca", done.stderr), done.stderr


# -- the user server -------------------------------------------------------------------------------


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_kubectl(world: World, cluster: str) -> None:
    """A11, A13, A14, A16 and A18."""
    kubectl = f"kubectl --kubeconfig /dev/null --server https://{USER_SERVER}/{cluster} --certificate-authority {world.ca}"
    mine = f"{kubectl} --token {world.token(cluster, 'reader')} -n {SPACE}"
    run = world.operator.run
    [pod] = run(f"{mine} get pods -o name -l app=hello-world").split()
    assert "Serving HTTP on" in run(f"{mine} logs {pod}")
    # By a WebSocket, and by SPDY.
    for way in ("", "KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false "):
        said = run(f"{way}{mine} exec {pod} -- /bin/sh -c 'echo hello; cat /www/index.html'")
        assert said == f"hello\nHello from {cluster}\n"
    refused = world.operator.station.run(
        *("bash", "-c", f"{mine} get pods -n {OTHER_SPACE}"), environment=world.operator.environment
    )
    assert re.search(r"Forbidden.*reader", refused.stderr), refused
    nobody = world.operator.station.run(
        *("bash", "-c", f"{kubectl} --token nobody get pods"),
        environment=world.operator.environment,
    )
    assert nobody.returncode != 0
    assert "You must be logged in to the server" in nobody.stderr


def test_a_watch(world: World) -> None:
    """A17."""
    [cluster, _] = CLUSTERS
    plane = world.managed[cluster].plane
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "watched", "namespace": SPACE},
    }
    log = world.files / "watch.log"
    kubectl = f"kubectl --kubeconfig /dev/null --server https://{USER_SERVER}/{cluster} --certificate-authority {world.ca}"
    watch = f"exec {kubectl} --token {world.token(cluster, 'reader')} -n {SPACE} get configmaps --watch --output-watch-events"
    process = world.operator.start(log, watch)
    try:
        world.eventually(lambda: "kube-root-ca.crt" in log.read_text(), "it lists")
        plane.apply(config_map)
        world.eventually(
            lambda: re.search(r"ADDED\s+watched", log.read_text()), "it says so", within_s=30
        )
        plane.delete(config_map)
    finally:
        process.kill()
        process.wait()


def curl(
    world: World, cluster: str, path: str, *options: str, account: str = "reader", token: str = ""
) -> tuple[int, str]:
    """Ask the user server, as curl does, with an account's token or another; return the status and the body."""
    token = token or world.token(cluster if cluster in CLUSTERS else CLUSTERS[0], account)
    done = world.operator.station.output(
        "curl", "-sS", "--max-time", "30", "--cacert", str(world.ca),
        "-H", f"Authorization: Bearer {token}", "-w", "\n%{http_code}", *options,
        f"https://{USER_SERVER}/{cluster}/{path}",
    )  # fmt: skip
    body, _, status = done.rpartition("\n")
    return int(status), body


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_curl(world: World, cluster: str) -> None:
    """A11, A19 to A21."""
    status, body = curl(world, cluster, f"api/v1/namespaces/{SPACE}/pods")
    assert status == 200
    assert len(json.loads(body)["items"]) == 2
    found = curl(world, cluster, f"{SERVICE}/http:hello-world:8000/proxy-service/")
    assert found == (200, f"Hello from {cluster}\n")
    status, body = curl(world, cluster, f"{SERVICE}/https:hello-world-https:8443/proxy-service/")
    # The service proxy does not know who signed this one's certificate.
    assert status == 502, body
    assert "certificate" in body
    status, body = curl(world, cluster, f"{SERVICE}/http:other:8000/proxy-service/")
    assert status == 403
    assert "default/other" in body


def test_a_cluster_that_is_not_there(world: World) -> None:
    """A12."""
    status, body = curl(world, "cluster3", "version")
    assert status == 502
    assert "cluster3" in body


def test_users_who_want_to_be_somebody_else(world: World) -> None:
    """A15."""
    [cluster, _] = CLUSTERS
    review = '{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}'
    options = ("-H", "Content-Type: application/json", "-H", "Impersonate-User: somebody", "-d", review)  # fmt: skip
    status, body = curl(world, cluster, WHOAMI, *options, account="delegate")
    assert status == 201
    assert json.loads(body)["status"]["userInfo"]["username"] == "somebody"
    assert curl(world, cluster, WHOAMI, *options)[0] == 403


# -- isolation -------------------------------------------------------------------------------------


def test_no_other_way_from_the_hub_into_a_cluster(world: World) -> None:
    """What the tunnel is for: hub and clusters have no network in common, but for what agents need of the hub."""
    places = [
        f"{address}:{port}"
        for cluster in world.managed.values()
        for address, port in (
            (cluster.segment.apiserver, 443),
            *((pod["status"]["podIP"], 8000) for pod in cluster.pods(SPACE)),
        )
    ]
    for place in places:
        done = world.operator.station.run(
            "bash", "-c", f"exec 3<>/dev/tcp/{place.replace(':', '/')}"
        )
        assert "Network is unreachable" in done.stderr, (place, done)


def test_no_other_way_out_of_a_cluster(world: World) -> None:
    near, far = world.managed.values()
    station = Workstation(near, SPACE, world.files / "in-cluster")
    entrypoint = world.hub.plane.get("v1", "Service", "proxy-entrypoint", NAMESPACE)
    assert entrypoint is not None
    try:
        for place in (f"{HUB_API}/6443", f"{HUB_PROXY}/8091"):
            station.output("bash", "-c", f"exec 3<>/dev/tcp/{place}")
        for place, error in {
            f"{HUB_PROXY}/8090": "refused",
            f"{entrypoint['spec']['clusterIP']}/8090": "unreachable",
            f"{world.hub.segment.apiserver}/443": "unreachable",
            f"{far.segment.apiserver}/443": "unreachable",
        }.items():
            done = station.run("bash", "-c", f"exec 3<>/dev/tcp/{place}")
            assert error in done.stderr, (place, done)
    finally:
        station.close()
