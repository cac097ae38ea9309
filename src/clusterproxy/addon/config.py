"""What the hub's programs are told: one field per flag of ``/manager`` and ``/cluster-proxy controllers``."""

from __future__ import annotations

from typing import Final

import attrs

from clusterproxy.errors import ConfigError
from clusterproxy.gotext import quote

_PULL_POLICIES: Final = ("Always", "IfNotPresent", "Never")

#: The gates that there are, and whether they are open by default.
FEATURE_GATES: Final = {"ClusterProfile": False}


@attrs.frozen
class BindAddress:
    """Where a port is opened; port 0 means that it is not."""

    host: str
    port: int


def parse_bind_address(flag: str, text: str) -> BindAddress:
    """Read ``HOST:PORT``, ``:PORT`` for all interfaces, or ``0`` for none, as controller-runtime does.

    Raises:
      ConfigError: for anything else.
    """
    if text in {"", "0"}:
        return BindAddress("", 0)
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65_536:
        raise ConfigError(flag, f"--{flag}: {quote(text)} is not HOST:PORT, :PORT or 0")
    return BindAddress(host.removeprefix("[").removesuffix("]"), int(port))


def parse_feature_gates(text: str) -> dict[str, bool]:
    """Read ``NAME=true,OTHER=false`` (k8s.io/component-base featuregate, ``Set``).

    Raises:
      ConfigError: for an unknown gate or another value.
    """
    gates = dict(FEATURE_GATES)
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = (part.strip() for part in entry.partition("="))
        if not equals:
            raise ConfigError("feature-gates", f"missing bool value for {name}")
        if value.lower() not in {"true", "false", "t", "f", "1", "0"}:
            raise ConfigError("feature-gates", f"invalid value of {name}={value}, must be a bool")
        switch = value.lower() in {"true", "t", "1"}
        if name in {"AllAlpha", "AllBeta"}:
            # All gates here are alpha. One that is named itself holds, wherever it stands.
            named = {part.partition("=")[0].strip() for part in text.split(",")}
            if name == "AllAlpha":
                gates.update({gate: switch for gate in FEATURE_GATES if gate not in named})
            continue
        if name not in FEATURE_GATES:
            known = ", ".join(sorted(FEATURE_GATES))
            raise ConfigError(
                "feature-gates", f"unrecognized feature gate: {name} (known: {known})"
            )
        gates[name] = switch
    return gates


def _check_positive_or_default(name: str, value: float) -> None:
    if value != value or value in {float("inf"), float("-inf")}:
        raise ConfigError(name, f"--{name} must be a number, got {value}")


def _check_given(values: dict[str, str]) -> None:
    """Check that flags have values."""
    for name, value in values.items():
        if not value:
            raise ConfigError(name, f"--{name} must not be empty")


def _check_ports(
    metrics: str, metrics_address: BindAddress, health: str, health_address: BindAddress
) -> None:
    """Check that the two ports of a program are two, if it has any."""
    if metrics_address.port and metrics_address == health_address:
        raise ConfigError(health, f"--{health} and --{metrics} are the same")


@attrs.frozen(kw_only=True)
class ManagerConfig:
    """What the manager is told. Nothing is read before :meth:`validate`."""

    metrics_bind_address: str = ":58080"
    health_probe_bind_address: str = ":58081"
    leader_elect: bool = False
    signer_secret_namespace: str = "default"
    signer_secret_name: str = "cluster-proxy-signer"
    agent_image_name: str = ""
    enable_kube_api_proxy: bool = True
    enable_service_proxy: bool = True
    enable_network_policies: bool = False
    agent_install_namespace: str = "open-cluster-management-cluster-proxy"
    image_pull_policy: str = "IfNotPresent"
    feature_gates: str = ""
    kubeconfig: str = ""
    # As OCM's own managers: a registration takes ten calls a cluster, and there may be hundreds at once.
    kube_api_qps: float = 50.0
    kube_api_burst: int = 100
    log_format: str = "text"
    verbosity: int = 0

    pod_namespace: str = ""
    """Where the program runs: the lease and the TLS profile are there."""
    given: frozenset[str] = frozenset()

    @property
    def metrics_address(self) -> BindAddress:
        return parse_bind_address("metrics-bind-address", self.metrics_bind_address)

    @property
    def health_address(self) -> BindAddress:
        return parse_bind_address("health-probe-bind-address", self.health_probe_bind_address)

    @property
    def gates(self) -> dict[str, bool]:
        return parse_feature_gates(self.feature_gates)

    def validate(self) -> None:
        """Check what can be checked without a cluster.

        Raises:
          ConfigError: for the first thing that is wrong.
        """
        if not self.pod_namespace:
            raise ConfigError(
                "POD_NAMESPACE", "POD_NAMESPACE must be set in the environment: where do I run?"
            )
        if self.image_pull_policy not in _PULL_POLICIES:
            known = ", ".join(_PULL_POLICIES)
            raise ConfigError(
                "image-pull-policy",
                f"--image-pull-policy: {quote(self.image_pull_policy)} is none of {known}",
            )
        _check_given(
            {
                "signer-secret-namespace": self.signer_secret_namespace,
                "signer-secret-name": self.signer_secret_name,
                "agent-install-namespace": self.agent_install_namespace,
            }
        )
        _check_ports(
            "metrics-bind-address",
            self.metrics_address,
            "health-probe-bind-address",
            self.health_address,
        )
        _check_positive_or_default("kube-api-qps", self.kube_api_qps)
        _ = self.gates


@attrs.frozen(kw_only=True)
class ControllersConfig:
    """What ``controllers`` is told, which issues the service proxies' serving certificate."""

    metrics_addr: str = ":8080"
    health_probe_addr: str = ":8081"
    enable_leader_election: bool = False
    certificates_namespace: str = "default"
    signer_secret_name: str = "cluster-proxy-signer"
    signer_secret_namespace: str = "default"
    agent_image: str = ""
    kubeconfig: str = ""
    log_format: str = "text"
    verbosity: int = 0

    pod_namespace: str = ""
    given: frozenset[str] = frozenset()

    @property
    def metrics_address(self) -> BindAddress:
        return parse_bind_address("metrics-addr", self.metrics_addr)

    @property
    def health_address(self) -> BindAddress:
        return parse_bind_address("health-probe-addr", self.health_probe_addr)

    def validate(self) -> None:
        """Check what can be checked without a cluster.

        Raises:
          ConfigError: for the first thing that is wrong.
        """
        _check_given(
            {
                "certificates-namespace": self.certificates_namespace,
                "signer-secret-name": self.signer_secret_name,
                "signer-secret-namespace": self.signer_secret_namespace,
            }
        )
        _check_ports("metrics-addr", self.metrics_address, "health-probe-addr", self.health_address)
