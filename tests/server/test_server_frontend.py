"""Clients of gRPC mode: rows S01 to S24, S27 and S29 of the conformance list, packet by packet."""

from __future__ import annotations

from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import trio
from harness import CONNECT, PROXY, dial_ok, observations, serving, settle, value, values

from clusterproxy_proto import (
    CloseDial,
    CloseRequest,
    CloseResponse,
    Data,
    DialRequest,
    DialResponse,
    Drain,
    Packet,
    PacketType,
    encode,
)

if TYPE_CHECKING:
    from trio.testing import MockClock

NO_AGENT = "No agent available"
TIMED_OUT = "timed out waiting for backend dial"
UNDECODABLE = (
    "grpc: failed to unmarshal the received message: proto: cannot parse invalid wire-format data"
)
MISMATCH = "mismatched connection IDs"


def dial(random: int = 1, address: str = "target:80") -> DialRequest:
    return DialRequest("tcp", address, random)


# -- S01, S02, S12, S13: the ordinary life of a connection -----------------------------------------


async def test_no_agent(autojump_clock: MockClock) -> None:
    async with serving() as server:
        client = await server.client()
        client.send(dial(7))
        await client.expect(DialResponse(error=NO_AGENT, random=7))
        assert server.dial_failures == {"no_agent": 1}
        # Upstream hears no more of this stream, even once there is an agent.
        agent = await server.agent()
        client.send(dial(8), Data(1, data=b"x"), CloseRequest(1))
        await client.expect_nothing_more()
        await agent.expect_nothing_more()
        assert client.closed_with is None
        client.half_close()
        assert await client.status() == ("OK", "")


async def test_no_agent_for_a_second_dial(autojump_clock: MockClock) -> None:
    """The connections that there are go on."""
    async with serving(proxy_strategies=("destHost",)) as server:
        agent, client = await server.agent(identifiers="host=target"), await server.client()
        await server.connect(client, agent)
        client.send(dial(2, "elsewhere:80"), Data(1, data=b"on"))
        await client.expect(DialResponse(error=NO_AGENT, random=2))
        await agent.expect(Data(1, data=b"on"))


