"""What tunnels cost: memory of an idle one, growth to thousands, and what is left when as many come again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from .cases import MAIN, chosen
from .contenders import PAIRS
from .processes import peak_mib, reset_peak, resident_mib
from .programs import ECHO, NotMeasured, load, pair
from .rounds import order
from .samples import Result, Row, Sample

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

PART: Final = "tunnels"
COUNTS: Final = (1, 10, 100, 1000, 5000)
READY: Final = "resident when ready"
IDLE: Final = "memory of an idle single-use tunnel"
# Opened at a time; what a fleet of impatient clients does is a case of "dials".
ABREAST: Final = 20
PORT: Final = 19610
_TO: Final = ["--target", f"127.0.0.1:{ECHO}", "--parallel", str(ABREAST)]


def memory(rounds: int, tunnels: int, folder: Path, words: Sequence[str]) -> Iterator[Row]:
    """Measure fresh pairs: resident when ready, and each idle tunnel's share."""
    if not chosen(PART, f"{IDLE}, {READY}", words) or not tunnels:
        return
    ready: dict[str, list[Sample]] = {key: [] for key in MAIN}
    idle: dict[str, list[Sample]] = {key: [] for key in MAIN}
    skipped: dict[str, str] = {}
    for number in range(rounds):
        for key in order(MAIN, number):
            (server, agent), _, mode, _ = PAIRS[key]
            with pair(f"memory-{key}", server, agent, PORT, folder, mode) as where:
                programs = {"server": where.server.pid, "agent": where.agent.pid}
                ready[key].append(Sample(figures={name: resident_mib(pid) for name, pid in programs.items()}))
                args = ["--mode", "many", "--count", str(tunnels), "--hold", "2s", *_TO]
                try:
                    report = load(where, args, folder)
                except NotMeasured as error:
                    skipped[key] = str(error)
                    continue
                figures = {name: report["procs"][name]["kib_per_conn_idle"] for name in programs}
                idle[key].append(Sample(figures=figures, errors=report["errors"] or {}))
    for name, unit, found in ((READY, "MiB", ready), (IDLE, "KiB", idle)):
        results = {key: Result(samples=tuple(found[key]), skipped=skipped.get(key, "")) for key in MAIN}
        yield Row(part=PART, name=name, figure="server", unit=unit, better=-1, results=results)


def growth(seconds: float, folder: Path, words: Sequence[str], counts: Sequence[int] = COUNTS) -> Iterator[Row]:
    """Open more and more tunnels, each pair in one sweep."""
    if not chosen(PART, "growth", words):
        return
    sweeps: dict[str, list[Any]] = {}
    skipped: dict[str, str] = {}
    listed = ",".join(map(str, counts))
    args = ["--mode", "grow", "--counts", listed, "--hold", "1s", "--duration", f"{seconds}s", *_TO]
    for key in MAIN:
        (server, agent), _, mode, _ = PAIRS[key]
        try:
            with pair(f"growth-{key}", server, agent, PORT, folder, mode) as where:
                sweeps[key] = load(where, args, folder)["steps"]
        except NotMeasured as error:
            skipped[key] = str(error)
    for number, count in enumerate(counts):
        results = {
            key: Result(samples=(_step(sweeps[key][number]),)) if key in sweeps else Result(skipped=skipped[key])
            for key in MAIN
        }
        yield Row(
            part=PART, name=step_name(count), figure="dials_s", unit="1/s", better=1, results=results,
            shown=("p50", "server_mib", "agent_mib"),
        )  # fmt: skip


def again(count: int, folder: Path, words: Sequence[str]) -> Iterator[Row]:
    """Open so many tunnels at our programs, close them, and open as many again: how do the peaks compare?"""
    name = again_name(count)
    if not chosen(PART, name, words):
        return
    (server, agent), _, mode, _ = PAIRS["ours"]
    figures: dict[str, float] = {}
    errors: dict[str, int] = {}
    with pair("again-ours", server, agent, PORT, folder, mode) as where:
        programs = {"server": where.server.pid, "agent": where.agent.pid}
        for turn in ("first", "second"):
            reset_peak(programs.values())
            report = load(where, ["--mode", "many", "--count", str(count), "--hold", "1s", *_TO], folder)
            errors |= report["errors"] or {}
            figures |= {f"{program}_{turn}_mib": peak_mib(pid) for program, pid in programs.items()}
    for program in programs:
        figures[program] = figures[f"{program}_second_mib"] / figures[f"{program}_first_mib"]
    result = Result(samples=(Sample(figures=figures, errors=errors),))
    yield Row(part=PART, name=name, figure="server", unit="of the first peak", better=-1, results={"ours": result})


def again_name(count: int) -> str:
    """Return a row's name."""
    return f"{count:,} tunnels, and again as many"


def step_name(count: int) -> str:
    """Return a row's name."""
    return f"with {count:,} open"


def _step(step: Any) -> Sample:  # noqa: ANN401 - JSON
    figures = {"dials_s": step["dials_s"], "open_s": step["open_s"], "open": step["open"]}
    if "us" in step:
        figures |= {"p50": step["us"]["p50"], "p99": step["us"]["p99"]}
    for name in ("server", "agent"):
        figures |= {
            f"{name}_mib": step["procs"][name]["rss_kb"] / 1024,
            f"{name}_kib_each": step["procs"][name]["kib_per_conn"],
        }
    return Sample(figures=figures)
