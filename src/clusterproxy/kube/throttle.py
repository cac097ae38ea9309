"""How many calls a client may make."""

from __future__ import annotations

from typing import Final

import trio

# client-go's (rest/config.go: DefaultQPS, DefaultBurst); what 0 means to its flags.
_DEFAULT_QPS: Final = 5.0
_DEFAULT_BURST: Final = 10


class Throttle:
    """A token bucket on trio's clock; who comes first goes first.

    Args:
      qps: calls per second in the long run; 0 is client-go's default (5), less is no limit.
      burst: calls at once after a pause; 0 is client-go's default (10).
    """

    def __init__(self, qps: float, burst: int) -> None:
        self._interval = 0.0 if qps < 0 else 1 / (qps or _DEFAULT_QPS)
        self._burst = burst if burst > 0 else _DEFAULT_BURST
        # When the bucket is full again. Each call moves it on by one interval.
        self._full_at = 0.0

    async def wait(self) -> None:
        """Wait for one's turn.

        Cancellation: the turn is given back.
        """
        now = trio.current_time()
        start = max(self._full_at, now)
        self._full_at = start + self._interval
        turn = self._full_at - self._burst * self._interval
        if turn > now:
            try:
                await trio.sleep_until(turn)
            except trio.Cancelled:
                self._full_at -= self._interval
                raise
