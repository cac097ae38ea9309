"""What is counted."""

from __future__ import annotations

from clusterproxy.reverse_proxy.metrics import ProxyMetrics
from clusterproxy.reverse_proxy.observer import Observer
from clusterproxy.telemetry.exposition import render


def test_requests_are_counted() -> None:
    metrics = ProxyMetrics()
    for method, status in (
        ("GET", 200), ("GET", 200), ("BREW", 418), ("GET", 499), ("GET", 777), ("GET", 778),
    ):  # fmt: skip
        metrics.began()
        metrics.ended(method, status)
    metrics.began()
    metrics.failed("cluster1")
    text = render(metrics)[0].decode()
    assert 'clusterproxy_http_requests_total{code="200",method="GET"} 2' in text
    assert 'clusterproxy_http_requests_total{code="418",method="other"} 1' in text
    assert 'clusterproxy_http_requests_total{code="499",method="GET"} 1' in text
    # An origin may make up as many as there are.
    assert 'clusterproxy_http_requests_total{code="other",method="GET"} 2' in text
    assert "clusterproxy_http_requests_in_flight 1" in text
    assert "clusterproxy_http_upstream_errors_total 1" in text


def test_nobody_has_to_count() -> None:
    observer = Observer()
    observer.began()
    observer.failed("a")
    observer.ended("GET", 200)
