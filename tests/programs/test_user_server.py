"""The user server as a program, before our server and agent (groups A and G of the conformance rows)."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import pytest
import trustme
from certificates import write_pair
from cluster import LOOPBACK, PROGRAM, wait_until
from go_tools import go_tool, needs_go
from user_server_stage import CONFIG_MAP, NAMESPACE, TICK, ConfigMaps, Hub, service_proxy

if TYPE_CHECKING:
    from collections.abc import Generator

pytestmark = pytest.mark.programs

FIRST_PORT: Final = 27440
CLUSTERS: Final = ("cluster1", "cluster2")
WILDCARD: Final = "*.open-cluster-management.proxy"
SERVICE: Final = "/cluster1/api/v1/namespaces/ns/services/{}/proxy-service/{}"


class Stage:
    """Everything up, and ways to ask."""

    def __init__(self, hub: Hub, config_maps: ConfigMaps, authority: trustme.CA) -> None:
        self.hub = hub
        self.config_maps = config_maps
        self.trusted = [authority]

    def context(self) -> ssl.SSLContext:
        """A new one: libraries set protocols in those that they are given."""
        context = ssl.create_default_context()
        for authority in self.trusted:
            authority.configure_trust(context)
        return context

    def ask(
        self, target: str, method: str = "GET", body: bytes | None = None, **headers: str
    ) -> tuple[int, str]:
        """Ask for a target, to the letter, on a connection of its own."""
        connection = http.client.HTTPSConnection(
            LOOPBACK, self.hub.user_port, timeout=20, context=self.context()
        )
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, target, body, named)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def seen(self, target: str, **headers: str) -> Any:
        """What the service proxy was asked for."""
        status, text = self.ask(target, "GET", None, **headers)
        assert status == 200, text
        return json.loads(text)

    def client(self, *, http2: bool) -> httpx.Client:
        return httpx.Client(
            base_url=f"https://{LOOPBACK}:{self.hub.user_port}",
            verify=self.context(),
            http1=not http2,
            http2=http2,
            timeout=20,
        )

    def connect(self, alpn: str = "http/1.1") -> ssl.SSLSocket:
        context = self.context()
        context.set_alpn_protocols([alpn])
        raw = socket.create_connection((LOOPBACK, self.hub.user_port), timeout=20)
        return context.wrap_socket(raw, server_hostname=LOOPBACK)


@contextlib.contextmanager
def stage(
    directory: Path, number: int, *options: str, server: tuple[str, ...] = ()
) -> Generator[Stage]:
    """Start everything, with ports and addresses of its own."""
    authority = trustme.CA()
    clusters = {name: f"127.0.{44 + number}.{at}" for at, name in enumerate(CLUSTERS, 1)}
    config_maps = ConfigMaps()
    with contextlib.ExitStack() as opened:
        kubeconfig = opened.enter_context(config_maps.serving(directory))
        for address in clusters.values():
            opened.enter_context(service_proxy(authority, address, WILDCARD))
        hub = Hub(
            directory,
            FIRST_PORT + 10 * number,
            authority,
            kubeconfig=kubeconfig,
            clusters=clusters,
        )
        opened.callback(hub.close)
        if server:
            hub.commands["server"] = server
        hub.start(*options)
        yield Stage(hub, config_maps, authority)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Generator[Stage]:
    with stage(tmp_path_factory.mktemp("hub"), 0) as one:
        yield one


def headers_of(seen: Any, name: str) -> list[str]:
    return [value for key, value in seen["headers"] if key == name]


# -- URLs and headers ----------------------------------------------------------------------------------


def test_to_an_apiserver(shared: Stage) -> None:
    """G2, G5, G6, and the header contract; the path goes on as it came."""
    seen = shared.seen(
        "/cluster1/api/v1/pods%2Fx/a%20b?watch=1&q=%2F",
        Authorization="Bearer t",
        Impersonate_User="bob",
        Cluster_Proxy_Service="evil",
        Connection="Cluster-Proxy-Port, Cluster-Proxy-Namespace",
    )
    assert seen["path"] == "/api/v1/pods%2Fx/a%20b?watch=1&q=%2F"
    assert {
        name.removeprefix("cluster-proxy-"): value
        for name, value in seen["headers"]
        if name.startswith("cluster-proxy-")
    } == {"proto": "https", "namespace": "default", "service": "kubernetes", "port": "443"}
    assert headers_of(seen, "host") == [f"{LOOPBACK}:{shared.hub.user_port}"]
    assert headers_of(seen, "authorization") == ["Bearer t"]
    assert headers_of(seen, "impersonate-user") == ["bob"]
    assert headers_of(seen, "x-forwarded-for") == [LOOPBACK]


@pytest.mark.parametrize(
    ("target", "status", "text"),
    [
        # G1, G3
        ("/", 400, "requestURL format not correct, path more than 2: /"),
        ("/cluster1", 400, "requestURL format not correct, path more than 2: /cluster1"),
        (SERVICE.format("ftp:a:1", ""), 400, "invalid service name"),
        (SERVICE.format("a:b:c:d", ""), 400, "invalid service name"),
        (SERVICE.format(":80", ""), 400, "invalid service name"),
        (SERVICE.format("x", ""), 400, "invalid request headers"),
        ("/../api", 400, "invalid cluster name"),
        ("/cluster1%2F..%2Fcluster2/api", 400, "invalid cluster name"),
        # A21
        (
            SERVICE.format("x:80", ""),
            403,
            (
                "service ns/x is not in the exposed services allowlist\n"
                f'to expose it, add to ConfigMap {NAMESPACE}/{CONFIG_MAP}:\n- {{namespace: "ns", service: "x", port: "80", protocol: "https"}}\n'
            ),
        ),
        # A12, G8
        (
            "/nobody/api",
            502,
            "proxy to anp-proxy-server failed because cluster nobody: failed at the server: No agent available",
        ),
    ],
)
def test_refusals(shared: Stage, target: str, status: int, text: str) -> None:
    began = time.monotonic()
    answer = shared.ask(target)
    assert answer[0] == status
    assert answer[1].startswith(text)
    assert time.monotonic() - began < 10


def test_no_connection_is_made_for_what_is_denied(shared: Stage) -> None:
    name = 'clusterproxy_user_server_cluster_connections_total{cluster="cluster1"}'
    before = shared.hub.metric(name)
    assert shared.ask(SERVICE.format("y:80", ""))[0] == 403
    assert shared.hub.metric(name) == before
    assert shared.hub.metric('clusterproxy_user_server_denied_total{mode="enforce"}') >= 1
    assert shared.hub.metric('clusterproxy_http_requests_total{code="403",method="GET"}') >= 1


def test_connections_are_shared(shared: Stage) -> None:
    ports = {shared.seen("/cluster1/api")["port"] for _ in range(5)}
    others = {shared.seen("/cluster2/api")["port"] for _ in range(5)}
    assert len(ports) == len(others) == 1
    assert ports != others
    assert (
        shared.hub.metric('clusterproxy_user_server_cluster_requests_total{cluster="cluster2"}')
        >= 4
    )


# -- the list ------------------------------------------------------------------------------------------


def test_the_list_changes(shared: Stage) -> None:
    """G9: effective at once, the last good one kept, and gone with the ConfigMap."""
    target = SERVICE.format("http:listed:8000", "path?a=b")

    def becomes(status: int) -> None:
        wait_until(lambda: shared.ask(target)[0] == status, f"the answer is {status}")

    becomes(403)
    shared.config_maps.put(CONFIG_MAP, {"a": "- {namespace: ns, service: listed, port: 8000}"})
    becomes(200)
    seen = shared.seen(target)
    assert seen["path"] == "/path?a=b"
    assert headers_of(seen, "cluster-proxy-proto") == ["http"]
    assert headers_of(seen, "cluster-proxy-namespace") == ["ns"]
    assert headers_of(seen, "cluster-proxy-service") == ["listed"]
    assert headers_of(seen, "cluster-proxy-port") == ["8000"]
    assert shared.ask(SERVICE.format("http:listed:8001", ""))[0] == 403
    shared.config_maps.put(CONFIG_MAP, {"a": "- {namespace: ns, name: listed}"})
    wait_until(
        lambda: shared.hub.metric("clusterproxy_user_server_exposed_services_valid") == 0,
        "the mistake was seen",
    )
    assert shared.ask(target)[0] == 200
    assert "unknown field" in shared.hub.log("user-server")
    shared.config_maps.put(CONFIG_MAP, None)
    becomes(403)


# -- protocols -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("http2", [False, True])
def test_both_protocols(shared: Stage, http2: bool) -> None:
    """G7: requests with bodies, and an answer that comes bit by bit."""
    with shared.client(http2=http2) as client:
        answer = client.post("/cluster1/api", content=b"x" * 100_000)
        assert answer.http_version == ("HTTP/2" if http2 else "HTTP/1.1")
        assert answer.json()["body"] == "x" * 100_000
        assert answer.json()["method"] == "POST"
        with client.stream("GET", "/cluster1/ticks") as ticks:
            found = []
            for line in ticks.iter_lines():
                found.append(line)
                TICK.set()
            assert found == ["tick 0", "tick 1", "tick 2"]


def test_upgrade(shared: Stage) -> None:
    with shared.connect() as sock:
        sock.sendall(
            b"GET /cluster1/upgrade HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n"
        )
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += sock.recv(1)
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"SPDY/3.1" in head
        for data in (b"hello", b"again"):
            sock.sendall(data)
            assert sock.recv(100) == data.upper()


def test_logs_hold_no_secrets(shared: Stage) -> None:
    status, _ = shared.ask("/nobody2/api?token=secret1", Authorization="Bearer secret2")
    assert status == 502
    log = shared.hub.log("user-server")
    assert "request GET for cluster nobody2 failed: " in log
    assert "secret" not in log


def test_a_profile_with_a_mistake_keeps_it_from_starting(shared: Stage, tmp_path: Path) -> None:
    """What runs goes on with the last good one."""
    shared.config_maps.put("ocm-tls-profile", {"minTLSVersion": "VersionTLS9"})
    hub = shared.hub
    second = (
        *hub.user_server_options(),
        f"--server-port={hub.user_port + 2}",
        f"--health-port={hub.user_health_port + 2}",
    )
    done = subprocess.run(
        (*PROGRAM, "user-server", *second),
        cwd=tmp_path,
        env=hub.process_environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert 'data.minTLSVersion is "VersionTLS9"' in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert shared.ask("/cluster1/api")[0] == 200
    shared.config_maps.put("ocm-tls-profile", None)


# -- health, certificates, failures ----------------------------------------------------------------------


def test_failures_and_certificates(tmp_path: Path) -> None:
    """G8, G10: what is lost comes back, and changed files are used without a restart."""
    with stage(tmp_path, 1, "--exposed-services-mode=warn") as one:
        hub = one.hub
        # What would be denied is only told of.
        assert one.seen(SERVICE.format("x:80", ""))["path"] == "/"
        assert "It was passed on, for the mode is warn" in hub.log("user-server")

        # Files are looked at every ten seconds: the rest happens meanwhile.
        other = trustme.CA()
        shown = shown_by(hub.user_port)
        write_pair(other, tmp_path, "user", LOOPBACK)
        one.trusted.append(other)

        hub.kill("agent")
        wait_until(lambda: one.ask("/cluster1/api")[0] == 502, "the agent's loss is seen")
        hub.start_agents()
        wait_until(lambda: one.ask("/cluster1/api")[0] == 200, "the agent is back")

        hub.kill("server")
        status, text = one.ask("/cluster1/api")
        assert status == 502
        assert text.startswith("proxy to anp-proxy-server failed because ")
        hub.start_server("--proxy-strategies=destHost")
        hub.wait_for_agent()
        wait_until(lambda: one.ask("/cluster1/api")[0] == 200, "the server is back")

        wait_until(lambda: shown_by(hub.user_port) != shown, "the new certificate is used")
        assert one.ask("/cluster1/api")[0] == 200
        assert hub.health("healthz") == (200, "ok")

        # A service proxy of another CA is not trusted, and connections that are there are used no more.
        other.cert_pem.write_to_path(hub.service_proxy_ca)
        key = Path(hub.user_key)
        good = key.read_text()
        key.write_text("nonsense")
        wait_until(lambda: one.ask("/cluster1/api")[0] == 502, "the new CA counts")
        assert "certificate" in one.ask("/cluster1/api")[1]
        wait_until(lambda: hub.health("healthz")[0] == 500, "what cannot be loaded is unhealthy")
        assert "user.key" in hub.health("healthz")[1]
        key.write_text(good)
        one.trusted[0].cert_pem.write_to_path(hub.service_proxy_ca)
        wait_until(lambda: hub.health("healthz")[0] == 200, "it is healthy again")
        wait_until(lambda: one.ask("/cluster1/api")[0] == 200, "the service proxy is trusted")

        # Whoever insists does not wait.
        os.kill(hub.pid("user-server"), signal.SIGTERM)
        wait_until(lambda: hub.health("readyz")[0] == 503, "it drains")
        os.kill(hub.pid("user-server"), signal.SIGTERM)
        assert hub.process("user-server").wait(timeout=5) == 0


def shown_by(port: int) -> bytes:
    """The certificate that users are shown now."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        socket.create_connection((LOOPBACK, port), timeout=20) as raw,
        context.wrap_socket(raw) as sock,
    ):
        return sock.getpeercert(binary_form=True) or b""


