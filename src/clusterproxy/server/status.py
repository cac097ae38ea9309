"""What a server is doing now: its agents and connections as JSON, at ``/status`` of the admin port.

All figures are counters that the data path keeps anyway. ``docs/cli.md`` says what each one means.
"""

from __future__ import annotations

import heapq
import json
from typing import TYPE_CHECKING, Any

import trio

from clusterproxy import __version__
from clusterproxy.http1 import Request, Response

if TYPE_CHECKING:
    from collections.abc import Callable

    from .backend import Backend
    from .connection import Connection
    from .state import ServerState

JSON = "application/json"


def status_route(
    state: ServerState, ready: Callable[[], tuple[bool, str]]
) -> Callable[[Request], Response]:
    """Return what answers ``GET /status``; with ``?top=N`` it lists the N busiest connections only.

    *ready* is what ``/readyz`` tells.
    """
    began = trio.current_time()

    def route(request: Request) -> Response:
        top = request.query.get("top", [""])[-1]
        if top and not (top.isascii() and top.isdecimal()):
            return Response.text(f"top must be a number, not {top[:80]!r}\n", 400)
        document = snapshot(state, top=int(top) if top else None)
        is_ready, reason = ready()
        document["server"] |= {
            "uptime_s": trio.current_time() - began,
            "ready": is_ready,
            "reason": "" if is_ready else reason,
        }
        return Response(200, json.dumps(document).encode() + b"\n", JSON)

    return route


def snapshot(state: ServerState, *, top: int | None = None) -> dict[str, Any]:
    """Return the agents and connections of a server, and totals of them all.

    With *top* only so many connections are listed: those with most bytes waiting, then those that have moved most.
    """
    agents = sorted(state.pool.backends, key=lambda backend: backend.agent_id)
    open_ones = [one for backend in agents for one in backend.connections.values()]
    listed = open_ones if top is None else heapq.nlargest(top, open_ones, key=_weight)
    rows = [_agent(backend) for backend in agents]
    totals = {
        name: sum(row[name] for row in rows)
        for name in (
            "connections",
            "pending_dials",
            "bytes_to_agent",
            "bytes_to_client",
            "queued_to_agent",
            "queued_to_client",
        )
    }
    config = state.config
    return {
        "server": {"id": config.server_id, "version": __version__, "mode": config.mode},
        "totals": {"agents": len(agents), **totals, "buffered_bytes": state.budget.used},
        "agents": rows,
        "connections": [_connection(one) for one in listed],
    }


def _weight(connection: Connection) -> tuple[int, int]:
    waiting = connection.to_agent.queued + connection.guard.queued
    return waiting, connection.to_agent.taken + _to_client(connection)


def _to_client(connection: Connection) -> int:
    # What a CONNECT client's kernel has not taken yet is counted off, of Unix sockets more than was sent.
    return max(0, connection.guard.taken)


def _agent(backend: Backend) -> dict[str, Any]:
    identifiers = backend.identifiers
    connections = backend.connections.values()
    return {
        "id": backend.agent_id,
        "identifiers": [*identifiers.hosts, *(["default-route"] * identifiers.default_route)],
        "age_s": trio.current_time() - backend.started,
        "draining": backend.draining,
        "extended": backend.extended,
        "connections": len(connections),
        "pending_dials": len(backend.dials),
        "bytes_to_agent": sum(one.to_agent.taken for one in connections),
        "bytes_to_client": sum(map(_to_client, connections)),
        "queued_to_agent": sum(one.to_agent.queued for one in connections),
        "queued_to_client": sum(one.guard.queued for one in connections),
    }


def _connection(connection: Connection) -> dict[str, Any]:
    return {
        "agent": connection.backend.agent_id,
        "id": connection.connect_id,
        "destination": connection.address,
        "age_s": trio.current_time() - connection.started,
        "bytes_to_agent": connection.to_agent.taken,
        "bytes_to_client": _to_client(connection),
        "queued_to_agent": connection.to_agent.queued,
        "queued_to_client": connection.guard.queued,
        "over_budget": connection.guard.over,
        "closing": connection.closing,
    }
