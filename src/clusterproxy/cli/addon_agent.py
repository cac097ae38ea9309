"""``clusterproxy addon-agent``: the flags of the original ``/agent``, and its program."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from clusterproxy.addon_agent.config import AddonAgentConfig

from .goflags import Flag, FlagSet, Parsed, flag_of
from .govalues import BOOL, DURATION, INT, STRING
from .klog import LOG_FLAGS
from .program import run_program

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

_SUMMARY = (
    "The add-on agent of a managed cluster: keeps the add-on's lease while the proxy agent in its pod has a tunnel,\n"
    "and forwards that to the hub's proxy servers if they have no address of their own."
)

_flag = partial(flag_of, AddonAgentConfig)


def _flags() -> Iterator[Flag]:
    yield _flag(
        "hub-kubeconfig", STRING, "Kubeconfig file of the hub. Without it, the pod's own account."
    )
    yield _flag("cluster-name", STRING, "Name of the managed cluster.")
    yield _flag("proxy-server-namespace", STRING, "Namespace of the proxy servers on the hub.")
    yield _flag(
        "enable-port-forward-proxy",
        BOOL,
        "Listen on localhost and forward connections to proxy servers through the hub's apiserver.",
    )
    yield _flag(
        "enable-proxy-agent-health-check",
        BOOL,
        "Renew the lease only while the proxy agent is connected.",
    )
    yield _flag(
        "kubeconfig",
        STRING,
        "Kubeconfig file of the managed cluster. Without it, the pod's own account.",
    )
    yield _flag("port-forward-port", INT, "Port on localhost that is forwarded.")
    yield _flag(
        "proxy-server-port", INT, "Port of the proxy servers' pods that it is forwarded to."
    )
    yield _flag("health-probe-bind-address", STRING, "Address of health, HOST:PORT or :PORT.")
    yield _flag(
        "proxy-agent-health-address", STRING, "Address of the proxy agent's health, HOST:PORT."
    )
    yield _flag(
        "certificate-directory",
        STRING,
        "Directory of the proxy agent's tls.crt and tls.key, whose change fails one health probe.",
    )
    yield _flag("lease-interval", DURATION, "Time between renewals of the lease.")
    yield from LOG_FLAGS


def addon_agent_flags() -> FlagSet:
    """The flags of the add-on agent."""
    return FlagSet("addon-agent", _SUMMARY, _flags(), single_dash=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the add-on agent with the flags in *argv* (``sys.argv``) and return its exit status."""
    flags = addon_agent_flags()

    def build(parsed: Parsed) -> AddonAgentConfig:
        return AddonAgentConfig(
            **parsed.fields(flags),
            pod_namespace=os.environ.get("POD_NAMESPACE", ""),
            given=parsed.given,
        )

    def load() -> Callable[[AddonAgentConfig], Awaitable[int]]:
        from clusterproxy.addon_agent.app import run_addon_agent

        return run_addon_agent

    return run_program(flags, "add-on agent options", build, load, argv)
