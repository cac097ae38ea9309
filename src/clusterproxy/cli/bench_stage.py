"""What ``clusterproxy bench`` puts up: the services, and a server with an agent if it is given none."""

from __future__ import annotations

import contextlib
import socket
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import attrs
import trio

from clusterproxy.bench.services import Services
from clusterproxy.errors import ConfigError
from clusterproxy.transport.listener import listen_tcp

from .children import (
    LOOPBACK,
    Program,
    StageError,
    agent_is_connected,
    keep_running,
    wait_for_agent,
    write_certificates,
)
from .connection_options import ServerAccess
from .outcome import CANNOT_LISTEN, Failure

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

# Below the range that the kernel takes ports of connections from (ip(7)), so that none is taken meanwhile.
_FIRST_PORT: Final = 21000
_LAST_PORT: Final = 26000


@attrs.frozen(kw_only=True)
class OwnProxy:
    """A running server and its agent.

    Attributes:
      access: how the server is reached.
      pids: of both, by name.
    """

    access: ServerAccess
    pids: dict[str, int]


@attrs.frozen(kw_only=True)
class Stage:
    """Starts programs, which run as long as the nursery.

    Attributes:
      directory: theirs; it goes with the stage.
    """

    nursery: trio.Nursery
    directory: Path

    async def _start(self, program: Program) -> int:
        process: trio.Process = await self.nursery.start(keep_running, program, self.directory)
        return process.pid

    async def services(self, host: str) -> Services:
        """Serve source, sink and echo, on this machine's address *host* if it is one and else on all.

        Raises:
          Failure: nothing can be listened on.
        """
        with contextlib.ExitStack() as opened:
            listeners = {
                kind: opened.enter_context(_listen(host)) for kind in ("source", "sink", "echo")
            }
            await self._start(
                Program(
                    name="services",
                    command=(
                        sys.executable, "-m", "clusterproxy.bench.services",
                        *(f"{kind}={sock.fileno()}" for kind, sock in listeners.items()),
                    ),
                    inherited=[sock.fileno() for sock in listeners.values()],
                )
            )  # fmt: skip
            shown = f"[{host}]" if ":" in host else host
            ports = {kind: sock.getsockname()[1] for kind, sock in listeners.items()}
            return Services(**{kind: f"{shown}:{port}" for kind, port in ports.items()})

    async def proxy(self, mode: Literal["grpc", "http-connect"], timeout_s: float) -> OwnProxy:
        """Start a server and an agent on loopback, with mutual TLS, and wait until they are connected.

        Raises:
          StageError: that cannot be done.
        """
        write_certificates(
            self.directory,
            "bench",
            {
                "frontend": {"frontend-server": LOOPBACK, "client": "client.example"},
                "cluster": {"cluster-server": LOOPBACK, "agent": "agent.example"},
            },
        )
        port, agent_port, health, admin, agent_health, agent_admin = _free_ports(6)
        server = Program(
            name="server",
            command=(
                sys.executable, "-m", "clusterproxy", "server",
                f"--mode={mode}",
                f"--server-bind-address={LOOPBACK}",
                f"--server-port={port}",
                "--server-ca-cert=frontend-ca.pem",
                "--server-cert=frontend-server.pem",
                "--server-key=frontend-server.pem",
                f"--agent-bind-address={LOOPBACK}",
                f"--agent-port={agent_port}",
                "--cluster-ca-cert=cluster-ca.pem",
                "--cluster-cert=cluster-server.pem",
                "--cluster-key=cluster-server.pem",
                f"--health-bind-address={LOOPBACK}",
                f"--health-port={health}",
                f"--admin-port={admin}",
            ),
        )  # fmt: skip
        agent = Program(
            name="agent",
            command=(
                sys.executable, "-m", "clusterproxy", "agent",
                f"--proxy-server-host={LOOPBACK}",
                f"--proxy-server-port={agent_port}",
                "--ca-cert=cluster-ca.pem",
                "--agent-cert=agent.pem",
                "--agent-key=agent.pem",
                f"--health-server-host={LOOPBACK}",
                f"--health-server-port={agent_health}",
                f"--admin-server-port={agent_admin}",
                "--sync-interval=100ms",
            ),
        )  # fmt: skip
        pids = {program.name: await self._start(program) for program in (server, agent)}
        log = self.directory / "agent.log"
        await wait_for_agent(lambda: agent_is_connected(health), "own", log)
        client = str(self.directory / "client.pem")
        access = ServerAccess(
            server=f"{LOOPBACK}:{port}",
            mode=mode,
            ca_cert=str(self.directory / "frontend-ca.pem"),
            cert=client,
            key=client,
            server_name="",
            timeout_s=timeout_s,
        )
        return OwnProxy(access=access, pids=pids)


@contextlib.asynccontextmanager
async def open_stage() -> AsyncGenerator[Stage]:
    """Have a place for programs in the block; they are stopped behind it, and leave nothing."""
    with tempfile.TemporaryDirectory(prefix="clusterproxy-bench-") as name:
        async with trio.open_nursery() as nursery:
            yield Stage(nursery=nursery, directory=Path(name))
            nursery.cancel_scope.cancel()


def _listen(host: str) -> socket.socket:
    try:
        try:
            return listen_tcp(host, 0, "target-host")
        except ConfigError:
            # The agent may know this machine by an address that it does not have itself.
            return listen_tcp("", 0, "target-host")
    except ConfigError as error:
        raise Failure(CANNOT_LISTEN, error.message) from error


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    for port in range(_FIRST_PORT, _LAST_PORT):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise StageError(f"no {count} free ports between {_FIRST_PORT} and {_LAST_PORT}")
