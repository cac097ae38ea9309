"""The agents that are connected, and the choice of one for a destination."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

from clusterproxy.tunnel.identifiers import destination_host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from clusterproxy.telemetry.server_metrics import ServerMetrics

    from .backend import Backend


class Strategy:
    """Backends under the keys that one proxy strategy files them under.

    The streams of one agent under one key are kept in the order in which they came: the oldest that is
    not draining is used, for an agent closes its younger duplicates.
    Source: pkg/server/backend_manager.go, desthost_backend_manager.go, default_route_backend_manager.go.
    """

    def __init__(
        self, name: str, keys: Callable[[Backend], Iterable[str]], *, by_host: bool
    ) -> None:
        self.name = name
        self.keys = keys
        self.by_host = by_host
        self._table: dict[str, dict[str, list[Backend]]] = {}

    def __len__(self) -> int:
        """What upstream counts as ready backends: the number of keys."""
        return len(self._table)

    def add(self, backend: Backend) -> None:
        for key in self.keys(backend):
            self._table.setdefault(key, {}).setdefault(backend.agent_id, []).append(backend)

    def remove(self, backend: Backend) -> None:
        for key in self.keys(backend):
            agents = self._table.get(key, {})
            streams = agents.get(backend.agent_id, [])
            if backend in streams:
                streams.remove(backend)
            if not streams:
                agents.pop(backend.agent_id, None)
            if not agents:
                self._table.pop(key, None)

    def choose(self, host: str) -> Backend | None:
        """Return a backend for *host*: any agent that has it, at random, draining ones last."""
        if self.by_host:
            agents = list(self._table.get(host, {}).values())
        else:
            agents = [streams for group in self._table.values() for streams in group.values()]
        if not agents:
            return None
        start = random.randrange(len(agents))  # noqa: S311  a choice, not a secret
        fallback: Backend | None = None
        for streams in agents[start:] + agents[:start]:
            for backend in streams:
                if not backend.draining:
                    return backend
            fallback = fallback or streams[0]
        return fallback


def _agent_id(backend: Backend) -> Iterable[str]:
    return (backend.agent_id,)


def _hosts(backend: Backend) -> Iterable[str]:
    return backend.identifiers.hosts


def _default_route(backend: Backend) -> Iterable[str]:
    return (backend.agent_id,) if backend.identifiers.default_route else ()


class BackendPool:
    """All backends of a server, under each of its strategies in turn.

    Attributes:
      on_add: called with each that comes.
    """

    def __init__(self, strategies: Iterable[str], metrics: ServerMetrics) -> None:
        makers = {
            "default": lambda: Strategy("default", _agent_id, by_host=False),
            "destHost": lambda: Strategy("destHost", _hosts, by_host=True),
            "defaultRoute": lambda: Strategy("defaultRoute", _default_route, by_host=False),
        }
        self._strategies = [makers[name]() for name in strategies]
        self._metrics = metrics
        self.backends: set[Backend] = set()
        self.on_add: Callable[[Backend], None] = lambda _: None
        self._count()

    @property
    def ready(self) -> bool:
        """Whether the first strategy has a backend (what ``/readyz`` tells)."""
        return len(self._strategies[0]) > 0

    def add(self, backend: Backend) -> None:
        self.backends.add(backend)
        for strategy in self._strategies:
            strategy.add(backend)
        self._count()
        self.on_add(backend)

    def remove(self, backend: Backend) -> None:
        """Take a backend out; it may be out already."""
        if backend not in self.backends:
            return
        self.backends.discard(backend)
        for strategy in self._strategies:
            strategy.remove(backend)
        self._count()

    def reach(self, backend: Backend) -> set[str] | None:
        """Return the hosts that a backend may be chosen for, or None: all."""
        hosts: set[str] = set()
        for strategy in self._strategies:
            keys = strategy.keys(backend)
            if strategy.by_host:
                hosts.update(keys)
            elif tuple(keys):
                return None
        return hosts

    def choose(self, address: str) -> Backend | None:
        """Return the backend for a dialled address, or None: "No agent available"."""
        host = destination_host(address)
        for strategy in self._strategies:
            backend = strategy.choose(host)
            if backend is not None:
                return backend
        return None

    def _count(self) -> None:
        for strategy in self._strategies:
            self._metrics.ready_backends.labels(strategy.name).set(len(strategy))
        self._metrics.ready_backend_connections.set(len(self._strategies[-1]))
