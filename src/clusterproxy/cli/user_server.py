"""``clusterproxy user-server``: the flags of the original ``/cluster-proxy user-server``, and its program."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from clusterproxy.user_server.config import UserServerConfig

from .goflags import Flag, FlagSet, Parsed, flag_of
from .govalues import DURATION, INT, STRING
from .klog import LOG_FLAGS
from .program import run_program

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

_SUMMARY = (
    "The hub's HTTPS server for users: passes requests for /CLUSTER/PATH through the tunnel to the\n"
    "service proxy of the cluster."
)

_flag = partial(flag_of, UserServerConfig)


def _flags() -> Iterator[Flag]:
    yield _flag("host", STRING, "Host of the proxy server.")
    yield _flag("port", INT, "Port of the proxy server.")
    yield _flag(
        "proxy-ca-cert", STRING, "File of the CAs that the proxy server's certificate comes from."
    )
    yield _flag("proxy-cert", STRING, "Certificate file for connections to the proxy server.")
    yield _flag("proxy-key", STRING, "Key file for connections to the proxy server.")
    yield _flag("server-cert", STRING, "Certificate file for users' connections.")
    yield _flag("server-key", STRING, "Key file for users' connections.")
    yield _flag("server-port", INT, "Port for users.")
    yield _flag(
        "service-proxy-ca-cert",
        STRING,
        "File of the CAs that the service proxies' certificate comes from.",
    )
    yield _flag("agent-install-namespace", STRING, "Namespace of the agents.", no_effect=True)
    yield _flag(
        "exposed-services-configmap",
        STRING,
        "Name of the ConfigMap with the services that users may reach.",
    )
    yield _flag(
        "exposed-services-mode",
        STRING,
        "What becomes of requests for other services: 'enforce' denies them, 'warn' only tells of them.",
    )
    yield _flag("drain-timeout", DURATION, "How long requests may go on after SIGTERM, in all.")
    yield _flag(
        "min-drain-duration",
        DURATION,
        "How long new connections are taken after SIGTERM, as part of it.",
    )
    yield _flag("health-port", INT, "Port for health, readiness and metrics.")
    yield _flag("kubeconfig", STRING, "Kubeconfig file. Without it, the pod's own account.")
    yield from LOG_FLAGS


def user_server_flags() -> FlagSet:
    """The flags of the user server."""
    return FlagSet("user-server", _SUMMARY, _flags())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the user server with the flags in *argv* (``sys.argv``) and return its exit status."""
    flags = user_server_flags()

    def build(parsed: Parsed) -> UserServerConfig:
        return UserServerConfig(
            **parsed.fields(flags),
            pod_namespace=os.environ.get("POD_NAMESPACE", ""),
            given=parsed.given,
        )

    def load() -> Callable[[UserServerConfig], Awaitable[int]]:
        from clusterproxy.user_server.program import run_user_server

        return run_user_server

    return run_program(flags, "user server options", build, load, argv)
