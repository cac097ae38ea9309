"""Agents at the server, and the choice among them: rows B01 to B12 of the conformance list."""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
from harness import CONNECT, ServerWorld, dial_ok, serving, settle, value, values

from clusterproxy_proto import (
    CloseRequest,
    CloseResponse,
    Data,
    DialRequest,
    DialResponse,
    Drain,
    Packet,
    encode,
)

if TYPE_CHECKING:
    from harness import ClientPeer
    from trio.testing import MockClock

NO_AGENT = DialResponse(error="No agent available", random=1)


@pytest.fixture(autouse=True)
def _chance() -> None:
    random.seed(7)


async def chosen(server: ServerWorld, address: str, *agents: ClientPeer) -> int | None:
    """Dial, and return which of the agents was asked; None if there was none."""
    client = await server.client()
    client.send(DialRequest("tcp", address, 1))
    await settle()
    asked = [n for n, agent in enumerate(agents) if agent.received]
    if not asked:
        await client.expect(NO_AGENT)
        client.hang_up()
        return None
    (number,) = asked
    dial = await agents[number].next()
    assert isinstance(dial, DialRequest)
    assert dial.address == address
    agents[number].send(DialResponse(error="refused", random=dial.random))
    await client.expect(DialResponse(error="refused", random=1))
    client.hang_up()
    return number


def is_ready(server: ServerWorld) -> bool:
    return server.state.pool.ready


async def tally(server: ServerWorld, address: str, *agents: ClientPeer) -> set[int | None]:
    """All agents that are asked for an address."""
    return {await chosen(server, address, *agents) for _ in range(30)}


# -- B01 to B03 ------------------------------------------------------------------------------------


async def test_headers_at_once(autojump_clock: MockClock) -> None:
    async with serving(server_id="server-7", server_count=3) as server:
        agent = await server.agent()
        metadata = await agent.response()
        assert metadata["serverid"] == ["server-7"]
        assert metadata["servercount"] == ["3"]
        await agent.expect_nothing_more()
        assert values(server.metrics.ready_backends) == {"default": 1}


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({}, "expected one agent ID in the context, got []"),
        ({"agentid": ["a", "b"]}, "expected one agent ID in the context, got [a b]"),
        (
            {"agentid": ["a"], "agentidentifiers": ["host=a", "host=b"]},
            "expected at most one set of agent identifiers in the context, got [host=a host=b]",
        ),
        (
            {"agentid": ["a"], "agentidentifiers": ["host=%zz"]},
            'fail to parse url encoded string: invalid URL escape "%zz"',
        ),
        (
            {"agentid": ["a"], "agentidentifiers": ["host=a;host=b"]},
            "fail to parse url encoded string: invalid semicolon separator in query",
        ),
    ],
)
async def test_refused_agents(
    metadata: dict[str, list[str | bytes]], text: str, autojump_clock: MockClock
) -> None:
    async with serving() as server:
        agent = await server.call(server.agents, CONNECT, metadata)
        assert await agent.status() == ("Unknown", text)
        assert not server.state.pool.backends
        assert not values(server.metrics.grpc_connections)


async def test_no_identifiers(autojump_clock: MockClock) -> None:
    async with serving(proxy_strategies=("destHost", "default")) as server:
        agent = await server.call(server.agents, CONNECT, {"agentid": ["a"]})
        assert await chosen(server, "anything:1", agent) == 0


# -- B05 to B09, B12 -------------------------------------------------------------------------------


async def test_default(autojump_clock: MockClock) -> None:
    async with serving() as server:
        assert server.metrics.ready_backends.children[("default",)].value == 0
        agents = [await server.agent(f"agent{n}") for n in range(3)]
        assert values(server.metrics.ready_backends) == {"default": 3}
        assert value(server.metrics.ready_backend_connections) == 3
        assert await tally(server, "x:1", *agents) == {0, 1, 2}
        agents[1].hang_up()
        await settle()
        assert await tally(server, "x:1", *agents) == {0, 2}
        assert values(server.metrics.ready_backends) == {"default": 2}


