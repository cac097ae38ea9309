"""The server's tables under random clients and agents, beside a model of who owns which connection.

Every connection's data carries its own name, so whatever reaches a peer says whose it is.
"""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import attrs
import trio
import trio.testing
from examples import examples
from harness import GO, OURS, ClientPeer, ServerWorld, dial_ok, serving, settle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clusterproxy_proto import (
    CloseDial,
    CloseRequest,
    CloseResponse,
    Data,
    DialRequest,
    DialResponse,
    Drain,
)

if TYPE_CHECKING:
    from collections.abc import Callable

HOSTS = ("h0", "h1", "nowhere")

# A step: what to do, and two numbers that choose whom to and what with.
STEPS = (
    *("dial", "answer", "to agent", "to client") * 6,
    *("close", "agent closes", "client", "agent", "foreign data", "foreign close") * 2,
    "refuse", "unknown data", "take back", "agent takes back", "empty data", "drain", "time",
    "client goes", "client resets", "client ends", "agent goes",
)  # fmt: skip


async def quiet() -> None:
    """Let everything happen, also what is kept back from Go clients for a moment."""
    await settle()
    await trio.sleep(0.01)
    await settle()


@attrs.define(eq=False)
class Link:
    """A dial of a client, and the connection that came of it, as the model sees it."""

    name: bytes
    client: Client
    random: int
    agent: Agent | None = None
    wire_random: int = 0
    agent_id: int = 0
    client_id: int = 0
    state: str = "pending"


@attrs.define(eq=False)
class Client:
    peer: ClientPeer
    links: list[Link] = attrs.field(factory=list)
    alive: bool = True
    deaf: bool = False


@attrs.define(eq=False)
class Agent:
    peer: ClientPeer
    host: str
    links: list[Link] = attrs.field(factory=list)
    alive: bool = True
    last_id: int = 0
    # Dials that the agent has seen, by its number: all of them, as agents do not know what is over.
    dials: dict[int, Link] = attrs.field(factory=dict)


