"""Notices connections whose peer is gone without a word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Never

import trio

if TYPE_CHECKING:
    from collections.abc import Collection

    from clusterproxy.http2.connection import Http2Connection

#: grpc-go's default for the answer to a keepalive PING.
TIMEOUT_S: Final = 20.0

#: Silence before a PING, and silence after it, between two ends that both are clusterproxy's.
BETWEEN_OURS: Final = (5.0, 10.0)

# How often connections are looked at: one task for all of them, so an idle one costs no task.
_LOOK_S: Final = 1.0


async def keep_alive(
    connections: Collection[Http2Connection], interval_s: float, timeout_s: float = TIMEOUT_S
) -> Never:
    """PING each connection that is silent for *interval_s*; end it *timeout_s* after one in vain.

    Cancellation: at any time.
    """
    while True:
        await trio.sleep(min(_LOOK_S, interval_s))
        now = trio.current_time()
        for connection in list(connections):
            connection.check_alive(now, interval_s, timeout_s)
