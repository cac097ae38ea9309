"""The program in this process: what it does in which order, what it waits for, and how it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from played_hub import PlayedHub, played_hub, until

from clusterproxy.addon_agent import app
from clusterproxy.addon_agent.config import AddonAgentConfig
from clusterproxy.errors import ConfigError
from clusterproxy.http1 import serve_http
from clusterproxy.telemetry.admin import agent_health_handler
from clusterproxy.telemetry.agent_metrics import AgentMetrics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Iterator
    from pathlib import Path


@pytest.fixture(autouse=True)
def _one_signal_too_many() -> Iterator[None]:
    """Keeps a signal that the program does not wait for any more from ending the tests."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
async def hub() -> AsyncIterator[PlayedHub]:
    async with played_hub() as found:
        yield found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


@attrs.define
class Program:
    """A running add-on agent, beside a proxy agent that is one of ours."""

    config: AddonAgentConfig
    directory: Path
    connected: bool = False
    status: int | None = None
    ended: trio.Event = attrs.field(factory=trio.Event)

    async def run(self) -> None:
        self.status = await app.run_addon_agent(self.config)
        self.ended.set()

    async def healthz(self) -> tuple[int, str]:
        return await self.get(self.config.health_address[1], "/healthz?verbose")

    async def get(self, port: int, target: str) -> tuple[int, str]:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(
                f"GET {target} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n".encode()
            )
            answer = b"".join([bytes(data) async for data in stream])
        head, _, body = answer.decode().partition("\r\n\r\n")
        return int(head.split()[1]), body


@contextlib.asynccontextmanager
async def running(hub: PlayedHub, directory: Path, **config: Any) -> AsyncGenerator[Program]:
    tls = directory / "tls"
    tls.mkdir()
    for name in ("tls.crt", "tls.key"):
        (tls / name).write_text("one")
    [proxy_agent] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    made = AddonAgentConfig(
        **{
            "pod_namespace": "agents",
            "cluster_name": "cluster1",
            "kubeconfig": hub.kubeconfig(directory),
            "hub_kubeconfig": hub.kubeconfig(directory, "hub"),
            "proxy_server_namespace": "proxies",
            "health_probe_bind_address": f"127.0.0.1:{free_port()}",
            "port_forward_port": free_port(),
            "certificate_directory": str(tls),
            "proxy_agent_health_address": f"127.0.0.1:{proxy_agent.socket.getsockname()[1]}",
            **config,
        }
    )
    made.validate()
    program = Program(made, directory)
    handler = agent_health_handler(AgentMetrics(), lambda: program.connected)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            trio.serve_listeners, lambda stream: serve_http(stream, handler), [proxy_agent]
        )
        nursery.start_soon(program.run)
        await trio.testing.wait_all_tasks_blocked(0.01)
        yield program
        nursery.cancel_scope.cancel()


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


async def test_lease_and_health(hub: PlayedHub, tmp_path: Path) -> None:
    async with running(hub, tmp_path) as program:
        verbose = "[+]certificates ok\n[+]port forward proxy readiness ok\nhealthz check passed\n"
        assert await program.healthz() == (200, verbose)
        await trio.sleep(0.3)
        assert not hub.leases
        program.connected = True
        await until(lambda: "agents" in hub.leases)
        assert hub.leases["agents"]["metadata"]["name"] == "cluster-proxy"
        assert {headers["user-agent"] for _, _, headers in hub.asked} == {"proxy-agent-addon-agent"}
        # Ours takes the new one by itself.
        (tmp_path / "tls" / "tls.crt").write_text("two")
        assert (await program.healthz())[0] == 200
        with pytest.raises(OSError, match="all attempts to connect"):
            await trio.open_tcp_stream("127.0.0.1", program.config.port_forward_port)
        terminate()
        with trio.fail_after(5):
            await program.ended.wait()
        assert program.status == 0


async def test_without_looking_at_the_proxy_agent(hub: PlayedHub, tmp_path: Path) -> None:
    async with running(hub, tmp_path, enable_proxy_agent_health_check=False) as program:
        await until(lambda: "agents" in hub.leases)
        assert not program.connected
        (tmp_path / "tls" / "tls.crt").write_text("two")
        assert [(await program.healthz())[0] for _ in range(2)] == [500, 200]


async def test_the_hub_has_the_lease_if_the_cluster_knows_none(
    hub: PlayedHub, tmp_path: Path
) -> None:
    async with played_hub() as local:
        local.raw = b"HTTP/1.1 404 Not Found\r\nConnection: close\r\n\r\n404 page not found\n"
        kubeconfig = local.kubeconfig(tmp_path, "local")
        async with running(hub, tmp_path, kubeconfig=kubeconfig) as program:
            program.connected = True
            await until(lambda: "cluster1" in hub.leases)


