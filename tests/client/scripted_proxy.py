"""Our client in this process, before a scripted proxy server or the real server and agent."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import attrs
import trio
from harness import (
    CONNECT,
    PROXY,
    ScriptedServer,
    Services,
    agent_state,
    dial_ok,
    serving,
    settle,
    socket_pair,
    value,
    values,
)

from clusterproxy.agent.session import Session
from clusterproxy.client import ClientMetrics, open_tunnel
from clusterproxy.http2.adapter import ErrorCode
from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.flow import Flow
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.rpc.channel import start_call
from clusterproxy.rpc.server import RpcServer
from clusterproxy.transport.stream import Transport
from clusterproxy.tunnel.extension import offer
from clusterproxy_proto import (
    CloseRequest,
    CloseResponse,
    Data,
    DialRequest,
    HalfClose,
    Packet,
    Payload,
    Reset,
    encode,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    from harness import ServerWorld

    from clusterproxy.client import Tunnel, TunnelStream
    from clusterproxy.grpc import Metadata
    from clusterproxy.rpc.server import ServerCall


class Connector:
    """What the client connects to instead of a server's address."""

    def __init__(
        self, nursery: trio.Nursery, serve: Callable[[Transport], Awaitable[None]]
    ) -> None:
        self._nursery = nursery
        self._serve = serve
        self.transports: list[Transport] = []
        #: What the next attempts raise.
        self.errors: list[OSError] = []
        #: What serves the next connections instead.
        self.stand_ins: list[Callable[[Transport], Awaitable[None]]] = []
        self.attempts: list[float] = []

    async def __call__(self, _server: object) -> socket.socket:
        await trio.lowlevel.checkpoint()
        self.attempts.append(trio.current_time())
        if self.errors:
            raise self.errors.pop(0)
        ours, theirs = socket_pair()
        self.transports.append(Transport(theirs))
        serve = self.stand_ins.pop(0) if self.stand_ins else self._serve
        self._nursery.start_soon(serve, self.transports[-1])
        return ours


def patch_connector(connector: Callable[[object], Awaitable[socket.socket]]) -> Any:
    """Have all tunnels connect by *connector* in the block."""
    return patch("clusterproxy.client.connecting._connect_socket", connector)


@attrs.define(eq=False)
class ProxyWorld:
    """A tunnel to a scripted server, which is told what to say."""

    tunnel: Tunnel
    nursery: trio.Nursery
    connector: Connector
    metrics: ClientMetrics
    peers: list[ScriptedProxy]

    @property
    def peer(self) -> ScriptedProxy:
        """The server's end of the newest Proxy stream."""
        return self.peers[-1]

    @property
    def states(self) -> dict[str, float]:
        return values(self.metrics.client_connections)

    @property
    def failures(self) -> dict[str, float]:
        return values(self.metrics.dial_failure_total)

    def packets(self, segment: str) -> dict[str, float]:
        found = self.metrics.stream_packets_total.children.items()
        return {labels[1]: cell.value for labels, cell in found if labels[0] == segment}

    async def start_dial(self, address: str = "target:80") -> tuple[Dial, DialRequest]:
        """Dial in a task of its own; return it, and the request that has come to the server."""
        dial = Dial(self.tunnel, address)
        self.nursery.start_soon(dial.run)
        await settle()
        request = await self.peer.next()
        assert isinstance(request, DialRequest)
        return dial, request

    async def connect(self, connect_id: int = 1) -> tuple[TunnelStream, ScriptedProxy]:
        """Establish a connection; return both its ends."""
        dial, request = await self.start_dial()
        self.peer.send(dial_ok(connect_id, request.random))
        await settle()
        assert dial.stream is not None
        return dial.stream, self.peer


class ScriptedProxy(ScriptedServer):
    """The server's end of a Proxy stream. As with real servers it ends when the client's side ends."""

    def _on_half_close(self) -> None:
        super()._on_half_close()
        self.finish()


class Dial:
    """A dial that runs, and what came of it."""

    def __init__(self, tunnel: Tunnel, address: str) -> None:
        self._tunnel = tunnel
        self._address = address
        self.scope = trio.CancelScope()
        self.stream: TunnelStream | None = None
        self.error: Exception | None = None
        self.done = trio.Event()

    async def run(self) -> None:
        try:
            with self.scope:
                self.stream = await self._tunnel.dial(self._address)
        except Exception as error:
            self.error = error
        finally:
            self.done.set()


@contextlib.asynccontextmanager
async def scripted(
    *,
    extended: bool = True,
    limits: Http2Limits | None = None,
    stand_ins: Sequence[Callable[[Transport], Awaitable[None]]] = (),
    **options: Any,
) -> AsyncGenerator[ProxyWorld]:
    """Open a tunnel to a scripted server; at the end nothing may be left of it."""
    peers: list[ScriptedProxy] = []

    def open_call(call: ServerCall) -> Callable[[], Awaitable[None]]:
        peer = ScriptedProxy(call)
        peers.append(peer)
        if extended:
            call.send_initial_metadata(offer())
        return peer.run

    metrics = ClientMetrics()
    async with trio.open_nursery() as nursery:
        rpc = RpcServer({PROXY: open_call}, limits=limits or Http2Limits())
        connector = Connector(nursery, rpc.serve)
        connector.stand_ins += stand_ins
        with patch_connector(connector):
            async with open_tunnel("/scripted", metrics=metrics, **options) as tunnel:
                yield ProxyWorld(tunnel, nursery, connector, metrics, peers)
        await settle()
        assert tunnel.closed
        assert not values(metrics.client_connections)
        nursery.cancel_scope.cancel()


