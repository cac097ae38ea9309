"""Which servers an agent keeps sessions to: rows A11 and A15 to A18 of the conformance list."""

from __future__ import annotations

import contextlib
import logging
import random
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
from harness import agent_state, settle, value, values

from clusterproxy.agent.servers import Servers, _Departure
from clusterproxy.agent.session import HandshakeError
from clusterproxy.grpc import Status

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from trio.testing import MockClock

    from clusterproxy.agent.state import AgentState


@attrs.define(eq=False)
class FakeCall:
    message: str = ""
    status: Status = Status.UNAVAILABLE


@attrs.define(eq=False)
class FakeSession:
    server_id: str
    server_count: int
    busy: bool = False
    drained: int = 0
    call: FakeCall = attrs.field(factory=FakeCall)
    over: trio.Event = attrs.field(factory=trio.Event)
    failure: Exception | None = None
    leaving: bool = False
    on_leave: Callable[[], None] = lambda: None

    def leave(self) -> None:
        self.leaving = True
        self.on_leave()

    async def run(self) -> None:
        await self.over.wait()
        if self.failure is not None:
            raise self.failure

    def drain(self) -> None:
        self.drained += 1


class FakeDialer:
    """Opens sessions to what is in *plan*, by address and in turn; the last entry is kept."""

    def __init__(self, plan: dict[str, list[str | Exception]], count: int = 1) -> None:
        self.plan = plan
        self.count = count
        self.attempts: list[tuple[float, str]] = []
        self.opened: list[FakeSession] = []
        self.closed: list[str] = []
        #: Whether sessions leave before they are known.
        self.sends_away = False

    @contextlib.asynccontextmanager
    async def open_session(self, host: str, _port: int) -> AsyncGenerator[FakeSession]:
        await trio.lowlevel.checkpoint()
        self.attempts.append((round(trio.current_time(), 3), host))
        answers = self.plan[host]
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        session = FakeSession(answer, self.count, leaving=self.sends_away)
        self.opened.append(session)
        try:
            yield session
        finally:
            self.closed.append(answer)

    @property
    def times(self) -> list[float]:
        return [time for time, _ in self.attempts]


@attrs.define
class FakeLeases:
    valid: int

    def count(self) -> int:
        return self.valid


@pytest.fixture(autouse=True)
def _no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "random", lambda: 0.0)


@contextlib.asynccontextmanager
async def syncing(
    plan: dict[str, list[str | Exception]],
    count: int = 1,
    leases: FakeLeases | None = None,
    **config: object,
) -> AsyncGenerator[tuple[AgentState, FakeDialer, Servers]]:
    hosts = ",".join(plan)
    state = agent_state(proxy_server_host=hosts, **config)
    dialer = FakeDialer(plan, count)
    servers = Servers(state, dialer, leases)  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(servers.sync)
        await settle()
        yield state, dialer, servers
        nursery.cancel_scope.cancel()
    assert len(dialer.closed) == len(dialer.opened)
    assert not servers.sessions
    assert not servers._leaving


def is_connected(servers: Servers) -> bool:
    return servers.connected


def refused() -> Exception:
    return OSError("dial tcp lb:8091: connect: connection refused")


async def test_one_server(autojump_clock: MockClock) -> None:
    async with syncing({"lb": ["A"]}) as (state, dialer, servers):
        assert is_connected(servers)
        assert value(state.metrics.open_server_connections) == 1
        assert value(state.metrics.known_server_count) == 1
        await trio.sleep(60)
        assert len(dialer.attempts) == 1


async def test_gauge_before_the_first_connection(autojump_clock: MockClock) -> None:
    async with syncing({"lb": [refused()]}) as (state, _, servers):
        assert not state.metrics.open_server_connections.children
        assert not is_connected(servers)


