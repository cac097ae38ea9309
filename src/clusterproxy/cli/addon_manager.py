"""``clusterproxy addon-manager``: the flags of the original ``/manager``, and its program."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from clusterproxy.addon.config import ManagerConfig

from .goflags import Flag, FlagSet, Parsed, flag_of
from .govalues import BOOL, FLOAT32, INT, STRING
from .klog import LOG_FLAGS
from .program import run_program

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

_SUMMARY = (
    "The hub's manager of the add-on: keeps CA, certificates and proxy servers as a\n"
    "ManagedProxyConfiguration says."
)

_flag = partial(flag_of, ManagerConfig)


def _flags() -> Iterator[Flag]:
    yield _flag(
        "metrics-bind-address", STRING, "Address of the metrics, HOST:PORT or :PORT; 0 is none."
    )
    yield _flag("health-probe-bind-address", STRING, "Address of health and readiness; 0 is none.")
    yield _flag("leader-elect", BOOL, "Work only while holding the lease, of several replicas.")
    yield _flag("signer-secret-namespace", STRING, "Namespace of the CA's secret.")
    yield _flag("signer-secret-name", STRING, "Name of the CA's secret.")
    yield _flag("agent-image-name", STRING, "Image of the add-on agent and the service proxy.")
    yield _flag(
        "enable-kube-api-proxy", BOOL, "Make managed clusters' apiservers reachable by their names."
    )
    yield _flag("enable-service-proxy", BOOL, "Run a service proxy in managed clusters.")
    yield _flag("enable-network-policies", BOOL, "Restrict the agents' pods by network policies.")
    yield _flag(
        "agent-install-namespace", STRING, "Namespace of the agent if nothing else is configured."
    )
    yield _flag("image-pull-policy", STRING, "Pull policy of the proxy servers' image.")
    yield _flag("feature-gates", STRING, "Comma list of NAME=true or false. Known: ClusterProfile.")
    yield _flag("kubeconfig", STRING, "Kubeconfig file. Without it, the pod's own account.")
    yield _flag("kube-api-qps", FLOAT32, "Most requests per second to the apiserver.")
    yield _flag("kube-api-burst", INT, "Most requests in a burst to the apiserver.")
    yield from LOG_FLAGS


def manager_flags() -> FlagSet:
    """The flags of the manager."""
    return FlagSet("addon-manager", _SUMMARY, _flags(), single_dash=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the manager with the flags in *argv* (``sys.argv``) and return its exit status."""
    flags = manager_flags()

    def build(parsed: Parsed) -> ManagerConfig:
        return ManagerConfig(
            **parsed.fields(flags),
            pod_namespace=os.environ.get("POD_NAMESPACE", ""),
            given=parsed.given,
        )

    def load() -> Callable[[ManagerConfig], Awaitable[int]]:
        from clusterproxy.addon.manager import run_manager

        return run_manager

    return run_program(flags, "manager options", build, load, argv)
