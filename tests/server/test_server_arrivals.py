"""Dials that a server holds for agents that are still on their way to it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from harness import dial_ok, read_to_end, serving, settle, tcp_pair, value, values

from clusterproxy.server import arrivals
from clusterproxy_proto import CloseDial, Data, DialRequest, DialResponse

if TYPE_CHECKING:
    from harness import ServerWorld
    from trio.testing import MockClock

    from clusterproxy.server.backend import Backend

HOSTS = {"proxy_strategies": ("destHost",), "agent_arrival_timeout_s": 10.0}
REQUEST = b"CONNECT %s:443 HTTP/1.1\r\nHost: h\r\n\r\n"
NO_AGENT = DialResponse(error="No agent available", random=1)


def held(server: ServerWorld) -> int:
    return len(server.state.arrivals._scopes)


async def test_a_dial_waits_for_its_agent(autojump_clock: MockClock) -> None:
    async with serving(**HOSTS) as server:
        client = await server.client()
        client.send(DialRequest("tcp", "one:80", 1), DialRequest("tcp", "two:80", 2))
        await client.expect_nothing_more()
        assert server.pending == held(server) == 2
        await trio.sleep(3)
        other = await server.agent("b", "host=other")
        agent = await server.agent("a", "host=one")
        await agent.expect(DialRequest("tcp", "one:80", 1))
        await other.expect_nothing_more()
        agent.send(dial_ok(1, 1))
        await client.expect(dial_ok(1, 1))
        client.send(Data(1, data=b"hello"))
        await agent.expect(Data(1, data=b"hello"))
        assert trio.current_time() == 3
        # The other one goes on waiting, to the end of the time since the start.
        await client.expect_nothing_more()
        assert server.pending == held(server) == 1
        assert await client.next(8) == DialResponse(error="No agent available", random=2)
        assert trio.current_time() == pytest.approx(10)
        assert server.dial_failures == {"no_agent": 1}
        # From now on as ever.
        client.send(DialRequest("tcp", "two:80", 3))
        await client.expect(DialResponse(error="No agent available", random=3))
        assert trio.current_time() == pytest.approx(10)
        assert not server.state.arrivals._waiting


async def test_by_default_nothing_waits(autojump_clock: MockClock) -> None:
    async with serving() as server:
        client = await server.client()
        client.send(DialRequest("tcp", "one:80", 1))
        await client.expect(NO_AGENT)
        assert trio.current_time() == 0


async def test_the_stream_is_deaf_afterwards_as_ever(autojump_clock: MockClock) -> None:
    async with serving(**HOSTS) as server:
        client = await server.client()
        client.send(DialRequest("tcp", "one:80", 1))
        # Not yet: the dial may come to something, and DATA before its answer is no mistake of the stream's.
        client.send(Data(7, data=b"early"))
        await client.expect_nothing_more()
        assert await client.next(11) == NO_AGENT
        client.send(DialRequest("tcp", "one:80", 2))
        await client.expect_nothing_more()


async def test_the_client_takes_the_dial_back(autojump_clock: MockClock) -> None:
    async with serving(**HOSTS) as server:
        client = await server.client()
        client.send(DialRequest("tcp", "one:80", 1))
        await settle()
        client.send(CloseDial(1))
        await settle()
        assert server.pending == held(server) == 0
        assert server.dial_failures == {"frontend_close": 1}
        assert not server.state.arrivals._waiting
        agent = await server.agent("a", "host=one")
        await agent.expect_nothing_more()
        await client.expect_nothing_more()


async def test_the_client_takes_it_back_in_the_moment_in_which_the_agent_comes(
    autojump_clock: MockClock,
) -> None:
    async with serving(**HOSTS) as server:
        client = await server.client()
        client.send(DialRequest("tcp", "one:80", 1))
        agent = await server.agent("b", "host=other")
        await settle()
        (connection,) = server.frontends.connections
        (stream,) = connection.streams.values()
        call: Any = stream.handler
        frontend_dials = call.receive.__self__._dials
        # Both before the task runs: it is woken first, and then withdrawn.
        pool = server.state.pool
        (backend,) = pool.backends
        pool._strategies[0]._table["one"] = {"b": [backend]}
        server.state.arrivals._waiting["one"].unpark_all()
        frontend_dials.pop(1).withdraw()
        await settle()
        await agent.expect_nothing_more()
        await client.expect_nothing_more()
        del pool._strategies[0]._table["one"]


@pytest.mark.parametrize("end", ["half_close", "reset", "hang_up"])
async def test_the_client_leaves(end: str, autojump_clock: MockClock) -> None:
    async with serving(**HOSTS) as server:
        client = await server.client()
        client.send(DialRequest("tcp", "one:80", 1))
        await settle()
        assert server.pending == 1
        getattr(client, end)()
        await settle()
        assert server.pending == held(server) == 0
        agent = await server.agent("a", "host=one")
        await agent.expect_nothing_more()


async def test_the_number_is_taken_meanwhile(autojump_clock: MockClock) -> None:
    async with serving(**HOSTS) as server:
        client = await server.client()
        client.send(DialRequest("tcp", "one:80", 1), DialRequest("tcp", "one:80", 1))
        await client.expect(DialResponse(error="dial with this number is pending", random=1))
        agent = await server.agent("a", "host=one")
        await agent.expect(DialRequest("tcp", "one:80", 1))
        await agent.expect_nothing_more()


async def test_only_so_many_wait(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrivals, "_LIMIT", 2)
    async with serving(**HOSTS) as server:
        client = await server.client()
        # In one batch, and when the others wait already.
        client.send(*(DialRequest("tcp", "one:80", number) for number in (1, 2, 3)))
        refused = await client.next()
        assert isinstance(refused, DialResponse)
        assert refused.error == "No agent available"
        client.send(DialRequest("tcp", "one:80", 4))
        await client.expect(DialResponse(error="No agent available", random=4))
        agent = await server.agent("a", "host=one")
        dials = {await agent.next(), await agent.next()}
        others = {1, 2, 3} - {refused.random}
        assert dials == {DialRequest("tcp", "one:80", number) for number in others}


async def test_an_agent_that_comes_and_goes_at_once(autojump_clock: MockClock) -> None:
    async with serving(**HOSTS) as server:
        client = await server.client()
        client.send(DialRequest("tcp", "one:80", 1))
        agent = await server.agent("b", "host=other")
        (backend,) = server.state.pool.backends
        table = server.state.pool._strategies[0]._table
        table["one"] = {"b": [backend]}
        server.state.arrivals._waiting["one"].unpark_all()
        del table["one"]
        await settle()
        await agent.expect_nothing_more()
        await client.expect_nothing_more()
        assert held(server) == 1
        second = await server.agent("a", "host=one")
        await second.expect(DialRequest("tcp", "one:80", 1))


async def test_an_agent_wakes_the_dials_that_are_for_it(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others would be chosen for in vain, all of them with each agent that connects."""
    async with serving(**HOSTS) as server:
        client = await server.client()
        for number in range(100):
            client.send(DialRequest("tcp", f"host{number}:80", number + 1))
        client.send(DialRequest("tcp", "one:80", 101), DialRequest("tcp", "one:81", 102))
        await settle()
        assert held(server) == 102
        chosen: list[str] = []
        choose = server.state.pool.choose

        def counted(address: str) -> Backend | None:
            chosen.append(address)
            return choose(address)

        monkeypatch.setattr(server.state.pool, "choose", counted)
        agent = await server.agent("a", "host=one&host=nobody")
        assert sorted(chosen) == ["one:80", "one:81"]
        assert {await agent.next(), await agent.next()} == {
            DialRequest("tcp", "one:80", 101),
            DialRequest("tcp", "one:81", 102),
        }
        assert held(server) == 100