async def test_a_hub_that_comes_late(
    hub: PlayedHub,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(app, "_KUBECONFIG_S", 0.05)
    monkeypatch.setattr(app, "_HUB_S", 0.2)
    path = tmp_path / "late"
    hub.add_pod("a")
    config = {"hub_kubeconfig": str(path), "enable_port_forward_proxy": True}
    async with running(hub, tmp_path, **config) as program:
        program.connected = True
        # The lease does not need it.
        await until(lambda: "agents" in hub.leases)
        assert caplog.text.count(f"--hub-kubeconfig {path} is not there yet") == 1
        assert (await program.healthz())[0] == 500
        async with await trio.open_tcp_stream(
            "127.0.0.1", program.config.port_forward_port
        ) as stream:
            assert not await stream.receive_some()
        # A connection has come: what becomes of it is not for a probe of the proxy agent.
        assert (await program.healthz())[0] == 200
        hub.kubeconfig(tmp_path, "late")

        await (await connected(program.config.port_forward_port)).aclose()


@pytest.mark.parametrize("signals", [1, 2])
async def test_what_is_forwarded_may_end(hub: PlayedHub, tmp_path: Path, signals: int) -> None:
    hub.add_pod("a")
    async with running(hub, tmp_path, enable_port_forward_proxy=True) as program:
        port = program.config.port_forward_port
        stream = await connected(port)
        terminate()
        await trio.sleep(0.2)
        assert not program.ended.is_set()
        # Still there, but nothing new is taken.
        await stream.send_all(b"again")
        assert await stream.receive_some() == b"again"
        with pytest.raises((OSError, trio.BrokenResourceError)):
            await connected(port)
        if signals == 1:
            await stream.aclose()
        else:
            terminate()
        with trio.fail_after(5):
            await program.ended.wait()
        assert program.status == 0
        await stream.aclose()
    await until(lambda: hub.open == 0)


async def connected(port: int) -> trio.SocketStream:
    """Return a connection through which somebody answers."""
    with trio.fail_after(5):
        while True:
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(b"hello")
                if bytes(await stream.receive_some()) == b"hello":
                    return stream
            await stream.aclose()
            await trio.sleep(0.05)


async def test_the_grace_is_not_without_end(
    hub: PlayedHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(app, "_GRACE_S", 0.2)
    hub.add_pod("a")
    async with running(hub, tmp_path, enable_port_forward_proxy=True) as program:
        stream = await connected(program.config.port_forward_port)
        terminate()
        with trio.fail_after(5):
            await program.ended.wait()
        assert not await stream.receive_some()
        await stream.aclose()
    assert "1 connections are forwarded yet" in caplog.text


@pytest.mark.parametrize("name", ["kubeconfig", "hub_kubeconfig"])
async def test_a_kubeconfig_that_cannot_be_used_ends_it(
    hub: PlayedHub, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "broken"
    path.write_text("clusters: 7")
    with pytest.RaisesGroup(pytest.RaisesExc(ConfigError), flatten_subgroups=True) as found:
        async with running(hub, tmp_path, **{name: str(path)}) as program:
            await program.ended.wait()
    [error] = flattened(found.value)
    assert error.field == name.replace("_", "-")
    assert str(path) in error.message


async def test_outside_of_a_pod_without_a_kubeconfig(
    hub: PlayedHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.RaisesGroup(pytest.RaisesExc(ConfigError), flatten_subgroups=True) as found:
        async with running(hub, tmp_path, kubeconfig="") as program:
            await program.ended.wait()
    [error] = flattened(found.value)
    assert error.message.startswith("no kubeconfig given, and not in a pod")


def flattened(group: BaseExceptionGroup[Any]) -> list[ConfigError]:
    found: list[ConfigError] = []
    for each in group.exceptions:
        found += flattened(each) if isinstance(each, BaseExceptionGroup) else [each]
    return found


async def test_a_port_that_is_taken(hub: PlayedHub, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = AddonAgentConfig(
            pod_namespace="a",
            health_probe_bind_address="127.0.0.1:0",
            port_forward_port=port,
            enable_port_forward_proxy=True,
        )
        config = attrs.evolve(config, health_probe_bind_address=f"127.0.0.1:{free_port()}")
        with pytest.raises(ConfigError, match="--port-forward-port: cannot listen on tcp"):
            await app.run_addon_agent(config)
