#!/usr/bin/env python3
"""Measure on lines: the documentation's own table at 1 Gbit/s, and long lines of 20 and 100 ms.

Usage: python -m bench.line [--only doc,20,100] [--rounds N] [--seconds S] [--json FILE], in the folder
`conformance`.

The load is always the stock Go client's. On the 1 Gbit/s line it is put on in goben's manner: one
connection, buffers of 1,000,000 bytes, rates that count from the first byte on (its 10 s are `--seconds`).
goben's default is both directions at once; each is measured alone as well.

A long line is a relay between agent and server (`konnbench/delay`); the rest is loopback. A figure there
is the rate after the first 10 s, in which windows may grow, and its share is of what TLS alone gets
through such a relay.
"""

from __future__ import annotations

import argparse
import functools
import json
import signal
import statistics
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .leg import Ends, konnbench, leg
from .namespaces import CLUSTER_ADDRESS, HUB_ADDRESS, gigabit_line, inside
from .programs import BUILD, OURS, NotMeasured, build, make_certificates, running

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, Sequence

Row = dict[str, Any]
Report = dict[str, Any]

PROGRAMS: Final = {
    "go": ([str(BUILD / "go-server")], [str(BUILD / "go-agent")]),
    "ours": ([*OURS, "server"], [*OURS, "agent"]),
}
PARTS: Final = ("doc", "20", "100")
GOBEN_SIZE: Final = "1000000"
SETTLE_S: Final = 10
LINE_MBIT_S: Final = 1000
# Much of it is never used: 12.5 MB are on their way in a round trip of 100 ms.
LINE_BUFFER: Final = 32 << 20
DOC_TARGET: Final = 0.95
LONG_TARGETS: Final = {100: 0.9}
SINK, SOURCE, TLS_SINK, TLS_SOURCE = 19641, 19642, 19643, 19644
PORTS: Final = {"go": 19650, "ours": 19660}
RELAYS: Final = {"go": 19670, "ours": 19671, "read": 19672, "write": 19673}


def measure(
    folder: Path,
    rounds: int,
    seconds: float,
    parts: Sequence[str] = PARTS,
    long_rounds: int | None = None,
) -> list[Row]:
    """Measure, print each row when it is there, and return them.

    Args:
        folder: for certificates and logs; a folder is made in it.
        rounds: of which each figure is the median; in each all programs have a turn.
        seconds: of one run; on long lines what follows the first 10.
        parts: of "doc", "20" and "100", what to measure.
        long_rounds: rounds on long lines, where a run takes longer; by default at most 3.

    Returns:
        Rows of "name", "unit", "figures" (program: median), "samples" (program: one a round), "share"
        (program: of what "direct" has), "target" and "verdict" ("pass" or "fail", of our share) where
        there is a target, "cpu_s_per_gib" (program: server and agent together), and "by_second"
        (program: Mbit/s of each second, medians; of both directions together where both are busy).
        What could not be measured is a row of "name" and "skipped": why.
    """
    own = folder / "line"
    own.mkdir(exist_ok=True)
    make_certificates(own, HUB_ADDRESS)
    if long_rounds is None:
        long_rounds = min(rounds, 3)
    rows: list[Row] = []
    for part in parts:
        try:
            if part == "doc":
                rows += documentation(own, rounds, seconds)
            else:
                rows += long_line(own, long_rounds, seconds, int(part))
        except NotMeasured as error:
            name = "1 Gbit/s line" if part == "doc" else f"{part} ms line"
            print(f"{name}: skipped: {error}", flush=True)
            rows.append({"name": name, "skipped": str(error)})
    return rows


