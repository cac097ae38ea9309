from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from bench import line
from bench.namespaces import Line, commands, gigabit_line
from bench.programs import NotMeasured

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def report(*by_second: float, cpu_s: float = 0.5) -> dict[str, Any]:
    """Return what konnbench says of a run that moved 1 GiB."""
    return {
        "mbit_s": by_second[-1],
        "mbit_s_by_second": list(by_second),
        "bytes": 1 << 30,
        "procs": {"server": {"cpu_s": cpu_s}, "agent": {"cpu_s": 1.0}, "client": {"cpu_s": 9.0}},
    }


def reports(**rates: Sequence[float]) -> dict[str, list[dict[str, Any]]]:
    return {name: [report(rate) for rate in each] for name, each in rates.items()}


def test_every_other_round_is_in_reverse() -> None:
    asked: list[str] = []

    def run(command: Sequence[str]) -> dict[str, Any]:
        asked.append(command[0])
        return {"number": len(asked)}

    got = line.interleaved(run, {"direct": ["d"], "go": ["g"], "ours": ["o"]}, 2)

    assert "".join(asked) == "dgoogd"
    assert got == {
        "direct": [{"number": 1}, {"number": 6}],
        "go": [{"number": 2}, {"number": 5}],
        "ours": [{"number": 3}, {"number": 4}],
    }


def test_a_row_has_medians_and_shares_of_the_direct_rate() -> None:
    taken = reports(direct=(930, 800, 1000), go=(465, 1, 900), ours=(1, 930, 837))

    row = line.row("read", taken, line.rate)

    assert row["figures"] == {"direct": 930, "go": 465, "ours": 837}
    assert row["samples"]["ours"] == [1, 930, 837]
    assert row["share"] == {"go": 0.5, "ours": 0.9}
    assert row["by_second"]["go"] == [465]
    assert row["cpu_s_per_gib"] == {"go": 1.5, "ours": 1.5}
    assert "verdict" not in row


@pytest.mark.parametrize(("ours", "verdict"), [(950, "pass"), (949, "fail")])
def test_the_verdict_is_on_our_share(ours: float, verdict: str) -> None:
    row = line.row("read", reports(direct=[1000], go=[1000], ours=[ours]), line.rate, 0.95)

    assert (row["target"], row["verdict"]) == (0.95, verdict)


def test_settled_leaves_out_the_seconds_in_which_windows_grow() -> None:
    assert line.settled(report(*[1.0] * line.SETTLE_S, 800, 1000)) == 900


def test_growth_is_the_median_of_each_second() -> None:
    assert line.by_second([report(1, 20), report(3, 60), report(2, 40)]) == [2, 40]


def test_the_table_has_the_form_of_the_documentation() -> None:
    read = line.row("read", reports(direct=[902], go=[461], ours=[899.6]), line.rate)
    write = line.row("write", reports(direct=[889], go=[428], ours=[880]), line.rate)

    assert line.table(read, write).splitlines() == [
        "|  Bandwidth  |  Direct  |  over Cluster-Proxy (Go)  |  over Cluster-Proxy (ours)  |",
        "|-------------|----------|---------------------------|-----------------------------|",
        "|  Read/Mbps  | 902 Mbps |         461 Mbps          |          900 Mbps           |",
        "| Write/Mbps  | 889 Mbps |         428 Mbps          |          880 Mbps           |",
    ]


def test_both_ends_of_the_line_are_limited() -> None:
    made = commands(Line(hub="left", cluster="right"), "line0")

    shaped = [command[2] for command in made if command[0] == "tc" and "tbf" in command]
    assert sorted(shaped) == ["left", "right"]


def test_without_root_there_is_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NotMeasured, match="need root"), gigabit_line():
        pass


def test_what_cannot_be_measured_is_skipped_and_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    rows = line.measure(tmp_path, 1, 1, parts=["doc"])

    assert rows == [{"name": "1 Gbit/s line", "skipped": "no ip on the PATH"}]
    assert capsys.readouterr().out == "1 Gbit/s line: skipped: no ip on the PATH\n"
