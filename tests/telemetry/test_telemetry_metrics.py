from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from clusterproxy.service_proxy.metrics import ServiceProxyMetrics
from clusterproxy.telemetry.agent_metrics import AgentMetrics
from clusterproxy.telemetry.cells import Cell, Family, Histogram, HistogramFamily
from clusterproxy.telemetry.controller_metrics import ControllerMetrics
from clusterproxy.telemetry.exposition import render
from clusterproxy.telemetry.server_metrics import ServerMetrics
from clusterproxy.user_server.metrics import UserServerMetrics

if TYPE_CHECKING:
    from clusterproxy.telemetry.metrics import ProgramMetrics

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
PREFIX = "konnectivity_network_proxy_"


def exposed(metrics: ProgramMetrics) -> str:
    return render(metrics, prometheus_client.CollectorRegistry())[0].decode()


def block(metrics: ProgramMetrics, name: str) -> str:
    """Return the HELP, TYPE and sample lines of one family, as the original's test helper selects them."""
    name = PREFIX + name
    lines = exposed(metrics).splitlines(keepends=True)
    return "".join(line for line in lines if re.match(rf"(# (HELP|TYPE) )?{name}[ {{]", line))


def test_cells_count() -> None:
    cell = Cell()
    cell.inc()
    cell.inc(4)
    cell.dec(2)
    cell.value += 1
    assert cell.value == 4
    cell.dec()
    assert cell.value == 3
    cell.set(-7)
    assert cell.value == -7


@given(st.lists(st.floats(min_value=0, max_value=20)))
def test_a_histogram_counts_every_observation_at_or_below_its_bounds(
    observations: list[float],
) -> None:
    histogram = Histogram((1, 5, 10))
    for seconds in observations:
        histogram.observe(seconds)
    expected = [sum(seconds <= bound for seconds in observations) for bound in (1, 5, 10, math.inf)]
    assert histogram.cumulative() == expected
    assert histogram.sum == sum(observations)


def test_a_family_keeps_one_child_for_each_combination_of_labels() -> None:
    family = Family("counter", "x_total", "Help.", ("a", "b"))
    assert family.labels("1", "2") is family.labels("1", "2")
    assert family.labels("1", "2") is not family.labels("2", "1")
    with pytest.raises(ValueError, match="x_total has labels"):
        family.labels("1")
    with pytest.raises(ValueError, match="x_total has labels"):
        family.inc()


def test_short_forms_use_the_child_without_labels() -> None:
    family = Family("gauge", "x", "Help.")
    assert not family.children
    family.set(5)
    family.inc()
    family.dec(2)
    assert family.labels().value == 4
    histogram = HistogramFamily("y", "Help.", (1,))
    histogram.observe(0.5)
    assert histogram.labels().counts == [1, 0]


# The expected blocks of upstream's pkg/testing/metrics/metrics.go; it compares parsed samples, so `{}` is optional.
def test_upstreams_own_checks_of_the_server_pass() -> None:
    metrics = ServerMetrics()
    metrics.dial_failure_count.labels("no_agent").inc(3)
    assert block(metrics, "server_dial_failure_count") == (
        "# HELP konnectivity_network_proxy_server_dial_failure_count Number of dial failures observed. Multiple failures can occur for a single dial request.\n"
        "# TYPE konnectivity_network_proxy_server_dial_failure_count counter\n"
        'konnectivity_network_proxy_server_dial_failure_count{reason="no_agent"} 3\n'
    )
    metrics.pending_backend_dials.inc()
    assert block(metrics, "server_pending_backend_dials") == (
        "# HELP konnectivity_network_proxy_server_pending_backend_dials Current number of pending backend dial requests\n"
        "# TYPE konnectivity_network_proxy_server_pending_backend_dials gauge\n"
        "konnectivity_network_proxy_server_pending_backend_dials 1\n"
    )
    assert block(metrics, "server_ready_backend_connections") == (
        "# HELP konnectivity_network_proxy_server_ready_backend_connections Number of konnectivity agent connected to the proxy server. DEPRECATED, please use ready_backends\n"
        "# TYPE konnectivity_network_proxy_server_ready_backend_connections gauge\n"
        "konnectivity_network_proxy_server_ready_backend_connections 0\n"
    )
    metrics.ready_backends.labels("destHost").set(2)
    metrics.ready_backends.labels("default").set(0)
    assert block(metrics, "server_ready_backends") == (
        "# HELP konnectivity_network_proxy_server_ready_backends Number of konnectivity agent connected to the proxy server\n"
        "# TYPE konnectivity_network_proxy_server_ready_backends gauge\n"
        'konnectivity_network_proxy_server_ready_backends{proxy_strategy="default"} 0\n'
        'konnectivity_network_proxy_server_ready_backends{proxy_strategy="destHost"} 2\n'
    )
    metrics.established_connections.set(12_345_678)
    assert block(metrics, "server_established_connections") == (
        "# HELP konnectivity_network_proxy_server_established_connections Current number of established end-to-end connections (post-dial).\n"
        "# TYPE konnectivity_network_proxy_server_established_connections gauge\n"
        "konnectivity_network_proxy_server_established_connections 1.2345678e+07\n"
    )


def test_upstreams_own_checks_of_the_agent_pass() -> None:
    metrics = AgentMetrics()
    metrics.endpoint_dial_failure_total.labels("timeout").inc()
    assert block(metrics, "agent_endpoint_dial_failure_total") == (
        "# HELP konnectivity_network_proxy_agent_endpoint_dial_failure_total Number of failures dialing the remote endpoint, by reason (example: timeout).\n"
        "# TYPE konnectivity_network_proxy_agent_endpoint_dial_failure_total counter\n"
        'konnectivity_network_proxy_agent_endpoint_dial_failure_total{reason="timeout"} 1\n'
    )
    metrics.open_endpoint_connections.set(3)
    assert block(metrics, "agent_open_endpoint_connections") == (
        "# HELP konnectivity_network_proxy_agent_open_endpoint_connections Current number of open endpoint connections.\n"
        "# TYPE konnectivity_network_proxy_agent_open_endpoint_connections gauge\n"
        "konnectivity_network_proxy_agent_open_endpoint_connections 3\n"
    )


