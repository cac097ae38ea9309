"""What the user server counts. All names are ours: the original counts nothing."""

from __future__ import annotations

from typing import Final

from clusterproxy.reverse_proxy.metrics import ProxyMetrics

#: Names of clusters that are told apart. Only those that were reached are: a client can name any.
_MAX_CLUSTERS: Final = 5000


class UserServerMetrics(ProxyMetrics):
    """The families of a user server."""

    def __init__(self) -> None:
        super().__init__()
        self.denied_total = self._own_counter(
            "user_server_denied_total",
            "Requests for services that are not exposed; those of mode warn were passed on.",
            ("mode",),
        )
        self.tunnel_errors_total = self._own_counter(
            "user_server_tunnel_errors_total",
            "Connections to service proxies that could not be made, by hop and cause.",
            ("hop", "cause"),
        )
        self.connections_total = self._own_counter(
            "user_server_cluster_connections_total",
            "Connections made to the service proxy of a cluster.",
            ("cluster",),
        )
        self.cluster_requests_total = self._own_counter(
            "user_server_cluster_requests_total",
            "Requests passed on to a cluster that was reached before.",
            ("cluster",),
        )
        self.exposed_services = self._own_gauge(
            "user_server_exposed_services", "Entries of the list of services in force."
        )
        self.exposed_services_valid = self._own_gauge(
            "user_server_exposed_services_valid",
            "Whether the list of services is as the ConfigMap says: 0 while that has a mistake, and before it was read.",
        )

    def note_reached(self, cluster: str) -> None:
        """Count a connection to a cluster."""
        family = self.connections_total
        if (cluster,) in family.children or len(family.children) < _MAX_CLUSTERS:
            family.labels(cluster).inc()

    def note_forwarded(self, cluster: str) -> None:
        """Count a request that goes on to a cluster."""
        if (cluster,) in self.connections_total.children:
            self.cluster_requests_total.labels(cluster).inc()
