"""Questions that many ask at once and soon again: asked once, and the answer kept for a while."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Generic, TypeVar

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_K = TypeVar("_K")
_V = TypeVar("_V")

# Answers that are kept; anybody may ask about any token.
_MOST: Final = 10_000


@attrs.define(eq=False)
class _Flight(Generic[_V]):
    """A question under way. Without an answer at its end, who asked it has gone."""

    over: trio.Event = attrs.field(factory=trio.Event)
    answer: tuple[_V] | None = None
    error: Exception | None = None


class Lookups(Generic[_K, _V]):
    """Answers by what they are about.

    Args:
      ttl_s: how long an answer holds; 0 for none but those who ask meanwhile.
    """

    def __init__(self, ttl_s: float) -> None:
        self._ttl_s = ttl_s
        # With the time when it ends, the oldest first.
        self._kept: dict[_K, tuple[float, _V]] = {}
        self._flights: dict[_K, _Flight[_V]] = {}

    async def find(self, key: _K, ask: Callable[[], Awaitable[_V]]) -> _V:
        """Return the answer about *key*, by *ask* if it is not known.

        Raises:
          Exception: what *ask* raised, for all who waited for it; it is asked anew the next time.

        Cancellation: if others wait for the answer, one of them asks again.
        """
        while True:
            kept = self._kept.get(key)
            if kept is not None and trio.current_time() < kept[0]:
                return kept[1]
            flight = self._flights.get(key)
            if flight is None:
                return await self._ask(key, ask)
            await flight.over.wait()
            if flight.error is not None:
                # Each needs its own: a traceback grows where it is raised.
                raise type(flight.error)(*flight.error.args) from flight.error
            if flight.answer is not None:
                return flight.answer[0]

    async def _ask(self, key: _K, ask: Callable[[], Awaitable[_V]]) -> _V:
        flight = self._flights[key] = _Flight[_V]()
        try:
            answer = await ask()
        except Exception as error:
            flight.error = error
            raise
        else:
            flight.answer = (answer,)
            self._keep(key, answer)
            return answer
        finally:
            del self._flights[key]
            flight.over.set()

    def _keep(self, key: _K, answer: _V) -> None:
        if self._ttl_s <= 0:
            return
        now = trio.current_time()
        kept = self._kept
        kept.pop(key, None)
        kept[key] = (now + self._ttl_s, answer)
        while len(kept) > _MOST or next(iter(kept.values()))[0] <= now:
            del kept[next(iter(kept))]
