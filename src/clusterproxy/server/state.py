"""What all parts of one proxy server share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import attrs

from .arrivals import Arrivals

if TYPE_CHECKING:
    from clusterproxy.telemetry.cells import Cell
    from clusterproxy.telemetry.server_metrics import ServerMetrics
    from clusterproxy.tunnel.budget import Budget

    from .backends import BackendPool
    from .config import ServerConfig
    from .connection import Connection

# "No limit" of --backend-dial-timeout.
_FOR_EVER: Final = float("inf")


class PacketCounters:
    """The cells that every DATA packet counts in, looked up once."""

    __slots__ = ("from_agent", "from_client", "to_agent", "to_client")

    def __init__(self, metrics: ServerMetrics) -> None:
        def cell(segment: str) -> Cell:
            return metrics.stream_packets_total.labels(segment, "DATA")

        self.from_client = cell("from_client")
        self.to_client = cell("to_client")
        self.from_agent = cell("from_agent")
        self.to_agent = cell("to_agent")


@attrs.define(kw_only=True)
class ServerState:
    """Configuration, metrics and the tables of one server."""

    config: ServerConfig
    metrics: ServerMetrics
    pool: BackendPool
    budget: Budget
    data_packets: PacketCounters
    buffered_bytes: Cell = attrs.field(
        init=False,
        default=attrs.Factory(lambda self: self.metrics.buffered_bytes.labels(), takes_self=True),
    )

    #: Where dials may wait for agents that this server, just started, does not have yet.
    arrivals: Arrivals = attrs.field(
        init=False,
        default=attrs.Factory(
            lambda self: Arrivals(self.pool, self.metrics, self.config.agent_arrival_timeout_s),
            takes_self=True,
        ),
    )

    #: Connections with something that waits for their clients.
    queued: set[Connection] = attrs.field(init=False, factory=set["Connection"])

    def note_buffered(self, size: int) -> None:
        """Count bytes that were put into a queue, or, negative, taken out of one."""
        self.budget.used += size
        self.buffered_bytes.value = self.budget.used

    def note_queued(self, connection: Connection) -> None:
        """Note whether something waits for a connection's client."""
        self.buffered_bytes.value = self.budget.used
        if connection.guard.queued:
            self.queued.add(connection)
        else:
            self.queued.discard(connection)

    def look_at_queues(self) -> None:
        """Hold queues at rest against their budget, which shrinks as others grow."""
        for connection in list(self.queued):
            connection.note_queue()

    @property
    def dial_timeout_s(self) -> float:
        return self.config.backend_dial_timeout_s or _FOR_EVER

    def count_packet(self, segment: str, packet_type: str) -> None:
        self.metrics.stream_packets_total.labels(segment, packet_type).value += 1

    def count_dial_failure(self, reason: str) -> None:
        self.metrics.dial_failure_count.labels(reason).value += 1

    def reject(self, segment: str, reason: str) -> None:
        """Count a packet that was refused."""
        self.metrics.rejected_packets_total.labels(segment, reason).value += 1
