"""What ``clusterproxy bench`` accepts, and the table that it prints."""

from __future__ import annotations

import io
import os
import re
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from rich.console import Console

from clusterproxy.bench.plan import Case
from clusterproxy.bench.processes import Usage
from clusterproxy.bench.report import Report
from clusterproxy.bench.workloads import Sample
from clusterproxy.cli.bench_view import draw
from clusterproxy.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path

SETTING = {"server": "hub:8090", "mode": "grpc", "rounds": 1, "duration_s": 3.0, "size": 262144}


def refused(*arguments: str, home: Path) -> str:
    environment = {"HOME": str(home), "CLUSTERPROXY_SERVER": None, "XDG_CONFIG_HOME": None}
    result = CliRunner(env=environment).invoke(main, ["bench", *arguments])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--workload", "read,rad"], "'rad' is no workload; there is idle, read, write"),
        (["--connections", "1,0"], "'1,0' is no list of numbers from 1 to 10000, as 1,8"),
        (["--connections", "many"], "'many' is no list of numbers"),
        (["--duration", "3"], "'3' is no duration, as 3s or 500ms"),
        (["--duration", "0s"], "nothing can be measured in no time"),
        (["--warmup", "-1s"], "'-1s' is no duration"),
        (["--size", "0"], "'--size'"),
        (["--watch", "server"], "'server' is no NAME=PID"),
        (["--watch", f"client={os.getpid()}"], "the name is not 'client'"),
        (["--watch", "server=99999999"], "'server=99999999': there is no such process"),
        (["--source", "somewhere"], "'somewhere' is no service: HOST:PORT is needed"),
        (["--source", "a:1", "--target-host", "b"], "--source and --target-host: one or the other"),
        (["--source", "a:1", "--workload", "read,both"], "--workload both needs a service that is given by --echo"),
        (["--server", "hub:8090"], "What does the agent of hub:8090 connect to? --target-host HOST"),
        (["--server", "hub:8090", "--target-host", "b", "--workload", "idle"], "--watch server=PID"),
        (["--json", "/there/is/no/such"], "No such file or directory"),
        (["--plots", "/proc/plots"], "--plots /proc/plots: No such file or directory"),
    ],
)  # fmt: skip
def test_bad_options_are_told_before_anything_is_measured(
    tmp_path: Path, arguments: list[str], complaint: str
) -> None:
    assert complaint in refused(*arguments, home=tmp_path)


def test_plots_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = refused("--plots", str(tmp_path / "plots"), home=tmp_path)
    assert "pip install 'clusterproxy[bench]'" in text


def test_help_teaches() -> None:
    text = CliRunner().invoke(main, ["bench", "--help"]).output
    assert "Examples:" in text
    assert "--target-host 10.0.0.7" in text


def lines_of(report: Report) -> list[str]:
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(draw(report))
    text = console.file
    assert isinstance(text, io.StringIO)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def test_the_table_has_direct_and_tunnel_in_one_line() -> None:
    report = Report(setting=SETTING)
    usage = {"server": Usage(0.7, 40 * 2**20), "client": Usage(0.6, 50 * 2**20)}
    trips = [1e-4] * 98 + [9e-4] * 2
    for case, sample in (
        (Case("read", 8, "direct"), Sample(value=9000.0, bytes=2**30, spent=usage)),
        (Case("read", 8, "reusable"), Sample(value=3000.0, bytes=2**30, spent=usage)),
        (Case("latency", 1, "direct"), Sample(value=50.0, round_trips=[5e-5])),
        (Case("latency", 1, "reusable"), Sample(value=100.0, round_trips=trips)),
        (Case("dial", 8, "direct"), Sample(value=4000.0)),
        (Case("dial", 8, "reusable"), Sample(value=1000.0)),
        (Case("dial", 8, "single-use"), Sample(errors=Counter({"refused\x1b": 3}))),
        # Ended before the tunnel's turn.
        (Case("dial", 64, "direct"), Sample(value=5000.0)),
    ):
        report.add(case, sample)
    report.interrupted = True
    lines = lines_of(report)
    assert lines[0] == "hub:8090  grpc  1 x 3 s  262,144 B a write  (interrupted)"
    cells = [[cell for cell in re.split(r"  +", line) if cell] for line in lines[2:11]]
    assert cells == [
        ["WORKLOAD", "AT ONCE", "DIRECT", "TUNNEL", "OF DIRECT"],
        ["read", "8", "9,000", "3,000", "Mbit/s", "33%"],
        ["round trip, p50", "1", "50", "100", "µs", "x 2.0"],
        ["round trip, p90", "1", "50", "100", "µs", "x 2.0"],
        ["round trip, p99", "1", "50", "900", "µs", "x 18.0"],
        ["dials, reusable tunnel", "8", "4,000", "1,000", "1/s", "25%"],
        ["dials, single-use tunnels", "8", "4,000", "failed", "1/s"],
        ["dials", "64", "5,000", "1/s"],
        [],
    ]
    assert [line.split() for line in lines[11:15]] == [
        ["CPU", "s/GiB", "MiB"],
        ["WORKLOAD", "AT", "ONCE", "SERVER", "CLIENT", "SERVER", "CLIENT"],
        ["read", "8", "0.70", "0.60", "40", "50"],
        [],
    ]
    assert lines[15:] == ["dials, 8 connections, single-use: 3 x refused�"]


def test_a_table_without_direct_ones_has_no_column_for_them() -> None:
    report = Report(setting=SETTING)
    report.add(Case("read", 1, "reusable"), Sample(value=50.0))
    assert "DIRECT" not in "".join(lines_of(report))
