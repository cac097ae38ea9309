"""The rounds of `make bench`, their medians, and what is printed of them."""

from __future__ import annotations

import json

import attrs
import pytest
from bench.cases import FEW_ROUNDS, Case
from bench.programs import NotMeasured
from bench.report import block, document, verdict_table
from bench.rounds import interleaved
from bench.samples import Result, Row, Sample, Table, cores_per_gbit
from bench.verdicts import verdicts

CASE = Case(
    part="bulk",
    name="read, 1 connection",
    mode="read",
    service="source",
    contenders=("go", "ours", "rathole"),
)


@attrs.define
class Contender:
    """Measures nothing; fails from a given round on."""

    key: str
    log: list[str]
    most_rounds: int | None = None
    fails_at: int | None = None
    errors: dict[str, int] = attrs.field(factory=dict[str, int])
    done: int = 0

    def measure(self, case: Case, seconds: float) -> Sample:
        self.log.append(self.key)
        self.done += 1
        if self.done == self.fails_at:
            raise NotMeasured("it broke")
        return Sample(figures={"mbit_s": self.done * seconds}, errors=self.errors)


def test_contenders_take_turns_and_every_other_round_goes_backwards() -> None:
    log: list[str] = []
    among = {key: Contender(key, log) for key in CASE.contenders}
    row = interleaved(CASE, among.__getitem__, 3, 2.0)
    assert log == ["go", "ours", "rathole", "rathole", "ours", "go", "go", "ours", "rathole"]
    assert row.results["ours"].median("mbit_s") == 4.0
    assert (row.part, row.name, row.unit) == ("bulk", "read, 1 connection", "Mbit/s")


def test_some_take_part_in_the_first_rounds_only() -> None:
    log: list[str] = []
    among = {
        key: Contender(key, log, most_rounds=FEW_ROUNDS if key == "rathole" else None)
        for key in CASE.contenders
    }
    interleaved(CASE, among.__getitem__, FEW_ROUNDS + 2, 1.0)
    assert (log.count("rathole"), log.count("ours")) == (FEW_ROUNDS, FEW_ROUNDS + 2)
    log.clear()
    interleaved(attrs.evolve(CASE, most_rounds=1), among.__getitem__, 5, 1.0)
    assert log == ["go", "ours", "rathole"]


def test_a_case_may_be_measured_for_longer() -> None:
    row = interleaved(attrs.evolve(CASE, stretch=3), lambda key: Contender(key, []), 1, 2.0)
    assert row.results["ours"].median("mbit_s") == 6.0


def test_who_fails_keeps_what_was_measured_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    log: list[str] = []

    def get(key: str) -> Contender:
        if key == "rathole":
            raise NotMeasured("cargo is missing")
        return among[key]

    among = {"go": Contender("go", log), "ours": Contender("ours", log, fails_at=2)}
    row = interleaved(CASE, get, 4, 1.0)
    assert (len(row.results["go"].samples), len(row.results["ours"].samples)) == (4, 1)
    assert row.results["ours"].skipped == "it broke"
    assert row.results["rathole"] == Result(skipped="cargo is missing")
    assert "rathole: cargo is missing" in capsys.readouterr().err
    assert "skipped: cargo is missing" in block(row)


def result(
    mbit_s: float, cpu: dict[str, float] | None = None, peak: dict[str, float] | None = None
) -> Result:
    return Result(
        samples=(Sample(figures={"mbit_s": mbit_s}, cpu_s_per_gib=cpu or {}, peak_mib=peak or {}),)
    )


def test_a_block_shows_ratios_costs_and_errors() -> None:
    broken = Result(samples=(Sample(figures={"mbit_s": 900.0}, errors={"read: reset": 3}),))
    cost = {"server": 1.5, "agent": 1.0, "client": 2.0}
    results = {
        "go": result(1000.0),
        "ours": result(2500.0, cpu=cost, peak={"server": 40.2, "agent": 39.9}),
        "rathole": broken,
    }
    row = Row(
        part="bulk",
        name="read, 1 connection",
        figure="mbit_s",
        unit="Mbit/s",
        better=1,
        results=results,
    )
    title, go, ours, rathole = block(row).splitlines()
    assert title == "bulk: read, 1 connection (Mbit/s)"
    assert "1,000.0" in go
    assert "x Go" not in go
    assert "2.50 x Go" in ours
    assert (
        "CPU s/GiB server 1.50, agent 1.00, client 2.00; 0.29 cores per Gbit/s; peak MiB 40 + 40"
        in ours
    )
    assert "3 ERRORS" in rathole


def test_a_gbit_costs_an_eighth_of_what_a_gigabyte_does() -> None:
    # 2**30 bytes in a second are 8.59 Gbit/s.
    assert cores_per_gbit(result(1.0, cpu={"server": 8.589934592})) == {
        "server": pytest.approx(1.0)
    }


def test_the_table_of_verdicts_counts_and_names_what_is_missing() -> None:
    rows = [Row(part="bulk", name="read, 1 connection", figure="mbit_s", unit="Mbit/s", better=1,
                results={"ours": result(2900.0), "go": result(1000.0)})]  # fmt: skip
    judged = verdicts(Table(rows))
    text = verdict_table(judged)
    assert "C  read, 1 connection" in text
    assert f"2 pass, 0 FAIL, {len(judged) - 2} not measured" in text
    some = [verdict for verdict in judged if verdict.name.startswith("read")]
    assert "not measured: read, 8 connections" in verdict_table([*some, *some[:1]])


def test_the_document_has_all_samples_and_is_json() -> None:
    row = Row(part="bulk", name="read, 1 connection", figure="mbit_s", unit="Mbit/s", better=1,
              results={"ours": result(2900.0, cpu={"server": 1.0}), "rathole": Result(skipped="no cargo")})  # fmt: skip
    judged = verdicts(Table([row]))
    report = json.loads(
        json.dumps(document({"cores": 2}, {"rounds": 1}, 12.34, [row], [{"name": "line"}], judged))
    )
    (found,) = report["rows"]
    assert found["results"]["ours"]["median"] == {"mbit_s": 2900.0}
    assert found["results"]["ours"]["samples"][0]["figures"] == {"mbit_s": 2900.0}
    assert found["results"]["rathole"] == {"skipped": "no cargo"}
    assert (report["seconds"], report["machine"], report["line"]) == (
        12.3,
        {"cores": 2},
        [{"name": "line"}],
    )
    assert len(report["verdicts"]) == len(judged)
