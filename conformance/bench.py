#!/usr/bin/env python3
"""Measure our server and agent beside the Go ones: the same load, in turn, on the same machine.

Usage: bench.py [--rounds N] [--seconds S] [--only WORD,...] [--json FILE]

Each figure is the median of the rounds, in which the pairings take turns, and what counts is the
ratio: absolute figures depend on the machine. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import attrs
import trustme

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build" / "bench"
UPSTREAM = "sigs.k8s.io/apiserver-network-proxy"
PROGRAMS = {
    "konnbench": "./konnbench",
    "target": "./konnbench/target",
    "go-server": f"{UPSTREAM}/cmd/server",
    "go-agent": f"{UPSTREAM}/cmd/agent",
}
SINK, SOURCE, ECHO, HOLE = 19501, 19502, 19503, 19504

# What four connections keep while a fifth of the same agent is unread.
LEAST_RATE_RATIO, MOST_P99_RATIO = 0.9, 2.0


@attrs.frozen
class Pair:
    """A server with an agent, running."""

    name: str
    port: int
    server: subprocess.Popen[bytes]
    agent: subprocess.Popen[bytes]

    @property
    def watch(self) -> str:
        return f"server={self.server.pid},agent={self.agent.pid}"


@attrs.frozen
class Case:
    """One measurement: what to ask of konnbench, and which of its figures to keep.

    ``better`` is +1 where more is better, -1 where less is.
    """

    name: str
    args: str
    figure: tuple[str, ...]
    unit: str
    better: int = 1


CASES = [
    Case("read, 1 connection", f"--mode read --target 127.0.0.1:{SOURCE}", ("mbit_s",), "Mbit/s"),
    Case("read, 8 connections", f"--mode read --parallel 8 --target 127.0.0.1:{SOURCE}", ("mbit_s",), "Mbit/s"),
    Case("write 32,768 B, 1 connection", f"--mode write --target 127.0.0.1:{SINK}", ("mbit_s",), "Mbit/s"),
    Case("write 32,768 B, 8 connections", f"--mode write --parallel 8 --target 127.0.0.1:{SINK}", ("mbit_s",), "Mbit/s"),
    Case("write 32,000 B, 1 connection", f"--mode write --size 32000 --target 127.0.0.1:{SINK}", ("mbit_s",), "Mbit/s"),
    Case("write 32,000 B, 8 connections", f"--mode write --size 32000 --parallel 8 --target 127.0.0.1:{SINK}", ("mbit_s",), "Mbit/s"),
    Case("round trip 64 B, p50", f"--mode latency --size 64 --target 127.0.0.1:{ECHO}", ("us", "p50"), "µs", -1),
    Case("dials, one at a time", f"--mode dial --target 127.0.0.1:{ECHO}", ("dials_s",), "1/s"),
    Case("dials, 50 at once", f"--mode dial --parallel 50 --target 127.0.0.1:{ECHO}", ("dials_s",), "1/s"),
    Case("dials on one reusable tunnel, 50 at once", f"--mode dial --transport grpc-reusable --parallel 50 --target 127.0.0.1:{ECHO}", ("dials_s",), "1/s"),
]


def build() -> None:
    BUILD.mkdir(parents=True, exist_ok=True)
    for name, package in PROGRAMS.items():
        subprocess.run(["go", "build", "-o", str(BUILD / name), package], cwd=HERE, check=True)


def make_certificates(folder: Path) -> None:
    names = ["localhost", "127.0.0.1"]
    for side, client in (("frontend", "client"), ("cluster", "agent")):
        authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
        authority.cert_pem.write_to_path(str(folder / f"{side}-ca.crt"))
        for leaf in (side, client):
            pair = authority.issue_cert(*names, key_type=trustme.KeyType.ECDSA)
            pair.cert_chain_pems[0].write_to_path(str(folder / f"{leaf}.crt"))
            pair.private_key_pem.write_to_path(str(folder / f"{leaf}.key"))


@contextmanager
def running(command: list[str], log: Path) -> Any:
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@contextmanager
def pair(name: str, server: list[str], agent: list[str], port: int, folder: Path, mode: str = "grpc") -> Any:
    def files(*flags: tuple[str, str]) -> list[str]:
        return [f"--{flag}={folder / file}" for flag, file in flags]

    server_args = [
        *server,
        *files(
            ("server-cert", "frontend.crt"), ("server-key", "frontend.key"), ("server-ca-cert", "frontend-ca.crt"),
            ("cluster-cert", "cluster.crt"), ("cluster-key", "cluster.key"), ("cluster-ca-cert", "cluster-ca.crt"),
        ),
        f"--mode={mode}", f"--server-port={port}", f"--agent-port={port + 1}", f"--health-port={port + 2}", f"--admin-port={port + 3}", "--v=0",
    ]
    agent_args = [
        *agent,
        *files(("agent-cert", "agent.crt"), ("agent-key", "agent.key"), ("ca-cert", "cluster-ca.crt")),
        "--proxy-server-host=127.0.0.1", f"--proxy-server-port={port + 1}",
        f"--health-server-port={port + 4}", f"--admin-server-port={port + 5}", "--v=0",
    ]
    with (
        running(server_args, folder / f"{name}-server.log") as server_process,
        running(agent_args, folder / f"{name}-agent.log") as agent_process,
    ):
        wait_ready(port + 2, folder, name)
        yield Pair(name, port, server_process, agent_process)


def wait_ready(port: int, folder: Path, name: str) -> None:
    for _ in range(150):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    for log in folder.glob(f"{name}-*.log"):
        sys.stderr.write(log.read_text())
    raise SystemExit(f"{name}: not ready")


def load(where: Pair, args: list[str], folder: Path) -> dict[str, Any]:
    command = [
        str(BUILD / "konnbench"), "--server-addr", f"127.0.0.1:{where.port}", "--watch", where.watch,
        "--ca", str(folder / "frontend-ca.crt"), "--cert", str(folder / "client.crt"), "--key", str(folder / "client.key"),
        *args,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    if report.get("errors"):
        print(f"  {where.name}: errors {report['errors']}", file=sys.stderr)
    return report


def measure(cases: list[Case], pairs: list[Pair], rounds: int, seconds: float, folder: Path) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        samples: dict[str, list[float]] = {where.name: [] for where in pairs}
        cpu: dict[str, list[float]] = {where.name: [] for where in pairs}
        for number in range(rounds):
            for where in pairs if number % 2 == 0 else reversed(pairs):
                args = [*case.args.split(), "--duration", f"{seconds}s"]
                report = load(where, args, folder)
                value: Any = report
                for key in case.figure:
                    value = value[key]
                samples[where.name].append(float(value))
                per_gib = report.get("cpu_s_per_gib")
                if per_gib:
                    cpu[where.name].append(per_gib["server"] + per_gib["agent"])
        medians = {name: statistics.median(values) for name, values in samples.items()}
        row = {"case": case.name, "unit": case.unit, "better": case.better, "median": medians, "samples": samples}
        if any(cpu.values()):
            row["cpu_s_per_gib"] = {name: statistics.median(values) for name, values in cpu.items()}
        results.append(row)
        print_row(row)
    return results


def print_row(row: dict[str, Any]) -> None:
    ours, theirs = row["median"]["ours"], row["median"]["go"]
    line = f"{row['case']:<42} {ours:>9.1f} {theirs:>9.1f} {row['unit']:<7} {ours / theirs:>6.2f} x"
    if "cpu_s_per_gib" in row:
        line += f"   CPU s/GiB {row['cpu_s_per_gib']['ours']:.2f} / {row['cpu_s_per_gib']['go']:.2f}"
    print(line, flush=True)


def idle_memory(pairs: list[Pair], folder: Path, count: int) -> list[dict[str, Any]]:
    results = []
    for where in pairs:
        args = ["--mode", "many", "--count", str(count), "--parallel", "20", "--target", f"127.0.0.1:{ECHO}"]
        report = load(where, args, folder)
        for program in ("server", "agent"):
            kib = report["procs"][program]["kib_per_conn_idle"]
            results.append({"pair": where.name, "program": program, "tunnels": count, "kib_per_tunnel": kib})
            print(f"{count} idle tunnels, {where.name} {program}: {kib} KiB each", flush=True)
    return results


def isolation(pairs: dict[str, Pair], rounds: int, seconds: float, folder: Path) -> list[dict[str, Any]]:
    """Measure four connections before and while a fifth is unread; the verdict is on the medians."""
    results = []
    for transport, where in pairs.items():
        for direction, target in (("read", SOURCE), ("write", SINK)):
            args = ["--mode", "neighbours", "--direction", direction, "--transport", transport, "--parallel", "4"]
            args += ["--target", f"127.0.0.1:{target}", "--echo", f"127.0.0.1:{ECHO}", "--unread", f"127.0.0.1:{HOLE}"]
            reports = [load(where, [*args, "--duration", f"{seconds}s"], folder) for _ in range(rounds)]
            rate = statistics.median(report["rate_ratio"] for report in reports)
            p99 = statistics.median(report["rtt_p99_ratio"] for report in reports)
            kept = rate >= LEAST_RATE_RATIO and p99 <= MOST_P99_RATIO and not any(report["errors"] for report in reports)
            results.append({
                "transport": transport, "direction": direction, "rate_ratio": rate, "rtt_p99_ratio": p99,
                "verdict": "pass" if kept else "fail", "reports": reports,
            })
            print(
                f"one of five unread, {transport} {direction}: {rate:.2f} of the rate, round trip p99 x {p99:.2f}"
                f" ({'pass' if kept else 'FAIL'}: at least {LEAST_RATE_RATIO}, at most x {MOST_P99_RATIO})",
                flush=True,
            )
    return results


def resident(pairs: list[Pair]) -> list[dict[str, Any]]:
    results = []
    for where in pairs:
        for program, process in (("server", where.server), ("agent", where.agent)):
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            mib = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
            results.append({"pair": where.name, "program": program, "resident_mib": round(mib, 1)})
            print(f"resident when ready, {where.name} {program}: {mib:.1f} MiB", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3)
    parser.add_argument("--tunnels", type=int, default=1000, help="for the memory of idle tunnels; 0: leave out")
    parser.add_argument("--isolation-rounds", type=int, default=3, help="with one connection unread; 0: leave out")
    parser.add_argument("--only", default="", help="comma list of words: the cases whose name has one of them")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    words = [word for word in options.only.split(",") if word]
    cases = [case for case in CASES if not words or any(word in case.name for word in words)]

    build()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clusterproxy-bench-")))
        make_certificates(folder)
        listen = [f"{kind}=127.0.0.1:{port}" for kind, port in (("sink", SINK), ("source", SOURCE), ("echo", ECHO), ("hole", HOLE))]
        target = [str(BUILD / "target")] + [word for where in listen for word in ("-listen", where)]
        stack.enter_context(running(target, folder / "target.log"))
        ours = [sys.executable, "-m", "clusterproxy"]
        pairs = [
            stack.enter_context(pair("ours", [*ours, "server"], [*ours, "agent"], 19510, folder)),
            stack.enter_context(pair("go", [str(BUILD / "go-server")], [str(BUILD / "go-agent")], 19520, folder)),
        ]
        print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; mutual TLS, stock Go client")
        print(f"median of {options.rounds} interleaved rounds of {options.seconds:g} s\n")
        report: dict[str, Any] = {"resident": resident(pairs)}
        print(f"\n{'':<42} {'ours':>9} {'Go':>9} {'':<7} ours/Go")
        report["cases"] = measure(cases, pairs, options.rounds, options.seconds, folder)
        if options.tunnels:
            report["idle"] = idle_memory(pairs, folder, options.tunnels)
        if options.isolation_rounds:
            by_connect = stack.enter_context(pair("connect", [*ours, "server"], [*ours, "agent"], 19530, folder, "http-connect"))
            both = {"grpc": pairs[0], "connect": by_connect}
            report["isolation"] = isolation(both, options.isolation_rounds, 12, folder)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
