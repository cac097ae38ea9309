"""HTTP through the user server: rates, latencies, events, and what requests cost that stay open.

The Go way is the original's: a single-use tunnel of the released Go client for each request, through the same proxy server, agent
and service proxy; from the load itself, and from what plays the original's user server.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from .cases import chosen
from .far import PROGRAMS, far_cluster, holding, settled
from .processes import cpu_seconds, resident_mib
from .programs import SOURCE, NotMeasured, konnbench
from .rounds import order
from .samples import Result, Row, Sample

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
    from pathlib import Path

    from .far import Far

PART: Final = "http"
SATURATED: Final = "1 KiB answers, 16 at once"
SATURATED_HTTP2: Final = "1 KiB answers, 16 at once, HTTP/2"
AT_REST: Final = "1 KiB answers, 50 each second"
EVENTS: Final = "events of a watch, 50 each second"
STREAM: Final = "a stream without end"
#: Where the rate of a tunnel itself is among the ways: one connection of the stock client, nothing but bytes.
TUNNEL: Final = "tunnel"
# The load itself, as the Go way, keeps nothing between requests: not for HTTP/2, nor for events that share a stream.
_ALL, _KEPT = ("without", "go", "go-user-server", "ours"), ("without", "go-user-server", "ours")
#: The ways by which each is measured.
WAYS: Final[Mapping[str, Sequence[str]]] = {
    SATURATED: _ALL,
    SATURATED_HTTP2: _KEPT,
    AT_REST: _ALL,
    EVENTS: _KEPT,
    STREAM: (TUNNEL, *_ALL),
}


def held_name(count: int, http2: bool) -> str:
    """Return a row's name."""
    return f"{count:,} watches open" + (", HTTP/2" if http2 else ", each on its own connection")


# As many streams as clients of Kubernetes have on one connection, or fewer.
_HTTP2_CLIENTS_OF: Final = 100
WATCHES: Final = 2000
QUICK_WATCHES: Final = 100


def http(rounds: int, seconds: float, watches: int, folder: Path, words: Sequence[str]) -> Iterator[Row]:
    """Measure what was asked for, through far clusters."""
    for http2 in (False, True):
        name = held_name(watches, http2)
        if chosen(PART, name, words):
            # Programs keep what they once had, so these are new.
            with _cluster(folder / f"held-{http2}") as far:
                yield _held(far, name, watches, http2)
    if not any(chosen(PART, name, words) for name in WAYS):
        return
    with _cluster(folder / "http") as far:
        # The Go way answers few, so that a short time has hardly any.
        timed = f"-duration={2 * seconds}s"
        # So many events and requests that a p99 is one.
        at_rest = f"-duration={max(4.0, 4 * seconds) if rounds > 1 else 2.0}s"
        cases: dict[str, tuple[str, list[str], str, str, int]] = {
            SATURATED: ("1k", ["-mode=rate", timed], "per_s", "1/s", 1),
            SATURATED_HTTP2: ("1k", ["-mode=rate", timed, "-http2"], "per_s", "1/s", 1),
            AT_REST: ("1k", ["-mode=open", at_rest], "p99", "ms", -1),
            EVENTS: ("events", ["-mode=events", at_rest], "p99", "ms", -1),
        }  # fmt: skip
        for name, (path, arguments, figure, unit, better) in cases.items():
            if chosen(PART, name, words):

                def measure(way: str, path: str = path, arguments: list[str] = arguments) -> Sample:
                    return _sample(far.ask(way, path, *arguments))

                yield in_turns(PART, name, measure, WAYS[name], rounds, figure, unit, better)
        if chosen(PART, STREAM, words):
            yield in_turns(
                PART, STREAM, lambda way: _stream(far, way, seconds, folder), WAYS[STREAM], rounds, "mbit_s", "Mbit/s", 1
            )


@contextmanager
def _cluster(folder: Path) -> Generator[Far]:
    folder.mkdir()
    with far_cluster(folder) as far:
        yield far


def in_turns(
    part: str,
    name: str,
    measure: Callable[[str], Sample],
    ways: Sequence[str],
    rounds: int,
    figure: str,
    unit: str,
    better: int,
) -> Row:
    """Measure each way in all rounds; whose load fails has no further samples, and says why."""
    samples: dict[str, list[Sample]] = {way: [] for way in ways}
    skipped: dict[str, str] = {}
    for number in range(rounds):
        for way in order(ways, number):
            if way in skipped:
                continue
            try:
                samples[way].append(measure(way))
            except NotMeasured as error:
                skipped[way] = str(error)
    results = {way: Result(samples=tuple(samples[way]), skipped=skipped.get(way, "")) for way in ways}
    return Row(part=part, name=name, figure=figure, unit=unit, better=better, results=results)


@contextmanager
def _used(far: Far, way: str) -> Generator[dict[str, float]]:
    """Tell, after the block, how many seconds of processor time each program of ours has used in it."""
    used: dict[str, float] = {}
    pids = far.pids if way == "ours" else {}
    before = {name: cpu_seconds(pid) for name, pid in pids.items()}
    yield used
    used |= {name: cpu_seconds(pid) - before[name] for name, pid in pids.items()}


def _sample(report: dict[str, Any]) -> Sample:
    figures = {"per_s": report["per_s"], **{name: us / 1000 for name, us in report["us"].items()}}
    return Sample(figures=figures, errors=report["errors"])


def _stream(far: Far, way: str, seconds: float, folder: Path) -> Sample:
    if way == TUNNEL:
        programs = far.cluster.programs
        files = [f"--ca={programs.ca}", f"--cert={programs.client_cert}", f"--key={programs.client_key}"]
        where = ["--server-addr", f"127.0.0.1:{programs.port}", "--target", f"loopback:{SOURCE}"]
        report = konnbench([*files, *where, "--mode", "read", "--duration", f"{seconds}s", "--warmup", "0.5s"], folder)
        return Sample(figures={"mbit_s": report["mbit_s"]}, errors=report["errors"] or {})
    with _used(far, way) as used:
        report = far.ask(way, "stream", "-mode=stream", f"-duration={seconds}s")
    each = {name: cpu / report["gib"] for name, cpu in used.items()}
    return Sample(figures={"mbit_s": report["mbit_s"]}, cpu_s_per_gib=each, errors=report["errors"])


def _held(far: Far, name: str, count: int, http2: bool) -> Row:
    """Open so many, and look what each has cost the programs that pass it on."""
    settled()
    pids = far.pids
    before = {program: resident_mib(pid) for program, pid in pids.items()}
    clients = -(-count // _HTTP2_CLIENTS_OF) if http2 else count
    options = [f"-count={count}", f"-parallel={clients}", *(["-http2"] if http2 else [])]
    try:
        with holding(far.command("ours", "watch", "-mode=hold", *options)) as report:
            settled()
            figures = {name: (resident_mib(pids[name]) - before[name]) * 1024 / count for name in PROGRAMS}
            result = Result(samples=(Sample(figures=figures, errors=report["errors"]),))
    except NotMeasured as error:
        result = Result(skipped=str(error))
    return Row(part=PART, name=name, figure="user-server", unit="KiB each", better=-1, results={"ours": result})
