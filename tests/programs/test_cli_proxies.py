"""``clusterproxy http-proxy`` and ``socks`` with real programs, curl among them."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from typing import TYPE_CHECKING

import pytest
from cluster import LOOPBACK, Cluster, closed_port, service

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.programs

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("cluster"), 27280)
    try:
        cluster.start_server()
        cluster.start_agent()
        yield cluster
    finally:
        cluster.close()


def curl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ("curl", "-sS", "--max-time", "20", "--noproxy", "", *arguments),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def talk(port: int, *parts: bytes) -> bytes:
    """Everything that a proxy says to *parts*, which go out one by one."""
    heard = b""
    with socket.create_connection((LOOPBACK, port), timeout=20) as sock:
        for part in parts:
            sock.sendall(part)
        sock.shutdown(socket.SHUT_WR)
        while more := sock.recv(65536):
            heard += more
    return heard


@needs_curl
@pytest.mark.parametrize("tunnel", [(), ("--proxytunnel",)])
def test_curl_through_the_http_proxy(cluster: Cluster, tunnel: tuple[str, ...]) -> None:
    via = "None" if tunnel else "1.1 clusterproxy"
    with service("web") as web, cluster.listener("http-proxy", "--listen=0") as proxy:
        where = ("-x", f"http://{LOOPBACK}:{proxy.port()}", *tunnel)
        url = f"http://{web}/a%20path?x=1"
        # The second time on the same connection.
        done = curl(*where, url, url)
        assert done.stdout == f"GET /a%20path?x=1 Host={web} Via={via}\n" * 2, done.stderr
        assert curl(*where, "-d", "x" * 100_000, url).stdout == "POST 100000 bytes\n"
        chunked = ("-H", "Transfer-Encoding: chunked", "-d", "x" * 100_000)
        assert curl(*where, *chunked, url).stdout == "POST 100000 bytes\n"


@needs_curl
def test_failed_dials_are_answers_and_lines(cluster: Cluster) -> None:
    closed = f"{LOOPBACK}:{closed_port()}"
    with cluster.listener("http-proxy", "--listen=0") as proxy:
        where = ("-x", f"http://{LOOPBACK}:{proxy.port()}")
        done = curl(*where, "-w", "%{http_code}", f"http://{closed}/")
        assert done.stdout.startswith(f"{closed}: failed at the service: ")
        assert done.stdout.endswith("502")
        assert proxy.complaint().startswith(f"{closed}: failed at the service: ")
        done = curl(*where, "-w", "%{http_connect}", f"https://{closed}/")
        assert done.returncode == 56
        assert done.stdout.endswith("502")


def test_what_is_behind_a_connect_request_goes_to_the_service(cluster: Cluster) -> None:
    with service("reverse") as reverse, cluster.listener("http-proxy", "--listen=0") as proxy:
        request = f"CONNECT {reverse} HTTP/1.1\r\nHost: {reverse}\r\n\r\n".encode()
        head, _, body = talk(proxy.port(), request + b"olleh").partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert body == b"hello"


@needs_curl
@pytest.mark.parametrize("version", ["--socks5-hostname", "--socks5", "--socks4a", "--socks4"])
def test_curl_through_socks(cluster: Cluster, version: str) -> None:
    with service("web") as web, cluster.listener("socks", "--listen=0") as proxy:
        done = curl(version, f"{LOOPBACK}:{proxy.port()}", f"http://{web}/")
        assert done.stdout == f"GET / Host={web} Via=None\n", done.stderr


@needs_curl
def test_names_are_looked_up_by_the_agent(cluster: Cluster) -> None:
    with service("web") as web, cluster.listener("socks", "--listen=0") as proxy:
        socks = f"{LOOPBACK}:{proxy.port()}"
        port = web.rpartition(":")[2]
        assert curl("--socks5-hostname", socks, f"http://localhost:{port}/").stdout
        done = curl("--socks5-hostname", socks, "http://nowhere.invalid/")
        assert done.returncode == 97
        assert "(4)" in done.stderr
        assert proxy.complaint().startswith("nowhere.invalid:80: failed at the agent: ")
        done = curl("--socks5-hostname", socks, f"http://{LOOPBACK}:{closed_port()}/")
        assert "(5)" in done.stderr


def test_an_http_client_at_the_socks_port_is_told_by_a_line(cluster: Cluster) -> None:
    with cluster.listener("socks", "--listen=0") as proxy:
        with contextlib.suppress(ConnectionResetError):
            assert talk(proxy.port(), b"GET / HTTP/1.1\r\n\r\n") == b""
        assert proxy.complaint() == "not a SOCKS client: its first byte is 0x47"
