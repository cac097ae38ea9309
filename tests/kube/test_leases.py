"""Servers' leases at a real apiserver: rows A19 and A23, and "Lease GC", of the conformance list."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from harness import value, values

from clusterproxy.agent.config import AgentConfig
from clusterproxy.agent.leases import LeaseCount
from clusterproxy.kube.client import open_kube_api
from clusterproxy.kube.lease import is_valid, micro_time
from clusterproxy.server import leases
from clusterproxy.server.config import ServerConfig
from clusterproxy.server.leases import ServerLease
from clusterproxy.telemetry.agent_metrics import AgentMetrics
from clusterproxy.telemetry.server_metrics import ServerMetrics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from kube.control_plane import ControlPlane

LABEL = "k8s-app=konnectivity-server"
# What Go's programs need, and no more.
RIGHTS = {
    "server": ["get", "create", "update", "list", "delete"],
    "agent": ["get", "list", "watch"],
}


@attrs.frozen
class Cluster:
    """A namespace of leases, with an account for each program."""

    hub: ControlPlane
    namespace: str

    @classmethod
    def make(cls, hub: ControlPlane) -> Cluster:
        self = cls(hub, hub.create_namespace())
        for name, verbs in RIGHTS.items():
            metadata = {"name": name, "namespace": self.namespace}
            group = "rbac.authorization.k8s.io"
            hub.apply(
                {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata},
                {
                    "apiVersion": f"{group}/v1",
                    "kind": "Role",
                    "metadata": metadata,
                    "rules": [
                        {
                            "apiGroups": ["coordination.k8s.io"],
                            "resources": ["leases"],
                            "verbs": verbs,
                        }
                    ],
                },
                {
                    "apiVersion": f"{group}/v1",
                    "kind": "RoleBinding",
                    "metadata": metadata,
                    "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
                    "subjects": [{"kind": "ServiceAccount", **metadata}],
                },
            )
        return self

    def put(self, name: str, *, age: float = 0.0, app: str = "konnectivity-server") -> None:
        """Write a lease that was renewed so many seconds ago."""
        self.hub.apply(
            {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {
                    "name": name,
                    "namespace": self.namespace,
                    "labels": {"k8s-app": app},
                },
                "spec": {"renewTime": micro_time(time.time() - age), "leaseDurationSeconds": 30},
            }
        )

    def leases(self) -> dict[str, Any]:
        api_version, kind = "coordination.k8s.io/v1", "Lease"
        found = self.hub.list(api_version, kind, self.namespace)
        # The apiserver says of a list what its items are, not of each.
        whole = [{"apiVersion": api_version, "kind": kind, **lease} for lease in found]
        return {lease["metadata"]["name"]: lease for lease in whole}

    @contextlib.asynccontextmanager
    async def server(self, **config: Any) -> AsyncGenerator[tuple[ServerLease, ServerMetrics]]:
        metrics = ServerMetrics()
        settings = ServerConfig(server_id="s1", lease_namespace=self.namespace, **config)
        kubeconfig = str(self.hub.kubeconfig_for(self.namespace, "server"))
        async with open_kube_api(kubeconfig) as api, trio.open_nursery() as nursery:
            keeper = ServerLease(api, settings, metrics)
            nursery.start_soon(keeper.run)
            yield keeper, metrics
            nursery.cancel_scope.cancel()

    @contextlib.asynccontextmanager
    async def agent(self) -> AsyncGenerator[tuple[LeaseCount, AgentMetrics]]:
        metrics = AgentMetrics()
        settings = AgentConfig(lease_namespace=self.namespace)
        kubeconfig = str(self.hub.kubeconfig_for(self.namespace, "agent"))
        async with open_kube_api(kubeconfig) as api, trio.open_nursery() as nursery:
            count = LeaseCount(api, settings, metrics)
            nursery.start_soon(count.run)
            yield count, metrics
            nursery.cancel_scope.cancel()


@pytest.fixture
def cluster(hub: ControlPlane) -> Cluster:
    return Cluster.make(hub)


async def until(condition: Callable[[], object], within: float = 30.0) -> None:
    """Wait for what happens in the apiserver or in another thread."""
    with trio.fail_after(within):
        while not await trio.to_thread.run_sync(condition):  # noqa: ASYNC110  nothing tells of it
            await trio.sleep(0.05)


async def test_a_server_has_its_lease(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_RENEW_S", 0.3)
    name = "konnectivity-proxy-server-s1"
    async with cluster.server() as (keeper, _):
        await until(lambda: name in cluster.leases())
        lease = cluster.leases()[name]
        assert lease["metadata"]["labels"] == {"k8s-app": "konnectivity-server"}
        assert lease["spec"]["holderIdentity"] == "s1"
        assert lease["spec"]["leaseDurationSeconds"] == 30

        def renewed() -> bool:
            now: str = cluster.leases()[name]["spec"]["renewTime"]
            before: str = lease["spec"]["renewTime"]
            return now > before

        await until(renewed)
        # Somebody else writes to it, and somebody deletes it: it is kept all the same.
        cluster.hub.patch(lease, {"metadata": {"annotations": {"note": "1"}}})
        lease = cluster.leases()[name]
        await until(renewed)
        assert cluster.leases()[name]["metadata"]["annotations"] == {"note": "1"}
        cluster.hub.delete(lease)
        await until(lambda: name in cluster.leases())
        keeper.release()
        with trio.fail_after(5):
            await keeper.over.wait()
        assert cluster.leases() == {}


async def test_only_expired_leases_of_servers_are_deleted(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.put("gone", age=31)
    cluster.put("there", age=5)
    cluster.put("foreign", age=1000, app="something-else")
    async with cluster.server() as (_, metrics):
        await until(lambda: "gone" not in cluster.leases())
        await until(lambda: value(metrics.culled_leases_count) == 1)
        assert cluster.leases().keys() >= {"there", "foreign"}
        assert values(metrics.lease_list_total) == {"200,": 1}
        assert values(metrics.lease_delete_total) == {"200,": 1}
        assert set(metrics.lease_list_latency_seconds.children) == {("200",)}
        assert set(metrics.lease_delete_latency_seconds.children) == {("200",)}


async def test_a_lease_that_is_renewed_meanwhile_is_not_deleted(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The version that was seen to have expired is the only one that may be deleted."""
    cluster.put("late", age=31)

    def renew_first(lease: Any, now: float) -> bool:
        valid = is_valid(lease, now)
        cluster.put("late")
        return valid

    monkeypatch.setattr(leases, "is_valid", renew_first)
    async with cluster.server() as (_, metrics):
        await until(lambda: values(metrics.lease_delete_total))
        assert values(metrics.lease_delete_total) == {"409,Conflict": 1}
        assert "late" in cluster.leases()
        assert value(metrics.culled_leases_count) == 0


