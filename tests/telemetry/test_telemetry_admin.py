from __future__ import annotations

import os
import re
import sys

import pytest
import trio

from clusterproxy.http1 import Request, Response
from clusterproxy.telemetry.admin import (
    Route,
    agent_admin_handler,
    agent_health_handler,
    http_proxy_health_handler,
    server_admin_handler,
    server_health_handler,
)
from clusterproxy.telemetry.agent_metrics import AgentMetrics
from clusterproxy.telemetry.metrics import Metrics
from clusterproxy.telemetry.server_metrics import ServerMetrics

TEXT = "text/plain; charset=utf-8"
NOT_FOUND = Response(
    404, b"404 page not found\n", TEXT, headers={"X-Content-Type-Options": "nosniff"}
)
NO_AGENT = "no connection to any proxy agent"


def get(handler: Route, target: str, host: str = "localhost:8095") -> Response:
    return handler(Request.parse("GET", target, [("host", host)]))


def server(*, ready: bool = True) -> Route:
    return server_health_handler(ServerMetrics(), lambda: (ready, "" if ready else NO_AGENT))


# By this the add-on agent of the pod knows that a renewed certificate needs no restart.
OF_OURS = {"X-Clusterproxy-Reloads": "certificates"}


def agent(*, connected: bool = True) -> Route:
    return agent_health_handler(AgentMetrics(), lambda: connected)


def server_admin(*, enable_profiling: bool = True) -> Route:
    return server_admin_handler(ServerMetrics(), enable_profiling=enable_profiling)


def agent_admin(*, enable_profiling: bool = True) -> Route:
    return agent_admin_handler(health_port=8093, enable_profiling=enable_profiling)


@pytest.mark.parametrize(
    "handler", [server(ready=False), agent(connected=False)], ids=["server", "agent"]
)
def test_alive_even_if_not_ready(handler: Route) -> None:
    assert get(handler, "/healthz") == Response(200, b"ok", TEXT)


@pytest.mark.parametrize("path", ["/readyz", "/ready", "/%72eadyz"])
def test_readiness(path: str) -> None:
    assert get(server(), path) == Response(200, b"ok", TEXT)
    assert get(server(ready=False), path) == Response(500, NO_AGENT.encode(), TEXT)
    assert get(agent(), path) == Response(200, b"ok", TEXT, headers=OF_OURS)
    for query in ("", "?verbose"):
        assert get(agent(connected=False), path + query) == Response(
            503,
            b"[+]ping ok\n[-]server-connected failed: no servers connected\n",
            TEXT,
            headers=OF_OURS,
        )


@pytest.mark.parametrize("query", ["verbose", "verbose=", "verbose=1", "a=b&verbose"])
def test_verbose_readiness_of_the_agent(query: str) -> None:
    verbose = Response(
        200, b"[+]ping ok\n[+]server-connected ok\ncheck passed\n", TEXT, headers=OF_OURS
    )
    assert get(agent(), "/readyz?" + query) == verbose
    assert get(server(), "/readyz?" + query) == Response(200, b"ok", TEXT)


@pytest.mark.parametrize(
    ("handler", "sample"),
    [
        (server(), b"konnectivity_network_proxy_server_http_connections 0\n"),
        (
            server_admin(enable_profiling=False),
            b"konnectivity_network_proxy_server_http_connections 0\n",
        ),
        (agent(), b"konnectivity_network_proxy_agent_known_server_count 0\n"),
    ],
)
def test_metrics(handler: Route, sample: bytes) -> None:
    response = get(handler, "/metrics")
    assert sample in response.body
    assert (response.status, response.content_type) == (
        200,
        "text/plain; version=0.0.4; charset=utf-8",
    )


@pytest.mark.parametrize(
    ("host", "target", "location"),
    [
        ("127.0.0.1:8094", "/metrics", "//127.0.0.1:8093/metrics"),
        ("example.com", "/metrics", "//example.com:8093/metrics"),
        ("[::1]:8094", "/metrics", "//[::1]:8093/metrics"),
        ("[::1]", "/metrics", "//[::1]:8093/metrics"),
        ("a:8094", "/metrics?x=1&y", "//a:8093/metrics?x=1&y"),
        ("b:1", "http://a:8094/metrics", "//a:8093/metrics"),
        ('a"<b>', "/metrics", "//a%22%3Cb%3E:8093/metrics"),
    ],
)
def test_the_agents_metrics_have_moved_to_the_health_port(
    host: str, target: str, location: str
) -> None:
    response = get(agent_admin(enable_profiling=False), target, host)
    assert response.status == 301
    assert response.headers == {"Location": location}
    assert response.content_type == "text/html; charset=utf-8"
    escaped = location.replace("&", "&amp;")
    assert response.body.decode() == f'<a href="{escaped}">Moved Permanently</a>.\n\n'


