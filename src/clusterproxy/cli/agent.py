"""``proxy-agent``: the flags of the original (``GrpcProxyAgentOptions.Flags``) and our own."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from clusterproxy.agent.config import AgentConfig

from .goflags import Flag, FlagSet, Parsed, flag_of
from .govalues import BOOL, DURATION, INT, STRING, STRINGS
from .klog import LOG_FLAGS
from .program import run_program

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

_SUMMARY = (
    "The konnectivity proxy agent: dials the proxy server and lets it reach services from here."
)

_PROXY_VARIABLES = ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy")

_flag = partial(flag_of, AgentConfig)


def _flags(agent_id: str) -> Iterator[Flag]:
    yield _flag("agent-cert", STRING, "Certificate file for connections to the server.")
    yield _flag("agent-key", STRING, "Key file for connections to the server.")
    yield _flag("ca-cert", STRING, "File of the CAs that the server's certificate comes from.")
    yield _flag(
        "proxy-server-host",
        STRING,
        "Host of the proxy server, or a comma list of hosts, each with or without a port.",
    )
    yield _flag("proxy-server-port", INT, "Port of the proxy server, where the host has none.")
    yield _flag(
        "alpn-proto",
        STRINGS,
        "Further ALPN protocols to offer, where the server shares its address with others.",
        field="alpn_protos",
    )
    yield _flag("health-server-host", STRING, "Address for health and readiness. Empty is all.")
    yield _flag("health-server-port", INT, "Port for health and readiness.")
    yield _flag("admin-bind-address", STRING, "Address for metrics and profiles. Empty is all.")
    yield _flag("admin-server-port", INT, "Port for metrics and profiles.")
    yield _flag("enable-profiling", BOOL, "Serve profiles at host:admin-server-port/debug/pprof.")
    yield _flag(
        "enable-contention-profiling", BOOL, "Profile contention. Needs --enable-profiling, too."
    )
    yield _flag(
        "agent-id",
        STRING,
        "This agent's unique ID. Without it, the environment's PROXY_AGENT_ID, then a UUID.",
        default=agent_id,
    )
    yield _flag(
        "agent-identifiers",
        STRING,
        "What the server may choose this agent by, like a URL's query: "
        "host=a&host=b&cidr=10.0.0.0/8&ipv4=10.0.0.1&ipv6=::1&default-route=true.",
    )
    yield _flag(
        "sync-interval", DURATION, "Time between looks for servers that are not connected yet."
    )
    yield _flag("sync-interval-cap", DURATION, "What that time grows to while a server is away.")
    yield _flag(
        "probe-interval",
        DURATION,
        "An ended connection is noticed at once, not by probes.",
        no_effect=True,
    )
    yield _flag("keepalive-time", DURATION, "A connection to the server idle so long gets a PING.")
    yield _flag(
        "service-account-token-path", STRING, "File of the token to authenticate by, if any."
    )
    yield _flag(
        "warn-on-channel-limit", BOOL, "There is no channel that could be full.", no_effect=True
    )
    yield _flag("sync-forever", BOOL, "Go on looking for servers when all are connected.")
    yield _flag("xfr-channel-size", INT, "See --connection-buffer-size instead.", no_effect=True)
    yield _flag("count-server-leases", BOOL, "Count servers by their leases.")
    yield _flag("lease-namespace", STRING, "Namespace of the servers' leases.")
    yield _flag("lease-label-selector", STRING, "Labels of the servers' leases.")
    yield Flag(
        name="lease-label",
        kind=STRING,
        default="",
        usage="",
        hidden=True,
        alias_of="lease-label-selector",
    )
    yield _flag(
        "server-count-source",
        STRING,
        "Which count of servers holds: 'default' (leases if counted, else the servers' word) "
        "or 'max' (the larger).",
    )
    yield _flag(
        "kubeconfig",
        STRING,
        "Kubeconfig file for the leases. Without it, the pod's service account.",
    )
    yield _flag(
        "kube-api-content-type", STRING, "Content type of requests to the API.", no_effect=True
    )
    yield _flag("max-message-size", INT, "Most bytes of a gRPC message.", field="max_message_bytes")
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
    yield _flag("dial-timeout", DURATION, "How long dialling a service may take, DNS included.")
    yield from LOG_FLAGS


def agent_flags(agent_id: str = "") -> FlagSet:
    """The flags of the proxy agent; *agent_id* is the default that the environment names."""
    return FlagSet("proxy-agent", _SUMMARY, _flags(agent_id))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the proxy agent with the flags in *argv* (``sys.argv``) and return its exit status."""
    flags = agent_flags(os.environ.get("PROXY_AGENT_ID", ""))

    def build(parsed: Parsed) -> AgentConfig:
        values = parsed.fields(flags)
        if not values["agent_id"]:
            del values["agent_id"]
        return AgentConfig(
            **values,
            given=parsed.given,
            proxy_environment={
                name: os.environ[name] for name in _PROXY_VARIABLES if name in os.environ
            },
        )

    def load() -> Callable[[AgentConfig], Awaitable[int]]:
        from clusterproxy.agent.app import run_agent

        return run_agent

    return run_program(flags, "agent options", build, load, argv)
