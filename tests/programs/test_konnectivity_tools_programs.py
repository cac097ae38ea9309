"""konnectivity's test client and test server, ours and Go's with the same command lines, through proxies of both kinds."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Final, Self

import pytest
import trustme
from certificates import write_ca
from cluster import LOOPBACK, PATIENCE_S, PROGRAM, closed_port, wait_until
from go_tools import go_tool, needs_go
from test_client_programs import Pair

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Sequence
    from pathlib import Path

# The first use may have to build Go's tools.
pytestmark = [pytest.mark.programs, needs_go, pytest.mark.timeout(600)]

_PAGES_PORT: Final = 27390
_TOOLS: Final = ("ours", "go")


@pytest.fixture(
    scope="module",
    params=[
        ("ours", "tls"),
        ("ours", "uds"),
        ("ours", "connect"),
        ("go", "tls"),
    ],
    ids="-".join,
)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    pair = Pair(tmp_path_factory.mktemp("pair"), *request.param)
    try:
        yield pair
    finally:
        pair.close()


def tool(kind: str, name: str) -> tuple[str, ...]:
    return (*PROGRAM, name) if kind == "ours" else (str(go_tool(name)),)


@contextlib.contextmanager
def pages(kind: str) -> Generator[str]:
    """Serve in the block; gives the option that leads there."""
    command = (*tool(kind, "test-server"), f"--server-port={_PAGES_PORT}")
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(_pages_answer, "the test server listens")
            yield f"--request-port={_PAGES_PORT}"
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0


def _pages_answer() -> bool:
    try:
        with socket.create_connection((LOOPBACK, _PAGES_PORT), timeout=1):
            return True
    except OSError:
        return False


def _command(pair: Pair, kind: str, options: Sequence[str]) -> tuple[str, ...]:
    where = (
        ("--proxy-host=", "--proxy-port=0", f"--proxy-uds={pair.socket}")
        if pair.transport == "uds"
        else (
            f"--proxy-host={LOOPBACK}",
            f"--proxy-port={pair.port}",
            f"--ca-cert={pair.ca}",
            f"--client-cert={pair.client_cert}",
            f"--client-key={pair.client_key}",
        )
    )
    service = f"--request-host={LOOPBACK}"
    return (*tool(kind, "test-client"), *where, f"--mode={pair.mode}", service, *options)


def ask(
    pair: Pair, kind: str, *options: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        _command(pair, kind, options),
        # Go's client ends its connection at any signal, be it the one by which its runtime interrupts goroutines.
        env=os.environ | {"GODEBUG": "asyncpreemptoff=1"} | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(("client", "server"), [("ours", "ours"), ("ours", "go"), ("go", "ours")])
def test_a_request(pair: Pair, client: str, server: str) -> None:
    with pages(server) as port:
        done = ask(pair, client, port)
        assert done.returncode == 0, done.stderr
        assert "HTML Response:" in done.stderr
        assert "<p>The success test page!</p>" in done.stderr
        done = ask(pair, client, port, "--request-path=/error", "-v=4")
        assert done.returncode == 0, done.stderr
        assert "Internal Server Error" in done.stderr
        done = ask(pair, client, port, "--request-path=close")
        assert done.returncode == 1
        assert "failed to send request to client, got" in done.stderr


@pytest.mark.parametrize("client", _TOOLS)
def test_several_requests_and_their_delays(pair: Pair, client: str) -> None:
    with pages("ours") as port:
        began = time.monotonic()
        options = ("--test-requests=5", "--test-delay=1", "--after-delay=1")
        done = ask(pair, client, port, *options)
        assert 2 < time.monotonic() - began < 12
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("HTML Response:") == 5
        done = ask(pair, client, port, "--test-requests=2", "--request-path=close")
        assert done.returncode == 1
        assert "Requests failed: 2" in done.stderr


class _Service:
    """Answers one request, over TLS with a context, and keeps the connection."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self._context = context
        self._listener = socket.create_server((LOOPBACK, 0))
        self._listener.settimeout(PATIENCE_S)
        self.port = f"--request-port={self._listener.getsockname()[1]}"
        self.request = b""
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        self.connection: socket.socket
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(PATIENCE_S)
        if self._context is not None:
            self.connection = self._context.wrap_socket(self.connection, server_side=True)
        while b"\r\n\r\n" not in self.request:
            self.request += self.connection.recv(65536)
        answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
        self.connection.sendall(answer)

    def is_open(self, within_s: float) -> bool:
        self.connection.settimeout(within_s)
        try:
            return bool(self.connection.recv(1))
        except TimeoutError:
            return True
        except OSError:
            return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
        self.connection.close()
        self._listener.close()


@contextlib.contextmanager
def asking(pair: Pair, *options: str) -> Generator[subprocess.Popen[str]]:
    """Run our client in the block, until it is told to end; it has its answer when the block begins."""
    command = _command(pair, "ours", (*options, "--after-delay=60"))
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            while "HTML Response" not in (line := process.stderr.readline()):
                assert line, process.wait(PATIENCE_S)
            yield process
            process.terminate()
            assert process.wait(PATIENCE_S) == 1
        finally:
            process.kill()


def test_connections_are_closed_behind_their_answers_unless_they_shall_stay(pair: Pair) -> None:
    with _Service() as service, asking(pair, service.port):
        assert not service.is_open(PATIENCE_S)
        assert service.request.startswith(b"GET /success HTTP/1.1\r\n")
    with _Service() as service:
        with asking(pair, service.port, "--close-idle-conn=false"):
            assert service.is_open(0.3)
        assert not service.is_open(PATIENCE_S)


def test_https(pair: Pair, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(LOOPBACK).configure_cert(context)
    options = ("--request-proto=https", "--request-path=a b")
    with _Service(context) as service:
        trusted = {"SSL_CERT_FILE": write_ca(authority, tmp_path)}
        done = ask(pair, "ours", service.port, *options, **trusted)
        assert done.returncode == 0, done.stderr
        assert "hello" in done.stderr
        assert service.request.startswith(b"GET /a%20b HTTP/1.1\r\n")


@pytest.mark.parametrize("client", _TOOLS)
def test_what_cannot_be_reached(pair: Pair, client: str) -> None:
    done = ask(pair, client, f"--request-port={closed_port()}")
    assert done.returncode == 1
    assert "ailed request" in done.stderr
    if pair.transport != "uds":
        done = ask(pair, client, f"--proxy-port={closed_port()}")
        assert done.returncode == 1
        done = ask(pair, client, "--ca-cert=missing.crt", "--request-port=8000")
        assert done.returncode == 1
        assert "missing.crt" in done.stderr


def test_a_port_that_is_taken() -> None:
    with socket.create_server((LOOPBACK, _PAGES_PORT)):
        command = (*PROGRAM, "test-server", f"--server-port={_PAGES_PORT}")
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --server-port")
