"""How much a line holds: its bandwidth-delay product, measured with PINGs. Pure."""

from __future__ import annotations

from typing import Final

# A window must hold more than what is under way: a batch is granted again only once it is dispatched,
# and a measurement, which begins with such a grant, sees the less of the window.
_FACTOR: Final = 3

# Between two measurements that change nothing, in seconds.
_REST_S: Final = 0.25


class Line:
    """What a connection's line holds, so that windows can grow where it is long.

    As grpc-go does (internal/transport/bdp_estimator.go), what arrives between a PING and its answer gives
    the rate. It is multiplied with the shortest round trip ever seen: the last one would also count
    what waits in queues, and windows that follow it make the queues longer.

    Attributes:
      size: the window in bytes that fills the line; 0 before the first measurement.
    """

    __slots__ = ("_begun", "_mark", "_measuring", "_next", "_rate", "_round_trip", "size")

    def __init__(self) -> None:
        self.size = 0
        self._begun = self._next = 0.0
        self._mark = 0
        self._measuring = False
        self._rate = 0.0
        self._round_trip = float("inf")

    def begin(self, received: int, now: float) -> bool:
        """Begin to measure at *received* bytes and *now* seconds; return whether to send a PING."""
        if self._measuring or now < self._next:
            return False
        self._measuring = True
        self._begun, self._mark = now, received
        return True

    def note_round_trip(self, seconds: float) -> None:
        """Note how long the answer to some PING took."""
        self._round_trip = min(self._round_trip, seconds)

    def end(self, received: int, now: float) -> None:
        """The PING was answered at *received* bytes and *now* seconds."""
        self._measuring = False
        elapsed = now - self._begun
        rate = (received - self._mark) / elapsed if elapsed > 0 else 0.0
        if rate > self._rate:
            self._rate = rate
        else:
            self._next = now + _REST_S
        self.size = int(_FACTOR * self._rate * min(self._round_trip, elapsed))
