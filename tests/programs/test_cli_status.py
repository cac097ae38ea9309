"""``clusterproxy status`` beside a real server."""

from __future__ import annotations

import json
import os
import pty
import signal
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest
from cluster import LOOPBACK, PROGRAM, Cluster, closed_port, service, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.programs


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), 27290)
    try:
        cluster.start_server()
        cluster.start_agent()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def destination(cluster: Cluster) -> Iterator[str]:
    """Where one connection goes that has carried something each way."""
    with (
        service("echo") as echo,
        cluster.listener("forward", echo) as forward,
        socket.create_connection((LOOPBACK, forward.port()), timeout=20) as sock,
    ):
        sock.sendall(b"x" * 5000)
        size = 0
        while size < 5000:
            size += len(sock.recv(5000))
        yield echo
    wait_until(lambda: not cluster.status()["connections"], "the connection is gone")


def test_one_snapshot_for_programs(cluster: Cluster, destination: str) -> None:
    done = cluster.run("status", "--json", "--interval=0.1")
    assert (done.returncode, done.stderr) == (0, b"")
    document = json.loads(done.stdout)
    (agent,) = document["agents"]
    assert (agent["id"], agent["identifiers"], agent["connections"]) == (
        "cluster1",
        ["cluster1"],
        1,
    )
    (one,) = document["connections"]
    assert one["destination"] == destination
    assert one["bytes_to_agent"] > 5000
    assert one["bytes_to_client"] > 5000
    assert (one["rate_to_agent"], one["stalled"]) == (0, False)


def test_tables_without_a_terminal(cluster: Cluster, destination: str) -> None:
    for arguments in ((), ("--once",)):
        done = cluster.run("status", "--interval=0.1", *arguments)
        assert done.returncode == 0, done.stderr
        text = done.stdout.decode()
        assert "1 agents, 1 connections" in text
        assert destination in text
        assert "\x1b" not in text


def test_the_live_view_until_ctrl_c(cluster: Cluster) -> None:
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        (*PROGRAM, "status", "--interval=0.1"),
        env=cluster.environment | {"TERM": "xterm"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    ) as status:
        os.close(terminal)
        output = b""
        while output.count(b"1 agents, 0 connections") < 3:
            output += os.read(controller, 65536)
        status.send_signal(signal.SIGINT)
        assert status.wait(timeout=20) == 0
    os.close(controller)
    assert b"Traceback" not in output


def test_an_admin_port_that_is_not_there_or_not_one(cluster: Cluster) -> None:
    done = cluster.run("status", ADMIN=f"{LOOPBACK}:{closed_port()}")
    assert done.returncode == 3
    assert b"Connection refused (does the server run there? --admin HOST:PORT" in done.stderr
    done = cluster.run("status", ADMIN=f"{LOOPBACK}:{cluster.health_port}")
    assert done.returncode == 3
    assert b"answers 404 and no status (is it the admin port" in done.stderr
    done = cluster.run("status", ADMIN="hub:port")
    assert done.returncode == 3
    assert done.stderr.count(b"\n") == 1
