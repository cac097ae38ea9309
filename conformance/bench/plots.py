"""The plots: what was measured, to be understood without words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl

mpl.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from . import agents, growth
from .cases import LABELS, read_name, write_name
from .samples import GIB_PER_GBIT

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .samples import Result, Row, Table
    from .verdicts import Verdict

OURS, GO, FIELD, GOOD, BAD = "#2a6fbb", "#e08a2c", "#9aa5b1", "#2e8b57", "#c0392b"
PROGRAMS: Final = {"server": "#2a6fbb", "agent": "#7fb0e3", "client": "#c9ced6"}
STYLE: Final[dict[Any, Any]] = {
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "svg.hashsalt": "clusterproxy",
}
# From the field to ours; the direct ways, which would dwarf the rest, are told in words.
TUNNELS: Final = ("ssh", "rathole", "own", "ours", "go", "ours-connect", "go-connect")
DIRECT: Final = ("direct", "direct-tls")
BY_LOAD: Final = (*DIRECT, *TUNNELS)


def draw(
    folder: Path, table: Table, verdicts: Sequence[Verdict], line: Sequence[Mapping[str, Any]], caption: str
) -> list[Path]:
    """Draw what there is to draw, as PNG and SVG, and return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    plots: dict[str, Callable[[], Figure | None]] = {
        "throughput": lambda: throughput(table),
        "cpu": lambda: cpu(table),
        "sizes": lambda: sizes(table),
        "latency": lambda: latency(table),
        "dials": lambda: dials(table),
        "tunnels": lambda: tunnels(table),
        "agents": lambda: fleet(table),
        "line": lambda: shares(line),
        "line-growth": lambda: by_second(line),
        "verdicts": lambda: overview([verdict for verdict in verdicts if verdict.step == "C"], "Targets"),
        "verdicts-http": lambda: overview([verdict for verdict in verdicts if verdict.step == "F"], "Targets of HTTP"),
        "verdicts-before": lambda: overview(
            [verdict for verdict in verdicts if verdict.step in {"A", "B"}], "Targets of earlier steps"
        ),
    }
    files: list[Path] = []
    with plt.rc_context(STYLE):
        for name, plot in plots.items():
            figure = plot()
            if figure is None:
                continue
            figure.supxlabel(caption, x=0.995, ha="right", fontsize=6.5, color="#7b8794")
            for kind in ("png", "svg"):
                file = folder / f"{name}.{kind}"
                # Without a date two runs of the same figures make the same file.
                figure.savefig(file, metadata={"Date": None} if kind == "svg" else None)
                files.append(file)
            plt.close(figure)
    return files


def throughput(table: Table) -> Figure | None:
    """Rates side by side with the field, read and write, with 1 and 8 connections."""
    cases = [
        ("read", 1, read_name(1)),
        ("write", 1, write_name(32768, 1)),
        ("read", 8, read_name(8)),
        ("write", 8, write_name(32768, 8)),
    ]
    rows = [
        (f"{mode}, {count} connection" + "s" * (count > 1), row)
        for mode, count, name in cases
        if (row := table.row("bulk", name))
    ]
    if not rows:
        return None
    figure, grid = plt.subplots(
        (len(rows) + 1) // 2, 2, figsize=(10.5, 3.3 * ((len(rows) + 1) // 2) + 0.5), squeeze=False, layout="constrained"
    )
    for axes, (title, row) in zip(grid.flat, rows, strict=False):
        _bars(axes, row, TUNNELS, lambda value: f"{value / 1000:.2f}", "Gbit/s" + _direct(row, 1000), scale=1000)
        axes.set_title(title)
    _hide_rest(grid.flat, len(rows))
    figure.suptitle("Throughput on one machine (higher is better)", fontweight="bold")
    return figure


