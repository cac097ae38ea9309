"""How a server that ends parts from its agents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Never

import trio

if TYPE_CHECKING:
    from collections.abc import Collection

    from clusterproxy.http2.connection import Http2Connection

    from .backend import Backend
    from .backends import BackendPool

# Clients may have opened streams before they heard of the end, and dial on them in a moment.
_LAST_DIALS_S: Final = 1.0

# Go agents keep open connections alive for so long, and no longer however long the grace is: the server that
# takes over holds dials for 20 s from its start on, which also have to cover what comes before the farewell
# (5 s of preStop), and an agent's look for another server (each second).
_PATIENCE_S: Final = 8.0

# How often agents are looked at: only at the end somebody wants to know whether a stream is idle.
_LOOK_S: Final = 0.1


async def take_leave(
    pool: BackendPool, clients: Collection[Http2Connection], grace_s: float
) -> Never:
    """Have agents go to other servers, and serve what is open for as long as they let us.

    Ours learn it by a graceful GOAWAY: they look for another server at once and keep their streams, so
    nothing that is open ends. A Go agent would drop its connection, with all that is open, and looks for
    another server only when its stream ends: that is ended as soon as nothing is open on it and no dial can
    come any more, after half of the grace or 8 s at the latest.

    Agents that come meanwhile are told as well: their connection was there, or on its way.

    Args:
      clients: their connections, which have been told before (:meth:`RpcServer.drain`).
      grace_s: until the server ends.

    Cancellation: at any time.
    """
    patience = min(grace_s / 2, _PATIENCE_S)
    begun = trio.current_time()
    told: set[Backend] = set()
    while True:
        waited = trio.current_time() - begun
        dialled_out = waited >= _LAST_DIALS_S and all(client.draining for client in clients)
        for backend in list(pool.backends):
            used = backend.connections or backend.dials
            if backend.extended:
                if backend not in told:
                    told.add(backend)
                    backend.call.connection.announce_end()
            elif waited >= patience or (dialled_out and not used):
                backend.part()
        await trio.sleep(_LOOK_S)
