"""`clusterproxy demo`: the real programs, a service that only the agent reaches, and requests to it.

Everything lives in one temporary directory, one network namespace and a handful of child processes,
all of which go when the demo ends.
"""

from __future__ import annotations

import http.client
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import attrs
import click
import trio

from .children import LOOPBACK, StageError, agent_is_connected, keep_running, wait_for_agent
from .demo_stage import (
    GREETING,
    PORTS,
    ManagedSide,
    Ports,
    Server,
    connect_command,
    go_command,
    managed_side,
    output_of,
    programs,
    write_files,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Sequence

REQUEST_TIMEOUT_S = 10


@attrs.frozen(kw_only=True)
class DemoConfig:
    """What the demo may be told."""

    ports: Ports
    wait: bool
    """Stay until a signal comes, so that a person can try things."""
    go_client: Path | None
    """The built `conformance/cmd/democlient`, if there is one."""


async def _until_ready(server: Server, directory: Path) -> None:
    """Wait until the service listens and an agent is connected to *server*."""

    def is_ready() -> bool:
        service_listens = "Serving" in (directory / "service.log").read_text()
        return service_listens and agent_is_connected(server.health_port)

    await wait_for_agent(is_ready, server.mode, directory / "agent.log")


def _curl_speaks_to_https_proxies() -> bool:
    try:
        return "HTTPS-proxy" in output_of("curl", "--version")
    except (OSError, subprocess.CalledProcessError):
        return False


async def _run(command: Sequence[str], directory: Path) -> tuple[bool, str]:
    with trio.move_on_after(REQUEST_TIMEOUT_S):
        done = await trio.run_process(
            command, cwd=directory, capture_stdout=True, capture_stderr=True, check=False
        )
        answer = (done.stdout or done.stderr).decode(errors="replace").strip()
        return done.returncode == 0, answer
    return False, f"no answer within {REQUEST_TIMEOUT_S} s"


def _connect_directly(service: str) -> None:
    host, _, port = service.rpartition(":")
    socket.create_connection((host, int(port)), timeout=REQUEST_TIMEOUT_S).close()


def _ask_without_curl(directory: Path, server: Server, service: str) -> str:
    """Ask *service* through the HTTP CONNECT *server*, for want of a `curl` that can."""
    context = ssl.create_default_context(cafile=str(directory / "frontend-ca.pem"))
    context.load_cert_chain(directory / "client.pem")
    with (
        socket.create_connection((LOOPBACK, server.port), timeout=REQUEST_TIMEOUT_S) as plain,
        context.wrap_socket(plain, server_hostname=LOOPBACK) as tls,
    ):
        tls.sendall(f"CONNECT {service} HTTP/1.1\r\nHost: {service}\r\n\r\n".encode())
        head = b""
        # Byte by byte: what follows the blank line is the service's.
        while not head.endswith(b"\r\n\r\n") and (byte := tls.recv(1)):
            head += byte
        if b" 200 " not in head.partition(b"\r\n")[0]:
            return head.decode(errors="replace").strip() or "the server hung up"
        tunnel = http.client.HTTPConnection(service)
        tunnel.sock = tls
        tunnel.request("GET", "/", headers={"Connection": "close"})
        return tunnel.getresponse().read().decode(errors="replace").strip()


def _title(text: str) -> None:
    click.secho(f"\n{text}", bold=True)


def _note(text: str) -> None:
    click.echo(f"  - {text}")


def _command_line(command: Sequence[str]) -> None:
    click.secho(f"  $ {shlex.join(command)}", fg="cyan")


def _verdict(good: bool, answer: str, remark: str = "") -> bool:
    mark = click.style("✔", fg="green") if good else click.style("✘", fg="red")
    click.echo(f"  {mark} {answer}{click.style(remark, dim=True)}")
    return good


async def _show_direct(side: ManagedSide) -> bool:
    _title("1. Directly, from the client's side")
    if side.no_namespace is not None:
        _note("not shown: on loopback everybody reaches the service")
        return True
    _note(f"TCP to {side.service}")
    try:
        await trio.to_thread.run_sync(_connect_directly, side.service)
    except OSError as error:
        return _verdict(True, error.strerror or str(error), ", as it should be")
    return _verdict(False, "connected, which should be impossible")


async def _show_connect(directory: Path, side: ManagedSide, server: Server) -> bool:
    _title("2. Through the tunnel: HTTP CONNECT over mutual TLS")
    if _curl_speaks_to_https_proxies():
        command = connect_command(server, side.service)
        _command_line(command)
        succeeded, answer = await _run(command, directory)
        return _verdict(succeeded and answer == GREETING, answer)
    _note("no curl that speaks to HTTPS proxies: Python's standard library asks")
    try:
        answer = await trio.to_thread.run_sync(_ask_without_curl, directory, server, side.service)
    except (OSError, http.client.HTTPException) as error:
        return _verdict(False, str(error))
    return _verdict(answer == GREETING, answer)


async def _show_go(client: Path | None, directory: Path, side: ManagedSide, server: Server) -> bool:
    _title("3. Through the tunnel: gRPC over mutual TLS, with the stock Go client")
    if client is None:
        _note("not shown: no Go client was built (`make demo` builds it where Go is present)")
        return True
    command = go_command(client, server, side.service)
    _command_line(command)
    succeeded, answer = await _run(command, directory)
    return _verdict(succeeded and answer == GREETING, answer)


def _show_lines_to_try(config: DemoConfig, directory: Path, side: ManagedSide) -> None:
    _title("While this runs, in another terminal")
    connect = config.ports.connect
    _command_line(("cd", str(directory)))
    _command_line(connect_command(connect, side.service))
    if config.go_client is not None:
        _command_line(go_command(config.go_client, config.ports.grpc, side.service))
    _command_line(("curl", f"http://{LOOPBACK}:{connect.health_port}/metrics"))
    if side.prefix:
        _command_line((*side.prefix, "curl", f"http://{side.service}/"))
    click.echo("\nCtrl-C stops everything and leaves nothing behind.")


async def _cancel_on_signal(signals: AsyncIterable[int], scope: trio.CancelScope) -> None:
    async for _ in signals:
        scope.cancel()


async def run_demo(config: DemoConfig) -> bool:
    """Start everything, show it, wait for a signal if *config* says so; return whether all is well.

    Raises:
        StageError: a program ended by itself or did not get ready, or something is missing.

    Cancellation, and SIGINT and SIGTERM likewise, stop all children and remove what was made.
    """
    good = False
    try:
        # The signals come first: from here on none ends the process before it has cleaned up.
        with (
            trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals,
            tempfile.TemporaryDirectory(prefix="clusterproxy-demo-") as name,
            managed_side(config.ports) as side,
        ):
            directory = Path(name)
            write_files(directory, side.server_address)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_on_signal, signals, nursery.cancel_scope)
                _title("What runs where")
                if side.no_namespace is not None:
                    _note(f"no network namespace here ({side.no_namespace}): all is on loopback")
                for program in programs(side, config.ports):
                    process: trio.Process = await nursery.start(keep_running, program, directory)
                    place = f"{program.where:<17}  pid {process.pid:<7}"
                    click.echo(f"  {program.name:<20}  {place}  {program.does}")
                for server in (config.ports.grpc, config.ports.connect):
                    await _until_ready(server, directory)
                good = await _show_direct(side)
                good &= await _show_connect(directory, side, config.ports.connect)
                good &= await _show_go(config.go_client, directory, side, config.ports.grpc)
                if config.wait:
                    _show_lines_to_try(config, directory, side)
                    await trio.sleep_forever()
                nursery.cancel_scope.cancel()
    except* StageError as errors:
        raise errors.exceptions[0] from None
    return good


@click.command()
@click.option(
    "--port",
    default=18090,
    show_default=True,
    type=click.IntRange(1024, 49151 - PORTS),
    help=f"First of the {PORTS} ports to use.",
)
@click.option("--once", is_flag=True, help="Show and exit, as it does without a terminal.")
@click.option(
    "--go-client",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The built conformance/cmd/democlient.",
)
def demo(port: int, once: bool, go_client: Path | None) -> None:
    """Show the proxy at work: server, agent, and a service that only the agent reaches."""
    config = DemoConfig(
        ports=Ports(first=port),
        wait=not once and sys.stdin.isatty() and sys.stdout.isatty(),
        go_client=go_client.absolute() if go_client else None,
    )
    click.echo("A client on the hub, a service in a managed cluster, and between them a tunnel")
    click.echo("that the cluster's agent has dialled:\n")
    click.echo("  client ──▶ proxy server ◀── agent ──▶ service")
    config.ports.check()
    good = trio.run(run_demo, config)
    sys.exit(0 if good else 1)
