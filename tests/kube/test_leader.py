"""Elections and events on a real apiserver."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from itertools import count
from typing import TYPE_CHECKING

import pytest
import trio

from clusterproxy.kube.client import open_kube_api
from clusterproxy.kube.events import EventRecorder
from clusterproxy.kube.leader import LeaderElection, LeadershipLost, LeaderTimes
from clusterproxy.kube.resource import LEASES

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from clusterproxy.kube.api import KubeApi
    from clusterproxy.kube.resource import Object
    from kube.control_plane import ControlPlane

pytestmark = pytest.mark.kube

run = trio.to_thread.run_sync

# As the defaults to each other, but faster; a lease is whole seconds.
TIMES = LeaderTimes(lease=3, renew_deadline=2, retry_period=0.4)
MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


_numbers = count(1)


@pytest.fixture
def namespace(hub: ControlPlane) -> str:
    """A namespace that needs no controller manager, which takes its time when the apiserver was gone."""
    name = f"of-leader-{next(_numbers)}"
    account = {"name": "me", "namespace": name}
    hub.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}},
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": account},
    )
    return name


class Candidate:
    def __init__(
        self, api: KubeApi, namespace: str, identity: str, events: EventRecorder | None = None
    ) -> None:
        self.election = LeaderElection(
            api, namespace=namespace, name="l", identity=identity, times=TIMES, events=events
        )
        self.began = trio.Event()
        self.ended = trio.Event()
        self.lost = ""
        self.scope = trio.CancelScope()

    async def _work(self) -> None:
        self.began.set()
        try:
            await trio.sleep_forever()
        finally:
            self.ended.set()

    async def run(self) -> None:
        with self.scope:
            try:
                await self.election.run(self._work)
            except LeadershipLost as error:
                self.lost = str(error)


@asynccontextmanager
async def opened(hub: ControlPlane) -> AsyncGenerator[tuple[KubeApi, trio.Nursery], None]:
    async with open_kube_api(str(hub.admin_kubeconfig)) as api, trio.open_nursery() as nursery:
        with trio.fail_after(60):
            yield api, nursery
        nursery.cancel_scope.cancel()


def lease(hub: ControlPlane, namespace: str) -> Object:
    found = hub.get("coordination.k8s.io/v1", "Lease", "l", namespace)
    assert found is not None
    return found


async def test_one_after_the_other(hub: ControlPlane, namespace: str) -> None:
    async with opened(hub) as (api, nursery):
        first, second = (Candidate(api, namespace, name) for name in ("first", "second"))
        nursery.start_soon(first.run)
        await first.began.wait()
        nursery.start_soon(second.run)
        await trio.sleep(TIMES.lease * 1.5)
        assert not second.began.is_set()
        held = await run(lease, hub, namespace)
        spec = held["spec"]
        assert (spec["holderIdentity"], spec["leaseDurationSeconds"]) == ("first", 3)
        assert spec["leaseTransitions"] == 0
        assert MICRO_TIME.fullmatch(spec["renewTime"])
        assert MICRO_TIME.fullmatch(spec["acquireTime"])
        first.scope.cancel()
        await second.began.wait()
        assert first.ended.is_set()
        spec = (await run(lease, hub, namespace))["spec"]
        assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("second", 1)


async def test_after_a_go_manager_that_died(hub: ControlPlane, namespace: str) -> None:
    record = {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": "l", "namespace": namespace},
        "spec": {
            "holderIdentity": "cluster-proxy-addon-manager-5d_6c",
            "leaseDurationSeconds": 3,
            # A clock that is wrong.
            "acquireTime": "2040-01-01T00:00:00.000000Z",
            "renewTime": "2040-01-01T00:00:00.000000Z",
            "leaseTransitions": 7,
        },
    }
    await run(hub.apply, record)
    async with opened(hub) as (api, nursery):
        ours = Candidate(api, namespace, "ours")
        began = trio.current_time()
        nursery.start_soon(ours.run)
        await ours.began.wait()
        assert trio.current_time() - began >= 3
        spec = (await run(lease, hub, namespace))["spec"]
        assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("ours", 8)


async def test_the_lease_is_taken_away(hub: ControlPlane, namespace: str) -> None:
    async with opened(hub) as (api, nursery):
        ours = Candidate(api, namespace, "ours")
        nursery.start_soon(ours.run)
        await ours.began.wait()
        await api.patch(LEASES, "l", {"spec": {"holderIdentity": "thief"}}, namespace)
        await ours.ended.wait()
        await trio.testing.wait_all_tasks_blocked()
        assert "taken by thief" in ours.lost
        assert (await run(lease, hub, namespace))["spec"]["holderIdentity"] == "thief"


@pytest.mark.parametrize("how", ["stops", "hangs"])
async def test_the_apiserver(hub: ControlPlane, namespace: str, how: str) -> None:
    async with opened(hub) as (api, nursery):
        first, second = (Candidate(api, namespace, name) for name in ("first", "second"))
        nursery.start_soon(first.run)
        await first.began.wait()
        nursery.start_soon(second.run)
        gone = hub.stopped_apiserver() if how == "stops" else hub.hanging_apiserver()
        at = trio.current_time()
        # An apiserver that a worker thread of trio starts ends with that thread.
        with gone:
            await first.ended.wait()
            assert trio.current_time() - at <= TIMES.renew_deadline + 1
            assert not second.began.is_set()
        await second.began.wait()
        assert "not renewed within 2 s" in first.lost


async def test_events(hub: ControlPlane, namespace: str) -> None:
    async with opened(hub) as (api, nursery):
        recorder = EventRecorder(api, component="tests")
        nursery.start_soon(recorder.run)
        ours = Candidate(api, namespace, "ours", recorder)
        nursery.start_soon(ours.run)
        await ours.began.wait()
        # Of what has no namespace the events are in ``default``.
        obj = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
        for _ in range(3):
            recorder.note(obj, "Warning", "Tested", f"the namespace {namespace} is tested")

        def seen(where: str, reason: str) -> list[Object]:
            found = hub.list("v1", "Event", where)
            return [event for event in found if event["reason"] == reason]

        while not await run(seen, namespace, "LeaderElection"):  # noqa: ASYNC110
            await trio.sleep(0.05)
        (event,) = await run(seen, namespace, "LeaderElection")
        assert event["message"] == "ours became leader"
        about = event["involvedObject"]
        held = await run(lease, hub, namespace)
        assert (about["kind"], about["name"]) == ("Lease", "l")
        assert about["uid"] == held["metadata"]["uid"]

        def tested() -> list[Object]:
            return [
                event
                for event in seen("default", "Tested")
                if event["involvedObject"]["name"] == namespace
            ]

        while not (found := await run(tested)) or found[0]["count"] < 3:  # noqa: ASYNC110
            await trio.sleep(0.05)
        (event,) = found
        assert (event["type"], event["source"]["component"]) == ("Warning", "tests")
