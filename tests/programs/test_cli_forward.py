"""``clusterproxy forward`` with real programs."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from typing import TYPE_CHECKING

import pytest
from cluster import LOOPBACK, Cluster, Listener, closed_port, service

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.programs


@pytest.fixture(params=["grpc", "http-connect"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def cluster(mode: str, tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, 27210, mode)
    try:
        cluster.start_server()
        cluster.start_agent()
        yield cluster
    finally:
        cluster.close()


def connect(port: int) -> socket.socket:
    return socket.create_connection((LOOPBACK, port), timeout=20)


def read_all(sock: socket.socket) -> bytes:
    data = b""
    while more := sock.recv(65536):
        data += more
    return data


def check_end(sock: socket.socket, forward: Listener, target: str) -> None:
    """Something has gone on the way: with a reset there is a line, an end in order needs none."""
    try:
        assert read_all(sock) == b""
    except ConnectionResetError:
        assert forward.complaint().startswith(f"{target}: the connection broke: ")


def test_several_at_once_on_tcp_and_unix(cluster: Cluster, tmp_path: Path) -> None:
    path = str(tmp_path / "local.sock")
    with (
        service("greeter") as greeter,
        service("reverse") as reverse,
        cluster.listener("forward", greeter, f"{reverse}=0", f"{reverse}=unix:{path}") as forward,
    ):
        with connect(forward.port()) as sock:
            assert read_all(sock) == b"hello from the cluster\n"
        tcp = connect(forward.port())
        assert forward.address() == f"unix:{path}"
        unix = socket.socket(socket.AF_UNIX)
        unix.settimeout(20)
        unix.connect(path)
        for sock in (tcp, unix):
            with sock:
                sock.sendall(b"olleh")
                sock.shutdown(socket.SHUT_WR)
                assert read_all(sock) == b"hello"
    assert not os.path.exists(path)


def test_one_target_on_several_addresses(cluster: Cluster) -> None:
    with (
        service("greeter") as greeter,
        cluster.listener("forward", greeter, "--listen=0", "--listen=[::1]:0") as forward,
    ):
        assert forward.address().startswith("127.0.0.1:")
        host, _, port = forward.address().rpartition(":")
        assert host == "[::1]"
        with socket.create_connection(("::1", int(port)), timeout=20) as sock:
            assert read_all(sock) == b"hello from the cluster\n"


def test_a_large_copy_both_ways(cluster: Cluster) -> None:
    block = os.urandom(1 << 20)
    count = 64
    sent, received, size = hashlib.sha256(), hashlib.sha256(), 0
    with (
        service("echo") as echo,
        cluster.listener("forward", echo) as forward,
        connect(forward.port()) as sock,
    ):

        def send() -> None:
            for _ in range(count):
                sent.update(block)
                sock.sendall(block)
            sock.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        while data := sock.recv(1 << 20):
            received.update(data)
            size += len(data)
        sender.join()
    assert size == count << 20
    assert received.digest() == sent.digest()


def test_a_failed_dial_is_one_line_and_the_next_connection_works(cluster: Cluster) -> None:
    closed = f"{LOOPBACK}:{closed_port()}"
    with service("greeter") as greeter, cluster.listener("forward", closed, greeter) as forward:
        with pytest.raises(ConnectionResetError), connect(forward.port()) as sock:
            read_all(sock)
        line = forward.complaint()
        assert line.startswith(f"{closed}: failed at the service: ")
        assert line.endswith("connection refused (nothing listens there, as the agent sees it)")
        with connect(forward.port()) as sock:
            assert read_all(sock) == b"hello from the cluster\n"


def test_the_server_goes_and_comes_back(cluster: Cluster) -> None:
    with service("echo") as echo, cluster.listener("forward", echo) as forward:
        port = forward.port()
        with connect(port) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            cluster.kill("server")
            check_end(sock, forward, echo)
        with pytest.raises(ConnectionResetError), connect(port) as sock:
            read_all(sock)
        line = forward.complaint()
        assert f"{echo}: failed at the server: proxy server {LOOPBACK}:{cluster.port}: " in line
        assert "connection refused (is it running there?)" in line
        cluster.start_server()
        cluster.wait_for_agent()
        with connect(port) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"


def test_the_agent_goes_in_mid_transfer_and_comes_back(cluster: Cluster) -> None:
    with service("echo") as echo, cluster.listener("forward", echo) as forward:
        port = forward.port()
        with connect(port) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
            cluster.kill("agent")
            check_end(sock, forward, echo)
        with pytest.raises(ConnectionResetError), connect(port) as sock:
            read_all(sock)
        line = forward.complaint()
        assert line.startswith(f"{echo}: failed at the server: ")
        assert "is the cluster's agent connected to this proxy server?" in line
        cluster.start_agent()
        with connect(port) as sock:
            sock.sendall(b"x")
            assert sock.recv(1) == b"x"
