"""What happens to an installation, under steady dials of both clusters: no dial fails that need not. Its end comes last."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import ssl
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from kube.control_plane import eventually

from clusterproxy.addon_agent.library import PROXY_SERVERS
from e2e import copies, source
from e2e.cluster import HUB_PROXY
from e2e.configs import configured, referred
from e2e.hello import SPACE, deployed
from e2e.test_documentation import DIALS, OF_TUNNEL, SERVICE, curl
from e2e.world import (
    AGENTS,
    CLUSTERS,
    MPC,
    NAMESPACE,
    PROXY,
    USER_SERVER,
    leaf_names,
    rolled_out,
    snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from e2e.cluster import Cluster
    from e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

Object = dict[str, Any]

CHART = Path(__file__).parents[2] / "deploy" / "charts" / "cluster-proxy"
UPGRADE = "helm upgrade -n open-cluster-management-addon cluster-proxy ocm/cluster-proxy --reset-then-reuse-values"


@contextlib.contextmanager
def copying(world: World, *way: str) -> Generator[None]:
    """Copy a gibibyte by e2e.copies, from before the block until after it; it must arrive whole."""
    log = world.files / "copies.log"
    process = world.operator.station.start(log, sys.executable, copies.__file__, *way)
    try:
        began = "it has begun"
        eventually(lambda: began in log.read_text() or process.poll() is not None, began)
        assert began in log.read_text(), log.read_text()
        yield
        process.terminate()
        assert process.wait(90) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    said = json.loads(log.read_text().splitlines()[-1])
    assert said["sha256"] == source.digest()
    # It was under way all the time.
    assert said["left"] > 0, said


@contextlib.contextmanager
def served(cluster: Cluster) -> Generator[str]:
    """Serve what e2e.source has in the block; gives the address of its Service."""
    program = Path(source.__file__).read_text(encoding="utf-8")
    objects = deployed("source", 9000, ["python3", "-c", program, "9000"])
    plane = cluster.plane
    _, service = plane.apply(*objects)

    address: str = service["spec"]["clusterIP"]

    def answers() -> bool:
        # It knows no such method.
        return httpx.head(f"http://{address}:9000/", trust_env=False).status_code == 501

    try:
        eventually(answers, "the copies' source answers")
        yield address
    finally:
        for each in objects:
            plane.delete(each)
        eventually(lambda: len(cluster.pods(SPACE)) == 2, "the copies' source is gone")


@contextlib.contextmanager
def exposed(world: World, service: str) -> Generator[str]:
    """Let a service of clusters be reached over HTTP in the block; gives the path at port 9000."""
    plane = world.hub.plane
    meta = {"name": "cluster-proxy-exposed-services", "namespace": NAMESPACE}
    config_map = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta}
    entry = f"- {{namespace: {SPACE}, service: {service}}}"
    plane.patch(config_map, {"data": {"of-a-test": entry}})
    path = f"{SERVICE}/http:{service}:9000/proxy-service/"
    try:
        world.eventually(
            lambda: curl(world, CLUSTERS[0], path, "--head")[0] == 501, "it is exposed"
        )
        yield path
    finally:
        plane.patch(config_map, {"data": {"of-a-test": None}})


@contextlib.contextmanager
def steady_dials(world: World, *clusters: str) -> Generator[None]:
    """Dial clusters all the time in the block; none may fail."""
    log = world.files / "dials.log"
    files = map(str, world.client_files())
    command = (sys.executable, DIALS, PROXY, *files, *(clusters or CLUSTERS))
    process = world.operator.station.start(log, *command)
    try:
        yield
    finally:
        process.terminate()
        process.wait(90)
    said = json.loads(log.read_text())
    assert said["begun"] > 5, said
    assert not said["failures"], "\n".join((f"of {said['begun']}:", *said["failures"]))


def replicas(world: World, count: int) -> bool:
    """Whether there are so many of everything, they are all there is, and all agents are at all servers."""
    found = [*world.hub.plane.list("apps/v1", "Deployment", NAMESPACE), *map(world.agent, CLUSTERS)]
    return (
        all(each["spec"]["replicas"] == count and rolled_out(each) for each in found)
        and world.agents_at_servers() == [count * len(CLUSTERS)] * count
    )


def test_replicas_under_steady_dials(world: World) -> None:
    with steady_dials(world):
        for count in (3, 1):
            with world.timed(f"helm upgrade, {count} replicas of everything"):
                world.operator.run(f"{UPGRADE} --set replicas={count}")
                with contextlib.suppress(AssertionError):
                    world.eventually(partial(replicas, world, count), "all are there", within_s=150)
                assert replicas(world, count), (world.agents_at_servers(), world.told())
    assert [world.available(each) for each in CLUSTERS] == ["True", "True"]


def test_another_configuration_under_steady_dials(world: World) -> None:
    """A6 and A8."""
    before = world.configuration()
    with steady_dials(world), world.timed("another name in the certificates, rolled out"):
        change = {"authentication": {"signer": {"selfSigned": {"additionalSANs": ["a.example"]}}}}
        changed = world.hub.plane.patch(
            {"apiVersion": MPC, "kind": "ManagedProxyConfiguration"} | before, {"spec": change}
        )
        generation = str(changed["metadata"]["generation"])
        assert generation != str(before["metadata"]["generation"])

        def followed() -> bool:
            server = world.hub.plane.get("apps/v1", "Deployment", "cluster-proxy", NAMESPACE)
            assert server is not None
            found = [server, *map(world.agent, CLUSTERS)]
            return all(
                generation
                in (
                    *each["metadata"].get("annotations", {}).values(),
                    *each["metadata"].get("labels", {}).values(),
                )
                and rolled_out(each)
                for each in found
            )

        world.eventually(followed, "all follow the configuration", within_s=120)
    for name in ("proxy-server", "agent-server"):
        assert "a.example" in leaf_names(world.secret(name)["tls.crt"])


def test_where_agents_run(world: World) -> None:
    """A5."""
    [cluster, other] = CLUSTERS
    placement = {
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "infra", "operator": "Exists"}],
    }

    def place(of: str = cluster) -> Object:
        spec: Object = world.agent(of)["spec"]["template"]["spec"]
        return {key: spec.get(key) for key in placement}

    before = place()
    with steady_dials(world), world.timed("AddOnDeploymentConfig and back"):
        with configured(world, cluster, nodePlacement=placement):
            world.eventually(
                lambda: place() == placement and rolled_out(world.agent(cluster)),
                "the agent is where it is told to be",
                within_s=120,
            )
            assert referred(world, cluster)
            assert place(other) == before
            assert world.available(cluster) == "True"
        world.eventually(
            lambda: place() == before and rolled_out(world.agent(cluster)),
            "the agent is where it was",
            within_s=120,
        )


def test_the_tls_profile(world: World) -> None:
    """A29 to A31."""
    plane = world.hub.plane
    suites = "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384"
    profile = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "ocm-tls-profile", "namespace": NAMESPACE},
    }

    def arguments() -> set[str] | None:
        found = plane.get("apps/v1", "Deployment", "cluster-proxy", NAMESPACE)
        assert found is not None
        [container] = found["spec"]["template"]["spec"]["containers"]
        args = {each for each in container["args"] if each.startswith(("--tls-", "--cipher-"))}
        return args if rolled_out(found) else None

    def reaches(*wanted: str) -> None:
        with contextlib.suppress(AssertionError):
            world.eventually(lambda: arguments() == set(wanted), "servers follow", within_s=60)
        assert arguments() == set(wanted)
        assert curl(world, CLUSTERS[0], "version")[0] == 200

    with steady_dials(world), world.timed("TLS profile: 1.2 with suites, 1.3, none"):
        plane.apply({**profile, "data": {"minTLSVersion": "VersionTLS12", "cipherSuites": suites}})
        reaches("--tls-min-version=VersionTLS12", f"--cipher-suites={suites}")
        plane.apply({**profile, "data": {"minTLSVersion": "VersionTLS13", "cipherSuites": suites}})
        reaches("--tls-min-version=VersionTLS13", f"--cipher-suites={suites}")
        plane.delete(profile)
        reaches("--tls-min-version=VersionTLS12")


def entrypoint_is(world: World, kind: str, argument: str) -> bool:
    """Whether agents come by this entrypoint, and no others are left."""
    found = [world.agent(each) for each in CLUSTERS]
    arguments = [found["spec"]["template"]["spec"]["containers"][0]["args"] for found in found]
    return (
        world.configuration()["spec"]["proxyServer"]["entrypoint"]["type"] == kind
        and all(argument in each for each in arguments)
        and all(map(rolled_out, found))
        and world.agents_at_servers() == [len(CLUSTERS)]
    )


def test_other_entrypoints_and_back(world: World) -> None:
    """Agents come through the hub's apiserver, by a load balancer, and by a name."""
    by_name = f"--proxy-server-host={HUB_PROXY}"
    with steady_dials(world):
        with world.timed("entrypoint: port-forward"):
            world.operator.run(f"{UPGRADE} --set proxyServer.entrypointAddress=")
            world.eventually(
                partial(entrypoint_is, world, "PortForward", "--proxy-server-host=127.0.0.1"),
                "agents come through the apiserver",
                within_s=120,
            )
            world.await_available()
        with world.timed("entrypoint: load balancer"):
            world.operator.run(
                f"{UPGRADE} --set proxyServer.entrypointAddress=,proxyServer.entrypointLoadBalancer=true"
            )
            balanced = world.eventually(world.load_balancer, "there is a Service for a balancer")
            status = {"loadBalancer": {"ingress": [{"hostname": HUB_PROXY}]}}
            world.hub.plane.patch(balanced, {"status": status}, subresource="status")
            world.eventually(
                partial(entrypoint_is, world, "LoadBalancerService", by_name),
                "agents come by the balancer",
                within_s=120,
            )
        with world.timed("entrypoint: a name"):
            world.operator.run(
                f"{UPGRADE} --set proxyServer.entrypointLoadBalancer=false,proxyServer.entrypointAddress={HUB_PROXY}"
            )
            world.eventually(
                partial(entrypoint_is, world, "Hostname", by_name),
                "agents come by the name",
                within_s=120,
            )
        world.await_available()
    # It has no owner: it stays, whatever becomes of the configuration, until somebody removes it as the chart's README says.
    assert world.load_balancer() is not None
    text = (CHART / "README.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^## A load balancer stays$.*?^```\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)  # fmt: skip
    said = world.operator.run(block)
    assert 'service "proxy-agent-entrypoint" deleted' in said
    assert world.load_balancer() is None


def test_the_authority_is_replaced(world: World) -> None:
    """Under steady dials, and while a gibibyte is copied by one tunnel."""
    old = world.secret("cluster-proxy-signer")["ca.crt"]
    signer = world.hub.plane.get("v1", "Secret", "cluster-proxy-signer", NAMESPACE)
    assert signer is not None
    prefix = MPC.partition("/")[0]
    change = {"metadata": {"annotations": {f"{prefix}/ca-overlap": "12s", f"{prefix}/rotate-ca": "now"}}}  # fmt: skip

    def over() -> bool:
        # As what mounts the secrets.
        world.client_files()
        present = world.secret("cluster-proxy-signer")
        bundle = world.secret("proxy-server-ca")["ca.crt"]
        return (
            present["ca.crt"] != old
            and set(present) == {"ca.crt", "ca.key"}
            and (bundle == present["ca.crt"])
        )

    [near, _] = world.managed.values()
    with served(near) as address:
        # Through the tunnel a cluster's name is that of its apiserver, which has another port then.
        near.services.add("copies.example", (near.segment.apiserver, 9000), (address, 9000))
        files = map(str, world.client_files())
        copy = ("tunnel", f"http://{near.name}:9000/", PROXY, *files)
        with copying(world, *copy), steady_dials(world), world.timed("CA replaced"):
            world.hub.plane.patch({"apiVersion": "v1", "kind": "Secret"} | signer, change)
            world.eventually(over, "the old authority is gone", within_s=150)
            found = curl(world, near.name, f"{SERVICE}/http:hello-world:8000/proxy-service/")
            assert found[0] == 200
    world.await_available()


OF_HUB = ("proxy-server", "agent-server", "proxy-client", "cluster-proxy-user-serving-cert", "cluster-proxy-service-proxy-server-cert")  # fmt: skip
OF_CLUSTER = (OF_TUNNEL, "cluster-proxy-hub-kubeconfig", "cluster-proxy-service-proxy-server-certificates")  # fmt: skip


def places(world: World) -> list[tuple[Cluster, str, tuple[str, ...]]]:
    """Return clusters, namespaces, and their secrets with certificates."""
    return [
        (world.hub, NAMESPACE, OF_HUB),
        *((each, AGENTS, OF_CLUSTER) for each in world.managed.values()),
    ]


def leaves(world: World) -> dict[tuple[str, str], str]:
    """Return the certificates by their clusters and secrets; one that is not there is empty."""
    found: dict[tuple[str, str], str] = {}
    for cluster, namespace, names in places(world):
        for name in names:
            secret = cluster.plane.get("v1", "Secret", name, namespace) or {}
            found[cluster.name, name] = secret.get("data", {}).get("tls.crt", "")
    return found


def first(encoded: str) -> str:
    """Return the first certificate of a secret's."""
    end = "-----END CERTIFICATE-----\n"
    return base64.b64decode(encoded).decode().partition(end)[0] + end


def all_starts(world: World) -> dict[str, int]:
    """Return how often each container of the add-on has been started anew, by their pods and names."""
    pods = [*world.hub.pods(NAMESPACE)]
    for each in world.managed.values():
        pods += each.pods(AGENTS)
    return {
        f"{pod['metadata']['name']} {each['name']}": each["restartCount"]
        for pod in pods
        for each in pod["status"]["containerStatuses"]
    }


def presented(world: World, place: tuple[str, int]) -> bytes:
    """Return the certificate that a server shows, in DER form."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    _, cert, key = world.client_files()
    context.load_cert_chain(cert, key)
    with socket.create_connection(place, 10) as raw, context.wrap_socket(raw) as stream:
        shown = stream.getpeercert(binary_form=True)
    assert shown is not None
    return shown


def servers(world: World) -> dict[tuple[str, int], tuple[str, str]]:
    """Return, of all places where something serves TLS, whose certificate it has."""
    found: dict[tuple[str, int], tuple[str, str]] = {}
    of_hub = {
        PROXY_SERVERS: {8090: "proxy-server", 8091: "agent-server"},
        "component=cluster-proxy-addon-user": {9092: "cluster-proxy-user-serving-cert"},
    }
    for selector, ports in of_hub.items():
        for pod in world.hub.plane.list("v1", "Pod", NAMESPACE, selector=selector):
            for port, name in ports.items():
                found[pod["status"]["podIP"], port] = (world.hub.name, name)
    for cluster in world.managed.values():
        for pod in cluster.pods(AGENTS):
            found[pod["status"]["podIP"], 7443] = (cluster.name, OF_CLUSTER[-1])
    return found


def test_all_certificates_are_replaced(world: World) -> None:
    """Whatever has one is given another while it serves: under steady dials, and while a gibibyte is copied over HTTPS."""
    [near, _] = world.managed.values()
    before, pods = leaves(world), all_starts(world)
    with served(near), exposed(world, "source") as page:
        copy = ("https", f"https://{USER_SERVER}/{near.name}/{page}", str(world.ca))
        with copying(world, *copy), steady_dials(world), world.timed("all certificates replaced"):
            for cluster, namespace, names in places(world):
                for name in names:
                    meta = {"name": name, "namespace": namespace}
                    cluster.plane.delete({"apiVersion": "v1", "kind": "Secret", "metadata": meta})

            def all_new() -> bool:
                found = leaves(world)
                return all(found[each] not in {before[each], ""} for each in before)

            world.eventually(all_new, "there are new ones", within_s=90)

            def behind() -> list[tuple[str, str]]:
                present = leaves(world)
                return [
                    of
                    for place, of in servers(world).items()
                    if presented(world, place) != ssl.PEM_cert_to_DER_cert(first(present[of]))
                ]

            with contextlib.suppress(AssertionError):
                eventually(lambda: not behind(), "all serve with them")
            assert behind() == []
            assert len(servers(world)) == 5
            assert curl(world, near.name, "version")[0] == 200
    # Nothing was replaced or started anew for it.
    assert all_starts(world) == pods
    world.await_available()


def test_a_cluster_cut_off_and_back(world: World) -> None:
    [near, far] = CLUSTERS
    service = f"{SERVICE}/http:hello-world:8000/proxy-service/"
    with steady_dials(world, near):
        with world.timed("a cluster cut off: users are told"), world.managed[far].cut_off():
            status, body = curl(world, far, service, "--max-time", "40")
            assert status == 502, body
            assert far in body
        with world.timed("and back: the first answer"):
            world.eventually(
                lambda: curl(world, far, service)[0] == 200, "it answers again", within_s=60
            )
    assert world.available(far) == "True"


def test_the_hubs_apiserver_restarted(world: World) -> None:
    plane = world.hub.plane
    path = f"{SERVICE}/http:hello-world:8000/proxy-service/"
    with steady_dials(world), world.timed("the hub's apiserver gone and back"):
        with plane.stopped_apiserver():
            for each in CLUSTERS:
                assert curl(world, each, path) == (200, f"Hello from {each}\n")
        # All go on, so that a change of the list of services is taken in.
        world.operator.run(f"{UPGRADE} --set-json 'exposedServices=[]'")
        world.eventually(
            lambda: curl(world, CLUSTERS[0], path)[0] == 403, "the service is exposed no more"
        )
    assert [world.available(each) for each in CLUSTERS] == ["True", "True"]


# -- the end ---------------------------------------------------------------------------------------


def test_what_an_uninstallation_leaves(world: World) -> None:
    with world.timed("helm uninstall"):
        world.operator.run(f"helm uninstall -n {NAMESPACE} cluster-proxy --wait")
        world.eventually(
            lambda: not any(map(world.addon, CLUSTERS)), "no cluster has the add-on", within_s=60
        )
        for each in CLUSTERS:
            world.eventually(partial(world.no_agents, each), "the agents are gone")

    # As the chart's README says.
    of_hub = {
        *empty_namespace(NAMESPACE),
        "ClusterRole cluster-proxy-addon-agent-tokenreview",
        "ClusterRoleBinding cluster-proxy-addon-agent-tokenreview",
        f"Secret {NAMESPACE}/cluster-proxy-service-proxy-server-cert",
    }
    expected = {"hub": of_hub} | dict.fromkeys(CLUSTERS, empty_namespace(AGENTS))

    def left() -> dict[str, set[str]]:
        everything = (world.hub, *world.managed.values())
        return {each.name: snapshot(each.plane) - world.before[each.name] for each in everything}

    with contextlib.suppress(AssertionError):
        world.eventually(lambda: left() == expected, "nothing else is left", within_s=30)
    assert left() == expected


def empty_namespace(name: str) -> set[str]:
    return {f"Namespace {name}", f"ServiceAccount {name}/default", f"ConfigMap {name}/kube-root-ca.crt"}  # fmt: skip
