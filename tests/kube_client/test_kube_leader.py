"""Who leads when; the records that Go's client would see."""

from __future__ import annotations

import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from memory_apiserver import MemoryApiserver

from clusterproxy.errors import Conflict, KubeUnavailable
from clusterproxy.kube.events import EventRecorder
from clusterproxy.kube.leader import LeaderElection, LeadershipLost, make_identity
from clusterproxy.kube.resource import LEASES

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio.testing import MockClock

MICRO_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z")


@pytest.fixture
def server() -> MemoryApiserver:
    return MemoryApiserver()


@attrs.define
class Candidate:
    """A process that wants to lead, for ever."""

    election: LeaderElection
    began: list[float] = attrs.field(factory=list[float])
    ended: list[float] = attrs.field(factory=list[float])
    lost: str = ""
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)

    async def work(self) -> None:
        self.began.append(trio.current_time())
        try:
            await trio.sleep_forever()
        finally:
            self.ended.append(trio.current_time())

    async def run(self) -> None:
        with self.scope:
            try:
                await self.election.run(self.work)
            except LeadershipLost as error:
                self.lost = str(error)


def candidate(server: MemoryApiserver, identity: str, **options: Any) -> Candidate:
    return Candidate(
        LeaderElection(server.api(), namespace="n", name="l", identity=identity, **options)
    )


def lease(server: MemoryApiserver) -> dict[str, Any]:
    spec: dict[str, Any] = server.objects["Lease", "n", "l"]["spec"]
    return spec


@asynccontextmanager
async def leading(server: MemoryApiserver) -> AsyncGenerator[Candidate, None]:
    async with trio.open_nursery() as nursery:
        leader = candidate(server, "first")
        nursery.start_soon(leader.run)
        await trio.sleep(1)
        assert leader.began
        assert leader.election.leading
        yield leader
        nursery.cancel_scope.cancel()


async def test_the_record_of_a_new_lease(
    autojump_clock: MockClock, server: MemoryApiserver
) -> None:
    async with leading(server):
        spec = lease(server)
        assert spec["holderIdentity"] == "first"
        assert spec["leaseDurationSeconds"] == 15
        assert spec["leaseTransitions"] == 0
        assert MICRO_TIME.fullmatch(spec["acquireTime"])
        assert MICRO_TIME.fullmatch(spec["renewTime"])
        await trio.sleep(10)
        renewed = lease(server)
        assert renewed["acquireTime"] == spec["acquireTime"]
        assert renewed["renewTime"] > spec["renewTime"]
        # Every two seconds, by one request.
        assert [verb for _, verb, _ in server.calls] == ["get", "create"] + ["update"] * 5


async def test_who_ends_lets_another_lead_at_once(
    autojump_clock: MockClock, server: MemoryApiserver
) -> None:
    async with trio.open_nursery() as nursery:
        async with leading(server) as first:
            second = candidate(server, "second")
            nursery.start_soon(second.run)
            await trio.sleep(100)
            assert not second.began
        assert not first.election.leading
        assert first.ended
        spec = lease(server)
        assert (spec["holderIdentity"], spec["leaseDurationSeconds"]) == ("", 1)
        assert spec["leaseTransitions"] == 0
        await trio.sleep(5)
        assert second.began
        assert lease(server)["leaseTransitions"] == 1
        nursery.cancel_scope.cancel()


