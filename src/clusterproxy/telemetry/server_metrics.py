"""The metrics of the proxy server (upstream: ``pkg/server/metrics/metrics.go``)."""

from __future__ import annotations

from clusterproxy.telemetry.metrics import DEFAULT_BUCKETS, ProgramMetrics

LATENCY_BUCKETS = (0.000001, 0.00001, 0.0001, 0.005, 0.025, 0.1, 0.5, 2.5, 12.5)
CONNECTION_DURATION_BUCKETS = (1, 5, 15, 30, 60, 300, 900, 1800, 3600, 14400, 43200, 86400)


class ServerMetrics(ProgramMetrics):
    """All metrics of one proxy server.

    As upstream, only unlabelled plain metrics and the count of ready backends stand at 0 from the start; the server
    sets ``ready_backends`` to 0 for each configured strategy, everything else appears when first used.
    """

    subsystem = "server"

    def __init__(self) -> None:
        super().__init__()
        self.dial_duration_seconds = self._histogram(
            "dial_duration_seconds",
            "Latency of dial to the remote endpoint in seconds",
            LATENCY_BUCKETS,
        )
        self.frontend_write_duration_seconds = self._histogram(
            "frontend_write_duration_seconds",
            "Latency of write to the frontend in seconds",
            LATENCY_BUCKETS,
        )
        # In upstream's main branch, after v0.36.
        self.connection_duration_seconds = self._histogram(
            "connection_duration_seconds",
            "Duration in seconds a proxied end-to-end connection was established (post-dial) before being closed.",
            CONNECTION_DURATION_BUCKETS,
        )
        self.grpc_connections = self._gauge(
            "grpc_connections",
            "Number of current grpc connections, partitioned by service method.",
            ("service_method",),
        )
        self.http_connections = self._gauge(
            "http_connections", "Number of current HTTP CONNECT connections"
        )
        self.ready_backend_connections = self._gauge(
            "ready_backend_connections",
            "Number of konnectivity agent connected to the proxy server. DEPRECATED, please use ready_backends",
        )
        self.ready_backends = self._gauge(
            "ready_backends",
            "Number of konnectivity agent connected to the proxy server",
            ("proxy_strategy",),
        )
        self.pending_backend_dials = self._gauge(
            "pending_backend_dials", "Current number of pending backend dial requests"
        )
        self.established_connections = self._gauge(
            "established_connections",
            "Current number of established end-to-end connections (post-dial).",
        )
        self.full_receive_channels = self._gauge(
            "full_receive_channels",
            "Number of current connections blocked by a full receive channel, partitioned by service method.",
            ("service_method",),
        )
        self.dial_failure_count = self._counter(
            "dial_failure_count",
            "Number of dial failures observed. Multiple failures can occur for a single dial request.",
            ("reason",),
        )
        self.culled_leases_count = self._counter(
            "culled_leases_count",
            "Count of expired leases that the lease garbage collection controller has culled.",
        )
        self.lease_delete_latency_seconds = self._histogram(
            "lease_delete_latency_seconds",
            "Latency of lease deletion calls by the garbage collection controller in seconds.",
            DEFAULT_BUCKETS,
            ("http_status_code",),
        )
        # "delection" and, below, "deletion" for listing are upstream's words.
        self.lease_delete_total = self._counter(
            "lease_delete_total",
            "Count of lease delection calls by the garbage collection controller. "
            "Labeled by HTTP status code and reason.",
            ("http_status_code", "reason"),
        )
        self.lease_list_latency_seconds = self._histogram(
            "lease_list_latency_seconds",
            "Latency of lease list calls by the garbage collection controller in seconds.",
            DEFAULT_BUCKETS,
            ("http_status_code",),
        )
        self.lease_list_total = self._counter(
            "lease_list_total",
            "Count of lease deletion calls by the garbage collection controller. "
            "Labeled by HTTP status code and reason.",
            ("http_status_code", "reason"),
        )
        self.rejected_agents_total = self._own_counter(
            "rejected_agents_total", "Agents' streams that were refused, by reason.", ("reason",)
        )
        for always_present in (
            self.http_connections,
            self.ready_backend_connections,
            self.culled_leases_count,
        ):
            always_present.set(0)