def test_histograms_look_as_gos_do() -> None:
    metrics = ServerMetrics()
    metrics.dial_duration_seconds.observe(0.00002)
    metrics.dial_duration_seconds.observe(100)
    metrics.lease_list_latency_seconds.labels("200").observe(0.005)
    text = exposed(metrics)
    name = PREFIX + "server_dial_duration_seconds"
    bounds = ["1e-06", "1e-05", "0.0001", "0.005", "0.025", "0.1", "0.5", "2.5", "12.5", "+Inf"]
    assert re.findall(rf'{name}_bucket{{le="(.*)"}} (\d+)', text) == list(
        zip(bounds, "0011111112", strict=True)
    )
    assert f"\n{name}_sum 100.00002\n{name}_count 2\n" in text
    name = PREFIX + "server_lease_list_latency_seconds"
    assert (
        f'\n# TYPE {name} histogram\n{name}_bucket{{http_status_code="200",le="0.005"}} 1\n' in text
    )
    assert f'\n{name}_bucket{{http_status_code="200",le="10"}} 1\n' in text
    assert f'\n{name}_sum{{http_status_code="200"}} 0.005\n' in text
    assert f'\n{name}_count{{http_status_code="200"}} 1\n' in text


def test_buckets_are_upstreams() -> None:
    server, agent = ServerMetrics(), AgentMetrics()
    assert server.frontend_write_duration_seconds.bounds == server.dial_duration_seconds.bounds
    lifespans = [1, 5, 15, 30, 60, 300, 900, 1800, 3600, 14400, 43200, 86400]
    assert list(server.connection_duration_seconds.bounds) == lifespans
    client_golang = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10]
    assert list(server.lease_delete_latency_seconds.bounds) == client_golang
    assert list(agent.dial_duration_seconds.bounds) == [0.005, 0.025, 0.1, 0.5, 2.5, 10, 30]
    assert agent.lease_list_latency_seconds.bounds == agent.dial_duration_seconds.bounds


@pytest.mark.parametrize(
    ("metrics", "present"),
    [
        (
            ServerMetrics(),
            {
                "server_culled_leases_count",
                "server_http_connections",
                "server_ready_backend_connections",
            },
        ),
        (AgentMetrics(), {"agent_known_server_count"}),
    ],
    ids=["server", "agent"],
)
def test_what_stands_at_zero_from_the_start(metrics: ProgramMetrics, present: set[str]) -> None:
    own = {"buffered_bytes", "handshakes_in_flight", "connections_over_budget"}
    assert {line for line in exposed(metrics).splitlines() if not line.startswith("#")} == (
        {f"{PREFIX}{name} 0" for name in present} | {f"clusterproxy_{name} 0" for name in own}
    )
    assert len(re.findall("(?m)^# HELP ", exposed(metrics))) == len(present) + len(own)


@given(st.text(), st.floats())
def test_every_label_and_value_can_be_read_back(label: str, value: float) -> None:
    metrics = ServerMetrics()
    metrics.certificate_expiry_seconds.labels(label).set(value)
    families = text_string_to_metric_families(exposed(metrics))
    (sample,) = (sample for family in families for sample in family.samples if sample.labels)
    assert sample.labels == {"file": label}
    assert sample.value == value or (math.isnan(sample.value) and math.isnan(value))


def test_the_process_tells_of_itself_after_our_families() -> None:
    body, content_type = render(ServerMetrics())
    text = body.decode()
    assert content_type == "text/plain; version=0.0.4; charset=utf-8"
    names = [family.name for family in text_string_to_metric_families(text)]
    assert {"process_resident_memory_bytes", "python_info", "python_gc_collections"} <= set(names)
    ours = [name for name in names if name.startswith(("clusterproxy", PREFIX))]
    assert names[: len(ours)] == ours == sorted(ours)


@pytest.mark.parametrize("metrics", [ServerMetrics(), AgentMetrics()], ids=["server", "agent"])
def test_attributes_are_named_as_the_metrics(metrics: ProgramMetrics) -> None:
    prefixes = (PREFIX + metrics.subsystem + "_", "clusterproxy_")
    attributes = {name: value for name, value in vars(metrics).items() if name != "families"}
    assert list(attributes.values()) == metrics.families
    for name, family in attributes.items():
        assert family.name in {prefix + name for prefix in prefixes}


def test_the_documentation_lists_exactly_what_exists() -> None:
    def row(family: Family | HistogramFamily) -> str:
        labels = ", ".join(f"`{name}`" for name in family.label_names) or "-"
        return f"| `{family.name}` | {family.kind} | {labels} | {family.documentation} |"

    families = {
        family.name: family
        for m in (
            ServerMetrics(),
            AgentMetrics(),
            ControllerMetrics(),
            UserServerMetrics(),
            ServiceProxyMetrics(),
        )
        for family in m.families
    }
    documented = [
        line
        for line in re.findall(
            r"(?m)^\| `\w+` \| (?:counter|gauge|histogram) \|.*$", DOCS.read_text()
        )
        # Those of the clients are named without their prefix.
        if re.match(r"\| `(?:konnectivity|clusterproxy|controller_runtime|leader|rest)_", line)
    ]
    assert sorted(documented) == sorted(row(family) for family in families.values())
