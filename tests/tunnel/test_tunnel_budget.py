from __future__ import annotations

import attrs
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from clusterproxy.tunnel.budget import FLOOR, MIN_PROGRESS, Budget, Guard, StallClock

KIB = 1024


@attrs.define
class FakeQueue:
    queued: int = 0
    taken: int = 0


class Source:
    """A queue, its guard, and how much of the source's credit is withheld."""

    def __init__(self, budget: Budget) -> None:
        self.queue = FakeQueue()
        self.held = 0
        self.watchers = 0
        self.closed = False
        self.guard = Guard(self.queue, budget, self.hold, self.release)

    def hold(self, size: int) -> None:
        assert size > 0
        self.held += size

    def release(self, size: int) -> None:
        assert size > 0
        self.held -= size

    def update(self) -> None:
        if self.guard.update():
            self.watchers += 1

    def queue_up(self, size: int) -> None:
        self.queue.queued = size
        self.update()


class GuardMachine(RuleBasedStateMachine):
    """Sources of one budget are filled, emptied, looked at, watched and closed."""

    @initialize(
        count=st.integers(1, 4), each=st.integers(0, 512 * KIB), total=st.integers(0, 1024 * KIB)
    )
    def start(self, count: int, each: int, total: int) -> None:
        self.budget = Budget(each=each, total=total)
        self.sources = [Source(self.budget) for _ in range(count)]

    def source(self, index: int) -> Source:
        return self.sources[index % len(self.sources)]

    def update(self, source: Source) -> None:
        """After a look exactly what is too much is held, and whoever is over is watched."""
        source.update()
        queued = source.queue.queued
        used = sum(other.queue.queued for other in self.sources)
        limit = max(FLOOR, min(self.budget.each, self.budget.total - used))
        assert source.held == (0 if source.closed else max(0, queued - limit))
        assert source.guard.over == (queued > limit)
        if queued > limit:
            assert source.watchers == 1

    @rule(index=st.integers(0, 3), size=st.integers(1, 300 * KIB))
    def put(self, index: int, size: int) -> None:
        source = self.source(index)
        source.queue.queued += size
        self.update(source)

    @rule(index=st.integers(0, 3), size=st.integers(1, 300 * KIB))
    def take(self, index: int, size: int) -> None:
        source = self.source(index)
        size = min(size, source.queue.queued)
        source.queue.queued -= size
        source.queue.taken += size
        assert (source.guard.queued, source.guard.taken) == (
            source.queue.queued,
            source.queue.taken,
        )
        self.update(source)

    @rule(index=st.integers(0, 3))
    def look(self, index: int) -> None:
        self.update(self.source(index))

    @rule(index=st.integers(0, 3))
    def watch(self, index: int) -> None:
        source = self.source(index)
        if source.watchers:
            over = source.guard.over
            assert source.guard.watch() == over
            source.watchers -= not over

    @rule(index=st.integers(0, 3))
    def close(self, index: int) -> None:
        source = self.source(index)
        source.closed = True
        source.guard.close()
        assert source.held == 0

    @rule(index=st.integers(0, 3))
    def discard(self, index: int) -> None:
        source = self.source(index)
        source.queue.queued = 0
        self.update(source)

    @invariant()
    def used_is_the_sum_of_what_is_queued(self) -> None:
        assert self.budget.used == sum(source.queue.queued for source in self.sources)
        assert self.budget.limit >= FLOOR

    @invariant()
    def no_more_is_held_than_is_queued(self) -> None:
        for source in self.sources:
            assert 0 <= source.held <= source.queue.queued
            assert not (source.closed and source.held)

    @invariant()
    def there_is_one_watcher_at_most(self) -> None:
        for source in self.sources:
            assert 0 <= source.watchers <= 1


TestGuards = GuardMachine.TestCase
TestGuards.settings = settings(max_examples=examples(100), stateful_step_count=40)


