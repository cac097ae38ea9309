"""The figures and tables of ``clusterproxy status``."""

from __future__ import annotations

import io
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from clusterproxy.cli.status import add_rates, draw, fitting, status


def connection(number: int, **figures: Any) -> dict[str, Any]:
    return {
        "agent": "cluster1",
        "id": number,
        "destination": f"service{number}:80",
        "age_s": 30.0,
        "bytes_to_agent": 0,
        "bytes_to_client": 0,
        "queued_to_agent": 0,
        "queued_to_client": 0,
        "over_budget": False,
        "closing": False,
        **figures,
    }


def document(uptime: float, *connections: dict[str, Any]) -> dict[str, Any]:
    return {
        "server": {"id": "hub", "version": "1", "mode": "grpc", "uptime_s": uptime, "ready": True, "reason": ""},
        "totals": {"agents": 1, "connections": len(connections), "pending_dials": 3, "buffered_bytes": 5000},
        "agents": [
            {"id": "cluster1", "identifiers": ["cluster1"], "age_s": 7300.0, "connections": len(connections), "draining": True}
        ],
        "connections": list(connections),
    }  # fmt: skip


def drawn(shown: dict[str, Any], rows: int | None = None, width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(draw(shown, rows=rows))
    text = console.file
    assert isinstance(text, io.StringIO)
    return text.getvalue()


def test_rates_are_differences_by_the_servers_clock() -> None:
    before = document(10, connection(1, bytes_to_agent=100), connection(2, bytes_to_client=7))
    now = document(
        12,
        connection(1, bytes_to_agent=300, bytes_to_client=50),
        connection(2, bytes_to_client=7),
        connection(3, bytes_to_client=20),
    )
    add_rates(before, now)
    rates = [(one["rate_to_agent"], one["rate_to_client"]) for one in now["connections"]]
    assert rates == [(100, 25), (0, 0), (0, 10)]
    for sums in (now["agents"][0], now["totals"]):
        assert (sums["rate_to_agent"], sums["rate_to_client"], sums["stalled"]) == (100, 35, 0)


@pytest.mark.parametrize(
    ("moved", "queued", "stalled"),
    [
        ({}, {"queued_to_client": 9}, True),
        ({}, {"queued_to_agent": 9}, True),
        ({"bytes_to_client": 1}, {"queued_to_client": 9}, False),
        # It is the other direction that moves.
        ({"bytes_to_agent": 1}, {"queued_to_client": 9}, True),
        ({}, {}, False),
    ],
)
def test_a_stall_is_something_that_waits_and_does_not_move(
    moved: dict[str, int], queued: dict[str, int], stalled: bool
) -> None:
    before, now = document(1, connection(1)), document(2, connection(1, **moved, **queued))
    add_rates(before, now)
    assert now["connections"][0]["stalled"] is stalled
    assert now["totals"]["stalled"] == stalled


def test_a_connection_is_not_stalled_at_first_sight() -> None:
    now = document(2, connection(1, queued_to_agent=5))
    add_rates(document(1), now)
    assert not now["connections"][0]["stalled"]


def test_tables_show_stalled_ones_first_and_how_many_are_left_out() -> None:
    before = document(1, *(connection(number) for number in range(5)))
    now = document(
        2,
        *(connection(number, bytes_to_agent=number * 1000) for number in range(4)),
        connection(4, queued_to_client=2_000_000),
    )
    add_rates(before, now)
    lines = drawn(now, rows=2).splitlines()
    assert "1 agents, 5 connections, 3 dials pending" in lines[1]
    assert "5.0 kB waiting, 1 stalled" in lines[1]
    (agent,) = (line for line in lines if "draining" in line)
    assert "2 h" in agent
    rows = [line for line in lines if "service" in line]
    assert [row.split()[1] for row in rows] == ["4", "3"]
    assert "2.0 MB" in rows[0]
    assert rows[0].rstrip().endswith("stalled")
    assert "3.0 kB/s" in rows[1]
    assert "and 3 more" in lines[-1]
    assert "more" not in drawn(now)


def busy(agents: int, connections: int) -> dict[str, Any]:
    """A hub's server: names as Open Cluster Management gives them, and one connection that stalls."""
    names = [f"cluster-{number:048x}.open-cluster-management.proxy" for number in range(agents)]

    def at(uptime: float, moved: int) -> dict[str, Any]:
        made = document(
            uptime,
            *(
                connection(
                    number,
                    agent=f"proxy-agent-{number % agents}",
                    destination=f"{names[number % agents]}:7443",
                    bytes_to_client=moved if number else 9_000_000,
                    queued_to_client=16_777_216,
                )
                for number in range(connections)
            ),
        )
        made["agents"] = [
            {"id": f"proxy-agent-{number}", "identifiers": [f"host={name}", f"host=cluster{number}"],
             "age_s": 30.0, "connections": 1, "draining": False}
            for number, name in enumerate(names)
        ]  # fmt: skip
        made["totals"]["agents"] = agents
        return made

    before, now = at(1, 1_000_000), at(2, 3_000_000)
    add_rates(before, now)
    return now


def on_terminal(shown: dict[str, Any], width: int, height: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(fitting(shown, console))
    text = console.file
    assert isinstance(text, io.StringIO)
    return text.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100, 132, 200])