async def test_backoff(autojump_clock: MockClock) -> None:
    async with syncing({"lb": [refused()]}) as (state, dialer, _):
        await trio.sleep(60)
        pauses = [b - a for a, b in zip(dialer.times, dialer.times[1:], strict=False)]
        expected = [1, 1.5, 2.25, 3.375, 5.0625, 7.59375, 10, 10, 10]
        assert pauses[: len(expected)] == pytest.approx(expected, abs=0.01)
        failures = values(state.metrics.server_connection_failure_count)
        assert failures == {"to_server": len(dialer.attempts)}


async def test_backoff_begins_anew(autojump_clock: MockClock) -> None:
    async with syncing({"lb": [refused(), refused(), refused(), "A", refused(), refused()]}) as (
        _,
        dialer,
        servers,
    ):
        await trio.sleep(6)
        (session,) = servers.sessions.values()
        session.over.set()  # type: ignore[attr-defined]
        await trio.sleep(4)
        pauses = [b - a for a, b in zip(dialer.times, dialer.times[1:], strict=False)]
        assert pauses[:3] == pytest.approx([1, 1.5, 2.25], abs=0.01)
        assert pauses[4:6] == pytest.approx([1, 1.5], abs=0.01)


async def test_jitter(autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "random", lambda: 1.0)
    async with syncing({"lb": [refused()]}) as (_, dialer, __):
        await trio.sleep(3)
        assert dialer.times[:3] == pytest.approx([0, 1.1, 2.75], abs=0.01)


async def test_servers_behind_a_load_balancer(autojump_clock: MockClock) -> None:
    answers: list[str | Exception] = ["A", "A", "B", "A", "B", "C"]
    async with syncing({"lb": answers}, count=3) as (state, dialer, servers):
        await trio.sleep(30)
        assert set(servers.sessions) == {"A", "B", "C"}
        # In a hurry after each duplicate, while a server is missing.
        assert dialer.times == pytest.approx([0, 1, 1.1, 2.1, 2.2, 2.4])
        # The duplicates are closed at once, and are no failures.
        assert dialer.closed == ["A", "A", "B"]
        assert not values(state.metrics.server_connection_failure_count)
        assert value(state.metrics.open_server_connections) == 3
        assert value(state.metrics.known_server_count) == 3