async def test_who_dies_is_replaced_when_its_lease_is_over(
    autojump_clock: MockClock, server: MemoryApiserver
) -> None:
    # A Go manager's record, whose clock is years ahead: what counts is that it does not change.
    server.put(
        LEASES,
        "l",
        "n",
        spec={
            "holderIdentity": "go_1",
            "leaseDurationSeconds": 15,
            "acquireTime": "2040-01-01T00:00:00.000000Z",
            "renewTime": "2040-01-01T00:00:00.000000Z",
            "leaseTransitions": 4,
            "strategy": "kept",
        },
    )
    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        ours = candidate(server, "ours")
        nursery.start_soon(ours.run)
        await trio.sleep(14)
        # Still alive.
        server.put(LEASES, "l", "n", spec=lease(server) | {"renewTime": "2040-01-01T00:00:14.0Z"})
        await trio.sleep(14)
        assert not ours.began
        await trio.sleep(10)
        # 15 s after it was seen to change, and at most one attempt more.
        assert 29 <= ours.began[0] - began < 29 + 2 * 4.4
        spec = lease(server)
        assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("ours", 5)
        assert spec["strategy"] == "kept"
        assert not spec["acquireTime"].startswith("2040")
        nursery.cancel_scope.cancel()


async def test_the_lease_is_taken_by_another(
    autojump_clock: MockClock, server: MemoryApiserver
) -> None:
    async with leading(server) as leader:
        server.put(LEASES, "l", "n", spec=lease(server) | {"holderIdentity": "thief"})
        at = trio.current_time()
        await trio.sleep(10)
        assert leader.lost == "lease n/l: taken by thief"
        # At the next renewal, which fails, and never later.
        assert leader.ended[0] - at <= 4
        assert lease(server)["holderIdentity"] == "thief"


async def test_a_change_that_is_none_of_the_record(
    autojump_clock: MockClock, server: MemoryApiserver
) -> None:
    async with leading(server) as leader:
        for _ in range(20):
            server.put(LEASES, "l", "n", spec=lease(server), metadata={"labels": {"a": "b"}})
            await trio.sleep(3)
        assert leader.election.leading
        assert server.objects["Lease", "n", "l"]["metadata"]["labels"] == {"a": "b"}


async def test_the_lease_is_deleted(autojump_clock: MockClock, server: MemoryApiserver) -> None:
    async with leading(server) as leader:
        server.remove(LEASES, "l", "n")
        await trio.sleep(10)
        assert leader.election.leading
        assert lease(server)["holderIdentity"] == "first"


async def test_the_apiserver_is_gone_for_a_while(
    autojump_clock: MockClock, server: MemoryApiserver
) -> None:
    async with leading(server) as leader:
        server.failures["update"] = KubeUnavailable("gone")
        await trio.sleep(6)
        server.failures["update"] = None
        await trio.sleep(30)
        assert leader.election.leading


@pytest.mark.parametrize("delay", [0, 1000])
async def test_the_apiserver_is_gone_for_too_long(
    autojump_clock: MockClock, server: MemoryApiserver, delay: float
) -> None:
    async with leading(server) as leader:
        renewed = max(time for time, verb, _ in server.calls if verb in ("create", "update"))
        server.failures["update"] = KubeUnavailable("gone")
        # Or it does not answer at all.
        server.delay_s = delay
        await trio.sleep(60)
        assert leader.lost.startswith("lease n/l: not renewed within 10 s")
        # Well before another one may think that it leads.
        assert leader.ended[0] - renewed <= 10


@pytest.mark.parametrize("done", [False, True])
async def test_one_renewal_is_not_answered(
    autojump_clock: MockClock, server: MemoryApiserver, done: bool
) -> None:
    async with leading(server) as leader:
        # One apiserver of several is gone without a word, and the connection to it is silent.
        server.delay_s = 1000
        await trio.sleep(3)
        server.delay_s = 0
        if done:
            server.put(LEASES, "l", "n", spec=lease(server) | {"renewTime": "only just"})
        await trio.sleep(30)
        assert leader.election.leading
        assert leader.lost == ""


async def test_who_leads_is_not_answered(
    autojump_clock: MockClock, server: MemoryApiserver
) -> None:
    server.delay_s = 1000
    ours = candidate(server, "ours")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.run)
        await trio.sleep(3)
        server.delay_s = 0
        await trio.sleep(10)
        assert ours.began
        nursery.cancel_scope.cancel()


