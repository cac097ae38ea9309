"""Dials of a server's first moments, when its agents are still on their way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from clusterproxy.tunnel.identifiers import destination_host

if TYPE_CHECKING:
    from clusterproxy.telemetry.server_metrics import ServerMetrics

    from .backend import Backend
    from .backends import BackendPool

# Dials that wait at one time; what each of them holds is bounded by MAX_ADDRESS.
_LIMIT: Final = 10_000


class Arrivals:
    """Holds dials until an agent for them connects, for some time after the start.

    Upstream answers "No agent available" at once. But in a rolling update clients find a new server as soon
    as agents do, or sooner, and all dials that it answers so are lost.

    Args:
      pool: tells of agents that connect, from now on.
      timeout_s: how long, from now on; 0 is not at all.
    """

    def __init__(self, pool: BackendPool, metrics: ServerMetrics, timeout_s: float) -> None:
        self._pool = pool
        self._metrics = metrics
        self._until = trio.current_time() + timeout_s if timeout_s else 0.0
        # One for each dial that waits.
        self._scopes: set[trio.CancelScope] = set()
        # By the host that is dialled, which is all that backends are chosen by.
        self._waiting: dict[str, trio.lowlevel.ParkingLot] = {}
        pool.on_add = self._look

    @property
    def open(self) -> bool:
        """Whether a dial without an agent may wait for one now."""
        return len(self._scopes) < _LIMIT and trio.current_time() < self._until

    def close(self) -> None:
        """Hold no dials any more, for no agent will come to a server that ends."""
        self._until = 0.0
        for scope in self._scopes:
            scope.cancel()

    async def choose(self, address: str) -> Backend | None:
        """Return a backend for a dialled address, or None: none has come in time, or too many wait.

        There is no checkpoint between the choice and the return.

        Cancellation: the client has left; this is counted as what it is, ``frontend_close``.
        """
        backend = self._pool.choose(address)
        if backend is not None or not self.open:
            return backend
        scope = trio.CancelScope(deadline=self._until)
        self._scopes.add(scope)
        self._metrics.pending_backend_dials.inc()
        try:
            with scope:
                while backend is None:
                    await self._agent(destination_host(address))
                    backend = self._pool.choose(address)
        except trio.Cancelled:
            self._metrics.dial_failure_count.labels("frontend_close").inc()
            raise
        finally:
            self._scopes.discard(scope)
            self._metrics.pending_backend_dials.dec()
        return backend

    async def _agent(self, host: str) -> None:
        lot = self._waiting.setdefault(host, trio.lowlevel.ParkingLot())
        try:
            await lot.park()
        finally:
            if not lot and self._waiting.get(host) is lot:
                del self._waiting[host]

    def _look(self, backend: Backend) -> None:
        """An agent has connected: wake the dials that it is for."""
        hosts = self._pool.reach(backend)
        for host in list(self._waiting) if hosts is None else hosts:
            if host in self._waiting:
                self._waiting[host].unpark_all()