class Model:
    def __init__(self, server: ServerWorld) -> None:
        self.server = server
        self.clients: list[Client] = []
        self.agents: list[Agent] = []
        self.counter = 0

    # -- choosing ----------------------------------------------------------------------------------

    def client(self, n: int) -> Client | None:
        alive = [client for client in self.clients if client.alive]
        return alive[n % len(alive)] if alive else None

    def agent(self, n: int) -> Agent | None:
        alive = [agent for agent in self.agents if agent.alive]
        return alive[n % len(alive)] if alive else None

    def links(self, *states: str) -> list[Link]:
        return [
            link
            for client in self.clients
            if client.alive
            for link in client.links
            if link.state in states
        ]

    def link(self, n: int, *states: str) -> Link | None:
        found = self.links(*states)
        return found[n % len(found)] if found else None

    # -- steps -------------------------------------------------------------------------------------

    async def step(self, what: str, n: int, m: int) -> None:
        method: Callable[[int, int], Any] = getattr(self, "do_" + what.replace(" ", "_"))
        await method(n, m)
        await quiet()
        self.check_gauges()

    async def do_client(self, n: int, _m: int) -> None:
        if len(self.clients) < 6:
            peer = await self.server.client(user_agent=(OURS, GO)[n % 2])
            self.clients.append(Client(peer))

    async def do_agent(self, n: int, _m: int) -> None:
        if len(self.agents) < 6:
            host = HOSTS[n % 2]
            # Two streams may well be of one agent.
            peer = await self.server.agent(f"agent-{host}-{n % 3}", f"host={host}")
            self.agents.append(Agent(peer, host))

    async def do_dial(self, n: int, m: int) -> None:
        client = self.client(n)
        if client is None or client.deaf:
            return
        self.counter += 1
        # Few numbers, so that clients choose the same ones.
        random = m % 2
        if any(link.random == random and link.state == "pending" for link in client.links):
            return
        host = HOSTS[2 if n % 10 == 9 else m // 2 % 2]
        link = Link(b"link %d;" % self.counter, client, random)
        client.peer.send(DialRequest("tcp", f"{host}:{self.counter}", random))
        await quiet()
        candidates = [agent for agent in self.agents if agent.alive and agent.host == host]
        if not candidates:
            client.deaf = all(link.state == "over" for link in client.links)
            assert client.peer.received.pop().payload == DialResponse(
                error="No agent available", random=random
            )
            return
        client.links.append(link)
        (agent,) = [one for one in candidates if one.peer.received]
        request = agent.peer.received.pop().payload
        assert isinstance(request, DialRequest)
        assert request.address == f"{host}:{self.counter}"
        assert not agent.peer.received
        link.agent, link.wire_random = agent, request.random
        agent.dials[request.random] = link
        agent.links.append(link)

    async def do_answer(self, n: int, _m: int) -> None:
        link = self.link(n, "pending")
        if link is None:
            return
        agent = link.agent
        assert agent is not None
        agent.last_id += 1
        link.agent_id = agent.last_id
        agent.peer.send(dial_ok(link.agent_id, link.wire_random))
        await quiet()
        answer = link.client.peer.received.pop().payload
        assert isinstance(answer, DialResponse)
        assert (answer.random, answer.error) == (link.random, "")
        others = [one.client_id for one in link.client.links if one is not link]
        assert answer.connect_id not in others
        link.client_id = answer.connect_id
        link.state = "open"

    async def do_refuse(self, n: int, _m: int) -> None:
        link = self.link(n, "pending")
        if link is not None and link.agent is not None:
            link.agent.peer.send(DialResponse(error=link.name.decode(), random=link.wire_random))
            await quiet()
            expected = DialResponse(error=link.name.decode(), random=link.random)
            assert link.client.peer.received.pop().payload == expected
            link.state = "over"

    async def do_to_agent(self, n: int, m: int) -> None:
        link = self.link(n, "open")
        if link is not None and link.agent is not None and not link.client.deaf:
            data = link.name * (1 + m % 3)
            link.client.peer.send(Data(link.client_id, data=data))
            await link.agent.peer.expect(Data(link.agent_id, data=data))

    async def do_to_client(self, n: int, m: int) -> None:
        link = self.link(n, "open", "closing")
        if link is not None and link.agent is not None:
            data = link.name * (1 + m % 3)
            link.agent.peer.send(Data(link.agent_id, data=data))
            await link.client.peer.expect(Data(link.client_id, data=data))

    async def do_empty_data(self, n: int, _m: int) -> None:
        link = self.link(n, "open")
        if link is not None and link.agent is not None and not link.client.deaf:
            link.client.peer.send(Data(link.client_id))
            await link.agent.peer.expect(Data(link.agent_id))

    async def do_close(self, n: int, _m: int) -> None:
        link = self.link(n, "open")
        if link is not None and link.agent is not None and not link.client.deaf:
            link.client.peer.send(CloseRequest(link.client_id))
            await link.agent.peer.expect(CloseRequest(link.agent_id))
            link.state = "closing"

    async def do_agent_closes(self, n: int, _m: int) -> None:
        link = self.link(n, "open", "closing")
        if link is not None and link.agent is not None:
            link.agent.peer.send(CloseResponse(link.name.decode(), link.agent_id))
            await link.client.peer.expect(CloseResponse(link.name.decode(), link.client_id))
            link.state = "over"

    async def do_foreign_data(self, n: int, m: int) -> None:
        """A number that belongs to somebody else, or to nobody."""
        client = self.client(n)
        if client is None or client.deaf:
            return
        mine = {link.client_id for link in client.links}
        number = 1 + m % 3
        if number in mine:
            return
        client.peer.send(Data(number, data=b"foreign"))
        await quiet()
        own = [link for link in client.links if link.state in ("open", "closing")]
        started = any(link.state == "pending" or link.client_id for link in client.links)
        if own:
            for link in own:
                link.state = "over"
                assert link.agent is not None
            client.deaf = True
            told = {packet.payload for packet in client.peer.received}
            client.peer.received.clear()
            assert told == {
                CloseResponse("mismatched connection IDs", one)
                for one in (number, *(link.client_id for link in own))
            }
            for agent in self.agents:
                asked = {packet.payload for packet in agent.peer.received}
                agent.peer.received.clear()
                mine_there = {link.agent_id for link in own if link.agent is agent}
                assert asked <= {CloseRequest(one) for one in mine_there}
        elif not started:
            await client.peer.expect(CloseResponse("backend not initialized", number))
            client.deaf = True

    async def do_foreign_close(self, n: int, m: int) -> None:
        client = self.client(n)
        if client is None or client.deaf:
            return
        number = 1 + m % 3
        if number in {link.client_id for link in client.links}:
            return
        client.peer.send(CloseRequest(number))
        if not any(link.state == "pending" or link.client_id for link in client.links):
            await client.peer.expect(CloseResponse("backend uninitialized", number))

    async def do_unknown_data(self, n: int, _m: int) -> None:
        agent = self.agent(n)
        if agent is not None:
            number = agent.last_id + 1000
            agent.peer.send(Data(number, data=b"unknown"), CloseResponse("", number))
            await agent.peer.expect(CloseRequest(number))

    async def do_take_back(self, n: int, _m: int) -> None:
        link = self.link(n, "pending")
        if link is None or link.client.deaf or link.agent is None:
            return
        link.client.peer.send(CloseDial(link.random))
        await quiet()
        link.state = "over"
        # The agent answers all the same.
        link.agent.last_id += 1
        number = link.agent.last_id
        link.agent.peer.send(dial_ok(number, link.wire_random), Data(number, data=b"late"))
        await link.agent.peer.expect(CloseRequest(number))
        link.agent.peer.send(CloseResponse("", number))

    async def do_agent_takes_back(self, n: int, _m: int) -> None:
        link = self.link(n, "pending")
        if link is not None and link.agent is not None:
            link.agent.peer.send(CloseDial(link.wire_random))
            await link.client.peer.expect(CloseDial(link.random))
            link.state = "over"

    async def _leave(self, client: Client, end: Callable[[], None]) -> None:
        end()
        await quiet()
        client.alive = False
        for agent in self.agents:
            told = [packet.payload for packet in agent.peer.received]
            agent.peer.received.clear()
            expected: list[object] = []
            for link in client.links:
                if link.agent is agent and link.state == "pending":
                    expected.append(CloseDial(link.wire_random))
                elif link.agent is agent and link.state == "open":
                    expected.append(CloseRequest(link.agent_id))
            assert sorted(map(repr, told)) == sorted(map(repr, expected))
            # What crosses the goodbye reaches nobody.
            for link in client.links:
                if link.agent is agent and link.state in ("open", "closing") and agent.alive:
                    agent.peer.send(Data(link.agent_id, data=link.name))
                    agent.peer.send(CloseResponse("", link.agent_id))
            await quiet()
            assert not agent.peer.received
        for link in client.links:
            link.state = "over"

    async def do_client_goes(self, n: int, _m: int) -> None:
        if (client := self.client(n)) is not None:
            await self._leave(client, client.peer.hang_up)

    async def do_client_resets(self, n: int, _m: int) -> None:
        if (client := self.client(n)) is not None:
            await self._leave(client, client.peer.reset)

    async def do_client_ends(self, n: int, _m: int) -> None:
        if (client := self.client(n)) is not None:
            await self._leave(client, client.peer.half_close)
            assert client.peer.closed_with == ("OK", "")

    async def do_agent_goes(self, n: int, m: int) -> None:
        agent = self.agent(n)
        if agent is None:
            return
        (agent.peer.hang_up, agent.peer.reset, agent.peer.half_close)[m % 3]()
        await quiet()
        agent.alive = False
        for client in self.clients:
            told = [packet.payload for packet in client.peer.received]
            client.peer.received.clear()
            expected: list[object] = []
            for link in client.links:
                if link.agent is agent and client.alive:
                    if link.state in ("open", "closing"):
                        expected.append(CloseResponse("", link.client_id))
                    elif link.state == "pending":
                        error = "agent disconnected before it answered the dial"
                        expected.append(DialResponse(error=error, random=link.random))
            assert sorted(map(repr, told)) == sorted(map(repr, expected))
        for link in agent.links:
            link.state = "over"

    async def do_drain(self, n: int, _m: int) -> None:
        if (agent := self.agent(n)) is not None:
            agent.peer.send(Drain())

    async def do_time(self, _n: int, m: int) -> None:
        """Long enough for dials to expire, now and then."""
        await trio.sleep(30 if not m % 4 else 0.1)
        if m % 4:
            return
        await quiet()
        for link in self.links("pending"):
            link.state = "over"
        for client in self.clients:
            for packet in client.peer.received:
                assert isinstance(packet.payload, DialResponse)
                assert packet.payload.error == "timed out waiting for backend dial"
            client.peer.received.clear()

    # -- what always holds -------------------------------------------------------------------------

    def check_gauges(self) -> None:
        server = self.server
        # A deaf stream's dials are answered all the same.
        assert server.pending == len(self.links("pending"))
        assert server.established == len(self.links("open", "closing"))
        tables = server.state.pool.backends
        assert sum(len(backend.dials) for backend in tables) == server.pending
        assert sum(len(backend.connections) for backend in tables) == server.established
        for peer in server.peers:
            assert not peer.received
        assert len(tables) == sum(agent.alive for agent in self.agents)


@settings(
    max_examples=examples(40),
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(STEPS), st.integers(0, 60), st.integers(0, 60)),
        min_size=30,
        max_size=80,
    )
)
def test_random_lives(steps: list[tuple[str, int, int]]) -> None:
    # A server that is so badly treated has much to say.
    logging.disable(logging.CRITICAL)

    async def live() -> None:
        # Leaving the block checks that every table and gauge is back at zero.
        async with AsyncExitStack() as stack:
            server = await stack.enter_async_context(serving(proxy_strategies=("destHost",)))
            model = Model(server)
            for what, n in (("agent", 0), ("agent", 1), ("client", 0), ("client", 1)):
                await model.step(what, n, 0)
            for step in steps:
                await model.step(*step)

    clock = trio.testing.MockClock(autojump_threshold=0)
    try:
        trio.run(live, clock=clock)
    finally:
        logging.disable(logging.NOTSET)


def test_the_model_knows_every_step() -> None:
    done = {name.removeprefix("do_").replace("_", " ") for name in dir(Model) if name[:3] == "do_"}
    assert done == set(STEPS)
