"""The agent program in this process: probes, certificates, and how it ends (rows A11, A21, A22)."""

from __future__ import annotations

import contextlib
import signal
import socket
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trustme
from certificates import write_ca, write_pair
from harness import ScriptedServer, ScriptedServers, dial_ok, greeting, settle, value, values

from clusterproxy.agent import app
from clusterproxy.agent.config import AgentConfig
from clusterproxy.errors import ConfigError, KubeUnavailable
from clusterproxy.telemetry.agent_metrics import AgentMetrics
from clusterproxy.transport.listener import listen_tcp
from clusterproxy.transport.stream import Transport, tune
from clusterproxy.transport.tls import server_context
from clusterproxy_proto import CloseRequest, CloseResponse, Data, DialRequest, Drain

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path

    from trio.testing import MockClock


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def files(authority: trustme.CA, tmp_path: Path) -> Path:
    write_ca(authority, tmp_path)
    write_pair(authority, tmp_path, "server", "127.0.0.1")
    write_pair(authority, tmp_path, "agent", "agent.test")
    return tmp_path


@pytest.fixture(autouse=True)
def _one_signal_too_many() -> Iterator[None]:
    """Keeps a signal that the agent does not wait for any more from ending the tests."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, before)


class Program:
    """A running agent, with the scripted servers that it finds."""

    def __init__(self, files: Path, nursery: trio.Nursery) -> None:
        self.files = files
        self.nursery = nursery
        self.servers = ScriptedServers(greeting())
        self.ports: dict[str, int] = {}
        self.config: dict[str, Any] = {
            "ca_cert": str(files / "ca.crt"),
            "agent_cert": str(files / "agent.crt"),
            "agent_key": str(files / "agent.key"),
            "health_server_port": 0,
            "admin_server_port": 0,
            "agent_id": "agent",
        }
        self.metrics: Any = None
        self.status: int | None = None
        self.stopped = trio.Event()

    @property
    def server(self) -> ScriptedServer:
        return self.servers.peers[-1]

    async def accept(self, stream: trio.SocketStream) -> None:
        context = server_context(
            cert=str(self.files / "server.crt"),
            key=str(self.files / "server.key"),
            client_ca=str(self.files / "ca.crt"),
            min_version="",
            cipher_suites=[],
            alpn=["h2"],
        )
        sock = socket.socket(fileno=stream.socket.detach())
        sock.setblocking(False)
        # Nagle's delay is real time, which a jumping clock does not wait for.
        tune(sock, user_timeout=False)
        transport = Transport(sock, context, server_side=True)
        try:
            await transport.handshake()
            await self.servers.rpc.serve(transport)
        except (OSError, trio.BrokenResourceError):
            transport.close()

    async def get(self, port: str, path: str) -> tuple[int, str, str]:
        stream = await trio.open_tcp_stream("127.0.0.1", self.ports[port])
        async with stream:
            await stream.send_all(
                f"GET {path} HTTP/1.1\r\nHost: h:1\r\nConnection: close\r\n\r\n".encode()
            )
            answer = b"".join([bytes(chunk) async for chunk in stream])
        head, _, body = answer.partition(b"\r\n\r\n")
        return int(head.split()[1]), head.decode(), body.decode()


@contextlib.asynccontextmanager
async def running(
    files: Path, monkeypatch: pytest.MonkeyPatch, *, listening: bool = True, **config: Any
) -> AsyncGenerator[Program]:
    listen, make = listen_tcp, AgentMetrics
    async with trio.open_nursery() as nursery:
        program = Program(files, nursery)
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listener.socket.getsockname()[1]
        if listening:
            nursery.start_soon(trio.serve_listeners, program.accept, [listener])
        else:
            await listener.aclose()

        def listen_anywhere(host: str, port: int, flag: str) -> socket.socket:
            sock = listen(host or "127.0.0.1", port, flag)
            program.ports[flag] = sock.getsockname()[1]
            return sock

        def make_metrics() -> Any:
            program.metrics = make()
            return program.metrics

        monkeypatch.setattr(app, "listen_tcp", listen_anywhere)
        monkeypatch.setattr(app, "AgentMetrics", make_metrics)

        async def run() -> None:
            settings = AgentConfig(**{"proxy_server_port": port, **program.config, **config})
            program.status = await app.run_agent(settings)
            program.stopped.set()

        async with trio.open_nursery() as running:
            running.start_soon(run)
            await settle()
            # The agent's own clocks tick for ever, so nothing else would end a wait in vain.
            with trio.fail_after(600):
                yield program
            for _ in range(2):
                if not program.stopped.is_set():
                    signal.raise_signal(signal.SIGTERM)
                    await settle()
            with trio.fail_after(5):
                await program.stopped.wait()
        nursery.cancel_scope.cancel()


async def test_probes(
    files: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with running(files, monkeypatch) as program:
        get = program.get
        assert (await get("health-server-port", "/healthz"))[::2] == (200, "ok")
        assert (await get("health-server-port", "/readyz"))[::2] == (200, "ok")
        verbose = "[+]ping ok\n[+]server-connected ok\ncheck passed\n"
        assert (await get("health-server-port", "/readyz?verbose"))[::2] == (200, verbose)
        status, _, text = await get("health-server-port", "/metrics")
        assert status == 200
        assert "konnectivity_network_proxy_agent_open_server_connections 1" in text
        # The configured port, 0 here.
        status, head, _ = await get("admin-server-port", "/metrics")
        assert status == 301
        assert "Location: //h:0/metrics" in head
        assert set(values(program.metrics.certificate_expiry_seconds)) == {str(files / "agent.crt")}


async def test_probes_without_a_server(
    files: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with running(files, monkeypatch, listening=False) as program:
        assert (await program.get("health-server-port", "/healthz"))[0] == 200
        assert (await program.get("health-server-port", "/ready"))[::2] == (
            503,
            "[+]ping ok\n[-]server-connected failed: no servers connected\n",
        )


async def test_a_connection_and_another_session(
    files: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with running(files, monkeypatch) as program:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        program.server.send(DialRequest("tcp", address, 5))
        await program.server.expect(dial_ok(1, 5))
        service = await listener.accept()
        first = program.server
        first.finish()
        assert await service.receive_some() == b""
        await trio.sleep(3)
        assert program.server is not first
        # The numbers begin anew with each stream.
        program.server.send(DialRequest("tcp", address, 6))
        await program.server.expect(dial_ok(1, 6))
        for stream in (service, await listener.accept()):
            await stream.aclose()
        await listener.aclose()


async def test_the_first_signal_drains(
    files: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with running(files, monkeypatch) as program:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        server = program.server
        server.send(DialRequest("tcp", address, 5))
        await server.expect(dial_ok(1, 5))
        service = await listener.accept()
        signal.raise_signal(signal.SIGTERM)
        await server.expect(Drain())
        # As long as there is a connection, and for dials that come all the same.
        await trio.sleep(60)
        server.send(DialRequest("tcp", address, 6), Data(1, data=b"on"))
        await server.expect(dial_ok(2, 6))
        assert await service.receive_some() == b"on"
        begin = trio.current_time()
        server.send(CloseRequest(1), CloseRequest(2))
        await server.expect(CloseResponse("", 1), CloseResponse("", 2))
        for stream in (service, await listener.accept()):
            await stream.aclose()
        await program.stopped.wait()
        assert program.status == 0
        assert 9.9 < trio.current_time() - begin < 11.1
        await listener.aclose()


async def test_a_signal_without_a_server(
    files: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with running(files, monkeypatch, listening=False) as program:
        begin = trio.current_time()
        signal.raise_signal(signal.SIGINT)
        await program.stopped.wait()
        assert program.status == 0
        assert trio.current_time() - begin == pytest.approx(10, abs=0.1)


async def test_the_second_signal_ends(
    files: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with running(files, monkeypatch) as program:
        begin = trio.current_time()
        signal.raise_signal(signal.SIGTERM)
        await trio.sleep(2)
        signal.raise_signal(signal.SIGTERM)
        await program.stopped.wait()
        assert program.status == 0
        assert trio.current_time() - begin == pytest.approx(2, abs=0.1)
        assert (await program.server.status())[0] in ("Canceled", "Unavailable")


async def test_certificates_are_reloaded(
    authority: trustme.CA,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    async with running(files, monkeypatch) as program:
        first = program.server
        write_pair(authority, files, "agent", "new.test")
        await trio.sleep(11)
        assert values(program.metrics.certificate_reload_total) == {"ok": 1}
        assert first.closed_with is None
        (files / "agent.key").write_text("broken")
        await trio.sleep(11)
        assert values(program.metrics.certificate_reload_total)["error"] == 1
        first.finish()
        await trio.sleep(3)
        assert program.server is not first


@pytest.mark.parametrize(
    ("given", "keepalive", "expected"),
    [
        (frozenset[str](), 3600.0, 33.0),
        (frozenset({"keepalive-time"}), 60.0, 60.0),
        (frozenset({"keepalive-time"}), 1.0, 10.0),
    ],
)
async def test_a_server_that_is_frozen(
    given: frozenset[str],
    keepalive: float,
    expected: float,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: MockClock,
) -> None:
    """It is noticed one interval and 20 s later, and no Go server punishes the PINGs."""
    async with running(files, monkeypatch, keepalive_time_s=keepalive, given=given) as program:
        begin = trio.current_time()
        (connection,) = program.servers.rpc.connections
        monkeypatch.setattr(connection, "_receive", lambda _view: None)
        while len(program.servers.peers) == 1:  # noqa: ASYNC110  nothing in the server tells of it
            await trio.sleep(0.5)
        assert trio.current_time() - begin == pytest.approx(expected + 20, abs=3)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"ca_cert": ""}, "ca-cert"),
        ({"ca_cert": "nowhere.crt"}, "ca-cert"),
        ({"agent_cert": "nowhere.crt"}, "agent-cert"),
        ({"agent_key": "nowhere.key"}, "agent-key"),
        ({"health_server_host": "192.0.2.1"}, "health-server-port"),
        ({"admin_bind_address": "192.0.2.1"}, "admin-server-port"),
    ],
)
async def test_bad_configuration(
    change: dict[str, Any], field: str, files: Path, autojump_clock: MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        config = Program(files, nursery).config
        with pytest.raises(ConfigError) as caught:
            await app.run_agent(AgentConfig(**{**config, **change}))
        assert caught.value.field == field


async def test_an_agent_without_a_certificate(
    files: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with running(files, monkeypatch, agent_cert="", agent_key="") as program:
        # This server wants one.
        assert not program.servers.peers
        await trio.sleep(5)
        failures = values(program.metrics.server_connection_failure_count)
        assert failures["to_server"] >= 2


# -- a server that leaves --------------------------------------------------------------------------


async def test_a_server_that_leaves(
    files: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async with running(files, monkeypatch) as program:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        address = f"127.0.0.1:{listener.socket.getsockname()[1]}"
        first = program.server
        first.send(DialRequest("tcp", address, 5))
        await first.expect(dial_ok(1, 5))
        service = await listener.accept()
        await trio.sleep(5)
        program.servers.metadata = greeting("another")
        (connection,) = program.servers.rpc.connections
        begin = trio.current_time()
        connection.announce_end()
        while len(program.servers.peers) < 2:  # noqa: ASYNC110  nothing in the server tells of it
            await trio.sleep(0.01)
        assert trio.current_time() - begin < 0.1
        # What is open goes on, and dials are still served.
        first.send(Data(1, data=b"on"), DialRequest("tcp", address, 6))
        await first.expect(dial_ok(2, 6))
        assert await service.receive_some() == b"on"
        await trio.sleep(20)
        assert first.closed_with is None
        assert len(program.servers.peers) == 2
        metrics = program.metrics
        assert value(metrics.open_server_connections) == 2
        first.finish()
        await settle()
        assert value(metrics.open_server_connections) == 1
        assert not values(metrics.server_connection_failure_count)
        for stream in (service, await listener.accept()):
            await stream.aclose()
        await listener.aclose()


# -- what needs Kubernetes -------------------------------------------------------------------------


class Kubernetes:
    """Stands in for the module that opens a real apiserver, which has no lease."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.lists = 0
        module = ModuleType("clusterproxy.kube.client")
        module.open_kube_api = self._open  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)

    @contextlib.asynccontextmanager
    async def _open(self, kubeconfig: str) -> AsyncGenerator[Kubernetes]:
        self.asked.append(kubeconfig)
        if kubeconfig == "broken":
            raise ConfigError("kubeconfig", "broken: no such file")
        yield self

    async def list(self, *_: object, **__: object) -> None:
        await trio.lowlevel.checkpoint()
        self.lists += 1
        raise KubeUnavailable("refused")


async def test_leases_without_an_apiserver(
    files: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    kubernetes = Kubernetes(monkeypatch)
    config: dict[str, Any] = {"count_server_leases": True, "kubeconfig": "file"}
    async with running(files, monkeypatch, **config) as program:
        await trio.sleep(10)
        assert kubernetes.asked == ["file"]
        assert kubernetes.lists > 1
        # The agent is there all the same.
        assert len(program.servers.peers) == 1
        assert value(program.metrics.known_server_count) == 1


async def test_no_way_to_kubernetes(
    files: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    Kubernetes(monkeypatch)
    async with trio.open_nursery() as nursery:
        config = Program(files, nursery).config
    with pytest.raises(ConfigError) as caught:
        await app.run_agent(AgentConfig(**config, count_server_leases=True, kubeconfig="broken"))
    assert caught.value.field == "kubeconfig"
