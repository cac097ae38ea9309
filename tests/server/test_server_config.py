"""The server's checks: upstream's TestDefaultServerOptions and TestValidate, and the rest of Validate."""

from __future__ import annotations

import logging
import uuid
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from clusterproxy.errors import ConfigError
from clusterproxy.server.config import ServerConfig, parse_strategies

if TYPE_CHECKING:
    from pathlib import Path

MISSING = "non-existent-file.crt"


@pytest.fixture
def ca_cert(tmp_path: Path) -> str:
    path = tmp_path / "ca.crt"
    path.touch()
    return str(path)


def test_defaults_are_upstreams_but_for_the_better_ones() -> None:
    config = attrs.asdict(ServerConfig(server_id="id"))
    assert config == {
        "server_cert": "",
        "server_key": "",
        "server_ca_cert": "",
        "cluster_cert": "",
        "cluster_key": "",
        "cluster_ca_cert": "",
        "mode": "grpc",
        "uds_name": "",
        "delete_existing_uds_file": True,
        "server_port": 8090,
        "server_bind_address": "",
        "agent_port": 8091,
        "agent_bind_address": "",
        "health_port": 8092,
        "health_bind_address": "",
        "admin_port": 8095,
        "admin_bind_address": "127.0.0.1",
        "keepalive_time_s": 3600.0,
        "frontend_keepalive_time_s": 3600.0,
        "enable_profiling": False,
        "enable_contention_profiling": False,
        "server_id": "id",
        "server_count": 1,
        "agent_namespace": "",
        "agent_service_account": "",
        "authentication_audience": "",
        "kubeconfig": "",
        "kubeconfig_qps": 0.0,
        "kubeconfig_burst": 0,
        "kube_api_content_type": "application/vnd.kubernetes.protobuf",
        "proxy_strategies": ("default",),
        "cipher_suites": (),
        "tls_min_version": "",
        "xfr_channel_size": 10,
        "enable_lease_controller": False,
        "lease_namespace": "kube-system",
        "lease_label": "k8s-app=konnectivity-server",
        # Better than 0, which waits for nobody at the end and for ever on a dial.
        "graceful_shutdown_timeout_s": 25.0,
        "backend_dial_timeout_s": 28.0,
        # Ours.
        "max_handshakes": 512,
        "max_concurrent_streams": 10_000,
        "max_header_list_bytes": 65_536,
        "max_message_bytes": 4_194_304,
        "max_resets_per_s": 200,
        "max_control_frames_per_s": 10_000,
        "connection_buffer_bytes": 16_777_216,
        "total_buffer_bytes": 536_870_912,
        "stall_timeout_s": 10.0,
        "half_close_linger_s": 10.0,
        "agent_arrival_timeout_s": 0.0,
        "agent_identity": "off",
        "log_format": "text",
        "verbosity": 0,
        "given": frozenset(),
    }


def test_an_id_is_made_up() -> None:
    first, second = ServerConfig().server_id, ServerConfig().server_id
    assert first != second
    assert str(uuid.UUID(first)) == first


ACCEPTED: list[dict[str, Any]] = [
    {},
    *(
        {f"{name}_port": port}
        for name in ("server", "agent", "admin", "health")
        for port in (1024, 49151)
    ),
    {"cipher_suites": ("TLS_AES_256_GCM_SHA384", "TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA")},
    {"tls_min_version": "VersionTLS12"},
    {"tls_min_version": "VersionTLS13"},
    {"proxy_strategies": ("destHost", "defaultRoute", "default")},
    {"graceful_shutdown_timeout_s": 0.0},
    {"graceful_shutdown_timeout_s": 30.0},
    {"backend_dial_timeout_s": 0.0},
    {"backend_dial_timeout_s": 30.0},
    {"mode": "http-connect"},
    {"server_ca_cert": "", "uds_name": "/run/proxy.sock", "server_port": 0},
    {"enable_profiling": True, "enable_contention_profiling": True},
    {"lease_label": "", "enable_lease_controller": False},
]


