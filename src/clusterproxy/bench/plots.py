"""Pictures of a report: what the direct way and the tunnel give, side by side. Needs matplotlib (extra ``bench``)."""

# pyright: basic
# matplotlib's own annotations leave too much open for the strict mode.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    Row: TypeAlias = dict[str, Any]

# Colours stand for the same in all pictures, and differ for the colour-blind as well (after Okabe and Ito).
_INK: Final = "#1f2933"
_FAINT: Final = "#d9dee4"
_QUIET: Final = "#6b7785"
_DIRECT: Final = "#a3adb8"
_TUNNEL: Final = "#0072b2"
_SECOND: Final = "#56b4e9"
_PROCESSES: Final = {"server": _TUNNEL, "agent": "#009e73", "client": "#cc79a7"}
_OTHERS: Final = ("#56b4e9", "#e69f00", "#d55e00", "#f0e442")

_STYLE: Final[dict[Any, Any]] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11.0,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 15.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 34.0,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "grid.color": _FAINT,
    "legend.frameon": False,
    "svg.hashsalt": "clusterproxy",
    "savefig.dpi": 150.0,
}
_THROUGHPUT: Final = ("read", "write", "both")
_NAMES: Final = {"both": "both ways"}
_WAYS: Final = {"direct": "direct", "reusable": "tunnel", "single-use": "single-use tunnels"}


def write_plots(document: dict[str, Any], directory: Path) -> list[Path]:
    """Write each picture that the report's *document* has figures for, as PNG and SVG; return the files."""
    rows = [row for row in document["rows"] if row["median"] is not None]
    pictures: dict[str, tuple[Callable[[Sequence[Row]], Figure], Sequence[Row]]] = {
        "throughput": (_throughput, [row for row in rows if row["workload"] in _THROUGHPUT]),
        "latency": (_latency, [row for row in rows if row.get("distribution")]),
        "cpu": (_cpu, [row for row in rows if row["workload"] in _THROUGHPUT and row["path"] == "tunnel" and row["cpu_s_per_gib"]]),
        "dials": (_dials, [row for row in rows if row["workload"] == "dial"]),
        "memory": (_memory, [row for row in rows if row.get("kib_per_tunnel")]),
    }  # fmt: skip
    written: list[Path] = []
    with rc_context(_STYLE):
        for name, (draw, found) in pictures.items():
            if found:
                figure = draw(found)
                for suffix in ("png", "svg"):
                    path = directory / f"{name}.{suffix}"
                    figure.savefig(path, metadata={"Date": None} if suffix == "svg" else None)
                    written.append(path)
    return written


def _figure(title: str, width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    return figure, axes


def _legend(axes: Axes) -> None:
    """Put the legend between title and picture, where it covers nothing."""
    handles, _ = axes.get_legend_handles_labels()
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=max(1, len(handles)), handlelength=1.2
    )


def _way(row: Row) -> str:
    return row["tunnel"] or "direct"


