"""What connected agents cost a server: memory, processor time while nothing happens, dials among many.

One process of Go plays them all, with upstream's own agent code: what each costs at its own end is not measured here.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from .cases import MAIN, chosen
from .contenders import PAIRS
from .processes import millicores, resident_mib
from .programs import BUILD, ECHO, NotMeasured, konnbench, running, server_command, wait_open, wait_ready
from .samples import Result, Row, Sample

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

PART: Final = "agents"
COUNTS: Final = (1, 10, 100, 300, 500)
PORTS: Final = {"ours": 19620, "go": 19630}
IDLE_SECONDS: Final = 10.0
# For what comes with connecting to be over.
SETTLE_SECONDS: Final = 1.0


def name_of(count: int) -> str:
    """Return a row's name."""
    return f"{count:,} agents connected"


def agents(
    seconds: float,
    folder: Path,
    words: Sequence[str],
    counts: Sequence[int] = COUNTS,
    idle_seconds: float = IDLE_SECONDS,
) -> Iterator[Row]:
    """Measure each server with each number of agents: all are idle at the same time, and dial one after the other."""
    for count in counts:
        if not chosen(PART, f"{name_of(count)}, idle", words):
            continue
        results: dict[str, Result] = {}
        try:
            with _fleet("ours", count, folder) as ours, _fleet("go", count, folder) as go:
                servers = {"ours": ours, "go": go}
                time.sleep(SETTLE_SECONDS)
                idle = millicores([server.pid for server in servers.values()], idle_seconds)
                for key in MAIN:
                    figures = {"idle": idle[servers[key].pid], "server_mib": resident_mib(servers[key].pid)}
                    results[key] = _dials(key, figures, seconds, folder)
        except NotMeasured as error:
            results = {key: Result(skipped=str(error)) for key in MAIN}
        yield Row(part=PART, name=name_of(count), figure="idle", unit="millicores", better=-1, results=results)


def _dials(key: str, figures: dict[str, float], seconds: float, folder: Path) -> Result:
    args = ["--server-addr", f"127.0.0.1:{PORTS[key]}", "--mode", "dial", "--target", f"127.0.0.1:{ECHO}"]
    report = konnbench([*args, "--duration", f"{seconds}s"], folder)
    sample = Sample(figures={**figures, "dials_s": report["dials_s"]}, errors=report["errors"] or {})
    return Result(samples=(sample,))


@contextmanager
def _fleet(key: str, count: int, folder: Path) -> Generator[subprocess.Popen[bytes]]:
    """Run a server with so many agents; yields the server."""
    (server, _), _, mode, _ = PAIRS[key]
    port, name = PORTS[key], f"agents-{key}"
    with running(server_command(server, port, folder, mode), folder / f"{name}-server.log") as process:
        wait_open([port + 1], process, folder / f"{name}-server.log")
        command = [str(BUILD / "agents"), "-server", f"127.0.0.1:{port + 1}", "-count", str(count)]
        command += [
            "-ca",
            str(folder / "cluster-ca.crt"),
            "-cert",
            str(folder / "agent.crt"),
            "-key",
            str(folder / "agent.key"),
        ]
        log = folder / f"{name}-{count}.log"
        with running(command, log) as fleet:
            while "{" not in log.read_text():
                if fleet.poll() is not None:
                    raise NotMeasured(f"{key}: {log.read_text().strip()}")
                time.sleep(0.05)
            wait_ready(port + 2, folder, name)
            yield process