async def test_agents_count_leases(cluster: Cluster) -> None:
    cluster.put("one")
    cluster.put("two", age=20)
    cluster.put("gone", age=40)
    cluster.put("foreign", app="something-else")
    async with cluster.agent() as (count, metrics):
        await until(lambda: count.count() == 2)
        assert values(metrics.lease_lists_total) == {"200,": 1}
        await until(lambda: values(metrics.lease_watches_total) == {"200,": 1})
        # News come by themselves; what expires does so without any.
        cluster.put("three")
        await until(lambda: count.count() == 3)
        await until(lambda: count.count() == 2, within=15)
        cluster.put("gone")
        await until(lambda: count.count() == 3)


async def test_agents_without_the_right_to_count(cluster: Cluster) -> None:
    cluster.hub.delete(
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "agent", "namespace": cluster.namespace},
        }
    )
    cluster.put("one")
    cluster.put("two")
    async with cluster.agent() as (count, metrics):
        await until(lambda: values(metrics.lease_lists_total).get("403,Forbidden"))
        assert count.count() == 1


async def test_an_apiserver_that_restarts(cluster: Cluster) -> None:
    # Renewed in the future: they outlast what follows.
    cluster.put("one", age=-300)
    cluster.put("two", age=-300)
    async with cluster.agent() as (count, _), cluster.server() as (keeper, __):
        await until(lambda: count.count() == 3)
        await trio.to_thread.run_sync(cluster.hub.stop_apiserver)
        try:
            with trio.move_on_after(3):
                while True:
                    assert count.count() == 3
                    await trio.sleep(0.1)
        finally:
            await trio.to_thread.run_sync(cluster.hub.start_apiserver)
        cluster.put("three", age=-300)
        await until(lambda: count.count() == 4, within=60)
        assert not keeper.over.is_set()
