"""Server and agent in this process, between scripted peers that speak packets over socket pairs."""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

import attrs
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from clusterproxy.agent.config import AgentConfig
from clusterproxy.agent.dial import dial
from clusterproxy.agent.resolver import Resolver
from clusterproxy.agent.session import Session
from clusterproxy.agent.state import AgentState
from clusterproxy.agent.state import PacketCounters as AgentPackets
from clusterproxy.grpc import PREFIX_SIZE, Metadata, prefix
from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.flow import Flow
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.rpc.channel import ClientCall, start_call
from clusterproxy.rpc.server import RpcServer, ServerCall
from clusterproxy.server.backend import backend_opener
from clusterproxy.server.backends import BackendPool
from clusterproxy.server.config import ServerConfig
from clusterproxy.server.connect import ConnectTunnel
from clusterproxy.server.frontend import frontend_opener
from clusterproxy.server.state import PacketCounters as ServerPackets
from clusterproxy.server.state import ServerState
from clusterproxy.telemetry.agent_metrics import AgentMetrics
from clusterproxy.telemetry.server_metrics import ServerMetrics
from clusterproxy.transport.stream import Transport
from clusterproxy.tunnel.budget import Budget
from clusterproxy.tunnel.extension import offer
from clusterproxy_proto import Data, DialRequest, DialResponse, Packet, Payload, decode, encode

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from clusterproxy.rpc.call import Call
    from clusterproxy.server.backend import Backend
    from clusterproxy.telemetry.cells import Family, HistogramFamily

PROXY = "/ProxyService/Proxy"
CONNECT = "/AgentService/Connect"
GO = "grpc-go/1.76.0"
OURS = "clusterproxy/0"
WINDOW = 64 * 1024
_EVERYTHING = 1 << 40


# Enough for a kernel that is busy with others, less than one notices.
_KERNEL_S: Final = 0.05


def heed_kernel(clock: MockClock) -> None:
    """Have a clock wait before it jumps, and :func:`settle` as well: what passes by TCP may come a moment later.

    For tests in which it matters when the kernel takes something: each jump costs that moment.
    """
    clock.autojump_threshold = _KERNEL_S


async def settle() -> None:
    """Let everything happen that needs no time to pass."""
    clock = trio.lowlevel.current_clock()
    heeding = isinstance(clock, MockClock) and clock.autojump_threshold == _KERNEL_S
    cushion = _KERNEL_S / 5 if heeding else 0.0
    # A batch that one task writes may wake the next one only after the first look.
    for _ in range(3):
        await wait_all_tasks_blocked(cushion)


def socket_pair() -> tuple[socket.socket, socket.socket]:
    pair = socket.socketpair()
    for sock in pair:
        sock.setblocking(False)
    return pair


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a TCP connection, for what Unix sockets do not have: resets and send buffers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    for sock in (ours, theirs):
        sock.setblocking(False)
    return ours, theirs


async def read_to_end(stream: trio.abc.ReceiveStream) -> bytes:
    """Everything until the other side ends the stream; raises BrokenResourceError if it resets it."""
    data = b""
    while more := await stream.receive_some():
        data += more
    return data


def value(family: Family, *labels: str) -> float:
    """The value of a metric, 0 if it is not there yet."""
    cell = family.children.get(labels)
    return 0 if cell is None else cell.value


def values(family: Family) -> dict[str, float]:
    """The non-zero values of a metric with one label, by its value; with several, joined by a comma."""
    return {",".join(labels): cell.value for labels, cell in family.children.items() if cell.value}


def observations(family: HistogramFamily) -> int:
    return sum(sum(histogram.counts) for histogram in family.children.values())