async def test_default_is_balanced(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agents = [await server.agent(f"agent{n}") for n in range(2)]
        counts = Counter([await chosen(server, "x:1", *agents) for _ in range(200)])
        assert all(58 < count < 142 for count in counts.values())


async def test_default_route(autojump_clock: MockClock) -> None:
    async with serving(proxy_strategies=("defaultRoute",)) as server:
        agents = [
            await server.agent("a0"),
            await server.agent("a1", "default-route=false"),
            await server.agent("a2", "default-route=true"),
            await server.agent("a3", "default-route=what"),
            await server.agent("a4", "default-route=false&default-route=true"),
        ]
        assert await tally(server, "x:1", *agents) == {2}
        assert values(server.metrics.ready_backends) == {"defaultRoute": 1}
        agents[2].hang_up()
        await settle()
        assert await chosen(server, "x:1", *agents) is None
        assert server.dial_failures["no_agent"] == 1
        assert not server.state.pool.ready


IDENTIFIERS = "host=localhost&host=node1.mydomain.com&ipv4=1.2.3.4&ipv6=9878::7675:1292:9183:7562"


@pytest.mark.parametrize(
    "address",
    [
        "localhost",
        "localhost:80",
        "node1.mydomain.com:443",
        "1.2.3.4",
        "1.2.3.4:8080",
        "9878::7675:1292:9183:7562",
        "[9878::7675:1292:9183:7562]:8080",
    ],
)
async def test_dest_host(address: str, autojump_clock: MockClock) -> None:
    async with serving(proxy_strategies=("destHost",)) as server:
        agents = [await server.agent("a0", IDENTIFIERS), await server.agent("a1", "host=other")]
        assert await chosen(server, address, *agents) == 0
        # Identifiers are counted, as upstream does.
        assert values(server.metrics.ready_backends) == {"destHost": 5}
        agents[0].hang_up()
        await settle()
        assert await chosen(server, address, *agents) is None


@pytest.mark.parametrize(
    "address", ["LOCALHOST:80", "node1", "node1.mydomain.com.:80", "[::1]:80", ""]
)
async def test_dest_host_is_exact(address: str, autojump_clock: MockClock) -> None:
    async with serving(proxy_strategies=("destHost",)) as server:
        agent = await server.agent("a0", IDENTIFIERS)
        assert await chosen(server, address, agent) is None


async def test_strategies_in_turn(autojump_clock: MockClock) -> None:
    async with serving(proxy_strategies=("destHost", "defaultRoute", "default")) as server:
        assert set(server.metrics.ready_backends.children) == {
            ("destHost",),
            ("defaultRoute",),
            ("default",),
        }
        plain = await server.agent("plain")
        assert not is_ready(server)
        assert await tally(server, "h:1", plain) == {0}
        route = await server.agent("route", "default-route=true")
        assert await tally(server, "h:1", plain, route) == {1}
        host = await server.agent("host", "host=h")
        assert is_ready(server)
        assert await tally(server, "h:1", plain, route, host) == {2}
        assert await tally(server, "other:1", plain, route, host) == {1}
        assert values(server.metrics.ready_backends) == {
            "destHost": 1,
            "defaultRoute": 1,
            "default": 3,
        }
        assert value(server.metrics.ready_backend_connections) == 3
        host.hang_up()
        route.hang_up()
        await settle()
        assert await tally(server, "h:1", plain, route, host) == {0}


async def test_shared_identifiers(autojump_clock: MockClock) -> None:
    """Agents that share an identifier share its load, which upstream's do not."""
    async with serving(proxy_strategies=("destHost",)) as server:
        agents = [await server.agent(f"a{n}", f"host=shared&host=h{n}") for n in range(3)]
        assert await tally(server, "shared:1", *agents) == {0, 1, 2}
        assert await tally(server, "h1:1", *agents) == {1}
        agents[0].hang_up()
        await settle()
        assert await tally(server, "shared:1", *agents) == {1, 2}
        agents[1].hang_up()
        agents[2].hang_up()
        await settle()
        assert await chosen(server, "shared:1", *agents) is None


# -- B10, B11 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategies", [("default",), ("destHost",), ("defaultRoute",)])
async def test_drain(strategies: tuple[str, ...], autojump_clock: MockClock) -> None:
    async with serving(proxy_strategies=strategies) as server:
        identifiers = "host=h&default-route=true"
        agents = [await server.agent(f"a{n}", identifiers) for n in range(2)]
        client = await server.client()
        client.send(DialRequest("tcp", "h:1", 1))
        await settle()
        draining = 0 if agents[0].received else 1
        dial = await agents[draining].next()
        agents[draining].send(dial_ok(1, 1), Drain())
        assert isinstance(dial, DialRequest)
        await client.expect(dial_ok(1, 1))
        assert await tally(server, "h:1", *agents) == {1 - draining}
        # Still ready, and what is open goes on.
        assert sum(values(server.metrics.ready_backends).values()) in (1, 2)
        client.send(Data(1, data=b"on"))
        await agents[draining].expect(Data(1, data=b"on"))
        # Without a payload, as a Go agent's cannot be told from: it counts all the same.
        agents[1 - draining].send_message(encode(Packet(6)))
        await settle()
        assert await tally(server, "h:1", *agents) <= {0, 1}
        assert await chosen(server, "h:1", *agents) is not None
        # All drain: they are served.
        agents[1 - draining].hang_up()
        await settle()
        assert await tally(server, "h:1", *agents) == {draining}


async def test_the_oldest_stream_of_an_agent(autojump_clock: MockClock) -> None:
    async with serving() as server:
        streams = [await server.agent("same") for _ in range(3)]
        assert values(server.metrics.ready_backends) == {"default": 1}
        assert values(server.metrics.grpc_connections) == {"Connect": 3}
        assert await tally(server, "x:1", *streams) == {0}
        streams[0].send(Drain())
        await settle()
        assert await tally(server, "x:1", *streams) == {1}
        streams[1].hang_up()
        await settle()
        assert await tally(server, "x:1", *streams) == {2}
        streams[2].send(Drain())
        await settle()
        assert await tally(server, "x:1", *streams) == {0}
        streams[0].hang_up()
        await settle()
        assert await tally(server, "x:1", *streams) == {2}
        assert values(server.metrics.ready_backends) == {"default": 1}


async def test_draining_stream_is_not_older_than_other_agents(autojump_clock: MockClock) -> None:
    """An agent that drains and has come back is used for its new stream."""
    async with serving(proxy_strategies=("destHost",)) as server:
        old = await server.agent("same", "host=h")
        old.send(Drain())
        new = await server.agent("same", "host=h&host=i")
        assert await tally(server, "h:1", old, new) == {1}
        assert await tally(server, "i:1", old, new) == {1}


async def test_an_agent_that_takes_no_more_dials(autojump_clock: MockClock) -> None:
    """Dials that would only wait behind others are refused at once; the stream is kept."""
    async with serving() as server:
        agent = await server.agent()
        agent.pause()
        error = "too many dials wait for the agent"
        refused = 0
        clients = []
        while not refused:
            client = await server.client()
            clients.append(client)
            client.send(*[DialRequest("tcp", "x" * 1000, n) for n in range(200)])
            await settle()
            assert {packet.payload.error for packet in client.received} <= {error}  # type: ignore[union-attr]
            refused += len(client.received)
            client.received.clear()
            assert len(clients) < 10
        assert server.dial_failures == {"backend_close": refused}
        assert server.pending == 200 * len(clients) - refused
        assert not server.limits_exceeded
        agent.resume()
        await settle()
        assert len(agent.received) == server.pending
        clients[0].send(DialRequest("tcp", "y:1", 999))
        await settle()
        assert agent.received.pop().payload == DialRequest("tcp", "y:1", 999)


async def test_an_agent_that_answers_no_dials(autojump_clock: MockClock) -> None:
    """However little they take: there is an end to dials that wait for one agent."""
    async with serving() as server:
        agent, client, other = await server.agent(), await server.client(), await server.client()
        with patch("clusterproxy.server.backend._PENDING_LIMIT", 3):
            client.send(*[DialRequest("tcp", "x:1", n) for n in range(3)])
            await settle()
            other.send(DialRequest("tcp", "x:1", 9))
            await other.expect(DialResponse(error="too many dials wait for the agent", random=9))
            assert (server.pending, len(agent.received)) == (3, 3)
            assert server.dial_failures == {"backend_close": 1}
            agent.send(DialResponse(error="no", random=1))
            await client.expect(DialResponse(error="no", random=1))
            agent.received.clear()
            await server.connect(other, agent, 1, 10)


async def test_goodbyes_to_an_agent_that_does_not_read(autojump_clock: MockClock) -> None:
    """They wait for it, whatever other limit their number would exceed, and none is lost."""
    async with serving() as server:
        agent, client, other = await server.agent(), await server.client(), await server.client()
        await server.connect(other, agent, 5000, 5000)
        for n in range(1, 200):
            await server.connect(client, agent, n, n)
        agent.pause()
        sent = [Data(5000, data=bytes(30_000)) for _ in range(4)]
        other.send(*sent)
        await settle()
        with patch("clusterproxy.http2.stream._URGENT_LIMIT", 1000):
            client.hang_up()
            await settle()
        assert not server.limits_exceeded
        assert server.established == 1
        agent.resume()
        await settle()
        got = [packet.payload for packet in agent.received]
        agent.received.clear()
        assert [packet for packet in got if isinstance(packet, Data)] == sent
        assert {packet for packet in got if not isinstance(packet, Data)} == {
            CloseRequest(n) for n in range(1, 200)
        }


async def test_an_agent_goes_with_much_for_it_queued(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        clients = [await server.client() for _ in range(5)]
        for n, client in enumerate(clients, 1):
            await server.connect(client, agent, n, n)
        agent.pause()
        for n, client in enumerate(clients, 1):
            client.send(*[Data(n, data=bytes(30_000)) for _ in range(10)])
            await settle()
        assert server.state.budget.used
        agent.hang_up()
        for n, client in enumerate(clients, 1):
            await client.expect(CloseResponse("", n))
        assert not server.state.budget.used


async def test_advice_is_left_out_for_an_agent_that_does_not_read(
    autojump_clock: MockClock,
) -> None:
    """What an agent sends without need makes no answers without end."""
    async with serving() as server:
        agent = await server.agent()
        agent.pause()
        agent.send(*[Data(n, data=b"x") for n in range(1, 30_000)])
        await settle()
        backend = server.backend("agent")
        assert backend.call.stream.schedule.urgent_size < 66 * 1024
        agent.resume()
        await settle()
        assert 4_000 < len(agent.received) < 25_000
        assert not server.limits_exceeded


async def test_only_so_many_closes_are_remembered(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        for start in range(1, 12_000, 1000):
            agent.send(*[dial_ok(n, n) for n in range(start, start + 1000)])
            await settle()
        assert server.dial_failures == {"unrecognized_response": 12_000}
        assert len(server.backend("agent")._closing) == 10_000


async def test_agent_errors_are_counted(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        agent.send(Data(1, data=bytes(5 << 20)))
        status, _ = await agent.status()
        assert status == "ResourceExhausted"
        assert values(server.metrics.stream_errors_total) == {
            "from_agent,ResourceExhausted,Unknown": 1
        }
        assert not server.state.pool.backends