def test_many_queues_get_less_each() -> None:
    budget = Budget(each=1024 * KIB, total=2048 * KIB)
    assert budget.limit == 1024 * KIB
    first, second, last = sources = [Source(budget) for _ in range(3)]
    first.queue_up(800 * KIB)
    second.queue_up(800 * KIB)
    last.queue_up(400 * KIB)
    # 448 KiB were left when the second one came, the floor when the last one did.
    assert [source.held for source in sources] == [0, 352 * KIB, 336 * KIB]
    assert [source.watchers for source in sources] == [0, 1, 1]
    assert budget.limit == FLOOR
    # The first one has not moved, and is over because of the others: a look finds that.
    assert first.guard.over
    first.update()
    assert (first.held, first.watchers) == (800 * KIB - FLOOR, 1)
    # The last one is over because of the others, and goes on when they are done.
    first.queue_up(0)
    second.queue_up(0)
    assert not last.guard.over
    last.update()
    assert [source.held for source in sources] == [0, 0, 0]


def test_only_the_excess_is_held() -> None:
    """The source brings as much as the consumer takes: others may live on that."""
    source = Source(Budget(each=100 * KIB, total=1024 * KIB))
    source.queue_up(100 * KIB)
    assert (source.held, source.guard.over) == (0, False)
    for queued in (101, 300, 299, 150, 250, 101):
        source.queue_up(queued * KIB)
        assert source.held == (queued - 100) * KIB
    source.queue_up(100 * KIB)
    assert (source.held, source.guard.over) == (0, False)


def test_what_is_queued_counts_after_the_end_of_the_source() -> None:
    budget = Budget(each=100 * KIB, total=1024 * KIB)
    source = Source(budget)
    source.queue_up(150 * KIB)
    assert source.held == 50 * KIB
    source.guard.close()
    source.guard.close()
    # Who does not fetch it is still watched, but nothing is held any more.
    assert (source.held, budget.used, source.guard.over) == (0, 150 * KIB, True)
    assert source.guard.watch()
    source.queue_up(140 * KIB)
    assert (source.held, budget.used, source.guard.over) == (0, 140 * KIB, True)
    source.queue_up(0)
    assert (budget.used, source.guard.over) == (0, False)
    assert not source.guard.watch()
    # And it gets over it only now, by what others have queued.
    source.queue_up(FLOOR + 1)
    assert not source.guard.over
    budget.used += 1024 * KIB
    assert source.guard.update()
    assert source.held == 0


def test_a_watcher_is_asked_for_again_only_when_the_last_has_gone() -> None:
    source = Source(Budget(each=FLOOR, total=FLOOR))
    for _ in range(3):
        source.queue_up(FLOOR + 1)
        source.queue_up(0)
    assert source.watchers == 1
    assert not source.guard.watch()
    source.queue.queued = FLOOR + 1
    assert source.guard.update()
    assert not source.guard.update()
    assert source.guard.watch()


def test_a_consumer_that_takes_nothing_stalls_after_the_timeout() -> None:
    clock = StallClock(10, 100.0, 5)
    assert clock.interval == 0.5
    times = [100 + clock.interval * step for step in range(1, 25)]
    stalled = [now for now in times if clock.stalled(now, 5)]
    assert stalled[0] == pytest.approx(110)


@pytest.mark.parametrize(("each_second", "stalls"), [(MIN_PROGRESS // 10 + 1, False), (6000, True)])
def test_progress_is_measured_over_the_timeout(each_second: int, stalls: bool) -> None:
    clock = StallClock(10, 0.0, 0)
    assert stalls == any(clock.stalled(step / 2, step * each_second // 2) for step in range(1, 120))


def test_one_large_step_counts_for_one_timeout() -> None:
    clock = StallClock(10, 0.0, 0)
    taken = [0 if step < 10 else MIN_PROGRESS for step in range(1, 60)]
    stalled = [clock.stalled(step / 2, size) for step, size in enumerate(taken, 1)]
    # Taken at 5 s: at 15 s that is in the last 10 s no more.
    assert stalled.index(True) / 2 + 0.5 == pytest.approx(15, abs=0.51)


@given(
    st.floats(0.1, 100),
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 2 * MIN_PROGRESS)), max_size=60),
)
def test_the_samples_kept_are_enough(timeout: float, steps: list[tuple[float, int]]) -> None:
    clock = StallClock(timeout, 0.0, 0)
    now, taken = 0.0, 0
    samples = [(now, taken)]
    for wait, size in steps:
        now += wait
        taken += size
        samples.append((now, taken))
        start = now - timeout + clock.interval / 2
        old = [before for since, before in samples if since <= start]
        assert clock.stalled(now, taken) == (bool(old) and taken - old[-1] < MIN_PROGRESS)