class Peer:
    """A scripted end of one call: sends packets, and keeps those that come.

    Packets go out in the order in which they were sent, whatever their size.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.received: deque[Packet] = deque()
        self.ended = trio.Event()
        self.closed_with: tuple[str, str] | None = None
        self.half_closed = False
        self._flow = Flow()
        self._arrived = trio.Event()
        call.receive = self._receive
        call.on_close = self._on_close
        call.on_half_close = self._on_half_close

    def _receive(self, _size: int, head: memoryview, rest: tuple[memoryview, ...]) -> None:
        self.received.append(decode(b"".join((head[PREFIX_SIZE:], *rest))))
        self._arrived.set()

    def _on_close(self, status: Any, message: str) -> None:
        self.closed_with = (status.go_name, message)
        self.ended.set()
        self._arrived.set()

    def _on_half_close(self) -> None:
        self.half_closed = True
        self.ended.set()

    def send(self, *payloads: Payload) -> None:
        for payload in payloads:
            self.send_message(encode(Packet.of(payload)))

    def send_message(self, message: bytes) -> None:
        framed = prefix(len(message)) + message
        self.call.forward(self._flow, len(framed), framed)

    @property
    def unsent(self) -> int:
        return self._flow.queued

    async def next(self, within: float = 1.0) -> Payload | None:
        """The next packet's payload."""
        with trio.fail_after(within):
            while not self.received:
                if self.closed_with is not None:
                    raise EOFError(self.closed_with)
                self._arrived = trio.Event()
                await self._arrived.wait()
        return self.received.popleft().payload

    async def expect(self, *payloads: Payload) -> None:
        """Exactly these packets come next."""
        for payload in payloads:
            assert await self.next() == payload

    async def expect_nothing_more(self) -> None:
        await settle()
        assert not self.received

    async def read(self, connect_id: int, size: int, within: float = 1.0) -> bytes:
        """The bytes of a connection, in however many packets; nothing else may come between."""
        data = b""
        while len(data) < size:
            packet = await self.next(within)
            assert isinstance(packet, Data)
            assert packet.connect_id == connect_id
            data += packet.data
        assert len(data) == size
        return data

    async def status(self) -> tuple[str, str]:
        """Wait for the end of the call."""
        with trio.fail_after(1):
            while self.closed_with is None:
                self._arrived = trio.Event()
                await self._arrived.wait()
        return self.closed_with

    def pause(self) -> None:
        """Read no more: what is on its way fills the window."""
        self.call.stream.hold(_EVERYTHING)

    def resume(self) -> None:
        self.call.stream.release(_EVERYTHING)


class ClientPeer(Peer):
    """The client's end of a call, that is, a client or an agent."""

    def __init__(self, call: ClientCall, connection: Http2Connection) -> None:
        super().__init__(call)
        self.response = call.response
        self.connection = connection
        self.half_close = call.half_close
        self.reset = call.cancel

    def hang_up(self) -> None:
        """The connection is lost."""
        self.connection.fail("hung up")


@attrs.define(eq=False)
class ServerWorld:
    """A proxy server without its listeners."""

    state: ServerState
    nursery: trio.Nursery
    frontends: RpcServer
    agents: RpcServer
    peers: list[ClientPeer] = attrs.field(factory=list)
    streams: list[trio.SocketStream] = attrs.field(factory=list)
    limits_exceeded: list[str] = attrs.field(factory=list)

    @property
    def metrics(self) -> ServerMetrics:
        return self.state.metrics

    @property
    def dial_failures(self) -> dict[str, float]:
        return values(self.metrics.dial_failure_count)

    def packets(self, segment: str) -> dict[str, float]:
        """The packets counted in a segment, by type."""
        found = self.metrics.stream_packets_total.children.items()
        return {labels[1]: cell.value for labels, cell in found if labels[0] == segment}

    @property
    def pending(self) -> float:
        return value(self.metrics.pending_backend_dials)

    @property
    def established(self) -> float:
        return value(self.metrics.established_connections)

    def backend(self, agent_id: str) -> Backend:
        (found,) = (one for one in self.state.pool.backends if one.agent_id == agent_id)
        return found

    async def call(
        self,
        server: RpcServer,
        path: str,
        metadata: Metadata | None = None,
        *,
        user_agent: str = OURS,
        beside: ClientPeer | None = None,
        window: int = WINDOW,
        **options: Any,
    ) -> ClientPeer:
        """Start a call on a connection of its own, or *beside* another one."""
        if beside is None:
            ours, theirs = socket_pair()
            self.nursery.start_soon(server.serve, Transport(theirs))
            limits = Http2Limits(window=window, max_message_size=16 * 1024 * 1024)
            connection = Http2Connection(Transport(ours), client=True, limits=limits)
            self.nursery.start_soon(connection.run)
            await trio.lowlevel.checkpoint()
        else:
            connection = beside.connection
        call = start_call(
            connection,
            path,
            authority="test",
            secure=False,
            metadata=metadata or {},
            user_agent=user_agent,
            **options,
        )
        peer = ClientPeer(call, connection)
        self.peers.append(peer)
        await settle()
        return peer

    async def client(self, *, extended: bool = False, **options: Any) -> ClientPeer:
        metadata = offer() if extended else {}
        return await self.call(self.frontends, PROXY, metadata, **options)

    async def agent(
        self,
        agent_id: str = "agent",
        identifiers: str = "",
        *,
        extended: bool = False,
        **options: Any,
    ) -> ClientPeer:
        metadata: Metadata = {"agentid": [agent_id], "agentidentifiers": [identifiers]}
        if extended:
            metadata |= offer()
        return await self.call(self.agents, CONNECT, metadata, **options)

    async def http(
        self, pair: tuple[socket.socket, socket.socket] | None = None
    ) -> trio.SocketStream:
        """A client's socket in HTTP CONNECT mode."""
        ours, theirs = pair or socket_pair()
        tunnel = ConnectTunnel(self.state, Transport(theirs))
        self.nursery.start_soon(tunnel.run)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        self.streams.append(stream)
        return stream

    async def connect(
        self, client: ClientPeer, agent: ClientPeer, connect_id: int = 1, random: int = 1
    ) -> None:
        """Establish a connection."""
        client.send(DialRequest("tcp", "target:80", random))
        dial = await agent.next()
        assert isinstance(dial, DialRequest)
        agent.send(dial_ok(connect_id, dial.random))
        await client.expect(dial_ok(connect_id, random))

    def check_idle(self) -> None:
        """Nothing is left in any table or gauge once all peers have gone."""
        metrics = self.metrics
        assert not self.state.pool.backends
        assert not self.state.budget.used
        for gauge in (
            metrics.pending_backend_dials,
            metrics.established_connections,
            metrics.grpc_connections,
            metrics.http_connections,
            metrics.full_receive_channels,
            metrics.connections_over_budget,
            metrics.buffered_bytes,
            metrics.ready_backends,
            metrics.ready_backend_connections,
        ):
            assert not values(gauge), gauge.name


