"""The server program in this process: its listeners, TLS, certificates, readiness and shutdown."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trustme
from certificates import write_agent_pair, write_ca, write_pair
from harness import CONNECT, GO, PROXY, ClientPeer, dial_ok, settle, value, values
from kube_script import ScriptedApi

from clusterproxy.errors import ConfigError, KubeUnavailable
from clusterproxy.http2.connection import Http2Connection
from clusterproxy.http2.limits import Http2Limits
from clusterproxy.kube import review_queue
from clusterproxy.rpc.channel import start_call
from clusterproxy.server import app
from clusterproxy.server.config import ServerConfig
from clusterproxy.transport.listener import listen_tcp, listen_unix
from clusterproxy.transport.stream import Transport, tune
from clusterproxy.transport.tls import client_context
from clusterproxy.tunnel.agent_identity import CLUSTER_URI
from clusterproxy.tunnel.extension import offer
from clusterproxy_proto import CloseRequest, CloseResponse, Data, DialRequest, DialResponse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path

    from trio.testing import MockClock

    from clusterproxy.kube.api import KubeApi

REQUEST = b"CONNECT target:443 HTTP/1.1\r\n\r\n"
ESTABLISHED = b"HTTP/1.1 200 Connection Established\r\n\r\n"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def config(authority: trustme.CA, tmp_path: Path) -> dict[str, Any]:
    ca = write_ca(authority, tmp_path)
    cert, key = write_pair(authority, tmp_path, "server", "127.0.0.1")
    write_pair(authority, tmp_path, "peer", "peer.test")
    ports = dict.fromkeys(("server_port", "agent_port", "health_port", "admin_port"), 0)
    return {
        **ports,
        "server_id": "server",
        "server_cert": cert,
        "server_key": key,
        "server_ca_cert": ca,
        "cluster_cert": cert,
        "cluster_key": key,
        "cluster_ca_cert": ca,
    }


@pytest.fixture(autouse=True)
def _one_signal_too_many() -> Iterator[None]:
    """Keeps a signal that the server does not wait for any more from ending the tests."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, before)


