"""What happens to an installation, under steady dials of both clusters: no dial fails that need not. Its end comes last."""

from __future__ import annotations

import contextlib
import json
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from e2e.cluster import HUB_PROXY
from e2e.test_documentation import DIALS, SERVICE, curl
from e2e.world import (
    ADDON,
    AGENTS,
    CLUSTERS,
    MPC,
    NAMESPACE,
    PROXY,
    leaf_names,
    rolled_out,
    snapshot,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from e2e.world import World

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400)]

Object = dict[str, Any]

UPGRADE = "helm upgrade -n open-cluster-management-addon cluster-proxy ocm/cluster-proxy --reset-then-reuse-values"


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
    plane = world.hub.plane
    placement = {
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "infra", "operator": "Exists"}],
    }
    config = {
        "apiVersion": ADDON,
        "kind": "AddOnDeploymentConfig",
        "metadata": {"name": "placed", "namespace": NAMESPACE},
        "spec": {"agentInstallNamespace": AGENTS, "nodePlacement": placement},
    }
    plane.apply(config)
    reference = {
        "group": ADDON.partition("/")[0],
        "resource": "addondeploymentconfigs",
        "name": "placed",
        "namespace": NAMESPACE,
    }
    addon = {"apiVersion": ADDON, "kind": "ManagedClusterAddOn"} | world.addon(cluster)

    def place(of: str = cluster) -> Object:
        spec: Object = world.agent(of)["spec"]["template"]["spec"]
        return {key: spec.get(key) for key in placement}

    def referred() -> bool:
        found = world.addon(cluster)["status"].get("configReferences", ())
        return any(
            each["resource"] == "addondeploymentconfigs" and each["desiredConfig"]["specHash"]
            for each in found
        )

    before = place()
    with steady_dials(world), world.timed("AddOnDeploymentConfig and back"):
        plane.patch(addon, {"spec": {"configs": [reference]}})
        world.eventually(
            lambda: place() == placement and rolled_out(world.agent(cluster)),
            "the agent is where it is told to be",
            within_s=120,
        )
        assert referred()
        assert place(other) == before
        assert world.available(cluster) == "True"
        plane.patch(addon, {"spec": {"configs": []}})
        world.eventually(
            lambda: place() == before and rolled_out(world.agent(cluster)),
            "the agent is where it was",
            within_s=120,
        )
    plane.delete(config)


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
    # It has no owner: it stays, whatever becomes of the configuration, until somebody removes it.
    assert world.load_balancer() is not None
    world.hub.plane.delete(balanced)


def test_the_authority_is_replaced(world: World) -> None:
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

    with steady_dials(world), world.timed("CA replaced"):
        world.hub.plane.patch({"apiVersion": "v1", "kind": "Secret"} | signer, change)
        world.eventually(over, "the old authority is gone", within_s=150)
        assert curl(world, CLUSTERS[0], f"{SERVICE}/http:hello-world:8000/proxy-service/")[0] == 200
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
