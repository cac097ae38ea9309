"""How often it is somebody's turn: who makes much work does not keep others from theirs. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable


class Turns:
    """Turns of anybody, each of whom has some at once and then one after the other (a token bucket for each).

    Args:
      at_once: how many one has after a rest.
      seconds: between two of the rest.
    """

    def __init__(
        self, at_once: int, seconds: float, clock: Callable[[], float] = trio.current_time
    ) -> None:
        self._seconds = seconds
        self._ahead = (at_once - 1) * seconds
        self._clock = clock
        # When all that one has had will be made up for.
        self._due: dict[str, float] = {}

    def take(self, name: str) -> float:
        """Take a turn; return 0, or, if it is not one's turn, seconds until it is."""
        now = self._clock()
        due = max(self._due.get(name, now), now)
        wait = due - now - self._ahead
        if wait > 0:
            return wait
        self._due[name] = due + self._seconds
        return 0.0

    def forget(self, name: str) -> None:
        """Forget somebody who does not come any more."""
        self._due.pop(name, None)
