"""The extension with agents and clients that are slow, gone, or mean harm (docs/protocol-extensions.md)."""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING

import pytest
import trio
from harness import dial_ok, serving, settle, value, values
from test_server_extension import GONE, KIB, MIB, ended, exactly, http, pieces

from clusterproxy.server import backend
from clusterproxy.tunnel.extension import INITIAL_CREDIT
from clusterproxy_proto import (
    CloseDial,
    CloseRequest,
    CloseResponse,
    Credit,
    Data,
    DialRequest,
    DialResponse,
    HalfClose,
    Payload,
    Reset,
)

if TYPE_CHECKING:
    from harness import ClientPeer, ServerWorld
    from trio.testing import MockClock

# A piece as it is counted against credit, for connectIDs below 128.
PIECE_COST = 32_013


def taken(peer: ClientPeer) -> list[Payload | None]:
    packets = [packet.payload for packet in peer.received]
    peer.received.clear()
    return packets


async def fill(agent: ClientPeer) -> list[Data]:
    """Send on connection 1 until the server grants nothing more; return what was sent."""
    sent: list[Data] = []
    credit = INITIAL_CREDIT
    while credit > 0:
        (packet,) = pieces(1, 1)
        agent.send(packet)
        sent.append(packet)
        await settle()
        credit += sum(p.size for p in taken(agent) if isinstance(p, Credit)) - PIECE_COST
    return sent


async def echo(agent: ClientPeer, count: int) -> None:
    """Play an agent whose service answers every piece before it reads the next one."""
    credit = INITIAL_CREDIT
    waiting: deque[Data] = deque()
    while count:
        packet = await agent.next()
        if isinstance(packet, Credit):
            credit += packet.size
        else:
            assert isinstance(packet, Data)
            waiting.append(packet)
        while waiting and credit > 0:
            agent.send(waiting.popleft(), Credit(1, PIECE_COST))
            credit -= PIECE_COST
            count -= 1


# -- both ends are over, and data waits ------------------------------------------------------------


@pytest.mark.parametrize("first", ["service", "client"])
async def test_both_ends_of_an_http_client(first: str, autojump_clock: MockClock) -> None:
    """Its socket is closed for the kernel then, in order; what it sent still waits for credit."""
    async with serving() as server:
        agent = await server.agent(extended=True)
        client = await http(server, agent, tcp=True)
        data = bytes(range(256)) * 600
        if first == "service":
            agent.send(HalfClose(1))
            await ended(client)
        await client.send_all(data)
        await client.send_eof()
        if first == "client":
            await settle()
            agent.send(HalfClose(1))
            await ended(client)
        await trio.sleep(12)
        assert len(agent.received) == 3
        agent.send(Credit(1, MIB))
        assert await agent.read(1, len(data)) == data
        await agent.expect(HalfClose(1))
        agent.send(CloseResponse("", 1))
        await settle()
        await agent.expect_nothing_more()
        assert value(server.metrics.http_connections) == 0


# -- the agent closes, and data waits for its credit -----------------------------------------------


