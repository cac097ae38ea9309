"""A server, an agent and services on loopback, as programs, for tests of the commands that use them."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Final
from urllib.request import urlopen

import trustme
from certificates import write_ca, write_pair

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

LOOPBACK: Final = "127.0.0.1"
PROGRAM: Final = (sys.executable, "-m", "clusterproxy")
PATIENCE_S: Final = 20.0


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something in other processes, of which there is no event to wait for."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"timed out: {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def running(*arguments: str, **options: Any) -> Generator[subprocess.Popen[str]]:
    """Run a command of clusterproxy in the block."""
    with subprocess.Popen(
        (*PROGRAM, *arguments),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


class Cluster:
    """Certificates, and the programs that are started with them.

    Attributes:
      environment: tells client commands where the server is and which files to use.
    """

    def __init__(self, directory: Path, first_port: int, mode: str = "grpc") -> None:
        self.directory = directory
        self.mode = mode
        self.port, self.agent_port, self.health_port, self.admin_port = range(
            first_port, first_port + 4
        )
        self.agent_health_port, self.agent_admin_port = first_port + 4, first_port + 5
        authority = trustme.CA()
        self.ca = write_ca(authority, directory)
        self.cert, self.key = write_pair(authority, directory, "server", LOOPBACK)
        self.client_cert, self.client_key = write_pair(
            authority, directory, "client", "client.test"
        )
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("CLUSTERPROXY_") and not name.lower().endswith("_proxy")
        } | {
            "HOME": str(directory),
            "CLUSTERPROXY_SERVER": f"{LOOPBACK}:{self.port}",
            "CLUSTERPROXY_MODE": mode,
            "CLUSTERPROXY_CA_CERT": self.ca,
            "CLUSTERPROXY_CERT": self.client_cert,
            "CLUSTERPROXY_KEY": self.client_key,
            "CLUSTERPROXY_ADMIN": f"{LOOPBACK}:{self.admin_port}",
        }
        self._programs: dict[str, subprocess.Popen[bytes]] = {}

    def start_server(self, *options: str, cert: str = "", key: str = "") -> None:
        self._start(
            "server",
            f"--mode={self.mode}",
            f"--server-bind-address={LOOPBACK}",
            f"--agent-bind-address={LOOPBACK}",
            f"--server-port={self.port}",
            f"--agent-port={self.agent_port}",
            f"--health-port={self.health_port}",
            f"--admin-port={self.admin_port}",
            f"--server-ca-cert={self.ca}",
            f"--server-cert={cert or self.cert}",
            f"--server-key={key or self.key}",
            f"--cluster-ca-cert={self.ca}",
            f"--cluster-cert={self.cert}",
            f"--cluster-key={self.key}",
            *options,
        )
        wait_until(lambda: self._probe("healthz"), "the server listens")

    def start_agent(self, *options: str) -> None:
        self._start(
            "agent",
            f"--proxy-server-host={LOOPBACK}",
            f"--proxy-server-port={self.agent_port}",
            f"--ca-cert={self.ca}",
            f"--agent-cert={self.client_cert}",
            f"--agent-key={self.client_key}",
            "--agent-id=cluster1",
            "--agent-identifiers=host=cluster1",
            f"--health-server-host={LOOPBACK}",
            f"--health-server-port={self.agent_health_port}",
            f"--admin-bind-address={LOOPBACK}",
            f"--admin-server-port={self.agent_admin_port}",
            "--sync-interval=100ms",
            *options,
        )
        self.wait_for_agent()

    def wait_for_agent(self) -> None:
        wait_until(lambda: self._probe("readyz"), "the agent is connected")

    def _start(self, name: str, *options: str) -> None:
        with (self.directory / f"{name}.log").open("ab") as log:
            self._programs[name] = subprocess.Popen(
                (*PROGRAM, name, *options), stdout=log, stderr=log, cwd=self.directory
            )

    def _probe(self, path: str) -> bool:
        for name, process in self._programs.items():
            assert process.poll() is None, (self.directory / f"{name}.log").read_text()
        try:
            with urlopen(f"http://{LOOPBACK}:{self.health_port}/{path}", timeout=5):
                return True
        except OSError:
            return False

    def kill(self, name: str) -> None:
        """End a program as a crash would."""
        process = self._programs.pop(name)
        process.kill()
        process.wait()

    def freeze(self, name: str) -> None:
        """Have a program hold its sockets open and do nothing any more."""
        self._programs[name].send_signal(signal.SIGSTOP)

    def pid(self, name: str) -> int:
        return self._programs[name].pid

    def close(self) -> None:
        for name in list(self._programs):
            self.kill(name)

    def status(self) -> Any:
        with urlopen(f"http://{LOOPBACK}:{self.admin_port}/status", timeout=5) as answer:
            return json.load(answer)

    # -- commands ----------------------------------------------------------------------------------

    def run(
        self, *arguments: str, send: str | bytes = b"", **changes: str
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a client command to its end; *changes* are variables without ``CLUSTERPROXY_``."""
        done = subprocess.run(
            (*PROGRAM, *arguments),
            input=send.encode() if isinstance(send, str) else send,
            env=self._changed(changes),
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return done

    @contextlib.contextmanager
    def listener(self, *arguments: str, **changes: str) -> Generator[Listener]:
        """Run a command that listens until the block ends; SIGTERM must end it well."""
        with running(*arguments, env=self._changed(changes)) as process:
            yield Listener(process)
            process.terminate()
            _, rest = process.communicate(timeout=PATIENCE_S)
            assert process.returncode == 0, rest
            assert "Traceback" not in rest, rest

    def _changed(self, changes: dict[str, str]) -> dict[str, str]:
        return self.environment | {f"CLUSTERPROXY_{name}": text for name, text in changes.items()}


class Listener:
    """A running ``forward``, ``http-proxy`` or ``socks``."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def address(self) -> str:
        """The next address that it says it listens on."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " -> " in line, self.process.communicate(timeout=PATIENCE_S)
        return line.partition(" -> ")[0]

    def port(self) -> int:
        return int(self.address().rpartition(":")[2])

    def complaint(self) -> str:
        """The next line on stderr."""
        assert self.process.stderr is not None
        return self.process.stderr.readline().rstrip()


class _Threads(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64


class _Reverse(socketserver.StreamRequestHandler):
    """Answers at the end of the request only: nothing works with it but half-close."""

    def handle(self) -> None:
        self.wfile.write(self.rfile.read()[::-1])


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while data := self.request.recv(65536):
            self.request.sendall(data)


class _Greeter(socketserver.BaseRequestHandler):
    """Speaks first, and ends."""

    def handle(self) -> None:
        self.request.sendall(b"hello from the cluster\n")


class _Web(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(
            f"{self.command} {self.path} Host={self.headers['Host']} Via={self.headers['Via']}\n"
        )

    def do_POST(self) -> None:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(f"{self.command} {len(body)} bytes\n")

    def _answer(self, text: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class _Page(_Web):
    """Answers as the service of the demo."""

    def do_GET(self) -> None:
        self._answer("Hello from the managed cluster!\n")


_HANDLERS: Final = {
    "page": _Page,
    "reverse": _Reverse,
    "echo": _Echo,
    "greeter": _Greeter,
    "web": _Web,
}


@contextlib.contextmanager
def service(kind: str) -> Generator[str]:
    """Serve on loopback in the block; its address is what an agent dials."""
    with _Threads((LOOPBACK, 0), _HANDLERS[kind]) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"{LOOPBACK}:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def closed_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server((LOOPBACK, 0)) as server:
        return int(server.getsockname()[1])
