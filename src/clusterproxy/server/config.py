"""The configuration of the proxy server: one field per flag, upstream's checks."""

from __future__ import annotations

import logging
import uuid
from typing import Final

import attrs

from clusterproxy.errors import ConfigError
from clusterproxy.gotext import format_seconds, missing_file, parse_labels, quote
from clusterproxy.grpc.metadata import is_sendable
from clusterproxy.transport.tls import GO_CIPHER_SUITES

_logger = logging.getLogger("clusterproxy.server.config")

STRATEGIES: Final = ("default", "destHost", "defaultRoute")
AGENT_IDENTITIES: Final = ("off", "verify", "require")
_TLS_VERSIONS: Final = ("VersionTLS10", "VersionTLS11", "VersionTLS12", "VersionTLS13")
_TLS_BELOW_12: Final = ("VersionTLS10", "VersionTLS11")
# The registered ports: those below need rights, those above are handed out to clients.
_FIRST_PORT: Final = 1024
_LAST_PORT: Final = 49151
_LARGEST_SETTING: Final = 2**32 - 1


def _new_id() -> str:
    return str(uuid.uuid4())


@attrs.frozen(kw_only=True)
class ServerConfig:
    """What the proxy server is told. Building one checks nothing: :meth:`validate` does."""

    server_cert: str = ""
    server_key: str = ""
    server_ca_cert: str = ""
    cluster_cert: str = ""
    cluster_key: str = ""
    cluster_ca_cert: str = ""
    mode: str = "grpc"
    uds_name: str = ""
    delete_existing_uds_file: bool = True
    server_port: int = 8090
    server_bind_address: str = ""
    agent_port: int = 8091
    agent_bind_address: str = ""
    admin_port: int = 8095
    admin_bind_address: str = "127.0.0.1"
    health_port: int = 8092
    health_bind_address: str = ""
    keepalive_time_s: float = 3600.0
    """0 is grpc-go's default of two hours, for both."""
    frontend_keepalive_time_s: float = 3600.0
    enable_profiling: bool = False
    enable_contention_profiling: bool = False
    server_id: str = attrs.field(factory=_new_id)
    server_count: int = 1
    agent_namespace: str = ""
    agent_service_account: str = ""
    authentication_audience: str = ""
    kubeconfig: str = ""
    kubeconfig_qps: float = 0.0
    kubeconfig_burst: int = 0
    kube_api_content_type: str = "application/vnd.kubernetes.protobuf"
    proxy_strategies: tuple[str, ...] = ("default",)
    cipher_suites: tuple[str, ...] = ()
    """Names as Go has them, for TLS 1.2; empty for the default."""
    tls_min_version: str = ""
    """A name of Go's: ``VersionTLS13`` stands for TLS 1.3, every other one for TLS 1.2."""
    xfr_channel_size: int = 10
    enable_lease_controller: bool = False
    lease_namespace: str = "kube-system"
    lease_label: str = "k8s-app=konnectivity-server"
    graceful_shutdown_timeout_s: float = 25.0
    """How long connections may go on after a signal; 0 ends them at once."""
    backend_dial_timeout_s: float = 28.0
    """How long a dial may wait for the agent's answer; 0 is no limit."""
    agent_arrival_timeout_s: float = 0.0
    """How long after the start a dial waits for an agent that is not there yet."""
    agent_identity: str = "off"
    """What agents' certificates say of their clusters: not looked at, held against what they claim, or required."""

    max_handshakes: int = 512
    max_concurrent_streams: int = 10_000
    max_header_list_bytes: int = 65_536
    max_message_bytes: int = 4_194_304
    max_resets_per_s: int = 200
    max_control_frames_per_s: int = 10_000
    connection_buffer_bytes: int = 16_777_216
    total_buffer_bytes: int = 536_870_912
    stall_timeout_s: float = 10.0
    half_close_linger_s: float = 10.0
    """How long a Go agent's service may go on after a client has ended its side."""
    log_format: str = "text"
    verbosity: int = 0

    given: frozenset[str] = frozenset()
    """The names of the flags that were set, for where a default may be chosen by circumstance."""

    @property
    def authenticates_agents(self) -> bool:
        """Whether agents authenticate by the tokens of a service account."""
        return bool(
            self.agent_namespace or self.agent_service_account or self.authentication_audience
        )

    @property
    def needs_kubernetes(self) -> bool:
        """Whether there is something to ask an apiserver for."""
        return self.authenticates_agents or self.enable_lease_controller

    def validate(self) -> None:
        """Check as ``ProxyRunOptions.Validate`` does, in its order and words, then our own flags.

        A minimum of TLS 1.0 or 1.1 is warned about.

        Raises:
            ConfigError: for the first thing that is wrong.
        """
        self._check_pair("server")
        self._check_pair("cluster")
        self._check_listeners()
        if self.enable_contention_profiling and not self.enable_profiling:
            raise ConfigError(
                "enable-contention-profiling",
                "if --enable-contention-profiling is set, --enable-profiling must also be set",
            )
        self._check_token_authentication()
        if self.kubeconfig and (problem := missing_file(self.kubeconfig)):
            raise ConfigError(
                "kubeconfig", f"checking KubeconfigPath {quote(self.kubeconfig)}, got {problem}"
            )
        check_strategies(self.proxy_strategies)
        if self.xfr_channel_size <= 0:
            raise ConfigError(
                "xfr-channel-size",
                f"channel size {self.xfr_channel_size} must be greater than 0",
            )
        self._check_tls()
        if self.enable_lease_controller:
            try:
                parse_labels(self.lease_label)
            except ValueError as exc:
                raise ConfigError("lease-label", str(exc)) from exc
        for name, seconds in (
            ("graceful-shutdown-timeout", self.graceful_shutdown_timeout_s),
            ("backend-dial-timeout", self.backend_dial_timeout_s),
            ("agent-arrival-timeout", self.agent_arrival_timeout_s),
            ("keepalive-time", self.keepalive_time_s),
            ("frontend-keepalive-time", self.frontend_keepalive_time_s),
        ):
            if seconds < 0:
                raise ConfigError(name, f"{name} must be >= 0, got {format_seconds(seconds)}")
        if not is_sendable(self.server_id):
            # Agents are told, and not one could come.
            text = f"server-id {quote(self.server_id)} must be printable ASCII"
            raise ConfigError("server-id", text)
        self._check_agent_identity()
        self._check_limits()

    def _check_pair(self, side: str) -> None:
        cert: str = getattr(self, f"{side}_cert")
        key: str = getattr(self, f"{side}_key")
        ca_cert: str = getattr(self, f"{side}_ca_cert")
        if key:
            if problem := missing_file(key):
                raise ConfigError(f"{side}-key", f"error checking {side} key {key}, got {problem}")
            if not cert:
                raise ConfigError(
                    f"{side}-cert",
                    f"cannot have {side} cert empty when {side} key is set to {quote(key)}",
                )
        if cert:
            if problem := missing_file(cert):
                raise ConfigError(
                    f"{side}-cert", f"error checking {side} cert {cert}, got {problem}"
                )
            if not key:
                raise ConfigError(
                    f"{side}-key",
                    f"cannot have {side} key empty when {side} cert is set to {quote(cert)}",
                )
        if ca_cert and (problem := missing_file(ca_cert)):
            raise ConfigError(
                f"{side}-ca-cert", f"error checking {side} CA cert {ca_cert}, got {problem}"
            )

    def _check_listeners(self) -> None:
        if self.mode not in {"grpc", "http-connect"}:
            raise ConfigError(
                "mode",
                f"mode must be set to either 'grpc' or 'http-connect' not {quote(self.mode)}",
            )
        if self.uds_name:
            if self.server_port != 0:
                raise ConfigError(
                    "server-port", f"server port should be set to 0 not {self.server_port} for UDS"
                )
            for name, value in (
                ("key", self.server_key),
                ("cert", self.server_cert),
                ("ca cert", self.server_ca_cert),
            ):
                if value:
                    raise ConfigError(
                        f"server-{name.replace(' ', '-')}",
                        f"server {name} should not be set for UDS",
                    )
        elif not self.server_ca_cert:
            raise ConfigError(
                "server-ca-cert", "server ca cert must be set when in TCP mode (uds-name is empty)"
            )
        ports = {
            "server": self.server_port,
            "agent": self.agent_port,
            "admin": self.admin_port,
            "health": self.health_port,
        }
        for name, port in ports.items():
            if port > _LAST_PORT:
                raise ConfigError(
                    f"{name}-port",
                    f"please do not try to use ephemeral port {port} for the {name} port",
                )
        for name, port in ports.items():
            if port < _FIRST_PORT and not (name == "server" and self.uds_name):
                raise ConfigError(
                    f"{name}-port",
                    f"please do not try to use reserved port {port} for the {name} port",
                )

    def _check_token_authentication(self) -> None:
        if not self.authenticates_agents:
            return
        if self.cluster_ca_cert:
            raise ConfigError(
                "cluster-ca-cert",
                "--cluster-ca-cert can not be used when agent authentication is enabled",
            )
        for name, value in (
            ("agent-namespace", self.agent_namespace),
            ("agent-service-account", self.agent_service_account),
            ("authentication-audience", self.authentication_audience),
        ):
            if not value:
                raise ConfigError(
                    name, f"--{name} cannot be empty when agent authentication is enabled"
                )

    def _check_tls(self) -> None:
        version = self.tls_min_version
        if version and version not in _TLS_VERSIONS:
            raise ConfigError(
                "tls-min-version",
                f"unsupported TLS version {quote(version)}, supported values are: "
                + ", ".join(_TLS_VERSIONS),
            )
        if version in _TLS_BELOW_12:
            _logger.warning(
                "--tls-min-version=%s is below TLS 1.2 and is considered insecure (RFC 8996): "
                "TLS 1.2 is the minimum",
                version,
            )
        for suite in self.cipher_suites:
            if suite not in GO_CIPHER_SUITES:
                raise ConfigError(
                    "cipher-suites",
                    f"cipher suite {suite} not supported, doesn't exist or considered as insecure",
                )

    def _check_agent_identity(self) -> None:
        mode = self.agent_identity
        if mode not in AGENT_IDENTITIES:
            raise ConfigError(
                "agent-identity",
                f"agent-identity must be one of {', '.join(AGENT_IDENTITIES)}, not {quote(mode)}",
            )
        if mode == "require" and not self.cluster_ca_cert:
            # No certificate is asked for then, so not one agent could come.
            raise ConfigError(
                "agent-identity", "--agent-identity=require needs --cluster-ca-cert, and no tokens"
            )
        if mode != "off" and "default" in self.proxy_strategies:
            _logger.warning(
                "--agent-identity=%s keeps no agent from the dials of other clusters while "
                "--proxy-strategies has 'default', which gives any dial to any agent: use destHost",
                mode,
            )

    def _check_limits(self) -> None:
        for name, value in (
            ("max-handshakes", self.max_handshakes),
            ("max-concurrent-streams", self.max_concurrent_streams),
            ("max-header-list-size", self.max_header_list_bytes),
            ("max-message-size", self.max_message_bytes),
            ("max-resets-per-second", self.max_resets_per_s),
            ("max-control-frames-per-second", self.max_control_frames_per_s),
            ("connection-buffer-size", self.connection_buffer_bytes),
            ("total-buffer-size", self.total_buffer_bytes),
        ):
            if value <= 0:
                raise ConfigError(name, f"{name} must be > 0, got {value}")
        for name, value in (
            ("max-concurrent-streams", self.max_concurrent_streams),
            ("max-header-list-size", self.max_header_list_bytes),
        ):
            # Peers are told, and a setting has 32 bits (RFC 9113, section 6.5.1).
            if value > _LARGEST_SETTING:
                raise ConfigError(name, f"{name} must be <= {_LARGEST_SETTING}, got {value}")
        if self.stall_timeout_s <= 0:
            raise ConfigError(
                "stall-timeout",
                f"stall-timeout must be > 0, got {format_seconds(self.stall_timeout_s)}",
            )
        if self.half_close_linger_s < 0:
            raise ConfigError(
                "half-close-linger",
                f"half-close-linger must be >= 0, got {format_seconds(self.half_close_linger_s)}",
            )


def parse_strategies(text: str) -> tuple[str, ...]:
    """Cut the value of ``--proxy-strategies`` into names, blank ones left out.

    Nothing but blanks stays one blank name, which :func:`check_strategies` tells from no value.
    """
    return tuple(filter(None, text.split(","))) or (("",) if text else ())


def check_strategies(names: tuple[str, ...]) -> None:
    """Check names of strategies as ``proxystrategies.ParseProxyStrategies`` does.

    Raises:
        ConfigError: if there is none, or one is unknown.
    """
    if not names:
        raise ConfigError("proxy-strategies", "ProxyStrategies cannot be empty")
    for name in names:
        if name not in STRATEGIES:
            problem = (
                f"unknown proxy strategy: {name}" if name else "proxy strategies cannot be empty"
            )
            raise ConfigError("proxy-strategies", f"invalid proxy strategies: {problem}")
