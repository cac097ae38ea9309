"""What can be wrong between a command and its server: one message, an exit status, in the stated time."""

from __future__ import annotations

import datetime as dt
import re
import socket
import time
from typing import TYPE_CHECKING

import pytest
import trustme
from certificates import write_ca
from cluster import LOOPBACK, Cluster, closed_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from subprocess import CompletedProcess

pytestmark = pytest.mark.programs


@pytest.fixture(scope="module", params=["grpc", "http-connect"])
def cluster(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """A server without agents."""
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), 27220, request.param)
    try:
        cluster.start_server()
        yield cluster
    finally:
        cluster.close()


def message(done: CompletedProcess[bytes]) -> str:
    """The one line on stderr, and nothing on stdout."""
    text = done.stderr.decode()
    assert not done.stdout
    assert text.startswith("Error: ")
    assert text.count("\n") == 1
    return text.removeprefix("Error: ").rstrip()


COMMANDS = [("dial", "cluster1:80"), ("forward", "cluster1:80"), ("socks", "--listen=0"), ("http-proxy", "--listen=0")]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_server_gone(cluster: Cluster, command: tuple[str, ...]) -> None:
    server = f"{LOOPBACK}:{closed_port()}"
    done = cluster.run(*command, SERVER=server)
    assert done.returncode == 3
    assert message(done) == f"proxy server {server}: connection refused (is it running there?)"


def test_no_agent(cluster: Cluster) -> None:
    done = cluster.run("dial", "cluster1:80")
    assert done.returncode == 1
    text = message(done)
    assert text.startswith("cluster1:80: failed at the server: ")
    assert "is the cluster's agent connected to this proxy server?" in text