def _grouped(
    axes: Axes,
    rows: Sequence[Row],
    ways: dict[str, tuple[str, str]],
    show: Callable[[float], str],
    scale: float = 1.0,
) -> None:
    """Draw a group of bars for each workload and number of connections, a bar for each way."""
    groups = list(dict.fromkeys((row["workload"], row["connections"]) for row in rows))
    present = [way for way in ways if any(_way(row) == way for row in rows)]
    width = 0.8 / len(present)
    top = max(value for row in rows for value in (row["median"], *row["samples"])) / scale
    for number, way in enumerate(present):
        label, colour = ways[way]
        of_way = {(row["workload"], row["connections"]): row for row in rows if _way(row) == way}
        found = [(place, of_way[group]) for place, group in enumerate(groups) if group in of_way]
        places = [place - 0.4 + width * (number + 0.5) for place, _ in found]
        values = [row["median"] / scale for _, row in found]
        axes.bar(places, values, width * 0.92, label=label, color=colour)
        for place, value, (_, row) in zip(places, values, found, strict=True):
            samples = [one / scale for one in row["samples"]]
            if len(samples) > 1:
                axes.vlines(place, min(samples), max(samples), color=_INK, linewidth=1)
            texts = [(show(value), _INK, "normal")]
            if row["of_direct"] is not None:
                texts.append((f"{row['of_direct']:.0%}", colour, "bold"))
            for line, (text, ink, weight) in enumerate(texts):
                axes.annotate(
                    text, (place, max([value, *samples])), (0, 3 + 14 * line), textcoords="offset points",
                    ha="center", va="bottom", fontsize=10, color=ink, fontweight=weight,
                )  # fmt: skip
    workloads = list(dict.fromkeys(workload for workload, _ in groups))
    axes.set_xticks(range(len(groups)), [f"{count}" for _, count in groups])
    if len(workloads) > 1:
        for workload in workloads:
            places = [place for place, group in enumerate(groups) if group[0] == workload]
            axes.text(
                sum(places) / len(places), -0.085, _NAMES.get(workload, str(workload)), ha="center", va="top",
                transform=axes.get_xaxis_transform(), fontsize=12, fontweight="bold",
            )  # fmt: skip
            if places[0]:
                axes.axvline(places[0] - 0.5, color=_FAINT, linewidth=1)
    axes.set_xlim(-0.55, len(groups) - 0.45)
    axes.set_ylim(0, top * 1.14)
    axes.grid(axis="y")
    axes.spines["left"].set_visible(False)
    axes.text(
        -0.005, -0.02, "connections", ha="right", va="top", transform=axes.transAxes, fontsize=9, color=_QUIET
    )  # fmt: skip


def _throughput(rows: Sequence[Row]) -> Figure:
    groups = {(row["workload"], row["connections"]) for row in rows}
    figure, axes = _figure("Throughput", max(5.5, 2.0 + 1.3 * len(groups)), 5.2)
    in_gigabits = max(row["median"] for row in rows) >= 1000
    scale = 1000 if in_gigabits else 1
    ways = {
        "direct": ("direct", _DIRECT),
        "reusable": ("through the tunnel", _TUNNEL),
        "single-use": ("through single-use tunnels", _TUNNEL),
    }
    _grouped(axes, rows, ways, lambda value: f"{value:.3g}", scale)
    axes.set_ylabel("Gbit/s" if in_gigabits else "Mbit/s")
    _legend(axes)
    return figure


def _dials(rows: Sequence[Row]) -> Figure:
    counts = {row["connections"] for row in rows}
    figure, axes = _figure("New connections", max(5.5, 2.0 + 2.2 * len(counts)), 5.2)
    ways = {
        "direct": ("direct", _DIRECT),
        "reusable": ("on one tunnel", _TUNNEL),
        "single-use": ("a tunnel for each", _SECOND),
    }
    _grouped(axes, rows, ways, lambda value: f"{value:,.0f}")
    axes.set_ylabel("per second")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _legend(axes)
    return figure


def _time(microseconds: float) -> str:
    if microseconds < 1000:
        return f"{microseconds:.3g} µs"
    return f"{microseconds / 1000:.3g} ms"


def _latency(rows: Sequence[Row]) -> Figure:
    """Draw how many round trips took no longer than a time: alone, and below it beside a busy stream."""
    names = {"latency": "alone", "beside": "beside a busy stream of the same agent"}
    shown = [workload for workload in names if any(row["workload"] == workload for row in rows)]
    figure = Figure(figsize=(9, 1.4 + 3.1 * len(shown)), layout="constrained")
    panels: list[Axes] = []
    for place, workload in enumerate(shown, 1):
        axes = figure.add_subplot(len(shown), 1, place, sharex=panels[0] if panels else None)
        panels.append(axes)
        for row in rows:
            if row["workload"] == workload:
                _distribution(axes, row)
        axes.set_ylim(0, 109)
        axes.set_yticks([0, 25, 50, 75, 99])
        axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        axes.grid(axis="both")
        axes.set_title(names[workload], fontsize=12, pad=9)
    figure.suptitle("Round trip of 64 bytes", x=0.01, ha="left", fontsize=15, fontweight="bold")
    panels[0].legend(loc="lower right", bbox_to_anchor=(1.01, 1.0), ncols=2, handlelength=1.2)
    last = panels[-1]
    last.set_xscale("log")
    last.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _time(value)))
    last.xaxis.set_minor_formatter(NullFormatter())
    low, high = last.get_xlim()
    # Room for the figures at either side.
    last.set_xlim(low / 1.6, high * 1.8)
    for axes in panels[:-1]:
        axes.tick_params(labelbottom=False)
    figure.supylabel("of all round trips", fontsize=11)
    return figure