def documentation(folder: Path, rounds: int, seconds: float) -> list[Row]:
    """Measure on a 1 Gbit/s line between two network namespaces."""
    with gigabit_line() as line, ExitStack() as stack:
        hub, cluster = inside(line.hub), inside(line.cluster)
        listeners = {"sink": SINK, "source": SOURCE}
        stack.enter_context(targets(folder, cluster, CLUSTER_ADDRESS, listeners))
        ends = Ends(hub=hub, cluster=cluster, server_host=HUB_ADDRESS)
        ways = {"direct": ["--transport", "direct"]}
        for name, (server, agent) in PROGRAMS.items():
            started = leg(f"doc-{name}", server, agent, PORTS[name], folder, ends)
            ways[name] = stack.enter_context(started)

        def run(mode: str, port: int) -> dict[str, list[Report]]:
            args = ["--mode", mode, "--size", GOBEN_SIZE, "--target", f"{CLUSTER_ADDRESS}:{port}"]
            commands = {name: [*args, *way] for name, way in ways.items()}
            return interleaved(functools.partial(konnbench, hub, seconds), commands, rounds)

        read, write, both = run("read", SOURCE), run("write", SINK), run("goben", SOURCE)
    rows = [
        row("1 Gbit/s line, read", read, rate, DOC_TARGET),
        row("1 Gbit/s line, write", write, rate, DOC_TARGET),
        row("1 Gbit/s line, read while it writes", both, lambda report: report["mbit_s_read"]),
        row("1 Gbit/s line, write while it reads", both, lambda report: report["mbit_s_written"]),
    ]
    for each in rows:
        print_row(each)
    print(f"\none direction at a time\n{table(rows[0], rows[1])}")
    print(f"\nboth at once, goben's default\n{table(rows[2], rows[3])}\n", flush=True)
    return rows


def long_line(folder: Path, rounds: int, seconds: float, round_trip_ms: int) -> list[Row]:
    """Measure with a relay between agent and server that makes round trips this long."""
    target = LONG_TARGETS.get(round_trip_ms)
    rows: list[Row] = []
    with ExitStack() as stack:
        listeners = {"sink": SINK, "source": SOURCE, "tls+sink": TLS_SINK, "tls+source": TLS_SOURCE}
        stack.enter_context(targets(folder, (), "127.0.0.1", listeners))
        through: dict[str, list[str]] = {}
        for name, (server, agent) in PROGRAMS.items():
            stack.enter_context(relay(folder, RELAYS[name], PORTS[name] + 1, round_trip_ms))
            ends = Ends(agent_dials=RELAYS[name])
            started = leg(f"{round_trip_ms}-{name}", server, agent, PORTS[name], folder, ends)
            through[name] = stack.enter_context(started)
        for mode, port, tls_port in (("read", SOURCE, TLS_SOURCE), ("write", SINK, TLS_SINK)):
            stack.enter_context(relay(folder, RELAYS[mode], tls_port, round_trip_ms))
            by_tls = ["--transport", "tls", "--ca", str(folder / "frontend-ca.crt")]
            ways = {"direct": [*by_tls, "--target", f"127.0.0.1:{RELAYS[mode]}"]}
            ways |= {name: [*way, "--target", f"127.0.0.1:{port}"] for name, way in through.items()}
            commands = {name: ["--mode", mode, *way] for name, way in ways.items()}
            run = functools.partial(konnbench, (), SETTLE_S + seconds)
            name = f"{round_trip_ms} ms line, {mode}, after {SETTLE_S} s"
            rows.append(row(name, interleaved(run, commands, rounds), settled, target))
            print_row(rows[-1])
            print_growth(rows[-1])
    return rows


def interleaved(
    run: Callable[[Sequence[str]], Report], commands: Mapping[str, Sequence[str]], rounds: int
) -> dict[str, list[Report]]:
    """Let all programs take turns, every other round in reverse, and return their reports."""
    reports: dict[str, list[Report]] = {name: [] for name in commands}
    for number in range(rounds):
        for name in list(commands)[:: 1 if number % 2 == 0 else -1]:
            reports[name].append(run(commands[name]))
    return reports


def row(
    name: str,
    reports: Mapping[str, Sequence[Report]],
    figure: Callable[[Report], float],
    target: float | None = None,
) -> Row:
    """Return a row of Mbit/s: medians, and their shares of what "direct" has."""
    samples = {program: [figure(report) for report in each] for program, each in reports.items()}
    figures = {program: statistics.median(values) for program, values in samples.items()}
    share = {program: figures[program] / figures["direct"] for program in PROGRAMS}
    used = {
        program: statistics.median(map(cpu_s_per_gib, reports[program])) for program in PROGRAMS
    }
    made: Row = {
        "name": name,
        "unit": "Mbit/s",
        "figures": figures,
        "samples": samples,
        "share": share,
        "by_second": {program: by_second(each) for program, each in reports.items()},
        "cpu_s_per_gib": used,
    }
    if target is not None:
        made |= {"target": target, "verdict": "pass" if share["ours"] >= target else "fail"}
    return made