def test_wrong_ca(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.run("dial", "cluster1:80", CA_CERT=write_ca(trustme.CA(), tmp_path))
    assert done.returncode == 3
    assert re.fullmatch(
        r"proxy server .*: its certificate is not trusted: .* "
        r"\(check that the CA certificate is that of this server\)",
        message(done),
    )


def test_wrong_name(cluster: Cluster) -> None:
    done = cluster.run("dial", "cluster1:80", SERVER_NAME="other.example")
    assert done.returncode == 3
    text = message(done)
    assert "other.example" in text
    assert "set the server name" in text


def test_no_certificate_of_our_own(cluster: Cluster) -> None:
    done = cluster.run("dial", "cluster1:80", CERT="", KEY="")
    assert done.returncode == 3
    assert "check the client's cert and key" in message(done)


def test_expired_certificate(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, 27230)
    authority = trustme.CA()
    cluster.ca = write_ca(authority, tmp_path, "expired-ca")
    yesterday = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
    leaf = authority.issue_cert(LOOPBACK, not_after=yesterday)
    leaf.private_key_and_cert_chain_pem.write_to_path(tmp_path / "expired.pem")
    expired = str(tmp_path / "expired.pem")
    try:
        cluster.start_server(cert=expired, key=expired)
        done = cluster.run("dial", "cluster1:80", CA_CERT=cluster.ca)
    finally:
        cluster.close()
    assert done.returncode == 3
    text = message(done)
    assert "certificate has expired" in text
    assert "renew it" in text


def test_a_server_that_accepts_and_says_nothing(cluster: Cluster) -> None:
    with socket.create_server((LOOPBACK, 0)) as silent:
        server = f"{LOOPBACK}:{silent.getsockname()[1]}"
        began = time.monotonic()
        done = cluster.run("dial", "cluster1:80", "--timeout=1", SERVER=server)
        took = time.monotonic() - began
    assert done.returncode == 3
    assert (
        message(done) == f"proxy server {server}: no answer within 1 s (is it the right address?)"
    )
    assert took < 5


def test_a_server_that_has_no_tls(cluster: Cluster) -> None:
    done = cluster.run("dial", "cluster1:80", SERVER=f"{LOOPBACK}:{cluster.health_port}")
    assert done.returncode == 3
    assert "is it" in message(done)


def test_a_server_of_the_other_mode(cluster: Cluster) -> None:
    other = {"grpc": "http-connect", "http-connect": "grpc"}[cluster.mode]
    done = cluster.run("dial", "cluster1:80", "--timeout=5", MODE=other)
    assert done.returncode == 3
    assert f"proxy server {LOOPBACK}:{cluster.port}: " in message(done)


def test_a_server_without_an_address(cluster: Cluster) -> None:
    done = cluster.run("dial", "cluster1:80", SERVER="nowhere.invalid:8090")
    assert done.returncode == 3
    text = message(done)
    assert text.startswith("proxy server nowhere.invalid:8090: no such host: ")
    assert "check the name" in text


def test_a_unix_socket_that_is_not_there(cluster: Cluster) -> None:
    done = cluster.run("dial", "cluster1:80", SERVER="unix:///nowhere/proxy.sock")
    assert done.returncode == 3
    assert "proxy server unix:///nowhere/proxy.sock: there is no such socket" in message(done)


@pytest.mark.parametrize(
    ("variable", "option"), [("CA_CERT", "--ca-cert"), ("CERT", "--cert"), ("KEY", "--key")]
)
def test_a_file_that_is_not_there(cluster: Cluster, variable: str, option: str) -> None:
    done = cluster.run("dial", "cluster1:80", **{variable: "/nowhere.pem"})
    assert done.returncode == 2
    text = message(done)
    assert text.startswith(f"{option}: ")
    assert "/nowhere.pem" in text


def test_a_server_address_that_is_none(cluster: Cluster) -> None:
    done = cluster.run("dial", "cluster1:80", SERVER="hub")
    assert done.returncode == 2
    assert message(done).startswith("--server: 'hub' is no server: ")


def test_a_broken_config_file(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[contexts.hub]\nserver = hub:8090\n")
    done = cluster.run("dial", "cluster1:80", f"--config={path}")
    assert done.returncode == 2
    assert message(done) == f"{path}:2:10: not TOML: Invalid value"


@pytest.mark.parametrize("command", ["forward", "socks", "http-proxy"])
def test_a_port_that_is_taken(cluster: Cluster, command: str) -> None:
    with socket.create_server((LOOPBACK, 0)) as other:
        port = other.getsockname()[1]
        target = ["cluster1:80"] if command == "forward" else []
        done = cluster.run(command, *target, f"--listen={port}")
    assert done.returncode == 5
    assert (
        message(done)
        == f"cannot listen on tcp {LOOPBACK}:{port}: Address already in use (port 0 takes a free one)"
    )


def test_a_path_that_cannot_be_listened_on(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a socket")
    for path, reason in (
        (tmp_path / "file", "Address already in use"),
        (tmp_path / "no/folder", "No such file or directory"),
    ):
        done = cluster.run("forward", f"cluster1:80=unix:{path}")
        assert done.returncode == 5
        assert message(done) == f"cannot listen on unix {path}: {reason}"
    assert (tmp_path / "file").read_text() == "not a socket"


def test_a_socket_that_a_killed_program_left(cluster: Cluster, tmp_path: Path) -> None:
    path = str(tmp_path / "left.sock")
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(path)
        left.listen()
        done = cluster.run("forward", f"cluster1:80=unix:{path}")
        assert done.returncode == 5
    with cluster.listener("forward", f"cluster1:80=unix:{path}") as forward:
        assert forward.address() == f"unix:{path}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["a:1=8080", "--listen=8081"],
        ["a:1", "b:1", "--listen=8081"],
        ["a:1=nowhere"],
        ["a:1=65536"],
        ["a=8080"],
        [],
    ],
)
def test_wrong_usage_of_forward(cluster: Cluster, arguments: list[str]) -> None:
    done = cluster.run("forward", *arguments)
    assert done.returncode == 2
    assert b"Usage: " in done.stderr


def test_a_frozen_server_in_the_middle(tmp_path: Path) -> None:
    """Half open: its sockets are there and nobody answers any more."""
    cluster = Cluster(tmp_path, 27240)
    try:
        cluster.start_server()
        with cluster.listener("forward", "cluster1:80", "--timeout=1") as forward:
            port = forward.port()
            cluster.freeze("server")
            began = time.monotonic()
            with (
                pytest.raises(ConnectionResetError),
                socket.create_connection((LOOPBACK, port), timeout=20) as sock,
            ):
                sock.recv(1)
            assert time.monotonic() - began < 10
            line = forward.complaint()
    finally:
        cluster.close()
    assert line.startswith("cluster1:80: failed at the ")
    assert "within 1 s" in line
