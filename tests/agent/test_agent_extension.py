"""Credit, half-close and reset with a server that knows them (docs/protocol-extensions.md)."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import pytest
import trio
from harness import AgentWorld, dial_ok, read_to_end, session, settle, values

from clusterproxy.tunnel.extension import INITIAL_CREDIT
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
    from trio.testing import MockClock

KIB = 1024
MIB = 1024 * KIB
PIECE = 32_000


def pieces(connect_id: int, count: int) -> list[Data]:
    return [Data(connect_id, data=b"%8d" % n * (PIECE // 8)) for n in range(count)]


async def exactly(service: trio.SocketStream, expected: bytes) -> None:
    data = b""
    with trio.fail_after(10):
        while len(data) < len(expected):
            more = await service.receive_some(len(expected) - len(data))
            assert more
            data += more
    assert data == expected


async def ended(service: trio.SocketStream) -> None:
    with trio.fail_after(1):
        assert await service.receive_some() == b""


def received(agent: AgentWorld) -> list[Payload | None]:
    packets = [packet.payload for packet in agent.server.received]
    agent.server.received.clear()
    return packets


def size_of(packets: list[Data]) -> int:
    return sum(5 + len(encode(Packet.of(packet))) for packet in packets)


# -- negotiation -----------------------------------------------------------------------------------


async def test_it_is_not_used_unless_accepted(autojump_clock: MockClock) -> None:
    async with session(window=4 * MIB) as agent:
        service = await agent.connect()
        agent.server.send(Credit(1, 1 << 40), HalfClose(1), Reset(1, "x"))
        agent.server.send_message(encode(Packet(1002)))
        agent.server.send(*pieces(1, 20))
        await exactly(service, b"".join(packet.data for packet in pieces(1, 20)))
        data = bytes(300_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.send_all, data)
            assert await agent.server.read(1, len(data)) == data
        await agent.server.expect_nothing_more()
        assert not values(agent.metrics.rejected_packets_total)


# -- credit ----------------------------------------------------------------------------------------


async def test_a_server_that_takes_nothing_for_an_hour(autojump_clock: MockClock) -> None:
    """The service is not read; nothing is closed, and nobody else waits."""
    async with session(window=4 * MIB, extended=True) as agent:
        service, other = [await agent.connect(connect_id=n) for n in (1, 2)]
        data = bytes(range(256)) * 4_000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service.send_all, data)
            await settle()
            first = [packet for packet in received(agent) if isinstance(packet, Data)]
            assert size_of(first) == pytest.approx(INITIAL_CREDIT, abs=100)
            await trio.sleep(3600)
            await agent.server.expect_nothing_more()
            await other.send_all(b"hello")
            await agent.server.expect(Data(2, data=b"hello"))
            assert not agent.state.budget.used
            # One byte of credit is as good as any for one packet that small.
            agent.server.send(Credit(1, 1000))
            await settle()
            (more,) = received(agent)
            assert isinstance(more, Data)
            agent.server.send(Credit(1, MIB))
            taken = b"".join(packet.data for packet in (*first, more))
            taken += await agent.server.read(1, len(data) - len(taken))
            assert taken == data


async def test_a_service_that_does_not_read(autojump_clock: MockClock) -> None:
    """A13: the server is granted nothing more for it; it finds its bytes after an hour."""
    async with session(window=4 * MIB, extended=True) as agent:
        service, quick = [await agent.connect(connect_id=n) for n in (1, 2)]
        sent: list[Data] = []
        credit = INITIAL_CREDIT
        while credit > 0:
            for packet in pieces(1, 1):
                sent.append(packet)
                agent.server.send(packet)
                credit -= size_of([packet])
            await settle()
            granted = [packet for packet in received(agent) if isinstance(packet, Credit)]
            credit += sum(packet.size for packet in granted)
        used = agent.state.budget.used
        assert 0 < used < 2 * MIB
        agent.server.send(Data(2, data=b"hello"))
        await exactly(quick, b"hello")
        await trio.sleep(3600)
        assert agent.open == 2
        assert not values(agent.metrics.stalled_connections_total)
        await exactly(service, b"".join(packet.data for packet in sent))
        await settle()
        assert any(isinstance(packet, Credit) for packet in received(agent))
        assert not agent.state.budget.used


async def test_a_service_that_keeps_pace_is_granted_more(autojump_clock: MockClock) -> None:
    async with session(window=4 * MIB, extended=True) as agent:
        service = await agent.connect()
        grants: list[int] = []
        for _ in range(4):
            sent = pieces(1, 3)
            agent.server.send(*sent)
            await exactly(service, b"".join(packet.data for packet in sent))
            await settle()
            grants += [p.size for p in received(agent) if isinstance(p, Credit)]
        assert sum(grants) >= MIB - INITIAL_CREDIT


@pytest.mark.parametrize("extent", ["one", "run"])
async def test_overdraft(extent: str, autojump_clock: MockClock) -> None:
    async with session(window=8 * MIB, extended=True) as agent:
        service = await agent.connect()
        other = await agent.connect(connect_id=2)
        for packet in pieces(1, 400):
            agent.server.send(packet)
            if extent == "one":
                await settle()
                if agent.open != 2:
                    break
        agent.server.send(Data(2, data=b"hello"))
        await exactly(other, b"hello")
        await settle()
        packets = [packet for packet in received(agent) if not isinstance(packet, Credit)]
        assert packets[0] == Reset(1, "more DATA than was granted")
        assert set(packets[1:]) <= {CloseResponse("unrecognized connectID", 1)}
        assert agent.open == 1
        await read_to_end(service)


# -- half-close ------------------------------------------------------------------------------------


async def test_the_server_ends_first(autojump_clock: MockClock) -> None:
    async with session(extended=True) as agent:
        service = await agent.connect(tcp=True)
        agent.server.send(
            Data(1, data=b"request"), HalfClose(1), HalfClose(1), Data(1, data=b"late")
        )
        await exactly(service, b"request")
        await ended(service)
        await trio.sleep(3600)
        await agent.server.expect_nothing_more()
        await service.send_all(b"answer")
        await service.aclose()
        await agent.server.expect(Data(1, data=b"answer"), CloseResponse("", 1))
        assert agent.open == 0


async def test_the_service_ends_first(autojump_clock: MockClock) -> None:
    async with session(extended=True) as agent:
        service = await agent.connect(tcp=True)
        await service.send_all(b"all I have")
        await service.send_eof()
        await agent.server.expect(Data(1, data=b"all I have"), HalfClose(1))
        await trio.sleep(3600)
        agent.server.send(Data(1, data=b"go on"))
        await exactly(service, b"go on")
        agent.server.send(Data(1, data=b"."), HalfClose(1))
        await agent.server.expect(CloseResponse("", 1))
        await exactly(service, b".")
        await ended(service)
        assert agent.open == 0


async def test_a_close_after_the_service_has_ended(autojump_clock: MockClock) -> None:
    async with session(extended=True) as agent:
        service = await agent.connect(tcp=True)
        await service.send_eof()
        await agent.server.expect(HalfClose(1))
        agent.server.send(Data(1, data=b"last"), CloseRequest(1))
        await agent.server.expect(CloseResponse("", 1))
        await exactly(service, b"last")
        await ended(service)


async def test_half_close_behind_a_queue(autojump_clock: MockClock) -> None:
    """The service gets everything before its end of the stream."""
    async with session(window=4 * MIB, extended=True) as agent:
        service = await agent.connect()
        sent = pieces(1, 3)
        agent.server.send(*sent, HalfClose(1))
        await settle()
        await exactly(service, b"".join(packet.data for packet in sent))
        await ended(service)


async def test_datagrams_know_no_end(autojump_clock: MockClock) -> None:
    async with session(extended=True) as agent:
        service = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        await service.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{service.getsockname()[1]}"
        ends: tuple[Payload, ...] = (HalfClose(1), Reset(2, ""))
        for number, last in enumerate(ends, 1):
            agent.server.send(DialRequest("udp", address, number))
            await agent.server.expect(dial_ok(number, number))
            agent.server.send(Data(number, data=b"one"), last)
            if number == 1:
                await agent.server.expect(CloseResponse("", 1))
            assert await service.recv(100) == b"one"
            await settle()
            assert agent.open == 0
        await agent.server.expect_nothing_more()
        service.close()


async def test_datagrams_wait_for_credit(autojump_clock: MockClock) -> None:
    async with session(window=4 * MIB, extended=True) as agent:
        service = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        await service.bind(("127.0.0.1", 0))
        agent.server.send(DialRequest("udp", f"127.0.0.1:{service.getsockname()[1]}", 7))
        await agent.server.expect(dial_ok(1, 7))
        agent.server.send(Data(1, data=b"hello"))
        _, address = await service.recvfrom(100)
        for _ in range(5):
            await service.sendto(bytes(20_000), address)
            await settle()
        packets = [packet for packet in received(agent) if isinstance(packet, Data)]
        assert len(packets) == 4
        agent.server.send(Credit(1, MIB))
        await agent.server.expect(Data(1, data=bytes(20_000)))
        service.close()


# -- reset -----------------------------------------------------------------------------------------


async def test_the_service_resets(autojump_clock: MockClock) -> None:
    async with session(extended=True) as agent:
        service = await agent.connect(tcp=True)
        await service.send_all(b"last")
        await agent.server.expect(Data(1, data=b"last"))
        service.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1] + [0] * 7))
        await service.aclose()
        await agent.server.expect(Reset(1, "Connection reset by peer"))
        assert agent.open == 0
        await agent.server.expect_nothing_more()


async def test_the_service_is_gone_when_it_is_written_to(autojump_clock: MockClock) -> None:
    async with session(extended=True) as agent:
        service = await agent.connect(tcp=True)
        await service.aclose()
        await agent.server.expect(HalfClose(1))
        agent.server.send(Data(1, data=b"x"))
        await settle()
        agent.server.send(Data(1, data=b"x"))
        packet = await agent.server.next()
        assert isinstance(packet, Reset)
        assert packet.reason
        assert agent.open == 0


async def test_the_server_resets(autojump_clock: MockClock) -> None:
    async with session(extended=True) as agent:
        service = await agent.connect(tcp=True)
        agent.server.send(Data(1, data=b"part"), Reset(1, "the client has gone"))
        await settle()
        assert agent.open == 0
        with pytest.raises(trio.BrokenResourceError):
            await read_to_end(service)
        await agent.server.expect_nothing_more()
        # It is a number like any other that is not in use now.
        agent.server.send(Data(1, data=b"x"))
        await agent.server.expect(CloseResponse("unrecognized connectID", 1))
        agent.server.send(Credit(1, 5), HalfClose(1), Reset(1, ""))
        await agent.server.expect_nothing_more()