def _distribution(axes: Axes, row: Row) -> None:
    straight = row["path"] == "direct"
    colour = _DIRECT if straight else _TUNNEL
    # Up to p99: the slowest of thousands says more about the machine.
    times = row["distribution"][:100]
    label = "direct" if straight else "through the tunnel"
    axes.plot(times, range(100), color=colour, linewidth=2.6, label=label)
    for percent in (50, 99):
        axes.plot(times[percent], percent, "o", color=colour, markersize=6)
        axes.annotate(
            _time(times[percent]), (times[percent], percent), (-8 if straight else 8, 0), textcoords="offset points",
            ha="right" if straight else "left", va="center", fontsize=10, color=_INK,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )  # fmt: skip


def _processes(rows: Sequence[Row], field: str) -> dict[str, str]:
    names = list(dict.fromkeys(name for row in rows for name in row[field]))
    # In the order of the way, which is not that in which they were named.
    names.sort(key=lambda name: [*_PROCESSES].index(name) if name in _PROCESSES else -1)
    others = [name for name in names if name not in _PROCESSES]
    colours = {name: _OTHERS[number % len(_OTHERS)] for number, name in enumerate(others)}
    return {name: _PROCESSES.get(name) or colours[name] for name in names}


def _stacked(axes: Axes, rows: Sequence[Row], field: str, labels: Sequence[str]) -> None:
    """Draw a bar for each row, made up of the processes' parts."""
    ends = [0.0] * len(rows)
    totals = [sum(max(0.0, value) for value in row[field].values()) for row in rows]
    most = max(totals) or 1.0
    for name, colour in _processes(rows, field).items():
        parts = [max(0.0, row[field].get(name, 0.0)) for row in rows]
        axes.barh(labels, parts, 0.66, ends, label=name, color=colour)
        for place, (end, part) in enumerate(zip(ends, parts, strict=True)):
            if part > most * 0.07:
                axes.text(end + part / 2, place, f"{part:.3g}", ha="center", va="center", color="white", fontsize=10)  # fmt: skip
        ends = [end + part for end, part in zip(ends, parts, strict=True)]
    for place, total in enumerate(totals):
        axes.text(total + most * 0.015, place, f"{total:.3g}", ha="left", va="center", fontweight="bold")  # fmt: skip
    axes.set_xlim(0, most * 1.1)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.spines["bottom"].set_visible(False)
    _legend(axes)


def _cpu(rows: Sequence[Row]) -> Figure:
    figure, axes = _figure("CPU time for a GiB through the tunnel", 9, 2.2 + 0.5 * len(rows))
    labels = [
        f"{_NAMES.get(row['workload'], row['workload'])}, {row['connections']}" for row in rows
    ]
    _stacked(axes, rows, "cpu_s_per_gib", labels)
    axes.set_xlabel("seconds")
    return figure


def _memory(rows: Sequence[Row]) -> Figure:
    figure, axes = _figure("Memory of an idle tunnel", 9, 2.2 + 0.5 * len(rows))
    _stacked(axes, rows, "kib_per_tunnel", [f"{row['connections']:,} tunnels" for row in rows])
    axes.set_xlabel("KiB")
    return figure