async def test_a_session_ends(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    async with syncing({"lb": ["A"]}) as (state, dialer, servers):
        dialer.opened[0].call.message = "connection closed by the peer"
        dialer.opened[0].over.set()
        await settle()
        assert not is_connected(servers)
        assert value(state.metrics.open_server_connections) == 0
        await trio.sleep(1.5)
        assert is_connected(servers)
        assert value(state.metrics.open_server_connections) == 1
    assert "session ended: connection closed by the peer" in caplog.text


@pytest.mark.parametrize(
    "failure",
    [
        OSError("x"),
        HandshakeError("expected one server count, got 0"),
        trio.TooSlowError(),
        trio.BrokenResourceError("x"),
        trio.ClosedResourceError("x"),
        ExceptionGroup("", [ExceptionGroup("", [OSError("x")])]),
    ],
)
async def test_failures(
    failure: Exception, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with syncing({"lb": [failure, "A"]}) as (state, _, servers):
        assert not is_connected(servers)
        await trio.sleep(1.5)
        assert is_connected(servers)
        assert values(state.metrics.server_connection_failure_count) == {"to_server": 1}
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING and "cannot" in r.msg]
    assert record.getMessage().startswith("cannot connect to server lb:8091")


async def test_a_bug_ends_one_attempt(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with syncing({"lb": [ZeroDivisionError(), "A"]}) as (_, __, servers):
        await trio.sleep(1.5)
        assert is_connected(servers)
    assert "bug in a session" in caplog.text


async def test_a_bug_ends_one_session(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with syncing({"lb": ["A"]}) as (_, dialer, servers):
        dialer.opened[0].failure = ZeroDivisionError()
        dialer.opened[0].over.set()
        await trio.sleep(1.5)
        assert is_connected(servers)
    assert "bug in a session" in caplog.text


async def test_the_count_of_a_duplicate_does_not_count(autojump_clock: MockClock) -> None:
    async with syncing({"lb": ["A"]}, count=2) as (state, dialer, servers):
        dialer.count = 7
        await trio.sleep(3)
        assert value(state.metrics.known_server_count) == 2
        assert len(servers.sessions) == 1


@pytest.mark.parametrize("count", [0, -3])
async def test_no_servers_are_one(count: int, autojump_clock: MockClock) -> None:
    async with syncing({"lb": ["A"]}, count=count) as (state, dialer, _):
        await trio.sleep(10)
        assert value(state.metrics.known_server_count) == 1
        assert len(dialer.attempts) == 1


async def test_sync_forever(autojump_clock: MockClock) -> None:
    answers: list[str | Exception] = ["A", "A", "A", "B"]
    async with syncing({"lb": answers}, sync_forever=True) as (_, dialer, servers):
        await trio.sleep(9.5)
        assert len(dialer.attempts) == 10
        assert set(servers.sessions) == {"A", "B"}


async def test_several_addresses(autojump_clock: MockClock) -> None:
    """Each is dialled whatever the count says; one that leads nowhere does not keep the others out."""
    plan: dict[str, list[str | Exception]] = {"a": ["A"], "b": [refused()], "c": ["C"]}
    async with syncing(plan) as (_, dialer, servers):
        await trio.sleep(5)
        assert set(servers.sessions) == {"A", "C"}
        hosts = [host for _, host in dialer.attempts]
        assert hosts[:3] == ["a", "b", "c"]
        assert hosts.count("a") == hosts.count("c") == 1
        assert hosts.count("b") > 1
        dialer.plan["b"] = ["B"]
        await trio.sleep(10)
        assert set(servers.sessions) == {"A", "B", "C"}
        before = len(dialer.attempts)
        await trio.sleep(30)
        assert len(dialer.attempts) == before
        # The one that is lost is the one that is dialled.
        dialer.opened[0].over.set()
        await trio.sleep(3)
        assert dialer.attempts[-1][1] == "a"
        assert set(servers.sessions) == {"A", "B", "C"}


async def test_a_load_balancer_beside_an_address_that_leads_nowhere(
    autojump_clock: MockClock,
) -> None:
    """All servers behind the one are found, and the other is tried in between, and again when it is back."""
    plan: dict[str, list[str | Exception]] = {"lb": ["A", "B", "C"], "away": [refused()]}
    async with syncing(plan, count=3) as (_, dialer, servers):
        await trio.sleep(10)
        assert set(servers.sessions) == {"A", "B", "C"}
        hosts = [host for _, host in dialer.attempts]
        assert hosts[:5] == ["lb", "away", "lb", "away", "lb"]
        # Now that none is missing the others are left alone.
        assert set(hosts[5:]) == {"away"}
        dialer.plan["away"] = ["D"]
        await trio.sleep(20)
        assert set(servers.sessions) == {"A", "B", "C", "D"}
        before = len(dialer.attempts)
        await trio.sleep(30)
        assert len(dialer.attempts) == before


async def test_who_is_asked_in_vain_is_asked_seldom(autojump_clock: MockClock) -> None:
    """Nobody knows whether the missing server is the one that is away: duplicates are paid for with patience."""
    plan: dict[str, list[str | Exception]] = {"a": ["A"], "b": [refused()], "c": ["C"]}
    async with syncing(plan, count=3) as (_, dialer, servers):
        await trio.sleep(600)
        assert set(servers.sessions) == {"A", "C"}
        hosts = [host for time, host in dialer.attempts if time > 60]
        assert hosts.count("b") == pytest.approx(54, abs=1)
        assert hosts.count("a") == pytest.approx(27, abs=1)
        assert hosts.count("c") == pytest.approx(27, abs=1)
        pauses = [b - a for a, b in zip(dialer.times, dialer.times[1:], strict=False)]
        assert min(pauses) >= 1


async def test_two_addresses_of_one_server(autojump_clock: MockClock) -> None:
    async with syncing({"a": ["A"], "b": ["A"]}) as (_, dialer, servers):
        await trio.sleep(30)
        assert set(servers.sessions) == {"A"}
        assert len(dialer.attempts) == 2
        dialer.opened[0].over.set()
        await trio.sleep(3)
        assert is_connected(servers)


async def test_a_hurry_does_not_last(autojump_clock: MockClock) -> None:
    """Four handshakes more for a server that comes or goes, then one in each interval."""
    async with syncing({"lb": ["A"]}, count=2) as (_, dialer, servers):
        await trio.sleep(5000.2)
        assert dialer.times[:8] == pytest.approx([0, 1, 1.1, 1.3, 1.7, 2.5, 3.5, 4.5])
        pauses = {round(b - a, 3) for a, b in zip(dialer.times[7:], dialer.times[8:], strict=False)}
        assert pauses == {1}
        before = len(dialer.times)
        dialer.opened[0].over.set()
        await settle()
        dialer.plan["lb"] = ["B"]
        await trio.sleep(1)
        dialer.plan["lb"] = ["B", "B", "C"]
        await trio.sleep(1.2)
        assert set(servers.sessions) == {"B", "C"}
        assert len(dialer.times) == before + 4


async def test_no_hurry_while_the_agent_drains(autojump_clock: MockClock) -> None:
    async with syncing({"lb": ["A"]}, count=2) as (_, dialer, servers):
        await trio.sleep(1.05)
        assert len(dialer.attempts) == 2
        servers.draining = True
        assert servers._interval() == 1
        await trio.sleep(5)
        assert len(dialer.attempts) == 2


# -- A19: the number of servers --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leases", "response", "source", "count"),
    [
        (3, 6, "default", 3),
        (3, 6, "", 3),
        (3, 6, "max", 6),
        (6, 3, "max", 6),
        (1, 0, "default", 1),
        (1, 0, "max", 1),
        (None, 6, "max", 6),
        (None, 0, "default", 1),
    ],
)
async def test_which_count_holds(
    leases: int | None, response: int, source: str, count: int, autojump_clock: MockClock
) -> None:
    plan: dict[str, list[str | Exception]] = {"lb": [*"ABCDEFGH"]}
    counter = None if leases is None else FakeLeases(leases)
    async with syncing(plan, response, counter, server_count_source=source) as (state, _, servers):
        await trio.sleep(20)
        assert value(state.metrics.known_server_count) == len(servers.sessions) == count


async def test_leases_come_and_go(autojump_clock: MockClock) -> None:
    leases = FakeLeases(1)
    plan: dict[str, list[str | Exception]] = {"lb": [*"ABC"]}
    async with syncing(plan, 5, leases) as (state, _, servers):
        await trio.sleep(5)
        assert set(servers.sessions) == {"A"}
        leases.valid = 2
        await trio.sleep(2)
        assert set(servers.sessions) == {"A", "B"}
        leases.valid = 1
        await trio.sleep(5)
        # What is connected stays.
        assert set(servers.sessions) == {"A", "B"}
        assert value(state.metrics.known_server_count) == 1


# -- servers that leave ----------------------------------------------------------------------------


async def test_a_server_leaves(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    async with syncing({"lb": ["A", "B"]}) as (state, dialer, servers):
        await trio.sleep(10.5)
        dialer.opened[0].leave()
        # No new client of that server reaches this cluster.
        assert not is_connected(servers)
        await settle()
        # At once, and what is open goes on.
        assert dialer.times == pytest.approx([0, 10.5])
        assert set(servers.sessions) == {"B"}
        assert is_connected(servers)
        assert dialer.closed == []
        assert value(state.metrics.open_server_connections) == 2
        await trio.sleep(30)
        assert len(dialer.attempts) == 2
        dialer.opened[0].over.set()
        await trio.sleep(30)
        assert value(state.metrics.open_server_connections) == 1
        assert dialer.closed == ["A"]
        assert len(dialer.attempts) == 2
        assert set(servers.sessions) == {"B"}
    # It was expected.
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING][:-1]


async def test_a_server_leaves_and_is_back_under_its_name(autojump_clock: MockClock) -> None:
    """A server that has a fixed ID, such as its node's name, is no duplicate of the one that leaves."""
    async with syncing({"lb": ["A"]}) as (state, dialer, servers):
        await trio.sleep(5)
        dialer.opened[0].leave()
        await settle()
        assert list(map(id, servers.sessions.values())) == [id(dialer.opened[1])]
        dialer.opened[0].over.set()
        await settle()
        assert list(map(id, servers.sessions.values())) == [id(dialer.opened[1])]
        assert value(state.metrics.open_server_connections) == 1


async def test_one_of_several_leaves(autojump_clock: MockClock) -> None:
    """The others are duplicates now: the new one is found in a hurry."""
    answers: list[str | Exception] = ["A", "B", "B", "B", "C"]
    async with syncing({"lb": answers}, count=2) as (_, dialer, servers):
        await trio.sleep(100)
        dialer.opened[0].leave()
        await trio.sleep(0.35)
        assert dialer.times == pytest.approx([0, 1, 100, 100.1, 100.3])
        assert set(servers.sessions) == {"B", "C"}


async def test_a_server_leaves_while_another_is_away(autojump_clock: MockClock) -> None:
    plan: dict[str, list[str | Exception]] = {"a": ["A"], "b": [refused()]}
    async with syncing(plan) as (_, dialer, servers):
        await trio.sleep(60)
        before = len(dialer.times)
        while len(dialer.times) == before:  # noqa: ASYNC110  nothing tells of it
            await trio.sleep(0.1)
        await trio.sleep(1.5)
        begin = trio.current_time()
        dialer.opened[0].leave()
        await settle()
        # Not only when the pause of up to 10 s is over.
        assert dialer.attempts[-1] == (round(begin, 3), "a")
        assert set(servers.sessions) == {"A"}


async def test_a_server_that_sends_everybody_away(autojump_clock: MockClock) -> None:
    """It counts as one that is away: it is tried less and less, and as ever when it keeps somebody."""
    async with syncing({"lb": ["A"]}) as (state, dialer, servers):
        await trio.sleep(4.5)
        dialer.sends_away = True
        dialer.opened[0].leave()
        await trio.sleep(60)
        pauses = [b - a for a, b in zip(dialer.times[1:], dialer.times[2:], strict=False)]
        expected = [1, 1.5, 2.25, 3.375, 5.0625, 7.59375, 10, 10, 10]
        assert dialer.times[:2] == [0, 4.5]
        assert pauses[: len(expected)] == pytest.approx(expected, abs=0.01)
        assert not is_connected(servers)
        assert not values(state.metrics.server_connection_failure_count)
        dialer.sends_away = False
        await trio.sleep(12)
        assert is_connected(servers)
        begin = len(dialer.times)
        await trio.sleep(5)
        dialer.sends_away = True
        dialer.opened[-1].leave()
        await trio.sleep(3)
        again = dialer.times[begin:]
        assert [b - again[0] for b in again[1:]] == pytest.approx([1, 2.5], abs=0.01)


async def test_a_server_that_leaves_in_the_moment_after_the_greeting(
    autojump_clock: MockClock,
) -> None:
    async with syncing({"lb": ["A"]}) as (_, dialer, _servers):
        while trio.current_time() < 9:
            opened = len(dialer.opened)
            dialer.opened[-1].leave()
            while len(dialer.opened) == opened:  # noqa: ASYNC110  nothing tells of it
                await trio.sleep(0.01)
        assert dialer.times == pytest.approx([0, 1, 2.5, 4.75, 8.125, 13.1875], abs=0.1)


async def test_sessions_that_leave_are_bounded(autojump_clock: MockClock) -> None:
    """An idle one makes room; if none is, the address is left alone, and no other one."""
    plan: dict[str, list[str | Exception]] = {"lb": ["A"], "other": ["B"]}
    async with syncing(plan) as (state, dialer, servers):
        await trio.sleep(5)
        assert set(servers.sessions) == {"A", "B"}
        sessions = dialer.opened
        sessions[0].busy = True
        for _ in range(30):
            servers.sessions["A"].leave()  # type: ignore[attr-defined]
            await trio.sleep(5)
        # The one that is in use and the youngest ones.
        left = [session for session in sessions if session.leaving]
        assert list(map(id, servers._leaving)) == list(map(id, [left[0], *left[-15:]]))
        assert dialer.closed == ["A"] * 14
        assert value(state.metrics.open_server_connections) == 18
        for session in sessions:
            session.busy = True
        servers.sessions["A"].leave()  # type: ignore[attr-defined]
        before = len(dialer.attempts)
        await trio.sleep(60)
        assert len(dialer.attempts) == before
        assert set(servers.sessions) == {"B"}
        dialer.plan["other"] = ["C"]
        sessions[1].over.set()
        await trio.sleep(2)
        assert set(servers.sessions) == {"C"}
        # Somebody is done: there is room again.
        left[0].busy = False
        await trio.sleep(2)
        assert set(servers.sessions) == {"A", "C"}
        assert len(servers._leaving) == 17


async def test_a_word_of_a_session_that_is_over(autojump_clock: MockClock) -> None:
    async with syncing({"lb": ["A"]}) as (_, dialer, servers):
        dialer.opened[0].over.set()
        await settle()
        dialer.opened[0].leave()
        await trio.sleep(1.5)
        assert is_connected(servers)
        assert not servers._leaving


async def test_drain_waits_for_sessions_that_leave(autojump_clock: MockClock) -> None:
    async with syncing({"lb": ["A", "B"]}) as (_, dialer, servers):
        await trio.sleep(2)
        dialer.opened[0].leave()
        dialer.opened[0].busy = True
        await trio.sleep(2)
        with trio.move_on_after(60) as limit:
            await servers.drain()
        assert limit.cancelled_caught
        assert [session.drained for session in dialer.opened] == [1, 1]


# -- A11: drain ------------------------------------------------------------------------------------


async def test_drain_of_an_idle_agent(autojump_clock: MockClock) -> None:
    answers: list[str | Exception] = ["A", "B"]
    async with syncing({"lb": answers}, count=3) as (_, dialer, servers):
        await trio.sleep(1.5)
        attempts = len(dialer.attempts)
        begin = trio.current_time()
        await servers.drain()
        assert trio.current_time() - begin == pytest.approx(10, abs=0.1)
        assert [session.drained for session in dialer.opened] == [1, 1]
        # No new sessions, though there are more servers.
        assert len(dialer.attempts) == attempts


async def test_drain_waits_for_connections(autojump_clock: MockClock) -> None:
    async with syncing({"lb": ["A"]}) as (state, dialer, servers):
        dialer.opened[0].busy = True
        begin = trio.current_time()
        done = trio.Event()

        async def drain() -> None:
            await servers.drain()
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            await trio.sleep(100)
            assert not done.is_set()
            dialer.opened[0].busy = False
            state.last_use = trio.current_time()
            await trio.sleep(5)
            # A dial that failed in between.
            state.last_use = trio.current_time()
            await done.wait()
        assert trio.current_time() - begin == pytest.approx(115, abs=1.1)


async def test_drain_tells_sessions_that_are_being_opened(autojump_clock: MockClock) -> None:
    async with syncing({"lb": [refused(), "A"]}) as (_, dialer, servers):
        servers.draining = True
        await trio.sleep(5)
        assert len(dialer.attempts) == 1
    async with syncing({"lb": ["A"]}) as (_, dialer, servers):
        servers.draining = True
        departure = _Departure(("lb", 1), trio.CancelScope())
        servers._add(FakeSession("B", 1), departure)  # type: ignore[arg-type]
        assert servers.sessions.pop("B").drained == 1  # type: ignore[attr-defined]
