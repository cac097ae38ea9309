"""The extension at the agent, with services that are gone and credit as it comes (docs/protocol-extensions.md)."""

from __future__ import annotations

import random
import socket
from typing import TYPE_CHECKING

import pytest
import trio
from harness import read_to_end, session, settle
from test_agent_extension import MIB, ended, exactly, pieces, received

from clusterproxy.tunnel.extension import INITIAL_CREDIT
from clusterproxy_proto import CloseResponse, Credit, Data, HalfClose, Reset

if TYPE_CHECKING:
    from trio.testing import MockClock

PIECE_COST = 32_013


async def reset(service: trio.SocketStream) -> None:
    service.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1] + [0] * 7))
    await service.aclose()


async def test_a_service_that_is_gone_while_there_is_no_credit(autojump_clock: MockClock) -> None:
    """Nobody reads its socket then."""
    async with session(window=4 * MIB, extended=True) as agent:
        service = await agent.connect(tcp=True)
        # All that the credit allows, and no byte more that is still to be delivered.
        await service.send_all(bytes(65_502))
        await settle()
        assert [type(packet) for packet in received(agent)] == [Data] * 3
        await reset(service)
        assert isinstance(await agent.server.next(within=6), Reset)
        assert agent.open == 0
        await agent.server.expect_nothing_more()


@pytest.mark.parametrize("later", [0, 4, 3600])
async def test_a_reset_goes_behind_what_waits_for_credit(
    later: float, autojump_clock: MockClock
) -> None:
    """The kernel still has what the service sent before: it is read, and then the reset."""
    async with session(window=4 * MIB, extended=True) as agent:
        service = await agent.connect(tcp=True)
        data = bytes(range(250)) * 400
        await service.send_all(data)
        await settle()
        assert len(agent.server.received) == 3
        await reset(service)
        await trio.sleep(later)
        agent.server.send(Credit(1, MIB))
        assert await agent.server.read(1, len(data)) == data
        await agent.server.expect(Reset(1, "Connection reset by peer"))
        assert agent.open == 0


async def test_a_service_that_is_gone_after_its_end(autojump_clock: MockClock) -> None:
    async with session(window=4 * MIB, extended=True) as agent:
        service = await agent.connect(tcp=True)
        await service.send_eof()
        await agent.server.expect(HalfClose(1))
        await reset(service)
        assert isinstance(await agent.server.next(within=6), Reset)
        assert agent.open == 0
        await agent.server.expect_nothing_more()


@pytest.mark.parametrize("first", ["server", "service"])
async def test_a_service_that_ends_in_order_is_not_gone(
    first: str, autojump_clock: MockClock
) -> None:
    """Even if both directions are over for the kernel while what it sent waits for credit."""
    async with session(window=4 * MIB, extended=True) as agent:
        service = await agent.connect(tcp=True)
        data = bytes(range(256)) * 600
        if first == "server":
            agent.server.send(HalfClose(1))
            await ended(service)
        await service.send_all(data)
        await service.send_eof()
        if first == "service":
            await settle()
            agent.server.send(HalfClose(1))
            await ended(service)
        await trio.sleep(3600)
        assert len(agent.server.received) == 3
        assert agent.open == 1
        agent.server.send(Credit(1, MIB))
        assert await agent.server.read(1, len(data)) == data
        packet = await agent.server.next()
        if packet == HalfClose(1):
            packet = await agent.server.next()
        assert packet == CloseResponse("", 1)
        assert agent.open == 0


async def test_both_ends_while_the_service_does_not_read(autojump_clock: MockClock) -> None:
    """The connection is over for the server; what is queued still gets to the service."""
    async with session(window=4 * MIB, extended=True) as agent:
        service = await agent.connect(tcp=True)
        sent: list[Data] = []
        credit = INITIAL_CREDIT
        while credit > 0:
            (packet,) = pieces(1, 1)
            sent.append(packet)
            agent.server.send(packet)
            await settle()
            granted = sum(p.size for p in received(agent) if isinstance(p, Credit))
            credit += granted - PIECE_COST
        agent.server.send(HalfClose(1))
        await service.send_eof()
        await agent.server.expect(CloseResponse("", 1))
        assert agent.state.budget.used
        await exactly(service, b"".join(packet.data for packet in sent))
        await ended(service)


async def test_a_flood_of_half_closes(autojump_clock: MockClock) -> None:
    async with session(window=4 * MIB, extended=True) as agent:
        service = await agent.connect()
        agent.server.send(Data(1, data=b"all"), *[HalfClose(1)] * 2_000, Data(1, data=b"late"))
        assert await read_to_end(service) == b"all"
        await agent.server.expect_nothing_more()
        assert not agent.state.budget.used
        await service.send_all(b"answer")
        await agent.server.expect(Data(1, data=b"answer"))


async def test_random_credit_keeps_every_byte_in_order(autojump_clock: MockClock) -> None:
    rnd = random.Random(5)  # noqa: S311  a choice that must be the same each time
    async with session(window=4 * MIB, extended=True) as agent:
        services = {n: await agent.connect(connect_id=n, tcp=n == 1) for n in (1, 2)}
        data = {n: rnd.randbytes(1_500_000) for n in services}
        got = {n: bytearray() for n in services}
        async with trio.open_nursery() as nursery:
            for n, service in services.items():
                nursery.start_soon(service.send_all, data[n])
            with trio.fail_after(60):
                while any(len(got[n]) < len(data[n]) for n in services):
                    await trio.sleep(0.01)
                    for packet in received(agent):
                        assert isinstance(packet, Data)
                        got[packet.connect_id] += packet.data
                    size = rnd.choice((1, 100, 5_000, 32_768, 200_000))
                    agent.server.send(Credit(rnd.choice((1, 2)), size))
                    if rnd.random() < 0.1:
                        agent.server.pause()
                        await trio.sleep(0.02)
                        agent.server.resume()
        assert got == data