@pytest.mark.parametrize(
    ("strategies", "identifiers", "woken"),
    [
        (("default",), "", True),
        (("destHost", "default"), "host=other", True),
        (("defaultRoute",), "default-route=true", True),
        (("defaultRoute",), "", False),
        (("destHost", "defaultRoute"), "host=one", True),
        (("destHost", "defaultRoute"), "host=other", False),
        (("destHost", "defaultRoute"), "host=other&default-route=true", True),
    ],
)
async def test_which_agents_a_dial_waits_for(
    strategies: tuple[str, ...], identifiers: str, woken: bool, autojump_clock: MockClock
) -> None:
    async with serving(agent_arrival_timeout_s=10.0, proxy_strategies=strategies) as server:
        client = await server.client()
        client.send(DialRequest("tcp", "one:80", 1))
        await settle()
        agent = await server.agent("a", identifiers)
        if woken:
            await agent.expect(DialRequest("tcp", "one:80", 1))
        else:
            await agent.expect_nothing_more()
        assert held(server) == (not woken)


# -- HTTP CONNECT ----------------------------------------------------------------------------------


async def test_connect_waits_as_well(autojump_clock: MockClock) -> None:
    async with serving(**HOSTS) as server:
        client = await server.http()
        await client.send_all(REQUEST % b"one" + b"early")
        await trio.sleep(3)
        assert server.pending == held(server) == 1
        agent = await server.agent("a", "host=one")
        dial = await agent.next()
        assert isinstance(dial, DialRequest)
        agent.send(dial_ok(1, dial.random))
        assert await client.receive_some() == b"HTTP/1.1 200 Connection Established\r\n\r\n"
        await agent.expect(Data(1, data=b"early"))
        # Nobody looks after a client any more that is being read.
        await trio.sleep(10)
        assert server.established == 1


async def test_connect_without_an_agent(autojump_clock: MockClock) -> None:
    async with serving(**HOSTS) as server:
        client = await server.http()
        await client.send_all(REQUEST % b"one")
        await settle()
        answer = await read_to_end(client)
        assert answer.endswith(b"currently no tunnels available: No agent available")
        assert trio.current_time() == pytest.approx(10)
        assert server.dial_failures == {"no_agent": 1}


async def test_connect_client_leaves(autojump_clock: MockClock) -> None:
    async with serving(**HOSTS) as server:
        client = await server.http(tcp_pair())
        await client.send_all(REQUEST % b"one")
        await settle()
        assert held(server) == 1
        client.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, bytes([1] + [0] * 7))
        await client.aclose()
        await trio.sleep(1)
        assert server.pending == held(server) == 0
        assert server.dial_failures == {"frontend_close": 1}
        assert value(server.metrics.http_connections) == 0
        assert not values(server.metrics.pending_backend_dials)


async def test_a_server_that_ends_holds_nothing(autojump_clock: MockClock) -> None:
    async with serving(**HOSTS) as server:
        client = await server.client()
        client.send(DialRequest("tcp", "one:80", 1))
        await settle()
        assert held(server) == 1
        server.state.arrivals.close()
        await client.expect(NO_AGENT)
        assert held(server) == server.pending == 0
        assert trio.current_time() == 0
        other = await server.client()
        other.send(DialRequest("tcp", "one:80", 2))
        await other.next()
        assert trio.current_time() == 0
