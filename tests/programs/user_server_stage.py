"""A hub with a user server, and clusters behind it: our server, agents and user server as programs on loopback."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import ssl
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

from certificates import write_pair
from cluster import LOOPBACK, PROGRAM, Cluster, wait_until

from clusterproxy.tunnel.agent_identity import service_proxy_host

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    import trustme

NAMESPACE: Final = "hub-home"
CONFIG_MAP: Final = "cluster-proxy-exposed-services"

SERVICE_PROXY_PORT: Final = 7443

# In a pod hostAliases do this.
_AGENT: Final = """
import os, socket
hosts = dict(pair.split("=") for pair in os.environ["TEST_HOSTS"].split(","))
look_up = socket.getaddrinfo
def getaddrinfo(host, *args, **kwargs):
    name = host.decode() if isinstance(host, bytes) else host
    return look_up(hosts.get(name, host), *args, **kwargs)
socket.getaddrinfo = getaddrinfo
from clusterproxy.cli.agent import main
raise SystemExit(main())
"""


class Hub(Cluster):
    """A proxy server, a user server, and agents of clusters whose service proxies are at addresses of loopback.

    Args:
      kubeconfig: what the user server reaches its apiserver with.
    """

    def __init__(
        self,
        directory: Path,
        first_port: int,
        authority: trustme.CA,
        *,
        kubeconfig: Path,
        clusters: dict[str, str],
        namespace: str = NAMESPACE,
    ) -> None:
        super().__init__(directory, first_port)
        self.user_port, self.user_health_port = first_port + 6, first_port + 7
        self.clusters = clusters
        self.user_cert, self.user_key = write_pair(authority, directory, "user", LOOPBACK)
        self.service_proxy_ca = str(directory / "service-proxy-ca.crt")
        authority.cert_pem.write_to_path(self.service_proxy_ca)
        self._kubeconfig = kubeconfig
        #: What is run instead of our own program of a name.
        self.commands: dict[str, tuple[str, ...]] = {"agent": (sys.executable, "-c", _AGENT)}
        self.process_environment = os.environ | {
            "POD_NAMESPACE": namespace,
            "TEST_HOSTS": ",".join(
                f"{service_proxy_host(name)}={address}" for name, address in clusters.items()
            ),
        }

    def start(self, *options: str) -> None:
        self.start_server("--proxy-strategies=destHost")
        self.start_agents()
        self.start_user_server(*options)

    def start_agents(self) -> None:
        """Run one agent that plays those of all clusters."""
        hosts = "&".join(f"host={service_proxy_host(name)}" for name in self.clusters)
        self.start_agent(f"--agent-identifiers={hosts}")

    def user_server_options(self) -> tuple[str, ...]:
        return (
            f"--host={LOOPBACK}",
            f"--port={self.port}",
            f"--proxy-ca-cert={self.ca}",
            f"--proxy-cert={self.client_cert}",
            f"--proxy-key={self.client_key}",
            f"--server-port={self.user_port}",
            f"--server-cert={self.user_cert}",
            f"--server-key={self.user_key}",
            f"--service-proxy-ca-cert={self.service_proxy_ca}",
            f"--health-port={self.user_health_port}",
            f"--kubeconfig={self._kubeconfig}",
        )

    def start_user_server(self, *options: str) -> None:
        self._start("user-server", *self.user_server_options(), *options)
        wait_until(lambda: self.health("readyz")[0] == 200, "the user server is ready")

    def _start(self, name: str, *options: str) -> None:
        command = self.commands.get(name, (*PROGRAM, name))
        with (self.directory / f"{name}.log").open("ab") as log:
            self._programs[name] = subprocess.Popen(
                (*command, *options),
                stdout=log,
                stderr=log,
                cwd=self.directory,
                env=self.process_environment,
            )

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def process(self, name: str) -> subprocess.Popen[bytes]:
        return self._programs[name]

    def health(self, path: str) -> tuple[int, str]:
        """What the health port says: status and text; 0 while it does not listen."""
        process = self._programs["user-server"]
        assert process.poll() in {None, 0}, self.log("user-server")
        try:
            with urlopen(f"http://{LOOPBACK}:{self.user_health_port}/{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except OSError as error:
            code: int = getattr(error, "code", 0)
            return code, error.read().decode() if code else ""  # type: ignore[attr-defined]

    def metric(self, line: str) -> float:
        """The value of the sample that begins so, 0 without one."""
        _, text = self.health("metrics")
        return next(
            (
                float(found.rpartition(" ")[2])
                for found in text.splitlines()
                if found.startswith(line)
            ),
            0.0,
        )


# -- an apiserver for programs that need one for ConfigMaps only ---------------------------------------


class ConfigMaps:
    """Answers list and watch of ConfigMaps of one namespace, over plain HTTP."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.version = 1
        self.objects: dict[str, dict[str, str]] = {}
        self.history: list[tuple[int, str, Any]] = []
        handler = type("_Bound", (_Apiserver,), {"world": self})
        self._server = http.server.ThreadingHTTPServer((LOOPBACK, 0), handler)
        self._server.daemon_threads = True

    def put(self, name: str, data: dict[str, str] | None) -> None:
        with self.changed:
            self.version += 1
            kind = "MODIFIED" if name in self.objects else "ADDED"
            if data is None:
                kind, data = "DELETED", self.objects.pop(name)
            else:
                self.objects[name] = data
            self.history.append((self.version, kind, self.render(name, data)))
            self.changed.notify_all()

    def render(self, name: str, data: dict[str, str]) -> Any:
        metadata = {"name": name, "namespace": NAMESPACE, "resourceVersion": str(self.version)}
        return {"metadata": metadata, "data": data}

    @contextlib.contextmanager
    def serving(self, directory: Path) -> Generator[Path]:
        """Serve in the block; yields a kubeconfig."""
        thread = threading.Thread(target=self._server.serve_forever)
        thread.start()
        path = directory / "kubeconfig"
        port = self._server.server_address[1]
        path.write_text(
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "c",
                    "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                    "clusters": [{"name": "c", "cluster": {"server": f"http://{LOOPBACK}:{port}"}}],
                    "users": [{"name": "u", "user": {"token": "t"}}],
                }
            )
        )
        try:
            yield path
        finally:
            self._server.shutdown()
            self._server.server_close()
            with self.changed:
                self.changed.notify_all()
            thread.join()


