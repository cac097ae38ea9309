"""Tells of agents that are refused."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from clusterproxy.errors import RPCError
    from clusterproxy.telemetry.server_metrics import ServerMetrics

_log = logging.getLogger("clusterproxy.server")

# Longer ones are cut: they go into logs.
_MAX_REASON: Final = 1024
_MAX_AGENT_ID: Final = 256

# A warning for each source in so many seconds, and for so many sources.
_QUIET_S: Final = 5.0
_LOUD: Final = 100


class Refusals:
    """Notes which agents are refused, in no more warnings than somebody can read: anybody can cause one."""

    def __init__(self, metrics: ServerMetrics) -> None:
        self._metrics = metrics
        # When there was a warning about a source, the oldest first.
        self._warned: dict[str, float] = {}
        self._left_out = 0

    def note(self, reason: str, source: str, agent: str, error: RPCError) -> None:
        """Count a refusal, and warn of it unless there are too many.

        Args:
          reason: as the metric has it.
          source: where the agent comes from.
        """
        self._metrics.rejected_agents_total.labels(reason).inc()
        now = trio.current_time()
        warned = self._warned
        while warned and now - next(iter(warned.values())) >= _QUIET_S:
            del warned[next(iter(warned))]
        text = error.message[:_MAX_REASON]
        fields = {"agent_id": agent[:_MAX_AGENT_ID]}
        if source in warned or len(warned) >= _LOUD:
            self._left_out += 1
            _log.debug("agent refused: %s", text, extra=fields)
            return
        warned[source] = now
        more = f" (and {self._left_out} more)" if self._left_out else ""
        self._left_out = 0
        _log.warning("agent refused: %s%s", text, more, extra=fields)
