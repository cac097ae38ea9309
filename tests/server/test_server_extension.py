"""Credit, half-close and reset with agents and clients that know them (docs/protocol-extensions.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from harness import ServerWorld, dial_ok, serving, settle, tcp_pair, value, values

from clusterproxy.tunnel.extension import INITIAL_CREDIT, METADATA_KEY
from clusterproxy_proto import (
    CloseRequest,
    CloseResponse,
    Credit,
    Data,
    DialRequest,
    HalfClose,
    Packet,
    Payload,
    Reset,
    encode,
)

if TYPE_CHECKING:
    from harness import ClientPeer
    from trio.testing import MockClock

KIB = 1024
MIB = 1024 * KIB
PIECE = 32_000
REQUEST = b"CONNECT target:443 HTTP/1.1\r\nHost: target:443\r\n\r\n"
ESTABLISHED = b"HTTP/1.1 200 Connection Established\r\n\r\n"
GONE = "the client has gone"
GO = "grpc-go/1.72.0"


def pieces(connect_id: int, count: int) -> list[Data]:
    return [Data(connect_id, data=b"%8d" % n * (PIECE // 8)) for n in range(count)]


async def http(server: ServerWorld, agent: ClientPeer, *, tcp: bool = False) -> trio.SocketStream:
    client = await server.http(tcp_pair() if tcp else None)
    await client.send_all(REQUEST)
    dial = await agent.next()
    assert isinstance(dial, DialRequest)
    agent.send(dial_ok(1, dial.random))
    await exactly(client, ESTABLISHED)
    return client


async def exactly(client: trio.SocketStream, expected: bytes) -> None:
    data = b""
    with trio.fail_after(10):
        while len(data) < len(expected):
            more = await client.receive_some(len(expected) - len(data))
            assert more
            data += more
    assert data == expected


async def ended(client: trio.SocketStream) -> None:
    with trio.fail_after(1):
        assert await client.receive_some() == b""


def send_within_credit(agent: ClientPeer, packets: list[Data], credit: int) -> int:
    """Send as an agent that heeds its credit; return what is left of it."""
    while packets and credit > 0:
        packet = packets.pop(0)
        agent.send(packet)
        credit -= 5 + len(encode(Packet.of(packet)))
    return credit


# -- negotiation -----------------------------------------------------------------------------------


async def test_negotiation(autojump_clock: MockClock) -> None:
    async with serving() as server:
        plain, ours = await server.agent("plain"), await server.agent("ours", extended=True)
        assert METADATA_KEY not in await plain.response()
        assert (await ours.response())[METADATA_KEY] == ["1"]
        client = await server.client(extended=True)
        assert (await client.response())[METADATA_KEY] == ["1"]
        other = await server.client()
        other.send(DialRequest("tcp", "x:1", 1))
        await settle()
        assert METADATA_KEY not in await other.response()


async def test_who_has_not_agreed_is_ignored(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(), await server.client()
        await server.connect(client, agent)
        for peer in (agent, client):
            peer.send(Credit(1, 1 << 40), HalfClose(1), Reset(1, "x"))
            peer.send_message(encode(Packet(1001)))
        await agent.expect_nothing_more()
        await client.expect_nothing_more()
        agent.send(Data(1, data=b"still"))
        client.send(Data(1, data=b"here"))
        await client.expect(Data(1, data=b"still"))
        await agent.expect(Data(1, data=b"here"))
        assert not values(server.metrics.rejected_packets_total)


async def test_liveness(autojump_clock: MockClock) -> None:
    async with serving() as server:
        for extended in (True, False):
            agent = await server.agent(extended=extended)
            (connection,) = (c for c in server.agents.connections if not c.lost)
            assert connection.keepalive == ((5.0, 10.0) if extended else None)
            agent.hang_up()
            await settle()
    async with serving(given=frozenset({"keepalive-time"})) as server:
        await server.agent(extended=True)
        (connection,) = server.agents.connections
        assert connection.keepalive is None


# -- credit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["grpc", "http-connect"])
async def test_a_reader_that_sleeps_for_an_hour(mode: str, autojump_clock: MockClock) -> None:
    """S25: its bytes wait at the agent, and nobody else does."""
    async with serving() as server:
        agent = await server.agent(extended=True)
        sleeper = await server.client(window=64 * KIB)
        http_client: trio.SocketStream | None = None
        if mode == "grpc":
            await server.connect(sleeper, agent, 1, 1)
            sleeper.pause()
        else:
            http_client = await http(server, agent)
        neighbour = await server.client()
        await server.connect(neighbour, agent, 2, 2)
        packets = pieces(1, 100)
        expected = b"".join(packet.data for packet in packets)
        credit = INITIAL_CREDIT
        # As much as the server takes; the socket of an HTTP client has a buffer of its own.
        while packets:
            credit = send_within_credit(agent, packets, credit)
            await settle()
            granted = [p.payload for p in agent.received if isinstance(p.payload, Credit)]
            agent.received.clear()
            if not granted:
                break
            credit += sum(p.size for p in granted)
        assert packets
        assert credit <= 0
        assert server.state.budget.used < 5 * MIB
        await trio.sleep(3600)
        agent.send(Data(2, data=b"hello"))
        await neighbour.expect(Data(2, data=b"hello"))
        assert server.established == 2
        assert not values(server.metrics.stalled_connections_total)

        async def feed(credit: int = credit) -> None:
            while packets:
                granted = await agent.next(within=5)
                assert isinstance(granted, Credit)
                credit = send_within_credit(agent, packets, credit + granted.size)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed)
            if http_client is not None:
                await exactly(http_client, expected)
            else:
                sleeper.resume()
                assert await sleeper.read(1, len(expected), within=10) == expected
        await settle()
        assert not server.state.budget.used


async def test_what_the_agent_has_no_credit_for_waits(autojump_clock: MockClock) -> None:
    """A13: the client is slowed down, the others on the agent's stream are not."""
    async with serving() as server:
        agent = await server.agent(extended=True)
        client, neighbour = await server.client(), await server.client()
        await server.connect(client, agent, 1, 1)
        await server.connect(neighbour, agent, 2, 2)
        sent = pieces(1, 60)
        client.send(*sent, CloseRequest(1))
        await settle()
        got = [packet.payload for packet in agent.received]
        agent.received.clear()
        assert got == sent[:3]
        # The client's window is 1 MiB, so some of it has not even left.
        assert client.unsent
        neighbour.send(Data(2, data=b"hello"))
        await agent.expect(Data(2, data=b"hello"))
        await trio.sleep(3600)
        await agent.expect_nothing_more()
        agent.send(Credit(1, 32_100))
        await agent.expect(sent[3])
        agent.send(Credit(1, -5), Credit(1, 0), Credit(9, 5))
        await agent.expect_nothing_more()
        agent.send(Credit(1, 4 * MIB))
        await agent.expect(*sent[4:], CloseRequest(1))
        agent.send(CloseResponse("", 1))
        await client.expect(CloseResponse("", 1))