def test_drain_and_profile(tmp_path: Path) -> None:
    """G11: after SIGTERM it is not ready, takes connections for a while, and lets requests end; and the TLS profile."""
    with stage(tmp_path, 2, "--min-drain-duration=2s", "--drain-timeout=20s") as one:
        hub = one.hub
        one.config_maps.put("ocm-tls-profile", {"minTLSVersion": "VersionTLS13"})
        old = one.context()
        old.maximum_version = ssl.TLSVersion.TLSv1_2

        def is_refused() -> bool:
            with socket.create_connection((LOOPBACK, hub.user_port), timeout=20) as raw:
                try:
                    old.wrap_socket(raw, server_hostname=LOOPBACK).close()
                except ssl.SSLError:
                    return True
            return False

        wait_until(is_refused, "the profile holds")
        assert one.ask("/cluster1/api")[0] == 200

        with one.client(http2=False) as client, client.stream("GET", "/cluster1/ticks") as ticks:
            lines = ticks.iter_lines()
            assert next(lines) == "tick 0"
            os.kill(hub.pid("user-server"), signal.SIGTERM)
            wait_until(lambda: hub.health("readyz") == (503, "draining\n"), "it is not ready")
            assert one.ask("/cluster1/api")[0] == 200

            def closed() -> bool:
                try:
                    socket.create_connection((LOOPBACK, hub.user_port), timeout=1).close()
                except OSError:
                    return True
                return False

            wait_until(closed, "no more connections are taken")
            assert hub.process("user-server").poll() is None
            TICK.set()
            assert next(lines) == "tick 1"
            TICK.set()
            assert next(lines) == "tick 2"
            TICK.set()
            assert list(lines) == []
        assert hub.process("user-server").wait(timeout=20) == 0


