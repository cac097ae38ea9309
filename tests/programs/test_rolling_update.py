"""A server is replaced by another one behind a load balancer, and no dial is lost."""

from __future__ import annotations

import os
import signal
import subprocess
from typing import TYPE_CHECKING, Final

import attrs
import pytest
import trio
from cluster import LOOPBACK, PROGRAM, Cluster, service
from go_tools import go_tool, needs_go

from clusterproxy import ClientTLS, open_tunnel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.programs

FIRST_PORT: Final = 27350


@attrs.define(eq=False)
class Balancer:
    """Passes connections on to one port, another one later."""

    port: int = 0

    async def serve(self, task_status: trio.TaskStatus[int]) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host=LOOPBACK)
        task_status.started(listener.socket.getsockname()[1])
        await trio.serve_listeners(self._pass_on, [listener])

    async def _pass_on(self, near: trio.SocketStream) -> None:
        try:
            far = await trio.open_tcp_stream(LOOPBACK, self.port)
        except OSError:
            return
        async with near, far, trio.open_nursery() as nursery:
            for source, sink in ((near, far), (far, near)):
                nursery.start_soon(self._copy, source, sink, nursery.cancel_scope)

    async def _copy(
        self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        try:
            while data := await source.receive_some():
                await sink.send_all(data)
        except trio.BrokenResourceError:
            pass
        scope.cancel()


class Servers(Cluster):
    """Servers one after the other, and agents of a kind."""

    def __init__(self, directory: Path, kind: str) -> None:
        super().__init__(directory, FIRST_PORT)
        self._agent = (str(go_tool("agent")),) if kind == "go" else (*PROGRAM, "agent")
        self.count = 0

    def start_next(self) -> tuple[int, int]:
        """Start a server; return its ports, for clients and for agents."""
        first = FIRST_PORT + 10 * self.count
        self.port, self.agent_port, self.health_port, self.admin_port = range(first, first + 4)
        self.count += 1
        self.start_server(f"--server-id=server{self.count}", "--proxy-strategies=destHost")
        return self.port, self.agent_port

    def start_agents(self, port: int, count: int) -> None:
        for number in range(count):
            health = FIRST_PORT + 100 + 2 * number
            self._start(
                f"agent{number}",
                f"--proxy-server-host={LOOPBACK}",
                f"--proxy-server-port={port}",
                f"--ca-cert={self.ca}",
                f"--agent-cert={self.client_cert}",
                f"--agent-key={self.client_key}",
                f"--agent-id=cluster{number}",
                f"--agent-identifiers=host={LOOPBACK}&host=cluster{number}",
                f"--health-server-port={health}",
                f"--admin-server-port={health + 1}",
            )

    def _start(self, name: str, *options: str) -> None:
        is_agent = name.startswith("agent")
        program = self._agent if is_agent else (*PROGRAM, "server")
        key = name if is_agent else f"server{self.count}"
        environment = os.environ | {"PROXY_SERVER_AGENT_ARRIVAL_TIMEOUT": "25s"}
        with (self.directory / f"{key}.log").open("ab") as log:
            self._programs[key] = subprocess.Popen(
                (*program, *options), stdout=log, stderr=log, env=environment
            )

    async def stop(self, number: int) -> int:
        process = self._programs.pop(f"server{number}")
        process.send_signal(signal.SIGTERM)
        return await trio.to_thread.run_sync(process.wait)


@pytest.fixture(params=["ours", pytest.param("go", marks=needs_go)])
def servers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Servers]:
    servers = Servers(tmp_path, request.param)
    yield servers
    servers.close()


async def test_no_dial_is_lost(servers: Servers) -> None:
    tls = ClientTLS(ca_cert=servers.ca, cert=servers.client_cert, key=servers.client_key)
    clients, agents = Balancer(), Balancer()
    clients.port, agents.port = servers.start_next()
    done, slowest = 0, 0.0
    with service("echo") as address:
        async with trio.open_nursery() as nursery:
            client_port: int = await nursery.start(clients.serve)
            agent_port: int = await nursery.start(agents.serve)

            async def dial() -> None:
                """As the user server of Open Cluster Management: a tunnel for each request."""
                nonlocal done, slowest
                begin = trio.current_time()
                async with (
                    open_tunnel(f"{LOOPBACK}:{client_port}", tls=tls, reusable=False) as tunnel,
                    await tunnel.dial(address) as stream,
                ):
                    await stream.send_all(b"hello")
                    assert await stream.receive_some() == b"hello"
                done += 1
                slowest = max(slowest, trio.current_time() - begin)

            async def dial_for_ever() -> None:
                while True:
                    await dial()

            servers.start_agents(agent_port, 3)
            # The first dial waits for an agent as those of the next server will.
            await dial()
            for _ in range(4):
                nursery.start_soon(dial_for_ever)
            for number in (1, 2):
                await trio.sleep(1)
                clients.port, agents.port = await trio.to_thread.run_sync(servers.start_next)
                # What a pod's preStop hook is for: who is on the way to this server still gets there.
                await trio.sleep(1)
                assert await servers.stop(number) == 0
                enough = done + 5
                with trio.fail_after(20):
                    while done < enough:  # noqa: ASYNC110  several tasks count
                        await trio.sleep(0.05)
            nursery.cancel_scope.cancel()
    # A Go agent looks for another server when its stream has ended, in the next interval of a second or two.
    assert slowest < 8
