"""The plots of `make bench`: whatever was measured, or not, they are drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from bench import agents, growth, plots
from bench.cases import cases
from bench.plots import draw
from bench.samples import Result, Row, Sample, Table
from bench.verdicts import of_line, verdicts

if TYPE_CHECKING:
    from pathlib import Path

FIGURES = ("mbit_s", "p50", "p99", "dials_s", "server", "agent", "server_mib", "agent_mib", "idle")
PLOTS = (
    "throughput",
    "cpu",
    "sizes",
    "latency",
    "dials",
    "tunnels",
    "agents",
    "line",
    "line-growth",
    "verdicts",
    "verdicts-before",
)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    # Everything is there, of fewer pixels.
    monkeypatch.setitem(plots.STYLE, "savefig.dpi", 40)


def measured(value: float) -> Result:
    programs = {"server": value / 100, "agent": value / 200, "client": value / 300}
    return Result(samples=(Sample(figures=dict.fromkeys(FIGURES, value), cpu_s_per_gib=programs),))


def everything() -> list[Row]:
    rows = [
        Row(part=case.part, name=case.name, figure=case.figure, unit=case.unit, better=case.better,
            results={key: measured(100.0 * place + 1) for place, key in enumerate(case.contenders)})
        for case in cases()
    ]  # fmt: skip
    both = {"ours": measured(30.0), "go": measured(40.0)}
    names = [(growth.PART, growth.step_name(count)) for count in growth.COUNTS]
    names += [(agents.PART, agents.name_of(count)) for count in agents.COUNTS]
    return rows + [
        Row(part=part, name=name, figure="p50", unit="", better=1, results=both)
        for part, name in names
    ]


LINE: list[dict[str, Any]] = [
    {
        "name": "100 ms line, read, after 10 s", "unit": "Mbit/s", "figures": {"direct": 1, "go": 1, "ours": 1},
        "share": {"go": 0.5, "ours": 0.95}, "target": 0.9, "by_second": {"direct": [1, 2], "go": [1, 1], "ours": [1, 2]},
    },
    {"name": "1 Gbit/s line", "skipped": "no namespaces"},
]  # fmt: skip


def test_all_plots_are_drawn_twice_over(tmp_path: Path) -> None:
    table = Table(everything())
    files = draw(tmp_path, table, [*verdicts(table), *of_line(LINE)], LINE, "a machine")
    assert {file.name for file in files} == {
        f"{name}.{kind}" for name in PLOTS for kind in ("png", "svg")
    }
    assert all(file.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml") for file in files)


def test_what_was_skipped_is_left_out(tmp_path: Path) -> None:
    rows = [
        Row(part=row.part, name=row.name, figure=row.figure, unit=row.unit, better=row.better,
            results={key: Result(skipped="not here") if key != "go" else result for key, result in row.results.items()})
        for row in everything()
    ]  # fmt: skip
    table = Table(rows)
    drawn = {file.stem for file in draw(tmp_path, table, verdicts(table), LINE[1:], "a machine")}
    assert drawn == set(PLOTS) - {"line", "line-growth", "verdicts", "verdicts-before"}
    assert draw(tmp_path, Table([]), verdicts(Table([])), [], "a machine") == []
