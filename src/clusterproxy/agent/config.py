"""The configuration of the proxy agent: one field per flag, upstream's checks."""

from __future__ import annotations

import re
import uuid
from typing import TYPE_CHECKING, Final

import attrs

from clusterproxy.errors import ConfigError
from clusterproxy.gotext import format_seconds, missing_file, parse_labels, parse_query, quote
from clusterproxy.grpc.metadata import is_sendable

if TYPE_CHECKING:
    from collections.abc import Mapping

# ``validateAgentIdentifiers``; the header's ``uid`` is not for agents to claim.
_IDENTIFIERS: Final = frozenset({"ipv4", "ipv6", "cidr", "host", "default-route"})
_LAST_PORT: Final = 65_535
_ADDRESS: Final = re.compile(
    r"\[(?P<host6>[^\[\]]+)\](:(?P<port6>[0-9]{1,5}))?"
    r"|(?P<host>[^:\[\]]+)(:(?P<port>[0-9]{1,5}))?"
    r"|(?P<bare6>[^\[\]]*:[^\[\]]*:[^\[\]]*)"
)


def _new_id() -> str:
    return str(uuid.uuid4())


def parse_addresses(hosts: str, port: int) -> tuple[tuple[str, int], ...]:
    """Read a comma list of ``host``, ``host:port``, ``[IPv6]:port`` or a bare IPv6 address.

    *port* is for those that have none. A single host, as upstream takes it, is the common case.

    Raises:
        ConfigError: if an element is blank or has a port that is no port.
    """
    return tuple(_parse_address(element.strip(), port) for element in hosts.split(","))


def _parse_address(text: str, default_port: int) -> tuple[str, int]:
    match = _ADDRESS.fullmatch(text)
    port = default_port if match is None else int(match["port6"] or match["port"] or default_port)
    # A default that is no port is for validate() to name.
    if match is None or (port != default_port and not 0 < port <= _LAST_PORT):
        raise ConfigError("proxy-server-host", f"proxy server host {quote(text)} is not an address")
    return match["host6"] or match["bare6"] or match["host"], port


