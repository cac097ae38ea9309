"""``clusterproxy controllers``: the flags of the original ``/cluster-proxy controllers``, and its program."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from clusterproxy.addon.config import ControllersConfig

from .goflags import Flag, FlagSet, Parsed, flag_of
from .govalues import BOOL, STRING
from .klog import LOG_FLAGS
from .program import run_program

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence

_SUMMARY = "Keeps the serving certificate of the service proxies, beside the user server."

_flag = partial(flag_of, ControllersConfig)


def _flags() -> Iterator[Flag]:
    yield _flag("metrics-addr", STRING, "Address of the metrics, HOST:PORT or :PORT; 0 is none.")
    yield _flag("health-probe-addr", STRING, "Address of health and readiness; 0 is none.")
    yield _flag(
        "enable-leader-election", BOOL, "Work only while holding the lease, of several replicas."
    )
    yield _flag("certificates-namespace", STRING, "Namespace of the certificate's secret.")
    yield _flag("signer-secret-name", STRING, "Name of the CA's secret.")
    yield _flag("signer-secret-namespace", STRING, "Namespace of the CA's secret.")
    yield _flag("agent-image", STRING, "Image of the add-on agent.", no_effect=True)
    yield _flag("kubeconfig", STRING, "Kubeconfig file. Without it, the pod's own account.")
    yield from LOG_FLAGS


def controllers_flags() -> FlagSet:
    """The flags of the controllers."""
    return FlagSet("controllers", _SUMMARY, _flags(), single_dash=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the controllers with the flags in *argv* (``sys.argv``) and return their exit status."""
    flags = controllers_flags()

    def build(parsed: Parsed) -> ControllersConfig:
        return ControllersConfig(
            **parsed.fields(flags),
            pod_namespace=os.environ.get("POD_NAMESPACE", ""),
            given=parsed.given,
        )

    def load() -> Callable[[ControllersConfig], Awaitable[int]]:
        from clusterproxy.addon.controllers import run_controllers

        return run_controllers

    return run_program(flags, "controllers options", build, load, argv)