def dial_ok(connect_id: int, random: int) -> DialResponse:
    return DialResponse(connect_id=connect_id, random=random)


def server_state(**config: Any) -> ServerState:
    settings = ServerConfig(**{"server_id": "server", **config})
    metrics = ServerMetrics()
    return ServerState(
        config=settings,
        metrics=metrics,
        pool=BackendPool(settings.proxy_strategies, metrics),
        budget=Budget(each=settings.connection_buffer_bytes, total=settings.total_buffer_bytes),
        data_packets=ServerPackets(metrics),
    )


@contextlib.asynccontextmanager
async def serving(**config: Any) -> AsyncGenerator[ServerWorld]:
    """Run a server; leaving the block ends all peers, and checks that nothing is left of them."""
    state = server_state(**config)
    async with trio.open_nursery() as nursery:
        exceeded: list[str] = []
        limits = Http2Limits(max_streams=state.config.max_concurrent_streams)
        frontends = RpcServer(
            {PROXY: frontend_opener(state)}, limits=limits, on_limit=exceeded.append
        )
        agents = RpcServer(
            {CONNECT: backend_opener(state)}, limits=limits, on_limit=exceeded.append
        )
        world = ServerWorld(state, nursery, frontends, agents, limits_exceeded=exceeded)
        yield world
        for peer in world.peers:
            peer.hang_up()
        for stream in world.streams:
            await trio.aclose_forcefully(stream)
        await settle()
        world.check_idle()
        nursery.cancel_scope.cancel()


# -- the agent -------------------------------------------------------------------------------------


class ScriptedServer(Peer):
    """The server's end of an agent's call."""

    def __init__(self, call: ServerCall) -> None:
        super().__init__(call)
        self.path = call.path
        self.metadata = call.metadata
        self.user_agent = call.user_agent
        self._over = trio.Event()

    async def run(self) -> None:
        await self._over.wait()

    def finish(self) -> None:
        """End the stream with OK."""
        self._over.set()


class ScriptedServers:
    """A server whose every agent stream is scripted.

    *metadata* is what it greets agents with, or None for no greeting.
    """

    def __init__(self, metadata: Metadata | None = None, *, window: int = WINDOW) -> None:
        self.metadata = metadata
        self.peers: list[ScriptedServer] = []
        limits = Http2Limits(window=window, max_message_size=16 * 1024 * 1024)
        self.rpc = RpcServer({CONNECT: self._open}, limits=limits)

    def _open(self, call: ServerCall) -> Callable[[], Awaitable[None]]:
        peer = ScriptedServer(call)
        self.peers.append(peer)
        if self.metadata is not None:
            call.send_initial_metadata(self.metadata)
        return peer.run


