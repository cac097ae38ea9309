"""The client library: connections to services of managed clusters, through a proxy server."""

from __future__ import annotations

from clusterproxy.telemetry.client_metrics import ClientMetrics as ClientMetrics

from .access import ClientTLS as ClientTLS
from .access import Server as Server
from .forward import forward_stream as forward_stream
from .listener import serve_local as serve_local
from .opening import open_tunnel as open_tunnel
from .stream import HalfCloseableTunnelStream as HalfCloseableTunnelStream
from .stream import TunnelStream as TunnelStream
from .tunnel import Tunnel as Tunnel
