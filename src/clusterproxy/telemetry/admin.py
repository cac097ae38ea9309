"""What the health and admin ports answer (upstream: ``runHealthServer`` and ``runAdminServer`` of server and agent).

Paths, statuses, texts and content types are those of Go's mux and handlers; each function returns a handler for
:func:`clusterproxy.http1.serve_http`.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING
from urllib.parse import quote

from clusterproxy.http1 import Request, Response
from clusterproxy.telemetry.exposition import render
from clusterproxy.telemetry.profiling import PROFILING_ROUTES
from clusterproxy.telemetry.reloads import RELOADS_CERTIFICATES, RELOADS_HEADER

if TYPE_CHECKING:
    from clusterproxy.telemetry.agent_metrics import AgentMetrics
    from clusterproxy.telemetry.metrics import Metrics
    from clusterproxy.telemetry.server_metrics import ServerMetrics

Route = Callable[[Request], Response]
Readiness = Callable[[], tuple[bool, str]]

HTML = "text/html; charset=utf-8"
NOSNIFF = {"X-Content-Type-Options": "nosniff"}


def server_health_handler(metrics: ServerMetrics, ready: Readiness) -> Route:
    """Return the server's health port: liveness, readiness (500 and the message of *ready* if not), metrics."""

    def readiness(_request: Request) -> Response:
        is_ready, message = ready()
        return Response.text("ok") if is_ready else Response.text(message, 500)

    return _router(
        {
            "/healthz": _ok,
            "/readyz": readiness,
            "/ready": readiness,
            "/metrics": _metrics_route(metrics),
        }
    )


def server_admin_handler(
    metrics: ServerMetrics, *, enable_profiling: bool, status: Route | None = None
) -> Route:
    """Return the server's admin port: metrics, its *status* in JSON, and the profiling pages if enabled."""
    routes = {"/metrics": _metrics_route(metrics)}
    if status is not None:
        routes["/status"] = status
    return _router(routes, enable_profiling=enable_profiling)


def agent_health_handler(metrics: AgentMetrics, connected: Callable[[], bool]) -> Route:
    """Return the agent's health port: liveness, metrics, and readiness, which is whether a server is *connected*."""

    def readiness(request: Request) -> Response:
        status, text = 200, "ok"
        if not connected():
            status = 503
            text = "[+]ping ok\n[-]server-connected failed: no servers connected\n"
        elif "verbose" in request.query:
            text = "[+]ping ok\n[+]server-connected ok\ncheck passed\n"
        return Response(status, text.encode(), headers={RELOADS_HEADER: RELOADS_CERTIFICATES})

    return _router(
        {
            "/healthz": _ok,
            "/readyz": readiness,
            "/ready": readiness,
            "/metrics": _metrics_route(metrics),
        }
    )


def agent_admin_handler(*, health_port: int, enable_profiling: bool) -> Route:
    """Return the agent's admin port: metrics have moved to *health_port* of the same host; profiling if enabled."""

    def metrics_moved(request: Request) -> Response:
        host, colon, port = request.authority.rpartition(":")
        # The port is missing on port 80, and an IPv6 address ends in a bracket then.
        if not colon or not port.isdecimal():
            host = request.authority
        _, question_mark, query = request.target.partition("?")
        return _moved(f"//{quote(host, safe=':[]')}:{health_port}/metrics{question_mark}{query}")

    return _router({"/metrics": metrics_moved}, enable_profiling=enable_profiling)


def probe_handler() -> Route:
    """Return the health port of a controller: it is alive and ready once it answers (controller-runtime's ping)."""
    return _router({"/healthz": _ok, "/readyz": _ok})


def http_proxy_health_handler(
    metrics: Metrics, problem: Callable[[], str], draining: Callable[[], bool]
) -> Route:
    """Return the health port of an HTTP proxy (upstream: pkg/utils/http_server.go, NewHealthProbeServer), and metrics.

    *problem* says what is wrong with its certificates, *draining* whether it is ending.
    """

    def healthz(_request: Request) -> Response:
        text = problem()
        if not text:
            return Response.text("ok")
        return Response.text(
            f"[+]healthz-ping ok\n[-]certificates failed: {text}\nhealthz check failed\n", 500
        )

    def readyz(_request: Request) -> Response:
        return Response.text("draining\n", 503) if draining() else Response.text("ok")

    return _router({"/healthz": healthz, "/readyz": readyz, "/metrics": _metrics_route(metrics)})


def metrics_handler(metrics: Metrics) -> Route:
    """Return a port that has metrics alone."""
    return _router({"/metrics": _metrics_route(metrics)})


def _router(routes: Mapping[str, Route], *, enable_profiling: bool = False) -> Route:
    table = dict(routes)
    if enable_profiling:
        table["/debug/pprof"] = lambda _request: _moved("/debug/pprof/")
        table |= PROFILING_ROUTES

    def handler(request: Request) -> Response:
        route = table.get(request.path)
        if route is not None:
            return route(request)
        if enable_profiling and request.path.startswith("/debug/pprof/"):
            return Response(404, b"Unknown profile\n", headers=NOSNIFF)
        return Response(404, b"404 page not found\n", headers=NOSNIFF)

    return handler


def _ok(_request: Request) -> Response:
    return Response.text("ok")


def _metrics_route(metrics: Metrics) -> Route:
    def route(_request: Request) -> Response:
        body, content_type = render(metrics)
        return Response(200, body, content_type)

    return route


def _moved(location: str) -> Response:
    body = f'<a href="{html.escape(location)}">Moved Permanently</a>.\n\n'
    return Response(301, body.encode(), HTML, headers={"Location": location})
