"""What the service proxy is told: one field per flag of ``/cluster-proxy service-proxy``, and ours."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Final

import attrs

from clusterproxy.errors import ConfigError
from clusterproxy.gotext import format_seconds, quote

from .identity import GroupMapping
from .oidc_claims import OidcConfig

_LAST_PORT: Final = 65_535

_OIDC_DEFAULTS: Final = OidcConfig()


@attrs.frozen(kw_only=True)
class ServiceProxyConfig:
    """What the service proxy is told. Building one checks nothing: :meth:`validate` does."""

    cert: str = ""
    key: str = ""
    additional_service_ca: str = ""
    hub_kubeconfig: str = ""
    enable_impersonation: bool = True
    token_review_cache_ttl_s: float = 10.0
    kube_api_qps: float = 50.0
    kube_api_burst: int = 100
    max_idle_conns: int = 100
    idle_conn_timeout_s: float = 90.0
    tls_handshake_timeout_s: float = 10.0
    expect_continue_timeout_s: float = 1.0
    drain_timeout_s: float = 30.0
    min_drain_duration_s: float = 10.0
    oidc_issuer_url: str = ""
    oidc_client_id: str = ""
    oidc_username_claim: str = _OIDC_DEFAULTS.username_claim
    oidc_username_prefix: str = ""
    oidc_groups_claim: str = ""
    oidc_groups_prefix: str = ""
    oidc_reserved_name_prefixes: tuple[str, ...] = _OIDC_DEFAULTS.reserved_name_prefixes
    oidc_ca_configmap: str = ""
    oidc_signing_algs: tuple[str, ...] = _OIDC_DEFAULTS.signing_algs
    oidc_required_claim: tuple[tuple[str, str], ...] = ()
    hub_group_mapping: tuple[tuple[str, str], ...] = ()
    authenticate_services: bool = False
    kubeconfig: str = ""
    kube_api_address: str = ""
    bind_address: str = ""
    port: int = 7443
    health_port: int = 8000
    log_format: str = "text"
    verbosity: int = 0

    pod_namespace: str = ""
    """Where the program runs: the TLS profile and the authorities of the OIDC issuer are there."""
    service_account: str = "/var/run/secrets/kubernetes.io/serviceaccount"
    """The folder with the pod's own token, and the authority of the cluster's apiserver."""
    given: frozenset[str] = frozenset()

    @property
    def oidc(self) -> OidcConfig | None:
        """What ID tokens have to be like, None if there is no issuer."""
        if not self.oidc_issuer_url:
            return None
        return OidcConfig(
            issuer_url=self.oidc_issuer_url,
            client_id=self.oidc_client_id,
            username_claim=self.oidc_username_claim,
            username_prefix=self.oidc_username_prefix,
            groups_claim=self.oidc_groups_claim,
            groups_prefix=self.oidc_groups_prefix,
            reserved_name_prefixes=self.oidc_reserved_name_prefixes,
            signing_algs=self.oidc_signing_algs,
            # The last word about a claim counts, as in a map.
            required_claims=tuple(dict(self.oidc_required_claim).items()),
        )

    @property
    def groups(self) -> GroupMapping:
        """What the hub's groups are called here."""
        return GroupMapping(self.hub_group_mapping)

    @property
    def token_file(self) -> str:
        """The file with the pod's own token."""
        return str(PurePosixPath(self.service_account, "token"))

    @property
    def root_ca(self) -> str:
        """The file with the authority of the cluster's apiserver."""
        return str(PurePosixPath(self.service_account, "ca.crt"))

    @property
    def apiserver(self) -> tuple[str, int] | None:
        """Where the apiserver is dialled, None for where its name leads to."""
        if not self.kube_api_address:
            return None
        host, _, port = self.kube_api_address.rpartition(":")
        return host.removeprefix("[").removesuffix("]"), int(port)

    def validate(self) -> None:
        """Check as ``serviceProxy.validate`` does, in its order and words, then what it finds out later, and our own.

        Raises:
          ConfigError: for the first thing that is wrong.
        """
        self._check_drain()
        for name, missing in (("cert", not self.cert), ("key", not self.key)):
            if missing:
                raise ConfigError(name, f"{name} is required")
        self._check_oidc()
        if not self.pod_namespace:
            raise ConfigError(
                "POD_NAMESPACE",
                "pod namespace is empty, please set the POD_NAMESPACE environment variable",
            )
        if self.enable_impersonation and not self.hub_kubeconfig:
            # Upstream takes the cluster's own apiserver for the hub.
            raise ConfigError(
                "hub-kubeconfig", "--hub-kubeconfig is required with --enable-impersonation"
            )
        self._check_numbers()
        self._check_own()

    def _check_drain(self) -> None:
        for name, seconds in (
            ("drain-timeout", self.drain_timeout_s),
            ("min-drain-duration", self.min_drain_duration_s),
        ):
            if seconds < 0:
                raise ConfigError(name, f"{name} must not be negative")
        if self.min_drain_duration_s > self.drain_timeout_s:
            raise ConfigError(
                "min-drain-duration", "min-drain-duration must not exceed drain-timeout"
            )

    def _check_oidc(self) -> None:
        config = self.oidc
        if config is not None:
            config.validate()
            return
        if self.oidc_client_id:
            raise ConfigError(
                "oidc-issuer-url",
                "--oidc-issuer-url and --oidc-client-id must be specified together",
            )
        fields = attrs.fields_dict(ServiceProxyConfig)
        for name, field in fields.items():
            if name.startswith("oidc_") and getattr(self, name) != field.default:
                flag = name.replace("_", "-")
                raise ConfigError(
                    flag, f"--{flag} is of no use without --oidc-issuer-url and --oidc-client-id"
                )

    def _check_numbers(self) -> None:
        for name, number in (
            ("max-idle-conns", self.max_idle_conns),
            ("idle-conn-timeout", self.idle_conn_timeout_s),
            ("tls-handshake-timeout", self.tls_handshake_timeout_s),
            ("expect-continue-timeout", self.expect_continue_timeout_s),
        ):
            if number < 0:
                shown = format_seconds(number) if isinstance(number, float) else number
                raise ConfigError(name, f"--{name} must not be negative, got {shown}")
        if self.kube_api_qps != self.kube_api_qps or self.kube_api_qps == float("inf"):
            raise ConfigError(
                "kube-api-qps", f"--kube-api-qps must be a number, got {self.kube_api_qps}"
            )

    def _check_own(self) -> None:
        for name, port in (("port", self.port), ("health-port", self.health_port)):
            if not 0 < port <= _LAST_PORT:
                raise ConfigError(name, f"--{name}: {port} is no port")
        if self.port == self.health_port:
            raise ConfigError("health-port", "--health-port and --port are the same")
        address = self.kube_api_address
        host, _, digits = address.rpartition(":")
        if address and not (host and digits.isdecimal() and 0 < int(digits) <= _LAST_PORT):
            raise ConfigError(
                "kube-api-address", f"--kube-api-address: {quote(address)} is not HOST:PORT"
            )
        for pattern, becomes in self.hub_group_mapping:
            if not pattern or "*" in pattern[:-1]:
                raise ConfigError(
                    "hub-group-mapping",
                    f"--hub-group-mapping: {quote(pattern)} is no group, or has a * before its end",
                )
            if "*" in becomes and not pattern.endswith("*"):
                raise ConfigError(
                    "hub-group-mapping",
                    f"--hub-group-mapping: {quote(pattern)} has no * for that of {quote(becomes)}",
                )
