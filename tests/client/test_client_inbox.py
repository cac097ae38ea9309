"""What waits for a reader, and what is counted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.client import ClientMetrics
from clusterproxy.client.inbox import Inbox
from clusterproxy.client.stream import split_address
from clusterproxy.telemetry.exposition import render

put = st.tuples(st.just("put"), st.sampled_from([1, 2, 100, 16_383, 16_384, 40_000]))
take = st.tuples(st.just("take"), st.integers(1, 50_000))


@given(st.lists(put | take, max_size=60))
def test_inbox_is_a_queue_of_bytes(steps: list[tuple[str, int]]) -> None:
    inbox, model, taken, written = Inbox(), b"", 0, 0
    for step, size in steps:
        if step == "put":
            data = bytes((written + at) % 251 for at in range(size))
            written += size
            inbox.put(data)
            model += data
        elif model:
            part = inbox.take(size)
            assert part == model[:size]
            assert isinstance(part, bytes)
            model = model[size:]
            taken += len(part)
        assert (inbox.queued, inbox.taken) == (len(model), taken)
    inbox.clear()
    assert inbox.queued == 0


def test_small_messages_share_memory() -> None:
    inbox = Inbox()
    for _ in range(100_000):
        inbox.put(b"x")
    assert len(inbox._chunks) < 10
    assert inbox.take(1 << 20) == b"x" * 100_000


def test_addresses() -> None:
    assert split_address("cluster1:443") == ("cluster1", 443)
    assert split_address("[fd00::1]:80") == ("fd00::1", 80)
    assert split_address("cluster1") == ("cluster1", 0)
    assert split_address("cluster1:https") == ("cluster1", 0)


def test_metrics_are_those_of_the_go_client() -> None:
    metrics = ClientMetrics()
    metrics.dial_failure_total.labels("endpoint").inc()
    metrics.client_connections.labels("ok").inc()
    metrics.stream_packets_total.labels("from_client", "DIAL_REQ").inc()
    metrics.stream_errors_total.labels("to_client", "Unavailable", "Unknown").inc()
    text = render(metrics)[0].decode()
    prefix = "konnectivity_network_proxy_client_"
    assert [line for line in text.splitlines() if prefix in line] == [
        f"# HELP {prefix}client_connections Number of open client connections, by status (Example: dialing)",
        f"# TYPE {prefix}client_connections gauge",
        f'{prefix}client_connections{{status="ok"}} 1',
        (
            f"# HELP {prefix}dial_failure_total "
            "Number of dial failures observed, by reason (example: remote endpoint error)"
        ),
        f"# TYPE {prefix}dial_failure_total counter",
        f'{prefix}dial_failure_total{{reason="endpoint"}} 1',
        (
            f"# HELP {prefix}stream_errors_total Count of gRPC stream errors, by segment, grpc Code, packet type. "
            "(example: from_agent, Code.Unavailable, DIAL_RSP)"
        ),
        f"# TYPE {prefix}stream_errors_total counter",
        f'{prefix}stream_errors_total{{code="Unavailable",packet_type="Unknown",segment="to_client"}} 1',
        (
            f"# HELP {prefix}stream_packets_total "
            "Count of packets processed, by segment and packet type (example: from_client, DIAL_REQ)"
        ),
        f"# TYPE {prefix}stream_packets_total counter",
        f'{prefix}stream_packets_total{{packet_type="DIAL_REQ",segment="from_client"}} 1',
    ]