async def test_connection(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client = await server.client()
        assert values(server.metrics.grpc_connections) == {"Proxy": 1, "Connect": 1}
        client.send(dial(1234, "10.0.0.1:443"))
        await agent.expect(DialRequest("tcp", "10.0.0.1:443", 1234))
        assert server.pending == 1
        agent.send(dial_ok(5, 1234))
        await client.expect(dial_ok(5, 1234))
        assert (server.pending, server.established) == (0, 1)
        assert observations(server.metrics.dial_duration_seconds) == 1
        client.send(Data(5, data=b"one"), Data(5, data=b"two"))
        await agent.expect(Data(5, data=b"one"), Data(5, data=b"two"))
        agent.send(Data(5, data=b"three"), Data(5, data=b"four"))
        await client.expect(Data(5, data=b"three"), Data(5, data=b"four"))
        client.send(CloseRequest(5))
        await agent.expect(CloseRequest(5))
        # Until the agent says so the connection is there, and its last data arrives.
        agent.send(Data(5, data=b"five"), CloseResponse("", 5))
        await client.expect(Data(5, data=b"five"), CloseResponse("", 5))
        assert server.established == 0
        assert observations(server.metrics.connection_duration_seconds) == 1
        assert not server.dial_failures
        assert server.packets("from_client") == {"DIAL_REQ": 1, "DATA": 2, "CLOSE_REQ": 1}
        assert server.packets("to_agent") == {"DIAL_REQ": 1, "DATA": 2, "CLOSE_REQ": 1}
        assert server.packets("from_agent") == {"DIAL_RSP": 1, "DATA": 3, "CLOSE_RSP": 1}
        assert server.packets("to_client") == {"DIAL_RSP": 1, "DATA": 3, "CLOSE_RSP": 1}


async def test_agent_closes_with_an_error(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        await server.connect(client, agent)
        agent.send(CloseResponse("reset", 1), CloseResponse("", 1), Data(1, data=b"late"))
        await client.expect(CloseResponse("reset", 1))
        # What comes behind the close is unknown, and answered once.
        await agent.expect(CloseRequest(1))
        await client.expect_nothing_more()
        assert server.established == 0


async def test_a_late_packet_of_the_client_is_no_foreign_one(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        await server.connect(client, agent)
        agent.send(CloseResponse("", 1))
        await client.expect(CloseResponse("", 1))
        client.send(Data(1, data=b"late"), CloseRequest(1), Data(1, data=b"later"))
        await client.expect_nothing_more()
        await agent.expect_nothing_more()
        assert not values(server.metrics.rejected_packets_total)
        await server.connect(client, agent, 2, 2)


async def test_close_request_follows_queued_data(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        await server.connect(client, agent)
        agent.pause()
        data = [Data(1, data=bytes([n]) * 10_000) for n in range(20)]
        client.send(*data, CloseRequest(1))
        await settle()
        agent.resume()
        await agent.expect(*data, CloseRequest(1))
        client.send(CloseRequest(1))
        await agent.expect_nothing_more()


async def test_dial_error(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        client.send(dial(9))
        await agent.expect(dial(9))
        agent.send(DialResponse(error="dial tcp 10.0.0.1:1: connect: connection refused", random=9))
        await client.expect(
            DialResponse(error="dial tcp 10.0.0.1:1: connect: connection refused", random=9)
        )
        assert server.dial_failures == {"error_response": 1}
        assert (server.pending, server.established) == (0, 0)
        assert observations(server.metrics.dial_duration_seconds) == 0
        # The stream is still good.
        await server.connect(client, agent, 2, 10)


@pytest.mark.parametrize("connect_id", [0, -5, -(1 << 63)])
async def test_dial_answer_without_a_usable_connection_id(
    connect_id: int, autojump_clock: MockClock
) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        client.send(dial())
        await agent.expect(dial())
        agent.send(dial_ok(connect_id, 1))
        await client.expect(
            DialResponse(error="agent answered without a new connection ID", random=1)
        )
        assert server.dial_failures == {"error_response": 1}
        assert server.established == 0
        assert agent.closed_with is None


async def test_dial_answer_with_the_number_of_another_connection(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, first, second = await server.agent(), await server.client(), await server.client()
        await server.connect(first, agent, 1)
        second.send(dial())
        await agent.expect(dial())
        agent.send(dial_ok(1, 1), Data(1, data=b"for the first"))
        await second.expect(
            DialResponse(error="agent answered without a new connection ID", random=1)
        )
        await first.expect(Data(1, data=b"for the first"))
        await second.expect_nothing_more()


# -- S03 to S07: packets out of place --------------------------------------------------------------


async def test_data_before_a_dial(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        client.send(Data(55, data=b"x"), Data(55, data=b"y"), CloseRequest(55), dial())
        await client.expect(CloseResponse("backend not initialized", 55))
        await client.expect_nothing_more()
        await agent.expect_nothing_more()
        assert client.closed_with is None


async def test_close_before_a_dial(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        client.send(CloseRequest(55))
        await client.expect(CloseResponse("backend uninitialized", 55))
        await server.connect(client, agent)


async def test_data_and_close_while_the_dial_is_pending(autojump_clock: MockClock) -> None:
    """S24: with nothing dialled yet every number is somebody else's."""
    async with serving() as server:
        agent, other, client = await server.agent(), await server.client(), await server.client()
        await server.connect(other, agent, 1)
        client.send(dial(), Data(1, data=b"foreign"), CloseRequest(1))
        await agent.expect(dial())
        await agent.expect_nothing_more()
        await client.expect_nothing_more()
        assert values(server.metrics.rejected_packets_total) == {
            "from_client,foreign_connection": 2
        }
        agent.send(dial_ok(2, 1))
        await client.expect(dial_ok(2, 1))
        client.send(Data(2, data=b"own"))
        await agent.expect(Data(2, data=b"own"))


async def test_data_of_a_foreign_connection(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, victim, client = await server.agent(), await server.client(), await server.client()
        await server.connect(victim, agent, 1)
        await server.connect(client, agent, 2)
        client.send(Data(2, data=b"own"), Data(1, data=b"foreign"), Data(2, data=b"too late"))
        await agent.expect(Data(2, data=b"own"), CloseRequest(2))
        await client.expect(CloseResponse(MISMATCH, 2), CloseResponse(MISMATCH, 1))
        # It is told nothing more, and neither is the agent.
        client.send(dial(8), CloseRequest(1))
        agent.send(Data(2, data=b"in flight"), CloseResponse("", 2))
        await agent.expect_nothing_more()
        await client.expect_nothing_more()
        assert server.established == 1
        victim.send(Data(1, data=b"mine"))
        await agent.expect(Data(1, data=b"mine"))
        agent.send(Data(1, data=b"yours"))
        await victim.expect(Data(1, data=b"yours"))


async def test_close_of_a_foreign_connection(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, victim, client = await server.agent(), await server.client(), await server.client()
        await server.connect(victim, agent, 1)
        await server.connect(client, agent, 2)
        client.send(CloseRequest(1), Data(2, data=b"still here"))
        await agent.expect(Data(2, data=b"still here"))
        await client.expect_nothing_more()
        assert server.established == 2


async def test_mismatch_behind_queued_data(autojump_clock: MockClock) -> None:
    """What the agent has sent for the client's own connection still arrives first."""
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        await server.connect(client, agent)
        client.pause()
        sent = [Data(1, data=bytes([n]) * 20_000) for n in range(10)]
        agent.send(*sent)
        await settle()
        client.send(Data(9, data=b"foreign"))
        await settle()
        client.resume()
        got = [await client.next() for _ in range(12)]
        # The answer for the foreign number belongs to no queue and may overtake.
        got.remove(CloseResponse(MISMATCH, 9))
        assert got == [*sent, CloseResponse(MISMATCH, 1)]
        assert not server.state.budget.used


async def test_connection_zero(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        client.send(Data(0, data=b"before"))
        await server.connect(client, agent)
        client.send(Data(0, data=b"x"), Data(1, data=b"y"))
        await agent.expect(Data(1, data=b"y"))
        agent.send(Data(0, data=b"x"), Data(1, data=b"z"))
        await client.expect(Data(1, data=b"z"))
        await agent.expect_nothing_more()


async def test_what_is_ignored(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        await server.connect(client, agent)
        client.send_message(encode(Packet(9)))
        client.send_message(encode(Packet(9, Data(1, data=b"?"))))
        client.send(CloseDial(77), CloseDial(1), dial_ok(1, 1), CloseResponse("", 1), Drain())
        # Neither Go nor we send empty DATA, but it is DATA.
        client.send(Data(1), Data(1, data=b"y"))
        await agent.expect(Data(1), Data(1, data=b"y"))
        await client.expect_nothing_more()
        assert server.packets("from_client")["Unknown"] == 2
        assert not server.dial_failures
        assert server.established == 1


# -- S09 to S11: the client goes -------------------------------------------------------------------


async def test_dial_taken_back(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        client.send(dial(5), CloseDial(5))
        await agent.expect(dial(5))
        assert server.pending == 0
        assert server.dial_failures == {"frontend_close": 1}
        agent.send(dial_ok(3, 5))
        await agent.expect(CloseRequest(3))
        assert server.dial_failures == {"frontend_close": 1, "unrecognized_response": 1}
        # The agent's data crosses the request to close.
        agent.send(Data(3, data=b"greeting"), CloseResponse("", 3))
        await agent.expect_nothing_more()
        await client.expect_nothing_more()
        await server.connect(client, agent, 4, 6)


async def test_unknown_dial_answers(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        agent.send(DialResponse(error="refused", random=5), dial_ok(3, 6))
        await agent.expect(CloseRequest(3))
        assert server.dial_failures == {"unrecognized_response": 2}


@pytest.mark.parametrize("way", ["reset", "hang_up", "half_close"])
async def test_client_goes(way: str, autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, other, client = await server.agent(), await server.client(), await server.client()
        await server.connect(other, agent, 1, 1)
        await server.connect(client, agent, 2, 2)
        client.send(dial(3), dial(4))
        await agent.expect(dial(3), dial(4))
        getattr(client, way)()
        await agent.expect(CloseDial(3), CloseDial(4), CloseRequest(2))
        if way == "half_close":
            assert await client.status() == ("OK", "")
        assert (server.pending, server.established) == (0, 1)
        # A late success is closed; the rest of the old connection is nobody's, and no news.
        agent.send(dial_ok(3, 3), Data(2, data=b"x"), CloseResponse("", 2))
        await agent.expect(CloseRequest(3))
        await agent.expect_nothing_more()
        assert server.dial_failures == {"unrecognized_response": 1}
        assert values(server.metrics.grpc_connections) == {"Proxy": 1, "Connect": 1}
        other.send(Data(1, data=b"on"))
        await agent.expect(Data(1, data=b"on"))


async def test_client_is_cut_off_in_the_middle(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        await server.connect(client, agent)
        client.call.forward(None, 100, b"\0\0\0\x10\0" + b"x" * 95)
        await settle()
        client.reset()
        await agent.expect(CloseRequest(1))
        assert not values(server.metrics.stream_errors_total)


# -- S15, S16: the agent goes ----------------------------------------------------------------------


@pytest.mark.parametrize("way", ["reset", "hang_up", "half_close"])
async def test_agent_goes(way: str, autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        clients = [await server.client() for _ in range(3)]
        for number, client in enumerate(clients[:2], 1):
            await server.connect(client, agent, number, number)
        clients[2].send(dial(3))
        await agent.expect(dial(3))
        getattr(agent, way)()
        await clients[0].expect(CloseResponse("", 1))
        await clients[1].expect(CloseResponse("", 2))
        await clients[2].expect(
            DialResponse(error="agent disconnected before it answered the dial", random=3)
        )
        assert server.dial_failures == {"backend_close": 1}
        assert (server.pending, server.established) == (0, 0)
        assert value(server.metrics.ready_backends, "default") == 0
        expected = {} if way == "half_close" else {"from_agent,Canceled,Unknown": 1}
        assert values(server.metrics.stream_errors_total) == expected
        clients[0].send(Data(1, data=b"late"), dial(4))
        await clients[0].expect(DialResponse(error=NO_AGENT, random=4))


async def test_two_streams_of_one_agent(autojump_clock: MockClock) -> None:
    """S29, S15: the same connectIDs on two streams of one agent ID, and the end of one of them."""
    async with serving() as server:
        old = await server.agent("agent")
        first = await server.client()
        await server.connect(first, old, 1, 1)
        old.send(Drain())
        new = await server.agent("agent")
        assert value(server.metrics.ready_backends, "default") == 1
        second = await server.client()
        await server.connect(second, new, 1, 1)
        old.send(Data(1, data=b"old"))
        new.send(Data(1, data=b"new"))
        await first.expect(Data(1, data=b"old"))
        await second.expect(Data(1, data=b"new"))
        first.send(Data(1, data=b"to old"))
        second.send(Data(1, data=b"to new"))
        await old.expect(Data(1, data=b"to old"))
        await new.expect(Data(1, data=b"to new"))
        old.hang_up()
        await first.expect(CloseResponse("", 1))
        await second.expect_nothing_more()
        assert value(server.metrics.ready_backends, "default") == 1
        second.send(Data(1, data=b"still here"))
        await new.expect(Data(1, data=b"still here"))


async def test_agent_takes_a_dial_back(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        client.send(dial(5))
        await agent.expect(dial(5))
        agent.send(CloseDial(6), CloseDial(5))
        await client.expect(CloseDial(5))
        assert server.dial_failures == {"backend_close": 1}
        assert server.pending == 0
        await server.connect(client, agent, 1, 5)


# -- S14 and what else agents send -----------------------------------------------------------------


async def test_data_of_an_unknown_connection(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        agent.send(Data(99, data=b"x"), Data(99, data=b"y"))
        await agent.expect(CloseRequest(99))
        await agent.expect_nothing_more()
        agent.send(CloseResponse("", 99), Data(99, data=b"z"))
        await agent.expect(CloseRequest(99))
        # In a form that Go does not write.
        agent.send_message(encode(Packet.of(Data(98, data=b"z"))) + b"\x50\x01")
        await agent.expect(CloseRequest(98))
        agent.send(CloseResponse("", 55))
        await agent.expect_nothing_more()


async def test_what_is_ignored_from_agents(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        await server.connect(client, agent)
        agent.send_message(b"\xff\xff\xff")
        for kind in PacketType:
            if kind is not PacketType.DRAIN:
                agent.send_message(encode(Packet(kind)))
        agent.send_message(encode(Packet(PacketType.DATA, CloseResponse("", 1))))
        agent.send_message(encode(Packet(9)))
        agent.send(dial(), CloseRequest(1), Data(1))
        agent.send(Data(1, data=b"on"))
        await client.expect(Data(1), Data(1, data=b"on"))
        await agent.expect_nothing_more()
        assert values(server.metrics.rejected_packets_total) == {
            "from_agent,undecodable": 1,
            "from_agent,no_payload": 7,
        }
        assert server.established == 1


# -- S17, S18: dials that are not answered ---------------------------------------------------------


async def test_dial_timeout(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        client.send(dial(5))
        await agent.expect(dial(5))
        begin = autojump_clock.current_time()
        assert await client.next(within=60) == DialResponse(error=TIMED_OUT, random=5)
        assert 27.9 < autojump_clock.current_time() - begin < 28.1
        assert server.dial_failures == {"backend_dial_timeout": 1}
        assert server.pending == 0
        # The agent is kept; its late answer is closed.
        agent.send(dial_ok(1, 5))
        await agent.expect(CloseRequest(1))
        await server.connect(client, agent, 2, 6)


async def test_no_dial_timeout(autojump_clock: MockClock) -> None:
    async with serving(backend_dial_timeout_s=0.0) as server:
        agent, client = await server.agent(), await server.client()
        client.send(dial(5))
        await agent.expect(dial(5))
        with pytest.raises(trio.TooSlowError):
            await client.next(within=3600)
        agent.send(dial_ok(1, 5))
        await client.expect(dial_ok(1, 5))


async def test_answered_dials_do_not_time_out(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        await server.connect(client, agent)
        client.send(dial(2))
        await agent.expect(dial(2))
        agent.send(DialResponse(error="refused", random=2))
        await client.expect(DialResponse(error="refused", random=2))
        autojump_clock.jump(100)
        await client.expect_nothing_more()
        assert server.dial_failures == {"error_response": 1}


async def test_dial_timeout_of_an_agent_that_does_not_read(autojump_clock: MockClock) -> None:
    """S18: the agent is retired, for its dials do not even leave."""
    async with serving(backend_dial_timeout_s=2.0) as server:
        agent, busy, client = await server.agent(), await server.client(), await server.client()
        await server.connect(busy, agent)
        agent.pause()
        busy.send(*[Data(1, data=bytes(30_000)) for _ in range(4)])
        await settle()
        client.send(dial(5))
        assert await client.next(within=60) == DialResponse(error=TIMED_OUT, random=5)
        assert server.dial_failures == {"backend_dial_timeout": 1}
        assert not server.state.pool.backends
        assert value(server.metrics.ready_backends, "default") == 0
        await busy.expect(CloseResponse("", 1))
        assert (server.pending, server.established) == (0, 0)
        client.send(dial(6))
        await client.expect(DialResponse(error=NO_AGENT, random=6))
        # Its stream has ended, too, though it does not read.
        assert (await agent.status())[0] == "Canceled"


# -- S19, S29: several dials, colliding numbers ----------------------------------------------------


async def test_several_dials_on_one_stream(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        client.send(dial(1), dial(2), dial(3))
        await agent.expect(dial(1), dial(2), dial(3))
        agent.send(dial_ok(20, 2), dial_ok(10, 1), DialResponse(error="refused", random=3))
        await client.expect(dial_ok(20, 2), dial_ok(10, 1), DialResponse(error="refused", random=3))
        client.send(Data(10, data=b"ten"), Data(20, data=b"twenty"), CloseRequest(10))
        await agent.expect(Data(10, data=b"ten"), Data(20, data=b"twenty"), CloseRequest(10))
        agent.send(CloseResponse("", 10), Data(20, data=b"on"))
        await client.expect(CloseResponse("", 10), Data(20, data=b"on"))


async def test_two_clients_choose_the_same_number(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        clients = [await server.client() for _ in range(3)]
        randoms = []
        for client in clients:
            client.send(dial(7))
            request = await agent.next()
            assert isinstance(request, DialRequest)
            assert request.address == "target:80"
            randoms.append(request.random)
        assert randoms[0] == 7
        assert len(set(randoms)) == 3
        assert all(0 <= random < 1 << 63 for random in randoms)
        assert server.pending == 3
        agent.send(
            dial_ok(3, randoms[2]),
            DialResponse(error="refused", random=randoms[1]),
            dial_ok(1, randoms[0]),
        )
        await clients[0].expect(dial_ok(1, 7))
        await clients[1].expect(DialResponse(error="refused", random=7))
        await clients[2].expect(dial_ok(3, 7))
        agent.send(Data(3, data=b"for the third"))
        await clients[2].expect(Data(3, data=b"for the third"))


async def test_dial_with_a_number_that_is_pending(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        client.send(dial(7), dial(7))
        await agent.expect(dial(7))
        await client.expect(DialResponse(error="dial with this number is pending", random=7))
        agent.send(dial_ok(1, 7))
        await client.expect(dial_ok(1, 7))
        assert server.pending == 0


async def test_too_many_pending_dials(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        client.send(*[dial(n) for n in range(300)])
        for n in range(256, 300):
            await client.expect(DialResponse(error="too many pending dials", random=n))
        assert server.pending == 256
        assert len(agent.received) == 256
        assert values(server.metrics.rejected_packets_total) == {"from_client,too_many_dials": 44}


@pytest.mark.parametrize(
    ("protocol", "address", "refused"),
    [
        ("tcp", "x" * 1024, False),
        ("tcp", "x" * 1025, True),
        ("p" * 32, "target:80", False),
        ("p" * 33, "target:80", True),
    ],
)
async def test_dial_that_is_too_long(
    protocol: str, address: str, refused: bool, autojump_clock: MockClock
) -> None:
    """It would only cost the stream that the agent's connections share; the client goes on."""
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        request = DialRequest(protocol, address, 7)
        client.send(request)
        if refused:
            await client.expect(DialResponse(error="address or protocol too long", random=7))
            await agent.expect_nothing_more()
            assert server.pending == 0
        else:
            await agent.expect(request)
            await client.expect_nothing_more()
        rejected = values(server.metrics.rejected_packets_total)
        assert rejected == ({"from_client,long_address": 1} if refused else {})
        await server.connect(client, agent)


async def test_two_agents_choose_the_same_number(autojump_clock: MockClock) -> None:
    """The client is given another number for the second connection, and may use both."""
    async with serving(proxy_strategies=("destHost",)) as server:
        agents = [await server.agent(f"agent{n}", f"host=h{n}") for n in range(3)]
        client = await server.client()
        for n, agent in enumerate(agents):
            client.send(dial(n, f"h{n}:80"))
            await agent.expect(dial(n, f"h{n}:80"))
            agent.send(dial_ok(1, n))
        numbers = []
        for n in range(3):
            answer = await client.next()
            assert isinstance(answer, DialResponse)
            assert answer.random == n
            numbers.append(answer.connect_id)
        assert numbers[0] == 1
        assert len(set(numbers)) == 3
        for agent, number in zip(agents, numbers, strict=True):
            client.send(Data(number, data=b"to %d" % number))
            # In another form than Go's, too.
            client.send_message(encode(Packet.of(Data(number, data=b"more"))) + b"\x50\x01")
            await agent.expect(Data(1, data=b"to %d" % number), Data(1, data=b"more"))
            agent.send(Data(1, data=b"from %d" % number))
            agent.send_message(encode(Packet.of(Data(1, data=b"more"))) + b"\x50\x01")
            await client.expect(Data(number, data=b"from %d" % number), Data(number, data=b"more"))
        agents[1].send(CloseResponse("", 1))
        await client.expect(CloseResponse("", numbers[1]))
        client.send(CloseRequest(numbers[2]))
        await agents[2].expect(CloseRequest(1))
        await agents[0].expect_nothing_more()
        await agents[1].expect_nothing_more()


async def test_a_number_is_not_given_twice_on_one_stream(autojump_clock: MockClock) -> None:
    """What the client still sends for a closed connection must not reach the next one's service."""
    largest = (1 << 63) - 1
    async with serving(proxy_strategies=("destHost",)) as server:
        agents = [await server.agent(f"agent{n}", f"host=h{n}") for n in range(2)]
        client = await server.client()
        numbers = []
        for n, agent in enumerate(agents):
            client.send(dial(n, f"h{n}:80"))
            await agent.expect(dial(n, f"h{n}:80"))
            agent.send(dial_ok(largest, n))
            answer = await client.next()
            assert isinstance(answer, DialResponse)
            numbers.append(answer.connect_id)
            if not n:
                agent.send(CloseResponse("", largest))
                await client.expect(CloseResponse("", largest))
        assert numbers[0] == largest
        assert 0 < numbers[1] < largest
        client.send(Data(numbers[0], data=b"late"), Data(numbers[1], data=b"new"))
        await agents[1].expect(Data(largest, data=b"new"))


async def test_only_so_many_closed_numbers_are_remembered(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        for n in range(1, 1030):
            await server.connect(client, agent, n, n)
            agent.send(CloseResponse("", n))
            await client.expect(CloseResponse("", n))
        client.send(Data(1029, data=b"late"))
        await client.expect_nothing_more()
        assert not values(server.metrics.rejected_packets_total)
        client.send(Data(1, data=b"forgotten"))
        await client.expect_nothing_more()
        assert values(server.metrics.rejected_packets_total) == {
            "from_client,foreign_connection": 1
        }


# -- S20 to S23: bad input -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["DIAL_REQ", "DATA", "CLOSE_REQ", "DIAL_CLS"])
async def test_packet_without_payload(kind: str, autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, other, client = await server.agent(), await server.client(), await server.client()
        await server.connect(other, agent, 1, 1)
        await server.connect(client, agent, 2, 2)
        client.send_message(encode(Packet(PacketType[kind])))
        assert await client.status() == (
            "InvalidArgument",
            f"packet of type {kind} without its payload",
        )
        await agent.expect(CloseRequest(2))
        other.send(Data(1, data=b"on"))
        await agent.expect(Data(1, data=b"on"))
        assert values(server.metrics.rejected_packets_total) == {"from_client,no_payload": 1}
        assert values(server.metrics.stream_errors_total) == {
            "from_client,InvalidArgument,Unknown": 1
        }


async def test_payload_of_another_type(autojump_clock: MockClock) -> None:
    async with serving() as server:
        client = await server.client()
        client.send_message(encode(Packet(PacketType.DATA, CloseRequest(1))))
        assert (await client.status())[0] == "InvalidArgument"


async def test_undecodable_message(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        await server.connect(client, agent)
        client.send_message(b"\xff\xff\xff")
        assert await client.status() == (
            "Internal",
            UNDECODABLE,
        )
        await agent.expect(CloseRequest(1))


async def test_message_too_large(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        await server.connect(client, agent)
        client.send(Data(1, data=bytes(5 << 20)))
        status, text = await client.status()
        assert status == "ResourceExhausted"
        assert text.startswith("grpc: received message larger than max")
        assert server.limits_exceeded == ["message_size"]
        await agent.expect(CloseRequest(1))


async def test_unknown_methods(autojump_clock: MockClock) -> None:
    async with serving() as server:
        wrong = await server.call(server.frontends, "/ProxyService/Nope")
        assert await wrong.status() == (
            "Unimplemented",
            "unknown method Nope for service ProxyService",
        )
        # The two services are on ports of their own.
        wrong = await server.call(server.frontends, CONNECT)
        assert await wrong.status() == ("Unimplemented", "unknown service AgentService")
        wrong = await server.call(server.agents, PROXY)
        assert await wrong.status() == ("Unimplemented", "unknown service ProxyService")


async def test_data_that_is_not_canonical(autojump_clock: MockClock) -> None:
    """It is read as protobuf says, and goes on in the one form that nobody reads otherwise."""
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        await server.connect(client, agent)
        # connectID 9 first, then 1: the last one counts.
        client.send_message(b"\x08\x04\x22\x07\x08\x09\x08\x01\x1a\x01x")
        await agent.expect(Data(1, data=b"x"))
        # Payload twice: merged.
        client.send_message(b"\x08\x04\x22\x02\x08\x01\x22\x03\x1a\x01y")
        await agent.expect(Data(1, data=b"y"))
        agent.send_message(b"\x22\x05\x08\x01\x1a\x01z\x08\x04")
        await client.expect(Data(1, data=b"z"))


# -- large and small pieces, urgent answers --------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, 16_384, 32_740, 1 << 20, (4 << 20) - 100])
async def test_sizes(size: int, autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        await server.connect(client, agent)
        data = Data(1, data=bytes(range(256)) * (size // 256) + b"x" * (size % 256))
        client.send(data)
        await agent.expect(data)
        agent.send(data)
        await client.expect(data)


async def test_answers_that_nobody_fetches(autojump_clock: MockClock) -> None:
    """A client that asks without end and does not read is cut off, not buffered for."""
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        await server.connect(client, agent)
        client.pause()
        for _ in range(40):
            client.send(*[dial(n) for n in range(1000, 2000)])
            await settle()
            if client.closed_with:
                break
        status, _ = await client.status()
        assert status == "ResourceExhausted"
        assert server.limits_exceeded == ["answers"]
        assert server.established == 0
        assert server.pending == 0


async def test_dial_answer_that_cannot_be_sent(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        client.pause()
        client.send(dial(1))
        await agent.expect(dial(1))
        for _ in range(2000):
            client.send(dial(1))
        await settle()
        (pending,) = server.backend("agent").dials.values()
        waiting = pending.client.call.stream.schedule.urgent_size  # type: ignore[attr-defined]
        assert waiting
        with patch("clusterproxy.http2.stream._URGENT_LIMIT", waiting):
            agent.send(dial_ok(9, 1))
            await agent.expect(CloseRequest(9))
        assert (await client.status())[0] == "ResourceExhausted"
        assert server.dial_failures == {"send_rsp": 1}
        assert server.established == 0


async def test_keepalive_pings_are_not_punished(autojump_clock: MockClock) -> None:
    """F9: Go servers end the connection of a client that PINGs oftener than every five minutes."""
    async with serving() as server:
        client = await server.client()
        answered: list[float] = []
        for _ in range(120):
            client.connection.ping(lambda: answered.append(trio.current_time()))
            await trio.sleep(5)
        client.reset()
        for _ in range(120):
            # Now without a stream.
            client.connection.ping(lambda: answered.append(trio.current_time()))
            await trio.sleep(5)
        assert len(answered) == 240
        assert client.connection.lost is None