@pytest.mark.parametrize("extent", ["one", "run"])
async def test_overdraft(extent: str, autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent(extended=True)
        client, neighbour = await server.client(), await server.client()
        await server.connect(client, agent, 1, 1)
        await server.connect(neighbour, agent, 2, 2)
        client.pause()
        if extent == "one":
            for packet in pieces(1, 12):
                agent.send(packet)
                await settle()
        else:
            agent.send(*pieces(1, 12))
        agent.send(Data(2, data=b"hello"))
        await neighbour.expect(Data(2, data=b"hello"))
        await settle()
        packets = [p.payload for p in agent.received]
        agent.received.clear()
        assert packets[-1] == Reset(1, "more DATA than was granted")
        assert server.established == 1
        assert values(server.metrics.rejected_packets_total) == {"from_agent,overdraft": 1}
        client.resume()
        while isinstance(last := await client.next(), Data):
            pass
        assert last == CloseResponse("more DATA than was granted", 1)


# -- the client's end ------------------------------------------------------------------------------


async def test_fin_of_an_http_client(autojump_clock: MockClock) -> None:
    """H12: the service's answer may take its time."""
    async with serving() as server:
        agent = await server.agent(extended=True)
        client = await http(server, agent)
        await client.send_all(b"request")
        await client.send_eof()
        await agent.expect(Data(1, data=b"request"), HalfClose(1))
        await trio.sleep(3600)
        agent.send(Data(1, data=b"answer"), CloseResponse("", 1))
        await exactly(client, b"answer")
        await ended(client)
        await agent.expect_nothing_more()


async def test_an_http_client_that_is_gone_after_its_fin(autojump_clock: MockClock) -> None:
    """Nobody reads its socket then, and the service says nothing."""
    async with serving() as server:
        agent = await server.agent(extended=True)
        client = await http(server, agent, tcp=True)
        await client.send_eof()
        await agent.expect(HalfClose(1))
        client.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, bytes([1] + [0] * 7))
        await client.aclose()
        assert await agent.next(within=6) == Reset(1, GONE)
        await settle()
        assert value(server.metrics.http_connections) == 0


