"""How a server that ends parts from its agents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Collection

    from clusterproxy.http2.connection import Http2Connection

    from .backends import BackendPool

# Clients may have opened streams before they heard of the end, and dial on them in a moment.
_LAST_DIALS_S: Final = 1.0

# How often agents are looked at: only at the end somebody wants to know whether a stream is idle.
_LOOK_S: Final = 0.1


async def take_leave(
    pool: BackendPool, clients: Collection[Http2Connection], patience_s: float
) -> None:
    """Have agents go to other servers, and serve what is open for as long as they let us.

    Ours learn it by a graceful GOAWAY: they look for another server at once and keep their streams, so
    nothing that is open ends. A Go agent would drop its connection, with all that is open, and looks for
    another server only when its stream ends: that is ended as soon as nothing is open on it and no dial can
    come any more, after *patience_s* at the latest.

    Args:
      clients: their connections, which have been told before (:meth:`RpcServer.drain`).
    """
    for backend in pool.backends:
        if backend.extended:
            backend.call.connection.announce_end()
    begun = trio.current_time()
    while others := [backend for backend in pool.backends if not backend.extended]:
        waited = trio.current_time() - begun
        dialled_out = waited >= _LAST_DIALS_S and all(client.draining for client in clients)
        for backend in others:
            used = backend.connections or backend.dials
            if waited >= patience_s or (dialled_out and not used):
                backend.part()
        await trio.sleep(_LOOK_S)
