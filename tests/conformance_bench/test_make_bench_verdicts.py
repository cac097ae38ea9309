"""The targets of `make bench` and what becomes of them."""

from __future__ import annotations

from typing import Any

import pytest
from bench import far, footprint, growth, isolation, kubectl, portforward, userserver
from bench.agents import COUNTS, name_of
from bench.agents import PART as AGENTS
from bench.cases import LABELS, cases, read_name, write_name
from bench.programs import NotMeasured
from bench.samples import Result, Row, Sample, Table
from bench.verdicts import Verdict, of_line, status_of, targets, verdicts


def row(part: str, name: str, **results: Result) -> Row:
    found = {key.replace("_", "-"): result for key, result in results.items()}
    return Row(part=part, name=name, figure="mbit_s", unit="Mbit/s", better=1, results=found)


def rate(*mbit_s: float, errors: int = 0, **cpu: float) -> Result:
    counted = {"broken": errors} if errors else {}
    samples = (
        Sample(figures={"mbit_s": each}, cpu_s_per_gib=cpu, errors=counted) for each in mbit_s
    )
    return Result(samples=tuple(samples))


def verdict(table: Table, name: str, step: str = "C") -> Verdict:
    (found,) = [each for each in verdicts(table) if (each.name, each.step) == (name, step)]
    return found


def test_the_median_of_the_rounds_counts_against_go() -> None:
    table = Table([row("bulk", read_name(1), ours=rate(2900, 2800, 9000), go=rate(1000, 1000, 1))])
    found = verdict(table, "read, 1 connection")
    assert (found.value, found.status, found.text) == (2.9, "pass", "≥ 2.8 × Go")  # noqa: RUF001
    assert found.margin == pytest.approx(2.9 / 2.8)


def test_what_was_not_measured_has_no_verdict() -> None:
    skipped = Result(skipped="cargo, to build rathole, is missing")
    table = Table(
        [row("bulk", read_name(1), ours_connect=rate(2000), go_connect=rate(1000), rathole=skipped)]
    )
    assert verdict(table, "CONNECT beside Go, read, 1 connection").status == "pass"
    found = verdict(table, "CONNECT beside rathole, read, 1 connection")
    assert (found.value, found.status, found.margin) == (None, "not measured", None)
    assert {each.status for each in verdicts(Table([]))} == {"not measured"}


def test_errors_of_ours_fail_what_the_figures_would_pass() -> None:
    table = Table([row("bulk", read_name(8), ours=rate(3000, errors=1), go=rate(1000, errors=7))])
    found = verdict(table, "read, 8 connections")
    assert (found.status, found.errors) == ("FAIL", 1)


def test_our_own_clients_writes_are_compared_with_gos_best() -> None:
    rows = [
        row("bulk", write_name(32768, 1), own=rate(4500), go=rate(1000)),
        row("bulk", write_name(32000, 1), go=rate(2500)),
    ]
    assert verdict(Table(rows), "own client, write, 1 connection").value == 1.8
    assert verdict(Table(rows[:1]), "own client, write, 1 connection").status == "not measured"


def test_cpu_is_compared_program_by_program() -> None:
    ours, go = rate(1, server=1.0, agent=1.5), rate(1, server=4.0, agent=3.0)
    table = Table([row("bulk", read_name(1), ours=ours, go=go)])
    server = verdict(table, "CPU per GiB, read, server, 1 connection")
    agent = verdict(table, "CPU per GiB, read, agent, 1 connection")
    assert (server.value, server.status) == (0.25, "pass")
    assert (agent.value, agent.status) == (0.5, "FAIL")


def test_round_trips_beside_a_stream_are_judged_in_milliseconds() -> None:
    name = "round trip 64 B beside a stream, one reusable tunnel"
    trip = Result(samples=(Sample(figures={"p50": 1900.0}),))
    found = verdict(
        Table([row("beside", name, ours=trip)]),
        "round trip p50 beside a stream, one reusable tunnel",
    )
    assert (found.value, found.status, found.text) == (1.9, "pass", "≤ 2 ms")


def test_a_second_lot_of_tunnels_is_judged_only_when_it_was_the_whole_lot() -> None:
    again = Result(samples=(Sample(figures={"server": 1.05, "agent": 1.2}),))
    whole = Table([row(growth.PART, growth.again_name(growth.COUNTS[-1]), ours=again)])
    assert verdict(whole, "peak of a second 5,000 tunnels, server").status == "pass"
    assert verdict(whole, "peak of a second 5,000 tunnels, agent").status == "FAIL"
    short = Table([row(growth.PART, growth.again_name(100), ours=again)])
    assert verdict(short, "peak of a second 5,000 tunnels, server").status == "not measured"


