"""What all parts of one proxy agent share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs

if TYPE_CHECKING:
    from clusterproxy.telemetry.agent_metrics import AgentMetrics
    from clusterproxy.telemetry.cells import Cell
    from clusterproxy.tunnel.budget import Budget

    from .config import AgentConfig
    from .resolver import Resolver


class PacketCounters:
    """The cells that every DATA packet counts in, looked up once."""

    __slots__ = ("from_server", "to_server")

    def __init__(self, metrics: AgentMetrics) -> None:
        # Upstream's segments are named from the agent's point of view of the tunnel.
        self.to_server: Cell = metrics.stream_packets_total.labels("from_agent", "DATA")
        self.from_server: Cell = metrics.stream_packets_total.labels("to_agent", "DATA")


@attrs.define(kw_only=True)
class AgentState:
    """Configuration, metrics and the tables of one agent."""

    config: AgentConfig
    metrics: AgentMetrics
    budget: Budget
    resolver: Resolver
    data_packets: PacketCounters
    buffered_bytes: Cell = attrs.field(
        init=False,
        default=attrs.Factory(lambda self: self.metrics.buffered_bytes.labels(), takes_self=True),
    )
    #: When a dial or an open connection was last seen; what ends a drain.
    last_use: float = 0.0

    def note_buffered(self, size: int) -> None:
        """Count bytes that were put into a queue, or, negative, taken out of one."""
        self.budget.used += size
        self.buffered_bytes.value = self.budget.used

    def count_packet(self, segment: str, packet_type: str) -> None:
        self.metrics.stream_packets_total.labels(segment, packet_type).value += 1
