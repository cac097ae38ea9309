"""Plans, processes, rows and their JSON."""

from __future__ import annotations

import json
import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from bench_streams import Nobody, drip, fails, service

from clusterproxy.bench.plan import CLIENT, UNITS, Bench, Case, Plan
from clusterproxy.bench.processes import Usage, Watch
from clusterproxy.bench.report import SCHEMA, Report
from clusterproxy.bench.services import Services
from clusterproxy.bench.workloads import Sample

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    import trio
    from trio.testing import MockClock


def plan(*workloads: Any, **changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "connections": [1, 8],
        "size": 1000,
        "warmup_s": 0.5,
        "duration_s": 2,
        "rounds": 1,
        "tunnels": 50,
        "direct": True,
        "tunnel_ways": ["reusable", "single-use"],
    }
    return Plan(workloads=workloads, **settings | changes)


# -- plans -----------------------------------------------------------------------------------------


def test_what_is_compared_is_measured_side_by_side() -> None:
    assert plan("latency", "read").cases() == [
        Case("read", 1, "direct"),
        Case("read", 1, "reusable"),
        Case("read", 8, "direct"),
        Case("read", 8, "reusable"),
        Case("latency", 1, "direct"),
        Case("latency", 1, "reusable"),
    ]


def test_dials_are_measured_on_all_kinds_of_tunnels() -> None:
    assert [(case.connections, case.way) for case in plan("dial", connections=[4]).cases()] == [
        (4, "direct"),
        (4, "reusable"),
        (4, "single-use"),
    ]
    without = plan("dial", "read", direct=False, tunnel_ways=["single-use"], connections=[4])
    assert [case.way for case in without.cases()] == ["single-use", "single-use"]


def test_idle_tunnels_come_first_and_once() -> None:
    cases = plan("read", "idle", rounds=3, connections=[1]).runs()
    assert cases[0] == Case("idle", 50, "single-use")
    assert [case.workload for case in cases[1:]] == ["read"] * 6


async def test_a_bench_runs_its_plan(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    dialled: list[str] = []

    def path(address: str) -> AbstractAsyncContextManager[trio.abc.Stream]:
        dialled.append(address)
        return service(nursery, {"source:1": drip}[address])()

    def broken(address: str) -> AbstractAsyncContextManager[trio.abc.Stream]:
        return fails(OSError(f"no way to {address}"))()

    bench = Bench(
        plan=plan("read", connections=[2]),
        services=Services(source="source:1", sink="sink:2", echo="echo:3"),
        paths={"direct": broken, "reusable": path},
        watch=Nobody(),
    )
    report, told = Report(), list[tuple[str, int]]()
    await bench.run(report, lambda case, done: told.append((case.way, done)))
    assert told == [("direct", 0), ("reusable", 1)]
    assert dialled == ["source:1"] * 2
    assert [row.case.way for row in report.failed()] == ["direct"]
    assert report.rows[0].errors == {"no way to source:1": 2}
    assert report.rows[1].median == pytest.approx(1.6, rel=0.02)


# -- processes -------------------------------------------------------------------------------------


def test_processes_are_read_as_the_kernel_writes_them(tmp_path: Path) -> None:
    def write(pid: int, user: int, system: int, pages: int) -> None:
        rest = ["S", *["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"], str(user), str(system), *("0" for _ in range(8)), str(pages)]  # fmt: skip
        (tmp_path / str(pid)).mkdir(exist_ok=True)
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (a) b ( c) {' '.join(rest)} 99\n")

    write(7, 100, 50, 10)
    watch = Watch({"server": 7, "gone": 8}, tmp_path)
    assert watch.missing() == ["gone"]
    before = watch.look()
    assert before == {"server": Usage(1.5, 40960)}
    write(7, 130, 70, 20)
    write(8, 1, 1, 1)
    since = watch.since(before)
    assert list(since) == ["server"]
    assert since["server"].cpu_s == pytest.approx(0.5)
    assert since["server"].resident == 81920


def test_this_process_is_there() -> None:
    usage = Watch({"me": os.getpid()}).look()["me"]
    assert usage.cpu_s > 0
    assert usage.resident > 2**20


# -- rows ------------------------------------------------------------------------------------------


def moved(rate: float, **changes: Any) -> Sample:
    return Sample(
        value=rate,
        bytes=2**30,
        seconds=2.0,
        spent={"server": Usage(1.0, 50 * 2**20), CLIENT: Usage(0.5, 40 * 2**20)},
        **changes,
    )


def report_of(*samples: tuple[Case, Sample]) -> Report:
    report = Report(setting={"server": "hub"})
    for case, sample in samples:
        report.add(case, sample)
    return report


def test_a_row_has_samples_medians_and_what_each_process_used() -> None:
    case = Case("read", 8, "reusable")
    report = report_of(
        (case, moved(100.0)),
        (attrs.evolve(case, way="direct"), moved(1000.0)),
        (case, moved(123.456789, errors=Counter({"reset": 2}))),
        (case, Sample(errors=Counter({"reset": 1}))),
        (case, moved(400.0)),
    )
    document = report.document()
    assert json.loads(json.dumps(document)) == document
    row, direct = document["rows"]
    assert row == {
        "workload": "read",
        "connections": 8,
        "path": "tunnel",
        "tunnel": "reusable",
        "unit": "Mbit/s",
        "samples": [100, 123.5, 400],
        "median": 123.5,
        "of_direct": 0.1235,
        "cpu_s_per_gib": {"server": 1, "client": 0.5},
        "rss_mib": {"server": 50, "client": 40},
        "errors": {"reset": 3},
        "bytes": [2**30, 2**30, 0, 2**30],
        "seconds": [2, 2, 0, 2],
    }
    # The server has nothing to do with the direct path.
    assert (direct["path"], direct["tunnel"], direct["of_direct"]) == ("direct", None, None)
    assert direct["cpu_s_per_gib"] == {"client": 0.5}
    assert direct["rss_mib"] == {"client": 40}


def test_round_trips_have_quantiles_and_a_distribution() -> None:
    times = [number * 1e-6 for number in range(1, 1001)]
    case = Case("beside", 2, "reusable")
    sample = Sample(value=500.0, round_trips=times, operations=1000, bulk_mbit_s=7.0,
                    spent={"server": Usage(2.0, 0)})  # fmt: skip
    (row,) = report_of((case, sample)).document()["rows"]
    assert (row["p50"], row["p90"], row["p99"]) == (500, 900, 990)
    assert len(row["distribution"]) == 101
    assert (row["distribution"][0], row["distribution"][100]) == (1, 1000)
    assert row["bulk_mbit_s"] == [7]
    assert row["cpu_s_per_operation"] == {"server": 0.002}
    assert row["cpu_s_per_gib"] == {}


@pytest.mark.parametrize("workload", UNITS)
def test_a_row_of_which_nothing_worked(workload: Any) -> None:
    report = report_of((Case(workload, 1, "reusable"), Sample(errors=Counter({"refused": 1}))))
    assert report.failed() == report.rows
    (row,) = report.document()["rows"]
    assert (row["samples"], row["median"], row["errors"]) == ([], None, {"refused": 1})


def test_the_document_says_where_it_was_measured() -> None:
    document = report_of().document()
    assert document["schema"] == SCHEMA
    assert document["setting"] == {"server": "hub"}
    assert document["interrupted"] is False
    assert document["machine"]["cores"] >= 1
    assert document["versions"].keys() == {"python", "openssl", "clusterproxy", "trio", "h2"}
