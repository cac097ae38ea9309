"""What the service proxy counts. All names are ours: the original counts nothing."""

from __future__ import annotations

from clusterproxy.reverse_proxy.metrics import ProxyMetrics


class ServiceProxyMetrics(ProxyMetrics):
    """The families of a service proxy."""

    def __init__(self) -> None:
        super().__init__()
        self.requests_total = self._own_counter(
            "service_proxy_requests_total",
            "Requests by what became of them: to the apiserver as whom they came (apiserver), to it as somebody "
            "who was authenticated here (impersonated), to a service (service), or refused (invalid, unauthenticated).",
            ("outcome",),
        )
        self.authentications_total = self._own_counter(
            "service_proxy_authentications_total",
            "Tokens that a provider was asked about, by what it said (known, unknown, error).",
            ("provider", "result"),
        )