class _Apiserver(http.server.BaseHTTPRequestHandler):
    world: ConfigMaps
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = parse_qs(url.query)
        assert url.path == f"/api/v1/namespaces/{NAMESPACE}/configmaps", url.path
        name = query["fieldSelector"][0].removeprefix("metadata.name=")
        world = self.world
        if "watch" not in query:
            with world.changed:
                data = world.objects.get(name)
                items = [] if data is None else [world.render(name, data)]
                body = json.dumps(
                    {
                        "apiVersion": "v1",
                        "kind": "ConfigMapList",
                        "metadata": {"resourceVersion": str(world.version)},
                        "items": items,
                    }
                ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            return
        seen = int(query["resourceVersion"][0])
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Connection", "close")
        self.end_headers()
        with contextlib.suppress(OSError):
            while not self.wfile.closed:
                with world.changed:
                    world.changed.wait(timeout=1)
                    news = [entry for entry in world.history if entry[0] > seen]
                for version, kind, obj in news:
                    seen = version
                    if obj["metadata"]["name"] == name:
                        event = json.dumps({"type": kind, "object": obj}) + "\n"
                        self.wfile.write(event.encode())

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base's name
        pass


# -- what plays a service proxy ------------------------------------------------------------------------


class _Echo(http.server.BaseHTTPRequestHandler):
    """Says what it was asked, slowly if it is asked to, and changes to an echo."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        where = urlsplit(self.path).path
        if where == "/upgrade":
            self.send_response(101)
            self.send_header("Connection", "Upgrade")
            self.send_header("Upgrade", self.headers["Upgrade"])
            self.end_headers()
            while data := self.rfile.read1(65536):
                self.wfile.write(data.upper())
            self.close_connection = True
            return
        if where == "/ticks":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            # The client asks for each.
            with contextlib.suppress(OSError):
                for number in range(3):
                    self._chunk(b"tick %d\n" % number)
                    TICK.wait(20)
                    TICK.clear()
                self._chunk(b"")
            return
        length = int(self.headers.get("Content-Length") or 0)
        seen = {
            "method": self.command,
            "path": self.path,
            "headers": [[name.lower(), value] for name, value in self.headers.items()],
            "body": self.rfile.read(length).decode(),
            "port": self.client_address[1],
        }
        body = json.dumps(seen).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the base's name
        pass


#: Lets the next tick out.
TICK: Final = threading.Event()


@contextlib.contextmanager
def service_proxy(authority: trustme.CA, address: str, host: str) -> Generator[None]:
    """Play a service proxy at *address*, with a certificate for *host*."""
    TICK.clear()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(host).configure_cert(context)
    server = _TlsServer((address, SERVICE_PROXY_PORT), _Echo, context)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        TICK.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _TlsServer(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(
        self, address: tuple[str, int], handler: Callable[..., Any], context: ssl.SSLContext
    ) -> None:
        super().__init__(address, handler)
        self._context = context

    def finish_request(self, request: Any, client_address: Any) -> None:
        # In the connection's thread: a handshake that never comes keeps nobody else out.
        with (
            contextlib.suppress(OSError),
            self._context.wrap_socket(request, server_side=True) as tls,
        ):
            super().finish_request(tls, client_address)