async def test_two_never_lead_at_once(autojump_clock: MockClock, server: MemoryApiserver) -> None:
    server.delay_s = 0.1
    async with trio.open_nursery() as nursery:
        both = [candidate(server, name) for name in ("a", "b", "c", "d")]
        for each in both:
            nursery.start_soon(each.run)
        for _ in range(200):
            await trio.sleep(0.5)
            leaders = [each for each in both if each.election.leading]
            assert len(leaders) <= 1
            if len(both) > 1 and leaders and trio.current_time() % 7 < 0.5:
                leaders[0].scope.cancel()
                both.remove(leaders[0])
        assert len(both) == 1
        assert both[0].election.leading
        nursery.cancel_scope.cancel()


async def test_losing_the_race_for_a_free_lease(
    autojump_clock: MockClock, server: MemoryApiserver
) -> None:
    server.failures["create"] = Conflict("somebody was faster")
    ours = candidate(server, "ours")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.run)
        await trio.sleep(20)
        assert not ours.began
        server.failures["create"] = None
        await trio.sleep(10)
        assert ours.began
        nursery.cancel_scope.cancel()


async def test_the_apiserver_fails_while_it_is_asked_who_leads(
    autojump_clock: MockClock, server: MemoryApiserver
) -> None:
    server.failures |= {"get": KubeUnavailable("gone"), "create": Conflict("somebody was faster")}
    ours = candidate(server, "ours")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ours.run)
        await trio.sleep(20)
        server.failures["get"] = None
        server.failures["create"] = None
        await trio.sleep(10)
        assert ours.began
        # Neither given up what is another's, nor in the way of the end.
        server.put(LEASES, "l", "n", spec=lease(server) | {"holderIdentity": "thief"})
        nursery.cancel_scope.cancel()
    assert lease(server)["holderIdentity"] == "thief"
    server.failures["get"] = KubeUnavailable("gone")
    again = candidate(server, "again")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(again.run)
        await trio.sleep(20)
        assert not again.began
        nursery.cancel_scope.cancel()


async def test_what_work_does_is_what_run_does(
    autojump_clock: MockClock, server: MemoryApiserver
) -> None:
    election = candidate(server, "ours").election
    done = False

    async def work() -> None:
        nonlocal done
        done = True

    await election.run(work)
    assert done
    assert lease(server)["holderIdentity"] == ""

    async def fail() -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        await election.run(fail)
    assert lease(server)["holderIdentity"] == ""
    assert not election.leading


async def test_the_lease_cannot_be_given_up(
    autojump_clock: MockClock, server: MemoryApiserver
) -> None:
    async with leading(server):
        server.delay_s = 1000
        at = trio.current_time()
    assert trio.current_time() - at <= 2


@pytest.mark.parametrize("spec", [None, 5, {}, {"holderIdentity": 5, "leaseTransitions": "x"}])
async def test_a_lease_of_any_shape(
    autojump_clock: MockClock, server: MemoryApiserver, spec: object
) -> None:
    server.put(LEASES, "l", "n", spec=spec)
    async with leading(server):
        assert lease(server)["leaseTransitions"] == 1


async def test_events(autojump_clock: MockClock, server: MemoryApiserver) -> None:
    recorder = EventRecorder(server.api(), component="me")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recorder.run)
        ours = candidate(server, "ours", events=recorder)
        nursery.start_soon(ours.run)
        await trio.sleep(1)
        ours.scope.cancel()
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    events = [obj for (kind, *_), obj in server.objects.items() if kind == "Event"]
    assert [event["message"] for event in events] == ["ours became leader", "ours stopped leading"]
    assert {event["reason"] for event in events} == {"LeaderElection"}
    about = events[0]["involvedObject"]
    assert (about["kind"], about["namespace"], about["name"]) == ("Lease", "n", "l")


def test_identities_differ() -> None:
    assert make_identity() != make_identity()