def cpu(table: Table) -> Figure | None:
    """CPU seconds per GiB, stacked by process."""
    cases = [
        ("read", read_name(1)),
        ("read, 8 connections", read_name(8)),
        ("write", write_name(32768, 1)),
        ("write, 8 connections", write_name(32768, 8)),
    ]
    rows = [(title, row) for title, name in cases if (row := table.row("bulk", name))]
    if not rows:
        return None
    figure, grid = plt.subplots(
        (len(rows) + 1) // 2, 2, figsize=(10.5, 3 * ((len(rows) + 1) // 2) + 0.7), squeeze=False, layout="constrained"
    )
    for axes, (title, row) in zip(grid.flat, rows, strict=False):
        found = [(key, row.results[key]) for key in BY_LOAD if key in row.results and row.results[key].programs()]
        found.reverse()
        left = [0.0] * len(found)
        for program, colour in PROGRAMS.items():
            values = [result.cpu(program) or 0.0 for _, result in found]
            axes.barh(range(len(found)), values, left=left, color=colour, label=program, height=0.7)
            left = [done + value for done, value in zip(left, values, strict=True)]
        for place, total in enumerate(left):
            axes.text(total, place, f" {total:.1f}", va="center", fontsize=8)
        axes.set_yticks(range(len(found)), [LABELS[key] for key, _ in found])
        axes.set_title(title)
        axes.set_xlabel(f"CPU seconds per GiB (× {GIB_PER_GBIT:.3f}: cores per Gbit/s)")
        axes.grid(axis="x")
        axes.margins(x=0.1)
    _hide_rest(grid.flat, len(rows))
    figure.legend(
        *grid.flat[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, fontsize=9, frameon=False
    )
    figure.suptitle("Processor time to move 1 GiB, by process (lower is better)", fontweight="bold")
    return figure


def sizes(table: Table) -> Figure | None:
    """The rate of writes by their size."""
    rows = table.part("sizes")
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    names = [row.name.removeprefix("write ") for row in rows]
    for key, colour in (("ours", OURS), ("go", GO)):
        rates = [(row.results[key].median("mbit_s") or 0) / 1000 for row in rows if key in row.results]
        if len(rates) == len(rows):
            axes.plot(names, rates, "o-", color=colour, label=LABELS[key], linewidth=2)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("Gbit/s")
    axes.set_xlabel("bytes of one write")
    axes.grid(axis="y")
    axes.legend(frameon=False)
    axes.set_title("Writes by their size, one connection (higher is better)")
    return figure


def latency(table: Table) -> Figure | None:
    """Round trips: p50 and p99 alone, and p50 beside a busy stream."""
    alone = table.row("latency", "round trip 64 B")
    company = table.part("beside")
    if alone is None and not company:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    left.set_title("alone: p50 (bar) and p99 (line)")
    if alone is not None:
        _bars(left, alone, BY_LOAD, lambda value: f"{value:.0f}", "µs", tick="p99")
    names, values, colours = [], [], []
    for row in company:
        for key in sorted(row.results, key=list(LABELS).index):
            if (p50 := row.results[key].median("p50")) is not None:
                names.append(f"{row.name.rpartition('stream, ')[2]}\n{LABELS[key].partition(',')[0]}")
                values.append(p50 / 1000)
                colours.append(_colour(key))
    right.barh(range(len(names)), values, color=colours, height=0.7)
    right.set_yticks(range(len(names)), names, fontsize=8)
    right.invert_yaxis()
    for place, value in enumerate(values):
        right.text(value, place, f" {value:.2f}", va="center", fontsize=8)
    right.axvline(2, color=GOOD, linestyle="--", linewidth=1)
    right.set_xlabel("ms (dashed: the target, at most 2 ms)")
    right.margins(x=0.16)
    right.grid(axis="x")
    right.set_title("beside a busy stream of the same agent: p50")
    figure.suptitle("Round trip of 64 bytes (lower is better)", fontweight="bold")
    return figure


def dials(table: Table) -> Figure | None:
    """Connections per second, each way."""
    rows = table.part("dials")
    if not rows:
        return None
    figure, grid = plt.subplots(
        (len(rows) + 1) // 2, 2, figsize=(10.5, 2.2 * ((len(rows) + 1) // 2) + 0.8), squeeze=False, layout="constrained"
    )
    for axes, row in zip(grid.flat, rows, strict=False):
        keys = sorted(set(row.results) - set(DIRECT), key=list(LABELS).index)
        _bars(axes, row, keys, lambda value: f"{value:,.0f}", "per second" + _direct(row, 1))
        axes.set_title(row.name)
    _hide_rest(grid.flat, len(rows))
    figure.suptitle("Connections opened, used and closed per second (higher is better)", fontweight="bold")
    return figure


def tunnels(table: Table) -> Figure | None:
    """Growth from one tunnel to thousands."""
    rows = [row for row in table.part(growth.PART) if row.name.startswith("with ")]
    figures = (("server_mib", "memory of the server", "MiB"), ("agent_mib", "memory of the agent", "MiB"),
               ("dials_s", "new tunnels, one at a time", "per second"), ("p50", "round trip p50", "µs"))  # fmt: skip
    return _curves(rows, figures, "open tunnels", "Growth of open single-use tunnels, all idle but one")


def fleet(table: Table) -> Figure | None:
    """Growth from one agent to hundreds."""
    figures = (("server_mib", "memory of the server", "MiB"), ("idle", "processor time while idle", "millicores"),
               ("dials_s", "new tunnels, one at a time", "per second"))  # fmt: skip
    return _curves(table.part(agents.PART), figures, "connected agents", "Growth of connected agents")


def shares(line: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Shares of the direct rate on lines with a limit or a delay."""
    rows = [row for row in line if "figures" in row]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(9, 0.75 * len(rows) + 1.6), layout="constrained")
    for number, (key, colour) in enumerate((("ours", OURS), ("go", GO))):
        shares = [row["share"][key] * 100 for row in rows]
        places = [place + (number - 0.5) * 0.38 for place in range(len(rows))]
        axes.barh(places, shares, height=0.36, color=colour, label=LABELS[key])
        for place, share in zip(places, shares, strict=True):
            axes.text(share, place, f" {share:.0f}", va="center", fontsize=8)
    for place, row in enumerate(rows):
        if "target" in row:
            axes.plot([row["target"] * 100] * 2, [place - 0.42, place + 0.42], color=GOOD, linewidth=2)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("% of the direct rate; green: target")
    axes.grid(axis="x")
    axes.margins(x=0.1)
    figure.legend(loc="outside lower left", ncols=2, frameon=False)
    figure.suptitle("Lines of 1 Gbit/s, and long ones (higher is better)", fontweight="bold")
    return figure


def by_second(line: Sequence[Mapping[str, Any]]) -> Figure | None:
    """How the rate grows on long lines."""
    rows = [row for row in line if "by_second" in row and " ms line" in row["name"]]
    if not rows:
        return None
    figure, grid = plt.subplots(
        (len(rows) + 1) // 2, 2, figsize=(10, 2.7 * ((len(rows) + 1) // 2) + 0.6), squeeze=False, layout="constrained"
    )
    for axes, row in zip(grid.flat, rows, strict=False):
        for key, colour in (("direct", FIELD), ("ours", OURS), ("go", GO)):
            rates = row["by_second"][key]
            axes.plot(
                range(1, len(rates) + 1),
                rates,
                "o-",
                color=colour,
                label="direct TLS" if key == "direct" else LABELS[key],
                markersize=3,
            )
        axes.set_title(row["name"].partition(", after")[0])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("second")
        axes.set_ylabel(row["unit"])
        axes.grid()
    _hide_rest(grid.flat, len(rows))
    figure.legend(*grid.flat[0].get_legend_handles_labels(), loc="outside lower left", ncols=3, frameon=False)
    figure.suptitle("Rate of one connection on long lines of 1 Gbit/s, second by second", fontweight="bold")
    return figure


def overview(verdicts: Sequence[Verdict], title: str) -> Figure | None:
    """How far each target is surpassed or missed."""
    measured = [(verdict, margin) for verdict in verdicts if (margin := verdict.margin) is not None]
    if not measured:
        return None
    margins = [min(max(margin, 0.1), 10) for _, margin in measured]
    figure, axes = plt.subplots(figsize=(10, 0.235 * len(measured) + 1.5), layout="constrained")
    for place, ((verdict, _), shown) in enumerate(zip(measured, margins, strict=True)):
        colour = GOOD if verdict.status == "pass" else BAD
        axes.barh(place, shown - 1, left=1, color=colour, height=0.7)
        axes.text(shown, place, f" {verdict.value:.2f} " if verdict.value is not None else "", va="center",
                  ha="left" if shown >= 1 else "right", fontsize=7.5, color=colour)  # fmt: skip
    axes.axvline(1, color="#323f4b", linewidth=1.2)
    axes.set_xscale("log")
    axes.set_xlim(min(0.4, *margins) / 1.35, max(2.5, *margins) * 1.35)
    _plain_log(axes)
    axes.set_yticks(range(len(measured)), [f"{verdict.name}   {verdict.text}" for verdict, _ in measured], fontsize=7.5)
    axes.set_ylim(len(measured) - 0.4, -0.6)
    axes.grid(axis="x", which="both")
    axes.set_xlabel("measured against its target (1: just reached); at each bar what was measured", fontsize=8.5)
    passed = sum(verdict.status == "pass" for verdict, _ in measured)
    figure.suptitle(f"{title}: {passed} of {len(measured)} reached", fontweight="bold")
    return figure


def _bars(axes: Axes, row: Row, keys: Sequence[str], text: Callable[[float], str], unit: str, *, scale: float = 1, tick: str = "") -> None:  # fmt: skip
    """Bars of a row's figure; with `tick` a second figure as a mark."""
    found: list[tuple[str, Result, float]] = []
    for key in keys:
        result = row.results.get(key)
        if result is not None and (value := result.median(row.figure)) is not None:
            found.append((key, result, value))
    values = [value / scale for *_, value in found]
    bars = axes.barh(range(len(found)), values, color=[_colour(key) for key, *_ in found], height=0.7)
    axes.set_yticks(range(len(found)), [LABELS[key] for key, *_ in found])
    axes.set_xlabel(unit)
    axes.grid(axis="x")
    for place, (bar, (_, result, value)) in enumerate(zip(bars, found, strict=True)):
        end, label = bar.get_width(), text(value)
        mark = result.median(tick) if tick else None
        if mark is not None:
            axes.plot([mark / scale] * 2, [place - 0.3, place + 0.3], color="#323f4b", linewidth=1.5)
            end, label = max(end, mark / scale), f"{label} / {text(mark)}"
        axes.text(end, place, f" {label}", va="center", fontsize=8)
    axes.margins(x=0.16)
    # A single bar is no taller than one of several.
    axes.set_ylim(max(len(found), 3) - 0.4, -0.6)


def _direct(row: Row, scale: float) -> str:
    """What the direct ways have, in words."""
    rates = [
        f"{LABELS[key]} {value / scale:,.{1 if scale > 1 else 0}f}"
        for key in DIRECT
        if key in row.results and (value := row.results[key].median(row.figure)) is not None
    ]
    return f" ({', '.join(rates)})" if rates else ""


def _curves(rows: Sequence[Row], figures: Sequence[tuple[str, str, str]], across: str, title: str) -> Figure | None:
    if not rows:
        return None
    figure, grid = plt.subplots(1, len(figures), figsize=(3.4 * len(figures) + 0.5, 3.6), layout="constrained")
    counts = [_count(row.name) for row in rows]
    for axes, (name, heading, unit) in zip(grid, figures, strict=True):
        for key, colour in (("ours", OURS), ("go", GO)):
            found = [
                (count, value) for count, row in zip(counts, rows, strict=True)
                if key in row.results and (value := row.results[key].median(name)) is not None
            ]  # fmt: skip
            if found:
                axes.plot(*zip(*found, strict=True), "o-", color=colour, label=LABELS[key], linewidth=2)
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.set_xticks(counts, [f"{count:,}" for count in counts], fontsize=8)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(heading, fontsize=10)
        axes.set_ylabel(unit)
        axes.set_xlabel(across)
        axes.grid()
    grid[0].legend(frameon=False)
    figure.suptitle(title, fontweight="bold")
    return figure


def _count(name: str) -> int:
    """The number in a row's name."""
    return int("".join(letter for letter in name if letter.isdigit()))


def _colour(key: str) -> str:
    return OURS if key.startswith(("ours", "own")) else GO if key.startswith("go") else FIELD


def _plain_log(axes: Axes) -> None:
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _hide_rest(axes: Any, used: int) -> None:  # noqa: ANN401 - numpy's iterator
    for unused in list(axes)[used:]:
        unused.set_visible(False)