async def test_half_close_of_a_client_behind_its_data(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(extended=True), await server.client(extended=True)
        await server.connect(client, agent)
        sent = pieces(1, 6)
        client.send(*sent, HalfClose(1), HalfClose(1), Data(1, data=b"too late"))
        await agent.expect(*sent[:3])
        await agent.expect_nothing_more()
        agent.send(Credit(1, MIB))
        await agent.expect(*sent[3:], HalfClose(1))
        await agent.expect_nothing_more()
        agent.send(Data(1, data=b"answer"), CloseResponse("", 1))
        await client.expect(Data(1, data=b"answer"), CloseResponse("", 1))


async def test_half_close_of_a_client_with_a_go_agent(autojump_clock: MockClock) -> None:
    async with serving(half_close_linger_s=7.0) as server:
        agent, client = await server.agent(), await server.client(extended=True)
        await server.connect(client, agent)
        client.send(Data(1, data=b"request"), HalfClose(1))
        await agent.expect(Data(1, data=b"request"))
        begin = trio.current_time()
        assert await agent.next(within=8) == CloseRequest(1)
        assert trio.current_time() - begin == pytest.approx(7, abs=0.1)
        agent.send(CloseResponse("", 1))
        await client.expect(CloseResponse("", 1))


@pytest.mark.parametrize("how", ["http", "cancel", "reset"])
async def test_a_client_breaks_off(how: str, autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent(extended=True)
        reason = GONE
        if how == "http":
            http_client = await http(server, agent, tcp=True)
            await http_client.send_all(bytes(100_000))
            await settle()
            http_client.setsockopt(
                trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, bytes([1] + [0] * 7)
            )
            await http_client.aclose()
            # Its socket is not read while its bytes wait for credit.
            await trio.sleep(5)
        else:
            client = await server.client(extended=True)
            await server.connect(client, agent)
            client.send(*pieces(1, 6))
            await settle()
            if how == "cancel":
                client.reset()
            else:
                reason = "enough"
                client.send(Reset(1, reason))
        await settle()
        packets = [p.payload for p in agent.received if not isinstance(p.payload, Data)]
        agent.received.clear()
        assert packets == [Reset(1, reason)]
        assert server.established == 0
        # What was under way is dropped without a word, and credit for it means nothing.
        agent.send(Data(1, data=b"late"), Credit(1, MIB))
        await agent.expect_nothing_more()
        assert not server.state.budget.used


@pytest.mark.parametrize("takes", [True, False])
async def test_a_client_closes_and_goes(takes: bool, autojump_clock: MockClock) -> None:
    """What it sent before waits for credit, for as long as the service takes some of it."""
    async with serving() as server:
        agent, client = await server.agent(extended=True), await server.client()
        await server.connect(client, agent)
        sent = pieces(1, 20)
        client.send(*sent, CloseRequest(1))
        await settle()
        client.half_close()
        await settle()
        assert server.established == 0
        await agent.expect(*sent[:3])
        if takes:
            for packet in sent[3:]:
                await trio.sleep(8)
                agent.send(Credit(1, 32_013))
                assert await agent.next() == packet
            await trio.sleep(8)
            agent.send(Credit(1, 32_013))
            assert await agent.next() == CloseRequest(1)
            agent.send(CloseResponse("", 1))
        else:
            last = await agent.next(within=21)
            assert last == Reset(1, "the service took nothing and the client has gone")
        await settle()
        assert not server.state.budget.used
        await agent.expect_nothing_more()


@pytest.mark.parametrize("extended", [True, False])
@pytest.mark.parametrize("takes", [True, False])
@pytest.mark.parametrize("told_of_an_end", [True, False])
async def test_an_http_client_closes_while_what_it_sent_waits(
    told_of_an_end: bool, takes: bool, extended: bool, autojump_clock: MockClock
) -> None:
    """On a Unix socket, of which the server knows that nobody reads it any more."""
    async with serving() as server:
        agent = await server.agent(extended=extended)
        client = await http(server, agent)
        if told_of_an_end and extended:
            agent.send(HalfClose(1))
            await ended(client)
        if not extended:
            agent.pause()
        sent = bytes(400_000)
        with trio.move_on_after(1):
            await client.send_all(sent)
        await client.aclose()
        if takes:
            await trio.sleep(110)
            if extended:
                agent.send(Credit(1, MIB))
            else:
                agent.resume()
            await settle()
            packets = [packet.payload for packet in agent.received]
            assert sum(len(packet.data) for packet in packets if isinstance(packet, Data)) > 200_000
            assert packets[-1] in (HalfClose(1), CloseRequest(1))
            agent.send(CloseResponse("", 1))
        else:
            await trio.sleep(130)
        await settle()
        assert server.established == 0
        assert value(server.metrics.http_connections) == 0
        assert not server.state.budget.used
        if not takes and extended:
            assert agent.received[-1].payload == Reset(1, GONE)


@pytest.mark.parametrize("extended", [True, False])
async def test_a_client_ends_its_stream_without_a_close(
    extended: bool, autojump_clock: MockClock
) -> None:
    """It is an orderly end: the service gets all of what was sent, and no reset."""
    async with serving() as server:
        agent, client = await server.agent(extended=extended), await server.client()
        await server.connect(client, agent)
        sent = pieces(1, 6)
        agent.pause()
        client.send(*sent)
        await settle()
        client.half_close()
        assert await client.status() == ("OK", "")
        assert server.established == 0
        agent.resume()
        if extended:
            await agent.expect(*sent[:3])
            await agent.expect_nothing_more()
            agent.send(Credit(1, MIB))
            await agent.expect(*sent[3:])
        else:
            await agent.expect(*sent)
        await agent.expect(CloseRequest(1))
        agent.send(CloseResponse("", 1))
        await agent.expect_nothing_more()
        assert not server.state.budget.used


async def test_the_agent_is_done_with_one_that_waits_for_credit(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent(extended=True)
        ends: tuple[Payload, ...] = (CloseResponse("", 1), Reset(2, "x"))
        for number, last in enumerate(ends, 1):
            client = await server.client()
            await server.connect(client, agent, number, number)
            client.send(*pieces(number, 20), CloseRequest(number))
            await settle()
            client.half_close()
            await settle()
            agent.received.clear()
            assert server.state.budget.used
            agent.send(last)
            await settle()
            assert not server.state.budget.used


# -- the service's end -----------------------------------------------------------------------------


async def test_half_close_of_a_service_to_an_http_client(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent(extended=True)
        client = await http(server, agent)
        agent.send(Data(1, data=b"all I have"), HalfClose(1))
        await exactly(client, b"all I have")
        await ended(client)
        await client.send_all(b"go on")
        await agent.expect(Data(1, data=b"go on"))
        await client.send_eof()
        await agent.expect(HalfClose(1))
        agent.send(CloseResponse("", 1))
        await settle()
        assert value(server.metrics.http_connections) == 0


async def test_half_close_of_a_service_to_our_client(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(extended=True), await server.client(extended=True)
        await server.connect(client, agent)
        agent.send(Data(1, data=b"all I have"), HalfClose(1))
        await client.expect(Data(1, data=b"all I have"), HalfClose(1))
        client.send(Data(1, data=b"go on"), CloseRequest(1))
        await agent.expect(Data(1, data=b"go on"), CloseRequest(1))
        agent.send(CloseResponse("", 1))
        await client.expect(CloseResponse("", 1))


@pytest.mark.parametrize("user_agent", [GO, "other"])
async def test_half_close_of_a_service_to_a_go_client(
    user_agent: str, autojump_clock: MockClock
) -> None:
    async with serving() as server:
        agent, client = (
            await server.agent(extended=True),
            await server.client(user_agent=user_agent),
        )
        await server.connect(client, agent)
        agent.send(Data(1, data=b"all I have"), HalfClose(1))
        await client.expect(Data(1, data=b"all I have"), CloseResponse("", 1))
        await agent.expect(CloseRequest(1))
        agent.send(CloseResponse("", 1))
        await settle()
        assert server.established == 0
        await client.expect_nothing_more()


async def test_reset_of_a_service(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent(extended=True)
        ours, gos = await server.client(extended=True), await server.client()
        await server.connect(ours, agent, 1, 1)
        await server.connect(gos, agent, 2, 2)
        agent.send(Data(1, data=b"last"), Reset(1, "connection reset by peer"))
        agent.send(Data(2, data=b"last"), Reset(2, "connection reset by peer" * 1000))
        await ours.expect(Data(1, data=b"last"), Reset(1, "connection reset by peer"))
        await gos.expect(Data(2, data=b"last"))
        packet = await gos.next()
        assert isinstance(packet, CloseResponse)
        assert packet.error.startswith("connection reset by peer")
        assert len(packet.error) == 1024
        assert server.established == 0
        ours.send(Data(1, data=b"too late"))
        await agent.expect_nothing_more()


async def test_reset_of_a_service_to_an_http_client(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent(extended=True)
        client = await http(server, agent, tcp=True)
        agent.send(Data(1, data=b"last"), Reset(1, "connection reset by peer"))
        await exactly(client, b"last")
        with pytest.raises(trio.BrokenResourceError), trio.fail_after(2):
            await client.receive_some()
        await settle()
        assert value(server.metrics.http_connections) == 0
        await agent.expect_nothing_more()


async def test_the_agent_goes(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent, client = await server.agent(extended=True), await server.client(extended=True)
        await server.connect(client, agent)
        client.send(*pieces(1, 20))
        await settle()
        agent.received.clear()
        other = await server.client()
        await server.connect(other, agent, 2, 2)
        agent.hang_up()
        await client.expect(Reset(1, "the connection to the agent was lost"))
        await other.expect(CloseResponse("", 2))
        await settle()
        assert not server.state.budget.used
