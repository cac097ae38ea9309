from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from clusterproxy.transport.stall import watch_stall
from clusterproxy.tunnel.budget import FLOOR, MIN_PROGRESS, Budget, Guard

if TYPE_CHECKING:
    from trio.testing import MockClock

TIMEOUT = 10.0


@attrs.define
class Consumer:
    """A queue with its guard, that is over its budget from the start."""

    queued: int = FLOOR + 1
    taken: int = 0
    given_up: list[float] = attrs.Factory(list)
    guard: Guard = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        budget = Budget(each=FLOOR, total=FLOOR)
        self.guard = Guard(self, budget, lambda _size: None, lambda _size: None)
        assert self.guard.update()

    def give_up(self) -> None:
        self.given_up.append(trio.current_time())

    async def take(self, size: int, every: float) -> None:
        """Take as fast as something comes."""
        while True:
            await trio.sleep(every)
            self.taken += size

    async def watch(self, *, for_at_most: float = 100) -> float:
        """Return after how many seconds the watch was over."""
        start = trio.current_time()
        with trio.move_on_after(for_at_most):
            await watch_stall(self.guard, TIMEOUT, self.give_up)
        return trio.current_time() - start


async def test_a_consumer_that_takes_nothing_is_given_up(autojump_clock: MockClock) -> None:
    consumer = Consumer()
    assert await consumer.watch() == pytest.approx(TIMEOUT)
    assert len(consumer.given_up) == 1


@pytest.mark.parametrize(
    ("size", "every", "stalls"),
    [
        (MIN_PROGRESS, 9.3, False),
        (MIN_PROGRESS // 10 + 1, 0.95, False),
        (MIN_PROGRESS // 10 - 100, 1.0, True),
        (100, 0.1, True),
    ],
)
async def test_slow_is_not_stalled(
    size: int, every: float, stalls: bool, autojump_clock: MockClock
) -> None:
    consumer = Consumer()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(consumer.take, size, every)
        await consumer.watch()
        nursery.cancel_scope.cancel()
    assert bool(consumer.given_up) == stalls


async def test_the_watch_ends_within_the_budget(autojump_clock: MockClock) -> None:
    consumer = Consumer()
    async with trio.open_nursery() as nursery:

        @nursery.start_soon
        async def _() -> None:
            await trio.sleep(9.7)
            consumer.queued = 0
            consumer.guard.update()

        assert await consumer.watch() == pytest.approx(TIMEOUT)
    assert not consumer.given_up
    # Over it again: another watch, which looks from then on.
    consumer.queued = FLOOR + 1
    assert consumer.guard.update()
    assert await consumer.watch() == pytest.approx(TIMEOUT)
    assert len(consumer.given_up) == 1


async def test_what_nobody_fetches_after_the_end_is_given_up(autojump_clock: MockClock) -> None:
    consumer = Consumer()
    consumer.guard.close()
    assert await consumer.watch() == pytest.approx(TIMEOUT)
    assert len(consumer.given_up) == 1


async def test_one_watch_at_a_time(autojump_clock: MockClock) -> None:
    consumer = Consumer()
    watches = 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(consumer.watch)
        # Back and over again between two looks, many times, and taking something each time.
        for _ in range(1000):
            await trio.sleep(0.03)
            consumer.taken += MIN_PROGRESS
            consumer.queued = 0
            watches += consumer.guard.update()
            consumer.queued = FLOOR + 1
            watches += consumer.guard.update()
        nursery.cancel_scope.cancel()
    assert watches == 1
    assert not consumer.given_up
