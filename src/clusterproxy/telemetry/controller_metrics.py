"""The metrics of the programs that look after objects of an apiserver."""

from __future__ import annotations

from clusterproxy.telemetry.cells import Family, HistogramFamily
from clusterproxy.telemetry.metrics import Metrics

_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class ControllerMetrics(Metrics):
    """Names, labels and HELP texts as the originals have them from controller-runtime and client-go.

    Source: controller-runtime ``pkg/internal/controller/metrics``, ``pkg/metrics/leaderelection.go``, ``client_go_adapter.go``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reconcile_total = self._add(
            Family(
                "counter",
                "controller_runtime_reconcile_total",
                "Total number of reconciliations per controller",
                ("controller", "result"),
            )
        )
        self.reconcile_errors_total = self._add(
            Family(
                "counter",
                "controller_runtime_reconcile_errors_total",
                "Total number of reconciliation errors per controller",
                ("controller",),
            )
        )
        self.reconcile_time_seconds = HistogramFamily(
            "controller_runtime_reconcile_time_seconds",
            "Length of time per reconciliation per controller",
            _BUCKETS,
            ("controller",),
        )
        self.families.append(self.reconcile_time_seconds)
        self.leader_election_master_status = self._add(
            Family(
                "gauge",
                "leader_election_master_status",
                "Gauge of if the reporting system is master of the relevant lease, 0 indicates backup, "
                "1 indicates master. 'name' is the string used to identify the lease.",
                ("name",),
            )
        )
        self.rest_client_requests_total = self._add(
            Family(
                "counter",
                "rest_client_requests_total",
                "Number of HTTP requests, partitioned by status code, method, and host.",
                ("code", "method", "host"),
            )
        )
        self.certificate_expiry_seconds = self._own_gauge(
            "secret_certificate_expiry_seconds",
            "When the certificate in this secret expires, in seconds since the Unix epoch.",
            ("namespace", "secret"),
        )
        self.certificates_issued_total = self._own_counter(
            "certificates_issued_total", "Certificates that were issued, by secret.", ("secret",)
        )
