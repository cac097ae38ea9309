"""The metrics of the proxy agent (upstream: ``pkg/agent/metrics/metrics.go``)."""

from __future__ import annotations

from clusterproxy.telemetry.metrics import ProgramMetrics

LATENCY_BUCKETS = (0.005, 0.025, 0.1, 0.5, 2.5, 10, 30)


class AgentMetrics(ProgramMetrics):
    """All metrics of one proxy agent.

    As upstream, ``known_server_count`` stands at 0 from the start and everything else appears when first used:
    ``open_server_connections`` has no sample before the first connection.
    """

    subsystem = "agent"

    def __init__(self) -> None:
        super().__init__()
        self.dial_duration_seconds = self._histogram(
            "dial_duration_seconds",
            "Latency of dial to the remote endpoint in seconds",
            LATENCY_BUCKETS,
        )
        self.server_connection_failure_count = self._counter(
            "server_connection_failure_count",
            "Count of failures to send to or receive from the proxy server, labeled by the direction "
            "(from_server or to_server). DEPRECATED, please use stream_events_error_total",
            ("direction",),
        )
        self.endpoint_dial_failure_total = self._counter(
            "endpoint_dial_failure_total",
            "Number of failures dialing the remote endpoint, by reason (example: timeout).",
            ("reason",),
        )
        self.open_server_connections = self._gauge(
            "open_server_connections", "Current number of open server connections."
        )
        self.known_server_count = self._gauge(
            "known_server_count", "Current number of servers agent is trying to connect to."
        )
        self.open_endpoint_connections = self._gauge(
            "open_endpoint_connections", "Current number of open endpoint connections."
        )
        self.lease_lists_total = self._counter(
            "lease_lists_total",
            "Count of server lease list calls made by the agent to the k8s apiserver, "
            "labeled by HTTP response code and reason",
            ("http_response_code", "reason"),
        )
        self.lease_watches_total = self._counter(
            "lease_watches_total",
            "Count of server lease watch calls made by the agent to the k8s apiserver, "
            "labeled by HTTP response code and reason",
            ("http_response_code", "reason"),
        )
        self.lease_list_latency_seconds = self._histogram(
            "lease_list_latency_seconds",
            "Latency of server lease listing in seconds",
            LATENCY_BUCKETS,
            ("http_response_code",),
        )
        self.known_server_count.set(0)
