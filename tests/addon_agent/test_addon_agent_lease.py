"""The add-on's lease against an apiserver that is played; a real one is in tests/kube/test_addon_lease.py."""

from __future__ import annotations

import contextlib
import itertools
import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from kube_script import ScriptedApi

from clusterproxy.addon_agent.lease import AddonLease
from clusterproxy.errors import AlreadyExists, Conflict, KubeUnavailable, NotFound
from clusterproxy.kube.lease import is_valid, micro_time

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio.testing import MockClock

    from clusterproxy.kube.api import KubeApi

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC).timestamp()


def clock() -> float:
    return NOON + trio.current_time()


class Leases(ScriptedApi):
    """An apiserver that has leases, by namespace, or *trouble*."""

    def __init__(self) -> None:
        super().__init__(self._do)
        self.stored: dict[str, dict[str, Any]] = {}
        self.trouble: dict[str, list[Exception]] = {}

    async def patch(self, _resource: Any, name: str, change: Any, namespace: str) -> Any:
        assert name == "cluster-proxy"
        return await self._call("patch", (namespace, change))

    def _do(self, verb: str, what: Any) -> Any:
        if errors := self.trouble.get(verb):
            return errors[0] if len(errors) == 1 else errors.pop(0)
        if verb == "create":
            return self.stored.setdefault(what["metadata"]["namespace"], what)
        namespace, change = what
        if namespace not in self.stored:
            return NotFound("no such lease", status=404)
        self.stored[namespace]["spec"] |= change["spec"]
        return self.stored[namespace]


class Tunnel:
    """What the proxy agent says."""

    def __init__(self) -> None:
        self.ready = True
        self.looks: list[float] = []

    async def look(self) -> bool:
        self.looks.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        return self.ready


@contextlib.asynccontextmanager
async def renewed(
    local: Leases, tunnel: Tunnel, *, hub: Leases | None = None, cluster: str = "cluster1"
) -> AsyncGenerator[None]:
    lease = AddonLease(
        cast("KubeApi", local),
        "agents",
        hub=lambda: cast("KubeApi | None", hub),
        cluster=cluster,
        ready=tunnel.look,
        interval_s=60.0,
        clock=clock,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lease.run)
        yield
        nursery.cancel_scope.cancel()
    assert not local.open


async def test_created_as_upstream_has_it_and_renewed_each_minute(
    autojump_clock: MockClock,
) -> None:
    api, tunnel = Leases(), Tunnel()
    async with renewed(api, tunnel):
        await trio.sleep(600)
        assert api.stored["agents"] == {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": "cluster-proxy", "namespace": "agents"},
            "spec": {
                "leaseDurationSeconds": 60,
                "renewTime": micro_time(NOON + api.calls[-1][0]),
            },
        }
        assert len(api.called("create")) == 1
        times = [at for at, verb, _ in api.calls if verb == "patch"]
        pauses = [after - before for before, after in itertools.pairwise(times)]
        assert all(60 <= pause <= 75 for pause in pauses)
        # All replicas of all clusters at one time would be a burst.
        assert len(set(pauses)) == len(pauses) >= 7


async def test_what_others_have_written_stays(autojump_clock: MockClock) -> None:
    api, tunnel = Leases(), Tunnel()
    api.stored["agents"] = {"metadata": {"labels": {"a": "b"}}, "spec": {"holderIdentity": "me"}}
    async with renewed(api, tunnel):
        await trio.sleep(1)
    assert api.stored["agents"]["metadata"] == {"labels": {"a": "b"}}
    assert api.stored["agents"]["spec"]["holderIdentity"] == "me"
    assert is_valid(api.stored["agents"], clock())


async def test_renewed_only_while_there_is_a_tunnel(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    api, tunnel = Leases(), Tunnel()
    tunnel.ready = False
    async with renewed(api, tunnel):
        await trio.sleep(100)
        assert not api.calls
        tunnel.ready = True
        ready_at = trio.current_time()
        # Not at the next minute.
        await trio.sleep(1.5)
        assert api.calls[-1][0] - ready_at <= 1
        await trio.sleep(200)
        tunnel.ready = False
        await trio.sleep(75)
        before = len(api.calls)
        await trio.sleep(1000)
        assert len(api.calls) == before
        tunnel.ready = True
        await trio.sleep(1.5)
        assert len(api.calls) == before + 1
    # Told when it changes and no oftener.
    assert caplog.text.count("the proxy agent has no tunnel") == 2
    assert caplog.text.count("the proxy agent has a tunnel") == 2


async def test_an_apiserver_that_is_away_ends_nothing(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    api, tunnel = Leases(), Tunnel()
    api.trouble["patch"] = [KubeUnavailable("connection refused")]
    async with renewed(api, tunnel):
        await trio.sleep(600)
        assert 40 <= len(api.calls) <= 50
        assert caplog.text.count("cannot renew the lease cluster-proxy: connection refused") == 1
        api.trouble.clear()
        await trio.sleep(15)
        assert is_valid(api.stored["agents"], clock())
    assert "can renew the lease cluster-proxy again" in caplog.text


async def test_one_conflict_is_no_news(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    api, tunnel = Leases(), Tunnel()
    api.stored["agents"] = {"spec": {}}
    api.trouble["patch"] = [Conflict("somebody else's"), Conflict("the same")]
    async with renewed(api, tunnel):
        await trio.sleep(0.5)
        del api.trouble["patch"]
        await trio.sleep(1)
        assert is_valid(api.stored["agents"], clock())
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


async def test_another_replica_may_be_quicker(autojump_clock: MockClock) -> None:
    api, tunnel = Leases(), Tunnel()
    api.trouble["create"] = [AlreadyExists("it is there")]
    async with renewed(api, tunnel):
        await trio.sleep(30)
        assert [verb for _, verb, _ in api.calls] == ["patch", "create"]


async def test_the_hub_has_the_lease_of_a_cluster_without_leases(autojump_clock: MockClock) -> None:
    local, hub, tunnel = Leases(), Leases(), Tunnel()
    local.trouble = {
        verb: [NotFound("404 page not found", status=404)] for verb in ("patch", "create")
    }
    async with renewed(local, tunnel, hub=hub):
        await trio.sleep(200)
    assert hub.stored["cluster1"]["metadata"] == {"name": "cluster-proxy", "namespace": "cluster1"}
    assert len(hub.called("patch")) >= 3


@pytest.mark.parametrize("cluster", ["", "cluster1"])
async def test_without_a_hub_it_is_told_what_is_missing(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, cluster: str
) -> None:
    local, hub, tunnel = Leases(), Leases(), Tunnel()
    local.trouble = {verb: [NotFound("no leases here")] for verb in ("patch", "create")}
    async with renewed(local, tunnel, hub=None if cluster else hub, cluster=cluster):
        await trio.sleep(20)
    assert "cannot renew the lease cluster-proxy: no leases here" in caplog.text
    assert not hub.calls


async def test_other_refusals_do_not_go_to_the_hub(autojump_clock: MockClock) -> None:
    local, hub, tunnel = Leases(), Leases(), Tunnel()
    local.trouble["patch"] = [KubeUnavailable("away")]
    async with renewed(local, tunnel, hub=hub):
        await trio.sleep(20)
    assert not hub.calls
