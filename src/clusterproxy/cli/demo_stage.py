"""What the demo puts up: a network namespace, certificates, and the command lines of its programs."""

from __future__ import annotations

import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import attrs

from .children import LOOPBACK, Program, StageError, write_certificates

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

NAMESPACE = "clusterproxy-demo"
HUB_LINK = "cpdemo-hub"
AGENT_LINK = "cpdemo-agent"
# Addresses reserved for tests of network devices (RFC 2544): no real service can be hidden by them.
HUB_ADDRESS = "198.18.77.1"
AGENT_ADDRESS = "198.18.77.2"
SERVICE_ADDRESS = "198.18.78.2"
SERVICE_PORT = 8080
GREETING = "Hello from the managed cluster!"
PORTS = 11


@attrs.frozen(kw_only=True)
class ManagedSide:
    """Where the agent and the service run."""

    name: str
    prefix: tuple[str, ...]
    """What a command starts with to run there."""
    server_address: str
    """Where the agent finds the proxy server."""
    service: str
    """host:port of the service, as the agent dials it."""
    no_namespace: str | None
    """Why there is no network namespace, or None if there is one."""


@attrs.frozen(kw_only=True)
class Server:
    """One proxy server: it speaks one mode only, as the original does, so the demo has two."""

    mode: str
    port: int
    agent_port: int
    health_port: int
    admin_port: int


@attrs.frozen(kw_only=True)
class Ports:
    """The `PORTS` ports from *first* on, and who has which."""

    first: int

    @property
    def grpc(self) -> Server:
        """The server of the Go client."""
        return self._server("grpc", self.first)

    @property
    def connect(self) -> Server:
        """The server of curl."""
        return self._server("http-connect", self.first + 1)

    @property
    def agent_health(self) -> int:
        """The agent's health port."""
        return self.first + 8

    @property
    def agent_admin(self) -> int:
        """The agent's admin port."""
        return self.first + 9

    @property
    def service(self) -> int:
        """The service's port when it has no address of its own."""
        return self.first + 10

    @staticmethod
    def _server(mode: str, port: int) -> Server:
        return Server(
            mode=mode, port=port, agent_port=port + 2, health_port=port + 4, admin_port=port + 6
        )

    def check(self) -> None:
        """Raise StageError if one of them is taken."""
        for port in range(self.first, self.first + PORTS):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((LOOPBACK, port))
                except OSError as error:
                    message = f"port {port}: {error.strerror}; choose others with --port"
                    raise StageError(message) from error


def output_of(*command: str) -> str:
    """Run *command* of this demo, found in the PATH as in a shell, and return what it prints.

    Raises:
        OSError: there is no such command.
        subprocess.CalledProcessError: it failed.
    """
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout  # noqa: S603


def _remove_namespace() -> None:
    # The link's other end and its routes go with it.
    for arguments in (("link", "delete", HUB_LINK), ("netns", "delete", NAMESPACE)):
        with suppress(OSError, subprocess.CalledProcessError):
            output_of("ip", *arguments)


def _make_namespace() -> None:
    for arguments in (
        f"netns add {NAMESPACE}",
        f"link add {HUB_LINK} type veth peer name {AGENT_LINK} netns {NAMESPACE}",
        f"-n {NAMESPACE} link set lo up",
        f"-n {NAMESPACE} address add {SERVICE_ADDRESS}/32 dev lo",
        f"-n {NAMESPACE} address add {AGENT_ADDRESS}/30 dev {AGENT_LINK}",
        f"-n {NAMESPACE} link set {AGENT_LINK} up",
        f"address add {HUB_ADDRESS}/30 dev {HUB_LINK}",
        f"link set {HUB_LINK} up",
        # Direct requests stay on this link: without the route they would leave the machine.
        f"route add {SERVICE_ADDRESS}/32 dev {HUB_LINK}",
    ):
        output_of("ip", *arguments.split())
    # The service's address is on the namespace's loopback; nothing outside is told the way to it.
    silence = "echo 1 > /proc/sys/net/ipv4/conf/all/arp_ignore"
    output_of("ip", "netns", "exec", NAMESPACE, "sh", "-c", silence)


