"""What the add-on agent is told: one field per flag of ``/agent``, and ours."""

from __future__ import annotations

import re
from typing import Final

import attrs

from clusterproxy.errors import ConfigError
from clusterproxy.gotext import quote

_ADDRESS: Final = re.compile(
    r"(?:\[(?P<host6>[^\[\]]+)\]|(?P<host>[^:\[\]]*)):(?P<port>[0-9]{1,5})"
)


def _parse_address(flag: str, text: str) -> tuple[str, int]:
    match = _ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match["port"]) < 65_536:
        raise ConfigError(flag, f"--{flag}: {quote(text)} is not HOST:PORT or :PORT")
    return match["host6"] or match["host"], int(match["port"])


@attrs.frozen(kw_only=True)
class AddonAgentConfig:
    """What the add-on agent is told. Nothing is read before :meth:`validate`."""

    hub_kubeconfig: str = ""
    cluster_name: str = ""
    proxy_server_namespace: str = "open-cluster-management-addon"
    enable_port_forward_proxy: bool = False
    enable_proxy_agent_health_check: bool = True
    kubeconfig: str = ""
    port_forward_port: int = 8091
    proxy_server_port: int = 8091
    health_probe_bind_address: str = ":8888"
    proxy_agent_health_address: str = "localhost:8093"
    certificate_directory: str = "/etc/tls"
    lease_interval_s: float = 60.0
    log_format: str = "text"
    verbosity: int = 0

    pod_namespace: str = ""
    """Where the program runs: the lease is there."""
    given: frozenset[str] = frozenset()

    @property
    def health_address(self) -> tuple[str, int]:
        return _parse_address("health-probe-bind-address", self.health_probe_bind_address)

    @property
    def proxy_agent_address(self) -> tuple[str, int]:
        host, port = _parse_address("proxy-agent-health-address", self.proxy_agent_health_address)
        return host or "localhost", port

    def validate(self) -> None:
        """Check what can be checked without a cluster.

        Raises:
          ConfigError: for the first thing that is wrong.
        """
        if not self.pod_namespace:
            raise ConfigError(
                "POD_NAMESPACE",
                "POD_NAMESPACE must be set in the environment: the lease is in the namespace of the pod",
            )
        for name, port in (
            ("port-forward-port", self.port_forward_port),
            ("proxy-server-port", self.proxy_server_port),
        ):
            if not 0 < port < 65_536:
                raise ConfigError(name, f"--{name} must be between 1 and 65535, got {port}")
        if self.lease_interval_s <= 0:
            raise ConfigError("lease-interval", "--lease-interval must be greater than 0")
        if self.enable_port_forward_proxy and not self.proxy_server_namespace:
            raise ConfigError(
                "proxy-server-namespace",
                "--proxy-server-namespace must not be empty with --enable-port-forward-proxy",
            )
        _ = self.health_address, self.proxy_agent_address
