"""``clusterproxy service-proxy``: the flags of the original ``/cluster-proxy service-proxy``, and its program."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING, Final

from clusterproxy.service_proxy.config import ServiceProxyConfig

from .goflags import Flag, FlagSet, Parsed, flag_of
from .govalues import BOOL, DURATION, FLOAT32, INT, STRING, STRINGS, Kind
from .klog import LOG_FLAGS
from .program import run_program

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

_SUMMARY = "A http proxy server, receives http requests from proxy-agent and forwards to the target service."


def _parse_pair(text: str) -> tuple[tuple[str, str], ...]:
    """One entry of a map (k8s.io/component-base cli/flag, ``MapStringString`` with NoSplit)."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError("malformed pair, expect string=string")
    return ((key.strip(), value.strip()),)


def _show_pairs(value: tuple[tuple[str, str], ...]) -> str:
    return ",".join(f"{key}={text}" for key, text in value)


_PAIRS: Final = Kind("mapStringString", _parse_pair, _show_pairs, repeated=True)

_flag = partial(flag_of, ServiceProxyConfig)


def _flags() -> Iterator[Flag]:
    yield _flag("cert", STRING, "Certificate file of the HTTPS listener.")
    yield _flag("key", STRING, "Key file of the HTTPS listener.")
    yield _flag(
        "additional-service-ca",
        STRING,
        "File of more CAs that services' certificates come from. May be missing.",
    )
    yield _flag("hub-kubeconfig", STRING, "Kubeconfig file of the hub.")
    yield _flag("enable-impersonation", BOOL, "Let users of the hub in, by their tokens.")
    yield _flag(
        "token-review-cache-ttl",
        DURATION,
        "How long what an apiserver said of a token holds. 0 is no longer than those ask who wait for it.",
    )
    yield _flag("kube-api-qps", FLOAT32, "Most requests per second to each apiserver.")
    yield _flag("kube-api-burst", INT, "Most requests in a burst to each apiserver.")
    yield _flag(
        "max-idle-conns", INT, "Most connections to services that wait for their next request."
    )
    yield _flag(
        "idle-conn-timeout", DURATION, "How long a connection to a service may wait. 0 is no limit."
    )
    yield _flag(
        "tls-handshake-timeout",
        DURATION,
        "How long a TLS handshake with a service may take. 0 is no limit.",
    )
    yield _flag(
        "expect-continue-timeout",
        DURATION,
        "How long a body waits for the service to ask for it, if the client wants that.",
    )
    yield _flag("drain-timeout", DURATION, "How long requests may go on after SIGTERM, in all.")
    yield _flag(
        "min-drain-duration", DURATION, "How long the port stays open after SIGTERM at least."
    )
    yield from _oidc_flags()
    yield _flag(
        "hub-group-mapping",
        _PAIRS,
        "What a group of the hub is called here, GROUP=NAME; without a name it is left out. "
        "A * at the end of the group stands for any rest, and in the name for that rest. The first that fits counts.",
    )
    yield _flag(
        "authenticate-services",
        BOOL,
        "Ask for a token in requests to services, too, as in those to the apiserver.",
    )
    yield _flag(
        "kubeconfig", STRING, "Kubeconfig file of the cluster. Without it, the pod's own account."
    )
    yield _flag(
        "kube-api-address",
        STRING,
        "Where the cluster's apiserver is dialled, HOST:PORT, if its name cannot be looked up.",
    )
    yield _flag("bind-address", STRING, "Address of both ports. Empty is all.")
    yield _flag("port", INT, "Port for requests.")
    yield _flag("health-port", INT, "Port for health, readiness and metrics.")
    yield from LOG_FLAGS


def _oidc_flags() -> Iterator[Flag]:
    yield _flag(
        "oidc-issuer-url", STRING, "URL of the OIDC issuer whose ID tokens are taken, https."
    )
    yield _flag("oidc-client-id", STRING, "Client ID that ID tokens must be for.")
    yield _flag("oidc-username-claim", STRING, "Claim that has a user's name.")
    yield _flag(
        "oidc-username-prefix",
        STRING,
        "What is put before users' names. Empty is the issuer and '#' for claims other than email; '-' is nothing.",
    )
    yield _flag("oidc-groups-claim", STRING, "Claim that has a user's groups.")
    yield _flag("oidc-groups-prefix", STRING, "What is put before groups.")
    yield _flag(
        "oidc-reserved-name-prefixes",
        STRINGS,
        "Comma list of what users' names and groups must not begin with. Empty is nothing.",
    )
    yield _flag(
        "oidc-ca-configmap",
        STRING,
        "ConfigMap in POD_NAMESPACE with the issuer's CAs in ca.crt. Empty is the system's CAs.",
    )
    yield _flag(
        "oidc-signing-algs", STRINGS, "Comma list of algorithms that ID tokens may be signed with."
    )
    yield _flag(
        "oidc-required-claim",
        _PAIRS,
        "A claim that ID tokens must have with this value, CLAIM=VALUE. May be given several times.",
    )


def service_proxy_flags() -> FlagSet:
    """The flags of the service proxy."""
    return FlagSet("service-proxy", _SUMMARY, _flags())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the service proxy with the flags in *argv* (``sys.argv``) and return its exit status."""
    flags = service_proxy_flags()

    def build(parsed: Parsed) -> ServiceProxyConfig:
        return ServiceProxyConfig(
            **parsed.fields(flags),
            pod_namespace=os.environ.get("POD_NAMESPACE", ""),
            given=parsed.given,
        )

    def load() -> Callable[[ServiceProxyConfig], Awaitable[int]]:
        from clusterproxy.service_proxy.program import run_service_proxy

        return run_service_proxy

    return run_program(flags, "service-proxy options", build, load, argv)