def greeting(server_id: str = "server", count: int | str = 1) -> Metadata:
    return {"serverid": [server_id], "servercount": [str(count)]}


def agent_state(**config: Any) -> AgentState:
    settings = AgentConfig(**{"agent_id": "agent", **config})
    metrics = AgentMetrics()
    return AgentState(
        config=settings,
        metrics=metrics,
        budget=Budget(each=settings.connection_buffer_bytes, total=settings.total_buffer_bytes),
        resolver=Resolver(),
        data_packets=AgentPackets(metrics),
    )


class Services:
    """What the agent reaches: plays :func:`clusterproxy.agent.dial.dial`.

    ``pair`` and ``listen`` make services; other addresses are dialled in earnest.
    """

    def __init__(self) -> None:
        self._sockets: dict[str, socket.socket] = {}
        self.opened: list[trio.SocketStream] = []
        self.cancelled: list[str] = []

    def pair(self, address: str, *, tcp: bool = False) -> trio.SocketStream:
        """A service that is connected when *address* is dialled, once."""
        ours, theirs = tcp_pair() if tcp else socket_pair()
        self._sockets[address] = theirs
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        self.opened.append(stream)
        return stream

    def close(self) -> None:
        for service in self.opened:
            service.socket.close()
        for sock in self._sockets.values():
            sock.close()

    async def dial(
        self, network: str, address: str, *, timeout_s: float, resolver: Resolver
    ) -> socket.socket:
        if address.startswith("never"):
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                self.cancelled.append(address)
                raise
        if address in self._sockets:
            await trio.lowlevel.checkpoint()
            return self._sockets.pop(address)
        return await dial(network, address, timeout_s=timeout_s, resolver=resolver)


@attrs.define(eq=False)
class AgentWorld:
    """One session of an agent, with a scripted server at the other end."""

    state: AgentState
    session: Session
    server: ScriptedServer
    services: Services
    connection: Http2Connection
    ended: trio.Event
    nursery: trio.Nursery

    @property
    def metrics(self) -> AgentMetrics:
        return self.state.metrics

    @property
    def open(self) -> float:
        return value(self.metrics.open_endpoint_connections)

    def packets(self, segment: str) -> dict[str, float]:
        found = self.metrics.stream_packets_total.children.items()
        return {labels[1]: cell.value for labels, cell in found if labels[0] == segment}

    async def connect(self, *, connect_id: int = 1, tcp: bool = False) -> trio.SocketStream:
        """Have the agent connect to a service, and return the service's end."""
        address = f"service:{connect_id}"
        service = self.services.pair(address, tcp=tcp)
        self.server.send(DialRequest("tcp", address, 100 + connect_id))
        await self.server.expect(dial_ok(connect_id, 100 + connect_id))
        return service

    def check_idle(self) -> None:
        assert not self.session.busy
        assert not self.open
        assert not self.state.budget.used
        assert not values(self.metrics.connections_over_budget)
        assert not values(self.metrics.buffered_bytes)


@contextlib.asynccontextmanager
async def session(
    *, window: int = WINDOW, extended: bool = False, **config: Any
) -> AsyncGenerator[AgentWorld]:
    """Run an agent's session; leaving the block ends it, and checks that nothing is left."""
    state = agent_state(**config)
    servers = ScriptedServers(greeting() | (offer() if extended else {}), window=window)
    services = Services()
    ours, theirs = socket_pair()
    with contextlib.closing(services), patch("clusterproxy.agent.session.dial", services.dial):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(servers.rpc.serve, Transport(theirs))
            connection = Http2Connection(Transport(ours), client=True, limits=Http2Limits())
            nursery.start_soon(connection.run)
            await trio.lowlevel.checkpoint()
            call = start_call(
                connection, CONNECT, authority="t", secure=False, metadata={}, user_agent=OURS
            )
            agent = Session(state, call)
            await agent.greet()
            ended = trio.Event()

            async def run() -> None:
                await agent.run()
                ended.set()

            nursery.start_soon(run)
            await settle()
            world = AgentWorld(state, agent, servers.peers[0], services, connection, ended, nursery)
            yield world
            connection.fail("the test is over")
            with trio.fail_after(60):
                await ended.wait()
            await settle()
            world.check_idle()
            nursery.cancel_scope.cancel()