@pytest.mark.parametrize(
    "target", ["/", "/healthz/", "/nope", "*", "/debug/pprof/", "/debug/pprof"]
)
@pytest.mark.parametrize("handler", [server(), agent()], ids=["server", "agent"])
def test_other_paths_of_the_health_port(handler: Route, target: str) -> None:
    assert get(handler, target) == NOT_FOUND


@pytest.mark.parametrize(
    "handler",
    [server_admin(enable_profiling=False), agent_admin(enable_profiling=False)],
    ids=["server", "agent"],
)
def test_profiling_is_off_unless_asked_for(handler: Route) -> None:
    for path in ("/debug/pprof", "/debug/pprof/", "/debug/pprof/goroutine", "/debug/pprof/cmdline"):
        assert get(handler, path) == NOT_FOUND


@pytest.mark.parametrize("handler", [server_admin(), agent_admin()], ids=["server", "agent"])
async def test_profiling_pages(handler: Route) -> None:
    moved = get(handler, "/debug/pprof")
    assert (moved.status, moved.headers) == (301, {"Location": "/debug/pprof/"})
    index = get(handler, "/debug/pprof/")
    assert (index.status, index.content_type) == (200, "text/html; charset=utf-8")
    links = re.findall(r'<a href="(\w+)"', index.body.decode())
    assert links == ["cmdline", "goroutine"]
    assert all(get(handler, f"/debug/pprof/{link}").status == 200 for link in links)
    assert get(handler, "/debug/pprof/cmdline").body == os.fsencode("\0".join(sys.orig_argv))
    assert get(handler, "/debug/pprof/heap").body == b"Unknown profile\n"
    assert get(handler, "/debug/pprof/heap").status == 404
    assert get(handler, "/elsewhere") == NOT_FOUND


@pytest.mark.parametrize("name", ["profile", "symbol", "trace"])
def test_what_go_has_and_we_do_not(name: str) -> None:
    response = get(server_admin(), f"/debug/pprof/{name}?seconds=5")
    assert response.status == 501
    assert response.body.decode() == (
        f"{name} is not available: this is a Python program. Profile it from outside with py-spy, for example\n"
        f"py-spy record --pid {os.getpid()} --duration 30 --output profile.svg\n"
    )


async def test_the_task_tree_shows_each_task_below_its_parent_with_its_stack() -> None:
    async def inner() -> None:
        await trio.sleep_forever()

    async def outer() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(inner, name="the inner task")
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(outer, name="the outer task")
        await trio.testing.wait_all_tasks_blocked()
        tree = get(server_admin(), "/debug/pprof/goroutine").body.decode()
        nursery.cancel_scope.cancel()
    lines = tree.splitlines()
    at = next(i for i, line in enumerate(lines) if line.strip() == "the outer task")
    indent = lines[at].partition("the")[0]
    assert lines[at + 1].startswith(f"{indent}    {__file__}:")
    assert lines[at + 1].endswith("<locals>.outer")
    inner_at = lines.index(indent + "  the inner task")
    assert inner_at > at
    assert lines[inner_at + 1].endswith("<locals>.inner")


def test_an_http_proxys_health() -> None:
    state = {"problem": "", "draining": False}
    handler = http_proxy_health_handler(
        Metrics(), lambda: str(state["problem"]), lambda: bool(state["draining"])
    )
    for path in ("/healthz", "/readyz"):
        assert get(handler, path) == Response(200, b"ok", TEXT)
    assert get(handler, "/metrics").status == 200
    state = {"problem": "no certificate", "draining": True}
    assert get(handler, "/readyz") == Response(503, b"draining\n", TEXT)
    failed = b"[+]healthz-ping ok\n[-]certificates failed: no certificate\nhealthz check failed\n"
    assert get(handler, "/healthz") == Response(500, failed, TEXT)
