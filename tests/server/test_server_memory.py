"""What is over is freed at once.

Cycles of references would keep it until the garbage collector comes by, which after a long idle time
is not before very much more has been made: a hub's memory then grows with every wave of clients.
"""

from __future__ import annotations

import gc
from collections import Counter
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest
import trio
from harness import ServerWorld, serving, session, settle

from clusterproxy.agent.endpoint import StreamEndpoint
from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.stream import Stream
from clusterproxy.rpc.server import ServerCall
from clusterproxy.server.connect import ConnectConnection, ConnectTunnel
from clusterproxy.server.frontend import Frontend
from clusterproxy.server.frontend_connection import FrontendConnection
from clusterproxy.transport.sink import ByteSink
from clusterproxy_proto import CloseRequest, CloseResponse, Data, DialRequest, DialResponse, Reset

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator

    from harness import ClientPeer
    from trio.testing import MockClock

KINDS = (
    ByteSink, ConnectConnection, ConnectTunnel, Frontend, FrontendConnection, Http2Connection,
    ServerCall, Stream, StreamEndpoint,
)  # fmt: skip


@contextmanager
def no_collector() -> Generator[None]:
    gc.collect()
    gc.disable()
    # What was there before is not looked through each time.
    gc.freeze()
    try:
        yield
    finally:
        gc.enable()


def alive() -> Counter[str]:
    return Counter(type(one).__name__ for one in gc.get_objects() if isinstance(one, KINDS))


async def close_in_order(client: ClientPeer, agent: ClientPeer, number: int) -> None:
    client.send(CloseRequest(number))
    await agent.expect(CloseRequest(number))
    agent.send(CloseResponse(connect_id=number))
    await client.expect(CloseResponse(connect_id=number))
    client.half_close()
    await client.status()


async def lose_client(client: ClientPeer, agent: ClientPeer, number: int) -> None:
    client.hang_up()
    await settle()
    assert isinstance(await agent.next(), CloseRequest | Reset)
    agent.send(CloseResponse(connect_id=number))


async def break_by_agent(client: ClientPeer, agent: ClientPeer, number: int) -> None:
    agent.send(Reset(number, "broken"))
    assert await client.next() is not None
    client.half_close()
    await client.status()


@pytest.mark.parametrize(
    ("end", "extended"),
    [
        (close_in_order, False),
        (close_in_order, True),
        (lose_client, False),
        (lose_client, True),
        (break_by_agent, True),  # only an agent that has the extension can say so
    ],
)
async def test_a_tunnel(
    end: Callable[[ClientPeer, ClientPeer, int], Awaitable[None]],
    extended: bool,
    autojump_clock: MockClock,
) -> None:
    async with serving() as server:
        agent = await server.agent(extended=extended)

        async def tunnel(number: int) -> None:
            client = await server.client(extended=extended)
            await server.connect(client, agent, number, number)
            client.send(Data(number, data=b"question"))
            await agent.read(number, 8)
            agent.send(Data(number, data=b"answer"))
            await client.read(number, 6)
            await end(client, agent, number)
            client.hang_up()
            # The test's own end.
            server.peers.remove(client)
            await settle()

        await check(tunnel)


async def test_a_connect_tunnel(autojump_clock: MockClock) -> None:
    async with serving() as server:
        agent = await server.agent(extended=True)

        async def tunnel(number: int) -> None:
            await connect_and_close(server, agent, number)

        await check(tunnel)


async def connect_and_close(server: ServerWorld, agent: ClientPeer, number: int) -> None:
    stream = await server.http()
    await stream.send_all(b"CONNECT target:80 HTTP/1.1\r\nHost: target:80\r\n\r\n")
    dial = await agent.next()
    assert isinstance(dial, DialRequest)
    agent.send(DialResponse(connect_id=number, random=dial.random))
    assert (await stream.receive_some()).startswith(b"HTTP/1.1 200")
    await stream.send_all(b"question")
    await agent.read(number, 8)
    server.streams.remove(stream)
    await trio.aclose_forcefully(stream)
    await settle()
    with suppress(trio.TooSlowError):
        while await agent.next() is not None:
            pass
    agent.send(CloseResponse(connect_id=number))
    await settle()


async def test_a_connection_of_an_agent(autojump_clock: MockClock) -> None:
    async with session(extended=True) as world:

        async def connection(number: int) -> None:
            service = await world.connect(connect_id=number)
            world.server.send(Data(number, data=b"question"))
            assert await service.receive_some() == b"question"
            world.server.send(CloseRequest(number))
            await world.server.expect(CloseResponse(connect_id=number))
            await service.aclose()
            await trio.sleep(20)

        await check(connection)


async def check(once: Callable[[int], Awaitable[None]]) -> None:
    await once(1)
    with no_collector():
        before = alive()
        for number in range(2, 6):
            await once(number)
        assert not alive() - before