class Program:
    """A running server, and what its peers need to know."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.directory = directory
        self.nursery = nursery
        self.ports: dict[str, int] = {}
        self.server: app.ProxyServer | None = None
        self.status: int | None = None
        self.stopped = trio.Event()

    @property
    def metrics(self) -> Any:
        assert self.server is not None
        return self.server.metrics

    def context(self, alpn: list[str], *, pair: str = "peer") -> ssl.SSLContext:
        cert = str(self.directory / f"{pair}.crt") if pair else None
        key = str(self.directory / f"{pair}.key") if pair else None
        return client_context(ca=str(self.directory / "ca.crt"), cert=cert, key=key, alpn=alpn)

    def socket(self, port: str, source: str = "127.0.0.1") -> socket.socket:
        address = ("127.0.0.1", self.ports[port])
        sock = socket.create_connection(address, source_address=(source, 0))
        sock.setblocking(False)
        # Nagle's delay is real time, which a jumping clock does not wait for.
        tune(sock, user_timeout=False)
        return sock

    async def transport(
        self, port: str, alpn: list[str], *, source: str = "127.0.0.1", **options: Any
    ) -> Transport:
        context = self.context(alpn, **options)
        transport = Transport(self.socket(port, source), context, server_hostname="127.0.0.1")
        try:
            await transport.handshake()
        except BaseException:
            transport.close()
            raise
        return transport

    async def knock(self, port: str, **options: Any) -> None:
        """Shake hands, and wait for what comes: in TLS 1.3 a client hears only then that it is refused."""
        transport = await self.transport(port, ["h2"], **options)
        try:
            while await transport.receive():
                pass
        finally:
            transport.close()

    async def call(self, transport: Transport, path: str, metadata: Any = None) -> ClientPeer:
        connection = Http2Connection(transport, client=True, limits=Http2Limits())
        self.nursery.start_soon(connection.run)
        await trio.lowlevel.checkpoint()
        call = start_call(
            connection,
            path,
            authority="t",
            secure=True,
            metadata=metadata or {},
            user_agent=GO,
        )
        peer = ClientPeer(call, connection)
        await settle()
        return peer

    async def agent(
        self,
        name: str = "agent",
        *,
        extended: bool = False,
        token: str = "",
        identifiers: str = "",
        **options: Any,
    ) -> ClientPeer:
        transport = await self.transport("agent-port", ["h2"], **options)
        metadata: dict[str, Any] = {"agentid": [name], **(offer() if extended else {})}
        metadata["agentidentifiers"] = [identifiers]
        if token:
            metadata["authorization"] = [f"Bearer {token}"]
        return await self.call(transport, CONNECT, metadata)

    async def client(self, **options: Any) -> ClientPeer:
        return await self.call(await self.transport("server-port", ["h2"], **options), PROXY)

    async def get(self, port: str, path: str) -> tuple[int, str]:
        stream = await trio.open_tcp_stream("127.0.0.1", self.ports[port])
        async with stream:
            await stream.send_all(
                f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode()
            )
            answer = b"".join([bytes(chunk) async for chunk in stream])
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), body.decode()


@contextlib.asynccontextmanager
async def running(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, directory: Path
) -> AsyncGenerator[Program]:
    listen = listen_tcp
    make = app.ProxyServer
    async with trio.open_nursery() as nursery:
        program = Program(directory, nursery)

        def listen_anywhere(host: str, port: int, flag: str) -> socket.socket:
            sock = listen(host or "127.0.0.1", port, flag)
            program.ports[flag] = sock.getsockname()[1]
            return sock

        def make_server(config: ServerConfig, api: KubeApi | None) -> app.ProxyServer:
            program.server = make(config, api)
            return program.server

        monkeypatch.setattr(app, "listen_tcp", listen_anywhere)
        monkeypatch.setattr(app, "ProxyServer", make_server)

        async def run() -> None:
            program.status = await app.run_server(ServerConfig(**config))
            program.stopped.set()

        async with trio.open_nursery() as running:
            running.start_soon(run)
            await settle()
            # The server's own clocks tick for ever, so nothing else would end a wait in vain.
            with trio.fail_after(600):
                yield program
            for _ in range(2):
                if not program.stopped.is_set():
                    signal.raise_signal(signal.SIGTERM)
                    await settle()
            with trio.fail_after(5):
                await program.stopped.wait()
        nursery.cancel_scope.cancel()


async def test_grpc(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    async with running(config, monkeypatch, tmp_path) as program:
        assert await program.get("health-port", "/healthz") == (200, "ok")
        not_ready = (500, "no connection to any proxy agent")
        assert await program.get("health-port", "/readyz") == not_ready
        agent = await program.agent()
        assert await program.get("health-port", "/readyz") == (200, "ok")
        client = await program.client()
        client.send(DialRequest("tcp", "target:1", 7))
        await agent.expect(DialRequest("tcp", "target:1", 7))
        agent.send(dial_ok(1, 7), Data(1, data=b"hello"), CloseResponse("", 1))
        await client.expect(dial_ok(1, 7), Data(1, data=b"hello"), CloseResponse("", 1))
        for port in ("health-port", "admin-port"):
            status, text = await program.get(port, "/metrics")
            assert status == 200
            assert 'ready_backends{proxy_strategy="default"} 1' in text
        assert await program.get("admin-port", "/debug/pprof/") == (404, "404 page not found\n")
        expiry = values(program.metrics.certificate_expiry_seconds)
        assert set(expiry) == {config["server_cert"]}


async def test_connect_mode(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    config["mode"] = "http-connect"
    async with running(config, monkeypatch, tmp_path) as program:
        agent = await program.agent()
        # HTTP/2 is not negotiated.
        transport = await program.transport("server-port", ["h2", "http/1.1"])
        assert transport.tls is not None
        assert transport.tls.selected_alpn_protocol() == "http/1.1"
        transport.send([REQUEST])
        dial = await agent.next()
        assert isinstance(dial, DialRequest)
        agent.send(dial_ok(1, dial.random), Data(1, data=b"hello"))
        received = b""
        while len(received) < len(ESTABLISHED) + 5:
            view = await transport.receive()
            assert view
            received += view
        assert received == ESTABLISHED + b"hello"
        transport.send([b"request"])
        await agent.expect(Data(1, data=b"request"))
        # The target ends while the client still sends: it gets an orderly end.
        agent.send(Data(1, data=b"bye"), CloseResponse("", 1))
        transport.send([b"more"])
        await settle()
        # Which of the two comes first is chance.
        assert {packet.payload for packet in agent.received} <= {Data(1, data=b"more")}
        assert bytes(await transport.receive()) == b"bye"
        assert not await transport.receive()
        transport.close()
        await settle()
        assert value(program.metrics.http_connections) == 0
        refused = await program.transport("server-port", [])
        refused.send([b"GET / HTTP/1.0\r\n\r\n"])
        assert bytes(await refused.receive()).startswith(b"HTTP/1.1 405 ")
        refused.close()


@pytest.mark.parametrize("mode", ["grpc", "http-connect"])
async def test_unix_socket(
    mode: str,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    path = tmp_path / "proxy.sock"
    path.write_text("left over")
    for side in ("cert", "key", "ca_cert"):
        config[f"server_{side}"] = ""
    config |= {"uds_name": str(path), "mode": mode}
    async with running(config, monkeypatch, tmp_path) as program:
        agent = await program.agent()
        assert oct(os.stat(path).st_mode & 0o777) == "0o770"
        assert "server-port" not in program.ports
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        sock.setblocking(False)
        if mode == "grpc":
            client = await program.call(Transport(sock), PROXY)
            client.send(DialRequest("tcp", "target:1", 7))
            await agent.expect(DialRequest("tcp", "target:1", 7))
        else:
            transport = Transport(sock)
            transport.send([REQUEST])
            assert isinstance(await agent.next(), DialRequest)
            transport.close()
    assert not path.exists()


async def test_the_unix_socket_of_the_next_server_stays(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """A server that ends, after its grace, does not take away what another one listens on."""
    path = tmp_path / "proxy.sock"
    for side in ("cert", "key", "ca_cert"):
        config[f"server_{side}"] = ""
    config |= {"uds_name": str(path)}
    with contextlib.ExitStack() as opened:
        async with running(config, monkeypatch, tmp_path):
            opened.enter_context(listen_unix(str(path), delete_existing=True))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


@pytest.mark.parametrize(("given", "interval"), [(0.0, 7200.0), (1e-9, 1.0), (90.0, 90.0)])
async def test_keepalive_times(
    given: float,
    interval: float,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """As grpc-go reads them: none is no reason to do nothing else."""
    intervals: list[float] = []

    async def keep_alive(_connections: object, interval_s: float) -> None:
        intervals.append(interval_s)
        await trio.sleep_forever()

    monkeypatch.setattr(app, "keep_alive", keep_alive)
    config |= {"keepalive_time_s": given, "frontend_keepalive_time_s": given}
    async with running(config, monkeypatch, tmp_path):
        assert intervals == [interval, interval]


# -- H14, B14: who is let in -----------------------------------------------------------------------


@pytest.mark.parametrize("port", ["server-port", "agent-port"])
@pytest.mark.parametrize("pair", ["", "stranger"])
async def test_certificates_are_demanded(
    port: str,
    pair: str,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    write_pair(trustme.CA(), tmp_path, "stranger", "peer.test")
    async with running(config, monkeypatch, tmp_path) as program:
        with pytest.raises((ssl.SSLError, trio.BrokenResourceError)):
            await program.knock(port, pair=pair)
        await settle()
        assert values(program.metrics.handshake_failures_total) == {"tls": 1}
        assert not values(program.metrics.grpc_connections)
        assert not value(program.metrics.handshakes_in_flight)


@pytest.mark.parametrize("port", ["server-port", "agent-port"])
@pytest.mark.parametrize("alpn", [[], ["http/1.1"]])
async def test_protocol_is_demanded(
    port: str,
    alpn: list[str],
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    async with running(config, monkeypatch, tmp_path) as program:
        transport = await program.transport(port, alpn)
        assert not await transport.receive()
        transport.close()
        await settle()
        assert values(program.metrics.handshake_failures_total) == {"alpn": 1}


@pytest.mark.parametrize("port", ["server-port", "agent-port"])
async def test_plain_text_on_a_tls_port(
    port: str,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    async with running(config, monkeypatch, tmp_path) as program:
        stream = await trio.open_tcp_stream("127.0.0.1", program.ports[port])
        await stream.send_all(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                pass
        await stream.aclose()
        await settle()
        assert values(program.metrics.handshake_failures_total) == {"tls": 1}
        assert (await program.agent()).closed_with is None


async def test_certificates_are_reloaded(
    authority: trustme.CA,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    async with running(config, monkeypatch, tmp_path) as program:
        agent, client = await program.agent(), await program.client()
        client.send(DialRequest("tcp", "target:1", 7))
        await agent.next()
        agent.send(dial_ok(1, 7))
        await client.expect(dial_ok(1, 7))
        # A broken file keeps the old ones in service.
        (tmp_path / "server.crt").write_text("nothing")
        await trio.sleep(11)
        assert values(program.metrics.certificate_reload_total)["error"] == 2
        assert (await program.agent()).closed_with is None
        write_pair(authority, tmp_path, "server", "127.0.0.1")
        second = trustme.CA()
        write_ca(second, tmp_path)
        await trio.sleep(11)
        assert values(program.metrics.certificate_reload_total)["ok"] == 2
        # The new CA for clients is in force, and no tunnel was dropped.
        write_ca(authority, tmp_path)
        with pytest.raises((ssl.SSLError, trio.BrokenResourceError)):
            await program.knock("server-port")
        client.send(Data(1, data=b"on"))
        await agent.expect(Data(1, data=b"on"))


async def test_each_connection_is_looked_at_anew(
    authority: trustme.CA,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    config |= {"agent_identity": "verify", "proxy_strategies": ("destHost",)}
    async with running(config, monkeypatch, tmp_path) as program:

        async def come() -> ClientPeer:
            return await program.agent(pair="mine", identifiers="host=cluster1")

        write_agent_pair(authority, tmp_path, "mine")
        old = await come()
        # The agent's file is replaced; what runs goes on.
        write_agent_pair(authority, tmp_path, "mine", f"{CLUSTER_URI}cluster2")
        status, text = await (await come()).status()
        assert (status, text[:28]) == ("PermissionDenied", 'identifier "host=cluster1" i')
        assert old.closed_with is None
        write_agent_pair(authority, tmp_path, "mine", f"{CLUSTER_URI}cluster1")
        assert (await come()).closed_with is None
        _, metrics = await program.get("health-port", "/metrics")
        assert 'clusterproxy_rejected_agents_total{reason="foreign_identifier"} 1' in metrics


@pytest.mark.parametrize("uri", [f"{CLUSTER_URI}cluster1", CLUSTER_URI.upper(), b"urn:a\xff"])
@pytest.mark.parametrize("mode", ["grpc", "http-connect"])
async def test_an_agent_reaches_no_other_cluster_as_a_client(
    uri: str | bytes,
    mode: str,
    authority: trustme.CA,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One authority signs for agents and for clients, and agents may forward any port of a server's pod."""
    config |= {"agent_identity": "verify", "proxy_strategies": ("destHost",), "mode": mode}
    write_agent_pair(authority, tmp_path, "mine", uri)
    async with running(config, monkeypatch, tmp_path) as program:
        alpn = ["h2"] if mode == "grpc" else ["http/1.1"]
        for _ in range(2):
            transport = await program.transport("server-port", alpn, pair="mine")
            with contextlib.suppress(trio.BrokenResourceError):
                assert not await transport.receive()
            transport.close()
        _, metrics = await program.get("health-port", "/metrics")
        assert 'clusterproxy_rejected_agents_total{reason="client"} 2' in metrics
        [record] = [each for each in caplog.records if each.levelno == logging.WARNING]
        assert record.getMessage().startswith("agent refused: it connects as a client: ")
        if mode == "grpc":
            assert (await program.client()).closed_with is None