def test_names_are_cut_and_figures_are_not(width: int) -> None:
    lines = on_terminal(busy(2, 3), width, 40)
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if "16.8 MB" in line]
    assert len(rows) == 3
    assert all("cluster-" in row and "0 bytes/s" in row for row in rows)
    assert rows[0].rstrip().endswith("stalled")
    assert ["9.0 MB" in row for row in rows] == [True, False, False]
    assert ["2.0 MB/s" in row for row in rows] == [False, True, True]
    agents = [line.split() for line in lines if "host=" in line]
    assert [row[-5] for row in agents] == ["1", "1"], "the number of connections"
    assert [row[-2] for row in agents] == ["2.0", "2.0"], "the rate to clients"


def test_without_a_terminal_nothing_is_cut() -> None:
    text = drawn(busy(2, 3), width=100_000)
    assert "…" not in text
    assert f"host=cluster-{1:048x}.open-cluster-management.proxy host=cluster1" in text


@pytest.mark.parametrize("height", [24, 50])
def test_many_agents_leave_lines_to_connections(height: int) -> None:
    lines = on_terminal(busy(60, 90), 80, height)
    assert len(lines) <= height
    agents, connections = (
        [line for line in lines if sign in line] for sign in ("host=", "16.8 MB")
    )
    assert connections[0].rstrip().endswith("stalled")
    assert min(len(agents), len(connections)) >= (height - 12) // 2
    more = [line.strip() for line in lines if "more" in line]
    assert more == [f"and {60 - len(agents)} more", f"and {90 - len(connections)} more"]


def test_a_dumb_terminal_gets_the_tables_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = [document(1, connection(1)), document(2, connection(1))]
    monkeypatch.setattr("clusterproxy.cli.status.fetch", lambda _admin: looks.pop(0))
    monkeypatch.setattr("rich.console.Console.is_terminal", property(lambda _console: True))
    result = CliRunner(env={"TERM": "dumb"}).invoke(status, ["--interval=0.1"])
    assert result.exit_code == 0, result.output
    assert "service1:80" in result.output
    assert not looks


def test_few_connections_leave_lines_to_agents() -> None:
    lines = on_terminal(busy(60, 2), 80, 24)
    assert len(lines) <= 24
    assert sum("host=" in line for line in lines) == 11
    assert sum("16.8 MB" in line for line in lines) == 2


def test_texts_of_peers_do_no_harm() -> None:
    now = document(2, connection(1, destination="\x1b[2J[red]a\r\n:80"))
    add_rates(document(1), now)
    text = drawn(now)
    assert "\x1b" not in text
    assert "\r" not in text
    assert "�[2J[red]a��:80" in text


def test_a_server_that_is_not_ready_says_why() -> None:
    now = document(2)
    now["server"] |= {"ready": False, "reason": "shutting down"}
    add_rates(document(1), now)
    assert "not ready: shutting down" in drawn(now)
