"""``proxy-server``: the flags of the original (``ProxyRunOptions.Flags``) and our own."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from clusterproxy.errors import ConfigError
from clusterproxy.gotext import quote
from clusterproxy.server.config import AGENT_IDENTITIES, ServerConfig, parse_strategies

from .goflags import Flag, FlagSet, Parsed, flag_of
from .govalues import BOOL, DURATION, FLOAT32, INT, STRING, STRINGS
from .klog import LOG_FLAGS
from .program import run_program

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

_SUMMARY = (
    "The konnectivity proxy server: takes requests from clients, such as the Kubernetes API "
    "server,\nand forwards them to the agents that have dialled it."
)

# A Deployment can say these also where the image may be Go's, which would not know the flags.
_ARRIVAL_TIMEOUT = "PROXY_SERVER_AGENT_ARRIVAL_TIMEOUT"
_AGENT_IDENTITY = "PROXY_SERVER_AGENT_IDENTITY"

_flag = partial(flag_of, ServerConfig)


def _flags(server_id: str, arrival_timeout_s: float, agent_identity: str) -> Iterator[Flag]:
    yield _flag("server-cert", STRING, "Certificate file for client connections.")
    yield _flag("server-key", STRING, "Key file for client connections.")
    yield _flag("server-ca-cert", STRING, "File of the CAs that clients' certificates come from.")
    yield _flag("cluster-cert", STRING, "Certificate file for agent connections.")
    yield _flag("cluster-key", STRING, "Key file for agent connections.")
    yield _flag("cluster-ca-cert", STRING, "File of the CAs that agents' certificates come from.")
    yield _flag("mode", STRING, "What clients speak: 'grpc' or 'http-connect'.")
    yield _flag("uds-name", STRING, "Unix socket for clients, instead of TCP.")
    yield _flag(
        "delete-existing-uds-file", BOOL, "Delete the file of the Unix socket if it is there."
    )
    yield _flag("server-port", INT, "Port for client connections. Must be 0 with --uds-name.")
    yield _flag("server-bind-address", STRING, "Address for client connections. Empty is all.")
    yield _flag("agent-port", INT, "Port for agent connections.")
    yield _flag("agent-bind-address", STRING, "Address for agent connections. Empty is all.")
    yield _flag("admin-port", INT, "Port for metrics and profiles.")
    yield _flag("admin-bind-address", STRING, "Address for metrics and profiles. Empty is all.")
    yield _flag("health-port", INT, "Port for health and readiness.")
    yield _flag("health-bind-address", STRING, "Address for health and readiness. Empty is all.")
    yield _flag("keepalive-time", DURATION, "An agent's connection idle so long gets a PING.")
    yield _flag(
        "frontend-keepalive-time", DURATION, "A client's connection idle so long gets a PING."
    )
    yield _flag("enable-profiling", BOOL, "Serve profiles at host:admin-port/debug/pprof.")
    yield _flag(
        "enable-contention-profiling", BOOL, "Profile contention. Needs --enable-profiling, too."
    )
    yield _flag(
        "server-id",
        STRING,
        "This server's unique ID. Without it, the environment's PROXY_SERVER_ID, then a UUID.",
        default=server_id,
    )
    yield _flag("server-count", INT, "Number of servers that agents are to connect to.")
    yield _flag("agent-namespace", STRING, "Namespace of agents that authenticate by token.")
    yield _flag(
        "agent-service-account", STRING, "Service account of agents that authenticate by token."
    )
    yield _flag(
        "authentication-audience", STRING, "Audience of tokens that agents authenticate by."
    )
    yield _flag(
        "kubeconfig",
        STRING,
        "Kubeconfig file for token reviews and leases. Without it, the pod's service account.",
    )
    yield _flag("kubeconfig-qps", FLOAT32, "Most requests per second to the Kubernetes API.")
    yield _flag("kubeconfig-burst", INT, "Most requests in a burst to the Kubernetes API.")
    yield _flag(
        "kube-api-content-type", STRING, "Content type of requests to the API.", no_effect=True
    )
    yield _flag(
        "proxy-strategies",
        STRING,
        "Comma list of ways to choose an agent, in order: default, destHost, defaultRoute.",
        default="default",
    )
    yield _flag("cipher-suites", STRINGS, "Comma list of cipher suites for TLS 1.2, by Go's names.")
    yield _flag(
        "tls-min-version", STRING, "VersionTLS12 (as empty) or VersionTLS13; lower ones are as 12."
    )
    yield _flag("xfr-channel-size", INT, "See --connection-buffer-size instead.", no_effect=True)
    yield _flag("enable-lease-controller", BOOL, "Publish a lease for this server.")
    yield _flag("lease-namespace", STRING, "Namespace of the servers' leases.")
    yield _flag("lease-label", STRING, "Labels of the servers' leases.")
    yield _flag(
        "graceful-shutdown-timeout",
        DURATION,
        "How long open connections may go on after SIGTERM. 0 ends them at once.",
    )
    yield _flag(
        "backend-dial-timeout",
        DURATION,
        "How long a dial may wait for the agent's answer. 0 is no limit.",
    )
    yield _flag(
        "agent-arrival-timeout",
        DURATION,
        "How long after the start dials wait for agents that are not connected yet. "
        f"Without it, the environment's {_ARRIVAL_TIMEOUT}.",
        default=arrival_timeout_s,
    )
    yield _flag(
        "agent-identity",
        STRING,
        "Whether agents may claim only what is of the cluster that their certificates name: 'off'; 'verify', where they "
        f"name one; or 'require', so that all must. Without it, the environment's {_AGENT_IDENTITY}.",
        default=agent_identity,
    )
    yield Flag(
        name="warn-on-channel-limit",
        kind=BOOL,
        default=True,
        usage="",
        no_effect=True,
        deprecated="This behavior is now thread safe and always on. "
        "This flag will be removed in a future release.",
    )
    yield _flag("max-handshakes", INT, "Most TLS handshakes at one time.")
    yield _flag("max-concurrent-streams", INT, "Most streams open on one HTTP/2 connection.")
    yield _flag(
        "max-header-list-size",
        INT,
        "Most bytes of a request's headers.",
        field="max_header_list_bytes",
    )
    yield _flag("max-message-size", INT, "Most bytes of a gRPC message.", field="max_message_bytes")
    yield _flag(
        "max-resets-per-second",
        INT,
        "Most streams that a peer may reset on one connection in a second.",
        field="max_resets_per_s",
    )
    yield _flag(
        "max-control-frames-per-second",
        INT,
        "Most HTTP/2 frames without data from a peer on one connection in a second.",
        field="max_control_frames_per_s",
    )
    yield _flag(
        "connection-buffer-size",
        INT,
        "Most bytes queued for one proxied connection.",
        field="connection_buffer_bytes",
    )
    yield _flag(
        "total-buffer-size",
        INT,
        "Most bytes queued for all proxied connections together.",
        field="total_buffer_bytes",
    )
    yield _flag(
        "stall-timeout",
        DURATION,
        "A full proxied connection that takes nothing for so long is closed.",
    )
    yield _flag(
        "half-close-linger",
        DURATION,
        "How long a service behind a Go agent may still answer a client that has ended its side.",
    )
    yield from LOG_FLAGS


def server_flags(
    server_id: str = "", arrival_timeout_s: float = 0.0, agent_identity: str = "off"
) -> FlagSet:
    """The flags of the proxy server; the arguments are defaults that the environment names."""
    return FlagSet("proxy-server", _SUMMARY, _flags(server_id, arrival_timeout_s, agent_identity))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proxy server with the flags in *argv* (``sys.argv``) and return its exit status."""
    arrival_timeout_s, problem = _arrival_timeout()
    agent_identity = os.environ.get(_AGENT_IDENTITY, "") or "off"
    flags = server_flags(os.environ.get("PROXY_SERVER_ID", ""), arrival_timeout_s, agent_identity)

    def build(parsed: Parsed) -> ServerConfig:
        if problem is not None and "agent-arrival-timeout" not in parsed.given:
            raise problem
        if agent_identity not in AGENT_IDENTITIES and "agent-identity" not in parsed.given:
            text = (
                f"the environment's {_AGENT_IDENTITY} must be one of {', '.join(AGENT_IDENTITIES)}"
            )
            raise ConfigError("agent-identity", f"{text}, not {quote(agent_identity)}")
        values = parsed.fields(flags)
        values["proxy_strategies"] = parse_strategies(values["proxy_strategies"])
        if not values["server_id"]:
            del values["server_id"]
        return ServerConfig(**values, given=parsed.given)

    def load() -> Callable[[ServerConfig], Awaitable[int]]:
        from clusterproxy.server.app import run_server

        return run_server

    return run_program(flags, "server options", build, load, argv)


def _arrival_timeout() -> tuple[float, ConfigError | None]:
    text = os.environ.get(_ARRIVAL_TIMEOUT, "")
    try:
        return DURATION.parse(text) if text else 0.0, None
    except ValueError as exc:
        message = f"invalid value {quote(text)} of the environment's {_ARRIVAL_TIMEOUT}: {exc}"
        return 0.0, ConfigError("agent-arrival-timeout", message)