@pytest.mark.parametrize(
    ("value", "at_least", "status"),
    [
        (2.0, True, "pass"),
        (1.99, True, "FAIL"),
        (2.0, False, "pass"),
        (2.01, False, "FAIL"),
        (None, True, "not measured"),
    ],
)
def test_a_bound_itself_is_reached(value: float | None, at_least: bool, status: str) -> None:
    assert status_of(value, 2.0, at_least=at_least) == status


def test_lines_are_judged_by_our_share_of_the_direct_rate() -> None:
    rows: list[dict[str, Any]] = [
        {"name": "100 ms line, read", "target": 0.9, "share": {"ours": 0.95, "go": 0.2}},
        {"name": "20 ms line, read", "share": {"ours": 0.5, "go": 0.2}},
        {"name": "1 Gbit/s line", "skipped": "no namespaces"},
    ]
    assert [(each.name, each.value, each.status) for each in of_line(rows)] == [
        ("100 ms line, read", 0.95, "pass"),
        ("1 Gbit/s line", None, "not measured"),
    ]


def test_each_target_is_about_something_that_is_measured() -> None:
    """A renamed case must not leave a target that nobody measures."""
    measured = {(case.part, case.name, key) for case in cases() for key in case.contenders}
    of_growth = [growth.IDLE, growth.READY, growth.again_name(growth.COUNTS[-1])]
    measured |= {(growth.PART, name, "ours") for name in of_growth}
    measured |= {
        (isolation.PART, isolation.name_of(transport, direction), "ours")
        for transport in isolation.TRANSPORTS
        for direction in ("read", "write")
    }
    held = [userserver.held_name(userserver.WATCHES, http2) for http2 in (False, True)]
    of_http = {name: ways for name, ways in userserver.WAYS.items() if "ours" in ways}
    measured |= {(userserver.PART, name, "ours") for name in (*of_http, *held)}
    of_kubectl = [kubectl.pods_name(kubectl.PODS), kubectl.EXEC]
    measured |= {(kubectl.PART, name, "ours") for name in of_kubectl}
    measured |= {(AGENTS, name_of(count), "ours") for count in COUNTS}
    measured.add((footprint.PART, footprint.POD, "ours"))
    assert {subject for target in targets() for subject in target.subjects} <= measured
    assert all(target.subjects for target in targets())


def test_names_are_unique() -> None:
    named = [(target.step, target.name) for target in targets()]
    assert len(named) == len(set(named))
    listed = [(case.part, case.name) for case in (*cases(), *portforward.CASES)]
    assert len(listed) == len(set(listed))
    contenders = {key for case in cases() for key in case.contenders}
    contenders |= {way for ways in userserver.WAYS.values() for way in ways} | set(kubectl.WAYS)
    contenders |= set(portforward.WAYS)
    assert contenders == set(LABELS)
    assert AGENTS not in {case.part for case in cases()}


def test_what_a_user_server_adds_is_the_difference_of_two() -> None:
    def p99(ms: float) -> Result:
        return Result(samples=(Sample(figures={"p99": ms}),))

    found = row(userserver.PART, userserver.AT_REST, ours=p99(12), without=p99(3), go=p99(40))
    name = f"added to the p99 of {userserver.AT_REST}"
    assert (
        verdict(Table([found]), name, "F").value,
        verdict(Table([found]), name, "F").status,
    ) == (
        9,
        "pass",
    )
    alone = row(userserver.PART, userserver.AT_REST, ours=p99(12))
    assert verdict(Table([alone]), name, "F").status == "not measured"


def test_each_program_on_the_way_has_its_share_of_what_stays_open() -> None:
    name = userserver.held_name(userserver.WATCHES, http2=False)
    each = dict.fromkeys(far.PROGRAMS, 40.0) | {"user-server": 81.0}
    table = Table([row(userserver.PART, name, ours=Result(samples=(Sample(figures=each),)))])
    for program in far.PROGRAMS:
        wanted = "FAIL" if program == "user-server" else "pass"
        assert verdict(table, f"{name}, {program}", "F").status == wanted


def test_ways_take_turns_and_one_that_fails_is_left_out() -> None:
    asked: list[str] = []

    def measure(way: str) -> Sample:
        asked.append(way)
        if way == "go":
            raise NotMeasured("it is not there")
        return Sample(figures={"s": float(len(asked))})

    found = userserver.in_turns("http", "name", measure, ("go", "ours"), 3, "s", "s", -1)
    assert asked == ["go", "ours", "ours", "ours"]
    assert found.results["go"] == Result(skipped="it is not there")
    assert found.results["ours"].median("s") == 3
