"""The metrics of the client library (upstream: ``konnectivity-client/pkg/client/metrics/metrics.go``)."""

from __future__ import annotations

from clusterproxy.telemetry.metrics import ProgramMetrics


class ClientMetrics(ProgramMetrics):
    """All metrics of the clients in one process; several tunnels may share them."""

    subsystem = "client"

    def __init__(self) -> None:
        super().__init__()
        self.dial_failure_total = self._counter(
            "dial_failure_total",
            "Number of dial failures observed, by reason (example: remote endpoint error)",
            ("reason",),
        )
        self.client_connections = self._gauge(
            "client_connections",
            "Number of open client connections, by status (Example: dialing)",
            ("status",),
        )
