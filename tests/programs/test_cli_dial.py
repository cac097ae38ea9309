"""``clusterproxy dial`` with real programs: what it carries, and how it ends."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
from cluster import PROGRAM, Cluster, closed_port, service

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.programs


@pytest.fixture(scope="module", params=["grpc", "http-connect"])
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), 27200, request.param)
    try:
        cluster.start_server()
        cluster.start_agent()
        yield cluster
    finally:
        cluster.close()


def test_a_service_that_speaks_first_and_ends(cluster: Cluster) -> None:
    with service("greeter") as address:
        done = cluster.run("dial", address)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hello from the cluster\n", b"")


def test_a_service_that_answers_at_the_end_of_the_input(cluster: Cluster) -> None:
    data = os.urandom(3_000_000)
    with service("reverse") as address:
        done = cluster.run("dial", address, send=data)
    assert done.returncode == 0, done.stderr
    assert done.stdout == data[::-1]
    assert done.stderr == b""


def test_files_as_input_and_output(cluster: Cluster, tmp_path: Path) -> None:
    data = os.urandom(1_000_000)
    (tmp_path / "in").write_bytes(data)
    with (
        service("reverse") as address,
        (tmp_path / "in").open("rb") as source,
        (tmp_path / "out").open("wb") as sink,
    ):
        subprocess.run(
            (*PROGRAM, "dial", address),
            stdin=source,
            stdout=sink,
            env=cluster.environment,
            check=True,
            timeout=20,
        )
    assert (tmp_path / "out").read_bytes() == data[::-1]


def test_output_that_nobody_reads_any_more(cluster: Cluster) -> None:
    with service("echo") as address:
        done = subprocess.run(
            (
                "sh",
                "-c",
                f"head -c 50000000 /dev/zero | {shlex.join(PROGRAM)} dial {address} | head -c 9",
            ),
            env=cluster.environment,
            capture_output=True,
            check=True,
            timeout=20,
        )
    assert (done.stdout, done.stderr) == (bytes(9), b"")


def test_input_that_stays_open_keeps_nobody(cluster: Cluster) -> None:
    with (
        service("greeter") as address,
        subprocess.Popen(
            (*PROGRAM, "dial", address),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=cluster.environment,
        ) as dial,
    ):
        assert dial.stdout is not None
        assert dial.stdout.read() == b"hello from the cluster\n"
        assert dial.wait(timeout=20) == 0


def test_ctrl_c(cluster: Cluster) -> None:
    with (
        service("echo") as address,
        subprocess.Popen(
            (*PROGRAM, "dial", address),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=cluster.environment,
        ) as dial,
    ):
        assert dial.stdin is not None
        assert dial.stdout is not None
        assert dial.stderr is not None
        dial.stdin.write(b"x")
        dial.stdin.flush()
        assert dial.stdout.read(1) == b"x"
        dial.send_signal(signal.SIGINT)
        assert dial.wait(timeout=20) == 130
        assert dial.stderr.read() == b""


def test_refused(cluster: Cluster) -> None:
    done = cluster.run("dial", f"127.0.0.1:{closed_port()}")
    assert done.returncode == 1
    text = done.stderr.decode()
    assert "failed at the service" in text
    assert "connection refused (nothing listens there, as the agent sees it)" in text
    assert text.count("\n") == 1


def test_a_name_that_the_agent_cannot_find(cluster: Cluster) -> None:
    done = cluster.run("dial", "nowhere.invalid:80")
    assert done.returncode == 1
    text = done.stderr.decode()
    assert text.startswith("Error: nowhere.invalid:80: failed at the agent: ")
    assert "names are looked up by the agent" in text


@pytest.mark.parametrize("target", ["cluster1", "a b:1", "cluster1:http", ":80", "cluster1:"])
def test_a_target_that_is_none(cluster: Cluster, target: str) -> None:
    done = cluster.run("dial", target)
    assert done.returncode == 2
    assert "HOST:PORT is needed" in done.stderr.decode()


@pytest.mark.parametrize(
    ("mode", "victim"),
    [
        ("grpc", "server"),
        ("grpc", "agent"),
        ("http-connect", "server"),
        ("http-connect", "agent"),
    ],
)
def test_something_goes_in_mid_transfer(mode: str, victim: str, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 27206, mode)
    try:
        cluster.start_server()
        cluster.start_agent()
        with (
            service("echo") as address,
            subprocess.Popen(
                (*PROGRAM, "dial", address),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=cluster.environment,
            ) as dial,
        ):
            assert dial.stdin is not None
            assert dial.stdout is not None
            assert dial.stderr is not None
            dial.stdin.write(b"x")
            dial.stdin.flush()
            assert dial.stdout.read(1) == b"x"
            cluster.kill(victim)
            assert dial.wait(timeout=20) == 4
            assert dial.stderr.read().startswith(b"Error: the connection broke: ")
    finally:
        cluster.close()
