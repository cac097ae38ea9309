"""A server and its agent with something between them, and the load that is put on them."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import attrs

from .programs import BUILD, NotMeasured, output_of, running, server_command

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence
    from pathlib import Path

# Runs where the server does, which may be another network namespace than ours.
WAIT_READY: Final = """
import sys, time, urllib.request
for _ in range(150):
    try:
        urllib.request.urlopen(sys.argv[1], timeout=1).close()
        sys.exit()
    except OSError:
        time.sleep(0.1)
sys.exit(1)
"""


@attrs.frozen(kw_only=True)
class Ends:
    """Where the two sides run, and how the agent finds its server.

    ``hub`` and ``cluster`` go in front of each command (a namespace, or nothing). The agent dials
    ``server_host`` at the port ``agent_dials``; None is the server's own.
    """

    hub: Sequence[str] = ()
    cluster: Sequence[str] = ()
    server_host: str = "127.0.0.1"
    agent_dials: int | None = None


@contextmanager
def leg(
    name: str, server: Sequence[str], agent: Sequence[str], port: int, folder: Path, ends: Ends
) -> Generator[list[str]]:
    """Run a server and its agent, ready while the context lasts; they take `port` to `port` + 5.

    Yields:
        The flags that send konnbench's connections through them, by the stock Go client.

    Raises:
        NotMeasured: the server had no agent within 15 s; the logs are on stderr.
    """
    agent_command = [
        *ends.cluster, *agent, f"--proxy-server-host={ends.server_host}", f"--proxy-server-port={ends.agent_dials or port + 1}",
        f"--agent-cert={folder / 'agent.crt'}", f"--agent-key={folder / 'agent.key'}", f"--ca-cert={folder / 'cluster-ca.crt'}",
        f"--health-server-port={port + 4}", f"--admin-server-port={port + 5}", "--v=0",
    ]  # fmt: skip
    logs = folder / f"{name}-server.log", folder / f"{name}-agent.log"
    with (
        running(server_command([*ends.hub, *server], port, folder), logs[0]) as server_process,
        running(agent_command, logs[1]) as agent_process,
    ):
        probe = [*ends.hub, sys.executable, "-c", WAIT_READY, f"http://127.0.0.1:{port + 2}/readyz"]
        if subprocess.run(probe, check=False).returncode != 0:
            for log in logs:
                sys.stderr.write(log.read_text(errors="replace"))
            raise NotMeasured(f"{name}: not ready")
        yield [
            "--transport", "grpc", "--server-addr", f"127.0.0.1:{port}",
            "--ca", str(folder / "frontend-ca.crt"), "--cert", str(folder / "client.crt"), "--key", str(folder / "client.key"),
            "--watch", f"server={server_process.pid},agent={agent_process.pid}",
        ]  # fmt: skip


def konnbench(where: Sequence[str], seconds: float, args: Sequence[str]) -> dict[str, Any]:
    """Run konnbench, which counts from the first byte on, and return its report.

    Args:
        where: what to put in front of the command.
        seconds: how long it measures.
        args: mode, target, and how to get there.

    Raises:
        NotMeasured: it failed, or one of its connections did; a rate would then say nothing.
    """
    command = [*where, str(BUILD / "konnbench"), "--warmup", "0s", "--duration", f"{seconds}s"]
    report = output_of([*command, *args], timeout=seconds + 120)
    if report["errors"]:
        raise NotMeasured(f"konnbench {' '.join(args)}: {report['errors']}")
    return report