# -- two clients that are connected with each other ------------------------------------------------


class Relay:
    """A proxy server that connects every two dials with each other."""

    def __init__(self) -> None:
        self._waiting: _RelayEnd | None = None

    def open(self, call: ServerCall) -> Callable[[], Awaitable[None]]:
        call.send_initial_metadata(offer())
        end = _RelayEnd(self, call)
        return end.run

    def pair(self, end: _RelayEnd) -> None:
        if self._waiting is None:
            self._waiting = end
        else:
            self._waiting.other, end.other = end, self._waiting
            self._waiting = None


class _RelayEnd(ScriptedProxy):
    def __init__(self, relay: Relay, call: ServerCall) -> None:
        super().__init__(call)
        self._relay = relay
        self.other: _RelayEnd | None = None
        self.flow = Flow(self._drained)
        call.receive = self._pass

    def _drained(self, size: int) -> None:
        assert self.other is not None
        self.other.call.stream.release(size)

    def _pass(self, size: int, head: memoryview, rest: tuple[memoryview, ...]) -> None:
        self._receive(size, head, rest)
        payload = self.received.popleft().payload
        match payload:
            case DialRequest():
                self._relay.pair(self)
                self.send(dial_ok(1, payload.random))
            case CloseRequest():
                self.send(CloseResponse("", 1))
                self.to_other(CloseResponse("", 1))
            case Data() | HalfClose() | Reset():
                self.to_other(payload)

    def to_other(self, payload: Payload) -> None:
        assert self.other is not None
        message = encode(Packet.of(payload))
        if isinstance(payload, Data):
            framed = b"\0" + len(message).to_bytes(4, "big") + message
            before = self.other.flow.queued
            self.other.call.forward(self.other.flow, len(framed), framed)
            self.call.stream.hold(self.other.flow.queued - before)
        else:
            if isinstance(payload, Reset):
                self.other.call.stream.drop_flow(self.other.flow)
            self.other.call.send_behind(self.other.flow, message)
            if isinstance(payload, Reset) and self.other.call.stream.waiting:
                # To a client that does not read nothing else can be said.
                call = self.other.call
                call.connection.reset_stream(call.stream, ErrorCode.CANCEL, told="reset")

    def _on_close(self, status: Any, message: str) -> None:
        super()._on_close(status, message)
        if self.other is not None and status.go_name != "OK":
            self.to_other(Reset(1, "gone"))


@contextlib.asynccontextmanager
async def relayed() -> AsyncGenerator[Callable[[], Awaitable[tuple[TunnelStream, TunnelStream]]]]:
    """Yield what makes pairs of streams that are connected through a scripted server."""
    async with trio.open_nursery() as nursery:
        rpc = RpcServer({PROXY: Relay().open}, limits=Http2Limits(window=64 * 1024))
        with patch_connector(Connector(nursery, rpc.serve)):
            async with open_tunnel("/relay") as tunnel:

                async def make() -> tuple[TunnelStream, TunnelStream]:
                    return await tunnel.dial("left:1"), await tunnel.dial("right:1")

                yield make
        nursery.cancel_scope.cancel()


# -- the real server and agent ---------------------------------------------------------------------


@attrs.define(eq=False)
class RealWorld:
    """A tunnel through our server and agent to services of the test."""

    tunnel: Tunnel
    connector: Connector
    server: ServerWorld
    services: Services
    metrics: ClientMetrics

    async def connect(self, address: str = "service:1") -> tuple[TunnelStream, trio.SocketStream]:
        service = self.services.pair(address, tcp=True)
        return await self.tunnel.dial(address), service


@contextlib.asynccontextmanager
async def real(mode: str = "grpc", **options: Any) -> AsyncGenerator[RealWorld]:
    """Run server and agent without listeners, and open a tunnel through them."""
    async with serving() as world:
        services = Services()
        with (
            contextlib.closing(services),
            patch("clusterproxy.agent.session.dial", services.dial),
        ):
            ours, theirs = socket_pair()
            world.nursery.start_soon(world.agents.serve, Transport(theirs))
            agent = Http2Connection(Transport(ours), client=True, limits=Http2Limits())
            world.nursery.start_soon(agent.run)
            await trio.lowlevel.checkpoint()
            metadata: Metadata = {"agentid": ["a"], "agentidentifiers": [""]}
            call = start_call(
                agent,
                CONNECT,
                authority="t",
                secure=False,
                metadata=metadata | offer(),
                user_agent="clusterproxy/0",
            )
            session = Session(agent_state(), call)
            await session.greet()
            world.nursery.start_soon(session.run)
            await settle()
            metrics = ClientMetrics()
            serve = world.frontends.serve if mode == "grpc" else _connect_server(world.state)
            connector = Connector(world.nursery, serve)
            with patch_connector(connector):
                async with open_tunnel("/real", mode=mode, metrics=metrics, **options) as tunnel:  # type: ignore[arg-type]
                    yield RealWorld(tunnel, connector, world, services, metrics)
            # An agent waits a while for its services to end.
            services.close()
            await settle()
            assert not session.endpoints
            assert not value(world.metrics.established_connections)
            agent.fail("the test is over")
            await settle()


def _connect_server(state: Any) -> Callable[[Transport], Awaitable[None]]:
    from clusterproxy.server.connect import ConnectTunnel

    async def serve(transport: Transport) -> None:
        await ConnectTunnel(state, transport).run()

    return serve
