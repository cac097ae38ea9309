"""Who is measured: each is started when it is first asked for, and told how the load reaches it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import attrs

from .cases import FEW_ROUNDS, FIELD, Case, Service
from .field import rathole, ssh
from .processes import peak_mib, reset_peak
from .programs import BUILD, ECHO, HOLE, OURS, SINK, SOURCE, NotMeasured, Pair, konnbench, output_of, pair
from .samples import Sample

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import ExitStack
    from pathlib import Path

GO: Final = ((str(BUILD / "go-server"),), (str(BUILD / "go-agent"),))
OUR: Final = ((*OURS, "server"), (*OURS, "agent"))
PORTS: Final[Mapping[Service, int]] = {
    "sink": SINK,
    "source": SOURCE,
    "echo": ECHO,
    "hole": HOLE,
    "fine-sink": HOLE + 4,
}
TLS_PORTS: Final[Mapping[Service, int]] = {"sink": SINK + 4, "source": SOURCE + 4, "echo": ECHO + 4}

# The pairs by contender: its programs, port, mode, and whether clients come in by a Unix socket.
PAIRS: Final = {
    "ours": (OUR, 19510, "grpc", False),
    "go": (GO, 19520, "grpc", False),
    "ours-connect": (OUR, 19530, "http-connect", False),
    "go-connect": (GO, 19540, "http-connect", False),
    "ours-socket": (OUR, 19550, "grpc", True),
    "go-socket": (GO, 19560, "grpc", True),
    "ours-connect-socket": (OUR, 19570, "http-connect", True),
    "go-connect-socket": (GO, 19580, "http-connect", True),
}


@attrs.frozen(kw_only=True)
class Contender:
    """One that is running: how konnbench reaches it and which processes it is."""

    key: str
    folder: Path
    transport: str
    args: Sequence[str] = ()
    ports: Mapping[Service, int] = PORTS
    host: str = "127.0.0.1"
    """Where the services are."""
    pids: Mapping[str, Sequence[int]] = attrs.field(factory=dict[str, "Sequence[int]"])

    @property
    def most_rounds(self) -> int | None:
        """The rounds that it takes part in; None: all."""
        return FEW_ROUNDS if self.key in FIELD else None

    def measure(self, case: Case, seconds: float) -> Sample:
        """Run a case once.

        Raises:
            NotMeasured: it could not be run to its end.
        """
        everyone = [pid for pids in self.pids.values() for pid in pids]
        reset_peak(everyone)
        report = self._report(case, seconds)
        return Sample(
            figures={name: float(_pick(report, path)) for name, path in case.figures.items()},
            cpu_s_per_gib=report.get("cpu_s_per_gib") or {},
            peak_mib={name: round(sum(map(peak_mib, pids)), 1) for name, pids in self.pids.items()},
            errors=report.get("errors") or {},
        )

    def _report(self, case: Case, seconds: float) -> dict[str, Any]:
        return konnbench(self.command(case, seconds), self.folder)

    def command(self, case: Case, seconds: float) -> list[str]:
        """Return konnbench's arguments for a case."""
        watch = ",".join(f"{name}={pid}" for name, pids in self.pids.items() for pid in pids)
        transport = f"{self.transport}-reusable" if case.reusable else self.transport
        return [
            "--transport", transport, *self.args, "--watch", watch, "--mode", case.mode,
            "--target", f"{self.host}:{self.ports[case.service]}", "--echo", f"{self.host}:{self.ports['echo']}",
            "--parallel", str(case.parallel), "--size", str(case.size),
            "--duration", f"{seconds}s", "--warmup", f"{case.warmup}s",
        ]  # fmt: skip


# What it is called there.
WORKLOADS: Final = {"read": "read", "write": "write", "latency": "latency"}


@attrs.frozen(kw_only=True)
class OwnClient(Contender):
    """Our server and agent, loaded by `clusterproxy bench`, that is by our own client."""

    def _report(self, case: Case, seconds: float) -> dict[str, Any]:
        report = output_of(self.command(case, seconds))
        row = report["rows"][0]
        if row["median"] is None:
            raise NotMeasured(f"our own client: {row['errors']}")
        return {
            "mbit_s": row["median"],
            "us": {"p50": row.get("p50"), "p99": row.get("p99")},
            "cpu_s_per_gib": row["cpu_s_per_gib"],
            "errors": row["errors"],
        }

    def command(self, case: Case, seconds: float) -> list[str]:
        """Return the command line for a case."""
        files = {"ca-cert": "frontend-ca.crt", "cert": "client.crt", "key": "client.key"}
        services = [word for name in ("sink", "source", "echo") for word in (f"--{name}", f"127.0.0.1:{PORTS[name]}")]
        watch = [word for name, pids in self.pids.items() for pid in pids for word in ("--watch", f"{name}={pid}")]
        return [
            *OURS, "bench", *(f"--{flag}={self.folder / file}" for flag, file in files.items()), *self.args,
            "--workload", WORKLOADS[case.mode], "--connections", str(case.parallel), *services, *watch,
            "--size", str(case.size), "--duration", f"{seconds}s", "--warmup", f"{case.warmup}s",
            "--rounds", "1", "--no-direct", "--json", "-",
        ]  # fmt: skip


class Contenders:
    """Starts who is asked for; all end with the stack."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._running: dict[str, Contender] = {}
        self._pairs: dict[str, Pair] = {}
        self._missing: dict[str, str] = {}

    def get(self, key: str) -> Contender:
        """Return a running contender.

        Raises:
            NotMeasured: it cannot be had here; says why.
        """
        if key in self._missing:
            raise NotMeasured(self._missing[key])
        if key not in self._running:
            try:
                self._running[key] = self._start(key)
            except NotMeasured as error:
                self._missing[key] = str(error)
                raise
        return self._running[key]

    def pair(self, key: str) -> Pair:
        """Return a running pair of server and agent, by the contender's key."""
        if key not in self._pairs:
            (server, agent), port, mode, by_socket = PAIRS[key]
            uds = self._folder / f"{key}.sock" if by_socket else None
            self._pairs[key] = self._stack.enter_context(pair(key, server, agent, port, self._folder, mode, uds))
        return self._pairs[key]

    def _start(self, key: str) -> Contender:
        folder = self._folder
        if key == "direct":
            return Contender(key=key, folder=folder, transport="direct")
        if key == "direct-tls":
            return Contender(key=key, folder=folder, transport="tls", ports=TLS_PORTS)
        if key in ("ssh", "rathole"):
            start = ssh if key == "ssh" else rathole
            tunnel = self._stack.enter_context(start(folder, PORTS))
            return Contender(key=key, folder=folder, transport="direct", ports=tunnel.ports, pids=tunnel.pids)
        where = self.pair("ours" if key == "own" else key)
        pids = {"server": [where.server.pid], "agent": [where.agent.pid]}
        address = f"127.0.0.1:{where.port}"
        if key == "own":
            return OwnClient(key=key, folder=folder, transport="", args=["--server", address], pids=pids)
        args = ["--uds", str(where.uds)] if where.uds else ["--server-addr", address]
        transport = "connect" if "connect" in key else "grpc"
        return Contender(key=key, folder=folder, transport=transport, args=args, pids=pids)


def _pick(report: Any, path: Sequence[str]) -> float:  # noqa: ANN401 - JSON
    for key in path:
        report = report[key]
    return float(report)