async def test_agents_may_be_clients_where_nobody_looks(
    authority: trustme.CA,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    write_agent_pair(authority, tmp_path, "mine", f"{CLUSTER_URI}cluster1")
    async with running(config, monkeypatch, tmp_path) as program:
        assert (await program.client(pair="mine")).closed_with is None


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"server_cert": ""}, "server-cert"),
        ({"cluster_cert": ""}, "cluster-cert"),
        ({"server_cert": "nowhere.crt"}, "server-cert"),
        ({"cluster_key": "nowhere.key"}, "cluster-key"),
        ({"cluster_ca_cert": "nowhere.crt"}, "cluster-ca-cert"),
        ({"server_ca_cert": "nowhere.crt"}, "server-ca-cert"),
        ({"health_bind_address": "192.0.2.1"}, "health-port"),
        ({"uds_name": "/no/such/directory/x.sock"}, "uds-name"),
    ],
)
async def test_bad_configuration(
    change: dict[str, Any], field: str, config: dict[str, Any], autojump_clock: MockClock
) -> None:
    with pytest.raises(ConfigError) as caught:
        await app.run_server(ServerConfig(**{**config, **change}))
    assert caught.value.field == field


async def test_agents_without_certificates(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    config["cluster_ca_cert"] = ""
    async with running(config, monkeypatch, tmp_path) as program:
        assert (await program.agent(pair="")).closed_with is None


async def test_limits_are_counted(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    config["max_control_frames_per_s"] = 10
    async with running(config, monkeypatch, tmp_path) as program:
        client = await program.client()
        for _ in range(50):
            client.connection.ping()
        await client.status()
        assert values(program.metrics.limit_exceeded_total) == {"control_frames": 1}


# -- shutdown --------------------------------------------------------------------------------------


async def test_shutdown_of_an_idle_server(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    async with running(config, monkeypatch, tmp_path) as program:
        agent = await program.agent()
        signal.raise_signal(signal.SIGTERM)
        await program.stopped.wait()
        assert program.status == 0
        assert trio.current_time() < 1
        await agent.status()


@pytest.mark.parametrize("mode", ["grpc", "http-connect"])
async def test_graceful_shutdown(
    mode: str,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    config["mode"] = mode
    async with running(config, monkeypatch, tmp_path) as program:
        agent = await program.agent()
        client: ClientPeer | None = None
        transport: Transport | None = None
        if mode == "grpc":
            client = await program.client()
            client.send(DialRequest("tcp", "target:1", 7))
        else:
            transport = await program.transport("server-port", [])
            transport.send([REQUEST])
        dial = await agent.next()
        assert isinstance(dial, DialRequest)
        agent.send(dial_ok(1, dial.random))
        await settle()
        signal.raise_signal(signal.SIGINT)
        await trio.sleep(7)
        # Not ready, no new connections, but what is open goes on.
        assert await program.get("health-port", "/readyz") == (500, "shutting down")
        with pytest.raises(OSError, match="refused"):
            program.socket("server-port")
        with pytest.raises(OSError, match="refused"):
            program.socket("agent-port")
        agent.send(Data(1, data=b"on"))
        if client is not None:
            await client.expect(dial_ok(1, 7), Data(1, data=b"on"))
            assert client.connection.draining
            client.send(CloseRequest(1))
            await agent.expect(CloseRequest(1))
            client.half_close()
            assert await client.status() == ("OK", "")
        else:
            assert transport is not None
            await settle()
            transport.close(reset=True)
            await agent.expect(CloseRequest(1))
            agent.send(CloseResponse("", 1))
        # Long before the end of the grace.
        with trio.fail_after(4):
            await program.stopped.wait()
        assert program.status == 0


async def test_shutdown_with_http_clients_that_ask_for_nothing(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """They are not waited for, but those that ask in a moment, or are about to, are served."""
    config["mode"] = "http-connect"
    async with running(config, monkeypatch, tmp_path) as program:
        agent = await program.agent()
        with contextlib.ExitStack() as opened:
            idle, slow, quick = [
                opened.enter_context(contextlib.closing(await program.transport("server-port", [])))
                for _ in range(3)
            ]
            slow.send([REQUEST[:10]])
            await settle()
            signal.raise_signal(signal.SIGTERM)
            await trio.sleep(0.5)
            begin = trio.current_time()
            quick.send([REQUEST])
            dials = [await agent.next()]
            with trio.fail_after(2):
                assert not await idle.receive()
            slow.send([REQUEST[10:]])
            dials.append(await agent.next())
            for connect_id, dial in enumerate(dials, 1):
                assert isinstance(dial, DialRequest)
                agent.send(dial_ok(connect_id, dial.random), CloseResponse("", connect_id))
            for client in (quick, slow):
                assert bytes(await client.receive()) == ESTABLISHED
                assert not await client.receive()
        with trio.fail_after(2):
            await program.stopped.wait()
        assert trio.current_time() - begin < 5
        assert program.status == 0


async def test_the_end_of_the_grace(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    async with running(config, monkeypatch, tmp_path) as program:
        await program.agent()
        client = await program.client()
        begin = trio.current_time()
        signal.raise_signal(signal.SIGTERM)
        await program.stopped.wait()
        assert trio.current_time() - begin == pytest.approx(25, abs=0.1)
        assert program.status == 0
        assert (await client.status())[0] == "Unavailable"


async def test_no_grace(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    config["graceful_shutdown_timeout_s"] = 0.0
    async with running(config, monkeypatch, tmp_path) as program:
        await program.client()
        begin = trio.current_time()
        signal.raise_signal(signal.SIGTERM)
        await program.stopped.wait()
        assert trio.current_time() - begin < 1
        assert program.status == 0


async def test_a_second_signal(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    async with running(config, monkeypatch, tmp_path) as program:
        await program.client()
        begin = trio.current_time()
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep(3)
        signal.raise_signal(signal.SIGTERM)
        await program.stopped.wait()
        assert trio.current_time() - begin == pytest.approx(3, abs=0.1)
        assert program.status == 1


async def test_dials_are_answered_during_shutdown(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    async with running(config, monkeypatch, tmp_path) as program:
        agent, client = await program.agent(), await program.client()
        signal.raise_signal(signal.SIGTERM)
        await settle()
        client.send(DialRequest("tcp", "target:1", 7))
        await agent.expect(DialRequest("tcp", "target:1", 7))
        agent.send(DialResponse(error="refused", random=7))
        await client.expect(DialResponse(error="refused", random=7))


# -- agents during the shutdown --------------------------------------------------------------------


async def test_our_agents_are_told_and_go_on(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    async with running(config, monkeypatch, tmp_path) as program:
        agent, client = await program.agent(extended=True), await program.client()
        signal.raise_signal(signal.SIGTERM)
        await settle()
        assert agent.connection.draining
        # Idle or not, until the server ends: dials of clients that are still there are served.
        await trio.sleep(24)
        client.send(DialRequest("tcp", "target:1", 7))
        await agent.expect(DialRequest("tcp", "target:1", 7))
        agent.send(dial_ok(1, 7), Data(1, data=b"late"))
        await client.expect(dial_ok(1, 7), Data(1, data=b"late"))
        assert agent.closed_with is None
        await program.stopped.wait()
        assert trio.current_time() == pytest.approx(25, abs=0.1)


async def test_an_idle_go_agent_is_parted_from(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """Its stream ends in order, and by no GOAWAY, when no dial can come any more."""
    async with running(config, monkeypatch, tmp_path) as program:
        agent, client = await program.agent(), await program.client()
        ours = await program.agent("ours", extended=True)
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep(0.9)
        assert not agent.ended.is_set()
        await trio.sleep(0.3)
        assert await agent.status() == ("OK", "")
        assert not agent.connection.draining
        # The other one is all that is left.
        client.send(DialRequest("tcp", "target:1", 7))
        await ours.expect(DialRequest("tcp", "target:1", 7))


async def test_a_go_agent_that_is_in_use(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    async with running(config, monkeypatch, tmp_path) as program:
        agents = [await program.agent(f"agent{n}") for n in range(3)]
        client = await program.client()
        asked: list[ClientPeer] = []
        for number in range(40):
            client.send(DialRequest("tcp", "target:1", number))
            await settle()
            (agent,) = (agent for agent in agents if agent.received)
            dial = await agent.next()
            assert isinstance(dial, DialRequest)
            if agent not in asked:
                asked.append(agent)
                if len(asked) < 3:
                    agent.send(dial_ok(1, number))
                    assert await client.next() is not None
                # The third one leaves the dial without an answer.
                continue
            agent.send(DialResponse(error="refused", random=number))
            await client.expect(DialResponse(error="refused", random=number))
        assert len(asked) == 3
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep(5)
        assert [agent.closed_with for agent in asked] == [None, None, None]
        # It ends when its connection has ended.
        asked[0].send(CloseResponse("", 1))
        await trio.sleep(0.2)
        assert [agent.closed_with for agent in asked] == [("OK", ""), None, None]
        # And after a while, for new servers hold dials for 20 s only.
        await trio.sleep(2.7)
        assert [agent.closed_with for agent in asked] == [("OK", ""), None, None]
        await trio.sleep(0.3)
        assert [agent.closed_with for agent in asked] == [("OK", "")] * 3
        assert trio.current_time() == pytest.approx(8.2, abs=0.2)


@pytest.mark.parametrize(("grace_s", "patience_s"), [(600, 8), (10, 5)])
async def test_patience_with_a_go_agent(
    grace_s: float,
    patience_s: float,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    config["graceful_shutdown_timeout_s"] = grace_s
    async with running(config, monkeypatch, tmp_path) as program:
        agent, client = await program.agent(), await program.client()
        client.send(DialRequest("tcp", "target:1", 7))
        await agent.expect(DialRequest("tcp", "target:1", 7))
        agent.send(dial_ok(1, 7))
        await client.expect(dial_ok(1, 7))
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep(patience_s - 0.2)
        assert agent.closed_with is None
        await trio.sleep(0.4)
        assert agent.closed_with == ("OK", "")


async def test_agents_that_come_during_the_farewell(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    """Their connection was accepted before; they are sent on as well, each once."""
    async with running(config, monkeypatch, tmp_path) as program:
        await program.client()
        early = await program.agent("early", extended=True)
        assert program.server is not None
        (connection,) = program.server.agents.connections
        announced: list[float] = []
        announce = connection.announce_end

        def announce_end() -> None:
            announced.append(trio.current_time())
            announce()

        monkeypatch.setattr(connection, "announce_end", announce_end)
        transports = [await program.transport("agent-port", ["h2"]) for _ in range(2)]
        await settle()
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep(2)
        assert early.connection.draining
        assert len(announced) == 1
        ours = await program.call(transports[0], CONNECT, {"agentid": ["a"], **offer()})
        go = await program.call(transports[1], CONNECT, {"agentid": ["b"]})
        await trio.sleep(0.2)
        assert ours.connection.draining
        assert ours.closed_with is None
        assert go.closed_with == ("OK", "")


async def test_a_client_that_does_not_answer_may_dial_yet(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    async with running(config, monkeypatch, tmp_path) as program:
        agent, client = await program.agent(), await program.client()
        assert program.server is not None
        (connection,) = program.server.frontends.connections
        monkeypatch.setattr(connection, "ping", lambda *_: None)
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep(4.5)
        assert not agent.ended.is_set()
        client.send(DialRequest("tcp", "target:1", 7))
        await agent.expect(DialRequest("tcp", "target:1", 7))
        agent.send(DialResponse(error="refused", random=7))
        # The end is final after 5 s.
        await trio.sleep(1)
        assert agent.ended.is_set()
        assert await agent.status() == ("OK", "")


async def test_dials_wait_for_agents_after_the_start(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    config["agent_arrival_timeout_s"] = 5.0
    async with running(config, monkeypatch, tmp_path) as program:
        client = await program.client()
        client.send(DialRequest("tcp", "target:1", 7))
        await trio.sleep(4)
        agent = await program.agent()
        await agent.expect(DialRequest("tcp", "target:1", 7))


# -- what needs Kubernetes -------------------------------------------------------------------------


class Kubernetes:
    """Stands in for the module that opens a real apiserver."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
        self.api = ScriptedApi(answer)
        self.asked: list[Any] = []
        self.open = False
        module = ModuleType("clusterproxy.kube.client")
        module.open_kube_api = self._open  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)

    @contextlib.asynccontextmanager
    async def _open(self, kubeconfig: str, **limits: Any) -> AsyncGenerator[ScriptedApi]:
        self.asked.append((kubeconfig, limits))
        if kubeconfig == "broken":
            raise ConfigError("kubeconfig", "broken: no such file")
        self.open = True
        yield self.api
        self.open = False


GOOD = "good"
TOKENS = {
    "agent_namespace": "ns",
    "agent_service_account": "agent",
    "authentication_audience": "us",
    "cluster_ca_cert": "",
}


def a_good_token(verb: str, what: Any) -> Any:
    assert verb == "create"
    user = {"username": "system:serviceaccount:ns:agent"}
    good = what["spec"]["token"] == GOOD
    return {"status": {"authenticated": good, "user": user, "audiences": ["us"]}}


async def test_agents_with_tokens(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    kubernetes = Kubernetes(monkeypatch, a_good_token)
    config |= TOKENS | {"kubeconfig": "file", "kubeconfig_qps": 7.5, "kubeconfig_burst": 9}
    async with running(config, monkeypatch, tmp_path) as program:
        assert kubernetes.asked == [("file", {"qps": 7.5, "burst": 9})]
        # None of them has a certificate.
        for token, status in (("", "Unknown"), ("bad", "Unknown")):
            refused = await program.agent(pair="", token=token)
            assert (await refused.status())[0] == status
        agent = await program.agent(pair="", token=GOOD)
        client = await program.client()
        client.send(DialRequest("tcp", "target:1", 7))
        await agent.expect(DialRequest("tcp", "target:1", 7))
        assert program.server is not None
        assert program.server.lease is None
    assert not kubernetes.open


async def test_a_flood_of_tokens_keeps_nobody_else_out(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    monkeypatch.setattr(review_queue, "_IN_FLIGHT", 1)
    monkeypatch.setattr(review_queue, "_WAITING", 5)

    def answer(verb: str, what: Any) -> Any:
        return a_good_token(verb, what) if what["spec"]["token"] == GOOD else None

    kubernetes = Kubernetes(monkeypatch, answer)
    config |= TOKENS
    async with running(config, monkeypatch, tmp_path) as program:
        flood = [await program.agent(pair="", token=f"bad{n}") for n in range(10)]
        agent = await program.agent(pair="", token=GOOD, source="127.0.0.2")
        # Of the others the newest are left, which have a turn between them and the agent.
        assert [n for n, peer in enumerate(flood) if peer.closed_with is None] == [0, 6, 7, 8, 9]
        flood[0].hang_up()
        await settle()
        flood[9].hang_up()
        assert (await agent.response())["serverid"] == ["server"]
        asked = [review["spec"]["token"] for review in kubernetes.api.called("create")]
        assert asked == ["bad0", "bad9", GOOD, "bad8"]
        assert program.server is not None
        assert len(program.server.agents.connections) == 9
        await trio.sleep(30)
        assert len(program.server.agents.connections) == 1
        assert agent.closed_with is None


async def test_connections_of_agents_with_certificates_may_be_silent(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    async with running(config, monkeypatch, tmp_path) as program:
        transport = await program.transport("agent-port", ["h2"])
        peer = await program.call(transport, "/Nothing/Known")
        assert (await peer.status())[0] == "Unimplemented"
        await trio.sleep(60)
        assert peer.connection.lost is None


async def test_a_lease_for_as_long_as_the_server_is_there_for_new_agents(
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    kubernetes = Kubernetes(monkeypatch, lambda *_: KubeUnavailable("refused"))
    config["enable_lease_controller"] = True
    async with running(config, monkeypatch, tmp_path) as program:
        assert kubernetes.asked == [("", {"qps": 0.0, "burst": 0})]
        await program.client()
        await trio.sleep(20)
        # An apiserver that is away is asked again, and nothing else happens.
        assert len(kubernetes.api.called("get")) > 3
        signal.raise_signal(signal.SIGTERM)
        await settle()
        assert len(kubernetes.api.called("delete")) == 1
        assert not program.stopped.is_set()
        await program.stopped.wait()
        assert program.status == 0
        assert trio.current_time() == pytest.approx(45, abs=0.1)


@pytest.mark.parametrize("signals", [1, 2])
async def test_an_apiserver_that_hangs_at_the_end(
    signals: int,
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    autojump_clock: MockClock,
) -> None:
    Kubernetes(monkeypatch, lambda *_: None)
    config |= {"enable_lease_controller": True}
    async with running(config, monkeypatch, tmp_path) as program:
        if signals == 2:
            await program.client()
        signal.raise_signal(signal.SIGTERM)
        await settle()
        if signals == 2:
            signal.raise_signal(signal.SIGTERM)
        await program.stopped.wait()
        # The lease expires by itself.
        assert trio.current_time() == pytest.approx(2 if signals == 1 else 0, abs=0.1)
        assert program.status == signals - 1


async def test_no_way_to_kubernetes(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    Kubernetes(monkeypatch, None)
    with pytest.raises(ConfigError) as caught:
        await app.run_server(
            ServerConfig(**config | {"kubeconfig": "broken", "enable_lease_controller": True})
        )
    assert caught.value.field == "kubeconfig"


def test_the_programs_do_without_the_kubernetes_client() -> None:
    code = (
        "import clusterproxy.server.app, clusterproxy.agent.app, sys\n"
        "assert not {'kubernetes', 'urllib3', 'yaml', 'clusterproxy.kube.client'} & sys.modules.keys()"
    )
    subprocess.run((sys.executable, "-c", code), check=True, timeout=60)