def cpu_s_per_gib(report: Report) -> float:
    """Return what server and agent used for each GiB that was moved."""
    used = sum(report["procs"][program]["cpu_s"] for program in ("server", "agent"))
    return float(used / (report["bytes"] / 2**30))


def rate(report: Report) -> float:
    """Return the Mbit/s of the whole run."""
    return float(report["mbit_s"])


def settled(report: Report) -> float:
    """Return the mean Mbit/s of the seconds after those in which windows may grow."""
    return float(statistics.mean(report["mbit_s_by_second"][SETTLE_S:]))


def by_second(reports: Sequence[Report]) -> list[float]:
    """Return for each second the median of all rounds."""
    return [
        statistics.median(second)
        for second in zip(*(report["mbit_s_by_second"] for report in reports), strict=True)
    ]


def table(read: Row, write: Row) -> str:
    """Return the documentation's table, with Go's Cluster-Proxy and ours."""
    heads = ("Bandwidth", "Direct", "over Cluster-Proxy (Go)", "over Cluster-Proxy (ours)")

    def line(cells: Sequence[str]) -> str:
        padded = (f"{cell:^{len(head) + 4}}" for cell, head in zip(cells, heads, strict=True))
        return f"|{'|'.join(padded)}|"

    def rates(each: Row) -> list[str]:
        return [f"{each['figures'][program]:.0f} Mbps" for program in ("direct", "go", "ours")]

    rule = ["-" * (len(head) + 4) for head in heads]
    rows = (heads, rule, ["Read/Mbps", *rates(read)], ["Write/Mbps", *rates(write)])
    return "\n".join(map(line, rows))


def print_row(each: Row) -> None:
    """Print one row."""
    figures, share = each["figures"], each["share"]
    verdict = f"   {each['verdict']}: at least {each['target']:.0%}" if "target" in each else ""
    print(
        f"{each['name']:<36} direct {figures['direct']:>6.1f}   Go {figures['go']:>6.1f} ({share['go']:>4.0%})"
        f"   ours {figures['ours']:>6.1f} ({share['ours']:>4.0%}){verdict}"
        f"   CPU s/GiB {each['cpu_s_per_gib']['ours']:.2f} / {each['cpu_s_per_gib']['go']:.2f}",
        flush=True,
    )


def print_growth(each: Row) -> None:
    """Print the rate of each second."""
    for program, rates in each["by_second"].items():
        print(f"    {program:<6} by second:", *(f"{rate:.0f}" for rate in rates), flush=True)


@contextmanager
def targets(
    folder: Path, where: Sequence[str], host: str, listeners: Mapping[str, int]
) -> Generator[None]:
    """Run the far end, one behaviour a port."""
    command = [*where, str(BUILD / "target")]
    command += ["-tls-cert", str(folder / "frontend.crt"), "-tls-key", str(folder / "frontend.key")]
    for kind, port in listeners.items():
        command += ["-listen", f"{kind}={host}:{port}"]
    with running(command, folder / "target.log"):
        yield


@contextmanager
def relay(folder: Path, port: int, to: int, round_trip_ms: int) -> Generator[None]:
    """Run a long line in front of a port of this machine."""
    one_way, rate, held = f"{round_trip_ms / 2}ms", str(LINE_MBIT_S), str(LINE_BUFFER)
    command = [str(BUILD / "delay"), "-listen", f"127.0.0.1:{port}", "-to", f"127.0.0.1:{to}"]
    command += ["-delay", one_way, "-rate", rate, "-buffer", held]
    with running(command, folder / f"delay-{port}.log"):
        yield


def end(number: int, _frame: object) -> None:
    """End as after Ctrl-C, so that what was started and made is ended and removed."""
    sys.exit(128 + number)


def main() -> None:
    """Run it alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default=",".join(PARTS), help="comma list: doc, 20 and 100 (ms)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="of each figure the median; on long lines at most 3"
    )
    parser.add_argument(
        "--seconds", type=float, default=10, help=f"of one run; on long lines after {SETTLE_S} more"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--only: {unknown[0]!r} is none of {', '.join(PARTS)}")
    if options.rounds < 1 or options.seconds < 1:
        parser.error("--rounds and --seconds must be at least 1")
    signal.signal(signal.SIGTERM, end)
    build()
    with tempfile.TemporaryDirectory(prefix="clusterproxy-line-") as folder:
        rows = measure(Path(folder), options.rounds, options.seconds, parts)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
