"""The metrics of a program that passes requests on."""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

from clusterproxy.telemetry.metrics import Metrics

from .observer import Observer

# Others are counted together: a client may make up as many as it likes.
_METHODS: Final = frozenset(
    {"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
)
# So may an origin with these.
_CODES: Final = frozenset({*map(int, HTTPStatus), 499})


class ProxyMetrics(Metrics, Observer):
    """Requests by status and method, those under way, failures behind us, and certificates."""

    def __init__(self) -> None:
        super().__init__()
        self.http_requests_total = self._own_counter(
            "http_requests_total",
            "Requests that are over, by status of the answer and method; "
            "499: the client left before there was one; other: one that HTTP does not know.",
            ("code", "method"),
        )
        self.http_requests_in_flight = self._own_gauge(
            "http_requests_in_flight", "Requests under way, upgraded connections among them."
        )
        self.http_upstream_errors_total = self._own_counter(
            "http_upstream_errors_total",
            "Requests whose destination was not reached, or did not answer as it should.",
            (),
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
        self._in_flight = self.http_requests_in_flight.labels()
        self._errors = self.http_upstream_errors_total.labels()

    def began(self) -> None:
        self._in_flight.value += 1

    def ended(self, method: str, status: int) -> None:
        self._in_flight.value -= 1
        if method not in _METHODS:
            method = "other"
        code = str(status) if status in _CODES else "other"
        self.http_requests_total.labels(code, method).value += 1

    def failed(self, origin: str) -> None:
        self._errors.value += 1
