"""Measure our programs beside the Go ones and the field's: the same load, in turn, on the same machine.

Each figure is the median of the rounds, in which the contenders take turns, and what counts are the
ratios: absolute figures depend on the machine. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import resource
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import attrs

from . import agents, footprint, growth, isolation, kubectl, line, portforward, userserver
from .cases import PARTS, cases, chosen
from .contenders import PORTS, TLS_PORTS, Contenders
from .machine import machine
from .plots import draw
from .programs import BUILD, NotMeasured, build, make_certificates, running
from .report import block, document, machine_line, verdict_table
from .rounds import interleaved
from .samples import Row, Table
from .verdicts import of_line, verdicts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# A long line needs 10 s before it is measured, so that it gets less of the time than its own program gives it.
LINE_ROUNDS, LINE_SECONDS = 3, 2.0
ISOLATION_SECONDS: Final = 5
# Bytes, a quarter of the sink's own: fine enough for many connections, and no load.
FINE_ACKNOWLEDGEMENTS: Final = 256 << 10


@attrs.frozen(kw_only=True)
class Options:
    """What was asked for on the command line."""

    rounds: int
    seconds: float
    tunnels: int
    isolation_rounds: int
    only: str
    quick: bool
    plots: Path
    json: Path | None

    @property
    def words(self) -> list[str]:
        """Of `only`."""
        return [word for word in self.only.split(",") if word]


def main() -> None:
    """Run it."""
    options = parse(sys.argv[1:])
    # So that what was started is ended, as after Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Thousands of tunnels need as many descriptors, at every program.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    begin = time.monotonic()
    build()
    found = machine()
    print(machine_line(found))
    print(
        f"median of {options.rounds} interleaved rounds of {options.seconds:g} s; mutual TLS and the stock Go client if not said otherwise\n"
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="clusterproxy-bench-")))
        make_certificates(folder)
        for name, command in targets(folder).items():
            stack.enter_context(running(command, folder / f"{name}.log"))
        rows: list[Row] = []
        on_lines: list[dict[str, Any]] = []
        try:
            for row in measure(options, folder):
                rows.append(row)
                print(f"[{(time.monotonic() - begin) / 60:.1f} min] {block(row)}\n", flush=True)
            on_lines = lines(options, folder)
        except KeyboardInterrupt:
            print("\nInterrupted: here is what was measured.")
        print()
    table = Table(rows)
    judged = [*verdicts(table), *of_line(on_lines)]
    print(verdict_table(judged))
    took = time.monotonic() - begin
    if options.json:
        shown = attrs.asdict(options, filter=lambda attribute, _: attribute.name not in ("plots", "json"))
        report = document(found, shown, took, rows, on_lines, judged)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    caption = f"{found['processor']}, {found['cores']} cores; {found['python']}; {found['go']}; medians of {options.rounds}; {found['commit']}"
    files = draw(options.plots, table, judged, on_lines, caption)
    print(
        f"\n{took / 60:.1f} minutes; {len(files)} plots in {options.plots}"
        + (f"; all figures in {options.json}" if options.json else "")
    )


def parse(words: Sequence[str]) -> Options:
    """Return the options; ends with what is wrong if something is."""
    parser = argparse.ArgumentParser(prog="make bench BENCH_ARGS=...", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, help="of each case [5]")
    parser.add_argument("--seconds", type=float, help="of one measurement [1.25]")
    parser.add_argument("--tunnels", type=int, help="for the memory of idle tunnels; 0: leave it out [1000]")
    parser.add_argument("--isolation-rounds", type=int, help="with one connection unread; 0: leave it out [3]")
    parser.add_argument(
        "--only",
        default="",
        help=f"comma list of parts ({', '.join(PARTS)}) and of words that are in names of cases",
    )
    parser.add_argument("--quick", action="store_true", help="everything once and shortly, to see that it runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path, default=BUILD / "plots", metavar="FOLDER")
    given = parser.parse_args(words)
    quick = given.quick
    defaults: dict[str, tuple[Any, Any]] = {
        "rounds": (5, 1),
        "seconds": (1.25, 0.5),
        "tunnels": (1000, 200),
        "isolation_rounds": (3, 1),
    }
    chosen_values = {
        name: both[quick] if getattr(given, name) is None else getattr(given, name) for name, both in defaults.items()
    }
    options = Options(**chosen_values, only=given.only, quick=quick, plots=given.plots, json=given.json)
    if options.rounds < 1 or options.seconds <= 0 or options.tunnels < 0 or options.isolation_rounds < 0:
        parser.error("--rounds must be at least 1, --seconds above 0, the others not below 0")
    return options


def measure(options: Options, folder: Path) -> Iterator[Row]:
    """Measure all that was asked for but the lines; a part that cannot be had says why on standard error."""
    words, quick = options.words, options.quick
    # First, for its pairs must be new and have the machine to themselves.
    yield from _part("tunnels", lambda: growth.memory(options.rounds, options.tunnels, folder, words))
    counts = growth.COUNTS[:3] if quick else growth.COUNTS
    yield from _part("tunnels", lambda: growth.growth(options.seconds, folder, words, counts))
    yield from _part("tunnels", lambda: growth.again(counts[-1], folder, words))
    fleets = agents.COUNTS[:3] if quick else agents.COUNTS
    yield from _part(
        "agents", lambda: agents.agents(options.seconds, folder, words, fleets, 1 if quick else agents.IDLE_SECONDS)
    )
    with ExitStack() as stack:
        contenders = Contenders(folder, stack)
        for case in cases():
            if case.matches(words):
                yield interleaved(case, contenders.get, options.rounds, options.seconds)
        seconds = 2 if quick else ISOLATION_SECONDS
        yield from _part(
            "isolation", lambda: isolation.isolation(contenders, options.isolation_rounds, seconds, folder, words)
        )
    # When the pairs have ended, for these are more programs than any other part has.
    yield from _part(
        portforward.PART, lambda: portforward.port_forward(options.rounds, options.seconds, folder, words)
    )
    watches = userserver.QUICK_WATCHES if quick else userserver.WATCHES
    yield from _part(
        userserver.PART, lambda: userserver.http(options.rounds, options.seconds, watches, folder, words)
    )
    pods = kubectl.QUICK_PODS if quick else kubectl.PODS
    yield from _part(kubectl.PART, lambda: kubectl.kubectl(options.rounds, pods, folder, words))
    idle = 1.0 if quick else footprint.IDLE_SECONDS
    yield from _part(footprint.PART, lambda: footprint.footprint(options.rounds, idle, folder, words))


def _part(name: str, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    try:
        yield from rows()
    except NotMeasured as error:
        print(f"{name}: skipped: {error}\n", file=sys.stderr, flush=True)


def lines(options: Options, folder: Path) -> list[dict[str, Any]]:
    """Measure lines that have a limit or are long, when that was asked for; they print their rows themselves."""
    if not chosen("line", "", options.words):
        return [{"name": "lines of 1 Gbit/s and 100 ms", "skipped": "not asked for"}]
    rounds, seconds = (1, 1.0) if options.quick else (min(options.rounds, LINE_ROUNDS), LINE_SECONDS)
    return line.measure(folder, rounds, seconds, long_rounds=1)


def targets(folder: Path) -> dict[str, list[str]]:
    """Return the commands of the services at the far end, in plain text and over TLS."""

    def command(services: dict[str, int], *more: str) -> list[str]:
        listen = [word for kind, port in services.items() for word in ("-listen", f"{kind}=127.0.0.1:{port}")]
        return [str(BUILD / "target"), *more, *listen]

    plain: dict[str, int] = {kind: port for kind, port in PORTS.items() if kind != "fine-sink"}
    over_tls = {f"tls+{kind}": port for kind, port in TLS_PORTS.items()}
    certificate = ("-tls-cert", str(folder / "frontend.crt"), "-tls-key", str(folder / "frontend.key"))
    return {
        "target": command(plain | over_tls, *certificate),
        "fine-target": command({"sink": PORTS["fine-sink"]}, "-ack-every", str(FINE_ACKNOWLEDGEMENTS)),
    }


if __name__ == "__main__":
    main()
