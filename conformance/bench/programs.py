"""The programs that are measured: built, given certificates, started and ended, and put under load."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs
import trustme

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

CONFORMANCE: Final = Path(__file__).resolve().parents[1]
BUILD: Final = CONFORMANCE.parent / "build" / "bench"
UPSTREAM: Final = "sigs.k8s.io/apiserver-network-proxy"
PROGRAMS: Final = {
    "konnbench": "./konnbench",
    "target": "./konnbench/target",
    "agents": "./konnbench/agents",
    "delay": "./konnbench/delay",
    "httpload": "./cmd/httpload",
    "go-server": f"{UPSTREAM}/cmd/server",
    "go-agent": f"{UPSTREAM}/cmd/agent",
}
OURS: Final = (sys.executable, "-m", "clusterproxy")
SINK, SOURCE, ECHO, HOLE = 19501, 19502, 19503, 19504


class NotMeasured(Exception):
    """Something could not be had or run to its end here; says why."""


@attrs.frozen
class Pair:
    """A server with an agent, running."""

    name: str
    port: int
    server: subprocess.Popen[bytes]
    agent: subprocess.Popen[bytes]
    uds: Path | None = None
    """Where clients come in, instead of `port`."""

    @property
    def watch(self) -> str:
        """What konnbench's `--watch` takes."""
        return f"server={self.server.pid},agent={self.agent.pid}"


def build() -> None:
    """Build all Go programs into `BUILD`."""
    BUILD.mkdir(parents=True, exist_ok=True)
    for name, package in PROGRAMS.items():
        subprocess.run(["go", "build", "-o", str(BUILD / name), package], cwd=CONFORMANCE, check=True)


def make_certificates(folder: Path, *names: str) -> None:
    """Write two authorities, of the frontend and the cluster, and a server's and a client's leaf of each.

    Loopback is among the leaves' names; *names* are further ones.
    """
    for side, client in (("frontend", "client"), ("cluster", "agent")):
        authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
        authority.cert_pem.write_to_path(str(folder / f"{side}-ca.crt"))
        for leaf in (side, client):
            pair = authority.issue_cert("localhost", "127.0.0.1", *names, key_type=trustme.KeyType.ECDSA)
            pair.cert_chain_pems[0].write_to_path(str(folder / f"{leaf}.crt"))
            pair.private_key_pem.write_to_path(str(folder / f"{leaf}.key"))


@contextmanager
def running(command: Sequence[str], log: Path) -> Generator[subprocess.Popen[bytes]]:
    """Run a program while the context lasts; then it is killed."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def pair(
    name: str,
    server: Sequence[str],
    agent: Sequence[str],
    port: int,
    folder: Path,
    mode: str = "grpc",
    uds: Path | None = None,
) -> Generator[Pair]:
    """Run a server and its agent, ready while the context lasts; they take `port` to `port` + 5.

    With `uds` clients come in by that Unix socket, in plain text, and not by `port`.

    Raises:
        NotMeasured: it was not ready within 15 s; its logs are on stderr.
    """
    agent_args = agent_command(agent, port + 1, port + 4, folder)
    with (
        running(server_command(server, port, folder, mode, uds), folder / f"{name}-server.log") as server_process,
        running(agent_args, folder / f"{name}-agent.log") as agent_process,
    ):
        wait_ready(port + 2, folder, name)
        yield Pair(name, port, server_process, agent_process, uds)


def server_command(
    server: Sequence[str], port: int, folder: Path, mode: str = "grpc", uds: Path | None = None
) -> list[str]:
    """Return a server's command line: clients at `port` or `uds`, agents at `port` + 1, health at `port` + 2."""
    frontend = (("server-cert", "frontend.crt"), ("server-key", "frontend.key"), ("server-ca-cert", "frontend-ca.crt"))
    cluster = (("cluster-cert", "cluster.crt"), ("cluster-key", "cluster.key"), ("cluster-ca-cert", "cluster-ca.crt"))
    clients = [f"--server-port={port}", *_files(folder, *frontend)]
    if uds is not None:
        clients = ["--server-port=0", f"--uds-name={uds}"]
    return [
        *server,
        *clients,
        *_files(folder, *cluster),
        f"--mode={mode}",
        f"--agent-port={port + 1}",
        f"--health-port={port + 2}",
        f"--admin-port={port + 3}",
        "--v=0",
    ]


def agent_command(agent: Sequence[str], server_port: int, port: int, folder: Path) -> list[str]:
    """Return an agent's command line: health at `port`, admin at `port` + 1."""
    return [
        *agent,
        *_files(folder, ("agent-cert", "agent.crt"), ("agent-key", "agent.key"), ("ca-cert", "cluster-ca.crt")),
        "--proxy-server-host=127.0.0.1",
        f"--proxy-server-port={server_port}",
        f"--health-server-port={port}",
        f"--admin-server-port={port + 1}",
        "--v=0",
    ]


def _files(folder: Path, *flags: tuple[str, str]) -> list[str]:
    return [f"--{flag}={folder / file}" for flag, file in flags]


def wait_ready(port: int, folder: Path, name: str) -> None:
    """Wait until a server has an agent.

    Raises:
        NotMeasured: it had none within 15 s; its logs are on stderr.
    """
    for _ in range(150):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    for log in folder.glob(f"{name}-*.log"):
        sys.stderr.write(log.read_text())
    raise NotMeasured(f"{name}: not ready")


def wait_open(ports: Iterable[int], process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a program listens.

    Raises:
        NotMeasured: it ended, or does not listen within 15 s; says the last line of its log.
    """
    deadline = time.monotonic() + 15
    for port in ports:
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    last = log.read_text(errors="replace").strip().rpartition("\n")[2]
                    raise NotMeasured(f"{log.stem} does not run here: {last}") from None
                time.sleep(0.05)


def load(where: Pair, args: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run konnbench against a pair's frontend, over mutual TLS or its Unix socket, and return its report."""
    front = ["--uds", str(where.uds)] if where.uds else ["--server-addr", f"127.0.0.1:{where.port}"]
    report = konnbench([*front, "--watch", where.watch, *args], folder)
    if report.get("errors"):
        print(f"  {where.name}: errors {report['errors']}", file=sys.stderr)
    return report


def konnbench(args: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run konnbench with the certificates of `folder` and return its report.

    Raises:
        NotMeasured: it ended with an error or did not end.
    """
    files = {"ca": "frontend-ca.crt", "cert": "client.crt", "key": "client.key"}
    command = [str(BUILD / "konnbench"), *(f"--{flag}={folder / file}" for flag, file in files.items()), *args]
    return output_of(command)


def output_of(command: Sequence[str], timeout: float = 180) -> dict[str, Any]:
    """Run a load to its end and return the JSON that it printed.

    Raises:
        NotMeasured: it ended with an error or did not end.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=True)
    except subprocess.CalledProcessError as error:
        raise NotMeasured(error.stderr.strip().rpartition("\n")[2] or f"exit status {error.returncode}") from error
    except subprocess.TimeoutExpired as error:
        raise NotMeasured(f"did not end within {timeout:g} s") from error
    report: dict[str, Any] = json.loads(done.stdout)
    return report