@contextmanager
def managed_side(ports: Ports) -> Generator[ManagedSide]:
    """Make the network namespace, or say why there is none and use loopback; remove it at the end."""
    reason = None
    try:
        _remove_namespace()  # left by a demo that was killed
        _make_namespace()
    except FileNotFoundError:
        reason = "there is no ip command, Debian's iproute2"
    except subprocess.CalledProcessError as error:
        reason = str(error.stderr).strip().splitlines()[-1] if error.stderr else str(error)
    try:
        if reason is None:
            yield ManagedSide(
                name=NAMESPACE,
                prefix=("ip", "netns", "exec", NAMESPACE),
                server_address=HUB_ADDRESS,
                service=f"{SERVICE_ADDRESS}:{SERVICE_PORT}",
                no_namespace=None,
            )
        else:
            yield ManagedSide(
                name="this machine",
                prefix=(),
                server_address=LOOPBACK,
                service=f"{LOOPBACK}:{ports.service}",
                no_namespace=reason,
            )
    finally:
        _remove_namespace()


def write_files(directory: Path, server_address: str) -> None:
    """Write the service's page, and the certificates of two CAs: one for clients, one for agents.

    Each identity is one PEM file with its key.

    Raises:
        StageError: trustme is not installed.
    """
    site = directory / "site"
    site.mkdir()
    (site / "index.html").write_text(GREETING + "\n")
    authorities = {
        "frontend": {"frontend-server": LOOPBACK, "client": "client.example"},
        "cluster": {"cluster-server": server_address, "agent": "agent.example"},
    }
    write_certificates(directory, "demo", authorities)


@attrs.frozen(kw_only=True)
class Actor(Program):
    """A program of the demo, and what a person is told about it."""

    where: str
    does: str


def _server(server: Server, side: ManagedSide) -> Actor:
    return Actor(
        name=f"server, {server.mode}",
        where="this machine",
        does=f"{LOOPBACK}:{server.port} for clients, {side.server_address}:{server.agent_port} for agents",
        command=(
            sys.executable, "-m", "clusterproxy", "server",
            f"--mode={server.mode}",
            f"--server-bind-address={LOOPBACK}",
            f"--server-port={server.port}",
            "--server-ca-cert=frontend-ca.pem",
            "--server-cert=frontend-server.pem",
            "--server-key=frontend-server.pem",
            f"--agent-bind-address={side.server_address}",
            f"--agent-port={server.agent_port}",
            "--cluster-ca-cert=cluster-ca.pem",
            "--cluster-cert=cluster-server.pem",
            "--cluster-key=cluster-server.pem",
            f"--health-bind-address={LOOPBACK}",
            f"--health-port={server.health_port}",
            f"--admin-port={server.admin_port}",
        ),
    )  # fmt: skip


def programs(side: ManagedSide, ports: Ports) -> Iterator[Actor]:
    """Yield the service, the two servers, and the agent that connects to both."""
    host, _, port = side.service.rpartition(":")
    yield Actor(
        name="service",
        where=side.name,
        does=f"http://{side.service}/",
        command=(
            *side.prefix, sys.executable, "-u", "-m", "http.server", "--directory=site", f"--bind={host}", port,
        ),
    )  # fmt: skip
    yield _server(ports.grpc, side)
    yield _server(ports.connect, side)
    servers = [
        f"{side.server_address}:{server.agent_port}" for server in (ports.grpc, ports.connect)
    ]
    yield Actor(
        name="agent",
        where=side.name,
        does=f"dials {' and '.join(servers)}",
        command=(
            *side.prefix, sys.executable, "-m", "clusterproxy", "agent",
            f"--proxy-server-host={','.join(servers)}",
            "--ca-cert=cluster-ca.pem",
            "--agent-cert=agent.pem",
            "--agent-key=agent.pem",
            f"--health-server-host={LOOPBACK}",
            f"--health-server-port={ports.agent_health}",
            f"--admin-server-port={ports.agent_admin}",
        ),
    )  # fmt: skip


def connect_command(server: Server, service: str) -> Sequence[str]:
    """Return the `curl` line that asks *service* through HTTP CONNECT."""
    return (
        "curl", "-sS", "--proxytunnel", "--proxy", f"https://{LOOPBACK}:{server.port}",
        "--proxy-cacert", "frontend-ca.pem", "--proxy-cert", "client.pem", f"http://{service}/",
    )  # fmt: skip


def go_command(client: Path, server: Server, service: str) -> Sequence[str]:
    """Return the line that asks *service* with the stock Go client over gRPC."""
    return (
        str(client), "-proxy", f"{LOOPBACK}:{server.port}", "-ca", "frontend-ca.pem",
        "-cert", "client.pem", "-key", "client.pem", f"http://{service}/",
    )  # fmt: skip
