"""Open Cluster Management's Cluster Proxy: konnectivity proxy server, agent and client on trio.

The client library is here by its names (``clusterproxy.open_tunnel``); it is loaded when one of them is
used, so that the programs do not pay for it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clusterproxy.client import ClientMetrics as ClientMetrics
    from clusterproxy.client import ClientTLS as ClientTLS
    from clusterproxy.client import HalfCloseableTunnelStream as HalfCloseableTunnelStream
    from clusterproxy.client import Server as Server
    from clusterproxy.client import Tunnel as Tunnel
    from clusterproxy.client import TunnelStream as TunnelStream
    from clusterproxy.client import forward_stream as forward_stream
    from clusterproxy.client import open_tunnel as open_tunnel
    from clusterproxy.client import serve_local as serve_local
    from clusterproxy.errors import ClusterProxyError as ClusterProxyError
    from clusterproxy.errors import ConfigError as ConfigError
    from clusterproxy.errors import ConnectCause as ConnectCause
    from clusterproxy.errors import ConnectError as ConnectError
    from clusterproxy.errors import DialCause as DialCause
    from clusterproxy.errors import DialError as DialError
    from clusterproxy.errors import DialReason as DialReason
    from clusterproxy.errors import Hop as Hop

__version__ = "0.1.0"

_CLIENT = frozenset(
    (
        "ClientMetrics",
        "ClientTLS",
        "HalfCloseableTunnelStream",
        "Server",
        "Tunnel",
        "TunnelStream",
        "forward_stream",
        "open_tunnel",
        "serve_local",
    )
)
_ERRORS = frozenset(
    (
        "ClusterProxyError",
        "ConfigError",
        "ConnectCause",
        "ConnectError",
        "DialCause",
        "DialError",
        "DialReason",
        "Hop",
    )
)


def __getattr__(name: str) -> object:
    if name in _CLIENT:
        return getattr(import_module("clusterproxy.client"), name)
    if name in _ERRORS:
        return getattr(import_module("clusterproxy.errors"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | _CLIENT | _ERRORS)