@pytest.mark.parametrize("changes", ACCEPTED, ids=str)
def test_accepted(ca_cert: str, changes: dict[str, Any]) -> None:
    ServerConfig(**{"server_ca_cert": ca_cert, **changes}).validate()


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (
        {"server_ca_cert": ""},
        "server-ca-cert",
        "server ca cert must be set when in TCP mode (uds-name is empty)",
    ),
    *(
        (
            {field: MISSING},
            field.replace("_", "-"),
            f"error checking {title} {MISSING}, got stat {MISSING}: no such file or directory",
        )
        for field, title in (
            ("server_ca_cert", "server CA cert"),
            ("server_cert", "server cert"),
            ("server_key", "server key"),
            ("cluster_ca_cert", "cluster CA cert"),
            ("cluster_cert", "cluster cert"),
            ("cluster_key", "cluster key"),
        )
    ),
    (
        {"server_key": "FILE"},
        "server-cert",
        'cannot have server cert empty when server key is set to "FILE"',
    ),
    (
        {"server_cert": "FILE"},
        "server-key",
        'cannot have server key empty when server cert is set to "FILE"',
    ),
    (
        {"cluster_key": "FILE"},
        "cluster-cert",
        'cannot have cluster cert empty when cluster key is set to "FILE"',
    ),
    (
        {"cluster_cert": "FILE"},
        "cluster-key",
        'cannot have cluster key empty when cluster cert is set to "FILE"',
    ),
    *(
        (
            {"server_id": value},
            "server-id",
            f"server-id {shown} must be printable ASCII",
        )
        for value, shown in (("ä", '"ä"'), ("a\nb", '"a\\nb"'))
    ),
    ({"mode": 'a"b'}, "mode", "mode must be set to either 'grpc' or 'http-connect' not \"a\\\"b\""),
    ({"uds_name": "/s"}, "server-port", "server port should be set to 0 not 8090 for UDS"),
    (
        {"uds_name": "/s", "server_port": 0, "server_key": "FILE", "server_cert": "FILE"},
        "server-key",
        "server key should not be set for UDS",
    ),
    (
        {"uds_name": "/s", "server_port": 0},
        "server-ca-cert",
        "server ca cert should not be set for UDS",
    ),
    *(
        (
            {f"{name}_port": port},
            f"{name}-port",
            f"please do not try to use {kind} port {port} for the {name} port",
        )
        for name in ("server", "agent", "admin", "health")
        for kind, port in (("reserved", 1023), ("reserved", -1), ("ephemeral", 49152))
    ),
    # All ports are held against the upper end before any is against the lower.
    (
        {"server_port": 1, "health_port": 49152},
        "health-port",
        "please do not try to use ephemeral port 49152 for the health port",
    ),
    (
        {"enable_contention_profiling": True},
        "enable-contention-profiling",
        "if --enable-contention-profiling is set, --enable-profiling must also be set",
    ),
    (
        {"agent_namespace": "n", "cluster_ca_cert": "FILE"},
        "cluster-ca-cert",
        "--cluster-ca-cert can not be used when agent authentication is enabled",
    ),
    (
        {"agent_service_account": "s", "authentication_audience": "a"},
        "agent-namespace",
        "--agent-namespace cannot be empty when agent authentication is enabled",
    ),
    (
        {"agent_namespace": "n", "authentication_audience": "a"},
        "agent-service-account",
        "--agent-service-account cannot be empty when agent authentication is enabled",
    ),
    (
        {"agent_namespace": "n", "agent_service_account": "s"},
        "authentication-audience",
        "--authentication-audience cannot be empty when agent authentication is enabled",
    ),
    (
        {"kubeconfig": MISSING},
        "kubeconfig",
        f'checking KubeconfigPath "{MISSING}", got stat {MISSING}: no such file or directory',
    ),
    ({"proxy_strategies": ()}, "proxy-strategies", "ProxyStrategies cannot be empty"),
    (
        {"proxy_strategies": ("",)},
        "proxy-strategies",
        "invalid proxy strategies: proxy strategies cannot be empty",
    ),
    (
        {"proxy_strategies": ("default", "invalid")},
        "proxy-strategies",
        "invalid proxy strategies: unknown proxy strategy: invalid",
    ),
    ({"xfr_channel_size": 0}, "xfr-channel-size", "channel size 0 must be greater than 0"),
    ({"xfr_channel_size": -10}, "xfr-channel-size", "channel size -10 must be greater than 0"),
    (
        {"tls_min_version": "InvalidVersion"},
        "tls-min-version",
        (
            'unsupported TLS version "InvalidVersion", supported values are: '
            "VersionTLS10, VersionTLS11, VersionTLS12, VersionTLS13"
        ),
    ),
    *(
        (
            {"cipher_suites": (suite,)},
            "cipher-suites",
            f"cipher suite {suite} not supported, doesn't exist or considered as insecure",
        )
        for suite in ("", "NOPE", "TLS_RSA_WITH_RC4_128_SHA", "ECDHE-RSA-AES128-GCM-SHA256")
    ),
    ({"enable_lease_controller": True, "lease_label": ""}, "lease-label", "empty string provided"),
    (
        {"enable_lease_controller": True, "lease_label": "a"},
        "lease-label",
        "invalid label format: a",
    ),
    (
        {"agent_identity": "on"},
        "agent-identity",
        'agent-identity must be one of off, verify, require, not "on"',
    ),
    (
        {"agent_identity": "require"},
        "agent-identity",
        "--agent-identity=require needs --cluster-ca-cert, and no tokens",
    ),
    (
        {
            "agent_identity": "require",
            "agent_namespace": "n",
            "agent_service_account": "s",
            "authentication_audience": "a",
        },
        "agent-identity",
        "--agent-identity=require needs --cluster-ca-cert, and no tokens",
    ),
    (
        {"graceful_shutdown_timeout_s": -1.0},
        "graceful-shutdown-timeout",
        "graceful-shutdown-timeout must be >= 0, got -1s",
    ),
    (
        {"backend_dial_timeout_s": -1.0},
        "backend-dial-timeout",
        "backend-dial-timeout must be >= 0, got -1s",
    ),
    (
        {"agent_arrival_timeout_s": -1.0},
        "agent-arrival-timeout",
        "agent-arrival-timeout must be >= 0, got -1s",
    ),
    ({"keepalive_time_s": -1.0}, "keepalive-time", "keepalive-time must be >= 0, got -1s"),
    (
        {"frontend_keepalive_time_s": -1.0},
        "frontend-keepalive-time",
        "frontend-keepalive-time must be >= 0, got -1s",
    ),
    *(
        ({field: 0}, flag, f"{flag} must be > 0, got 0")
        for field, flag in (
            ("max_handshakes", "max-handshakes"),
            ("max_concurrent_streams", "max-concurrent-streams"),
            ("max_header_list_bytes", "max-header-list-size"),
            ("max_message_bytes", "max-message-size"),
            ("max_resets_per_s", "max-resets-per-second"),
            ("max_control_frames_per_s", "max-control-frames-per-second"),
            ("connection_buffer_bytes", "connection-buffer-size"),
            ("total_buffer_bytes", "total-buffer-size"),
        )
    ),
    *(
        ({field: 2**32}, flag, f"{flag} must be <= 4294967295, got 4294967296")
        for field, flag in (
            ("max_concurrent_streams", "max-concurrent-streams"),
            ("max_header_list_bytes", "max-header-list-size"),
        )
    ),
    ({"stall_timeout_s": 0.0}, "stall-timeout", "stall-timeout must be > 0, got 0s"),
    ({"half_close_linger_s": -1.0}, "half-close-linger", "half-close-linger must be >= 0, got -1s"),
]


