"""``clusterproxy bench`` for a moment: that its figures agree with each other, not how large they are."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cluster import LOOPBACK, PATIENCE_S, PROGRAM, Cluster, closed_port, service, wait_until

from clusterproxy.bench.plan import UNITS

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.programs


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """An environment that names no server, and a look for remains afterwards."""
    remains = tmp_path / "tmp"
    remains.mkdir()
    clean = {name: text for name, text in os.environ.items() if not name.startswith("CLUSTERPROXY_")}  # fmt: skip
    yield clean | {"HOME": str(tmp_path), "TMPDIR": str(remains)}
    assert list(remains.iterdir()) == []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), 27320)
    try:
        cluster.start_server()
        cluster.start_agent()
        yield cluster
    finally:
        cluster.close()


def check(row: dict[str, Any]) -> None:
    assert row["errors"] == {}, row
    assert len(row["samples"]) == 1
    assert row["median"] == row["samples"][0] > 0
    assert row["unit"] == UNITS[row["workload"]]
    assert (row["tunnel"] is None) == (row["path"] == "direct")
    assert "client" in row["rss_mib"]
    assert ("server" in row["rss_mib"]) == (row["path"] == "tunnel")
    assert (row["of_direct"] is not None) == (row["path"] == "tunnel" and row["workload"] != "idle")
    if row["workload"] in ("read", "write", "both"):
        rate = row["bytes"][0] * 8 / 1e6 / row["seconds"][0]
        assert row["median"] == pytest.approx(rate, rel=0.01)
        assert row["seconds"][0] >= 0.3
        assert row["cpu_s_per_gib"]["client"] > 0
    if row["workload"] in ("latency", "beside"):
        assert row["distribution"] == sorted(row["distribution"])
        assert row["p50"] <= row["p90"] <= row["p99"] <= row["distribution"][100]
        assert row["median"] == row["p50"]


def test_all_of_it_with_its_own_server(environment: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        (
            *PROGRAM, "bench", "--duration=300ms", "--warmup=100ms", "--connections=2", "--tunnels=20",
            "--json=report.json", "--plots=plots",
        ),
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "own server and agent  grpc  1 x 0.3 s" in done.stdout
    document = json.loads((tmp_path / "report.json").read_text())
    assert [(row["workload"], row["connections"], row["tunnel"]) for row in document["rows"]] == [
        ("idle", 20, "single-use"),
        *((name, 2, way) for name in ("read", "write", "both") for way in (None, "reusable")),
        *((name, count, way) for name, count in (("latency", 1), ("beside", 2)) for way in (None, "reusable")),
        *(("dial", 2, way) for way in (None, "reusable", "single-use")),
    ]  # fmt: skip
    for row in document["rows"]:
        check(row)
    assert document["rows"][0]["kib_per_tunnel"].keys() == {"server", "agent", "client"}
    assert not document["interrupted"]
    pictures = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"throughput.png", "throughput.svg", "latency.png", "cpu.svg"} <= pictures


@pytest.mark.parametrize("mode", ["grpc", "http-connect"])
def test_its_own_server_in_each_mode(environment: dict[str, str], mode: str) -> None:
    done = subprocess.run(
        (
            *PROGRAM, "bench", f"--mode={mode}", "--workload=read,write,dial", "--connections=2", "--single-use",
            "--duration=300ms", "--no-direct", "--json=-",
        ),
        env=environment, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert document["setting"]["mode"] == mode
    ways = [row["tunnel"] for row in document["rows"]]
    assert ways == ["single-use"] * 3 + ["reusable"] * (mode == "grpc")
    for row in document["rows"]:
        check(row | {"of_direct": 1})


def test_a_given_server_and_services_of_its_own(cluster: Cluster) -> None:
    done = cluster.run(
        "bench", "--target-host=localhost", "--workload=read,write,idle", "--duration=300ms", "--connections=1",
        "--tunnels=5", "--json=-", f"--watch=server={cluster.pid('server')}", f"--watch=agent={cluster.pid('agent')}",
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    document = json.loads(done.stdout)
    assert document["setting"]["server"] == f"{LOOPBACK}:{cluster.port}"
    assert [row["path"] for row in document["rows"]] == ["tunnel"] * 3
    for row in document["rows"][1:]:
        assert row["cpu_s_per_gib"].keys() == {"server", "agent", "client"}
        check(row | {"of_direct": 1})


def test_services_that_are_there(cluster: Cluster) -> None:
    with service("echo") as echo:
        done = cluster.run(
            "bench", f"--echo={echo}", f"--source={LOOPBACK}:{closed_port()}", "--workload=read,latency,dial", "--direct",
            "--duration=300ms", "--connections=1", "--json=-",
        )  # fmt: skip
    # Of a workload of which nothing works the others do not suffer.
    assert done.returncode == 1
    rows = json.loads(done.stdout)["rows"]
    assert [row["workload"] for row in rows if row["median"] is None] == ["read", "read"]
    (refused,) = rows[1]["errors"]
    assert "failed at the service" in refused
    assert [row["workload"] for row in rows if row["median"]] == ["latency"] * 2 + ["dial"] * 3


def test_a_server_that_is_not_there(cluster: Cluster) -> None:
    done = cluster.run("bench", "--target-host=localhost", SERVER=f"{LOOPBACK}:{closed_port()}")
    assert done.returncode == 3
    assert (done.stdout, done.stderr.count(b"\n")) == (b"", 1)
    assert b"connection refused (is it running there?)" in done.stderr


def test_ctrl_c_shows_what_was_measured(environment: dict[str, str], tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        (*PROGRAM, "bench", "--workload=latency,read", "--connections=1", "--duration=300ms", "--rounds=1000", "--json=report.json"),
        env=environment | {"TERM": "xterm"}, cwd=tmp_path, stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, text=True,
    ) as bench:  # fmt: skip
        os.close(terminal)
        shown = b""
        # The bar says how many of the cases are done.
        while b"2/4000" not in shown:
            shown += os.read(controller, 65536)
        bench.send_signal(signal.SIGINT)
        table, _ = bench.communicate(timeout=PATIENCE_S)
    os.close(controller)
    assert bench.returncode == 130
    assert b"Traceback" not in shown
    assert "(interrupted)" in table
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["interrupted"]
    assert document["rows"][0]["median"] > 0


def test_its_own_server_that_dies(environment: dict[str, str], tmp_path: Path) -> None:
    with subprocess.Popen(
        (*PROGRAM, "bench", "--workload=read", "--duration=20s"),
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as bench:  # fmt: skip
        wait_until(lambda: bool(servers(bench.pid)), "its server runs")
        os.kill(servers(bench.pid)[0], signal.SIGKILL)
        _, text = bench.communicate(timeout=PATIENCE_S)
    assert bench.returncode == 1
    assert "server: ended with status -9" in text
    assert "Traceback" not in text


def servers(parent: int) -> list[int]:
    """The children of a process that are proxy servers."""
    # Each thread has children of its own.
    lists = [path.read_text().split() for path in Path(f"/proc/{parent}/task").glob("*/children")]
    return [
        int(pid)
        for pids in lists
        for pid in pids
        if "\0clusterproxy\0server\0" in Path(f"/proc/{pid}/cmdline").read_text()
    ]
