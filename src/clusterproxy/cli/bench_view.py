"""How ``clusterproxy bench`` looks on a terminal: a bar while it runs, a table of what came of it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import attrs
import trio
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from clusterproxy.bench.report import Row

from .outcome import plain

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Sequence

    from rich.console import JustifyMethod, RenderableType

    from clusterproxy.bench.plan import Case, Way, Workload
    from clusterproxy.bench.report import Report

# The bar is drawn by the process that makes the load: seldom.
_REDRAW_S: Final = 0.5

# Above the names of processes.
_CPU: Final = "CPU s/GiB"
_MEMORY: Final = "MiB"

_TITLES: Final[dict[Workload, str]] = {
    "idle": "idle tunnel",
    "read": "read",
    "write": "write",
    "both": "both ways",
    "latency": "round trip",
    "beside": "beside a busy stream",
    "dial": "dials",
}
_WAYS: Final[dict[Way, str]] = {
    "direct": "",
    "reusable": "reusable tunnel",
    "single-use": "single-use tunnels",
}


def title(case: Case, *parts: str) -> str:
    """Return what a person calls a case."""
    return ", ".join((_TITLES[case.workload], *parts))


@attrs.define
class Bar:
    """What the bar shows; nothing without a terminal."""

    progress: Progress | None = None

    def tell(self, text: str, done: int) -> None:
        """Show what is measured now, and how many cases are done."""
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], description=text, completed=done)


@contextlib.asynccontextmanager
async def progress_bar(total: int) -> AsyncGenerator[Bar]:
    """Show a bar on stderr in the block, if that is a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Bar()
        return
    progress = Progress(
        TextColumn("{task.description:<32}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
    )

    async def redraw() -> None:
        while True:
            progress.refresh()
            await trio.sleep(_REDRAW_S)

    with progress:
        progress.add_task("starting", total=total)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(redraw)
            yield Bar(progress)
            nursery.cancel_scope.cancel()


def _number(value: float | None) -> str:
    if value is None:
        return "failed"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _share(case: Case, tunnel: float | None, direct: float | None) -> str:
    if not tunnel or not direct:
        return ""
    return f"{tunnel / direct:.0%}" if case.more_is_better else f"x {tunnel / direct:.1f}"


def _figures(report: Report) -> Iterator[dict[str, str]]:
    """Yield the lines of the table, by the names of their columns: a figure, directly and through the tunnel."""
    paired = [report.direct(row) for row in report.rows]
    for row in report.rows:
        if row in paired:
            continue  # it is in the line of the tunnel
        case, straight = row.case, report.direct(row)
        if case.way == "direct":
            # Interrupted before the tunnel's turn.
            row, straight = Row(case), row
        parts = {"p50": 0.5, "p90": 0.9, "p99": 0.99} if case.unit == "µs" else {"": None}
        for name, part in parts.items():
            tunnel, direct = (
                None if one is None else one.median if part is None else one.round_trip(part)
                for one in (row, straight)
            )
            yield {
                "WORKLOAD": _name(case, name),
                "AT ONCE": str(case.connections),
                "DIRECT": _number(direct) if straight else "",
                "TUNNEL": _number(tunnel) if row.samples else "",
                "": case.unit,
                "OF DIRECT": _share(case, tunnel, direct),
            }


def _costs(report: Report) -> Iterator[dict[str, str]]:
    """Yield the lines of the table of what the tunnel's processes have used."""
    for row in report.rows:
        cpu, memory = row.cpu_per_gib(), row.resident()
        if row.case.way != "direct" and memory:
            yield {
                "WORKLOAD": _name(row.case),
                "AT ONCE": str(row.case.connections),
                **{f"{_CPU}\n{name}": f"{value:.2f}" for name, value in cpu.items()},
                **{f"{_MEMORY}\n{name}": f"{value:.0f}" for name, value in memory.items()},
            }


def _name(case: Case, *parts: str) -> str:
    way = _WAYS[case.way] if case.workload == "dial" else ""
    return title(case, *filter(None, (*parts, way)))


def _table(lines: Sequence[dict[str, str]], gap: int) -> Table:
    """Return a table of lines, in the order of their columns and without those that are empty."""
    every = dict.fromkeys(name for line in lines for name in line)
    names = [name for name in every if any(line.get(name) for line in lines)]
    names.sort(key=lambda name: ("\n" in name, name.startswith(_MEMORY)))
    two_lines = "\n" if any("\n" in name for name in names) else ""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, gap, 0, 0))
    above = ""
    for name in names:
        head, _, process = name.rpartition("\n")
        shown = f"{head if head != above else ''}{two_lines}{plain(process).upper()}"
        above = head
        side: JustifyMethod = "left" if name in ("WORKLOAD", "") else "right"
        table.add_column(shown, justify=side, no_wrap=True)
    for line in lines:
        table.add_row(*(line.get(name, "") for name in names))
    return table


def draw(report: Report) -> RenderableType:
    """Return the tables of a report, and what went wrong below them."""
    figures, costs = list(_figures(report)), list(_costs(report))
    parts: list[RenderableType] = [_head(report), Text(""), _table(figures, 2)]
    if costs:
        parts += [Text(""), _table(costs, 1)]
    return Group(*parts, *_errors(report))


def _head(report: Report) -> Text:
    setting = report.setting
    cut = "  (interrupted)" if report.interrupted else ""
    return Text.assemble(
        (plain(setting["server"]), "bold"),
        f"  {setting['mode']}  {setting['rounds']} x {setting['duration_s']:g} s  {setting['size']:,} B a write",
        (cut, "yellow"),
    )


def _errors(report: Report) -> list[Text]:
    found: list[Text] = []
    for row in report.rows:
        case = row.case
        where = f"{title(case)}, {case.connections} connections, {case.way}"
        found += [
            Text(f"{where}: {count} x {plain(text)}", "red") for text, count in row.errors.items()
        ]
    return [Text(""), *found] if found else []