@attrs.frozen(kw_only=True)
class AgentConfig:
    """What the proxy agent is told. Only the addresses are read at once: see :meth:`validate`."""

    agent_cert: str = ""
    agent_key: str = ""
    ca_cert: str = ""
    proxy_server_host: str = "127.0.0.1"
    proxy_server_port: int = 8091
    server_addresses: tuple[tuple[str, int], ...] = attrs.field(
        default=attrs.Factory(
            lambda self: parse_addresses(self.proxy_server_host, self.proxy_server_port),
            takes_self=True,
        )
    )
    """What the two fields above come to."""
    alpn_protos: tuple[str, ...] = ()
    health_server_host: str = ""
    health_server_port: int = 8093
    admin_bind_address: str = "127.0.0.1"
    admin_server_port: int = 8094
    enable_profiling: bool = False
    enable_contention_profiling: bool = False
    agent_id: str = attrs.field(factory=_new_id)
    agent_identifiers: str = ""
    """Sent as given."""
    sync_interval_s: float = 1.0
    probe_interval_s: float = 1.0
    sync_interval_cap_s: float = 10.0
    keepalive_time_s: float = 3600.0
    service_account_token_path: str = ""
    warn_on_channel_limit: bool = False
    sync_forever: bool = False
    xfr_channel_size: int = 150
    count_server_leases: bool = False
    lease_namespace: str = "kube-system"
    lease_label_selector: str = "k8s-app=konnectivity-server"
    server_count_source: str = "default"
    kubeconfig: str = ""
    kube_api_content_type: str = "application/vnd.kubernetes.protobuf"

    max_message_bytes: int = 4_194_304
    connection_buffer_bytes: int = 16_777_216
    total_buffer_bytes: int = 536_870_912
    stall_timeout_s: float = 10.0
    dial_timeout_s: float = 5.0
    log_format: str = "text"
    verbosity: int = 0

    proxy_environment: Mapping[str, str] = attrs.field(factory=dict[str, str])
    """What the environment says of HTTP proxies, for ``proxyenv.proxy_for``."""
    given: frozenset[str] = frozenset()
    """The names of the flags that were set, for where a default may be chosen by circumstance."""

    def validate(self) -> None:
        """Check as ``GrpcProxyAgentOptions.Validate`` does, in its order and words, then our own.

        Raises:
            ConfigError: for the first thing that is wrong.
        """
        self._check_files()
        ports = {
            "proxy server": ("proxy-server-port", self.proxy_server_port),
            "health server": ("health-server-port", self.health_server_port),
            "admin server": ("admin-server-port", self.admin_server_port),
        }
        for title, (name, port) in ports.items():
            if port <= 0:
                raise ConfigError(name, f"{title} port {port} must be greater than 0")
        if self.xfr_channel_size <= 0:
            raise ConfigError(
                "xfr-channel-size", f"channel size {self.xfr_channel_size} must be greater than 0"
            )
        if self.enable_contention_profiling and not self.enable_profiling:
            raise ConfigError(
                "enable-contention-profiling",
                "if --enable-contention-profiling is set, --enable-profiling must also be set",
            )
        if self.sync_interval_s > self.sync_interval_cap_s:
            raise ConfigError(
                "sync-interval",
                f"sync interval {format_seconds(self.sync_interval_s)} must be less than "
                f"sync interval cap {format_seconds(self.sync_interval_cap_s)}",
            )
        if path := self.service_account_token_path:
            _check_exists("service-account-token-path", f"service account token path {path}", path)
        self._check_identifiers()
        if path := self.kubeconfig:
            _check_exists("kubeconfig", f"KubeconfigPath {quote(path)}", path)
        if self.count_server_leases:
            try:
                parse_labels(self.lease_label_selector)
            except ValueError as exc:
                raise ConfigError("lease-label-selector", str(exc)) from exc
        if self.server_count_source not in {"", "default", "max"}:
            raise ConfigError(
                "server-count-source",
                "--server-count-source must be one of '', 'default', 'max', "
                f"got {self.server_count_source}",
            )
        # Upstream leaves these to the system calls, which it then repeats for ever or dies of.
        for title, (name, port) in ports.items():
            if port > _LAST_PORT:
                raise ConfigError(name, f"{title} port {port} must be less than 65536")
        for name, value in (
            ("agent-id", self.agent_id),
            ("agent-identifiers", self.agent_identifiers),
        ):
            if not is_sendable(value):
                text = f"{name} {quote(value)} must be printable ASCII"
                raise ConfigError(name, text)
        for protocol in self.alpn_protos:
            if not (protocol.isascii() and 0 < len(protocol) < 256):
                text = f"ALPN protocol {quote(protocol)} must be ASCII of 1 to 255 characters"
                raise ConfigError("alpn-proto", text)
        self._check_limits()

    def _check_files(self) -> None:
        cert, key = self.agent_cert, self.agent_key
        if key:
            _check_exists("agent-key", f"agent key {key}", key)
            if not cert:
                raise ConfigError(
                    "agent-cert", f'cannot have agent cert empty when agent key is set to "{key}"'
                )
        if cert:
            _check_exists("agent-cert", f"agent cert {cert}", cert)
            if not key:
                raise ConfigError(
                    "agent-key", f'cannot have agent key empty when agent cert is set to "{cert}"'
                )
        if self.ca_cert:
            _check_exists("ca-cert", f"agent CA cert {self.ca_cert}", self.ca_cert)

    def _check_identifiers(self) -> None:
        try:
            names = parse_query(self.agent_identifiers)
        except ValueError as exc:
            raise ConfigError("agent-identifiers", f"agent address is invalid: {exc}") from exc
        for name in names:
            if name not in _IDENTIFIERS:
                raise ConfigError(
                    "agent-identifiers", f"agent address is invalid: unknown address type: {name}"
                )

    def _check_limits(self) -> None:
        for name, value in (
            ("max-message-size", self.max_message_bytes),
            ("connection-buffer-size", self.connection_buffer_bytes),
            ("total-buffer-size", self.total_buffer_bytes),
        ):
            if value <= 0:
                raise ConfigError(name, f"{name} must be > 0, got {value}")
        for name, seconds in (
            ("sync-interval", self.sync_interval_s),
            ("stall-timeout", self.stall_timeout_s),
            ("dial-timeout", self.dial_timeout_s),
        ):
            if seconds <= 0:
                raise ConfigError(name, f"{name} must be > 0, got {format_seconds(seconds)}")


def _check_exists(flag: str, title: str, path: str) -> None:
    if problem := missing_file(path):
        raise ConfigError(flag, f"error checking {title}, got {problem}")
