"""Servers counted by leases: rows A19 and A23, with an apiserver that is played; a real one is in tests/kube."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
from harness import observations, settle, value, values

from clusterproxy.agent.config import AgentConfig
from clusterproxy.agent.leases import LeaseCount
from clusterproxy.errors import Forbidden, KubeError, KubeUnavailable
from clusterproxy.kube.api import Change, Listing, WatchEvent
from clusterproxy.kube.lease import micro_time
from clusterproxy.telemetry.agent_metrics import AgentMetrics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from trio.testing import MockClock

    from clusterproxy.kube.api import KubeApi

NOON = datetime(2026, 11, 26, 12, tzinfo=UTC).timestamp()


def clock() -> float:
    return NOON + trio.current_time()


def lease(name: str, age: float) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "namespace": "ns", "resourceVersion": f"{name}{age}"},
        "spec": {"renewTime": micro_time(clock() - age), "leaseDurationSeconds": 30},
    }


class Played:
    """An apiserver with leases; *trouble* is what every request meets, and ends watches when it comes."""

    def __init__(self, *leases: dict[str, Any]) -> None:
        self.leases = list(leases)
        self.trouble: KubeError | None = None
        self.selectors: list[tuple[Any, str]] = []
        self._send, self._receive = trio.open_memory_channel[WatchEvent | KubeError](100)

    async def list(
        self, _resource: object, namespace: str | None, *, label_selector: str, keep: Any, **_: Any
    ) -> Listing:
        await trio.sleep(0.05)
        self.selectors.append((namespace, label_selector))
        if self.trouble is not None:
            raise self.trouble
        return Listing([keep(one) for one in self.leases], "1")

    @contextlib.asynccontextmanager
    async def watch(self, *_: Any, **__: Any) -> AsyncGenerator[AsyncIterator[WatchEvent]]:
        await trio.lowlevel.checkpoint()
        if self.trouble is not None:
            raise self.trouble
        yield self._events()

    async def _events(self) -> AsyncIterator[WatchEvent]:
        while True:
            event = await self._receive.receive()
            if isinstance(event, KubeError):
                raise event
            yield event

    def put(self, obj: dict[str, Any]) -> None:
        self._send.send_nowait(WatchEvent(Change.MODIFIED, obj))

    def fail(self, error: KubeError) -> None:
        self.trouble = error
        self._send.send_nowait(error)


@contextlib.asynccontextmanager
async def counting(
    played: Played, **config: Any
) -> AsyncGenerator[tuple[LeaseCount, AgentMetrics]]:
    metrics = AgentMetrics()
    settings = AgentConfig(lease_namespace="ns", lease_label_selector=" a = b ,c=d", **config)
    count = LeaseCount(cast("KubeApi", played), settings, metrics, clock=clock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(count.run)
        await trio.sleep(0.1)
        await settle()
        yield count, metrics
        nursery.cancel_scope.cancel()


async def test_before_anything_is_known() -> None:
    settings = AgentConfig()
    assert LeaseCount(cast("KubeApi", Played()), settings, AgentMetrics()).count() == 1


async def test_valid_ones_count(autojump_clock: MockClock) -> None:
    played = Played(lease("a", 0), lease("b", 5), lease("c", 20), lease("old", 40))
    async with counting(played) as (count, metrics):
        assert played.selectors == [("ns", "a=b,c=d")]
        assert count.count() == 3
        assert values(metrics.lease_lists_total) == {"200,": 1}
        assert values(metrics.lease_watches_total) == {"200,": 1}
        assert observations(metrics.lease_list_latency_seconds) == 1
        # They expire without an event.
        await trio.sleep(15)
        assert count.count() == 2
        played.put(lease("c", 0))
        await settle()
        assert count.count() == 3
        await trio.sleep(60)
        assert count.count() == 1


async def test_none_is_one(autojump_clock: MockClock) -> None:
    async with counting(Played()) as (count, _):
        assert count.count() == 1


@pytest.mark.parametrize(
    ("error", "counted"),
    [
        (Forbidden("no", status=403, reason="Forbidden"), "403,Forbidden"),
        (KubeUnavailable("refused"), ""),
    ],
)
async def test_an_apiserver_that_is_not_there_at_first(
    error: KubeError, counted: str, autojump_clock: MockClock
) -> None:
    played = Played(lease("a", -100), lease("b", -100))
    played.trouble = error
    async with counting(played) as (count, metrics):
        assert count.count() == 1
        assert set(values(metrics.lease_lists_total)) == ({counted} if counted else set())
        played.trouble = None
        await trio.sleep(60)
        assert count.count() == 2
        assert value(metrics.lease_watches_total, "200", "") == 1


async def test_an_apiserver_that_goes_away(autojump_clock: MockClock) -> None:
    """Leases that nobody can renew have not expired."""
    played = Played(lease("a", 0), lease("b", 0))
    async with counting(played) as (count, metrics):
        assert count.count() == 2
        played.fail(Forbidden("no", status=403, reason="Forbidden"))
        await trio.sleep(300)
        assert count.count() == 2
        assert value(metrics.lease_watches_total, "403", "Forbidden") > 1
        played.trouble = None
        await trio.sleep(60)
        assert count.count() == 1