@pytest.mark.parametrize(("changes", "flag", "message"), REFUSED, ids=str)
def test_refused_in_upstreams_words(
    ca_cert: str, changes: dict[str, Any], flag: str, message: str
) -> None:
    given: dict[str, Any] = {
        field: ca_cert if value == "FILE" else value for field, value in changes.items()
    }
    with pytest.raises(ConfigError) as caught:
        ServerConfig(**{"server_ca_cert": ca_cert, **given}).validate()
    assert (caught.value.field, caught.value.message) == (flag, message.replace("FILE", ca_cert))


@pytest.mark.parametrize("version", ["VersionTLS10", "VersionTLS11"])
def test_old_tls_is_warned_about(
    ca_cert: str, version: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="clusterproxy"):
        ServerConfig(server_ca_cert=ca_cert, tls_min_version=version).validate()
    assert [record.getMessage() for record in caplog.records] == [
        (
            f"--tls-min-version={version} is below TLS 1.2 and is considered insecure (RFC 8996): "
            "TLS 1.2 is the minimum"
        )
    ]


@pytest.mark.parametrize(
    ("mode", "strategies", "warned"),
    [
        ("verify", ("default",), True),
        ("require", ("destHost", "default"), True),
        ("verify", ("destHost", "defaultRoute"), False),
        ("off", ("default",), False),
    ],
)
def test_identities_that_decide_nothing_are_warned_about(
    ca_cert: str,
    mode: str,
    strategies: tuple[str, ...],
    warned: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, logger="clusterproxy"):
        ServerConfig(
            server_ca_cert=ca_cert,
            cluster_ca_cert=ca_cert,
            agent_identity=mode,
            proxy_strategies=strategies,
        ).validate()
    said = f"--agent-identity={mode} keeps no agent from the dials of other clusters while"
    assert (said in caplog.text) is warned
    assert len(caplog.records) == warned


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("default", ("default",)),
        ("destHost,,defaultRoute,", ("destHost", "defaultRoute")),
        ("", ()),
        (",", ("",)),
    ],
)
def test_strategies_are_cut_at_commas(text: str, names: tuple[str, ...]) -> None:
    assert parse_strategies(text) == names


TOKEN = {"agent_namespace": "n", "agent_service_account": "s", "authentication_audience": "a"}


@pytest.mark.parametrize(
    ("changes", "needed"),
    [(TOKEN, True), ({"enable_lease_controller": True}, True), ({}, False)],
)
def test_what_needs_kubernetes(ca_cert: str, changes: dict[str, Any], *, needed: bool) -> None:
    config = ServerConfig(server_ca_cert=ca_cert, kubeconfig=ca_cert, **changes)
    config.validate()
    assert config.needs_kubernetes is needed