async def test_a_close_of_the_agent_frees_what_waits_for_it(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(extended=True), await server.client(extended=True)
        for number in (1, 2, 3):
            await server.connect(client, agent, number, number)
            # More than the client's window.
            client.send(*pieces(number, 60))
            await settle()
            assert server.state.budget.used > MIB // 2
            assert client.unsent
            agent.received.clear()
            agent.send(CloseResponse("", number))
            await client.expect(CloseResponse("", number))
            await settle()
            assert not server.state.budget.used
            # The rest of it was let in, and dropped.
            assert not client.unsent
            await agent.expect_nothing_more()
        assert not values(server.metrics.rejected_packets_total)


async def test_a_close_of_the_agent_frees_an_http_client(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent(extended=True)
        client = await http(server, agent, tcp=True)
        await client.send_all(bytes(150_000))
        await settle()
        assert server.state.budget.used
        agent.received.clear()
        agent.send(CloseResponse("", 1))
        await ended(client)
        assert not server.state.budget.used
        await trio.sleep(2)
        assert value(server.metrics.http_connections) == 0
        await agent.expect_nothing_more()


# -- CLOSE_REQ behind data that waits --------------------------------------------------------------


@pytest.mark.parametrize("client_stays", [True, False])
async def test_close_behind_data_of_an_echo(client_stays: bool, autojump_clock: MockClock) -> None:
    """The service reads on only once its answers are gone, so they must still be granted."""
    async with serving() as server:
        agent = await server.agent(extended=True, window=4 * MIB)
        client = await server.client(extended=True)
        await server.connect(client, agent)
        sent = pieces(1, 20)
        client.send(*sent, CloseRequest(1))
        await settle()
        if not client_stays:
            client.half_close()
            await settle()
            assert server.established == 0
        await echo(agent, len(sent))
        packet = await agent.next()
        while isinstance(packet, Credit):
            packet = await agent.next()
        assert packet == CloseRequest(1)
        agent.send(CloseResponse("", 1))
        if client_stays:
            await client.expect(*sent, CloseResponse("", 1))
        await agent.expect_nothing_more()
        assert not server.state.budget.used
        assert server.established == 0
        assert not values(server.metrics.rejected_packets_total)


# -- HALF_CLOSE twice ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["grpc", "http-connect"])
async def test_more_behind_a_half_close_of_the_agent(mode: str, autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent(extended=True, window=4 * MIB)
        client = await server.client(extended=True)
        stream: trio.SocketStream | None = None
        if mode == "grpc":
            await server.connect(client, agent)
        else:
            stream = await http(server, agent, tcp=True)
        agent.send(Data(1, data=b"all"), HalfClose(1), HalfClose(1), Data(1, data=b"late"))
        await settle()
        agent.send(*pieces(1, 8))
        await settle()
        assert values(server.metrics.rejected_packets_total) == {"from_agent,after_half_close": 9}
        # The other direction goes on.
        if stream is None:
            await client.expect(Data(1, data=b"all"), HalfClose(1))
            await client.expect_nothing_more()
            client.send(Data(1, data=b"on"), HalfClose(1))
        else:
            await exactly(stream, b"all")
            await ended(stream)
            await stream.send_all(b"on")
            await stream.send_eof()
        await agent.expect(Data(1, data=b"on"), HalfClose(1))
        agent.send(CloseResponse("", 1))
        if stream is None:
            await client.expect(CloseResponse("", 1))
        await settle()
        assert server.established == 0


@pytest.mark.parametrize("on", ["filled", "other"])
async def test_a_flood_of_half_closes(on: str, autojump_clock: MockClock) -> None:
    """To a client that does not read: nothing grows, and its stream is not reset for it."""
    async with serving() as server:
        agent = await server.agent(extended=True, window=4 * MIB)
        client = await server.client(extended=True, window=64 * KIB)
        await server.connect(client, agent, 1, 1)
        await server.connect(client, agent, 2, 2)
        client.pause()
        sent = await fill(agent)
        before = server.state.budget.used
        assert before
        number = 1 if on == "filled" else 2
        agent.send(*[HalfClose(number)] * 12_000)
        await settle()
        assert server.state.budget.used - before < 100
        client.resume()
        await settle()
        assert client.closed_with is None
        got = taken(client)
        assert got.count(HalfClose(number)) == 1
        assert [packet for packet in got if isinstance(packet, Data)] == sent


# -- RESET -----------------------------------------------------------------------------------------


async def test_a_long_reason_of_a_client_is_cut(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(extended=True), await server.client(extended=True)
        await server.connect(client, agent)
        client.send(Reset(1, "x" * (3 * MIB)))
        await agent.expect(Reset(1, "x" * 1024))
        await agent.expect_nothing_more()


async def test_resets_do_not_make_closes_forgotten(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(backend, "_CLOSING_LIMIT", 2)
    async with serving() as server:
        agent, client = await server.agent(extended=True), await server.client(extended=True)
        for number in range(1, 6):
            await server.connect(client, agent, number, number)
        leaving = await server.client()
        await server.connect(leaving, agent, 6, 6)
        leaving.send(CloseRequest(6))
        leaving.half_close()
        await agent.expect(CloseRequest(6))
        for number in range(1, 6):
            client.send(Reset(number, "enough"))
            await agent.expect(Reset(number, "enough"))
        agent.send(Data(6, data=b"late"), Data(5, data=b"late"))
        await agent.expect_nothing_more()
        assert not values(server.metrics.rejected_packets_total)
        # Of resets as many are remembered as that.
        agent.send(Data(1, data=b"late"))
        await agent.expect(CloseRequest(1))


# -- clients that are gone -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 150_000])
async def test_an_http_client_that_is_gone(size: int, autojump_clock: MockClock) -> None:
    """Nobody reads its socket while its bytes wait for credit."""
    async with serving() as server:
        agent = await server.agent(extended=True)
        client = await http(server, agent, tcp=True)
        await client.send_all(bytes(size))
        await settle()
        client.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, bytes([1] + [0] * 7))
        await client.aclose()
        await trio.sleep(6)
        *before, last = taken(agent)
        assert last == Reset(1, GONE)
        assert all(isinstance(packet, Data) for packet in before)
        assert value(server.metrics.http_connections) == 0
        assert not server.state.budget.used


@pytest.mark.parametrize("size", [0, 150_000])
async def test_an_http_client_on_a_unix_socket_that_is_gone(
    size: int, autojump_clock: MockClock
) -> None:
    """Its end and its loss look the same: what it sent is delivered, and no answer awaited."""
    async with serving() as server:
        agent = await server.agent(extended=True)
        client = await http(server, agent)
        data = bytes(range(250)) * (size // 250)
        await client.send_all(data)
        await client.aclose()
        await trio.sleep(60)
        if data:
            assert len(agent.received) == 3
            agent.send(Credit(1, MIB))
        assert await agent.read(1, size) == data
        await agent.expect(HalfClose(1))
        assert await agent.next(within=6) == CloseRequest(1)
        agent.send(CloseResponse("", 1))
        await trio.sleep(2)
        assert value(server.metrics.http_connections) == 0
        assert server.established == 0
        await agent.expect_nothing_more()


@pytest.mark.parametrize("extended", [True, False])
async def test_a_dial_that_a_client_takes_back(extended: bool, autojump_clock: MockClock) -> None:
    """Our agent gives it up; a Go agent would ignore what it is told, so it is told nothing."""
    async with serving() as server:
        agent, client = await server.agent(extended=extended), await server.client()
        client.send(DialRequest("tcp", "target:80", 7))
        await agent.expect(DialRequest("tcp", "target:80", 7))
        client.send(CloseDial(8), CloseDial(7), CloseDial(7))
        if extended:
            await agent.expect(CloseDial(7))
        await agent.expect_nothing_more()
        assert server.pending == 0
        assert server.dial_failures == {"frontend_close": 1}
        # It may have been too late.
        agent.send(dial_ok(1, 7))
        await agent.expect(CloseRequest(1))
        await client.expect_nothing_more()


# -- agents that break the rules -------------------------------------------------------------------


async def test_a_number_that_is_still_leaving(autojump_clock: MockClock) -> None:
    """An agent that uses it again gets its new dial refused, and the old one's data."""
    async with serving() as server:
        agent = await server.agent(extended=True)
        first, second = await server.client(), await server.client()
        await server.connect(first, agent, 1, 1)
        sent = pieces(1, 8)
        first.send(*sent, CloseRequest(1))
        await settle()
        first.half_close()
        await settle()
        await agent.expect(*sent[:3])
        second.send(DialRequest("tcp", "target:80", 2))
        await agent.expect(DialRequest("tcp", "target:80", 2))
        agent.send(dial_ok(1, 2))
        error = "agent answered without a new connection ID"
        await second.expect(DialResponse(error=error, random=2))
        assert server.dial_failures == {"error_response": 1}
        assert server.established == 0
        agent.send(Credit(1, MIB))
        await agent.expect(*sent[3:], CloseRequest(1))
        assert not server.state.budget.used
        agent.send(CloseResponse("", 1))
        # Now it is free.
        await server.connect(second, agent, 1, 3)


@pytest.mark.parametrize("last", [CloseResponse("", 1), Reset(1, "broken")])
async def test_no_credit_after_the_end(
    last: CloseResponse | Reset, autojump_clock: MockClock
) -> None:
    async with serving() as server:
        agent = await server.agent(extended=True, window=4 * MIB)
        client = await server.client(extended=True, window=64 * KIB)
        await server.connect(client, agent)
        client.pause()
        sent = await fill(agent)
        agent.send(last)
        await settle()
        assert server.state.budget.used
        client.resume()
        await client.expect(*sent, last)
        assert not server.state.budget.used
        await agent.expect_nothing_more()


async def test_odd_credit(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(extended=True), await server.client(extended=True)
        await server.connect(client, agent)
        most = (1 << 63) - 1
        agent.send(Credit(1, -most - 1), Credit(-5, 3), HalfClose(0), Reset(-1, "x"))
        agent.send(Credit(1, most), Credit(1, most))
        sent = pieces(1, 5)
        client.send(*sent)
        await agent.expect(*sent)


# -- integrity -------------------------------------------------------------------------------------


async def dial_two_each(
    server: ServerWorld, client: ClientPeer, agents: tuple[ClientPeer, ClientPeer]
) -> dict[int, tuple[ClientPeer, int]]:
    """Connect twice to each agent; return each client's number with the agent and its number."""
    found: dict[int, tuple[ClientPeer, int]] = {}
    while len(found) < 4:
        number = len(found) + 1
        client.send(DialRequest("tcp", "target:80", number))
        await settle()
        (agent,) = (one for one in agents if one.received)
        assert isinstance(await agent.next(), DialRequest)
        connect_id = 1 + sum(1 for owner, _ in found.values() if owner is agent)
        agent.send(dial_ok(connect_id, number))
        answer = await client.next()
        assert isinstance(answer, DialResponse)
        found[answer.connect_id] = agent, connect_id
    return found


async def test_random_credit_keeps_every_byte_in_order(autojump_clock: MockClock) -> None:
    """Connections of two agents that use the same numbers, so some are renumbered."""
    rnd = random.Random(7)  # noqa: S311  a choice that must be the same each time
    async with serving() as server:
        agents = (await server.agent("a", extended=True), await server.agent("b", extended=True))
        client = await server.client(extended=True, window=256 * KIB)
        found = await dial_two_each(server, client, agents)
        sent, got = ({number: bytearray() for number in found} for _ in range(2))
        ends: list[int] = []

        def collect() -> None:
            for number, (agent, connect_id) in found.items():
                for packet in (p.payload for p in agent.received):
                    if isinstance(packet, Data) and packet.connect_id == connect_id:
                        assert number not in ends
                        got[number] += packet.data
                    elif packet == HalfClose(connect_id):
                        ends.append(number)
            for agent in agents:
                agent.received.clear()

        for _ in range(400):
            number = rnd.choice([*found])
            if client.unsent < 50_000:
                data = rnd.randbytes(rnd.choice([1, 100, 3_000, 20_000, 32_000, 60_000]))
                client.send(Data(number, data=data))
                sent[number] += data
            agent, connect_id = found[rnd.choice([*found])]
            agent.send(Credit(connect_id, rnd.choice([1, 700, 20_000, 64_000])))
            if rnd.random() < 0.5:
                await settle()
                collect()
        for number in found:
            client.send(HalfClose(number))
        for _ in range(60):
            for agent, connect_id in found.values():
                agent.send(Credit(connect_id, 100_000))
            await settle()
            collect()
        assert all(sent.values())
        assert got == sent
        assert sorted(ends) == sorted(found)
        assert not server.state.budget.used


async def test_clients_that_leave_much_behind_and_go(autojump_clock: MockClock) -> None:
    """No window bounds what they leave together, so the total budget does."""
    async with serving(total_buffer_bytes=2 * MIB) as server:
        agent = await server.agent(extended=True)
        resets: list[Reset] = []
        for number in range(1, 13):
            client = await server.client()
            await server.connect(client, agent, number, number)
            client.send(*pieces(number, 20), CloseRequest(number))
            await settle()
            client.half_close()
            await settle()
            assert server.state.budget.used < 3 * MIB
            resets += [p.payload for p in agent.received if isinstance(p.payload, Reset)]
            agent.received.clear()
        assert resets[-1] == Reset(12, "the service took nothing and the client has gone")


async def test_clients_that_leave_much_behind_a_slow_go_agent(autojump_clock: MockClock) -> None:
    """The same where the agent's stream is what is slow: it takes a little with each dial."""
    async with serving(total_buffer_bytes=2 * MIB) as server:
        agent = await server.agent()
        agent.pause()
        last: list[Payload | None] = []
        for number in range(1, 13):
            client = await server.client()
            client.send(DialRequest("tcp", "target:80", number))
            agent.resume()
            while (packet := await agent.next()) != DialRequest("tcp", "target:80", number):
                last.append(packet)
            agent.pause()
            agent.send(dial_ok(number, number))
            await client.expect(dial_ok(number, number))
            client.send(*pieces(number, 20), CloseRequest(number))
            await settle()
            client.half_close()
            await settle()
            assert server.state.budget.used < 3 * MIB
        assert server.established == 0
        agent.resume()
        await settle()
        last += [packet.payload for packet in agent.received]
        agent.received.clear()
        # Each is closed, those that were given up, too.
        closed = [packet for packet in last if isinstance(packet, CloseRequest)]
        assert sorted(packet.connect_id for packet in closed) == list(range(1, 13))
        assert not server.state.budget.used
