"""The agent's checks: upstream's TestDefaultServerOptions and TestValidate, and the rest of Validate."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusterproxy.agent.config import AgentConfig, parse_addresses
from clusterproxy.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

MISSING = "non-existent-file.crt"


def test_defaults_are_upstreams() -> None:
    assert attrs.asdict(AgentConfig(agent_id="id")) == {
        "agent_cert": "",
        "agent_key": "",
        "ca_cert": "",
        "proxy_server_host": "127.0.0.1",
        "proxy_server_port": 8091,
        "server_addresses": (("127.0.0.1", 8091),),
        "alpn_protos": (),
        "health_server_host": "",
        "health_server_port": 8093,
        "admin_bind_address": "127.0.0.1",
        "admin_server_port": 8094,
        "enable_profiling": False,
        "enable_contention_profiling": False,
        "agent_id": "id",
        "agent_identifiers": "",
        "sync_interval_s": 1.0,
        "probe_interval_s": 1.0,
        "sync_interval_cap_s": 10.0,
        "keepalive_time_s": 3600.0,
        "service_account_token_path": "",
        "warn_on_channel_limit": False,
        "sync_forever": False,
        "xfr_channel_size": 150,
        "count_server_leases": False,
        "lease_namespace": "kube-system",
        "lease_label_selector": "k8s-app=konnectivity-server",
        "server_count_source": "default",
        "kubeconfig": "",
        "kube_api_content_type": "application/vnd.kubernetes.protobuf",
        # Ours.
        "max_message_bytes": 4_194_304,
        "connection_buffer_bytes": 16_777_216,
        "total_buffer_bytes": 536_870_912,
        "stall_timeout_s": 10.0,
        "dial_timeout_s": 5.0,
        "log_format": "text",
        "verbosity": 0,
        "proxy_environment": {},
        "given": frozenset(),
    }


def test_an_id_is_made_up() -> None:
    first, second = AgentConfig().agent_id, AgentConfig().agent_id
    assert first != second
    assert str(uuid.UUID(first)) == first


@pytest.mark.parametrize(
    "changes",
    [
        {},
        *(
            {field: port}
            for field in ("proxy_server_port", "health_server_port", "admin_server_port")
            for port in (1, 1023, 49152, 65535)
        ),
        {"sync_interval_s": 10.0},
        {"enable_profiling": True, "enable_contention_profiling": True},
        {
            "agent_identifiers": "host=a&host=b&ipv4=1.2.3.4&ipv6=::1&cidr=10.0.0.0/8&default-route=true"
        },
        *({"server_count_source": source} for source in ("", "default", "max")),
        {"lease_label_selector": ""},
    ],
    ids=str,
)
def test_accepted(changes: dict[str, Any]) -> None:
    AgentConfig(**changes).validate()


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    *(
        (
            {field: MISSING},
            field.replace("_", "-"),
            f"error checking {title}, got stat {MISSING}: no such file or directory",
        )
        for field, title in (
            ("agent_key", f"agent key {MISSING}"),
            ("agent_cert", f"agent cert {MISSING}"),
            ("ca_cert", f"agent CA cert {MISSING}"),
            ("service_account_token_path", f"service account token path {MISSING}"),
            ("kubeconfig", f'KubeconfigPath "{MISSING}"'),
        )
    ),
    (
        {"agent_key": "FILE"},
        "agent-cert",
        'cannot have agent cert empty when agent key is set to "FILE"',
    ),
    (
        {"agent_cert": "FILE"},
        "agent-key",
        'cannot have agent key empty when agent cert is set to "FILE"',
    ),
    *(
        ({field: port}, field.replace("_", "-"), f"{title} port {port} must be {what}")
        for field, title in (
            ("proxy_server_port", "proxy server"),
            ("health_server_port", "health server"),
            ("admin_server_port", "admin server"),
        )
        for port, what in (
            (0, "greater than 0"),
            (-1, "greater than 0"),
            (65536, "less than 65536"),
        )
    ),
    ({"xfr_channel_size": 0}, "xfr-channel-size", "channel size 0 must be greater than 0"),
    ({"xfr_channel_size": -10}, "xfr-channel-size", "channel size -10 must be greater than 0"),
    (
        {"enable_contention_profiling": True},
        "enable-contention-profiling",
        "if --enable-contention-profiling is set, --enable-profiling must also be set",
    ),
    (
        {"sync_interval_s": 11.5},
        "sync-interval",
        "sync interval 11.5s must be less than sync interval cap 10s",
    ),
    (
        {"agent_identifiers": "host=a&uid=b"},
        "agent-identifiers",
        "agent address is invalid: unknown address type: uid",
    ),
    (
        {"agent_identifiers": "host=a;b"},
        "agent-identifiers",
        "agent address is invalid: invalid semicolon separator in query",
    ),
    (
        {"agent_identifiers": "host=%zz"},
        "agent-identifiers",
        'agent address is invalid: invalid URL escape "%zz"',
    ),
    (
        {"count_server_leases": True, "lease_label_selector": ""},
        "lease-label-selector",
        "empty string provided",
    ),
    (
        {"count_server_leases": True, "lease_label_selector": "a"},
        "lease-label-selector",
        "invalid label format: a",
    ),
    (
        {"server_count_source": "foobar"},
        "server-count-source",
        "--server-count-source must be one of '', 'default', 'max', got foobar",
    ),
    *(
        (
            {"alpn_protos": ("h3", protocol)},
            "alpn-proto",
            f'ALPN protocol "{protocol}" must be ASCII of 1 to 255 characters',
        )
        for protocol in ("", "ä", "p" * 256)
    ),
    *(
        (
            {name: value},
            name.replace("_", "-"),
            f"{name.replace('_', '-')} {shown} must be printable ASCII",
        )
        for name, value, shown in (
            ("agent_id", "ä", '"ä"'),
            ("agent_id", "a\nb", '"a\\nb"'),
            # An argument that was no UTF-8.
            ("agent_id", "\udcff", '"\\xff"'),
            ("agent_identifiers", "host=ä", '"host=ä"'),
        )
    ),
    ({"sync_interval_s": 0.0}, "sync-interval", "sync-interval must be > 0, got 0s"),
    ({"sync_interval_s": -1.0}, "sync-interval", "sync-interval must be > 0, got -1s"),
    ({"max_message_bytes": 0}, "max-message-size", "max-message-size must be > 0, got 0"),
    (
        {"connection_buffer_bytes": -1},
        "connection-buffer-size",
        "connection-buffer-size must be > 0, got -1",
    ),
    ({"total_buffer_bytes": 0}, "total-buffer-size", "total-buffer-size must be > 0, got 0"),
    ({"stall_timeout_s": 0.0}, "stall-timeout", "stall-timeout must be > 0, got 0s"),
    ({"dial_timeout_s": -0.1}, "dial-timeout", "dial-timeout must be > 0, got -100ms"),
]


@pytest.mark.parametrize(("changes", "flag", "message"), REFUSED, ids=str)
def test_refused_in_upstreams_words(
    tmp_path: Path, changes: dict[str, Any], flag: str, message: str
) -> None:
    file = tmp_path / "file"
    file.touch()
    given: dict[str, Any] = {
        field: str(file) if value == "FILE" else value for field, value in changes.items()
    }
    with pytest.raises(ConfigError) as caught:
        AgentConfig(**given).validate()
    assert (caught.value.field, caught.value.message) == (flag, message.replace("FILE", str(file)))


@pytest.mark.parametrize(
    ("hosts", "addresses"),
    [
        ("proxy.example", [("proxy.example", 8091)]),
        ("proxy.example:443", [("proxy.example", 443)]),
        ("a, b:1,c:65535", [("a", 8091), ("b", 1), ("c", 65535)]),
        ("10.0.0.1:1", [("10.0.0.1", 1)]),
        ("::1", [("::1", 8091)]),
        ("[::1]", [("::1", 8091)]),
        ("[fe80::1%eth0]:1,::", [("fe80::1%eth0", 1), ("::", 8091)]),
    ],
)
def test_addresses_of_servers(hosts: str, addresses: list[tuple[str, int]]) -> None:
    assert parse_addresses(hosts, 8091) == tuple(addresses)
    assert AgentConfig(proxy_server_host=hosts).server_addresses == tuple(addresses)


@pytest.mark.parametrize(
    "bad",
    [
        "",
        "a,,b",
        "a:",
        ":1",
        "a:0",
        "a:65536",
        "a:x",
        "a:-1",
        "a:٣",
        "[::1",
        "[]",
        "[::1]x",
        "[::1]:",
    ],
)
def test_what_is_no_address_is_refused(bad: str) -> None:
    with pytest.raises(ConfigError, match="is not an address") as caught:
        parse_addresses(bad, 8091)
    assert caught.value.field == "proxy-server-host"


@given(st.text(alphabet="a.:[]0123456789,% ", max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        addresses = parse_addresses(text, 8091)
    except ConfigError:
        return
    assert all(host and 0 < port <= 65535 for host, port in addresses)


def test_a_bad_default_port_is_for_validation_to_name() -> None:
    with pytest.raises(ConfigError, match="proxy server port 0 must be greater than 0"):
        AgentConfig(proxy_server_port=0).validate()
