"""What the user server is told: one field per flag of ``/cluster-proxy user-server``, and ours."""

from __future__ import annotations

from typing import Final

import attrs

from clusterproxy.errors import ConfigError
from clusterproxy.gotext import format_seconds, quote

ENFORCE: Final = "enforce"
WARN: Final = "warn"

_LAST_PORT: Final = 65535


@attrs.frozen(kw_only=True)
class UserServerConfig:
    """What the user server is told. Building one checks nothing: :meth:`validate` does."""

    host: str = ""
    port: int = 0
    proxy_ca_cert: str = ""
    proxy_cert: str = ""
    proxy_key: str = ""
    server_cert: str = ""
    server_key: str = ""
    server_port: int = 0
    service_proxy_ca_cert: str = ""
    agent_install_namespace: str = "open-cluster-management-cluster-proxy"
    exposed_services_configmap: str = "cluster-proxy-exposed-services"
    exposed_services_mode: str = ENFORCE
    drain_timeout_s: float = 30.0
    min_drain_duration_s: float = 10.0
    health_port: int = 8000
    kubeconfig: str = ""
    log_format: str = "text"
    verbosity: int = 0

    pod_namespace: str = ""
    """Where the program runs: the list of services and the TLS profile are there."""
    given: frozenset[str] = frozenset()

    @property
    def denies(self) -> bool:
        """Whether what is not exposed is denied, and not only told of."""
        return self.exposed_services_mode == ENFORCE

    def validate(self) -> None:
        """Check as ``userServer.Validate`` does, in its order and words, then what it finds out later, and our own.

        Raises:
          ConfigError: for the first thing that is wrong.
        """
        self._check_drain()
        for name, missing in (
            ("server-cert", not self.server_cert),
            ("server-key", not self.server_key),
            ("server-port", not self.server_port),
            ("service-proxy-ca-cert", not self.service_proxy_ca_cert),
        ):
            if missing:
                raise ConfigError(name, f"the {name} is required")
        if not self.pod_namespace:
            raise ConfigError(
                "POD_NAMESPACE",
                "pod namespace is empty, please set the POD_NAMESPACE environment variable",
            )
        # Upstream finds these out with the first request, or does not say which one it is.
        for name, missing in (
            ("host", not self.host),
            ("port", not self.port),
            ("proxy-ca-cert", not self.proxy_ca_cert),
            ("exposed-services-configmap", not self.exposed_services_configmap),
        ):
            if missing:
                raise ConfigError(name, f"the {name} is required")
        if bool(self.proxy_cert) != bool(self.proxy_key):
            raise ConfigError(
                "proxy-key", "the proxy-cert and the proxy-key are only of use together"
            )
        for name, port in (
            ("port", self.port),
            ("server-port", self.server_port),
            ("health-port", self.health_port),
        ):
            if not 0 < port <= _LAST_PORT:
                raise ConfigError(name, f"--{name}: {port} is no port")
        if self.server_port == self.health_port:
            raise ConfigError("health-port", "--health-port and --server-port are the same")
        if self.exposed_services_mode not in {ENFORCE, WARN}:
            raise ConfigError(
                "exposed-services-mode",
                f"--exposed-services-mode: {quote(self.exposed_services_mode)} is neither {ENFORCE} nor {WARN}",
            )

    def _check_drain(self) -> None:
        for name, seconds in (
            ("drain-timeout", self.drain_timeout_s),
            ("min-drain-duration", self.min_drain_duration_s),
        ):
            if seconds < 0:
                raise ConfigError(
                    name, f"{name} must not be negative, got {format_seconds(seconds)}"
                )
        if self.min_drain_duration_s > self.drain_timeout_s:
            raise ConfigError(
                "min-drain-duration", "min-drain-duration must not exceed drain-timeout"
            )
