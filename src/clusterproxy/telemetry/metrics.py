"""What server and agent measure in common, and the base that collects the families of one program."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from clusterproxy.telemetry.cells import Family, HistogramFamily

if TYPE_CHECKING:
    from collections.abc import Sequence

NAMESPACE = "konnectivity_network_proxy"
OWN_PREFIX = "clusterproxy_"

# prometheus.DefBuckets of client_golang, used where upstream names no buckets.
DEFAULT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The families of one program."""

    def __init__(self) -> None:
        self.families: list[Family | HistogramFamily] = []

    def _add(self, family: Family) -> Family:
        self.families.append(family)
        return family

    def _own_counter(self, name: str, documentation: str, label_names: Sequence[str]) -> Family:
        return self._add(Family("counter", OWN_PREFIX + name, documentation, label_names))

    def _own_gauge(self, name: str, documentation: str, label_names: Sequence[str] = ()) -> Family:
        family = self._add(Family("gauge", OWN_PREFIX + name, documentation, label_names))
        if not label_names:
            family.set(0)
        return family


class ProgramMetrics(Metrics):
    """The families of a proxy: upstream's stream counters, and ours with the prefix ``clusterproxy_``.

    Each attribute is named as the metric without its prefix. Names, labels and HELP texts of the ``konnectivity_*``
    metrics are upstream's (``konnectivity-client/pkg/common/metrics/metrics.go``).
    """

    subsystem: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.stream_packets_total = self._counter(
            "stream_packets_total",
            "Count of packets processed, by segment and packet type (example: from_client, DIAL_REQ)",
            ("segment", "packet_type"),
        )
        self.stream_errors_total = self._counter(
            "stream_errors_total",
            "Count of gRPC stream errors, by segment, grpc Code, packet type. "
            "(example: from_agent, Code.Unavailable, DIAL_RSP)",
            ("segment", "code", "packet_type"),
        )
        self.stalled_connections_total = self._own_counter(
            "stalled_connections_total",
            "Proxied connections closed because their consumer made no progress while over its budget.",
            ("direction",),
        )
        self.buffered_bytes = self._own_gauge(
            "buffered_bytes", "Bytes queued for consumers of proxied connections."
        )
        self.connections_over_budget = self._own_gauge(
            "connections_over_budget",
            "Connections whose consumer does not keep up, so that more is queued than their budget.",
        )
        self.rejected_packets_total = self._own_counter(
            "rejected_packets_total",
            "Packets that were refused, by segment and reason (example: from_client, foreign_connection).",
            ("segment", "reason"),
        )
        self.limit_exceeded_total = self._own_counter(
            "limit_exceeded_total",
            "Times a peer or the process reached a limit, by limit.",
            ("limit",),
        )
        self.certificate_reload_total = self._own_counter(
            "certificate_reload_total",
            "Reloads of changed certificate, key and CA files, by result (ok, error).",
            ("result",),
        )
        self.certificate_expiry_seconds = self._own_gauge(
            "certificate_expiry_seconds",
            "When the certificate in this file expires, in seconds since the Unix epoch.",
            ("file",),
        )
        self.handshakes_in_flight = self._own_gauge(
            "handshakes_in_flight", "TLS handshakes that have begun and not ended."
        )
        self.handshake_failures_total = self._own_counter(
            "handshake_failures_total", "TLS handshakes that failed, by reason.", ("reason",)
        )

    def _upstream_name(self, name: str) -> str:
        return f"{NAMESPACE}_{self.subsystem}_{name}"

    def _counter(self, name: str, documentation: str, label_names: Sequence[str] = ()) -> Family:
        return self._add(Family("counter", self._upstream_name(name), documentation, label_names))

    def _gauge(self, name: str, documentation: str, label_names: Sequence[str] = ()) -> Family:
        return self._add(Family("gauge", self._upstream_name(name), documentation, label_names))

    def _histogram(
        self,
        name: str,
        documentation: str,
        bounds: Sequence[float],
        label_names: Sequence[str] = (),
    ) -> HistogramFamily:
        family = HistogramFamily(self._upstream_name(name), documentation, bounds, label_names)
        self.families.append(family)
        return family
