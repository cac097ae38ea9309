"""Mutations of recorded sessions against server and agent in memory: they hurt nobody but themselves.

The normal run plays a few thousand; ``CLUSTERPROXY_FUZZ=100000`` says how many, over all tests.
"""

from __future__ import annotations

import gc
import logging
import os
import re
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import trio
from examples import examples
from harness import (
    CONNECT,
    GO,
    OURS,
    PROXY,
    ClientPeer,
    ScriptedServers,
    ServerWorld,
    agent_state,
    dial_ok,
    greeting,
    serving,
    settle,
    socket_pair,
    value,
)
from mutations import Playback, Recorder, Session, mutate

from clusterproxy.agent.session import HandshakeError
from clusterproxy.agent.session import Session as AgentSession
from clusterproxy.errors import RPCError
from clusterproxy.grpc import PREFIX_SIZE
from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.rpc.channel import start_call
from clusterproxy.transport.stream import Transport
from clusterproxy_proto import (
    CloseDial,
    CloseRequest,
    CloseResponse,
    Data,
    DialRequest,
    DialResponse,
    Drain,
    decode,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterator

    from clusterproxy.agent.state import AgentState
    from clusterproxy.grpc import Metadata
    from clusterproxy.rpc.server import RpcServer

TOTAL = int(os.environ.get("CLUSTERPROXY_FUZZ", examples(3000)))
# How often the others are looked at.
LOOK = 10

pytestmark = pytest.mark.timeout(max(120, TOTAL // 20))


class Bugs(logging.Handler):
    """Collects the exceptions that are logged: what the last resorts have caught."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self.found.append(record.exc_info[1])

    def check(self) -> None:
        if self.found:
            raise self.found[0]


@pytest.fixture
def bugs() -> Iterator[Bugs]:
    handler = Bugs()
    logger = logging.getLogger("clusterproxy")
    logger.addHandler(handler)
    # Every mutation has a line or two to log.
    logger.propagate = False
    yield handler
    logger.removeHandler(handler)
    logger.propagate = True


def census() -> Counter[str]:
    """Count our own objects that are alive."""
    gc.collect()
    return Counter(
        f"{type(one).__module__}.{type(one).__qualname__}"
        for one in gc.get_objects()
        # Some classes of C libraries have something else in the place of a name.
        if str(type(one).__module__).startswith(("clusterproxy", "h2.", "hpack."))
    )


async def play(
    bugs: Bugs,
    each: Callable[[int], Awaitable[None]],
    look: Callable[[], Awaitable[None]],
    share: int,
) -> None:
    """Play *share* per cent of the mutations, and look that nothing is left of them."""
    await each(0)
    await look()
    before = census()
    for number in range(1, TOTAL * share // 100 + 1):
        try:
            await each(number)
            if not number % LOOK:
                await look()
            bugs.check()
        except BaseException as error:
            error.add_note(f"mutation {number}")
            raise
    await look()
    # Numbers in metrics may appear for the first time, and streams that stay be measured.
    after = census() - before
    grown = {name: n for name, n in after.items() if not re.search("telemetry|Probe", name)}
    assert grown == {}


# -- recording -------------------------------------------------------------------------------------


async def recorded_call(
    world: ServerWorld, server: RpcServer, path: str, metadata: Metadata, user_agent: str = OURS
) -> tuple[ClientPeer, Recorder]:
    ours, theirs = socket_pair()
    world.nursery.start_soon(server.serve, Transport(theirs))
    recorder = Recorder(ours)
    connection = Http2Connection(recorder, client=True, limits=Http2Limits())
    world.nursery.start_soon(connection.run)
    await trio.lowlevel.checkpoint()
    call = start_call(
        connection, path, authority="proxy", secure=False, metadata=metadata, user_agent=user_agent
    )
    peer = ClientPeer(call, connection)
    world.peers.append(peer)
    await settle()
    return peer, recorder


async def record_client(world: ServerWorld, user_agent: str) -> Session:
    """One dial, data both ways, the end; then another on the same stream."""
    client, recorder = await recorded_call(world, world.frontends, PROXY, {}, user_agent)
    for number in (2, 3):
        client.send(DialRequest("tcp", "target:80", 40 + number))
        answer = await client.next()
        assert isinstance(answer, DialResponse)
        client.send(Data(answer.connect_id, data=b"GET / HTTP/1.1\r\n\r\n"))
        await settle()
        client.send(Data(answer.connect_id, data=bytes(3000)), Data(answer.connect_id, data=b"x"))
        await client.read(answer.connect_id, 3019)
        client.connection.ping()
        client.send(CloseRequest(answer.connect_id))
        await client.expect(CloseResponse("", answer.connect_id))
    client.send(DialRequest("udp", "never:53", 99), CloseDial(99))
    await settle()
    client.half_close()
    await settle()
    client.hang_up()
    await settle()
    return Session(tuple(recorder.batches))


async def record_agent(world: ServerWorld, victim: ClientPeer) -> Session:
    """Dials answered and refused, data both ways, the end of connections, the end."""
    metadata: Metadata = {"agentid": ["fuzzed"], "agentidentifiers": ["host=victim"]}
    agent, recorder = await recorded_call(world, world.agents, CONNECT, metadata)
    for number in (1, 2):
        victim.send(DialRequest("tcp", "victim:80", 70 + number))
        await settle()
        agent.send(dial_ok(number, 70 + number))
        agent.send(Data(number, data=b"hello"))
        await settle()
        agent.send(Data(number, data=bytes(3000)), Data(number, data=b"x"))
        agent.connection.ping()
        await settle()
    agent.send(DialResponse("no such host", random=73))
    agent.send(CloseResponse("", 1), CloseResponse("reset", 2))
    agent.send(Data(9, data=b"nobody"), Drain())
    await settle()
    agent.half_close()
    await settle()
    agent.hang_up()
    await settle()
    return Session(tuple(recorder.batches))


# -- the server ------------------------------------------------------------------------------------


class Bystanders:
    """An agent that serves everybody, a client with a connection through it, and another client
    that dials through whoever is there.
    """

    def __init__(self, world: ServerWorld) -> None:
        self.world = world
        self._open: set[int] = set()
        self._count = 0

    async def start(self) -> None:
        self.agent = await self.world.agent("bystander")
        self.agent.call.receive = self._serve
        self.client = await self.world.client()
        self.client.send(DialRequest("tcp", "target:80", 1))
        await self.client.expect(dial_ok(1, 1))
        self.victim = await self.world.client()
        self.victim.call.receive = self._take
        await self.look()

    def _serve(self, _size: int, head: memoryview, rest: tuple[memoryview, ...]) -> None:
        """What the bystanding agent does: everything that is asked for, and echo."""
        match decode(b"".join((head[PREFIX_SIZE:], *rest))).payload:
            case DialRequest() as dial:
                number = min(set(range(1, len(self._open) + 2)) - self._open)
                self._open.add(number)
                self.agent.send(dial_ok(number, dial.random))
            case Data() as data:
                self.agent.send(Data(data.connect_id, data=bytes(data.data)))
            case CloseRequest() as close:
                self._open.discard(close.connect_id)
                self.agent.send(CloseResponse("", close.connect_id))
            case _:
                pass

    def dial(self) -> None:
        """Let the victim dial, if that is not pending already."""
        self._count += 1
        if self._count % 8 in (1, 2, 3):
            self.victim.send(DialRequest("tcp", "victim:80", 70 + self._count % 8))

    def _take(self, _size: int, head: memoryview, rest: tuple[memoryview, ...]) -> None:
        """What the victim does: use a connection that it gets, and close it."""
        match decode(b"".join((head[PREFIX_SIZE:], *rest))).payload:
            case DialResponse(error="", connect_id=number):
                self.victim.send(Data(number, data=b"how are you"))
            case Data(connect_id=number, data=data) if bytes(data) in (b"x", b"how are you"):
                self.victim.send(CloseRequest(number))
            case _:
                pass

    async def look(self) -> None:
        """Make sure that nothing is left of the others, and that the client's tunnel works."""
        world = self.world
        for backend in world.state.pool.backends:
            assert backend.agent_id == "bystander"
        assert len(world.state.pool.backends) == len(world.agents.connections) == 1
        token = b"%d" % self._count
        self.client.send(Data(1, data=token))
        assert await self.client.read(1, len(token)) == token
        await settle()
        assert len(world.frontends.connections) == 2
        assert world.pending == 0
        assert world.established == len(self._open) == 1
        assert not world.state.budget.used


async def test_clients(bugs: Bugs, autojump_clock: trio.testing.MockClock) -> None:
    async with serving() as world:
        bystanders = Bystanders(world)
        await bystanders.start()
        sessions = [await record_client(world, agent) for agent in (OURS, GO)]

        async def each(number: int) -> None:
            batches, capacity = mutate(sessions, number)
            await world.frontends.serve(Playback(batches, capacity=capacity))

        await play(bugs, each, bystanders.look, share=45)


async def test_agents(bugs: Bugs, autojump_clock: trio.testing.MockClock) -> None:
    async with serving(proxy_strategies=("destHost", "default")) as world:
        bystanders = Bystanders(world)
        await bystanders.start()
        sessions = [await record_agent(world, bystanders.victim)]

        async def each(number: int) -> None:
            batches, capacity = mutate(sessions, number)
            await world.agents.serve(Playback(batches, bystanders.dial, capacity))

        await play(bugs, each, bystanders.look, share=45)


async def test_empty_data_under_another_number() -> None:
    """What mutations 6670 and 6906 found: it was taken for a bug, and ended the agent's stream."""
    async with serving() as world:
        agent = await world.agent()
        client = await world.client()
        await world.connect(client, agent, random=1)
        client.send(CloseRequest(1))
        await agent.expect(CloseRequest(1))
        agent.send(CloseResponse("", 1))
        await client.expect(CloseResponse("", 1))
        client.send(DialRequest("tcp", "target:80", 2))
        await agent.next()
        agent.send(dial_ok(1, 2))
        answer = await client.next()
        assert isinstance(answer, DialResponse)
        assert answer.connect_id != 1
        client.send(Data(answer.connect_id), Data(answer.connect_id, data=b"up"))
        await agent.expect(Data(1), Data(1, data=b"up"))
        agent.send(Data(1), Data(1, data=b"down"))
        await client.expect(Data(answer.connect_id), Data(answer.connect_id, data=b"down"))


# -- the agent -------------------------------------------------------------------------------------


async def echo(service: socket.socket) -> None:
    async with trio.SocketStream(trio.socket.from_stdlib_socket(service)) as stream:
        try:
            async for data in stream:
                await stream.send_all(data)
        except trio.BrokenResourceError:
            pass


async def record_server() -> Session:
    """What a server sends that has the agent dial, send, and close."""
    servers = ScriptedServers(greeting())
    ours, theirs = socket_pair()
    recorder = Recorder(theirs)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(servers.rpc.serve, recorder)
        connection = Http2Connection(Transport(ours), client=True, limits=Http2Limits())
        nursery.start_soon(connection.run)
        await trio.lowlevel.checkpoint()
        session = AgentSession(agent_state(), connect(connection))
        nursery.start_soon(session.run)
        await settle()
        (server,) = servers.peers
        for number in (1, 2):
            server.send(DialRequest("tcp", f"service:{number}", 70 + number))
            await server.expect(dial_ok(number, 70 + number))
            server.send(Data(number, data=b"GET /"), Data(number, data=bytes(3000)))
            await server.read(number, 3005)
            server.call.connection.ping()
        server.send(CloseRequest(1), Data(1, data=b"late"), CloseDial(99), CloseRequest(9))
        server.send(DialRequest("udp", "service:3", 73))
        await settle()
        server.finish()
        await settle()
        nursery.cancel_scope.cancel()
    return Session(tuple(recorder.batches))


connect = partial(
    start_call, path=CONNECT, authority="proxy", secure=False, metadata={}, user_agent=OURS
)


async def run_session(state: AgentState, batches: list[bytes], capacity: int) -> None:
    """Run an agent's session with a server that sends *batches*."""
    connection = Http2Connection(
        Playback(batches, capacity=capacity), client=True, limits=Http2Limits()
    )
    session = AgentSession(state, connect(connection))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        try:
            await session.greet()
        except (RPCError, HandshakeError):
            session.call.cancel()
        else:
            await session.run()
        connection.fail("the session is over")
    assert not session.busy


async def test_servers(bugs: Bugs, autojump_clock: trio.testing.MockClock) -> None:
    async with trio.open_nursery() as nursery:

        async def dial(*_: object, **__: object) -> socket.socket:
            await trio.lowlevel.checkpoint()
            ours, theirs = socket_pair()
            nursery.start_soon(echo, ours)
            return theirs

        with patch("clusterproxy.agent.session.dial", dial):
            sessions = [await record_server()]
            state = agent_state()

            async def each(number: int) -> None:
                await run_session(state, *mutate(sessions, number))

            async def look() -> None:
                await settle()
                assert value(state.metrics.open_endpoint_connections) == 0
                assert not state.budget.used
                assert not nursery.child_tasks

            await play(bugs, each, look, share=10)
