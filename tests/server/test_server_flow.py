"""Budgets: who has to wait for a consumer that does not keep up, for how long, and what is left after it."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

import pytest
import trio
from harness import (
    ServerWorld,
    dial_ok,
    heed_kernel,
    read_to_end,
    serving,
    settle,
    tcp_pair,
    value,
    values,
)

from clusterproxy.transport.pace import READ_SIZE
from clusterproxy_proto import CloseRequest, CloseResponse, Data, DialRequest

if TYPE_CHECKING:
    from harness import ClientPeer
    from trio.testing import MockClock

KIB = 1024
BUDGET = 256 * KIB
PIECE = 32_000
# What goes out together shares a frame, up to what a connection writes at once.
BATCH = READ_SIZE
STALLED = "connection closed: the client did not read for too long"


def bulk(connect_id: int, size: int) -> list[Data]:
    """About *size* bytes, in pieces that can be told apart."""
    return [Data(connect_id, data=b"%6d" % n * (PIECE // 6)) for n in range(size // PIECE)]


def paused(server: ServerWorld) -> tuple[float, float]:
    metrics = server.metrics
    full = value(metrics.full_receive_channels, "Connect")
    assert value(metrics.connections_over_budget) == full
    return full, value(metrics.buffered_bytes)


async def read_slowly(client: ClientPeer, *, every: float, times: int) -> None:
    """Take one window at a time."""
    for _ in range(times):
        client.resume()
        client.pause()
        await trio.sleep(every)


async def two_clients(server: ServerWorld) -> tuple[ClientPeer, ClientPeer, ClientPeer]:
    agent = await server.agent()
    slow, neighbour = await server.client(), await server.client()
    await server.connect(slow, agent, 1)
    await server.connect(neighbour, agent, 2)
    return agent, slow, neighbour


async def test_within_the_budget_nobody_waits(autojump_clock: MockClock) -> None:
    async with serving(connection_buffer_bytes=BUDGET) as server:
        agent, slow, neighbour = await two_clients(server)
        slow.pause()
        sent = bulk(1, BUDGET)
        agent.send(*sent, Data(2, data=b"hello"))
        await neighbour.expect(Data(2, data=b"hello"))
        full, buffered = paused(server)
        assert not full
        assert buffered == server.state.budget.used > BUDGET // 2
        # However long: within its budget a consumer may sleep.
        await trio.sleep(3600)
        slow.resume()
        await slow.expect(*sent)
        assert paused(server) == (0, 0)


async def test_over_the_budget_the_agent_waits(autojump_clock: MockClock) -> None:
    async with serving(connection_buffer_bytes=BUDGET) as server:
        agent, slow, neighbour = await two_clients(server)
        slow.pause()
        sent = bulk(1, 3 << 20)
        agent.send(*sent, Data(2, data=b"hello"))
        await settle()
        full, buffered = paused(server)
        assert full == 1
        # The stream's window, which was granted before, comes on top, and what one frame brings of it
        # before it is counted.
        assert BUDGET < buffered < BUDGET + (1 << 20) + BATCH
        assert agent.unsent
        await neighbour.expect_nothing_more()
        slow.resume()
        await slow.expect(*sent)
        await neighbour.expect(Data(2, data=b"hello"))
        await trio.sleep(1)
        assert paused(server) == (0, 0)
        assert not values(server.metrics.stalled_connections_total)


async def test_no_progress(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(connection_buffer_bytes=BUDGET) as server:
        agent, slow, neighbour = await two_clients(server)
        slow.pause()
        agent.send(*bulk(1, 3 << 20), Data(2, data=b"hello"))
        await settle()
        waited = server.state.budget.used
        assert waited > BUDGET
        begin = trio.current_time()
        assert await neighbour.next(within=11) == Data(2, data=b"hello")
        assert 9 < trio.current_time() - begin < 11
        assert values(server.metrics.stalled_connections_total) == {"to_client": 1}
        await agent.expect(CloseRequest(1))
        await settle()
        assert paused(server) == (0, 0)
        assert server.established == 1
        # What was under way arrives, then the reason.
        slow.resume()
        while (packet := await slow.next()) != CloseResponse(STALLED, 1):
            assert isinstance(packet, Data)
        agent.send(CloseResponse("", 1))
        await slow.expect_nothing_more()
        assert slow.closed_with is None
        await server.connect(slow, agent, 3, 3)
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.args == (10.0, waited)
    assert "its client took nothing for 10 s" in record.getMessage()
    assert record.__dict__["connection_id"] == 1
    assert record.__dict__["agent_id"] == "agent"


async def test_slow_progress(autojump_clock: MockClock) -> None:
    async with serving(connection_buffer_bytes=BUDGET) as server:
        agent, slow, _ = await two_clients(server)
        slow.pause()
        agent.send(*bulk(1, 4 << 20))
        # 64 KiB every 8 s, and the window takes whole messages only now and then.
        await read_slowly(slow, every=4, times=40)
        assert not values(server.metrics.stalled_connections_total)
        assert server.established == 2
        assert len(slow.received) > 40


async def test_too_slow_progress(autojump_clock: MockClock) -> None:
    async with serving(connection_buffer_bytes=BUDGET) as server:
        agent, slow, _ = await two_clients(server)
        slow.pause()
        agent.send(*bulk(1, 4 << 20))
        await read_slowly(slow, every=15, times=3)
        assert values(server.metrics.stalled_connections_total) == {"to_client": 1}


@pytest.mark.parametrize(
    "end", ["client resets", "client hangs up", "client closes", "agent closes", "agent goes"]
)
async def test_the_end_of_a_connection_over_its_budget(end: str, autojump_clock: MockClock) -> None:
    async with serving(connection_buffer_bytes=BUDGET) as server:
        agent, slow, neighbour = await two_clients(server)
        slow.pause()
        sent = bulk(1, 3 * BUDGET)
        agent.send(*sent)
        await settle()
        assert paused(server)[0] == 1
        begin = trio.current_time()
        if end == "client resets":
            slow.reset()
        elif end == "client hangs up":
            slow.hang_up()
        elif end == "agent goes":
            agent.hang_up()
        else:
            if end == "client closes":
                slow.send(CloseRequest(1))
                await agent.expect(CloseRequest(1))
            agent.send(CloseResponse("", 1))
        await settle()
        await trio.sleep(1)
        assert trio.current_time() - begin < 2
        full, buffered = paused(server)
        if end.startswith("agent") or end == "client closes":
            # What was sent before is still delivered, and counts until then.
            assert buffered > BUDGET
            if end != "agent closes":
                slow.resume()
                await slow.expect(*sent, CloseResponse("", 1))
                await settle()
                assert not server.state.budget.used
            else:
                slow.hang_up()
        else:
            await agent.expect(CloseRequest(1))
            assert not full
            assert not buffered
        await settle()
        assert not server.state.budget.used
        if end != "agent goes":
            agent.send(*bulk(2, BUDGET))
            await neighbour.expect(*bulk(2, BUDGET))


async def test_nobody_fetches_the_end_of_a_connection(autojump_clock: MockClock) -> None:
    """What waits over the budget is given up as before, or the memory would never come back."""
    async with serving(connection_buffer_bytes=BUDGET) as server:
        agent, slow, neighbour = await two_clients(server)
        slow.pause()
        agent.send(*bulk(1, 3 * BUDGET), CloseResponse("", 1), Data(2, data=b"hello"))
        await neighbour.expect(Data(2, data=b"hello"))
        await trio.sleep(11)
        assert not server.state.budget.used
        assert values(server.metrics.stalled_connections_total) == {"to_client": 1}
        slow.resume()
        while (packet := await slow.next()) != CloseResponse(STALLED, 1):
            assert isinstance(packet, Data)
        await slow.expect_nothing_more()
        await agent.expect_nothing_more()


async def test_half_close_with_data_queued(autojump_clock: MockClock) -> None:
    """A client that ends its side is told so, even if it has not taken what was queued."""
    async with serving(connection_buffer_bytes=BUDGET) as server:
        agent, slow, _ = await two_clients(server)
        slow.pause()
        agent.send(*bulk(1, BUDGET // 2))
        await settle()
        assert server.state.budget.used
        slow.half_close()
        await agent.expect(CloseRequest(1))
        assert not server.state.budget.used
        slow.resume()
        assert await slow.status() == ("OK", "")


async def test_the_total_is_shared(autojump_clock: MockClock) -> None:
    async with serving(
        connection_buffer_bytes=1 << 20,
        total_buffer_bytes=1 << 20,
        proxy_strategies=("destHost",),
    ) as server:
        agents = [await server.agent(f"agent{n}", f"host=h{n}") for n in range(2)]
        clients = [await server.client() for _ in range(2)]
        for n in range(2):
            clients[n].send(DialRequest("tcp", f"h{n}:80", 1))
            await agents[n].next()
            agents[n].send(dial_ok(1, 1))
            await clients[n].expect(dial_ok(1, 1))
            clients[n].pause()
        agents[0].send(*bulk(1, 400 * KIB))
        await settle()
        assert paused(server)[0] == 0
        # A third of what is left for the first one would do alone.
        sent = bulk(1, 500 * KIB)
        agents[1].send(*sent)
        await settle()
        assert paused(server)[0] == 1
        clients[1].resume()
        await clients[1].expect(*sent)
        await trio.sleep(1)
        assert paused(server)[0] == 0
        clients[0].resume()
        await clients[0].expect(*bulk(1, 400 * KIB))
        assert not server.state.budget.used


async def test_a_queue_at_rest_when_the_budget_shrinks(autojump_clock: MockClock) -> None:
    """Nobody puts anything in it or takes anything out, but it is looked at."""
    async with serving(
        connection_buffer_bytes=1 << 20,
        total_buffer_bytes=1 << 20,
        proxy_strategies=("destHost",),
    ) as server:
        agents = [await server.agent(f"agent{n}", f"host=h{n}") for n in range(3)]
        clients = [await server.client() for _ in range(3)]
        for n in range(3):
            clients[n].send(DialRequest("tcp", f"h{n}:80", 1))
            await agents[n].next()
            agents[n].send(dial_ok(1, 1))
            await clients[n].expect(dial_ok(1, 1))
            clients[n].pause()
        # Each is within its budget when it comes to rest. Three pieces more fill the client's window.
        for agent, pieces in zip(agents, (14, 13, 8), strict=True):
            agent.send(*bulk(1, pieces * PIECE))
            await settle()
        assert server.state.budget.limit < 7 * PIECE
        await trio.sleep(60)
        assert paused(server)[0] == 0
        for _ in range(3):
            server.state.look_at_queues()
            await settle()
            assert paused(server)[0] == 2, "one watch for each of the first two"
        await trio.sleep(11)
        # What one of them had queued was too much for both: the other may stay.
        assert values(server.metrics.stalled_connections_total) == {"to_client": 1}
        assert server.established == 2
        assert paused(server)[0] == 0
        clients[2].resume()
        await clients[2].expect(*bulk(1, 8 * PIECE))
        assert len(server.state.queued) == 1


# -- towards the agent -----------------------------------------------------------------------------


async def test_the_client_waits_for_its_agent(autojump_clock: MockClock) -> None:
    """S08: its own stream gets no credit; nothing is dropped or reordered, and others go on."""
    async with serving(proxy_strategies=("destHost",)) as server:
        slow = await server.agent("slow", "host=slow")
        quick = await server.agent("quick", "host=quick")
        client, other = await server.client(), await server.client()
        for peer, agent, host in ((client, slow, "slow"), (other, quick, "quick")):
            peer.send(DialRequest("tcp", f"{host}:1", 1))
            await agent.next()
            agent.send(dial_ok(1, 1))
            await peer.expect(dial_ok(1, 1))
        slow.pause()
        sent = bulk(1, 4 << 20)
        client.send(*sent)
        await settle()
        assert value(server.metrics.full_receive_channels, "Proxy") == 1
        (connection,) = server.backend("slow").connections.values()
        assert connection.to_agent.queued <= (1 << 20) + BATCH
        assert client.unsent > 1 << 20
        await trio.sleep(60)
        other.send(*bulk(1, 1 << 20))
        await quick.expect(*bulk(1, 1 << 20))
        slow.send(Data(1, data=b"the other way"))
        await client.expect(Data(1, data=b"the other way"))
        slow.resume()
        await slow.expect(*sent)
        assert value(server.metrics.full_receive_channels, "Proxy") == 0
        assert not values(server.metrics.stalled_connections_total)


@pytest.mark.parametrize("end", ["client", "agent"])
async def test_the_end_while_the_client_waits(end: str, autojump_clock: MockClock) -> None:
    async with serving(proxy_strategies=("destHost",)) as server:
        slow = await server.agent("slow", "host=slow")
        quick = await server.agent("quick", "host=quick")
        client = await server.client()
        client.send(DialRequest("tcp", "slow:1", 1))
        await slow.next()
        slow.send(dial_ok(1, 1))
        await client.expect(dial_ok(1, 1))
        slow.pause()
        client.send(*bulk(1, 2 << 20))
        await settle()
        assert value(server.metrics.full_receive_channels, "Proxy") == 1
        if end == "client":
            client.hang_up()
            await settle()
            assert value(server.metrics.full_receive_channels, "Proxy") == 0
            slow.resume()
            # Its data still goes out, then the close.
            while (packet := await slow.next()) != CloseRequest(1):
                assert isinstance(packet, Data)
            return
        slow.hang_up()
        await client.expect(CloseResponse("", 1))
        await settle()
        assert value(server.metrics.full_receive_channels, "Proxy") == 0
        # The credit is back: the stream is as good as new.
        assert not client.unsent
        client.send(DialRequest("tcp", "quick:1", 2))
        await quick.next()
        quick.send(dial_ok(7, 2))
        await client.expect(dial_ok(7, 2))
        client.send(*bulk(7, 3 << 20))
        await quick.expect(*bulk(7, 3 << 20))


# -- HTTP CONNECT ----------------------------------------------------------------------------------

REQUEST = b"CONNECT target:80 HTTP/1.1\r\nHost: target:80\r\n\r\n"
ESTABLISHED = b"HTTP/1.1 200 Connection Established\r\n\r\n"


async def tunnel(
    server: ServerWorld, agent: ClientPeer, connect_id: int, *, tcp: bool = False
) -> trio.SocketStream:
    client = await server.http(tcp_pair() if tcp else None)
    await client.send_all(REQUEST)
    dial = await agent.next()
    assert isinstance(dial, DialRequest)
    agent.send(dial_ok(connect_id, dial.random))
    assert await client.receive_some() == ESTABLISHED
    return client


async def receive(client: trio.SocketStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = await client.receive_some()
        if not more:
            break
        data += more
    return data


async def test_connect_over_the_budget(autojump_clock: MockClock) -> None:
    async with serving(connection_buffer_bytes=BUDGET) as server:
        agent = await server.agent()
        slow, neighbour = [await tunnel(server, agent, n) for n in (1, 2)]
        sent = bulk(1, 3 << 20)
        agent.send(*sent, Data(2, data=b"hello"))
        await settle()
        assert paused(server)[0] == 1
        assert agent.unsent
        data = b"".join(packet.data for packet in sent)
        assert await receive(slow, len(data)) == data
        assert await receive(neighbour, 5) == b"hello"
        await trio.sleep(1)
        assert paused(server) == (0, 0)


@pytest.mark.parametrize("tcp", [False, True])
async def test_connect_without_progress(tcp: bool, autojump_clock: MockClock) -> None:
    heed_kernel(autojump_clock)
    async with serving(connection_buffer_bytes=BUDGET) as server:
        agent = await server.agent()
        slow, neighbour = [await tunnel(server, agent, n, tcp=tcp) for n in (1, 2)]
        agent.send(*bulk(1, 16 << 20), Data(2, data=b"hello"))
        await settle()
        begin = trio.current_time()
        assert await receive(neighbour, 5) == b"hello"
        assert 9 < trio.current_time() - begin < 11
        await agent.expect(CloseRequest(1))
        assert values(server.metrics.stalled_connections_total) == {"to_client": 1}
        await settle()
        assert paused(server) == (0, 0)
        assert value(server.metrics.http_connections) == 1
        # The client sees that it has not got everything.
        if tcp:
            with pytest.raises(trio.BrokenResourceError):
                await read_to_end(slow)
        else:
            assert len(await read_to_end(slow)) < 16 << 20


@pytest.mark.parametrize("tcp", [False, True])
async def test_connect_client_goes_with_data_queued(tcp: bool, autojump_clock: MockClock) -> None:
    heed_kernel(autojump_clock)
    async with serving() as server:
        agent = await server.agent()
        client = await tunnel(server, agent, 1, tcp=tcp)
        agent.send(*bulk(1, 12 << 20))
        await settle()
        assert server.state.budget.used > 1 << 20
        await client.aclose()
        await agent.expect(CloseRequest(1))
        await settle()
        assert not server.state.budget.used
        assert not value(server.metrics.http_connections)


async def test_connect_client_waits_for_its_agent(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client = await tunnel(server, agent, 1)
        agent.pause()
        data = bytes(range(256)) * (4 << 12)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send_all, data)
            await settle()
            (connection,) = server.backend("agent").connections.values()
            # One read at most; the rest is left to the kernel.
            assert 0 < connection.to_agent.queued < 300_000
            agent.resume()
            assert await agent.read(1, len(data)) == data


async def test_connect_agent_goes_while_the_client_waits(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent()
        client = await tunnel(server, agent, 1)
        agent.pause()
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
                    await client.send_all(bytes(64 << 20))

            nursery.start_soon(send)
            await settle()
            agent.hang_up()
            with trio.fail_after(15), contextlib.suppress(trio.BrokenResourceError):
                # Not as if the service had ended in order, where the socket can tell that.
                assert await client.receive_some() == b""
            await client.aclose()