def test_who_takes_all_places_of_a_connection(tmp_path: Path) -> None:
    """The proxy server takes so many streams on one; clients that hold as many keep nobody else waiting."""
    with stage(tmp_path, 4) as one, contextlib.ExitStack() as held:
        hub = one.hub
        hub.kill("server")
        hub.start_server("--proxy-strategies=destHost", "--max-concurrent-streams=8")
        hub.wait_for_agent()
        wait_until(lambda: one.ask("/cluster1/api")[0] == 200, "the server is back")
        client = held.enter_context(one.client(http2=True))
        for _ in range(20):
            ticks = held.enter_context(client.stream("GET", "/cluster1/ticks"))
            assert next(ticks.iter_lines()) == "tick 0"
        began = time.monotonic()
        for cluster in CLUSTERS:
            assert one.ask(f"/{cluster}/api")[0] == 200
        assert time.monotonic() - began < 10


@needs_go
def test_the_originals_proxy_server(tmp_path: Path) -> None:
    """New certificates for it mean a new connection, and what is open on the old one goes on."""
    with stage(tmp_path, 3, server=(str(go_tool("server")),)) as one:
        hub = one.hub
        assert one.ask("/cluster1/api")[0] == 200
        assert one.ask("/nobody/api")[1].startswith(
            "proxy to anp-proxy-server failed because cluster nobody: failed at the server: No agent"
        )
        with one.client(http2=True) as client, client.stream("GET", "/cluster2/ticks") as ticks:
            lines = ticks.iter_lines()
            assert next(lines) == "tick 0"
            for copy in (hub.client_cert, hub.client_key):
                # Another file with the same in it.
                path = Path(copy)
                path.with_suffix(".new").write_bytes(path.read_bytes())
                path.with_suffix(".new").rename(path)
            wait_until(
                lambda: hub.metric('clusterproxy_certificate_reload_total{result="ok"}') > 0,
                "the certificate was loaded again",
            )
            assert one.ask("/cluster1/api")[0] == 200
            for number in (1, 2):
                TICK.set()
                assert next(lines) == f"tick {number}"
            TICK.set()
            assert list(lines) == []
        assert "Traceback" not in hub.log("user-server")
